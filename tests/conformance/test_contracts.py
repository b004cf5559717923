"""The contracts that every public loss keeps, checked from its one declaration."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import telos.losses
from telos.losses._algebra import call_keywords
from tests.conformance.collect import all_declarations, batched, build, call, callables, draw, floating
from tests.declaration import Declaration, Inputs

DECLARATIONS = all_declarations()
WITH_MODULE = [d for d in DECLARATIONS if d.module is not None]
WITH_FUNCTION = [d for d in DECLARATIONS if d.function is not None]
ROWS = [d for d in WITH_MODULE if d.rows]
CLASSIFICATION = [d for d in WITH_MODULE if getattr(build(d), "family", "") == "classification"]
LABELLED = [d for d in CLASSIFICATION if not draw(d, 2)["target"].is_floating_point()]
STATEFUL = [d for d in WITH_MODULE if d.state]

# Public names that no declaration covers, and why.
EXEMPT = {
    "Loss": "the base of all losses; computes nothing",
    "ClassificationLoss": "the base of the family; its formula is its subclass's",
    "Mixture": "holds other losses; tests/losses/test_algebra.py",
    "LinearLoss": "another call, (x, weight, target), around every declared loss; test_fused.py",
    "linear_loss": "the function of LinearLoss",
    "FastIBPLoss": "takes a model, not tensors; tests/losses/robust/test_ibp.py",
    "CAdvULLoss": "takes a model, not tensors; tests/losses/robust/test_continuous_adversarial.py",
    "CAdvIPOLoss": "takes a model, not tensors; tests/losses/robust/test_continuous_adversarial.py",
    "AdversarialLoss": "takes a model, not tensors; tests/losses/robust/test_attacks.py",
}


def each(declarations: list[Declaration]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("declaration", declarations, ids=lambda d: d.name)


def with_gradient(inputs: Inputs, names: tuple[str, ...]) -> Inputs:
    return {k: v.clone().requires_grad_() if k in names else v for k, v in inputs.items()}


def gradients(declaration: Declaration, target: object, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and its gradients with respect to the differentiable inputs that the target takes."""
    inputs = with_gradient(inputs, declaration.differentiable)
    loss = call(target, inputs)
    accepted = call_keywords(target) if isinstance(target, nn.Module) else None
    names = [n for n in declaration.differentiable if accepted is None or n in accepted]
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, [inputs[n] for n in names]), strict=True))


# ---------------------------------------------------------------------------------------------- declared


def test_every_public_loss_is_declared() -> None:
    declared = {d.function for d in DECLARATIONS} | {type(build(d)) for d in WITH_MODULE}
    missing = [
        name
        for name in telos.losses.__all__
        if (name.endswith("Loss") or name.endswith("_loss"))
        and name not in EXEMPT
        and getattr(telos.losses, name) not in declared
    ]
    assert missing == [], "a public loss needs a Declaration in its test file"


@each([d for d in WITH_MODULE if d.function is not None])
def test_function_and_module_share_names_and_defaults(declaration: Declaration) -> None:
    module = build(declaration)
    called = set(inspect.signature(module.rows if declaration.rows else module.forward).parameters)
    called |= set(inspect.signature(module.forward).parameters) | set(declaration.state)
    called |= {name for name, _ in module.named_parameters()} | set(declaration.function_only)
    function = {
        name: parameter.default
        for name, parameter in inspect.signature(declaration.function).parameters.items()
        if name not in called
    }
    constructor = {
        name: parameter.default
        for name, parameter in inspect.signature(type(module)).parameters.items()
        if name not in declaration.module_only
    }
    assert function == constructor
    assert all(hasattr(module, name) for name in constructor), "the module keeps what it was given, by name"


@each(WITH_MODULE)
def test_space_names_hyper_parameters(declaration: Declaration) -> None:
    module = build(declaration)
    parameters = inspect.signature(type(module)).parameters
    for name, span in type(module).space.items():
        assert name in parameters, f"{name} is not a constructor argument"
        assert span.at(0.0) != span.at(0.999), f"the range of {name} is a point"


@each([d for d in WITH_MODULE if d.function is not None and not d.state])
def test_module_equals_function(declaration: Declaration) -> None:
    inputs = draw(declaration, 6)
    torch.testing.assert_close(call(build(declaration, inputs), inputs), call(declaration.function, inputs))


# ---------------------------------------------------------------------------------------------- doors


