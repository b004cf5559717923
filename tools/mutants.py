"""Plant faults in the losses, one at a time, and count how many the test suite catches.

    python tools/mutants.py                      every fault in every loss file
    python tools/mutants.py --most 60 --seed 1   a random sample of them
    python tools/mutants.py --only comp_sum      the faults of one file

Five kinds of fault, those that a careless edit makes: a flipped sign, a dropped maximum shift, a mean for a sum (or
the reverse), a detached input, labels shifted by one. Each is planted in a copy of the source, and the tests of that
file, its golden cases and its conformance checks run against the copy until one fails. Survivors are listed: a fault
that changes nothing (an equivalent mutant) survives too, so the figure is a lower bound.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOSSES = ROOT / "src" / "telos" / "losses"
INPUTS = ("logits", "adversarial_logits", "z1", "z2", "embeddings", "weight", "prediction", "margins")
SUPPORT = ("__init__.py", "_checks.py", "_space.py", "_task.py")


@dataclass(frozen=True)
class Mutant:
    """One fault: where it is and what it does."""

    file: str
    line: int
    kind: str
    what: str
    source: str

    @property
    def title(self) -> str:
        """The fault in a line."""
        return f"{self.file}:{self.line} [{self.kind}] {self.what}"


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Every fault that can be planted in one file."""
    tree = ast.parse(path.read_text())
    nodes = [node for function in functions(tree) for node in ast.walk(function)]
    for position, candidate in enumerate(nodes):
        if not isinstance(candidate, ast.BinOp | ast.UnaryOp | ast.Call):
            continue
        if plant(copy.deepcopy(candidate)) is None:
            continue
        twin = copy.deepcopy(tree)
        node = [n for function in functions(twin) for n in ast.walk(function)][position]
        before = ast.unparse(node).splitlines()[0][:80] if isinstance(node, ast.expr) else ""
        kind = plant(node)
        if kind:
            after = ast.unparse(node).splitlines()[0][:80]
            yield Mutant(name_of(path), node.lineno, kind, f"{before} -> {after}", ast.unparse(twin))
    for position, function in enumerate(functions(tree)):
        arguments = [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
        for name in arguments:
            for kind, statement in faults_of_argument(name, arguments):
                twin = copy.deepcopy(tree)
                body = functions(twin)[position].body
                start = 1 if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) else 0
                body[start:start] = ast.parse(statement).body
                what = f"{function.name}: {statement}"
                yield Mutant(
                    name_of(path), function.lineno, kind, what, ast.unparse(ast.fix_missing_locations(twin))
                )


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """The functions that compute: no checks, no constructors, no printing."""
    skipped = ("check", "_check", "__init__", "extra_repr", "from_task", "__post_init__")
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and not n.name.startswith(skipped)]
    found = [f for f in found if not isinstance(f.body[-1], ast.Raise)]  # abstract: nothing is computed
    # a function inside another is walked with it
    inner = {id(n) for f in found for n in ast.walk(f) if n is not f and isinstance(n, ast.FunctionDef)}
    return [f for f in found if id(f) not in inner]


def plant(node: ast.AST) -> str | None:
    """Change an expression in place; the kind of fault, or ``None`` where there is nothing to change."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        sides = (node.left, node.right)
        if any(isinstance(s, ast.List | ast.Tuple | ast.JoinedStr) for s in sides) or "shape" in ast.unparse(
            node
        ):
            return None
        node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        return "sign"
    if (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and not isinstance(node.operand, ast.Constant)
    ):
        node.op = ast.UAdd()
        return "sign"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return plant_in_call(node, node.func)
    return None


def plant_in_call(node: ast.Call, function: ast.Attribute) -> str | None:
    swap = {"mean": "sum", "sum": "mean"}
    if function.attr in swap:
        function.attr = swap[function.attr]
        return "reduction"
    if function.attr in ("log_softmax", "logsumexp"):
        owner = function.value
        on_torch = isinstance(owner, ast.Name) and owner.id in ("torch", "F")
        arguments = node.args if on_torch else [owner, *node.args]
        if len(arguments) < 2:
            return None
        values, dim = (ast.unparse(argument) for argument in arguments[:2])
        total = f"torch.log(torch.exp({values}).sum({dim}, keepdim=True))"
        naive = f"(({values}) - {total})" if function.attr == "log_softmax" else f"{total}.squeeze({dim})"
        parsed = ast.parse(naive, mode="eval").body
        # the call becomes `torch.add(<naive>, 0)`: a node cannot change its type in place
        node.func = ast.parse("torch.add", mode="eval").body
        node.args, node.keywords = [parsed, ast.Constant(0)], []
        ast.fix_missing_locations(node)
        return "shift"
    return None


def faults_of_argument(name: str, arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Statements that spoil an argument at the top of a function."""
    if name in INPUTS:
        yield "detach", f"{name} = {name}.detach()"
    if name == "target" and "logits" in arguments:
        yield "labels", "target = target if target.is_floating_point() else (target + 1) % logits.shape[-1]"
    if name in ("labels", "bag_index", "index"):
        yield "labels", f"{name} = {name} if {name} is None else {name}.roll(1)"


