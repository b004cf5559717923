"""Certified training by interval bounds, with the regularisers that let its warm-up be short."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from telos.losses._algebra import Loss
from telos.losses._checks import check_floating, check_range, check_shape
from telos.losses._reduction import Denominator, Reduction, at_least_float32, check_reduction, reduce
from telos.losses._space import log_uniform, uniform
from telos.losses.classification.cross_entropy import cross_entropy_loss
from telos.losses.robust.interval import Bounds, IntervalTensor, margin_lower_bounds


def certified_cross_entropy_loss(
    margins: Float[Tensor, "batch others"],
    *,
    sample_weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Cross-entropy of the worst logits that bounds of the margins allow: an upper bound of the robust loss.

    ::

        L_rob = log(1 + sum_j exp(-m_j)),    m_j a lower bound of z_y - z_j over a box of inputs

    With the exact margins of one input it is the cross-entropy of its logits.

    Args:
        margins: (N, C - 1) from :func:`telos.losses.margin_lower_bounds`, any real numbers.
        sample_weight: (N,) one weight per example.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in nats: a scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models, arXiv
        1810.12715.

    Example:
        >>> import torch
        >>> certified_cross_entropy_loss(torch.tensor([[0.0, 0.0, 0.0]]))
        tensor(1.3863)
    """
    check_reduction(reduction, denominator)
    check_floating("margins", margins)
    check_shape("margins", margins, ("N", "C - 1"))
    if margins.shape[1] < 1:
        raise ValueError(f"margins must be over at least one other class, got {tuple(margins.shape)}")
    margins = at_least_float32(margins)
    weights = torch.ones_like(margins[:, 0])
    if sample_weight is not None:
        check_floating("sample_weight", sample_weight)
        check_shape("sample_weight", sample_weight, tuple(weights.shape))
        weights = sample_weight.to(margins.dtype)
    margins = torch.where(weights.unsqueeze(1) == 0, 0.0, margins)
    return reduce(F.pad(-margins, (1, 0)).logsumexp(1), weights, reduction, denominator)


def tightness_regularizer(
    relu_inputs: Sequence[IntervalTensor], input_radius: Tensor | float, *, tolerance: float = 0.5
) -> Tensor:
    r"""How much wider the bounds before the ReLUs are than the box of the inputs.

    With ``D_i`` the mean half width of the bounds before ReLU i, over batch and units, and ``D_0`` that of the
    inputs, over m ReLUs::

        L_tight = (1/m) sum_i max(0, t - D_0 / max(D_i, 1e-12)) / t

    A layer counts where it widens the box more than ``1 / t`` times.

    Args:
        relu_inputs: the m boxes that the ReLUs were given, which a box made with ``relu_inputs=[]`` collects.
        input_radius: ``D_0``, the mean half width of the box of the inputs.
        tolerance: t, in (0, 1].

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: without a ReLU, or for a tolerance out of range.

    Source:
        Fast Certified Robust Training with Short Warmup, arXiv 2103.17268.

    Example:
        >>> import torch
        >>> box = IntervalTensor(torch.tensor([[-4.0, 0.0]]), torch.tensor([[4.0, 8.0]]))
        >>> tightness_regularizer([box], 1.0)  # four times as wide
        tensor(0.5000)
    """
    _check_layers(relu_inputs, tolerance)
    widths = torch.stack([box.radius.mean() for box in relu_inputs])
    return (F.relu(tolerance - input_radius / widths.clamp_min(1e-12)) / tolerance).mean()


def relu_balance_regularizer(relu_inputs: Sequence[IntervalTensor], *, tolerance: float = 0.5) -> Tensor:
    r"""How unequal the shares of surely active and surely inactive ReLUs are.

    With bounds ``(lo, up)`` and centre c before a ReLU, sums over batch and units, and the masks A = ``lo > 0``
    and I = ``up < 0`` of units that are active, or inactive, in the whole box::

        R_mean = sum(c A) / -sum(c I)
        R_var  = sum((c - mean(c))^2 A) / sum((c - mean(c))^2 I)
        L_relu = (1/m) sum_i [ max(0, t - fold(R_mean)) + max(0, t - fold(R_var)) ] / t
        fold(R) = min(R, 1 / max(R, 1e-12))

    The masks are constants. Without an active unit both terms of a layer are 1 and have no gradient; a layer
    whose terms are not finite, as without an inactive unit, is left out of the sum (but not of m).

    Args:
        relu_inputs: the m boxes that the ReLUs were given, which a box made with ``relu_inputs=[]`` collects.
        tolerance: t, in (0, 1].

    Returns:
        A scalar in [0, 2].

    Raises:
        ValueError: without a ReLU, or for a tolerance out of range.

    Source:
        Fast Certified Robust Training with Short Warmup, arXiv 2103.17268.

    Example:
        >>> import torch
        >>> box = IntervalTensor(torch.tensor([[1.0, -5.0]]), torch.tensor([[1.0, -5.0]]))
        >>> relu_balance_regularizer([box])  # R_mean = 1/5, R_var = 1
        tensor(0.6000)
    """
    _check_layers(relu_inputs, tolerance)
    return torch.stack([_imbalance(box, tolerance) for box in relu_inputs]).mean()


