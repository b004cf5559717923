"""Losses of rows of logits and their derivatives, one Triton launch for a chunk: for :mod:`telos.kernels.fused_linear`.

Needs Triton and is imported only where it is used. One program takes one row and reads it twice: once for what the
loss needs of it (a running maximum and the sum of exponentials; for the Z-loss the first two moments), once to write
the derivative. Bias, softcap and the row's cotangent are part of both readings, so that nothing else touches the
logits between the two matrix products. All arithmetic is in float32.

The kernels do nothing that the interpreter of Triton cannot do; ``TRITON_INTERPRET=1`` runs them on the CPU.
"""

# the arguments of kernels have types of Triton's own; a run-time type check must not wrap what Triton compiles
# mypy: disable-error-code="no-untyped-def"

from typing import Literal, TypeAlias, no_type_check

import torch
import triton  # type: ignore[import-untyped, import-not-found]
import triton.language as tl  # type: ignore[import-untyped, import-not-found]
from torch import Tensor

Slope: TypeAlias = Literal["cross_entropy", "comp_sum", "focal", "symmetric"]

# columns of one reading: 16 to a thread
_BLOCK, _WARPS = 4096, 8
_EPS = torch.finfo(torch.float32).eps


@triton.jit
@no_type_check
def _read(row, columns, classes, bias, softcap, scale):
    """Logits (float32, -inf outside the row) and their derivative with respect to what is stored."""
    inside = columns < classes
    z = tl.load(row + columns, mask=inside, other=-float("inf")).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    slope = scale
    if softcap is not None:
        # tanh and its derivative from e = exp(-2 |u|): no overflow, and no cancellation in the derivative
        u = z / softcap
        e = tl.exp(-2.0 * tl.abs(u))
        tanh = (1.0 - e) / (1.0 + e)
        z = tl.where(inside, softcap * tl.where(u < 0, -tanh, tanh), -float("inf"))
        slope = scale * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    return z * scale, slope


@triton.jit
@no_type_check
def _read_label(row, label, classes, bias, softcap, scale):
    """The logit of the label; NaN for a label outside the classes, of which nothing is read."""
    known = (label >= 0) & (label < classes)
    z, _ = _read(row, tl.where(known, label, 0), classes, bias, softcap, scale)
    return tl.where(known, z, float("nan"))


@triton.jit
@no_type_check
def _slope_of_nll(nll, first, second, KIND: tl.constexpr):
    """``f'(nll)`` of a loss ``f(-log p_y)``."""
    if KIND == "comp_sum":  # Phi_tau, first = tau
        return tl.exp((1.0 - first) * nll)
    p = tl.exp(-nll)
    if KIND == "symmetric":  # first * nll + second * (1 - p)
        return first + second * p
    if KIND == "focal":  # (1 - p)^gamma nll, first = gamma > 0
        # 1 - p without cancellation; the series is exact to rounding below 1/8
        series = nll * (
            1.0 - nll * (0.5 - nll * (1.0 / 6 - nll * (1.0 / 24 - nll * (1.0 / 120 - nll / 720))))
        )
        miss = tl.where(nll < 0.125, series, 1.0 - p)
        # nll / (1 - p) is 1 at 0, and nll p is 0 at infinity
        ratio = tl.where(nll < 1e-6, 1.0, tl.where(p == 0, 0.0, nll) / miss)
        return tl.exp(first * tl.log(miss)) * (1.0 + first * ratio * p)
    return 1.0


