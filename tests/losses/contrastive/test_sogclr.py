"""SogCLR and iSogCLR: golden values, the robust objective behind them, and what the memory does."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from telos.losses import ISogCLRLoss, SogCLRLoss, isogclr_loss, kl_radius_temperature, sogclr_loss
from telos.losses._task import TaskInfo, misfit
from tests.declaration import Declaration, Inputs
from tests.golden.adapters import Case, differences

EXAMPLES = 300
SURROGATE = "its gradient is the objective's: test_gradient_is_that_of_the_objective"


def sample(with_temperatures: bool, sides: int = 1):
    """Two views of n examples with their indices, and a memory that has seen them."""

    def draw(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        z1 = torch.randn(n, 6, generator=generator, dtype=torch.float64)
        z2 = z1 + 0.5 * torch.randn(n, 6, generator=generator, dtype=torch.float64)
        shape = (n,) if sides == 1 else (n, sides)
        state = {"log_average": torch.full(shape, -1.5), "seen": torch.ones(n, dtype=torch.bool)}
        if with_temperatures:
            state["gradient_average"] = torch.full(shape, 0.25)
            state["temperatures"] = torch.full(shape, 0.2)
        index = torch.randperm(EXAMPLES, generator=generator)[:n]
        return {"z1": z1.to(dtype), "z2": z2.to(dtype), "index": index, **state}

    return draw


def scaled_views(inputs: Inputs) -> Inputs:
    return {**inputs, "z1": 3.0 * inputs["z1"], "z2": 0.5 * inputs["z2"]}


def swapped_views(inputs: Inputs) -> Inputs:
    return {**inputs, "z1": inputs["z2"], "z2": inputs["z1"]}


def rotated(inputs: Inputs) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    return {**inputs, "z1": inputs["z1"] @ turn, "z2": inputs["z2"] @ turn}


declarations = [
    Declaration(
        function=sogclr_loss,
        module=lambda: SogCLRLoss(EXAMPLES),
        sample=sample(with_temperatures=False),
        differentiable=("z1", "z2"),
        rows=False,
        state=("log_average", "seen"),
        surrogate=SURROGATE,
        extreme="",
        growth=2,
        invariances={"scale": scaled_views, "exchange": swapped_views, "rotation": rotated},
        module_only=("num_examples", "first_use_gamma_one"),
        function_only=("log_floor",),
        minimum=2,
    ),
    Declaration(
        function=isogclr_loss,
        module=lambda: ISogCLRLoss(EXAMPLES),
        sample=sample(with_temperatures=True),
        differentiable=("z1", "z2"),
        rows=False,
        state=("log_average", "gradient_average", "temperatures", "seen"),
        surrogate=SURROGATE,
        extreme="",
        growth=2,
        invariances={"scale": scaled_views, "exchange": swapped_views, "rotation": rotated},
        module_only=("num_examples", "temperature", "first_use_gamma_one"),
        function_only=("log_floor",),
        minimum=2,
    ),
]


# ---------------------------------------------------------------------------------------------- golden


def golden_isogclr(case: Case) -> dict[str, Any]:
    """Several steps of one stateful loss; all of the upstream's state is indexed by sample."""
    params, bimodal = case.params, case.params["variant"] == "official_bimodal"
    start = params.get("tau_init", params.get("tau"))
    beta = params.get("beta_u", params.get("beta"))
    shape = (params["num_samples"], 2) if bimodal else (params["num_samples"],)
    log_average = torch.full(shape, -math.inf, dtype=torch.float64)
    gradient_average = torch.zeros(shape, dtype=torch.float64)
    temperatures = torch.full(shape, start, dtype=torch.float64)
    # upstream's bimodal s is relative to a running maximum b, and has 1e-10 added to it in the weights
    running_maximum = torch.zeros(shape, dtype=torch.float64)
    found: dict[str, list[Tensor]] = {"loss_steps": [], "grad_z1_steps": [], "grad_z2_steps": []}
    for step, index in enumerate(case.inputs["index_steps"]):
        z1 = case.inputs["z1_steps"][step].clone().requires_grad_()
        z2 = case.inputs["z2_steps"][step].clone().requires_grad_()
        gamma = params["gamma"]
        if "gamma_at_step" in params:
            gamma = params["gamma_at_step"][step]
        elif params.get("first_step_initialises_s") and step == 0:
            gamma = 1.0
        log_floor = None
        if bimodal:
            top = _largest_exponents(z1.detach(), z2.detach(), temperatures[index])
            running_maximum[index] = torch.maximum(running_maximum[index], top)
            log_floor = running_maximum[index] + math.log(1e-10)
        loss, state = isogclr_loss(
            z1,
            z2,
            log_average=log_average[index],
            gradient_average=gradient_average[index],
            temperatures=temperatures[index],
            rho=params.get("rho", params.get("rho_init")),
            gamma=gamma,
            temperature_min=params["tau_min"],
            temperature_max=params["tau_max"],
            temperature_lr=params.get("eta", params.get("eta_init")),
            momentum=1 - beta,
            grad_clip=params.get("grad_clip"),
            bimodal=bimodal,
            subtract_positive=bimodal,
            include_positive=bimodal,
            log_floor=log_floor,
        )
        log_average[index], gradient_average[index], temperatures[index] = state
        loss.backward()
        found["loss_steps"].append(loss.detach())
        found["grad_z1_steps"].append(z1.grad)  # type: ignore[arg-type]
        found["grad_z2_steps"].append(z2.grad)  # type: ignore[arg-type]
    result: dict[str, Any] = {name: torch.stack(steps) for name, steps in found.items()}
    final = {
        "s": (log_average - running_maximum).exp(),
        "b": running_maximum,
        "u": gradient_average,
        "tau": temperatures,
    }
    for name, values in final.items():
        result[f"final_{name}"] = values
        if bimodal:
            result[f"final_{name}_1"], result[f"final_{name}_2"] = values.unbind(-1)
    return result


