"""StableMax cross-entropy; golden cases of the loss and of PerpGrad."""

import math
from typing import Any

import pytest
import torch

from telos.losses.classification.stablemax import (
    StableMaxCrossEntropyLoss,
    log_stablemax,
    stablemax_cross_entropy_loss,
)
from telos.optim import PerpGrad
from tests.declaration import Declaration, classification_sample
from tests.golden.adapters import Case, gradients

declarations = [
    Declaration(stablemax_cross_entropy_loss, StableMaxCrossEntropyLoss, classification_sample()),
]


def golden_stablemax_perpgrad(case: Case) -> dict[str, Any]:
    options = dict(case.params)
    if options.pop("function") == "OrthoGrad":
        return _perpgrad_run(case, options)
    logits = case.leaf("logits")
    loss = stablemax_cross_entropy_loss(logits, case.inputs["target"], **options)
    (grad,) = gradients(loss, logits)
    return {"loss": loss, "log_stablemax": log_stablemax(logits), "grad_logits": grad}


def _perpgrad_run(case: Case, options: dict[str, Any]) -> dict[str, Any]:
    base = getattr(torch.optim, options.pop("base_optimizer"))
    parameters = [_double(value).clone().requires_grad_() for value in case.inputs["params"]]
    # the source projects tensors of any size
    optimizer = PerpGrad(base(parameters, **options), min_numel=1)
    projected, after = [], []
    for step in case.inputs["grads_per_step"]:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = _double(gradient).clone()
        optimizer.step()
        projected.append([parameter.grad.clone() for parameter in parameters])
        after.append([parameter.detach().clone() for parameter in parameters])
    return {"projected_grads_per_step": projected, "params_after_each_step": after}


def _double(value: Any) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _stablemax(logits: torch.Tensor) -> torch.Tensor:
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
    return s / s.sum(-1, keepdim=True)


def _draw() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(5, (6,), generator=generator)


def test_hand_computed() -> None:
    loss = stablemax_cross_entropy_loss(torch.tensor([[2.0, -1.0, 0.0]]).double(), torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(4.5 / 3), rel=1e-14)


def test_all_zero_logits_give_log_of_the_classes() -> None:
    loss = stablemax_cross_entropy_loss(torch.zeros(2, 7).double(), torch.tensor([3, 6]))
    assert loss.item() == pytest.approx(math.log(7), rel=1e-14)


def test_equation_and_closed_form_gradient() -> None:
    logits, target = _draw()
    probabilities = _stablemax(logits)
    torch.testing.assert_close(log_stablemax(logits), probabilities.log())
    loss = stablemax_cross_entropy_loss(logits, target)
    (grad,) = gradients(loss, logits)
    one_hot = torch.nn.functional.one_hot(target, 5)
    torch.testing.assert_close(grad, (probabilities - one_hot) / (1 + logits.abs()) / 6)


def test_is_log_softmax_of_the_signed_logarithm() -> None:
    logits, _ = _draw()
    signed = logits.sign() * torch.log1p(logits.abs())
    torch.testing.assert_close(log_stablemax(logits), torch.log_softmax(signed, -1))
    torch.testing.assert_close(log_stablemax(logits, dim=0), torch.log_softmax(signed, 0))


@pytest.mark.parametrize("row", [[0.0, -0.0, 1.0, -1.0], [1.0, 1.0, 0.0, 2.0], [1e6, 0.0, 1.0, -1e6]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradient_at_special_logits(row: list[float], dtype: torch.dtype) -> None:
    logits = torch.tensor([row], dtype=dtype, requires_grad=True)
    for label in range(4):
        (grad,) = gradients(stablemax_cross_entropy_loss(logits, torch.tensor([label])), logits)
        x = logits.detach().double()
        expected = (_stablemax(x) - torch.nn.functional.one_hot(torch.tensor([label]), 4)) / (1 + x.abs())
        tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
        torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=1e-12)


def test_gradcheck_at_zero_and_one() -> None:
    logits = torch.tensor(
        [[0.0, 1.0, -1.0, 2.5], [1.0, 0.0, 0.0, -4.0]], dtype=torch.float64
    ).requires_grad_()
    target = torch.tensor([1, 2])
    assert torch.autograd.gradcheck(lambda z: stablemax_cross_entropy_loss(z, target), logits)


def test_no_collapse_where_cross_entropy_has() -> None:
    logits, target = torch.tensor([[20.0, 0.0, 0.0]], requires_grad=True), torch.tensor([0])
    (dead,) = gradients(torch.nn.functional.cross_entropy(logits, target), logits)
    (alive,) = gradients(stablemax_cross_entropy_loss(logits, target), logits)
    assert dead[0, 0] == 0
    # (21 / 23 - 1) / 21
    assert alive[0, 0].item() == pytest.approx(-2 / 23 / 21, rel=1e-5)


def test_is_not_shift_invariant() -> None:
    logits, target = _draw()
    here, shifted = (stablemax_cross_entropy_loss(z, target).item() for z in (logits, logits + 5))
    assert abs(here - shifted) > 0.1


def test_probabilities_average_over_classes() -> None:
    logits, _ = _draw()
    q = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(-1)
    expected = -(q * _stablemax(logits).log()).sum(-1)
    torch.testing.assert_close(stablemax_cross_entropy_loss(logits, q, reduction="none"), expected)


def test_half_precision_comes_back_in_float32() -> None:
    assert log_stablemax(torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.bare
def test_whole_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="logits must have a floating-point dtype"):
        log_stablemax(torch.zeros(3, dtype=torch.long))


def test_log_probabilities_are_those_of_the_loss() -> None:
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    loss = StableMaxCrossEntropyLoss()
    logs = loss.log_probabilities(logits)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(-logs.gather(1, target[:, None]).mean(), loss(logits, target))


def test_log_probabilities_carry_their_gradient() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0], [3.0, -0.5, 0.25]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_stablemax, logits)
    assert torch.autograd.gradcheck(StableMaxCrossEntropyLoss().log_probabilities, logits)
