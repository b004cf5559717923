"""Attacks against hand-computed optima of linear models.

``AdversarialLoss`` takes a model where other losses take tensors, so that the generic conformance, which
draws tensors, leaves it out: its contracts are tested here.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from telos.losses import AdversarialLoss, CrossEntropyLoss, FocalLoss, Mixture, pgd_attack
from telos.losses.robust.attacks import evaluation_mode

WEIGHT = torch.tensor([1.0, -3.0, 2.0, 0.0], dtype=torch.float64)


def linear(inputs: Tensor) -> Tensor:
    return (inputs @ WEIGHT).sum()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------- optimum


@pytest.mark.parametrize("start", ["zero", "uniform", "gaussian"])
def test_linf_optimum_of_a_linear_objective(start: str) -> None:
    inputs = torch.randn(5, 4, dtype=torch.float64)
    moved = pgd_attack(linear, inputs, radius=0.3, start=start, generator=generator())
    shift = (moved - inputs)[:, :3]
    torch.testing.assert_close(shift, 0.3 * WEIGHT[:3].sign().expand(5, 3))
    if start == "zero":  # a pixel without slope stays where it is
        assert torch.equal(moved[:, 3], inputs[:, 3])


def test_l2_optimum_of_a_linear_objective() -> None:
    inputs = torch.randn(5, 4, dtype=torch.float64)
    best = 0.3 * WEIGHT / WEIGHT.norm()
    moved = pgd_attack(linear, inputs, radius=0.3, norm="l2", start="zero")
    torch.testing.assert_close(moved - inputs, best.expand(5, 4))
    # from a random start the part across the slope shrinks from step to step
    moved = pgd_attack(linear, inputs, radius=0.3, norm="l2", steps=200, step_size=0.3, generator=generator())
    torch.testing.assert_close(moved - inputs, best.expand(5, 4))


def test_one_step_from_the_centre_is_the_fast_gradient_sign_method() -> None:
    inputs = torch.rand(6, 4, dtype=torch.float64)

    def objective(points: Tensor) -> Tensor:
        return (points * WEIGHT).sin().sum()

    leaf = inputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(leaf), leaf)
    moved = pgd_attack(objective, inputs, radius=0.1, steps=1, start="zero")
    torch.testing.assert_close(moved, inputs + 0.1 * slope.sign())


def test_steps_add_up_until_the_ball_ends() -> None:
    inputs = torch.zeros(1, 4, dtype=torch.float64)
    for steps in (0, 1, 2, 5):
        moved = pgd_attack(linear, inputs, radius=0.3, steps=steps, step_size=0.1, start="zero")
        assert moved[0, 0].item() == pytest.approx(min(0.1 * steps, 0.3), abs=1e-15)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ball_and_bounds_are_respected(norm: str) -> None:
    inputs = torch.rand(50, 3, 2, dtype=torch.float64, generator=generator(1))
    for start in ("zero", "uniform", "gaussian"):
        moved = pgd_attack(
            lambda points: (points**2 - points.prod(-1, keepdim=True)).sum(),
            inputs,
            radius=0.4,
            step_size=0.5,
            norm=norm,
            bounds=(0.0, 1.0),
            start=start,
            generator=generator(),
        )
        shift = (moved - inputs).flatten(1)
        size = shift.abs().amax(1) if norm == "linf" else shift.norm(dim=1)
        assert (size <= 0.4 + 1e-12).all()
        assert ((moved >= 0) & (moved <= 1)).all()
        assert not torch.equal(moved, inputs)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_vanishing_gradient_still_moves_the_point(norm: str) -> None:
    # 1e-30 squared underflows in float32
    moved = pgd_attack(
        lambda points: 1e-30 * (points @ WEIGHT.float()).sum(),
        torch.zeros(2, 4),
        radius=0.3,
        norm=norm,
        start="zero",
    )
    size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    torch.testing.assert_close(size, torch.full((2,), 0.3))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_slope_no_move(norm: str) -> None:
    inputs = torch.rand(2, 4)
    moved = pgd_attack(lambda points: (0.0 * points).sum(), inputs, radius=0.3, norm=norm, start="zero")
    assert torch.equal(moved, inputs)


# --------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("shape", [(4000, 3), (4000, 2, 2)])
def test_uniform_start_fills_the_l2_ball_evenly(shape: tuple[int, ...]) -> None:
    zeros = torch.zeros(shape, dtype=torch.float64)
    start = pgd_attack(linear, zeros, radius=2.0, steps=0, norm="l2", generator=generator()).flatten(1)
    dimension = start.shape[1]
    # the fraction of the ball's volume within the radius of the point is uniform on [0, 1]
    volume = (start.norm(dim=1) / 2) ** dimension
    assert volume.max() <= 1
    assert volume.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * 4000))
    assert start.mean(0).abs().max().item() < 4 * 2 / math.sqrt(dimension * 4000)


def test_uniform_start_fills_the_linf_ball_evenly() -> None:
    zeros = torch.zeros(4000, 3, dtype=torch.float64)
    start = pgd_attack(linear, zeros, radius=2.0, steps=0, generator=generator())
    assert start.abs().max() <= 2
    assert start.abs().mean().item() == pytest.approx(1.0, abs=4 * 2 / math.sqrt(12 * 12000))
    assert start.mean().abs().item() < 4 * 4 / math.sqrt(12 * 12000)


def test_gaussian_start_is_small() -> None:
    start = pgd_attack(
        linear, torch.zeros(4000, 3), radius=2.0, steps=0, start="gaussian", generator=generator()
    )
    assert start.std().item() == pytest.approx(0.001, rel=0.05)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_reproducible_by_generator_alone(norm: str) -> None:
    inputs = torch.rand(3, 4)
    state = torch.get_rng_state()
    first, again, other = (
        pgd_attack(linear, inputs, radius=0.3, steps=0, norm=norm, generator=generator(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------- tensors


def test_attack_works_without_gradients_and_returns_a_detached_point() -> None:
    inputs = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        moved = pgd_attack(linear, inputs, radius=0.3, start="zero")
    assert not moved.requires_grad
    assert inputs.grad is None
    torch.testing.assert_close(moved - inputs.detach(), (0.3 * WEIGHT.sign()).expand(3, 4))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_empty_batch_and_half_precision(norm: str) -> None:
    weight = WEIGHT.half()
    assert pgd_attack(linear, torch.zeros(0, 4).double(), radius=0.3, norm=norm).shape == (0, 4)
    moved = pgd_attack(lambda x: (x @ weight).sum(), torch.zeros(2, 4).half(), radius=0.25, norm=norm)
    assert moved.dtype == torch.float16
    assert torch.isfinite(moved).all()


# -------------------------------------------------------------------------------------------------- loss


def two_class_model() -> nn.Linear:
    model = nn.Linear(4, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.stack([WEIGHT, -0.5 * WEIGHT]))
        model.bias.copy_(torch.tensor([0.3, -0.1]))
    return model


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_adversarial_cross_entropy_of_a_linear_model(norm: str) -> None:
    """The worst margin is the clean one less ``radius`` times the dual norm of the difference of weights."""
    model, inputs = two_class_model(), torch.randn(7, 4, dtype=torch.float64)
    target = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    dual = (1.5 * WEIGHT).abs().sum() if norm == "linf" else (1.5 * WEIGHT).norm()
    logits = model(inputs)
    margin = torch.where(target == 0, logits[:, 0] - logits[:, 1], logits[:, 1] - logits[:, 0])
    expected = torch.nn.functional.softplus(-(margin - 0.2 * dual)).mean()
    found = AdversarialLoss(CrossEntropyLoss(), radius=0.2, norm=norm, start="zero")(model, inputs, target)
    torch.testing.assert_close(found, expected)


def test_radius_zero_is_the_base_loss_and_keywords_reach_it() -> None:
    model, inputs, target = two_class_model(), torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 1])
    weight = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    loss = AdversarialLoss(CrossEntropyLoss(), radius=0.0)
    torch.testing.assert_close(
        loss(model, inputs, target, sample_weight=weight, denominator=5.0),
        CrossEntropyLoss()(model(inputs), target, sample_weight=weight, denominator=5.0),
    )
    with pytest.raises(TypeError, match="epoch"):
        loss(model, inputs, target, epoch=3)


def test_parameter_gradients_are_those_of_the_attacked_point_alone() -> None:
    model, inputs, target = (
        two_class_model(),
        torch.randn(5, 4, dtype=torch.float64),
        torch.tensor([0, 1, 1, 0, 0]),
    )
    loss = AdversarialLoss(FocalLoss(), radius=0.2, steps=3)
    loss(model, inputs, target, generator=generator(4)).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    point = pgd_attack(
        lambda moved: FocalLoss()(model(moved), target), inputs, radius=0.2, steps=3, generator=generator(4)
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    FocalLoss()(model(point), target).backward()
    for have, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(have, parameter.grad)


class CountingLoss(nn.Module):
    """A loss with state, which it moves in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        self.calls += self.training
        return torch.nn.functional.cross_entropy(logits, target)


