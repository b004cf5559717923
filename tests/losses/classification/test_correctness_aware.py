import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses.classification.correctness_aware import CorrectnessAwareLoss, correctness_aware_loss
from telos.losses.classification.cross_entropy import cross_entropy_loss
from telos.metrics.calibration import expected_calibration_error, top1_brier
from telos.nn.calibrators import AdaptiveTemperature, fit_calibrator, transform_consistency_features
from tests.declaration import Declaration, Inputs, classification_sample, shifted
from tests.golden.adapters import Case, gradients


def relabelled(inputs: Inputs) -> Inputs:
    """Classes in another order."""
    order = torch.tensor([3, 0, 4, 1, 2])
    return {**inputs, "logits": inputs["logits"][:, order], "target": order.argsort()[inputs["target"]]}


TIES = "where two classes tie for the prediction"
declarations = [
    Declaration(
        function=correctness_aware_loss,
        module=CorrectnessAwareLoss,
        sample=classification_sample(),
        rows=False,
        kinks=TIES,
        invariances={"shift of the logits": shifted(3.7), "order of the classes": relabelled},
    ),
    Declaration(
        function=None,
        module=lambda: CorrectnessAwareLoss(balanced=True),
        sample=classification_sample(classes=3),
        rows=False,
        kinks=TIES,
    ),
]


def calibrator_of(case: Case) -> AdaptiveTemperature:
    names = ("hidden", "t_min", "t_max")
    weights = case.inputs["weights"]
    calibrator = AdaptiveTemperature(weights["w1"].shape[1], **{name: case.params[name] for name in names})
    state = {"hidden.weight": "w1", "hidden.bias": "b1", "output.weight": "w2", "output.bias": "b2"}
    calibrator.to(case.dtype).load_state_dict({name: weights[key] for name, key in state.items()})
    return calibrator


def read(calibrator: AdaptiveTemperature, case: Case, features: Tensor) -> dict[str, Any]:
    logits, target = case.inputs["logits"], case.inputs["target"]
    calibrated = calibrator(logits, features)
    ece = [
        expected_calibration_error(scores.softmax(-1), target, n_bins=25) for scores in (logits, calibrated)
    ]
    return {
        "features": features,
        "temperature": calibrator.temperature(features),
        "calibrated_logits": calibrated,
        "ece25_before": ece[0],
        "ece25_after": ece[1],
    }


def golden_correctness_aware(case: Case) -> dict[str, Any]:
    target = case.inputs["target"]
    if "transformed_logits" not in case.inputs:
        logits = case.leaf("logits")
        loss = correctness_aware_loss(logits, target, balanced=case.params["balanced"])
        correct = (logits.argmax(-1) == target).long()
        return {"loss": loss, "grad_logits": gradients(loss, logits)[0], "correct": correct}
    logits = case.inputs["logits"]
    features = transform_consistency_features(logits, case.inputs["transformed_logits"], k=case.params["k"])
    calibrator = calibrator_of(case)
    found = read(calibrator, case, features)
    loss = CorrectnessAwareLoss(balanced=True)
    options = {name: case.params[name] for name in ("lr", "epochs")}
    history = fit_calibrator(calibrator, logits, features, target, loss, **options)
    weights = dict(zip(("w1", "b1", "w2", "b2"), (p.detach() for p in calibrator.parameters()), strict=True))
    trained = {
        **read(calibrator, case, features),
        **weights,
        "weights": weights,
        "losses": [record["loss"] for record in history],
        "loss": loss(calibrator(logits, features), target),
    }
    expected = case.expected.get("after_10_adam_epochs")
    found["after_10_adam_epochs"] = trained if isinstance(expected, dict) else trained["temperature"]
    return found


def batch(n: int = 12, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (n,), generator=generator)


def parts(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    confidence, predicted = logits.softmax(-1).max(-1)
    return confidence, (predicted == target).double()


# ---------------------------------------------------------------------------------------------- definition


def test_plain_is_the_brier_score_of_the_confidence() -> None:
    logits, target = batch()
    torch.testing.assert_close(
        correctness_aware_loss(logits, target), top1_brier(logits.softmax(-1), target), rtol=1e-13, atol=0
    )


def test_balanced_by_the_weights_of_the_authors_code() -> None:
    logits, target = batch()
    confidence, correct = parts(logits, target)
    r = correct.mean()
    assert 0 < r < 1
    assert r != 0.5
    weight = torch.where(correct == 1, 1 - r, r)
    expected = (weight * (confidence - correct) ** 2).sum() / weight.sum()
    torch.testing.assert_close(correctness_aware_loss(logits, target, balanced=True), expected)


def test_balanced_is_the_mean_of_the_means_of_right_and_wrong() -> None:
    logits, target = batch()
    confidence, correct = parts(logits, target)
    error = (confidence - correct) ** 2
    expected = (error[correct == 1].mean() + error[correct == 0].mean()) / 2
    rows = correctness_aware_loss(logits, target, balanced=True, reduction="none")
    torch.testing.assert_close(rows.mean(), expected)
    torch.testing.assert_close(
        correctness_aware_loss(logits, target, balanced=True, denominator=4), rows.sum() / 4
    )


def test_balanced_is_plain_where_half_are_right() -> None:
    logits, _ = batch()
    target = torch.where(torch.arange(12) < 6, logits.argmax(-1), logits.argmin(-1))
    torch.testing.assert_close(
        correctness_aware_loss(logits, target, balanced=True), correctness_aware_loss(logits, target)
    )


@pytest.mark.parametrize("right", [True, False])
def test_balanced_is_plain_where_all_are_right_or_all_wrong(right: bool) -> None:
    """The authors' code divides 0 by 0 there."""
    logits, _ = batch()
    target = logits.argmax(-1) if right else logits.argmin(-1)
    logits.requires_grad_()
    balanced, plain = (correctness_aware_loss(logits, target, balanced=option) for option in (True, False))
    torch.testing.assert_close(balanced, plain)
    torch.testing.assert_close(gradients(balanced, logits), gradients(plain, logits))


@pytest.mark.parametrize("balanced", [False, True])
def test_gradient_away_from_ties(balanced: bool) -> None:
    logits, target = batch()
    weight = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda scores: correctness_aware_loss(scores, target, balanced=balanced, sample_weight=weight),
        logits.requires_grad_(),
    )


