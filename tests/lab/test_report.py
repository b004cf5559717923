"""The page: self-contained, complete, honest, and safe whatever names users choose."""

import json
import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from telos.lab import conclusion, render, write_report
from telos.lab._charts import CARDS, colour_class, contrast, palette, symbol
from telos.lab._sentences import headline, suite_headline
from telos.trials import Comparison, Entry, Plan, Run, compare
from telos.trials.plan import PlannedRecipe
from telos.trials.store import REFERENCE
from telos.trials.suite import Suite

BLOBS = "tests.trials.examples:BLOBS"
LOSSES = "cross_entropy,focal,tests.trials.examples:Exploding,tests.trials.examples:Raising,smooth_adversarial_comp_sum"
METRICS = {"accuracy": "max", "macro_f1": "max", "nll": "min", "ece": "min"}
TUNING = 1_000_000
WINNING = re.compile(
    r"\b(better|best|won|wins?|winners?|beats?|outperform\w*|superior|improv\w*|ahead|gain\w*)\b",
    re.IGNORECASE,
)


class Page(HTMLParser):
    """Tags with their attributes, the text outside of scripts and styles, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.whole = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag == "wbr":
            return
        self._inside = tag
        self.text += " "

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""
        self.text += " "

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """The attributes of the elements that have these."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [a for name, a in self.tags if name == tag and wanted.items() <= a.items()]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[1])

    @property
    def entries(self) -> list[dict[str, Any]]:
        return self.data["comparisons"][0]["entries"]


# ------------------------------------------------------------------------------------- made-up comparisons


def made_up(
    accuracies: dict[str, list[float] | str],
    *,
    epochs: int = 4,
    tuned: dict[str, list[float | str]] | None = None,
    reference: list[float] | None = None,
    **changes: Any,
) -> Comparison:
    """A comparison whose test metric is given, seed by seed; nothing is trained.

    ``accuracies`` has a word in place of numbers for a recipe that was refused (the reason) or ``diverged``;
    ``tuned`` the score of every trial, or ``stopped``.
    """
    seeds = max(len(values) for values in accuracies.values() if isinstance(values, list))
    planned = tuple(
        PlannedRecipe(
            *(label, label, "adamw", label, "code", {"learning_rate": "0.0001 to 0.03, logarithmic"}),
            refused=values if isinstance(values, str) and values != "diverged" else None,
        )
        for label, values in accuracies.items()
    )
    plan = Plan(
        **{
            "task": "clouds",
            "title": "clouds",
            "recipes": planned,
            "seeds": seeds,
            "trials": len(next(iter(tuned.values()))) if tuned else 1,
            "tuning_seeds": 2,
            "epochs": epochs,
            "metric": "accuracy",
            "direction": "max",
            "metrics": METRICS,
            "band": 0.01,
            "best": 1.0,
            "sizes": {"train": 600, "validation": 150, "test": 250},
            "classes": 3,
            "versions": {"telos": "0.1.0", "torch": "2.13.0", "revision": None},
            "description": "1,000 made-up points.",
            "command": "telos compare clouds loss=cross_entropy,focal",
            "reference": reference is not None,
            "reference_name": "gradient boosting" if reference else "",
            **changes,
        }
    )

    def run(recipe: str, role: str, trial: int, seed: int, value: float | None) -> Run:
        split = "validation" if role == "tuning" else "test"
        own = {"accuracy": value, "macro_f1": value, "nll": 0.5, "ece": 0.1} if value is not None else {}
        own.setdefault(plan.metric, value)
        curve = [
            {
                "epoch": epoch + 1,
                "seconds": epoch + 1.0,
                "loss": 1 / (epoch + 1),
                **{
                    f"validation_{name}": float(number) * (epoch + 1) / epochs for name, number in own.items()
                },
            }
            for epoch in range(epochs if value is not None and role == "evaluation" else 0)
        ]
        return Run(
            *(f"{recipe}{role}{trial}-{seed}", plan.task, recipe, role, trial, seed, epochs, "code"),
            {"learning_rate": 0.001 * 2**trial, "weight_decay": 0.01},
            "diverged" if value is None else "finished",
            "loss is inf at step 3" if value is None else None,
            {f"{split}_{name}": number for name, number in own.items()},
            curve,
            0.5 + 0.01 * len(recipe),
        )

    entries = []
    for recipe in planned:
        values = accuracies[recipe.label]
        if recipe.refused is not None:
            entries.append(Entry(recipe, (), (), None, (), 0))
            continue
        if isinstance(values, str):
            lost = tuple(run(recipe.label, "tuning", 0, TUNING + place, None) for place in range(2))
            entries.append(Entry(recipe, lost, (None,), None, (), 0, ("diverged",)))
            continue
        scores, tuning = [], []
        for trial, score in enumerate(tuned[recipe.label] if tuned else []):
            seen = [0.1] if score == "stopped" else [score, score]
            tuning += [
                run(recipe.label, "tuning", trial, TUNING + place, value) for place, value in enumerate(seen)
            ]
            scores.append(None if score == "stopped" else score)
        numbers = [score for score in scores if score is not None]
        chosen = scores.index(max(numbers)) if numbers else 0
        states = tuple("stopped" if score is None else "finished" for score in scores)
        runs = tuple(
            run(recipe.label, "evaluation", chosen, seed, value) for seed, value in enumerate(values)
        )
        entries.append(Entry(recipe, tuple(tuning), tuple(scores), chosen, runs, 0, states))
    outside = None
    if reference is not None:
        name = PlannedRecipe(plan.reference_name, "", "", REFERENCE, "", {})
        runs = tuple(run(REFERENCE, "reference", 0, seed, value) for seed, value in enumerate(reference))
        outside = Entry(name, (), (), 0, runs, 0)
    return Comparison(plan, tuple(entries), outside)