@pytest.mark.bare
@each(DECLARATIONS)
def test_wrong_dtype_names_the_argument(declaration: Declaration) -> None:
    inputs = draw(declaration, 6)
    for kind, target in callables(declaration, inputs):
        for name in declaration.differentiable:
            if kind == "module" and name not in (call_keywords(target) or (name,)):
                continue
            with pytest.raises(TypeError, match=name):
                call(target, {**inputs, name: inputs[name].long()})


@pytest.mark.bare
@each(DECLARATIONS)
def test_wrong_shape_names_an_argument(declaration: Declaration) -> None:
    inputs = draw(declaration, 6)
    names = batched(declaration, inputs, 6)
    for kind, target in callables(declaration, inputs):
        accepted = (call_keywords(target) if kind == "module" else None) or tuple(inputs)
        for name in names:
            if name in accepted:
                with pytest.raises(ValueError, match="|".join(names)):
                    call(target, {**inputs, name: inputs[name][:-1]})


@pytest.mark.bare
@each(LABELLED)
def test_label_out_of_range_is_refused(declaration: Declaration) -> None:
    inputs = draw(declaration, 6)
    bad = inputs["target"].clone()
    bad[2] = inputs["logits"].shape[-1]
    with pytest.raises(ValueError, match="target must lie in"):
        call(build(declaration, inputs), {**inputs, "target": bad})


@pytest.mark.bare
@each(DECLARATIONS)
def test_unknown_reduction_is_refused(declaration: Declaration) -> None:
    inputs = draw(declaration, 6)
    if declaration.function is not None:
        with pytest.raises(ValueError, match="reduction"):
            declaration.function(**inputs, reduction="average")


@each(DECLARATIONS)
def test_too_few_examples(declaration: Declaration) -> None:
    """An empty batch is 0 with a graph, or a clear error where the loss is not defined."""
    for n in range(declaration.minimum):
        inputs = draw(declaration, n)
        for _, target in callables(declaration, inputs):
            with pytest.raises(ValueError, match=r"at least|needs"):
                call(target, inputs)
    if declaration.minimum == 0:
        inputs = draw(declaration, 0)
        for _, target in callables(declaration, inputs):
            loss, slopes = gradients(declaration, target, inputs)
            assert loss == 0
            assert all(slope.shape == inputs[name].shape for name, slope in slopes.items())
            assert all(torch.count_nonzero(slope) == 0 for slope in slopes.values())


# ---------------------------------------------------------------------------------------------- gradient


@each([d for d in WITH_FUNCTION if not d.surrogate and not d.kinks])
def test_gradient_is_that_of_the_value(declaration: Declaration) -> None:
    inputs = draw(declaration, 5)
    leaves = [inputs[name].clone().requires_grad_() for name in declaration.differentiable]

    def value(*tensors: Tensor) -> Tensor:
        return call(
            declaration.function, {**inputs, **dict(zip(declaration.differentiable, tensors, strict=True))}
        )

    assert torch.autograd.gradcheck(value, leaves)


@each([d for d in WITH_FUNCTION if d.kinks and not d.surrogate])
def test_gradient_lies_between_one_sided_derivatives(declaration: Declaration) -> None:
    inputs = draw(declaration, 5)
    _, slopes = gradients(declaration, declaration.function, inputs)
    step = 1e-6
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        ray = {n: torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in slopes.items()}

        def along(t: float, ray: dict[str, Tensor] = ray) -> Tensor:
            return call(declaration.function, {**inputs, **{n: inputs[n] + t * ray[n] for n in ray}})

        slope = sum((slopes[n] * ray[n]).sum() for n in ray)
        sides = sorted([((along(step) - along(0)) / step).item(), ((along(0) - along(-step)) / step).item()])
        assert sides[0] - 1e-5 <= slope <= sides[1] + 1e-5


@each(DECLARATIONS)
def test_equal_scores_have_a_finite_gradient(declaration: Declaration) -> None:
    """All inputs equal is where a norm, a standard deviation or a margin has no slope of its own."""
    inputs = draw(declaration, 6)
    constant = {name: torch.zeros_like(inputs[name]) for name in declaration.differentiable}
    for _, target in callables(declaration, inputs):
        loss, slopes = gradients(declaration, target, {**inputs, **constant})
        assert torch.isfinite(loss)
        assert all(torch.isfinite(slope).all() for slope in slopes.values())


