"""Triplet margin loss: every triplet by loops, what leaves it unchanged, its limits and its doors."""

import importlib.util
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from telos.losses.metric.triplet import TripletMarginLoss, triplet_margin_loss
from tests.declaration import Declaration, Inputs, embedding_sample, scaled

DIM = 6


def rotated(inputs: Inputs) -> Inputs:
    noise = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rotation = torch.linalg.qr(noise).Q.to(inputs["embeddings"].dtype)
    return {**inputs, "embeddings": inputs["embeddings"] @ rotation}


def renamed_labels(inputs: Inputs) -> Inputs:
    names = torch.tensor([70, -3, 11])
    # scaled as well, so that some floating input moves
    return {**inputs, "labels": names[inputs["labels"]], "embeddings": 2.0 * inputs["embeddings"]}


declarations = [
    Declaration(
        function=triplet_margin_loss,
        module=TripletMarginLoss,
        sample=embedding_sample(DIM),
        differentiable=("embeddings",),
        rows=False,
        extreme="embeddings",
        growth=2,
        kinks="the mean divides by another number where a triplet becomes active, and jumps",
        invariances={
            "rotation": rotated,
            "length of embeddings": scaled(7.0, "embeddings"),
            "names of labels": renamed_labels,
        },
    )
]

MININGS = ["all", "semi_hard", "hard"]
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3, 1, 0, 2, 2, 1])


