"""The Z-loss and its baselines: losses that see of the logits the target's, their sum and sum of squares."""

from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._algebra import ClassificationLoss
from telos.losses._checks import check_range
from telos.losses._reduction import (
    Denominator,
    Reduction,
    at_least_float32,
    at_target,
    classification_rows,
    reduce,
    safe_sqrt,
)
from telos.losses._space import log_uniform, uniform
from telos.losses._task import TaskInfo


def _z_scores(logits: Tensor, eps: float) -> Tensor:
    mean = logits.mean(-1, keepdim=True)
    centred = logits - mean
    # the second subtraction takes out the rounding of the first mean, which matters where |mean| >> spread
    centred = centred - centred.mean(-1, keepdim=True)
    spread = safe_sqrt(centred.square().mean(-1, keepdim=True))
    # a row that is constant to rounding has no scale: it is left unscaled, so that its gradient stays finite
    constant = spread <= torch.finfo(logits.dtype).eps * mean.abs()
    return centred / torch.where(constant, torch.ones_like(spread), spread + eps)


def _z_values(logits: Tensor, target: Tensor, *, a: float, b: float, eps: float) -> Tensor:
    # softplus(x) = -logsigmoid(-x), exact everywhere: F.softplus turns linear at a threshold
    return at_target(_z_scores(logits, eps), target, lambda z: -F.logsigmoid(a * (z - b)) / a)


def _log_taylor_softmax(logits: Tensor) -> Tensor:
    # 1 + x + x^2 / 2 as a sum of positive terms, so that nothing cancels at x < 0
    terms = ((logits + 1).square() + 1) / 2
    return terms.log() - terms.sum(-1, keepdim=True).log()


def _log_spherical_softmax(logits: Tensor, eps: float) -> Tensor:
    terms = logits.square() + eps
    return terms.log() - terms.sum(-1, keepdim=True).log()


def _taylor_values(logits: Tensor, target: Tensor) -> Tensor:
    return at_target(-_log_taylor_softmax(logits), target)


def _spherical_values(logits: Tensor, target: Tensor, *, eps: float) -> Tensor:
    return at_target(-_log_spherical_softmax(logits, eps), target)


def _mse_values(logits: Tensor, target: Tensor) -> Tensor:
    return at_target(logits.square().sum(-1, keepdim=True) - 2 * logits + 1, target)


def z_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    a: float = 1.0,
    b: float = 0.0,
    eps: float = 1e-12,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Z-loss: the softplus of the target's standardised logit, blind to shift and scale of the logits.

    ::

        z_k = (o_k - mean(o)) / std(o)                    population standard deviation over the D classes
        loss = (1 / a) * log(1 + exp(a * (b - z_y)))      a -> inf: the hinge max(0, b - z_y)
        d loss / d o_k = -(g / std) * (1[k = y] - 1/D - z_y z_k / D),   g = sigmoid(a * (b - z_y))

    Made for very many classes, where a large ``b`` with a small ``a`` favours top-1 accuracy and a smaller
    ``b`` the top-k accuracy of larger k. It needs the logits only through the target's logit, their sum and
    their sum of squares, so that :func:`telos.kernels.spherical_step` can train an output layer of D classes
    without computing them. A row of equal logits (to rounding) has no scale and is left unscaled: its
    z-scores are 0 and its gradient finite. With two classes z_y is 1 or -1 and the gradient 0.

    Args:
        logits: (N, C) or (N, T, C) scores o.
        target: (N,) or (N, T) labels in [0, C), or probabilities q of the shape of ``logits``: the loss is
            then ``sum_y q_y loss(o, y)``.
        a: sharpness, above 0. Tune it, with ``b``, on the metric that counts (top-k error).
        b: location in standard deviations.
        eps: added to the standard deviation, at least 0.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a single class, a label or a parameter out of range, or an unknown
            reduction.
        TypeError: for a wrong dtype.

    Source:
        The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family,
        arXiv 1604.08859.

    Example:
        >>> import torch
        >>> z_loss(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([0]))
        tensor(0.2176)
        >>> z_loss(torch.tensor([[70.0, 10.0, 10.0]]), torch.tensor([0]))
        tensor(0.2176)
    """
    _check_z(a, eps)
    values, weights = classification_rows(
        partial(_z_values, a=a, b=b, eps=eps),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class ZLoss(ClassificationLoss):
    """Z-loss; see :func:`z_loss`.

    Example:
        >>> import torch
        >>> ZLoss(a=1.0, b=0.0)(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([0]))
        tensor(0.2176)
    """

    space = {"a": log_uniform(0.05, 10.0), "b": uniform(0.0, 10.0)}
    """Not searched: ``eps``, which only keeps equal logits from a division by 0."""

    def __init__(
        self,
        a: float = 1.0,
        b: float = 0.0,
        eps: float = 1e-12,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        _check_z(a, eps)
        self.a, self.b, self.eps = a, b, eps

    @classmethod
    def from_task(cls, info: TaskInfo, **hyperparameters: object) -> Self:
        """The loss, where there is something to learn from it."""
        if info.num_classes == 2:
            raise ValueError("ZLoss has no gradient with two classes: their standardised logits are -1 and 1")
        return cls(**hyperparameters)  # type: ignore[arg-type]

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``softplus(a (b - z_y)) / a`` of each row."""
        return _z_values(logits, target, a=self.a, b=self.b, eps=self.eps)


