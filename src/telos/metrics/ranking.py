"""Quality of rankings, where rare things should not be drowned by frequent ones."""

from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torchmetrics import Metric

from telos.losses._checks import check_integer, check_range, check_shape, values_can_be_read


def weighted_triplet_recall(
    ranks: Integer[Tensor, " triplets"], train_counts: Integer[Tensor, " triplets"], *, k: int = 20
) -> Float[Tensor, ""]:
    r"""Recall at K in which a triplet weighs the more, the less often training showed it.

    ::

        wR@K = sum_t w_t [r_t < K],     w_t = 1 / (n_t + 1) / sum_u 1 / (n_u + 1)

    For (subject, predicate, object) triplets of scene graphs, and for anything else that is ranked and has a frequency.
    With equal counts it is plain recall; a triplet never seen in training (zero-shot) has the largest weight.

    Args:
        ranks: (T,) rank r of each true triplet among the predictions, from 0. One that was not retrieved has any
            rank of at least K (the authors: 301).
        train_counts: (T,) how often training showed each, n.
        k: K, at least 1; the authors use 5, 10, 15, 20 and 50.

    Returns:
        A float64 scalar in [0, 1]; 0 without triplets.

    Raises:
        ValueError: for a wrong shape, a negative rank or count, or a K below 1.
        TypeError: for a wrong dtype.

    Source:
        Graph Density-Aware Losses for Novel Compositions in Scene Graph Generation, arXiv 2005.08230.

    Example:
        >>> import torch
        >>> ranks, counts = torch.tensor([3, 40]), torch.tensor([0, 999])
        >>> weighted_triplet_recall(ranks, counts)
        tensor(0.9990, dtype=torch.float64)
    """
    found, total = _weighted_sums(ranks, train_counts, k)
    return found / torch.where(total == 0, 1.0, total)


def triplet_weights(train_counts: Integer[Tensor, " triplets"]) -> Float[Tensor, " triplets"]:
    """The weights ``1 / (n + 1)``, normalised to the sum 1, of :func:`weighted_triplet_recall`.

    They weigh other quantities alike: ``(triplet_weights(n) * ranks).sum()`` is the weighted mean rank.

    Args:
        train_counts: (T,) how often training showed each triplet.

    Returns:
        (T,) in float64.

    Raises:
        ValueError: for a wrong shape or a negative count.
        TypeError: for a wrong dtype.

    Source:
        Graph Density-Aware Losses for Novel Compositions in Scene Graph Generation, arXiv 2005.08230.

    Example:
        >>> import torch
        >>> triplet_weights(torch.tensor([0, 1, 1]))
        tensor([0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    rarity = _rarity(train_counts)
    return rarity / rarity.sum()


class WeightedTripletRecall(Metric):
    """Weighted triplet recall over batches and ranks; see :func:`weighted_triplet_recall`.

    Example:
        >>> import torch
        >>> metric = WeightedTripletRecall(k=20)
        >>> metric.update(torch.tensor([3]), torch.tensor([0]))
        >>> metric.update(torch.tensor([40]), torch.tensor([999]))
        >>> metric.compute()
        tensor(0.9990, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    found: Tensor
    total: Tensor

    def __init__(self, k: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("k", k, 1, float("inf"))
        self.k = k
        self.add_state("found", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, ranks: Tensor, train_counts: Tensor) -> None:
        """Count triplets (T,) with their ranks and their counts in training."""
        found, total = _weighted_sums(ranks, train_counts, self.k)
        self.found += found
        self.total += total

    def compute(self) -> Tensor:
        """The recall so far, 0 without triplets."""
        return self.found / torch.where(self.total == 0, 1.0, self.total)


def _weighted_sums(ranks: Tensor, train_counts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The rarity that was retrieved, and all of it."""
    check_integer("ranks", ranks)
    check_shape("ranks", ranks, ("T",))
    check_range("k", k, 1, float("inf"))
    _check_not_negative("ranks", ranks)
    rarity = _rarity(train_counts)
    check_shape("train_counts", train_counts, tuple(ranks.shape))
    return (rarity * (ranks < k)).sum(), rarity.sum()


def _rarity(train_counts: Tensor) -> Tensor:
    check_integer("train_counts", train_counts)
    check_shape("train_counts", train_counts, ("T",))
    _check_not_negative("train_counts", train_counts)
    return 1 / (train_counts.double() + 1)


def _check_not_negative(name: str, numbers: Tensor) -> None:
    if values_can_be_read(numbers) and (numbers < 0).any():
        raise ValueError(f"{name} must be at least 0, got {int(numbers.min())}")
