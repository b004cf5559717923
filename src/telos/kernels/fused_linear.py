"""A linear layer followed by any function of each row of its output, without ever holding that output.

The rows are taken a chunk at a time: logits, values and the gradient of the logits live only as long as their
chunk, and what the gradient does to input, weight and bias is added up at once. Wherever torch runs; on CUDA the
products take half-precision operands as they are, and with Triton installed one kernel makes values and gradient of
a chunk (:mod:`telos.kernels.triton_rows`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

RowFormula: TypeAlias = Callable[..., Tensor]
RowDerivative: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
RowKernel: TypeAlias = Callable[..., Tensor]
ChunkSize: TypeAlias = int | Literal["auto"]

P = ParamSpec("P")
R = TypeVar("R")

# logits of one chunk: few enough to stay far below N x C, enough to keep a matrix product busy
_FEWEST_LOGITS, _MOST_LOGITS = 2**20, 2**23
# every chunk reads the whole weight: enough rows that this costs less than the products
_FEWEST_ROWS = 128
# on CUDA a chunk must occupy the whole device: up to 256 MiB of float32 logits
_FEWEST_CUDA_LOGITS, _MOST_CUDA_LOGITS = 2**24, 2**26
# and their gradient in half precision, of several chunks, up to 512 MiB
_MOST_CUDA_GRADIENTS = 2**28
# a product of so many outputs has tiles for every multiprocessor several times over, so that cuBLAS does not split its
# sums; the partial sums of a split would be rounded to the dtype of the output
_UNSPLIT = 2**24


def auto_chunk_size(num_rows: int, num_classes: int, device: str = "cpu") -> int:
    """Rows of a chunk: a sixteenth of all, within 2^20 to 2^23 logits; on CUDA an eighth, within 2^24 to 2^26.

    But at least 128 rows within those, and 32 in any case: every chunk reads the whole weight, which is larger than
    32 rows of logits.

    Example:
        >>> auto_chunk_size(4096, 50257), auto_chunk_size(4096, 10)
        (160, 4096)
        >>> auto_chunk_size(8192, 128256, "cuda")
        512
    """
    parts, fewest, most, multiple = 16, _FEWEST_LOGITS, _MOST_LOGITS, 32
    if device == "cuda":
        parts, fewest, most, multiple = 8, _FEWEST_CUDA_LOGITS, _MOST_CUDA_LOGITS, 128
    classes = max(num_classes, 1)
    rows = min(max(-(-num_rows // parts), fewest // classes, _FEWEST_ROWS), most // classes)
    rows = max(rows, _FEWEST_ROWS // 4)
    rows = rows // multiple * multiple if rows >= 2 * multiple else rows
    return max(1, min(rows, num_rows))


@cache
def _is_ampere_or_newer(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def rows_on_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels take the rows of ``tensor``: on NVIDIA GPUs from Ampere on, where Triton is installed.

    Example:
        >>> import torch
        >>> rows_on_triton(torch.ones(1))
        False
    """
    return tensor.is_cuda and _has_triton() and _is_ampere_or_newer(tensor.device)


def mixed_products(tensor: Tensor) -> bool:
    """Whether half-precision matrices are multiplied as they are, into float32: on NVIDIA GPUs from Ampere on.

    Example:
        >>> import torch
        >>> mixed_products(torch.ones(1, dtype=torch.bfloat16))
        False
    """
    return tensor.is_cuda and _is_ampere_or_newer(tensor.device)


