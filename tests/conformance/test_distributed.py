"""Several ranks compute the gradient of one process on the whole batch, unequal local batches included.

On 2 and on 3 ranks: a wrong factor of W - 1 does not show on 2 of them, and only 3 have one between first and last.
"""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from telos.losses import _distributed
from tests.conformance.collect import all_declarations, batched, build, call, draw
from tests.conformance.ranks import on_ranks
from tests.declaration import Declaration, Inputs

N = 8
EDGES = {2: [0, 3, N], 3: [0, 2, 5, N]}  # where the batch is cut


def checked() -> list[Declaration]:
    return [d for d in all_declarations() if d.module is not None and not d.no_distributed]


each = pytest.mark.parametrize("position", range(len(checked())), ids=lambda i: checked()[i].name)


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


def local_part(declaration: Declaration, inputs: Inputs) -> Inputs:
    rank, world = dist.get_rank(), dist.get_world_size()
    if declaration.split is not None:
        return declaration.split(inputs, world)[rank]
    low, high = list(pairwise(EDGES[world]))[rank]
    names = batched(declaration, inputs, N)
    return {k: v[low:high] if k in names else v for k, v in inputs.items()}


def parameter_gradients(position: int) -> dict[str, Tensor]:
    """Two steps (a state written in the first is read in the second) and the gradients after the second."""
    declaration, ranks = checked()[position], dist.is_initialized()
    inputs = draw(declaration, N)
    loss = build(declaration, inputs).double()
    if ranks and not declaration.rows:
        loss.gather_distributed = True  # type: ignore[assignment]
    names = [name for name in declaration.differentiable if name in batched(declaration, inputs, N)]
    model: nn.Module = Model(inputs, names)
    model = nn.parallel.DistributedDataParallel(model) if ranks else model
    local = local_part(declaration, inputs) if ranks else inputs
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
            gradient /= dist.get_world_size()
        found[f"loss.{name}"] = gradient
    found.update({f"state.{name}": buffer for name, buffer in loss.state_dict().items()})
    return {name: tensor.detach().clone() for name, tensor in found.items() if tensor is not None}


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("world", EDGES)
@each
def test_ranks_equal_one_process(position: int, world: int) -> None:
    expected = parameter_gradients(position)
    for found in on_ranks(world, parameter_gradients, position):
        assert found.keys() == expected.keys()
        for name, want in expected.items():
            torch.testing.assert_close(found[name], want, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------------------------- planted faults


def with_a_faulty_gather(fault: str, position: int) -> dict[str, Tensor]:
    """``parameter_gradients`` with a gather whose backward is wrong, on every rank."""
    gather = _distributed._GatherWithGradient
    right = gather.backward

    def wrong(ctx, *gradients: Tensor):
        if fault == "no gradient of the other ranks' losses":
            start = sum(ctx.sizes[: dist.get_rank()])
            return gradients[0][start : start + ctx.sizes[dist.get_rank()]], None
        own, _ = right(ctx, *gradients)
        world = dist.get_world_size()
        return own / world if fault == "divided by the ranks" else own * world, None

    gather.backward = staticmethod(wrong)
    try:
        return parameter_gradients(position)
    finally:
        gather.backward = staticmethod(right)


GATHERING = [i for i, d in enumerate(checked()) if not d.rows and hasattr(build(d), "gather_distributed")]


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize(
    "fault", ["no gradient of the other ranks' losses", "divided by the ranks", "times the ranks"]
)
@pytest.mark.parametrize("position", GATHERING, ids=lambda i: checked()[i].name)
def test_a_factor_of_the_world_size_is_noticed(position: int, fault: str) -> None:
    """The faults that gathers with gradient have been published with, held against the test above."""
    expected = parameter_gradients(position)
    found, _ = on_ranks(2, with_a_faulty_gather, fault, position)
    assert any(
        not torch.allclose(found[n], g, rtol=1e-3) for n, g in expected.items() if n.startswith("model")
    )
