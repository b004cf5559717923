"""Any row-wise classification loss fused with the output layer that feeds it: no N x C logits."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from telos.kernels.fused_linear import (
    ChunkSize,
    RowDerivative,
    RowKernel,
    auto_chunk_size,
    autocast_dtype,
    eager_in_compiled_code,
    fused_linear_rows,
    rows_on_triton,
)
from telos.losses._algebra import ClassificationLoss, Loss, Mixture, term_name
from telos.losses._checks import check_classification, check_floating, check_range, check_shape
from telos.losses._reduction import Denominator, Reduction, check_reduction, divisor, row_weights
from telos.losses._row_derivatives import adaptive_ldr_kl, comp_sum_tau, row_derivative
from telos.losses.classification.comp_sum import CompSumLoss, _phi
from telos.losses.classification.cross_entropy import CrossEntropyLoss, LabelSmoothingLoss
from telos.losses.classification.focal import FocalLoss
from telos.losses.classification.ldr import ALDRKLLoss, _adaptive_rows
from telos.losses.classification.noise_robust import _MAE_TAU, GCELoss, MAELoss, SCELoss
from telos.losses.classification.z_loss import ZLoss

TermFormula = Callable[..., Tensor]
Compiled: TypeAlias = bool | Literal["auto"]

# fewer logits than these take less time than compiling could save
_WORTH_COMPILING = 2**24
# one for each loss, with a cache of its own: the losses of a process do not use up each other's recompilations
_compiled: WeakKeyDictionary[nn.Module, Callable[..., Tensor]] = WeakKeyDictionary()


class _Term(NamedTuple):
    """One loss of the sum, with what turns its row values into its share of the result."""

    loss: ClassificationLoss
    factor: float
    counts: Tensor  # (N,) weights of the rows
    share: Tensor  # (N,) weights over the denominator, times the factor


@eager_in_compiled_code
def linear_loss(
    x: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, "classes dim"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    loss: nn.Module,
    bias: Float[Tensor, " classes"] | None = None,
    *,
    softcap: float | None = None,
    chunk_size: ChunkSize = "auto",
    reduction: Reduction = "mean",
    denominator: Denominator = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    index: Integer[Tensor, " batch"] | None = None,
    compiled: Compiled = "auto",
) -> Tensor:
    r"""``loss(x @ weight.T + bias, target)`` with never more than a chunk of logits alive.

    Value and gradients (of x, weight, bias and the loss's own parameters) are those of the plain expression; the
    memory beyond inputs and gradients is that of a few chunks of logits instead of a few times N x C. ``"mean"``
    and ``"sum"`` form the gradients in the forward pass; ``"none"`` repeats the forward product in backward and
    keeps the same memory. Rows that do not count (ignored, of weight 0) are not computed at all.

    Every row-wise loss on logits is taken: those of this library, subclasses of
    :class:`telos.losses.ClassificationLoss`, and mixtures of them, of which each term keeps its own denominator.
    On labels most of them have derivatives written by hand (``losses/_row_derivatives.py``); the others, and all of
    them on probabilities, are differentiated a chunk at a time.

    A loss that overrides ``rows`` must give weights that do not depend on the logits.

    Half-precision inputs are multiplied as they are and summed in float32, in which the logits stay (the eager
    expression rounds them); under autocast inputs are first rounded to its dtype. Compiled callers break their
    graph here, once, and go on. There is no second derivative and no transform of ``torch.func``. Tied embeddings
    simply receive both gradients.

    On NVIDIA GPUs (from Ampere on) with Triton, which comes with torch there, one kernel makes values and gradient
    of a chunk for cross-entropy, smoothed labels, focal loss, the comp-sum losses (GCE and MAE among them), SCE and
    Z-loss on labels; a label out of range, which nobody can check there without waiting for the device, makes the
    loss NaN. Other losses are compiled, see ``compiled``. Half-precision products take their operands as they are;
    what that means for precision and memory stands with :func:`telos.kernels.fused_linear_rows`.

    On several ranks take ``denominator="global"`` and make the call in the forward of the wrapped module. There
    ``fully_shard`` has gathered the weights (a DTensor is refused) and reduces their gradients, and
    DistributedDataParallel with ``find_unused_parameters`` sees that the output layer is used.

    Args:
        x: (N, D) or (N, T, D) inputs of the output layer.
        weight: (C, D), for example ``model.lm_head.weight``, in the dtype of ``x`` unless autocast is on.
        target: (N,) or (N, T) labels, or probabilities (N, C) or (N, T, C).
        loss: a :class:`telos.losses.ClassificationLoss` or a mixture of them; its ``class_weight`` and
            ``ignore_index`` hold.
        bias: (C,) or ``None``.
        softcap: logits become ``softcap * tanh(logits / softcap)``; above 0.
        chunk_size: rows of a chunk, or ``"auto"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.
        sample_weight: one weight per example, (N,) or (N, T).
        index: (N,) positions in the training set, for a loss with per-example memory.
        compiled: whether a loss without a kernel of its own passes through ``torch.compile``, which merges its passes
            over a chunk, its derivative among them; ``"auto"`` where kernels run on Triton and there are at least
            2^24 logits. The first call then takes seconds, and an error of the compiler is raised. A loss with
            memory, or with a ``rows`` of its own, is not compiled.

    Returns:
        The loss: a scalar, or the shape of the batch with ``"none"``; float32 for half-precision inputs.

    Raises:
        ValueError: for a wrong shape, label or option, a loss that wants further inputs, or targets, weights or a
            denominator that require gradients.
        TypeError: for a wrong dtype, a sharded weight, or a loss that is not a sum over rows of logits.
        RuntimeError: at a backward with ``create_graph=True``, and under a transform of ``torch.func``.

    Example:
        >>> import torch
        >>> from telos.losses import FocalLoss
        >>> x, weight, target = torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([0, 3])
        >>> linear_loss(x, weight, target, FocalLoss(gamma=2.0))
        tensor(0.7798)
        >>> FocalLoss(gamma=2.0)(x @ weight.T, target)
        tensor(0.7798)
    """
    check_reduction(reduction, denominator)
    classes = _check(x, weight, bias, target, sample_weight, softcap, denominator)
    batch_shape = x.shape[:-1]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.reshape(-1, x.shape[-1])
    labels = target.reshape(-1, classes) if target.is_floating_point() else target.reshape(-1).long()

    parts = list(_terms(loss, reduction))
    for term, _ in parts:
        _check_target(term, x, target, sample_weight, classes)
    sample_weight = None if sample_weight is None else sample_weight.reshape(-1).to(compute)
    terms = []
    for term, factor in parts:
        counts = _row_weights(term, labels, sample_weight, classes, compute, chunk_size)
        divided_by = divisor(counts, denominator) if reduction == "mean" else 1.0
        terms.append(_Term(term, factor, counts, counts * factor / divided_by))

    memories = [
        _Memory(term.loss, index, counted=term.counts) for term in terms if isinstance(term.loss, ALDRKLLoss)
    ]
    if index is not None and not memories:
        raise ValueError(f"index was given, but {term_name(loss)} keeps no memory of examples")
    remembering = {id(memory.loss): memory for memory in memories}
    formulas = [
        remembering[id(term.loss)].formula if id(term.loss) in remembering else _formula(term.loss)
        for term in terms
    ]
    position = torch.arange(rows.shape[0], device=x.device)

    shares: tuple[Tensor, ...] = ()
    derivative, kernel = None, None
    if len(terms) == 1:
        row_weight = terms[0].share
        if labels.ndim == 1:
            derivative, kernel = _derivative(terms[0].loss), _kernel(terms[0].loss)
            if memories and memories[0].has_derivative:
                derivative = memories[0].derivative
    else:
        shares = tuple(term.share for term in terms)
        row_weight = torch.stack(shares).ne(0).any(0).to(compute)

    parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    if parameters:
        derivative = kernel = None
    on_triton = rows_on_triton(x)
    if compiled == "auto":
        compiled = on_triton and rows.shape[0] * classes >= _WORTH_COMPILING
    plain_rows = all(type(term.loss).rows is ClassificationLoss.rows for term in terms)
    if compiled and plain_rows and (kernel is None or not on_triton):
        formula = _compiled_formula(loss, tuple(term.loss for term in terms), softcap)
        softcap, derivative = None, None  # both are a part of what is compiled
    else:
        formula = partial(_evaluate, formulas)
    result = fused_linear_rows(
        rows,
        weight,
        bias,
        formula,
        labels,
        position,
        *shares,
        row_weight=row_weight,
        derivative=derivative,
        kernel=kernel,
        parameters=parameters,
        softcap=softcap,
        chunk_size=chunk_size,
        reduction="none" if reduction == "none" else "sum",
    )
    _advance(loss)
    for memory in memories:
        memory.commit()
    return result.reshape(batch_shape) if reduction == "none" else result


class LinearLoss(nn.Module):
    """A row-wise loss fused with an output layer; see :func:`linear_loss`.

    Args:
        loss: a :class:`telos.losses.ClassificationLoss` or a mixture of them.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        chunk_size: rows of a chunk, or ``"auto"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        compiled: whether a loss without a kernel of its own is compiled.

    The weight is an argument of the call, so that it stays with the model, where it may be tied or sharded.

    Example:
        >>> import torch
        >>> from telos.losses import CrossEntropyLoss
        >>> head, loss = torch.nn.Linear(3, 4), LinearLoss(CrossEntropyLoss())
        >>> x, target = torch.ones(2, 3), torch.tensor([0, 3])
        >>> fused, plain = loss(x, head.weight, target, head.bias), CrossEntropyLoss()(head(x), target)
        >>> bool((fused - plain).abs() < 1e-6)
        True
    """

    family = "linear"

    def __init__(
        self,
        loss: nn.Module,
        *,
        softcap: float | None = None,
        chunk_size: ChunkSize = "auto",
        reduction: Reduction = "mean",
        compiled: Compiled = "auto",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        tuple(_terms(loss, reduction))  # refuses here what the call would refuse
        self.loss = loss
        self.softcap = softcap
        self.chunk_size: ChunkSize = chunk_size
        self.reduction: Reduction = reduction
        self.compiled: Compiled = compiled

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        denominator: Denominator = None,
        sample_weight: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``x @ weight.T + bias``; see :func:`linear_loss`."""
        return linear_loss(
            x,
            weight,
            target,
            self.loss,
            bias,
            softcap=self.softcap,
            chunk_size=self.chunk_size,
            reduction=self.reduction,
            denominator=denominator,
            sample_weight=sample_weight,
            index=index,
            compiled=self.compiled,
        )

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        return (
            f"softcap={self.softcap}, chunk_size={self.chunk_size!r}, reduction={self.reduction!r}, "
            f"compiled={self.compiled!r}"
        )


def _terms(
    loss: nn.Module, reduction: str, factor: float = 1.0
) -> Iterator[tuple[ClassificationLoss, float]]:
    """The row-wise losses whose weighted sum ``loss`` is; anything else is refused with the reason."""
    if isinstance(loss, Mixture):
        for inner, own in zip(loss.losses, loss.current_weights(), strict=True):
            yield from _terms(inner, reduction, factor * own)
        return
    name = type(loss).__name__
    if not isinstance(loss, ClassificationLoss):
        if isinstance(loss, Loss) and loss.family == "classification":
            reason = "it couples the examples of a batch, so that no chunk of rows has a loss of its own"
        else:
            reason = "only a telos.losses.ClassificationLoss says what each row of logits contributes"
        raise TypeError(f"loss {name} cannot be fused with a linear layer: {reason}")
    if type(loss).forward is not ClassificationLoss.forward and not isinstance(loss, ALDRKLLoss):
        further = ", ".join(sorted(loss.needs))
        why = f"it needs {further} beside the logits" if further else "it has a forward of its own"
        raise ValueError(f"loss {name} cannot be fused with a linear layer: {why}")
    if loss.reduction not in ("mean", reduction):
        raise ValueError(
            f"loss {name} has reduction={loss.reduction!r} but the call asks for {reduction!r}; pass the same to both"
        )
    yield loss, factor


def _formula(loss: ClassificationLoss) -> TermFormula:
    def formula(logits: Tensor, target: Tensor, position: Tensor) -> Tensor:
        if type(loss).rows is not ClassificationLoss.rows:
            values, weights = loss.rows(logits, target)
            if weights.requires_grad:
                raise ValueError(
                    f"loss {type(loss).__name__} cannot be fused with a linear layer: its weights depend on the logits"
                )
            return values
        if target.is_floating_point():
            target = target.to(logits.dtype)
            target = target if loss.class_weight is None else target * loss.class_weight.to(logits.dtype)
        return loss.values(logits, target)

    return formula


def _evaluate(
    formulas: Sequence[TermFormula], logits: Tensor, target: Tensor, position: Tensor, *shares: Tensor
) -> Tensor:
    """The value of each row: of the only term, or the sum of the terms' shares."""
    if not shares:
        return formulas[0](logits, target, position)
    pairs = zip(formulas, shares, strict=True)
    parts = [_masked(own, share, logits, target, position) for own, share in pairs]
    return torch.stack(parts).sum(0)


def _capped_values(
    losses: Sequence[ClassificationLoss], softcap: float | None, logits: Tensor, *chunk: Tensor
) -> Tensor:
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return _evaluate([_formula(loss) for loss in losses], logits, *chunk)


def _compiled_formula(
    loss: nn.Module, losses: Sequence[ClassificationLoss], softcap: float | None
) -> TermFormula:
    """What ``_evaluate`` gives on capped logits, compiled once for all sizes of a chunk."""
    if loss not in _compiled:
        _compiled[loss] = torch.compile(_capped_values, isolate_recompiles=True)  # type: ignore[call-overload]
    values = _compiled[loss]

    def formula(logits: Tensor, *chunk: Tensor) -> Tensor:
        for tensor in (logits, *chunk):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # the last chunk is shorter
        try:
            return values(losses, softcap, logits, *chunk)
        except torch._dynamo.exc.TorchDynamoException as error:
            error.add_note("linear_loss(..., compiled=False) does without the compiler")
            raise

    return formula


def _masked(formula: TermFormula, share: Tensor, logits: Tensor, target: Tensor, position: Tensor) -> Tensor:
    """A term's part of rows that count for the mixture but perhaps not for the term."""
    counts = share != 0
    logits = torch.where(counts.unsqueeze(-1), logits, 0.0)
    target = torch.where(counts if target.ndim == 1 else counts.unsqueeze(-1), target, 0)
    return formula(logits, target, position) * share


def _row_weights(
    loss: ClassificationLoss,
    target: Tensor,
    sample_weight: Tensor | None,
    classes: int,
    dtype: torch.dtype,
    chunk_size: ChunkSize = "auto",
) -> Tensor:
    """Weights of the rows as ``loss.rows`` gives them, without logits."""
    if type(loss).rows not in (ClassificationLoss.rows, ALDRKLLoss.rows):
        # a row contract of the user's own is asked, a chunk at a time
        parts = []
        size = auto_chunk_size(target.shape[0], classes) if chunk_size == "auto" else max(1, chunk_size)
        for start in range(0, target.shape[0], size):
            part = target[start : start + size]
            own = None if sample_weight is None else sample_weight[start : start + size]
            logits = torch.zeros(part.shape[0], classes, dtype=dtype, device=target.device)
            with torch.no_grad():
                parts.append(loss.rows(logits, part, sample_weight=own)[1].to(dtype))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=dtype, device=target.device)
    class_weight = None if loss.class_weight is None else loss.class_weight.detach()
    return row_weights(target, class_weight, sample_weight, loss.ignore_index, dtype)


