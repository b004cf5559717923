"""Several data sets: ranks, Friedman's test, the critical difference, times to the baseline's result."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from telos.trials import UsageError, compare
from telos.trials.comparison import Comparison
from telos.trials.suite import (
    MINIMUM_DATA_SETS,
    Suite,
    critical_difference,
    friedman_test,
    indistinguishable,
    rank_recipes,
)


@pytest.mark.parametrize(
    ("recipes", "quantile"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (7, 2.949), (10, 3.164)]
)
def test_critical_difference_has_the_quantiles_of_demsar(recipes, quantile) -> None:
    # table 5(a) of Demsar (2006), whose last digit is not always rounded
    found = critical_difference(recipes, 20) / np.sqrt(recipes * (recipes + 1) / 120)
    assert found == pytest.approx(quantile, abs=1e-3)


def test_friedman_agrees_with_scipy_ties_included() -> None:
    means = np.random.default_rng(0).integers(0, 4, size=(5, 12)).astype(float)
    ranks = rank_recipes(means, ["max"] * 12)
    chi_square = stats.friedmanchisquare(*means).statistic
    found = friedman_test(ranks)
    assert found.statistic == pytest.approx(11 * chi_square / (12 * 4 - chi_square))
    assert found.p_value == pytest.approx(stats.f.sf(found.statistic, 4, 44))


def test_friedman_at_its_limits() -> None:
    everywhere = np.tile([[1.0], [2.0], [3.0]], (1, 6))
    assert friedman_test(everywhere).p_value == 0.0
    assert friedman_test(np.full((3, 6), 2.0)).p_value == 1.0
    with pytest.raises(ValueError, match="at least 2 recipes"):
        friedman_test(np.ones((1, 6)))


def test_friedman_rarely_rejects_what_is_equal() -> None:
    generator = np.random.default_rng(1)
    draws = [rank_recipes(generator.normal(size=(4, 10)), ["max"] * 10) for _ in range(2000)]
    false = np.mean([friedman_test(ranks).p_value < 0.05 for ranks in draws])
    # 0.05, and three standard errors of 2,000 draws
    assert false < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


def test_nemenyi_rarely_tells_apart_what_is_equal() -> None:
    generator = np.random.default_rng(2)
    distance = critical_difference(4, 20)
    spans = [np.ptp(rank_recipes(generator.normal(size=(4, 20)), ["max"] * 20).mean(1)) for _ in range(2000)]
    assert np.mean(np.array(spans) >= distance) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


def test_groups_overlap_and_none_lies_inside_another() -> None:
    assert indistinguishable([1.0, 1.5, 2.0, 2.5], 1.2) == [(0, 1, 2), (1, 2, 3)]
    assert indistinguishable([1.0, 3.0, 5.0], 1.2) == []
    assert indistinguishable([1.0, 1.1, 1.2], 9.0) == [(0, 1, 2)]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare("wine", "cross_entropy,focal,mae", seeds=3, trials=1, epochs=3)


def shifted(comparison: Comparison, name: str, amounts: dict[str, float]) -> Comparison:
    """The same comparison under another name, with a recipe's test metric moved."""
    entries = []
    for entry in comparison.entries:
        amount = amounts.get(entry.recipe.label, 0.0)
        runs = tuple(
            replace(run, metrics={**run.metrics, "test_accuracy": run.metrics["test_accuracy"] + amount})
            for run in entry.evaluation
        )
        entries.append(replace(entry, evaluation=runs))
    return replace(comparison, plan=replace(comparison.plan, task=name), entries=tuple(entries))


def ordered(comparison: Comparison, count: int) -> Suite:
    amounts = {"cross_entropy": 0.0, "focal": 5.0, "mae": -5.0}
    return Suite(tuple(shifted(comparison, f"data{i}", amounts) for i in range(count)))


