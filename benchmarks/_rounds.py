"""What every benchmark needs: interleaved rounds, ratios with spreads, the machine's own rates, memory, files, plots.

A benchmark runs as ``python -m benchmarks.<name>``, takes the options of :func:`parser`, and writes one file (and a
plot of cost against size beside it) with the keys

- ``what``: one sentence; ``command``: how to repeat it; ``machine``: :func:`machine`; ``rates``: :func:`machine_rates`
- ``cases``: a list of ``{"case": str, "sizes": {...}, "seconds": {name: [...]}, "ratios": {name: {median, low,
  high}}, "memory_MiB": {name: float}, "floor_seconds": float}``; only ``case`` and ``sizes`` are in all of them;
  a ratio is named "own / reference"
- ``goals``: a list of :func:`goal`
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("pytorch-metric-learning", "lightly", "liger-kernel", "cut-cross-entropy", "triton", "numba")
MATMUL_SIZE = 2048
COPY_BYTES = 2**27

# Okabe and Ito's palette: told apart with every common kind of colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def parser(script: str, documentation: str | None, *, rounds: int, threads: int) -> argparse.ArgumentParser:
    """The options that every benchmark takes: ``--rounds``, ``--threads``, ``--quick`` and ``--folder``.

    Args:
        script: ``__file__`` of the benchmark.
        documentation: its ``__doc__``, of which the first line is shown.
        rounds: default number of rounds.
        threads: default number of threads.
    """
    described = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{Path(script).stem}", description=(documentation or "").partition("\n")[0]
    )
    described.add_argument("--rounds", type=int, default=rounds)
    described.add_argument("--threads", type=int, default=threads)
    described.add_argument("--quick", action="store_true", help="small sizes; results go to runs/benchmarks")
    described.add_argument("--folder", type=Path, help="where results and plot are written")
    return described


def destination(script: str, options: argparse.Namespace) -> Path:
    """The JSON file to write: recorded results are in ``benchmarks/results``, quick ones never are."""
    folder = options.folder or (ROOT / "runs" / "benchmarks" if options.quick else RESULTS)
    return folder / f"{Path(script).stem}.json"


def seconds(action: Callable[[], object]) -> float:
    """Seconds of one call; the queue of a GPU in use is empty before and after it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    start = time.perf_counter()
    kept = action()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    del kept  # freed outside the timed part
    return elapsed


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call: every contender once a round, the order rotated by one place from round to round.

    Load that comes and goes on the machine so meets all of them, and a ratio within a round is fair.
    """
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = shown = time.perf_counter()
    for round_ in range(warmup + rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            taken = seconds(contenders[name])
            if round_ >= warmup:
                times[name].append(taken)
            now = time.perf_counter()
            if sys.stderr.isatty() and now - shown > 2:
                shown = now
                line = f"round {round_ + 1} of {warmup + rounds}, {now - start:.0f} s, {name}"
                print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    if shown > start:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with the lower and upper quartile."""
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def ratio(times: Mapping[str, Sequence[float]], name: str, *references: str) -> dict[str, float]:
    """Time of ``name`` over the best of the references in the same round: median and quartiles over rounds."""
    rounds = zip(times[name], *(times[other] for other in references), strict=True)
    return spread([own / min(others) for own, *others in rounds])


def goal(
    name: str, reached: Mapping[str, float], *, at_most: float | None = None, at_least: float | None = None
) -> dict[str, object]:
    """A goal and whether the median reached it."""
    if (at_most is None) == (at_least is None):
        raise ValueError("goal: give either at_most or at_least")
    bound = {"at_most": at_most} if at_most is not None else {"at_least": at_least}
    middle = reached["median"]
    met = middle <= at_most if at_most is not None else middle >= (at_least or 0.0)
    return {"name": name, **bound, "reached": dict(reached), "met": met}


def best_of(action: Callable[[], object], repeats: int = 5) -> float:
    action()
    return min(seconds(action) for _ in range(repeats))


def machine_rates(threads: int, device: str = "cpu") -> dict[str, float]:
    """Flops per second of a square product in two precisions, and bytes per second of a copy, measured now.

    A copy of B bytes moves 2 B: read and written.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rates: dict[str, float] = {"matmul_size": MATMUL_SIZE, "copy_bytes": COPY_BYTES}
    for dtype in (torch.float32, torch.float64):
        left = torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device=device)
        out = torch.empty_like(left)
        taken = best_of(partial(torch.mm, left, left, out=out))
        rates[f"{str(dtype).removeprefix('torch.')}_flops_per_second"] = 2 * MATMUL_SIZE**3 / taken
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates["bytes_per_second"] = 2 * COPY_BYTES / best_of(lambda: target.copy_(source))
    torch.set_num_threads(before)
    return rates


def floor_seconds(
    flops: float, transferred: float, rates: Mapping[str, float], dtype: str = "float32"
) -> float:
    """The time no implementation goes below: arithmetic and transfers overlap, so the longer of the two.

    Args:
        flops: those of the products that the job cannot avoid.
        transferred: bytes that it must at least read and write.
        rates: from :func:`machine_rates`.
        dtype: of the products.
    """
    return max(flops / rates[f"{dtype}_flops_per_second"], transferred / rates["bytes_per_second"])


def resident_peak() -> float:
    """MiB; from /proc where there is one, for getrusage counts what the parent held before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def report_growth(action: Callable[[], object]) -> None:
    """For the process that :func:`peak_memory` starts: print the MiB by which ``action`` raises the resident set."""
    before = resident_peak()
    kept = action()
    print(resident_peak() - before)
    del kept


