"""The output layer of the spherical family: equal to a dense layer, its loss and SGD, in every way it is used."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from telos.losses.classification.z_loss import (
    spherical_mse_loss,
    spherical_softmax_loss,
    taylor_softmax_loss,
    z_loss,
)
from telos.nn.spherical import SphericalLinear
from tests.conformance.ranks import on_ranks
from tests.golden.adapters import read_cases

LOSSES: dict[str, Callable[..., Tensor]] = {
    "z": z_loss,
    "mse": spherical_mse_loss,
    "taylor": taylor_softmax_loss,
    "spherical": spherical_softmax_loss,
}
RATES = {"z": 5.0, "mse": 0.02, "taylor": 0.5, "spherical": 0.1}
CLASSES, DIM = 12, 4


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(*shape: int, classes: int = CLASSES, seed: int = 0) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def pair(kind: Any = "z", bias: bool = True, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A layer and the dense one that it must follow."""
    torch.manual_seed(0)
    dense = nn.Linear(DIM, CLASSES, bias=bias, dtype=dtype)
    return SphericalLinear.from_linear(dense, kind, **options), dense


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same_weights(head: SphericalLinear, dense: nn.Linear, tolerance: float = 1e-11) -> None:
    close(head.weight, dense.weight.detach(), tolerance)
    W = dense.weight.detach().double()
    if dense.bias is not None:
        close(head.bias, dense.bias.detach(), tolerance)
        W = torch.cat([W, dense.bias.detach().double().unsqueeze(1)], 1)
    close(head.Q, W.T @ W, 10 * tolerance)
    close(head.w_bar, W.sum(0), 10 * tolerance)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("z", 1000), ("mse", 300), ("taylor", 300), ("spherical", 300)])
def test_equals_dense_sgd_over_1000_steps(kind: Any, steps: int) -> None:
    """What the class says: 1e-12 in float64; in float32 2e-6, and nearer than dense SGD in float32."""
    classes, dim, rate, decay = 300, 12, RATES[kind], 1e-3
    torch.manual_seed(0)
    rounded = nn.Linear(dim, classes)
    dense = copy.deepcopy(rounded).double()
    start = dense.weight.detach().clone()
    heads = [SphericalLinear.from_linear(layer, kind) for layer in (rounded, dense)]
    optimizers = [
        torch.optim.SGD(layer.parameters(), lr=rate, weight_decay=decay) for layer in (rounded, dense)
    ]
    for step in range(steps):
        hidden = normal(8, dim, seed=step, dtype=torch.float32)
        target = labels(8, classes=50, seed=step)  # repeated within and between batches
        found = []
        for layer, optimizer in zip((rounded, dense), optimizers, strict=True):
            inputs = hidden.to(layer.weight.dtype, copy=True).requires_grad_()
            optimizer.zero_grad()
            loss = LOSSES[kind](layer(inputs), target)
            loss.backward()
            optimizer.step()
            found.append((loss.detach(), inputs.grad))
        for head in heads:
            inputs = hidden.to(head.V.dtype, copy=True).requires_grad_()
            loss = head(inputs, target)
            loss.backward()
            head.step(rate, weight_decay=decay)
            if step % 100 == 99:
                tolerance = 1e-10 if head.V.dtype == torch.float64 else 1e-4
                close(loss.detach().double(), found[1][0], tolerance)
                close(inputs.grad.double(), found[1][1], tolerance)
    weight, bias = dense.weight.detach(), dense.bias.detach()
    assert relative(start, weight) > 0.3
    single, double = heads
    assert relative(double.weight, weight) < 1e-12
    assert relative(double.bias, bias) < 1e-12
    assert double.consistency_error() < 1e-12
    assert relative(single.weight, weight) < 2e-6
    assert relative(single.bias, bias) < 2e-6
    assert relative(single.weight, weight) < relative(rounded.weight.detach(), weight)
    assert single.consistency_error() < 1e-6


