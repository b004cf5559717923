"""A loss fused with its output layer on a GPU: telos beside Liger-Kernel, cut-cross-entropy and torch.

    python -m benchmarks.linear_loss_cuda        (or python benchmarks/linear_loss_cuda.py --out FILE)

Forward and backward in bfloat16 at the size of a language model, N = 8,192, D = 4,096, C = 128,256. A time is that of
one call on the host's clock, with the device idle before and after it. Peers that are not installed, or fail, are left
out with the reason. The floor is the three products alone, by cuBLAS, in the same rounds.

The logits are drawn twice. ``flat``: of standard deviation 1, targets at random, so that hardly any probability is
worth a gradient; cut-cross-entropy leaves out blocks of small gradients unless told not to. ``peaked``: of standard
deviation 4, targets drawn from the softmax, which is nearer to a trained model. Errors are those of the value and, as
parts of their norms, of both gradients, against float64.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__ in (None, ""):  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._rounds import destination, goal, interleaved, machine, parser, ratio, shown, spread, write
from telos.losses import (
    CrossEntropyLoss,
    FocalLoss,
    GCELoss,
    LabelSmoothingLoss,
    LDRKLLoss,
    SCELoss,
    ZLoss,
    linear_loss,
    token_logps,
)

FLOOR = "floor: three products"
OWN = "telos cross_entropy"
# approximate by default: small gradients are left out
FILTERED = "cut-cross-entropy, filtered"
OTHERS: dict[str, nn.Module] = {
    "label_smoothing": LabelSmoothingLoss(),
    "gce": GCELoss(),
    "focal": FocalLoss(),
    "sce": SCELoss(),
    "z_loss": ZLoss(),
    "ldr_kl": LDRKLLoss(),  # no kernel of its own: compiled, like the mixture
    "cross_entropy + 0.1 focal": CrossEntropyLoss() + 0.1 * FocalLoss(),
}
SPREAD = {"flat": 1.0, "peaked": 4.0}

Call = Callable[[], Any]


class Problem:
    """Inputs of an output layer."""

    def __init__(self, kind: str, rows: int, dim: int, classes: int, device: str) -> None:
        self.kind, self.rows, self.dim, self.classes, self.device = kind, rows, dim, classes, device
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(rows, dim, generator=generator, device=device)
        weight = torch.randn(classes, dim, generator=generator, device=device) * SPREAD[kind] / dim**0.5
        self.x, self.weight = x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
        del x, weight
        if kind == "flat":
            self.target = torch.randint(classes, (rows,), generator=generator, device=device)
        else:
            with torch.no_grad():
                parts = [
                    torch.multinomial((part @ self.weight.T).float().softmax(-1), 1, generator=generator)
                    for part in self.x.split(512)
                ]
            self.target = torch.cat(parts).squeeze(-1)

    def both(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Call:
        """Forward and backward: the value and its two gradients."""

        def call() -> tuple[Tensor, ...]:
            value = loss(self.x, self.weight)
            return value.detach(), *torch.autograd.grad(value, (self.x, self.weight))

        return call

    def floor(self) -> Call:
        """The products alone, in bfloat16; what one of them takes does not depend on the numbers being gradients."""
        x, weight = self.x.detach(), self.weight.detach()

        def call() -> None:
            logits = x @ weight.T
            logits @ weight
            logits.T @ x

        return call

    def sizes(self) -> dict[str, int]:
        """For the results file."""
        return {"N": self.rows, "D": self.dim, "C": self.classes}

    def text(self) -> str:
        """For the reader."""
        return f"N = {self.rows:,}, D = {self.dim:,}, C = {self.classes:,}, {self.kind} logits"


def cross_entropies(problem: Problem, everything: bool = True) -> tuple[dict[str, Call], dict[str, str]]:
    """Ways to cross-entropy, and why some are missing."""
    target, missing = problem.target, dict[str, str]()
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        OWN: lambda x, weight: linear_loss(x, weight, target, CrossEntropyLoss())
    }
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        plain, wide = (
            LigerFusedLinearCrossEntropyLoss(),
            LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32),
        )
        ways["Liger-Kernel"] = lambda x, weight: plain(weight, x, target)
        ways["Liger-Kernel, float32 sums"] = lambda x, weight: wide(weight, x, target)
    except Exception as error:  # whatever keeps a peer from loading is reported
        missing["Liger-Kernel"] = f"{type(error).__name__}: {error}"
    try:
        from cut_cross_entropy import linear_cross_entropy

        ways[FILTERED] = lambda x, weight: linear_cross_entropy(x, weight, target)
        ways["cut-cross-entropy, exact"] = lambda x, weight: linear_cross_entropy(
            x, weight, target, filter_eps=None
        )
    except Exception as error:
        missing["cut-cross-entropy"] = f"{type(error).__name__}: {error}"
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        ways["torch linear_cross_entropy"] = lambda x, weight: F.linear_cross_entropy(
            x, weight, target, options=options
        )
    if everything:
        ways["torch eager"] = lambda x, weight: F.cross_entropy(x @ weight.T, target)
        compiled = torch.compile(lambda x, weight: F.cross_entropy((x @ weight.T).float(), target))
        ways["torch compiled"] = lambda x, weight: compiled(x, weight)
    return {name: problem.both(way) for name, way in ways.items()}, missing


def that_run(ways: Mapping[str, Call], missing: dict[str, str], device: str) -> dict[str, Call]:
    """Those that survive a first call, which also compiles what is compiled."""
    working = {}
    for name, way in ways.items():
        start = time.perf_counter()
        try:
            way()
            synchronize(device)
        except Exception as error:  # a peer may fail in ways of its own; ours may not
            if name.startswith("telos"):
                raise
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"  {name}: left out, {missing[name]}", flush=True)
            continue
        print(f"  {name}: first call {time.perf_counter() - start:.1f} s", flush=True)
        working[name] = way
    return working


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory(problem: Problem, way: Call) -> float | None:
    """MiB at the peak beyond inputs and gradients, as the allocator of CUDA counts."""
    if problem.device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = way()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return (peak - problem.x.nbytes - problem.weight.nbytes) / 2**20


def truth(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy and its gradients, a few rows at a time, and back to the dtype that holds a whole gradient."""
    x, weight = problem.x.detach().to(dtype), problem.weight.detach().to(dtype)
    value = torch.zeros((), dtype=dtype, device=problem.device)
    grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
    for start in range(0, problem.rows, 512):
        rows = slice(start, start + 512)
        logits = (x[rows] @ weight.T).requires_grad_()
        part = F.cross_entropy(logits, problem.target[rows], reduction="sum") / problem.rows
        (slope,) = torch.autograd.grad(part, logits)
        value += part.detach()
        grad_x[rows] = slope @ weight
        grad_weight.addmm_(slope.T, x[rows])
    return value, grad_x, grad_weight


