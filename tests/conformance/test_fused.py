"""Every declared loss on labels and logits keeps its contracts when it is fused with an output layer, or is refused.

The declarations are those of the losses themselves, so that a new loss is checked here as well.
"""

import inspect

import pytest
import torch
from torch import Tensor

from telos.losses import CrossEntropyLoss, LinearLoss, linear_loss
from telos.losses._algebra import call_keywords
from tests.conformance.collect import all_declarations, build, draw
from tests.conformance.test_contracts import LargestTensor
from tests.declaration import Declaration, Inputs

DECLARATIONS = [
    d
    for d in all_declarations()
    if d.module is not None and getattr(build(d), "family", "") == "classification"
]
LAYER = ("x", "weight", "bias")
CHUNK = 3


def reason_against(declaration: Declaration) -> tuple[type[Exception], str] | None:
    """Why a loss cannot be fused: it couples the examples, or wants more than one row of logits."""
    if not declaration.rows:
        return TypeError, "couples the examples"
    further = build(declaration).needs - {"index"}
    return (ValueError, f"needs {', '.join(sorted(further))}") if further else None


FUSED = [d for d in DECLARATIONS if reason_against(d) is None]
each = pytest.mark.parametrize("declaration", FUSED, ids=lambda d: d.name)
on_labels = pytest.mark.parametrize(
    "declaration", [d for d in FUSED if not draw(d, 1)["target"].is_floating_point()], ids=lambda d: d.name
)


def problem(declaration: Declaration, n: int = 8, dtype: torch.dtype = torch.float64, dim: int = 4) -> Inputs:
    """An output layer in front of a loss: n rows, and the sample's target and index."""
    sample = draw(declaration, n, dtype=dtype)
    accepted = call_keywords(build(declaration)) or frozenset()
    classes, generator = sample.pop("logits").shape[-1], torch.Generator().manual_seed(1)
    layer = {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in zip(LAYER, ((n, dim), (classes, dim), (classes,)), strict=True)
    }
    return {**layer, **{name: value for name, value in sample.items() if name in accepted}}


def with_gradients(inputs: Inputs) -> Inputs:
    return {
        name: value.clone().requires_grad_() if name in LAYER else value for name, value in inputs.items()
    }


def fused(declaration: Declaration, inputs: Inputs, reduction: str = "mean", **options: object) -> Tensor:
    module = LinearLoss(build(declaration), chunk_size=CHUNK, reduction=reduction)
    return module.to(inputs["x"].device)(**inputs, **options)


def plain(declaration: Declaration, inputs: Inputs, reduction: str = "mean", **options: object) -> Tensor:
    module = build(declaration)
    module.reduction = reduction
    rest = {name: value for name, value in inputs.items() if name not in LAYER}
    return module(inputs["x"] @ inputs["weight"].T + inputs["bias"], **rest, **options)


def gradients(value: Tensor, inputs: Inputs, names: tuple[str, ...] = LAYER) -> dict[str, Tensor]:
    cotangent = torch.linspace(1, 2, max(value.numel(), 1), dtype=value.dtype)[: value.numel()]
    found = torch.autograd.grad(value, [inputs[name] for name in names], cotangent.reshape(value.shape))
    return dict(zip(names, found, strict=True))


def assert_same(value: Tensor, inputs: Inputs, want: Tensor, wanted: Inputs) -> None:
    torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10)
    found, expected = gradients(value, inputs), gradients(want, wanted)
    for name in LAYER:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---------------------------------------------------------------------------------------------- which


@pytest.mark.parametrize("declaration", [d for d in DECLARATIONS if reason_against(d)], ids=lambda d: d.name)
def test_what_cannot_be_fused_is_refused_with_the_reason(declaration: Declaration) -> None:
    reason = reason_against(declaration)
    assert reason is not None
    loss = build(declaration)
    with pytest.raises(
        reason[0], match=f"{type(loss).__name__} cannot be fused with a linear layer.*{reason[1]}"
    ):
        LinearLoss(loss)


def test_function_and_module_share_names_and_defaults() -> None:
    def defaults(*functions: object) -> Inputs:
        signatures = [inspect.signature(f).parameters.items() for f in functions]  # type: ignore[arg-type]
        return {n: p.default for signature in signatures for n, p in signature if n != "self"}

    assert defaults(linear_loss) == defaults(LinearLoss, LinearLoss.forward)


# ---------------------------------------------------------------------------------------------- value and gradient


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each
def test_equals_the_loss_of_the_logits(declaration: Declaration, reduction: str) -> None:
    inputs, others = (with_gradients(problem(declaration)) for _ in range(2))
    assert_same(fused(declaration, inputs, reduction), inputs, plain(declaration, others, reduction), others)


@each
def test_weights_of_examples_and_a_denominator(declaration: Declaration) -> None:
    inputs, others = (with_gradients(problem(declaration)) for _ in range(2))
    options = {"sample_weight": torch.linspace(0, 2, 8, dtype=torch.float64), "denominator": 5.0}
    assert_same(fused(declaration, inputs, **options), inputs, plain(declaration, others, **options), others)


@each
def test_inside_a_mixture(declaration: Declaration) -> None:
    inputs, others = (with_gradients(problem(declaration)) for _ in range(2))
    options = {"sample_weight": torch.linspace(0, 2, 8, dtype=torch.float64)}
    value = LinearLoss(build(declaration) + 0.5 * CrossEntropyLoss(), chunk_size=CHUNK)(**inputs, **options)
    logits = others["x"] @ others["weight"].T + others["bias"]
    second = CrossEntropyLoss()(logits, others["target"], **options)
    assert_same(value, inputs, plain(declaration, others, **options) + 0.5 * second, others)


