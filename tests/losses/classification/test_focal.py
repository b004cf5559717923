import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import FocalLoss, focal_loss
from tests.declaration import Declaration, classification_sample, shifted
from tests.golden.adapters import gradients

declarations = [
    Declaration(
        function=focal_loss,
        module=FocalLoss,
        sample=classification_sample(),
        invariances={"shift of the logits": shifted(3.7)},
    )
]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(5, (6,), generator=generator)


def test_gamma_zero_is_cross_entropy() -> None:
    logits, target = batch()
    weight = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
    torch.testing.assert_close(
        focal_loss(logits, target, gamma=0.0, class_weight=weight),
        F.cross_entropy(logits, target, weight=weight),
    )


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_by_definition(gamma: float) -> None:
    logits, target = batch()
    p = logits.softmax(-1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(
        focal_loss(logits, target, gamma=gamma, reduction="none"), -((1 - p) ** gamma) * p.log()
    )


def test_large_gamma_forgets_what_is_mostly_right() -> None:
    loss = focal_loss(torch.tensor([[3.0, 0.0]], dtype=torch.float64), torch.tensor([0]), gamma=200.0)
    assert 0 <= loss < 1e-200


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_certain_and_right_costs_nothing_and_has_no_slope(gamma: float) -> None:
    """1 - p is 0 there, and its power has an infinite slope for gamma below 1."""
    logits = torch.tensor([[800.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0]), gamma=gamma)
    assert loss == 0
    assert (gradients(loss, logits)[0].abs() < 1e-100).all()


def test_keeps_its_digits_where_the_probability_is_nearly_one() -> None:
    """With p = 1 - e and e small, (1 - p)^2 (-log p) is e^3 (1 + e / 2) to first order."""
    e = 1e-7
    logits = torch.tensor(
        [[-torch.special.logit(torch.tensor(e, dtype=torch.float64)), 0.0]], dtype=torch.float64
    )
    loss = focal_loss(logits, torch.tensor([0]))
    torch.testing.assert_close(loss, torch.tensor(e**3 * (1 + e / 2), dtype=torch.float64), rtol=1e-8, atol=0)


def test_probabilities_average_the_labels() -> None:
    logits, _ = batch()
    probabilities = torch.softmax(-logits, -1)
    expected = sum(
        probabilities[:, y] * focal_loss(logits, torch.full((6,), y), reduction="none") for y in range(5)
    )
    torch.testing.assert_close(focal_loss(logits, probabilities, reduction="none"), expected)


@pytest.mark.bare
def test_negative_gamma_is_refused() -> None:
    logits, target = batch()
    with pytest.raises(ValueError, match="gamma must lie in"):
        focal_loss(logits, target, gamma=-0.1)
    with pytest.raises(ValueError, match="gamma must lie in"):
        FocalLoss(-0.1)
