"""Log-probabilities of tokens: from logits, and from hidden states without ever building the logits."""

from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from telos.kernels.fused_linear import (
    ChunkSize,
    autocast_dtype,
    eager_in_compiled_code,
    fused_linear_rows,
    softmax_nll_,
)
from telos.losses._checks import (
    check_floating,
    check_integer,
    check_label_values,
    check_range,
    check_shape,
)
from telos.losses._reduction import at_least_float32

TokenReduction: TypeAlias = Literal["none", "sum", "mean"]
Cutoff: TypeAlias = Literal["clamp", "zero"]

# the label of padding and prompts in every common collator
_IGNORED = -100


@eager_in_compiled_code
def token_logps(
    hidden: Float[Tensor, "batch tokens dim"],
    lm_head: Float[Tensor, "classes dim"],
    labels: Integer[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"] | Integer[Tensor, "batch tokens"] | None = None,
    *,
    bias: Float[Tensor, " classes"] | None = None,
    temperature: float = 1.0,
    reduction: TokenReduction = "none",
    entropy: bool = False,
    chunk_size: ChunkSize = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probabilities of labels under an output layer, with never more than a chunk of logits alive.

    ::

        logits = hidden lm_head^T + bias
        logp_t = log softmax(logits_t / temperature)[labels_t]
        entropy_t = -sum_k p_k log p_k,     p = softmax(logits_t / temperature)

    The value and the gradients (of hidden, lm_head and bias; through the entropy as well) are those of
    :func:`sequence_logps` on the logits. On NVIDIA GPUs (from Ampere on) with Triton one kernel makes them, a chunk at a
    time; a label out of range gives NaN there. Gradients repeat the forward product, since the weight of each token is
    known in backward only; under ``torch.no_grad()`` (a reference model) nothing is kept. Masked tokens are not
    computed. Labels are not shifted: ``labels[:, t]`` is the token that ``hidden[:, t]`` predicts.

    Args:
        hidden: (N, T, D) inputs of the output layer.
        lm_head: (C, D) its weight.
        labels: (N, T) tokens in [0, C); tokens labelled -100 do not count.
        mask: (N, T), nonzero where a token counts; all of them by default.
        bias: (C,) or ``None``.
        temperature: divides the logits; above 0.
        reduction: ``"none"`` gives (N, T) with 0 at tokens that do not count, ``"sum"`` and ``"mean"`` (N,) over
            the tokens that count (0 where none does).
        entropy: also return the entropy, reduced alike. Without Triton its derivative is taken by autograd, a
            chunk at a time.
        chunk_size: rows of a chunk, or ``"auto"``.

    Returns:
        Log-probabilities in nats, float32 for half-precision inputs; with ``entropy`` a pair.

    Raises:
        ValueError: for a wrong shape, a label out of range, a temperature that is not above 0 or an unknown
            reduction.
        TypeError: for a wrong dtype.
        RuntimeError: at a backward with ``create_graph=True``.

    Example:
        >>> import torch
        >>> hidden, lm_head = torch.zeros(1, 2, 3), torch.ones(4, 3)
        >>> token_logps(hidden, lm_head, torch.tensor([[0, -100]]))
        tensor([[-1.3863,  0.0000]])
        >>> token_logps(hidden, lm_head, torch.tensor([[0, 3]]), reduction="sum", entropy=True)
        (tensor([-2.7726]), tensor([2.7726]))
    """
    check_floating("hidden", hidden)
    check_shape("hidden", hidden, ("N", "T", "D"))
    check_floating("lm_head", lm_head)
    check_shape("lm_head", lm_head, ("C", hidden.shape[-1]))
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (lm_head.shape[0],))
    if lm_head.dtype != hidden.dtype and autocast_dtype(hidden) is None:
        raise TypeError(f"lm_head must have the dtype of hidden, {hidden.dtype}, got {lm_head.dtype}")
    counts = _counts(labels, mask, hidden.shape[:2], lm_head.shape[0], temperature, reduction)
    target = torch.where(counts, labels.long(), 0)
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def formula(logits: Tensor, target: Tensor) -> Tensor:
        logps = torch.log_softmax(logits / temperature, -1)
        own = logps.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return torch.stack([own, _entropy(logps)], -1) if entropy else own

    def derivative(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        nll = softmax_nll_(logits if temperature == 1 else logits.div_(temperature), target)
        return -nll, torch.full_like(nll, -1 / temperature)

    def kernel(
        logits: Tensor, target: Tensor, *, cotangent: Tensor | None, out: Tensor | None, **layer: Any
    ) -> Tensor:
        from telos.kernels.triton_rows import softmax_rows

        if cotangent is not None:  # the kernel gives the negative log-probability
            cotangent = torch.stack([-cotangent[:, 0], cotangent[:, 1]], -1) if entropy else -cotangent
        nll, entropies = softmax_rows(
            logits, target, temperature=temperature, entropy=entropy, cotangent=cotangent, out=out, **layer
        )
        return -nll if entropies is None else torch.stack([-nll, entropies], -1)

    rows = fused_linear_rows(
        hidden.reshape(-1, hidden.shape[-1]),
        lm_head,
        bias,
        formula,
        target.reshape(-1),
        row_weight=counts.reshape(-1).to(compute),
        derivative=None if entropy else derivative,
        kernel=kernel,
        columns=2 if entropy else None,
        chunk_size=chunk_size,
        reduction="none",
    )
    if not entropy:
        return _reduced(rows.reshape(labels.shape), counts, reduction)
    logps, entropies = rows.reshape(*labels.shape, 2).unbind(-1)
    return _reduced(logps, counts, reduction), _reduced(entropies, counts, reduction)


def sequence_logps(
    logits: Float[Tensor, "batch tokens classes"],
    labels: Integer[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"] | Integer[Tensor, "batch tokens"] | None = None,
    *,
    temperature: float = 1.0,
    reduction: TokenReduction = "sum",
    lower_cutoff: float | None = None,
    upper_cutoff: float | None = None,
    cutoff: Cutoff = "clamp",
) -> Tensor:
    """Log-probabilities of sequences from logits: the sum (or mean) of those of their tokens.

    Args:
        logits: (N, T, C) scores; ``logits[:, t]`` predicts ``labels[:, t]``.
        labels: (N, T) tokens in [0, C); tokens labelled -100 do not count.
        mask: (N, T), nonzero where a token counts; all of them by default.
        temperature: divides the logits; above 0.
        reduction: ``"sum"`` or ``"mean"`` over the tokens that count, (N,), or ``"none"`` for (N, T).
        lower_cutoff: a token whose log-probability lies below it has no gradient; ``None`` for no cut-off.
        upper_cutoff: the same for a log-probability above it, at least ``lower_cutoff``.
        cutoff: the value of a token beyond a cut-off: the cut-off itself (``"clamp"``), or 0 (``"zero"``), as if
            the token were certain. Either way it stays in the divisor of a mean.

    Returns:
        Log-probabilities in nats, float32 for half-precision logits. Tokens that do not count, NaN or not, have
        value and gradient 0.

    Raises:
        ValueError: for a wrong shape, a label out of range, a temperature that is not above 0, cut-offs in the
            wrong order, or an unknown reduction or cutoff.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> sequence_logps(torch.zeros(1, 3, 4), torch.tensor([[0, 3, -100]]))
        tensor([-2.7726])
        >>> sequence_logps(torch.zeros(1, 3, 4), torch.tensor([[0, 3, -100]]), lower_cutoff=-1.0)
        tensor([-2.])
    """
    _check_cutoffs(lower_cutoff, upper_cutoff, cutoff)
    check_floating("logits", logits)
    check_shape("logits", logits, ("N", "T", "C"))
    counts = _counts(labels, mask, logits.shape[:2], logits.shape[-1], temperature, reduction)
    logits = torch.where(counts.unsqueeze(-1), at_least_float32(logits), 0.0)
    target = torch.where(counts, labels.long(), 0)
    logps = torch.log_softmax(logits / temperature, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    logps = _cut(logps, lower_cutoff, upper_cutoff, cutoff)
    return _reduced(torch.where(counts, logps, 0.0), counts, reduction)


def _cut(logps: Tensor, lower: float | None, upper: float | None, cutoff: str) -> Tensor:
    # a comparison is false for NaN, which therefore stays
    if lower is not None:
        logps = torch.where(logps < lower, lower if cutoff == "clamp" else 0.0, logps)
    if upper is not None:
        logps = torch.where(logps > upper, upper if cutoff == "clamp" else 0.0, logps)
    return logps


def _check_cutoffs(lower: float | None, upper: float | None, cutoff: str) -> None:
    if cutoff not in ("clamp", "zero"):
        raise ValueError(f"cutoff must be 'clamp' or 'zero', got {cutoff!r}")
    if lower is not None and upper is not None and not lower <= upper:
        raise ValueError(f"lower_cutoff must not exceed upper_cutoff, got {lower} and {upper}")


def _entropy(logps: Tensor) -> Tensor:
    # a class of probability 0 adds nothing, even where its log-probability is -inf
    p = logps.exp()
    return -(p * torch.where(p == 0, 0.0, logps)).sum(-1)


def _counts(
    labels: Tensor, mask: Tensor | None, shape: torch.Size, classes: int, temperature: float, reduction: str
) -> Tensor:
    """Where a token counts, behind the doors that both functions share."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    check_integer("labels", labels)
    check_shape("labels", labels, tuple(shape))
    check_label_values("labels", labels, classes, _IGNORED)
    check_range("temperature", temperature, 0.0, float("inf"), open_low=True)
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    # raised first: -100 would wrap around in a narrow integer dtype
    counts = labels.long() != _IGNORED
    if mask is None:
        return counts
    if mask.is_floating_point():
        raise TypeError(f"mask must be boolean or integer, got {mask.dtype}")
    check_shape("mask", mask, tuple(shape))
    return counts & (mask != 0)


def _reduced(values: Tensor, counts: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    total = values.sum(-1)
    return total if reduction == "sum" else total / counts.sum(-1).clamp_min(1)