def _largest_exponents(z1: Tensor, z2: Tensor, temperatures: Tensor) -> Tensor:
    """The largest ``h / temperature`` of each row and of each column, the positive's 0 included."""
    cosines = normalize(z1, dim=-1) @ normalize(z2, dim=-1).T
    differences = torch.stack([cosines, cosines.T], -1) - cosines.diagonal()[:, None, None]
    return (differences / temperatures[:, None, :]).amax(1)


def bimodal_case(steps: int = 4, batch: int = 5, dim: int = 4, examples: int = 8) -> Case:
    """A case of the two-modality form by plain loops over pairs, with averages as they are."""
    params = {
        "variant": "official_bimodal",
        "num_samples": examples,
        "steps": steps,
        "gamma": 0.8,
        "rho_init": 1.0,
        "eta_init": 0.03,
        "beta_u": 0.9,
        "tau_init": 0.07,
        "tau_min": 0.005,
        "tau_max": 0.1,
        "grad_clip": 1.5,
    }
    generator = torch.Generator().manual_seed(11)
    z1_steps, z2_steps = (
        torch.randn(steps, batch, dim, generator=generator, dtype=torch.float64) for _ in "12"
    )
    index_steps = torch.stack([torch.randperm(examples, generator=generator)[:batch] for _ in range(steps)])
    s, b, u = ([[0.0] * examples for _ in range(2)] for _ in range(3))
    tau = [[params["tau_init"]] * examples for _ in range(2)]
    expected: dict[str, Any] = {"loss_steps": [], "grad_z1_steps": [], "grad_z2_steps": []}
    for step in range(steps):
        z1, z2 = z1_steps[step].clone().requires_grad_(), z2_steps[step].clone().requires_grad_()
        first, second = z1 / z1.norm(dim=1, keepdim=True), z2 / z2.norm(dim=1, keepdim=True)
        loss = torch.zeros((), dtype=torch.float64)
        for side, (anchors, others) in enumerate([(first, second), (second, first)]):
            for row, example in enumerate(index_steps[step].tolist()):
                h = [anchors[row] @ others[k] - anchors[row] @ others[row] for k in range(batch)]
                exponents = [value.item() / tau[side][example] for value in h]
                old = b[side][example]
                b[side][example] = max(old, *exponents)
                g = sum(math.exp(e - b[side][example]) for e in exponents) / (batch - 1)
                decayed = (1 - 0.8) * s[side][example] * math.exp(old - b[side][example])
                s[side][example] = decayed + 0.8 * g
                weights = [math.exp(e - b[side][example]) / (s[side][example] + 1e-10) for e in exponents]
                loss = (
                    loss + sum(w * value for w, value in zip(weights, h, strict=True)) / (batch - 1) / batch
                )
                slope = math.log(s[side][example]) + b[side][example] + 1.0
                slope -= sum(w * e for w, e in zip(weights, exponents, strict=True)) / (batch - 1)
                slope = min(max(slope, -1.5), 1.5)
                u[side][example] = (1 - 0.9) * u[side][example] + 0.9 * slope
                tau[side][example] = min(max(tau[side][example] - 0.03 * u[side][example], 0.005), 0.1)
        loss.backward()
        expected["loss_steps"].append(loss.item())
        expected["grad_z1_steps"].append(z1.grad.tolist())  # type: ignore[union-attr]
        expected["grad_z2_steps"].append(z2.grad.tolist())  # type: ignore[union-attr]
    for name, memory in {"s": s, "b": b, "u": u, "tau": tau}.items():
        expected[f"final_{name}_1"], expected[f"final_{name}_2"] = memory
    inputs = {"z1_steps": z1_steps, "z2_steps": z2_steps, "index_steps": index_steps}
    return Case("isogclr", "bimodal_by_loops", params, inputs, expected)


