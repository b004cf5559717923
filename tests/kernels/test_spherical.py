"""The factored output layer equals dense SGD, at a cost that does not depend on the number of classes."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from telos.kernels.spherical import (
    SphericalState,
    spherical_backward,
    spherical_forward,
    spherical_grad_norm,
    spherical_refactor,
    spherical_stabilize,
    spherical_state,
    spherical_statistics_loss,
    spherical_step,
    spherical_update,
    spherical_weight,
)
from telos.losses.classification.z_loss import (
    spherical_mse_loss,
    spherical_softmax_loss,
    taylor_softmax_loss,
    z_loss,
)

LOSSES = {
    "z": z_loss,
    "mse": spherical_mse_loss,
    "taylor": taylor_softmax_loss,
    "spherical": spherical_softmax_loss,
}

# where SGD itself is stable: at 0.5 two dense runs of "spherical" 1e-14 apart are 1e-9 apart after 200 steps
RATES = {"z": 0.5, "mse": 0.002, "taylor": 0.5, "spherical": 0.1}


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["z", "taylor", "spherical", "mse"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_equals_dense_sgd_over_200_steps(kind: Any, weight_decay: float) -> None:
    """Repeated targets, two per example, stabilisation every 3 steps, a full refactor half-way."""
    classes, features, examples, lr = 30, 6, 5, RATES[kind]
    options = {"a": 1.3, "b": 0.5} if kind == "z" else {}
    dense = _normal(classes, features).requires_grad_()
    optimizer = torch.optim.SGD([dense], lr=lr, weight_decay=weight_decay)
    state = spherical_state(dense)
    # four of the thirty classes make sure that targets repeat within and between examples
    generator = torch.Generator().manual_seed(1)
    stretched = 0.0
    for step in range(200):
        H = _normal(examples, features, seed=100 + step).requires_grad_()
        index = torch.randint(4, (examples, 2), generator=generator)
        logits = H @ dense.T
        loss = sum(LOSSES[kind](logits, index[:, k], **options) for k in range(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result = spherical_step(state, H.detach(), index, lr, kind=kind, weight_decay=weight_decay, **options)
        _close(result.loss, loss.detach())
        _close(result.grad_inputs, H.grad)
        state = result.state
        singular = torch.linalg.svdvals(state.U)
        stretched = max(stretched, singular.max().item(), 1 / singular.min().item())
        if step % 3 == 2:
            state = spherical_stabilize(state, low=0.99, high=1.01)
        if step == 100:
            state = spherical_refactor(state)
        _close(spherical_weight(state), dense.detach())
    W = dense.detach()
    _close(state.Q, W.T @ W)
    _close(state.w_bar, W.sum(0))
    _close(state.U @ state.U_inv_t.T, torch.eye(features, dtype=torch.float64))
    assert stretched > 1.01  # otherwise stabilisation has had nothing to do


def test_equals_dense_sgd_without_any_stabilisation() -> None:
    dense = _normal(40, 8).requires_grad_()
    state = spherical_state(dense)
    generator = torch.Generator().manual_seed(1)
    for step in range(200):
        H, index = _normal(6, 8, seed=step), torch.randint(40, (6,), generator=generator)
        (grad,) = torch.autograd.grad(z_loss(H @ dense.T, index), dense)
        dense = (dense - 0.3 * grad).detach().requires_grad_()
        state = spherical_step(state, H, index, 0.3).state
    W = dense.detach()
    _close(spherical_weight(state), W)
    _close(state.Q, W.T @ W)
    _close(state.U @ state.U_inv_t.T, torch.eye(8, dtype=torch.float64))


def test_forward_equals_the_logits() -> None:
    state = SphericalState(_normal(9, 3), _normal(3, 3, seed=1), *(_normal(3, 3) for _ in range(1)), *_rest())
    W = spherical_weight(state)
    state = state._replace(Q=W.T @ W, w_bar=W.sum(0))
    H = _normal(4, 3, seed=2)
    logits = H @ W.T
    index = torch.tensor([[8, 0], [1, 1], [2, 8], [3, 4]])
    selected, sums, squares = spherical_forward(state, H, index)
    _close(selected, logits.gather(1, index))
    _close(sums, logits.sum(1))
    _close(squares, logits.square().sum(1))
    _close(spherical_forward(state, H, index[:, 0]).selected, logits[torch.arange(4), index[:, 0]])


def _rest() -> tuple[torch.Tensor, ...]:
    return _normal(3, seed=3), _normal(3, 3), _normal(3)


def test_update_equals_a_dense_step_of_any_gradients() -> None:
    """More examples than features; the gradients need not come from a loss."""
    W = _normal(7, 3)
    state = spherical_state(W)
    H, index = _normal(10, 3, seed=1), torch.randint(7, (10, 3), generator=torch.Generator().manual_seed(0))
    gA, gs, gq = _normal(10, 3, seed=2), _normal(10, seed=3), 0.1 * _normal(10, seed=4)
    logits = H @ W.T
    grad_logits = 2 * gq.unsqueeze(1) * logits + gs.unsqueeze(1)
    grad_logits = grad_logits.scatter_add(1, index, gA)
    grad_H, new = spherical_update(state, H, index, gA, gs, gq, 0.05)
    expected = W - 0.05 * grad_logits.T @ H
    _close(grad_H, grad_logits @ W)
    _close(spherical_backward(state, H, index, gA, gs, gq), grad_logits @ W)
    _close(spherical_grad_norm(state, H, index, gA, gs, gq), (grad_logits.T @ H).norm())
    nothing = (0 * gA, 0 * gs, 0 * gq)
    assert spherical_grad_norm(state, H, index, *nothing) == 0
    _close(spherical_weight(new), expected)
    _close(new.Q, expected.T @ expected)
    _close(new.w_bar, expected.sum(0))


def _by_example_products(
    state: SphericalState,
    H: torch.Tensor,
    index: torch.Tensor,
    gA: torch.Tensor,
    gs: torch.Tensor,
    gq: torch.Tensor,
    lr: float,
) -> SphericalState:
    """The step as the paper writes it: with the m x m matrix of products of the logits' gradients, and Woodbury."""
    V, U, U_inv_t, omega, Q, w_bar = state
    classes = V.shape[0]
    Y = torch.zeros(len(H), classes, dtype=H.dtype).scatter_add_(1, index, gA)
    B = 2 * gq.unsqueeze(1) * H
    Z = Y @ spherical_weight(state) + torch.outer(gs, w_bar)
    half = (
        B @ Q @ B.T / 2
        + Y @ Y.T / 2
        + classes / 2 * torch.outer(gs, gs)
        + torch.outer(gs, Y.sum(1))
        + B @ Z.T
    )
    grad_H = B @ Q + Z
    new_U = U - lr * (H @ U.T).T @ B
    identity = torch.eye(len(H), dtype=H.dtype)
    new_U_inv_t = U_inv_t + lr * (U_inv_t @ B.T) @ torch.linalg.solve(identity - lr * H @ B.T, H)
    cross = grad_H.T @ H
    return SphericalState(
        V - lr * Y.T @ (H @ new_U_inv_t.T),
        new_U,
        new_U_inv_t,
        omega - lr * H.T @ (2 * gq * (H @ omega) + gs),
        Q - lr * (cross + cross.T) + lr**2 * H.T @ (half + half.T) @ H,
        w_bar - lr * H.T @ (2 * gq * (H @ w_bar) + Y.sum(1) + classes * gs),
    )


