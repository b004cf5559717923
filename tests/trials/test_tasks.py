"""Tasks: splits, noise, long tails, metrics, and tasks that a user brings."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss

from telos.losses import CrossEntropyLoss, Mixture
from telos.losses.regression import HuberLoss, MSELoss
from telos.trials import BUILT_IN, Batches, ClassificationTask, UsageError, classification_metrics, load_task
from telos.trials.tasks import RegressionTask, derive_seed, regression_metrics
from tests.trials.examples import BLOBS, Remembering

CLASSIFICATION = sorted(name for name, task in BUILT_IN.items() if isinstance(task, ClassificationTask))


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_splits_are_a_partition_of_constant_sizes_stratified_by_class(name: str) -> None:
    task = BUILT_IN[name]
    _, target = task.load()
    one, two = task.fold(0), task.fold(1)
    for fold in (one, two):
        sizes = [len(part["target"]) for part in (fold.train, fold.validation, fold.test)]
        assert sizes == [len(part["target"]) for part in (one.train, one.validation, one.test)]
        # every example is in one split at most; the long tail drops some of the training split
        rows = torch.cat([part["inputs"] for part in (fold.train, fold.validation, fold.test)])
        whole = len(np.unique(task.load()[0], axis=0))
        assert len(torch.unique(rows.double().mul(1e4).round(), dim=0)) >= min(len(rows), whole) - 1
        assert fold.info.num_examples == len(fold.train["target"])
        # a task that keeps its labels from the loss has no counts to tell
        assert sum(fold.info.class_counts or [fold.info.num_examples]) == fold.info.num_examples
        assert torch.equal(fold.train["index"], torch.arange(len(fold.train["target"])))
    if task.imbalance == 1:
        assert sum(len(p["target"]) for p in (one.train, one.validation, one.test)) == len(target)
    shares = np.bincount(one.test["target"].numpy()) / np.bincount(target)
    np.testing.assert_allclose(shares, 0.25, atol=0.02)
    assert not torch.equal(one.train["inputs"], two.train["inputs"])
    assert torch.equal(one.train["inputs"], task.fold(0).train["inputs"])


def test_the_built_in_tasks_are_what_they_have_been() -> None:
    assert sorted(BUILT_IN) == [
        "bags",
        "breast_cancer",
        "diabetes",
        "digits",
        "digits_adversarial",
        "digits_calibration",
        "digits_embeddings",
        "digits_longtail",
        "digits_noisy",
        "digits_views",
        "modular_addition",
        "wine",
    ]
    assert all(task.name == name for name, task in BUILT_IN.items())
    # stored runs rest on the splits: class by class in order, training rows first, the test rows last
    inputs, target = BUILT_IN["wine"].load()
    rng = np.random.default_rng(derive_seed("wine", 4, "split"))
    train, test = [], []
    for label, (kept, held) in {0: (35, 15), 1: (42, 18), 2: (29, 12)}.items():
        rows = rng.permutation(np.flatnonzero(target == label))
        train += rows[:kept].tolist()
        test += rows[-held:].tolist()
    fold = BUILT_IN["wine"].fold(4)
    scaled = (inputs - inputs[sorted(train)].mean(0)) / inputs[sorted(train)].std(0)
    np.testing.assert_allclose(fold.train["inputs"], scaled[sorted(train)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fold.test["inputs"], scaled[sorted(test)], rtol=1e-5, atol=1e-6)


def test_features_are_standardised_with_the_training_split_alone() -> None:
    fold = BLOBS.fold(3)
    torch.testing.assert_close(fold.train["inputs"].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(fold.train["inputs"].std(0, correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert fold.test["inputs"].mean(0).abs().max() > 1e-3


def test_noise_changes_training_and_validation_labels_and_spares_the_test_split() -> None:
    clean = ClassificationTask("same", BUILT_IN["digits"].load)
    noisy = ClassificationTask("same", BUILT_IN["digits"].load, noise=0.4)
    for seed in (0, 1):
        before, after = clean.fold(seed), noisy.fold(seed)
        assert torch.equal(before.train["inputs"], after.train["inputs"])
        assert torch.equal(before.test["target"], after.test["target"])
        changed = (before.train["target"] != after.train["target"]).double()
        # binomial: four standard deviations of 1,078 draws are 0.06
        assert abs(changed.mean().item() - 0.4) < 0.06
        assert abs((before.validation["target"] != after.validation["target"]).double().mean() - 0.4) < 0.12


def test_a_long_tail_thins_the_training_classes_only() -> None:
    fold = BUILT_IN["digits_longtail"].fold(0)
    counts = np.array(fold.info.class_counts)
    assert counts[0] > 100
    assert counts[-1] == round(counts[0] / 50)
    assert (np.diff(counts) <= 3).all()
    assert np.bincount(fold.test["target"]).min() > 40


def test_batches_cover_the_data_in_an_order_that_the_generator_decides() -> None:
    data = {"target": torch.arange(10), "inputs": torch.arange(10) * 2}
    batches = Batches(data, 4, torch.Generator().manual_seed(1))
    first, second = list(batches), list(batches)
    assert len(batches) == len(first) == 3
    assert sorted(torch.cat([batch["target"] for batch in first]).tolist()) == list(range(10))
    assert all(torch.equal(batch["inputs"], 2 * batch["target"]) for batch in first)
    assert [b["target"].tolist() for b in first] != [b["target"].tolist() for b in second]
    again = list(Batches(data, 4, torch.Generator().manual_seed(1)))
    assert [b["target"].tolist() for b in first] == [b["target"].tolist() for b in again]


def test_metrics_agree_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 5, generator=generator) * 2
    target = torch.randint(0, 4, (200,), generator=generator)  # class 4 is predicted but never true
    found = classification_metrics(logits, target)
    predicted, probabilities = logits.argmax(-1), logits.double().softmax(-1)
    assert found["accuracy"] == pytest.approx((predicted == target).double().mean().item())
    assert found["macro_f1"] == pytest.approx(f1_score(target, predicted, average="macro"))
    assert found["nll"] == pytest.approx(log_loss(target, probabilities, labels=range(5)))


def test_the_calibration_error_of_a_hand_made_case() -> None:
    # confidence 0.9 four times, right three times; confidence 0.6 twice, never right
    high, low = np.log([0.9, 0.1]), np.log([0.6, 0.4])
    logits = torch.tensor(np.array([high] * 4 + [low] * 2))
    target = torch.tensor([0, 0, 0, 1, 1, 1])
    expected = (4 * abs(0.9 - 0.75) + 2 * abs(0.6 - 0.0)) / 6
    assert classification_metrics(logits, target)["ece"] == pytest.approx(expected)


def test_index_goes_only_to_losses_that_take_it() -> None:
    fold, model = BLOBS.fold(0), torch.nn.Linear(3, 3)
    batch = {name: values[:5] for name, values in fold.train.items()}
    plain = BLOBS.training_step(model, CrossEntropyLoss())(batch)
    remembering = Remembering(len(fold.train["target"]))
    mixed = Mixture([(1.0, CrossEntropyLoss()), (0.5, remembering)])
    indexed = BLOBS.training_step(model, mixed)(batch)
    torch.testing.assert_close(indexed["loss"], 1.5 * plain["loss"])
    assert remembering.seen.tolist()[:6] == [1, 1, 1, 1, 1, 0]
    # torch's own losses take neither index nor arbitrary keywords
    torch.testing.assert_close(BLOBS.training_step(model, torch.nn.CrossEntropyLoss())(batch), plain)


def test_evaluation_is_in_evaluation_mode_and_leaves_the_mode_alone() -> None:
    fold = BLOBS.fold(0)
    model = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Linear(3, 3)).train()
    loss = CrossEntropyLoss()
    assert BLOBS.evaluate(model, loss, fold.test) == BLOBS.evaluate(model, loss, fold.test)
    assert model.training


def test_a_loss_may_say_how_to_read_the_logits() -> None:
    class Squares(CrossEntropyLoss):
        def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
            return torch.log_softmax(logits.square(), -1)

    fold, model = BLOBS.fold(0), torch.nn.Linear(3, 3)
    logits = model(fold.test["inputs"]).detach()
    found = BLOBS.evaluate(model, Squares(), fold.test)
    assert found == pytest.approx(classification_metrics(logits.square(), fold.test["target"]))
    assert found != BLOBS.evaluate(model, CrossEntropyLoss(), fold.test)


@pytest.mark.parametrize("spec", ["tests.trials.examples:blobs", "tests.trials.examples:BLOBS"])
def test_a_task_from_outside(spec: str) -> None:
    task = load_task(spec)
    assert task.name == "blobs"
    assert task.info.num_classes == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", r"unknown task 'digit'; nearest: digits"),
        ("mnist1d", r"unknown task 'mnist1d'; there are: bags, breast_cancer, diabetes, digits"),
        ("tests.trials.examples:blob", r"tests.trials.examples has no 'blob'; nearest: (BLOBS, )?blobs"),
        ("no.such.module:Task", r"cannot import no.such.module \(ModuleNotFoundError"),
        ("tests.trials.examples:NotATask", r"not a task: it lacks batch_size, epochs, evaluate, fold, info"),
        ("tests.trials.examples:broken", r"could not be built: RuntimeError: no data today"),
    ],
)
def test_what_is_no_task(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_task(spec)


def test_a_task_in_the_folder_where_the_user_stands(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_own_tasks.py").write_text("from tests.trials.examples import blobs\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    assert load_task("my_own_tasks:blobs").name == "blobs"


# ---------------------------------------------------------------------------------------------------- regression


def test_the_numbers_of_a_regression_are_standardised_and_lead_back() -> None:
    task = BUILT_IN["diabetes"]
    target = task.load()[1]
    fold = task.fold(0)
    sizes = [len(part["target"]) for part in (fold.train, fold.validation, fold.test)]
    assert sizes == [266, 66, 110]
    assert (fold.info.family, fold.info.num_classes, fold.info.num_examples) == ("regression", None, 266)
    torch.testing.assert_close(fold.train["target"].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(fold.train["target"].std(correction=0), torch.tensor(1.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(fold.train["inputs"].mean(0), torch.zeros(10), atol=1e-6, rtol=0)
    own = torch.cat(
        [
            part["target"].double() * part["scale"] + part["centre"]
            for part in (fold.train, fold.validation, fold.test)
        ]
    )
    np.testing.assert_allclose(np.sort(own), np.sort(target), rtol=1e-5)
    assert not torch.equal(fold.train["inputs"], task.fold(1).train["inputs"])
    assert torch.equal(fold.train["inputs"], task.fold(0).train["inputs"])


def test_regression_metrics_agree_with_scikit_learn() -> None:
    from sklearn.metrics import mean_absolute_error, median_absolute_error, r2_score, root_mean_squared_error

    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 50, generator=generator)
    found = regression_metrics(prediction, target)
    assert found["rmse"] == pytest.approx(root_mean_squared_error(target, prediction))
    assert found["mae"] == pytest.approx(mean_absolute_error(target, prediction))
    assert found["r2"] == pytest.approx(r2_score(target, prediction), rel=1e-5)
    assert found["median_absolute_error"] == pytest.approx(median_absolute_error(target, prediction))
    assert regression_metrics(prediction, torch.ones(50))["r2"] == 0.0


def test_a_regression_is_measured_in_its_own_units() -> None:
    task = BUILT_IN["diabetes"]
    fold = task.fold(0)
    for shape in ((), (1,)):  # a model may keep its one output as a dimension
        constant = torch.nn.Module()
        constant.forward = lambda inputs, shape=shape: torch.zeros(len(inputs), *shape)  # type: ignore[method-assign]
        found = task.evaluate(constant, MSELoss(), fold.test)
        own = fold.test["target"].double() * fold.test["scale"]
        assert found["rmse"] == pytest.approx(own.square().mean().sqrt().item())
        assert found["mae"] == pytest.approx(own.abs().mean().item())
    assert set(found) == set(task.metrics) == set(task.best) == set(task.bands)
    assert task.bands["rmse"] == pytest.approx(0.01 * task.load()[1].std(), rel=0.05)


def test_a_regression_trains() -> None:
    task = RegressionTask("line", lambda: (np.linspace(-1, 1, 80)[:, None], np.linspace(5, 9, 80)), width=8)
    fold = task.fold(0)
    torch.manual_seed(0)
    model = task.model(fold.info)
    step = task.training_step(model, HuberLoss())
    before = task.evaluate(model, HuberLoss(), fold.test)["rmse"]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(100):
        optimizer.zero_grad()
        loss = step(fold.train)["loss"]
        assert loss.ndim == 0
        loss.backward()
        optimizer.step()
    assert task.evaluate(model, HuberLoss(), fold.test)["rmse"] < 0.1 < before
    assert "a number from 5 to 9" in task.description
