"""The task on bags: what is known of which example, whole bags, and errors at the right level."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from telos.losses import AggregateInterpolationLoss, BagLoss, InstanceLoss
from telos.trials import (
    BagsTask,
    Batches,
    Job,
    Run,
    UsageError,
    compare,
    estimate_seconds,
    load_task,
    loss_names,
    make_plan,
    parse_recipes,
    run_job,
)
from telos.trials.splits import shuffled
from telos.trials.tasks import derive_seed

NAME = "bags"
TASK: BagsTask = load_task(NAME)  # type: ignore[assignment]


def ran(loss: str, epochs: int = 2, seed: int = 0, **more: float) -> Run:
    (recipe,) = parse_recipes(loss, family="aggregate")
    chosen = {"learning_rate": 3e-3, "weight_decay": 0.01, **more}
    run = run_job(Job(NAME, loss, "adamw", recipe.canonical, "evaluation", 0, chosen, seed, epochs, "code"))
    assert run.reason is None
    return run


def numbered(size: int = 3, rows: int = 60) -> BagsTask:
    """Row i has the features (i, i) and the response i^2, so that rows can be told from their features."""

    def load() -> tuple[np.ndarray, np.ndarray]:
        number = np.arange(rows, dtype=np.float64)
        return np.stack([number, number], 1), number**2

    return BagsTask("numbered", load, size=size, width=4)


class Recorded(nn.Module):
    """Keeps what a loss of the family is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, prediction: Tensor, bag_response: Tensor, bag_index: Tensor) -> Tensor:
        self.calls.append((prediction.detach(), bag_response, bag_index))
        return prediction.sum()


def rows_of(task: BagsTask, inputs: Tensor, seed: int) -> np.ndarray:
    """The rows of ``numbered`` behind standardised features."""
    features, target = task.load()
    train = shuffled(len(target), np.random.default_rng(derive_seed(task.name, seed, "split")))[0]
    scale, mean = features[train].std(0), features[train].mean(0)
    return np.rint(inputs.numpy() * scale + mean)[..., 0].astype(int)


# ------------------------------------------------------------------------------------------------------ bags


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_row_is_a_whole_bag_and_its_mean_response(size: int) -> None:
    task = numbered(size)
    for seed in (0, 1):
        fold = task.fold(seed)
        target = task.load()[1]
        parts = shuffled(60, np.random.default_rng(derive_seed("numbered", seed, "split")))
        for split, rows in zip((fold.train, fold.validation), parts, strict=False):
            bags = rows_of(task, split["inputs"], seed)
            assert bags.shape == (len(rows) // size, size)
            # disjoint bags of rows of this split; what fills no bag is left out
            assert len(np.unique(bags)) == bags.size
            assert set(bags.ravel()) <= set(rows)
            known = split["target"].double() * split["scale"] + split["centre"]
            np.testing.assert_allclose(known, target[bags].mean(1), rtol=1e-5, atol=1e-4)
        single = rows_of(task, fold.test["inputs"], seed)
        assert sorted(single) == sorted(parts[2])
        known = fold.test["target"].double() * fold.test["scale"] + fold.test["centre"]
        np.testing.assert_allclose(known, target[single], rtol=1e-5, atol=1e-3)
        # what is standardised are the means of the training bags, as a single response would spread
        torch.testing.assert_close(fold.train["target"].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
        deviation = fold.train["target"].std(correction=0) * math.sqrt(size)
        torch.testing.assert_close(deviation, torch.tensor(1.0), atol=1e-5, rtol=0)
        assert fold.info.num_examples == fold.train["inputs"].shape[0] * size
    assert torch.equal(task.fold(0).train["inputs"], numbered(size).fold(0).train["inputs"])
    assert not torch.equal(task.fold(0).train["inputs"], task.fold(1).train["inputs"])


def test_training_and_tuning_do_not_depend_on_single_responses() -> None:
    """Responses are shuffled within every bag of the training and the validation split: nothing may change."""
    task = numbered(size=3)
    fold = task.fold(0)
    target = task.load()[1].copy()
    rng = np.random.default_rng(5)
    for split in (fold.train, fold.validation):
        for bag in rows_of(task, split["inputs"], 0):
            target[bag] = target[bag].mean() + rng.permutation(target[bag] - target[bag].mean())
    assert (target != task.load()[1]).sum() > 20
    other = BagsTask("numbered", lambda: (task.load()[0], target), size=3, width=4).fold(0)
    for name in ("train", "validation"):
        before, after = getattr(fold, name), getattr(other, name)
        assert set(before) == {"inputs", "target", "centre", "scale"}
        for key in before:
            torch.testing.assert_close(before[key], after[key], rtol=1e-6, atol=1e-6)


def test_batches_are_whole_bags() -> None:
    task, loss = numbered(size=3), Recorded()
    fold = task.fold(0)
    known = {tuple(bag): mean for bag, mean in zip(
        rows_of(task, fold.train["inputs"], 0).tolist(), fold.train["target"].tolist(), strict=True
    )}  # fmt: skip
    model, seen = nn.Linear(2, 1), []
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0]]))
        model.bias.zero_()
    for batch in Batches(fold.train, 5, torch.Generator().manual_seed(0)):
        task.training_step(model, loss)(batch)
    for prediction, response, index in loss.calls:
        assert (len(prediction), response.ndim) == (3 * len(response), 1)
        rows = rows_of(task, torch.stack([prediction, prediction], 1), 0)
        for place, mean in enumerate(response.tolist()):
            bag = tuple(rows[index.numpy() == place].tolist())
            assert known[bag] == mean
            seen.append(bag)
    assert sorted(seen) == sorted(known)