def noisy(mean: float, seed: int, n: int = 8, spread: float = 0.003) -> list[float]:
    return (mean + spread * np.random.default_rng(seed).normal(size=n)).tolist()


COLUMNS = (
    {"name": "label", "kind": "target", "treatment": "3 classes", "missing": 0.0},
    {"name": "<script>alert(3)</script>", "kind": "text", "treatment": "TF-IDF", "missing": 0.25},
    {"name": "patient", "kind": "group", "treatment": "rows that share it stay together", "missing": None},
)


def shown() -> Comparison:
    """A comparison with something of everything."""
    return made_up(
        {
            "cross_entropy": noisy(0.80, 0),
            "focal": noisy(0.90, 1),
            "gce": noisy(0.80, 2),
            "exploding": "diverged",
            "hinge": "Hinge needs two classes",
            "mae": noisy(0.70, 4),
        },
        tuned={
            "cross_entropy": [0.8, 0.7, 0.75],
            "focal": [0.8, 0.9, "stopped"],
            "gce": [0.8, "stopped", "stopped"],
            "mae": [0.6, 0.7, 0.5],
        },
        reference=noisy(0.85, 3),
        notices=("patient_id is left out, it looks like an identifier",),
        columns=COLUMNS,
        max_time=600.0,
    )


def several(count: int) -> Suite:
    """A suite of so many made-up data sets; ``hinge`` fits only some of them."""
    found = []
    for place in range(count):
        values: dict[str, list[float] | str] = {
            "cross_entropy": noisy(0.70 + 0.01 * place, place),
            "focal": noisy(0.80 + 0.01 * place, 100 + place),
            "gce": noisy(0.60 + 0.01 * place, 200 + place),
            "hinge": "needs two classes" if place == 1 else noisy(0.5, place),
        }
        found.append(made_up(values, task=f"clouds_{place}", title=f"clouds {place}"))
    return Suite(tuple(found))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(BLOBS, LOSSES, seeds=5, trials=3, tuning_seeds=1, command="telos compare blobs 'loss=a,b'")


@pytest.fixture(scope="module")
def page(comparison: Comparison) -> Page:
    return Page(render(comparison))


@pytest.fixture(scope="module")
def full() -> Page:
    return Page(render(shown()))


@pytest.fixture(scope="module")
def suite() -> Page:
    return Page(render(several(6)))


# ----------------------------------------------------------------------------------- one file, asks for nothing


@pytest.mark.parametrize("name", ["page", "full", "suite"])
def test_nothing_is_fetched(name: str, request: pytest.FixtureRequest) -> None:
    page = request.getfixturevalue(name)
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action", "data", "poster", "style"} & set(attributes), tag
        assert str(attributes.get("href", "#")).startswith("#"), f"{tag} points elsewhere"
        assert not [key for key in attributes if key.startswith("on")], f"{tag} has a handler"
        assert tag not in ("link", "iframe", "img", "base", "form", "object", "embed")
    own = page.whole.replace(page.scripts[0], "")
    for word in ("http:", "https:", "@import", "url(", "//cdn"):
        assert word not in own
    assert len(page.whole.encode()) < 6_000_000
    assert own.count("</script>") == 3  # the library is there once
    assert len(page.scripts) == 3