def softmax_nll_(logits: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood (M,) of labels (M,); ``logits`` (M, C) become its derivative ``softmax - onehot``.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 2)
        >>> softmax_nll_(logits, torch.tensor([0])), logits
        (tensor([0.6931]), tensor([[-0.5000,  0.5000]]))
    """
    column = target.unsqueeze(-1)
    top, own = logits.amax(-1, keepdim=True), logits.gather(-1, column)
    torch.softmax(logits, -1, out=logits)
    # p_y may underflow, the largest probability cannot: log sum exp = top - log p_top
    nll = top - logits.amax(-1, keepdim=True).log() - own
    logits.scatter_add_(-1, column, torch.full_like(own, -1.0))
    return nll.squeeze(-1)


def eager_in_compiled_code(function: Callable[P, R]) -> Callable[P, R]:
    """A compiled caller breaks its graph at ``function``, which runs as it is, and goes on after it.

    What ``torch.compiler.disable`` does, without loading the compiler when the module is imported.

    Example:
        >>> import torch
        >>> eager_in_compiled_code(torch.neg)(torch.ones(1))
        tensor([-1.])
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype to which autocast would round ``tensor`` for a product, ``None`` where it leaves it alone.

    Example:
        >>> import torch
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     autocast_dtype(torch.ones(1))
        torch.bfloat16
    """
    device = tensor.device.type
    known = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if known and tensor.dtype != torch.float64 else None


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    device = tensor.device.type
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()


class _Plan(NamedTuple):
    formula: RowFormula
    derivative: RowDerivative | None
    kernel: RowKernel | None
    parameters: tuple[Tensor, ...]
    columns: int | None
    softcap: float | None
    chunk_size: int | None  # None chooses it
    reduction: str
    dtype: torch.dtype  # of the operands of the products
    compute: torch.dtype  # of logits, values and accumulated gradients
    mixed: bool  # operands enter the products in `dtype`; otherwise they are raised to `compute`


class _Gradients(NamedTuple):
    """All of them in multiples of ``unit``."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    parameters: tuple[Tensor | None, ...]
    unit: Tensor | None


class _Chunk(NamedTuple):
    """Values of a chunk; the gradient of its product is ``scale * gradient``."""

    values: Tensor
    gradient: Tensor | None = None
    scale: Tensor | None = None  # (M, 1)
    parameters: tuple[Tensor | None, ...] = ()


