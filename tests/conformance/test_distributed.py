"""Several ranks compute the gradient of one process on the whole batch, unequal local batches included.

One pool of three gloo processes runs every declared loss; the tests then look at what it reported.
"""

import multiprocessing as mp
import os
import tempfile
import traceback
from functools import cache
from itertools import pairwise
from pathlib import Path
from queue import Empty

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.conformance.collect import all_declarations, batched, build, call, draw
from tests.declaration import Declaration, Inputs

RANKS = 3
N = 8  # not a multiple of the ranks: 2, 3 and 3 examples


def checked() -> list[Declaration]:
    return [d for d in all_declarations() if d.module is not None and not d.no_distributed]


class Model(nn.Module):
    """A parameter in front of every differentiable input, so that there is a parameter gradient to compare."""

    def __init__(self, inputs: Inputs, names: list[str]) -> None:
        super().__init__()
        self.maps = nn.ParameterDict()
        generator = torch.Generator().manual_seed(5)
        for name in names:
            width = inputs[name].shape[-1] if inputs[name].ndim > 1 else 1
            noise = torch.randn(width, width, generator=generator, dtype=torch.float64)
            self.maps[name] = nn.Parameter(torch.eye(width, dtype=torch.float64) + 0.1 * noise)

    def forward(self, inputs: Inputs) -> Inputs:
        mapped = {
            n: inputs[n] @ w if inputs[n].ndim > 1 else inputs[n] * w[0, 0] for n, w in self.maps.items()
        }
        return {**inputs, **mapped}


def parts(declaration: Declaration, inputs: Inputs) -> list[Inputs]:
    if declaration.split is not None:
        return declaration.split(inputs, RANKS)
    edges = [0, 2, 5, N]
    names = batched(declaration, inputs, N)
    return [{k: v[low:high] if k in names else v for k, v in inputs.items()} for low, high in pairwise(edges)]


def parameter_gradients(declaration: Declaration, inputs: Inputs, ranks: bool) -> dict[str, Tensor]:
    """Two steps (a state written in the first is read in the second) and the gradients after the second."""
    loss = build(declaration, inputs).double()
    if ranks and not declaration.rows:
        loss.gather_distributed = True  # type: ignore[assignment]
    names = [name for name in declaration.differentiable if name in batched(declaration, inputs, N)]
    model: nn.Module = Model(inputs, names)
    model = nn.parallel.DistributedDataParallel(model) if ranks else model
    local = parts(declaration, inputs)[dist.get_rank()] if ranks else inputs
    for _ in range(2):
        model.zero_grad()
        loss.zero_grad()
        outputs = model(local)
        if declaration.rows:
            outputs["denominator"] = "global" if ranks else None
        call(loss, outputs).backward()
    found = {f"model.{n.removeprefix('module.')}": p.grad for n, p in model.named_parameters()}
    for name, parameter in loss.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        if ranks:
            dist.all_reduce(gradient)
            gradient /= RANKS
        found[f"loss.{name}"] = gradient
    found.update({f"state.{name}": buffer for name, buffer in loss.state_dict().items()})
    return {name: tensor.detach().clone() for name, tensor in found.items() if tensor is not None}


def worker(rank: int, store: str, queue: mp.Queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for position, declaration in enumerate(checked()):
        try:
            found = parameter_gradients(declaration, draw(declaration, N), ranks=True)
            report = {name: tensor.tolist() for name, tensor in found.items()}
        except Exception:  # reported to the test of this declaration, and the others go on
            report = traceback.format_exc()
        queue.put((rank, position, report))
        dist.barrier()
    dist.destroy_process_group()


@cache
def reports() -> dict[tuple[int, int], object]:
    """What each rank found for each of the checked declarations, by their positions."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [context.Process(target=worker, args=(rank, store, queue)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        found = {}
        while len(found) < RANKS * len(checked()):
            try:
                rank, position, report = queue.get(timeout=2)
                found[rank, position] = report
            except Empty:
                # a rank that died (killed for memory, say) will not report; the tests say which losses are missing
                if not all(process.is_alive() or process.exitcode == 0 for process in processes):
                    break
        for process in processes:
            process.join(timeout=30)
            process.kill()
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("position", range(len(checked())), ids=lambda i: checked()[i].name)
def test_ranks_equal_one_process(position: int) -> None:
    declaration = checked()[position]
    expected = parameter_gradients(declaration, draw(declaration, N), ranks=False)
    for rank in range(RANKS):
        report = reports().get((rank, position), "the rank ended before it reported")
        assert isinstance(report, dict), report
        assert report.keys() == expected.keys()
        for name, want in expected.items():
            torch.testing.assert_close(
                torch.tensor(report[name], dtype=want.dtype), want, msg=lambda m, n=name: f"{n}: {m}"
            )
