"""The gallery: a page of text and table from each recorded store, and its whole report, without training.

``gallery/NAME.toml`` is the comparison as ``telos compare`` runs it, ``gallery/NAME.sqlite.gz`` its store.
``tools/gallery.py`` records one.
"""

import gzip
import re
import shutil
import tempfile
from pathlib import Path

from telos.lab import Comparison, Result, Suite, load
from telos.lab.leaderboard import printed

GALLERY = Path(__file__).parent / "gallery"
NAMES = sorted(path.name.removesuffix(".sqlite.gz") for path in GALLERY.glob("*.sqlite.gz"))


def recorded(name: str) -> Result:
    """The comparison that a packed store holds."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / f"{name}.sqlite"
        with gzip.open(GALLERY / f"{name}.sqlite.gz") as packed, store.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
        return load(store)


def excerpt(name: str, result: Result) -> str:
    """Conclusion, table and the way to the report, in MyST's Markdown."""
    runs = sum(len(e.tuning) + len(e.evaluation) for c in result.comparisons for e in c.entries)
    heads, *lines = _table(result.found)
    return "\n".join(
        [
            f"**What it shows.** {_text(result.conclusion)}",
            "",
            _row(heads),
            _row(["---"] + ["---:"] * (len(heads) - 1)),
            *(_row([_text(cell) for cell in line]) for line in lines),
            "",
            f"{runs:,} runs. <a href='comparisons/{name}.html'>The whole report</a>; again on your machine: "
            f"`telos compare docs/gallery/{name}.toml`.",
            "",
        ]
    )


def _table(found: Comparison | Suite) -> list[list[str]]:
    """Titles and rows that fit a page: of a single comparison the one metric that it was about."""
    heads, lines = printed(found)
    if isinstance(found, Suite):
        return [heads, *lines]
    # the difference is the middle of its interval, which stays on one line
    kept = [
        [line[0], line[1], line[3].replace(" ", "\u00a0"), line[-1]] for line in (heads, *lines) if line[1]
    ]
    kept[0][2] = "minus baseline, 95 %"
    if outside := found.reference:
        mean = outside.mean(f"test_{found.plan.metric}")
        kept.append([outside.recipe.label, f"{mean:.4f}", "", "outside the comparison"])
    return kept


def write_excerpts(folder: Path) -> None:
    """One file for each comparison, which ``gallery.md`` includes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        text = excerpt(name, recorded(name))
        page = folder / f"{name}.inc"
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def write_reports(folder: Path) -> None:
    """The whole reports, beside the pages that Sphinx has built."""
    for name in NAMES:
        recorded(name).report(folder / f"{name}.html")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text(words: str) -> str:
    for mark in "\\*_`<[":
        words = words.replace(mark, "\\" + mark)
    return re.sub(r"[ \n]+", " ", words)
