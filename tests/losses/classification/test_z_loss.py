"""The Z-loss and the other spherical losses; golden cases of the loss and of the factored layer."""

import math
from typing import Any

import pytest
import torch

from telos.kernels import (
    SphericalState,
    spherical_forward,
    spherical_statistics_loss,
    spherical_update,
    spherical_weight,
)
from telos.losses import TaskInfo
from telos.losses.classification.z_loss import (
    SphericalMSELoss,
    SphericalSoftmaxLoss,
    TaylorSoftmaxLoss,
    ZLoss,
    spherical_mse_loss,
    spherical_softmax_loss,
    taylor_softmax_loss,
    z_loss,
)
from tests.declaration import Declaration, classification_sample, scaled, shifted
from tests.golden.adapters import Case, gradients

affine = {"shift": shifted(3.0), "scale": scaled(2.5, "logits")}

declarations = [
    Declaration(z_loss, ZLoss, classification_sample(), invariances=affine),
    Declaration(z_loss, ZLoss, classification_sample(soft=True), invariances=affine),
    Declaration(taylor_softmax_loss, TaylorSoftmaxLoss, classification_sample()),
    Declaration(
        spherical_softmax_loss,
        SphericalSoftmaxLoss,
        classification_sample(),
        invariances={"sign": scaled(-1.0, "logits")},
    ),
    Declaration(spherical_mse_loss, SphericalMSELoss, classification_sample()),
]


def golden_z_loss(case: Case) -> dict[str, Any]:
    if "steps" in case.inputs:
        return {"steps": _layer_steps(case)}
    logits, target = case.leaf("logits"), case.inputs["target"]
    loss = z_loss(logits, target, **case.params)
    (grad,) = gradients(loss, logits)
    return {
        "loss": loss,
        "loss_per_sample": z_loss(logits, target, **case.params, reduction="none"),
        "grad_logits": grad,
    }


def _layer_steps(case: Case) -> list[dict[str, Any]]:
    """The factored layer, from recorded gradients of the statistics or from those of the Z-loss."""
    V, U, omega = (case.inputs[name].double() for name in ("V", "U", "omega"))
    W = V @ U + omega
    state = SphericalState(V, U, torch.linalg.inv(U).T, omega, W.T @ W, W.sum(0))
    results = []
    for step in case.inputs["steps"]:
        H, indices = step["H"].double(), step["indices"]
        statistics = spherical_forward(state, H, indices)
        result: dict[str, Any] = dict(zip(("A", "s", "q"), statistics, strict=True))
        names = ("grad_A", "grad_s", "grad_q")
        recorded = [step[name].double() for name in names] if "grad_A" in step else None
        if "a" in case.params:
            A, s, q = (entry.clone().requires_grad_() for entry in statistics)
            loss = spherical_statistics_loss(A, s, q, V.shape[0], a=case.params["a"], b=case.params["b"])
            result["loss"] = loss.detach()
            result |= dict(zip(names, gradients(loss, A, s, q), strict=True))
        elif recorded is not None:
            result |= dict(zip(names, recorded, strict=True))
        grad_A, grad_s, grad_q = recorded or [result[name] for name in names]
        grad_H, state = spherical_update(state, H, indices, grad_A, grad_s, grad_q, case.params["eta"])
        result["grad_H"] = grad_H
        result["new_W"] = spherical_weight(state)
        result |= {f"new_{name}": getattr(state, name) for name in ("V", "U", "omega", "Q", "w_bar")}
        result["new_Ui"] = result["new_U_inv_t"] = state.U_inv_t
        results.append(result)
    return results


def _draw(n: int = 6, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64).requires_grad_()
    return logits, torch.randint(classes, (n,), generator=generator)


def test_equation() -> None:
    logits, target = _draw()
    z = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True, unbiased=False)
    expected = torch.log(1 + torch.exp(1.7 * (0.4 - z[torch.arange(6), target]))) / 1.7
    torch.testing.assert_close(z_loss(logits, target, a=1.7, b=0.4, reduction="none"), expected)