def embeddings(n: int = 12, dim: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(z: Tensor, labels: Tensor, margin: float, mining: str, unit: bool = True) -> list[list[Tensor]]:
    """The losses of the active triplets, anchor by anchor; ``mining`` by the gap d_an - d_ap."""
    z = z / z.norm(dim=-1, keepdim=True) if unit else z
    size = len(labels)
    found: list[list[Tensor]] = []
    for a in range(size):
        found.append([])
        for p in range(size):
            for n in range(size):
                if p == a or labels[p] != labels[a] or labels[n] == labels[a]:
                    continue
                gap = (z[a] - z[n]).norm() - (z[a] - z[p]).norm()
                if mining == "semi_hard" and gap <= 0:
                    continue
                if mining == "hard" and gap > 0:
                    continue
                if margin - gap > 0:
                    found[-1].append(margin - gap)
    return found


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("margin", [0.05, 0.4])
@pytest.mark.parametrize("mining", MININGS)
def test_equals_a_loop_over_triplets(mining: str, margin: float, unit: bool) -> None:
    z = embeddings().requires_grad_()
    anchors = by_loops(z, LABELS, margin, mining, unit)
    losses = torch.stack([loss for anchor in anchors for loss in anchor])
    assert len(losses) > 3
    options = {"margin": margin, "mining": mining, "normalize": unit}
    loss = triplet_margin_loss(z, LABELS, **options)
    torch.testing.assert_close(loss, losses.mean(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, z),
        torch.autograd.grad(losses.mean(), z, retain_graph=True),
        rtol=1e-10,
        atol=1e-12,
    )
    total = triplet_margin_loss(z, LABELS, **options, reduction="sum")
    torch.testing.assert_close(total, losses.sum(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(total, z), torch.autograd.grad(losses.sum(), z), rtol=1e-10, atol=1e-12
    )
    values = triplet_margin_loss(z, LABELS, **options, reduction="none")
    per_anchor = torch.stack([sum(anchor, start=torch.zeros((), dtype=torch.float64)) for anchor in anchors])
    torch.testing.assert_close(values, per_anchor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mining", MININGS)
def test_gradcheck_away_from_the_jumps(mining: str) -> None:
    z = embeddings(8, 3).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 0, 2, 2, 1])
    assert triplet_margin_loss(z, labels, margin=0.3, mining=mining) > 0  # type: ignore[arg-type]

    def value(tensor: Tensor) -> Tensor:
        return triplet_margin_loss(tensor, labels, margin=0.3, mining=mining)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(value, z)
    assert torch.autograd.gradgradcheck(value, z)


def test_float32_is_the_truth_rounded() -> None:
    """Distances that float32 inner products would lose: two tight clusters, a thousandth apart."""
    centre, labels = embeddings(1, 16), torch.arange(40) % 2
    offset = 1e-3 * embeddings(2, 16, seed=1)[labels]
    z = (centre + offset + 1e-3 * embeddings(40, 16, seed=2)).float()
    losses = [loss for anchor in by_loops(z.double(), labels, 1e-3, "all") for loss in anchor]
    want = torch.stack(losses).mean().item()
    assert triplet_margin_loss(z, labels, margin=1e-3).item() == pytest.approx(want, rel=1e-6)


def test_semi_hard_and_hard_part_the_sum() -> None:
    z = embeddings()
    parts = [
        triplet_margin_loss(z, LABELS, margin=0.3, mining=m, reduction="sum") for m in ("semi_hard", "hard")
    ]
    assert all(part > 0 for part in parts)
    torch.testing.assert_close(sum(parts), triplet_margin_loss(z, LABELS, margin=0.3, reduction="sum"))


def test_margin_zero() -> None:
    z = embeddings()
    assert triplet_margin_loss(z, LABELS, margin=0.0, mining="semi_hard") == 0
    torch.testing.assert_close(
        triplet_margin_loss(z, LABELS, margin=0.0), triplet_margin_loss(z, LABELS, margin=0.0, mining="hard")
    )
    # a negative as far as the positive is not active: its loss is 0
    tied = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    assert triplet_margin_loss(tied[[0, 1, 2]], torch.tensor([0, 0, 1]), margin=0.0, reduction="none")[0] == 0


def test_wide_margin_is_linear_in_the_margin() -> None:
    """With every triplet active the loss is the mean of d_ap - d_an plus the margin."""
    z = embeddings()
    first, second = (triplet_margin_loss(z, LABELS, margin=margin) for margin in (2.5, 7.25))
    torch.testing.assert_close(second - first, torch.tensor(4.75, dtype=torch.float64))


def test_collapse_costs_the_margin_and_has_no_slope() -> None:
    z = torch.ones(6, 3, dtype=torch.float64).requires_grad_()
    loss = triplet_margin_loss(z, LABELS[:6], margin=0.3)
    assert loss.item() == pytest.approx(0.3, rel=1e-12)
    assert torch.count_nonzero(torch.autograd.grad(loss, z)[0]) == 0
    # all of it is hard: no negative is farther than a positive
    assert triplet_margin_loss(z, LABELS[:6], margin=0.3, mining="hard").item() == pytest.approx(
        0.3, rel=1e-12
    )
    assert triplet_margin_loss(z, LABELS[:6], margin=0.3, mining="semi_hard") == 0


def test_duplicates_have_distance_zero_and_a_finite_slope() -> None:
    z = embeddings()
    z[2] = z[0]
    z[3] = 5 * z[0]
    leaf = z.clone().requires_grad_()
    loss = triplet_margin_loss(leaf, LABELS, margin=0.3)
    losses = [value for anchor in by_loops(z, LABELS, 0.3, "all") for value in anchor]
    torch.testing.assert_close(loss.detach(), torch.stack(losses).mean(), rtol=1e-10, atol=1e-12)
    (slope,) = torch.autograd.grad(loss, leaf)
    assert torch.isfinite(slope).all()
    assert slope.norm() < 1


def test_directions_that_agree_to_rounding_tie() -> None:
    """A positive and a negative along the anchor are both at distance 0: with margin 0 nothing is active."""
    z = embeddings(50, 33)
    stack = torch.cat([z, 3 * z, 0.7 * z])
    for row in range(50):
        leaf = stack[row::50].clone().requires_grad_()
        loss = triplet_margin_loss(leaf, torch.tensor([0, 0, 1]), margin=0.0, reduction="sum")
        assert loss == 0
        assert torch.count_nonzero(torch.autograd.grad(loss, leaf)[0]) == 0


def test_well_separated_classes_cost_nothing() -> None:
    z = torch.eye(3, dtype=torch.float64).repeat_interleave(3, 0).requires_grad_()
    loss = triplet_margin_loss(z, torch.arange(9) // 3, margin=1.4)
    assert loss == 0
    assert torch.count_nonzero(torch.autograd.grad(loss, z)[0]) == 0
    assert triplet_margin_loss(z, torch.arange(9) // 3, margin=1.5) > 0


@pytest.mark.parametrize(
    "labels", [[], [0], [0, 1], [0, 0], [0, 1, 2, 3], [4, 4, 4, 4]], ids=lambda labels: f"labels{labels}"
)
def test_zero_with_a_graph_without_triplets(labels: list[int]) -> None:
    z = embeddings(len(labels)).requires_grad_()
    loss = triplet_margin_loss(z, torch.tensor(labels, dtype=torch.long), margin=3.0)
    assert loss == 0
    (slope,) = torch.autograd.grad(loss, z)
    assert slope.shape == z.shape
    assert torch.count_nonzero(slope) == 0


def test_zero_embedding_has_no_gradient() -> None:
    z = embeddings()
    z[0] = 0
    leaf = z.requires_grad_()
    loss = triplet_margin_loss(leaf, LABELS, margin=0.3)
    (slope,) = torch.autograd.grad(loss, leaf)
    assert torch.count_nonzero(slope[0]) == 0
    assert torch.isfinite(slope).all()
    assert slope[1:].norm() > 1e-3


def test_nan_is_seen() -> None:
    z = embeddings()
    z[1, 2] = math.nan
    assert torch.isnan(triplet_margin_loss(z, LABELS))
    # also where it leaves no triplet active
    apart = torch.eye(3, dtype=torch.float64).repeat_interleave(2, 0)
    apart[0, 0] = math.nan
    assert torch.isnan(triplet_margin_loss(apart, torch.arange(6) // 2))


def test_denominator_replaces_the_number_of_triplets() -> None:
    z = embeddings()
    total = triplet_margin_loss(z, LABELS, reduction="sum")
    torch.testing.assert_close(triplet_margin_loss(z, LABELS, denominator=10.0), total / 10)


def test_labels_whose_values_cannot_be_read_give_the_same() -> None:
    """Under a transform the size of the largest class is unknown, and the sort is over all columns."""
    z = embeddings()
    under = torch.func.grad(lambda x: triplet_margin_loss(x, LABELS, margin=0.3))(z)
    leaf = z.clone().requires_grad_()
    torch.testing.assert_close(
        under,
        torch.autograd.grad(triplet_margin_loss(leaf, LABELS, margin=0.3), leaf)[0],
        rtol=1e-12,
        atol=1e-14,
    )


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_nothing_is_larger_than_the_distances() -> None:
    z = embeddings(200, 8).float().requires_grad_()
    with LargestTensor() as largest:
        triplet_margin_loss(z, torch.arange(200) % 4).backward()
    assert largest.elements <= 200 * 201


@pytest.mark.skipif(
    importlib.util.find_spec("pytorch_metric_learning") is None,
    reason="pytorch-metric-learning is not installed",
)
@pytest.mark.parametrize(("mining", "theirs"), [("all", "all"), ("semi_hard", "semihard"), ("hard", "hard")])
def test_equals_pytorch_metric_learning(mining: str, theirs: str) -> None:
    from pytorch_metric_learning.losses import TripletMarginLoss as PeerLoss
    from pytorch_metric_learning.miners import TripletMarginMiner

    z = embeddings(60, 8).float()
    labels = torch.arange(60) % 5
    chosen = TripletMarginMiner(margin=0.05, type_of_triplets=theirs)(z, labels)
    want = PeerLoss()(z, labels, chosen).item()
    assert triplet_margin_loss(z, labels, mining=mining).item() == pytest.approx(want, abs=1e-6)  # type: ignore[arg-type]


@pytest.mark.bare
def test_refusals_name_the_argument() -> None:
    z = embeddings()
    with pytest.raises(ValueError, match="margin must lie in"):
        triplet_margin_loss(z, LABELS, margin=-0.1)
    with pytest.raises(ValueError, match="margin must lie in"):
        TripletMarginLoss(margin=math.inf)
    with pytest.raises(ValueError, match="mining must be 'all', 'semi_hard' or 'hard', got 'easy'"):
        TripletMarginLoss(mining="easy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels must have shape"):
        triplet_margin_loss(z, LABELS[:5])
    with pytest.raises(TypeError, match="labels"):
        triplet_margin_loss(z, LABELS.double())
    with pytest.raises(ValueError, match="denominator"):
        triplet_margin_loss(z, LABELS, reduction="sum", denominator=3.0)