def test_only_the_pages_own_scripts_may_run(page: Page) -> None:
    policy = str(page.all("meta", http_equiv="Content-Security-Policy")[0]["content"])
    allowed = re.search(r"script-src ([^;]*);", policy)
    assert allowed is not None
    hashes = [f"'sha256-{b64encode(sha256(page.scripts[i].encode()).digest()).decode()}'" for i in (0, 2)]
    assert allowed[1].split() == hashes
    assert policy.startswith("default-src 'none';")
    assert "unsafe-eval" not in policy
    assert "http" not in policy


def test_a_page_of_very_much_stays_small() -> None:
    rng = np.random.default_rng(0)
    labels = [f"loss_{place}" for place in range(25)]
    columns = tuple(
        {"name": f"a column with a long name, {place}", "kind": "number", "treatment": "scaled " * 20, "missing": 0.1}
        for place in range(6000)
    )  # fmt: skip
    many = made_up(
        {label: rng.normal(0.8, 0.01, 10).tolist() for label in labels},
        tuned={label: rng.uniform(0.5, 0.9, 150).tolist() for label in labels},
        epochs=150,
        columns=columns,
    )
    text = render(Suite((many,) * 3))
    assert len(text.encode()) < 6_000_000
    assert "this page leaves out some" in text
    # what decides is there
    assert text.count('data-recipe="loss_24"') >= 4
    alone = render(many)
    assert len(alone.encode()) < 6_000_000
    assert "more columns not shown" in alone


def test_curves_are_thinned_to_their_ends() -> None:
    found = Page(render(made_up({"a": noisy(0.8, 0), "b": noisy(0.8, 1)}, epochs=350)))
    curve = found.entries[0]["curves"]["validation_accuracy"]
    assert len(curve["epoch"]) == len(curve["mean"]) == 100
    assert (curve["epoch"][0], curve["epoch"][-1]) == (1, 350)


# ---------------------------------------------------------------------------------------------- what it shows


def test_it_shows_what_was_asked_for(page: Page) -> None:
    for word in (
        "cross_entropy",
        "focal",
        "telos compare blobs 'loss=a,b'",
        "corrected resampled",
        "needs adversarial_logits, which the task does not supply",
        "loss is inf at step 3, in epoch 2",
        "never works",
        "learning_rate 0.0001 to 0.03, logarithmic",
        "torch",
        "could not have made it the chosen one",
    ):
        assert word in page.text
    assert {entry["label"] for entry in page.entries} == {"cross_entropy", "focal"}


def test_the_charts_hold_the_numbers_of_the_runs(page: Page, comparison: Comparison) -> None:
    by_label = {entry["label"]: entry for entry in page.entries}
    for entry in comparison.entries[:2]:
        shown = by_label[entry.recipe.label]
        assert shown["seeds"] == {str(run.seed): run.metrics["test_accuracy"] for run in entry.evaluation}
        own = {trial["trial"]: trial for trial in shown["trials"]}
        assert [own[trial]["score"] for trial in range(3)] == list(entry.scores)
        assert [trial for trial in own if own[trial]["chosen"]] == [entry.chosen]
        last = [run.curve[-1]["validation_accuracy"] for run in entry.evaluation]
        assert shown["curves"]["validation_accuracy"]["mean"][-1] == pytest.approx(sum(last) / 5, rel=1e-4)
        assert len(shown["curves"]["loss"]["mean"]) == comparison.plan.epochs
    assert by_label["cross_entropy"]["difference"] is None
    assert by_label["focal"]["difference"]["low"] < by_label["focal"]["difference"]["high"]


def test_the_conclusion_stands_at_the_top(full: Page) -> None:
    found = shown()
    assert headline(found) == "focal is better than cross_entropy in test accuracy"
    assert (
        full.text.index(headline(found)) < full.text.index(conclusion(found)) < full.text.index("Leaderboard")
    )