@pytest.mark.parametrize("examples", [1, 4, 5, 6, 40])
def test_update_equals_the_form_with_products_of_examples(examples: int) -> None:
    """Fewer examples than features, as many, and more."""
    features, classes = 5, 9
    U = torch.eye(features, dtype=torch.float64) + 0.2 * _normal(features, features, seed=1)
    V, omega = _normal(classes, features), _normal(features, seed=2)
    W = V @ U + omega
    state = SphericalState(V, U, torch.linalg.inv(U).T, omega, W.T @ W, W.sum(0))
    H = _normal(examples, features, seed=3)
    index = torch.randint(classes, (examples, 3), generator=torch.Generator().manual_seed(0))
    gA, gs, gq = _normal(examples, 3, seed=4), _normal(examples, seed=5), 0.1 * _normal(examples, seed=6)
    _, new = spherical_update(state, H, index, gA, gs, gq, 0.03)
    for have, want in zip(new, _by_example_products(state, H, index, gA, gs, gq, 0.03), strict=True):
        _close(have, want)


@pytest.mark.parametrize("kind", ["z", "mse"])
def test_small_matrices_in_float64_keep_float32_rows_nearer_to_exact_sgd(kind: Any) -> None:
    classes, features, examples, lr = 200, 16, 16, {"z": 2.0, "mse": 0.003}[kind]
    W = _normal(classes, features, dtype=torch.float32)
    mixed = spherical_state(W)
    assert mixed.V.dtype == torch.float32
    assert {entry.dtype for entry in mixed[1:]} == {torch.float64}
    single = SphericalState(*(entry.to(torch.float32, copy=True) for entry in mixed))
    exact = spherical_state(W.double())
    for step in range(400):
        H = _normal(examples, features, seed=step, dtype=torch.float32)
        index = torch.randint(40, (examples,), generator=torch.Generator().manual_seed(step))
        mixed, single = (
            spherical_step(state, H, index, lr, kind=kind, inplace=True).state for state in (mixed, single)
        )
        exact = spherical_step(exact, H.double(), index, lr, kind=kind).state
        if step % 50 == 49:
            mixed, single, exact = (spherical_stabilize(state) for state in (mixed, single, exact))
    assert single.Q.dtype == torch.float32
    want = spherical_weight(exact)

    def error(state: SphericalState) -> torch.Tensor:
        return (state.V.double() @ state.U.double() + state.omega.double() - want).norm() / want.norm()

    assert error(mixed) < 1e-6
    assert 2 * error(mixed) < error(single)