def test_gradient_is_the_closed_form_sums_to_zero_and_is_orthogonal_to_the_logits() -> None:
    logits, target = _draw()
    (grad,) = gradients(z_loss(logits, target, a=1.7, b=0.4, eps=0.0, reduction="sum"), logits)
    o = logits.detach()
    sigma = o.std(-1, keepdim=True, unbiased=False)
    z = (o - o.mean(-1, keepdim=True)) / sigma
    z_target = z.gather(1, target.unsqueeze(1))
    g = torch.sigmoid(1.7 * (0.4 - z_target))
    one_hot = torch.nn.functional.one_hot(target, 7)
    torch.testing.assert_close(grad, -(g / sigma) * (one_hot - 1 / 7 - z_target * z / 7))
    torch.testing.assert_close(grad.sum(-1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close((grad * o).sum(-1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("factor", "shift"), [(1e-3, 0.0), (7.0, -40.0), (1e4, 1e5)])
def test_blind_to_positive_affine_changes(factor: float, shift: float) -> None:
    logits, target = _draw()
    torch.testing.assert_close(
        z_loss(factor * logits + shift, target, a=2.0, b=1.0, reduction="none"),
        z_loss(logits, target, a=2.0, b=1.0, reduction="none"),
        rtol=1e-8,
        atol=1e-10,
    )


def test_large_a_is_the_hinge() -> None:
    logits, target = _draw()
    z = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True, unbiased=False)
    hinge = (0.5 - z[torch.arange(6), target]).clamp_min(0)
    # softplus(a x) / a exceeds max(0, x) by at most log(2) / a
    gap = z_loss(logits, target, a=1e4, b=0.5, eps=0.0, reduction="none") - hinge
    assert gap.min() >= -1e-15
    assert gap.max() <= math.log(2) / 1e4


@pytest.mark.parametrize("a", [0.3, 1.0, 8.0])
def test_target_at_the_mean_costs_log_two_over_a(a: float) -> None:
    loss = z_loss(torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64), torch.tensor([1]), a=a, b=0.0)
    assert loss.item() == pytest.approx(math.log(2) / a, rel=1e-12)


def test_two_classes_give_two_values_and_no_gradient() -> None:
    logits, _ = _draw(classes=2)
    target = logits.argmax(-1)
    for labels, z in ((target, 1.0), (1 - target, -1.0)):
        values = z_loss(logits, labels, a=2.0, b=0.5, eps=0.0, reduction="none")
        expected = math.log1p(math.exp(2.0 * (0.5 - z))) / 2.0
        torch.testing.assert_close(values, torch.full_like(values, expected))
        (grad,) = gradients(values, logits)
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_logits_have_a_finite_gradient_towards_the_target(constant: float, dtype: torch.dtype) -> None:
    logits = torch.full((1, 5), constant, dtype=dtype, requires_grad=True)
    loss = z_loss(logits, torch.tensor([2]), a=1.0, b=0.0)
    # what rounding leaves of the spread is left unscaled
    rounding = 1e-6 + 2 * torch.finfo(dtype).eps * abs(constant)
    assert loss.item() == pytest.approx(math.log(2), abs=rounding)
    (grad,) = gradients(loss, logits)
    # unscaled: -g (1[k = y] - 1/D) with g = 1/2
    expected = 0.5 * (0.2 - torch.nn.functional.one_hot(torch.tensor([2]), 5).to(dtype))
    torch.testing.assert_close(grad, expected, rtol=0, atol=rounding)


def test_small_spread_on_a_large_mean_in_float32() -> None:
    # q / D - mean^2 would be pure rounding here: the mean square is 1e8, the variance about 1
    exact, target = _draw(classes=50)
    logits = (exact.detach() + 1e4).float()
    reference = z_loss(logits.double(), target, reduction="none")
    torch.testing.assert_close(
        z_loss(logits, target, reduction="none").double(), reference, rtol=1e-5, atol=1e-6
    )


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 classes"):
        z_loss(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))


def test_parameters_out_of_range_are_refused() -> None:
    for bad in ({"a": 0.0}, {"a": -1.0}, {"eps": -1e-9}):
        with pytest.raises(ValueError, match="must lie in"):
            z_loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), **bad)
        with pytest.raises(ValueError, match="must lie in"):
            ZLoss(**bad)
    with pytest.raises(ValueError, match="eps must lie in"):
        spherical_softmax_loss(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), eps=0.0)


