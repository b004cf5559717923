import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from telos.losses import TaskInfo, misfit
from telos.losses.classification.trades import (
    AdversarialCrossEntropyLoss,
    TRADESLoss,
    adversarial_cross_entropy_loss,
    trades_attack,
    trades_loss,
)
from tests.declaration import Declaration, classification_sample, shifted


def adversarial(n: int, classes: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, classes, generator=generator, dtype=torch.float64).to(dtype)


declarations = [
    Declaration(
        trades_loss,
        TRADESLoss,
        classification_sample(adversarial_logits=adversarial),
        differentiable=("logits", "adversarial_logits"),
        invariances={"shift": shifted(3.0), "shift of the attack": shifted(-2.0, "adversarial_logits")},
    ),
    Declaration(
        adversarial_cross_entropy_loss,
        AdversarialCrossEntropyLoss,
        classification_sample(adversarial_logits=adversarial),
        differentiable=("adversarial_logits",),
        extreme="adversarial_logits",
        invariances={"the clean logits": shifted(3.0), "shift": shifted(-2.0, "adversarial_logits")},
    ),
]


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, moved = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in "12")
    return clean, moved, torch.tensor([0, 1, 2, 3, 0, 1])


def test_trades_is_cross_entropy_and_a_divergence() -> None:
    clean, moved, target = problem()
    p, q = clean.softmax(-1), moved.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    expected = F.cross_entropy(clean, target) + 2.5 * divergence
    found = trades_loss(clean, target, adversarial_logits=moved, beta=2.5)
    torch.testing.assert_close(found, expected)


def test_limits_of_trades() -> None:
    clean, moved, target = problem()
    plain = F.cross_entropy(clean, target)
    torch.testing.assert_close(trades_loss(clean, target, adversarial_logits=moved, beta=0.0), plain)
    torch.testing.assert_close(trades_loss(clean, target, adversarial_logits=clean), plain)
    torch.testing.assert_close(
        adversarial_cross_entropy_loss(clean, target, adversarial_logits=moved),
        F.cross_entropy(moved, target),
    )


def test_probability_targets_are_means_over_labels() -> None:
    clean, moved, target = problem()
    soft = F.one_hot(target, 4).double()
    for loss in (TRADESLoss(), AdversarialCrossEntropyLoss()):
        torch.testing.assert_close(
            loss(clean, soft, adversarial_logits=moved), loss(clean, target, adversarial_logits=moved)
        )


def test_the_gradient_flows_through_both_outputs() -> None:
    clean, moved, target = (t.requires_grad_() if t.is_floating_point() else t for t in problem())
    with_clean, with_moved = torch.autograd.grad(
        trades_loss(clean, target, adversarial_logits=moved) - F.cross_entropy(clean, target), (clean, moved)
    )
    p, q = clean.softmax(-1), moved.softmax(-1)
    torch.testing.assert_close(with_moved, 6.0 * (q - p).detach() / 6)
    ratio = (p / q).log().detach()
    expected = p * (ratio - (p * ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(with_clean, expected.detach())


def test_the_attack_moves_the_output_of_a_linear_model_to_a_corner() -> None:
    model = nn.Linear(3, 2, dtype=torch.float64)
    inputs = torch.full((5, 3), 0.5, dtype=torch.float64)
    moved = trades_attack(
        model, inputs, torch.zeros(5, dtype=torch.long), radius=0.1, steps=20,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    # the difference of two logits is linear: its extremes on the cube are at +-sign(w_1 - w_0)
    corner = 0.1 * (model.weight[1] - model.weight[0]).sign()
    gaps = ((moved - inputs) - corner).abs().amax(1), ((moved - inputs) + corner).abs().amax(1)
    assert torch.minimum(*gaps).max() < 1e-12
    assert model.weight.grad is None


def test_what_the_task_must_supply() -> None:
    info = TaskInfo(family="classification", num_classes=3)
    assert "adversarial_logits" in (misfit(TRADESLoss, info) or "")
    supplied = TaskInfo("classification", num_classes=3, supplies=frozenset({"adversarial_logits"}))
    assert misfit(TRADESLoss, supplied) is None


@pytest.mark.bare
def test_errors() -> None:
    clean, moved, target = problem()
    with pytest.raises(ValueError, match="beta"):
        trades_loss(clean, target, adversarial_logits=moved, beta=-1.0)
    with pytest.raises(ValueError, match="adversarial_logits"):
        trades_loss(clean, target, adversarial_logits=moved[:2])