def test_bags_that_leave_too_little_to_tune_on_are_refused() -> None:
    assert len(load_task("bags size=33").fold(0).validation["target"]) == 2
    with pytest.raises(
        UsageError, match="size must be at most 33, so that there are two bags to tune on, got 34"
    ):
        make_plan("bags size=34", "bag", trials=1)
    for text, message in (
        ("bags size=0", "size must be at least 1, got 0"),
        ("bags size=some", "size must be a whole number, got 'some'"),
        ("bags noise=0.1", "noise= replaces labels, and the target of bags is numbers"),
        ("diabetes size=4", "size= does not apply to diabetes"),
    ):
        with pytest.raises(UsageError, match=message):
            load_task(text)


# --------------------------------------------------------------------------------------------------- metrics


def test_errors_are_of_single_examples_in_testing_and_of_bag_means_in_tuning() -> None:
    task = load_task("bags size=8")
    fold = task.fold(0)
    torch.manual_seed(0)
    model = task.model(fold.info)
    with torch.no_grad():
        single = model(fold.test["inputs"])[:, 0].double() * fold.test["scale"] + fold.test["centre"]
        bags = model(fold.validation["inputs"])[..., 0].double().mean(1)
    bags = bags * fold.validation["scale"] + fold.validation["centre"]
    response = fold.test["target"].double() * fold.test["scale"] + fold.test["centre"]
    tested, tuned = (task.evaluate(model, BagLoss(), split) for split in (fold.test, fold.validation))
    error = single - response
    assert tested["rmse"] == pytest.approx(error.square().mean().sqrt().item())
    assert tested["mae"] == pytest.approx(error.abs().mean().item())
    assert tested["r2"] == pytest.approx(1 - (error.square().mean() / response.var(correction=0)).item())
    means = [
        error[fold.test["bag_index"] == bag].mean().item() for bag in fold.test["bag_index"].unique().tolist()
    ]
    assert tested["bag_rmse"] == pytest.approx(np.sqrt(np.square(means).mean()))
    known = fold.validation["target"].double() * fold.validation["scale"] + fold.validation["centre"]
    assert tuned["rmse"] == tuned["bag_rmse"] == pytest.approx((bags - known).square().mean().sqrt().item())
    assert tuned["mae"] == pytest.approx((bags - known).abs().mean().item())
    assert set(tested) == set(tuned) == set(task.metrics) == set(task.best) == set(task.bands)


