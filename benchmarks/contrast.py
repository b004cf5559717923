"""Contrastive losses in tiles against the dense form and other libraries, forward and backward.

    python -m benchmarks.contrast

N counts the rows of the similarity matrix, so NT-Xent has N / 2 examples of two views; SupCon has four rows a class;
D = 256, temperature 0.1, embeddings are normalised by the loss. "telos tiled" holds 1,024 rows of the matrix at a time,
"telos dense" all. At N = 32,768 only the tiled form runs, in a process of its own whose whole memory is reported.

pytorch-metric-learning's NTXentLoss takes a mask of positive pairs x negative pairs, and so only joins at N = 512:
with two rows a class, where it is the same loss, and with four, where each positive is contrasted with the negatives
alone and the loss differs (SupCon, the nearest of ours, runs beside it). Peers are the extra ``bench``.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._rounds import (
    curves,
    destination,
    floor_seconds,
    goal,
    interleaved,
    machine,
    machine_rates,
    parser,
    peak_memory,
    peer,
    plot,
    ratio,
    report_growth,
    resident_peak,
    shown,
    spread,
    write,
)
from telos.losses import info_nce_loss, ntxent_loss, supcon_loss

DIM, TEMPERATURE, TILE = 256, 0.1, 1024
SIZES, ALONE = [512, 2048, 4096, 8192], 32768
TILED, DENSE, TORCH = "telos tiled", "telos dense", "torch cross-entropy"
PML, LIGHTLY = "pytorch-metric-learning", "lightly"
GOAL, GOAL_SIZES, GOAL_MIB = 1.3, (4096, 8192), 4096.0
# of N x N x D: no implementation without approximation does with fewer; a symmetric matrix is known from its half
LEAST_PRODUCTS = {"InfoNCE": 3.0, "symmetric InfoNCE": 3.0, "NT-Xent": 1.5, "SupCon": 1.5}
PRODUCTS = {"InfoNCE": (3, 3), "symmetric InfoNCE": (4, 3), "NT-Xent": (3, 3), "SupCon": (3, 3)}
PEERS_UP_TO = {(PML, "NT-Xent"): 512}
# what its masks take at N = 512 with four rows a class, and some air
PML_FOUR_ROWS_GIB = 10
Loss = Callable[[Tensor, Tensor], Tensor]


def labels(size: int, rows_a_class: int) -> Tensor:
    return torch.arange(size) // rows_a_class


def telos(method: str, chunk_size: int | None) -> Loss:
    """Of two halves (N / 2, D) for NT-Xent and SupCon, of two views (N, D) for InfoNCE."""
    options: dict[str, Any] = {"temperature": TEMPERATURE, "chunk_size": chunk_size}
    if method == "NT-Xent":
        return lambda z1, z2: ntxent_loss(z1, z2, **options)
    if method == "SupCon":
        return lambda z1, z2: supcon_loss(torch.cat([z1, z2]), labels(2 * len(z1), 4), **options)
    return lambda z1, z2: info_nce_loss(z1, z2, symmetric=method.startswith("symmetric"), **options)


def torch_expression(symmetric: bool) -> Loss:
    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        logits = F.normalize(z1, dim=-1) @ F.normalize(z2, dim=-1).T / TEMPERATURE
        target = torch.arange(len(z1))
        one_way = F.cross_entropy(logits, target)
        return (one_way + F.cross_entropy(logits.T, target)) / 2 if symmetric else one_way

    return loss


def metric_learning(name: str, rows_a_class: int | None) -> Loss | None:
    """A loss of pytorch-metric-learning; ``None`` rows a class are two views stacked."""
    kind = peer("pytorch_metric_learning.losses", name)
    if kind is None:
        return None
    loss = kind(temperature=TEMPERATURE)

    def call(z1: Tensor, z2: Tensor) -> Tensor:
        size = 2 * len(z1)
        classes = torch.arange(size) % len(z1) if rows_a_class is None else labels(size, rows_a_class)
        return loss(torch.cat([z1, z2]), classes)

    return call


def contenders(method: str) -> dict[str, Loss]:
    """Every implementation of a method by name."""
    taking_part: dict[str, Loss | None] = {TILED: telos(method, TILE), DENSE: telos(method, None)}
    if method == "NT-Xent":
        taking_part[PML] = metric_learning("NTXentLoss", None)
        kind = peer("lightly.loss", "NTXentLoss")
        taking_part[LIGHTLY] = None if kind is None else kind(temperature=TEMPERATURE)
    elif method == "SupCon":
        taking_part[PML] = metric_learning("SupConLoss", 4)
    else:
        taking_part[TORCH] = torch_expression(method.startswith("symmetric"))
    return {name: loss for name, loss in taking_part.items() if loss is not None}


def problem(method: str, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    rows = size if "InfoNCE" in method else size // 2
    first = torch.randn(rows, DIM, generator=generator)
    second = first + torch.randn(rows, DIM, generator=generator)
    return first.requires_grad_(), second.requires_grad_()


def step(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[float, Tensor]:
    """Value, and the gradient of the first view."""
    z1.grad = z2.grad = None
    value = loss(z1, z2)
    value.backward()
    assert z1.grad is not None
    return value.item(), z1.grad


def floor(method: str, size: int, rates: Mapping[str, float]) -> float:
    """The products that the method cannot avoid; embeddings read, and their gradients written, once."""
    rows = 2 * size if "InfoNCE" in method else size
    return floor_seconds(LEAST_PRODUCTS[method] * 2 * size**2 * DIM, 2 * 4 * rows * DIM, rates)


def case(method: str, size: int, rounds: int, rates: Mapping[str, float]) -> dict[str, Any]:
    z1, z2 = problem(method, size)
    losses = {n: f for n, f in contenders(method).items() if size <= PEERS_UP_TO.get((n, method), size)}
    actions = {name: lambda loss=loss: step(loss, z1, z2) for name, loss in losses.items()}
    times = interleaved(actions, rounds)
    value, slope = actions[DENSE]()
    differences = {}
    for name, action in actions.items():
        if name != DENSE:
            other, other_slope = action()
            gradient = (slope - other_slope).abs().max() / slope.abs().max()
            differences[name] = {"value": abs(value - other), "relative_gradient": gradient.item()}
    ratios = {f"{TILED} / {name}": ratio(times, TILED, name) for name in actions if name != TILED}
    least = floor(method, size, rates)
    ratios[f"{TILED} / floor"] = spread([taken / least for taken in times[TILED]])
    return {
        "case": f"{method}, N = {size:,}",
        "sizes": {"method": method, "N": size, "D": DIM},
        "products": dict(zip((TILED, DENSE), PRODUCTS[method], strict=True)),
        "seconds": times,
        "floor_seconds": least,
        "ratios": ratios,
        "memory_MiB": {name: peak_memory(__file__, "--memory-of", method, name, size) for name in actions},
        "differences_from_dense": differences,
    }


def alone(method: str, rates: Mapping[str, float]) -> dict[str, Any]:
    """The tiled form at a size where a dense matrix alone is 4 GiB."""
    z1, z2 = problem(method, ALONE)
    times = interleaved({TILED: lambda: step(telos(method, TILE), z1, z2)}, 1, warmup=0)
    least = floor(method, ALONE, rates)
    return {
        "case": f"{method}, N = {ALONE:,}",
        "sizes": {"method": method, "N": ALONE, "D": DIM},
        "seconds": times,
        "floor_seconds": least,
        "ratios": {f"{TILED} / floor": spread([taken / least for taken in times[TILED]])},
        "process_MiB": {TILED: peak_memory(__file__, "--memory-of", method, TILED, ALONE, "--whole")},
    }


def four_rows_a_class() -> dict[str, Any] | None:
    """The published loss of the peer on more than two rows a class, at the largest size that it survives."""
    loss = metric_learning("NTXentLoss", 4)
    if loss is None:
        return None
    if available_gib() < PML_FOUR_ROWS_GIB:
        print(f"left out: NTXentLoss of {PML} with four rows a class wants {PML_FOUR_ROWS_GIB} GiB free")
        return None
    z1, z2 = problem("SupCon", 512)
    losses = {TILED: telos("SupCon", TILE), f"{PML} NTXentLoss": loss}
    times = interleaved({n: lambda f=f: step(f, z1, z2) for n, f in losses.items()}, 2, warmup=0)
    memory = {n: peak_memory(__file__, "--memory-of", "four rows", n, 512) for n in losses}
    return {
        "case": "four rows a class, N = 512",
        "sizes": {"method": "four rows", "N": 512, "D": DIM},
        "seconds": times,
        "ratios": {f"{PML} NTXentLoss / {TILED}": ratio(times, f"{PML} NTXentLoss", TILED)},
        "memory_MiB": memory,
    }


def available_gib() -> float:
    information = Path("/proc/meminfo")
    if not information.exists():
        return 0.0
    line = next(line for line in information.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) / 2**20


def report_memory(method: str, name: str, size: int, whole: bool) -> None:
    if method == "four rows":
        loss = telos("SupCon", TILE) if name == TILED else metric_learning("NTXentLoss", 4)
        method = "SupCon"
    else:
        loss = contenders(method)[name]
    assert loss is not None
    step(loss, *problem(method, 16))
    if whole:
        step(loss, *problem(method, size))
        print(resident_peak())
    else:
        report_growth(lambda: step(loss, *problem(method, size)))


def goals(cases: list[dict[str, Any]]) -> list[dict[str, object]]:
    found = []
    for row in cases:
        method, size = row["sizes"]["method"], row["sizes"]["N"]
        if size in GOAL_SIZES:
            name = f"{method}, N = {size:,}: {TILED} / {DENSE}"
            found.append(goal(name, row["ratios"][f"{TILED} / {DENSE}"], at_most=GOAL))
        if row.get("process_MiB", {}).get(TILED) is not None:
            name = f"{method}, N = {size:,}, D = {DIM}: MiB of the whole process"
            found.append(goal(name, spread([row["process_MiB"][TILED]]), at_most=GOAL_MIB))
    return found


def show(row: Mapping[str, Any]) -> None:
    for name, values in row["seconds"].items():
        memory = {**row.get("memory_MiB", {}), **row.get("process_MiB", {})}.get(name)
        held = "" if memory is None else f", {memory:.0f} MiB"
        print(f"{row['case']:32s} {name:36s} {shown(spread(values))} s{held}", flush=True)


def run(options: argparse.Namespace) -> None:
    described, rates = machine(options.threads, [PML, LIGHTLY]), machine_rates(options.threads)
    cases = []
    for method in LEAST_PRODUCTS:
        for size in SIZES[:2] if options.quick else SIZES:
            cases.append(case(method, size, options.rounds, rates))
            show(cases[-1])
    if not options.quick:
        extra = four_rows_a_class()
        for row in [
            *([] if extra is None else [extra]),
            *(alone(method, rates) for method in LEAST_PRODUCTS),
        ]:
            cases.append(row)
            show(row)
    path = destination(__file__, options)
    result = {
        "what": f"contrastive losses, D = {DIM}, {TILE} rows a tile, float32, CPU",
        "command": "python -m benchmarks.contrast",
        "machine": described,
        "rates": rates,
        "goals": goals(cases),
        "cases": cases,
    }
    write(path, result)
    for method in ("NT-Xent", "SupCon"):
        title, slug = f"{method}, forward and backward", method.lower().replace("-", "")
        own = [row for row in cases if row["sizes"]["method"] == method]
        for quantity, unit in (("seconds", "seconds"), ("memory_MiB", "MiB")):
            kind = quantity.removesuffix("_MiB")
            target = path.with_name(f"contrast_{slug}_{kind}.svg")
            plot(target, title, curves(own, "N", quantity), "rows of the similarity matrix", unit)


def main() -> None:
    described = parser(__file__, __doc__, rounds=7, threads=2)
    described.add_argument("--memory-of", nargs=3, metavar=("METHOD", "NAME", "N"), help=argparse.SUPPRESS)
    described.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options = described.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        method, name, size = options.memory_of
        report_memory(method, name, int(size), options.whole)
    else:
        run(options)


if __name__ == "__main__":
    main()