def test_two_modalities_equal_plain_loops() -> None:
    case = bimodal_case()
    assert max(abs(value) for value in case.expected["final_b_1"]) > 5, "the running maximum must matter"
    assert 0.1 in case.expected["final_tau_1"] + case.expected["final_tau_2"], "a bound must be reached"
    assert differences(golden_isogclr(case), case.expected, 1e-10, 1e-12) == []


# ---------------------------------------------------------------------------------------------- the objective


def views(n: int = 6, dim: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z1, z2 = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for _ in "12")
    return z1.requires_grad_(), z2.requires_grad_()


def fresh(n: int, temperature: float | Tensor = 0.3, sides: int = 1) -> dict[str, Tensor]:
    shape = (n,) if sides == 1 else (n, sides)
    return {
        "log_average": torch.full(shape, -math.inf, dtype=torch.float64),
        "gradient_average": torch.zeros(shape, dtype=torch.float64),
        "temperatures": torch.zeros(shape, dtype=torch.float64) + temperature,
        "seen": torch.zeros(n, dtype=torch.bool),
    }


def relative_scores(z1: Tensor, z2: Tensor, bimodal: bool) -> list[list[Tensor]]:
    """``h`` of the negatives of each anchor of each example, one by one."""
    first, second = normalize(z1, dim=-1), normalize(z2, dim=-1)
    anchors = []
    for i in range(len(z1)):
        others = [k for k in range(len(z1)) if k != i]
        across = (second[others], first[others])
        same = (first[others], second[others])
        anchors.append(
            [
                (across[side] if bimodal else torch.cat([across[side], same[side]])) @ anchor
                - first[i] @ second[i]
                for side, anchor in enumerate((first[i], second[i]))
            ]
        )
    return anchors


@pytest.mark.parametrize("bimodal", [False, True])
def test_gradient_is_that_of_the_objective(bimodal: bool) -> None:
    """Nothing remembered: mean over examples of the sum over anchors of t (log mean exp(h / t) + rho)."""
    z1, z2 = views()
    sides = 2 if bimodal else 1
    temperatures = torch.linspace(0.1, 0.6, 6 * sides, dtype=torch.float64).view((6, 2) if bimodal else (6,))
    objective = torch.zeros((), dtype=torch.float64)
    for i, rows in enumerate(relative_scores(z1, z2, bimodal)):
        for side, h in enumerate(rows):
            t = temperatures[i, side] if bimodal else temperatures[i]
            objective = objective + t * ((h / t).exp().mean().log() + 0.25) / 6
    expected = torch.autograd.grad(objective, (z1, z2))
    for value in ("surrogate", "objective"):
        loss, _ = isogclr_loss(
            z1, z2, **fresh(6, temperatures, sides), rho=0.25, bimodal=bimodal, value=value
        )
        for slope, want in zip(torch.autograd.grad(loss, (z1, z2)), expected, strict=True):
            torch.testing.assert_close(slope, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, objective.detach(), rtol=1e-12, atol=0.0)


