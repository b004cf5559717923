"""Loss and output layer together: telos against eager torch and ``torch.nn.functional.linear_cross_entropy``.

``python benchmarks/linear_loss.py --rows 2048 --dim 512 --classes 50257 --threads 2 --repeats 3``

One process; in each round every contender takes one forward and backward, in an order that rotates, so that load on
the machine meets all of them. Reported are medians, and the median over rounds of the ratio to a reference that ran
in the same round: for cross-entropy the faster of eager and torch's chunked path, for another loss its own eager form
and telos's cross-entropy. The floor is what three products of N x D x C take at the rate measured here.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses.classification import CrossEntropyLoss, FocalLoss, GCELoss, LDRKLLoss, ZLoss
from telos.losses.linear import linear_loss

LOSSES = {
    "cross_entropy": CrossEntropyLoss(),
    "gce": GCELoss(),
    "z_loss": ZLoss(),
    "focal": FocalLoss(),
    "ldr_kl": LDRKLLoss(),
}


def seconds(loss: Callable[[], Tensor], *leaves: Tensor) -> float:
    for leaf in leaves:
        leaf.grad = None
    start = time.perf_counter()
    loss().backward()
    return time.perf_counter() - start


def products(x: Tensor, weight: Tensor) -> float:
    """Three products of a chunk's size, scaled to all rows."""
    rows = min(160, x.shape[0])
    part, logits = x[:rows].detach(), x.new_empty(rows, weight.shape[0])
    matrix, gradient = weight.detach(), torch.zeros_like(weight)
    start = time.perf_counter()
    torch.mm(part, matrix.t(), out=logits)
    torch.mm(logits, matrix)
    gradient.addmm_(logits.t(), part)
    return (time.perf_counter() - start) * x.shape[0] / rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 2048), ("dim", 512), ("classes", 50257), ("threads", 2), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--losses", nargs="*", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument(
        "--no-eager", action="store_true", help="leave out the eager form of the other losses"
    )
    parser.add_argument("--note", default="", help="kept with the results, such as the load of the machine")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "linear_loss.json")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.rows, options.dim, generator=generator).requires_grad_()
    weight = (
        torch.randn(options.classes, options.dim, generator=generator) / options.dim**0.5
    ).requires_grad_()
    target = torch.randint(options.classes, (options.rows,), generator=generator)

    contenders: dict[str, Callable[[], Tensor]] = {
        "eager cross_entropy": lambda: F.cross_entropy(x @ weight.T, target)
    }
    if hasattr(F, "linear_cross_entropy"):
        chunked = torch.nn.LinearCrossEntropyOptions()
        contenders["torch linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            x, weight, target, options=chunked
        )
    for name in options.losses:
        loss = LOSSES[name]
        contenders[f"telos {name}"] = lambda loss=loss: linear_loss(x, weight, target, loss)
        if name != "cross_entropy" and not options.no_eager:
            contenders[f"eager {name}"] = lambda loss=loss: loss(x @ weight.T, target)

    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in ["floor", *names]}
    load = [os.getloadavg()[0]]
    for round_ in range(options.repeats + 1):
        shift = round_ % len(names)
        taken = {name: seconds(contenders[name], x, weight) for name in names[shift:] + names[:shift]}
        taken["floor"] = products(x, weight)
        if round_:  # the first round warms up
            for name, value in taken.items():
                times[name].append(value)
    load.append(os.getloadavg()[0])

    def ratio(name: str, *references: str) -> float:
        return statistics.median(
            own / min(others)
            for own, *others in zip(times[name], *(times[other] for other in references), strict=True)
        )

    peers = [name for name in ("eager cross_entropy", "torch linear_cross_entropy") if name in times]
    ratios = {}
    for name in names:
        if name.startswith("telos"):
            ratios[f"{name} / best of torch cross-entropy"] = ratio(name, *peers)
            eager = name.replace("telos", "eager")
            if eager in times:
                ratios[f"{name} / {eager}"] = ratio(name, eager)
            ratios[f"{name} / floor"] = ratio(name, "floor")
    for name, values in times.items():
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{name:32s} {statistics.median(values):8.3f} s   ({spread})")
    for name, value in ratios.items():
        print(f"{name:64s} {value:6.2f}")

    sizes = {name: getattr(options, name) for name in ("rows", "dim", "classes", "threads", "repeats")}
    result = {
        "sizes": {**sizes, "dtype": "float32", "device": "cpu"},
        "note": options.note,
        "load_average": load,
        "torch": torch.__version__,
        "processor": platform.machine(),
        "seconds": times,
        "ratios": ratios,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