# ---------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each(DECLARATIONS)
def test_half_precision_is_computed_in_float32(declaration: Declaration, dtype: torch.dtype) -> None:
    half = {
        name: value.to(dtype)
        if name not in declaration.state and name in floating(draw(declaration, 6))
        else value
        for name, value in draw(declaration, 6, dtype=torch.float32).items()
    }
    double = {name: value.double() if name in floating(half) else value for name, value in half.items()}
    for kind, target in callables(declaration, half):
        loss, slopes = gradients(declaration, target, half)
        assert loss.dtype == torch.float32
        assert all(slope.dtype == dtype for slope in slopes.values())
        reference = declaration.function if kind == "function" else build(declaration, double)
        exact, exact_slopes = gradients(declaration, reference, double)
        torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=2e-6)
        for name, slope in slopes.items():
            # the one rounding that is allowed is that of the result to the input's dtype
            torch.testing.assert_close(slope, exact_slopes[name].to(dtype), rtol=2e-2, atol=1e-4)


@each(DECLARATIONS)
def test_float64_stays_float64(declaration: Declaration) -> None:
    inputs = draw(declaration, 6)
    for _, target in callables(declaration, inputs):
        loss, slopes = gradients(declaration, target, inputs)
        assert loss.dtype == torch.float64
        assert all(slope.dtype == torch.float64 for slope in slopes.values())


@pytest.mark.parametrize("size", [30.0, 30000.0])
@each([d for d in DECLARATIONS if d.extreme])
def test_extreme_scores(declaration: Declaration, size: float) -> None:
    """Finite at +-30000, or +inf where the loss is declared super-linear; never NaN."""
    inputs = draw(declaration, 24, dtype=torch.float32)
    inputs = {**inputs, declaration.extreme: size * inputs[declaration.extreme].sign()}
    for _, target in callables(declaration, inputs):
        loss, slopes = gradients(declaration, target, inputs)
        if declaration.superlinear:
            assert torch.isfinite(loss) or loss == torch.inf
        else:
            assert torch.isfinite(loss)
            assert all(torch.isfinite(slope).all() for slope in slopes.values())


@each(DECLARATIONS)
def test_autocast_changes_nothing(declaration: Declaration) -> None:
    inputs = draw(declaration, 6, dtype=torch.float32)
    for _, target in callables(declaration, inputs):
        expected = call(target, inputs) if not declaration.state else None
        fresh = build(declaration, inputs) if isinstance(target, nn.Module) else target
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = call(fresh, inputs)
        assert loss.dtype == torch.float32
        if expected is not None:
            torch.testing.assert_close(loss, expected)


# ---------------------------------------------------------------------------------------------- invariance


@each([d for d in DECLARATIONS if not d.order_matters])
def test_order_of_the_batch_does_not_matter(declaration: Declaration) -> None:
    inputs = draw(declaration, 7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    names = batched(declaration, inputs, 7)
    permuted = {k: v[order] if k in names else v for k, v in inputs.items()}
    for _, target in callables(declaration, inputs):
        twin = build(declaration, inputs) if isinstance(target, nn.Module) else target
        loss, slopes = gradients(declaration, target, inputs)
        other, other_slopes = gradients(declaration, twin, permuted)
        torch.testing.assert_close(loss, other)
        for name in slopes:
            want = slopes[name][order] if name in names else slopes[name]
            torch.testing.assert_close(want, other_slopes[name])


@pytest.mark.parametrize(
    ("declaration", "invariance"),
    [(d, name) for d in WITH_FUNCTION for name in d.invariances],
    ids=lambda value: value.name if isinstance(value, Declaration) else value,
)
def test_declared_invariance(declaration: Declaration, invariance: str) -> None:
    for seed in range(3):
        inputs = draw(declaration, 6, seed=seed)
        moved = declaration.invariances[invariance](inputs)
        assert any(not torch.equal(inputs[name], moved[name]) for name in floating(inputs))
        torch.testing.assert_close(call(declaration.function, inputs), call(declaration.function, moved))


# ---------------------------------------------------------------------------------------------- torch


@pytest.mark.bare
@each([d for d in DECLARATIONS if not d.state and not d.no_compile])
def test_compiles_to_one_graph(declaration: Declaration) -> None:
    inputs = draw(declaration, 6, dtype=torch.float32)
    for _, target in callables(declaration, inputs):
        torch.compiler.reset()
        loss, slopes = gradients(declaration, target, inputs)
        compiled = torch.compile(_positional(target, inputs), fullgraph=True, backend="aot_eager")
        leaves = with_gradient(inputs, declaration.differentiable)
        result = compiled(leaves)
        torch.testing.assert_close(result.detach(), loss)
        result.backward()
        for name, slope in slopes.items():
            torch.testing.assert_close(leaves[name].grad, slope)


def _positional(target: object, inputs: Inputs):
    accepted = call_keywords(target) if isinstance(target, nn.Module) else None
    names = [name for name in inputs if accepted is None or name in accepted]

    def run(values: Inputs) -> Tensor:
        result = target(**{name: values[name] for name in names})  # type: ignore[operator]
        return result[0] if isinstance(result, tuple) else result

    return run


@each([d for d in WITH_FUNCTION if not d.no_vmap])
def test_works_under_functional_transforms(declaration: Declaration) -> None:
    """vmap over a further leading axis, and grad inside it."""
    name = declaration.differentiable[0]
    inputs = draw(declaration, 5)
    stack = torch.stack([draw(declaration, 5, seed=seed)[name] for seed in range(3)])

    def value(tensor: Tensor) -> Tensor:
        return call(declaration.function, {**inputs, name: tensor})

    torch.testing.assert_close(torch.func.vmap(value)(stack), torch.stack([value(entry) for entry in stack]))
    slopes = torch.func.vmap(torch.func.grad(value))(stack)
    for entry, slope in zip(stack, slopes, strict=True):
        leaf = entry.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(value(leaf), leaf)[0], slope)


