"""Robust errors: pseudo-Huber, Cauchy and Geman-McClure, by entry or of a whole example.

All three are functions of a squared residual ``r^2``. What that is, ``form`` says:

- ``"elementwise"``: of each entry; the value of an example is the mean over its entries.
- ``"mean"``: the mean square over the entries of an example.
- ``"vector"``: their sum, the squared Euclidean norm.

For predictions of shape (N,) the three are the same.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from telos.losses._checks import check_range
from telos.losses._reduction import Denominator, Reduction, reduce
from telos.losses._space import log_uniform
from telos.losses.regression._rows import RegressionLoss, Rows

Form: TypeAlias = Literal["elementwise", "mean", "vector"]


def _pseudo_huber(squared: Tensor, *, scale: float) -> Tensor:
    # sqrt(r^2 + c^2) - c without the cancellation
    return squared / ((squared + scale**2).sqrt() + scale)


def _cauchy(squared: Tensor, *, scale: float) -> Tensor:
    return torch.log1p(squared / (2 * scale**2))


def _geman_mcclure(squared: Tensor, *, scale: float) -> Tensor:
    return 2 * squared / (squared + 4 * scale**2)


def _robust_rows(
    formula: Callable[[Tensor], Tensor],
    form: Form,
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None,
    sample_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Values and weights (N,) of ``formula(r^2)``."""
    rows = Rows(prediction, target, mask, sample_weight)
    squared = (rows.prediction - rows.target).square()
    if form == "elementwise":
        return rows.mean(formula(squared)), rows.weights
    return formula(rows.mean(squared) if form == "mean" else rows.sum(squared)), rows.weights


def _check(scale: float, form: str) -> None:
    check_range("scale", scale, 0.0, math.inf, open_low=True)
    if form not in ("elementwise", "mean", "vector"):
        raise ValueError(f"form must be 'elementwise', 'mean' or 'vector', got {form!r}")