def test_gradient_is_temperature_times_ntxent_without_the_positive_in_the_denominator() -> None:
    z1, z2 = views()
    loss, _ = sogclr_loss(
        z1,
        z2,
        log_average=torch.full((6,), -math.inf, dtype=torch.float64),
        gamma=1.0,
        temperature=0.2,
        subtract_positive=False,
    )
    both = normalize(torch.cat([z1, z2]), dim=-1)
    logits = both @ both.T / 0.2
    partner = torch.arange(12).roll(6)
    own = torch.eye(12, dtype=torch.bool) | torch.eye(12, dtype=torch.bool)[partner]
    decoupled = logits.masked_fill(own, -math.inf).logsumexp(-1) - logits.gather(1, partner[:, None])[:, 0]
    for slope, want in zip(
        torch.autograd.grad(loss, (z1, z2)),
        torch.autograd.grad(0.2 * 2 * decoupled.mean(), (z1, z2)),
        strict=True,
    ):
        torch.testing.assert_close(slope, want, rtol=1e-10, atol=1e-12)


def test_subtracting_the_positive_matters_only_through_the_memory() -> None:
    z1, z2 = views()
    slopes = {}
    for subtract in (True, False):
        for gamma in (1.0, 0.5):
            state = {**fresh(6), "log_average": torch.full((6,), -1.0, dtype=torch.float64), "seen": None}
            loss, _ = isogclr_loss(z1, z2, **state, gamma=gamma, subtract_positive=subtract)
            slopes[subtract, gamma] = torch.autograd.grad(loss, z1)[0]
    torch.testing.assert_close(slopes[True, 1.0], slopes[False, 1.0], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(slopes[True, 0.5], slopes[False, 0.5], rtol=1e-3)


@pytest.mark.parametrize("bimodal", [False, True])
def test_temperature_slope_is_radius_minus_divergence(bimodal: bool) -> None:
    """G = rho - KL(softmax(h / t) || uniform), which is also the finite difference of the objective in t."""
    z1, z2 = views()
    rho, temperature, sides = 0.4, 0.35, 2 if bimodal else 1
    _, state = isogclr_loss(
        z1, z2, **fresh(6, temperature, sides), rho=rho, momentum=0.0, grad_clip=None, bimodal=bimodal
    )
    for i, rows in enumerate(relative_scores(z1.detach(), z2.detach(), bimodal)):
        divergences, slopes = [], []
        for h in rows:
            p = (h / temperature).softmax(-1)
            divergences.append((p * (p * len(h)).log()).sum())
            up, down = (
                t * ((h / t).exp().mean().log() + rho) for t in (temperature + 1e-5, temperature - 1e-5)
            )
            slopes.append((up - down) / 2e-5)
        slope = rho - torch.stack(divergences)
        slope = slope if bimodal else slope.mean()
        torch.testing.assert_close(state.gradient_average[i], slope, rtol=1e-12, atol=1e-12)
        numeric = torch.stack(slopes) if bimodal else torch.stack(slopes).mean()
        torch.testing.assert_close(state.gradient_average[i], numeric, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("rho", "bound"), [(0.3, None), (0.0, 1.0), (1.5, 0.05)])
def test_temperatures_converge_to_the_root_of_the_ball(rho: float, bound: float | None) -> None:
    """Frozen embeddings and gamma = 1: each anchor's t solves KL = rho, or stops at a bound."""
    z1, z2 = (z.detach() for z in views(5))
    state = fresh(5, 0.3, sides=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(1500):
            _, (log_average, velocity, temperatures) = isogclr_loss(
                z1,
                z2,
                **state,
                rho=rho,
                gamma=1.0,
                momentum=0.0,
                temperature_lr=0.03,
                temperature_max=1.0,
                bimodal=True,
            )
            state.update(log_average=log_average, gradient_average=velocity, temperatures=temperatures)
    rows = relative_scores(z1, z2, bimodal=True)
    roots = torch.stack([kl_radius_temperature(torch.stack(h), rho, temperature_max=1.0) for h in rows])
    torch.testing.assert_close(state["temperatures"], roots.clamp(0.05, 1.0), rtol=1e-8, atol=0.0)
    if bound is not None:
        assert (state["temperatures"] == bound).all()
    else:
        assert ((state["temperatures"] > 0.05) & (state["temperatures"] < 1.0)).any()


# ---------------------------------------------------------------------------------------------- the dual root


def divergence(h: Tensor, temperature: Tensor) -> Tensor:
    p = (h / temperature.unsqueeze(-1)).softmax(-1)
    return torch.special.xlogy(p, p * h.shape[-1]).sum(-1)


def test_bisection_finds_the_radius() -> None:
    h = torch.randn(50, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rho in (1e-3, 0.1, 0.5, 2.0):
        found = divergence(h, kl_radius_temperature(h, rho))
        torch.testing.assert_close(found, torch.full_like(found, rho), rtol=1e-9, atol=1e-12)


def test_bisection_of_two_scores_by_hand() -> None:
    """Two scores 0 and 1: p = sigmoid(1 / t), so t = 1 / logit(p) for the p whose divergence is rho."""
    p = torch.tensor(0.8, dtype=torch.float64)
    rho = math.log(2) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2)
    found = kl_radius_temperature(torch.tensor([0.0, 1.0], dtype=torch.float64), rho)
    torch.testing.assert_close(found, 1 / torch.logit(p), rtol=1e-10, atol=0.0)


def test_bisection_without_a_root_gives_the_bound() -> None:
    h = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0], [2.0, 2.0, 0.0]], dtype=torch.float64)
    bounds = {"temperature_min": 0.01, "temperature_max": 5.0}
    # ln 3 = 1.0986 is beyond every weighting; two equal largest scores reach ln 1.5 = 0.405 only
    assert (kl_radius_temperature(h, 1.2, **bounds) == 0.01).all()
    low = kl_radius_temperature(h, 0.5, **bounds)
    assert low[0] > 0.02
    assert (low[1:] == 0.01).all()
    high = kl_radius_temperature(h, 0.0, **bounds)
    assert high[0] == 5.0


