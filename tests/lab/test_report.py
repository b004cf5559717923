"""The page: self-contained, complete, and safe whatever names users choose."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from telos.lab import render, write_report
from telos.trials import Comparison, compare

BLOBS = "tests.trials.examples:BLOBS"
LOSSES = "cross_entropy,focal,tests.trials.examples:Exploding,tests.trials.examples:Raising,smooth_adversarial_comp_sum"


class Page(HTMLParser):
    """Tags with their attributes, text by the element around it, and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[1])


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(BLOBS, LOSSES, seeds=5, trials=3, tuning_seeds=1, command="telos compare blobs 'loss=a,b'")


@pytest.fixture(scope="module")
def page(comparison: Comparison) -> Page:
    return Page(render(comparison))


def test_nothing_is_fetched(page: Page, comparison: Comparison) -> None:
    for tag, attributes in page.tags:
        assert not {"src", "href", "action", "data"} & set(attributes), f"{tag} points elsewhere"
        assert tag not in ("link", "iframe", "img", "base", "form")
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "Content-Security" in str(a))
    assert str(policy).startswith("default-src 'none';")
    assert "http" not in str(policy)
    own = render(comparison).replace(page.scripts[0], "")
    assert "http:" not in own
    assert "https:" not in own
    assert "@import" not in own
    assert "url(" not in own


def test_it_is_small_enough(comparison: Comparison) -> None:
    assert len(render(comparison).encode()) < 6_000_000


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
    ):
        assert word in page.text
    assert {entry["label"] for entry in page.data["entries"]} == {"cross_entropy", "focal"}


def test_the_charts_hold_the_numbers_of_the_runs(page: Page, comparison: Comparison) -> None:
    by_label = {entry["label"]: entry for entry in page.data["entries"]}
    for entry in comparison.entries[:2]:
        shown = by_label[entry.recipe.label]
        assert shown["seeds"] == {str(run.seed): run.metrics["test_accuracy"] for run in entry.evaluation}
        assert [trial["score"] for trial in shown["trials"]] == list(entry.scores)
        last = [run.curve[-1]["validation_accuracy"] for run in entry.evaluation]
        assert shown["curves"]["validation_accuracy"]["mean"][-1] == pytest.approx(sum(last) / 5, rel=1e-4)
        assert len(shown["curves"]["loss"]["mean"]) == comparison.plan.epochs
    assert by_label["cross_entropy"]["difference"] is None
    assert by_label["focal"]["difference"]["low"] < by_label["focal"]["difference"]["high"]


def test_what_users_write_stays_text(comparison: Comparison) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&$title"
    versions = dict.fromkeys((name + evil for name, value in comparison.plan.versions.items() if value), evil)
    plan = replace(comparison.plan, task=evil, command=evil, description=evil, versions=versions)
    entries = tuple(
        replace(
            entry,
            recipe=replace(entry.recipe, label=evil + str(place), refused=evil if entry.recipe.refused else None),
            evaluation=tuple(replace(run, reason=evil, hyperparameters={**run.hyperparameters, evil: evil})
                             for run in entry.evaluation),
            tuning=tuple(replace(run, reason=None if run.finished else evil) for run in entry.tuning),
        )
        for place, entry in enumerate(comparison.entries)
    )  # fmt: skip
    attacked = Page(render(Comparison(plan, entries)))
    quiet = Page(render(comparison))
    assert [tag for tag, _ in attacked.tags].count("script") == 3
    assert [tag for tag, _ in attacked.tags] == [tag for tag, _ in quiet.tags]
    assert attacked.scripts[2] == quiet.scripts[2]
    assert {entry["label"] for entry in attacked.data["entries"]} == {evil + "0", evil + "1"}
    assert evil in attacked.text


def test_a_page_without_results(comparison: Comparison) -> None:
    lost = tuple(entry for entry in comparison.entries if not entry.finished)
    page = Page(render(Comparison(comparison.plan, lost)))
    assert "No recipe finished" in page.text
    assert page.data["entries"] == []


def test_an_old_page_is_replaced_only_by_a_whole_one(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(comparison, path)
    before = path.read_text()
    assert before.startswith("<!DOCTYPE html>")

    def full(*args: object, **keywords: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(comparison, path)
    assert path.read_text() == before
