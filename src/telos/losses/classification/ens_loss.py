"""EnsLoss: at every step a fresh random convex, calibrated margin loss for binary classification."""

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from telos.losses._algebra import Loss
from telos.losses._checks import check_floating, check_integer, check_range, check_shape
from telos.losses._distributed import gather_with_gradient
from telos.losses._links import logistic
from telos.losses._reduction import (
    Denominator,
    Reduction,
    at_least_float32,
    check_reduction,
    classification_rows,
    reduce,
)
from telos.losses._space import uniform


def _inverse_box_cox(noise: Tensor, lam: float) -> Tensor:
    """``max(1 + lam z, 0)^(1/lam)``, and its limit ``exp(z)`` at lam = 0: a random positive magnitude."""
    if lam == 0:
        return noise.exp()
    inside = lam * noise > -1
    power = (torch.log1p(torch.where(inside, lam * noise, 0.0)) / lam).exp()
    return torch.where(inside, power, torch.inf if lam < 0 else 0.0)


def _signed_margins(logits: Tensor, target: Tensor) -> Tensor:
    return (2 * target - 1) * (logits[..., 1] - logits[..., 0])


def _margin_rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Margins and weights, each of the shape of ``target``; masks and weights as in the family."""
    check_floating("logits", logits)
    check_integer("target", target)
    if logits.shape != target.shape and logits.shape[-1:] in ((1,), (2,)):
        scores = logits
    elif logits.shape == target.shape:
        scores = logits.unsqueeze(-1)
    else:
        raise ValueError(
            f"logits must have shape {(*target.shape, 2)}, {(*target.shape, 1)} or {tuple(target.shape)} "
            f"for a target of shape {tuple(target.shape)} and two classes, got {tuple(logits.shape)}"
        )
    if scores.shape[-1] == 1:  # one score is that of class 1 against a class 0 of score 0
        scores = torch.cat([torch.zeros_like(scores), scores], -1)
    return classification_rows(
        _signed_margins,
        scores,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )


def calibrated_derivatives(
    margins: Float[Tensor, " batch"],
    noise: Float[Tensor, " batch"],
    *,
    lam: float = 0.0,
    clip: float = 1.0,
    shift: float = 1e-6,
    tail_power: float = 1.0,
    counts: Bool[Tensor, " batch"] | None = None,
) -> Tensor:
    r"""The derivatives of a random calibrated margin loss at the margins of a batch.

    A convex margin loss phi enters a gradient step only through ``g_i = phi'(s_i)``, and is calibrated where
    ``phi'(0) < 0``. So draw the values and let the order of the margins place them::

        d_i = BC^-1(z_i; lam) > 0,   BC^-1(z; 0) = exp(z),   BC^-1(z; lam) = max(1 + lam z, 0)^(1 / lam)
        r   = sort(max(-d, -clip))             ascending
        g   = r_(j) for the j-th smallest margin                            (nondecreasing: phi is convex)
        g_i = g_i / s_i^tail_power  where  s_i > 1                          (the right tail decays)
        g_i = g_i - shift                                                   (strictly negative)

    Args:
        margins: (N,) margins s, positive where the prediction is right.
        noise: (N,) standard normal draws z; only the set of its values matters.
        lam: parameter of the inverse Box-Cox transform: heavier tails below 0, lighter ones above.
        clip: largest magnitude, above 0; it keeps steps comparable with those of the hinge loss.
        shift: subtracted in the end, at least 0.
        tail_power: the authors' code has 1. RECONSTRUCTED for other values.
        counts: (N,) which examples exist; the others take no part in the sort and get 0.

    Returns:
        (N,) derivatives in [-clip - shift, -shift], detached; NaN where the margin is NaN. Ties are kept in
        the order of the batch.

    Raises:
        ValueError: for a wrong shape or a parameter out of range.
        TypeError: for a wrong dtype.

    Source:
        EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification, arXiv
        2409.00908.

    Example:
        >>> import torch
        >>> margins, noise = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.0, 1.0, -0.6931])
        >>> calibrated_derivatives(margins, noise)
        tensor([-0.2500, -1.0000, -1.0000])
    """
    check_floating("margins", margins)
    check_shape("margins", margins, ("N",))
    check_floating("noise", noise)
    check_shape("noise", noise, tuple(margins.shape))
    _check(lam, clip, shift, tail_power)
    with torch.no_grad():
        margins = at_least_float32(margins)
        derivatives, order = -_inverse_box_cox(noise.to(margins.dtype), lam).clamp_max(clip), margins
        if counts is not None:  # what does not exist comes last in both orders
            derivatives = torch.where(counts, derivatives, 0.0)
            order = torch.where(counts, margins, torch.inf)
        ranks = order.argsort(stable=True)
        matched = torch.zeros_like(margins).scatter(0, ranks, derivatives.sort().values)
        matched = matched / torch.where(margins > 1, margins, 1.0) ** tail_power - shift
        matched = torch.where(margins.isnan(), margins, matched)
        return matched if counts is None else torch.where(counts, matched, 0.0)


def ens_loss(
    logits: Float[Tensor, "*shape"],
    target: Integer[Tensor, "*batch"],
    *,
    lam: float = 0.0,
    clip: float = 1.0,
    shift: float = 1e-6,
    tail_power: float = 1.0,
    noise: Float[Tensor, "*batch"] | None = None,
    generator: torch.Generator | None = None,
    gather_distributed: bool = False,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""EnsLoss: a gradient step on a random calibrated margin loss, as dropout is one on a random network.

    With the margins ``s_i = t_i f(x_i)``, ``t = 2 y - 1``, and ``g`` from :func:`calibrated_derivatives`::

        loss = mean_i stop_grad(g_i) * s_i,     d loss / d f_i = t_i g_i / N

    The value is a carrier of that gradient, may be negative and says nothing about fit: watch accuracy or the
    binary cross-entropy, which :class:`EnsLoss` gives in evaluation mode. The backward is not the derivative
    of the value, in which ``g`` depends on the scores. The derivatives are matched within the batch at hand,
    so that the loss depends on the batch size; examples that do not count take no part.

    Args:
        logits: (N, 2) scores of both classes, of which the difference ``logits[:, 1] - logits[:, 0]`` is f;
            or f itself, as (N,) or (N, 1). Further batch dimensions are flattened.
        target: (N,) labels 0 and 1.
        lam: parameter of the random magnitudes; see :func:`calibrated_derivatives`.
        clip: largest magnitude of a derivative.
        shift: keeps derivatives below 0.
        tail_power: decay of the derivative at margins above 1.
        noise: standard normal draws in the shape of ``target``; drawn if not given.
        generator: source of the noise. Without one it is torch's default generator of the device of
            ``logits``, so that ``torch.manual_seed`` repeats a run. Give every rank another seed.
        gather_distributed: match the derivatives over the batches of all ranks, of which each then computes
            the loss. Otherwise each rank sorts its own.
        class_weight: (2,) weight of each class; it scales the derivatives after they are matched.
        sample_weight: one weight per example, likewise.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (``w_i g_i s_i``; with ``gather_distributed`` those of
            all ranks, flattened).
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape (more than two classes among them), a label or a parameter out of range,
        or an
            unknown reduction.
        TypeError: for a wrong dtype, or probabilities as target.

    Source:
        EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification, arXiv
        2409.00908.

    Example:
        >>> import torch
        >>> scores = torch.tensor([0.5, -0.5], requires_grad=True)
        >>> ens_loss(scores, torch.tensor([1, 1]), noise=torch.tensor([0.1, 0.2])).backward()
        >>> scores.grad  # noise above 0 is clipped: the hinge loss
        tensor([-0.5000, -0.5000])
    """
    check_reduction(reduction, denominator)
    _check(lam, clip, shift, tail_power)
    margins, weights = _margin_rows(logits, target, class_weight, sample_weight, ignore_index)
    if noise is None:
        device = margins.device if generator is None else generator.device
        noise = torch.randn(margins.shape, generator=generator, dtype=margins.dtype, device=device).to(
            margins.device
        )
    check_floating("noise", noise)
    check_shape("noise", noise, tuple(target.shape))
    shape = margins.shape
    margins, weights, noise = margins.reshape(-1), weights.reshape(-1), noise.to(margins.dtype).reshape(-1)
    if gather_distributed:
        margins, weights, noise = gather_with_gradient(margins, weights, noise)
    derivatives = calibrated_derivatives(
        margins, noise, lam=lam, clip=clip, shift=shift, tail_power=tail_power, counts=weights != 0
    )
    values = derivatives * margins
    if not gather_distributed:
        values, weights = values.reshape(shape), weights.reshape(shape)
    return reduce(values, weights, reduction, denominator)


