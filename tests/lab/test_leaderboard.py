"""The leaderboard: rows, data frame, terminal table, and a conclusion that claims no more than was found."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from telos.lab import conclusion, frame, rows, table
from telos.trials import Comparison, Entry, Run, make_plan

BLOBS = "tests.trials.examples:BLOBS"
OTHERS = "focal,tests.trials.examples:Exploding,smooth_adversarial_comp_sum"


def comparison(accuracies: dict[str, list[float]], losses: str = f"cross_entropy,{OTHERS}") -> Comparison:
    """Made-up accuracies by recipe; a recipe that is not named diverged in every trial."""
    seeds = max(map(len, accuracies.values()))
    plan = make_plan(BLOBS, losses, seeds=seeds, trials=1)
    entries = []
    for recipe in plan.recipes:
        if recipe.refused:
            entries.append(Entry(recipe, (), (), None, (), 0))
            continue
        values = accuracies.get(recipe.label, [None] * seeds)
        runs = tuple(
            Run(
                f"{recipe.label}{seed}", plan.task, recipe.canonical, "evaluation", 0, seed, 2, recipe.code,
                {"learning_rate": 0.001, "weight_decay": 0.01},
                "diverged" if value is None else "finished",
                None if value is None else None if value is not None else "",
                {} if value is None else {f"test_{name}": value for name in plan.metrics},
                [], 0.5,
            )
            for seed, value in enumerate(values)
        )  # fmt: skip
        entries.append(Entry(recipe, (), (), 0, runs, 0))
    return Comparison(plan, tuple(entries))


def noisy(mean: float, seed: int, n: int = 8) -> list[float]:
    return (mean + 0.003 * np.random.default_rng(seed).normal(size=n)).tolist()


BETTER = comparison({"cross_entropy": noisy(0.80, 0), "focal": noisy(0.90, 1)})


def printed(found: Comparison, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(found, width))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_are_ordered_and_complete() -> None:
    found = rows(BETTER)
    assert [row["recipe"] for row in found][:2] == ["focal", "cross_entropy"]
    assert [row["rank"] for row in found] == [1, 2, None, None]
    first, second, *rest = found
    values = BETTER.entries[1].values("test_accuracy")
    assert first["accuracy"] == pytest.approx(np.mean(list(values.values())))
    assert first["difference"] == pytest.approx(first["accuracy"] - second["accuracy"])
    assert first["difference_low"] < first["difference"] < first["difference_high"]
    assert (first["verdict"], second["verdict"]) == ("better", "baseline")
    assert second["difference"] is None
    assert {row["status"] for row in rest} == {"diverged", "refused"}
    assert all(row["accuracy"] is None for row in rest)


def test_the_frame_has_a_row_per_recipe() -> None:
    found = frame(BETTER)
    assert found.height == 4
    assert found["hyperparameters"][0] == "learning_rate=0.001, weight_decay=0.01"
    assert {"accuracy", "macro_f1", "nll", "ece", "seconds", "p_holm", "reason"} <= set(found.columns)


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_fits_and_shows_names(width: int) -> None:
    text = printed(BETTER, width)
    assert max(map(len, text.splitlines())) <= width
    for word in ("focal", "cross_entropy", "better", "baseline", "refused"):
        assert word in text
    assert ("macro-F1" in text) == (width == 160)


def test_names_are_not_read_as_markup() -> None:
    plan = replace(BETTER.plan, title="[bold]x[/bold] [red]")
    assert "[bold]x[/bold] [red]" in printed(replace(BETTER, plan=plan), 160)


def sentences(found: Comparison) -> list[str]:
    return re.split(r"(?<=[a-z0-9)])\. (?=[A-Z0-9])", conclusion(found))


def test_a_clear_difference_in_two_sentences() -> None:
    first, second = sentences(BETTER)
    assert "focal had the highest mean test accuracy over 8 seeds" in first
    assert "for the baseline cross_entropy (paired difference +0.1" in first
    assert "focal came out better; this holds for this task, model and tuning budget." in second


def test_no_difference_is_not_called_one() -> None:
    same = comparison({"cross_entropy": noisy(0.8, 0), "focal": (np.array(noisy(0.8, 1)) * 1.001).tolist()})
    text = conclusion(same)
    assert "better" not in text
    assert "came out practically equal" in text or "without a difference that 8 seeds can show" in text


def test_few_seeds_are_not_tested() -> None:
    text = conclusion(comparison({"cross_entropy": [0.8, 0.81], "focal": [0.9, 0.91]}))
    assert text.endswith("2 seeds cannot carry a test of any difference to cross_entropy.")


def test_when_there_is_nothing_to_compare() -> None:
    assert conclusion(comparison({"none": [0.1]})) == "No recipe finished. There is nothing to compare."
    alone = comparison({"cross_entropy": noisy(0.8, 0)}, "cross_entropy")
    assert "and it is the baseline. There is no other recipe" in conclusion(alone)
    lost = comparison({"focal": noisy(0.8, 0)})
    assert "The baseline cross_entropy did not finish" in conclusion(lost)


def test_an_unfinished_comparison_says_so() -> None:
    entries = tuple(replace(entry, missing=1) for entry in BETTER.entries)
    assert "(the comparison is not finished)" in conclusion(replace(BETTER, entries=entries))


def test_less_may_be_better() -> None:
    plan = replace(BETTER.plan, metric="nll", direction="min")
    text = conclusion(replace(BETTER, plan=plan))
    assert "cross_entropy had the lowest mean test NLL" in text
    assert "focal came out worse" in text


def test_several_recipes_are_counted() -> None:
    found = comparison(
        {"cross_entropy": noisy(0.8, 0), "focal": noisy(0.9, 1), "gce": noisy(0.7, 2), "mae": noisy(0.95, 3)},
        "cross_entropy,focal,gce,mae",
    )
    assert "the 3 other recipes came out as 2 better and 1 worse; this holds" in conclusion(found)
