"""Counting triplets by ranks equals going through all of them, ties and labels of every size included."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from telos.kernels import triplets
from telos.kernels.triplets import triplet_counts

MININGS = ["all", "semi_hard", "hard"]


def active(d_ap: float, d_an: float, margin: float, mining: str) -> bool:
    chosen = {"all": True, "semi_hard": d_an > d_ap, "hard": d_an <= d_ap}[mining]
    return chosen and d_an < d_ap + margin


def counts_by_loops(distances: Tensor, labels: Tensor, margin: float, mining: str) -> Tensor:
    counts = torch.zeros_like(distances)
    size = len(labels)
    d, y = distances.tolist(), labels.tolist()
    for a in range(size):
        for p in range(size):
            for n in range(size):
                if p != a and y[p] == y[a] and y[n] != y[a] and active(d[a][p], d[a][n], margin, mining):
                    counts[a, p] += 1
                    counts[a, n] -= 1
    return counts


def problem(size: int, classes: int, seed: int, steps: int | None = None) -> tuple[Tensor, Tensor]:
    """Random distances, on a grid of ``steps`` values where ties are wanted, and labels of unequal numbers."""
    generator = torch.Generator().manual_seed(seed)
    distances = torch.rand(size, size, generator=generator, dtype=torch.float64)
    if steps is not None:
        distances = (steps * distances).floor() / steps
    labels = (classes * torch.rand(size, generator=generator) ** 2).long() * 7 - 3
    return distances, labels


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("margin", [0.0, 0.25, 5.0])
@pytest.mark.parametrize("steps", [None, 4])
def test_equals_loops(mining: str, margin: float, steps: int | None) -> None:
    for seed, classes in enumerate((1, 2, 5, 12)):
        distances, labels = problem(17, classes, seed, steps)
        wanted = counts_by_loops(distances, labels, margin, mining)
        assert torch.equal(triplet_counts(distances, labels, margin, mining).coefficients, wanted)
        largest = int(labels.unique(return_counts=True)[1].max())
        for bound in (largest, largest + 3, 100):
            got = triplet_counts(distances, labels, margin, mining, largest_class=bound)
            assert torch.equal(got.coefficients, wanted)
            assert torch.equal(got.active, wanted.clamp_min(0).sum(-1))


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    distances, labels = problem(23, 4, 0)
    whole = triplet_counts(distances, labels, 0.1)
    assert whole.active.sum() > 0
    monkeypatch.setattr(triplets, "_TILE", 23 * 5)
    assert all(map(torch.equal, triplet_counts(distances, labels, 0.1), whole))
    monkeypatch.setattr(triplets, "_TILE", 1)
    assert all(map(torch.equal, triplet_counts(distances, labels, 0.1), whole))


def test_semi_hard_and_hard_part_all() -> None:
    distances, labels = problem(40, 5, 1)
    semi_hard, hard = (triplet_counts(distances, labels, 0.3, m) for m in ("semi_hard", "hard"))
    assert semi_hard.active.sum() > 0
    assert hard.active.sum() > 0
    for part, other, whole in zip(semi_hard, hard, triplet_counts(distances, labels, 0.3), strict=True):
        assert torch.equal(part + other, whole)


@pytest.mark.parametrize("mining", MININGS)
def test_rows_sum_to_zero_and_a_wide_margin_counts_every_triplet(mining: str) -> None:
    distances, labels = problem(40, 5, 2)
    counts = triplet_counts(distances, labels, 10.0, mining)
    assert torch.count_nonzero(counts.coefficients.sum(-1)) == 0
    alike = (labels[:, None] == labels).sum(-1)
    every = ((alike - 1) * (len(labels) - alike)).double()
    assert torch.equal(counts.active, every) if mining == "all" else (counts.active <= every).all()


def test_is_the_derivative_of_the_summed_loss() -> None:
    distances, labels = problem(12, 3, 3)
    leaf = distances.clone().requires_grad_()
    alike = labels[:, None] == labels
    positive = alike & ~torch.eye(12, dtype=torch.bool)
    triplets_loss = (leaf[:, :, None] - leaf[:, None, :] + 0.2).relu()
    total = triplets_loss[positive[:, :, None] & ~alike[:, None, :]].sum()
    counts = triplet_counts(distances, labels, 0.2)
    torch.testing.assert_close(counts.coefficients, torch.autograd.grad(total, leaf)[0])
    torch.testing.assert_close(
        (counts.coefficients * distances).sum() + 0.2 * counts.active.sum(),
        total.detach(),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negatives_at_infinity_are_never_active(dtype: torch.dtype) -> None:
    distances, labels = problem(9, 3, 4)
    distances, labels = distances.to(dtype), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    distances[:, 8] = math.inf
    for mining in MININGS:
        counts = triplet_counts(distances, labels, 1.0, mining)
        assert counts.coefficients.dtype == counts.active.dtype == dtype
        assert torch.count_nonzero(counts.coefficients[:6, 8]) == 0
        assert torch.isfinite(counts.coefficients).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    distances, _ = problem(8, 2, 5)
    labels = torch.tensor([0, 0, 1, 1, 5, 5, 5, 100])
    assert torch.equal(
        triplet_counts(distances, labels.to(dtype), 0.3).coefficients,
        counts_by_loops(distances, labels, 0.3, "all"),
    )


@pytest.mark.parametrize("size", [0, 1, 2])
def test_small_batches_have_no_triplet(size: int) -> None:
    counts = triplet_counts(torch.ones(size, size), torch.arange(size), 1.0)
    assert counts.coefficients.shape == (size, size)
    assert counts.active.shape == (size,)
    assert not any(map(torch.count_nonzero, counts))


class WorkSpace(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_larger_than_the_distances() -> None:
    distances, labels = problem(300, 4, 6)
    with WorkSpace() as space:
        triplet_counts(distances, labels, 0.1)
    # a tile has one column more, for the end of the ranks
    assert space.elements <= 300 * 301


@pytest.mark.bare
def test_unknown_mining_is_refused() -> None:
    with pytest.raises(ValueError, match="mining must be 'all', 'semi_hard' or 'hard', got 'easy'"):
        triplet_counts(torch.zeros(2, 2), torch.zeros(2).long(), 0.1, "easy")  # type: ignore[arg-type]
