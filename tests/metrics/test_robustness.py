"""Verified error: what it counts, and its place between clean error, attacks and certainty."""

import pytest
import torch
from torch import nn

from telos.losses import CrossEntropyLoss, pgd_attack
from telos.losses.robust.interval import IntervalTensor, margin_lower_bounds
from telos.metrics.robustness import VerifiedError, verified_error


def test_an_example_needs_every_margin_above_zero() -> None:
    margins = torch.tensor([[1.0, 2.0], [0.0, 1.0], [-1.0, 5.0], [torch.nan, 1.0], [torch.inf, 1e-9]])
    assert verified_error(margins).item() == pytest.approx(3 / 5)
    assert verified_error(margins[:0]) == 0


def test_batches_add_up() -> None:
    margins = torch.randn(23, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    metric = VerifiedError()
    for part in margins.split(5):
        metric.update(part)
    torch.testing.assert_close(metric.compute(), verified_error(margins))
    metric.reset()
    assert metric.compute() == 0


def test_it_lies_above_the_error_under_attack_and_grows_with_the_box() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 3))
        inputs = torch.rand(200, 5)
    target = model(inputs).argmax(1)
    target[:20] = (target[:20] + 1) % 3
    base = CrossEntropyLoss(reduction="none")
    errors = []
    for eps in (0.0, 0.01, 0.03, 0.1, 1.0):
        margins = margin_lower_bounds(model(IntervalTensor.around(inputs, eps)), target)
        attacked = pgd_attack(lambda x: base(model(x), target).sum(), inputs, radius=eps, start="zero")
        errors.append(verified_error(margins).item())
        assert errors[-1] >= (model(attacked).argmax(1) != target).float().mean().item()
    assert errors == sorted(errors)
    assert errors[0] == pytest.approx(0.1)
    assert errors[-1] == 1


@pytest.mark.bare
def test_doors() -> None:
    with pytest.raises(TypeError, match="margins"):
        verified_error(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="margins"):
        VerifiedError().update(torch.zeros(3))
