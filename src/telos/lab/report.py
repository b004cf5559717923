"""The report: one self-contained page that asks nothing of the network.

What users wrote (names of files, columns, recipes and metrics, reasons of failures) is escaped as text by
construction, and a content security policy names by their hashes the two scripts that may run.
"""

from __future__ import annotations

import json
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from string import Template

from telos.lab._charts import Detail, comparison_data, palette, suite_data
from telos.lab._markup import join, tag
from telos.lab._sections import comparison_body
from telos.lab._sentences import counted, name_of
from telos.lab._suite_sections import suite_body
from telos.trials import Comparison
from telos.trials.suite import Suite

LIMIT = 5_900_000
"""Bytes of a page; plotly takes most of them."""
DETAILS = (Detail(100, True, 2000, 400), Detail(30, False, 200, 60), Detail(0, False, 0, 0))
"""What a page holds of each comparison: the first of these that keeps to the limit."""


def write_report(found: Comparison | Suite, path: Path) -> None:
    """Write the page; it replaces an older one only when it is complete.

    Args:
        found: a comparison, or several of them.
        path: of the ``.html`` file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / "store.sqlite"
    page = render(found, str(path.parent) if beside.is_file() else None)
    unfinished = path.with_suffix(".html.part")
    # the name of a file need not be text; what cannot be written becomes a question mark
    unfinished.write_text(page, encoding="utf-8", errors="replace")
    unfinished.replace(path)


def render(found: Comparison | Suite, store: str | None = None) -> str:
    """The page as text.

    Args:
        found: a comparison, or several of them.
        store: what the commands on the page call the store; what the command of the comparison called it,
            or ``STORE``, if not given.

    Returns:
        HTML of less than six million bytes, unless the leaderboards alone are larger.
    """
    for detail in DETAILS:
        page = _page(found, store, detail)
        if len(page.encode("utf-8", "replace")) <= LIMIT:
            break
    return page


def _page(found: Comparison | Suite, store: str | None, detail: Detail) -> str:
    if isinstance(found, Suite):
        name, comparisons = counted(len(found.comparisons), "data set"), found.comparisons
        body, ranks = suite_body(found, store, detail), suite_data(found)
    else:
        name, comparisons = name_of(found), (found,)
        body, ranks = comparison_body(found, store, detail), None
    if detail != DETAILS[0]:
        less = "To stay small, this page leaves out some curves, trials or columns; the store has them all."
        body = join([body, tag("p", less, class_="note")])
    charts = [comparison_data(comparison, detail, place) for place, comparison in enumerate(comparisons)]
    data = json.dumps({"suite": ranks, "comparisons": charts}, allow_nan=False, separators=(",", ":"))
    script, plotly = _own("page.js"), _plotly()
    return Template(_own("page.html")).substitute(
        title=tag("title", f"{name}: telos compare"),
        policy=(
            f"default-src 'none'; script-src {_hash(plotly)} {_hash(script)}; style-src 'unsafe-inline'; "
            "base-uri 'none'; form-action 'none'"
        ),
        style=Template(_own("page.css")).substitute(light=palette("light"), dark=palette("dark")),
        body=body,
        plotly=plotly,
        # a closing tag inside a string would end the script element
        data=data.replace("<", "\\u003c"),
        script=script,
    )


@cache
def _own(name: str) -> str:
    return (files("telos.lab") / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    # a parser makes every end of line a line feed, and the hash must be that of what it reads
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")


@cache
def _hash(script: str) -> str:
    return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"
