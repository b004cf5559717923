import pytest
import torch

from telos.metrics.ranking import WeightedTripletRecall, triplet_weights, weighted_triplet_recall


def triplets() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([0, 3, 30, 7, 301, 0]), torch.tensor([0, 100, 5, 1, 0, 1000])


@pytest.mark.parametrize("count", [0, 7])
def test_equal_counts_give_plain_recall(count: int) -> None:
    ranks, _ = triplets()
    recall = weighted_triplet_recall(ranks, torch.full((6,), count), k=8)
    torch.testing.assert_close(recall.item(), 4 / 6)


@pytest.mark.parametrize(("rank", "expected"), [(0, 1.0), (19, 1.0), (20, 0.0), (301, 0.0)])
def test_one_unseen_among_frequent_ones_decides(rank: int, expected: float) -> None:
    ranks = torch.tensor([rank, 5, 400])
    recall = weighted_triplet_recall(ranks, torch.tensor([0, 10**9, 10**9]), k=20)
    torch.testing.assert_close(recall.item(), expected, rtol=0, atol=1e-8)


def test_weights_by_definition() -> None:
    _, counts = triplets()
    rarity = torch.tensor([1, 1 / 101, 1 / 6, 1 / 2, 1, 1 / 1001], dtype=torch.float64)
    torch.testing.assert_close(triplet_weights(counts), rarity / rarity.sum())


def test_metric_over_batches_equals_the_function() -> None:
    ranks, counts = triplets()
    metric = WeightedTripletRecall(k=10)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        metric.update(ranks[part], counts[part])
    torch.testing.assert_close(metric.compute(), weighted_triplet_recall(ranks, counts, k=10))
    metric.reset()
    metric.update(ranks[:0], counts[:0])
    assert metric.compute() == 0


def test_no_triplets() -> None:
    empty = torch.zeros(0, dtype=torch.long)
    assert weighted_triplet_recall(empty, empty) == 0


@pytest.mark.bare
def test_doors() -> None:
    ranks, counts = triplets()
    with pytest.raises(ValueError, match="train_counts must have shape"):
        weighted_triplet_recall(ranks, counts[1:])
    with pytest.raises(ValueError, match="train_counts must be at least 0, got -1"):
        weighted_triplet_recall(ranks, counts - 1)
    with pytest.raises(ValueError, match="ranks must be at least 0"):
        weighted_triplet_recall(ranks - 1, counts)
    with pytest.raises(TypeError, match="ranks must have an integer dtype"):
        weighted_triplet_recall(ranks.float(), counts)
    with pytest.raises(ValueError, match="k must lie in"):
        weighted_triplet_recall(ranks, counts, k=0)
    with pytest.raises(ValueError, match="k must lie in"):
        WeightedTripletRecall(k=0)