def _imbalance(box: IntervalTensor, tolerance: float) -> Tensor:
    centre = box.centre
    active, inactive = (box.lower > 0).to(centre.dtype), (box.upper < 0).to(centre.dtype)
    spread = (centre - centre.mean()).square()
    mean_active, mean_inactive = (centre * active).mean(), -(centre * inactive).mean()
    var_active, var_inactive = (spread * active).sum(), (spread * inactive).sum()
    # a ratio over 0 folds to 0 or leaves the layer out; its denominator is replaced, for the gradient's sake
    defined = (mean_inactive > 0) & ((var_active > 0) | (var_inactive > 0))
    mean_ratio = mean_active / torch.where(mean_inactive > 0, mean_inactive, 1.0)
    var_ratio = var_active / torch.where(var_inactive > 0, var_inactive, 1.0)
    var_ratio = torch.where(var_inactive > 0, var_ratio, 0.0)
    terms = [F.relu(tolerance - _fold(ratio)) / tolerance for ratio in (mean_ratio, var_ratio)]
    return torch.where(defined & torch.isfinite(terms[0] + terms[1]), terms[0] + terms[1], 0.0)


def _fold(ratio: Tensor) -> Tensor:
    return torch.minimum(ratio, 1 / ratio.clamp_min(1e-12))


