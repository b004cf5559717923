"""Triplet margin loss over all triplets: telos against pytorch-metric-learning, forward and backward.

    python benchmarks/triplets.py [--rounds 9] [--threads 1] [--out benchmarks/results/triplets.json]

Both run interleaved in one process on the same embeddings (labels i mod 8, margin 0.05, D = 64); reported are the
medians of the rounds, and the median and quartiles of the ratio within a round. Larger batches, up to N = 4096,
run with telos alone. Peak memory is the growth of the resident set in a process of its own. Without
pytorch-metric-learning (``pip install pytorch-metric-learning``) only the side of telos runs.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from telos.losses.metric.triplet import triplet_margin_loss

DIM, CLASSES, MARGIN, GOAL = 64, 8, 0.05, 20.0
COMPARED = [96, 192, 384]
ALONE = [384, 1024, 2048, 4096]
Loss = Callable[[Tensor, Tensor], Tensor]


def telos_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    return triplet_margin_loss(embeddings, labels, margin=MARGIN)


def peer_loss() -> Loss | None:
    try:
        from pytorch_metric_learning.losses import TripletMarginLoss
    except ImportError:
        return None
    return TripletMarginLoss(margin=MARGIN)


def problem(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, DIM, generator=generator, requires_grad=True), torch.arange(size) % CLASSES


def step(loss: Loss, embeddings: Tensor, labels: Tensor) -> tuple[float, float, Tensor]:
    """Seconds, value and gradient of one forward and backward."""
    embeddings.grad = None
    start = time.perf_counter()
    value = loss(embeddings, labels)
    value.backward()
    seconds = time.perf_counter() - start
    assert embeddings.grad is not None
    return seconds, value.item(), embeddings.grad


def compare(size: int, peer: Loss, rounds: int) -> dict[str, object]:
    embeddings, labels = problem(size)
    _, value, slope = step(telos_loss, embeddings, labels)
    _, peer_value, peer_slope = step(peer, embeddings, labels)
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(step(peer, embeddings, labels)[0])
        ours.append(step(telos_loss, embeddings, labels)[0])
    low, middle, high = statistics.quantiles([b / a for a, b in zip(ours, theirs, strict=True)], n=4)
    return {
        "N": size,
        "triplets": size * (size // CLASSES - 1) * (size - size // CLASSES),
        "telos_seconds": statistics.median(ours),
        "peer_seconds": statistics.median(theirs),
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "value_difference": abs(value - peer_value),
        "gradient_difference": (slope - peer_slope).abs().max().item(),
    }


def alone(size: int, rounds: int) -> dict[str, object]:
    embeddings, labels = problem(size)
    step(telos_loss, embeddings, labels)
    times = [step(telos_loss, embeddings, labels)[0] for _ in range(rounds)]
    low, middle, high = statistics.quantiles(times, n=4)
    return {"N": size, "telos_seconds": middle, "telos_seconds_quartiles": [low, high]}


def peak_memory(name: str, size: int) -> float | None:
    """MiB by which one forward and backward raises the resident set of a fresh process."""
    command = [sys.executable, __file__, "--memory-of", name, str(size)]
    result = subprocess.run(command, capture_output=True, text=True)
    return float(result.stdout) if result.returncode == 0 else None


def resident_peak() -> float:
    """MiB; from /proc where there is one, for getrusage counts what the parent held before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def report_memory(name: str, size: int) -> None:
    loss = telos_loss if name == "telos" else peer_loss()
    assert loss is not None
    step(loss, *problem(16))
    before = resident_peak()
    step(loss, *problem(size))
    print(resident_peak() - before)


def best_of(action: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def machine_rates() -> dict[str, float]:
    """Flops per second of a float64 product and bytes per second of a copy, both measured here."""
    square, source = torch.randn(1024, 1024, dtype=torch.float64), torch.ones(2**24, dtype=torch.float64)
    target = torch.empty_like(source)
    return {
        "flops_per_second": 2 * 1024**3 / best_of(lambda: square @ square),
        "bytes_per_second": 2 * 8 * 2**24 / best_of(lambda: target.copy_(source)),
    }


def floor_seconds(size: int, rates: dict[str, float]) -> float:
    """What no implementation with a float64 distance matrix goes below.

    One product forward and one backward (2 N^2 D flops each); the distances and the counts written once and read
    once (4 * 8 N^2 bytes). The searches are not in it.
    """
    return 4 * size**2 * DIM / rates["flops_per_second"] + 32 * size**2 / rates["bytes_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "triplets.json")
    parser.add_argument("--memory-of", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        report_memory(options.memory_of[0], int(options.memory_of[1]))
        return

    peer, rates = peer_loss(), machine_rates()
    compared = []
    if peer is None:
        print(
            "pytorch-metric-learning is not installed (pip install pytorch-metric-learning): telos runs alone"
        )
    else:
        for size in COMPARED:
            row = compare(size, peer, options.rounds)
            row["telos_MiB"], row["peer_MiB"] = peak_memory("telos", size), peak_memory("peer", size)
            compared.append(row)
            low, high = row["ratio_quartiles"]  # type: ignore[misc]
            print(
                f"N={size:5d}  telos {1e3 * row['telos_seconds']:8.2f} ms  peer {1e3 * row['peer_seconds']:9.2f} ms  "  # type: ignore[operator]
                f"ratio {row['ratio']:6.1f} ({low:.1f} to {high:.1f})  difference {row['value_difference']:.1e}"
            )
        print(f"goal at N={COMPARED[-1]}: ratio of at least {GOAL:.0f}, got {compared[-1]['ratio']:.1f}")
    larger = []
    for size in ALONE:
        row = alone(size, 3 if size > 1024 else options.rounds)
        row["telos_MiB"], row["floor_seconds"] = peak_memory("telos", size), floor_seconds(size, rates)
        larger.append(row)
        memory = "unknown" if row["telos_MiB"] is None else f"{row['telos_MiB']:.0f} MiB"
        print(
            f"N={size:5d}  telos {1e3 * row['telos_seconds']:8.2f} ms  "  # type: ignore[operator]
            f"floor {1e3 * row['floor_seconds']:8.2f} ms  peak memory {memory}"  # type: ignore[operator]
        )
    result = {
        "what": f"triplet margin loss, all triplets, forward and backward, D={DIM}, {CLASSES} classes, float32, CPU",
        "goal": {"N": COMPARED[-1], "ratio": GOAL},
        "compared": compared,
        "telos_alone": larger,
        "machine": {"processor": platform.machine(), "threads": options.threads, **rates},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pytorch-metric-learning": None if peer is None else metadata.version("pytorch-metric-learning"),
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
