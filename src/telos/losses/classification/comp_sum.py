"""Comp-sum losses, from sum-exponential through cross-entropy to MAE, and their smooth adversarial form."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._algebra import ClassificationLoss
from telos.losses._checks import check_integer, check_label_values, check_range, check_shape
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
from telos.losses.classification._adversarial import AdversarialRowsLoss
from telos.losses.robust.attacks import evaluation_mode, pgd_attack


def _phi(log1p_u: Tensor, tau: float) -> Tensor:
    """``Phi_tau(u)`` from ``log(1 + u)``; expm1 keeps it accurate near tau = 1."""
    return log1p_u if tau == 1 else torch.expm1((1 - tau) * log1p_u) / (1 - tau)


def _values(logits: Tensor, target: Tensor, *, tau: float) -> Tensor:
    # log(1 + u_y) = -log p_y: no exponential of raw score differences
    return at_target(-torch.log_softmax(logits, -1), target, partial(_phi, tau=tau))


def _margin_distance(logits: Tensor, target: Tensor, adversarial_logits: Tensor) -> Tensor:
    """``||D_x' - D_x||_2`` of the margin vectors, in O(C) for every class at once.

    With the shift ``d = h(x') - h(x)`` the squared norm is ``sum_k (d_y - d_k)^2``, which is
    ``C (d_y - mean d)^2 + sum_k (d_k - mean d)^2``.
    """
    shift = adversarial_logits - logits
    square = (shift - shift.mean(-1, keepdim=True)).square()
    return at_target(square.shape[-1] * square + square.sum(-1, keepdim=True), target, safe_sqrt)


def _smooth_adversarial_values(
    logits: Tensor, target: Tensor, adversarial_logits: Tensor, *, tau: float, rho: float, nu: float
) -> Tensor:
    return _values(logits / rho, target, tau=tau) + nu * _margin_distance(logits, target, adversarial_logits)


def _rho_margin_values(logits: Tensor, target: Tensor, *, tau: float, rho: float) -> Tensor:
    margin = logits.gather(-1, target.unsqueeze(-1)) - logits
    others = torch.ones_like(logits).scatter(-1, target.unsqueeze(-1), 0.0)
    return _phi(torch.log1p(((1 - margin / rho).clamp(0, 1) * others).sum(-1)), tau)


def comp_sum_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    tau: float = 1.0,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Comp-sum loss: a family from sum-exponential through cross-entropy to MAE.

    With ``p = softmax(logits)`` and ``u_y = sum_{k != y} exp(h_k - h_y) = 1 / p_y - 1``::

        Phi_tau(u) = ((1 + u)^(1 - tau) - 1) / (1 - tau),   Phi_1(u) = log(1 + u)
        loss = Phi_tau(u_y) = (p_y^(tau - 1) - 1) / (1 - tau)

    tau = 0 is the sum-exponential loss, 1 cross-entropy, 1 + q with 0 < q < 1 generalised cross-entropy, 2
    MAE (``1 - p_y``, half the l1 distance to the label). The gradient is ``p_y^(tau - 1) (p - e_y)``: tau
    below 1 is hard on mistakes; tau above 1 forgives them, and learns slowly where there are many classes.

    Args:
        logits: (N, C) or (N, T, C) scores h.
        target: (N,) or (N, T) labels in [0, C), or probabilities q of the shape of ``logits``, for which the
            loss is ``sum_y q_y loss(h, y)``.
        tau: at least 0.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or the shape of the batch with ``reduction="none"``. Below tau = 1 it grows like
        ``exp((1 - tau) * margin)`` and may overflow to infinity in float32.

    Raises:
        ValueError: for a wrong shape, a label out of range, a negative tau or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Cross-Entropy Loss Functions: Theoretical Analysis and Applications, arXiv 2304.07288.

    Example:
        >>> import torch
        >>> logits, target = torch.zeros(1, 4), torch.tensor([2])
        >>> [round(comp_sum_loss(logits, target, tau=tau).item(), 4) for tau in (0.0, 1.0, 2.0)]
        [3.0, 1.3863, 0.75]
    """
    check_range("tau", tau, 0.0, float("inf"))
    values, weights = classification_rows(
        partial(_values, tau=tau),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class CompSumLoss(ClassificationLoss):
    """Comp-sum loss; see :func:`comp_sum_loss`.

    Example:
        >>> import torch
        >>> CompSumLoss(tau=2.0)(torch.zeros(1, 4), torch.tensor([2]))
        tensor(0.7500)
    """

    space = {"tau": uniform(0.0, 2.0)}

    def __init__(
        self,
        tau: float = 1.0,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        check_range("tau", tau, 0.0, float("inf"))
        self.tau = tau

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``Phi_tau(1 / p_y - 1)`` of each row."""
        return _values(logits, target, tau=self.tau)


def smooth_adversarial_comp_sum_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    adversarial_logits: Float[Tensor, "*batch classes"],
    tau: float = 1.0,
    rho: float = 1.0,
    nu: float = 1.0,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Smooth adversarial comp-sum loss (ADV-COMP-SUM).

    A comp-sum loss of the clean scores, and how far the attack can move the vector of margins
    ``D_x = (h_y(x) - h_k(x))_k``::

        Phi_tau( sum_{k != y} exp(-(h_y - h_k) / rho) ) + nu * || D_x' - D_x ||_2

    It bounds the adversarial rho-margin loss wherever ``nu >= sqrt(C - 1) / rho``. The attack that makes
    ``x'`` is :func:`comp_sum_attack`. RECONSTRUCTED: that rho divides the margin inside the exponential; the
    bound needs it.

    Args:
        logits: (N, C) or (N, T, C) scores at the clean inputs.
        target: labels in [0, C) or probabilities of the shape of ``logits``.
        adversarial_logits: scores at the perturbed inputs, of the shape of ``logits``; gradients flow into
            both.
        tau: at least 0; the paper tunes it in [0, 1].
        rho: margin scale, above 0.
        nu: weight of the margin shift, at least 0.
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
        Cross-Entropy Loss Functions: Theoretical Analysis and Applications, arXiv 2304.07288.

    Example:
        >>> import torch
        >>> clean, target = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> moved = torch.tensor([[0.0, 1.0]])
        >>> smooth_adversarial_comp_sum_loss(clean, target, adversarial_logits=moved, nu=0.5)
        tensor(1.3133)
    """
    _check_margin(tau, rho, nu)
    values, weights = classification_rows(
        partial(_smooth_adversarial_values, tau=tau, rho=rho, nu=nu),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        companions={"adversarial_logits": adversarial_logits},
    )
    return reduce(values, weights, reduction, denominator)


def comp_sum_attack(
    model: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, "batch ..."],
    target: Integer[Tensor, " batch"],
    *,
    radius: float = 8 / 255,
    steps: int = 10,
    step_size: float | None = None,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """The inner maximisation of the smooth adversarial loss: PGD on ``||D_x' - D_x||_2``.

    Starts at ``x + 0.001 * N(0, 1)``, since the distance has no slope at ``x`` itself.

    Args:
        model: inputs to logits (N, C). A module is attacked in evaluation mode, so that no running statistics
            move, and gets its modes back; no parameter gradient is touched.
        inputs: (N, ...) clean inputs, within ``bounds``.
        target: (N,) labels.
        radius: size of the ball.
        steps: number of ascent steps.
        step_size: length of a step; ``2.5 * radius / steps`` if not given.
        norm: ``"linf"`` or ``"l2"``.
        bounds: lowest and highest legal input value, or ``None``.
        generator: source of the random start.

    Returns:
        Perturbed inputs of the shape of ``inputs``, detached.

    Raises:
        ValueError: for a parameter or a label out of range, inputs outside ``bounds`` or a wrong shape.
        TypeError: for a wrong dtype.

    Source:
        Cross-Entropy Loss Functions: Theoretical Analysis and Applications, arXiv 2304.07288.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> moved = comp_sum_attack(model, torch.full((1, 2), 0.5), torch.tensor([0]), radius=0.1)
        >>> bool((moved - 0.5).abs().max() <= 0.1 + 1e-6)
        True
    """
    check_shape("target", target, (inputs.shape[0],))
    check_integer("target", target)
    target = target.long()
    with evaluation_mode(model):
        with torch.no_grad():
            clean = at_least_float32(model(inputs))
        check_label_values("target", target, clean.shape[-1])
        return pgd_attack(
            lambda moved: _margin_distance(clean, target, at_least_float32(model(moved))).sum(),
            inputs,
            radius=radius,
            steps=steps,
            step_size=step_size,
            norm=norm,
            bounds=bounds,
            start="gaussian",
            generator=generator,
        )


class SmoothAdversarialCompSumLoss(AdversarialRowsLoss):
    """Smooth adversarial comp-sum loss; see :func:`smooth_adversarial_comp_sum_loss`.

    Example:
        >>> import torch
        >>> clean, target = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> SmoothAdversarialCompSumLoss(nu=0.5)(clean, target, adversarial_logits=torch.tensor([[0.0, 1.0]]))
        tensor(1.3133)
    """

    space = {"tau": uniform(0.0, 1.0), "rho": log_uniform(0.1, 10.0), "nu": log_uniform(0.1, 10.0)}
    attack = staticmethod(comp_sum_attack)

    def __init__(
        self,
        tau: float = 1.0,
        rho: float = 1.0,
        nu: float = 1.0,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        _check_margin(tau, rho, nu)
        self.tau, self.rho, self.nu = tau, rho, nu

    def _formula(self, logits: Tensor, target: Tensor, adversarial_logits: Tensor) -> Tensor:
        return _smooth_adversarial_values(
            logits, target, adversarial_logits, tau=self.tau, rho=self.rho, nu=self.nu
        )


def rho_margin_comp_sum_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"],
    *,
    tau: float = 1.0,
    rho: float = 1.0,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Rho-margin comp-sum loss, ``Phi_tau(sum_{k != y} clip(1 - (h_y - h_k) / rho, 0, 1))``.

    At adversarial scores this is the tight, non-smooth loss that :func:`smooth_adversarial_comp_sum_loss`
    bounds: made to be evaluated, flat wherever a margin lies outside [0, rho].

    Args:
        logits: (N, C) or (N, T, C) scores, usually at perturbed inputs.
        target: labels in [0, C); probabilities are refused, since they would cost O(C^2) a row.
        tau: at least 0.
        rho: margin, above 0.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label or a parameter out of range, or an unknown reduction.
        TypeError: for a wrong dtype, or probabilities as target.

    Source:
        Cross-Entropy Loss Functions: Theoretical Analysis and Applications, arXiv 2304.07288.

    Example:
        >>> import torch
        >>> rho_margin_comp_sum_loss(torch.tensor([[0.5, 0.0]]), torch.tensor([0]))
        tensor(0.4055)
    """
    _check_margin(tau, rho, 0.0)
    if target.is_floating_point():
        raise TypeError(f"target must hold labels of an integer dtype, got {target.dtype}")
    values, weights = classification_rows(
        partial(_rho_margin_values, tau=tau, rho=rho),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


def _check_margin(tau: float, rho: float, nu: float) -> None:
    check_range("tau", tau, 0.0, float("inf"))
    check_range("rho", rho, 0.0, float("inf"), open_low=True)
    check_range("nu", nu, 0.0, float("inf"))