@pytest.mark.parametrize("balanced", [False, True])
def test_weights_are_repeated_rows_in_the_balance_too(balanced: bool) -> None:
    logits, target = batch()
    times = torch.arange(12) % 3
    weighted = correctness_aware_loss(logits, target, balanced=balanced, sample_weight=times.double())
    repeated = correctness_aware_loss(
        logits.repeat_interleave(times, 0), target.repeat_interleave(times), balanced=balanced
    )
    torch.testing.assert_close(weighted, repeated)


def test_probabilities_average_the_labels() -> None:
    logits, _ = batch()
    probabilities = (-logits).softmax(-1)
    weight = torch.linspace(0.5, 2.0, 4, dtype=torch.float64)
    expected = sum(
        weight[y]
        * probabilities[:, y]
        * correctness_aware_loss(logits, torch.full((12,), y), reduction="none")
        for y in range(4)
    )
    found = correctness_aware_loss(logits, probabilities, reduction="none", class_weight=weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("balanced", [False, True])
def test_correct_overrides_the_comparison_with_the_target(balanced: bool) -> None:
    logits, target = batch()
    correct = torch.arange(12) % 3 == 0
    as_labels = torch.where(correct, logits.argmax(-1), logits.argmin(-1))
    expected = correctness_aware_loss(logits, as_labels, balanced=balanced)
    module = CorrectnessAwareLoss(balanced=balanced)
    torch.testing.assert_close(module(logits, target, correct=correct), expected)
    soft = F.one_hot(target, 4).double()
    torch.testing.assert_close(module(logits, soft, correct=correct), expected)


# ---------------------------------------------------------------------------------------------- what it is for


def test_wrong_wants_a_high_temperature_and_right_a_low_one() -> None:
    logits, _ = batch(n=1)
    temperatures = torch.linspace(0.3, 10, 50, dtype=torch.float64).unsqueeze(-1)
    for target, sign in ((logits.argmin(-1), -1), (logits.argmax(-1), 1)):
        losses = correctness_aware_loss(logits / temperatures, target.expand(50), reduction="none")
        assert (sign * losses.diff() > 0).all()


def test_narrow_miss_against_cross_entropy() -> None:
    """The true class just behind: cross-entropy sharpens the wrong prediction, this loss flattens it."""
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.0, -1.0]], dtype=torch.float64)
    temperatures = torch.linspace(0.1, 10, 99_001, dtype=torch.float64)
    scores, target = logits / temperatures.unsqueeze(-1), torch.ones(99_001, dtype=torch.long)
    best = {
        loss: int(loss(scores, target, reduction="none").argmin())
        for loss in (cross_entropy_loss, correctness_aware_loss)
    }
    confidence = scores.softmax(-1)[:, 0]
    ce, ca = best[cross_entropy_loss], best[correctness_aware_loss]
    assert temperatures[ce].item() == pytest.approx(0.671, abs=1e-3)
    assert confidence[ce].item() == pytest.approx(0.527, abs=1e-3)
    assert temperatures[ca] == 10
    assert confidence[ca].item() == pytest.approx(0.237, abs=1e-3)


@pytest.mark.parametrize(("balanced", "best"), [(False, 0.7), (True, 0.5)])
def test_best_constant_confidence(balanced: bool, best: float) -> None:
    """The accuracy of the group; balanced forgets the base rate."""
    confidence = torch.linspace(0.5, 0.999, 2000, dtype=torch.float64)
    target = torch.tensor([0] * 7 + [1] * 3)
    losses = [
        correctness_aware_loss(
            torch.tensor([[math.log(p), math.log1p(-p)]], dtype=torch.float64).expand(10, 2),
            target,
            balanced=balanced,
            correct=target == 0,
        )
        for p in confidence.tolist()
    ]
    assert confidence[torch.stack(losses).argmin()].item() == pytest.approx(best, abs=5e-4)


# ---------------------------------------------------------------------------------------------- doors


@pytest.mark.bare
def test_doors() -> None:
    logits, target = batch()
    with pytest.raises(ValueError, match="logits must have at least 2 classes, got 1"):
        correctness_aware_loss(logits[:, :1], torch.zeros_like(target))
    with pytest.raises(TypeError, match=r"correct must have dtype torch.bool, got torch.int64"):
        correctness_aware_loss(logits, target, correct=target)
    with pytest.raises(ValueError, match=r"correct must have shape \(12,\), got \(11,\)"):
        correctness_aware_loss(logits, target, correct=target[1:] == 0)
    with pytest.raises(TypeError, match="target must hold labels where balanced=True"):
        correctness_aware_loss(logits, logits.softmax(-1), balanced=True)
