"""Which rows are trained on, tuned on and tested on: stratified, by group, by time.

``shares`` are those of training, validation and test split; two of them leave the test split out, for data
whose test split is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHARES = (0.60, 0.15, 0.25)
WITHOUT_TEST = (0.80, 0.20)
CANDIDATES = 64
ROWS_OF_A_CLASS = 4  # fewest rows with which a class is in all three splits, and twice in training


def stratified(
    target: np.ndarray, rng: np.random.Generator, shares: Sequence[float] = SHARES
) -> list[np.ndarray]:
    """Every class is dealt to the splits by their shares.

    The counts of a class depend on its size alone, so that every seed has splits of the same sizes.

    Example:
        >>> import numpy as np
        >>> labels = np.repeat([0, 1], [20, 8])
        >>> [len(rows) for rows in stratified(labels, np.random.default_rng(0))]
        [17, 4, 7]
    """
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    for label in np.unique(target):
        rows = rng.permutation(np.flatnonzero(target == label))
        for part, chosen in zip(parts, _dealt(rows, shares), strict=True):
            part.append(chosen)
    return [np.sort(np.concatenate(part)) for part in parts]


def shuffled(count: int, rng: np.random.Generator, shares: Sequence[float] = SHARES) -> list[np.ndarray]:
    """Rows at random, for targets without classes.

    Example:
        >>> import numpy as np
        >>> [len(rows) for rows in shuffled(100, np.random.default_rng(0))]
        [60, 15, 25]
    """
    return [np.sort(rows) for rows in _dealt(rng.permutation(count), shares)]


def grouped(
    groups: np.ndarray,
    labels: np.ndarray | None,
    rng: np.random.Generator,
    shares: Sequence[float] = SHARES,
) -> list[np.ndarray]:
    """Whole groups are dealt to the splits, so that no group straddles two of them.

    Of ``CANDIDATES`` random deals the one is taken whose splits are closest to their shares, of the rows and
    of every class. A deal that leaves a class out of the training split counts as far off.

    Args:
        groups: (N,) number of each row's group, from 0.
        labels: (N,) classes from 0, or ``None`` for numbers.
        rng: draws the deals.
        shares: of the splits.

    Returns:
        The rows of each split.

    Raises:
        ValueError: for fewer groups than splits.

    Example:
        >>> import numpy as np
        >>> groups = np.arange(40) // 2
        >>> parts = grouped(groups, None, np.random.default_rng(0))
        >>> [len(rows) for rows in parts], sum(len(set(groups[rows])) for rows in parts)
        ([24, 6, 10], 20)
    """
    count = int(groups.max()) + 1
    if count < len(shares):
        raise ValueError(f"{count} groups cannot be dealt to {len(shares)} splits")
    sizes = np.bincount(groups, minlength=count)
    # (groups, classes): how many rows of each class a group has; a table of that size must fit in memory
    classes = 1 if labels is None else int(labels.max()) + 1
    if labels is None or count * classes > 20_000_000:
        counts = sizes[:, None]
    else:
        counts = np.bincount(groups * classes + labels, minlength=count * classes).reshape(count, classes)
    totals = counts.sum(0)
    best, least = np.zeros(count, dtype=np.int64), np.inf
    for _ in range(CANDIDATES):
        part = _cut(rng.permutation(count), sizes, shares)
        held = np.stack([counts[part == place].sum(0) for place in range(len(shares))])
        rows = np.array([sizes[part == place].sum() for place in range(len(shares))])
        off = np.abs(held / totals - np.array(shares)[:, None]).mean()
        off += np.abs(rows / rows.sum() - np.array(shares)).mean() + (held[0] == 0).sum()
        if off < least:
            best, least = part, off
    # a class that no deal brought into the training split gets one of its groups there
    for label in np.flatnonzero(counts[best == 0].sum(0) == 0):
        best[rng.choice(np.flatnonzero(counts[:, label]))] = 0
    if len(np.unique(best)) < len(shares):
        raise ValueError(f"{count} groups are too few for every class in training and every split with a row")
    return [np.flatnonzero(best[groups] == place) for place in range(len(shares))]


def chronological(time: np.ndarray, shares: Sequence[float] = SHARES) -> list[np.ndarray]:
    """The past to train on, then what came after; rows of one moment stay together.

    Raises:
        ValueError: for fewer moments than splits.

    Example:
        >>> import numpy as np
        >>> [rows.tolist() for rows in chronological(np.array([5, 1, 1, 9]), (0.5, 0.25, 0.25))]
        [[1, 2], [0], [3]]
    """
    moments, places, sizes = np.unique(time, return_inverse=True, return_counts=True)
    if len(moments) < len(shares):
        raise ValueError(f"{len(moments)} moments cannot be dealt to {len(shares)} splits")
    part = _cut(np.arange(len(moments)), sizes, shares)
    return [np.flatnonzero(part[places] == place) for place in range(len(shares))]


def _dealt(rows: np.ndarray, shares: Sequence[float]) -> list[np.ndarray]:
    held = [max(1, round(share * len(rows))) for share in shares[1:]]
    return np.split(rows, len(rows) - np.cumsum(held[::-1])[::-1])


def _cut(order: np.ndarray, sizes: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """The split of each unit: units in ``order`` are cut where the shares of rows are reached, none empty."""
    middle = np.cumsum(sizes[order]) - sizes[order] / 2
    edges = np.searchsorted(middle, np.cumsum(shares[:-1]) * sizes.sum())
    for place in range(len(edges)):
        lowest = 1 + (edges[place - 1] if place else 0)
        edges[place] = min(max(edges[place], lowest), len(order) - (len(edges) - place))
    part = np.empty(len(order), dtype=np.int64)
    part[order] = np.searchsorted(edges, np.arange(len(order)), side="right")
    return part
