"""Interval bound propagation: what a network can compute from any input of a box."""

import operator
from collections.abc import Callable
from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses._checks import (
    check_floating,
    check_integer,
    check_label_values,
    check_shape,
    values_can_be_read,
)
from telos.losses._reduction import at_least_float32

Bounds: TypeAlias = tuple[float | Tensor, float | Tensor]


class IntervalTensor:
    """A box of tensors, which ordinary modules map to a box that holds all they can make of it.

    ``model(IntervalTensor.around(x, eps))`` runs any model of these parts, each by its sound rule::

        linear, convolution   c' = W c + b,  r' = |W| r                   with centre c and radius r
        batch normalisation   a = weight / sqrt(var + eps),  c' = a (c - mean) + bias,  r' = |a| r
        ReLU, tanh, sigmoid, pooling, mean, reshaping                     applied to lower and to upper
        sum of boxes; sum and product with a number or a tensor; dropout in evaluation

    Everything else raises ``NotImplementedError``; so does, under ``torch.compile``, an operator between a box and
    a tensor, where ``torch.add``, ``sub``, ``mul`` and ``div`` compile.

    Batch normalisation in training uses mean and biased variance of the batch of ``clean``, through which the
    gradient flows, and updates its running statistics from it as usual. The box is computed at least in float32,
    also under autocast, and its bounds are those of exact arithmetic: they are not rounded outwards. To verify on a
    GPU set ``torch.backends.cudnn.allow_tf32 = False``, or convolutions keep three digits only.

    Args:
        lower: lower corner of the box.
        upper: upper corner, nowhere below ``lower``.
        clean: a point carried along, or ``None``; batch normalisation in training needs it.
        relu_inputs: a list to which every ReLU appends the box it is given.

    Attributes:
        lower: lower bounds.
        upper: upper bounds.
        centre: ``(lower + upper) / 2``.
        radius: ``(upper - lower) / 2``.
        clean: the point carried along, or ``None``.

    Source:
        On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models, arXiv
        1810.12715; batch normalisation as in Fast Certified Robust Training with Short Warmup, arXiv 2103.17268.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[1.0, -2.0]])
        >>> box = layer(IntervalTensor.around(torch.zeros(1, 2), 0.5))
        >>> box.lower.item(), box.upper.item()
        (-1.5, 1.5)
    """

    _corners: tuple[Tensor, Tensor] | None
    _ball: tuple[Tensor, Tensor] | None
    _layer: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        lower: Tensor,
        upper: Tensor,
        clean: Tensor | None = None,
        *,
        relu_inputs: "list[IntervalTensor] | None" = None,
    ) -> None:
        check_floating("lower", lower)
        check_floating("upper", upper)
        check_shape("upper", upper, tuple(lower.shape))
        if values_can_be_read(lower) and values_can_be_read(upper) and bool((upper < lower).any()):
            raise ValueError("upper must be nowhere below lower")
        self.clean, self.relu_inputs = clean, relu_inputs
        # one of the pairs is enough, and the other is computed where it is asked for
        self._corners, self._ball = (lower, upper), None
        # radius of the input and weight of the linear layer that made this box, for tighter margins
        self._layer = None

    @classmethod
    def around(
        cls,
        inputs: Tensor,
        eps: float | Tensor,
        bounds: Bounds | None = None,
        *,
        clean: bool = True,
        relu_inputs: "list[IntervalTensor] | None" = None,
    ) -> Self:
        """The l-inf ball of radius ``eps`` around ``inputs``, cut to ``bounds``.

        Args:
            inputs: (N, ...) centres.
            eps: radius, at least 0, in the unit of ``inputs``; a tensor that broadcasts to ``inputs`` gives
                channels radii of their own (eps / std where channels were divided by std).
            bounds: lowest and highest legal value, numbers or tensors that broadcast; ``inputs`` keep to them.
            clean: whether to carry ``inputs`` along.
            relu_inputs: a list to which every ReLU appends the box it is given.

        Returns:
            The box, in float32 or float64.

        Raises:
            ValueError: for a negative ``eps``, or inputs outside ``bounds``.
            TypeError: for inputs that are not floating point.

        Example:
            >>> import torch
            >>> IntervalTensor.around(torch.tensor([0.1, 0.5]), 0.2, (0.0, 1.0)).lower
            tensor([0.0000, 0.3000])
        """
        check_floating("inputs", inputs)
        _check_eps(eps)
        inputs = at_least_float32(inputs)
        eps = eps.to(inputs.dtype) if isinstance(eps, Tensor) else eps
        lower, upper = inputs - eps, inputs + eps
        if bounds is not None:
            lowest, highest = (torch.as_tensor(b, dtype=inputs.dtype, device=inputs.device) for b in bounds)
            _check_inside(inputs, lowest, highest)
            lower, upper = torch.maximum(lower, lowest), torch.minimum(upper, highest)
        return cls(lower, upper, inputs if clean else None, relu_inputs=relu_inputs)

    @property
    def lower(self) -> Tensor:
        """Lower bounds."""
        return self._lower_upper()[0]

    @property
    def upper(self) -> Tensor:
        """Upper bounds."""
        return self._lower_upper()[1]

    @property
    def centre(self) -> Tensor:
        """``(lower + upper) / 2``."""
        return self._centre_radius()[0]

    @property
    def radius(self) -> Tensor:
        """``(upper - lower) / 2``."""
        return self._centre_radius()[1]

    def _lower_upper(self) -> tuple[Tensor, Tensor]:
        if self._corners is None:
            assert self._ball is not None
            centre, radius = self._ball
            self._corners = (centre - radius, centre + radius)
        return self._corners

    def _centre_radius(self) -> tuple[Tensor, Tensor]:
        if self._ball is None:
            lower, upper = self._lower_upper()
            self._ball = ((lower + upper) / 2, (upper - lower) / 2)
        return self._ball

    def _made(
        self,
        clean: Tensor | None,
        *,
        corners: tuple[Tensor, Tensor] | None = None,
        ball: tuple[Tensor, Tensor] | None = None,
        layer: tuple[Tensor, Tensor] | None = None,
    ) -> "IntervalTensor":
        """A box made of this one, whose numbers need no check."""
        box = object.__new__(IntervalTensor)
        box.clean, box.relu_inputs = clean, self.relu_inputs
        box._corners, box._ball, box._layer = corners, ball, layer
        return box

    def _copy(self) -> "IntervalTensor":
        return self._made(self.clean, corners=self._corners, ball=self._ball, layer=self._layer)

    def _become(self, other: "IntervalTensor") -> "IntervalTensor":
        """In place: every other name of this box sees the change, as with a tensor."""
        self.__dict__.update(other.__dict__)
        return self

    def _map(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> "IntervalTensor":
        """A function that is nondecreasing in every entry, applied to both corners and to the point."""
        lower, upper = (function(corner, *args, **kwargs) for corner in self._lower_upper())
        clean = None if self.clean is None else function(self.clean, *args, **kwargs)
        return self._made(clean, corners=(lower, upper))

    # ------------------------------------------------------------------------------- what models ask a tensor

    def _any(self) -> Tensor:
        pair = self._corners or self._ball
        assert pair is not None
        return pair[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of the box."""
        return self._any().shape

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the bounds."""
        return self._any().dtype

    @property
    def device(self) -> torch.device:
        """Where the bounds are."""
        return self._any().device

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self._any().ndim

    def dim(self) -> int:
        """Number of dimensions."""
        return self._any().ndim

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    def flatten(self, *args: Any, **kwargs: Any) -> "IntervalTensor":
        """As of a tensor."""
        return self._map(torch.flatten, *args, **kwargs)

    def reshape(self, *shape: Any) -> "IntervalTensor":
        """As of a tensor."""
        return self._map(Tensor.reshape, *shape)

    def view(self, *shape: Any) -> "IntervalTensor":
        """As of a tensor, also where the memory would have to be copied."""
        return self._map(Tensor.reshape, *shape)

    def mean(self, *args: Any, **kwargs: Any) -> "IntervalTensor":
        """As of a tensor."""
        return self._map(torch.mean, *args, **kwargs)

    def relu(self) -> "IntervalTensor":
        """As of a tensor."""
        return _relu(F.relu, self)

    def __add__(self, other: Any) -> "IntervalTensor":
        return _sum(operator.add, self, other)

    __radd__ = __add__

    def __iadd__(self, other: Any) -> "IntervalTensor":
        return self._become(self + other)

    def __sub__(self, other: Any) -> "IntervalTensor":
        return self + -other

    def __rsub__(self, other: Any) -> "IntervalTensor":
        return -self + other

    def __neg__(self) -> "IntervalTensor":
        return self * -1.0

    def __mul__(self, other: Any) -> "IntervalTensor":
        return _product(operator.mul, self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "IntervalTensor":
        return _quotient(operator.truediv, self, other)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = RULES.get(function)
        boxes = [part for part in args if isinstance(part, IntervalTensor)]
        first = bool(boxes) and boxes[0] is args[0]
        if rule is None or not (rule in ARITHMETIC or (first and len(boxes) == 1)):
            name = getattr(function, "__name__", repr(function))
            raise NotImplementedError(
                f"no interval bound for {name}: use linear and convolution layers, batch normalisation, ReLU, "
                "tanh, sigmoid, pooling, mean, reshaping and sums"
            )
        device = boxes[0].device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return rule(function, *args, **(kwargs or {}))
        return rule(function, *args, **(kwargs or {}))


def margin_lower_bounds(logits: IntervalTensor, target: Tensor) -> Tensor:
    r"""Lower bounds of the margins ``z_y - z_j`` of the target over every other class.

    Where a linear layer made the logits, it is merged with the difference, so that what both logits share
    cancels; with its input's centre c and radius r::

        m_j = (W_y - W_j) c + b_y - b_j - |W_y - W_j| r

    Otherwise ``m_j = lower(z_y) - upper(z_j)``. An example is verified, robust in the whole box, if all its m_j are
    positive. It takes O(N C D) memory for a last layer of D inputs.

    Args:
        logits: (N, C) box of logits, as a model of an :class:`IntervalTensor` returns it.
        target: (N,) labels y.

    Returns:
        (N, C - 1) margins over the classes j != y, in increasing order of j.

    Raises:
        ValueError: for a wrong shape or a label out of range.
        TypeError: for a wrong dtype.

    Source:
        Fast Certified Robust Training with Short Warmup, arXiv 2103.17268.

    Example:
        >>> import torch
        >>> box = IntervalTensor(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[2.0, 0.5, 3.0]]))
        >>> margin_lower_bounds(box, torch.tensor([0]))
        tensor([[ 0.5000, -2.0000]])
    """
    if not isinstance(logits, IntervalTensor):
        raise TypeError(f"logits must be an IntervalTensor, got {type(logits).__name__}")
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits must have shape (N, C) with at least two classes, got {tuple(logits.shape)}"
        )
    check_integer("target", target)
    check_shape("target", target, (logits.shape[0],))
    classes = logits.shape[1]
    check_label_values("target", target, classes)
    target = target.long()
    others = torch.arange(classes - 1, device=target.device)
    others = others + (others >= target.unsqueeze(1))
    if logits._layer is None:
        return logits.lower.gather(1, target.unsqueeze(1)) - logits.upper.gather(1, others)
    radius, weight = logits._layer
    widths = (weight[target].unsqueeze(1) - weight).abs() @ radius.unsqueeze(-1)
    worst = logits.centre.gather(1, target.unsqueeze(1)) - logits.centre - widths.squeeze(-1)
    return worst.gather(1, others)


# ------------------------------------------------------------------------------------------------------ rules


def _affine(
    function: Callable[..., Any],
    box: IntervalTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> IntervalTensor:
    """A layer that is linear in its first argument and in its weight."""
    weight = weight.to(box.dtype)
    bias = None if bias is None else bias.to(box.dtype)
    # a fast convolution may round a sum of nonnegative numbers below 0
    radius = function(box.radius, weight.abs(), None, *args, **kwargs).clamp_min(0)
    centre = function(box.centre, weight, bias, *args, **kwargs)
    clean = None if box.clean is None else function(box.clean, weight, bias, *args, **kwargs)
    layer = (box.radius, weight) if function is F.linear else None
    return box._made(clean, ball=(centre, radius), layer=layer)


def _batch_norm(
    function: Callable[..., Any],
    box: IntervalTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> IntervalTensor:
    dtype, clean = box.dtype, box.clean
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if training:
        if clean is None:
            raise ValueError(
                "batch normalisation in training takes its statistics from the clean inputs: "
                "use IntervalTensor.around(..., clean=True), or call model.eval()"
            )
        # this also moves the running statistics, and refuses one value per channel
        normalised = function(clean, running_mean, running_var, weight, bias, True, momentum, eps)
        var, mean = torch.var_mean(clean, [0, *range(2, clean.ndim)], correction=0)
    else:
        assert running_mean is not None
        assert running_var is not None
        var, mean = running_var.to(dtype), running_mean.to(dtype)
    column = (-1, *[1] * (box.ndim - 2))
    scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    scale, shift = scale.view(column), shift.view(column)
    if not training:
        normalised = None if clean is None else clean * scale + shift
    return box._made(normalised, ball=(box.centre * scale + shift, box.radius * scale.abs()))


def _relu(function: Callable[..., Any], box: IntervalTensor, inplace: bool = False) -> IntervalTensor:
    if box.relu_inputs is not None:
        # a copy, in case the box is changed in place later
        box.relu_inputs.append(box._copy())
    after = box._map(torch.relu)
    return box._become(after) if inplace else after


def _monotone(function: Callable[..., Any], box: IntervalTensor, *args: Any, **kwargs: Any) -> IntervalTensor:
    return box._map(function, *args, **kwargs)


def _dropout(
    function: Callable[..., Any],
    box: IntervalTensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> IntervalTensor:
    if training and p > 0:
        raise NotImplementedError("no interval bound for dropout in training: call model.eval()")
    return box


def _sum(function: Callable[..., Any], first: Any, second: Any, *, alpha: float = 1) -> IntervalTensor:
    """A sum with a box, a number or a tensor, either of which may come first."""
    second = second if alpha == 1 else second * alpha
    box, other = (first, second) if isinstance(first, IntervalTensor) else (second, first)
    if not isinstance(other, IntervalTensor):
        return box._map(operator.add, other)
    clean = None if box.clean is None or other.clean is None else box.clean + other.clean
    return box._made(clean, corners=(box.lower + other.lower, box.upper + other.upper))


def _difference(function: Callable[..., Any], first: Any, second: Any, *, alpha: float = 1) -> IntervalTensor:
    return _sum(function, first, second, alpha=-alpha)


def _product(function: Callable[..., Any], first: Any, second: Any) -> IntervalTensor:
    """A product with a number or a tensor, either of which may come first."""
    box, factor = (first, second) if isinstance(first, IntervalTensor) else (second, first)
    if isinstance(factor, IntervalTensor):
        raise NotImplementedError("no interval bound for the product of two boxes")
    clean = None if box.clean is None else box.clean * factor
    return box._made(clean, ball=(box.centre * factor, box.radius * abs(factor)))


def _quotient(function: Callable[..., Any], box: Any, divisor: Any) -> IntervalTensor:
    if isinstance(divisor, IntervalTensor):
        raise NotImplementedError("no interval bound for a division by a box")
    clean = None if box.clean is None else box.clean / divisor
    return box._made(clean, ball=(box.centre / divisor, box.radius / abs(divisor)))


ARITHMETIC = (_sum, _difference, _product, _quotient)
"""Rules whose box may come second."""

RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            *(F.linear, F.conv1d, F.conv2d, F.conv3d),
            *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        ),
        _affine,
    ),
    **dict.fromkeys((F.relu, torch.relu), _relu),
    **dict.fromkeys(
        (
            *(torch.tanh, torch.sigmoid, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze),
            *(torch.mean, torch.sum, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
            *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
            *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.pad),
        ),
        _monotone,
    ),
    F.batch_norm: _batch_norm,
    F.dropout: _dropout,
    **dict.fromkeys((torch.add, Tensor.add), _sum),
    **dict.fromkeys((torch.sub, Tensor.sub), _difference),
    **dict.fromkeys((torch.mul, Tensor.mul), _product),
    **dict.fromkeys((torch.div, Tensor.div), _quotient),
}
"""The sound rule of every function that has one, called as ``rule(function, box, ...)``."""


# ------------------------------------------------------------------------------------------------------ doors


def _check_eps(eps: float | Tensor) -> None:
    if isinstance(eps, Tensor):
        if not values_can_be_read(eps) or not eps.numel():
            return
        eps = float(eps.min())
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def _check_inside(inputs: Tensor, lowest: Tensor, highest: Tensor) -> None:
    """Refuse standardised pixels where [0, 1] was promised: cutting the box would leave nothing of it."""
    if not inputs.numel() or not values_can_be_read(inputs):
        return
    slack = torch.finfo(inputs.dtype).eps * torch.maximum(lowest.abs(), highest.abs())
    if bool(((inputs < lowest - slack) | (inputs > highest + slack)).any()):
        raise ValueError(
            f"inputs must lie within bounds, got values from {float(inputs.min()):g} to {float(inputs.max()):g}"
        )