def test_golden_layer() -> None:
    """The recorded steps of the authors' layer, as far as they come with a loss."""
    path = Path(__file__).parents[1] / "golden" / "z_loss.json"
    cases = [case for case in read_cases(path) if "steps" in case.inputs]
    assert cases
    for case in cases:
        V, U, omega = (case.inputs[name] for name in ("V", "U", "omega"))
        W = V @ U + omega
        head = SphericalLinear(V.shape[1], V.shape[0], bias=False, dtype=torch.float64)
        state = {"V": V, "U": U, "U_inv_t": torch.linalg.inv(U).T, "omega": omega}
        state |= {"Q": W.T @ W, "w_bar": W.sum(0)}
        never = torch.tensor([0.0, 0.0, math.inf])  # U is not looked at, so that U and V can be compared
        head.load_state_dict({**state, "_extra_state": never})
        for step, expected in zip(case.inputs["steps"], case.expected["steps"], strict=True):
            H = step["H"].clone().requires_grad_()
            statistics = head._statistics(H, step["indices"].reshape(len(H), -1))
            gradients = [step[name] for name in ("grad_A", "grad_s", "grad_q")]
            torch.autograd.backward(
                statistics, [g.reshape(s.shape) for g, s in zip(gradients, statistics, strict=True)]
            )
            head.step(case.params["eta"])
            found = {"grad_H": H.grad, "new_W": head.weight, "new_Q": head.Q, "new_w_bar": head.w_bar}
            found |= {"new_U": head.U, "new_omega": head.omega, "new_V": head.V}
            for name, value in found.items():
                torch.testing.assert_close(
                    value, torch.tensor(expected[name], dtype=torch.float64), rtol=1e-8, atol=1e-10
                )


@pytest.mark.parametrize("kind", list(LOSSES))
@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_of_target(kind: Any, bias: bool) -> None:
    """Three targets for each example, repeated and padded, with weights of targets and examples."""
    head, dense = pair(kind, bias)
    hidden, target = normal(6, DIM).requires_grad_(), labels(6, 3)
    target[0] = 5  # three times the same
    target[1, 1:] = -100
    target[2] = -100
    target_weight, sample_weight = normal(6, 3, seed=1), normal(6, seed=2).abs()
    sample_weight[4] = 0
    loss = head(hidden, target, target_weight=target_weight, sample_weight=sample_weight)
    loss.backward()
    reference = hidden.detach().clone().requires_grad_()
    logits = dense(reference)
    total = torch.zeros((), dtype=torch.float64)
    for i in (0, 1, 3, 5):
        for k in range(3):
            if target[i, k] != -100:
                own = LOSSES[kind](logits[i : i + 1], target[i, k : k + 1])
                total = total + sample_weight[i] * target_weight[i, k] * own
    expected = total / sample_weight[[0, 1, 3, 5]].sum()
    expected.backward()
    close(loss, expected)
    close(hidden.grad, reference.grad)
    assert (hidden.grad[[2, 4]] == 0).all()
    gradient = torch.cat([parameter.grad.reshape(CLASSES, -1) for parameter in dense.parameters()], 1)
    close(head.grad_norm(), gradient.norm())
    head.step(0.05)
    torch.optim.SGD(dense.parameters(), lr=0.05).step()
    same_weights(head, dense)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sequences_and_reductions(reduction: Any) -> None:
    head, dense = pair(reduction=reduction)
    hidden, target = normal(2, 5, DIM), labels(2, 5)
    target[1, 3:] = -100
    loss, expected = head(hidden, target), z_loss(dense(hidden), target, reduction=reduction)
    assert loss.shape == expected.shape
    close(loss, expected)
    # one target for each token, in a dimension of its own
    close(head(hidden, target.unsqueeze(-1)), expected)
    cotangent = normal(*loss.shape, seed=3)
    loss.backward(cotangent)
    expected.backward(cotangent)
    head.step(0.3)
    torch.optim.SGD(dense.parameters(), lr=0.3).step()
    same_weights(head, dense)


