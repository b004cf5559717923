import math
from itertools import combinations

import pytest
import torch

from telos.metrics.reliability import PassAtK, expected_pass_at_n, pass_at_k


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_by_enumeration(k: int) -> None:
    """The share of the k-subsets of six samples that hold a right one."""
    expected = []
    for correct in range(7):
        right = [sample < correct for sample in range(6)]
        subsets = list(combinations(right, k))
        expected.append(sum(any(subset) for subset in subsets) / len(subsets))
    found = pass_at_k(torch.arange(7), torch.full((7,), 6), k)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_one_attempt_is_the_share_of_right_samples() -> None:
    found = pass_at_k(torch.tensor([[3, 5]]), torch.tensor([[10, 8]]), 1)
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.625]], dtype=torch.float64))


def test_many_samples() -> None:
    found = pass_at_k(torch.tensor([7]), torch.tensor([10_000]), 64).item()
    assert found == pytest.approx(1 - math.comb(9993, 64) / math.comb(10_000, 64), rel=1e-8)


def test_unbiased() -> None:
    """Its mean over the binomial number of right samples is 1 - (1 - p)^k."""
    n, k, p = 12, 5, 0.3
    correct = torch.arange(n + 1)
    chance = torch.tensor([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]).double()
    mean = (chance * pass_at_k(correct, torch.full((n + 1,), n), k)).sum()
    torch.testing.assert_close(
        mean, expected_pass_at_n(torch.tensor(p, dtype=torch.float64), k), rtol=1e-6, atol=0
    )


def test_expected_pass_keeps_its_digits() -> None:
    p = torch.tensor([1e-12, 0.5, 1.0, 0.0], dtype=torch.float64)
    found = expected_pass_at_n(p, 100)
    torch.testing.assert_close(
        found, torch.tensor([1e-10, 1 - 2**-100, 1.0, 0.0], dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert (expected_pass_at_n(p, 0) == 0).all()


def test_metric_over_batches_is_the_mean() -> None:
    correct, samples = torch.tensor([0, 1, 4, 9]), torch.tensor([9, 8, 7, 9])
    metric = PassAtK(3)
    metric.update(correct[:1], samples[:1])
    metric.update(correct[1:], samples[1:])
    torch.testing.assert_close(metric.compute(), pass_at_k(correct, samples, 3).mean())
    metric.reset()
    metric.update(correct[:0], samples[:0])
    assert metric.compute() == 0


@pytest.mark.bare
def test_doors() -> None:
    with pytest.raises(ValueError, match="num_samples must be at least k = 5, got 4"):
        pass_at_k(torch.tensor([1]), torch.tensor([4]), 5)
    with pytest.raises(ValueError, match="num_correct must lie in"):
        pass_at_k(torch.tensor([5]), torch.tensor([4]), 2)
    with pytest.raises(ValueError, match="num_samples must have shape"):
        pass_at_k(torch.tensor([1]), torch.tensor([4, 4]), 2)
    with pytest.raises(TypeError, match="num_correct must have an integer dtype"):
        pass_at_k(torch.tensor([1.0]), torch.tensor([4]), 2)
    with pytest.raises(ValueError, match="k must lie in"):
        PassAtK(0)
    with pytest.raises(ValueError, match="p must lie in"):
        expected_pass_at_n(torch.tensor([1.5]), 2)
    with pytest.raises(ValueError, match="n must lie in"):
        expected_pass_at_n(torch.tensor([0.5]), -1)
