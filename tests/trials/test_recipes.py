"""Recipes: names, mixtures, fixed hyper-parameters, and errors that name what is nearest."""

import pytest
import torch
from torch import nn

from telos.losses import CompSumLoss, CrossEntropyLoss, FocalLoss, LabelSmoothingLoss, Mixture, TaskInfo
from telos.trials import UsageError, loss_names, parse_recipes

TEN = TaskInfo("classification", num_classes=10, num_examples=50, dim=8, supplies=frozenset({"index"}))


def built(text: str) -> nn.Module:
    (recipe,) = parse_recipes(text)
    return recipe.build_loss(TEN, {})


@pytest.mark.parametrize("name", ["focal", "focal_loss", "FocalLoss", "focalloss", "Focal_Loss"])
def test_a_name_is_that_of_the_function_or_the_class(name: str) -> None:
    assert type(built(name)) is FocalLoss
    assert parse_recipes(name)[0].canonical == parse_recipes("focal")[0].canonical


def test_every_short_name_leads_to_its_class() -> None:
    names = loss_names("classification")
    assert {"cross_entropy", "focal", "label_smoothing", "comp_sum"} <= set(names)
    for name, kind in names.items():
        assert parse_recipes(name)[0].terms[0].loss.__name__ == kind


def test_hyperparameters_are_fixed() -> None:
    loss = built("focal:gamma=3.5")
    assert isinstance(loss, FocalLoss)
    assert loss.gamma == 3.5
    assert parse_recipes("focal:gamma=2")[0].canonical == parse_recipes("FocalLoss:gamma=2.0")[0].canonical
    assert "gamma" not in parse_recipes("focal:gamma=2")[0].space
    assert "gamma" in parse_recipes("focal")[0].space


def test_a_mixture() -> None:
    loss = built("cross_entropy + 0.1*focal:gamma=1 + 2 * comp_sum:tau=1e+0")
    assert isinstance(loss, Mixture)
    assert loss.weights == [1.0, 0.1, 2.0]
    assert [type(term) for term in loss.losses] == [CrossEntropyLoss, FocalLoss, CompSumLoss]
    assert loss.losses[2].tau == 1.0
    one = built("0.5*focal")
    assert isinstance(one, Mixture)
    assert one.weights == [0.5]
    assert built("1e+1*focal").weights == [10.0]


def test_the_space_of_a_mixture_names_its_terms_and_reaches_them() -> None:
    (recipe,) = parse_recipes("label_smoothing+focal+0.5*focal:gamma=1")
    assert list(recipe.space) == ["LabelSmoothingLoss.smoothing", "FocalLoss1.gamma"]
    loss = recipe.build_loss(TEN, {"LabelSmoothingLoss.smoothing": 0.3, "FocalLoss1.gamma": 4.0})
    assert isinstance(loss, Mixture)
    assert isinstance(loss.losses[0], LabelSmoothingLoss)
    assert loss.losses[0].smoothing == 0.3
    assert [loss.losses[1].gamma, loss.losses[2].gamma] == [4.0, 1.0]


def test_any_class_from_outside() -> None:
    loss = built("torch.nn:CrossEntropyLoss:label_smoothing=0.2")
    assert isinstance(loss, nn.CrossEntropyLoss)
    assert loss.label_smoothing == 0.2
    assert isinstance(built("cross_entropy+torch.nn:CrossEntropyLoss"), Mixture)