def test_rows_that_do_not_count_may_hold_anything() -> None:
    head, _ = pair()
    clean, _ = pair()
    hidden, target = normal(5, DIM), labels(5, 2)
    target[1] = -100
    sample_weight = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    target_weight = torch.ones(5, 2, dtype=torch.float64)
    target_weight[4] = 0
    spoilt, weights = hidden.clone(), sample_weight.clone()
    spoilt[[1, 2, 4]] = math.nan
    weights[1] = math.nan
    target_weight[1] = math.nan
    results = []
    for layer, inputs, own in ((head, spoilt, weights), (clean, hidden, sample_weight)):
        inputs.requires_grad_()
        loss = layer(inputs, target, target_weight=target_weight, sample_weight=own)
        loss.backward()
        layer.step(0.3)
        results.append((loss.detach(), inputs.grad, layer.weight))
    for have, want in zip(*results, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)
    assert (spoilt.grad[[1, 2, 4]] == 0).all()
    inputs = hidden.detach().clone()
    inputs[0] = math.nan  # this one counts
    assert head(inputs, target).isnan()


def test_nothing_counts() -> None:
    head, _ = pair()
    before = head.weight
    for hidden, target in (
        (normal(0, DIM), labels(0)),
        (normal(3, DIM), torch.full((3,), -100)),
        (normal(3, DIM), labels(3, 0)),
    ):
        hidden.requires_grad_()
        loss = head(hidden, target)
        assert loss == 0
        loss.backward()
        assert (hidden.grad == 0).all()
        assert head.grad_norm() == 0
        head.step(0.1)
    close(head.weight, before, 0)


def test_accumulation_equals_one_batch() -> None:
    """Micro-batches with different numbers of targets, each over the count of all."""
    head, dense = pair()
    hidden, target = normal(7, DIM), labels(7, 2)
    target[:4, 1] = -100
    for rows, wide in ((slice(0, 4), 1), (slice(4, 7), 2)):
        head(hidden[rows], target[rows, :wide], denominator=7).backward()
    logits = dense(hidden)
    total = z_loss(logits, target[:, 0], reduction="sum") + z_loss(logits, target[:, 1], reduction="sum")
    (total / 7).backward()
    gradient = torch.cat([dense.weight.grad, dense.bias.grad.unsqueeze(1)], 1)
    close(head.grad_norm(), gradient.norm())
    head.step(0.4)
    torch.optim.SGD(dense.parameters(), lr=0.4).step()
    same_weights(head, dense)


def test_the_step_follows_the_gradient_that_flowed() -> None:
    """A scaled loss in a mixture, two losses from one layer, a backward repeated: as with a parameter."""
    head, dense = pair()
    hidden, target = normal(5, DIM), labels(5)
    for layer, loss_of in ((head, head), (dense, lambda h, t: z_loss(dense(h), t))):
        inputs = hidden.clone().requires_grad_()
        loss = 0.3 * loss_of(inputs, target) + inputs.square().sum() - 2 * loss_of(2 * inputs, target) ** 2
        loss.backward(retain_graph=True)
        loss.backward()
        close(inputs.grad, inputs.grad)
        if layer is dense:
            torch.optim.SGD(dense.parameters(), lr=0.2).step()
        else:
            head.step(0.2)
    same_weights(head, dense)


def test_clipping_with_the_rest_of_the_network() -> None:
    head, dense = pair()
    trunks = [nn.Linear(3, DIM, dtype=torch.float64) for _ in range(2)]
    trunks[1].load_state_dict(trunks[0].state_dict())
    inputs, target, most = 5 * normal(6, 3), labels(6), 0.01
    head(trunks[0](inputs), target).backward()
    parameters = list(trunks[0].parameters())
    norm = torch.nn.utils.get_total_norm([*(p.grad for p in parameters), head.grad_norm()])
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    head.scale_grad((most / (norm + 1e-6)).clamp(max=1.0))
    torch.optim.SGD(parameters, lr=0.5).step()
    z_loss(dense(trunks[1](inputs)), target).backward()
    everything = [*trunks[1].parameters(), *dense.parameters()]
    expected = torch.nn.utils.clip_grad_norm_(everything, most)
    torch.optim.SGD(everything, lr=0.5).step()
    close(norm, expected)
    assert norm > 10 * most
    close(head.grad_norm(), torch.cat([p.grad.flatten() for p in dense.parameters()]).norm())
    head.step(0.5)
    same_weights(head, dense)
    close(trunks[0].weight, trunks[1].weight)


