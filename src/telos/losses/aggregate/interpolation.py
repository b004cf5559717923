"""Learning from the mean response of bags of examples: bag loss, instance loss and what lies between."""

import math
from collections.abc import Callable
from typing import ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._algebra import Loss
from telos.losses._checks import (
    check_floating,
    check_integer,
    check_range,
    check_shape,
    values_can_be_read,
)
from telos.losses._reduction import Denominator, Reduction, at_least_float32, check_reduction, reduce
from telos.losses._space import Space, uniform

Pointwise: TypeAlias = Literal["squared", "logistic", "softmax"] | Callable[[Tensor, Tensor], Tensor]
BagWeighting: TypeAlias = Literal["bag", "sample"]


def _bag_sum(values: Tensor, bag_index: Tensor, bags: int) -> Tensor:
    return values.new_zeros(bags, *values.shape[1:]).index_add(0, bag_index, values)


def _log_bag_mean(log_values: Tensor, bag_index: Tensor, size: Tensor) -> Tensor:
    """Logarithm of the bag means of ``exp(log_values)``."""
    bags = size.shape[0]
    where = bag_index.reshape(-1, *[1] * (log_values.ndim - 1)).expand_as(log_values)
    top = log_values.new_full((bags, *log_values.shape[1:]), -math.inf)
    top = top.scatter_reduce(0, where, log_values.detach(), "amax")
    top = torch.where(top.isinf(), torch.zeros_like(top), top)
    shifted = (log_values - top[bag_index]).exp()
    return top + _bag_sum(shifted, bag_index, bags).log() - _per_bag(size, top).log()


def _per_bag(size: Tensor, like: Tensor) -> Tensor:
    """One number per bag, with the trailing dimensions of ``like``."""
    return size.reshape(-1, *[1] * (like.ndim - 1))


