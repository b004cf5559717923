"""PerpGrad: gradients orthogonal to the weights, under any optimizer."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from telos.optim import PerpGrad, orthogonalize_


def _parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    parameter.grad = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return parameter


def _inner(parameter: Tensor) -> Tensor:
    return (parameter.detach() * parameter.grad).sum()


def test_orthogonal_and_of_the_same_norm() -> None:
    parameters = [_parameter(3, 4), _parameter(50, seed=1), _parameter(2, 3, 4, seed=2)]
    norms = [p.grad.norm() for p in parameters]
    orthogonalize_(parameters)
    for parameter, norm in zip(parameters, norms, strict=True):
        assert abs(_inner(parameter)) < 1e-13
        torch.testing.assert_close(parameter.grad.norm(), norm)


def test_equals_the_projection_matrix() -> None:
    parameter = _parameter(7)
    w, g = parameter.detach(), parameter.grad.clone()
    projector = torch.eye(7, dtype=torch.float64) - torch.outer(w, w) / (w @ w)
    orthogonalize_(parameter, rescale=False)
    torch.testing.assert_close(parameter.grad, projector @ g)


def test_global_scope_projects_the_whole_vector() -> None:
    parameters = [_parameter(3, 4), _parameter(5, seed=1)]
    w = torch.cat([p.detach().flatten() for p in parameters])
    g = torch.cat([p.grad.flatten() for p in parameters])
    expected = g - (w @ g) / (w @ w) * w
    expected = expected * g.norm() / expected.norm()
    orthogonalize_(parameters, scope="global")
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in parameters]), expected)
    assert abs(_inner(parameters[0])) > 1e-3  # the tensors by themselves are not orthogonal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.37, -3.1])
@pytest.mark.parametrize("size", [10, 1000, 100_000])
def test_parallel_gradient_gives_zero(dtype: torch.dtype, factor: float, size: int) -> None:
    for offset in (0.0, 3.0):
        parameter = (_parameter(size, seed=size).detach() + offset).to(dtype).requires_grad_()
        parameter.grad = factor * parameter.detach()
        orthogonalize_(parameter)
        assert (parameter.grad == 0).all()


def test_zero_weights_leave_the_gradient() -> None:
    parameter = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    parameter.grad = torch.arange(5.0, dtype=torch.float64)
    orthogonalize_(parameter)
    torch.testing.assert_close(parameter.grad, torch.arange(5.0, dtype=torch.float64))


def test_zero_gradient_stays_zero() -> None:
    parameter = _parameter(5)
    parameter.grad.zero_()
    orthogonalize_(parameter)
    assert (parameter.grad == 0).all()


def test_scaling_the_weights_changes_nothing() -> None:
    one, scaled = _parameter(6), _parameter(6)
    scaled.data *= 1000
    orthogonalize_([one])
    orthogonalize_([scaled])
    torch.testing.assert_close(one.grad, scaled.grad)


def test_single_numbers_keep_their_gradient() -> None:
    temperature = _parameter(1)
    before = temperature.grad.clone()
    orthogonalize_([temperature])
    assert (temperature.grad == before).all()
    orthogonalize_([temperature], min_numel=1)
    assert (temperature.grad == 0).all()


def test_bfloat16_is_computed_in_float32() -> None:
    parameter = _parameter(4000, dtype=torch.bfloat16)
    exact = parameter.detach().double().requires_grad_()
    exact.grad = parameter.grad.double()
    orthogonalize_([parameter])
    orthogonalize_([exact])
    assert parameter.grad.dtype == torch.bfloat16
    # only the last rounding to bfloat16 is left
    torch.testing.assert_close(parameter.grad.double(), exact.grad, rtol=2**-8, atol=1e-6)


def test_complex_parameters_are_pairs_of_reals() -> None:
    pairs = _parameter(5, 2)
    parameter = torch.view_as_complex(pairs.detach().clone()).requires_grad_()
    parameter.grad = torch.view_as_complex(pairs.grad.clone())
    orthogonalize_([parameter])
    orthogonalize_([pairs])
    torch.testing.assert_close(torch.view_as_real(parameter.grad), pairs.grad)


def test_missing_gradients_are_passed_over() -> None:
    parameter = nn.Parameter(torch.ones(3))
    orthogonalize_([parameter])
    orthogonalize_([], scope="global")
    assert parameter.grad is None


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"needs dense gradients, got torch\.sparse_coo"):
        PerpGrad(torch.optim.SGD(embedding.parameters(), lr=0.1)).step()


def test_sgd_grows_the_norm_by_the_step_alone() -> None:
    """Pythagoras: |w'|^2 = |w|^2 + lr^2 |g|^2."""
    parameter = _parameter(6)
    before, gradient = parameter.detach().square().sum(), parameter.grad.square().sum()
    PerpGrad(torch.optim.SGD([parameter], lr=0.3)).step()
    torch.testing.assert_close(parameter.detach().square().sum(), before + 0.09 * gradient)