def test_scaled_loss_as_a_loss_scaler_does_it() -> None:
    head, dense = pair()
    hidden, target = normal(5, DIM), labels(5)
    (1024.0 * head(hidden, target)).backward()
    assert head.grad_norm().isfinite()
    head.scale_grad(1 / 1024.0)
    z_loss(dense(hidden), target).backward()
    head.step(0.3)
    torch.optim.SGD(dense.parameters(), lr=0.3).step()
    same_weights(head, dense)
    (math.inf * head(hidden, target)).backward()
    assert not head.grad_norm().isfinite()
    head.zero_grad()
    assert head.grad_norm() == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    results = []
    for kept in (True, False):
        head, _ = pair()
        torch.manual_seed(1)
        trunk = nn.Sequential(nn.Linear(3, DIM), nn.Tanh()).double()
        inputs, target = normal(6, 3).requires_grad_(), labels(6)

        def run(rows: Tensor, head: Any = head, trunk: Any = trunk, target: Tensor = target) -> Tensor:
            return head(trunk(rows), target)

        loss = run(inputs) if kept else checkpoint(run, inputs, use_reentrant=reentrant)
        loss.backward()
        head.step(0.4)
        results.append((loss.detach(), trunk[0].weight.grad, inputs.grad, head.weight, head.Q))
    for have, want in zip(*results, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)


def test_what_leaves_a_gradient_and_what_does_not() -> None:
    head, _ = pair()
    before = head.weight
    hidden, target = normal(5, DIM).requires_grad_(), labels(5)
    loss = head(hidden, target)
    assert head.grad_norm() == 0  # forward alone
    torch.autograd.grad(loss, hidden, retain_graph=True)
    assert head.grad_norm() == 0  # asked for the inputs' gradient only
    loss.backward(inputs=[hidden], retain_graph=True)
    assert head.grad_norm() == 0
    loss.backward()
    once = head.grad_norm()
    assert once > 0
    head.zero_grad()
    assert head.grad_norm() == 0
    with torch.no_grad():
        assert not head(hidden, target).requires_grad
    head.step(1.0)
    close(head.weight, before, 0)
    head.eval()
    head(hidden.detach(), target).backward()  # as nn.Linear: in eval mode, and from inputs without gradient
    close(head.grad_norm(), once)
    head.step(1.0)
    assert head.grad_norm() == 0  # used up
    head.requires_grad_(False)
    assert not head(hidden.detach(), target).requires_grad
    head(hidden, target).backward()
    assert head.grad_norm() == 0
    head.requires_grad_()
    head(hidden, target).backward()
    assert head.grad_norm() > 0


def test_a_parameter_is_never_touched_by_an_optimizer() -> None:
    head, _ = pair()
    assert not list(head.parameters())
    assert {name for name, _ in head.named_buffers()} == {"V", "U", "U_inv_t", "omega", "Q", "w_bar"}


def test_linear_round_trip() -> None:
    for dtype in (torch.float32, torch.float64):
        for bias in (True, False):
            _, dense = pair(bias=bias, dtype=dtype)
            back = SphericalLinear.from_linear(dense, bias_scale=0.5).to_linear()
            for name, value in dense.state_dict().items():
                torch.testing.assert_close(back.state_dict()[name], value, rtol=0, atol=0)
    _, dense = pair(dtype=torch.float32)
    half = dense.bfloat16()
    head = SphericalLinear.from_linear(half)
    assert head.V.dtype == torch.float32
    assert (head.weight == half.weight.float()).all()
    dense.weight.data.zero_()
    assert (head.weight != 0).any()  # a copy


def test_bias_scale_slows_the_bias() -> None:
    """The bias is the weight of a constant input: its own gradient and its effect carry the constant once each."""
    head, dense = pair(bias_scale=0.1)
    hidden, target = normal(5, DIM), labels(5)
    loss, expected = head(hidden, target), z_loss(dense(hidden), target)
    close(loss, expected)
    loss.backward()
    expected.backward()
    head.step(0.5)
    close(head.weight, (dense.weight - 0.5 * dense.weight.grad).detach())
    close(head.bias, (dense.bias - 0.5 * 0.1**2 * dense.bias.grad).detach())


