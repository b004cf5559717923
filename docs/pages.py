"""Writes ``reference/``: a page for each method, one for each room's other names, and the evidence table."""

import shutil
from pathlib import Path
from typing import Any

import telos
from telos import _catalogue

RESULTS = Path(telos.__file__).parent / "evidence" / "results"


def write(folder: Path) -> None:
    """Writes all pages; one that stays the same is left alone, so that Sphinx need not read it again."""
    papers = [paper for paper in _catalogue.papers() if paper["implemented"]]
    pages = {f"{paper['slug']}.rst": method_page(paper) for paper in papers}
    rooms: dict[str, list[str]] = {}
    for path, symbol in _catalogue.symbols().items():
        if symbol["paper"] is None:
            rooms.setdefault(path.rpartition(".")[0], []).append(path)
    for room, names in rooms.items():
        pages[f"{room}.rst"] = room_page(room, names)
    pages["index.rst"] = index_page([paper["slug"] for paper in papers], sorted(rooms))
    pages["evidence_table.inc"] = evidence_table()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.name not in pages and old.suffix in {".rst", ".inc"}:
            old.unlink()
    for name, text in pages.items():
        page = folder / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
    for plot in RESULTS.glob("*.png"):
        shutil.copyfile(plot, folder / plot.name)


def index_page(slugs: list[str], rooms: list[str]) -> str:
    lines = [*title("Reference", "="), "Methods", "-------", "", ".. toctree::", "   :maxdepth: 1", ""]
    lines += [f"   {slug}" for slug in slugs]
    lines += ["", "Everything else", "---------------", "", ".. toctree::", "   :maxdepth: 1", ""]
    return "\n".join([*lines, *(f"   {room}" for room in rooms), ""])


def room_page(room: str, names: list[str]) -> str:
    lines = title(room, "=")
    for name in names:
        lines += directive(_catalogue.symbols()[name])
    return "\n".join(lines)


def method_page(paper: dict[str, Any]) -> str:
    """When to use a method, its status, its names with their docstrings, and its evidence."""
    doubt = "" if paper["arxiv_certain"] else " (id not certain)"
    lines = [
        *title(paper["slug"], "="),
        f"Paper {paper['number']}: *{escape(paper['title'])}*, "
        f"`arXiv {paper['arxiv']} <https://arxiv.org/abs/{paper['arxiv']}>`__{doubt}.",
        "",
        escape(paper["when"]),
        "",
        f":Golden values: {golden(paper)}",
        f":Evidence: {verdict(paper)}",
    ]
    if paper["planned"]:
        lines.append(f":To come: {', '.join(f'``{name}``' for name in paper['planned'])}")
    lines += ["", *title("Use", "-")]
    for name in paper["symbols"]:
        lines += directive(_catalogue.symbols()[name])
    lines += [*title("Evidence", "-"), *evidence_section(paper)]
    return "\n".join(lines)


def directive(symbol: dict[str, Any]) -> list[str]:
    """The autodoc directive of a public name, and the ranges in which its hyper-parameters are searched."""
    lines = [f".. auto{symbol['kind']}:: {symbol['path']}"]
    if symbol["kind"] == "class":
        lines.append("   :members:")
    if symbol["space"] and symbol["kind"] == "class":
        ranges = ", ".join(f"``{name}`` in ``{space}``" for name, space in symbol["space"].items())
        lines += ["", f"   Searched by ``telos compare``: {ranges}."]
    return [*lines, ""]


def golden(paper: dict[str, Any]) -> str:
    return f"equal to {paper['golden_cases']} recorded cases" if paper["golden"] else "none recorded"


def verdict(paper: dict[str, Any]) -> str:
    evidence = paper["evidence"]
    if evidence is None:
        return "no study yet"
    if evidence["verdict"] is None:
        return "not run yet"
    stale = " (stale: the study changed after this result)" if evidence["stale"] else ""
    return f"**{evidence['verdict']}**{stale}"


def evidence_section(paper: dict[str, Any]) -> list[str]:
    evidence = paper["evidence"]
    if evidence is None:
        return ["No study yet.", ""]
    lines = []
    for key in ("claim", "protocol", "decision", "pilot"):
        lines += [f"**{key.capitalize()}.** {escape(' '.join(evidence[key].split()))}", ""]
    lines += [f"Run it yourself: ``telos verify {paper['slug']}``.", ""]
    if evidence["verdict"] is None:
        return lines
    versions = ", ".join(f"{name} {number}" for name, number in evidence["versions"].items())
    lines += [
        f"**{evidence['verdict']}**: {escape(evidence['reason'])}. {len(evidence['seeds'])} seeds "
        f"({evidence['seeds'][0]} to {evidence['seeds'][-1]}), budget {evidence['budget']}, "
        f"{evidence['wall_time']:.0f} s, {versions}.",
        "",
        *table(
            ["effect", "must exceed", "mean", "lower", "upper", "verdict"],
            [
                [
                    escape(effect["description"]) + ("" if effect["required"] else " *(reported only)*"),
                    *(number(effect[key]) for key in ("threshold", "mean", "lower", "upper")),
                    effect["verdict"],
                ]
                for effect in evidence["effects"]
            ],
        ),
        "Lower and upper are one-sided 95 % bounds of the mean over seeds, from Student's t.",
        "",
    ]
    if (RESULTS / f"{paper['slug']}.png").exists():
        lines += [f".. image:: {paper['slug']}.png", f"   :alt: the effects of {paper['slug']} by seed", ""]
    return lines


def evidence_table() -> str:
    """The table of ``evidence.md``, in reStructuredText."""
    rows = [
        [
            f":doc:`{paper['slug']} </reference/{paper['slug']}>`" if paper["implemented"] else paper["slug"],
            escape(" ".join(paper["evidence"]["claim"].split())),
            verdict(paper),
            escape(paper["evidence"]["reason"] or ""),
            str(len(paper["evidence"]["seeds"] or ())),
        ]
        for paper in _catalogue.papers()
        if paper["evidence"]
    ]
    return "\n".join(table(["method", "claim tested", "verdict", "because", "seeds"], rows))


def title(text: str, line: str) -> list[str]:
    return [text, line * len(text), ""]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A list-table, whose cells may be of any length."""
    if not rows:
        return ["Nothing yet.", ""]
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [head, *rows]:
        lines += [f"   {'* -' if position == 0 else '  -'} {cell}" for position, cell in enumerate(row)]
    return [*lines, ""]


def number(value: float | None) -> str:
    return "--" if value is None else f"{value:.4g}"


def escape(text: str) -> str:
    """Plain text in reStructuredText: no character marks anything up."""
    for mark in "\\*`|_":
        text = text.replace(mark, "\\" + mark)
    return text
