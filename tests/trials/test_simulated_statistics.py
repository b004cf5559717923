"""What the statistics promise, checked by simulation where the truth is known."""

import numpy as np
import pytest

from telos.trials.statistics import Estimate, holm, resampled_interval, verdict

TRAIN, TEST, SEEDS = 120, 50, 10
DIM = 6


def draw(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Two Gaussian classes of unequal spread, so that the two classifiers below differ."""
    target = generator.integers(2, size=count)
    spread = np.linspace(0.5, 3.0, DIM)
    return generator.normal(size=(count, DIM)) * spread + 0.6 * target[:, None], target


def accuracies(
    inputs: np.ndarray, target: np.ndarray, train: np.ndarray, test: np.ndarray
) -> tuple[float, float]:
    """Nearest class mean, and least squares on the labels."""
    means = [inputs[train][target[train] == label].mean(0) for label in (0, 1)]
    distances = [((inputs[test] - mean) ** 2).sum(1) for mean in means]
    nearest = (distances[1] < distances[0]) == target[test]
    design = np.column_stack([inputs, np.ones(len(inputs))])
    weights = np.linalg.lstsq(design[train], 2.0 * target[train] - 1, rcond=None)[0]
    linear = (design[test] @ weights > 0) == target[test]
    return float(nearest.mean()), float(linear.mean())


def paired_differences(generator: np.random.Generator) -> list[float]:
    """What ``telos compare`` sees: one data set, a fresh split per seed, two recipes on each."""
    inputs, target = draw(generator, TRAIN + TEST)
    found = []
    for _ in range(SEEDS):
        order = generator.permutation(TRAIN + TEST)
        one, two = accuracies(inputs, target, order[:TRAIN], order[TRAIN:])
        found.append(two - one)
    return found


@pytest.fixture(scope="module")
def truth() -> float:
    """The expected difference for training sets of this size, over fresh data every time."""
    generator = np.random.default_rng(10)
    differences = []
    for _ in range(3000):
        inputs, target = draw(generator, TRAIN + 400)
        one, two = accuracies(inputs, target, np.arange(TRAIN), np.arange(TRAIN, TRAIN + 400))
        differences.append(two - one)
    return float(np.mean(differences))


@pytest.mark.slow
def test_corrected_intervals_cover_and_uncorrected_ones_do_not(truth) -> None:
    generator = np.random.default_rng(11)
    repeats = 600
    samples = [paired_differences(generator) for _ in range(repeats)]
    intervals = {
        share: [resampled_interval(sample, share) for sample in samples] for share in (TEST / TRAIN, 0.0)
    }
    covered = {
        share: np.mean([estimate.low <= truth <= estimate.high for estimate in found])
        for share, found in intervals.items()
    }
    # three standard errors of 600 repetitions at 95 %
    assert covered[TEST / TRAIN] > 0.95 - 3 * np.sqrt(0.95 * 0.05 / repeats)
    assert covered[0.0] < 0.85


@pytest.mark.slow
def test_identical_recipes_rarely_win() -> None:
    """Two recipes that differ by the noise of training alone."""
    generator = np.random.default_rng(12)
    repeats = 4000
    noise = generator.normal(0.0, 0.02, size=(repeats, SEEDS))
    wins = 0
    for differences in noise:
        estimate = resampled_interval(differences, 0.0)
        wins += verdict(estimate, holm([estimate.p_value])[0], band=0.0) in ("better", "worse")
    assert wins / repeats < 0.05 + 3 * np.sqrt(0.05 * 0.95 / repeats)
    # and the test is not merely deaf
    shifted = [resampled_interval(row + 0.03, 0.0) for row in noise[:200]]
    assert np.mean([verdict(e, e.p_value, band=0.0) == "better" for e in shifted]) > 0.9


@pytest.mark.slow
def test_holm_keeps_the_chance_of_any_false_win() -> None:
    """Six recipes against one baseline, so that the differences share the baseline's noise."""
    generator = np.random.default_rng(13)
    repeats, recipes = 2000, 6
    any_wrong = any_uncorrected = 0
    for _ in range(repeats):
        scores = generator.normal(size=(recipes + 1, SEEDS))
        found = [resampled_interval(row - scores[0], 0.0) for row in scores[1:]]
        p_values = [estimate.p_value for estimate in found]
        any_uncorrected += min(p_values) < 0.05
        any_wrong += any(wins(e, p) for e, p in zip(found, holm(p_values), strict=True))
    assert any_wrong / repeats < 0.05 + 3 * np.sqrt(0.05 * 0.95 / repeats)
    assert any_uncorrected / repeats > 0.12


def wins(estimate: Estimate, p_corrected: float) -> bool:
    return verdict(estimate, p_corrected, band=0.0) in ("better", "worse")