def test_starts_as_a_linear_layer_does() -> None:
    generator = torch.Generator().manual_seed(3)
    head = SphericalLinear(16, 5000, generator=generator)
    for values, bound in ((head.weight, 0.25), (head.bias, 0.25)):
        assert values.abs().max() <= bound
        assert abs(values.mean()) < 0.01
        assert abs(values.std() - bound / 3**0.5) < 0.01
    again = SphericalLinear(16, 5000, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(head.V, again.V, rtol=0, atol=0)
    again.reset_parameters(generator)
    assert (head.V != again.V).any()
    assert again.consistency_error() < 1e-12


def test_resumes_bit_for_bit() -> None:
    """Also the schedule by which U is looked at."""

    def fresh() -> SphericalLinear:
        torch.manual_seed(0)
        return SphericalLinear(DIM, CLASSES, stabilize_every=4)

    def train(head: SphericalLinear, steps: range) -> SphericalLinear:
        for step in steps:
            head(normal(6, DIM, seed=step, dtype=torch.float32), labels(6, classes=5, seed=step)).backward()
            head.step(1 + 0.1 * step)
        return head

    whole = train(fresh(), range(30))
    first = train(fresh(), range(13))
    assert first.get_extra_state().any()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = SphericalLinear(DIM, CLASSES, stabilize_every=4)
    second(normal(6, DIM, dtype=torch.float32), labels(6)).backward()
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.grad_norm() == 0  # it belonged to other weights
    train(second, range(13, 30))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=0)
    assert (whole.U != fresh().U).any()


def test_copies_and_pickles() -> None:
    head, dense = pair()
    hidden, target = normal(5, DIM).requires_grad_(), labels(5)
    head(hidden, target).backward()  # pending
    z_loss(dense(hidden), target).backward()
    torch.optim.SGD(dense.parameters(), lr=0.3).step()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        other.step(0.3)
        same_weights(other, dense)
    head.step(0.3)
    same_weights(head, dense)


@pytest.mark.parametrize("kind", list(LOSSES))
def test_stays_exact_where_u_collapses(kind: Any) -> None:
    """Rates at which a single step shrinks directions of W threefold and more; U is looked at in time."""
    head, dense = pair(kind)
    rate = {"z": 20.0, "mse": 0.12, "taylor": 5.0, "spherical": 2.0}[kind]
    for step in range(120):
        hidden, target = normal(8, DIM, seed=step), labels(8, seed=step)
        head(hidden, target).backward()
        dense.zero_grad()
        LOSSES[kind](dense(hidden), target).backward()
        head.step(rate if step != 60 else 3 * rate)
        torch.optim.SGD(dense.parameters(), lr=rate if step != 60 else 3 * rate).step()
    assert relative(head.weight, dense.weight.detach()) < 1e-8


def test_looks_at_u_as_often_as_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    true = torch.linalg.svdvals
    head = SphericalLinear(DIM, 1000, stabilize_every=10)
    step = 0

    def seen(U: Tensor) -> Tensor:
        looks.append(step)
        return true(U)

    monkeypatch.setattr(torch.linalg, "svdvals", seen)

    def take(steps: range, rate: float) -> None:
        nonlocal step
        for step in steps:
            head(normal(2, DIM, seed=step), labels(2, seed=step)).backward()
            head.step(rate)

    take(range(1, 42), 2**-7)
    assert looks == [1, 4, 11, 21, 31, 41]  # after more than twice the distance, then every ten
    looks.clear()
    take(range(42, 43), 10.0)  # a rate a thousand times as large is looked at once it is taken
    assert looks == [42]


def test_diverging_is_no_crash() -> None:
    head = SphericalLinear(DIM, CLASSES, stabilize_every=1)
    head(torch.full((3, DIM), math.nan), labels(3)).backward()
    head.step(0.1)
    head(torch.zeros(3, DIM), labels(3)).backward()
    head.step(0.1)
    assert head.weight.isnan().any()


