"""All triplets of a batch by sorting: what each distance adds to the loss, without a list of N^3 triplets.

A triplet is active for anchor a, positive p and negative n when ``d_ap - d_an + margin > 0``. The sum of the
active losses is linear in the distances with whole-number coefficients: how many active triplets each pair is
part of. With an anchor's positives sorted by distance, the positives that are active with one negative are an
interval of ranks, so that two binary searches a pair and one cumulative sum count them all.
"""

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Integer
from torch import Tensor

Mining: TypeAlias = Literal["all", "semi_hard", "hard"]

# pairs that are counted at a time: the integer work space is a few tensors of this size
_TILE = 2**21


class TripletCounts(NamedTuple):
    """Result of :func:`triplet_counts`; whole numbers in the dtype of the distances, without gradient.

    Attributes:
        coefficients: (N, N) active triplets of each pair: above 0 for positives, below 0 for negatives.
        active: (N,) active triplets of each anchor.
    """

    coefficients: Tensor
    active: Tensor


def triplet_counts(
    distances: Float[Tensor, "batch batch"],
    labels: Integer[Tensor, " batch"],
    margin: float,
    mining: Mining = "all",
    *,
    largest_class: int | None = None,
) -> TripletCounts:
    """How many active triplets each pair is part of: the derivative of their summed loss by the distances.

    With ``A`` the set of triplets (a, p, n), p another row of the label of a and n a row of another label, for
    which ``d_an < d_ap + margin`` (and besides ``d_an > d_ap`` with ``"semi_hard"``, ``d_an <= d_ap`` with
    ``"hard"``)::

        sum_A (d_ap - d_an + margin) = sum_ij c_ij d_ij + margin |A|
        c_ap = #{n: (a, p, n) in A}      c_an = -#{p: (a, p, n) in A}

    Every row of c sums to 0. Takes O(N^2 log P) time for at most P rows a label, and O(N^2) memory.

    Args:
        distances: (N, N), row a holds the distances from anchor a.
        labels: (N,).
        margin: 0 or above.
        mining: which triplets count.
        largest_class: an upper bound of the number of rows of one label, where it is known; it shortens the
            sort.

    Returns:
        The coefficients c (N, N) and the number of active triplets of each anchor (N,).

    Raises:
        ValueError: for an unknown mining.

    Example:
        >>> import torch
        >>> points = torch.tensor([0.0, 1.0, 1.5])
        >>> counts = triplet_counts((points[:, None] - points).abs(), torch.tensor([0, 0, 1]), margin=1.0)
        >>> counts.coefficients
        tensor([[ 0.,  1., -1.],
                [ 1.,  0., -1.],
                [ 0.,  0.,  0.]])
        >>> counts.active
        tensor([1., 1., 0.])
    """
    if mining not in ("all", "semi_hard", "hard"):
        raise ValueError(f"mining must be 'all', 'semi_hard' or 'hard', got {mining!r}")
    distances, labels = distances.detach().contiguous(), labels.long().contiguous()
    size = distances.shape[-1]
    order = labels.argsort()
    by_label = labels[order]
    # the rows of a label are one stretch of `order`
    first = torch.searchsorted(by_label, labels).unsqueeze(-1)
    last = torch.searchsorted(by_label, labels, right=True).unsqueeze(-1)
    slots = torch.arange(size if largest_class is None else min(largest_class, size), device=labels.device)
    itself = torch.arange(size, device=labels.device).unsqueeze(-1)
    tiles = []
    for start in range(0, size, max(1, _TILE // max(1, size))):
        rows = slice(start, start + max(1, _TILE // max(1, size)))
        columns = order[(first[rows] + slots).clamp_max(size - 1)]
        positive = (first[rows] + slots < last[rows]) & (columns != itself[rows])
        negative = labels[rows].unsqueeze(-1) != labels
        tiles.append(_count_tile(distances[rows], columns, positive, negative, margin, mining))
    if not tiles:
        return TripletCounts(torch.zeros_like(distances), distances.new_zeros(0))
    coefficients, active = zip(*tiles, strict=True)
    return TripletCounts(torch.cat(coefficients), torch.cat(active))


def _count_tile(
    distances: Tensor, columns: Tensor, positive: Tensor, negative: Tensor, margin: float, mining: Mining
) -> tuple[Tensor, Tensor]:
    """The counts of some anchors: distances and negative (B, N); columns and positive (B, P), the candidates."""
    near, slot = torch.where(positive, distances.gather(-1, columns), math.inf).sort(-1)
    number = positive.sum(-1, keepdim=True)
    # A negative is active with the positives of the ranks from start to end (exclusive): it is out of reach of
    # the first `beyond` (their loss is 0), and the first `closer` are closer than it. The minimum with `number`
    # is for a negative at an infinite distance, which would be placed among the candidates that are none.
    beyond = torch.searchsorted(near + margin, distances, right=True).minimum(number)
    start, end = beyond, number.expand_as(beyond)
    if mining != "all":
        closer = torch.searchsorted(near, distances).minimum(number)
        start, end = (
            (beyond.minimum(closer), closer) if mining == "semi_hard" else (beyond.maximum(closer), end)
        )
    ones = negative.to(distances.dtype)
    change = torch.zeros_like(near[:, :1]).expand(-1, near.shape[-1] + 1)
    change = change.scatter_add(-1, start, ones).scatter_add(-1, end, -ones)
    of_positives = change.cumsum(-1)[:, :-1]
    of_negatives = torch.where(negative, start - end, 0).to(distances.dtype)
    return of_negatives.scatter_add(-1, columns.gather(-1, slot), of_positives), of_positives.sum(-1)
