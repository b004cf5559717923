"""Errors of a prediction: squared, absolute, Huber, quantile (pinball) and log-cosh."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from telos.losses._checks import check_range
from telos.losses._reduction import Denominator, Reduction, reduce
from telos.losses._space import log_uniform
from telos.losses.regression._rows import RegressionLoss, regression_rows


def _squared(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square()


def _absolute(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs()


def _huber(prediction: Tensor, target: Tensor, *, delta: float) -> Tensor:
    return F.huber_loss(prediction, target, reduction="none", delta=delta)


def _pinball(prediction: Tensor, target: Tensor, *, quantile: float) -> Tensor:
    residual = target - prediction
    # two hinges rather than a maximum, which would split the gradient at 0 unevenly
    return quantile * residual.relu() + (1 - quantile) * (-residual).relu()


def _log_cosh(prediction: Tensor, target: Tensor) -> Tensor:
    size = (prediction - target).abs()
    # near 0 log(1 + 2 sinh^2(r / 2)) keeps its digits; far out |r| + log(1 + exp(-2 |r|)) - log 2 cannot overflow
    near = torch.where(size < 1, prediction - target, torch.zeros_like(size))
    close = torch.log1p(2 * torch.sinh(near / 2).square())
    return torch.where(size < 1, close, size + torch.log1p(torch.exp(-2 * size)) - math.log(2))


def mse_loss(
    prediction: Float[Tensor, "batch *entries"],
    target: Float[Tensor, "batch *entries"],
    mask: Bool[Tensor, "batch *leading"] | None = None,
    *,
    sample_weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Squared error, ``r^2`` with the residual ``r = prediction - target``; its minimiser is the mean.

    Args:
        prediction: (N, ...) values, floating point.
        target: of the shape of ``prediction``.
        mask: True where an entry counts; of the shape of ``prediction`` or of its leading dimensions.
        sample_weight: (N,) weight of each example.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``; the value of an example is the mean over its
        entries that count.

    Raises:
        ValueError: for a wrong shape or an unknown reduction.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> mse_loss(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0]))
        tensor(5.)
    """
    values, weights = regression_rows(_squared, prediction, target, mask=mask, sample_weight=sample_weight)
    return reduce(values, weights, reduction, denominator)


class MSELoss(RegressionLoss):
    """Squared error; see :func:`mse_loss`.

    Example:
        >>> import torch
        >>> MSELoss()(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0]))
        tensor(5.)
    """

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """``r^2`` of each entry."""
        return _squared(prediction, target)


def l1_loss(
    prediction: Float[Tensor, "batch *entries"],
    target: Float[Tensor, "batch *entries"],
    mask: Bool[Tensor, "batch *leading"] | None = None,
    *,
    sample_weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Absolute error, ``|r|`` with ``r = prediction - target``; its minimiser is the median.

    (``mae_loss`` is the classification loss of that name, ``1 - p_y``.)

    Args:
        prediction: (N, ...) values, floating point.
        target: of the shape of ``prediction``.
        mask: True where an entry counts; of the shape of ``prediction`` or of its leading dimensions.
        sample_weight: (N,) weight of each example.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``; the value of an example is the mean over its
        entries that count.

    Raises:
        ValueError: for a wrong shape or an unknown reduction.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> l1_loss(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0]))
        tensor(2.)
    """
    values, weights = regression_rows(_absolute, prediction, target, mask=mask, sample_weight=sample_weight)
    return reduce(values, weights, reduction, denominator)


class L1Loss(RegressionLoss):
    """Absolute error; see :func:`l1_loss`.

    Example:
        >>> import torch
        >>> L1Loss()(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0]))
        tensor(2.)
    """

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """``|r|`` of each entry."""
        return _absolute(prediction, target)


def huber_loss(
    prediction: Float[Tensor, "batch *entries"],
    target: Float[Tensor, "batch *entries"],
    mask: Bool[Tensor, "batch *leading"] | None = None,
    *,
    delta: float = 1.0,
    sample_weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Huber loss: squared for small residuals, absolute for large ones.

    With ``r = prediction - target``::

        r^2 / 2                    where |r| <= delta
        delta (|r| - delta / 2)    elsewhere

    Args:
        prediction: (N, ...) values, floating point.
        target: of the shape of ``prediction``.
        mask: True where an entry counts; of the shape of ``prediction`` or of its leading dimensions.
        delta: where the square turns into a line, above 0, in units of the target.
        sample_weight: (N,) weight of each example.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``; the value of an example is the mean over its
        entries that count.

    Raises:
        ValueError: for a wrong shape, a ``delta`` that is not positive, or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Robust Estimation of a Location Parameter, Annals of Mathematical Statistics 35 (1964).

    Example:
        >>> import torch
        >>> huber_loss(torch.tensor([0.5, 5.0]), torch.tensor([0.0, 2.0]), delta=1.0, reduction="none")
        tensor([0.1250, 2.5000])
    """
    check_range("delta", delta, 0.0, math.inf, open_low=True)
    values, weights = regression_rows(
        partial(_huber, delta=delta), prediction, target, mask=mask, sample_weight=sample_weight
    )
    return reduce(values, weights, reduction, denominator)