def test_the_reference_is_a_line_and_not_ranked(full: Page) -> None:
    found = shown()
    assert found.reference is not None
    assert full.data["comparisons"][0]["reference"]["mean"] == found.reference.mean("test_accuracy")
    assert "gradient boosting" not in [entry["label"] for entry in full.entries]
    assert not full.all("button", data_key="gradient boosting")
    foot = full.whole[full.whole.index("<tfoot>") : full.whole.index("</tfoot>")]
    assert "gradient boosting" in foot
    assert f"{found.reference.mean('test_accuracy'):.4f}" in foot
    assert "not tuned, ranked or tested" in foot
    assert "The dashed line is the mean of gradient boosting" in full.text


def test_notices_and_columns_of_the_data(full: Page) -> None:
    assert "Patient_id is left out, it looks like an identifier" in full.text
    for column in COLUMNS:
        for part in (column["name"], column["kind"], column["treatment"]):
            assert str(part) in full.text
    cells = re.findall(r'data-value="(?:0\.0|25\.0|)">([^<]*)</td></tr>', full.whole)
    assert [cell for cell in cells if "%" in cell] == ["0.0 %", "25.0 %"]


def test_what_a_time_limit_did() -> None:
    limited = replace(shown(), stopped_by_time=True, completed_trials=2)
    text = Page(render(limited)).text
    assert "The time limit of 10 min ended it: 2 of 3 trials a recipe and 8 of 8 seeds count" in text
    assert "Each recipe got 2 trials" in text
    assert "Only trials and seeds that every recipe completed count" in text
    assert "ended it" not in Page(render(shown())).text


def test_stopped_trials_and_their_rule(full: Page) -> None:
    assert "A trial was stopped once even 1, the best accuracy there can be" in full.text
    assert "1 finished, 2 stopped" in full.text
    gce = next(entry for entry in full.entries if entry["label"] == "gce")
    assert [(trial["state"], trial["score"], trial["seeds"]) for trial in gce["trials"]] == [
        ("finished", 0.8, 2),
        ("stopped", 0.1, 1),
        ("stopped", 0.1, 1),
    ]


def test_a_fixed_test_split_is_said_to_be_one() -> None:
    found = made_up({"a": noisy(0.8, 0), "b": noisy(0.8, 1)}, resplits=False)
    text = Page(render(found)).text
    assert text.index(found.interval_note) < text.index("Leaderboard")
    assert "its own split" not in text
    assert "corrected resampled" not in text


def test_an_unfinished_comparison_says_so() -> None:
    found = shown()
    entries = tuple(replace(entry, missing=3) for entry in found.entries[:1]) + found.entries[1:]
    text = Page(render(replace(found, entries=entries))).text
    assert "The comparison is not finished: up to 3 runs are still to do." in text
    assert "So far: focal is better" in text


def test_how_to_take_it_home(tmp_path: Path) -> None:
    found = shown()
    text = Page(render(found)).text
    for command in ("telos export best STORE", "telos compare STORE --add loss=", "telos report STORE"):
        assert command in text
    assert "the recipe with the highest mean (focal)" in text
    named = replace(found, plan=replace(found.plan, command="telos compare x loss=a out='my runs'"))
    assert "telos export best 'my runs'" in Page(render(named)).text
    (tmp_path / "store.sqlite").touch()
    write_report(found, tmp_path / "report.html")
    assert f"telos export best {tmp_path}" in Page((tmp_path / "report.html").read_text()).text


def test_no_password_is_shown() -> None:
    command = "telos compare digits loss=a store=postgresql://me:s3cr3t@host/runs"
    found = shown()
    text = render(replace(found, plan=replace(found.plan, command=command)))
    assert "s3cr3t" not in text
    assert "telos export best STORE" in text


def test_regression_in_large_units() -> None:
    values = {
        "mse": [1234.5, 1250.0, 1240.0, 1231.0, 1249.0],
        "huber": [1230.0, 1245.0, 1236.0, 1228.0, 1241.0],
    }
    found = made_up(
        values,
        metric="rmse",
        direction="min",
        metrics={"rmse": "min"},
        family="regression",
        band=0.0,
        classes=None,
    )
    text = Page(render(found)).text
    assert "1,236.0" in text
    assert "lower is better" in text
    assert "softmax" not in text
    assert "no difference was declared too small to matter" in text