class FastIBPLoss(Loss):
    r"""Certified training by interval bound propagation with a short warm-up (the loss of "Fast IBP").

    With the bounds of the box ``|x' - x| <= eps``, cut to ``bounds``::

        loss = L_rob + regularization (1 - eps / eps_max) (L_tight + L_relu)

    (:func:`certified_cross_entropy_loss`, :func:`tightness_regularizer`, :func:`relu_balance_regularizer`). At
    ``eps = 0`` L_rob is the cross-entropy of the clean logits, and the regularisers see a box of ``min_eps``. At
    ``eps_max`` they end by themselves; the authors' code stops them with the last epoch of the warm-up, when
    this factor has reached 0.

    The recipe around it: weights from :func:`telos.nn.ibp_init_`, batch normalisation after every hidden layer
    (:func:`telos.nn.cnn7` has both in its layout), ``eps`` from
    :class:`telos.optim.SmoothedEpsSchedule` at every step, Adam at 5e-4 without weight decay, gradient norms
    clipped at 10. Count verified test errors in evaluation mode with :class:`telos.metrics.VerifiedError`. The
    cost is that of three to five passes of plain training. On several ranks each has the regularisers of its own
    part of the batch, as in the authors' code.

    Args:
        eps_max: radius to be robust against, in the unit in which an input has standard deviation ``std``.
        regularization: weight of the regularisers, at least 0; the paper has 0.5, and 0.1 to 0.2 for
            TinyImageNet.
        tolerance: t of the regularisers, in (0, 1].
        min_eps: radius of the regularisers' box while eps is 0.
        bounds: lowest and highest legal input value, numbers or tensors that broadcast to the inputs, or ``None``.
        std: what the inputs' channels were divided by, a tensor that broadcasts to the inputs such as one of
            shape (3, 1, 1); every eps is divided by it. ``None`` where they were not scaled.

    Raises:
        ValueError: for a parameter out of range.

    Source:
        Fast Certified Robust Training with Short Warmup, arXiv 2103.17268. The authors' code also logs a term on
        the standard deviation of the centres; it is no part of the loss, there or here.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> inputs, target = torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss = FastIBPLoss(0.1, bounds=(0.0, 1.0))
        >>> clean = torch.nn.functional.cross_entropy(model(inputs), target)
        >>> bool(loss(model, inputs, target) > clean)  # eps is eps_max
        True
        >>> sorted(loss.terms(model, inputs, target, eps=0.05))
        ['certified_cross_entropy', 'relu_balance', 'tightness']
    """

    family = "robust"
    space = {"regularization": log_uniform(0.05, 1.0), "tolerance": uniform(0.25, 0.75)}
    """Not searched: ``eps_max``, which is the threat, and ``min_eps``, which stands in for a radius of 0."""
    lowest: Tensor | None
    highest: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        eps_max: float = 8 / 255,
        regularization: float = 0.5,
        tolerance: float = 0.5,
        min_eps: float = 1e-6,
        *,
        bounds: Bounds | None = None,
        std: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_range("eps_max", eps_max, 0.0, float("inf"), open_low=True)
        check_range("regularization", regularization, 0.0, float("inf"))
        check_range("tolerance", tolerance, 0.0, 1.0, open_low=True)
        check_range("min_eps", min_eps, 0.0, float("inf"), open_low=True)
        self.eps_max, self.regularization = eps_max, regularization
        self.tolerance, self.min_eps = tolerance, min_eps
        lowest, highest = (None, None) if bounds is None else map(torch.as_tensor, bounds)
        if lowest is not None and highest is not None and bool((lowest >= highest).any()):
            raise ValueError(f"bounds must be (lowest, highest) with lowest < highest, got {bounds}")
        if std is not None and bool((std <= 0).any()):
            raise ValueError(f"std must be above 0, got {std.min().item()}")
        for name, value in (("lowest", lowest), ("highest", highest), ("std", std)):
            self.register_buffer(name, value, persistent=False)

    @property
    def bounds(self) -> Bounds | None:
        """Lowest and highest legal input value, if there are any."""
        return None if self.lowest is None or self.highest is None else (self.lowest, self.highest)

    def terms(
        self,
        model: Callable[[Any], Any],
        inputs: Tensor,
        target: Tensor,
        *,
        eps: float | None = None,
        sample_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> dict[str, Tensor]:
        """``certified_cross_entropy`` and, where they have a weight, ``tightness`` and ``relu_balance``."""
        eps = self._eps(eps)
        # an empty batch has no mean width
        regularised = self.intensity(eps) > 0 and inputs.shape[0] > 0
        if eps == 0 and not regularised:
            clean = cross_entropy_loss(
                model(inputs), target, sample_weight=sample_weight, denominator=denominator
            )
            return {"certified_cross_entropy": clean}
        radius = eps or self.min_eps
        box = IntervalTensor.around(
            inputs,
            radius if self.std is None else radius / self.std,
            self.bounds,
            # the point is for batch normalisation in training, and for the loss at eps = 0
            clean=eps == 0 or getattr(model, "training", True),
            relu_inputs=[] if regularised else None,
        )
        logits = model(box)
        if not isinstance(logits, IntervalTensor):
            raise TypeError(f"model must map a box to a box, got {type(logits).__name__}")
        if eps > 0:
            certified = certified_cross_entropy_loss(
                margin_lower_bounds(logits, target), sample_weight=sample_weight, denominator=denominator
            )
        else:
            assert logits.clean is not None
            certified = cross_entropy_loss(
                logits.clean, target, sample_weight=sample_weight, denominator=denominator
            )
        found = {"certified_cross_entropy": certified}
        if box.relu_inputs:
            found["tightness"] = tightness_regularizer(
                box.relu_inputs, box.radius.mean(), tolerance=self.tolerance
            )
            found["relu_balance"] = relu_balance_regularizer(box.relu_inputs, tolerance=self.tolerance)
        return found

    def forward(
        self,
        model: Callable[[Any], Any],
        inputs: Tensor,
        target: Tensor,
        *,
        eps: float | None = None,
        sample_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            model: maps inputs (N, ...) to logits (N, C), of the parts that :class:`IntervalTensor` lists.
            inputs: (N, ...) clean inputs.
            target: (N,) labels.
            eps: radius at this step, in [0, eps_max]; ``eps_max`` if not given.
            sample_weight: (N,) weight of every example in L_rob; the regularisers are means over the batch.
            denominator: what the mean of L_rob divides by; see :func:`telos.losses.reduce`.
        """
        found = self.terms(
            model, inputs, target, eps=eps, sample_weight=sample_weight, denominator=denominator
        )
        loss = found["certified_cross_entropy"]
        if "tightness" in found:
            loss = loss + self.intensity(self._eps(eps)) * (found["tightness"] + found["relu_balance"])
        return loss

    def intensity(self, eps: float) -> float:
        """Weight of the regularisers at this radius, ``regularization (1 - eps / eps_max)``."""
        return self.regularization * max(0.0, 1 - eps / self.eps_max)

    def _eps(self, eps: float | None) -> float:
        if eps is None:
            return self.eps_max
        # a schedule may end one rounding beside the radius
        check_range("eps", eps, 0.0, self.eps_max * (1 + 1e-9))
        return eps

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return (
            f"eps_max={self.eps_max:g}, regularization={self.regularization:g}, tolerance={self.tolerance:g}"
        )


def _check_layers(relu_inputs: Sequence[IntervalTensor], tolerance: float) -> None:
    check_range("tolerance", tolerance, 0.0, 1.0, open_low=True)
    if not relu_inputs:
        raise ValueError("relu_inputs must hold at least one box, got none")