# ---------------------------------------------------------------------------------------------- memory


def test_full_batch_remembers_the_mean() -> None:
    z1, z2 = (z.detach() for z in views())
    loss = SogCLRLoss(6, temperature=0.3, gamma=1.0)
    loss(z1.float(), z2.float(), torch.arange(6))
    expected = torch.stack(
        [
            torch.stack([(h / 0.3).exp().mean() for h in rows]).mean()
            for rows in relative_scores(z1, z2, False)
        ]
    )
    torch.testing.assert_close(loss.memory_of("log_average").exp(), expected.float(), rtol=1e-5, atol=0.0)


def test_small_batches_remember_the_full_batch() -> None:
    """A frozen model: the average over many small batches approaches that over all negatives."""
    z1, z2 = (z.detach() for z in views(12))
    everything = [
        torch.stack([(h / 0.5).exp().mean() for h in rows]).mean() for rows in relative_scores(z1, z2, False)
    ]
    loss = SogCLRLoss(12, temperature=0.5, gamma=0.02)
    generator = torch.Generator().manual_seed(0)
    history = []
    for step in range(2000):
        index = torch.randperm(12, generator=generator)[:4]
        loss(z1[index], z2[index], index)
        if step >= 500:
            history.append(loss.memory_of("log_average").exp())
    torch.testing.assert_close(
        torch.stack(history).mean(0).double(), torch.stack(everything), rtol=0.05, atol=0.0
    )


def test_permuting_the_batch_permutes_the_updates() -> None:
    z1, z2 = views()
    generator = torch.Generator().manual_seed(2)
    state = {
        "log_average": torch.randn(6, generator=generator, dtype=torch.float64),
        "gradient_average": torch.randn(6, generator=generator, dtype=torch.float64),
        "temperatures": 0.1 + torch.rand(6, generator=generator, dtype=torch.float64),
        "seen": torch.tensor([True, True, False, True, False, True]),
    }
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss, new = isogclr_loss(z1, z2, **state)
    other, moved = isogclr_loss(z1[order], z2[order], **{name: entry[order] for name, entry in state.items()})
    torch.testing.assert_close(other, loss)
    for have, want in zip(moved, new, strict=True):
        torch.testing.assert_close(have, want[order])


@pytest.mark.parametrize("bimodal", [False, True])
def test_only_drawn_examples_change(bimodal: bool) -> None:
    z1, z2 = views(4)
    loss = ISogCLRLoss(10, temperature=0.2, bimodal=bimodal)
    loss(z1, z2, torch.tensor([8, 1, 3, 5]))
    drawn = torch.zeros(10, dtype=torch.bool)
    drawn[[8, 1, 3, 5]] = True
    temperatures, log_average = loss.memory_of("temperatures"), loss.memory_of("log_average")
    assert temperatures.shape == ((10, 2) if bimodal else (10,))
    assert (temperatures[~drawn] == torch.tensor(0.2)).all()
    assert (temperatures[drawn] != torch.tensor(0.2)).all()
    assert torch.isinf(log_average[~drawn]).all()
    assert torch.isfinite(log_average[drawn]).all()