def errors(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> dict[str, float | None]:
    """Of the value absolutely, of the gradients as parts of their norms, in pieces that fit beside them; None for NaN."""
    result = {"value": abs(float(found[0]) - float(right[0]))}
    for name, got, want in zip(("grad_x", "grad_weight"), found[1:], right[1:], strict=True):
        pairs = list(zip(got.split(4096), want.split(4096), strict=True))
        distance = sum(float((one.to(two.dtype) - two).square().sum()) for one, two in pairs)
        norm = sum(float(two.square().sum()) for _, two in pairs)
        result[name] = (distance / norm) ** 0.5
    return {name: error if math.isfinite(error) else None for name, error in result.items()}


def measure(
    problem: Problem,
    what: str,
    ways: Mapping[str, Call],
    rounds: int,
    ratios: Callable[[Mapping[str, list[float]]], dict[str, dict[str, float]]],
) -> dict[str, Any]:
    times = interleaved(ways, rounds, warmup=2)
    case = {
        "case": f"{what}, {problem.text()}",
        "sizes": problem.sizes(),
        "seconds": times,
        "memory_MiB": {name: memory(problem, way) for name, way in ways.items() if name != FLOOR},
        "ratios": ratios(times),
    }
    if OWN in times and ratios is against:
        case["ratios"] |= compared_memory(case)
    if FLOOR in times:
        case["floor_seconds"] = spread(times[FLOOR])["median"]
    for name, taken in times.items():
        used = case["memory_MiB"].get(name)
        print(
            f"  {name:40s} {1e3 * spread(taken)['median']:9.2f} ms"
            + (f" {used:10.0f} MiB" if used is not None else ""),
            flush=True,
        )
    return case


def against(times: Mapping[str, list[float]], own: str = OWN) -> dict[str, dict[str, float]]:
    """Ratios of telos to every peer, to the best of them, and to the floor."""
    peers = [name for name in times if not name.startswith("telos") and name != FLOOR]
    exact = [name for name in peers if name != FILTERED]
    found = {f"{own} / {peer}": ratio(times, own, peer) for peer in peers}
    if peers:
        found[f"{own} / best of all"] = ratio(times, own, *peers)
    if exact:
        found[f"{own} / best of the exact"] = ratio(times, own, *exact)
    if FLOOR in times:
        found[f"{own} / floor"] = ratio(times, own, FLOOR)
    return found


def other_ratios(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    found = {}
    for name in times:
        if name.startswith("telos "):
            eager = name.replace("telos", "eager")
            references = [other for other in (eager, OWN) if other in times and other != name]
            found |= {f"{name} / {other}": ratio(times, name, other) for other in references}
    return found


def compared_memory(case: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Memory of telos over that of the fastest peer: of all, and of those whose gradients are exact."""
    found = {}
    for kind, left_out in (("all", ()), ("the exact", (FILTERED,))):
        peers = [name for name in case["memory_MiB"] if not name.startswith("telos") and name not in left_out]
        if not peers:
            continue
        fastest = min(peers, key=lambda name: spread(case["seconds"][name])["median"])
        own, other = case["memory_MiB"][OWN], case["memory_MiB"][fastest]
        if own is not None and other is not None:
            part = own / max(other, 1.0)
            found[f"memory of {OWN} / {fastest}, fastest of {kind}"] = dict.fromkeys(
                ("median", "low", "high"), part
            )
    return found


def goals(case: Mapping[str, Any]) -> list[dict[str, object]]:
    """At least as fast as the best of the peers, at no more memory than that one takes."""
    judged = ("best of all", "best of the exact", "fastest of all", "fastest of the exact")
    return [
        goal(f"{name}; {case['case']}", reached, at_most=1.0)
        for name, reached in case["ratios"].items()
        if name.endswith(judged)
    ]


def main() -> None:
    options = arguments()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("linear_loss_cuda needs a CUDA device")
    torch.set_num_threads(options.threads)
    sizes = (options.rows, options.dim, options.classes)
    reference = getattr(torch, options.reference)
    started = time.perf_counter()
    cases: list[dict[str, Any]] = []

    def recorded(*more: dict[str, Any]) -> dict[str, Any]:
        """Written after every case, so that an interrupted run leaves what it measured."""
        cases.extend(more)
        flops = 6 * options.rows * options.dim * options.classes
        result = {
            "what": "a loss fused with its output layer on a GPU, forward and backward in bfloat16",
            "command": "python -m benchmarks.linear_loss_cuda",
            "machine": machine(options.threads),
            "rates": {"bfloat16_flops_per_second": flops / cases[0]["floor_seconds"]},
            "cases": cases,
            "goals": [each for case in cases for each in goals(case)],
        }
        write(options.out or destination(__file__, options), result)
        return result

    for kind in SPREAD:
        problem = Problem(kind, *sizes, device)
        print(f"cross-entropy, {problem.text()}", flush=True)
        ways, missing = cross_entropies(problem)
        ways = that_run(ways, missing, device)
        case = measure(problem, "cross-entropy", {**ways, FLOOR: problem.floor()}, options.rounds, against)
        right = truth(problem, reference)
        case["errors"] = {name: errors(way(), right) for name, way in ways.items()}
        for name, error in case["errors"].items():
            told = (f"{key} {'NaN' if value is None else f'{value:.2e}'}" for key, value in error.items())
            print(f"  {name:40s} {', '.join(told)}", flush=True)
        del right
        recorded({**case, "missing": missing})
        del problem, ways

    problem = Problem("flat", *sizes, device)
    print(f"other losses, {problem.text()}", flush=True)
    ways = {OWN: problem.both(lambda x, w: linear_loss(x, w, problem.target, CrossEntropyLoss()))}
    for name, loss in OTHERS.items():
        ways[f"telos {name}"] = problem.both(lambda x, w, loss=loss: linear_loss(x, w, problem.target, loss))
        ways[f"eager {name}"] = problem.both(lambda x, w, loss=loss: loss(x @ w.T, problem.target))
    missing = {}
    ways = that_run(ways, missing, device)
    case = measure(problem, "other losses", ways, max(options.rounds // 2, 3), other_ratios)
    recorded({**case, "missing": missing})

    print(f"log-probabilities of tokens, {problem.text()}", flush=True)
    labels = problem.target[None]

    def fused(x: Tensor, weight: Tensor) -> Tensor:
        return token_logps(x[None], weight, labels).sum()

    def both(x: Tensor, weight: Tensor) -> Tensor:
        logps, entropy = token_logps(x[None], weight, labels, entropy=True)
        return (logps + 0.01 * entropy).sum()

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return torch.log_softmax((x @ weight.T).float(), -1).gather(-1, problem.target[:, None]).sum()

    ways = {
        "telos token_logps": problem.both(fused),
        "telos token_logps with entropy": problem.both(both),
        "eager token_logps": problem.both(eager),
    }
    missing = {}
    ways = that_run(ways, missing, device)
    case = measure(problem, "token_logps", ways, max(options.rounds // 2, 3), other_ratios)
    recorded({**case, "missing": missing})
    del problem, ways

    # more rows than 2 D: the weight's gradient is summed over chunks
    problem = Problem("flat", 4 * options.rows, options.dim, options.classes, device)
    print(f"cross-entropy, {problem.text()}", flush=True)
    ways, missing = cross_entropies(problem, everything=False)
    ways = that_run(ways, missing, device)
    case = measure(problem, "cross-entropy", ways, max(options.rounds // 2, 3), against)
    cases.append({**case, "missing": missing})
    result = recorded()
    for each in result["goals"]:
        print(("met    " if each["met"] else "MISSED ") + shown(each["reached"]) + "  " + each["name"])
    print(f"{time.perf_counter() - started:.0f} s in all")


def arguments() -> argparse.Namespace:
    described = parser(__file__, __doc__, rounds=20, threads=8)
    for name, size, quick in (("rows", 8192, 2048), ("dim", 4096, 1024), ("classes", 128256, 32000)):
        described.add_argument(f"--{name}", type=int, help=f"{size:,}, with --quick {quick:,}")
    described.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    described.add_argument("--reference", default="float64", choices=("float64", "float32"))
    described.add_argument("--out", type=Path, help="the file to write, instead of the usual one")
    options = described.parse_args()
    for name, size, quick in (("rows", 8192, 2048), ("dim", 4096, 1024), ("classes", 128256, 32000)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else size)
    return options


if __name__ == "__main__":
    main()
