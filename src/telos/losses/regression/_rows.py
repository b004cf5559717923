"""The rows of the regression family: one error per entry, one mean per example, masked entries left out."""

from collections.abc import Callable

import torch
from torch import Tensor

from telos.losses._algebra import Loss
from telos.losses._checks import check_floating, check_shape
from telos.losses._reduction import (
    Denominator,
    Reduction,
    at_least_float32,
    check_reduction,
    reduce,
)


def check_regression(
    prediction: Tensor, target: Tensor, mask: Tensor | None, sample_weight: Tensor | None
) -> None:
    """The door of the regression family: prediction and target (N, ...) of one shape."""
    check_floating("prediction", prediction)
    check_floating("target", target)
    if prediction.ndim < 1:
        raise ValueError("prediction must have shape (N, ...), got ()")
    check_shape("target", target, tuple(prediction.shape))
    if prediction.shape[0] and not prediction[0].numel():
        raise ValueError(
            f"prediction must have at least one entry each example, got {tuple(prediction.shape)}"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a tensor of dtype torch.bool, got {got}")
        fits = mask.ndim <= prediction.ndim and all(
            have in (want, 1) for have, want in zip(mask.shape, prediction.shape, strict=False)
        )
        if not fits or mask.ndim < 1 or mask.shape[0] != prediction.shape[0]:
            raise ValueError(
                f"mask must have the leading dimensions of prediction {tuple(prediction.shape)}, "
                f"got {tuple(mask.shape)}"
            )
    if sample_weight is not None:
        check_floating("sample_weight", sample_weight)
        check_shape("sample_weight", sample_weight, (prediction.shape[0],))


class Rows:
    """Prediction and target in which nothing that does not count is left, and means over what counts.

    Half precision is raised to float32; entries under the mask and rows of weight 0 are replaced by zeros
    before any arithmetic, so that a NaN in them reaches neither value nor gradient.
    """

    def __init__(
        self, prediction: Tensor, target: Tensor, mask: Tensor | None, sample_weight: Tensor | None
    ) -> None:
        check_regression(prediction, target, mask, sample_weight)
        prediction = at_least_float32(prediction)
        target = target.to(prediction.dtype)
        self.weights = prediction.new_ones(prediction.shape[0])
        counts: Tensor | None = None
        if mask is not None:
            counts = mask.reshape(*mask.shape, *[1] * (prediction.ndim - mask.ndim)).expand(prediction.shape)
            self.weights = _flat(counts).any(1).to(prediction.dtype)
        if sample_weight is not None:
            # a weight of NaN on a row that is masked must not revive it
            weighted = self.weights * sample_weight.to(prediction.dtype)
            self.weights = torch.where(self.weights == 0, self.weights, weighted)
            kept = (self.weights != 0).reshape(-1, *[1] * (prediction.ndim - 1)).expand(prediction.shape)
            counts = kept if counts is None else counts & kept
        self.counts = counts
        self.prediction, self.target = self._kept(prediction), self._kept(target)

    def _kept(self, entries: Tensor) -> Tensor:
        return (
            entries if self.counts is None else torch.where(self.counts, entries, torch.zeros_like(entries))
        )

    def sum(self, errors: Tensor) -> Tensor:
        """The sum (N,) over the entries of each example that count."""
        return _flat(self._kept(errors)).sum(1)

    def mean(self, errors: Tensor) -> Tensor:
        """The mean (N,) over the entries of each example that count; 0 where none does."""
        if self.counts is None:
            return _flat(errors).mean(1)
        return self.sum(errors) / _flat(self.counts).sum(1).clamp_min(1)


def _flat(entries: Tensor) -> Tensor:
    return entries.flatten(1) if entries.ndim > 1 else entries.unsqueeze(1)


def regression_rows(
    formula: Callable[[Tensor, Tensor], Tensor],
    prediction: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Values and weights (N,) of a regression loss whose ``formula`` gives one error per entry.

    Args:
        formula: ``(prediction (N, ...), target (N, ...)) -> errors (N, ...)``.
        prediction: (N, ...), floating point.
        target: of the shape of ``prediction``.
        mask: True where an entry counts; (N, ...) or its leading dimensions.
        sample_weight: (N,).
    """
    rows = Rows(prediction, target, mask, sample_weight)
    return rows.mean(formula(rows.prediction, rows.target)), rows.weights


class RegressionLoss(Loss):
    """A row-wise loss on ``(prediction (N, ...), target (N, ...), mask=None)``.

    A subclass writes its formula as ``values``, one error per entry, finite where prediction and target are 0.
    The value of an example is the mean over its entries that count, and every example weighs the same, however
    many of its entries are masked.

    Example:
        >>> import torch
        >>> class Overshoot(RegressionLoss):
        ...     def values(self, prediction, target):
        ...         return torch.relu(prediction - target)
        >>> Overshoot()(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
        tensor(0.5000)
    """

    family = "regression"

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The formula: prediction and target (N, ...) to errors (N, ...)."""
        raise NotImplementedError(f"{type(self).__name__} must define values(prediction, target)")

    def rows(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One value and one weight (N,) per example."""
        return regression_rows(self.values, prediction, target, mask=mask, sample_weight=sample_weight)

    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The reduced loss; see :func:`telos.losses.reduce` for ``denominator``."""
        values, weights = self.rows(prediction, target, mask, sample_weight=sample_weight)
        return reduce(values, weights, self.reduction, denominator)
