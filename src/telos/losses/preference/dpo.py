"""Direct preference optimisation: losses of the log-probabilities of a chosen and a rejected answer."""

import torch
from jaxtyping import Float
from torch import Tensor

from telos.losses._algebra import Loss
from telos.losses._checks import check_floating, check_range, check_shape
from telos.losses._links import logistic
from telos.losses._reduction import Denominator, Reduction, at_least_float32, check_reduction, reduce
from telos.losses._space import log_uniform, uniform


def _pair_rows(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    sample_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios to the reference of the chosen and the rejected answers, and the weights of the pairs.

    Without a reference (which has no gradient) the log-ratios are the log-probabilities. Pairs of weight 0 are
    replaced by zeros, so that a NaN in them reaches nothing.
    """
    given = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        missing = "ref_chosen_logps" if ref_chosen_logps is None else "ref_rejected_logps"
        raise ValueError(f"{missing} must be given with the other reference, or both be None")
    if sample_weight is not None:
        given["sample_weight"] = sample_weight
    for name, tensor in given.items():
        if tensor is not None:
            check_floating(name, tensor)
            first = name == "policy_chosen_logps"
            check_shape(name, tensor, ("N",) if first else tuple(policy_chosen_logps.shape))
    chosen, rejected = at_least_float32(policy_chosen_logps), at_least_float32(policy_rejected_logps)
    if ref_chosen_logps is not None and ref_rejected_logps is not None:
        chosen = chosen - at_least_float32(ref_chosen_logps.detach())
        rejected = rejected - at_least_float32(ref_rejected_logps.detach())
    weights = torch.ones_like(chosen) if sample_weight is None else sample_weight.to(chosen.dtype)
    counts = weights != 0
    return torch.where(counts, chosen, 0.0), torch.where(counts, rejected, 0.0), weights


def _dpo_values(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    margin = beta * (chosen - rejected)
    if label_smoothing == 0:
        return logistic(margin)
    return (1 - label_smoothing) * logistic(margin) + label_smoothing * logistic(-margin)


def _ipo_values(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    return (chosen - rejected - 1 / (2 * beta)).square()


def dpo_loss(
    policy_chosen_logps: Float[Tensor, " batch"],
    policy_rejected_logps: Float[Tensor, " batch"],
    ref_chosen_logps: Float[Tensor, " batch"] | None = None,
    ref_rejected_logps: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sample_weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Direct preference optimisation (DPO): logistic regression on the difference of two log-ratios.

    With ``u = log pi(y | x) - log pi_ref(y | x)`` of the chosen answer w and the rejected answer l::

        D = u_w - u_l
        loss = (1 - e) log(1 + exp(-beta D)) + e log(1 + exp(beta D))

    where e is the label smoothing: the probability that a preference is the wrong way round (conservative DPO).

    Args:
        policy_chosen_logps: (N,) log-probabilities in nats of the chosen answers, each summed over its tokens
            (:func:`telos.losses.sequence_logps`, :func:`telos.losses.token_logps`).
        policy_rejected_logps: (N,) those of the rejected answers.
        ref_chosen_logps: (N,) the same under the reference model, without gradient; ``None`` for no reference.
        ref_rejected_logps: (N,) likewise.
        beta: strength of the pull to the reference, above 0; small values let the policy go far.
        label_smoothing: e in [0, 0.5).
        sample_weight: (N,) one weight per pair.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in nats: a scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a parameter out of range, one reference without the other or an unknown
            reduction.
        TypeError: for a wrong dtype.

    Source:
        Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv 2305.18290.

    Example:
        >>> import torch
        >>> same = torch.tensor([-3.0])
        >>> dpo_loss(same, same, same, same)
        tensor(0.6931)
        >>> dpo_loss(same + 20, same - 20, same, same)
        tensor(0.0181)
    """
    check_reduction(reduction, denominator)
    _check_dpo(beta, label_smoothing)
    chosen, rejected, weights = _pair_rows(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, sample_weight
    )
    return reduce(_dpo_values(chosen, rejected, beta, label_smoothing), weights, reduction, denominator)


class DPOLoss(Loss):
    """Direct preference optimisation; see :func:`dpo_loss`.

    Args:
        beta: strength of the pull to the reference, above 0.
        label_smoothing: in [0, 0.5).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: for a parameter out of range or an unknown reduction.

    Source:
        Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv 2305.18290.

    Example:
        >>> import torch
        >>> same = torch.tensor([-3.0])
        >>> DPOLoss(beta=0.5)(same, same - 2, same, same)
        tensor(0.3133)
    """

    family = "preference"
    space = {"beta": log_uniform(0.01, 1.0), "label_smoothing": uniform(0.0, 0.3)}

    def __init__(
        self, beta: float = 0.1, label_smoothing: float = 0.0, *, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        _check_dpo(beta, label_smoothing)
        self.beta, self.label_smoothing = beta, label_smoothing
        self.reduction: Reduction = reduction

    def rows(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One value and one weight per pair."""
        chosen, rejected, weights = _pair_rows(
            policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, sample_weight
        )
        return _dpo_values(chosen, rejected, self.beta, self.label_smoothing), weights

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The reduced loss of a batch of pairs."""
        values, weights = self.rows(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            sample_weight=sample_weight,
        )
        return reduce(values, weights, self.reduction, denominator)

    def extra_repr(self) -> str:
        """The hyper-parameters, for ``print``."""
        return f"beta={self.beta:g}, label_smoothing={self.label_smoothing:g}"


def ipo_loss(
    policy_chosen_logps: Float[Tensor, " batch"],
    policy_rejected_logps: Float[Tensor, " batch"],
    ref_chosen_logps: Float[Tensor, " batch"] | None = None,
    ref_rejected_logps: Float[Tensor, " batch"] | None = None,
    *,
    beta: float = 0.1,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    sample_weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Identity preference optimisation (IPO): the difference of two log-ratios is drawn to a finite margin.

    With ``u = log pi(y | x) - log pi_ref(y | x)`` of the chosen answer w and the rejected answer l::

        loss = ( u_w / n_w - u_l / n_l - 1 / (2 beta) )^2

    where the lengths n are 1 unless they are given. The paper has sums over tokens and no lengths; the common
    implementations use means over tokens, which the paper's authors have confirmed to be what they meant. So
    either pass sums together with the lengths, or means without; sums without lengths are the paper's formula to
    the letter, for which beta has to be smaller.

    Args:
        policy_chosen_logps: (N,) log-probabilities in nats of the chosen answers.
        policy_rejected_logps: (N,) those of the rejected answers.
        ref_chosen_logps: (N,) the same under the reference model, without gradient; ``None`` for no reference.
        ref_rejected_logps: (N,) likewise.
        beta: above 0; the margin is ``1 / (2 beta)`` nats.
        chosen_lengths: (N,) numbers of tokens, at least 1, by which the log-ratios are divided, or ``None``.
        rejected_lengths: (N,) likewise, given where ``chosen_lengths`` is.
        sample_weight: (N,) one weight per pair.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in squared nats: a scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a beta that is not above 0, one reference or one tensor of lengths without
            the other, or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv 2310.12036.

    Example:
        >>> import torch
        >>> same = torch.tensor([-3.0])
        >>> ipo_loss(same, same, same, same, beta=0.25)
        tensor(4.)
        >>> ipo_loss(same + 2, same, same, same, beta=0.25)  # the margin is met
        tensor(0.)
    """
    check_reduction(reduction, denominator)
    _check_beta(beta)
    chosen, rejected, weights = _pair_rows(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, sample_weight
    )
    chosen, rejected = _per_token(chosen, rejected, chosen_lengths, rejected_lengths)
    return reduce(_ipo_values(chosen, rejected, beta), weights, reduction, denominator)


class IPOLoss(Loss):
    """Identity preference optimisation; see :func:`ipo_loss`.

    Args:
        beta: above 0; the margin is ``1 / (2 beta)`` nats.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: for a beta that is not above 0 or an unknown reduction.

    Source:
        A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv 2310.12036.

    Example:
        >>> import torch
        >>> same, lengths = torch.tensor([-3.0]), torch.tensor([5])
        >>> IPOLoss(beta=0.25)(same + 10, same, same, same, chosen_lengths=lengths, rejected_lengths=lengths)
        tensor(0.)
    """

    family = "preference"
    space = {"beta": log_uniform(0.01, 1.0)}

    def __init__(self, beta: float = 0.1, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        _check_beta(beta)
        self.beta = beta
        self.reduction: Reduction = reduction

    def rows(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One value and one weight per pair."""
        chosen, rejected, weights = _pair_rows(
            policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, sample_weight
        )
        chosen, rejected = _per_token(chosen, rejected, chosen_lengths, rejected_lengths)
        return _ipo_values(chosen, rejected, self.beta), weights

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        sample_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The reduced loss of a batch of pairs."""
        values, weights = self.rows(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            sample_weight=sample_weight,
        )
        return reduce(values, weights, self.reduction, denominator)

    def extra_repr(self) -> str:
        """The hyper-parameter, for ``print``."""
        return f"beta={self.beta:g}"


def _per_token(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor | None, rejected_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    if chosen_lengths is None and rejected_lengths is None:
        return chosen, rejected
    for name, lengths in (("chosen_lengths", chosen_lengths), ("rejected_lengths", rejected_lengths)):
        if lengths is None:
            raise ValueError(f"{name} must be given with the other lengths, or both be None")
        check_shape(name, lengths, tuple(chosen.shape))
    assert chosen_lengths is not None
    assert rejected_lengths is not None
    # an empty answer has a log-ratio of 0, whatever it is divided by
    return chosen / chosen_lengths.clamp_min(1), rejected / rejected_lengths.clamp_min(1)


def _check_beta(beta: float) -> None:
    check_range("beta", beta, 0.0, float("inf"), open_low=True)


def _check_dpo(beta: float, label_smoothing: float) -> None:
    _check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
