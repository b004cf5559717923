import math
from fractions import Fraction
from itertools import combinations

import pytest
import torch

from telos.metrics.reliability import (
    CostToFailure,
    FailureRate,
    PassAtK,
    cost_to_failure,
    expected_pass_at_n,
    failure_rate_interval,
    kaplan_meier,
    pass_at_k,
    samples_for_bound,
)


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


# ---------------------------------------------------------------------------------------------- rare failures


def at_most(k: int, n: int, p: float) -> float:
    """P(X <= k) of a binomial variable, term by term."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


@pytest.mark.parametrize(("k", "n"), [(1, 7), (3, 40), (39, 40), (20, 41)])
def test_bounds_are_where_the_tails_are(k: int, n: int) -> None:
    """At the upper bound so few failures, at the lower one so many, have a probability of 2.5 %."""
    rate, low, high = failure_rate_interval(k, n)
    assert rate.item() == pytest.approx(k / n, rel=1e-15)
    assert at_most(k, n, high.item()) == pytest.approx(0.025, rel=1e-9)
    assert 1 - at_most(k - 1, n, low.item()) == pytest.approx(0.025, rel=1e-9)
    assert at_most(k, n, failure_rate_interval(k, n, 0.9, side="upper").high.item()) == pytest.approx(0.1)
    lower = failure_rate_interval(k, n, 0.9, side="lower")
    assert 1 - at_most(k - 1, n, lower.low.item()) == pytest.approx(0.1)
    assert lower.high == 1


def test_bounds_without_failures_and_without_successes() -> None:
    n = torch.tensor([1, 10, 1000, 10**8])
    closed_form = -torch.expm1(math.log(0.025) / n.double())
    none, every = failure_rate_interval(torch.zeros_like(n), n), failure_rate_interval(n, n)
    torch.testing.assert_close(none.high, closed_form, rtol=1e-10, atol=0)
    torch.testing.assert_close(every.low, 1 - closed_form, rtol=1e-10, atol=0)
    assert (none.low == 0).all()
    assert (every.high == 1).all()
    one_sided = failure_rate_interval(0, 10**6, side="upper").high.item()
    assert one_sided == pytest.approx(3 / 10**6, rel=2e-3)


def test_successes_mirror_failures() -> None:
    k, n = torch.tensor([[0, 1, 4], [7, 9, 11]]), torch.full((2, 3), 11)
    one, other = failure_rate_interval(k, n, 0.8), failure_rate_interval(n - k, n, 0.8)
    torch.testing.assert_close(one.low, 1 - other.high, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", ["both", "upper", "lower"])
def test_coverage_is_at_least_nominal(side: str) -> None:
    """Summed over all outcomes of 30 trials, for rates from 0.001 to 0.999."""
    k, n, p = torch.arange(31), 30, torch.linspace(0.001, 0.999, 499, dtype=torch.float64)
    _, low, high = failure_rate_interval(k, torch.full_like(k, n), 0.9, side=side)
    chance = torch.exp(torch.distributions.Binomial(n, p.unsqueeze(1)).log_prob(k.double()))
    covered = (low <= p.unsqueeze(1)) & (p.unsqueeze(1) <= high)
    coverage = (chance * covered).sum(1)
    assert coverage.min() >= 0.9 - 1e-12
    assert coverage.min() < 0.93  # and it is no wider than it must be


def test_samples_for_bound() -> None:
    for rate in (0.5, 0.01, 1e-5):
        assert samples_for_bound(rate) == math.ceil(math.log(0.05) / math.log1p(-rate))
    for failures in (1, 4):
        enough = samples_for_bound(0.02, 0.9, failures=failures)
        assert at_most(failures, enough, 0.02) <= 0.1 < at_most(failures, enough - 1, 0.02)
        assert failure_rate_interval(failures, enough, 0.9, side="upper").high <= 0.02
        assert failure_rate_interval(failures, enough - 1, 0.9, side="upper").high > 0.02


def test_failure_rate_over_batches() -> None:
    failed = torch.tensor([True, False, True, False, False, True])
    accepted = torch.tensor([True, True, False, True, False, True])
    metric = FailureRate(0.9)
    metric.update(failed[:2], accepted[:2])
    metric.update(failed[2:].reshape(2, 2), accepted[2:].reshape(2, 2))
    assert metric.compute() == failure_rate_interval(2, 4, 0.9)
    metric.reset()
    metric.update(failed)
    assert metric.compute() == failure_rate_interval(3, 6, 0.9)
    metric.reset()
    metric.update(failed, torch.zeros_like(failed))
    rate, low, high = metric.compute()
    assert rate.isnan()
    assert (low, high) == (0, 1)


# ---------------------------------------------------------------------------------------------- cost of attacks


def test_kaplan_meier_against_the_product_in_fractions() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.randint(0, 9, (60,), generator=generator)
    censored = torch.rand(60, generator=generator) < 0.4
    times, survival = kaplan_meier(cost, censored)
    pairs = list(zip(cost.tolist(), censored.tolist(), strict=True))
    assert times.tolist() == sorted(set(cost.tolist()))
    share, expected = Fraction(1), []
    for time in sorted(set(cost.tolist())):
        ended = sum(c == time and not given_up for c, given_up in pairs)
        share *= 1 - Fraction(ended, sum(c >= time for c, _ in pairs))
        expected.append(float(share))
    torch.testing.assert_close(survival, torch.tensor(expected, dtype=torch.float64))


def test_without_censoring_it_is_the_sample() -> None:
    for n in range(1, 80):
        cost = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        found = cost_to_failure(cost, torch.zeros(n, dtype=torch.bool))
        assert found.median == cost.median()  # the lower one of an even number
        torch.testing.assert_close(found.restricted_mean, cost.mean())
        torch.testing.assert_close(found.geometric_mean, cost.log().mean().exp())
        assert (found.attacks, found.successes) == (n, n)


def test_attacks_that_were_given_up_are_not_dropped() -> None:
    cost = torch.tensor([10, 300, 300, 300])
    found = cost_to_failure(cost, torch.tensor([False, True, True, True]))
    assert found.median == torch.inf
    assert found.restricted_mean == (10 + 3 * 300) / 4
    assert (found.attacks, found.successes, found.geometric_mean.round()) == (4, 1, 10)
    none = cost_to_failure(cost, torch.ones(4, dtype=torch.bool))
    assert (none.median, none.geometric_mean.isnan()) == (torch.inf, True)


def test_median_where_attacks_were_given_up_early() -> None:
    """Two of the four that reach cost 5 succeed there: half of all, as the early ones say nothing."""
    cost = torch.tensor([1, 2, 5, 5, 9, 9])
    censored = torch.tensor([True, True, False, False, True, True])
    assert cost_to_failure(cost, censored).median == 5
    assert cost_to_failure(cost, torch.tensor([True, True, False, True, True, True])).median == torch.inf


def test_cost_to_failure_over_batches() -> None:
    cost, censored = torch.tensor([4, 8, 15, 16, 23]), torch.tensor([False, False, True, False, True])
    metric = CostToFailure()
    metric.update(cost[:2], censored[:2])
    metric.update(cost[2:], censored[2:])
    assert metric.compute() == cost_to_failure(cost, censored)
    metric.reset()
    with pytest.warns(UserWarning, match="called before"):
        empty = metric.compute()
    assert empty.median.isnan()
    assert empty.attacks == empty.successes == 0
    assert empty.restricted_mean.isnan()
    assert empty.geometric_mean.isnan()


@pytest.mark.bare
def test_doors_of_failures() -> None:
    with pytest.raises(ValueError, match="failures must lie in"):
        failure_rate_interval(3, 2)
    with pytest.raises(ValueError, match="failures must lie in"):
        failure_rate_interval(-1, 2)
    with pytest.raises(TypeError, match="trials must have an integer dtype"):
        failure_rate_interval(1, 2.0)
    with pytest.raises(ValueError, match="trials must have shape"):
        failure_rate_interval(torch.tensor([1, 2]), torch.tensor([3]))
    for confidence in (0.0, 1.0):
        with pytest.raises(ValueError, match="confidence must lie in"):
            FailureRate(confidence)
    with pytest.raises(ValueError, match="side must be"):
        FailureRate(side="left")
    with pytest.raises(TypeError, match="failed must be a boolean tensor, got torch.int64"):
        FailureRate().update(torch.tensor([1]))
    with pytest.raises(ValueError, match="accepted must have shape"):
        FailureRate().update(torch.tensor([True]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="rate must lie in"):
        samples_for_bound(0.0)
    with pytest.raises(ValueError, match="failures must lie in"):
        samples_for_bound(0.1, failures=-1)


@pytest.mark.bare
def test_doors_of_attacks() -> None:
    flag = torch.tensor([False])
    for cost in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"cost must be finite and at least 0, got {cost}"):
            kaplan_meier(torch.tensor([cost]), flag)
    with pytest.raises(ValueError, match="censored must have shape"):
        cost_to_failure(torch.tensor([1, 2]), flag)
    with pytest.raises(ValueError, match="cost must have shape"):
        CostToFailure().update(torch.tensor(1), flag)
    with pytest.raises(TypeError, match="censored must be a boolean tensor"):
        CostToFailure().update(torch.tensor([1]), torch.tensor([0]))