def test_statistics_state_and_modes_move_by_the_last_call_alone() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.BatchNorm1d(6), nn.Linear(6, 2)
    )
    model[3].eval()  # a part that the user froze
    frozen = copy.deepcopy(model[3].state_dict())
    base, inputs, target = CountingLoss(), torch.rand(8, 4), torch.tensor([0, 1] * 4)
    AdversarialLoss(base, radius=0.1, steps=5)(model, inputs, target)
    assert model[1].num_batches_tracked == 1
    assert base.calls == 1
    assert base.training
    assert [part.training for part in model] == [True, True, True, False, True]
    assert all(torch.equal(value, frozen[name]) for name, value in model[3].state_dict().items())


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()

    def fail(points: Tensor) -> Tensor:
        assert [part.training for part in model] == [False, False]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), evaluation_mode(model, fail):
        fail(torch.zeros(1))
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


def test_it_is_a_loss_of_the_robust_family() -> None:
    loss = AdversarialLoss(CrossEntropyLoss(), radius=0.1, start="zero")
    mixture = 0.5 * loss + AdversarialLoss(FocalLoss(), radius=0.1, start="zero")
    assert isinstance(mixture, Mixture)
    assert mixture.family == "robust"
    model, inputs, target = two_class_model(), torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 1])
    terms = [part(model, inputs, target) for part in mixture.losses]
    torch.testing.assert_close(mixture(model, inputs, target), 0.5 * terms[0] + terms[1])
    with pytest.raises(ValueError, match="must share a call"):
        loss + FocalLoss()
    twin = copy.deepcopy(loss)
    torch.testing.assert_close(twin(model, inputs, target), terms[0])
    assert "radius=0.1" in repr(loss)


