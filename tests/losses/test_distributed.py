"""The collectives behind batch-coupled losses, on two and on three gloo ranks with unequal batches."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from telos.losses import ISogCLRLoss, SupConLoss, ntxent_loss
from telos.losses._distributed import (
    gather_padded,
    gather_sizes,
    gather_with_gradient,
    is_distributed,
    mean_over_ranks,
    own_rows,
)
from tests.conformance.ranks import on_ranks

N = 5
SIZES = {2: [2, 3], 3: [2, 0, 3]}  # of three ranks one has nothing
CPU = torch.device("cpu")


def rows(seed: int = 0, dim: int = 4) -> Tensor:
    """The whole batch."""
    return torch.randn(N, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(whole: Tensor, rank: int, world: int) -> Tensor:
    return whole.split(SIZES[world])[rank].clone()


def weights(rank: int) -> Tensor:
    """What each rank multiplies the gathered rows by."""
    return rows(seed=10 + rank)


def collectives() -> dict[str, Any]:
    """Everything that the tests look at, as this rank sees it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    size = SIZES[world][rank]
    first, second = (part(rows(seed), rank, world).requires_grad_() for seed in (0, 1))
    numbers = part(torch.arange(N), rank, world)
    gathered, other, gathered_numbers = gather_with_gradient(first, second, numbers)
    ((gathered * weights(rank)).sum() + (gathered * other).sum()).backward()
    strided = part(rows(), rank, world).T.contiguous().T
    twice = part(rows(), rank, world).requires_grad_()
    (slope,) = torch.autograd.grad(gather_with_gradient(twice)[0].square().sum(), twice, create_graph=True)
    try:
        slope.sum().backward()
        double_backward = "allowed"
    except RuntimeError as error:
        double_backward = str(error)
    return {
        "is_distributed": is_distributed(),
        "sizes": gather_sizes(size, CPU),
        "own": own_rows(size, CPU),
        "mean": mean_over_ranks(torch.tensor([float(rank), 1.0])).tolist(),
        "gathered": gathered.detach(),
        "numbers": gathered_numbers,
        "grad_first": first.grad,
        "grad_second": second.grad,
        "strided": gather_with_gradient(strided)[0],
        "padded": gather_padded(numbers, SIZES[world]),
        "double_backward": double_backward,
        **losses(rank, world),
    }


def losses(rank: int, world: int) -> dict[str, Any]:
    """Losses that gather, where a rank holds no example at all, and a memory that all ranks keep alike."""
    z1, z2 = (part(rows(seed), rank, world).requires_grad_() for seed in (0, 1))
    loss = ntxent_loss(z1, z2, gather_distributed=True)
    loss.backward()
    embeddings = part(rows(), rank, world)
    labels = part(torch.tensor([0, 1, 0, 1, 1]), rank, world)
    stateful = ISogCLRLoss(6, gather_distributed=True)
    index = part(torch.tensor([5, 2, 0, 2, 4]), rank, world)  # example 2 is drawn on two ranks
    for _ in range(2):
        stateful_loss = stateful(z1, z2, index)
    return {
        "ntxent": loss.item(),
        "ntxent_grad": z1.grad,
        "supcon": SupConLoss(gather_distributed=True)(embeddings, labels).item(),
        "isogclr": stateful_loss.item(),
        "temperatures": stateful.memory_of("temperatures"),
    }


@cache
def reports(world: int) -> list[dict[str, Any]]:
    return on_ranks(world, collectives)


# ---------------------------------------------------------------------------------------------- one process


def test_one_process_is_left_alone() -> None:
    tensor = rows().requires_grad_()
    assert not is_distributed()
    assert gather_with_gradient(tensor, tensor) == (tensor, tensor)
    assert mean_over_ranks(tensor) is tensor
    assert own_rows(5, CPU) == slice(0, 5)


# ---------------------------------------------------------------------------------------------- ranks

on_every_rank = pytest.mark.parametrize(
    ("rank", "world"), [(rank, world) for world in SIZES for rank in range(world)]
)


@pytest.mark.xdist_group("distributed")
@on_every_rank
def test_gathers_unequal_batches_in_rank_order(rank: int, world: int) -> None:
    report, sizes = reports(world)[rank], SIZES[world]
    assert report["is_distributed"]
    assert report["sizes"] == sizes
    assert report["own"] == slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    assert torch.equal(report["gathered"], rows())
    assert torch.equal(report["strided"], rows())
    for name in ("numbers", "padded"):
        assert torch.equal(report[name], torch.arange(N))  # no gradient, and still whole numbers


@pytest.mark.xdist_group("distributed")
@on_every_rank
def test_mean_over_ranks(rank: int, world: int) -> None:
    assert reports(world)[rank]["mean"] == [(world - 1) / 2, 1.0]


@pytest.mark.xdist_group("distributed")
@on_every_rank
def test_gradient_is_the_sum_over_ranks(rank: int, world: int) -> None:
    """Rank r computes sum(x * w_r) + sum(x * y) of all rows: x gets the sum of w_r, and y once from each rank."""
    total = sum((weights(r) for r in range(world)), torch.zeros_like(rows()))
    report = reports(world)[rank]
    for name, want in {"grad_first": total + world * rows(1), "grad_second": world * rows()}.items():
        torch.testing.assert_close(report[name], part(want, rank, world))


@pytest.mark.xdist_group("distributed")
@on_every_rank
def test_second_derivatives_are_refused_and_not_wrong(rank: int, world: int) -> None:
    assert "once_differentiable" in reports(world)[rank]["double_backward"]


@pytest.mark.xdist_group("distributed")
@on_every_rank
def test_losses_see_the_whole_batch_even_from_an_empty_rank(rank: int, world: int) -> None:
    z1, z2 = rows(0).requires_grad_(), rows(1)
    loss = ntxent_loss(z1, z2)
    report = reports(world)[rank]
    torch.testing.assert_close(report["ntxent"], loss.item())
    (slope,) = torch.autograd.grad(world * loss, z1)
    torch.testing.assert_close(report["ntxent_grad"], part(slope, rank, world))
    supcon = SupConLoss()(rows(), torch.tensor([0, 1, 0, 1, 1]))
    torch.testing.assert_close(report["supcon"], supcon.item())


@pytest.mark.xdist_group("distributed")
@on_every_rank
def test_memory_is_that_of_one_process_on_all_ranks(rank: int, world: int) -> None:
    single = ISogCLRLoss(6)
    for _ in range(2):
        loss = single(rows(0), rows(1), torch.tensor([5, 2, 0, 2, 4]))
    report = reports(world)[rank]
    torch.testing.assert_close(report["isogclr"], loss.item())
    torch.testing.assert_close(report["temperatures"], single.memory_of("temperatures"))
