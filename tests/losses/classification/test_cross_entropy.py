from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import CrossEntropyLoss, LabelSmoothingLoss, cross_entropy_loss, label_smoothing_loss
from tests.declaration import Declaration, classification_sample, shifted

declarations = [
    Declaration(
        function=cross_entropy_loss,
        module=CrossEntropyLoss,
        sample=classification_sample(),
        invariances={"shift of the logits": shifted(3.7)},
    ),
    Declaration(
        function=label_smoothing_loss,
        module=LabelSmoothingLoss,
        sample=classification_sample(),
        invariances={"shift of the logits": shifted(3.7)},
    ),
]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(5, (6,), generator=generator)


WEIGHT = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torchs_for_labels(reduction: Any, weight: Tensor | None) -> None:
    logits, target = batch()
    target[2] = -100
    torch.testing.assert_close(
        cross_entropy_loss(logits, target, class_weight=weight, reduction=reduction),
        F.cross_entropy(logits, target, weight=weight, reduction=reduction),
    )


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_equals_torchs_for_probabilities(weight: Tensor | None) -> None:
    logits, _ = batch()
    probabilities = torch.softmax(-logits, -1)
    torch.testing.assert_close(
        cross_entropy_loss(logits, probabilities, class_weight=weight),
        F.cross_entropy(logits, probabilities, weight=weight),
    )


def test_equals_torchs_for_sequences() -> None:
    logits, target = batch()
    sequences, labels = logits.reshape(2, 3, 5), target.reshape(2, 3)
    torch.testing.assert_close(
        cross_entropy_loss(sequences, labels, reduction="none"),
        F.cross_entropy(sequences.transpose(1, 2), labels, reduction="none"),
    )


def test_denominator_makes_micro_batches_add_up() -> None:
    logits, target = batch()
    parts = [cross_entropy_loss(logits[i : i + 2], target[i : i + 2], denominator=6.0) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), F.cross_entropy(logits, target))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothing_equals_torchs(smoothing: float) -> None:
    logits, target = batch()
    torch.testing.assert_close(
        label_smoothing_loss(logits, target, smoothing=smoothing),
        F.cross_entropy(logits, target, label_smoothing=smoothing),
    )


def test_smoothing_is_cross_entropy_against_the_mixture() -> None:
    logits, target = batch()
    mixture = 0.8 * F.one_hot(target, 5).double() + 0.2 / 5
    torch.testing.assert_close(
        label_smoothing_loss(logits, target, smoothing=0.2), cross_entropy_loss(logits, mixture)
    )


def test_smoothing_of_probabilities_averages_the_labels() -> None:
    logits, _ = batch()
    probabilities = torch.softmax(-logits, -1)
    expected = sum(
        probabilities[:, y] * label_smoothing_loss(logits, torch.full((6,), y), reduction="none")
        for y in range(5)
    )
    torch.testing.assert_close(label_smoothing_loss(logits, probabilities, reduction="none"), expected)


def test_class_weight_of_smoothed_labels_weighs_the_row() -> None:
    """As the docstring says; torch weighs the smoothed mass class by class instead."""
    logits, target = batch()
    rows = label_smoothing_loss(logits, target, reduction="none")
    weight = WEIGHT[target]
    torch.testing.assert_close(
        label_smoothing_loss(logits, target, class_weight=WEIGHT), (weight * rows).sum() / weight.sum()
    )


@pytest.mark.bare
@pytest.mark.parametrize("smoothing", [-0.1, 1.1])
def test_smoothing_outside_the_unit_interval_is_refused(smoothing: float) -> None:
    logits, target = batch()
    with pytest.raises(ValueError, match="smoothing must lie in"):
        label_smoothing_loss(logits, target, smoothing=smoothing)
    with pytest.raises(ValueError, match="smoothing must lie in"):
        LabelSmoothingLoss(smoothing)