def _sweep(
    plan: _Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor,
    chunked: Sequence[Tensor],
    cotangent: Tensor | None,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, _Gradients]:
    """Weighted values of all rows and, given their cotangent, the gradients that are wanted."""
    total, dim = x.shape
    classes, compute = weight.shape[0], plan.compute
    # a row of weight 0 is never touched, so that a NaN in it reaches nothing (on meta nothing can be looked up)
    kept = None if row_weight.is_meta or bool((row_weight != 0).all()) else row_weight.nonzero().squeeze(-1)
    count = total if kept is None else kept.numel()
    want_x, want_weight, want_bias, want_parameters = wanted if cotangent is not None else (False,) * 4
    # `step` rows of logits at a time, `group` rows of their gradient; the same matrix where products are not mixed
    step, group = _rows_at_a_time(plan, count, x, weight, want_weight)
    unit = None
    if plan.dtype == torch.float16 and plan.mixed and cotangent is not None:
        unit = _float16_unit(cotangent)
        cotangent = cotangent / unit

    operand = weight.to(plan.dtype) if plan.mixed else weight.to(plan.dtype).to(compute)
    offset = None if bias is None else bias.to(compute).contiguous()
    logits_buffer = _matrix(operand, step, classes, compute, aligned=plan.mixed)
    slopes = None
    if plan.mixed and (want_x or want_weight or want_bias):
        slopes = _matrix(operand, group, classes, plan.dtype, aligned=True)
    # bfloat16 takes a gradient whose sums are whole; a loss scale of float16 is only known in backward
    whole = plan.mixed and plan.dtype == torch.bfloat16
    # written chunk by chunk where every row counts, scattered otherwise
    grad_x = None
    if want_x:
        dtype = x.dtype if whole and x.dtype == torch.bfloat16 else compute
        new = operand.new_empty if kept is None else operand.new_zeros
        grad_x = new(total, dim, dtype=dtype)
    grad_weight = None
    if want_weight:
        single = whole and weight.dtype == torch.bfloat16 and group >= count and weight.numel() >= _UNSPLIT
        dtype = weight.dtype if single else compute
        grad_weight = (operand.new_empty if count else operand.new_zeros)(classes, dim, dtype=dtype)
    grad_bias = operand.new_zeros(classes, dtype=compute) if want_bias else None
    grad_parameters: list[Tensor | None] = [None] * len(plan.parameters)
    values = operand.new_zeros(total, *([] if plan.columns is None else [plan.columns]), dtype=compute)

    def chosen(start: int, stop: int) -> slice | Tensor:
        return slice(start, stop) if kept is None else kept[start:stop]

    for first in range(0, count, group):
        last = min(first + group, count)
        rows = x[chosen(first, last)].to(plan.dtype).to(operand.dtype)
        gradient, scale = None, None
        for start in range(first, last, step):
            stop = min(start + step, last)
            part, inner = chosen(start, stop), slice(start - first, stop - first)
            logits = _product(rows[inner], operand.t(), logits_buffer[: stop - start])
            slope = None if cotangent is None else cotangent[part]
            out = None if slopes is None else slopes[inner]
            # unpacked, so that nothing holds the gradient of one chunk while the next is computed
            value, gradient, scale, extra = _chunk_rows(
                plan, logits, offset, [tensor[part] for tensor in chunked], slope, out
            )
            share = row_weight[part]
            values[part] = value.detach() * (share if value.ndim == 1 else share.unsqueeze(-1))
            if want_parameters and extra:
                grad_parameters = [
                    old if new is None else new if old is None else old + new
                    for old, new in zip(grad_parameters, extra, strict=True)
                ]
        if slopes is not None:
            gradient = slopes[: last - first]
        if gradient is None:
            continue
        # the weight of a row is applied to its D features, not to its C logits
        if grad_x is not None:
            _input_gradient(grad_x, chosen(first, last), gradient, operand, scale)
        if grad_weight is not None:
            left = rows if scale is None else rows * scale
            _product(gradient.t(), left, grad_weight, accumulate=first > 0)
        if grad_bias is not None:
            grad_bias += (
                gradient.sum(0, dtype=compute) if scale is None else (scale.t() @ gradient).squeeze(0)
            )
    return values, _Gradients(grad_x, grad_weight, grad_bias, tuple(grad_parameters), unit)