@triton.jit
@no_type_check
def _softmax_rows(
    logits,
    out,
    bias,
    target,
    cotangent,
    entropy_cotangent,
    nll,
    entropy,
    classes,
    logits_stride,
    out_stride,
    softcap,
    scale,
    smoothing,
    first,
    second,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # offsets of rows pass 2^31 in a chunk of 16,000 rows of 128,256 logits
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * logits_stride
    label = tl.load(target + index)
    own = _read_label(row, label, classes, bias, softcap, scale)

    # every lane keeps the maximum of its own columns and sums relative to it: one exponential for each logit.
    # The first maximum is finite, so that -inf - max is never NaN; a NaN reaches the sum and stays there.
    top = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)  # of z - max, for the entropy
    shifted = tl.zeros((BLOCK,), tl.float32)  # sum of z - own, for smoothed labels
    centre = tl.where(tl.abs(own) < float("inf"), own, 0.0)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, _ = _read(row, columns, classes, bias, softcap, scale)
        rise = z - top
        e = tl.exp(-tl.abs(rise))
        if entropy is not None:
            # mass that has become 0 has no moment, though its distance may be infinite
            grown = tl.where(e == 0, 0.0, (moment - rise * total) * e)
            moment = tl.where(rise > 0, grown, moment + tl.where(e == 0, 0.0, rise * e))
        total = tl.where(rise > 0, total * e + 1.0, total + e)
        top = tl.where(rise > 0, z, top)
        if smoothing is not None:
            shifted += tl.where(columns < classes, z - centre, 0.0)
    highest = tl.max(top, 0)
    rise = top - highest
    e = tl.exp(rise)
    if entropy is not None:
        moment = tl.sum(tl.where(e == 0, 0.0, (moment + rise * total) * e), 0)
    total = tl.sum(total * e, 0)
    log_total = tl.log(total)
    loss = (highest - own) + log_total
    value = loss
    if smoothing is not None:
        value = loss + smoothing * (own - centre) - smoothing * (tl.sum(shifted, 0) / classes)
    tl.store(nll + index, value)
    if entropy is not None:
        disorder = log_total - moment / total
        tl.store(entropy + index, disorder)

    if out is not None:
        row_out = out + index * out_stride
        factor = tl.load(cotangent + index) * _slope_of_nll(loss, first, second, KIND)
        weight = 1.0 / total
        blame = 0.0
        if entropy is not None:
            blame = tl.load(entropy_cotangent + index)
        even = 0.0
        kept = 1.0
        if smoothing is not None:
            even = smoothing / classes
            kept = 1.0 - smoothing
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z, slope = _read(row, columns, classes, bias, softcap, scale)
            # relative to the maximum, which is exact; the log-sum-exp of large logits is not
            p = tl.exp(z - highest) * weight
            gradient = factor * (p - tl.where(columns == label, kept + even, even))
            if entropy is not None:
                surprise = tl.where(p == 0, 0.0, p * ((z - highest) - log_total + disorder))
                gradient -= blame * surprise
            tl.store(row_out + columns, (gradient * slope).to(out.dtype.element_ty), mask=columns < classes)