class _RobustLoss(RegressionLoss):
    """What the three share: ``scale``, ``form``, and rows of a function of the squared residual."""

    space = {"scale": log_uniform(0.05, 5.0)}

    def __init__(
        self, scale: float = 1.0, form: Form = "elementwise", *, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction)
        _check(scale, form)
        self.scale = scale
        self.form: Form = form

    def of_squared(self, squared: Tensor) -> Tensor:
        """The loss of a squared residual."""
        raise NotImplementedError(f"{type(self).__name__} must define of_squared(squared)")

    def rows(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One value and one weight (N,) per example."""
        return _robust_rows(self.of_squared, self.form, prediction, target, mask, sample_weight)


def pseudo_huber_loss(
    prediction: Float[Tensor, "batch *entries"],
    target: Float[Tensor, "batch *entries"],
    mask: Bool[Tensor, "batch *leading"] | None = None,
    *,
    scale: float = 1.0,
    form: Form = "elementwise",
    sample_weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Pseudo-Huber loss: smooth, a square near 0 and a line far out.

    ::

        sqrt(r^2 + c^2) - c

    The influence of an outlier stays at 1. With c to 0 it is ``|r|``; with c large it is ``r^2 / (2 c)``.
    (``c`` times this is the form ``c^2 (sqrt(1 + (r / c)^2) - 1)`` of some libraries.)

    Args:
        prediction: (N, ...) values, floating point.
        target: of the shape of ``prediction``.
        mask: True where an entry counts; of the shape of ``prediction`` or of its leading dimensions.
        scale: c, above 0, in units of the target: residuals far above it are outliers.
        form: what r^2 is: of each entry (``"elementwise"``), the mean over the entries of an example
            (``"mean"``) or their sum (``"vector"``).
        sample_weight: (N,) weight of each example.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a ``scale`` that is not positive, or an unknown form or reduction.
        TypeError: for a wrong dtype.

    Source:
        Improved Techniques for Training Consistency Models, arXiv 2310.14189 (``form="vector"``).

    Example:
        >>> import torch
        >>> pseudo_huber_loss(torch.tensor([1.0, 100.0]), torch.zeros(2), reduction="none")
        tensor([ 0.4142, 99.0050])
    """
    _check(scale, form)
    values, weights = _robust_rows(
        partial(_pseudo_huber, scale=scale), form, prediction, target, mask, sample_weight
    )
    return reduce(values, weights, reduction, denominator)


class PseudoHuberLoss(_RobustLoss):
    """Pseudo-Huber loss; see :func:`pseudo_huber_loss`.

    Example:
        >>> import torch
        >>> PseudoHuberLoss(scale=1.0)(torch.tensor([1.0]), torch.tensor([0.0]))
        tensor(0.4142)
    """

    def of_squared(self, squared: Tensor) -> Tensor:
        """``sqrt(r^2 + c^2) - c``."""
        return _pseudo_huber(squared, scale=self.scale)


def cauchy_loss(
    prediction: Float[Tensor, "batch *entries"],
    target: Float[Tensor, "batch *entries"],
    mask: Bool[Tensor, "batch *leading"] | None = None,
    *,
    scale: float = 1.0,
    form: Form = "elementwise",
    sample_weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Cauchy loss: the influence of an outlier falls like ``2 / r``.

    ::

        log(1 + r^2 / (2 c^2))

    The gradient is largest at ``|r| = sqrt(2) c``; outliers are damped, not cut.

    Args:
        prediction: (N, ...) values, floating point.
        target: of the shape of ``prediction``.
        mask: True where an entry counts; of the shape of ``prediction`` or of its leading dimensions.
        scale: c, above 0, in units of the target: residuals far above it are outliers.
        form: what r^2 is: of each entry (``"elementwise"``), the mean over the entries of an example
            (``"mean"``) or their sum (``"vector"``).
        sample_weight: (N,) weight of each example.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a ``scale`` that is not positive, or an unknown form or reduction.
        TypeError: for a wrong dtype.

    Source:
        Improved Training Technique for Latent Consistency Models, arXiv 2502.01441 (``form="mean"`` is the
        authors' code).

    Example:
        >>> import torch
        >>> cauchy_loss(torch.tensor([1.0, 100.0]), torch.zeros(2), reduction="none")
        tensor([0.4055, 8.5174])
    """
    _check(scale, form)
    values, weights = _robust_rows(
        partial(_cauchy, scale=scale), form, prediction, target, mask, sample_weight
    )
    return reduce(values, weights, reduction, denominator)


class CauchyLoss(_RobustLoss):
    """Cauchy loss; see :func:`cauchy_loss`.

    Example:
        >>> import torch
        >>> CauchyLoss(scale=1.0)(torch.tensor([1.0]), torch.tensor([0.0]))
        tensor(0.4055)
    """

    def of_squared(self, squared: Tensor) -> Tensor:
        """``log(1 + r^2 / (2 c^2))``."""
        return _cauchy(squared, scale=self.scale)


def geman_mcclure_loss(
    prediction: Float[Tensor, "batch *entries"],
    target: Float[Tensor, "batch *entries"],
    mask: Bool[Tensor, "batch *leading"] | None = None,
    *,
    scale: float = 1.0,
    form: Form = "elementwise",
    sample_weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Geman-McClure loss: bounded by 2, so that an outlier hardly pulls at all.

    ::

        2 r^2 / (r^2 + 4 c^2)

    The influence falls like ``1 / r^3``: a prediction that begins far from every target barely learns.

    Args:
        prediction: (N, ...) values, floating point.
        target: of the shape of ``prediction``.
        mask: True where an entry counts; of the shape of ``prediction`` or of its leading dimensions.
        scale: c, above 0, in units of the target: residuals far above it are outliers.
        form: what r^2 is: of each entry (``"elementwise"``), the mean over the entries of an example
            (``"mean"``) or their sum (``"vector"``).
        sample_weight: (N,) weight of each example.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a ``scale`` that is not positive, or an unknown form or reduction.
        TypeError: for a wrong dtype.

    Source:
        Improved Training Technique for Latent Consistency Models, arXiv 2502.01441.

    Example:
        >>> import torch
        >>> geman_mcclure_loss(torch.tensor([1.0, 100.0]), torch.zeros(2), reduction="none")
        tensor([0.4000, 1.9992])
    """
    _check(scale, form)
    values, weights = _robust_rows(
        partial(_geman_mcclure, scale=scale), form, prediction, target, mask, sample_weight
    )
    return reduce(values, weights, reduction, denominator)


class GemanMcClureLoss(_RobustLoss):
    """Geman-McClure loss; see :func:`geman_mcclure_loss`.

    Example:
        >>> import torch
        >>> GemanMcClureLoss(scale=1.0)(torch.tensor([1.0]), torch.tensor([0.0]))
        tensor(0.4000)
    """

    def of_squared(self, squared: Tensor) -> Tensor:
        """``2 r^2 / (r^2 + 4 c^2)``."""
        return _geman_mcclure(squared, scale=self.scale)
