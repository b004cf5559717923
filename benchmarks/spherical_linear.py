"""One training step of an output layer by the number of classes: the factored layer against the full softmax.

    python -m benchmarks.spherical_linear

All contenders turn inputs of 300 features, in the authors' batch of 200, into the gradient of the inputs and a step of
plain SGD on the weights, in float32. ``SphericalLinear`` trains with the Z-loss; the full softmax with cross-entropy,
by ``linear_loss`` (no logits) and eagerly (with logits), both on the same weights, changed in place. The seconds of the
factored layer are the mean over 100 steps, with the look at U that falls due once in 100; it takes so little of each
round that the others still meet the same load.

The floor is what the products of the factored step take in float64 at the rate of large products measured here, or the
rows it must move; ``softmax_floor_seconds`` is the same of the three products of the softmax in float32.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._rounds import (
    counted_peak,
    curves,
    destination,
    floor_seconds,
    goal,
    interleaved,
    machine,
    machine_rates,
    parser,
    plot,
    ratio,
    shown,
    spread,
    write,
)
from telos.losses import CrossEntropyLoss, linear_loss
from telos.nn.spherical import SphericalLinear

FEATURES, BATCH, RATE, STEPS, BATCHES = 300, 200, 0.1, 100, 16
# the paper's vocabulary is the third
CLASSES, QUICK = [10_000, 100_000, 793_471, 1_000_000], [1_000, 10_000]
TELOS, FUSED, EAGER = "SphericalLinear", "softmax, linear_loss", "softmax, eager"
SPEEDUP = 40.0
Batch = tuple[Tensor, Tensor]
Contenders = dict[str, Callable[[], object]]


def batches(classes: int, device: str) -> Iterator[Batch]:
    """For ever the same few, with targets from all over the classes."""
    if device == "meta":
        empty = torch.empty(BATCH, FEATURES, device=device)
        return cycle([(empty.requires_grad_(), torch.empty(BATCH, dtype=torch.long, device=device))])
    generator = torch.Generator().manual_seed(classes)
    return cycle(
        [
            (
                torch.randn(BATCH, FEATURES, generator=generator).requires_grad_(),
                torch.randint(classes, (BATCH,), generator=generator),
            )
            for _ in range(BATCHES)
        ]
    )


def factored(classes: int, steps: int, device: str = "cpu") -> tuple[Tensor, Contenders]:
    """The rows of the layer, and ``steps`` of its steps."""
    generator = None if device == "meta" else torch.Generator().manual_seed(0)
    layer = SphericalLinear(FEATURES, classes, bias=False, device=device, generator=generator)
    # as in the middle of a run: the next look is due after a hundred steps
    layer.set_extra_state(torch.tensor([0.0, 0.0, float("inf")]))
    turn = batches(classes, device)

    def run() -> None:
        for _ in range(steps):
            hidden, target = next(turn)
            hidden.grad = None
            layer(hidden, target).backward()
            layer.step(RATE)

    return layer.V, {TELOS: run}


def softmax(classes: int, device: str = "cpu") -> tuple[Tensor, Contenders]:
    """The weights of the dense layer, and a step by two ways to the same gradients."""
    weight = torch.empty(classes, FEATURES, device=device)
    if device != "meta":
        weight.uniform_(-(FEATURES**-0.5), FEATURES**-0.5, generator=torch.Generator().manual_seed(0))
    weight.requires_grad_()
    loss, turn = CrossEntropyLoss(), batches(classes, device)

    def step(value: Callable[[Tensor, Tensor], Tensor]) -> None:
        hidden, target = next(turn)
        hidden.grad = weight.grad = None
        value(hidden, target).backward()
        with torch.no_grad():
            weight.sub_(weight.grad, alpha=RATE)  # type: ignore[arg-type]
        weight.grad = None

    return weight.detach(), {
        FUSED: lambda: step(lambda hidden, target: linear_loss(hidden, weight, target, loss)),
        EAGER: lambda: step(lambda hidden, target: F.cross_entropy(hidden @ weight.T, target)),
    }


def floors(classes: int, rates: Mapping[str, float]) -> tuple[float, float]:
    """Of the factored step and of the softmax.

    With m examples and d features the factored step cannot do without ten products of m d^2 (two for the statistics, one
    for the gradient of the inputs, one for U, two for its inverse, one for the rows of V, three for Q), four of m^2 d
    (two for the m x m system, two for Q) and one factoring.
    """
    m, d = BATCH, FEATURES
    flops = 10 * 2 * m * d * d + 4 * 2 * m * m * d + 2 * m**3 / 3
    own = floor_seconds(flops, 2 * 4 * m * d, rates, "float64")
    return own, floor_seconds(3 * 2 * m * d * classes, 2 * 4 * classes * d, rates)


def memory(classes: int) -> dict[str, float]:
    """MiB that one step takes beside weights and inputs, counted."""
    return {
        name: counted_peak(step)
        for _, ways in (factored(classes, 1, "meta"), softmax(classes, "meta"))
        for name, step in ways.items()
    }


def case(classes: int, steps: int, rounds: int, rates: Mapping[str, float]) -> dict[str, Any]:
    times = interleaved({**factored(classes, steps)[1], **softmax(classes)[1]}, rounds)
    times[TELOS] = [taken / steps for taken in times[TELOS]]
    own_floor, softmax_floor = floors(classes, rates)
    return {
        "case": f"C = {classes:,}",
        "sizes": {"C": classes, "N": BATCH, "D": FEATURES},
        "seconds": times,
        "floor_seconds": own_floor,
        "softmax_floor_seconds": softmax_floor,
        "memory_MiB": memory(classes),
        "ratios": {f"{name} / {TELOS}": ratio(times, name, TELOS) for name in (FUSED, EAGER)},
    }


def goals_of(last: Mapping[str, Any]) -> list[dict[str, object]]:
    """The paper's speed against the softmax, at the largest number of classes."""
    return [
        goal(f"SphericalLinear, {last['case']}: {name}", reached, at_least=SPEEDUP)
        for name, reached in last["ratios"].items()
    ]


def run(options: argparse.Namespace) -> None:
    rates, cases = machine_rates(options.threads), []
    for classes in QUICK if options.quick else options.classes:
        cases.append(case(classes, 5 if options.quick else STEPS, options.rounds, rates))
        for name, values in cases[-1]["seconds"].items():
            print(f"C = {classes:9,d}  {name:24s} {shown(spread(values))} s")
    path = destination(__file__, options)
    write(
        path,
        {
            "what": f"a training step of an output layer, D = {FEATURES}, batch {BATCH}, float32, CPU",
            "command": "python -m benchmarks.spherical_linear",
            "machine": machine(options.threads, []),
            "rates": rates,
            "goals": [] if options.quick else goals_of(cases[-1]),
            "cases": cases,
        },
    )
    title = f"One training step of an output layer, D = {FEATURES}, batch {BATCH}"
    plot(path.with_suffix(".svg"), title, curves(cases, "C"), "classes", "seconds")


def main() -> None:
    described = parser(__file__, __doc__, rounds=5, threads=2)
    described.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    options = described.parse_args()
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
