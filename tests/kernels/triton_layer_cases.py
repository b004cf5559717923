"""linear_loss and token_logps on the Triton kernels, against the plain expressions in float64.

Not collected by itself, like triton_rows_cases.py.
"""

import pytest
import torch
from torch import Tensor

from telos.kernels import fused_linear, triton_rows
from telos.losses import (
    CompSumLoss,
    CrossEntropyLoss,
    FocalLoss,
    GCELoss,
    LabelSmoothingLoss,
    LDRKLLoss,
    MAELoss,
    SCELoss,
    ZLoss,
    linear_loss,
    sequence_logps,
    token_logps,
)
from tests.kernels.triton_rows_cases import DEVICE, capped, needs_gpu

LOSSES = {
    "cross_entropy": CrossEntropyLoss,
    "class_weight": lambda: CrossEntropyLoss(class_weight=torch.linspace(0.5, 2, 37, device=DEVICE)),
    "comp_sum_one": lambda: CompSumLoss(tau=1.0),
    "comp_sum_half": lambda: CompSumLoss(tau=0.5),
    "gce": GCELoss,
    "mae": MAELoss,
    "sce": SCELoss,
    "focal": FocalLoss,
    "focal_zero": lambda: FocalLoss(gamma=0.0),
    "label_smoothing": LabelSmoothingLoss,
    "z_loss": lambda: ZLoss(a=2.0, b=0.5),
}
# differentiated by autograd, in the same loop
OTHERS = {"ldr_kl": LDRKLLoss, "mixture": lambda: CrossEntropyLoss() + 0.3 * ZLoss()}


@pytest.fixture
def kernels_used(monkeypatch) -> list[int]:
    """Takes the way of a GPU on any device, and counts the rows that go to the kernels."""
    monkeypatch.setattr(fused_linear, "rows_on_triton", lambda tensor: True)
    monkeypatch.setattr(fused_linear, "mixed_products", lambda tensor: True)
    rows: list[int] = []
    for name in ("softmax_rows", "z_rows"):
        original = getattr(triton_rows, name)

        def counted(logits, *args, _original=original, **keywords):
            rows.append(logits.shape[0])
            return _original(logits, *args, **keywords)

        monkeypatch.setattr(triton_rows, name, counted)
    return rows


def layer(dtype: torch.dtype, rows: int = 13, dim: int = 24, classes: int = 37) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x, weight, bias = (
        (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype).requires_grad_()
        for shape, scale in (((rows, dim), 1.0), ((classes, dim), 0.4), ((classes,), 1.0))
    )
    target = torch.randint(classes, (rows,), generator=generator).to(DEVICE)
    target[[1, 6]] = -100
    return x, weight, bias, target


def truth(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    return capped(x.double() @ weight.double().T, bias, softcap)


def compare(found: Tensor, want: Tensor, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    """Errors as a part of the whole tensor."""
    torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)
    cotangent = torch.linspace(0.3, 1.7, max(want.numel(), 1), device=DEVICE).reshape(want.shape)
    gradients = torch.autograd.grad(found, inputs, cotangent.to(found.dtype))
    expected = torch.autograd.grad(want, inputs, cotangent.double())
    for got, right in zip(gradients, expected, strict=True):
        assert got.dtype == right.dtype
        error = (got.double() - right.double()).norm() / right.double().norm()
        assert error <= tolerance, error


@pytest.mark.parametrize("chunk_size", [5, "auto"])
@pytest.mark.parametrize("name", LOSSES)
def test_linear_loss(kernels_used, name, chunk_size) -> None:
    x, weight, bias, target = layer(torch.float32)
    loss = LOSSES[name]()
    for softcap in (None, 5.0):
        found = linear_loss(x, weight, target, loss, bias, softcap=softcap, chunk_size=chunk_size)
        want = loss(truth(x, weight, bias, softcap), target)
        compare(found, want, (x, weight, bias), 1e-5)
    assert sum(kernels_used) == 2 * 11  # ignored rows are not computed


@pytest.mark.parametrize(
    ("dtype", "chunk_size"), [(torch.bfloat16, 5), (torch.bfloat16, "auto"), (torch.float16, 5)]
)
@pytest.mark.parametrize("name", [*LOSSES, *OTHERS])
def test_linear_loss_in_half_precision(kernels_used, name, dtype, chunk_size) -> None:
    """The gradient of the logits is rounded once, and the result once: half a unit in the last place each."""
    x, weight, bias, target = layer(dtype)
    loss = (LOSSES | OTHERS)[name]()
    for softcap in (None, 5.0):
        found = linear_loss(x, weight, target, loss, bias, softcap=softcap, chunk_size=chunk_size)
        assert found.dtype == torch.float32
        want = loss(truth(x, weight, bias, softcap), target)
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(1.3 * found, (x, weight, bias))
        exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
        expected = torch.autograd.grad(1.3 * loss(truth(*exact, softcap), target), exact)
        for got, right in zip(gradients, expected, strict=True):
            assert got.dtype == dtype
            error = (got.double() - right).norm() / right.norm()
            assert error <= 1.5 * torch.finfo(dtype).eps / 2, error
    assert bool(kernels_used) == (name in LOSSES)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "z_loss", "ldr_kl"])
