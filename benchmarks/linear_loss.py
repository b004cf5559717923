"""A row-wise loss fused with its output layer: telos against eager torch and ``F.linear_cross_entropy``.

    python -m benchmarks.linear_loss

Every row-wise classification loss of the library takes part, forward and backward. Cross-entropy is compared with the
faster of the two ways that torch has, eager and chunked, the other losses with the same. A smaller case compares each
loss with its own eager form, others let the number of classes grow, and ``token_logps`` stands against eager
log-softmax. Memory is counted, without data: bytes of the tensors that are alive together, less the gradients.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import telos.losses
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
from telos.losses import ClassificationLoss, LinearLoss, TaskInfo, linear_loss, misfit, token_logps

EAGER, TORCH = "eager torch", "torch linear_cross_entropy"
CROSS_ENTROPY = "CrossEntropyLoss"
ROWS, DIM, CLASSES = 2048, 512, 50257
MEMORY_ROWS = 4096
GROWING = (4096, 16384, 65536, 131072)
# losses that share a measurement of the reference
AT_ONCE = 4
AT_MOST = {"cross-entropy": 1.05, "others": 1.3, "memory": 1 / 8}


def row_losses(rows: int, dim: int, classes: int) -> tuple[dict[str, ClassificationLoss], dict[str, str]]:
    """The public losses that an output layer can be fused with, at their defaults, and why the others cannot."""
    supplies = frozenset({"index"})
    info = TaskInfo("classification", num_classes=classes, num_examples=rows, dim=dim, supplies=supplies)
    taken, refused = {}, {}
    for name in sorted(telos.losses.__all__):
        kind = getattr(telos.losses, name)
        if (
            not inspect.isclass(kind)
            or not issubclass(kind, ClassificationLoss)
            or kind is ClassificationLoss
        ):
            continue
        reason = misfit(kind, info)
        if reason is None:
            loss = kind.from_task(info)
            try:
                LinearLoss(loss)
            except (TypeError, ValueError) as error:
                reason = str(error)
        if reason is None:
            taken[name] = loss
        else:
            refused[name] = reason
    return taken, refused


class Problem:
    """Inputs of an output layer, and the ways to a loss on it."""

    def __init__(self, rows: int, dim: int, classes: int, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows, self.dim, self.classes = rows, dim, classes
        if device == "meta":
            x, weight = torch.empty(rows, dim, device=device), torch.empty(classes, dim, device=device)
            self.target = torch.empty(rows, dtype=torch.long, device=device)
        else:
            x = torch.randn(rows, dim, generator=generator)
            weight = torch.randn(classes, dim, generator=generator) / dim**0.5
            self.target = torch.randint(classes, (rows,), generator=generator)
        self.x, self.weight = x.requires_grad_(), weight.requires_grad_()
        self.index = torch.arange(rows, device=device)

    def gradients(self, loss: Callable[[], Tensor]) -> Callable[[], object]:
        """Forward and backward."""
        return lambda: torch.autograd.grad(loss(), (self.x, self.weight))

    def eager(self, loss: nn.Module) -> Callable[[], object]:
        """The plain expression, on logits."""
        memory = {"index": self.index} if hasattr(loss, "memory") else {}
        return self.gradients(lambda: loss(self.x @ self.weight.T, self.target, **memory))

    def fused(self, loss: nn.Module) -> Callable[[], object]:
        """Without logits."""
        memory = {"index": self.index} if hasattr(loss, "memory") else {}
        return self.gradients(lambda: linear_loss(self.x, self.weight, self.target, loss, **memory))

    def torch_cross_entropy(self) -> dict[str, Callable[[], object]]:
        """Eager, and the chunked path of torch where it has one."""
        ways = {EAGER: self.gradients(lambda: F.cross_entropy(self.x @ self.weight.T, self.target))}
        if hasattr(F, "linear_cross_entropy"):
            options = torch.nn.LinearCrossEntropyOptions()
            ways[TORCH] = self.gradients(
                lambda: F.linear_cross_entropy(self.x, self.weight, self.target, options=options)
            )
        return ways

    def memory(self, ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """MiB beyond the inputs and their two gradients."""
        gradients = (self.x.nbytes + self.weight.nbytes) / 2**20
        return {name: counted_peak(way) - gradients for name, way in ways.items()}

    def sizes(self) -> dict[str, int]:
        """For the results file."""
        return {"N": self.rows, "D": self.dim, "C": self.classes}

    def text(self) -> str:
        """For the reader."""
        return f"N = {self.rows:,}, D = {self.dim:,}, C = {self.classes:,}"

    def floor(self, rates: Mapping[str, float], products: int = 3) -> float:
        """The products with their operands and results moved once; the logits need not touch memory."""
        moved = 8 * (self.rows + self.classes) * self.dim
        return floor_seconds(2 * products * self.rows * self.dim * self.classes, moved, rates)


def cross_entropy(problem: Problem, rounds: int, rates: Mapping[str, float]) -> dict[str, Any]:
    references = problem.torch_cross_entropy()
    own = f"telos {CROSS_ENTROPY}"
    times = interleaved({**references, own: problem.fused(telos.losses.CrossEntropyLoss())}, rounds)
    return {
        "case": f"cross-entropy, {problem.text()}",
        "sizes": problem.sizes(),
        "seconds": times,
        "floor_seconds": problem.floor(rates),
        "ratios": {f"{own} / the faster of torch": ratio(times, own, *references)},
    }


def every_loss(problem: Problem, rounds: int, rates: Mapping[str, float], reference: str) -> dict[str, Any]:
    """Every other loss against torch's faster cross-entropy, a few at a time so that both see the same load."""
    losses, refused = row_losses(problem.rows, problem.dim, problem.classes)
    del losses[CROSS_ENTROPY]
    names = list(losses)
    seconds: dict[str, list[float]] = {reference: []}
    ratios = {}
    for start in range(0, len(names), AT_ONCE):
        ways = {f"telos {name}": problem.fused(losses[name]) for name in names[start : start + AT_ONCE]}
        times = interleaved({reference: problem.torch_cross_entropy()[reference], **ways}, rounds)
        ratios |= {f"{own} / {reference}": ratio(times, own, reference) for own in ways}
        seconds[reference] += times.pop(reference)
        seconds |= times
    return {
        "case": f"every other loss against the cross-entropy of torch, {problem.text()}",
        "sizes": problem.sizes(),
        "seconds": seconds,
        "floor_seconds": problem.floor(rates),
        "ratios": ratios,
        "refused": refused,
    }


