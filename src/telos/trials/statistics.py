"""Statistics of paired comparisons over seeds, when every seed also splits the data anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MINIMUM_SEEDS = 5


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: over seeds.
        low: lower end of the interval; ``nan`` where one seed cannot give any.
        high: upper end.
        p_value: two-sided, of no difference from zero; ``nan`` below two seeds.
        n: number of seeds.
    """

    mean: float
    low: float
    high: float
    p_value: float
    n: int


def resampled_interval(values: Sequence[float], test_share: float, confidence: float = 0.95) -> Estimate:
    r"""Mean of a quantity over random splits, with the corrected resampled t interval.

    Training sets of different splits overlap, so the usual ``s^2 / n`` is too small. The correction of Nadeau
    and Bengio adds the share of the test split::

        mean +- t_{n-1} * sqrt((1 / n + n_test / n_train) * s^2)

    Args:
        values: one number per seed: a metric, or a paired difference of two.
        test_share: ``n_test / n_train``; 0 gives Student's ordinary interval, for seeds that share one split.
        confidence: of the interval.

    Returns:
        Mean, interval and the p-value of a mean of zero.

    Raises:
        ValueError: for no values, a negative share, or a confidence outside (0, 1).

    Source:
        Inference for the Generalization Error, Machine Learning 52 (2003).

    Example:
        >>> found = resampled_interval([1.0, 2.0, 3.0], test_share=0.0)
        >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3)
        (2.0, -0.484, 4.484)
    """
    from scipy import stats

    if not len(values):
        raise ValueError("values must hold at least one number, got none")
    if test_share < 0:
        raise ValueError(f"test_share must be at least 0, got {test_share}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    numbers = np.asarray(values, dtype=np.float64)
    n, mean = len(numbers), float(numbers.mean())
    if n == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, n)
    error = math.sqrt((1 / n + test_share) * float(numbers.var(ddof=1)))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error
    # error is 0 where every seed gave the same number
    size = abs(mean) / error if error > 0 else (0.0 if mean == 0 else math.inf)
    p_value = 2 * float(stats.t.sf(size, n - 1))
    return Estimate(mean, mean - half, mean + half, p_value, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of several p-values.

    Args:
        p_values: in [0, 1].

    Returns:
        Corrected p-values in the given order; rejecting those below alpha keeps the chance of any false
        rejection at alpha.

    Source:
        A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6 (1979).

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    count, corrected, largest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(count), key=lambda at: p_values[at])):
        largest = max(largest, min(1.0, (count - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def verdict(difference: Estimate, p_corrected: float | None, band: float, direction: str = "max") -> str:
    """What a paired difference to the baseline allows to say, in words.

    Args:
        difference: recipe minus baseline.
        p_corrected: Holm-corrected p-value, or ``None`` where there are too few seeds to test.
        band: differences smaller than this do not matter in practice.
        direction: ``"max"`` where more is better.

    Returns:
        ``"better"`` or ``"worse"``; ``"practically equal"`` (the interval lies inside the band); ``"unclear
        after correction"`` (significant alone, not among so many comparisons); ``"no difference that n seeds
        can show"``; or ``"n too small to test"``.

    Example:
        >>> verdict(resampled_interval([0.1, 0.12, 0.11, 0.1, 0.12], 0.4), 0.001, band=0.01)
        'better'
    """
    if p_corrected is None:
        return "n too small to test"
    inside = -band < difference.low and difference.high < band
    if p_corrected < 0.05 and not inside:
        return "better" if (difference.mean > 0) == (direction == "max") else "worse"
    if inside:
        return "practically equal"
    if difference.p_value < 0.05:
        # the interval, which is not corrected, leaves zero out
        return "unclear after correction"
    return f"no difference that {difference.n} seeds can show"
