"""Normalised softmax: golden values, the geometry of its gradients, and its limits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import NormalizedSoftmaxLoss, TaskInfo, misfit, normalized_softmax_loss
from telos.nn import HypersphericalHead
from telos.surgery import add_class
from tests.declaration import Declaration, Inputs, scaled
from tests.golden.adapters import Case, gradients

CLASSES, DIM = 3, 5


def sample(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "embeddings": normal(n, DIM),
        "labels": torch.randint(CLASSES, (n,), generator=generator),
        "weight": normal(CLASSES, DIM),
    }


def rotated(inputs: Inputs) -> Inputs:
    """One rotation of embeddings and class directions together."""
    noise = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rotation = torch.linalg.qr(noise).Q.to(inputs["embeddings"].dtype)
    return {**inputs, "embeddings": inputs["embeddings"] @ rotation, "weight": inputs["weight"] @ rotation}


declarations = [
    Declaration(
        function=normalized_softmax_loss,
        module=lambda: NormalizedSoftmaxLoss(CLASSES, DIM),
        sample=sample,
        differentiable=("embeddings", "weight"),
        extreme="",
        invariances={
            "length of embeddings": scaled(7.0, "embeddings"),
            "length of class weights": scaled(0.3, "weight"),
            "rotation": rotated,
        },
        module_only=("num_classes", "dim", "learn_scale"),
    )
]


def golden_hyperspherical_novel_class(case: Case) -> dict:
    if case.params["function"] == "add_class":
        weight = case.inputs["weight"]
        head = HypersphericalHead(weight.shape[1], weight.shape[0], scale=case.params["scale"]).double()
        with torch.no_grad():
            head.weight.copy_(weight)
        grown = add_class(head, case.inputs["support_embeddings"])
        logits = grown(case.inputs["query_embeddings"])
        return {
            "new_weight": grown.directions(),
            "query_logits": logits,
            "query_probs": logits.softmax(-1),
        }
    embeddings, weight = case.leaf("embeddings"), case.leaf("weight")
    loss = normalized_softmax_loss(embeddings, case.inputs["target"], weight, scale=case.params["scale"])
    return dict(
        zip(
            ("loss", "grad_embeddings", "grad_weight"),
            (loss, *gradients(loss, embeddings, weight)),
            strict=True,
        )
    )


def draw(n: int = 6, seed: int = 0) -> Inputs:
    return sample(n, torch.Generator().manual_seed(seed), torch.float64)


def test_is_cross_entropy_on_scaled_cosines() -> None:
    inputs = draw()
    cosine = F.cosine_similarity(inputs["embeddings"][:, None], inputs["weight"][None], dim=-1)
    torch.testing.assert_close(
        normalized_softmax_loss(**inputs, scale=16.0), F.cross_entropy(16.0 * cosine, inputs["labels"])
    )


def test_gradients_are_orthogonal_to_what_they_move() -> None:
    inputs = draw()
    leaves = [inputs[name].requires_grad_() for name in ("embeddings", "weight")]
    for leaf, slope in zip(leaves, gradients(normalized_softmax_loss(**inputs), *leaves), strict=True):
        assert slope.norm(dim=1).min() > 1e-3
        torch.testing.assert_close((leaf * slope).sum(1), torch.zeros(leaf.shape[0], dtype=torch.float64))


def test_gradient_falls_with_the_length_of_the_embedding() -> None:
    inputs = draw()
    short = inputs["embeddings"].clone().requires_grad_()
    long = (100 * inputs["embeddings"]).requires_grad_()
    (slope,) = gradients(normalized_softmax_loss(**{**inputs, "embeddings": short}), short)
    (small,) = gradients(normalized_softmax_loss(**{**inputs, "embeddings": long}), long)
    torch.testing.assert_close(100 * small, slope)


def test_small_scale_gives_the_uniform_loss() -> None:
    loss = normalized_softmax_loss(**draw(), scale=1e-9)
    torch.testing.assert_close(loss.item(), math.log(CLASSES))


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_floor_at_perfect_separation(scale: float) -> None:
    """C directions with cosines -1 / (C - 1) and every embedding on its own."""
    classes = 10
    simplex = torch.eye(classes, dtype=torch.float64) - 1 / classes
    loss = normalized_softmax_loss(3 * simplex, torch.arange(classes), simplex, scale=scale)
    floor = math.log1p((classes - 1) * math.exp(-scale * classes / (classes - 1)))
    assert loss.item() == pytest.approx(floor, rel=1e-10)


def test_zero_rows_have_no_direction_and_no_gradient() -> None:
    inputs = draw()
    inputs["embeddings"][2] = 0
    inputs["weight"][1] = 0
    leaves = [inputs[name].requires_grad_() for name in ("embeddings", "weight")]
    values = normalized_softmax_loss(**inputs, reduction="none")
    assert values[2].item() == pytest.approx(math.log(CLASSES), rel=1e-12)
    embeddings_slope, weight_slope = gradients(values, *leaves)
    assert torch.count_nonzero(embeddings_slope[2]) == 0
    assert torch.count_nonzero(weight_slope[1]) == 0
    assert weight_slope[0].norm() > 0


def test_project_mode_takes_class_weights_as_they_are() -> None:
    inputs = draw()
    unit = F.normalize(inputs["embeddings"], dim=1)
    torch.testing.assert_close(
        normalized_softmax_loss(**inputs, scale=4.0, mode="project"),
        F.cross_entropy(4.0 * unit @ inputs["weight"].T, inputs["labels"]),
    )
    inputs["weight"] = F.normalize(inputs["weight"], dim=1)
    torch.testing.assert_close(
        normalized_softmax_loss(**inputs, mode="project"), normalized_softmax_loss(**inputs)
    )


def test_projection_after_a_step_restores_unit_length() -> None:
    loss = NormalizedSoftmaxLoss(CLASSES, DIM, mode="project").double()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    inputs = draw()
    loss(inputs["embeddings"], inputs["labels"]).backward()
    optimizer.step()
    moved = loss.weight.detach().clone()
    assert (moved.norm(dim=1) - 1).abs().max() > 1e-3
    loss.project_()
    torch.testing.assert_close(loss.weight.detach(), moved / (moved.norm(dim=1, keepdim=True) + 1e-7))


def test_a_row_of_weight_zero_does_not_exist() -> None:
    inputs = draw()
    kept = torch.tensor([True, True, False, True, True, True])
    class_weight = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    poisoned = inputs["embeddings"].clone()
    poisoned[2] = torch.nan
    hidden = [
        {"sample_weight": kept.double()},
        {"labels": torch.where(kept, inputs["labels"], -100)},
    ]
    want = normalized_softmax_loss(inputs["embeddings"][kept], inputs["labels"][kept], inputs["weight"])
    for way in hidden:
        leaf, weight = poisoned.clone().requires_grad_(), inputs["weight"].clone().requires_grad_()
        loss = normalized_softmax_loss(**{**inputs, "embeddings": leaf, "weight": weight, **way})
        torch.testing.assert_close(loss.detach(), want)
        slope, weight_slope = gradients(loss, leaf, weight)
        assert torch.count_nonzero(slope[2]) == 0
        assert torch.isfinite(slope).all()
        assert torch.isfinite(weight_slope).all()
    leaf = poisoned.clone().requires_grad_()
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    loss = normalized_softmax_loss(leaf, labels, inputs["weight"], class_weight=class_weight)
    assert torch.isfinite(gradients(loss, leaf)[0]).all()


def test_nan_in_a_row_that_counts_is_seen() -> None:
    inputs = draw()
    inputs["embeddings"][0, 0] = torch.nan
    assert torch.isnan(normalized_softmax_loss(**inputs))


def test_class_and_sample_weights_follow_torch() -> None:
    inputs = draw(8)
    class_weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    logits = 10 * F.normalize(inputs["embeddings"], dim=1) @ F.normalize(inputs["weight"], dim=1).T
    torch.testing.assert_close(
        normalized_softmax_loss(**inputs, class_weight=class_weight),
        F.cross_entropy(logits, inputs["labels"], weight=class_weight),
    )
    torch.testing.assert_close(
        normalized_softmax_loss(**inputs, sample_weight=class_weight[inputs["labels"]]),
        F.cross_entropy(logits, inputs["labels"], weight=class_weight),
    )


def test_learned_scale_is_a_positive_parameter() -> None:
    loss = NormalizedSoftmaxLoss(CLASSES, DIM, scale=5.0, learn_scale=True)
    assert isinstance(loss.scale, Tensor)
    assert loss.scale.item() == pytest.approx(5.0, rel=1e-6)
    inputs = sample(6, torch.Generator().manual_seed(0), torch.float32)
    loss(inputs["embeddings"], inputs["labels"]).backward()
    assert loss.log_scale is not None
    assert loss.log_scale.grad is not None
    assert loss.log_scale.grad.abs() > 0
    assert len(list(loss.parameters())) == 2


def test_starts_at_unit_length_and_follows_a_generator() -> None:
    loss = NormalizedSoftmaxLoss(4, 7)
    torch.testing.assert_close(loss.weight.detach().norm(dim=1), torch.ones(4))
    loss.reset_parameters(torch.Generator().manual_seed(1))
    first = loss.weight.detach().clone()
    loss.reset_parameters(torch.Generator().manual_seed(1))
    assert torch.equal(first, loss.weight)
    loss.reset_parameters(torch.Generator().manual_seed(2))
    assert not torch.equal(first, loss.weight)


def test_is_built_from_a_task() -> None:
    info = TaskInfo(family="metric", num_classes=4, dim=7)
    loss = NormalizedSoftmaxLoss.from_task(info, scale=20.0)
    assert loss.weight.shape == (4, 7)
    assert loss.scale == 20.0
    assert misfit(NormalizedSoftmaxLoss, info) is None
    with pytest.raises(ValueError, match="num_classes and dim"):
        NormalizedSoftmaxLoss.from_task(TaskInfo(family="metric", num_classes=4))


@pytest.mark.bare
def test_refuses_what_it_cannot_mean() -> None:
    inputs = draw()
    with pytest.raises(ValueError, match="scale must lie in"):
        normalized_softmax_loss(**inputs, scale=0.0)
    with pytest.raises(ValueError, match="mode must be 'reparam' or 'project', got 'both'"):
        NormalizedSoftmaxLoss(3, 5, mode="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        normalized_softmax_loss(**{**inputs, "labels": inputs["labels"] + 3})
    with pytest.raises(ValueError, match=r"weight must have shape \(C, 5\)"):
        normalized_softmax_loss(**{**inputs, "weight": inputs["weight"][:, :4]})
    with pytest.raises(ValueError, match="class_weight must have shape"):
        normalized_softmax_loss(**inputs, class_weight=torch.ones(4, dtype=torch.float64))