# -------------------------------------------------------------------------------------------------- doors


def test_what_cannot_be_attacked_is_refused() -> None:
    inputs = torch.rand(2, 3)
    for wrong, message in [
        ({"radius": -0.1}, r"radius must lie in \[0.0, inf\], got -0.1"),
        ({"radius": math.nan}, "radius"),
        ({"steps": -1}, r"steps must lie in \[0, inf\], got -1"),
        ({"step_size": -1.0}, "step_size"),
        ({"norm": "l1"}, "norm must be 'linf' or 'l2', got 'l1'"),
        ({"start": "corner"}, "start must be 'uniform', 'gaussian' or 'zero', got 'corner'"),
        ({"bounds": (1.0, 0.0)}, r"bounds must be \(lowest, highest\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            pgd_attack(torch.sum, inputs, **{"radius": 0.1, **wrong})
        with pytest.raises(ValueError, match=message):
            AdversarialLoss(CrossEntropyLoss(), **{"radius": 0.1, **wrong})
    with pytest.raises(ValueError, match=r"inputs must have shape \(N, ...\) .*, got \(3,\)"):
        pgd_attack(torch.sum, torch.rand(3), radius=0.1)
    with pytest.raises(ValueError, match=r"inputs must lie within bounds .*, got values from 0 to 255"):
        pgd_attack(torch.sum, torch.tensor([[0.0, 255.0]]), radius=0.1, bounds=(0.0, 1.0))
    with pytest.raises(TypeError, match=r"inputs must have a floating-point dtype, got torch\.int64"):
        pgd_attack(torch.sum, torch.zeros(2, 3, dtype=torch.long), radius=0.1)


def test_a_bound_that_half_precision_rounds_outwards_is_accepted() -> None:
    inputs = torch.tensor([[0.1, 0.05]]).half()
    assert inputs[0, 0].item() < 0.1
    pgd_attack(torch.sum, inputs, radius=0.01, bounds=(0.05, 0.1))