def test_adamw_steps_with_the_projected_gradient() -> None:
    wrapped, plain = _parameter(4, 3), _parameter(4, 3)
    optimizer = PerpGrad(torch.optim.AdamW([wrapped], lr=0.1, weight_decay=0.5))
    reference = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.5)
    for seed in range(3):
        gradient = _parameter(4, 3, seed=10 + seed).grad
        wrapped.grad, plain.grad = gradient.clone(), gradient.clone()
        w = plain.detach()
        perpendicular = gradient - (w * gradient).sum() / w.square().sum() * w
        plain.grad = perpendicular * gradient.norm() / perpendicular.norm()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(wrapped, plain)


def test_closure_gradients_do_not_escape() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, 0.0]))
    optimizer = PerpGrad(torch.optim.SGD([parameter], lr=0.1))
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = (parameter * torch.tensor([3.0, 4.0])).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert len(calls) == 1
    assert loss.item() == 9
    torch.testing.assert_close(parameter.detach(), torch.tensor([3.0, -0.5]))


def test_groups_state_and_defaults_are_those_of_the_base() -> None:
    parameter = _parameter(4)
    base = torch.optim.AdamW([parameter], lr=0.1, betas=(0.5, 0.6))
    optimizer = PerpGrad(base)
    optimizer.step()
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    # a checkpoint of the base goes into a shell; loading gives the base new groups, and so the shell
    other = PerpGrad(torch.optim.AdamW([parameter], lr=9.0))
    other.load_state_dict(base.state_dict())
    assert other.param_groups is other.base_optimizer.param_groups
    assert other.param_groups[0]["lr"] == 0.1
    assert other.param_groups[0]["betas"] == (0.5, 0.6)
    assert other.state[parameter]["step"] == 1
    other.param_groups[0]["lr"] = 0.0
    other.param_groups[0]["weight_decay"] = 0.0
    before = parameter.detach().clone()
    other.step()
    torch.testing.assert_close(parameter.detach(), before, rtol=0, atol=0)


def test_add_param_group() -> None:
    base = torch.optim.SGD([_parameter(4)], lr=0.1)
    optimizer = PerpGrad(base)
    optimizer.add_param_group({"params": [_parameter(3)], "lr": 1.0})
    assert [group["lr"] for group in base.param_groups] == [0.1, 1.0]


def test_learning_rate_schedule() -> None:
    parameter = _parameter(4)
    optimizer = PerpGrad(torch.optim.SGD([parameter], lr=1.0))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for expected in (1.0, 0.5, 0.25):
        before = parameter.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - parameter.detach(), expected * parameter.grad)
        schedule.step()


def test_zero_grad() -> None:
    parameter = _parameter(4)
    optimizer = PerpGrad(torch.optim.SGD([parameter], lr=1.0))
    optimizer.zero_grad(set_to_none=False)
    assert (parameter.grad == 0).all()
    optimizer.zero_grad()
    assert parameter.grad is None


def test_grad_scaler_unscales_before_the_projection_and_skips_overflow() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    wrapped, plain = _parameter(4, dtype=torch.float32), _parameter(4, dtype=torch.float32)
    PerpGrad(torch.optim.SGD([plain], lr=0.1)).step()
    optimizer = PerpGrad(torch.optim.SGD([wrapped], lr=0.1))
    gradient = wrapped.grad.clone()
    optimizer.zero_grad()
    scaler.scale((wrapped * gradient).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(wrapped, plain)
    before = wrapped.detach().clone()
    optimizer.zero_grad()
    scaler.scale((wrapped * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(wrapped.detach(), before, rtol=0, atol=0)
    assert scaler.get_scale() < 2.0**10


def test_step_hooks_run() -> None:
    optimizer = PerpGrad(torch.optim.SGD([_parameter(4)], lr=0.1))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_options_and_state(duplicate) -> None:
    optimizer = PerpGrad(
        torch.optim.AdamW([_parameter(4)], lr=0.1), scope="global", rescale=False, min_numel=3
    )
    optimizer.step()
    other = duplicate(optimizer)
    assert (other.scope, other.rescale, other.min_numel) == ("global", False, 3)
    assert other.base_optimizer is not optimizer.base_optimizer
    (state,) = other.state.values()
    assert state["step"] == 1
    for twin in (optimizer, other):
        (parameter,) = twin.param_groups[0]["params"]
        parameter.grad = torch.ones(4, dtype=torch.float64)
        twin.step()
    torch.testing.assert_close(*(twin.param_groups[0]["params"][0] for twin in (optimizer, other)))


def test_shows_the_groups() -> None:
    assert "lr: 0.1" in repr(PerpGrad(torch.optim.SGD([_parameter(4)], lr=0.1)))


@pytest.mark.bare
def test_doors() -> None:
    parameter = _parameter(4)
    base = torch.optim.SGD([parameter], lr=0.1)
    with pytest.raises(TypeError, match=r"base_optimizer must be a torch\.optim\.Optimizer, got list"):
        PerpGrad([parameter])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LBFGS"):
        PerpGrad(torch.optim.LBFGS([parameter]))
    with pytest.raises(ValueError, match="scope must be 'tensor' or 'global', got 'layer'"):
        PerpGrad(base, scope="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_numel must be at least 1, got 0"):
        orthogonalize_([parameter], min_numel=0)
