"""The certified loss, its regularisers against their formulas, and golden values of the authors' code.

``FastIBPLoss`` takes a model where other losses take tensors, so that the generic conformance leaves it out: its
contracts are tested here.
"""

import ast
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from telos.losses import CrossEntropyLoss, Mixture, cross_entropy_loss, pgd_attack
from telos.losses.robust.ibp import (
    FastIBPLoss,
    certified_cross_entropy_loss,
    relu_balance_regularizer,
    tightness_regularizer,
)
from telos.losses.robust.interval import IntervalTensor, margin_lower_bounds
from telos.optim.schedules import SmoothedEpsSchedule
from tests.declaration import Declaration, Inputs
from tests.golden.adapters import Case, read_cases

GOLDEN = Path(__file__).parents[2] / "golden" / "fast_certified_ibp.json"


def sample(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    margins = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    weight = torch.rand(n, generator=generator, dtype=torch.float64)
    return {"margins": margins.to(dtype), "sample_weight": weight.to(dtype)}


declarations = [
    Declaration(
        certified_cross_entropy_loss, None, sample, differentiable=("margins",), rows=False, extreme="margins"
    ),
]


# ---------------------------------------------------------------------------------------------------- golden


def golden_fast_certified_ibp(case: Case) -> dict[str, Any]:
    params = case.params
    if params.get("function") == "smoothed_eps_schedule":
        schedule = SmoothedEpsSchedule(
            **{k: params[k] for k in ("eps_max", "batches_per_epoch", "start", "length", "mid", "beta")}
        )
        return {
            "eps_per_batch": [
                schedule(step) for step in range(params["epochs"] * params["batches_per_epoch"])
            ]
        }
    model, inputs, target = golden_network(case)
    box = IntervalTensor.around(
        inputs, params["eps"], (params["data_min"], params["data_max"]), relu_inputs=[]
    )
    logits = model(box)
    margins = margin_lower_bounds(logits, target)
    tolerance, layers = params["tol"], box.relu_inputs
    intensity = params["reg_lambda"] * (1 - params["eps_over_eps_max"])
    robust = certified_cross_entropy_loss(margins)
    tightness = tightness_regularizer(layers, box.radius.mean(), tolerance=tolerance)
    balance = relu_balance_regularizer(layers, tolerance=tolerance)
    total = robust + intensity * (tightness + balance)
    named = dict(model.named_parameters())
    slopes = torch.autograd.grad(total, list(named.values()))
    # the source adds up its regularisers, layer by layer, in float32
    rounded = {
        "loss_tightness": in_float32(
            [tightness_regularizer([layer], box.radius.mean(), tolerance=tolerance) for layer in layers]
        ),
        "loss_relu": in_float32([relu_balance_regularizer([layer], tolerance=tolerance) for layer in layers]),
    }
    torch.testing.assert_close(rounded["loss_tightness"].double(), tightness, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rounded["loss_relu"].double(), balance, rtol=1e-6, atol=1e-7)
    weighted = torch.zeros(())
    weighted += rounded["loss_tightness"]
    weighted += rounded["loss_relu"]
    weighted *= intensity
    return {
        "clean_logits": logits.clean,
        "pre_relu_bounds": [{"lower": layer.lower, "upper": layer.upper} for layer in layers],
        "margin_lower_bounds": margins,
        "robust_loss": robust,
        **rounded,
        # logged by the source, no part of its loss
        "loss_std": in_float32([F.relu(tolerance - layer.centre.std()) / tolerance for layer in layers]),
        "reg_weighted": weighted,
        "total_loss": robust.double() + weighted,
        "grad_total": dict(zip(named, slopes, strict=True)),
    }


def in_float32(terms: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for term in terms:
        total += term.detach()
    total /= len(terms)
    return total


def golden_network(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(*map(layer, case.params["architecture"])).to(case.dtype)
    missing, unexpected = model.load_state_dict(case.inputs["state_dict"], strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    model.train(case.params["batchnorm_training"])
    return model, case.inputs["x"], case.inputs["target"]


def layer(text: str) -> nn.Module:
    """A module from its ``repr``, without running any code of the file's."""
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Name)
    keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    return getattr(nn, call.func.id)(*map(ast.literal_eval, call.args), **keywords)


NETWORK_CASES = [case for case in read_cases(GOLDEN) if "architecture" in case.params]


@pytest.mark.parametrize("case", NETWORK_CASES, ids=lambda case: case.name)
def test_the_loss_is_the_sum_of_its_golden_parts(case: Case) -> None:
    params = case.params
    loss = FastIBPLoss(
        params["eps"] / params["eps_over_eps_max"],
        params["reg_lambda"],
        params["tol"],
        bounds=(params["data_min"], params["data_max"]),
    )
    model, inputs, target = golden_network(case)
    value = loss(model, inputs, target, eps=params["eps"])
    assert value.item() == pytest.approx(case.expected["total_loss"], rel=1e-6)
    value.backward()
    for name, parameter in model.named_parameters():
        want = torch.tensor(case.expected["grad_total"][name], dtype=torch.float64)
        torch.testing.assert_close(parameter.grad, want, rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------ certified cross-entropy


def test_margins_of_logits_give_their_cross_entropy() -> None:
    logits = 3 * torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 4, 2, 2, 1, 3])
    margins = margin_lower_bounds(IntervalTensor(logits, logits), target)
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            certified_cross_entropy_loss(margins, reduction=reduction),
            F.cross_entropy(logits, target, reduction=reduction),
        )


def test_weights_and_masks_of_rows() -> None:
    margins = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [-1.0, 3.0]], requires_grad=True)
    weight = torch.tensor([1.0, 0.0, 3.0])
    values = certified_cross_entropy_loss(margins.detach()[[0, 2]], reduction="none")
    loss = certified_cross_entropy_loss(margins, sample_weight=weight)
    torch.testing.assert_close(loss, (values[0] + 3 * values[1]) / 4)
    loss.backward()
    assert torch.equal(margins.grad[1], torch.zeros(2))
    halved = certified_cross_entropy_loss(margins, sample_weight=weight, denominator=8.0)
    torch.testing.assert_close(halved, loss / 2)


