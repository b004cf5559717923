"""Statistics against scipy and against numbers worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from telos.trials import holm, resampled_interval, verdict
from telos.trials.statistics import Estimate


def test_without_correction_it_is_students_paired_test() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.8, 0.1, 10), rng.normal(0.75, 0.1, 10)
    found = resampled_interval(first - second, test_share=0.0)
    expected = stats.ttest_rel(first, second)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-12)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_the_correction_adds_the_share_of_the_test_split() -> None:
    # mean 2, variance 1, n = 3, n_test / n_train = 1 / 3: the error is sqrt((1/3 + 1/3) * 1)
    found = resampled_interval([1.0, 2.0, 3.0], test_share=1 / 3)
    # with 2 degrees of freedom the p quantile of t is (2 p - 1) / sqrt(2 p (1 - p)); here p = 0.975
    half = 0.95 / math.sqrt(2 * 0.975 * 0.025) * math.sqrt(2 / 3)
    assert found.mean == 2.0
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-12)
    # for 2 degrees of freedom the two-sided p-value is 1 - t / sqrt(t^2 + 2)
    t = 2 / math.sqrt(2 / 3)
    assert found.p_value == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-12)


def test_the_corrected_interval_covers_and_the_ordinary_one_does_not() -> None:
    # values with the correlation rho = share / (1 + share) that the correction assumes; the truth is 0
    rng, share, n = np.random.default_rng(1), 0.5, 10
    rho = share / (1 + share)
    common = rng.normal(size=(2000, 1)) * math.sqrt(rho)
    values = common + rng.normal(size=(2000, n)) * math.sqrt(1 - rho)
    covered = {
        given: np.mean([(e := resampled_interval(row, given)).low <= 0 <= e.high for row in values])
        for given in (0.0, share)
    }
    # 95 % of 2,000 has a standard error of 0.5 %
    assert abs(covered[share] - 0.95) < 0.02
    assert covered[0.0] < 0.75


def test_degenerate_samples() -> None:
    one = resampled_interval([0.3], 0.4)
    assert one.mean == 0.3
    assert all(math.isnan(value) for value in (one.low, one.high, one.p_value))
    same = resampled_interval([0.0, 0.0, 0.0], 0.4)
    assert (same.mean, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert resampled_interval([0.5, 0.5, 0.5], 0.4).p_value == 0.0
    for bad in (([], 0.1, 0.95), ([1.0], -0.1, 0.95), ([1.0], 0.1, 1.0)):
        with pytest.raises(ValueError, match="must"):
            resampled_interval(*bad)


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.06 (never falling)
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def estimate(mean: float, half: float) -> Estimate:
    return Estimate(mean, mean - half, mean + half, 0.01 if abs(mean) > half else 0.5, 10)


@pytest.mark.parametrize(
    ("difference", "p", "direction", "words"),
    [
        (estimate(0.05, 0.02), 0.001, "max", "better"),
        (estimate(0.05, 0.02), 0.001, "min", "worse"),
        (estimate(-0.05, 0.02), 0.001, "max", "worse"),
        (estimate(-0.05, 0.02), 0.001, "min", "better"),
        (estimate(0.03, 0.05), 0.2, "max", "no difference that 10 seeds can show"),
        (estimate(0.03, 0.02), 0.06, "max", "unclear after correction"),
        (estimate(0.002, 0.005), 0.4, "max", "practically equal"),
        # surely above zero, and surely too little to matter
        (estimate(0.004, 0.002), 0.001, "max", "practically equal"),
        (estimate(0.05, 0.02), None, "max", "n too small to test"),
    ],
)
def test_verdicts(difference: Estimate, p: float | None, direction: str, words: str) -> None:
    assert verdict(difference, p, band=0.01, direction=direction) == words