def test_a_page_without_results(comparison: Comparison) -> None:
    lost = tuple(entry for entry in comparison.entries if not entry.finished)
    page = Page(render(Comparison(comparison.plan, lost)))
    assert "Nothing to compare" in page.text
    assert "No recipe finished" in page.text
    assert page.entries == []


def test_one_seed_and_one_recipe() -> None:
    text = Page(render(made_up({"a": [0.8], "b": [0.9]}))).text
    assert "1 seed is too few to tell" in text
    alone = made_up({"a": noisy(0.8, 0)})
    assert "One recipe, and nothing to compare it with" in Page(render(alone)).text


# --------------------------------------------------------------------------------------- it does not overclaim


def simulated(rng: np.random.Generator, shift: float) -> Comparison:
    """Recipes that share the luck of a split; all but the first are ``shift`` above it on average."""
    recipes, seeds = int(rng.integers(2, 6)), int(rng.integers(2, 13))
    luck = rng.normal(0.8, 0.03, seeds)
    means = [0.0, *([shift] * (recipes - 1))]
    spread = rng.choice([0.002, 0.01, 0.03])
    values = {
        f"loss_{i}": (luck + mean + rng.normal(0, spread, seeds)).tolist() for i, mean in enumerate(means)
    }
    return made_up(values, band=float(rng.choice([0.0, 0.01])), resplits=bool(rng.integers(2)), epochs=1)


def test_words_of_winning_stand_only_where_a_verdict_has_them() -> None:
    rng = np.random.default_rng(20)
    claimed = quiet = 0
    for number in range(240):
        found = simulated(rng, shift=0.0 if number % 4 else 0.05)
        verdicts = [difference.verdict for difference in found.differences().values()]
        for text in (headline(found), conclusion(found)):
            # the names of the made-up recipes hold no such word
            assert bool(WINNING.search(text)) == ("better" in verdicts), (text, verdicts)
        assert ("worse" in conclusion(found)) == ("worse" in verdicts)
        assert "worse" in verdicts or "worse" not in headline(found)
        claimed += "better" in verdicts
        quiet += "better" not in verdicts
    assert claimed > 20
    assert quiet > 120


def test_identical_recipes_seldom_seem_better() -> None:
    rng = np.random.default_rng(21)
    claims = sum(bool(WINNING.search(headline(simulated(rng, shift=0.0)))) for _ in range(300))
    # at 5 %, half of it on the better side, more than 17 of 300 have a chance below one in a thousand
    assert claims <= 17


def test_one_loss_against_itself_shows_no_difference() -> None:
    same = noisy(0.8, 5)
    assert headline(made_up({"a": same, "b": same})) == "Practically equal"
    assert "practically equal" in conclusion(made_up({"a": same, "b": same}))
    unlike = made_up({"a": noisy(0.8, 5, spread=0.05), "b": noisy(0.8, 6, spread=0.05)})
    assert headline(unlike) == "No difference that 8 seeds can show"


def test_mixed_verdicts_are_counted() -> None:
    found = made_up(
        {
            "cross_entropy": noisy(0.8, 0),
            "same": noisy(0.8, 0),
            "wild": noisy(0.8, 3, spread=0.2),
            "low": noisy(0.6, 4),
        }
    )
    words = "Against cross_entropy: 1 practically equal, 1 with no difference that 8 seeds can show, 1 worse"
    assert headline(found) == words
    both = made_up(
        {"cross_entropy": noisy(0.8, 0), "a": noisy(0.9, 1), "b": noisy(0.6, 2), "c": noisy(0.9, 3)}
    )
    assert headline(both) == "a and c are better than cross_entropy in test accuracy"
    low = made_up({"cross_entropy": noisy(0.8, 0), "b": noisy(0.6, 2)})
    assert headline(low) == "b is worse than cross_entropy in test accuracy"


def test_the_table_says_what_the_verdicts_say(full: Page) -> None:
    found = shown()
    for label, difference in found.differences().items():
        row = re.search(rf'<tr data-recipe="{label}">.*?</tr>', full.whole)
        assert row is not None
        assert f'<td class="verdict" data-value="{difference.verdict}">' in row[0]


# ------------------------------------------------------------------------------------------ several data sets