@pytest.mark.bare
def test_a_second_class_is_needed() -> None:
    with pytest.raises(ValueError, match="at least one other class"):
        certified_cross_entropy_loss(torch.zeros(3, 0))


# ------------------------------------------------------------------------------------------------ regularisers


def boxes(seed: int = 0, shift: float = 0.0) -> list[IntervalTensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in ((6, 7), (6, 3, 4)):
        centre = torch.randn(shape, dtype=torch.float64, generator=generator) + shift
        radius = torch.rand(shape, dtype=torch.float64, generator=generator)
        found.append(IntervalTensor(centre - radius, centre + radius))
    return found


def plain_balance(box: IntervalTensor, tolerance: float) -> float:
    """The formula with Python numbers, unit by unit."""
    lower, upper = box.lower.flatten().tolist(), box.upper.flatten().tolist()
    centre = [(lo + up) / 2 for lo, up in zip(lower, upper, strict=True)]
    mean = math.fsum(centre) / len(centre)
    active = [c for c, lo in zip(centre, lower, strict=True) if lo > 0]
    inactive = [c for c, up in zip(centre, upper, strict=True) if up < 0]

    def fold(ratio: float) -> float:
        return min(ratio, 1 / max(ratio, 1e-12))

    ratios = (
        math.fsum(active) / -math.fsum(inactive),
        math.fsum((c - mean) ** 2 for c in active) / math.fsum((c - mean) ** 2 for c in inactive),
    )
    return sum(max(0.0, tolerance - fold(ratio)) / tolerance for ratio in ratios)


@pytest.mark.parametrize("shift", [-0.8, 0.0, 0.7])
@pytest.mark.parametrize("tolerance", [0.5, 1.0])
def test_balance_equals_its_formula(shift: float, tolerance: float) -> None:
    layers = boxes(1, shift)
    want = sum(plain_balance(box, tolerance) for box in layers) / 2
    assert relu_balance_regularizer(layers, tolerance=tolerance).item() == pytest.approx(want, rel=1e-12)
    if tolerance == 1.0:
        assert want > 0


def test_balance_does_not_see_a_change_of_scale_or_of_sign() -> None:
    layers = boxes(2, 0.7)
    value = relu_balance_regularizer(layers)
    assert value > 0
    scaled = [IntervalTensor(3 * box.lower, 3 * box.upper) for box in layers]
    torch.testing.assert_close(relu_balance_regularizer(scaled), value)
    mirrored = [IntervalTensor(-box.upper, -box.lower) for box in layers]
    torch.testing.assert_close(relu_balance_regularizer(mirrored), value)


def test_layers_without_active_or_inactive_units() -> None:
    def layer(*centres: float) -> IntervalTensor:
        centre = torch.tensor([centres], requires_grad=True)
        return IntervalTensor(centre - 0.5, centre + 0.5)

    def value(*layers: IntervalTensor) -> float:
        return relu_balance_regularizer(layers).item()

    # no active unit: both ratios are 0 and count in full, without a gradient
    dead = layer(-1.0, -3.0, 0.0)
    assert value(dead) == pytest.approx(2.0)
    # no inactive unit, or neither: left out of the sum, but not of the number of layers
    assert value(layer(1.0, 3.0, 0.0)) == 0
    assert value(layer(0.0, 0.1, -0.1)) == 0
    assert value(dead, layer(1.0, 2.0, 3.0)) == pytest.approx(1.0)
    # no active unit, and one inactive unit at the mean of the centres: 0 / 0 in the second ratio
    assert value(layer(-1.0)) == 0
    # R_mean = 1/4, R_var = 1
    assert value(layer(1.0, -1.0, -3.0)) == pytest.approx(0.5)
    # the only inactive unit lies at the mean: R_var is infinite, folds to 0 and counts in full; R_mean = 1
    centre, radius = torch.tensor([[1.0, -1.0, -3.0]], requires_grad=True), torch.tensor([[0.5, 0.5, 4.0]])
    loss = relu_balance_regularizer([IntervalTensor(centre - radius, centre + radius)])
    assert loss.item() == pytest.approx(1.0)
    loss.backward()
    assert torch.isfinite(centre.grad).all()
    for centres in ((-1.0, -3.0, 0.0), (1.0, 3.0), (0.0, 0.1), (-1.0,), (2.0, -0.6, -1.4, 0.0), (0.0, 0.0)):
        centre = torch.tensor([centres], requires_grad=True)
        relu_balance_regularizer([IntervalTensor(centre - 0.5, centre + 0.5)]).backward()
        assert torch.isfinite(centre.grad).all()


def test_tightness_equals_its_formula() -> None:
    layers = boxes(3)
    widths = [((box.upper - box.lower) / 2).mean() for box in layers]
    for input_radius in (0.01, 0.2, 10.0):
        want = sum(max(0.0, 0.5 - input_radius / width.item()) / 0.5 for width in widths) / 2
        found = tightness_regularizer(layers, input_radius)
        assert found.item() == pytest.approx(want, rel=1e-12, abs=1e-15)
    # a box of no width does not divide by zero
    point = IntervalTensor(torch.zeros(2, 3), torch.zeros(2, 3))
    assert tightness_regularizer([point], 0.1) == 0
    assert tightness_regularizer([point], torch.tensor(0.0)) == 1


def test_gradients_of_the_regularisers() -> None:
    centre = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.6
    radius = 0.3 + torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

    def both(centre: Tensor, radius: Tensor) -> Tensor:
        box = IntervalTensor(centre - radius, centre + radius)
        return torch.stack([tightness_regularizer([box], 0.1), relu_balance_regularizer([box])])

    assert (both(centre, radius) > 0).all()
    assert torch.autograd.gradcheck(both, (centre.requires_grad_(), radius.requires_grad_()))


@pytest.mark.bare
def test_doors_of_the_regularisers() -> None:
    for call in (lambda: tightness_regularizer([], 0.1), lambda: relu_balance_regularizer([])):
        with pytest.raises(ValueError, match="at least one box"):
            call()
    with pytest.raises(ValueError, match="tolerance"):
        relu_balance_regularizer(boxes(), tolerance=0.0)


# --------------------------------------------------------------------------------------------------- the loss


def problem(batch_norm: bool = True, n: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norms = [nn.BatchNorm1d(9), nn.BatchNorm1d(8)] if batch_norm else [nn.Identity(), nn.Identity()]
        model = nn.Sequential(
            *(nn.Linear(6, 9), norms[0], nn.ReLU(), nn.Linear(9, 8), norms[1], nn.ReLU(), nn.Linear(8, 3))
        ).double()
        return model, torch.rand(n, 6, dtype=torch.float64), torch.randint(3, (n,))


def test_it_bounds_the_loss_at_every_attack() -> None:
    model, inputs, target = problem(batch_norm=False)
    base = CrossEntropyLoss(reduction="none")
    certified = FastIBPLoss(0.1, bounds=(0.0, 1.0))(model, inputs, target)
    attacked = pgd_attack(
        lambda points: base(model(points), target).sum(), inputs, radius=0.1, bounds=(0.0, 1.0), start="zero"
    )
    assert certified > base(model(attacked), target).mean() > base(model(inputs), target).mean()


def test_terms_and_their_weights_over_the_warm_up() -> None:
    model, inputs, target = problem()
    loss = FastIBPLoss(0.2, 0.5, 0.75, bounds=(0.0, 1.0))
    clean = cross_entropy_loss(copy.deepcopy(model)(inputs), target)
    start = loss.terms(copy.deepcopy(model), inputs, target, eps=0.0)
    torch.testing.assert_close(start["certified_cross_entropy"], clean)
    collected: list[IntervalTensor] = []
    box = IntervalTensor.around(inputs, 1e-6, (0.0, 1.0), relu_inputs=collected)
    copy.deepcopy(model)(box)
    torch.testing.assert_close(
        start["tightness"], tightness_regularizer(collected, box.radius.mean(), tolerance=0.75)
    )
    torch.testing.assert_close(start["relu_balance"], relu_balance_regularizer(collected, tolerance=0.75))
    for eps, intensity in ((0.0, 0.5), (0.05, 0.375), (0.15, 0.125), (0.2, 0.0), (None, 0.0)):
        found = loss.terms(copy.deepcopy(model), inputs, target, eps=eps)
        want = found["certified_cross_entropy"]
        if intensity:
            want = want + intensity * (found["tightness"] + found["relu_balance"])
        else:
            assert sorted(found) == ["certified_cross_entropy"]
        torch.testing.assert_close(loss(copy.deepcopy(model), inputs, target, eps=eps), want)


def test_without_weight_and_radius_it_is_cross_entropy_of_any_model() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).double()
    _, inputs, target = problem()
    loss = FastIBPLoss(0.2, regularization=0.0)(model, inputs, target, eps=0.0)
    torch.testing.assert_close(loss, F.cross_entropy(model(inputs), target))
    with pytest.raises(NotImplementedError, match="gelu"):
        FastIBPLoss(0.2)(model, inputs, target)


def test_scaled_inputs_are_boxed_in_their_own_unit() -> None:
    """Dividing the channels by std, with the first layer and the bounds to match, changes the bounds not at all."""
    model, inputs, target = problem(batch_norm=False)
    std = torch.tensor([0.2, 0.5, 1.0, 2.0, 0.3, 0.7], dtype=torch.float64)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[0].weight.mul_(std)
    raw = FastIBPLoss(0.1, bounds=(0.0, 1.0))(model, inputs, target)
    loss = FastIBPLoss(0.1, bounds=(0.0, 1 / std), std=std)
    torch.testing.assert_close(loss(scaled, inputs / std, target), raw)
    assert dict(loss.named_buffers()).keys() == {"lowest", "highest", "std"}
    assert not loss.state_dict()


def test_weights_of_examples() -> None:
    model, inputs, target = problem(batch_norm=False)
    loss = FastIBPLoss(0.1)
    weight = torch.tensor([1.0] * 6 + [0.0] * 6, dtype=torch.float64)
    torch.testing.assert_close(
        loss(model, inputs, target, sample_weight=weight), loss(model, inputs[:6], target[:6])
    )
    for eps in (0.0, 0.1):
        whole = loss.terms(model, inputs, target, eps=eps)["certified_cross_entropy"]
        part = loss.terms(model, inputs, target, eps=eps, denominator=24.0)["certified_cross_entropy"]
        torch.testing.assert_close(part, whole / 2)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.2])
