"""Per-example memory: what a stateful loss remembers about each example of the training set."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from telos.losses._checks import check_integer, check_shape, values_can_be_read
from telos.losses._distributed import gather_padded, gather_sizes, is_distributed


def log_ema(log_old: Tensor, log_new: Tensor, gamma: float | Tensor) -> Tensor:
    """``log((1 - gamma) * old + gamma * new)`` from logarithms, so that neither can overflow.

    ``log_old`` may be minus infinity (nothing remembered); gamma = 1 forgets the old value entirely.
    """
    gamma = torch.as_tensor(gamma, dtype=log_new.dtype, device=log_new.device)
    return torch.logaddexp(torch.log1p(-gamma) + log_old, gamma.log() + log_new)


class SampleMemory(nn.Module):
    """Named numbers for each example of a training set, addressed by the data set's own sample index.

    The numbers live in float32 (or float64 if asked) buffers whatever the dtype of the module around them, and
    ``state_dict`` saves them. ``write`` is called by a loss only while it trains. Where an index occurs several times in
    a batch its contributions are averaged; where several ranks train, each write exchanges (index, value) pairs so that
    every rank holds the same memory. Keep such a loss outside the module that DistributedDataParallel wraps: a broadcast
    of buffers would only repeat that work.

    Args:
        num_examples: number of examples N in the training set.
        initial: value of every entry before its first write, by name.
        logarithms: names that hold logarithms; their contributions are averaged before the logarithm.
        dtype: of the buffers.

    Example:
        >>> import torch
        >>> memory = SampleMemory(4, initial={"temperature": 0.1})
        >>> memory.write(torch.tensor([2, 2]), temperature=torch.tensor([0.2, 0.4]))
        >>> memory.temperature
        tensor([0.1000, 0.1000, 0.3000, 0.1000])
        >>> memory.seen
        tensor([False, False,  True, False])
    """

    seen: Tensor

    def __init__(
        self,
        num_examples: int,
        initial: dict[str, float],
        logarithms: tuple[str, ...] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {num_examples}")
        self.num_examples = num_examples
        self.names = tuple(initial)
        self.logarithms = logarithms
        for name, value in initial.items():
            self.register_buffer(name, torch.full((num_examples,), value, dtype=dtype))
        self.register_buffer("seen", torch.zeros(num_examples, dtype=torch.bool))

    def check(self, index: Tensor | None, length: int) -> Tensor:
        """Refuse a missing, misshapen or out-of-range index; return it as int64."""
        if index is None:
            raise ValueError("index must hold the position of every example in the training set, got None")
        check_integer("index", index)
        check_shape("index", index, (length,))
        if index.numel() and values_can_be_read(index):
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= self.num_examples:
                raise ValueError(
                    f"index must lie in [0, {self.num_examples}), got {low if low < 0 else high}; "
                    "is the memory as long as the training set?"
                )
        return index.long()

    def read(self, name: str, index: Tensor) -> Tensor:
        """The entries ``name`` of the examples ``index``."""
        return getattr(self, name)[index]

    @torch.no_grad()
    def write(self, index: Tensor, **values: Tensor) -> None:
        """Replace entries; duplicates are averaged, and for a non-finite contribution stands what was remembered."""
        stacked = torch.stack([values[name].detach().to(getattr(self, name).dtype) for name in values], -1)
        if is_distributed():
            sizes = gather_sizes(index.shape[0], index.device)
            index, stacked = gather_padded(index, sizes), gather_padded(stacked, sizes)
        finite = torch.isfinite(stacked).all(-1)
        for name, column in zip(values, stacked.unbind(-1), strict=True):
            buffer: Tensor = getattr(self, name)
            column = torch.where(finite, column, buffer[index])
            if name in self.logarithms:
                # the largest contribution of each entry first, so that the mean of exponentials cannot overflow
                top = buffer.scatter_reduce_(0, index, column, "amax", include_self=False)[index]
                ratio = torch.where(column == top, 0.0, column - top).exp()
                mean = buffer.scatter_reduce_(0, index, ratio, "mean", include_self=False)[index]
                buffer[index] = top + mean.log()
            else:
                buffer.scatter_reduce_(0, index, column, "mean", include_self=False)
        visits = torch.zeros_like(self.seen, dtype=torch.uint8).scatter_reduce_(
            0, index, finite.byte(), "amax"
        )
        self.seen |= visits.bool()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # half() and bfloat16() around the loss must not blunt the memory: follow the device, keep dtype and digits
        before = {name: getattr(self, name) for name in self.names}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved: Tensor = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def extra_repr(self) -> str:
        """Size and names, for ``print``."""
        return f"num_examples={self.num_examples}, {', '.join(self.names)}"