def test_a_suite_shows_ranks_diagram_profiles_and_every_task(suite: Page) -> None:
    found = several(6)
    for words in (suite_headline(found), found.conclusion(), "Nemenyi", "Friedman", "Performance profiles"):
        assert words in suite.text
    assert suite_headline(found) == "No recipe ranks clearly ahead of cross_entropy"
    # three ranks apart by one each need twelve data sets
    assert suite_headline(several(12)) == "focal ranks better than cross_entropy"
    recipes = suite.data["suite"]["recipes"]
    assert [recipe["label"] for recipe in recipes] == [s.label for s in found.standings()]
    assert suite.data["suite"]["distance"] == pytest.approx(found.critical_difference())
    assert suite.data["suite"]["groups"] == [list(group) for group in found.groups()]
    for recipe in recipes:
        assert len(recipe["tau"]) == len(recipe["share"])
        assert recipe["share"] == sorted(recipe["share"])
    assert len(suite.data["comparisons"]) == len(suite.all("details", class_="task")) == 6
    for one in found.comparisons:
        assert conclusion(one) in suite.text
    assert "refused on clouds_1: needs two classes" in suite.text
    assert len(suite.all("input", id="filter")) == 1


def test_a_small_suite_says_why_it_has_no_diagram() -> None:
    found = several(3)
    page = Page(render(found))
    assert (
        "There is no critical-difference diagram: ranks can be tested with 5 or more data sets" in page.text
    )
    assert "and here are 3 data sets and 3 recipes." in page.text
    assert not page.all("div", id="suite-ranks")
    assert page.all("div", id="suite-profiles")
    assert suite_headline(found) == "3 data sets are too few to test ranks"


def test_ranks_of_identical_recipes_are_no_claim() -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        tasks = tuple(
            made_up(
                {name: rng.normal(0.8, 0.01, 5).tolist() for name in "abc"},
                task=f"t{place}",
                title=f"t{place}",
            )
            for place in range(int(rng.integers(2, 8)))
        )
        found = Suite(tasks)
        tested, distance = found.friedman(), found.critical_difference()
        base = next(s.mean_rank for s in found.standings() if s.label == "a")
        ahead = (
            tested is not None
            and distance is not None
            and tested.p_value < 0.05
            and any(base - standing.mean_rank >= distance for standing in found.standings())
        )
        assert ("better" in suite_headline(found)) == ahead


def test_a_suite_without_a_ranked_recipe() -> None:
    first = made_up({"a": noisy(0.8, 0), "b": "needs two classes"})
    second = made_up({"a": noisy(0.8, 0), "b": "needs two classes"}, task="other", title="other")
    lost = tuple(
        replace(entry, evaluation=(), missing=8) if not entry.recipe.refused else entry
        for entry in second.entries
    )
    page = Page(render(Suite((first, replace(second, entries=lost)))))
    assert "Nothing to rank" in page.text
    assert page.data["suite"] is None


# ------------------------------------------------------------------------------------------------------ safety

EVIL = "<b></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;$title %{x} ${y}"


def evil(found: Comparison) -> Comparison:
    """The same with something bad in everything that comes from outside."""
    plan = found.plan
    plan = replace(
        plan,
        task=EVIL,
        title=EVIL,
        command=EVIL,
        description=EVIL,
        notices=(EVIL,) * len(plan.notices),
        columns=tuple({**column, "name": EVIL, "kind": EVIL, "treatment": EVIL} for column in plan.columns),
        versions={name + EVIL: EVIL for name, value in plan.versions.items() if value},
        reference_name=EVIL,
        metrics={EVIL if name == "ece" else name: way for name, way in plan.metrics.items()},
    )

    def bad(run: Run) -> Run:
        metrics = {name.replace("ece", EVIL): value for name, value in run.metrics.items()}
        curve = [{name.replace("ece", EVIL): value for name, value in record.items()} for record in run.curve]
        settings = {**run.hyperparameters, EVIL: EVIL}
        return replace(
            run, metrics=metrics, curve=curve, hyperparameters=settings, reason=run.reason and EVIL
        )

    def spoilt(entry: Entry, name: str) -> Entry:
        recipe = replace(entry.recipe, label=name, space={EVIL: EVIL}, refused=entry.recipe.refused and EVIL)
        runs = {"tuning": tuple(map(bad, entry.tuning)), "evaluation": tuple(map(bad, entry.evaluation))}
        return replace(entry, recipe=recipe, **runs)

    entries = tuple(spoilt(entry, EVIL + str(place)) for place, entry in enumerate(found.entries))
    return replace(
        found, plan=plan, entries=entries, reference=found.reference and spoilt(found.reference, EVIL)
    )