def test_bfloat16_is_closer_to_the_truth_than_the_eager_path(kernels_used, name) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, 64, generator=generator).to(DEVICE, torch.bfloat16)
    weight = (0.3 * torch.randn(300, 64, generator=generator)).to(DEVICE, torch.bfloat16)
    target = torch.randint(300, (32,), generator=generator).to(DEVICE)
    loss = (LOSSES | OTHERS)[name]()

    def run(how, dtype):
        a, b = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        value = how(a, b)
        return [value.detach().double(), *(g.double() for g in torch.autograd.grad(value, (a, b)))]

    right = run(lambda a, b: loss(a @ b.T, target), torch.float64)
    eager = run(lambda a, b: loss(a @ b.T, target), torch.bfloat16)
    fused = run(lambda a, b: linear_loss(a, b, target, loss, chunk_size=16), torch.bfloat16)
    for want, plain, ours in zip(right, eager, fused, strict=True):
        assert (ours - want).norm() < (plain - want).norm()


@pytest.mark.parametrize("name", ["cross_entropy", "comp_sum_half", "focal", "label_smoothing", "z_loss"])
def test_other_reductions_and_a_second_backward(kernels_used, name) -> None:
    x, weight, bias, target = layer(torch.float32)
    loss = LOSSES[name]()
    for reduction in ("sum", "none"):
        loss.reduction = reduction
        found = linear_loss(x, weight, target, loss, bias, reduction=reduction, chunk_size=4)
        compare(found, loss(truth(x, weight, bias, None), target), (x, weight, bias), 1e-5)
    total = linear_loss(x, weight, target, LOSSES[name](), bias, chunk_size=4)
    one = torch.autograd.grad(total, (x, weight, bias), retain_graph=True)
    two = torch.autograd.grad(total, (x, weight, bias))
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(first, second)


def test_a_bfloat16_gradient_that_needs_no_sum_is_rounded_once(kernels_used, monkeypatch) -> None:
    """Large products are written in bfloat16 at once, here small ones: three chunks of logits, one of gradients."""
    monkeypatch.setattr(fused_linear, "_UNSPLIT", 1)
    monkeypatch.setattr(fused_linear, "auto_chunk_size", lambda rows, classes, device: 4)
    x, weight, bias, target = layer(torch.bfloat16)
    found = linear_loss(x, weight, target, CrossEntropyLoss(), bias)
    assert kernels_used == [4, 4, 3]
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    want = CrossEntropyLoss()(truth(*exact, None), target)
    for got, right in zip(
        torch.autograd.grad(found, (x, weight, bias)), torch.autograd.grad(want, exact), strict=True
    ):
        assert (got.double() - right).norm() / right.norm() <= 1.5 * torch.finfo(torch.bfloat16).eps / 2