def name_of(path: Path) -> str:
    return path.relative_to(LOSSES).as_posix()


def tests_of(file: str) -> list[list[str]]:
    """The pytest runs that should notice a fault in this file, the likeliest first."""
    own = ROOT / "tests" / "losses" / Path(file).parent / f"test_{Path(file).stem.lstrip('_')}.py"
    contracts = "tests/conformance/test_contracts.py"
    first = [[str(own)]] if own.exists() else []
    if Path(file).name.startswith("_"):  # shared by all losses
        return [*first, ["tests/golden"], [contracts, "-k", "not compiles"]]
    tree = ast.parse((LOSSES / file).read_text())
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"]
    return [*first, ["tests/golden"], [contracts, "-k", f"({' or '.join(names)}) and not compiles"]]


def is_caught(mutant: Mutant, timeout: int) -> bool:
    """Whether some test fails on the copy that holds the fault."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src", Path(folder) / "src")
        (Path(folder) / "src" / "telos" / "losses" / mutant.file).write_text(mutant.source)
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(folder) / "src"),
            "TELOS_TYPECHECK": "0",
            "OMP_NUM_THREADS": "1",
        }
        for tests in tests_of(mutant.file):
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
            try:
                done = subprocess.run(
                    [*command, *tests], cwd=ROOT, env=environment, capture_output=True, timeout=timeout
                )
            except subprocess.TimeoutExpired:
                return True  # an endless loop is noticed
            if done.returncode not in (0, 5):
                return True
    return False


def main() -> None:
    """Plant, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=None, help="sample this many faults")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="", help="only files whose path contains this")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--timeout", type=int, default=300, help="seconds after which a fault counts as noticed"
    )
    parser.add_argument("--json", type=Path, default=None, help="write the outcome here")
    options = parser.parse_args()
    # what all losses share comes last: its faults take the longest
    files = sorted(LOSSES.rglob("*.py"), key=lambda path: (path.name.startswith("_"), path))
    files = [path for path in files if path.name not in SUPPORT and options.only in name_of(path)]
    faults = [mutant for path in files for mutant in mutants_of(path)]
    population = len(faults)
    if options.most is not None and options.most < population:
        faults = random.Random(options.seed).sample(faults, options.most)
    print(f"{len(faults)} faults of {population} in {len(files)} files", flush=True)
    caught = [False] * len(faults)
    with ThreadPoolExecutor(options.processes) as pool:
        waiting = {pool.submit(is_caught, fault, options.timeout): i for i, fault in enumerate(faults)}
        for done, future in enumerate(as_completed(waiting), 1):
            position = waiting[future]
            caught[position] = future.result()
            if not caught[position]:
                print(f"  survived: {faults[position].title}", flush=True)
            if done % 10 == 0:
                print(f"  {done}/{len(faults)}: {sum(caught)} caught", flush=True)
    total, found = (
        Counter(f.kind for f in faults),
        Counter(f.kind for f, c in zip(faults, caught, strict=True) if c),
    )
    for kind in total:
        print(f"{kind:>10}: {found[kind]} of {total[kind]} caught")
    print(f"caught {sum(caught)} of {len(faults)} ({100 * sum(caught) / max(len(faults), 1):.0f} %)")
    survivors = [fault for fault, c in zip(faults, caught, strict=True) if not c]
    if options.json:
        rows = [{k: v for k, v in asdict(fault).items() if k != "source"} for fault in survivors]
        options.json.write_text(
            json.dumps({"planted": len(faults), "caught": sum(caught), "survivors": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
