"""Direct coverage optimization: training for the best of N samples instead of for one."""

import math
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._algebra import ClassificationLoss, Loss
from telos.losses._checks import (
    check_floating,
    check_integer,
    check_label_values,
    check_shape,
    values_can_be_read,
)
from telos.losses._logps import sequence_logps
from telos.losses._reduction import (
    Denominator,
    Reduction,
    at_least_float32,
    at_target,
    check_reduction,
    classification_rows,
    reduce,
)
from telos.losses._space import log_uniform

Grouping: TypeAlias = Literal["proof", "step"]


def _log1mexp(exponent: Tensor) -> Tensor:
    """``log(1 - exp(a))`` of ``a < 0``, exact at both ends."""
    near = exponent > -math.log(2)
    return torch.where(
        near,
        (-torch.expm1(torch.where(near, exponent, -1.0))).log(),
        torch.log1p(-torch.where(near, -1.0, exponent).exp()),
    )


def _log_coverage(logps: Tensor, n_samples: float) -> Tensor:
    """``log(1 - (1 - p)^N)`` of ``logps = log p``, finite with a finite slope wherever log p is."""
    if n_samples == 1:
        return logps
    rare, sure = _limits(logps, n_samples)
    between = torch.where(rare | sure, -1.0, logps)
    coverage = _log1mexp(n_samples * _log1mexp(between))
    # the first two terms of the series in N p, whose error is (N p)^2 / 24
    series = logps + math.log(n_samples) - (n_samples - 1) / 2 * torch.where(sure, 0.0, logps).exp()
    return torch.where(sure, torch.zeros_like(logps), torch.where(rare, series, coverage))


def _factor(logps: Tensor, n_samples: float) -> Tensor:
    """``N p (1 - p)^(N - 1) / (1 - (1 - p)^N)`` without a gradient."""
    logps = logps.detach()
    if n_samples == 1:
        return torch.where(logps.isnan(), logps, 1.0)
    rare, sure = _limits(logps, n_samples)
    between = torch.where(rare | sure, -1.0, logps)
    log_miss = _log1mexp(between)
    log_factor = math.log(n_samples) + between + (n_samples - 1) * log_miss - _log1mexp(n_samples * log_miss)
    series = 1 - (n_samples - 1) / 2 * torch.where(sure, 0.0, logps).exp()
    return torch.where(sure, 0.0, torch.where(rare, series, log_factor.exp()))


def _limits(logps: Tensor, n_samples: float) -> tuple[Tensor, Tensor]:
    """Where N p is so small that its series is exact, and where p is 1 (rounding may lift log p above 0)."""
    smallest = -16.0 if logps.dtype == torch.float64 else -8.0
    return logps < smallest - math.log(n_samples), logps >= 0


def _check_n_samples(n_samples: float) -> None:
    if not (n_samples >= 1 and math.isfinite(n_samples)):
        raise ValueError(f"n_samples must be finite and at least 1, got {n_samples}")


def _values(logits: Tensor, target: Tensor, *, n_samples: float) -> Tensor:
    return at_target(torch.log_softmax(logits, -1), target, lambda logps: -_log_coverage(logps, n_samples))


def coverage_from_logps(logps: Float[Tensor, "*shape"], *, n_samples: float = 16.0) -> Tensor:
    r"""The logarithm of pass@N, the probability that at least one of N samples is right.

    ::

        log( 1 - (1 - p)^N ),     p = exp(logps)

    Its negative mean is the DCO loss of whatever the log-probabilities belong to: with
    ``token_logps(hidden, lm_head, labels, reduction="sum")`` that of sequences, without building their logits.

    Args:
        logps: log-probabilities of being right with one sample, any shape; what lies above 0 counts as 0.
        n_samples: N, at least 1, not necessarily whole.

    Returns:
        Log-coverages of the same shape, float32 for half precision; log p itself at ``N = 1``.

    Raises:
        ValueError: for a number of samples that is below 1 or not finite.
        TypeError: for a wrong dtype.

    Source:
        Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning,
        arXiv 2502.07154.

    Example:
        >>> import torch
        >>> coverage_from_logps(torch.tensor([0.5, 0.25]).log(), n_samples=2).exp()
        tensor([0.7500, 0.4375])
    """
    check_floating("logps", logps)
    _check_n_samples(n_samples)
    return _log_coverage(at_least_float32(logps), n_samples)


