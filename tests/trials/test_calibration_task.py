"""Calibration after training: a frozen classifier, a temperature for each digit, and what is measured of it."""

import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from telos.losses import CrossEntropyLoss, StableMaxCrossEntropyLoss
from telos.trials import (
    BUILT_IN,
    CalibrationTask,
    DataInfo,
    Fold,
    Run,
    UsageError,
    classification_metrics,
    derive_seed,
    load_task,
    make_plan,
    run_job,
)
from telos.trials.calibration_task import FITTED, calibration_metrics, fitted_classifier
from telos.trials.plan import evaluation_jobs

TASK = BUILT_IN["digits_calibration"]
assert isinstance(TASK, CalibrationTask)


def run(loss: str, *, optim: str = "adamw", epochs: int = 3, reference: bool = False) -> Run:
    plan = make_plan("digits_calibration", loss, optim=optim, seeds=1, trials=1, epochs=epochs)
    jobs = evaluation_jobs(plan, {plan.recipes[0].label: 0})
    return run_job(jobs[-1] if reference else jobs[0])


def pixels(rows: np.ndarray) -> torch.Tensor:
    return torch.tensor(TASK.load()[0][rows] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)


def test_the_digits_of_a_seed_are_four_parts_of_all_of_them() -> None:
    _, target = TASK.load()
    for seed in (0, 7):
        parts = TASK.rows(seed)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(target)))
        assert [len(part) for part in parts] == [FITTED, 978, 269, 450]
        fold = TASK.fold(seed)
        for part, split in zip(parts[1:], (fold.train, fold.validation, fold.test), strict=True):
            np.testing.assert_array_equal(split["target"], target[part])
    assert not np.array_equal(TASK.rows(0)[0], TASK.rows(7)[0])


def test_the_frozen_logits_come_from_the_classifier_of_the_seed() -> None:
    fitted, train, _, test = TASK.rows(0)
    target = torch.tensor(TASK.load()[1][fitted])
    model = fitted_classifier(pixels(fitted), target, 10, derive_seed("digits_calibration", 0, "classifier"))
    fold = TASK.fold(0)
    assert torch.equal(model(pixels(train)), fold.train["inputs"][:, :10])
    assert torch.equal(model(pixels(test)), fold.test["inputs"][:, :10])
    # it fits what it has seen, and is surer of the rest than it is right
    assert (model(pixels(fitted)).argmax(-1) == target).all()
    found = calibration_metrics(fold.test["inputs"][:, :10], fold.test["target"])
    confidence = fold.test["inputs"][:, :10].softmax(-1).amax(-1).mean().item()
    assert confidence - found["accuracy"] > 0.03
    assert found["accuracy"] > 0.75


