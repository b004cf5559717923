"""Derivatives written by hand against autograd through the losses themselves."""

import pytest
import torch

from telos.losses import (
    ALDRKLLoss,
    CompSumLoss,
    CrossEntropyLoss,
    FocalLoss,
    GCELoss,
    LabelSmoothingLoss,
    LDRKLLoss,
    MAELoss,
    SCELoss,
    SphericalMSELoss,
    SphericalSoftmaxLoss,
    StableMaxCrossEntropyLoss,
    TaylorSoftmaxLoss,
    WestonWatkinsLoss,
    ZLoss,
)
from telos.losses._row_derivatives import adaptive_ldr_kl, row_derivative

LOSSES = {
    "cross_entropy": CrossEntropyLoss(),
    "comp_sum": CompSumLoss(tau=0.5),
    "comp_sum_above_one": CompSumLoss(tau=1.7),
    "gce": GCELoss(),
    "mae": MAELoss(),
    "focal": FocalLoss(gamma=2.5),
    "focal_zero": FocalLoss(gamma=0.0),
    "focal_below_one": FocalLoss(gamma=0.5),
    "sce": SCELoss(alpha=0.3, beta=1.5),
    "label_smoothing": LabelSmoothingLoss(smoothing=0.2),
    "ldr_kl": LDRKLLoss(temperature=0.7, margin=0.4),
    "weston_watkins": WestonWatkinsLoss(margin=0.8),
    "stablemax": StableMaxCrossEntropyLoss(),
    "z_loss": ZLoss(a=2.0, b=0.5),
    "spherical_softmax": SphericalSoftmaxLoss(eps=0.3),
    "taylor_softmax": TaylorSoftmaxLoss(),
    "squared_error": SphericalMSELoss(),
}


def problem(scale: float = 2.0, classes: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    logits = scale * torch.randn(12, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (12,), generator=generator)


@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_derivatives_are_those_of_the_loss(name: str, scale: float) -> None:
    logits, target = problem(scale)
    leaf = logits.clone().requires_grad_()
    expected = LOSSES[name].values(leaf, target)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    derivative = row_derivative(LOSSES[name])
    assert derivative is not None
    values, slope = derivative(logits, target)
    torch.testing.assert_close(values, expected.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(logits * slope[:, None], gradient, rtol=1e-10, atol=1e-11)


# below tau = 1 a comp-sum loss grows like exp((1 - tau) nll): it is declared to overflow
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "comp_sum"])
def test_extreme_logits_stay_finite(name: str) -> None:
    logits = torch.tensor([[30000.0, -30000.0, 0.0], [-30000.0, 30000.0, 30000.0], [0.0, 0.0, 0.0]])
    derivative = row_derivative(LOSSES[name])
    assert derivative is not None
    values, slope = derivative(logits, torch.tensor([0, 0, 1]))
    assert values.isfinite().all()
    assert (logits * slope[:, None]).isfinite().all()


def test_a_subclass_has_no_derivative_of_its_parent() -> None:
    class Changed(FocalLoss):
        pass

    assert row_derivative(Changed()) is None
    assert row_derivative(LDRKLLoss(normalize="softplus")) is None


@pytest.mark.parametrize("shift", [0.0, 15.0, -60.0])
def test_adaptive_ldr(shift: float) -> None:
    logits, target = problem()
    logits += shift
    loss = ALDRKLLoss(num_examples=12, temperature=2.0, alpha=1.5, margin=0.3)
    leaf, old = logits.clone().requires_grad_(), torch.linspace(0.5, 3.0, 12)
    from telos.losses.classification.ldr import _adaptive_rows

    expected, _, expected_new = _adaptive_rows(
        leaf, target, old, temperature=2.0, alpha=1.5, margin=0.3, normalize=loss.normalize, exact=False,
        class_weight=None, sample_weight=None, ignore_index=-100,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    values, slope, new = adaptive_ldr_kl(logits, target, old, temperature=2.0, alpha=1.5, margin=0.3)
    torch.testing.assert_close(values, expected.detach(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(new.float(), expected_new)
    # torch's softplus is linear above 20, where the exact slope is 1 - 2e-9
    torch.testing.assert_close(logits * slope[:, None], gradient, rtol=1e-7, atol=1e-9)