def test_upkeep_leaves_the_weights() -> None:
    head, _ = pair(stabilize_every=1000)
    head.set_extra_state(torch.tensor([0.0, 0.0, math.inf]))  # no upkeep of its own
    for step in range(60):
        head(normal(8, DIM, seed=step), labels(8, seed=step)).backward()
        head.step(3.0)
    W, b = head.weight, head.bias
    assert torch.linalg.svdvals(head.U).max() > 2.5
    head.stabilize()
    close(head.weight, W)
    assert torch.linalg.svdvals(head.U).max() <= 2
    head.refactor()
    close(head.weight, W)
    close(head.bias, b)
    close(head.U, torch.eye(DIM + 1, dtype=torch.float64), 0)
    assert head.consistency_error() < 1e-14
    for name in ("Q", "w_bar", "U_inv_t"):
        spoilt = copy.deepcopy(head)
        getattr(spoilt, name).add_(0.01)
        assert spoilt.consistency_error() > 1e-4


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision(half: torch.dtype) -> None:
    head, _ = pair(dtype=torch.float32)
    exact, _ = pair(dtype=torch.float32)
    hidden, target = normal(5, DIM).to(half), labels(5)
    own, raised = hidden.clone().requires_grad_(), hidden.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # changes nothing
        loss = head(own, target)
        logits = head.logits(hidden)
    expected = exact(raised, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(logits, exact.logits(hidden), rtol=0, atol=0)
    loss.backward()
    expected.backward()
    assert own.grad.dtype == half
    torch.testing.assert_close(own.grad, raised.grad.to(half), rtol=0, atol=0)
    head.step(0.3)
    exact.step(0.3)
    torch.testing.assert_close(head.V, exact.V, rtol=0, atol=0)


def test_dtypes_of_the_module() -> None:
    head, _ = pair(dtype=torch.float32)
    before = {name: value.clone() for name, value in head.named_buffers()}
    for convert in (
        SphericalLinear.half,
        SphericalLinear.bfloat16,
        SphericalLinear.float,
        lambda layer: layer.to(torch.bfloat16),
    ):
        convert(head)
        for name, value in head.named_buffers():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    hidden, target = normal(5, DIM), labels(5)
    head(hidden, target).backward()  # what is pending stays pending
    norm = head.grad_norm()
    head.double()
    torch.testing.assert_close(head.grad_norm().float(), norm)
    head.zero_grad()
    assert head.V.dtype == torch.float64
    assert head(normal(2, DIM), labels(2)).dtype == torch.float64
    head.float()
    assert head.V.dtype == torch.float32
    assert head.Q.dtype == torch.float64
    torch.testing.assert_close(head.V, before["V"], rtol=0, atol=0)


def test_meta() -> None:
    head = SphericalLinear(DIM, 50_000, device="meta")
    assert head.V.is_meta
    hidden = torch.empty(3, DIM, device="meta", requires_grad=True)
    loss = head(hidden, torch.empty(3, dtype=torch.long, device="meta"))
    loss.backward()
    assert hidden.grad.is_meta
    assert head.logits(hidden).shape == (3, 50_000)
    # nor does an ordinary step read a number, for which a GPU would have to be waited
    head.set_extra_state(torch.tensor([0.0, 0.0, math.inf]))
    assert head.grad_norm().is_meta
    head.scale_grad(0.5)
    head.step(0.1, weight_decay=0.01)
    real = head.to_empty(device="cpu")
    real.reset_parameters()
    assert real.consistency_error() < 1e-12


def test_prediction() -> None:
    head, dense = pair(dtype=torch.float32)
    head.double()
    dense = dense.double()
    hidden = normal(2, 3, DIM).requires_grad_()
    logits = head.logits(hidden)
    close(logits, dense(hidden).detach())
    assert not logits.requires_grad
    for k in (1, 5, CLASSES):
        values, classes = head.topk(hidden, k)
        expected = logits.topk(k, -1)
        close(values, expected.values)
        assert (classes == expected.indices).all()
    wide = SphericalLinear(3, 70_000)
    rows = torch.randn(200, 3)
    values, classes = wide.topk(rows, 4)  # several chunks
    expected = wide.logits(rows).topk(4, -1)
    torch.testing.assert_close(values, expected.values)
    assert (wide.logits(rows).gather(1, classes) == values).all()


def test_a_step_does_not_see_the_number_of_classes() -> None:
    flops = []
    for classes in (100, 100_000):
        head = SphericalLinear(DIM, classes)
        hidden, target = torch.randn(5, DIM), labels(5)
        head(hidden, target).backward()
        head.step(0.1)  # the first looks at U
        V = head.V.clone()
        with FlopCounterMode(display=False) as counter:
            head(hidden, target).backward()
            head.step(0.1)
        flops.append(counter.get_total_flops())
        assert (head.V != V).any(1).nonzero().flatten().tolist() == sorted(set(target.tolist()))
    assert flops[0] == flops[1] > 0


def on_rank(kind: str) -> dict[str, Any]:
    """Steps beside DistributedDataParallel around a dense layer; unequal batches, accumulation, clipping."""
    rank, world = dist.get_rank(), dist.get_world_size()
    head, dense = pair(kind)
    wrapped = DistributedDataParallel(dense)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.2)
    norms = []
    for step in range(4):
        optimizer.zero_grad()
        rows = 2 + 3 * rank
        hidden, target = (
            normal(rows, DIM, seed=10 * step + rank),
            labels(rows, 1 + rank, seed=10 * step + rank),
        )
        for half in (slice(0, 1), slice(1, rows)):
            head(hidden[half], target[half], denominator="global").backward()
            logits = wrapped(hidden[half])
            total = sum(LOSSES[kind](logits, column, reduction="sum") for column in target[half].unbind(1))
            counted = torch.tensor(float(len(hidden[half])))
            dist.all_reduce(counted)
            (total / (counted / world)).backward()
        gradient = torch.cat([dense.weight.grad, dense.bias.grad.unsqueeze(1)], 1)
        if step % 2:
            norms.append((head.grad_norm().item(), gradient.norm().item()))
        if step == 3:
            head.scale_grad(0.5)
            for parameter in dense.parameters():
                parameter.grad *= 0.5
        head.step(0.2)
        optimizer.step()
    found = {"norms": norms, "weight": head.weight.tolist(), "dense": dense.weight.tolist()}
    # only one rank has anything
    if rank == 0:
        head(normal(3, DIM), labels(3)).backward()
    head.step(0.2)
    found["alone"] = head.weight.tolist()
    head.step(0.2)  # no rank has anything
    found["nobody"] = head.weight.tolist()
    single = SphericalLinear.from_linear(dense, kind, gather_distributed=False)  # type: ignore[arg-type]
    before = single.weight
    single(normal(3, DIM), labels(3)).backward()
    single.step(0.2)
    found["moved"] = (head.weight - before).norm().item()
    found["single"] = (single.weight - before).norm().item()
    torch.manual_seed(rank)
    own = SphericalLinear(DIM, CLASSES, gather_distributed=False)
    if rank == 0:  # the others do not come to meet it
        own(normal(3, DIM), labels(3)).backward()
        found["own"] = own.grad_norm().item()
        own.step(0.1)
    other = SphericalLinear(DIM, CLASSES)
    other(normal(3, DIM), labels(3)).backward()
    try:
        other.step(0.1)
        found["other"] = "allowed"
    except RuntimeError as error:
        found["other"] = str(error)
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_take_the_step_of_data_parallelism(world: int) -> None:
    answers = on_ranks(world, on_rank, "z")
    for answer in answers:
        close(torch.tensor(answer["weight"]), torch.tensor(answer["dense"]), 1e-6)
        for have, want in answer["norms"]:
            assert have == pytest.approx(want, rel=1e-10)
        for name in ("weight", "alone", "nobody"):
            assert answer[name] == answers[0][name]
        assert answer["nobody"] == answer["alone"] != answer["weight"]
        assert "the ranks hold different weights" in answer["other"]
    assert answers[0]["own"] > 0
    # where one rank alone has anything, its gradient is divided like the others'
    assert answers[0]["moved"] == pytest.approx(answers[0]["single"] / world, rel=1e-6)