def taylor_softmax_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Log-Taylor-softmax: the softmax with ``exp(x)`` replaced by ``1 + x + x^2 / 2``.

    With ``s = sum_k o_k`` and ``q = sum_k o_k^2`` over D classes::

        loss = -log( (1 + o_y + o_y^2 / 2) / (D + s + q / 2) )

    The quadratic is smallest (1/2) at -1 and grows again below it, so a very negative logit is not a small
    probability.

    Args:
        logits: (N, C) or (N, T, C) scores o.
        target: labels in [0, C), or probabilities of the shape of ``logits``.
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

    Source:
        An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family, arXiv 1511.05042.

    Example:
        >>> import torch
        >>> taylor_softmax_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.1823)
    """
    values, weights = classification_rows(
        _taylor_values,
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class TaylorSoftmaxLoss(ClassificationLoss):
    """Log-Taylor-softmax; see :func:`taylor_softmax_loss`.

    Example:
        >>> import torch
        >>> TaylorSoftmaxLoss()(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.1823)
    """

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Log-probabilities (..., C) under this loss: not those of a softmax, nor always in the order of the logits."""
        return _log_taylor_softmax(at_least_float32(logits))

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``-log`` of the Taylor-softmax of the target, for each row."""
        return _taylor_values(logits, target)


def spherical_softmax_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    eps: float = 0.1,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Log-spherical-softmax: probabilities from squared logits.

    With ``q = sum_k o_k^2`` over D classes::

        loss = -log( (o_y^2 + eps) / (q + D eps) )

    It does not see the sign of a logit. ``eps`` bounds the loss and the slope near 0; its default is
    RECONSTRUCTED (the paper tunes it), so tune it.

    Args:
        logits: (N, C) or (N, T, C) scores o.
        target: labels in [0, C), or probabilities of the shape of ``logits``.
        eps: added to every square, above 0.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in nats: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label or ``eps`` out of range, or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family, arXiv 1511.05042.

    Example:
        >>> import torch
        >>> spherical_softmax_loss(torch.tensor([[2.0, 1.0]]), torch.tensor([0]), eps=1.0)
        tensor(0.3365)
    """
    check_range("eps", eps, 0.0, float("inf"), open_low=True)
    values, weights = classification_rows(
        partial(_spherical_values, eps=eps),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class SphericalSoftmaxLoss(ClassificationLoss):
    """Log-spherical-softmax; see :func:`spherical_softmax_loss`.

    Example:
        >>> import torch
        >>> SphericalSoftmaxLoss(eps=1.0)(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
        tensor(0.3365)
    """

    space = {"eps": log_uniform(1e-4, 1.0)}

    def __init__(
        self,
        eps: float = 0.1,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        check_range("eps", eps, 0.0, float("inf"), open_low=True)
        self.eps = eps

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Log-probabilities (..., C) under this loss: a class is likely where its logit is far from 0."""
        return _log_spherical_softmax(at_least_float32(logits), self.eps)

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``-log`` of the spherical softmax of the target, for each row."""
        return _spherical_values(logits, target, eps=self.eps)


def spherical_mse_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Squared error of the logits against the one-hot target, summed over classes.

    ::

        loss = sum_k (o_k - 1[k = y])^2 = q - 2 o_y + 1,   q = sum_k o_k^2

    Args:
        logits: (N, C) or (N, T, C) scores o.
        target: labels in [0, C), or probabilities of the shape of ``logits``: the loss is then the expected
            one, ``sum_y p_y loss(o, y)``, not the squared distance to the vector of probabilities (the two
            differ by a constant).
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label out of range or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Efficient Exact Gradient Update for training Deep Networks with Very Large Sparse Targets, arXiv
        1412.7091.

    Example:
        >>> import torch
        >>> spherical_mse_loss(torch.tensor([[0.5, -1.0]]), torch.tensor([0]))
        tensor(1.2500)
    """
    values, weights = classification_rows(
        _mse_values,
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class SphericalMSELoss(ClassificationLoss):
    """Squared error against the one-hot target; see :func:`spherical_mse_loss`.

    Example:
        >>> import torch
        >>> SphericalMSELoss()(torch.tensor([[0.5, -1.0]]), torch.tensor([0]))
        tensor(1.2500)
    """

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``sum_k (o_k - 1[k = y])^2`` of each row."""
        return _mse_values(logits, target)


def _check_z(a: float, eps: float) -> None:
    check_range("a", a, 0.0, float("inf"), open_low=True)
    check_range("eps", eps, 0.0, float("inf"))
