"""The gallery says what its stores hold, and compares what its files name."""

import inspect
import re
import sys
from pathlib import Path

import pytest

from telos import _catalogue
from telos.lab.words import Words
from telos.trials import Plan
from telos.trials.recipes import loss_names, parse_recipes

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
import comparisons  # noqa: E402  (a module of the documentation)

FILES = sorted(path.stem for path in comparisons.GALLERY.glob("*.toml"))


def plans_of(name: str) -> tuple[Plan, ...]:
    return tuple(comparison.plan for comparison in comparisons.recorded(name).comparisons)


def test_three_comparisons_or_more_are_recorded_and_shown() -> None:
    assert len(comparisons.NAMES) >= 3
    assert comparisons.NAMES == FILES
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    for name in comparisons.NAMES:
        assert f"{{include}} reference/gallery/{name}.inc" in page


@pytest.mark.parametrize("name", FILES)
def test_what_was_compared_is_what_the_file_says(name: str) -> None:
    words = Words.parse([str(comparisons.GALLERY / f"{name}.toml")])
    plans = plans_of(name)
    assert tuple(plan.task for plan in plans) == words.tasks
    for plan in plans:
        assert (plan.seeds, plan.trials) == (words.values["seeds"], words.values["trials"])
        recipes = parse_recipes(words.values["loss"], words.values["optim"], plan.family)
        assert [recipe.canonical for recipe in plan.recipes] == [recipe.canonical for recipe in recipes]


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_missing_from_a_store(name: str) -> None:
    for comparison in comparisons.recorded(name).comparisons:
        assert not comparison.stopped_by_time
        for entry in comparison.entries:
            assert entry.recipe.refused or len(entry.evaluation) == comparison.plan.seeds


@pytest.mark.parametrize("name", FILES)
def test_an_excerpt_holds_conclusion_and_table(name: str) -> None:
    result = comparisons.recorded(name)
    text = comparisons.excerpt(name, result)
    assert comparisons._text(result.conclusion) in text
    for comparison in result.comparisons:
        for entry in comparison.ranked:
            assert f"| {comparisons._text(entry.recipe.label)} |" in text


def test_every_classification_loss_is_compared_under_wrong_labels() -> None:
    """What does not fit the task is refused there with its reason."""
    (plan,) = plans_of("noisy_labels")
    compared = {recipe.canonical for recipe in plan.recipes}
    for text, name in loss_names("classification").items():
        (recipe,) = parse_recipes(text)
        assert recipe.canonical in compared, f"{name} ({text}) is not in docs/gallery/noisy_labels.toml"
    for recipe in plan.recipes:
        assert recipe.refused is None or len(recipe.refused) > 10


def test_every_recommendation_links_to_what_was_recorded() -> None:
    """To a study with a verdict, a comparison of the gallery, or the measured times and memory."""
    verdicts = {paper["slug"] for paper in _catalogue.papers() if paper["verdict"]}
    page = (DOCS / "choose_loss.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", (DOCS / "gallery.md").read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {title.lower().replace(" ", "-") for title in titles}
    table = page[page.index("| --- |") :].split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[1:]]
    assert len(rows) > 10
    for aim, _, recorded in rows:
        studies = re.findall(r"reference/(\w+)>", recorded)
        comparisons_linked = re.findall(r"gallery\.md#([\w-]+)", recorded)
        assert set(studies) <= verdicts, aim
        assert set(comparisons_linked) <= anchors, aim
        assert studies or comparisons_linked or "{doc}`performance`" in recorded, aim


def test_every_loss_named_in_the_guide_exists() -> None:
    page = (DOCS / "choose_loss.md").read_text(encoding="utf-8")
    table = page[page.index("| loss | setting") :].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        losses, settings, _ = (re.findall(r"`(\w+)`", cell) for cell in line.strip("|").split("|"))
        for place, name in enumerate(losses):
            (recipe,) = parse_recipes(name)
            parameters = inspect.signature(recipe.terms[0].loss).parameters
            wanted = settings if len(losses) == 1 else settings[place : place + 1]
            assert set(wanted) <= set(parameters), name
