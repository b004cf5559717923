"""A linear layer followed by any function of each row of its output, without ever holding that output.

The rows are taken a chunk at a time: logits, values and the gradient of the logits live only as long as their
chunk, and what the gradient does to input, weight and bias is added up at once. On CPU and, without kernels of its
own yet, wherever torch runs.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

RowFormula: TypeAlias = Callable[..., Tensor]
RowDerivative: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
ChunkSize: TypeAlias = int | Literal["auto"]

P = ParamSpec("P")
R = TypeVar("R")

# logits of one chunk: few enough to stay far below N x C, enough to keep a matrix product busy
_FEWEST_LOGITS, _MOST_LOGITS = 2**20, 2**23


def auto_chunk_size(num_rows: int, num_classes: int) -> int:
    """Rows of a chunk: a sixteenth of all, within 2^20 to 2^23 logits.

    Example:
        >>> auto_chunk_size(4096, 50257), auto_chunk_size(4096, 10)
        (160, 4096)
    """
    rows = min(
        max(-(-num_rows // 16), _FEWEST_LOGITS // max(num_classes, 1)), _MOST_LOGITS // max(num_classes, 1)
    )
    rows = rows // 32 * 32 if rows >= 64 else rows
    return max(1, min(rows, num_rows))


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
    parameters: tuple[Tensor, ...]
    columns: int | None
    softcap: float | None
    chunk_size: int
    reduction: str
    dtype: torch.dtype  # of the operands of the products, before they are raised
    compute: torch.dtype  # of logits, values and accumulated gradients


class _Gradients(NamedTuple):
    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    parameters: tuple[Tensor | None, ...]


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
    step = min(plan.chunk_size, max(count, 1))
    want_x, want_weight, want_bias, want_parameters = wanted if cotangent is not None else (False,) * 4
    operand = weight.to(plan.dtype).to(compute)
    offset = None if bias is None else bias.to(compute)
    logits_buffer = operand.new_empty(step, classes)
    # written chunk by chunk where every row counts, scattered otherwise
    grad_x = None
    if want_x:
        grad_x = operand.new_empty(total, dim) if kept is None else operand.new_zeros(total, dim)
    grad_weight = None
    if want_weight:
        grad_weight = operand.new_empty(classes, dim) if count else operand.new_zeros(classes, dim)
    grad_bias = operand.new_zeros(classes) if want_bias else None
    grad_parameters: list[Tensor | None] = [None] * len(plan.parameters)
    values = operand.new_zeros(total, *([] if plan.columns is None else [plan.columns]))

    for start in range(0, count, step):
        stop = min(start + step, count)
        chosen: slice | Tensor = slice(start, stop) if kept is None else kept[start:stop]
        rows = x[chosen].to(plan.dtype).to(compute)
        logits = torch.mm(rows, operand.t(), out=logits_buffer[: stop - start])
        if offset is not None:
            logits.add_(offset)
        slope = None
        if plan.softcap is not None:
            logits.div_(plan.softcap).tanh_()
            slope = 1 - logits.square() if want_x or want_weight or want_bias else None
            logits.mul_(plan.softcap)
        chunk = [tensor[chosen] for tensor in chunked]
        scale = None
        if cotangent is None:
            value, gradient = plan.formula(logits, *chunk), None
        elif plan.derivative is not None:
            value, derivative = plan.derivative(logits, *chunk)
            gradient, scale = logits, (cotangent[chosen] * derivative).unsqueeze(-1)
        else:
            value, gradient, extra = _differentiate(plan, logits, chunk, cotangent[chosen])
            if want_parameters:
                grad_parameters = [
                    old if new is None else new if old is None else old + new
                    for old, new in zip(grad_parameters, extra, strict=True)
                ]
        share = row_weight[chosen]
        values[chosen] = value.detach() * (share if value.ndim == 1 else share.unsqueeze(-1))
        if gradient is None:
            continue
        if slope is not None:
            gradient.mul_(slope)
        # the weight of a row is applied to its D features, not to its C logits
        if grad_x is not None:
            product = (
                torch.mm(gradient, operand, out=grad_x[chosen])
                if isinstance(chosen, slice)
                else gradient @ operand
            )
            if scale is not None:
                product.mul_(scale)
            if not isinstance(chosen, slice):
                grad_x[chosen] = product
        if grad_weight is not None:
            left = rows if scale is None else rows * scale
            grad_weight.addmm_(gradient.t(), left, beta=0 if start == 0 else 1)
        if grad_bias is not None:
            grad_bias += gradient.sum(0) if scale is None else (scale.t() @ gradient).squeeze(0)
    return values, _Gradients(grad_x, grad_weight, grad_bias, tuple(grad_parameters))


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
        ctx.shapes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
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
        if gradients is None:
            x, weight, bias, row_weight, *chunked = ctx.saved_tensors
            share = row_weight if grad_output.ndim < 2 else row_weight.unsqueeze(-1)
            with _no_autocast(x):
                _, gradients = _sweep(
                    ctx.plan, x, weight, bias, row_weight, chunked, share * grad_output, ctx.wanted
                )
        else:
            for gradient in (*gradients[:3], *gradients.parameters):
                if gradient is not None:
                    gradient.mul_(grad_output)
        tensors = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients[:3], ctx.shapes, strict=True)
        ]
        return (*tensors, None, None, None, None, *gradients.parameters)


@eager_in_compiled_code
def fused_linear_rows(
    x: Float[Tensor, "rows dim"],
    weight: Float[Tensor, "classes dim"],
    bias: Float[Tensor, " classes"] | None,
    formula: RowFormula,
    *chunked: Tensor,
    row_weight: Float[Tensor, " rows"] | None = None,
    derivative: RowDerivative | None = None,
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
    nothing asks for, such as that of a frozen weight, is not computed. Half-precision operands are multiplied as
    they are, with logits, values and sums over chunks in float32.

    Memory beyond inputs, result and gradients is a few chunks of logits (one or two with a ``derivative``, else
    what ``formula`` and its backward take), and a float32 copy of a half-precision weight.

    Args:
        x: (N, D) inputs.
        weight: (C, D).
        bias: (C,) or ``None``.
        formula: ``(logits (M, C), *chunk) -> values (M,)``, differentiable, one value for each row of its own.
        chunked: tensors of N rows that are cut like ``x`` and follow the logits; no gradient flows to them.
        row_weight: (N,) factor of each row, constant. Rows of weight 0 are left out of the computation.
        derivative: ``(logits (M, C), *chunk) -> (values (M,), slope (M,))``, which may overwrite ``logits`` and
            must leave in it ``g`` with ``d values / d logits = slope * g``; it takes the place of autograd.
        parameters: tensors inside ``formula`` that want gradients.
        columns: K, where ``formula`` gives (M, K) values (``reduction="none"`` only); ``None`` for (M,).
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        chunk_size: rows of a chunk; ``"auto"`` is :func:`auto_chunk_size`.
        reduction: ``"sum"``, or ``"none"`` for the weighted value of each row.

    Returns:
        A scalar, or (N,) or (N, K) values with ``"none"``; float32 for half-precision inputs.

    Raises:
        ValueError: for a wrong shape or chunk size, or columns under a sum.
        RuntimeError: at a backward with ``create_graph=True``.

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
    if chunk_size == "auto":
        size = auto_chunk_size(x.shape[0], weight.shape[0])
    elif isinstance(chunk_size, int) and chunk_size >= 1:
        size = chunk_size
    else:
        raise ValueError(f"chunk_size must be 'auto' or at least 1, got {chunk_size!r}")
    if columns is not None and (reduction != "none" or derivative is not None):
        raise ValueError("columns needs reduction='none' and no derivative")
    dtype = autocast_dtype(x) or x.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    if row_weight is None:
        row_weight = x.new_ones(x.shape[0], dtype=compute)
    plan = _Plan(formula, derivative, tuple(parameters), columns, softcap, size, reduction, dtype, compute)
    result = _FusedLinearRows.apply(
        x, weight, bias, row_weight.to(compute), plan, chunked, torch.is_grad_enabled(), *parameters
    )
    return result  # type: ignore[return-value]
