"""Margin links: hand values, slopes, and what makes a margin loss calibrated."""

import math

import pytest
import torch

from telos.losses._links import exponential, hinge, logistic


@pytest.mark.parametrize(
    ("link", "values"),
    [
        (hinge, [3.0, 1.0, 0.0]),
        (logistic, [math.log1p(math.exp(2.0)), math.log(2.0), math.log1p(math.exp(-2.0))]),
        (exponential, [math.exp(2.0), 1.0, math.exp(-2.0)]),
    ],
)
def test_hand_values(link, values) -> None:
    margins = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    losses = link(margins)
    torch.testing.assert_close(losses, torch.tensor(values, dtype=torch.float64))
    (slope,) = torch.autograd.grad(losses.sum(), margins)
    assert slope[1] < 0, "calibrated: falling at margin 0"
    assert slope.diff().min() >= 0, "convex"


def test_a_hinge_elsewhere() -> None:
    torch.testing.assert_close(hinge(torch.tensor([0.0, 0.3]), at=0.1), torch.tensor([0.1, 0.0]))