@each(DECLARATIONS)
def test_memory_layout_does_not_matter(declaration: Declaration) -> None:
    inputs = draw(declaration, 6)
    strided = {
        name: torch.stack([value, value], -1)[..., 0] if isinstance(value, Tensor) and value.ndim else value
        for name, value in inputs.items()
    }
    assert any(not value.is_contiguous() for value in strided.values() if isinstance(value, Tensor))
    for _, target in callables(declaration, inputs):
        twin = build(declaration, inputs) if isinstance(target, nn.Module) else target
        torch.testing.assert_close(call(target, inputs), call(twin, strided))


@each(WITH_MODULE)
def test_survives_copying_after_a_step(declaration: Declaration) -> None:
    inputs = draw(declaration, 6, dtype=torch.float32)
    module = build(declaration, inputs)
    call(module, with_gradient(inputs, declaration.differentiable)).backward()
    module.eval()
    expected = call(module, inputs)
    fresh = build(declaration)
    fresh.load_state_dict(module.state_dict())
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    torch.load(stored, weights_only=True)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh.eval()):
        torch.testing.assert_close(call(twin, inputs), expected)
    assert repr(module)


@each(DECLARATIONS)
def test_runs_on_the_meta_device(declaration: Declaration) -> None:
    inputs = draw(declaration, 6, dtype=torch.float32)
    meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    for _, target in callables(declaration, inputs):
        if isinstance(target, nn.Module):
            target.to("meta")
        loss = call(target, with_gradient(meta, declaration.differentiable))
        assert loss.device.type == "meta"
        loss.backward()


# ---------------------------------------------------------------------------------------------- state


@each(STATEFUL)
def test_state_moves_only_in_training_with_gradients(declaration: Declaration) -> None:
    inputs = draw(declaration, 6, dtype=torch.float32)
    module = build(declaration, inputs)

    def state() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in module.state_dict().items()}

    def unchanged(before: dict[str, Tensor]) -> bool:
        return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    before = state()
    with torch.no_grad():
        call(module, inputs)
    assert unchanged(before), "without gradients"
    module.eval()
    call(module, inputs)
    assert unchanged(before), "in eval mode"
    module.train()
    call(module, inputs)
    assert not unchanged(before), "in training"
    module.half()
    assert all(v.dtype != torch.float16 for v in module.state_dict().values()), "memory keeps its precision"


# ---------------------------------------------------------------------------------------------- cost


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                # an expanded tensor has more elements than numbers in memory
                stored = tensor.untyped_storage().nbytes() // tensor.itemsize
                self.elements = max(self.elements, min(tensor.numel(), stored))
        return result


@each(DECLARATIONS)
def test_largest_intermediate_grows_as_declared(declaration: Declaration) -> None:
    sizes = []
    for n in (64, 256):
        inputs = draw(declaration, n, dtype=torch.float32)
        target = declaration.function if declaration.function is not None else build(declaration, inputs)
        with LargestTensor() as largest:
            call(target, with_gradient(inputs, declaration.differentiable)).backward()
        sizes.append(largest.elements)
    assert sizes[1] <= 1.05 * sizes[0] * 4**declaration.growth