def test_an_empty_batch_is_zero_with_a_graph(eps: float) -> None:
    model, inputs, target = problem(batch_norm=False)
    loss = FastIBPLoss(0.2)(model, inputs[:0], target[:0], eps=eps)
    assert loss == 0
    loss.backward()
    assert all(not p.grad.any() for p in model.parameters())


def test_evaluation_mode_leaves_the_statistics_alone() -> None:
    model, inputs, target = problem()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    FastIBPLoss(0.2)(model, inputs, target, eps=0.1).backward()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    # each example stands alone then
    values = [FastIBPLoss(0.2)(model, inputs[i : i + 1], target[i : i + 1]) for i in range(len(target))]
    torch.testing.assert_close(torch.stack(values).mean(), FastIBPLoss(0.2)(model, inputs, target))


def test_it_trains_and_adds_up_with_other_losses() -> None:
    model, inputs, target = problem(n=32)
    loss = FastIBPLoss(0.02, bounds=(0.0, 1.0))
    schedule = SmoothedEpsSchedule(0.02, batches_per_epoch=10, start=2, length=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with torch.no_grad():
        start = loss(model, inputs, target)
    for step in range(120):
        optimizer.zero_grad()
        loss(model, inputs, target, eps=schedule(step)).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss(model, inputs, target) < 0.5 * start
    mixture = loss + 0.5 * FastIBPLoss(0.01, bounds=(0.0, 1.0))
    assert isinstance(mixture, Mixture)
    model.eval()
    want = loss(model, inputs, target) + 0.5 * FastIBPLoss(0.01, bounds=(0.0, 1.0))(model, inputs, target)
    torch.testing.assert_close(mixture(model, inputs, target), want)


def test_memory_grows_with_the_batch_alone() -> None:
    """The largest tensor of a step has as many entries as the batch has, for 4 and for 8 times the examples."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for part in result if isinstance(result, tuple | list) else (result,):
                if isinstance(part, Tensor):
                    self.entries = max(self.entries, part.numel())
            return result

    def largest(n: int) -> int:
        model, inputs, target = problem(n=n)
        with Largest() as watch:
            FastIBPLoss(0.2)(model, inputs, target, eps=0.1).backward()
        return watch.entries

    assert largest(256) == 2 * largest(128)


@pytest.mark.bare
def test_compiles_to_one_graph() -> None:
    model, inputs, target = problem()
    model.eval()
    loss = FastIBPLoss(0.2, bounds=(0.0, 1.0))

    def value(points: Tensor) -> Tensor:
        return loss(model, points, target, eps=0.1)

    compiled = torch.compile(value, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs), value(inputs))


@pytest.mark.bare
def test_doors_of_the_loss() -> None:
    model, inputs, target = problem(batch_norm=False)
    for build, match in (
        (lambda: FastIBPLoss(0.0), "eps_max"),
        (lambda: FastIBPLoss(0.1, -1.0), "regularization"),
        (lambda: FastIBPLoss(0.1, tolerance=0.0), "tolerance"),
        (lambda: FastIBPLoss(0.1, tolerance=1.5), "tolerance"),
        (lambda: FastIBPLoss(0.1, min_eps=0.0), "min_eps"),
        (lambda: FastIBPLoss(0.1, bounds=(1.0, 0.0)), "bounds"),
        (lambda: FastIBPLoss(0.1, std=torch.tensor([1.0, 0.0])), "std"),
        (lambda: FastIBPLoss(0.1)(model, inputs, target, eps=0.2), "eps must lie in"),
        (lambda: FastIBPLoss(0.1)(model, inputs, target, eps=-0.1), "eps must lie in"),
        (lambda: FastIBPLoss(0.1, bounds=(0.0, 0.5))(model, inputs, target), "within bounds"),
    ):
        with pytest.raises(ValueError, match=match):
            build()
    with pytest.raises(TypeError, match="box"):
        FastIBPLoss(0.1)(lambda box: box.lower, inputs, target)