def _rows_at_a_time(plan: _Plan, count: int, x: Tensor, weight: Tensor, want_weight: bool) -> tuple[int, int]:
    """Rows of logits, and rows of their gradient, that are held at once."""
    classes, dim = weight.shape
    count = max(count, 1)
    step = plan.chunk_size or auto_chunk_size(
        x.shape[0], classes, "cuda" if plan.mixed or x.is_cuda else "cpu"
    )
    step = min(step, count)
    if plan.chunk_size or not plan.mixed:
        return step, step
    # Each group after the first reads and writes the float32 sum of the weight's gradient, 4 C D bytes. Where the
    # bfloat16 gradient of all logits, 2 N C bytes, is no larger, it is kept instead: the weight's gradient is then
    # one product, without that sum and its traffic.
    if want_weight and weight.dtype == plan.dtype == torch.bfloat16 and count <= 2 * dim:
        return step, count
    return step, min(max(_MOST_CUDA_GRADIENTS // max(classes, 1) // step, 1) * step, count)


def _matrix(like: Tensor, rows: int, columns: int, dtype: torch.dtype, aligned: bool) -> Tensor:
    """A new matrix; aligned, its rows start at multiples of 128 bytes: products with an odd vocabulary are slow else."""
    unit = 128 // dtype.itemsize if aligned and columns > 128 else 1
    return like.new_empty(rows, -(-columns // unit) * unit, dtype=dtype)[:, :columns]


def _float16_unit(cotangent: Tensor) -> Tensor:
    """A power of two, on the device, in which the largest cotangent is at most 1: float16 cannot hold a mean's 1 / N."""
    if cotangent.numel() == 0:
        return cotangent.new_ones(())
    largest = cotangent.abs().amax()
    return torch.where(largest > 0, largest, 1.0).log2().ceil().exp2()


def _product(left: Tensor, right: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """``out = left @ right``, or ``out += left @ right``; half-precision operands may have a float32 ``out``."""
    if not (left.is_cuda or left.is_meta):  # no other device has a mixed product
        left, right = left.to(out.dtype), right.to(out.dtype)
    if left.dtype == out.dtype:
        return out.addmm_(left, right) if accumulate else torch.mm(left, right, out=out)
    if accumulate:
        return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _input_gradient(
    grad_x: Tensor, chosen: slice | Tensor, gradient: Tensor, operand: Tensor, scale: Tensor | None
) -> None:
    """``grad_x[chosen] = scale * gradient @ operand``."""
    shape = gradient.shape[0], operand.shape[1]
    if isinstance(chosen, slice) and (grad_x.dtype != torch.bfloat16 or shape[0] * shape[1] >= _UNSPLIT):
        product = _product(gradient, operand, grad_x[chosen])
        if scale is not None:
            product.mul_(scale)
        return
    dtype = torch.float32 if grad_x.dtype == torch.bfloat16 else grad_x.dtype
    product = _product(gradient, operand, grad_x.new_empty(shape, dtype=dtype))
    if scale is not None:
        product.mul_(scale)
    grad_x[chosen] = product.to(grad_x.dtype)


def _chunk_rows(
    plan: _Plan,
    logits: Tensor,
    bias: Tensor | None,
    chunk: Sequence[Tensor],
    cotangent: Tensor | None,
    out: Tensor | None,
) -> _Chunk:
    """The values of a chunk from its product, and the gradient of the product, which goes to ``out`` where given."""
    if plan.kernel is not None:
        into = None if cotangent is None else logits if out is None else out
        values = plan.kernel(logits, *chunk, bias=bias, softcap=plan.softcap, cotangent=cotangent, out=into)
        return _Chunk(values, into)
    if bias is not None:
        logits.add_(bias)
    slope = None
    if plan.softcap is not None:
        logits.div_(plan.softcap).tanh_()
        slope = None if cotangent is None else 1 - logits.square()
        logits.mul_(plan.softcap)
    scale: Tensor | None = None
    parameters: tuple[Tensor | None, ...] = ()
    if plan.derivative is not None:  # less memory than the formula, even where no gradient is wanted
        values, derivative = plan.derivative(logits, *chunk)
        if cotangent is None:
            return _Chunk(values)
        gradient, scale = logits, (cotangent * derivative).unsqueeze(-1)
    elif cotangent is None:
        return _Chunk(plan.formula(logits, *chunk))
    else:
        values, gradient, parameters = _differentiate(plan, logits, chunk, cotangent)
    if slope is not None:
        # into the slope, for a gradient of autograd may be one number seen many times
        gradient = slope.mul_(gradient)
    if out is None:
        return _Chunk(values, gradient, scale, parameters)
    out = out.copy_(gradient) if scale is None else torch.mul(gradient, scale, out=out)
    return _Chunk(values, out, None, parameters)


def _differentiate(
    plan: _Plan, logits: Tensor, chunk: Sequence[Tensor], cotangent: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Values of a chunk, and the gradients of its logits and of the formula's parameters."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        value = plan.formula(leaf, *chunk)
    if not value.requires_grad:  # constant in everything
        return value, torch.zeros_like(logits), (None,) * len(plan.parameters)
    gradient, *extra = torch.autograd.grad(
        value, (leaf, *plan.parameters), cotangent.to(value.dtype), allow_unused=True
    )
    return value, torch.zeros_like(logits) if gradient is None else gradient, tuple(extra)


class _FusedLinearRows(torch.autograd.Function):
    """Gradients are formed in the forward pass of a sum; ``none``, and a second backward, compute them anew."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_weight: Tensor,
        plan: _Plan,
        chunked: tuple[Tensor, ...],
        gradient_follows: bool,
        *parameters: Tensor,
    ) -> Tensor:
        wanted = (*ctx.needs_input_grad[:3], any(ctx.needs_input_grad[7:]))
        now = gradient_follows and plan.reduction == "sum" and any(wanted)
        ctx.plan, ctx.wanted = plan, wanted
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(x, weight, bias, row_weight, *chunked)
        with _no_autocast(x):
            values, ctx.gradients = _sweep(
                plan, x, weight, bias, row_weight, chunked, row_weight if now else None, wanted
            )
        if not now:
            ctx.gradients = None
        return values.sum(0) if plan.reduction == "sum" else values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a linear layer fused with its loss has no second derivative (create_graph=True); "
                "compute the logits and call the loss on them instead"
            )
        (grad_output,) = grad_outputs
        # the buffers are handed over, scaled in place, and gone: a second backward recomputes
        gradients, ctx.gradients = ctx.gradients, None
        factor: Tensor | None = grad_output
        if gradients is None:
            x, weight, bias, row_weight, *chunked = ctx.saved_tensors
            share = row_weight if grad_output.ndim < 2 else row_weight.unsqueeze(-1)
            with _no_autocast(x):
                _, gradients = _sweep(
                    ctx.plan, x, weight, bias, row_weight, chunked, share * grad_output, ctx.wanted
                )
            factor = None
        if gradients.unit is not None:
            factor = gradients.unit if factor is None else factor * gradients.unit
        tensors = [
            _finished(gradient, factor, dtype)
            for gradient, dtype in zip(gradients[:3], ctx.dtypes, strict=True)
        ]
        parameters = [
            _finished(gradient, factor, None if gradient is None else gradient.dtype)
            for gradient in gradients.parameters
        ]
        return (*tensors, None, None, None, None, *parameters)


def _finished(gradient: Tensor | None, factor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """``factor * gradient`` in its dtype, in place where it can be."""
    if gradient is None or factor is None:
        return gradient if gradient is None else gradient.to(dtype)
    if gradient.dtype in (torch.float16, torch.bfloat16):  # in which the factor would be rounded too
        gradient = gradient.contiguous()
        if rows_on_triton(gradient):
            from telos.kernels.triton_rows import scale_

            return scale_(gradient, factor)
        for part in gradient.view(-1).split(_UNSPLIT):
            part.copy_(part.float() * factor)
        return gradient
    if gradient.is_cuda and gradient.dtype != dtype:  # one reading instead of two
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    return gradient.mul_(factor).to(dtype)


@eager_in_compiled_code
def fused_linear_rows(
    x: Float[Tensor, "rows dim"],
    weight: Float[Tensor, "classes dim"],
    bias: Float[Tensor, " classes"] | None,
    formula: RowFormula,
    *chunked: Tensor,
    row_weight: Float[Tensor, " rows"] | None = None,
    derivative: RowDerivative | None = None,
    kernel: RowKernel | None = None,
    parameters: Sequence[Tensor] = (),
    columns: int | None = None,
    softcap: float | None = None,
    chunk_size: ChunkSize = "auto",
    reduction: Literal["sum", "none"] = "sum",
) -> Tensor:
    r"""``sum_i w_i f(x_i W^T + b, ...)`` with never more than a chunk of logits alive.

    With ``reduction="sum"`` the forward pass also forms the gradients (three matrix products in all), which
    backward scales and hands over; a second backward through the same graph computes them anew. With ``"none"``
    the cotangents are known in backward only, which repeats the forward product (four in all). A product that
    nothing asks for, such as that of a frozen weight, is not computed. Logits, values and sums over chunks of
    half-precision inputs are in float32.

    Memory beyond inputs, result and gradients is a few chunks of logits (one or two with a ``derivative``, else
    what ``formula`` and its backward take), and a float32 copy of a half-precision weight.

    On NVIDIA GPUs (from Ampere on) half-precision operands enter the products as they are, accumulated in float32
    into float32 logits; the gradient of the logits is rounded to the dtype of the operands, with the weight of its
    row inside, before it is multiplied. The copy of the weight is not made. Instead there is, with ``"auto"``
    chunks, the smaller of a float32 sum of the weight's gradient (4 C D bytes) and the bfloat16 gradient of all
    logits (2 N C bytes); with a ``chunk_size``, that sum. A bfloat16 gradient that needs no sum is rounded once,
    and once more if the result is then multiplied by anything but a power of two.

    Args:
        x: (N, D) inputs.
        weight: (C, D).
        bias: (C,) or ``None``.
        formula: ``(logits (M, C), *chunk) -> values (M,)``, differentiable, one value for each row of its own.
        chunked: tensors of N rows that are cut like ``x`` and follow the logits; no gradient flows to them.
        row_weight: (N,) factor of each row, constant. Rows of weight 0 are left out of the computation.
        derivative: ``(logits (M, C), *chunk) -> (values (M,), slope (M,))``, which may overwrite ``logits`` and
            must leave in it ``g`` with ``d values / d logits = slope * g``; it takes the place of autograd.
        kernel: ``(logits (M, C), *chunk, bias=, softcap=, cotangent=, out=) -> values``, used instead of the two
            above where :func:`rows_on_triton` holds and logits are float32. It gets the bare product and writes
            ``cotangent * d values / d product`` to ``out``, which may be ``logits`` or of half precision; with
            ``cotangent`` and ``out`` ``None`` it only computes the values.
        parameters: tensors inside ``formula`` that want gradients.
        columns: K, where ``formula`` gives (M, K) values (``reduction="none"`` only); ``None`` for (M,).
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        chunk_size: rows of a chunk; ``"auto"`` is :func:`auto_chunk_size`.
        reduction: ``"sum"``, or ``"none"`` for the weighted value of each row.

    Returns:
        A scalar, or (N,) or (N, K) values with ``"none"``; float32 for half-precision inputs.

    Raises:
        ValueError: for a wrong shape or chunk size, or columns under a sum.
        TypeError: for a DTensor.
        RuntimeError: at a backward with ``create_graph=True``, and under a transform of ``torch.func``.

    Example:
        >>> import torch
        >>> x, weight = torch.ones(3, 2), torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True)
        >>> total = fused_linear_rows(x, weight, None, lambda logits: logits.square().sum(-1), chunk_size=2)
        >>> total.backward()
        >>> total, weight.grad
        (tensor(30., grad_fn=<_FusedLinearRowsBackward>), tensor([[18., 18.],
                [ 6.,  6.]]))
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x and weight must have shapes (N, D) and (C, D), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "a linear layer fused with its loss knows no transform of torch.func; "
            "compute the logits and call the loss on them instead"
        )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if hasattr(tensor, "full_tensor"):
            raise TypeError(
                f"{name} of a fused linear layer must be whole, got a DTensor; with fully_shard, call it in the "
                f"forward of the module that was sharded, where parameters are gathered and gradients reduced"
            )
    if chunk_size != "auto" and not (isinstance(chunk_size, int) and chunk_size >= 1):
        raise ValueError(f"chunk_size must be 'auto' or at least 1, got {chunk_size!r}")
    if columns is not None and (reduction != "none" or derivative is not None):
        raise ValueError("columns needs reduction='none' and no derivative")
    dtype = autocast_dtype(x) or x.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    if row_weight is None:
        row_weight = x.new_ones(x.shape[0], dtype=compute)
    plan = _Plan(
        formula,
        derivative,
        kernel if compute == torch.float32 and rows_on_triton(x) else None,
        tuple(parameters),
        columns,
        softcap,
        None if chunk_size == "auto" else chunk_size,
        reduction,
        dtype,
        compute,
        dtype in (torch.float16, torch.bfloat16) and mixed_products(x),
    )
    result = _FusedLinearRows.apply(
        x, weight, bias, row_weight.to(compute), plan, chunked, torch.is_grad_enabled(), *parameters
    )
    return result  # type: ignore[return-value]
