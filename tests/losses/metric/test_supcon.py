"""SupCon: plain loops, NT-Xent as the case of unique labels, and anchors without a positive."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from telos.losses import SupConLoss, ntxent_loss, supcon_loss
from tests.declaration import Declaration, Inputs, embedding_sample


def renamed_labels(inputs: Inputs) -> Inputs:
    names = torch.tensor([70, -3, 11])
    # scaled as well, so that some floating input moves
    return {**inputs, "labels": names[inputs["labels"]], "embeddings": 2.0 * inputs["embeddings"]}


declarations = [
    Declaration(
        function=supcon_loss,
        module=SupConLoss,
        sample=embedding_sample(),
        differentiable=("embeddings",),
        rows=False,
        extreme="",
        growth=2,
        invariances={"names of labels and scale": renamed_labels},
    ),
    Declaration(
        function=None,
        module=lambda: SupConLoss(chunk_size=4),
        sample=embedding_sample(),
        differentiable=("embeddings",),
        rows=False,
        extreme="",
        growth=1,
        no_compile="a chunk size that was asked for breaks the graph; tests/kernels/test_contrast.py",
    ),
]

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3, 1])


def embeddings(n: int = 8, dim: int = 4) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_loops(z: Tensor, labels: Tensor, temperature: float) -> list[Tensor]:
    """The values of the anchors that have a positive."""
    z = z / z.norm(dim=-1, keepdim=True)
    values = []
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        positives = [k for k in others if labels[k] == labels[i]]
        if positives:
            log_sum = torch.stack([z[i] @ z[k] / temperature for k in others]).exp().sum().log()
            values.append(sum(log_sum - z[i] @ z[p] / temperature for p in positives) / len(positives))
    return values


def test_equals_plain_loops() -> None:
    z = embeddings().requires_grad_()
    values = torch.stack(by_loops(z, LABELS, 0.2))
    assert len(values) == 6, "labels 2 and 3 occur once"
    loss = supcon_loss(z, LABELS, temperature=0.2)
    torch.testing.assert_close(loss, values.mean())
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(values.mean(), z))


def test_anchors_without_a_positive_do_not_count() -> None:
    z = embeddings()
    values = supcon_loss(z, LABELS, reduction="none")
    assert values.shape == (8,)
    assert (values[[3, 6]] == 0).all()
    assert (values != 0).sum() == 6
    torch.testing.assert_close(supcon_loss(z, LABELS), values.sum() / 6)
    torch.testing.assert_close(supcon_loss(z, LABELS, reduction="sum"), values.sum())
    # the authors' mean, over all anchors
    torch.testing.assert_close(supcon_loss(z, LABELS, denominator=8.0), values.sum() / 8)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_zero_with_a_graph_where_no_anchor_counts(n: int) -> None:
    z = embeddings(n).requires_grad_()
    loss = supcon_loss(z, torch.arange(n))
    assert loss == 0
    (slope,) = torch.autograd.grad(loss, z)
    assert slope.shape == (n, 4)
    assert torch.count_nonzero(slope) == 0


def both_forms(z: Tensor, labels: Tensor, chunk_size: Any, **options: Any) -> None:
    """The tiled form against the dense one: values, and gradients under a random cotangent."""
    z = z.detach().requires_grad_()
    tiled, dense = (supcon_loss(z, labels, chunk_size=size, **options) for size in (chunk_size, None))
    torch.testing.assert_close(tiled, dense, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(dense)
    (got,), (want,) = (torch.autograd.grad(loss, z, cotangent) for loss in (tiled, dense))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"reduction": "none"}, {"denominator": 3.0}, {"denominator": torch.tensor(4)}],
    ids=str,
)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_tiles_change_nothing(chunk_size: int, normalize: bool, options: dict[str, Any]) -> None:
    for labels in (LABELS, torch.zeros(8).long(), torch.arange(8), LABELS.to(torch.uint8)):
        for temperature in (0.1, 0.01):
            both_forms(
                embeddings(), labels, chunk_size, normalize=normalize, temperature=temperature, **options
            )


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_tiles_of_hardly_any_examples(n: int, reduction: Any) -> None:
    both_forms(embeddings(n), torch.zeros(n).long(), 3, reduction=reduction)


@pytest.mark.parametrize("per_class", [4, 300])
def test_tiles_of_a_large_batch(per_class: int) -> None:
    """1,100 examples: more than one tile of 1,024 rows, with a remainder."""
    order = torch.randperm(1100, generator=torch.Generator().manual_seed(1))
    both_forms(embeddings(1100, 3), order // per_class, "auto")


def test_second_derivatives_without_tiles() -> None:
    z = embeddings(5).requires_grad_()
    labels = torch.tensor([0, 0, 1, 2, 1])
    assert torch.autograd.gradgradcheck(lambda z: supcon_loss(z, labels), z)
    with pytest.raises(RuntimeError, match="pass chunk_size=None"):
        torch.autograd.grad(supcon_loss(z, labels, chunk_size=2), z, create_graph=True)


def test_functional_transforms_ignore_tiles() -> None:
    stack = torch.stack([embeddings(), embeddings() + 1])
    slopes = torch.func.vmap(torch.func.grad(lambda z: supcon_loss(z, LABELS, chunk_size=3)))(stack)
    for entry, slope in zip(stack, slopes, strict=True):
        leaf = entry.clone().requires_grad_()
        torch.testing.assert_close(slope, torch.autograd.grad(supcon_loss(leaf, LABELS), leaf)[0])


@pytest.mark.bare
def test_compiled_code_is_one_graph_at_any_size() -> None:
    z, labels = embeddings(1100, 3).requires_grad_(), torch.arange(1100) // 4
    torch.compiler.reset()
    compiled = torch.compile(supcon_loss, fullgraph=True, backend="aot_eager")
    want, got = supcon_loss(z, labels), compiled(z, labels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, z), torch.autograd.grad(want, z))


def test_two_views_of_unique_labels_are_ntxent() -> None:
    z1, z2 = embeddings(10).chunk(2)
    labels = torch.arange(5)
    stacked = supcon_loss(torch.cat([z1, z2]), torch.cat([labels, labels]), temperature=0.3)
    torch.testing.assert_close(stacked, ntxent_loss(z1, z2, temperature=0.3))


def test_one_class_of_equal_embeddings() -> None:
    z = torch.ones(6, 3, dtype=torch.float64)
    torch.testing.assert_close(supcon_loss(z, torch.zeros(6).long()).item(), math.log(5))


def test_gradient_by_formula() -> None:
    """dL_i/ds_ik = (P_ik - [k in P(i)] / |P(i)|) / t, and nothing for an anchor without a positive."""
    z = embeddings(8, 8)
    gram = (normalize(z, dim=-1) @ normalize(z, dim=-1).T).requires_grad_()
    itself = torch.eye(8, dtype=torch.bool)
    positives = (LABELS[:, None] == LABELS) & ~itself
    count = positives.sum(-1, keepdim=True)
    probabilities = (gram / 0.2).masked_fill(itself, -math.inf).softmax(-1)
    wanted = torch.where(count > 0, probabilities - positives / count.clamp_min(1), 0.0) / 0.2 / 6
    # through the embeddings: dL/dz = (W + W^T) z for unit z without normalisation
    unit = normalize(z, dim=-1).requires_grad_()
    loss = supcon_loss(unit, LABELS, temperature=0.2, normalize=False)
    (slope,) = torch.autograd.grad(loss, unit)
    torch.testing.assert_close(slope, ((wanted + wanted.T) @ unit).detach())


def test_large_inner_products_stay_finite() -> None:
    z = (300.0 * embeddings().float().sign()).requires_grad_()
    loss = supcon_loss(z, LABELS, normalize=False, temperature=0.01)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()  # type: ignore[union-attr]


@pytest.mark.bare
def test_refusals_name_the_argument() -> None:
    z = embeddings()
    with pytest.raises(ValueError, match="temperature"):
        SupConLoss(temperature=-1.0)
    with pytest.raises(ValueError, match="labels must have shape"):
        supcon_loss(z, LABELS[:5])
    with pytest.raises(TypeError, match="labels"):
        supcon_loss(z, LABELS.double())
    with pytest.raises(ValueError, match="denominator"):
        supcon_loss(z, LABELS, reduction="sum", denominator=3.0)
    with pytest.raises(ValueError, match="chunk_size must be 'auto', None or at least 1, got 0"):
        supcon_loss(z, LABELS, chunk_size=0)
    with pytest.raises(ValueError, match="chunk_size"):
        SupConLoss(chunk_size=-1)
