"""Robustness that is proved rather than attacked."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from telos.losses._checks import check_floating, check_shape


def verified_error(margins: Float[Tensor, "batch others"]) -> Float[Tensor, ""]:
    r"""Share of examples that are not proved to be classified correctly in their whole box.

    ::

        mean_i [ min_j m_ij <= 0 ]          m_ij a lower bound of z_y - z_j, for every class j != y

    It is at least the error under any attack within the box, and at least the clean error; a NaN proves nothing.

    Args:
        margins: (N, C - 1) from :func:`telos.losses.margin_lower_bounds`, of a model in evaluation mode.

    Returns:
        A float32 scalar in [0, 1]; 0 without examples.

    Raises:
        ValueError: for a wrong shape.
        TypeError: for margins that are not floating point.

    Source:
        Fast Certified Robust Training with Short Warmup, arXiv 2103.17268.

    Example:
        >>> import torch
        >>> verified_error(torch.tensor([[1.0, 2.0], [3.0, -0.1]]))
        tensor(0.5000)
    """
    unverified = _unverified(margins)
    return unverified.sum() / max(unverified.numel(), 1)


class VerifiedError(Metric):
    """Verified error over batches and ranks; see :func:`verified_error`.

    Example:
        >>> import torch
        >>> from telos.losses.robust.interval import IntervalTensor, margin_lower_bounds
        >>> model, inputs, target = torch.nn.Linear(2, 3).eval(), torch.rand(8, 2), torch.zeros(8).long()
        >>> metric = VerifiedError()
        >>> with torch.no_grad():
        ...     metric.update(margin_lower_bounds(model(IntervalTensor.around(inputs, 10.0)), target))
        >>> metric.compute()
        tensor(1.)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    unverified: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("unverified", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, margins: Tensor) -> None:
        """Count the unverified rows of margins (N, C - 1)."""
        unverified = _unverified(margins)
        self.unverified += unverified.sum()
        self.total += unverified.numel()

    def compute(self) -> Tensor:
        """The share so far, 0 without examples."""
        return self.unverified / self.total.clamp_min(1)


def _unverified(margins: Tensor) -> Tensor:
    check_floating("margins", margins)
    check_shape("margins", margins, ("N", "C - 1"))
    # asked this way round, so that a NaN is not verified
    return ~(margins.detach() > 0).all(1)