class HuberLoss(RegressionLoss):
    """Huber loss; see :func:`huber_loss`.

    Example:
        >>> import torch
        >>> HuberLoss(delta=1.0)(torch.tensor([0.5, 5.0]), torch.tensor([0.0, 2.0]))
        tensor(1.3125)
    """

    space = {"delta": log_uniform(0.05, 5.0)}

    def __init__(self, delta: float = 1.0, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        check_range("delta", delta, 0.0, math.inf, open_low=True)
        self.delta = delta

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """``r^2 / 2`` or ``delta (|r| - delta / 2)`` of each entry."""
        return _huber(prediction, target, delta=self.delta)


def quantile_loss(
    prediction: Float[Tensor, "batch *entries"],
    target: Float[Tensor, "batch *entries"],
    mask: Bool[Tensor, "batch *leading"] | None = None,
    *,
    quantile: float = 0.5,
    sample_weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Quantile (pinball) loss, whose minimiser is a quantile of the target.

    With ``r = target - prediction``::

        quantile * max(r, 0) + (1 - quantile) * max(-r, 0)

    Quantile 0.5 is half the absolute error.

    Args:
        prediction: (N, ...) values, floating point.
        target: of the shape of ``prediction``.
        mask: True where an entry counts; of the shape of ``prediction`` or of its leading dimensions.
        quantile: in (0, 1): the share of targets that should lie below the prediction.
        sample_weight: (N,) weight of each example.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``; the value of an example is the mean over its
        entries that count.

    Raises:
        ValueError: for a wrong shape, a quantile outside (0, 1), or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Regression Quantiles, Econometrica 46 (1978).

    Example:
        >>> import torch
        >>> quantile_loss(torch.zeros(2), torch.tensor([1.0, -1.0]), quantile=0.9, reduction="none")
        tensor([0.9000, 0.1000])
    """
    _check_quantile(quantile)
    values, weights = regression_rows(
        partial(_pinball, quantile=quantile), prediction, target, mask=mask, sample_weight=sample_weight
    )
    return reduce(values, weights, reduction, denominator)


class QuantileLoss(RegressionLoss):
    """Quantile (pinball) loss; see :func:`quantile_loss`. The quantile says what is estimated: it is not tuned.

    Example:
        >>> import torch
        >>> QuantileLoss(quantile=0.9)(torch.zeros(2), torch.tensor([1.0, -1.0]))
        tensor(0.5000)
    """

    space = {}
    """Not searched: ``quantile``, which says what is estimated."""

    def __init__(self, quantile: float = 0.5, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        _check_quantile(quantile)
        self.quantile = quantile

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """``q max(r, 0) + (1 - q) max(-r, 0)`` of each entry."""
        return _pinball(prediction, target, quantile=self.quantile)


def _check_quantile(quantile: float) -> None:
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie in (0, 1), got {quantile}")


def log_cosh_loss(
    prediction: Float[Tensor, "batch *entries"],
    target: Float[Tensor, "batch *entries"],
    mask: Bool[Tensor, "batch *leading"] | None = None,
    *,
    sample_weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""``log cosh r`` with ``r = prediction - target``: about ``r^2 / 2`` near 0 and ``|r| - log 2`` far out.

    Smooth everywhere; the gradient is ``tanh r``.

    Args:
        prediction: (N, ...) values, floating point.
        target: of the shape of ``prediction``.
        mask: True where an entry counts; of the shape of ``prediction`` or of its leading dimensions.
        sample_weight: (N,) weight of each example.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``; the value of an example is the mean over its
        entries that count.

    Raises:
        ValueError: for a wrong shape or an unknown reduction.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> log_cosh_loss(torch.tensor([0.1, 100.0]), torch.zeros(2), reduction="none")
        tensor([4.9917e-03, 9.9307e+01])
    """
    values, weights = regression_rows(_log_cosh, prediction, target, mask=mask, sample_weight=sample_weight)
    return reduce(values, weights, reduction, denominator)


class LogCoshLoss(RegressionLoss):
    """``log cosh`` of the residual; see :func:`log_cosh_loss`.

    Example:
        >>> import torch
        >>> LogCoshLoss()(torch.tensor([1.0]), torch.tensor([0.0]))
        tensor(0.4338)
    """

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """``log cosh r`` of each entry."""
        return _log_cosh(prediction, target)