def test_inplace_writes_the_rows_of_the_targets_only() -> None:
    W, H, index = _normal(12, 4), _normal(3, 4, seed=1), torch.tensor([2, 7, 2])
    pure, shared = spherical_state(W), spherical_state(W)
    expected = spherical_step(pure, H, index, 0.2).state
    result = spherical_step(shared, H, index, 0.2, inplace=True).state
    assert result.V is shared.V
    torch.testing.assert_close(pure.V, W, rtol=0, atol=0)
    for have, want in zip(result, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)
    touched = (result.V != W).any(1)
    assert touched.nonzero().flatten().tolist() == [2, 7]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("values", [[5.0, 1.0, 1.2, 0.9], [0.01, 40.0, 3.0, 0.9]])
def test_stabilize_keeps_the_weights_and_mends_the_condition(inplace: bool, values: list[float]) -> None:
    left, right = (torch.linalg.qr(_normal(4, 4, seed=seed))[0] for seed in (1, 2))
    U = left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T
    state = SphericalState(
        _normal(9, 4), U, torch.linalg.inv(U).T, _normal(4, seed=5), _normal(4, 4), _normal(4)
    )
    W = spherical_weight(state)
    state = state._replace(Q=W.T @ W, w_bar=W.sum(0))
    mended = spherical_stabilize(state, inplace=inplace)
    assert (mended.V is state.V) is inplace
    singular = torch.linalg.svdvals(mended.U)
    assert singular.min() >= 0.5
    assert singular.max() <= 2
    _close(spherical_weight(mended), W)
    _close(mended.U @ mended.U_inv_t.T, torch.eye(4, dtype=torch.float64))
    _close(mended.Q, W.T @ W)
    _close(mended.w_bar, W.sum(0))


def test_stabilize_refactors_when_a_third_is_outside() -> None:
    state = spherical_state(_normal(9, 4))
    state = state._replace(U=3 * state.U, U_inv_t=state.U_inv_t / 3, omega=_normal(4))
    mended = spherical_stabilize(state)
    _close(mended.U, torch.eye(4, dtype=torch.float64))
    _close(mended.omega, torch.zeros(4, dtype=torch.float64))
    _close(mended.V, spherical_weight(state))


def test_equal_logits_have_finite_gradients() -> None:
    """All rows of W equal: no standard deviation."""
    H = _normal(3, 4, dtype=torch.float32)
    state = spherical_state(torch.ones(6, 4))
    loss, grad_H, new = spherical_step(state, H, torch.tensor([0, 1, 2]), 0.1)
    assert loss.isfinite()
    assert grad_H.isfinite().all()
    assert all(entry.isfinite().all() for entry in new)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, ``known`` storages aside."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.numel = known, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_cost_does_not_depend_on_the_number_of_classes() -> None:
    costs = []
    for classes in (100, 100_000):
        state = spherical_state(_normal(classes, 4, dtype=torch.float32))
        H, index = _normal(3, 4, seed=1, dtype=torch.float32), torch.tensor([5, 6, 5])
        with (
            FlopCounterMode(display=False) as flops,
            _Largest({state.V.untyped_storage().data_ptr()}) as largest,
        ):
            spherical_step(state, H, index, 0.1, inplace=True)
        costs.append((flops.get_total_flops(), largest.numel))
    assert costs[0] == costs[1]
    assert costs[0][0] > 0


def test_memory_is_linear_in_the_batch() -> None:
    state = spherical_state(_normal(50, 4))
    sizes = []
    for examples in (500, 1000):
        H, one = _normal(examples, 4), torch.ones(examples, dtype=torch.float64)
        index = torch.randint(50, (examples, 2), generator=torch.Generator().manual_seed(0))
        with _Largest(set()) as largest:
            spherical_update(state, H, index, torch.stack([one, one], 1), one, 1e-4 * one, 1e-3)
        sizes.append(largest.numel)
    assert sizes[1] == 2 * sizes[0]


