"""Writes the numbers of ``benchmarks/results/*.json`` into README.md and docs/performance.md, between their marks.

Run ``python tools/benchmarks_table.py`` after ``make bench``; ``--check`` says whether both are fresh. A number about
speed or memory stands in these two files between marks only.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUMMARY = re.compile(r"(<!-- goals in short: [^>]*-->\n).*?(<!-- /goals -->)", re.DOTALL)
GOALS = re.compile(r"(<!-- goals: [^>]*-->\n).*?(<!-- /goals -->)", re.DOTALL)
SECTION = re.compile(r"(<!-- benchmark (\w+): [^>]*-->\n).*?(<!-- /benchmark -->)", re.DOTALL)

UNRUN = "Nothing recorded yet.\n"
# more contenders than this do not stand side by side in one row
SIDE_BY_SIDE = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is stale")
    check = parser.parse_args().check
    results = recorded()
    stale = [path for path, text in pages(results).items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path.name} is stale; run: python tools/benchmarks_table.py", file=sys.stderr)
        else:
            path.write_text(pages(results)[path], encoding="utf-8")
    return 1 if check and stale else 0


def recorded() -> dict[str, dict[str, Any]]:
    """The recorded results by the name of their benchmark."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))
    }


def pages(results: Mapping[str, dict[str, Any]]) -> dict[Path, str]:
    """README.md and docs/performance.md as they should be."""
    readme, guide = ROOT / "README.md", ROOT / "docs" / "performance.md"
    guide_text = guide.read_text(encoding="utf-8")
    missing = set(results) - {match[2] for match in SECTION.finditer(guide_text)}
    if missing:
        sys.exit(f"docs/performance.md has no section for {', '.join(sorted(missing))}")
    guide_text = SECTION.sub(
        lambda match: match[1] + (section(results[match[2]]) if match[2] in results else UNRUN) + match[3],
        guide_text,
    )
    summary, goals = goals_in_short(results), goals_table(results)
    return {
        readme: SUMMARY.sub(lambda match: match[1] + summary + match[2], readme.read_text(encoding="utf-8")),
        guide: GOALS.sub(lambda match: match[1] + goals + match[2], guide_text),
    }


def bound_of(goal: Mapping[str, Any]) -> str:
    return f"at most {goal['at_most']:,.4g}" if "at_most" in goal else f"at least {goal['at_least']:,.4g}"


def margin(goal: Mapping[str, Any]) -> float:
    """Above 1 where the goal is met, the more the better."""
    middle = goal["reached"]["median"]
    return float(goal["at_most"] / middle if "at_most" in goal else middle / goal["at_least"])


def goals_in_short(results: Mapping[str, dict[str, Any]]) -> str:
    """Goals of one benchmark with the same bound in one row, and the least favourable of them."""
    rows = []
    for name, result in results.items():
        alike: dict[str, list[dict[str, Any]]] = {}
        for goal in result["goals"]:
            alike.setdefault(bound_of(goal), []).append(goal)
        for bound, goals in alike.items():
            worst = min(goals, key=margin)
            met = sum(goal["met"] for goal in goals)
            reached = f"{worst['name']}: {spread(worst['reached'])}"
            rows.append([f"`{name}`", bound, f"{met} of {len(goals)}", reached])
    lines = table(["benchmark", "goal", "met", "least favourable: median (quartiles)"], rows)
    return "\n".join([*lines, "", *machines(results)]) + "\n"


def goals_table(results: Mapping[str, dict[str, Any]]) -> str:
    """Every goal, and what was reached."""
    rows = [
        [goal["name"], bound_of(goal), spread(goal["reached"]), "met" if goal["met"] else "**missed**"]
        for result in results.values()
        for goal in result["goals"]
    ]
    lines = table(["what", "goal", "median (quartiles)", ""], rows)
    return "\n".join([*lines, "", *machines(results)]) + "\n"


