"""The collectives behind batch-coupled losses, in one pool of three gloo processes with unequal batches."""

import multiprocessing as mp
import os
import tempfile
import traceback
from functools import cache
from pathlib import Path
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

SIZES = [2, 0, 3]  # one rank has nothing
RANKS = len(SIZES)
CPU = torch.device("cpu")


def rows(seed: int = 0, dim: int = 4) -> Tensor:
    """The whole batch."""
    return torch.randn(sum(SIZES), dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(whole: Tensor, rank: int) -> Tensor:
    return whole.split(SIZES)[rank].clone()


def weights(rank: int) -> Tensor:
    """What each rank multiplies the gathered rows by."""
    return rows(seed=10 + rank)


def collectives(rank: int) -> dict[str, Any]:
    """Everything that the tests look at, as this rank sees it."""
    first, second = (part(rows(seed), rank).requires_grad_() for seed in (0, 1))
    numbers = part(torch.arange(sum(SIZES)), rank)
    gathered, other, gathered_numbers = gather_with_gradient(first, second, numbers)
    ((gathered * weights(rank)).sum() + (gathered * other).sum()).backward()
    strided = part(rows(), rank).T.contiguous().T
    twice = part(rows(), rank).requires_grad_()
    (slope,) = torch.autograd.grad(gather_with_gradient(twice)[0].square().sum(), twice, create_graph=True)
    try:
        slope.sum().backward()
        double_backward = "allowed"
    except RuntimeError as error:
        double_backward = str(error)
    return {
        "is_distributed": is_distributed(),
        "sizes": gather_sizes(SIZES[rank], CPU),
        "own": (own_rows(SIZES[rank], CPU).start, own_rows(SIZES[rank], CPU).stop),
        "mean": mean_over_ranks(torch.tensor([float(rank), 1.0])).tolist(),
        "gathered": gathered.tolist(),
        "numbers": (gathered_numbers.tolist(), str(gathered_numbers.dtype), gathered_numbers.requires_grad),
        "grad_first": first.grad.tolist(),  # type: ignore[union-attr]
        "grad_second": second.grad.tolist(),  # type: ignore[union-attr]
        "strided": gather_with_gradient(strided)[0].tolist(),
        "padded": gather_padded(numbers, SIZES).tolist(),
        "double_backward": double_backward,
        **losses(rank),
    }


def losses(rank: int) -> dict[str, Any]:
    """Losses that gather, where a rank holds no example at all, and a memory that all ranks keep alike."""
    z1, z2 = (part(rows(seed), rank).requires_grad_() for seed in (0, 1))
    loss = ntxent_loss(z1, z2, gather_distributed=True)
    loss.backward()
    embeddings = part(rows(), rank)
    labels = part(torch.tensor([0, 1, 0, 1, 1]), rank)
    stateful = ISogCLRLoss(6, gather_distributed=True)
    index = part(torch.tensor([5, 2, 0, 2, 4]), rank)  # example 2 is drawn on two ranks
    for _ in range(2):
        stateful_loss = stateful(z1, z2, index)
    return {
        "ntxent": loss.item(),
        "ntxent_grad": z1.grad.tolist(),  # type: ignore[union-attr]
        "supcon": SupConLoss(gather_distributed=True)(embeddings, labels).item(),
        "isogclr": stateful_loss.item(),
        "temperatures": stateful.memory_of("temperatures").tolist(),
    }


def worker(rank: int, store: str, queue: mp.Queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        queue.put((rank, collectives(rank)))
    except Exception:  # shown by the first test that asks
        queue.put((rank, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()


@cache
def reports() -> list[dict[str, Any]]:
    context = mp.get_context("spawn")
    queue = context.Queue()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [context.Process(target=worker, args=(rank, store, queue)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        found = dict(queue.get(timeout=120) for _ in range(RANKS))
        for process in processes:
            process.join()
    failed = [report for report in found.values() if isinstance(report, str)]
    assert not failed, failed[0]
    return [found[rank] for rank in range(RANKS)]


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- one process


def test_one_process_is_left_alone() -> None:
    tensor = rows().requires_grad_()
    assert not is_distributed()
    assert gather_with_gradient(tensor, tensor) == (tensor, tensor)
    assert mean_over_ranks(tensor) is tensor
    assert own_rows(5, CPU) == slice(0, 5)


# ---------------------------------------------------------------------------------------------- three ranks

pooled = pytest.mark.parametrize("rank", range(RANKS))


@pytest.mark.xdist_group("distributed")
@pooled
def test_gathers_unequal_batches_in_rank_order(rank: int) -> None:
    report = reports()[rank]
    assert report["is_distributed"]
    assert report["sizes"] == SIZES
    assert report["own"] == (sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    assert report["gathered"] == rows().tolist()
    assert report["strided"] == rows().tolist()
    assert report["numbers"] == ([0, 1, 2, 3, 4], "torch.int64", False)
    assert report["padded"] == [0, 1, 2, 3, 4]


@pytest.mark.xdist_group("distributed")
@pooled
def test_mean_over_ranks(rank: int) -> None:
    assert reports()[rank]["mean"] == [1.0, 1.0]


@pytest.mark.xdist_group("distributed")
@pooled
def test_gradient_is_the_sum_over_ranks(rank: int) -> None:
    """Rank r computes sum(x * w_r) + sum(x * y) of all rows: x gets the sum of w_r, and y once from each rank."""
    total = sum((weights(r) for r in range(RANKS)), torch.zeros_like(rows()))
    report = reports()[rank]
    for name, want in {"grad_first": total + RANKS * rows(1), "grad_second": RANKS * rows()}.items():
        torch.testing.assert_close(float64(report[name]).view(-1, 4), part(want, rank))


@pytest.mark.xdist_group("distributed")
@pooled
def test_second_derivatives_are_refused_and_not_wrong(rank: int) -> None:
    assert "once_differentiable" in reports()[rank]["double_backward"]


@pytest.mark.xdist_group("distributed")
@pooled
def test_losses_see_the_whole_batch_even_from_an_empty_rank(rank: int) -> None:
    z1, z2 = rows(0).requires_grad_(), rows(1)
    loss = ntxent_loss(z1, z2)
    report = reports()[rank]
    torch.testing.assert_close(report["ntxent"], loss.item())
    (slope,) = torch.autograd.grad(RANKS * loss, z1)
    torch.testing.assert_close(float64(report["ntxent_grad"]).view(-1, 4), part(slope, rank))
    supcon = SupConLoss()(rows(), torch.tensor([0, 1, 0, 1, 1]))
    torch.testing.assert_close(report["supcon"], supcon.item())


@pytest.mark.xdist_group("distributed")
@pooled
def test_memory_is_that_of_one_process_on_all_ranks(rank: int) -> None:
    single = ISogCLRLoss(6)
    for _ in range(2):
        loss = single(rows(0), rows(1), torch.tensor([5, 2, 0, 2, 4]))
    torch.testing.assert_close(reports()[rank]["isogclr"], loss.item())
    torch.testing.assert_close(
        torch.tensor(reports()[rank]["temperatures"]), single.memory_of("temperatures")
    )
