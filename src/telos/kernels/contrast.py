"""Contrast without its matrix: each query picks its positives among all keys, a tile of logits at a time.

The logits are inner products of queries and keys, with any temperature already inside the queries. Of the whole
matrix only the rows of one tile live at a time, so that memory grows with N and not with N^2.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from telos.kernels.fused_linear import (
    ChunkSize,
    RowDerivative,
    _no_autocast,
    eager_in_compiled_code,
    fused_linear_rows,
    softmax_nll_,
)

# a tile reads all keys once: enough rows that this costs less than the products
_TILE_ROWS = 1024
# with fewer logits the matrix is small, and the dense formula knows every transform of torch
_FEWEST_LOGITS = 2**20

_NO_SECOND_DERIVATIVE = (
    "a contrastive loss computed in tiles has no second derivative (create_graph=True); pass chunk_size=None, "
    "which holds the whole matrix of logits"
)


def check_chunk_size(chunk_size: ChunkSize | None) -> None:
    """Refuse anything but ``"auto"``, ``None`` and a whole number of at least 1."""
    if not (chunk_size is None or chunk_size == "auto" or (isinstance(chunk_size, int) and chunk_size >= 1)):
        raise ValueError(f"chunk_size must be 'auto', None or at least 1, got {chunk_size!r}")


def tile_rows(chunk_size: ChunkSize | None, num_queries: int, num_keys: int) -> int | None:
    """Rows of a tile, or ``None`` where the matrix of logits is to be held whole.

    ``"auto"`` tiles more than 2^20 logits, 1,024 rows at a time, in eager code; compiled code and small matrices
    stay dense. A number tiles always, and ``None`` never. Transforms of ``torch.func`` have no tiled form and find
    the dense one.

    Example:
        >>> tile_rows("auto", 512, 512), tile_rows("auto", 4096, 4096), tile_rows(64, 512, 512)
        (None, 1024, 64)
    """
    check_chunk_size(chunk_size)
    compiling = torch.compiler.is_compiling()
    if chunk_size is None or (not compiling and torch._C._are_functorch_transforms_active()):
        return None
    if isinstance(chunk_size, int):
        return chunk_size
    return None if compiling or num_queries * num_keys <= _FEWEST_LOGITS else _TILE_ROWS


def label_counts(labels: Integer[Tensor, " batch"]) -> Integer[Tensor, " batch"]:
    """How many examples have the label of each, itself included, in O(N log N).

    Example:
        >>> import torch
        >>> label_counts(torch.tensor([7, 3, 7, 7]))
        tensor([3, 1, 3, 3])
    """
    labels = labels.long().contiguous()
    ordered = labels.sort().values
    return torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)


@eager_in_compiled_code
def contrast_rows(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    positive: Integer[Tensor, " queries"],
    itself: Integer[Tensor, " queries"] | None = None,
    *,
    chunk_size: int = _TILE_ROWS,
    summed: bool = True,
) -> Tensor:
    r"""Negative log-likelihood of each query's one positive among the keys.

    With logits ``s_ik = <q_i, k_k>``, the positive ``p(i)`` and, where it is given, the query's own key ``o(i)``::

        l_i = log( sum_{k != o(i)} exp(s_ik) ) - s_ip(i)

    The sum and its gradient take three products of the size of the matrix, as in the dense formula; values one by
    one take four.

    Args:
        queries: (M, D), the temperature divided out.
        keys: (N, D).
        positive: (M,) the key that each query is to find.
        itself: (M,) the key that is the query itself and no candidate.
        chunk_size: rows of a tile.
        summed: whether to add the values up. Only then is the gradient formed in the forward pass.

    Returns:
        A scalar, or (M,) values.

    Raises:
        RuntimeError: at a backward with ``create_graph=True``.

    Example:
        >>> import torch
        >>> contrast_rows(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4]), summed=False)  # log 5
        tensor([1.6094, 1.6094])
    """

    def nll_(logits: Tensor, positive: Tensor, *itself: Tensor) -> tuple[Tensor, Tensor]:
        for own in itself:
            logits.scatter_(-1, own.unsqueeze(-1), -math.inf)
        values = softmax_nll_(_relative_(logits), positive)
        return values, torch.ones_like(values)

    chunked = (positive,) if itself is None else (positive, itself)
    return _in_tiles(nll_, queries, keys, chunked, chunk_size, summed)


@eager_in_compiled_code
def contrast_labels(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "batch dim"],
    labels: Integer[Tensor, " batch"],
    count: Integer[Tensor, " batch"],
    *,
    chunk_size: int = _TILE_ROWS,
    summed: bool = True,
) -> Tensor:
    r"""Mean negative log-likelihood of each example's positives, the others of its label, among all others.

    With logits ``s_ik = <q_i, k_k>`` and ``P(i) = {p != i: y_p = y_i}``::

        l_i = mean_{p in P(i)} ( log( sum_{k != i} exp(s_ik) ) - s_ip )

    and 0 where i has no positive; such rows are not computed. Products as in :func:`contrast_rows`.

    Args:
        queries: (N, D), the temperature divided out.
        keys: (N, D) of the same examples.
        labels: (N,).
        count: (N,) examples of each one's label, from :func:`label_counts`.
        chunk_size: rows of a tile.
        summed: whether to add the values up. Only then is the gradient formed in the forward pass.

    Returns:
        A scalar, or (N,) values.

    Raises:
        RuntimeError: at a backward with ``create_graph=True``.

    Example:
        >>> import torch
        >>> labels, z = torch.tensor([0, 1, 0]), torch.zeros(3, 2)
        >>> contrast_labels(z, z, labels, label_counts(labels), summed=False)  # log 2 where there is a positive
        tensor([0.6931, 0.0000, 0.6931])
    """

    def mean_nll_(logits: Tensor, itself: Tensor, label: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
        own, share = itself.unsqueeze(-1), 1 / positives.to(logits.dtype)
        positive = (label.unsqueeze(-1) == labels).scatter_(-1, own, False)
        logits.scatter_(-1, own, -math.inf)
        pull = torch.where(positive, _relative_(logits), 0.0).sum(-1) * share
        torch.softmax(logits, -1, out=logits)
        values = -logits.amax(-1).log() - pull
        logits.sub_(torch.where(positive, share.unsqueeze(-1), 0.0))
        return values, torch.ones_like(values)

    labels = labels.long()
    itself = torch.arange(labels.shape[0], device=labels.device)
    return _in_tiles(
        mean_nll_,
        queries,
        keys,
        (itself, labels, count - 1),
        chunk_size,
        summed,
        row_weight=(count > 1).to(queries.dtype),
    )


def _relative_(logits: Tensor) -> Tensor:
    """Large inner products cancel here, before anything is added to them."""
    return logits.sub_(logits.amax(-1, keepdim=True))


def _in_tiles(
    derivative: RowDerivative,
    queries: Tensor,
    keys: Tensor,
    chunked: tuple[Tensor, ...],
    chunk_size: int,
    summed: bool,
    row_weight: Tensor | None = None,
) -> Tensor:
    """The keys are an output layer, and a row of logits is that of a classification with N classes."""
    with _no_autocast(queries):
        result = fused_linear_rows(
            queries,
            keys,
            None,
            lambda logits, *chunk: derivative(logits, *chunk)[0],
            *chunked,
            row_weight=row_weight,
            derivative=derivative,
            chunk_size=chunk_size,
            reduction="sum" if summed else "none",
        )
    if result.requires_grad:
        result.register_hook(_refuse_second_derivatives)
    return result


def _refuse_second_derivatives(_: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(_NO_SECOND_DERIVATIVE)


class _BothWays(torch.autograd.Function):
    """Columns are complete only after all rows: one sweep for the sums, another for the gradient."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, chunk_size: int) -> Tensor:  # type: ignore[override]
        count = queries.shape[0]
        row_sums, positives = queries.new_empty(count), queries.new_empty(count)
        column_sums = queries.new_full((count,), -math.inf)
        buffer = queries.new_empty(min(chunk_size, count), count)
        with _no_autocast(queries):
            for start in range(0, count, chunk_size):
                own = slice(start, min(start + chunk_size, count))
                logits = torch.mm(queries[own], keys.t(), out=buffer[: own.stop - start])
                positives[own] = logits.diagonal(start)
                row_sums[own] = logits.logsumexp(-1)
                torch.logaddexp(column_sums, logits.logsumexp(0), out=column_sums)
        ctx.save_for_backward(queries, keys, row_sums, column_sums)
        ctx.chunk_size = chunk_size
        return (row_sums - positives) + (column_sums - positives)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_NO_SECOND_DERIVATIVE)
        (weight,) = grad_outputs
        queries, keys, row_sums, column_sums = ctx.saved_tensors
        count = queries.shape[0]
        grad_queries = torch.empty_like(queries) if ctx.needs_input_grad[0] else None
        grad_keys = torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
        buffer, other = (queries.new_empty(min(ctx.chunk_size, count), count) for _ in "12")
        with _no_autocast(queries):
            for start in range(0, count, ctx.chunk_size):
                own = slice(start, min(start + ctx.chunk_size, count))
                size = own.stop - start
                logits = torch.mm(queries[own], keys.t(), out=buffer[:size])
                columns = torch.sub(logits, column_sums, out=other[:size]).exp_().mul_(weight)
                share = weight[own].unsqueeze(-1)
                gradient = logits.sub_(row_sums[own].unsqueeze(-1)).exp_().mul_(share).add_(columns)
                gradient.diagonal(start).sub_(2 * weight[own])
                if grad_queries is not None:
                    torch.mm(gradient, keys, out=grad_queries[own])
                if grad_keys is not None:
                    grad_keys.addmm_(gradient.t(), queries[own])
        return grad_queries, grad_keys, None


@eager_in_compiled_code
def contrast_both_ways(
    queries: Float[Tensor, "batch dim"], keys: Float[Tensor, "batch dim"], *, chunk_size: int = _TILE_ROWS
) -> Float[Tensor, " batch"]:
    r"""Negative log-likelihood of each pair (q_i, k_i) among the keys, plus that among the queries.

    With logits ``s_ik = <q_i, k_k>``::

        l_i = log( sum_k exp(s_ik) ) + log( sum_k exp(s_ki) ) - 2 s_ii

    Takes one product for the values and three for the gradient, one more than the dense formula.

    Args:
        queries: (N, D), the temperature divided out.
        keys: (N, D).
        chunk_size: rows of a tile.

    Returns:
        (N,) values.

    Raises:
        RuntimeError: at a backward with ``create_graph=True``.

    Example:
        >>> import torch
        >>> contrast_both_ways(torch.zeros(2, 3), torch.zeros(2, 3))  # 2 log 2
        tensor([1.3863, 1.3863])
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return _BothWays.apply(queries.to(dtype), keys.to(dtype), chunk_size)  # type: ignore[no-any-return]