@pytest.mark.bare
def test_compiled_caller() -> None:
    head, dense = pair(dtype=torch.float32)
    trunk = nn.Linear(3, DIM)

    def run(inputs: Tensor, target: Tensor) -> Tensor:
        return 2 * head(torch.tanh(trunk(inputs)), target)

    inputs, target = normal(5, 3, dtype=torch.float32), labels(5)
    compiled = torch.compile(run, backend="aot_eager")
    loss = compiled(inputs, target)
    loss.backward()
    expected = 2 * z_loss(dense(torch.tanh(trunk(inputs))), target)
    own = trunk.weight.grad.clone()
    trunk.zero_grad()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(own, trunk.weight.grad)
    head.step(0.3)
    torch.optim.SGD(dense.parameters(), lr=0.3).step()
    same_weights(head, dense, 1e-6)
    torch.compiler.reset()
    with pytest.raises(Exception, match="(?i)disable"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(inputs, target)


def test_refuses_what_would_be_wrong() -> None:
    head, _ = pair()
    hidden, target = normal(5, DIM).requires_grad_(), labels(5)
    first, second = head(hidden, target), head(hidden, target)
    first.backward()
    head.step(0.1)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        second.backward()
    assert head.grad_norm() == 0
    loss = head(hidden, target)
    head.load_state_dict(head.state_dict())
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()
    loss = head(hidden, target)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    # of three rows only the first moves V, and only by a step that leaves U regular
    plain = SphericalLinear(2, 3, "mse", bias=False, dtype=torch.float64)
    before = plain.weight
    plain(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0])).backward()
    with pytest.raises(RuntimeError, match="singular"):
        plain.step(0.5)
    close(plain.weight, before, 0)
    plain.step(0.25)
    assert plain.weight[0, 0] != before[0, 0]