def test_weights_of_targets() -> None:
    A, s, q = _normal(4, 3), _normal(4), 20 + _normal(4)
    weight = _normal(4, 3, seed=1)
    each = torch.stack([spherical_statistics_loss(A[:, k], s, q, 9, reduction="none") for k in range(3)], 1)
    total = spherical_statistics_loss(A, s, q, 9, target_weight=weight, reduction="none")
    _close(total, (weight * each).sum(1))
    single = spherical_statistics_loss(A[:, 0], s, q, 9, target_weight=weight[:, 0], reduction="none")
    _close(single, weight[:, 0] * each[:, 0])


def test_stabilize_of_float32_rows() -> None:
    U = torch.diag(torch.tensor([4.0, 1.0, 1.0, 0.9], dtype=torch.float64))
    V = _normal(1000, 4, dtype=torch.float32)
    state = SphericalState(V.clone(), U, torch.linalg.inv(U).T, _normal(4), _normal(4, 4), _normal(4))
    W = spherical_weight(state)
    for inplace in (False, True):
        mended = spherical_stabilize(state, inplace=inplace)
        assert mended.V.dtype == torch.float32
        assert (mended.V is state.V) is inplace
        torch.testing.assert_close(spherical_weight(mended), W, rtol=1e-6, atol=1e-6)
        assert mended.U.dtype == torch.float64


def test_stabilize_leaves_what_has_diverged() -> None:
    state = spherical_state(_normal(9, 4))
    state.U[0, 0] = math.nan
    assert spherical_stabilize(state) is state


def test_a_rate_that_makes_the_layer_singular_is_refused() -> None:
    state, one = spherical_state(_normal(3, 2)), torch.ones(1, dtype=torch.float64)
    before = state.V.clone()
    for examples in (1, 2):  # fewer examples than features, and as many
        H = torch.eye(2, dtype=torch.float64)[:examples]
        ones = one.expand(examples)
        with pytest.raises(RuntimeError, match="singular"):
            spherical_update(state, H, ones.long(), ones, ones, ones, 0.5, inplace=True)
    torch.testing.assert_close(state.V, before, rtol=0, atol=0)


def test_head_is_differentiable() -> None:
    A, s, q = _normal(4, 2).requires_grad_(), _normal(4).requires_grad_(), (20 + _normal(4)).requires_grad_()
    for kind in LOSSES:
        assert torch.autograd.gradcheck(
            lambda A, s, q, kind=kind: spherical_statistics_loss(A, s, q, 9, kind=kind), (A, s, q)
        )


def test_empty_batch() -> None:
    state = spherical_state(_normal(5, 3))
    empty = torch.empty(0, 3, dtype=torch.float64)
    loss, grad_H, new = spherical_step(state, empty, torch.empty(0, dtype=torch.long), 0.1)
    assert loss == 0
    assert grad_H.shape == (0, 3)
    for have, want in zip(new, state, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)


@pytest.mark.bare
def test_doors() -> None:
    state, H = spherical_state(_normal(5, 3)), _normal(2, 3)
    index = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"weight must have shape \(D, d\), got \(5,\)"):
        spherical_state(_normal(5))
    for dtype in (torch.long, torch.bfloat16):
        with pytest.raises(TypeError, match="weight must be float32 or float64"):
            spherical_state(torch.ones(3, 2, dtype=dtype))
    with pytest.raises(ValueError, match=r"H must have shape \(m, 3\), got \(2, 4\)"):
        spherical_forward(state, _normal(2, 4), index)
    with pytest.raises(ValueError, match=r"index must have shape \(2,\) or \(2, K\), got \(3,\)"):
        spherical_forward(state, H, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"grad_sums must have shape \(2,\), got \(3,\)"):
        spherical_update(state, H, index, H[:, 0], _normal(3), H[:, 0], 0.1)
    with pytest.raises(ValueError, match=r"target_weight must have shape \(2,\), got \(2, 1\)"):
        spherical_statistics_loss(H[:, 0], H[:, 0], H[:, 0], 5, target_weight=H[:, :1])
    with pytest.raises(ValueError, match="weight_decay must lie below 1 / lr"):
        spherical_step(state, H, index, 0.5, weight_decay=2.0)
    with pytest.raises(ValueError, match="kind must be"):
        spherical_step(state, H, index, 0.5, kind="softmax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a must be above 0"):
        spherical_step(state, H, index, 0.5, a=0.0)
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        spherical_statistics_loss(H[:, 0], H[:, 0], H[:, 0], 1)
    with pytest.raises(ValueError, match="0 < low <= 1 <= high"):
        spherical_stabilize(state, low=2.0)