# ---------------------------------------------------------------------------------------------- rows and weights


@each(ROWS)
def test_rows_reduce_to_the_loss(declaration: Declaration) -> None:
    inputs = draw(declaration, 6)
    accepted = call_keywords(build(declaration)) or frozenset(inputs)
    taken = {k: v for k, v in inputs.items() if k in accepted}
    values, weights = build(declaration, inputs).rows(**taken)
    assert values.shape == weights.shape
    loss = call(build(declaration, inputs), inputs)
    torch.testing.assert_close((weights * values).sum() / weights.sum(), loss)
    again = build(declaration, inputs)
    again.reduction = "none"
    torch.testing.assert_close(call(again, inputs), weights * values)
    again = build(declaration, inputs)
    again.reduction = "sum"
    torch.testing.assert_close(call(again, inputs), (weights * values).sum())
    accumulated = build(declaration, inputs)(**taken, denominator=10.0)
    torch.testing.assert_close(accumulated, (weights * values).sum() / 10)


@each([d for d in CLASSIFICATION if not d.order_matters])
def test_a_row_of_weight_zero_does_not_exist(declaration: Declaration) -> None:
    """Not even if it holds NaN: by ignore_index and by sample_weight, exactly zero gradient."""
    inputs = draw(declaration, 6)
    kept = torch.tensor([True, True, False, True, True, True])
    names = batched(declaration, inputs, 6)
    without = {k: v[kept] if k in names else v for k, v in inputs.items()}
    poisoned = {**inputs}
    for name in floating(inputs):
        if name in names:
            poisoned[name] = torch.where(
                kept.reshape(-1, *[1] * (inputs[name].ndim - 1)),
                inputs[name],
                torch.full_like(inputs[name], torch.nan),
            )
    ways = [{**poisoned, "sample_weight": kept.double()}]
    if not inputs["target"].is_floating_point():
        ways.append({**poisoned, "target": torch.where(kept, inputs["target"], -100)})
    for inputs_with_hole in ways:
        loss, slopes = gradients(declaration, build(declaration, inputs), inputs_with_hole)
        expected, expected_slopes = gradients(declaration, build(declaration, inputs), without)
        torch.testing.assert_close(loss, expected)
        for name, slope in slopes.items():
            assert torch.count_nonzero(slope[~kept]) == 0
            torch.testing.assert_close(slope[kept], expected_slopes[name])


@each([d for d in CLASSIFICATION if not d.order_matters])
def test_a_weight_of_two_is_a_row_twice(declaration: Declaration) -> None:
    inputs = draw(declaration, 6)
    weight = torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    names = batched(declaration, inputs, 6)
    repeated = {k: v.repeat_interleave(weight.long(), 0) if k in names else v for k, v in inputs.items()}
    loss = call(build(declaration, inputs), {**inputs, "sample_weight": weight})
    torch.testing.assert_close(loss, call(build(declaration, inputs), repeated))


@each(CLASSIFICATION)
def test_nan_in_a_row_that_counts_is_seen(declaration: Declaration) -> None:
    inputs = draw(declaration, 6)
    name = declaration.extreme or "logits"  # what the loss is computed from
    bad = inputs[name].clone()
    bad[0, 0] = torch.nan
    assert torch.isnan(call(build(declaration, inputs), {**inputs, name: bad}))


@each(LABELLED)
def test_class_weight_follows_torch(declaration: Declaration) -> None:
    """With labels a class weight is a weight of the row, and enters the denominator."""
    inputs = draw(declaration, 8)
    class_weight = torch.linspace(0.5, 2.0, inputs["logits"].shape[-1], dtype=torch.float64)
    module = build(declaration, inputs)
    module.class_weight = class_weight
    by_class = call(module, inputs)
    by_row = call(build(declaration, inputs), {**inputs, "sample_weight": class_weight[inputs["target"]]})
    torch.testing.assert_close(by_class, by_row)


@each(WITH_MODULE)
def test_losses_of_a_family_add_up(declaration: Declaration) -> None:
    inputs = draw(declaration, 6)
    single = call(build(declaration, inputs), inputs)
    mixture = build(declaration, inputs) + 0.5 * build(declaration, inputs)
    torch.testing.assert_close(call(mixture, inputs), 1.5 * single)