class _Memory:
    """The per-example temperatures of one call: read before it, collected by chunks, written after it."""

    def __init__(self, loss: ALDRKLLoss, index: Tensor | None, counted: Tensor) -> None:
        length = counted.shape[0]
        self.loss, self.index = loss, None if index is None else loss.memory.check(index, length)
        if self.index is None:
            self.old = torch.full((length,), loss.temperature, device=counted.device)
        else:
            self.old = loss.memory.read("temperature", self.index)
        self.new = torch.full_like(self.old, math.nan)  # what is not visited is not written

    def formula(self, logits: Tensor, target: Tensor, position: Tensor) -> Tensor:
        loss = self.loss
        values, _, new = _adaptive_rows(
            logits,
            target,
            self.old[position],
            temperature=loss.temperature,
            alpha=loss.alpha,
            margin=loss.margin,
            normalize=loss.normalize,
            exact=loss.exact,
            class_weight=loss.class_weight,
            sample_weight=None,
            ignore_index=loss.ignore_index,
        )
        self.new[position] = new.detach()
        return values

    @property
    def has_derivative(self) -> bool:
        return type(self.loss) is ALDRKLLoss and self.loss.normalize == "softplus" and not self.loss.exact

    def derivative(self, logits: Tensor, target: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.loss
        values, slope, new = adaptive_ldr_kl(
            logits,
            target,
            self.old[position],
            temperature=loss.temperature,
            alpha=loss.alpha,
            margin=loss.margin,
        )
        self.new[position] = new.to(self.new.dtype)
        return values, slope

    def commit(self) -> None:
        if self.index is not None and self.loss.training and torch.is_grad_enabled():
            self.loss.memory.write(self.index, temperature=self.new)


def _advance(loss: nn.Module) -> None:
    """One step of every schedule, as the forward of a mixture takes it."""
    for part in loss.modules():
        if isinstance(part, Mixture) and part._scheduled and part.training and torch.is_grad_enabled():
            part.steps += 1


def _derivative(loss: ClassificationLoss) -> RowDerivative | None:
    """The hand-written row derivative of a loss on labels, without the position that formulas take."""
    derivative = row_derivative(loss)
    if derivative is None:
        return None
    return lambda logits, target, position: derivative(logits, target)


def _kernel(loss: ClassificationLoss) -> RowKernel | None:
    """The same on Triton, for every loss that is a function of ``-log p_y``, for smoothed labels and for Z-loss."""
    if type(loss) is ZLoss:
        return partial(_z_kernel, loss.a, loss.b, loss.eps)
    if type(loss) is LabelSmoothingLoss:
        return partial(_nll_kernel, lambda nll: nll, {"smoothing": loss.smoothing})
    if type(loss) in (CompSumLoss, GCELoss, MAELoss) and (tau := comp_sum_tau(loss)) != 1:
        return partial(_nll_kernel, partial(_phi, tau=tau), {"slope": "comp_sum", "first": tau})
    if type(loss) is FocalLoss and (gamma := loss.gamma) > 0:
        modulated: Callable[[Tensor], Tensor] = lambda nll: (-torch.expm1(-nll)).pow(gamma) * nll  # noqa: E731
        return partial(_nll_kernel, modulated, {"slope": "focal", "first": gamma})
    if type(loss) is SCELoss:
        alpha, reverse = loss.alpha, -loss.beta * loss.log_zero
        return partial(
            _nll_kernel,
            lambda nll: alpha * nll + reverse * _phi(nll, _MAE_TAU),
            {"slope": "symmetric", "first": alpha, "second": reverse},
        )
    if type(loss) in (CrossEntropyLoss, CompSumLoss, FocalLoss):
        return partial(_nll_kernel, lambda nll: nll, {})
    return None


def _nll_kernel(
    value: Callable[[Tensor], Tensor],
    options: dict[str, Any],
    logits: Tensor,
    target: Tensor,
    position: Tensor,
    **layer: Any,
) -> Tensor:
    from telos.kernels.triton_rows import softmax_rows

    return value(softmax_rows(logits, target, **options, **layer)[0])


def _z_kernel(
    a: float, b: float, eps: float, logits: Tensor, target: Tensor, position: Tensor, **layer: Any
) -> Tensor:
    from telos.kernels.triton_rows import z_rows

    score = z_rows(logits, target, a=a, b=b, eps=eps, **layer)
    return -torch.nn.functional.logsigmoid(a * (score - b)) / a


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Any,
    sample_weight: Tensor | None,
    softcap: float | None,
    denominator: Denominator,
) -> int:
    """The doors of the linear layer; returns the number of classes."""
    check_floating("x", x)
    check_floating("weight", weight)
    if x.ndim < 2:
        raise ValueError(f"x must have shape (N, D) or (N, T, D), got {tuple(x.shape)}")
    check_shape("weight", weight, ("C", x.shape[-1]))
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (weight.shape[0],))
    others = [weight] if bias is None else [weight, bias]
    if any(other.dtype != x.dtype for other in others) and autocast_dtype(x) is None:
        got = ", ".join(str(other.dtype) for other in others)
        raise TypeError(f"weight and bias must have the dtype of x, {x.dtype}, outside autocast, got {got}")
    if softcap is not None:
        check_range("softcap", softcap, 0.0, float("inf"), open_low=True)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    for name, tensor in (("target", target), ("sample_weight", sample_weight), ("denominator", denominator)):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient, none flows to it here; detach it")
    return weight.shape[0]


def _check_target(
    loss: ClassificationLoss, x: Tensor, target: Tensor, sample_weight: Tensor | None, classes: int
) -> None:
    # a tensor of the shape of the logits that takes the memory of one number
    logits = x.new_zeros(()).expand(*x.shape[:-1], classes)
    check_classification(
        logits, target, loss.class_weight, sample_weight, loss.ignore_index, loss.minimum_classes
    )
