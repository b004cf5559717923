"""The rule that turns numbers into a verdict, against bounds computed by hand."""

import math

import pytest

from telos.evidence import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    SEEDS,
    Effect,
    Study,
    finding,
    judge,
    t_bounds,
)

T_95_7 = 1.8945786051  # 95 % quantile of Student's t with 7 degrees of freedom, from a table


def study(*effects: Effect) -> Study:
    return Study("toy", "claim", "protocol", "decision", effects, "pilot", lambda seed, budget: {})


def test_seeds_are_eight_and_apart_from_the_pilots() -> None:
    assert list(SEEDS) == [100, 101, 102, 103, 104, 105, 106, 107]


def test_bounds_by_hand() -> None:
    # 1..8: mean 4.5, sum of squared deviations 42, so sd = sqrt(42 / 7) and the standard error sqrt(6 / 8)
    half_width = T_95_7 * math.sqrt(6 / 8)
    lower, upper = t_bounds(range(1, 9))
    assert lower == pytest.approx(4.5 - half_width, rel=1e-9)
    assert upper == pytest.approx(4.5 + half_width, rel=1e-9)


def test_bounds_of_two_values_by_hand() -> None:
    # one degree of freedom is the Cauchy distribution: its 95 % quantile is tan(0.45 pi), sd / sqrt(2) is 1/2
    lower, upper = t_bounds([0.0, 1.0])
    assert upper - 0.5 == pytest.approx(math.tan(0.45 * math.pi) / 2, rel=1e-9)
    assert lower + upper == pytest.approx(1.0)


def test_bounds_need_two_values() -> None:
    with pytest.raises(ValueError, match="at least two numbers"):
        t_bounds([1.0])


def test_finding_carries_mean_and_spread() -> None:
    found = finding(Effect("gain", "gain", 0.0), range(1, 9))
    assert (found.mean, found.n) == (4.5, 8)
    assert found.sd == pytest.approx(math.sqrt(6))


@pytest.mark.parametrize(
    ("threshold", "verdict"),
    [
        (2.85, REPRODUCED),  # the lower bound of 1..8 is 2.8593
        (2.87, INCONCLUSIVE),
        (4.5, INCONCLUSIVE),
        (6.13, INCONCLUSIVE),  # the upper bound is 6.1407
        (6.15, NOT_REPRODUCED),
    ],
)
def test_verdict_on_each_side_of_both_bounds(threshold: float, verdict: str) -> None:
    assert finding(Effect("gain", "gain", threshold), range(1, 9)).verdict == verdict


def test_equal_values_at_the_threshold_are_inconclusive() -> None:
    assert finding(Effect("gain", "gain", 1.0), [1.0] * 8).verdict == INCONCLUSIVE
    assert finding(Effect("gain", "gain", 0.9), [1.0] * 8).verdict == REPRODUCED


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_inconclusive_and_say_so(broken: float) -> None:
    found = finding(Effect("gain", "gain", 0.0), [5.0] * 7 + [broken])
    assert found.verdict == INCONCLUSIVE
    assert found.reason == "gain is not finite on 1 of 8 seeds"
    assert math.isnan(found.lower)


def test_too_few_seeds_are_inconclusive() -> None:
    found = finding(Effect("gain", "gain", 0.0), [5.0, 5.1, 5.2, 5.3, 5.4, 5.5, 5.6])
    assert found.verdict == INCONCLUSIVE
    assert "7 of the 8 seeds" in found.reason


def test_a_single_seed_has_a_mean_and_no_bounds() -> None:
    found = finding(Effect("gain", "gain", 0.0), [5.0])
    assert found.mean == 5.0
    assert math.isnan(found.sd)
    assert math.isnan(found.upper)


HIGH, LOW, BETWEEN = [3.0, 3.1] * 4, [-3.0, -3.1] * 4, [3.0, -3.0] * 4


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (HIGH, HIGH, REPRODUCED),
        (HIGH, BETWEEN, INCONCLUSIVE),
        (HIGH, LOW, NOT_REPRODUCED),
        (BETWEEN, LOW, NOT_REPRODUCED),
        (BETWEEN, BETWEEN, INCONCLUSIVE),
    ],
)
def test_a_study_takes_every_required_effect(first: list[float], second: list[float], verdict: str) -> None:
    toy = study(Effect("a", "a", 0.0), Effect("b", "b", 0.0))
    rows = [{"a": a, "b": b} for a, b in zip(first, second, strict=True)]
    assert judge(toy, rows)[0] == verdict


def test_an_effect_that_is_not_required_decides_nothing() -> None:
    toy = study(Effect("a", "a", 0.0), Effect("b", "b", 0.0, required=False))
    verdict, reason, findings = judge(toy, [{"a": a, "b": b} for a, b in zip(HIGH, LOW, strict=True)])
    assert verdict == REPRODUCED
    assert reason.startswith("a: lower bound")
    assert findings[1].verdict == NOT_REPRODUCED


def test_the_reason_names_the_effects_that_decided() -> None:
    toy = study(Effect("a", "a", 0.0), Effect("b", "b", 0.0))
    rows = [{"a": a, "b": b} for a, b in zip(HIGH, LOW, strict=True)]
    assert judge(toy, rows)[1].startswith("b: upper bound")


def test_a_missing_effect_is_an_error() -> None:
    with pytest.raises(ValueError, match="must return b, got"):
        judge(study(Effect("a", "a", 0.0), Effect("b", "b", 0.0)), [{"a": 1.0}])
