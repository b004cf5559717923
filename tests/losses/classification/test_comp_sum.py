"""Comp-sum losses against torch's cross-entropy, brute force and hand-computed attacks."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import (
    CompSumLoss,
    SmoothAdversarialCompSumLoss,
    comp_sum_attack,
    comp_sum_loss,
    rho_margin_comp_sum_loss,
    smooth_adversarial_comp_sum_loss,
)
from telos.losses.classification.comp_sum import _margin_distance
from telos.theory import h_consistency_transform
from tests.declaration import Declaration, classification_sample, shifted
from tests.golden.adapters import Case, gradients

TAUS = (0.0, 0.3, 0.5, 1 - 1e-9, 1.0, 1 + 1e-9, 1.5, 1.9, 2.0, 2.5)


def adversarial(n: int, classes: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, classes, generator=generator, dtype=torch.float64).to(dtype)


declarations = [
    Declaration(
        comp_sum_loss,
        CompSumLoss,
        classification_sample(),
        invariances={"shift": shifted(3.0)},
    ),
    Declaration(
        smooth_adversarial_comp_sum_loss,
        SmoothAdversarialCompSumLoss,
        classification_sample(adversarial_logits=adversarial),
        differentiable=("logits", "adversarial_logits"),
        invariances={"shift": shifted(3.0), "shift of the attack": shifted(-2.0, "adversarial_logits")},
    ),
    Declaration(
        rho_margin_comp_sum_loss,
        None,  # made to be evaluated: placement gives it no module
        classification_sample(),
        kinks="a margin of 0 or rho",
        invariances={"shift": shifted(3.0)},
    ),
]


def golden_comp_sum(case: Case) -> dict[str, Any]:
    if "grid" in case.inputs:
        return {"T": transform_of(case.inputs["grid"], case.expected["T"])}
    logits, target, params = case.leaf("logits"), case.inputs["target"], case.params
    if "adv_logits" not in case.inputs:
        loss = comp_sum_loss(logits, target, **params)
        (slope,) = gradients(loss, logits)
        rows = comp_sum_loss(logits, target, reduction="none", **params)
        return {"loss": loss, "loss_per_sample": rows, "grad_logits": slope}
    moved, tau, rho, nu = case.leaf("adv_logits"), params["tau"], params["rho"], params["nu"]
    loss = smooth_adversarial_comp_sum_loss(logits, target, adversarial_logits=moved, **params)
    slope, moved_slope = gradients(loss, logits, moved)
    return {
        "loss": loss,
        "surrogate_per_sample": comp_sum_loss(logits / rho, target, tau=tau, reduction="none"),
        "penalty_per_sample": nu * _margin_distance(logits, target, moved),
        "rho_margin_adversarial_per_sample": rho_margin_comp_sum_loss(
            moved, target, tau=tau, rho=rho, reduction="none"
        ),
        "grad_logits": slope,
        "grad_adv_logits": moved_slope,
    }


def transform_of(grid: Any, expected: Any) -> Any:
    """``T_tau`` on a grid of (tau, classes, beta): records, columns of one length, or axes of a product."""
    if isinstance(grid, list):
        each = expected if isinstance(expected, list) and len(expected) == len(grid) else [None] * len(grid)
        return [transform_of(entry, want) for entry, want in zip(grid, each, strict=True)]
    names = {name: axis for name in grid if (axis := axis_of(name))}
    if len(names) < len(grid) or not {"tau", "beta"} <= set(names.values()):
        each = expected if isinstance(expected, dict) else {}
        return {key: transform_of(entry, each.get(key)) for key, entry in grid.items()}
    columns = {axis: torch.as_tensor(grid[name], dtype=torch.float64) for name, axis in names.items()}
    sizes = {column.numel() for column in columns.values() if column.ndim}
    shape = torch.as_tensor(expected).shape
    if len(sizes) == 1 and len(shape) <= 1:  # one length, one answer each
        points = [
            {axis: column[row] if column.ndim else column for axis, column in columns.items()}
            for row in range(sizes.pop())
        ]
        return [at_point(point) for point in points]
    return outer(columns, {})


def axis_of(name: str) -> str | None:
    spellings = {
        "tau": ("tau", "taus"),
        "num_classes": ("n", "ns", "c", "k", "num_classes", "classes", "n_classes"),
        "beta": ("b", "bs", "beta", "betas", "t", "epsilon", "eps", "x"),
    }
    return next((axis for axis, words in spellings.items() if name.lower() in words), None)


def outer(columns: dict[str, Tensor], point: dict[str, Tensor]) -> Any:
    if not columns:
        return at_point(point)
    axis, *rest = columns
    remaining = {name: columns[name] for name in rest}
    if columns[axis].ndim == 0:
        return outer(remaining, {**point, axis: columns[axis]})
    return [outer(remaining, {**point, axis: value}) for value in columns[axis]]


def at_point(point: dict[str, Tensor]) -> float:
    classes = int(point["num_classes"]) if "num_classes" in point else 2
    return float(h_consistency_transform(float(point["beta"]), float(point["tau"]), classes))


@pytest.mark.parametrize(
    "grid",
    [
        [{"tau": 0.0, "n": 3, "b": 0.6}, {"tau": 2.0, "n": 10, "b": 0.5}],
        {"tau": [0.0, 2.0], "n": [3, 10], "b": [0.6, 0.5]},
    ],
)
def test_golden_adapter_reads_records_and_columns(grid: Any) -> None:
    case = Case("comp_sum", "theory", {}, {"grid": grid}, {"T": [0.2, 0.05]})
    assert golden_comp_sum(case)["T"] == pytest.approx([0.2, 0.05], abs=1e-12)


def test_golden_adapter_reads_axes() -> None:
    grid = {"tau": [0.0, 2.0], "n": 10, "b": torch.tensor([0.6, 0.8, 0.5], dtype=torch.float64)}
    case = Case("comp_sum", "theory", {}, {"grid": grid}, {"T": [[0.0] * 3] * 2})
    found = golden_comp_sum(case)["T"]
    assert found[0][:2] == pytest.approx([0.2, 0.4], abs=1e-12)
    assert found[1] == pytest.approx([0.06, 0.08, 0.05], abs=1e-12)


# ------------------------------------------------------------------------------------------------ the family


@pytest.fixture
def sample() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return logits, torch.randint(6, (40,), generator=generator)


def probability(logits: Tensor, target: Tensor) -> Tensor:
    return logits.softmax(-1).gather(-1, target[:, None])[:, 0]


def test_tau_one_is_cross_entropy(sample: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(comp_sum_loss(*sample), F.cross_entropy(*sample), rtol=1e-14, atol=0)
    soft = torch.randn(40, 6, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(comp_sum_loss(sample[0], soft), F.cross_entropy(sample[0], soft))


def test_tau_two_is_mean_absolute_error(sample: tuple[Tensor, Tensor]) -> None:
    logits, target = sample
    mae = (logits.softmax(-1) - F.one_hot(target, 6)).abs().sum(-1).mean() / 2
    torch.testing.assert_close(comp_sum_loss(logits, target, tau=2.0), mae)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.7])
def test_between_one_and_two_is_generalised_cross_entropy(sample: tuple[Tensor, Tensor], q: float) -> None:
    expected = ((1 - probability(*sample) ** q) / q).mean()
    torch.testing.assert_close(comp_sum_loss(*sample, tau=1 + q), expected)


def test_tau_zero_is_the_sum_of_exponentials(sample: tuple[Tensor, Tensor]) -> None:
    logits, target = sample
    expected = [
        sum(math.exp(row[k] - row[y]) for k in range(6) if k != y)
        for row, y in zip(logits.tolist(), target.tolist(), strict=True)
    ]
    found = comp_sum_loss(logits, target, tau=0.0, reduction="none")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("tau", TAUS)
def test_gradient_is_p_to_the_tau_minus_one_times_the_residual(
    sample: tuple[Tensor, Tensor], tau: float
) -> None:
    logits, target = sample[0].clone().requires_grad_(), sample[1]
    (slope,) = torch.autograd.grad(comp_sum_loss(logits, target, tau=tau, reduction="sum"), logits)
    p = logits.detach().softmax(-1)
    expected = probability(p.log(), target)[:, None] ** (tau - 1) * (p - F.one_hot(target, 6))
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("tau", TAUS)
def test_soft_targets_average_the_losses_of_the_classes(sample: tuple[Tensor, Tensor], tau: float) -> None:
    logits = sample[0][:5]
    soft = torch.randn(5, 6, dtype=torch.float64).softmax(-1)
    classes = torch.arange(6)
    by_class = torch.stack(
        [comp_sum_loss(row.expand(6, 6), classes, tau=tau, reduction="none") for row in logits]
    )
    found = comp_sum_loss(logits, soft, tau=tau, reduction="none")
    torch.testing.assert_close(found, (soft * by_class).sum(-1))
    hard = F.one_hot(sample[1][:5], 6).double()
    torch.testing.assert_close(
        comp_sum_loss(logits, hard, tau=tau), comp_sum_loss(logits, sample[1][:5], tau=tau)
    )


def test_decreases_in_tau_and_is_smooth_at_one(sample: tuple[Tensor, Tensor]) -> None:
    rows = torch.stack([comp_sum_loss(*sample, tau=tau, reduction="none") for tau in TAUS])
    assert (rows.diff(dim=0) <= 0).all()
    assert (rows[0] > rows[-1]).all()
    # the derivative of the loss in tau is -a^2/2 at tau = 1, with a the cross-entropy
    a = rows[TAUS.index(1.0)]
    torch.testing.assert_close(rows[TAUS.index(1 - 1e-9)] - a, 1e-9 * a**2 / 2, rtol=1e-4, atol=1e-15)


def test_confident_mistakes_are_flat_above_one_and_infinite_below() -> None:
    logits = torch.tensor([[30000.0, -30000.0]], requires_grad=True)
    target = torch.tensor([1])
    loss = comp_sum_loss(logits, target, tau=1.5)
    assert loss == 2.0
    assert torch.count_nonzero(torch.autograd.grad(loss, logits)[0]) == 0
    assert comp_sum_loss(logits, target, tau=0.5) == torch.inf
    # the right answer, however confident, stays finite with a finite gradient
    loss = comp_sum_loss(logits, torch.tensor([0]), tau=0.5)
    assert loss == 0
    assert torch.count_nonzero(torch.autograd.grad(loss, logits)[0]) == 0


def test_a_class_of_probability_zero_adds_nothing_though_its_loss_is_infinite() -> None:
    logits = torch.tensor([[3e4, -3e4, 3e4]], requires_grad=True)
    soft = torch.tensor([[0.5, 0.0, 0.5]])
    loss = comp_sum_loss(logits, soft, tau=0.0)
    torch.testing.assert_close(loss, torch.tensor(1.0))
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


# ------------------------------------------------------------------------------- smooth adversarial loss


def margins(logits: Tensor, y: int) -> Tensor:
    return torch.cat([logits[y] - logits[:y], logits[y] - logits[y + 1 :]])


def phi(u: Tensor, tau: float) -> Tensor:
    return torch.log(1 + u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5])
def test_smooth_loss_by_its_definition(sample: tuple[Tensor, Tensor], tau: float) -> None:
    logits, target = sample
    moved, rho, nu = logits + 0.3 * logits.cos(), 0.7, 1.3
    expected = torch.stack(
        [
            phi((-margins(h, y) / rho).exp().sum(), tau) + nu * (margins(g, y) - margins(h, y)).norm()
            for h, g, y in zip(logits, moved, target.tolist(), strict=True)
        ]
    )
    arguments = {"adversarial_logits": moved, "tau": tau, "rho": rho, "nu": nu}
    found = smooth_adversarial_comp_sum_loss(logits, target, **arguments, reduction="none")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.7])
def test_rho_margin_loss_by_its_definition(sample: tuple[Tensor, Tensor], tau: float) -> None:
    logits, target = sample
    expected = torch.stack(
        [
            phi((1 - margins(h, y) / 0.7).clamp(0, 1).sum(), tau)
            for h, y in zip(logits, target.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(
        rho_margin_comp_sum_loss(logits, target, tau=tau, rho=0.7, reduction="none"), expected
    )


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0])
def test_smooth_loss_dominates_the_rho_margin_loss_at_every_point(tau: float, rho: float) -> None:
    generator = torch.Generator().manual_seed(11)
    target = torch.randint(6, (2000,), generator=generator)
    logits = 3 * torch.randn(2000, 6, generator=generator, dtype=torch.float64)
    scale = torch.rand(2000, 1, generator=generator, dtype=torch.float64)
    moved = logits + scale * torch.randn(2000, 6, generator=generator, dtype=torch.float64)
    nu = math.sqrt(5) / rho
    smooth = smooth_adversarial_comp_sum_loss(
        logits, target, adversarial_logits=moved, tau=tau, rho=rho, nu=nu, reduction="none"
    )
    rough = rho_margin_comp_sum_loss(moved, target, tau=tau, rho=rho, reduction="none")
    assert (smooth >= rough).all()


def test_without_a_shift_the_smooth_loss_is_the_scaled_one(sample: tuple[Tensor, Tensor]) -> None:
    logits, target = sample[0].clone().requires_grad_(), sample[1]
    smooth = smooth_adversarial_comp_sum_loss(
        logits, target, adversarial_logits=logits.detach(), tau=0.4, rho=2.0, nu=5.0
    )
    scaled = comp_sum_loss(logits / 2.0, target, tau=0.4)
    torch.testing.assert_close(smooth, scaled)
    torch.testing.assert_close(torch.autograd.grad(smooth, logits)[0], torch.autograd.grad(scaled, logits)[0])


def test_smooth_loss_averages_over_soft_targets(sample: tuple[Tensor, Tensor]) -> None:
    logits, moved = sample[0][:4], sample[0][4:8]
    soft = torch.randn(4, 6, dtype=torch.float64).softmax(-1)
    call = {"adversarial_logits": moved, "tau": 0.5, "reduction": "none"}
    by_class = [smooth_adversarial_comp_sum_loss(logits, torch.full((4,), y), **call) for y in range(6)]
    torch.testing.assert_close(
        smooth_adversarial_comp_sum_loss(logits, soft, **call), (soft * torch.stack(by_class, -1)).sum(-1)
    )


def test_nan_in_adversarial_logits_propagates_from_rows_that_count_only() -> None:
    logits, target = torch.zeros(2, 3), torch.tensor([0, -100])
    moved = torch.ones(2, 3)
    moved[1] = torch.nan
    call = smooth_adversarial_comp_sum_loss
    assert torch.isfinite(call(logits, target, adversarial_logits=moved))
    assert call(logits, torch.tensor([0, 1]), adversarial_logits=moved).isnan()


# ----------------------------------------------------------------------------------------------- attack


def linear_model() -> torch.nn.Linear:
    model = torch.nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 2.5]]))
    return model


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attack_on_a_linear_model_is_the_hand_computed_one(norm: str) -> None:
    # two classes: ||D_x' - D_x|| = |(w_0 - w_1) . shift|, largest along (1, -3, -2) or against it
    model, inputs = linear_model(), torch.zeros(20, 3, dtype=torch.float64)
    direction = torch.tensor([1.0, -3.0, -2.0], dtype=torch.float64)
    best = direction.sign() if norm == "linf" else direction / direction.norm()
    moved = comp_sum_attack(
        model,
        inputs,
        torch.zeros(20, dtype=torch.long),
        radius=0.2,
        step_size=100.0,  # so long a step that nothing is left of the random start
        norm=norm,
        bounds=None,
        generator=torch.Generator().manual_seed(0),
    )
    side = (moved @ direction).sign()
    torch.testing.assert_close(moved, 0.2 * side[:, None] * best.expand(20, 3))
    assert set(side.tolist()) == {1.0, -1.0}


def test_attack_raises_the_smooth_loss_and_keeps_to_ball_and_bounds() -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    inputs, target = torch.rand(32, 8), torch.randint(4, (32,))
    moved = comp_sum_attack(model, inputs, target, radius=0.1)
    assert ((moved - inputs).abs() <= 0.1 + 1e-6).all()
    assert ((moved >= 0) & (moved <= 1)).all()
    noise = (inputs + 0.1 * torch.empty_like(inputs).uniform_(-1, 1).sign()).clamp(0, 1)
    loss = [
        smooth_adversarial_comp_sum_loss(model(inputs), target, adversarial_logits=model(x)).item()
        for x in (inputs, noise, moved)
    ]
    assert loss[2] > loss[1] > loss[0]


def test_attack_leaves_parameters_statistics_and_modes_alone() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(), torch.nn.Linear(6, 3)
    )
    model[2].eval()  # a part that the user froze stays frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[0].weight.grad = torch.ones_like(model[0].weight)
    comp_sum_attack(model, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1]), radius=0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [part.training for part in model] == [True, True, False, True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None


def test_attack_is_reproducible_by_its_generator() -> None:
    model, inputs, target = linear_model().float(), torch.rand(6, 3), torch.zeros(6, dtype=torch.long)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (
        comp_sum_attack(model, inputs, target, steps=0, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------- doors


@pytest.mark.bare
def test_parameters_out_of_range_are_refused() -> None:
    logits, target = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"tau must lie in \[0.0, inf\], got -0.1"):
        comp_sum_loss(logits, target, tau=-0.1)
    with pytest.raises(ValueError, match="tau"):
        CompSumLoss(tau=math.nan)
    with pytest.raises(ValueError, match=r"rho must lie in \(0.0, inf\], got 0"):
        SmoothAdversarialCompSumLoss(rho=0)
    with pytest.raises(ValueError, match="nu"):
        smooth_adversarial_comp_sum_loss(logits, target, adversarial_logits=logits, nu=-1.0)
    with pytest.raises(ValueError, match=r"logits must have at least 2 classes, got 1"):
        comp_sum_loss(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"adversarial_logits must have shape \(2, 3\), got \(2, 4\)"):
        smooth_adversarial_comp_sum_loss(logits, target, adversarial_logits=torch.zeros(2, 4))
    with pytest.raises(TypeError, match="target must hold labels of an integer dtype"):
        rho_margin_comp_sum_loss(logits, torch.full((2, 3), 1 / 3))


@pytest.mark.bare
def test_attack_refuses_what_it_cannot_attack() -> None:
    model, target = torch.nn.Linear(3, 2), torch.tensor([0, 1])
    with pytest.raises(
        ValueError, match=r"inputs must lie within bounds \(0.0, 1.0\), got values from -1 to -1"
    ):
        comp_sum_attack(model, torch.full((2, 3), -1.0), target)
    with pytest.raises(ValueError, match=r"target must have shape \(2,\), got \(2, 2\)"):
        comp_sum_attack(model, torch.rand(2, 3), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"target must lie in \[0, 2\), got 2"):
        comp_sum_attack(model, torch.rand(2, 3), torch.tensor([0, 2]))
    with pytest.raises(TypeError, match="target must have an integer dtype"):
        comp_sum_attack(model, torch.rand(2, 3), torch.tensor([0.0, 1.0]))
    assert model.training
