"""Collectives with gradients, for losses whose value couples the examples of all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_distributed() -> bool:
    """Whether a default process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over ranks, without gradient; the tensor itself where there is one process."""
    if not is_distributed():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def gather_sizes(size: int, device: torch.device) -> list[int]:
    """The first dimension of every rank's batch; batches may differ in length."""
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([size], dtype=torch.long, device=device))
    return [int(s.item()) for s in sizes]


def gather_padded(tensor: Tensor, sizes: list[int]) -> Tensor:
    """Concatenate the first dimension over ranks of the given sizes, without gradient."""
    longest = max(sizes)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def own_rows(size: int, device: torch.device) -> slice:
    """Where this rank's ``size`` rows lie in a gathered batch; everything where there is one process."""
    if not is_distributed():
        return slice(0, size)
    start = sum(gather_sizes(size, device)[: dist.get_rank()])
    return slice(start, start + size)


class _GatherWithGradient(torch.autograd.Function):
    """All-gather along the first dimension; its transpose sums all ranks' gradients and keeps own rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return gather_padded(tensor.contiguous(), sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        start = sum(ctx.sizes[: dist.get_rank()])
        return total[start : start + ctx.sizes[dist.get_rank()]], None


def gather_with_gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Concatenate each tensor over the ranks, in rank order; gradients flow back to every rank's own rows.

    Every rank then computes the same loss of the whole batch. The gradient that reaches a rank's rows is the
    sum over ranks, which DistributedDataParallel's averaging turns into exactly the gradient of one process
    on the whole batch. Batches of different lengths are fine. Without a process group the tensors come back
    as they are.
    """
    if not is_distributed():
        return tensors
    sizes = gather_sizes(tensors[0].shape[0], tensors[0].device)
    return tuple(
        _GatherWithGradient.apply(tensor, sizes)  # type: ignore[misc]
        if tensor.is_floating_point()
        else gather_padded(tensor.contiguous(), sizes)
        for tensor in tensors
    )