@pytest.mark.parametrize("bimodal", [False, True])
def test_module_follows_the_function(bimodal: bool) -> None:
    """Three steps with a first visit in the last: gamma is 1 there and 0.8 elsewhere."""
    sides = 2 if bimodal else 1
    module = ISogCLRLoss(8, rho=0.4, temperature=0.3, bimodal=bimodal)
    state = {
        name: entry.float() if entry.is_floating_point() else entry
        for name, entry in fresh(8, 0.3, sides).items()
    }
    for seed, index in enumerate(torch.tensor([[0, 1, 2, 3], [3, 4, 1, 5], [1, 6, 0, 4]])):
        z1, z2 = (z.float() for z in views(4, seed=seed))
        rows = {name: entry[index] for name, entry in state.items()}
        expected, new = isogclr_loss(z1, z2, **rows, rho=0.4, bimodal=bimodal)
        torch.testing.assert_close(module(z1, z2, index=index), expected)
        for name, entry in new._asdict().items():
            state[name][index] = entry
        state["seen"][index] = True
        for name in ("log_average", "gradient_average", "temperatures"):
            torch.testing.assert_close(module.memory_of(name), state[name])


def test_first_visit_without_gamma_one_starts_from_zero() -> None:
    z1, z2 = views(4)
    index = torch.arange(4)
    full, started = (SogCLRLoss(4, gamma=0.25, first_use_gamma_one=flag) for flag in (True, False))
    full(z1, z2, index)
    started(z1, z2, index)
    torch.testing.assert_close(
        started.memory_of("log_average"), full.memory_of("log_average") + math.log(0.25)
    )


def test_duplicates_are_averaged() -> None:
    z1, z2 = (z.detach() for z in views(4))
    loss = SogCLRLoss(5, gamma=1.0, temperature=0.4)
    loss(z1, z2, torch.tensor([2, 0, 2, 1]))
    separate = SogCLRLoss(5, gamma=1.0, temperature=0.4)
    separate(z1, z2, torch.tensor([2, 0, 3, 1]))
    apart = separate.memory_of("log_average").exp()
    torch.testing.assert_close(loss.memory_of("log_average")[2].exp(), (apart[2] + apart[3]) / 2)


def test_small_temperature_cannot_overflow() -> None:
    """exp(2 / 0.005) is 10^173: float32 holds its logarithm."""
    z1 = torch.eye(4)
    z2 = -torch.eye(4)
    loss = ISogCLRLoss(4, temperature=0.005, temperature_min=0.005, bimodal=True)
    z1.requires_grad_()
    value = loss(z1, z2, torch.arange(4))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(z1.grad).all()  # type: ignore[union-attr]
    torch.testing.assert_close(loss.memory_of("log_average"), torch.full((4, 2), 1 / 0.005))


def test_values_per_example_sum_up() -> None:
    z1, z2 = views()
    state = {**fresh(6), "seen": None}
    each, _ = isogclr_loss(z1, z2, **state, reduction="none")
    assert each.shape == (6,)
    for reduction, want in (("sum", each.sum()), ("mean", each.mean())):
        torch.testing.assert_close(isogclr_loss(z1, z2, **state, reduction=reduction)[0], want)


# ---------------------------------------------------------------------------------------------- doors


