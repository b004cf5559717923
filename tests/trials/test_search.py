"""Search: untuned first, then a sequence that recipe and trial number decide."""

import numpy as np
import pytest

from telos.losses import choice, integers, log_uniform, uniform
from telos.trials import Run, best_trial, configuration, load_task, parse_recipes, search_space
from telos.trials.search import Standing, describe, hopeless, score
from tests.trials.examples import BLOBS


def test_trial_0_is_the_default() -> None:
    task = load_task("digits")
    (recipe,) = parse_recipes("focal")
    assert configuration(recipe, task, 0) == {"learning_rate": 1e-3, "weight_decay": 1e-2}
    (sgd,) = parse_recipes("focal", "sgd")
    assert configuration(sgd, task, 0) == pytest.approx({"learning_rate": 0.03, "weight_decay": 5e-4})


def test_trials_are_decided_by_recipe_and_number_alone() -> None:
    focal, comp_sum = parse_recipes("focal,comp_sum")
    backwards = [configuration(focal, BLOBS, trial) for trial in (5, 4, 3, 2, 1)]
    forwards = [configuration(focal, BLOBS, trial) for trial in (1, 2, 3, 4, 5)]
    assert forwards == backwards[::-1]
    assert len({tuple(found.values()) for found in forwards}) == 5
    (spelt,) = parse_recipes("FocalLoss")
    assert configuration(spelt, BLOBS, 3) == configuration(focal, BLOBS, 3)
    assert (
        configuration(comp_sum, BLOBS, 3)["learning_rate"] != configuration(focal, BLOBS, 3)["learning_rate"]
    )


def test_learning_rate_and_weight_decay_are_always_searched_within_their_ranges() -> None:
    for recipe in parse_recipes("cross_entropy,focal,label_smoothing+0.1*focal"):
        space = search_space(recipe, BLOBS)
        assert list(space)[:2] == ["learning_rate", "weight_decay"]
        found = [configuration(recipe, BLOBS, trial) for trial in range(1, 17)]
        for name, span in space.items():
            values = [one[name] for one in found]
            assert len(set(values)) == 16
            assert all(span.low <= value <= span.high for value in values)
        # quasi-random: of 16 points each quarter of the (logarithmic) range gets between 3 and 5
        positions = sorted(_position(space["learning_rate"], one["learning_rate"]) for one in found)
        assert [sum(q / 4 <= p < (q + 1) / 4 for p in positions) for q in range(4)] == pytest.approx(
            [4] * 4, abs=1
        )


def _position(span, value: float) -> float:
    import math

    return math.log(value / span.low) / math.log(span.high / span.low)


def test_what_is_fixed_is_not_searched() -> None:
    (recipe,) = parse_recipes("focal:gamma=2", "adamw:lr=0.005")
    assert list(search_space(recipe, BLOBS)) == ["weight_decay"]
    found = configuration(recipe, BLOBS, 4)
    assert found["learning_rate"] == 0.005
    assert "gamma" not in found
    (all_fixed,) = parse_recipes("cross_entropy", "adamw:lr=0.005:weight_decay=0.0")
    assert configuration(all_fixed, BLOBS, 4) == {"learning_rate": 0.005, "weight_decay": 0.0}


def test_the_best_trial() -> None:
    assert best_trial([0.5, 0.7, 0.7], "max") == 1
    assert best_trial([0.5, 0.3, 0.3], "min") == 1
    assert best_trial([None, 0.1, None], "max") == 1
    assert best_trial([None, None], "max") is None


def test_ranges_in_words() -> None:
    assert describe(log_uniform(0.1, 10)) == "0.1 to 10, logarithmic"
    assert describe(uniform(0, 2)) == "0 to 2"
    assert describe(integers(1, 5)) == "whole numbers 1 to 5"
    assert describe(choice("a", 2)) == "one of a, 2"


# ------------------------------------------------------------------------------------------ hopeless trials


def run_of(trial: int, seed: int, value: float | None) -> Run:
    status = "diverged" if value is None else "finished"
    return Run(
        f"{trial}/{seed}", "t", "r", "tuning", trial, seed, 1, "c", {}, status,
        metrics={} if value is None else {"m": value},
    )  # fmt: skip


