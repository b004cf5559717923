import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from telos.kernels.fused_linear import auto_chunk_size, fused_linear_rows, softmax_nll_


def problem(n: int = 11, dim: int = 4, classes: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((n, dim), (classes, dim), (classes,))
    )
    return x, weight, bias, torch.randn(n, generator=generator, dtype=torch.float64)


def formula(logits: Tensor, offset: Tensor) -> Tensor:
    return (logits.sin() * logits).sum(-1) * offset


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100, "auto"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_value_and_gradients_are_those_of_the_plain_expression(chunk_size, softcap, reduction) -> None:
    x, weight, bias, offset = problem()
    row_weight = torch.linspace(-1, 2, 11, dtype=torch.float64)
    logits = x @ weight.T + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain = row_weight * formula(logits, offset)
    fused = fused_linear_rows(
        x,
        weight,
        bias,
        formula,
        offset,
        row_weight=row_weight,
        softcap=softcap,
        chunk_size=chunk_size,
        reduction=reduction,
    )
    plain = plain.sum() if reduction == "sum" else plain
    cotangent = torch.randn_like(plain)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(plain, (x, weight, bias), cotangent)
    for got, want in zip(torch.autograd.grad(fused, (x, weight, bias), cotangent), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_second_backward_gives_the_same_gradients() -> None:
    x, weight, bias, offset = problem()
    total = fused_linear_rows(x, weight, bias, formula, offset, chunk_size=4)
    first = torch.autograd.grad(3 * total, (x, weight, bias), retain_graph=True)
    second = torch.autograd.grad(3 * total, (x, weight, bias))
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_a_parameter_of_the_formula_gets_its_gradient() -> None:
    x, weight, bias, offset = problem()
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def scaled(logits: Tensor, offset: Tensor) -> Tensor:
        return formula(scale * logits, offset)

    fused = fused_linear_rows(x, weight, bias, scaled, offset, parameters=(scale,), chunk_size=3)
    plain = scaled(x @ weight.T + bias, offset).sum()
    (got,), (want,) = torch.autograd.grad(fused, scale), torch.autograd.grad(plain, scale)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_rows_of_weight_zero_are_left_out() -> None:
    x, weight, bias, offset = problem()
    seen = []

    def counting(logits: Tensor, offset: Tensor) -> Tensor:
        seen.append(logits.shape[0])
        return formula(logits, offset)

    row_weight = torch.tensor([0, 1, 1, 0, 2, 0, 0, 1, 0, 1, 0], dtype=torch.float64)
    poisoned = x.detach().clone()
    poisoned[row_weight == 0] = torch.nan
    poisoned.requires_grad_()
    total = fused_linear_rows(poisoned, weight, bias, counting, offset, row_weight=row_weight, chunk_size=2)
    assert sum(seen) == 5
    plain = (row_weight * formula(x @ weight.T + bias, offset)).sum()
    got = torch.autograd.grad(total, (poisoned, weight, bias))
    for one, two in zip(got, torch.autograd.grad(plain, (x, weight, bias)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert (got[0][row_weight == 0] == 0).all()


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("frozen", "reduction", "products"),
    [
        ("", "sum", 3),
        ("x", "sum", 2),
        ("weight", "sum", 2),
        ("both", "sum", 1),
        ("", "none", 4),
        ("weight", "none", 3),
    ],
)
def test_products_that_nothing_asks_for_are_not_computed(frozen, reduction, products) -> None:
    x, weight, _, offset = problem()
    x.requires_grad_(frozen not in ("x", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    with Products() as counter:
        total = fused_linear_rows(x, weight, None, formula, offset, reduction=reduction).sum()
        if total.requires_grad:
            total.backward()
    assert counter.count == products


def test_without_gradients_only_the_forward_product_is_computed() -> None:
    x, weight, bias, offset = problem()
    with torch.no_grad(), Products() as counter:
        total = fused_linear_rows(x, weight, bias, formula, offset)
    assert counter.count == 1
    assert not total.requires_grad


def test_several_values_of_a_row() -> None:
    x, weight, bias, offset = problem()

    def two(logits: Tensor, offset: Tensor) -> Tensor:
        return torch.stack([formula(logits, offset), logits.square().mean(-1)], -1)

    fused = fused_linear_rows(x, weight, bias, two, offset, columns=2, reduction="none", chunk_size=4)
    plain = two(x @ weight.T + bias, offset)
    cotangent = torch.randn_like(plain)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad(plain, (x, weight), cotangent)
    for got, expected in zip(torch.autograd.grad(fused, (x, weight), cotangent), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_softmax_nll_at_extreme_logits() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [0.0, -200.0, 0.0], [1.0, 2.0, 3.0]])
    target = torch.tensor([1, 1, 2])
    leaf = logits.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
    (gradient,) = torch.autograd.grad(want.sum(), leaf)
    nll = softmax_nll_(logits, target)
    torch.testing.assert_close(nll.double(), want.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-6, atol=1e-6)


def test_second_derivatives_are_refused() -> None:
    x, weight, bias, offset = problem()
    for reduction in ("sum", "none"):
        total = fused_linear_rows(x, weight, bias, formula, offset, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(total, x, create_graph=True)


def test_auto_chunks_stay_within_their_bounds() -> None:
    for rows in (1, 7, 512, 4096, 65536):
        for classes in (2, 1000, 50257, 128256, 10**7):
            size = auto_chunk_size(rows, classes)
            assert 1 <= size <= rows
            # 32 rows of logits are smaller than the weight of any layer with more than 32 inputs
            assert size <= 32 or size * classes <= 2**23
    assert auto_chunk_size(0, 5) == 1


@pytest.mark.bare
def test_doors() -> None:
    x, weight, bias, offset = problem()
    with pytest.raises(ValueError, match="shapes"):
        fused_linear_rows(x, weight[:, :2], bias, formula, offset)
    with pytest.raises(ValueError, match="chunk_size must be 'auto' or at least 1, got 0"):
        fused_linear_rows(x, weight, bias, formula, offset, chunk_size=0)
    with pytest.raises(ValueError, match="columns needs"):
        fused_linear_rows(x, weight, bias, formula, offset, columns=2)
