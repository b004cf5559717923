"""Writes ``src/telos/catalogue.json`` from ``papers.toml``, the code, the golden files and the evidence.

Run ``python tools/catalogue.py`` after a change of a public name, a docstring or a result; ``--check`` says
whether the file is fresh.
"""

import argparse
import dataclasses
import hashlib
import importlib
import inspect
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "telos"
CATALOGUE = PACKAGE / "catalogue.json"
README = ROOT / "README.md"
TABLE = re.compile(r"(<!-- evidence: [^>]*-->\n).*?(<!-- /evidence -->)", re.DOTALL)
ROOMS = (
    "losses", "nn", "optim", "metrics", "data", "surgery", "online", "theory", "kernels",
    "fit", "trials", "lab", "evidence", "integrations",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes src/telos/catalogue.json.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the file is stale")
    check = parser.parse_args().check
    catalogue, remarks = build()
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    papers = catalogue["papers"]
    files = {CATALOGUE: json.dumps(catalogue, indent=1, ensure_ascii=False) + "\n"}
    if README.exists():
        table = evidence_table(papers)
        files[README] = TABLE.sub(
            lambda match: match[1] + table + match[2], README.read_text(encoding="utf-8")
        )
    for path, text in files.items():
        fresh = path.exists() and path.read_text(encoding="utf-8") == text
        if check and not fresh:
            print(f"{path.name} is stale; run: python tools/catalogue.py", file=sys.stderr)
            return 1
        if not fresh:
            path.write_text(text, encoding="utf-8")
    print(
        f"{len(papers)} papers: {sum(p['implemented'] for p in papers)} implemented, "
        f"{sum(p['golden'] for p in papers)} golden-checked, {sum(p['verdict'] is not None for p in papers)} "
        f"with a verdict; {len(catalogue['symbols'])} public names"
    )
    return 0


def build() -> tuple[dict[str, Any], list[str]]:
    """The catalogue, and what its reader should know about what is missing."""
    rows = tomllib.loads((PACKAGE / "papers.toml").read_text(encoding="utf-8"))["paper"]
    symbols = public_symbols()
    adapters = golden_adapters()
    remarks: list[str] = []
    papers = []
    for row in sorted(rows, key=lambda row: row["number"]):
        slug, names = row["slug"], row["symbols"]
        missing = [name for name in names if name not in symbols]
        remarks += [f"{slug}: {name} is not a public name" for name in missing]
        for name in names:
            if name in symbols:
                symbols[name]["paper"] = slug
        cases = golden_cases(slug)
        evidence = evidence_of(slug)
        if evidence and evidence["stale"]:
            remarks.append(f"{slug}: its result is stale; run: telos verify {slug} --record")
        papers.append(
            {
                "number": row["number"],
                "slug": slug,
                "title": row["title"],
                "arxiv": row["arxiv"],
                "arxiv_certain": row["arxiv_certain"],
                "when": row.get("when", ""),
                "implemented": bool(names) and not missing,
                "golden": cases > 0 and slug in adapters,
                "golden_cases": cases if slug in adapters else 0,
                "verdict": evidence["verdict"] if evidence else None,
                "evidence": evidence,
                "symbols": [name for name in names if name in symbols],
                "planned": row.get("planned", []) + missing,
            }
        )
    return {"papers": papers, "symbols": dict(sorted(symbols.items()))}, remarks


def public_symbols() -> dict[str, dict[str, Any]]:
    """Every name in the ``__all__`` of a room that is a function or a class of the library."""
    found: dict[str, dict[str, Any]] = {}
    for room in ROOMS:
        if not ((PACKAGE / room / "__init__.py").exists() or (PACKAGE / f"{room}.py").exists()):
            continue
        module = importlib.import_module(f"telos.{room}")
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if not inspect.isroutine(value) and not inspect.isclass(value):
                continue
            # a name that a room takes over from another is listed where it is defined
            if f"{value.__module__}.".startswith(f"telos.{room}."):
                found[f"telos.{room}.{name}"] = describe(f"telos.{room}", name, value)
    return found


def describe(room: str, name: str, value: Any) -> dict[str, Any]:
    """One public name: how to import and call it, and what its docstring says."""
    space = ranges(value)
    return {
        "name": name,
        "path": f"{room}.{name}",
        "kind": "class" if inspect.isclass(value) else "function",
        "paper": None,
        "import": f"from {room} import {name}",
        "signature": f"{name}{bare_signature(value)}",
        "defaults": defaults(value),
        "space": space,
        "doc": inspect.cleandoc(value.__doc__ or ""),
        "source": source_of(value),
    }


def bare_signature(value: Any) -> str:
    """Names and defaults without annotations, which differ between versions of Python."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    parameters = [
        parameter.replace(
            annotation=parameter.empty,
            default=parameter.empty if parameter.default is parameter.empty else _Shown(parameter.default),
        )
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def defaults(value: Any) -> dict[str, str]:
    """The default of every parameter that has one."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: repr(_Shown(p.default)) for p in parameters if p.default is not p.empty}


class _Shown:
    """A default value whose ``repr`` holds no address and no full module path."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        if inspect.isroutine(self.value) or inspect.isclass(self.value):
            return self.value.__name__
        return re.sub(r" at 0x[0-9a-f]+", "", repr(self.value))


def ranges(value: Any) -> dict[str, str]:
    """The hyper-parameter ranges of a loss class, or of the class that belongs to a loss function."""
    owner = value
    if not inspect.isclass(value):
        wanted = value.__name__.replace("_", "").lower()
        classes = [c for _, c in inspect.getmembers(sys.modules[value.__module__], inspect.isclass)]
        owner = next((c for c in classes if c.__name__.lower() == wanted), None)
    space = getattr(owner, "space", None)
    return {key: shown_range(entry) for key, entry in space.items()} if isinstance(space, dict) else {}


def shown_range(entry: Any) -> str:
    """``log_uniform(0.1, 10)`` from ``LogUniform(low=0.1, high=10.0)``."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(entry).__name__).lower()
    values = [getattr(entry, field.name) for field in dataclasses.fields(entry)]
    if len(values) == 1 and isinstance(values[0], tuple):
        values = list(values[0])
    return f"{name}({', '.join(f'{v:g}' if isinstance(v, float) else repr(v) for v in values)})"


def source_of(value: Any) -> str:
    """The file that defines it, below ``src/telos``."""
    file = inspect.getsourcefile(inspect.unwrap(value)) or sys.modules[value.__module__].__file__ or ""
    return Path(file).resolve().relative_to(PACKAGE.resolve()).as_posix()


def golden_cases(slug: str) -> int:
    """How many recorded cases the tests hold for a slug."""
    path = ROOT / "tests" / "golden" / f"{slug}.json"
    return len(json.loads(path.read_text(encoding="utf-8"))["cases"]) if path.exists() else 0


def golden_adapters() -> set[str]:
    """The slugs for which a test file defines ``golden_<slug>``."""
    pattern = re.compile(r"^def golden_(\w+)\(", re.MULTILINE)
    return {
        slug
        for path in (ROOT / "tests").rglob("test_*.py")
        for slug in pattern.findall(path.read_text(encoding="utf-8"))
    }


def evidence_of(slug: str) -> dict[str, Any] | None:
    """What the study of a slug claims and what its recorded run found."""
    source = PACKAGE / "evidence" / f"{slug}.py"
    if not source.exists():
        return None
    study = getattr(importlib.import_module(f"telos.evidence.{slug}"), "STUDY", None)
    if study is None:
        sys.exit(f"{source.name} holds no STUDY")
    recorded = PACKAGE / "evidence" / "results" / f"{slug}.json"
    result = json.loads(recorded.read_text(encoding="utf-8")) if recorded.exists() else {}
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    keep = ("verdict", "reason", "budget", "seeds", "effects", "values", "wall_time", "versions")
    return {
        "claim": study.claim,
        "protocol": study.protocol,
        "decision": study.decision,
        "pilot": study.pilot,
        **{key: result.get(key) for key in keep},
        "stale": bool(result) and result.get("source_sha256") != digest,
    }


def evidence_table(papers: list[dict[str, Any]]) -> str:
    """The README's table: what was claimed, what the recorded runs say, and what beside the claim did not show."""
    lines = ["| method | claim tested | verdict | reported beside it, and not shown |", "|---|---|---|---|"]
    for paper in papers:
        if paper["verdict"] is not None:
            stale = " (stale)" if paper["evidence"]["stale"] else ""
            cells = [
                paper["evidence"]["claim"],
                paper["verdict"] + stale,
                not_shown(paper["evidence"]["effects"]),
            ]
            row = " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells)
            lines.append(f"| `{paper['slug']}` | {row} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def not_shown(effects: list[dict[str, Any]]) -> str:
    """The effects that do not enter the verdict and did not exceed their threshold, with their means."""
    missed = [effect for effect in effects if not effect["required"] and effect["verdict"] != "REPRODUCED"]
    return "; ".join(f"{effect['description']}: {effect['mean']:+.3f}" for effect in missed)


if __name__ == "__main__":
    sys.exit(main())
