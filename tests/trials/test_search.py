"""Search: untuned first, then a sequence that recipe and trial number decide."""

import pytest

from telos.losses import choice, integers, log_uniform, uniform
from telos.trials import best_trial, configuration, load_task, parse_recipes, search_space
from telos.trials.search import describe
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