def test_standings_and_ranks(comparison) -> None:
    suite = ordered(comparison, 6)
    assert [standing.label for standing in suite.standings()] == ["focal", "cross_entropy", "mae"]
    assert [standing.mean_rank for standing in suite.standings()] == [1.0, 2.0, 3.0]
    assert suite.ranks().shape == (3, 6)
    assert suite.tasks == tuple(f"data{i}" for i in range(6))


def test_the_conclusion_tests_only_what_is_enough_to_test(comparison) -> None:
    few, many = ordered(comparison, 3), ordered(comparison, 12)
    assert few.friedman() is None
    assert few.critical_difference() is None
    assert few.groups() == []
    assert f"{MINIMUM_DATA_SETS} or more" in few.conclusion()
    assert "focal is better than the baseline and mae is worse than the baseline" in many.conclusion()
    same = Suite(tuple(shifted(comparison, f"d{i}", {}) for i in range(6)))
    alike = replace(comparison, entries=comparison.entries[:1])
    assert "no other recipe" in Suite((alike,)).conclusion()
    # six copies of one data set have one order, which is not chance to a test that takes them as six
    assert same.friedman() is not None


def test_equal_recipes_are_not_told_apart(comparison) -> None:
    generator = np.random.default_rng(0)
    labels = [entry.recipe.label for entry in comparison.entries]
    values = dict.fromkeys(labels, 0.5)
    level = {entry.recipe.label: entry.mean("test_accuracy") for entry in comparison.entries}
    suite = Suite(
        tuple(
            shifted(comparison, f"d{i}", {k: values[k] - level[k] + generator.normal() for k in labels})
            for i in range(8)
        )
    )
    assert "do not differ by more than chance" in suite.conclusion()


def test_what_did_not_finish_somewhere_has_no_rank(comparison) -> None:
    refused = replace(
        comparison,
        entries=(
            *comparison.entries[:2],
            replace(
                comparison.entries[2],
                recipe=replace(comparison.entries[2].recipe, refused="it is for two classes"),
                evaluation=(),
                tuning=(),
            ),
        ),
    )
    suite = Suite((comparison, refused))
    assert suite.labels == ("cross_entropy", "focal")
    assert suite.left_out == {"mae": "refused on wine: it is for two classes"}


def test_the_baseline_is_one(comparison) -> None:
    other = replace(comparison, entries=comparison.entries[::-1])
    with pytest.raises(UsageError, match="one baseline"):
        Suite((comparison, other))
    with pytest.raises(UsageError, match="at least one"):
        Suite(())


def test_times_to_what_the_baseline_ends_with(comparison) -> None:
    curve = [{"epoch": float(e), "seconds": e / 10, "validation_accuracy": e / 10} for e in (1, 2, 3)]
    faster = [{**record, "validation_accuracy": record["validation_accuracy"] + 0.1} for record in curve]
    never = [{**record, "validation_accuracy": 0.0} for record in curve]
    entries = tuple(
        replace(entry, evaluation=tuple(replace(run, curve=own) for run in entry.evaluation))
        for entry, own in zip(comparison.entries, (curve, faster, never), strict=True)
    )
    suite = Suite((replace(comparison, entries=entries),))
    assert suite.times().tolist() == [[3.0], [2.0], [np.inf]]
    assert suite.times("seconds")[1, 0] == pytest.approx(0.2)
    assert suite.scores()["focal"] == 1.0
    assert suite.scores()["cross_entropy"] == pytest.approx((4 - 1.5) / 3)
    assert suite.scores()["mae"] == 0.0
    assert set(suite.profiles()["name"]) == set(suite.labels)
    with pytest.raises(ValueError, match="unit"):
        suite.times("minutes")
    bare = tuple(
        replace(entry, evaluation=tuple(replace(run, curve=[]) for run in entry.evaluation))
        for entry in entries
    )
    assert np.isinf(Suite((replace(comparison, entries=bare),)).times()).all()
