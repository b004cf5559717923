"""From rows to a number: the one contract on which weighting, accumulation and data parallelism rest.

A row-wise loss gives one value and one weight per example. ``reduce`` turns them into ``sum(w * v) / denominator``;
the denominator defaults to ``sum(w)``, and can be given where the batch at hand is only a part of the batch that
counts.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from telos.losses._checks import check_classification, check_floating, check_shape
from telos.losses._distributed import mean_over_ranks

Reduction: TypeAlias = Literal["mean", "sum", "none"]
Denominator: TypeAlias = float | Tensor | Literal["global"] | None
RowFormula: TypeAlias = Callable[..., Tensor]


def check_reduction(reduction: str, denominator: Denominator = None) -> None:
    """Refuse an unknown reduction, and a denominator that nothing would divide by."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator divides a mean, so it needs reduction='mean', got {reduction!r}")
    if isinstance(denominator, str) and denominator != "global":
        raise ValueError(f"denominator must be a number, a tensor, 'global' or None, got {denominator!r}")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision raised to float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def reduce(
    values: Tensor, weights: Tensor, reduction: Reduction = "mean", denominator: Denominator = None
) -> Tensor:
    """Weighted reduction of rows.

    Args:
        values: one value per example, any shape.
        weights: one weight per example, of the shape of ``values``; an example of weight 0 does not count.
        reduction: ``"mean"`` gives ``sum(w * v) / denominator``, ``"sum"`` gives ``sum(w * v)``, ``"none"`` gives
            ``w * v`` in the shape of ``values``.
        denominator: what a mean divides by. ``None`` is ``sum(w)``; a number or a tensor serves gradient
            accumulation (the count over all micro-batches); ``"global"`` is the mean of ``sum(w)`` over the ranks
            of the default process group, with which DistributedDataParallel's averaged gradient equals that of
            one process on the whole batch. Where nothing counts the mean is 0, with a graph.

    Example:
        >>> import torch
        >>> reduce(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([1.0, 3.0, 0.0]))
        tensor(1.7500)
    """
    check_reduction(reduction, denominator)
    weighted = torch.where(weights == 0, torch.zeros_like(values), values) * weights
    if reduction == "none":
        return weighted
    total = weighted.sum()
    if reduction == "sum":
        return total
    return total / divisor(weights, denominator)


def divisor(weights: Tensor, denominator: Denominator) -> Tensor | float:
    """What a mean divides by: ``sum(w)`` or the given denominator, and 1 where that is 0."""
    if denominator is None:
        denominator = weights.sum()
    elif isinstance(denominator, str):
        denominator = mean_over_ranks(weights.sum())
    if isinstance(denominator, Tensor):
        return torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    return denominator or 1.0


def row_weights(
    target: Tensor,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """Weights (M,) of rows with labels (M,) of int64 or probabilities (M, C): 0 for what does not count."""
    if target.is_floating_point():
        weights = torch.ones(target.shape[0], dtype=dtype, device=target.device)
    else:
        kept = target != ignore_index
        weights = kept.to(dtype)
        if class_weight is not None:
            weights = weights * class_weight.to(dtype)[torch.where(kept, target, 0)]
    if sample_weight is None:
        return weights
    # a weight of NaN on an ignored row must not revive it
    return torch.where(weights == 0, weights, weights * sample_weight.to(dtype).reshape(-1))


def safe_sqrt(squared: Tensor) -> Tensor:
    """The square root with value and gradient 0 at 0 (and below), where the plain one has an infinite slope."""
    # asked this way round, so that a NaN is no zero and propagates
    zero = squared <= 0
    return torch.where(zero, torch.zeros_like(squared), torch.where(zero, 1.0, squared).sqrt())


def at_target(per_class: Tensor, target: Tensor, formula: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The loss of the target class: ``formula(per_class)[y]``, or its mean under target probabilities.

    With labels (M,) only the M picked entries of ``per_class`` (M, C) pass through ``formula``; with probabilities
    q (M, C) the result is ``sum_y q_y formula(per_class)_y``, where a class of probability 0 adds nothing even if its
    loss is infinite.

    Example:
        >>> import torch
        >>> at_target(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2]), torch.square)
        tensor([9.])
        >>> at_target(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 0.5, 0.0]]), torch.square)
        tensor([2.5000])
    """
    formula = formula or (lambda entries: entries)
    if target.ndim == per_class.ndim - 1:
        return formula(per_class.gather(-1, target.unsqueeze(-1)).squeeze(-1))
    absent = target == 0
    # replaced before the formula, so that an infinite slope of an absent class cannot turn into 0 * inf
    entries = formula(torch.where(absent, torch.zeros_like(per_class), per_class))
    return torch.where(absent, torch.zeros_like(entries), target * entries).sum(-1)


def classification_rows(
    formula: RowFormula,
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    minimum_classes: int = 2,
    companions: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Values and weights of a row-wise classification loss, each of the shape of the batch.

    Sequences are flattened, half precision is raised to float32, rows that do not count are replaced by zeros before
    any arithmetic (a NaN in them reaches neither value nor gradient), class weights follow torch: with labels they
    weigh the row (and enter the denominator), with probabilities they weigh the classes inside the row.

    Args:
        formula: the loss itself: ``(logits (M, C), target (M,) or (M, C)) -> values (M,)``, linear in a probability
            target. Companions follow as positional arguments, in order.
        logits: (..., C), floating point.
        target: (...) labels or (..., C) probabilities.
        class_weight: (C,).
        sample_weight: (...).
        ignore_index: label of rows that do not count.
        minimum_classes: fewest classes for which the formula means something.
        companions: further tensors of the shape of ``logits``, by the argument name that errors should use (logits
            at a perturbed input, say); they are flattened, raised and masked with it.

    Example:
        >>> import torch
        >>> def margin(logits, target):
        ...     return at_target(-logits, target)
        >>> logits, target = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]]), torch.tensor([1, -100])
        >>> classification_rows(margin, logits, target)
        (tensor([-2., -0.]), tensor([1., 0.]))
    """
    check_classification(logits, target, class_weight, sample_weight, ignore_index, minimum_classes)
    batch_shape, classes = logits.shape[:-1], logits.shape[-1]
    others = []
    for name, companion in (companions or {}).items():
        check_floating(name, companion)
        check_shape(name, companion, tuple(logits.shape))
        others.append(at_least_float32(companion).reshape(-1, classes))
    logits = at_least_float32(logits).reshape(-1, classes)
    if target.is_floating_point():
        target = target.to(logits.dtype).reshape(-1, classes)
        target = target if class_weight is None else target * class_weight.to(logits.dtype)
    else:
        # raised first: -100 would wrap around in a narrow integer dtype
        target = target.reshape(-1).long()
    weights = row_weights(target, class_weight, sample_weight, ignore_index, logits.dtype)
    if not target.is_floating_point():
        target = torch.where(target != ignore_index, target, 0)
    counts = (weights != 0).unsqueeze(-1)
    logits = torch.where(counts, logits, torch.zeros_like(logits))
    if target.is_floating_point():
        target = torch.where(counts, target, torch.zeros_like(target))
    others = [torch.where(counts, other, torch.zeros_like(other)) for other in others]
    return formula(logits, target, *others).reshape(batch_shape), weights.reshape(batch_shape)