def peak_memory(script: str, *arguments: object) -> float | None:
    """MiB by which the resident set of a fresh process grows; the last line that the process prints.

    Args:
        script: ``__file__`` of a benchmark, started with ``arguments``, which then calls :func:`report_growth`.
        arguments: its command line.

    Returns:
        MiB, or None where the process failed (what it said goes to standard error).
    """
    command = [sys.executable, "-m", f"benchmarks.{Path(script).stem}", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode != 0:
        print(result.stderr.strip().splitlines()[-1:], file=sys.stderr)
        return None
    return float(result.stdout.strip().splitlines()[-1])


class Peak(TorchDispatchMode):
    """Counts the bytes of storages made inside the block; ``peak`` is the most that were alive at once.

    A storage from outside does not count, nor does what a view or a change in place returns of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.sizes: dict[int, int] = {}
        self.outside: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self.sizes and storage._cdata not in self.outside:
                self.outside.add(storage._cdata)
                weakref.finalize(storage, self.outside.discard, storage._cdata)
        result = func(*args, **kwargs)
        for storage in _storages(result):
            self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes and key not in self.outside:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def counted_peak(action: Callable[[], object]) -> float:
    """MiB of the tensors that ``action`` makes and that are alive together; works on the meta device too.

    Workspace that a kernel allocates for itself is not seen.
    """
    with Peak() as counted:
        kept = action()
    del kept
    return counted.peak / 2**20


@cache  # says why only once
def peer(module: str, name: str) -> Any:
    """``module.name`` of another library, or None with a line that says why it cannot be imported."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        print(f"without {module.partition('.')[0]}, which cannot be imported: {error}", file=sys.stderr)
        return None


def processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(threads: int, peers: Sequence[str] = PEERS) -> dict[str, object]:
    """What a reader must know of the machine and of the installed ``peers``; no names of hosts and no paths."""
    versions = {}
    for peer in peers:
        try:
            versions[peer] = metadata.version(peer)
        except metadata.PackageNotFoundError:
            continue
    described: dict[str, object] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": versions,
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def _rounded(value: object) -> object:
    """Five significant digits: more is noise, and makes the files long."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _layout(value: object, indent: int = 0) -> str:
    """JSON with containers of plain values on one line."""
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_layout(item, indent + 1)}" for key, item in value.items()]
        nested = any(isinstance(item, dict | list) for item in value.values())
        opening, closing = "{", "}"
    elif isinstance(value, list):
        items = [_layout(item, indent + 1) for item in value]
        nested = any(isinstance(item, dict | list) for item in value)
        opening, closing = "[", "]"
    else:
        return json.dumps(value, allow_nan=False)
    line = opening + ", ".join(items) + closing
    if not nested and len(line) + indent <= 110:
        return line
    return opening + "\n" + ",\n".join(pad + item for item in items) + "\n" + " " * indent + closing


def write(path: Path, result: Mapping[str, object]) -> None:
    """Write ``result`` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(_layout(_rounded(result)) + "\n")
    partial.replace(path)
    print(f"written to {path.name}")


def curves(
    cases: Sequence[Mapping[str, Any]], size: str, quantity: str = "seconds"
) -> dict[str, list[tuple[float, float]]]:
    """The series of :func:`plot`: medians of each contender, and the floor, over the cases that have ``size``.

    Args:
        cases: of a results file.
        size: the key of ``sizes`` on the horizontal axis.
        quantity: ``"seconds"`` or ``"memory_MiB"``.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for name, values in case.get(quantity, {}).items():
            if values is not None:
                cost = spread(values)["median"] if isinstance(values, list) else values
                series.setdefault(name, []).append((case["sizes"][size], cost))
        if quantity == "seconds" and "floor_seconds" in case:
            series.setdefault("floor", []).append((case["sizes"][size], case["floor_seconds"]))
    return series


def plot(
    path: Path,
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str = "seconds",
) -> None:
    """Cost against size on two logarithmic axes; a series whose label starts with "floor" is a dashed line.

    Args:
        path: a ``.svg`` or ``.png`` file.
        title: stands above.
        series: label -> points ``(size, cost)``.
        xlabel: of the horizontal axis, with its unit.
        ylabel: of the vertical axis, with its unit.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # fixed salt and no date: the same numbers give the same file
    with pyplot.rc_context({"svg.hashsalt": "telos", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
        drawn = 0
        for label, points in series.items():
            sizes, costs = zip(*sorted(points), strict=True)
            if label.startswith("floor"):
                axes.plot(sizes, costs, "--", color="0.4", linewidth=1, label=label)
                continue
            colour, marker = COLOURS[drawn % len(COLOURS)], MARKERS[drawn % len(MARKERS)]
            axes.plot(sizes, costs, color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
            drawn += 1
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
        axes.set_xticks(sorted({size for points in series.values() for size, _ in points}), minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        dates = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, metadata=dates, facecolor="white", dpi=120)
        pyplot.close(figure)


def shown(reached: Mapping[str, float]) -> str:
    """``median (low to high)`` with three significant digits; what has no spread (a count) is one number."""
    if reached["low"] == reached["high"]:
        return f"{reached['median']:.3g}"
    return f"{reached['median']:.3g} ({reached['low']:.3g} to {reached['high']:.3g})"