@triton.jit
@no_type_check
def _z_rows(
    logits,
    out,
    bias,
    target,
    cotangent,
    scores,
    classes,
    logits_stride,
    out_stride,
    softcap,
    a,
    b,
    eps,
    rounding,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * logits_stride
    label = tl.load(target + index)
    own = _read_label(row, label, classes, bias, softcap, 1.0)

    # moments about the mean of the first block, so that a common offset of the logits cancels before squares are
    # taken; the block is a part of the row, so what is left of the offset is at most a few spreads
    columns = tl.arange(0, BLOCK)
    corner, _ = _read(row, 0, classes, bias, softcap, 1.0)
    z, _ = _read(row, columns, classes, bias, softcap, 1.0)
    centre = corner + tl.sum(tl.where(columns < classes, z - corner, 0.0), 0) / tl.minimum(classes, BLOCK)
    one = tl.zeros((BLOCK,), tl.float32)
    two = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, _ = _read(row, columns, classes, bias, softcap, 1.0)
        distance = tl.where(columns < classes, z - centre, 0.0)
        one += distance
        two += distance * distance
    mean = tl.sum(one, 0) / classes
    variance = tl.sum(two, 0) / classes - mean * mean
    spread = tl.sqrt(tl.where(variance < 0, 0.0, variance))  # asked this way round, a NaN stays
    # a row that is constant to rounding is left unscaled, with the derivative of its centred logit
    constant = spread <= rounding * tl.abs(centre + mean)
    divisor = tl.where(constant, 1.0, spread + eps)
    score = ((own - centre) - mean) / divisor
    tl.store(scores + index, score)

    if out is not None:
        row_out = out + index * out_stride
        slope = -tl.load(cotangent + index) / (1.0 + tl.exp(a * (score - b))) / divisor
        bend = tl.where(constant, 0.0, score / (classes * tl.where(constant, 1.0, spread)))
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z, capped = _read(row, columns, classes, bias, softcap, 1.0)
            gradient = tl.where(columns == label, 1.0, 0.0) - 1.0 / classes - ((z - centre) - mean) * bend
            tl.store(
                row_out + columns,
                (slope * gradient * capped).to(out.dtype.element_ty),
                mask=columns < classes,
            )


@triton.jit
@no_type_check
def _scale(tensor, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(tensor + index, mask=index < count, other=0.0).to(tl.float32)
        tl.store(tensor + index, (value * by).to(tensor.dtype.element_ty), mask=index < count)


def softmax_rows(
    logits: Tensor,
    target: Tensor,
    *,
    slope: Slope = "cross_entropy",
    first: float = 0.0,
    second: float = 0.0,
    smoothing: float | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cotangent: Tensor | None = None,
    out: Tensor | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Negative log-likelihood of each row, and the derivative of any loss ``f`` of it; the entropy where asked.

    ::

        z = cap(logits + bias) / temperature,   p = softmax(z),   nll = -log p_y
        out_k = cotangent f'(nll) (p_k - (1 - s) 1[k = y] - s / C) dz_k / dlogits_k

    With ``smoothing`` s the first result is ``(1 - s) nll + s mean_k(-log p_k)``, and f is the identity. With
    ``entropy`` the cotangent has two columns, for ``nll`` and for ``-sum_k p_k log p_k``.

    Args:
        logits: (M, C) float32, float16 or bfloat16, contiguous along C.
        target: (M,) labels; one outside [0, C) gives NaN.
        slope: ``f'``: 1, ``exp((1 - first) nll)``, that of focal loss with gamma ``first``, or
            ``first + second p_y``.
        first: see ``slope``.
        second: see ``slope``.
        smoothing: in [0, 1].
        temperature: divides the logits.
        bias: (C,) float32, contiguous.
        softcap: ``cap(z) = softcap tanh(z / softcap)``.
        cotangent: (M,) or (M, 2) float32.
        out: (M, C) of any floating dtype, for the derivative; may be ``logits`` itself.
        entropy: whether to compute it.

    Returns:
        (M,) float32, and with ``entropy`` another (M,).
    """
    rows, classes = logits.shape
    block, warps = _launch(classes)
    nll = torch.empty(rows, dtype=torch.float32, device=logits.device)
    disorder = torch.empty_like(nll) if entropy else None
    parts = (None, None) if cotangent is None else cotangent.unbind(-1) if entropy else (cotangent, None)
    own, other = (None if part is None or out is None else part.float().contiguous() for part in parts)
    with torch.cuda.device_of(logits):
        _softmax_rows[(rows,)](
            logits,
            out,
            bias,
            target.contiguous(),
            own,
            other,
            nll,
            disorder,
            classes,
            logits.stride(0),
            0 if out is None else out.stride(0),
            None if softcap is None else float(softcap),
            1.0 / temperature,
            smoothing,
            float(first),
            float(second),
            KIND=slope,
            BLOCK=block,
            num_warps=warps,
        )
    return nll, disorder


def z_rows(
    logits: Tensor,
    target: Tensor,
    *,
    a: float,
    b: float,
    eps: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    cotangent: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standardised logit ``z_y`` (M,) of each row's label, and the derivative of its Z-loss.

    ::

        z_k = (o_k - mean(o)) / (std(o) + eps),   o = cap(logits + bias)
        loss = -log sigmoid(a (z_y - b)) / a
        out_k = -cotangent sigmoid(a (b - z_y)) / std (1[k = y] - 1/C - z_y z_k / C) do_k / dlogits_k

    A row that is constant to rounding is left unscaled. The arguments are those of :func:`softmax_rows`.
    """
    rows, classes = logits.shape
    block, warps = _launch(classes)
    scores = torch.empty(rows, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _z_rows[(rows,)](
            logits,
            out,
            bias,
            target.contiguous(),
            None if cotangent is None or out is None else cotangent.float().contiguous(),
            scores,
            classes,
            logits.stride(0),
            0 if out is None else out.stride(0),
            None if softcap is None else float(softcap),
            float(a),
            float(b),
            float(eps),
            _EPS,
            BLOCK=block,
            num_warps=warps,
        )
    return scores


def scale_(tensor: Tensor, factor: Tensor) -> Tensor:
    """``tensor *= factor`` for a number on the device, in float32; a factor of 1 costs no more than the launch."""
    block = 4096
    with torch.cuda.device_of(tensor):
        _scale[(triton.cdiv(tensor.numel(), block),)](
            tensor, factor, tensor.numel(), BLOCK=block, num_warps=8
        )
    return tensor


def _launch(classes: int) -> tuple[int, int]:
    """Block and warps for rows of so many logits."""
    block = min(_BLOCK, triton.next_power_of_2(classes))
    return block, max(1, block * _WARPS // _BLOCK)