def own_eager(problem: Problem, rounds: int) -> dict[str, Any]:
    losses, _ = row_losses(problem.rows, problem.dim, problem.classes)
    seconds, ratios = {}, {}
    for name, loss in losses.items():
        own, plain = f"telos {name}", f"eager {name}"
        times = interleaved({plain: problem.eager(loss), own: problem.fused(loss)}, rounds)
        seconds |= times
        ratios[f"{own} / {plain}"] = ratio(times, own, plain)
    return {
        "case": f"every loss against its own eager form, {problem.text()}",
        "sizes": problem.sizes(),
        "seconds": seconds,
        "ratios": ratios,
    }


def growing(problem: Problem, rounds: int, rates: Mapping[str, float]) -> dict[str, Any]:
    def ways(problem: Problem) -> dict[str, Callable[[], object]]:
        fused = problem.fused(telos.losses.CrossEntropyLoss())
        return {**problem.torch_cross_entropy(), "telos": fused}

    times = interleaved(ways(problem), rounds)
    counted = Problem(problem.rows, problem.dim, problem.classes, device="meta")
    return {
        "case": f"cross-entropy with growing C, {problem.text()}",
        "sizes": problem.sizes(),
        "seconds": times,
        "floor_seconds": problem.floor(rates),
        "ratios": {f"telos / {name}": ratio(times, "telos", name) for name in times if name != "telos"},
        "memory_MiB": counted.memory(ways(counted)),
    }