class EnsLoss(Loss):
    """A random calibrated loss at every training step; see :func:`ens_loss`.

    In evaluation mode it is the binary cross-entropy ``log(1 + exp(-s))``, so that a validation loss means
    something.

    Args:
        lam: parameter of the random magnitudes. ``state_dict`` saves it, since ``resample`` moves it.
        clip: largest magnitude of a derivative.
        shift: keeps derivatives below 0.
        tail_power: decay of the derivative at margins above 1.
        gather_distributed: match the derivatives over the batches of all ranks.
        lam_range: where ``resample`` draws ``lam`` from; the authors use (-1, 1) for images and tables and
            (0, 1) for text, and draw every few epochs. Their published configurations keep ``lam = 0``.
        class_weight: (2,) weight of each class.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> loss = EnsLoss().eval()
        >>> loss(torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
        tensor(0.1269)
    """

    family = "classification"
    binary_only = True
    space = {"lam": uniform(-1.0, 1.0)}
    """Not searched: ``clip``, ``shift`` and ``tail_power``, which the authors keep: they bound the derivatives."""
    class_weight: Tensor | None

    def __init__(
        self,
        lam: float = 0.0,
        clip: float = 1.0,
        shift: float = 1e-6,
        tail_power: float = 1.0,
        gather_distributed: bool = False,
        lam_range: tuple[float, float] | None = None,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        _check(lam, clip, shift, tail_power)
        if lam_range is not None and not lam_range[0] < lam_range[1]:
            raise ValueError(f"lam_range must hold a lower and a higher number, got {lam_range}")
        self.lam, self.clip, self.shift, self.tail_power = lam, clip, shift, tail_power
        self.gather_distributed = gather_distributed
        self.lam_range = lam_range
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def resample(self, generator: torch.Generator | None = None) -> float:
        """Draw ``lam`` uniformly from ``lam_range`` (call it every few epochs) and return it."""
        if self.lam_range is None:
            raise ValueError("lam_range must be given to resample lam, got None")
        low, high = self.lam_range
        device = None if generator is None else generator.device
        u = torch.rand((), generator=generator, device=device, dtype=torch.float64)
        self.lam = low + (high - low) * u.item()
        return self.lam

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        sample_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The carrier of a random gradient in training mode, the binary cross-entropy in evaluation mode."""
        if not self.training:
            margins, weights = _margin_rows(
                logits, target, self.class_weight, sample_weight, self.ignore_index
            )
            return reduce(logistic(margins), weights, self.reduction, denominator)
        return ens_loss(
            logits,
            target,
            lam=self.lam,
            clip=self.clip,
            shift=self.shift,
            tail_power=self.tail_power,
            noise=noise,
            generator=generator,
            gather_distributed=self.gather_distributed,
            class_weight=self.class_weight,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            denominator=denominator,
        )

    def get_extra_state(self) -> Tensor:
        """``lam``, for ``state_dict``."""
        return torch.tensor(self.lam, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """``lam``, from ``load_state_dict``."""
        self.lam = float(state)


def _check(lam: float, clip: float, shift: float, tail_power: float) -> None:
    check_range("lam", lam, float("-inf"), float("inf"), open_low=True)
    check_range("clip", clip, 0.0, float("inf"), open_low=True)
    check_range("shift", shift, 0.0, float("inf"))
    check_range("tail_power", tail_power, 0.0, float("inf"))