def tuned(
    values: np.ndarray, direction: str, best: float | None, ahead: int = 1
) -> tuple[int | None, Standing, int]:
    """Walk the trials as the engine does, with ``ahead`` runs on their way at a time; NaN diverges."""
    trials, seeds = values.shape
    standing = Standing(range(seeds), "m", direction, best)
    on_the_way: list[tuple[int, int]] = []
    ran = 0
    for place in np.ndindex(trials, seeds):
        while len(on_the_way) >= ahead:
            trial, seed = on_the_way.pop(0)
            value = values[trial, seed]
            standing.add(trial, run_of(trial, seed, None if np.isnan(value) else float(value)))
        if standing.trial(place[0]).status == "open":
            on_the_way.append(place)
            ran += 1
    for trial, seed in on_the_way:
        value = values[trial, seed]
        standing.add(trial, run_of(trial, seed, None if np.isnan(value) else float(value)))
    return best_trial([standing.trial(t).score for t in range(trials)], direction), standing, ran


@pytest.mark.parametrize(("direction", "best"), [("max", 1.0), ("min", 0.0)])
def test_stopping_hopeless_trials_never_changes_the_choice(direction: str, best: float) -> None:
    """Against exhaustive tuning, on scores with many ties, tenths that rounding cannot hold, and divergence."""
    rng = np.random.default_rng(0)
    saved = 0
    for case in range(400):
        trials, seeds = int(rng.integers(1, 12)), int(rng.integers(1, 12))
        steps = int(rng.choice([2, 3, 7, 10, 1000]))
        values = rng.integers(0, steps + 1, (trials, seeds)) / steps
        values = values ** rng.choice([0.2, 1.0, 5.0])
        values[rng.random(values.shape) < 0.03] = np.nan
        whole = [None if np.isnan(row).any() else score(row.tolist()) for row in values]
        expected = best_trial(whole, direction)
        chosen, _, ran = tuned(values, direction, best)
        assert chosen == expected, case
        assert tuned(values, direction, None)[0] == expected
        saved += values.size - ran
    assert saved > 1000


def test_how_many_run_at_a_time_does_not_change_what_is_said_of_a_trial() -> None:
    rng = np.random.default_rng(1)
    surplus = 0
    for _ in range(200):
        values = rng.integers(0, 11, (8, 4)) / 10
        values[rng.random(values.shape) < 0.05] = np.nan
        _, alone, few = tuned(values, "max", 1.0)
        _, crowded, many = tuned(values, "max", 1.0, ahead=7)
        assert [alone.trial(t) for t in range(8)] == [crowded.trial(t) for t in range(8)]
        surplus += many - few
    assert surplus > 0


def test_a_trial_is_stopped_by_its_own_runs_and_earlier_trials_alone() -> None:
    standing = Standing((5, 6, 7), "m", "max", 1.0)
    for seed, value in zip((5, 6, 7), (0.8, 0.9, 0.7), strict=True):
        standing.add(1, run_of(1, seed, value))
    # the bound of trial 2 after 0.3 is 0.7667 < 0.8
    standing.add(2, run_of(2, 5, 0.3))
    assert (standing.trial(2).status, standing.trial(2).score) == ("stopped", None)
    # trial 0 comes before trial 1, so trial 1 says nothing about it
    standing.add(0, run_of(0, 5, 0.3))
    assert standing.trial(0).status == "open"
    # a value that is just good enough
    standing.add(3, run_of(3, 5, 0.41))
    assert standing.trial(3).status == "open"
    standing.add(4, run_of(4, 5, None))
    assert standing.trial(4).status == "diverged"


def test_nothing_is_hopeless_without_a_best_value_or_a_complete_trial() -> None:
    assert not hopeless([0.0], 3, None, 0.9, "max")
    assert not hopeless([0.0], 3, 1.0, None, "max")
    assert not hopeless([0.0, 0.0, 0.0], 3, 1.0, 0.9, "max")
    # all that is left could at best be a tie, and the earlier trial wins ties
    assert hopeless([0.5], 2, 1.0, 0.75, "max")
    assert hopeless([0.5], 2, 0.0, 0.25, "min")
    assert not hopeless([0.5], 2, 0.0, 0.2500001, "min")


def test_repeated_configurations_are_neither_run_nor_chosen() -> None:
    standing = Standing((5,), "m", "max", 1.0, repeats=(1,))
    assert standing.trial(1).status == "repeated"
    assert standing.trial(0).status == "open"