def log_probabilities(problem: Problem, rounds: int, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """``token_logps``: trained through, and as a reference model that wants no gradient."""
    hidden, labels = problem.x.unsqueeze(0), problem.target.unsqueeze(0)

    def eager() -> Tensor:
        logps = torch.log_softmax(hidden @ problem.weight.T, -1)
        return logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def telos_way() -> Tensor:
        return token_logps(hidden, problem.weight, labels)

    def without_gradient(logps: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(logps)

    contenders = {EAGER: eager, "telos": telos_way}
    rows = []
    for text, products, way in (
        ("forward and backward", 3, lambda logps: problem.gradients(lambda: logps().sum())),
        ("without a gradient", 1, without_gradient),
    ):
        times = interleaved({name: way(logps) for name, logps in contenders.items()}, rounds)
        rows.append(
            {
                "case": f"token_logps, {text}, {problem.text()}",
                "sizes": problem.sizes(),
                "seconds": times,
                "floor_seconds": problem.floor(rates, products),
                "ratios": {f"telos / {EAGER}": ratio(times, "telos", EAGER)},
            }
        )
    return rows


def memory(problem: Problem) -> dict[str, Any]:
    losses, _ = row_losses(problem.rows, problem.dim, problem.classes)
    ways = problem.torch_cross_entropy()
    for name, loss in losses.items():
        loss.to("meta")
        ways[f"eager {name}"], ways[f"telos {name}"] = problem.eager(loss), problem.fused(loss)
    counted = problem.memory(ways)
    shares = {name: counted[f"telos {name}"] / counted[f"eager {name}"] for name in losses}
    return {
        "case": f"memory beyond inputs and gradients, counted, {problem.text()}",
        "sizes": problem.sizes(),
        "memory_MiB": counted,
        "ratios": {f"telos {name} / eager {name}": spread([share]) for name, share in shares.items()},
    }


def goals_of(
    own: Mapping[str, Any], others: Mapping[str, Any], counted: Mapping[str, Any]
) -> list[dict[str, object]]:
    """Cross-entropy by itself; of the other losses the slowest; of the memory of all the largest share."""

    def most(case: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
        return max(case["ratios"].items(), key=lambda item: item[1]["median"])

    (first, reached), (slowest, slow), (largest, share) = most(own), most(others), most(counted)
    number = len(others["ratios"])
    return [
        goal(f"linear_loss, time: {first}", reached, at_most=AT_MOST["cross-entropy"]),
        goal(f"linear_loss, time, slowest of {number} others: {slowest}", slow, at_most=AT_MOST["others"]),
        goal(f"linear_loss, memory, largest of {number + 1}: {largest}", share, at_most=AT_MOST["memory"]),
    ]


def main() -> None:
    described = parser(__file__, __doc__, rounds=5, threads=2)
    for name, default in (("rows", ROWS), ("dim", DIM), ("classes", CLASSES)):
        described.add_argument(f"--{name}", type=int, default=default)
    options = described.parse_args()
    torch.set_num_threads(options.threads)
    about, rates = machine(options.threads, []), machine_rates(options.threads)
    quick, rounds = options.quick, options.rounds
    full = Problem(256, 128, 8192) if quick else Problem(options.rows, options.dim, options.classes)
    small = Problem(*((128, 64, 1024) if quick else (512, 256, 8192)))

    cases: list[dict[str, Any]] = []
    path = destination(__file__, options)

    def record(case: dict[str, Any]) -> None:
        """Print a case and write all cases so far: an interrupted run keeps what it has measured."""
        cases.append(case)
        print(case["case"], flush=True)
        for name, value in case["ratios"].items():
            print(f"  {name:72s} {shown(value)}", flush=True)
        content = {
            "what": "a row-wise loss with its output layer, forward and backward, float32, CPU",
            "command": "python -m benchmarks.linear_loss",
            "machine": about,
            "rates": rates,
            "goals": [] if quick or len(cases) < 3 else goals_of(*cases[:3]),
            "cases": cases,
        }
        write(path, content)

    record(cross_entropy(full, rounds, rates))
    peers = {name: values for name, values in cases[0]["seconds"].items() if not name.startswith("telos")}
    reference = min(peers, key=lambda name: spread(peers[name])["median"])
    record(every_loss(full, min(rounds, 3), rates, reference))
    record(memory(Problem(MEMORY_ROWS, DIM, CLASSES, device="meta")))
    record(own_eager(small, rounds))
    grown = []
    for classes in GROWING[:2] if quick else GROWING:
        grown.append(growing(Problem(full.rows // 2, full.dim, classes), min(rounds, 3), rates))
        record(grown[-1])
    for case in log_probabilities(full, min(rounds, 3), rates):
        record(case)
    title = f"Cross-entropy with its output layer, N = {full.rows // 2:,}, D = {full.dim}"
    for quantity, label in (("seconds", "seconds"), ("memory_MiB", "MiB beyond inputs and gradients")):
        picture = path.with_name(f"{path.stem}_{quantity.partition('_')[0]}.svg")
        plot(picture, title, curves(grown, "C", quantity), "classes", label)


if __name__ == "__main__":
    main()