@pytest.mark.bare
def test_doors() -> None:
    head, hidden = SphericalLinear(DIM, CLASSES), torch.randn(3, DIM)
    target = labels(3)
    for arguments, message in (
        ((0, 5), "in_features must be at least 1, got 0"),
        ((5, 1), "num_classes must be at least 2, got 1"),
        ((5, 5, "softmax"), "kind must be"),
    ):
        with pytest.raises(ValueError, match=message):
            SphericalLinear(*arguments)
    for options, message in (
        ({"a": 0.0}, "a must be above 0"),
        ({"bias_scale": 0.0}, "bias_scale must lie in"),
        ({"stabilize_every": 0}, "stabilize_every must be at least 1"),
        ({"reduction": "max"}, "reduction must be"),
    ):
        with pytest.raises(ValueError, match=message):
            SphericalLinear(5, 5, **options)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got torch.bfloat16"):
        SphericalLinear(5, 5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"hidden must have shape \(N, 4\) or \(N, T, 4\), got \(3, 5\)"):
        head(torch.randn(3, 5), target)
    with pytest.raises(TypeError, match="hidden must have a floating-point dtype"):
        head(torch.ones(3, DIM, dtype=torch.long), target)
    with pytest.raises(ValueError, match=r"target must have shape \(3,\) or \(3, 'K'\), got \(4,\)"):
        head(hidden, labels(4))
    with pytest.raises(TypeError, match="target must have an integer dtype"):
        head(hidden, torch.ones(3))
    with pytest.raises(ValueError, match=r"target must lie in \[0, 12\) or -100 \(ignored\), got 12"):
        head(hidden, torch.tensor([0, 12, 1]))
    with pytest.raises(ValueError, match=r"target_weight must have shape \(3,\), got \(3, 1\)"):
        head(hidden, target, target_weight=torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(3,\), got \(2,\)"):
        head(hidden, target, sample_weight=torch.ones(2))
    with pytest.raises(ValueError, match="denominator divides a mean"):
        SphericalLinear(DIM, CLASSES, reduction="sum")(hidden, target, denominator=2)
    for rate in (-0.1, math.nan):
        with pytest.raises(ValueError, match="lr must lie in"):
            head.step(rate)
    head(hidden, target).backward()
    with pytest.raises(ValueError, match="weight_decay must lie below 1 / lr"):
        head.step(0.5, weight_decay=2.0)
    for k in (0, CLASSES + 1):
        with pytest.raises(ValueError, match="k must lie in"):
            head.topk(hidden, k)
    with pytest.raises(ValueError, match="hidden must have shape"):
        head.logits(torch.randn(DIM))