@each
def test_memory_layout_does_not_matter(declaration: Declaration) -> None:
    inputs, others = (with_gradients(problem(declaration)) for _ in range(2))
    strided = {name: torch.stack([value, value], -1)[..., 0] for name, value in inputs.items()}
    strided["weight"] = inputs["weight"].T.contiguous().T
    assert not any(strided[name].is_contiguous() for name in ("x", "weight", "target"))
    assert_same(fused(declaration, strided), inputs, plain(declaration, others), others)


@each
def test_no_second_derivative(declaration: Declaration) -> None:
    inputs = with_gradients(problem(declaration))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fused(declaration, inputs), inputs["x"], create_graph=True)


@each
def test_gradients_only_for_those_that_ask(declaration: Declaration) -> None:
    inputs = problem(declaration)
    assert not fused(declaration, inputs).requires_grad
    with torch.no_grad():
        assert not fused(declaration, with_gradients(inputs)).requires_grad
    every = with_gradients(inputs)
    expected = gradients(fused(declaration, every), every)
    for name in LAYER:
        alone = {**inputs, name: inputs[name].clone().requires_grad_()}
        found = gradients(fused(declaration, alone), alone, (name,))
        torch.testing.assert_close(found[name], expected[name])


# ---------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each
def test_half_precision_is_summed_in_float32(declaration: Declaration, dtype: torch.dtype) -> None:
    half = with_gradients(problem(declaration, dtype=dtype))
    exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in half.items()}
    value = fused(declaration, half)
    assert value.dtype == torch.float32
    exact = with_gradients(exact)
    want = plain(declaration, exact)
    torch.testing.assert_close(value.double(), want, rtol=2e-5, atol=2e-6)
    expected = gradients(want, exact)
    for name, gradient in gradients(value, half).items():
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, expected[name].to(dtype), rtol=2e-2, atol=1e-4)


@each
def test_extreme_logits(declaration: Declaration) -> None:
    inputs = problem(declaration, n=24, dtype=torch.float32)
    logits = 30000 * draw(declaration, 24, dtype=torch.float32)["logits"].sign()
    inputs.update(x=logits, weight=torch.eye(logits.shape[-1]), bias=torch.zeros(logits.shape[-1]))
    inputs = with_gradients(inputs)
    value = fused(declaration, inputs)
    if declaration.superlinear:
        assert not value.isnan()
    else:
        assert value.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients(value, inputs).values())


@each
def test_equal_logits_have_a_finite_gradient(declaration: Declaration) -> None:
    inputs = problem(declaration)
    inputs = with_gradients(
        {**inputs, "weight": torch.zeros_like(inputs["weight"]), "bias": 0 * inputs["bias"]}
    )
    value = fused(declaration, inputs)
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(value, inputs).values())


# ---------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [0, 5])
@each
def test_where_nothing_counts_the_loss_is_zero_with_a_graph(
    declaration: Declaration, n: int, reduction: str
) -> None:
    inputs = problem(declaration, n)
    inputs["x"] = torch.full_like(inputs["x"], torch.nan)
    inputs = with_gradients(inputs)
    value = fused(declaration, inputs, reduction, sample_weight=torch.zeros(n, dtype=torch.float64))
    assert torch.count_nonzero(value) == 0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients(value, inputs).values())


@on_labels
def test_nan_in_an_ignored_row_reaches_nothing(declaration: Declaration) -> None:
    inputs, others = problem(declaration), with_gradients(problem(declaration))
    ignored = torch.tensor([False, True, False, False, True, False, False, False])
    target = torch.where(ignored, -100, inputs["target"])
    poisoned = with_gradients(
        {**inputs, "x": inputs["x"].masked_fill(ignored.unsqueeze(-1), torch.nan), "target": target}
    )
    clean = {**others, "target": target}
    assert_same(fused(declaration, poisoned), poisoned, plain(declaration, clean), clean)
    assert torch.count_nonzero(gradients(fused(declaration, poisoned), poisoned)["x"][ignored]) == 0


@each
def test_nan_in_a_row_that_counts_is_seen(declaration: Declaration) -> None:
    inputs = problem(declaration)
    inputs["x"][5, 0] = torch.nan
    assert fused(declaration, inputs).isnan()
    assert fused(declaration, inputs, "none").isnan().tolist() == [row == 5 for row in range(8)]


# ---------------------------------------------------------------------------------------------- torch and cost


@pytest.mark.parametrize("reduction", ["mean", "none"])
@each
def test_runs_on_the_meta_device(declaration: Declaration, reduction: str) -> None:
    inputs = {name: value.to("meta") for name, value in problem(declaration, dtype=torch.float32).items()}
    value = fused(declaration, with_gradients(inputs), reduction)
    assert value.device.type == "meta"
    value.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@on_labels
def test_the_logits_are_never_whole(declaration: Declaration, reduction: str) -> None:
    """No tensor that any operation returns is as large as they would be."""
    inputs = with_gradients(problem(declaration, n=64, dim=1))
    with LargestTensor() as largest:
        fused(declaration, inputs, reduction).sum().backward()
    assert largest.elements < 64 * inputs["weight"].shape[0]