def test_values_may_hold_commas_signs_and_colons() -> None:
    recipes = parse_recipes("torch.nn:NLLLoss:weight=[1, 2+0j],focal", "adamw:betas=(0.8, 0.95),sgd")
    assert [(recipe.loss, recipe.optim) for recipe in recipes] == [
        ("torch.nn:NLLLoss:weight=[1, 2+0j]", "adamw:betas=(0.8, 0.95)"),
        ("torch.nn:NLLLoss:weight=[1, 2+0j]", "sgd"),
        ("focal", "adamw:betas=(0.8, 0.95)"),
        ("focal", "sgd"),
    ]
    assert parse_recipes("comp_sum:tau=+1.5")[0].terms[0].fixed == {"tau": 1.5}
    assert parse_recipes("comp_sum:tau=1.5+focal")[0].terms[0].fixed == {"tau": 1.5}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("crossentropi", r"unknown loss 'crossentropi'; nearest: cross_entropy"),
        ("cross_entropy,", r"has an empty entry"),
        ("focal:gama=2", r"focal has no hyper-parameter 'gama'; nearest: gamma"),
        ("focal:gamma=__import__('os')", r"value of gamma .* must be a literal"),
        ("focal:gamma=two", r"value of gamma .* must be a literal"),
        ("focal:gamma=1:gamma=2", r"gives gamma twice"),
        ("focal:gamma=1:2", r"'2' in .* must read key=value"),
        ("x*focal", r"weight 'x' in 'x\*focal' must be a finite number"),
        ("nan*focal", r"must be a finite number"),
        ("focal+", r"a loss has no name"),
        ("focal,FocalLoss", r"loss=FocalLoss optim=adamw is the same recipe as loss=focal"),
        ("torch.nn:CrossEntropy", r"torch.nn has no 'CrossEntropy'; nearest: CrossEntropyLoss"),
        ("torch.nn:functional", r"must be a subclass of torch.nn.Module"),
        ("no_such_module_here:Loss", r"cannot import no_such_module_here"),
        ("rho_margin_comp_sum", r"unknown loss 'rho_margin_comp_sum'; nearest: .*comp_sum"),
    ],
)
def test_what_is_no_recipe(loss: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipes(loss)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ("adamww", r"unknown optimizer 'adamww'; nearest: adamw"),
        ("adamw:beta=1", r"adamw has no hyper-parameter 'beta'; nearest: betas"),
    ],
)
def test_what_is_no_optimizer(optim: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_recipes("focal", optim)


def test_reasons_why_a_recipe_does_not_fit() -> None:
    reasons = {
        recipe.loss: recipe.misfit(TEN)
        for recipe in parse_recipes(
            "cross_entropy,smooth_adversarial_comp_sum,cross_entropy+smooth_adversarial_comp_sum,focal:gamma=-1,ens"
        )
    }
    assert reasons["cross_entropy"] is None
    for mixed in ("smooth_adversarial_comp_sum", "cross_entropy+smooth_adversarial_comp_sum"):
        assert "needs adversarial_logits, which the task does not supply" in str(reasons[mixed])
    assert "gamma must" in str(reasons["focal:gamma=-1"])
    assert "is for two classes and the task has 10" in str(reasons["ens"])


def test_a_loss_is_built_from_what_the_task_knows() -> None:
    (recipe,) = parse_recipes("tests.trials.examples:Remembering")
    assert recipe.misfit(TEN) is None
    assert recipe.build_loss(TEN, {}).seen.shape == (50,)
    blind = TaskInfo("classification", num_classes=10, num_examples=50)
    assert "needs index" in str(recipe.misfit(blind))


def test_optimizers_are_built_with_what_was_chosen_and_fixed() -> None:
    weight = nn.Parameter(torch.ones(1))
    (recipe,) = parse_recipes("focal", "sgd:nesterov=True")
    optimizer, scheduled = recipe.build_optimizer([weight], learning_rate=0.3, weight_decay=0.01)
    group = optimizer.param_groups[0]
    assert optimizer is scheduled
    assert type(optimizer) is torch.optim.SGD
    assert (group["lr"], group["weight_decay"], group["momentum"], group["nesterov"]) == (
        0.3,
        0.01,
        0.9,
        True,
    )
    assert recipe.misfit(TEN) is None
    # LBFGS has no weight decay, so it cannot be searched fairly
    reason = parse_recipes("focal", "torch.optim:LBFGS")[0].misfit(TEN)
    assert "torch.optim:LBFGS cannot be built" in str(reason)


def test_an_optimizer_that_wants_the_losses_of_the_examples_is_refused() -> None:
    (recipe,) = parse_recipes("cross_entropy", "normalized_gd")
    reason = recipe.misfit(TaskInfo(family="classification", num_classes=3))
    assert (
        reason == "normalized_gd steps from the losses of the examples, and a recipe gives it their gradient"
    )


def test_a_wrapping_optimizer_wraps_adamw() -> None:
    (recipe,) = parse_recipes("cross_entropy", "perpgrad:lr=0.02")
    weight = nn.Parameter(torch.ones(2))
    optimizer, inner = recipe.build_optimizer([weight], learning_rate=0.5, weight_decay=0.1)
    assert type(optimizer).__name__ == "PerpGrad"
    assert type(inner) is torch.optim.AdamW
    assert inner.param_groups[0]["lr"] == 0.02
    assert inner.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.param_groups[0]["params"][0] is weight