def test_no_label_outside_its_hundred_digits_reaches_the_classifier() -> None:
    images, target = TASK.load()
    wrong = (target + 1) % 10
    wrong[TASK.rows(0)[0]] = target[TASK.rows(0)[0]]

    class SameRows(CalibrationTask):
        def rows(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
            return TASK.rows(seed)

    other, fold = SameRows("digits_calibration", lambda: (images, wrong)).fold(0), TASK.fold(0)
    for name in ("train", "validation", "test"):
        one, two = getattr(fold, name), getattr(other, name)
        assert torch.equal(one["inputs"], two["inputs"])
        assert torch.equal(one["shifted"], two["shifted"])
        assert (one["target"] != two["target"]).all()


def test_nothing_that_is_trained_changes_the_classifier() -> None:
    model = TASK.classifier(0)
    before = copy.deepcopy(model.state_dict())
    assert run("correctness_aware", epochs=2).finished
    assert TASK.classifier(0) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # what is trained are the calibrator's own numbers: 12 features, 5 units, one temperature
    trained = TASK.model(TASK.info)
    assert sum(parameter.numel() for parameter in trained.parameters()) == 12 * 5 + 5 + 5 + 1


def test_the_same_numbers_twice_whatever_the_number_of_threads() -> None:
    again = CalibrationTask("digits_calibration", TASK.load)
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        other = again.fold(1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    fold = TASK.fold(1)
    for name in ("train", "validation", "test"):
        for key, values in getattr(fold, name).items():
            assert torch.equal(values, getattr(other, name)[key])
    one, two = run("focal"), run("focal")
    assert one.metrics == two.metrics
    assert one.finished


def test_accuracy_is_that_of_the_classifier_for_every_recipe() -> None:
    runs = [run(loss) for loss in ("cross_entropy", "correctness_aware:balanced=True", "focal", "gce")]
    runs += [run("stablemax_cross_entropy"), run("cross_entropy", optim="perp_grad")]
    for name in ("validation_accuracy", "test_accuracy", "test_shifted_accuracy"):
        assert len({found.metrics[name] for found in runs}) == 1
    assert len({found.metrics["test_brier"] for found in runs}) == len(runs)
    logits, target = TASK.fold(0).test["inputs"][:, :10], TASK.fold(0).test["target"]
    right = (logits.argmax(-1) == target).double().mean().item()
    assert runs[0].metrics["test_accuracy"] == pytest.approx(right)
    # the shifts are hard
    assert 0.2 < runs[0].metrics["test_shifted_accuracy"] < right - 0.1


def test_calibration_helps_where_there_is_something_to_mend() -> None:
    before = calibration_metrics(TASK.fold(0).test["inputs"][:, :10], TASK.fold(0).test["target"])
    after, scaled = run("cross_entropy", epochs=30).metrics, run("cross_entropy", reference=True).metrics
    for found in (after, scaled):
        assert found["test_nll"] < before["nll"]
        assert found["test_ece"] < before["ece"]
    assert scaled["test_accuracy"] == after["test_accuracy"] == pytest.approx(before["accuracy"])
    assert set(scaled) == {f"test_{name}" for name in TASK.metrics}


def test_the_reference_finds_a_known_temperature() -> None:
    # at temperature 2.5, and only there, confidence is 3/4 in the first group and 9/10 in the second
    gap = torch.tensor([3.0] * 4 + [9.0] * 10, dtype=torch.float64).log() * 2.5
    target = torch.tensor([0, 0, 0, 1] + [0] * 9 + [1])
    inputs = torch.stack([gap, torch.zeros_like(gap), torch.randn(14, dtype=torch.float64)], 1)
    split = {"inputs": inputs, "target": target, "shifted": torch.stack([inputs, 2 * inputs], 1)}
    info = DataInfo("classification", num_classes=2, num_examples=14, input_shape=(3,))
    found = TASK.reference(Fold(split, split, split, info), 0)
    assert found["ece"] == pytest.approx(0, abs=1e-6)
    assert found["top1_brier"] == pytest.approx((4 * 0.75 * 0.25 + 10 * 0.9 * 0.1) / 14, abs=1e-6)
    assert found["accuracy"] == pytest.approx(12 / 14)
    # the second shifted copy has doubled logits: odds are squared
    doubled = (4 * (0.75 * 0.1**2 + 0.25 * 0.9**2) + 10 * (0.9 * (1 / 82) ** 2 + 0.1 * (81 / 82) ** 2)) / 14
    assert found["shifted_top1_brier"] == pytest.approx((found["top1_brier"] + doubled) / 2, abs=1e-6)


def test_metrics_agree_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(300, 4, generator=generator), torch.arange(300) % 4
    found, shares = calibration_metrics(logits, target), logits.double().softmax(-1)
    right = (shares.argmax(-1) == target).numpy()
    assert found["nll"] == pytest.approx(log_loss(target, shares))
    assert found["auroc"] == pytest.approx(roc_auc_score(right, shares.amax(-1)))
    onehot = nn.functional.one_hot(target, 4)
    assert found["brier"] == pytest.approx((shares - onehot).square().sum(-1).mean().item())
    forecast = shares.amax(-1).numpy()
    assert found["top1_brier"] == pytest.approx(float(((forecast - right) ** 2).mean()))
    plain = classification_metrics(logits, target)
    assert {name: found[name] for name in ("accuracy", "nll", "ece")} == pytest.approx(
        {name: plain[name] for name in ("accuracy", "nll", "ece")}
    )
    assert calibration_metrics(nn.functional.one_hot(target, 4).float(), target)["auroc"] == 0.5


def test_every_metric_is_declared_and_measured() -> None:
    fold = TASK.fold(0)
    found = TASK.evaluate(TASK.model(fold.info), CrossEntropyLoss(), fold.validation)
    assert set(found) == set(TASK.metrics) == set(TASK.best) == set(TASK.bands)
    assert TASK.metric in found
    for name, direction in TASK.metrics.items():
        better = found[name] <= TASK.best[name] if direction == "max" else found[name] >= TASK.best[name]
        assert better, name


def test_a_loss_that_reads_logits_its_own_way_is_measured_by_it() -> None:
    fold = TASK.fold(0)
    torch.manual_seed(0)
    model, loss = TASK.model(fold.info), StableMaxCrossEntropyLoss()
    found = TASK.evaluate(model, loss, fold.test)
    logits = loss.log_probabilities(model(fold.test["inputs"]).detach())
    assert found["nll"] == pytest.approx(calibration_metrics(logits, fold.test["target"])["nll"])
    assert found["nll"] != pytest.approx(TASK.evaluate(model, CrossEntropyLoss(), fold.test)["nll"])


def test_training_does_not_look_at_the_shifted_digits() -> None:
    fold = TASK.fold(0)
    torch.manual_seed(0)
    model = TASK.model(fold.info)
    batch = {name: values[:20] for name, values in fold.train.items()}
    unknown = {**batch, "shifted": torch.full_like(batch["shifted"], float("nan"))}
    step = TASK.training_step(model, CrossEntropyLoss())
    assert torch.equal(step(batch)["loss"], step(unknown)["loss"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model=linear",
            "model= does not apply to digits_calibration, which is built in; it takes batch_size=",
        ),
        ("noise=0.1", "noise= does not apply to digits_calibration"),
        ("width=5", "width= does not apply to digits_calibration"),
        ("batch_size=0", "batch_size must be at least 1, got 0"),
    ],
)
def test_words_that_do_not_apply(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_task(f"digits_calibration {text}")
    assert load_task("digits_calibration batch_size=32").batch_size == 32


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("ens_loss", "is for two classes and the task has 10"),
        ("trades", "needs adversarial_logits, which the task does not supply"),
        ("mse", "is a regression loss and the task calls a classification loss"),
    ],
)
def test_losses_that_do_not_fit(loss: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan("digits_calibration", loss)