def dco_factor(logps: Float[Tensor, "*shape"], *, n_samples: float = 16.0) -> Tensor:
    r"""What DCO multiplies the gradient of cross-entropy with: 1 for an unsolved example, 0 for a solved one.

    ::

        F(N, p) = N p (1 - p)^(N - 1) / (1 - (1 - p)^N),     p = exp(logps)

    It falls with p from ``F(N, 0) = 1`` to ``F(N, 1) = 0`` (N > 1), and is near 0 from a few times 1/N on.
    The authors' code uses a rational approximation where ``N p < 0.1``, with a relative error up to 1.3e-4; this
    is exact to rounding.

    Args:
        logps: log-probabilities of being right with one sample, any shape; what lies above 0 counts as 0.
        n_samples: N, at least 1, not necessarily whole.

    Returns:
        Factors in [0, 1] of the same shape, without a gradient, float32 for half precision. They underflow to 0
        for confident examples.

    Raises:
        ValueError: for a number of samples that is below 1 or not finite.
        TypeError: for a wrong dtype.

    Source:
        Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning,
        arXiv 2502.07154.

    Example:
        >>> import torch
        >>> dco_factor(torch.tensor([0.0, 0.5, 1.0]).log(), n_samples=2)
        tensor([1.0000, 0.6667, 0.0000])
    """
    check_floating("logps", logps)
    _check_n_samples(n_samples)
    return _factor(at_least_float32(logps), n_samples)


def dco_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    n_samples: float = 16.0,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Direct coverage optimization: minus the log-probability that one of N sampled classes is the right one.

    ::

        L = -log( 1 - (1 - p_y)^N ),     p = softmax(logits)
        dL = F(N, p_y) d(-log p_y),      F of :func:`dco_factor`

    For a model that is asked N times and has a verifier pick: cross-entropy keeps raising the confidence of examples
    that N samples already solve, at the cost of those that they do not. Its minimiser is that of cross-entropy, and
    N = 1 is cross-entropy. Choose N near the number of samples at test time: a larger one lowers the accuracy of a
    single sample.

    The classes of every row are one answer each, also in (N, T, C); where an answer is a sequence of tokens use
    :func:`sequence_dco_loss`.

    Args:
        logits: (N, C) or (N, T, C) scores.
        target: (N,) or (N, T) labels in [0, C), or probabilities of the shape of ``logits``.
        n_samples: N, at least 1, not necessarily whole. The authors' command line has 1, which is cross-entropy;
            their experiments 1, 4, 16, 64 and 256.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in nats: a scalar, or the shape of the batch with ``reduction="none"``. The authors' code reports
        ``F * (-log p_y)`` instead, which has the same gradient.

    Raises:
        ValueError: for a wrong shape, a label out of range, a number of samples below 1 or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning,
        arXiv 2502.07154.

    Example:
        >>> import torch
        >>> dco_loss(torch.zeros(1, 2), torch.tensor([0]), n_samples=2)  # -log(3 / 4)
        tensor(0.2877)
    """
    _check_n_samples(n_samples)
    values, weights = classification_rows(
        partial(_values, n_samples=n_samples),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class DCOLoss(ClassificationLoss):
    """Direct coverage optimization over classes; see :func:`dco_loss`.

    Example:
        >>> import torch
        >>> DCOLoss(n_samples=2)(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.2877)
    """

    space = {"n_samples": log_uniform(1.0, 256.0)}

    def __init__(
        self,
        n_samples: float = 16.0,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        _check_n_samples(n_samples)
        self.n_samples = n_samples

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``-log(1 - (1 - p_y)^N)`` of each row."""
        return _values(logits, target, n_samples=self.n_samples)


