"""Modular addition: splits of all pairs, what collapses, and the recipes that reach it."""

import pytest
import torch
from torch import nn

from telos.losses import CrossEntropyLoss, StableMaxCrossEntropyLoss
from telos.trials import (
    BUILT_IN,
    Batches,
    ModularTask,
    UsageError,
    classification_metrics,
    load_task,
    make_plan,
    parse_recipes,
    run_job,
    search_space,
)
from telos.trials.plan import evaluation_jobs

TASK = BUILT_IN["modular_addition"]
assert isinstance(TASK, ModularTask)
GRID = {"loss": "cross_entropy,stablemax_cross_entropy", "optim": "adamw,perp_grad"}


def pairs(inputs: torch.Tensor, modulus: int) -> list[tuple[int, int]]:
    first, second = inputs.split(modulus, 1)
    assert (first.sum(1) == 1).all()
    assert (second.sum(1) == 1).all()
    return list(zip(first.argmax(1).tolist(), second.argmax(1).tolist(), strict=True))


@pytest.mark.parametrize("modulus", [3, 7, TASK.modulus])
def test_the_splits_are_disjoint_and_cover_all_pairs(modulus: int) -> None:
    fold = ModularTask("modular_addition", modulus).fold(2)
    seen: list[tuple[int, int]] = []
    for split in (fold.train, fold.validation, fold.test):
        here = pairs(split["inputs"], modulus)
        assert len(here) > 0
        assert split["target"].tolist() == [(a + b) % modulus for a, b in here]
        assert torch.equal(split["index"], torch.arange(len(here)))
        seen += here
    assert sorted(seen) == [(a, b) for a in range(modulus) for b in range(modulus)]
    assert len(fold.train["target"]) == int(0.4 * modulus**2) == fold.info.num_examples


def test_a_seed_decides_the_splits() -> None:
    one, again, other = TASK.fold(0), TASK.fold(0), TASK.fold(1)
    assert torch.equal(one.train["inputs"], again.train["inputs"])
    assert torch.equal(one.test["target"], again.test["target"])
    assert not torch.equal(one.train["inputs"], other.train["inputs"])
    sizes = [len(split["target"]) for split in (one.train, one.validation, one.test)]
    assert [round(size / TASK.modulus**2, 2) for size in sizes] == [0.4, 0.15, 0.45]


def test_a_step_sees_all_training_pairs_and_nothing_of_the_others() -> None:
    fold = TASK.fold(0)
    batches = Batches(fold.train, TASK.batch_size, torch.Generator().manual_seed(0))
    (batch,) = list(batches)
    assert len(batches) == 1
    assert sorted(pairs(batch["inputs"], TASK.modulus)) == sorted(pairs(fold.train["inputs"], TASK.modulus))
    assert set(batch) == {"inputs", "target", "index"}
    # what later splits hold beside their own pairs are the training pairs
    for split in (fold.validation, fold.test):
        assert torch.equal(split["train_inputs"], fold.train["inputs"])
        assert torch.equal(split["train_target"], fold.train["target"])


def hand_made() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model that returns its inputs; of four training rows one leads by more than float32 can hold."""
    rows = torch.tensor([[20.0, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, 16.0, 0.0], [0.0, 0.0, 1.0]])
    split = {
        "inputs": torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]),
        "target": torch.tensor([0, 1]),
        "train_inputs": rows,
        "train_target": torch.tensor([0, 0, 1, 1]),
    }
    return nn.Identity(), split


def test_the_metrics_of_a_hand_made_case() -> None:
    model, split = hand_made()
    found = TASK.evaluate(model, CrossEntropyLoss(), split)
    assert set(found) == set(TASK.metrics) == set(TASK.best)
    assert found["collapse"] == 0.25
    assert found["train_accuracy"] == 0.75
    assert found["accuracy"] == 0.5
    assert found["nll"] == pytest.approx(classification_metrics(split["inputs"], split["target"])["nll"])


def test_collapse_is_that_of_the_probabilities_which_the_loss_reads() -> None:
    model, split = hand_made()
    loss = StableMaxCrossEntropyLoss()
    found = TASK.evaluate(model, loss, split)
    assert found["collapse"] == 0  # 21 against 1 is far from rounding
    # s = (3, 1, 1) on both rows, of which the second is wrong
    expected = -(torch.tensor(3 / 5).log() + torch.tensor(1 / 5).log()).item() / 2
    assert found["nll"] == pytest.approx(expected, rel=1e-5)
    huge = {**split, "train_inputs": split["train_inputs"] * 1e8}
    assert TASK.evaluate(model, loss, huge)["collapse"] == 1


def test_the_network_fits_its_training_pairs() -> None:
    task = ModularTask("small", modulus=11, width=64)
    fold = task.fold(0)
    torch.manual_seed(0)
    model = task.model(fold.info)
    assert [tuple(weights.shape) for weights in model.parameters()] == [(64, 22), (64, 64), (11, 64)]
    step = task.training_step(model, CrossEntropyLoss())
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate)
    for _ in range(100):
        optimizer.zero_grad()
        step(fold.train)["loss"].backward()
        optimizer.step()
    found = task.evaluate(model, CrossEntropyLoss(), fold.test)
    assert found["train_accuracy"] == 1
    assert found["accuracy"] < 0.5  # by heart


def test_the_grid_of_two_losses_and_two_optimizers() -> None:
    plan = make_plan("modular_addition", **GRID, seeds=1, trials=1, epochs=2)
    assert [recipe.label for recipe in plan.runnable] == [
        f"{loss} / {optim}"
        for loss in ("cross_entropy", "stablemax_cross_entropy")
        for optim in ("adamw", "perp_grad")
    ]
    assert (plan.metric, plan.direction, plan.best, plan.reference) == ("accuracy", "max", 1.0, False)
    jobs = evaluation_jobs(plan, {recipe.label: 0 for recipe in plan.recipes})
    runs = [run_job(job) for job in jobs]
    assert [found.status for found in runs] == ["finished"] * 4
    # the optimizer decides something
    assert len({found.metrics["test_nll"] for found in runs}) == 4
    assert run_job(jobs[1]).metrics == runs[1].metrics


def test_learning_rate_and_weight_decay_are_searched_unless_fixed() -> None:
    adamw, perp_grad = (
        search_space(recipe, TASK) for recipe in parse_recipes("cross_entropy", GRID["optim"])
    )
    assert adamw == perp_grad
    assert set(adamw) == {"learning_rate", "weight_decay"}
    without = parse_recipes("cross_entropy", "adamw:weight_decay=0,perp_grad:weight_decay=0")
    assert [set(search_space(recipe, TASK)) for recipe in without] == [{"learning_rate"}] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=linear", "model= does not apply to modular_addition, which is built in; it takes width="),
        ("noise=0.1", "noise= does not apply to modular_addition"),
        ("batch_size=64", "batch_size= does not apply to modular_addition"),
        ("width=0", "width must be at least 1, got 0"),
    ],
)
def test_words_that_do_not_apply(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_task(f"modular_addition {text}")
    assert load_task("modular_addition width=8").width == 8


def test_what_cannot_be_split_or_trained() -> None:
    with pytest.raises(ValueError, match="modulus must be at least 3, so that every split has a pair, got 2"):
        ModularTask("tiny", modulus=2)
    with pytest.raises(UsageError, match=f"is for two classes and the task has {TASK.modulus}"):
        make_plan("modular_addition", "ens_loss")