def _mean_outputs(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def _pointwise_values(prediction: Tensor, response: Tensor, pointwise: Pointwise) -> Tensor:
    """``l(response, prediction)`` of each row."""
    if callable(pointwise):
        return _mean_outputs(pointwise(prediction, response))
    if pointwise == "squared":
        return _mean_outputs((response - prediction).square())
    if pointwise == "logistic":
        return _log_loss(F.logsigmoid(prediction), F.logsigmoid(-prediction), response)
    return -(response * torch.log_softmax(prediction, -1)).sum(-1)


def _log_loss(log_yes: Tensor, log_no: Tensor, response: Tensor) -> Tensor:
    return _mean_outputs(-(response * log_yes + (1 - response) * log_no))


def _bag_values(
    prediction: Tensor, response: Tensor, bag_index: Tensor, size: Tensor, pointwise: Pointwise
) -> Tensor:
    """``l(ybar_a, mean prediction of bag a)``; the log losses average probabilities, in logarithms."""
    if pointwise == "logistic":
        log_yes = _log_bag_mean(F.logsigmoid(prediction), bag_index, size)
        log_no = _log_bag_mean(F.logsigmoid(-prediction), bag_index, size)
        return _log_loss(log_yes, log_no, response)
    if pointwise == "softmax":
        return -(response * _log_bag_mean(torch.log_softmax(prediction, -1), bag_index, size)).sum(-1)
    mean = _bag_sum(prediction, bag_index, size.shape[0]) / _per_bag(size, prediction)
    return _pointwise_values(mean, response, pointwise)


def _instance_values(
    prediction: Tensor, response: Tensor, bag_index: Tensor, size: Tensor, pointwise: Pointwise
) -> Tensor:
    """``mean over bag a of l(ybar_a, f_i)``."""
    per_example = _pointwise_values(prediction, response[bag_index], pointwise)
    return _bag_sum(per_example, bag_index, size.shape[0]) / size


def _rows(
    prediction: Tensor,
    bag_response: Tensor,
    bag_index: Tensor,
    rho: float,
    pointwise: Pointwise,
    bag_weighting: str,
    bag_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Value and weight of every bag."""
    _check(prediction, bag_response, bag_index, pointwise, bag_weighting, bag_weight)
    prediction = at_least_float32(prediction)
    response, bag_index = bag_response.to(prediction.dtype), bag_index.long()
    bags = response.shape[0]
    size = _bag_sum(prediction.new_ones(prediction.shape[0]), bag_index, bags)
    weights = torch.ones_like(size) if bag_weight is None else bag_weight.to(size.dtype)
    counts = weights != 0
    if values_can_be_read(size) and (empty := (size == 0) & counts).any():
        raise ValueError(
            f"bag_index must name every bag in [0, {bags}), got no example of bag {int(empty.nonzero()[0])}"
        )
    if bag_weighting == "sample":
        weights = torch.where(counts, weights * size, weights)
    # a bag of weight 0 may be empty or hold NaN; one that counts and is empty, unseen, gives 0 / 0 = NaN
    size = torch.where(counts, size, size.clamp_min(1))
    response = torch.where(_per_bag(counts, response), response, torch.zeros_like(response))
    prediction = torch.where(
        _per_bag(counts[bag_index], prediction), prediction, torch.zeros_like(prediction)
    )
    arguments = (prediction, response, bag_index, size, pointwise)
    if rho == 0:
        return _bag_values(*arguments), weights
    if rho == 1:
        return _instance_values(*arguments), weights
    return (1 - rho) * _bag_values(*arguments) + rho * _instance_values(*arguments), weights


def bag_loss(
    prediction: Float[Tensor, "examples *outputs"],
    bag_response: Float[Tensor, "bags *outputs"],
    bag_index: Integer[Tensor, " examples"],
    *,
    pointwise: Pointwise = "squared",
    bag_weighting: BagWeighting = "bag",
    bag_weight: Float[Tensor, " bags"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Bag-level loss: the mean prediction of a bag against its mean response.

    ::

        L_bag = mean_a l( ybar_a, mean_{i in a} f_i )

    Right on average and noisy: nothing says which member of a bag is high and which is low.

    Args:
        prediction: (N,) or (N, C), one row per example. Values for ``"squared"``, logits for the log losses.
        bag_response: (B,) or (B, C), the mean response of each bag.
        bag_index: (N,) the bag of each example, in [0, B). Bags must be complete within the batch and none
            may be empty; see :class:`telos.data.BagSampler`.
        pointwise: l. ``"squared"``, ``(y - p)^2``; ``"logistic"``, log loss of a share y in [0, 1] under
            ``p = sigmoid(f)``; ``"softmax"``, cross-entropy of shares (B, C) under ``p = softmax(f)``; or a
            function of (prediction, response) of equal shape to values of that shape, such as
            ``partial(F.huber_loss, reduction="none")``. The log losses average the **probabilities** of a
            bag, not its logits. Several outputs of a row are averaged, except by ``"softmax"``.
        bag_weighting: ``"bag"`` lets every bag count alike; ``"sample"`` weighs it by its number of examples.
        bag_weight: (B,) further weight of each bag; a bag of weight 0 does not count, and may be empty.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (B,) with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, an index out of range, an empty bag or an unknown option.
        TypeError: for a wrong dtype.

    Source:
        Learning from Aggregate responses: Instance Level versus Bag Level Loss Functions, arXiv 2401.11081.

    Example:
        >>> import torch
        >>> bag_loss(torch.tensor([0.0, 2.0, 5.0]), torch.tensor([1.0, 4.0]), torch.tensor([0, 0, 1]))
        tensor(0.5000)
    """
    values, weights = _rows(prediction, bag_response, bag_index, 0.0, pointwise, bag_weighting, bag_weight)
    return reduce(values, weights, reduction, denominator)


def instance_loss(
    prediction: Float[Tensor, "examples *outputs"],
    bag_response: Float[Tensor, "bags *outputs"],
    bag_index: Integer[Tensor, " examples"],
    *,
    pointwise: Pointwise = "squared",
    bag_weighting: BagWeighting = "bag",
    bag_weight: Float[Tensor, " bags"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Instance-level loss: every member of a bag against the bag's mean response.

    ::

        L_ins = mean_a mean_{i in a} l( ybar_a, f_i )

    Little noise and a bias towards predictions that are constant within a bag: for the squared loss it is the
    bag loss plus the within-bag variance of the predictions, for a convex l at least the bag loss.

    Args:
        prediction: (N,) or (N, C), one row per example. Values for ``"squared"``, logits for the log losses.
        bag_response: (B,) or (B, C), the mean response of each bag.
        bag_index: (N,) the bag of each example, in [0, B); no bag may be empty.
        pointwise: l, as in :func:`bag_loss`.
        bag_weighting: ``"bag"`` lets every bag count alike; ``"sample"`` weighs it by its number of examples.
        bag_weight: (B,) further weight of each bag; a bag of weight 0 does not count, and may be empty.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (B,) with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, an index out of range, an empty bag or an unknown option.
        TypeError: for a wrong dtype.

    Source:
        Learning from Aggregate responses: Instance Level versus Bag Level Loss Functions, arXiv 2401.11081.

    Example:
        >>> import torch
        >>> instance_loss(torch.tensor([0.0, 2.0, 5.0]), torch.tensor([1.0, 4.0]), torch.tensor([0, 0, 1]))
        tensor(1.)
    """
    values, weights = _rows(prediction, bag_response, bag_index, 1.0, pointwise, bag_weighting, bag_weight)
    return reduce(values, weights, reduction, denominator)


def aggregate_interpolation_loss(
    prediction: Float[Tensor, "examples *outputs"],
    bag_response: Float[Tensor, "bags *outputs"],
    bag_index: Integer[Tensor, " examples"],
    *,
    rho: float = 0.5,
    pointwise: Pointwise = "squared",
    bag_weighting: BagWeighting = "bag",
    allow_extrapolation: bool = False,
    bag_weight: Float[Tensor, " bags"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Between the bag-level and the instance-level loss.

    ::

        L(rho) = (1 - rho) L_bag + rho L_ins = L_bag + rho (L_ins - L_bag)

    For the squared loss ``L_ins - L_bag`` is the mean within-bag variance of the predictions, so rho is the
    strength of a penalty on it: rho = 0 is unbiased and noisy, rho = 1 steady and biased. The best rho lies
    between and depends on noise, signal and the number of bags; :func:`telos.theory.optimal_rho` has it for
    linear models, otherwise tune it on held-out bags. With bags of one example rho changes nothing.

    The abstract and reviews of the paper say that the losses are interpolated linearly; the formulas are
    RECONSTRUCTED from them. The paper has bags of equal size; weighing unequal ones alike keeps the identity
    with the variance.

    Args:
        prediction: (N,) or (N, C), one row per example. Values for ``"squared"``, logits for the log losses.
        bag_response: (B,) or (B, C), the mean response of each bag.
        bag_index: (N,) the bag of each example, in [0, B); no bag may be empty.
        rho: share of the instance loss, in [0, 1]. The default is arbitrary.
        pointwise: l, as in :func:`bag_loss`.
        bag_weighting: ``"bag"`` lets every bag count alike; ``"sample"`` weighs it by its number of examples.
        allow_extrapolation: accept rho outside [0, 1]. Above 1 it shrinks more; below 0 the squared loss has
            no lower bound.
        bag_weight: (B,) further weight of each bag; a bag of weight 0 does not count, and may be empty.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (B,) with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, an index or rho out of range, an empty bag or an unknown option.
        TypeError: for a wrong dtype.

    Source:
        Learning from Aggregate responses: Instance Level versus Bag Level Loss Functions, arXiv 2401.11081.

    Example:
        >>> import torch
        >>> prediction, bag_index = torch.tensor([0.0, 2.0, 5.0]), torch.tensor([0, 0, 1])
        >>> aggregate_interpolation_loss(prediction, torch.tensor([1.0, 4.0]), bag_index, rho=0.2)
        tensor(0.6000)
    """
    _check_rho(rho, allow_extrapolation)
    values, weights = _rows(prediction, bag_response, bag_index, rho, pointwise, bag_weighting, bag_weight)
    return reduce(values, weights, reduction, denominator)


class _BagRowsLoss(Loss):
    """Rows are bags: one value and one weight for each."""

    family = "aggregate"

    def __init__(
        self, rho: float, pointwise: Pointwise, bag_weighting: BagWeighting, reduction: Reduction
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        _check_options(pointwise, bag_weighting)
        self.rho: float = rho
        self.pointwise: Pointwise = pointwise
        self.bag_weighting: BagWeighting = bag_weighting
        self.reduction: Reduction = reduction

    def rows(
        self,
        prediction: Tensor,
        bag_response: Tensor,
        bag_index: Tensor,
        *,
        bag_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One value and one weight per bag, (B,) each."""
        return _rows(
            prediction, bag_response, bag_index, self.rho, self.pointwise, self.bag_weighting, bag_weight
        )

    def forward(
        self,
        prediction: Tensor,
        bag_response: Tensor,
        bag_index: Tensor,
        *,
        bag_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The reduced loss; see :func:`telos.losses.reduce` for ``denominator``."""
        values, weights = self.rows(prediction, bag_response, bag_index, bag_weight=bag_weight)
        return reduce(values, weights, self.reduction, denominator)


class BagLoss(_BagRowsLoss):
    """Bag-level loss; see :func:`bag_loss`.

    Example:
        >>> import torch
        >>> BagLoss()(torch.tensor([0.0, 2.0, 5.0]), torch.tensor([1.0, 4.0]), torch.tensor([0, 0, 1]))
        tensor(0.5000)
    """

    def __init__(
        self,
        pointwise: Pointwise = "squared",
        bag_weighting: BagWeighting = "bag",
        *,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(0.0, pointwise, bag_weighting, reduction)


class InstanceLoss(_BagRowsLoss):
    """Instance-level loss; see :func:`instance_loss`.

    Example:
        >>> import torch
        >>> InstanceLoss()(torch.tensor([0.0, 2.0, 5.0]), torch.tensor([1.0, 4.0]), torch.tensor([0, 0, 1]))
        tensor(1.)
    """

    def __init__(
        self,
        pointwise: Pointwise = "squared",
        bag_weighting: BagWeighting = "bag",
        *,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(1.0, pointwise, bag_weighting, reduction)


class AggregateInterpolationLoss(_BagRowsLoss):
    """Between the bag-level and the instance-level loss; see :func:`aggregate_interpolation_loss`.

    Example:
        >>> import torch
        >>> prediction, bag_index = torch.tensor([0.0, 2.0, 5.0]), torch.tensor([0, 0, 1])
        >>> AggregateInterpolationLoss(rho=0.2)(prediction, torch.tensor([1.0, 4.0]), bag_index)
        tensor(0.6000)
    """

    space: ClassVar[Space] = {"rho": uniform(0.0, 1.0)}

    def __init__(
        self,
        rho: float = 0.5,
        pointwise: Pointwise = "squared",
        bag_weighting: BagWeighting = "bag",
        allow_extrapolation: bool = False,
        *,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(rho, pointwise, bag_weighting, reduction)
        _check_rho(rho, allow_extrapolation)
        self.allow_extrapolation = allow_extrapolation


def _check_rho(rho: float, allow_extrapolation: bool) -> None:
    if allow_extrapolation:
        check_range("rho", rho, -math.inf, math.inf)
    elif not 0 <= rho <= 1:
        raise ValueError(f"rho must lie in [0, 1] unless allow_extrapolation=True, got {rho}")


def _check_options(pointwise: Pointwise, bag_weighting: str) -> None:
    if not callable(pointwise) and pointwise not in ("squared", "logistic", "softmax"):
        raise ValueError(
            f"pointwise must be 'squared', 'logistic', 'softmax' or a function, got {pointwise!r}"
        )
    if bag_weighting not in ("bag", "sample"):
        raise ValueError(f"bag_weighting must be 'bag' or 'sample', got {bag_weighting!r}")


def _check(
    prediction: Tensor,
    bag_response: Tensor,
    bag_index: Tensor,
    pointwise: Pointwise,
    bag_weighting: str,
    bag_weight: Tensor | None,
) -> None:
    _check_options(pointwise, bag_weighting)
    check_floating("prediction", prediction)
    check_floating("bag_response", bag_response)
    check_integer("bag_index", bag_index)
    least = 2 if pointwise == "softmax" else 1
    if prediction.ndim < least:
        raise ValueError(f"prediction must have at least {least} dimensions, got {tuple(prediction.shape)}")
    check_shape("bag_response", bag_response, ("B", *prediction.shape[1:]))
    check_shape("bag_index", bag_index, (prediction.shape[0],))
    bags = bag_response.shape[0]
    if bag_weight is not None:
        check_floating("bag_weight", bag_weight)
        check_shape("bag_weight", bag_weight, (bags,))
    if bag_index.numel() and values_can_be_read(bag_index):
        low, high = int(bag_index.min()), int(bag_index.max())
        if low < 0 or high >= bags:
            raise ValueError(f"bag_index must lie in [0, {bags}), got {low if low < 0 else high}")