def _sequence_rows(
    logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None,
    n_samples: float,
    length_normalize: bool,
    shift: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Value and weight of every sequence; one of which no token counts has weight 0."""
    check_floating("logits", logits)
    check_shape("logits", logits, ("N", "T", "C"))
    check_integer("labels", labels)
    check_shape("labels", labels, tuple(logits.shape[:2]))
    if sample_weight is not None:
        check_floating("sample_weight", sample_weight)
        check_shape("sample_weight", sample_weight, (logits.shape[0],))
    labels = torch.where(labels.long() == ignore_index, -100, labels.long())
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    check_label_values("labels", labels, logits.shape[-1], -100)
    dtype = at_least_float32(logits).dtype
    lengths = (labels != -100).sum(-1)
    weights = (lengths > 0).to(dtype)
    if sample_weight is not None:
        weights = torch.where(weights == 0, weights, weights * sample_weight.to(dtype))
    # a sequence of weight 0 may hold NaN
    logps = sequence_logps(logits, labels, (weights != 0).unsqueeze(-1).expand(labels.shape))
    values = -_log_coverage(logps, n_samples)
    return (values / lengths.clamp_min(1) if length_normalize else values), weights


def sequence_dco_loss(
    logits: Float[Tensor, "batch tokens classes"],
    labels: Integer[Tensor, "batch tokens"],
    *,
    n_samples: float = 16.0,
    length_normalize: bool = False,
    shift: bool = True,
    sample_weight: Float[Tensor, " batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Direct coverage optimization of whole sequences: minus the log-probability that one of N samples is right.

    ::

        log p = sum_t log softmax(logits_t)[labels_t+1]        over the tokens that count
        L = -log( 1 - (1 - p)^N )

    For supervised fine-tuning on answers or proofs of a language model that will be sampled N times and verified.
    One value per sequence: for long completions p is so small that this is cross-entropy summed over tokens minus
    ``log N``. Where the probability of the right answer cannot be computed (chains of thought), estimate it by
    sampling and use :func:`dco_weighted_nll_loss`. For large vocabularies, see :func:`coverage_from_logps`.

    Args:
        logits: (N, T, C) scores of the next token.
        labels: (N, T) tokens in [0, C) as the model reads them; ``ignore_index`` (or -100) at prompt and padding.
        n_samples: N, at least 1, not necessarily whole. The authors' command line has 1, which is cross-entropy;
            their experiments 1, 4, 16, 64 and 256.
        length_normalize: divide the loss of each sequence by its number of tokens. The paper does not; the default
            variant of the authors' code does.
        shift: whether the logits at t predict the label at t + 1; otherwise that at t.
        sample_weight: one weight per sequence.
        ignore_index: label of tokens that do not count. A sequence without any other token does not count either,
            where the authors' mean counts it as 0.
        reduction: ``"mean"`` over sequences, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in nats: a scalar, or (N,) with ``reduction="none"``. The authors' code reports ``F * (-log p)``
        instead, which has the same gradient.

    Raises:
        ValueError: for a wrong shape, a label out of range, a number of samples below 1 or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning,
        arXiv 2502.07154.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[-100, 0, 1]])  # two tokens of probability 1/2: p = 1/4
        >>> sequence_dco_loss(torch.zeros(1, 3, 2), labels, n_samples=2)  # -log(7 / 16)
        tensor(0.8267)
    """
    _check_n_samples(n_samples)
    rows = _sequence_rows(logits, labels, sample_weight, n_samples, length_normalize, shift, ignore_index)
    return reduce(*rows, reduction, denominator)


class SequenceDCOLoss(Loss):
    """Direct coverage optimization of sequences; see :func:`sequence_dco_loss`.

    A family of its own, ``"sequence"``: it gives one value per sequence where a classification loss gives one per
    token, and shifts the labels itself.

    Example:
        >>> import torch
        >>> SequenceDCOLoss(n_samples=2)(torch.zeros(1, 3, 2), torch.tensor([[-100, 0, 1]]))
        tensor(0.8267)
    """

    family = "sequence"
    space = {"n_samples": log_uniform(1.0, 256.0)}

    def __init__(
        self,
        n_samples: float = 16.0,
        length_normalize: bool = False,
        shift: bool = True,
        *,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_n_samples(n_samples)
        check_reduction(reduction)
        self.n_samples = n_samples
        self.length_normalize = length_normalize
        self.shift = shift
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def rows(
        self, logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One value and one weight per sequence."""
        return _sequence_rows(
            logits,
            labels,
            sample_weight,
            self.n_samples,
            self.length_normalize,
            self.shift,
            self.ignore_index,
        )

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The loss of logits (N, T, C) and labels (N, T)."""
        values, weights = self.rows(logits, labels, sample_weight=sample_weight)
        return reduce(values, weights, self.reduction, denominator)


def dco_weighted_nll_loss(
    nll: Float[Tensor, " batch"],
    p_hat: Float[Tensor, " batch"],
    *,
    n_samples: float = 16.0,
    sample_weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""DCO for chains of thought: ``F(N, p_hat) * nll`` with a probability that was estimated by sampling.

    The right answer may be reached by many chains, so its probability is not that of the one in the data. Sample some
    completions (the authors: 64 at temperature 1), let ``p_hat`` be the share with the right answer, and take
    for ``nll`` the cross-entropy of the completion in the data. The authors leave out examples with ``p_hat >= 0.1``
    and set ``p_hat = 0`` (plain cross-entropy) during the first 20 updates.

    Args:
        nll: (N,) minus the log-probability of each completion; or its mean over tokens.
        p_hat: (N,) estimated probabilities in [0, 1]; no gradient flows into them.
        n_samples: N, at least 1, not necessarily whole.
        sample_weight: one weight per example.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a probability out of range, a number of samples below 1 or an unknown
            reduction.
        TypeError: for a wrong dtype.

    Source:
        Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning,
        arXiv 2502.07154.

    Example:
        >>> import torch
        >>> nll, p_hat = torch.tensor([6.0, 6.0]), torch.tensor([0.0, 0.5])
        >>> dco_weighted_nll_loss(nll, p_hat, n_samples=2, reduction="none")
        tensor([6., 4.])
    """
    check_floating("nll", nll)
    check_shape("nll", nll, ("N",))
    check_floating("p_hat", p_hat)
    check_shape("p_hat", p_hat, tuple(nll.shape))
    _check_n_samples(n_samples)
    nll = at_least_float32(nll)
    if sample_weight is None:
        weights = torch.ones_like(nll)
    else:
        check_floating("sample_weight", sample_weight)
        check_shape("sample_weight", sample_weight, tuple(nll.shape))
        weights = sample_weight.to(nll.dtype)
    if values_can_be_read(p_hat) and (bad := ((p_hat < 0) | (p_hat > 1)) & (weights != 0)).any():
        raise ValueError(f"p_hat must lie in [0, 1], got {p_hat[bad][0].item()}")
    factor = _factor(at_least_float32(p_hat).log(), n_samples).to(nll.dtype)
    counts = weights != 0
    values = torch.where(counts, factor, 0.0) * torch.where(counts, nll, 0.0)
    return reduce(values, weights, reduction, denominator)


def group_dco_loss(
    step_logps: Float[Tensor, " steps"],
    proof_index: Integer[Tensor, " steps"],
    *,
    n_samples: float = 16.0,
    mode: Grouping = "proof",
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""DCO of proofs that are made of steps, from the log-probabilities of their steps (tactics).

    ::

        mode="proof"   L_k = -log( 1 - (1 - p_k)^N ),   log p_k = sum of step_logps of proof k
        mode="step"    L_s = -log( 1 - (1 - p_s)^N ),   log p_s = step_logps_s

    ``"proof"`` is for N attempts at whole proofs. ``"step"`` is for tree search: N is then the number of branches
    that a search may try at each state, and a proof of k steps needs about ``N^k`` samples; a small N searches narrow
    and deep, a large one wide and shallow, and an ensemble over N of 1, 4, 8, 16 and 32 found more proofs than any one.

    Args:
        step_logps: (S,) log-probability of each step given its state.
        proof_index: (S,) the proof of each step, in [0, S): a batch has no more proofs than steps.
        n_samples: N, at least 1, not necessarily whole.
        mode: ``"proof"`` or ``"step"``.
        reduction: ``"mean"`` over proofs, or over steps with ``mode="step"``; ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in nats: a scalar. With ``reduction="none"`` (S,): of every step, or of every proof number, 0 where it
        has no step.

    Raises:
        ValueError: for a wrong shape, an index out of range, a number of samples below 1, an unknown mode or reduction.
        TypeError: for a wrong dtype.

    Source:
        Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning,
        arXiv 2502.07154. RECONSTRUCTED from public summaries: the step-wise form and what its N means.

    Example:
        >>> import torch
        >>> logps, proof = torch.tensor([0.5, 0.5, 0.5]).log(), torch.tensor([0, 0, 1])
        >>> group_dco_loss(logps, proof, n_samples=2, reduction="none")
        tensor([0.8267, 0.2877, 0.0000])
    """
    check_floating("step_logps", step_logps)
    check_shape("step_logps", step_logps, ("S",))
    check_integer("proof_index", proof_index)
    check_shape("proof_index", proof_index, tuple(step_logps.shape))
    check_label_values("proof_index", proof_index, step_logps.shape[0])
    _check_n_samples(n_samples)
    if mode not in ("proof", "step"):
        raise ValueError(f"mode must be 'proof' or 'step', got {mode!r}")
    logps = at_least_float32(step_logps)
    weights = torch.ones_like(logps)
    if mode == "proof":
        empty = torch.zeros_like(logps)
        weights = (empty.index_add(0, proof_index.long(), weights) > 0).to(logps.dtype)
        logps = empty.index_add(0, proof_index.long(), logps)
    return reduce(-_log_coverage(logps, n_samples), weights, reduction, denominator)