def test_a_radius_without_a_root_warns_once() -> None:
    z1, z2 = views(3)
    with pytest.warns(UserWarning, match=r"rho=1.375 is at least log\(2 negatives\)"):
        isogclr_loss(z1, z2, **fresh(3, sides=2), rho=1.375, bimodal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        isogclr_loss(z1, z2, **fresh(3, sides=2), rho=1.375, bimodal=True)
        # 4 negatives with two views: log 4 = 1.386
        isogclr_loss(z1, z2, **fresh(3), rho=1.375)
    with pytest.warns(UserWarning, match=r"log\(4 negatives\)"):
        isogclr_loss(z1, z2, **fresh(3), rho=1.3875)


@pytest.mark.bare
def test_refusals_name_the_argument() -> None:
    z1, z2 = views(4)
    loss = ISogCLRLoss(4)
    with pytest.raises(ValueError, match="index"):
        loss(z1, z2)
    with pytest.raises(ValueError, match=r"index must lie in \[0, 4\), got 4"):
        loss(z1, z2, torch.arange(1, 5))
    with pytest.raises(ValueError, match="log_average must have shape"):
        isogclr_loss(z1, z2, **fresh(4), bimodal=True)
    with pytest.raises(ValueError, match="gamma"):
        SogCLRLoss(4, gamma=0.0)
    with pytest.raises(ValueError, match="temperature must lie in"):
        ISogCLRLoss(4, temperature=2.0)
    with pytest.raises(ValueError, match="value must be"):
        isogclr_loss(z1, z2, **fresh(4), value="loss")  # type: ignore[arg-type]


def test_built_from_a_task() -> None:
    info = TaskInfo("contrastive", num_examples=17, supplies=frozenset({"index"}))
    for cls in (SogCLRLoss, ISogCLRLoss):
        assert misfit(cls, info) is None
        assert misfit(cls, TaskInfo("contrastive", num_examples=17)) is not None
        built = cls.from_task(info, gamma=0.7)
        assert built.memory_of("log_average").shape == (17,)
        assert built.gamma == 0.7
        with pytest.raises(ValueError, match="num_examples"):
            cls.from_task(TaskInfo("contrastive"))


@pytest.mark.parametrize("bimodal", [False, True])
def test_raw_scores_give_the_same_objective_and_gradient_without_memory(bimodal: bool) -> None:
    """With gamma = 1 the positive cancels: t log mean exp(c / t) - c_p is t log mean exp((c - c_p) / t)."""
    z1 = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    z2 = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    state = torch.full((5, 2) if bimodal else (5,), -math.inf, dtype=torch.float64)
    found = {}
    for subtract in (False, True):
        for value in ("surrogate", "objective"):
            loss, _ = sogclr_loss(
                z1,
                z2,
                log_average=state,
                temperature=0.3,
                gamma=1.0,
                bimodal=bimodal,
                subtract_positive=subtract,
                value=value,
            )
            found[subtract, value] = (loss, *torch.autograd.grad(loss, (z1, z2)))
    for value in ("surrogate", "objective"):
        for have, want in zip(found[False, value], found[True, value], strict=True):
            torch.testing.assert_close(have, want)
    # written out: cosines, the positive on the diagonal
    a, b = normalize(z1.detach(), dim=1), normalize(z2.detach(), dim=1)
    others = ~torch.eye(5, dtype=torch.bool)
    total = 0.0
    for i in range(5):
        keys = (
            [a @ b[i], b @ a[i]]
            if bimodal
            else [torch.cat([a[others[i]], b[others[i]]]) @ v for v in (a[i], b[i])]
        )
        for scores in keys:
            scores = scores[others[i]] if bimodal else scores
            total += 0.3 * ((scores - a[i] @ b[i]) / 0.3).exp().mean().log() / 5
    torch.testing.assert_close(found[True, "objective"][0].detach(), total)


def test_averages_of_two_anchors_cannot_overflow() -> None:
    # identical negatives at temperature 0.005: log s is about 400 above the positive of an opposite pair
    z1 = torch.tensor([[1.0, 0.0], [-1.0, 0.01], [-1.0, -0.01]])
    z2 = -z1
    states = [
        sogclr_loss(
            z1.to(d), z2.to(d), log_average=torch.full((3,), -math.inf, dtype=d), temperature=0.005, gamma=1.0
        )[1]
        for d in (torch.float32, torch.float64)
    ]
    assert states[1].log_average.max() > 300
    torch.testing.assert_close(states[0].log_average.double(), states[1].log_average, rtol=1e-5, atol=1e-4)


def test_a_constant_does_not_move_the_temperature() -> None:
    h = 1e-3 * torch.tensor([0.0, -0.5, -1.0, -2.0], dtype=torch.float64)
    t = kl_radius_temperature(h, 0.2)
    assert t < 2e-3
    torch.testing.assert_close(kl_radius_temperature(h + 40.0, 0.2), t, rtol=1e-6, atol=0.0)