def machines(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """What ran where."""
    where: dict[str, list[str]] = {}
    for name, result in results.items():
        if result["goals"]:
            where.setdefault(machine(result["machine"]), []).append(f"`{name}`")
    return [f"{', '.join(names)}: {described}." for described, names in where.items()]


def section(result: Mapping[str, Any]) -> str:
    """Everything that one benchmark measured."""
    lines = [f"{result['what'][0].upper()}{result['what'][1:]}; `{result['command']}`. {rates(result)}", ""]
    for cases in groups(result["cases"]):
        if 0 < len(cases[0].get("seconds", {})) <= SIDE_BY_SIDE:
            lines += [*side_by_side(cases), ""]
        else:
            lines += [line for case in cases for line in (*listed(case), "")]
    return "\n".join(lines)


def groups(cases: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Cases that have the same columns share a table."""
    grouped: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for case in cases:
        columns = [tuple(case.get(key, ())) for key in ("seconds", "ratios", "memory_MiB", "process_MiB")]
        grouped.setdefault((*columns, "floor_seconds" in case), []).append(case)
    return list(grouped.values())


def side_by_side(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row for each case; time and memory of a contender stand in one cell."""
    first = cases[0]
    names, ratios = list(first["seconds"]), list(first.get("ratios", ()))
    floor = ["floor"] if "floor_seconds" in first else []
    rows = []
    for case in cases:
        row = [case["case"], *(cost(case, name) for name in names)]
        row += [time(case["floor_seconds"])] if floor else []
        rows.append(row + [spread(case["ratios"][name]) for name in ratios])
    return table(["case", *names, *floor, *ratios], rows)


def cost(case: Mapping[str, Any], name: str) -> str:
    """Median time and peak memory of a contender, what there is of the two."""
    parts = [time(median(case["seconds"][name]))] if name in case.get("seconds", {}) else []
    if (size := case.get("memory_MiB", {}).get(name)) is not None:
        parts.append(mebibytes(size))
    if (size := case.get("process_MiB", {}).get(name)) is not None:
        parts.append(f"{mebibytes(size)} (whole process)")
    return ", ".join(parts)


def listed(case: Mapping[str, Any]) -> list[str]:
    """A row for each ratio of a case with many contenders, the largest first; then those that are in no ratio."""
    rows, shown = [], set()
    for what, reached in sorted(case["ratios"].items(), key=lambda item: -item[1]["median"]):
        own, _, reference = what.partition(" / ")
        shown |= {own, reference}
        rows.append([what, spread(reached), cost(case, own), cost(case, reference)])
    names = case.get("seconds", case.get("memory_MiB", {}))
    rows += [[name, "", cost(case, name), ""] for name in names if name not in shown]
    if "floor_seconds" in case:
        rows.append(["floor", "", time(case["floor_seconds"]), ""])
    lines = table(["ratio", "median (quartiles)", "of the first", "of the second"], rows)
    return [f"{case['case'][0].upper()}{case['case'][1:]}:", "", *lines]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def machine(described: Mapping[str, Any]) -> str:
    """The processor, or the GPU, the threads and the versions that were compared."""
    where = described.get("gpu") or f"{described['processor']}, {described['threads']} thread(s)"
    versions = {"torch": described["torch"], **described["peers"]}
    return f"{where}; {', '.join(f'{name} {version}' for name, version in versions.items())}"


def rates(result: Mapping[str, Any]) -> str:
    """What the floor rests on."""
    measured = result.get("rates", {})
    parts = [
        f"{name} products at {measured[f'{name}_flops_per_second'] / 1e9:.3g} Gflop/s"
        for name in ("bfloat16", "float32", "float64")
        if f"{name}_flops_per_second" in measured
    ]
    if "bytes_per_second" in measured:
        parts.append(f"copies at {measured['bytes_per_second'] / 1e9:.3g} GB/s")
    load = result["machine"].get("load_average")
    loaded = f" (load average before the run {load:g})" if load is not None else ""
    return f"{machine(result['machine'])}{loaded}" + (f"; {', '.join(parts)}." if parts else ".")


def spread(reached: Mapping[str, float]) -> str:
    if reached["low"] == reached["high"]:
        return f"{reached['median']:.3g}"
    return f"{reached['median']:.3g} ({reached['low']:.3g} to {reached['high']:.3g})"


def time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def mebibytes(size: float | None) -> str:
    return "" if size is None else f"{size:.3g} MiB" if size < 1000 else f"{size / 1024:.3g} GiB"


if __name__ == "__main__":
    sys.exit(main())
