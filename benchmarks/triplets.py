"""Triplet margin loss over all triplets of a batch: telos against pytorch-metric-learning, forward and backward.

    python -m benchmarks.triplets

Both run on the same embeddings (labels i mod 8, margin 0.05, D = 64). Above N = 384 telos runs alone: the peer lists
every triplet. Without pytorch-metric-learning (the extra ``bench``) only the side of telos runs.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
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
    shown,
    spread,
    write,
)
from telos.losses import triplet_margin_loss

DIM, CLASSES, MARGIN, GOAL = 64, 8, 0.05, 20.0
COMPARED, ALONE = [96, 192, 384], [1024, 2048, 4096]
TELOS, PEER = "telos", "pytorch-metric-learning"
Loss = Callable[[Tensor, Tensor], Tensor]


def telos_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    return triplet_margin_loss(embeddings, labels, margin=MARGIN)


def losses() -> dict[str, Loss]:
    peer_loss = peer("pytorch_metric_learning.losses", "TripletMarginLoss")
    return {TELOS: telos_loss} | ({} if peer_loss is None else {PEER: peer_loss(margin=MARGIN)})


def problem(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, DIM, generator=generator, requires_grad=True), torch.arange(size) % CLASSES


def step(loss: Loss, embeddings: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Value and gradient."""
    embeddings.grad = None
    value = loss(embeddings, labels)
    value.backward()
    assert embeddings.grad is not None
    return value.item(), embeddings.grad


def floor(size: int, rates: dict[str, float]) -> float:
    """For a float64 distance matrix: one product forward and one backward; the matrix written once and read once.

    The sorting and the searches are not in it.
    """
    return floor_seconds(4 * size**2 * DIM, 2 * 8 * size**2, rates, "float64")


def case(size: int, contenders: dict[str, Loss], rounds: int, rates: dict[str, float]) -> dict[str, Any]:
    embeddings, labels = problem(size)
    actions = {name: lambda loss=loss: step(loss, embeddings, labels) for name, loss in contenders.items()}
    times = interleaved(actions, rounds)
    row: dict[str, Any] = {
        "case": f"N = {size:,}",
        "sizes": {"N": size, "triplets": size * (size // CLASSES - 1) * (size - size // CLASSES)},
        "seconds": times,
        "floor_seconds": floor(size, rates),
        "memory_MiB": {name: peak_memory(__file__, "--memory-of", name, size) for name in contenders},
    }
    if PEER in contenders:
        row["ratios"] = {f"{PEER} / {TELOS}": ratio(times, PEER, TELOS)}
        (value, slope), (peer_value, peer_slope) = actions[TELOS](), actions[PEER]()
        row["difference"] = {
            "value": abs(value - peer_value),
            "gradient": (slope - peer_slope).abs().max().item(),
        }
    return row


def report_memory(name: str, size: int) -> None:
    loss = losses()[name]
    step(loss, *problem(16))
    report_growth(lambda: step(loss, *problem(size)))


def run(options: argparse.Namespace) -> None:
    contenders, rates = losses(), machine_rates(options.threads)
    described = machine(options.threads, [PEER])
    cases = []
    for size in (COMPARED[:1] if options.quick else COMPARED) + (ALONE[:1] if options.quick else ALONE):
        taking_part = contenders if size in COMPARED else {TELOS: telos_loss}
        cases.append(case(size, taking_part, 3 if size > 1024 else options.rounds, rates))
        for name, values in cases[-1]["seconds"].items():
            print(f"N = {size:5d}  {name:24s} {shown(spread(values))} s")
    goals = []
    if PEER in contenders and not options.quick:
        reached = next(row for row in cases if row["sizes"]["N"] == COMPARED[-1])["ratios"]
        name = f"{PEER} / {TELOS}"
        goals = [goal(f"triplet margin loss, N = {COMPARED[-1]}: {name}", reached[name], at_least=GOAL)]
    path = destination(__file__, options)
    write(
        path,
        {
            "what": f"triplet margin loss over all triplets, D = {DIM}, {CLASSES} classes, float32, CPU",
            "command": "python -m benchmarks.triplets",
            "machine": described,
            "rates": rates,
            "goals": goals,
            "cases": cases,
        },
    )
    title = "Triplet margin loss, forward and backward"
    plot(path.with_suffix(".svg"), title, curves(cases, "N"), "examples in the batch", "seconds")


def main() -> None:
    described = parser(__file__, __doc__, rounds=9, threads=1)
    described.add_argument("--memory-of", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    options = described.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        report_memory(options.memory_of[0], int(options.memory_of[1]))
    else:
        run(options)


if __name__ == "__main__":
    main()