def test_float16_gradients_do_not_vanish(kernels_used) -> None:
    """A mean over many rows puts 1 / N on every row, and a loss scale comes only in backward."""
    x, weight, _, target = layer(torch.float16)
    total = linear_loss(x, weight, target, CrossEntropyLoss(), denominator=1e7)
    got = torch.autograd.grad(2.0**16 * total, (x, weight))
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    want = CrossEntropyLoss()(exact[0] @ exact[1].T, target, denominator=1e7)
    for found, right in zip(got, torch.autograd.grad(2.0**16 * want, exact), strict=True):
        assert (found.double() - right).norm() / right.norm() <= 1e-3


def test_autocast(kernels_used) -> None:
    x, weight, _, target = layer(torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = linear_loss(x, weight, target, CrossEntropyLoss(), chunk_size=5)
    rounded = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (x, weight)]
    want = CrossEntropyLoss()(rounded[0] @ rounded[1].T, target)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    for got, right in zip(
        torch.autograd.grad(found, (x, weight)), torch.autograd.grad(want, rounded), strict=True
    ):
        assert got.dtype == torch.float32
        assert (got.double() - right).norm() / right.norm() <= torch.finfo(torch.bfloat16).eps / 2


def test_double_precision_does_without_kernels(kernels_used) -> None:
    x, weight, bias, target = layer(torch.float64)
    found = linear_loss(x, weight, target, CrossEntropyLoss(), bias)
    want = CrossEntropyLoss()(truth(x, weight, bias, None), target)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert not kernels_used


def test_probability_targets_and_changed_formulas_do_without_kernels(kernels_used) -> None:
    class Doubled(CrossEntropyLoss):
        def values(self, logits: Tensor, target: Tensor) -> Tensor:
            return 2 * super().values(logits, target)

    x, weight, bias, target = layer(torch.float32)
    probabilities = torch.rand(13, 37, device=DEVICE).softmax(-1)
    for loss, labels in ((CrossEntropyLoss(), probabilities), (Doubled(), target)):
        found = linear_loss(x, weight, labels, loss, bias, chunk_size=5)
        compare(found, loss(truth(x, weight, bias, None), labels), (x, weight, bias), 1e-5)
    assert not kernels_used


@pytest.mark.parametrize("name", ["cross_entropy", "z_loss", "focal"])
def test_nan_rows(kernels_used, name) -> None:
    """In an ignored row it reaches nothing, in a counted one the loss."""
    x, weight, bias, target = layer(torch.float32)
    poisoned = x.detach().clone()
    poisoned[[1, 6]] = torch.nan
    poisoned.requires_grad_()
    loss = LOSSES[name]()
    found = linear_loss(poisoned, weight, target, loss, bias, chunk_size=5)
    want = loss(truth(x, weight, bias, None), target)
    got = torch.autograd.grad(found, (poisoned, weight))
    for one, two in zip(got, torch.autograd.grad(want, (x, weight)), strict=True):
        assert (one.double() - two.double()).norm() / two.double().norm() <= 1e-5
    with torch.no_grad():
        poisoned[0] = torch.nan
    assert linear_loss(poisoned, weight, target, loss, bias).isnan()


def test_empty_and_frozen(kernels_used) -> None:
    x, weight, bias, target = layer(torch.bfloat16)
    total = linear_loss(x, weight, torch.full_like(target, -100), CrossEntropyLoss(), bias)
    assert total == 0
    for gradient in torch.autograd.grad(total, (x, weight, bias)):
        assert (gradient == 0).all()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    want = CrossEntropyLoss()(exact[0] @ exact[1].T, target)
    for k in (0, 1):
        free = [tensor.detach() for tensor in (x, weight)]
        free[k].requires_grad_()
        found = linear_loss(*free, target, CrossEntropyLoss(), chunk_size=5)
        (got,) = torch.autograd.grad(found, free[k])
        (right,) = torch.autograd.grad(want, exact[k], retain_graph=True)
        assert (got.double() - right).norm() / right.norm() <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy", [False, True])
