"""Reads the generated catalogue: what is implemented, golden-checked and evidenced. Imports no torch.

``catalogue.json`` holds ``papers``, one entry per paper in the order of their numbers, and ``symbols``,
one entry per public name. ``tools/catalogue.py`` writes it.
"""

import difflib
import json
import re
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Note", "Source", "Example", "Examples")


@cache
def read() -> dict[str, Any]:
    """The catalogue that was shipped with the library."""
    return json.loads(resources.files("telos").joinpath("catalogue.json").read_text(encoding="utf-8"))


def papers() -> list[dict[str, Any]]:
    """Every paper, by number."""
    return read()["papers"]


def symbols() -> dict[str, dict[str, Any]]:
    """Every public name, by its import path."""
    return read()["symbols"]


def find(name: str) -> tuple[str, dict[str, Any]]:
    """What a user means by ``name``: a slug, an import path or a public name.

    Args:
        name: a slug comes first, then an import path (``telos.optim.PerpGrad``), then its last part in any
            case.

    Returns:
        ``("paper", entry)`` or ``("symbol", entry)``.

    Raises:
        KeyError: if there is no such name; the message gives the nearest ones.
    """
    for paper in papers():
        if paper["slug"] == name:
            return "paper", paper
    known = symbols()
    if name in known:
        return "symbol", known[name]
    for same in (str.__eq__, lambda full, wanted: full.lower() == wanted.lower()):
        for path, symbol in known.items():
            if same(path.rpartition(".")[2], name):
                return "symbol", symbol
    names = [paper["slug"] for paper in papers()] + [path.rpartition(".")[2] for path in known]
    raise KeyError(f"nothing is called {name!r}; {nearest(name, names)}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid names that look most like ``name``, as the end of an error message."""
    options = sorted(set(valid))
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    close += [low for low in by_lower if name.lower() in low and low not in close][:3]
    if close:
        return f"the nearest names are {', '.join(by_lower[low] for low in close)}"
    if len(options) <= 12:
        return f"the names are {', '.join(options) or 'none yet'}"
    return "`telos list` shows the names"


def sections(docstring: str) -> dict[str, str]:
    """Splits a Google-style docstring: ``""`` holds what stands before the first section."""
    parts: dict[str, list[str]] = {"": []}
    current = ""
    for line in docstring.splitlines():
        heading = re.fullmatch(rf"({'|'.join(SECTIONS)}):", line)
        if heading:
            current = heading[1]
            parts[current] = []
        else:
            parts[current].append(line[4:] if current and line.startswith("    ") else line)
    return {name: "\n".join(lines).strip("\n") for name, lines in parts.items()}
