"""Focal loss: cross-entropy that turns away from what is already well classified."""

from functools import partial

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._algebra import ClassificationLoss
from telos.losses._checks import check_range
from telos.losses._reduction import Denominator, Reduction, at_target, classification_rows, reduce
from telos.losses._space import uniform


def _values(logits: Tensor, target: Tensor, *, gamma: float) -> Tensor:
    def modulated(nll: Tensor) -> Tensor:
        # 1 - p = -expm1(-nll), exact for p near 1; its power has no gradient at 0, so it is kept above 0
        miss = (-torch.expm1(-nll)).clamp_min(torch.finfo(nll.dtype).tiny)
        return miss.pow(gamma) * nll

    return at_target(-torch.log_softmax(logits, -1), target, modulated)


def focal_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    gamma: float = 2.0,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Focal loss, ``-(1 - p_y)^gamma log p_y`` with ``p = softmax(logits)``.

    Args:
        logits: (N, C) or (N, T, C) scores.
        target: (N,) or (N, T) labels in [0, C), or probabilities of the shape of ``logits``.
        gamma: focus, at least 0; 0 is cross-entropy, larger values ignore easy examples more.
        class_weight: (C,) weight of each class (the paper's alpha).
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label out of range, a negative gamma or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Focal Loss for Dense Object Detection, arXiv 1708.02002.

    Example:
        >>> import torch
        >>> focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=2.0)
        tensor(0.1733)
    """
    check_range("gamma", gamma, 0.0, float("inf"))
    values, weights = classification_rows(
        partial(_values, gamma=gamma),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class FocalLoss(ClassificationLoss):
    """Focal loss; see :func:`focal_loss`.

    Example:
        >>> import torch
        >>> FocalLoss(gamma=2.0)(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.1733)
    """

    space = {"gamma": uniform(0.0, 5.0)}

    def __init__(
        self,
        gamma: float = 2.0,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        check_range("gamma", gamma, 0.0, float("inf"))
        self.gamma = gamma

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``-(1 - p_y)^gamma log p_y`` of each row."""
        return _values(logits, target, gamma=self.gamma)