def test_units_are_those_of_the_response() -> None:
    inputs, response = TASK.load()
    ten = replace(TASK, load=lambda: (inputs, 10 * response + 1000))
    model = TASK.model(TASK.info)
    for split in ("test", "validation"):
        small, large = (task.evaluate(model, BagLoss(), getattr(task.fold(0), split)) for task in (TASK, ten))
        for name in ("rmse", "mae", "bag_rmse"):
            assert large[name] == pytest.approx(10 * small[name], rel=1e-4)
        assert large["r2"] == pytest.approx(small["r2"], abs=1e-4)
    assert ten.bands["rmse"] == pytest.approx(10 * TASK.bands["rmse"], rel=0.1)


def test_a_response_without_spread_does_no_harm() -> None:
    task = BagsTask(
        "flat", lambda: (np.random.default_rng(0).normal(size=(60, 2)), np.full(60, 3.0)), width=4
    )
    fold = task.fold(0)
    found = task.evaluate(task.model(fold.info), BagLoss(), fold.test)
    assert all(math.isfinite(value) for value in found.values())
    assert fold.train["target"].abs().max() == 0


# ------------------------------------------------------------------------------------------------------ runs


def test_the_family_has_these_losses() -> None:
    assert {"bag", "instance", "aggregate_interpolation"} <= {
        name.removesuffix("_loss") for name in loss_names("aggregate")
    }
    plan = make_plan(NAME, "bag,instance,aggregate_interpolation,mse", trials=1)
    assert [recipe.refused for recipe in plan.recipes[:3]] == [None] * 3
    assert re.fullmatch(
        "MSELoss is a regression loss and the task calls an? aggregate loss", plan.recipes[3].refused
    )
    assert "rho" in plan.recipes[2].space
    assert (plan.family, plan.metric, plan.direction, plan.best) == ("aggregate", "rmse", "min", 0.0)
    assert plan.sizes == {"train": 66, "validation": 16, "test": 110}
    assert "random bags of 4" in plan.description


def test_a_run_gives_the_same_numbers_twice_and_recipes_share_everything_else() -> None:
    first, other = ran("aggregate_interpolation"), ran("aggregate_interpolation", seed=1)
    torch.rand(5)
    assert ran("aggregate_interpolation").metrics == first.metrics
    assert other.metrics != first.metrics
    assert ran("aggregate_interpolation", rho=0.0).metrics == pytest.approx(ran("bag").metrics, rel=1e-5)
    assert ran("aggregate_interpolation", rho=1.0).metrics == pytest.approx(ran("instance").metrics, rel=1e-5)
    assert ran("bag").metrics != ran("instance").metrics


def test_with_bags_of_one_all_losses_are_the_ordinary_regression() -> None:
    task = replace(TASK, size=1)
    fold = task.fold(0)
    model = task.model(fold.info)
    values = [
        task.training_step(model, loss)(fold.train)["loss"]
        for loss in (BagLoss(), InstanceLoss(), AggregateInterpolationLoss(rho=0.3))
    ]
    prediction = model(fold.train["inputs"][:, 0])[:, 0]
    expected = nn.functional.mse_loss(prediction, fold.train["target"])
    for value in values:
        torch.testing.assert_close(value, expected)


def test_bags_are_enough_to_learn_single_responses() -> None:
    # the mean of all responses has an R2 of about 0 on single examples
    assert ran("aggregate_interpolation", epochs=30, rho=0.3).metrics["test_r2"] > 0.2


def test_a_comparison_resumes_with_the_same_numbers(tmp_path) -> None:
    words = "bags size=6", "bag,instance,aggregate_interpolation+0.1*bag"
    settings = {"optim": "adamw,sgd", "trials": 2, "tuning_seeds": 1, "epochs": 2}
    plan = make_plan(*words, seeds=2, **settings)
    assert "AggregateInterpolationLoss.rho" in plan.recipes[-1].space
    assert estimate_seconds(plan).seconds > 0
    compare(*words, seeds=1, **settings, store=tmp_path / "store.sqlite")
    resumed = compare(*words, seeds=2, **settings, store=tmp_path / "store.sqlite")
    fresh = compare(*words, seeds=2, **settings)
    assert [entry.status for entry in fresh.entries] == ["finished"] * 6
    for one, other in zip(resumed.entries, fresh.entries, strict=True):
        assert [run.metrics for run in one.evaluation] == [run.metrics for run in other.evaluation]
