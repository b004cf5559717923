"""fused_linear_rows with half-precision operands in the products, which is how CUDA does it; here without kernels.

On the CPU a mixed product raises its operands, which gives the same numbers: half-precision products summed in float32.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.kernels import fused_linear
from telos.kernels.fused_linear import auto_chunk_size, fused_linear_rows, softmax_nll_
from tests.losses.test_linear import Peak

N, DIM, CLASSES = 23, 12, 31
HALF_ULP = torch.finfo(torch.bfloat16).eps / 2


@pytest.fixture(autouse=True)
def _mixed(monkeypatch) -> None:
    monkeypatch.setattr(fused_linear, "mixed_products", lambda tensor: True)


def problem(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((N, DIM), (CLASSES, DIM), (CLASSES,))
    )
    return x, weight, bias, torch.randint(CLASSES, (N,), generator=generator)


def formula(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def derivative(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    nll = softmax_nll_(logits, target)
    return nll, torch.ones_like(nll)


def errors(
    total: Tensor,
    row_weight: Tensor,
    inputs: tuple[Tensor, ...],
    factor: float = 1.0,
    softcap: float | None = None,
) -> list[float]:
    """Of the value and of every gradient, as a part of its norm, against float64."""
    x, weight, bias, target = inputs
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    logits = exact[0] @ exact[1].T + exact[2]
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    want = (row_weight.double() * formula(logits, target)).sum()
    found = [total.detach(), *torch.autograd.grad(factor * total, (x, weight, bias))]
    right = [want.detach(), *torch.autograd.grad(factor * want, exact)]
    assert all(got.dtype == tensor.dtype for got, tensor in zip(found[1:], (x, weight, bias), strict=True))
    return [
        float((got.double() - truth).norm() / truth.norm()) for got, truth in zip(found, right, strict=True)
    ]


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("how", [None, derivative])
@pytest.mark.parametrize("chunk_size", [4, "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_rounded(dtype, chunk_size, how, softcap) -> None:
    """Logits and values not at all; the gradient of the logits once, and every gradient once."""
    x, weight, bias, target = problem(dtype)
    row_weight = torch.linspace(0.1, 1, N) / N
    total = fused_linear_rows(
        x,
        weight,
        bias,
        formula,
        target,
        row_weight=row_weight,
        derivative=how,
        softcap=softcap,
        chunk_size=chunk_size,
    )
    assert total.dtype == torch.float32
    value, *gradients = errors(total, row_weight, (x, weight, bias, target), softcap=softcap)
    assert value < 1e-6
    assert max(gradients) < 1.5 * torch.finfo(dtype).eps / 2


def test_the_sum_over_chunks_is_in_float32() -> None:
    """Four hundred equal chunks: in bfloat16 the sum would stop growing at 256 times a chunk."""
    rows = 400
    x, weight = torch.ones(rows, 2).bfloat16(), torch.zeros(3, 2).bfloat16().requires_grad_()
    total = fused_linear_rows(x, weight, None, lambda logits: logits[:, 0] * 1.0, chunk_size=1)
    (gradient,) = torch.autograd.grad(total, weight)
    assert gradient[0, 0] == rows


def test_a_gradient_in_one_piece_is_scaled_in_float32(monkeypatch) -> None:
    """Written in bfloat16 by its product, and then multiplied by a number that bfloat16 does not have."""
    monkeypatch.setattr(fused_linear, "_UNSPLIT", 1)
    inputs = problem()
    row_weight = torch.full((N,), 1.0)
    total = fused_linear_rows(*inputs[:3], formula, inputs[3])
    # a third rounded to bfloat16 is off by 1e-3, in every entry alike
    _, *gradients = errors(total, row_weight, inputs, factor=1 / 3)
    assert max(gradients) < 2 * HALF_ULP
    _, scaled, _, _ = (
        0,
        *torch.autograd.grad(fused_linear_rows(*inputs[:3], formula, inputs[3]) / 3, inputs[:3]),
    )
    whole = torch.autograd.grad(fused_linear_rows(*inputs[:3], formula, inputs[3]), inputs[0])[0]
    torch.testing.assert_close(scaled, (whole.float() / 3).bfloat16(), rtol=0, atol=0)


def test_float16_holds_the_gradients_of_a_mean_over_many_rows() -> None:
    """1 / N = 1e-9 times the probabilities is 0 in float16; it is taken out and comes back with the loss scale."""
    inputs = problem(torch.float16)
    row_weight = torch.full((N,), 1e-9)
    total = fused_linear_rows(*inputs[:3], formula, inputs[3], row_weight=row_weight, chunk_size=5)
    _, *gradients = errors(total, row_weight, inputs, factor=2.0**24)
    assert max(gradients) < 1e-3


def test_float16_without_any_weight_and_with_none() -> None:
    x, weight, bias, target = problem(torch.float16)
    total = fused_linear_rows(x, weight, bias, formula, target, row_weight=torch.zeros(N))
    for gradient in torch.autograd.grad(total, (x, weight, bias)):
        assert (gradient == 0).all()
    values = fused_linear_rows(x, weight, bias, formula, target, reduction="none", chunk_size=5)
    for gradient in torch.autograd.grad(values, (x, weight, bias), torch.zeros(N)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_gradient_that_is_one_number_seen_many_times(reduction) -> None:
    """That of a sum, which autograd gives as an expanded tensor; under a softcap it is multiplied."""
    x, weight, bias, _ = problem()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    total = fused_linear_rows(
        x, weight, bias, lambda logits: logits.sum(-1), softcap=4.0, chunk_size=5, reduction=reduction
    ).sum()
    want = (4 * ((exact[0] @ exact[1].T + exact[2]) / 4).tanh()).sum()
    for got, right in zip(
        torch.autograd.grad(total, (x, weight, bias)), torch.autograd.grad(want, exact), strict=True
    ):
        assert (got.double() - right).norm() / right.norm() < 1.5 * HALF_ULP


def test_parameters_of_the_formula_in_float16() -> None:
    """Their gradients are taken out of the unit of float16 as well."""
    x, weight, bias, target = problem(torch.float16)
    scale = torch.tensor(0.7, requires_grad=True)
    row_weight = torch.full((N,), 1e-3)

    def scaled(logits: Tensor, target: Tensor) -> Tensor:
        return formula(scale * logits, target)

    total = fused_linear_rows(
        x, weight, bias, scaled, target, row_weight=row_weight, parameters=(scale,), chunk_size=5
    )
    logits = x.double() @ weight.double().T + bias.double()
    want = (row_weight * scaled(logits, target)).sum()
    (got,), (right,) = torch.autograd.grad(total, scale), torch.autograd.grad(want, scale)
    torch.testing.assert_close(got, right, rtol=1e-4, atol=0)


def test_chunks_of_logits_and_of_gradients(monkeypatch) -> None:
    monkeypatch.setattr(fused_linear, "_FEWEST_CUDA_LOGITS", 4 * CLASSES)
    monkeypatch.setattr(fused_linear, "_MOST_CUDA_LOGITS", 4 * CLASSES)
    monkeypatch.setattr(fused_linear, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(fused_linear, "_MOST_CUDA_GRADIENTS", 9 * CLASSES)
    x, weight, bias, target = problem()
    seen: list[int] = []

    def counting(logits: Tensor, target: Tensor) -> Tensor:
        seen.append(logits.shape[0])
        return formula(logits, target)

    products: list[tuple[int, ...]] = []
    product = fused_linear._product

    def watched(left, right, out, accumulate=False):
        products.append((*left.shape, right.shape[1], accumulate))
        return product(left, right, out, accumulate)

    monkeypatch.setattr(fused_linear, "_product", watched)
    fused_linear_rows(x, weight, bias, counting, target)
    # N <= 2 D: the gradient of all logits is kept, and each gradient is one product
    assert seen == [4, 4, 4, 4, 4, 3]
    assert [p for p in products if p[2] != CLASSES] == [(N, CLASSES, DIM, False), (CLASSES, N, DIM, False)]
    products.clear()
    fused_linear_rows(x, weight.float().detach().requires_grad_(), bias, counting, target)
    # a float32 weight has a float32 gradient: two chunks of logits at a time
    rows = [p for p in products if p[2] != CLASSES]
    assert [p[0] for p in rows[::2]] == [8, 8, 7]
    assert [p[3] for p in rows[1::2]] == [False, True, True]


def test_chunk_sizes_on_cuda() -> None:
    assert auto_chunk_size(8192, 128256, "cuda") == 512
    assert auto_chunk_size(2048, 128256, "cuda") == 256
    assert auto_chunk_size(100, 128256, "cuda") == 100
    assert auto_chunk_size(8192, 50257, "cuda") == 1024
    assert auto_chunk_size(10**6, 50257, "cuda") == 1280
    assert auto_chunk_size(8192, 10, "cuda") == 8192
    assert auto_chunk_size(8192, 2**27, "cuda") == 32


def test_rows_of_matrices_are_aligned() -> None:
    for dtype, columns in ((torch.float32, 50257), (torch.bfloat16, 50257), (torch.bfloat16, 128256)):
        matrix = fused_linear._matrix(torch.empty(0), 3, columns, dtype, aligned=True)
        assert matrix.shape == (3, columns)
        assert matrix.stride(0) * dtype.itemsize % 128 == 0
        assert matrix.stride(0) - columns < 128


@pytest.mark.parametrize(
    ("rows", "bytes_allowed"),
    [
        # bfloat16 gradient of all logits and 512 rows of float32 logits
        (8192, 2 * 8192 * 128256 + 4 * 512 * 128256),
        # the float32 sum; while it grows, the chunks beside it take less than the gradient that is made of it
        (16384, 4 * 128256 * 4096),
    ],
)
def test_memory_of_a_language_model(rows, bytes_allowed, monkeypatch) -> None:
    """Counted without data at D=4096, C=128,256 in bfloat16, beyond inputs and gradients."""
    # without data there is nothing to multiply, and the meta device would make a temporary matrix for a sum
    monkeypatch.setattr(fused_linear, "_product", lambda left, right, out, accumulate=False: out)
    x = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta").requires_grad_()
    weight = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta").requires_grad_()
    target = torch.empty(rows, dtype=torch.long, device="meta")
    with Peak() as peak:
        fused_linear_rows(x, weight, None, formula, target, derivative=derivative).backward()
    beyond = peak.peak - 2 * (x.nbytes + weight.nbytes)  # inputs are counted when they are first seen
    assert 0.99 < beyond / bytes_allowed < 1.001
    eager = 2 * 2 * rows * 128256 + 4 * rows * 128256  # logits and their gradient, and one float32 copy
    assert beyond < 0.7 * eager
