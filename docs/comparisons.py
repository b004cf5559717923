"""The gallery: a page of text and table from each recorded store, and its whole report, without training.

``gallery/NAME.toml`` is the comparison as ``telos compare`` runs it, ``gallery/NAME.sqlite.gz`` its store.
``tools/gallery.py`` records one.
"""

import gzip
import shutil
import tempfile
from pathlib import Path

from telos.lab import Result, load
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
    heads, lines = printed(result.found)
    runs = sum(len(e.tuning) + len(e.evaluation) for c in result.comparisons for e in c.entries)
    shown = [line for line in lines if any(line[1:-1])]
    return "\n".join(
        [
            f"**What it shows.** {_text(result.conclusion)}",
            "",
            _row(heads),
            _row(["---"] + ["---:"] * (len(heads) - 1)),
            *map(_row, ([_text(cell) for cell in line] for line in shown)),
            "",
            f"{runs:,} runs. <a href='comparisons/{name}.html'>The whole report</a>; again on your machine: "
            f"`telos compare docs/gallery/{name}.toml`.",
            "",
        ]
    )


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
    return " ".join(words.split())
