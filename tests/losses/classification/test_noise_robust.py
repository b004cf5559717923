from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import GCELoss, MAELoss, SCELoss, comp_sum_loss, gce_loss, mae_loss, sce_loss
from tests.declaration import Declaration, classification_sample, shifted
from tests.golden.adapters import gradients

declarations = [
    Declaration(
        function=function,
        module=module,
        sample=classification_sample(),
        invariances={"shift of the logits": shifted(3.7)},
    )
    for function, module in ((mae_loss, MAELoss), (gce_loss, GCELoss), (sce_loss, SCELoss))
]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(5, (6,), generator=generator)


def test_mae_is_half_the_distance_of_the_softmax_to_the_label() -> None:
    logits, target = batch()
    distance = (logits.softmax(-1) - F.one_hot(target, 5)).abs().sum(-1)
    torch.testing.assert_close(mae_loss(logits, target, reduction="none"), distance / 2)


def test_mae_is_symmetric() -> None:
    """Its sum over the labels is C - 1 whatever the scores, so noise cannot move its minimiser."""
    logits, _ = batch()
    total = sum(mae_loss(logits, torch.full((6,), y), reduction="none") for y in range(5))
    torch.testing.assert_close(total, torch.full((6,), 4.0, dtype=torch.float64))


def test_reverse_cross_entropy_is_symmetric() -> None:
    logits, _ = batch()
    total = sum(sce_loss(logits, torch.full((6,), y), alpha=0.0, reduction="none") for y in range(5))
    torch.testing.assert_close(total, torch.full((6,), 16.0, dtype=torch.float64))


@pytest.mark.parametrize("q", [0.05, 0.7, 1.0])
def test_gce_by_definition(q: float) -> None:
    logits, target = batch()
    p = logits.softmax(-1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(gce_loss(logits, target, q=q, reduction="none"), (1 - p**q) / q)


def test_gce_lies_between_cross_entropy_and_mae() -> None:
    logits, target = batch()
    torch.testing.assert_close(gce_loss(logits, target, q=1.0), mae_loss(logits, target))
    torch.testing.assert_close(
        gce_loss(logits, target, q=1e-9), F.cross_entropy(logits, target), rtol=1e-8, atol=0
    )
    torch.testing.assert_close(gce_loss(logits, target, q=0.4), comp_sum_loss(logits, target, tau=1.4))


def test_gradients_weigh_cross_entropys_by_a_power_of_the_probability() -> None:
    logits, target = batch()
    leaf = logits.clone().requires_grad_()
    p = logits.softmax(-1)
    own = p.gather(1, target[:, None])
    towards = p - F.one_hot(target, 5)
    for loss, power in (
        (mae_loss(leaf, target, reduction="sum"), 1.0),
        (gce_loss(leaf, target, reduction="sum"), 0.7),
    ):
        torch.testing.assert_close(gradients(loss, leaf)[0], own**power * towards)


def test_sce_by_definition() -> None:
    """-sum_k p_k log q_k with q one-hot and log 0 = A, beside cross-entropy."""
    logits, target = batch()
    p, label = logits.softmax(-1), F.one_hot(target, 5)
    log_label = torch.where(label == 1, torch.tensor(0.0, dtype=torch.float64), -6.0)
    expected = 0.3 * -(label * p.log()).sum(-1) + 2.0 * -(p * log_label).sum(-1)
    actual = sce_loss(logits, target, alpha=0.3, beta=2.0, log_zero=-6.0, reduction="none")
    torch.testing.assert_close(actual, expected)


def test_sce_limits() -> None:
    logits, target = batch()
    torch.testing.assert_close(sce_loss(logits, target, alpha=1.0, beta=0.0), F.cross_entropy(logits, target))
    torch.testing.assert_close(sce_loss(logits, target, alpha=0.0), 4 * mae_loss(logits, target))


@pytest.mark.parametrize("loss", [mae_loss, gce_loss, sce_loss])
def test_probabilities_average_the_labels(loss: Any) -> None:
    logits, _ = batch()
    probabilities = torch.softmax(-logits, -1)
    expected = sum(
        probabilities[:, y] * loss(logits, torch.full((6,), y), reduction="none") for y in range(5)
    )
    torch.testing.assert_close(loss(logits, probabilities, reduction="none"), expected)


@pytest.mark.bare
def test_doors() -> None:
    logits, target = batch()
    for q in (0.0, 1.1):
        with pytest.raises(ValueError, match="q must lie in"):
            gce_loss(logits, target, q=q)
        with pytest.raises(ValueError, match="q must lie in"):
            GCELoss(q)
    for bad in ({"alpha": -1.0}, {"beta": -1.0}, {"log_zero": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            sce_loss(logits, target, **bad)
        with pytest.raises(ValueError, match=next(iter(bad))):
            SCELoss(**bad)
