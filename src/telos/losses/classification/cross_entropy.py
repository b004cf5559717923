"""Softmax cross-entropy, plain and with smoothed labels."""

from functools import partial

import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._algebra import ClassificationLoss
from telos.losses._checks import check_range
from telos.losses._reduction import Denominator, Reduction, classification_rows, reduce
from telos.losses._space import uniform


def _values(logits: Tensor, target: Tensor, *, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)


def cross_entropy_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Softmax cross-entropy, ``-log softmax(logits)_y``.

    Torch's own function behind the doors of this library, which add ``sample_weight`` and ``denominator``.

    Args:
        logits: (N, C) or (N, T, C) scores, any real numbers.
        target: (N,) or (N, T) labels in [0, C), or probabilities of the shape of ``logits``.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in nats: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label out of range or an unknown reduction.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> cross_entropy_loss(torch.zeros(1, 4), torch.tensor([2]))
        tensor(1.3863)
    """
    values, weights = classification_rows(
        partial(_values, label_smoothing=0.0),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class CrossEntropyLoss(ClassificationLoss):
    """Softmax cross-entropy; see :func:`cross_entropy_loss`.

    Example:
        >>> import torch
        >>> CrossEntropyLoss()(torch.zeros(1, 4), torch.tensor([2]))
        tensor(1.3863)
    """

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``-log softmax(logits)_y`` of each row."""
        return _values(logits, target, label_smoothing=0.0)


def label_smoothing_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    smoothing: float = 0.1,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Cross-entropy against smoothed labels.

    The target keeps ``1 - smoothing`` of its mass and spreads the rest evenly over the C classes::

        (1 - s) * (-log p_y) + s * mean_k(-log p_k),   p = softmax(logits)

    Args:
        logits: (N, C) or (N, T, C) scores.
        target: (N,) or (N, T) labels in [0, C), or probabilities of the shape of ``logits``.
        smoothing: mass ``s`` in [0, 1] that is spread over the classes.
        class_weight: (C,) weight of each class. It weighs the example (and the denominator) by its label.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in nats: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label or a smoothing out of range, or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Rethinking the Inception Architecture for Computer Vision, arXiv 1512.00567.

    Example:
        >>> import torch
        >>> label_smoothing_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), smoothing=0.2)
        tensor(0.3269)
    """
    check_range("smoothing", smoothing, 0.0, 1.0)
    values, weights = classification_rows(
        partial(_values, label_smoothing=smoothing),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class LabelSmoothingLoss(ClassificationLoss):
    """Cross-entropy against smoothed labels; see :func:`label_smoothing_loss`.

    Example:
        >>> import torch
        >>> LabelSmoothingLoss(smoothing=0.2)(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.3269)
    """

    space = {"smoothing": uniform(0.0, 0.4)}

    def __init__(
        self,
        smoothing: float = 0.1,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        check_range("smoothing", smoothing, 0.0, 1.0)
        self.smoothing = smoothing

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``(1 - s) * (-log p_y) + s * mean_k(-log p_k)`` of each row."""
        return _values(logits, target, label_smoothing=self.smoothing)