@pytest.mark.parametrize(
    ("loss", "kind", "options"),
    [
        (z_loss, "z", {"a": 0.7, "b": 1.5}),
        (taylor_softmax_loss, "taylor", {}),
        (spherical_softmax_loss, "spherical", {"eps": 0.02}),
        (spherical_mse_loss, "mse", {}),
    ],
)
def test_loss_of_the_logits_equals_loss_of_their_statistics(loss, kind, options) -> None:
    logits, target = _draw()
    selected = logits[torch.arange(6), target]
    head = spherical_statistics_loss(
        selected, logits.sum(-1), logits.square().sum(-1), 7, kind=kind, **options, reduction="none"
    )
    dense = loss(logits, target, reduction="none", **options)
    torch.testing.assert_close(head, dense)
    torch.testing.assert_close(gradients(head, logits), gradients(dense, logits))


@pytest.mark.parametrize("loss", [z_loss, taylor_softmax_loss, spherical_softmax_loss, spherical_mse_loss])
def test_probabilities_average_over_classes(loss) -> None:
    logits, _ = _draw()
    q = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    by_class = torch.stack([loss(logits, torch.full((6,), y), reduction="none") for y in range(7)], -1)
    torch.testing.assert_close(loss(logits, q, reduction="none"), (q * by_class).sum(-1))


def test_baselines_equal_their_equations() -> None:
    logits, target = _draw()
    one_hot = torch.nn.functional.one_hot(target, 7).double()
    torch.testing.assert_close(
        spherical_mse_loss(logits, target, reduction="none"), (logits - one_hot).square().sum(-1)
    )
    taylor = 1 + logits + logits.square() / 2
    torch.testing.assert_close(
        taylor_softmax_loss(logits, target, reduction="none"),
        -((taylor / taylor.sum(-1, keepdim=True)).log() * one_hot).sum(-1),
    )
    squares = logits.square() + 0.3
    torch.testing.assert_close(
        spherical_softmax_loss(logits, target, eps=0.3, reduction="none"),
        -((squares / squares.sum(-1, keepdim=True)).log() * one_hot).sum(-1),
    )


@pytest.mark.parametrize(
    "loss", [TaylorSoftmaxLoss(), SphericalSoftmaxLoss(eps=0.3)], ids=lambda x: type(x).__name__
)
def test_log_probabilities_are_those_of_the_loss(loss) -> None:
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    logs = loss.log_probabilities(logits)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(-logs.gather(1, target[:, None]).mean(), loss(logits, target))
    # the reason for the method: they are not monotone in the logits
    assert loss.log_probabilities(torch.tensor([[-9.0, 1.0]])).argmax() == 0


@pytest.mark.parametrize(
    "loss", [TaylorSoftmaxLoss(), SphericalSoftmaxLoss(eps=0.3)], ids=lambda x: type(x).__name__
)
def test_log_probabilities_carry_their_gradient(loss) -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss.log_probabilities, logits)


def test_eps_is_added_to_the_standard_deviation() -> None:
    logits, target = torch.tensor([[2.0, -1.0, -1.0]], dtype=torch.float64), torch.tensor([0])
    # mean 0, population standard deviation sqrt(2)
    score = 2.0 / (math.sqrt(2.0) + 0.5)
    assert z_loss(logits, target, eps=0.5).item() == pytest.approx(math.log1p(math.exp(-score)), rel=1e-12)


def test_two_classes_are_refused_by_a_task() -> None:
    """Their standardised logits are -1 and 1 whatever the model says, so that nothing could be learnt."""
    logits = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    z_loss(logits, torch.tensor([0, 1, 1, 0, 1])).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-10
    with pytest.raises(ValueError, match="no gradient with two classes"):
        ZLoss.from_task(TaskInfo(family="classification", num_classes=2))
    assert ZLoss.from_task(TaskInfo(family="classification", num_classes=3), a=2.0).a == 2.0