def test_token_logps(kernels_used, reduction, temperature, entropy) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(3, 5, 24, generator=generator).to(DEVICE).requires_grad_()
    lm_head = torch.randn(37, 24, generator=generator).to(DEVICE).requires_grad_()
    bias = torch.randn(37, generator=generator).to(DEVICE).requires_grad_()
    labels = torch.randint(37, (3, 5), generator=generator).to(DEVICE)
    labels[0, 0] = -100
    mask = torch.ones(3, 5, dtype=torch.bool, device=DEVICE)
    mask[1, 3:] = False
    options = {"temperature": temperature, "reduction": reduction}
    found = token_logps(hidden, lm_head, labels, mask, bias=bias, entropy=entropy, chunk_size=4, **options)
    logits = truth(hidden, lm_head, bias, None)
    want = sequence_logps(logits, labels, mask, **options)
    compare(found[0] if entropy else found, want, (hidden, lm_head, bias), 1e-5)
    assert sum(kernels_used) == 2 * 12  # forward, and once more in backward
    if entropy:
        counts = mask & (labels >= 0)
        each = torch.distributions.Categorical(logits=logits.detach() / temperature).entropy() * counts
        if reduction != "none":
            each = each.sum(-1) / (counts.sum(-1).clamp_min(1) if reduction == "mean" else 1)
        torch.testing.assert_close(found[1].double(), each, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        reference = token_logps(hidden, lm_head, labels, mask, bias=bias, **options)
    torch.testing.assert_close(reference.double(), want, rtol=1e-5, atol=1e-5)


def test_log_probability_and_entropy_in_one_objective(kernels_used) -> None:
    """As a policy gradient has it: two cotangents for each token."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(2, 3, 24, generator=generator).to(DEVICE).requires_grad_()
    lm_head = torch.randn(37, 24, generator=generator).to(DEVICE).requires_grad_()
    labels = torch.randint(37, (2, 3), generator=generator).to(DEVICE)
    logps, entropies = token_logps(hidden, lm_head, labels, temperature=0.7, entropy=True, chunk_size=4)
    logits = truth(hidden, lm_head, None, None)
    want = sequence_logps(logits, labels, temperature=0.7, reduction="none")
    want = want - 0.3 * torch.distributions.Categorical(logits=logits / 0.7).entropy()
    compare(logps - 0.3 * entropies, want, (hidden, lm_head), 1e-5)
    assert sum(kernels_used) == 2 * 6


def test_token_logps_in_bfloat16(kernels_used) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(3, 5, 24, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
    lm_head = torch.randn(37, 24, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
    labels = torch.randint(37, (3, 5), generator=generator).to(DEVICE)
    found = token_logps(hidden, lm_head, labels)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, lm_head)]
    want = sequence_logps(exact[0] @ exact[1].T, labels, reduction="none")
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(found.sum(), (hidden, lm_head))
    for one, two in zip(got, torch.autograd.grad(want.sum(), exact), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - two).norm() / two.norm() <= 1.5 * torch.finfo(torch.bfloat16).eps / 2


@needs_gpu
@pytest.mark.parametrize("name", ["cross_entropy", "focal", "z_loss", "ldr_kl", "mixture"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_real_layer(name, dtype) -> None:
    """Nothing patched: products, kernels and compiled formulas as a user gets them, odd vocabulary, ragged chunks."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(1500, 256, generator=generator, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(50257, 256, generator=generator, device=DEVICE) / 16).to(dtype).requires_grad_()
    target = torch.randint(50257, (1500,), generator=generator, device=DEVICE)
    target[::7] = -100
    loss = (LOSSES | OTHERS)[name]()
    found = linear_loss(x, weight, target, loss)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    want = loss(exact[0] @ exact[1].T, target)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    for got, right in zip(
        torch.autograd.grad(found, (x, weight)), torch.autograd.grad(want, exact), strict=True
    ):
        assert got.dtype == dtype
        assert (got.double() - right).norm() / right.norm() <= tolerance
