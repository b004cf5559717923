"""Every benchmark in turn, then one table of ratios with their spreads, and the goals.

    python -m benchmarks [--quick] [NAME ...]

Each runs in a process of its own. Those for a GPU (``*_cuda``) are left out with one line where there is none.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._rounds import RESULTS, ROOT, shown

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def folder(quick: bool) -> Path:
    return ROOT / "runs" / "benchmarks" if quick else RESULTS


def report(results: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of the closing table: ratios of each case (below 1 the first is faster), then the goals."""
    lines = []
    for name, result in results.items():
        lines += ["", f"{name}: {result['what']}"]
        for case in result["cases"]:
            if case.get("ratios"):
                lines.append(f"  {case['case']}")
                lines += [f"    {what:74s} {shown(reached)}" for what, reached in case["ratios"].items()]
    goals = [goal for result in results.values() for goal in result["goals"]]
    if goals:
        lines += ["", "goals (median over rounds, quartiles)"]
        for goal in goals:
            bound = (
                f"at most {goal['at_most']:.4g}" if "at_most" in goal else f"at least {goal['at_least']:.4g}"
            )
            verdict = "met   " if goal["met"] else "MISSED"
            lines.append(f"  {verdict} {bound:14s} {shown(goal['reached']):28s} {goal['name']}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small sizes; results go to runs/benchmarks")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(NAMES))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")

    results, failed = {}, []
    for name in options.names or NAMES:
        if name.endswith("_cuda") and not torch.cuda.is_available():
            print(f"== {name}: left out, there is no CUDA device")
            continue
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if options.quick else [])]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            failed.append(name)
            continue
        print(f"== {name}: {time.perf_counter() - start:.0f} s")
        results[name] = json.loads((folder(options.quick) / f"{name}.json").read_text(encoding="utf-8"))
    print("\n".join(report(results)))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
