"""The catalogue: one row for each paper, generated from the code and fresh."""

import hashlib
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from telos import _catalogue
from telos._catalogue import nearest, sections

ROOT = Path(__file__).parents[1]
ROWS = tomllib.loads((ROOT / "src/telos/papers.toml").read_text(encoding="utf-8"))["paper"]
IMPLEMENTED = [row for row in ROWS if row["symbols"]]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("catalogue")


def test_the_file_is_fresh() -> None:
    call = [sys.executable, "tools/catalogue.py", "--check"]
    ended = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_every_paper_has_one_row() -> None:
    assert [row["number"] for row in ROWS] == list(range(1, 130))
    assert len({row["slug"] for row in ROWS}) == 129
    assert len({row["arxiv"] for row in ROWS}) == 129
    for row in ROWS:
        assert row["slug"].isidentifier()
        assert row["title"] == row["title"].strip() != ""
        assert len(row["arxiv"]) == 10


@pytest.mark.parametrize("row", IMPLEMENTED, ids=lambda row: row["slug"])
def test_a_row_names_what_exists_and_says_when_to_use_it(row: dict) -> None:
    for path in row["symbols"]:
        room, _, name = path.rpartition(".")
        assert name in importlib.import_module(room).__all__, f"{path} is not public"
    assert row["when"].endswith(".")


def test_no_name_belongs_to_two_papers() -> None:
    names = [name for row in ROWS for name in row["symbols"]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("row", IMPLEMENTED, ids=lambda row: row["slug"])
def test_what_is_implemented_is_golden_checked_and_evidenced(row: dict) -> None:
    paper = next(paper for paper in _catalogue.papers() if paper["slug"] == row["slug"])
    assert paper["implemented"]
    assert paper["golden"] == (ROOT / "tests" / "golden" / f"{row['slug']}.json").exists()
    assert paper["verdict"] is not None
    assert not paper["evidence"]["stale"]


def test_parts_of_the_catalogue_are_computed(tool: ModuleType, tmp_path: Path, monkeypatch) -> None:
    """A made-up repository: what is there counts, and what is promised only does not."""
    package = tmp_path / "src" / "telos"
    package.mkdir(parents=True)
    (tmp_path / "tests" / "golden").mkdir(parents=True)
    (tmp_path / "tests" / "golden" / "one.json").write_text('{"slug": "one", "cases": [{}, {}, {}]}')
    (tmp_path / "tests" / "golden" / "two.json").write_text('{"slug": "two", "cases": [{}]}')
    (tmp_path / "tests" / "test_one.py").write_text(
        "def golden_one(case): ...\n# def golden_two(case): ...\n"
    )
    (package / "papers.toml").write_text(
        "".join(
            f'[[paper]]\nnumber = {n}\nslug = "{slug}"\ntitle = "T"\narxiv = "x"\narxiv_certain = true\n'
            f"symbols = {symbols}\n"
            for n, slug, symbols in [
                (1, "one", '["telos.losses.FocalLoss"]'),
                (2, "two", '["telos.losses.focal_loss", "telos.losses.imaginary_loss"]'),
                (3, "three", "[]"),
            ]
        )
    )
    focal = {
        path: _catalogue.symbols()[path] for path in ("telos.losses.focal_loss", "telos.losses.FocalLoss")
    }
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "PACKAGE", package)
    monkeypatch.setattr(tool, "public_symbols", lambda: {path: {**entry} for path, entry in focal.items()})
    catalogue, remarks = tool.build()
    one, two, three = catalogue["papers"]
    assert (one["implemented"], one["golden"], one["golden_cases"]) == (True, True, 3)
    assert (two["implemented"], two["golden"], two["golden_cases"]) == (False, False, 0)
    assert two["planned"] == ["telos.losses.imaginary_loss"]
    assert (three["implemented"], three["golden"], three["verdict"]) == (False, False, None)
    assert remarks == ["two: telos.losses.imaginary_loss is not a public name"]
    assert catalogue["symbols"]["telos.losses.FocalLoss"]["paper"] == "one"


def test_a_result_of_another_source_is_stale(tool: ModuleType, tmp_path: Path, monkeypatch) -> None:
    room = tmp_path / "evidence"
    (room / "results").mkdir(parents=True)
    source = (
        "from telos.evidence import Effect, Study\n"
        "effects = (Effect('a', 'a', 0.0),)\n"
        "STUDY = Study('claim_of_mine', 'c', 'p', 'd', effects, 'none', lambda seed, budget: {})\n"
    )
    (room / "claim_of_mine.py").write_text(source)
    from telos import evidence

    monkeypatch.setattr(evidence, "__path__", [str(room), *evidence.__path__])
    monkeypatch.setattr(tool, "PACKAGE", tmp_path)
    unrun = tool.evidence_of("claim_of_mine")
    assert (unrun["claim"], unrun["verdict"], unrun["stale"]) == ("c", None, False)
    result = {"verdict": "REPRODUCED", "source_sha256": hashlib.sha256(source.encode()).hexdigest()}
    (room / "results" / "claim_of_mine.json").write_text(json.dumps(result))
    assert tool.evidence_of("claim_of_mine")["stale"] is False
    (room / "claim_of_mine.py").write_text(source + "# changed\n")
    assert tool.evidence_of("claim_of_mine")["stale"] is True
    assert tool.evidence_of("nothing_of_mine") is None


def test_defaults_and_signatures_hold_no_address(tool: ModuleType) -> None:
    def function(a, b=2.0, *, link=len, thing=object()) -> None:
        """Doc."""

    assert tool.bare_signature(function) == "(a, b=2.0, *, link=len, thing=<object object>)"
    assert tool.defaults(function) == {"b": "2.0", "link": "len", "thing": "<object object>"}


def test_ranges_are_written_as_they_are_declared(tool: ModuleType) -> None:
    from telos.losses import choice, integers, log_uniform, uniform

    shown = [
        tool.shown_range(r) for r in (uniform(0, 2.5), log_uniform(0.1, 10), integers(1, 5), choice("a", 2))
    ]
    assert shown == ["uniform(0, 2.5)", "log_uniform(0.1, 10)", "integers(1, 5)", "choice('a', 2)"]


def test_sections_of_a_docstring() -> None:
    parts = sections(
        "First.\n\nMore::\n\n    x = 1\n\nArgs:\n    a: one\n        and more.\n\nReturns:\n    b.\n"
    )
    assert parts == {"": "First.\n\nMore::\n\n    x = 1", "Args": "a: one\n    and more.", "Returns": "b."}


def test_nearest_names() -> None:
    assert nearest("alpa", ["alpha", "beta"]) == "the nearest names are alpha"
    assert nearest("zzz", ["alpha", "beta"]) == "the names are alpha, beta"
    assert nearest("zzz", []) == "the names are none yet"
    assert nearest("core", ["deqa_score", *"abcdefghijklmn"]) == "the nearest names are deqa_score"
