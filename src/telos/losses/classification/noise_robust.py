"""Losses that forgive wrong labels: MAE, generalised and symmetric cross-entropy."""

from functools import partial

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._algebra import ClassificationLoss
from telos.losses._checks import check_range
from telos.losses._reduction import Denominator, Reduction, at_target, classification_rows, reduce
from telos.losses._space import log_uniform, uniform
from telos.losses.classification.comp_sum import _phi
from telos.losses.classification.comp_sum import _values as _comp_sum_values

# MAE and GCE are comp-sum losses, and the reverse cross-entropy is a multiple of MAE
_MAE_TAU = 2.0


def _sce_values(logits: Tensor, target: Tensor, *, alpha: float, beta: float, log_zero: float) -> Tensor:
    def symmetric(nll: Tensor) -> Tensor:
        return alpha * nll - beta * log_zero * _phi(nll, _MAE_TAU)

    return at_target(-torch.log_softmax(logits, -1), target, symmetric)


def mae_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Mean absolute error of the softmax, ``1 - p_y``.

    The comp-sum loss with tau = 2 (:func:`telos.losses.comp_sum_loss`); half the paper's ``||p - e_y||_1``.
    It is symmetric (its sum over the labels is constant), which makes it robust to uniform label noise and
    slow to learn.

    Args:
        logits: (N, C) or (N, T, C) scores.
        target: (N,) or (N, T) labels in [0, C), or probabilities q of the shape of ``logits``: the loss is
            then ``sum_y q_y (1 - p_y)``.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in [0, 1]: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label out of range or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Robust Loss Functions under Label Noise for Deep Neural Networks, arXiv 1712.09482.

    Example:
        >>> import torch
        >>> mae_loss(torch.zeros(1, 4), torch.tensor([2]))
        tensor(0.7500)
    """
    values, weights = classification_rows(
        partial(_comp_sum_values, tau=_MAE_TAU),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class MAELoss(ClassificationLoss):
    """Mean absolute error of the softmax; see :func:`mae_loss`.

    Example:
        >>> import torch
        >>> MAELoss()(torch.zeros(1, 4), torch.tensor([2]))
        tensor(0.7500)
    """

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``1 - p_y`` of each row."""
        return _comp_sum_values(logits, target, tau=_MAE_TAU)


def gce_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    q: float = 0.7,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Generalised cross-entropy, ``(1 - p_y^q) / q``: between cross-entropy (q to 0) and MAE (q = 1).

    The comp-sum loss with tau = 1 + q (:func:`telos.losses.comp_sum_loss`) under another name.

    Args:
        logits: (N, C) or (N, T, C) scores.
        target: (N,) or (N, T) labels in [0, C), or probabilities of the shape of ``logits``, over which the
            loss of the labels is averaged.
        q: in (0, 1].
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in [0, 1/q]: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label or a q out of range, or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels, arXiv 1805.07836.

    Example:
        >>> import torch
        >>> gce_loss(torch.zeros(1, 4), torch.tensor([2]), q=0.5)
        tensor(1.)
    """
    check_range("q", q, 0.0, 1.0, open_low=True)
    values, weights = classification_rows(
        partial(_comp_sum_values, tau=1 + q),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class GCELoss(ClassificationLoss):
    """Generalised cross-entropy; see :func:`gce_loss`.

    Example:
        >>> import torch
        >>> GCELoss(q=0.5)(torch.zeros(1, 4), torch.tensor([2]))
        tensor(1.)
    """

    space = {"q": uniform(0.05, 1.0)}

    def __init__(
        self,
        q: float = 0.7,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        check_range("q", q, 0.0, 1.0, open_low=True)
        self.q = q

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``(1 - p_y^q) / q`` of each row."""
        return _comp_sum_values(logits, target, tau=1 + self.q)


def sce_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    log_zero: float = -4.0,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Symmetric cross-entropy: cross-entropy and its reverse, with prediction and label exchanged.

    The reverse term ``-sum_k p_k log 1[k = y]`` takes ``log 0 = A``, and is a multiple of MAE::

        alpha * (-log p_y) + beta * (-A) (1 - p_y)

    Args:
        logits: (N, C) or (N, T, C) scores.
        target: (N,) or (N, T) labels in [0, C), or probabilities of the shape of ``logits``, over which the
            loss of the labels is averaged.
        alpha: weight of cross-entropy, at least 0.
        beta: weight of the reverse cross-entropy, at least 0.
        log_zero: the finite stand-in A for the logarithm of 0, at most 0.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label or a parameter out of range, or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Symmetric Cross Entropy for Robust Learning with Noisy Labels, arXiv 1908.06112.

    Example:
        >>> import torch
        >>> sce_loss(torch.zeros(1, 4), torch.tensor([2]))  # 0.1 * log 4 + 4 * 0.75
        tensor(3.1386)
    """
    _check_sce(alpha, beta, log_zero)
    values, weights = classification_rows(
        partial(_sce_values, alpha=alpha, beta=beta, log_zero=log_zero),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class SCELoss(ClassificationLoss):
    """Symmetric cross-entropy; see :func:`sce_loss`.

    Example:
        >>> import torch
        >>> SCELoss()(torch.zeros(1, 4), torch.tensor([2]))
        tensor(3.1386)
    """

    space = {"alpha": log_uniform(0.01, 10.0), "beta": log_uniform(0.1, 10.0)}
    """Not searched: ``log_zero``, which only scales what beta weighs."""

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 1.0,
        log_zero: float = -4.0,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        _check_sce(alpha, beta, log_zero)
        self.alpha, self.beta, self.log_zero = alpha, beta, log_zero

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``alpha * (-log p_y) + beta * (-A) (1 - p_y)`` of each row."""
        return _sce_values(logits, target, alpha=self.alpha, beta=self.beta, log_zero=self.log_zero)


def _check_sce(alpha: float, beta: float, log_zero: float) -> None:
    check_range("alpha", alpha, 0.0, float("inf"))
    check_range("beta", beta, 0.0, float("inf"))
    check_range("log_zero", log_zero, float("-inf"), 0.0, open_low=True)
