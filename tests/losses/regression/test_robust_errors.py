import math

import pytest
import torch
from torch import Tensor

from telos.losses.regression import (
    CauchyLoss,
    GemanMcClureLoss,
    PseudoHuberLoss,
    cauchy_loss,
    geman_mcclure_loss,
    pseudo_huber_loss,
)
from tests.losses.regression.test_errors import batch, declared

declarations = [
    *declared(pseudo_huber_loss, PseudoHuberLoss),
    *declared(cauchy_loss, CauchyLoss),
    *declared(geman_mcclure_loss, GemanMcClureLoss),
]

LOSSES = {
    "pseudo_huber": (pseudo_huber_loss, PseudoHuberLoss),
    "cauchy": (cauchy_loss, CauchyLoss),
    "geman_mcclure": (geman_mcclure_loss, GemanMcClureLoss),
}


def by_definition(name: str, squared: Tensor, c: float) -> Tensor:
    if name == "pseudo_huber":
        return (squared + c**2).sqrt() - c
    if name == "cauchy":
        return (squared / 2 + c**2).log() - 2 * math.log(c)
    return 2 * squared / (squared + 4 * c**2)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("name", LOSSES)
def test_the_three_forms_by_definition(name: str, scale: float) -> None:
    function, module = LOSSES[name]
    prediction, target = batch(2, 3)
    squared = (prediction - target).square().flatten(1)
    expected = {
        "elementwise": by_definition(name, squared, scale).mean(1),
        "mean": by_definition(name, squared.mean(1), scale),
        "vector": by_definition(name, squared.sum(1), scale),
    }
    for form, want in expected.items():
        found = function(prediction, target, scale=scale, form=form, reduction="none")
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(module(scale, form, reduction="none")(prediction, target), found)


@pytest.mark.parametrize("form", ["elementwise", "mean", "vector"])
@pytest.mark.parametrize("name", LOSSES)
def test_masked_entries_and_rows_of_weight_zero_do_not_exist(name: str, form: str) -> None:
    function, _ = LOSSES[name]
    prediction, target = batch(4)
    mask = torch.tensor([[True, True, False, True]] * 6)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    chosen = torch.tensor([0, 2, 3, 4, 4, 5])
    kept = function(prediction[chosen][:, mask[0]], target[chosen][:, mask[0]], form=form)
    holed = prediction.masked_fill(~mask, torch.nan)
    holed[1] = torch.inf
    holed.requires_grad_()
    loss = function(holed, target, mask, form=form, sample_weight=weight)
    torch.testing.assert_close(loss, kept)
    (slope,) = torch.autograd.grad(loss, holed)
    assert torch.isfinite(slope).all()
    assert torch.count_nonzero(slope[:, 2]) == torch.count_nonzero(slope[1]) == 0


def test_limits() -> None:
    prediction, target = batch(4)
    size = (prediction - target).norm(dim=1)
    rows = {"form": "vector", "reduction": "none"}
    # c to 0 is the norm, c large r^2 / (2 c); 2 c^2 times Cauchy and Geman-McClure tend to r^2 and r^2
    torch.testing.assert_close(
        pseudo_huber_loss(prediction, target, scale=1e-9, **rows), size, rtol=1e-8, atol=0
    )
    wide = 1e5
    torch.testing.assert_close(
        2 * wide * pseudo_huber_loss(prediction, target, scale=wide, **rows), size.square(), rtol=1e-8, atol=0
    )
    for function in (cauchy_loss, geman_mcclure_loss):
        torch.testing.assert_close(
            2 * wide**2 * function(prediction, target, scale=wide, **rows), size.square(), rtol=1e-8, atol=0
        )


def test_the_influence_of_an_outlier() -> None:
    residual = torch.tensor([1e-3, 1.0, 1e3, 1e6], dtype=torch.float64, requires_grad=True)

    def influence(function) -> Tensor:
        loss = function(residual, torch.zeros(4, dtype=torch.float64), reduction="sum")
        return torch.autograd.grad(loss, residual)[0]

    r = residual.detach()
    torch.testing.assert_close(influence(pseudo_huber_loss), r / (r**2 + 1).sqrt())
    torch.testing.assert_close(influence(cauchy_loss), 2 * r / (2 + r**2))
    torch.testing.assert_close(influence(geman_mcclure_loss), 16 * r / (r**2 + 4) ** 2)
    at = torch.linspace(0.01, 10, 2000, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(cauchy_loss(at, torch.zeros_like(at), reduction="sum"), at)[0]
    assert abs(at[slope.argmax()].item() - math.sqrt(2)) < 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_a_tiny_residual_keeps_its_digits(name: str) -> None:
    function, _ = LOSSES[name]
    found = function(torch.tensor([1e-5]), torch.zeros(1))
    # with scale 1 each of the three begins as r^2 / 2
    torch.testing.assert_close(found.item(), 0.5e-10, rtol=1e-6, atol=0)


@pytest.mark.bare
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_refused(name: str) -> None:
    function, module = LOSSES[name]
    zeros = torch.zeros(2)
    for make in (lambda **bad: function(zeros, zeros, **bad), module):
        with pytest.raises(ValueError, match=r"scale must lie in \(0"):
            make(scale=0.0)
        with pytest.raises(ValueError, match="form must be 'elementwise', 'mean' or 'vector', got 'sum'"):
            make(form="sum")