@pytest.mark.parametrize("kind", ["comparison", "suite"])
def test_what_users_write_stays_text(kind: str) -> None:
    calm, attacked = shown(), evil(shown())
    quiet, page = (
        Page(render(found if kind == "comparison" else Suite((found,) * 2))) for found in (calm, attacked)
    )
    assert [tag for tag, _ in page.tags if tag != "wbr"] == [tag for tag, _ in quiet.tags if tag != "wbr"]
    assert [set(a) for tag, a in page.tags if tag != "wbr"] == [
        set(a) for tag, a in quiet.tags if tag != "wbr"
    ]
    assert len(page.scripts) == 3
    assert page.scripts[0] == quiet.scripts[0]
    assert page.scripts[2] == quiet.scripts[2]
    assert {entry["label"] for entry in page.entries} == {EVIL + place for place in "0125"}
    assert EVIL in page.text


def test_names_that_are_no_text_can_be_written(tmp_path: Path) -> None:
    found = shown()
    command = "telos compare \udcff.csv"
    write_report(replace(found, plan=replace(found.plan, command=command)), tmp_path / "report.html")
    assert "telos compare ?.csv" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_an_old_page_is_replaced_only_by_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(shown(), path)
    before = path.read_text()
    assert before.startswith("<!DOCTYPE html>")

    def full(*args: object, **keywords: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(shown(), path)
    assert path.read_text() == before


# ------------------------------------------------------------------------------------------------ accessibility


@pytest.mark.parametrize("name", ["full", "suite"])
def test_structure_that_assistive_technology_reads(name: str, request: pytest.FixtureRequest) -> None:
    page = request.getfixturevalue(name)
    assert page.all("html", lang="en")
    assert page.all("meta", name="viewport", content="width=device-width, initial-scale=1")
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert page.all("a", class_="skip", href="#leaderboard")
    assert "leaderboard" in ids
    assert page.all("label", for_="filter")
    assert page.whole.count("<table") == page.whole.count("<caption>")
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    charts = page.all("div", class_="chart")
    assert charts
    for chart in charts:
        assert chart["role"] == "img"
        assert len(str(chart["aria-label"])) > 20
    # boxes that scroll can be reached and have a name
    for box in page.all("div", class_="scroll"):
        assert box["tabindex"] == "0"
        assert box["aria-label"]
    assert all(a["aria-hidden"] == "true" for a in page.all("svg"))


def test_the_difference_chart_tells_its_numbers(full: Page) -> None:
    spoken = str(full.all("div", id="c0-difference")[0]["aria-label"])
    for label, difference in shown().differences().items():
        assert (
            f"{label} {difference.estimate.mean:+.4g}, interval {difference.estimate.low:+.4g} to " in spoken
        )
        assert difference.verdict in spoken


def test_numbers_behind_the_charts(full: Page) -> None:
    for run in shown().entries[1].evaluation:
        assert f">{run.metrics['test_accuracy']:.4f}<" in full.whole
    assert full.whole.count("<summary>The numbers</summary>") == 3


def tokens(scheme: str) -> dict[str, str]:
    """The colours of the style sheet."""
    css = (files("telos.lab") / "page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root[^{]*\{(.*?)\$", css, re.DOTALL)[:2]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", light if scheme == "light" else dark))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    found = tokens(scheme)
    assert found["card"] == CARDS[scheme]
    for text in ("ink", "soft", "accent", "good", "bad", "warn"):
        for ground in ("ground", "card", "tint"):
            assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    # borders of fields
    assert contrast(found["edge"], found["card"]) >= 3
    marks = dict(re.findall(r"--(r\w): ?(#[0-9a-f]{6})", palette(scheme)))
    assert len(marks) == 9
    for mark, colour in marks.items():
        assert contrast(colour, found["card"]) >= 3, mark


def test_contrast_agrees_with_known_ratios() -> None:
    # black on white is 21 by definition; #767676 is the well-known lightest grey for text on white
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert 4.5 <= contrast("#767676", "#ffffff") < 4.6
    assert contrast("#777777", "#ffffff") < 4.5


def test_marks_differ_where_colours_repeat() -> None:
    looks = [(colour_class(place), symbol(place)) for place in range(-1, 64)]
    assert len(set(looks)) == len(looks)
