"""The Triton kernels against float64 torch.

Not collected by itself: test_triton_rows.py runs this file under Triton's interpreter, where no GPU is needed, and once
more as it is where there is one.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.kernels.triton_rows import scale_, softmax_rows, z_rows
from telos.losses import z_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
CLASSES = [1, 2, 5, 127, 128, 1000, 5000]  # the last takes two blocks
ROWS = 3

if INTERPRETED:
    # the interpreter cuts float32 off to bfloat16, where a GPU rounds to nearest
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return torch.from_numpy(data).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = nearest

# f, the name of its slope, and the parameters of the slope
OF_NLL = {
    "cross_entropy": (lambda nll: nll, "cross_entropy", 0.0, 0.0),
    "sum_exponential": (lambda nll: nll.expm1(), "comp_sum", 0.0, 0.0),
    "comp_sum_half": (lambda nll: 2 * (0.5 * nll).expm1(), "comp_sum", 0.5, 0.0),
    "comp_sum_three_halves": (lambda nll: -2 * (-0.5 * nll).expm1(), "comp_sum", 1.5, 0.0),
    "mae": (lambda nll: 1 - (-nll).exp(), "comp_sum", 2.0, 0.0),
    "focal_half": (lambda nll: (1 - (-nll).exp()).sqrt() * nll, "focal", 0.5, 0.0),
    "focal": (lambda nll: (1 - (-nll).exp()).square() * nll, "focal", 2.0, 0.0),
    "focal_five": (lambda nll: (1 - (-nll).exp()).pow(5) * nll, "focal", 5.0, 0.0),
    "symmetric": (lambda nll: 0.1 * nll + 4 * (1 - (-nll).exp()), "symmetric", 0.1, 4.0),
}


def draw(classes: int, scale: float = 3.0, rows: int = ROWS) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(classes)
    logits = scale * torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    cotangent = torch.randn(rows, generator=generator)
    bias = torch.randn(classes, generator=generator)
    return tuple(tensor.to(DEVICE) for tensor in (logits, target, cotangent, bias))


def capped(logits: Tensor, bias: Tensor | None = None, softcap: float | None = None) -> Tensor:
    z = logits if bias is None else logits + bias.double()
    return z if softcap is None else softcap * (z / softcap).tanh()


def negative_log_likelihood(z: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(z, target, reduction="none")


def gradient(value: Tensor, leaf: Tensor, cotangent: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf, cotangent.double())[0]


def near(found: Tensor, want: Tensor, tolerance: float = 3e-6) -> None:
    """Relative to the largest entry of each row."""
    assert found.shape == want.shape
    largest = want.abs().amax(-1, keepdim=True).clamp_min(1.0) if want.ndim > 1 else want.abs().clamp_min(1.0)
    error = ((found.double() - want) / largest).abs().max()
    assert error <= tolerance, error  # a NaN fails


@pytest.mark.parametrize("options", ["plain", "bias", "softcap", "bias and softcap"])
@pytest.mark.parametrize("name", OF_NLL)
@pytest.mark.parametrize("classes", CLASSES)
def test_functions_of_the_nll(classes, name, options) -> None:
    formula, slope, first, second = OF_NLL[name]
    if name == "focal_half" and classes == 1:
        pytest.skip("the reference has an infinite slope at nll = 0")
    logits, target, cotangent, bias = draw(classes)
    layer = {
        "bias": bias if "bias" in options else None,
        "softcap": 4.0 if "softcap" in options else None,
    }
    leaf = logits.double().requires_grad_()
    want = negative_log_likelihood(capped(leaf, **layer), target)
    derivative = gradient(formula(want), leaf, cotangent)
    out = torch.full_like(logits, torch.nan)
    nll, entropy = softmax_rows(
        logits, target, slope=slope, first=first, second=second, cotangent=cotangent, out=out, **layer
    )
    assert entropy is None
    near(nll, want.detach())
    near(out, derivative)
    without, _ = softmax_rows(logits, target, **layer)
    torch.testing.assert_close(without, nll, rtol=0, atol=0)


def test_the_slope_of_focal_loss_at_all_nll() -> None:
    """From p next to 1, where the series takes over, to p = 0; relative errors, at the nll that float32 resolves."""
    d = torch.cat([torch.linspace(-40, 2, 85), torch.tensor([10.0, 90.0, 200.0, 3e4])]).to(DEVICE)
    logits = torch.stack([torch.zeros_like(d), d], -1)
    target, ones = torch.zeros(len(d), dtype=torch.long, device=DEVICE), torch.ones(len(d), device=DEVICE)
    other = logits.double().softmax(-1)[:, 1]
    for gamma in (0.5, 1.0, 2.0, 5.0):
        out = torch.empty_like(logits)
        nll, _ = softmax_rows(logits, target, slope="focal", first=gamma, cotangent=ones, out=out)
        assert (nll[0] == 0) & (out[0] == 0).all()
        n = nll.double()
        p, miss = (-n).exp(), -torch.expm1(-n)
        slope = miss.pow(gamma) + gamma * n * p * miss.clamp_min(1e-300).pow(gamma - 1)
        torch.testing.assert_close(out[:, 1].double(), slope * other, rtol=2e-6 * (1 + gamma), atol=1e-30)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_smoothed_labels(classes, softcap) -> None:
    logits, target, cotangent, bias = draw(classes)
    leaf = logits.double().requires_grad_()
    z = capped(leaf, bias, softcap)
    want = F.cross_entropy(z, target, reduction="none", label_smoothing=0.3)
    out = torch.empty_like(logits)
    values, _ = softmax_rows(
        logits, target, smoothing=0.3, bias=bias, softcap=softcap, cotangent=cotangent, out=out
    )
    near(values, want.detach())
    near(out, gradient(want, leaf, cotangent))


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_log_probability_and_entropy(classes, temperature) -> None:
    logits, target, one, _ = draw(classes)
    two = torch.linspace(-1, 1, ROWS, device=DEVICE)
    leaf = logits.double().requires_grad_()
    nll = negative_log_likelihood(leaf / temperature, target)
    p = (leaf / temperature).softmax(-1)
    entropy = -(p * torch.log_softmax(leaf / temperature, -1)).sum(-1)
    want = gradient(nll, leaf, one) + gradient(entropy, leaf, two)
    out = torch.empty_like(logits)
    values, disorder = softmax_rows(
        logits, target, temperature=temperature, entropy=True, cotangent=torch.stack([one, two], -1), out=out
    )
    near(values, nll.detach())
    near(disorder, entropy.detach())
    near(out, want, 1e-5)


@pytest.mark.parametrize("classes", [classes for classes in CLASSES if classes > 1])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("offset", [0.0, 3e4])
def test_z_loss(classes, softcap, offset) -> None:
    if softcap is not None and offset:
        pytest.skip("capped logits have no offset")
    logits, target, cotangent, bias = draw(classes)
    logits = logits + offset
    leaf = logits.double().requires_grad_()
    a, b = 2.0, 0.5
    want = z_loss(capped(leaf, bias, softcap), target, a=a, b=b, reduction="none")
    out = torch.empty_like(logits)
    score = z_rows(
        logits, target, a=a, b=b, eps=1e-12, bias=bias, softcap=softcap, cotangent=cotangent, out=out
    )
    # bias + 30,000 is rounded in float32
    tolerance = 3e-3 if offset else 1e-5
    near(-F.logsigmoid(a * (score - b)) / a, want.detach(), tolerance)
    near(out, gradient(want, leaf, cotangent), tolerance)


def test_z_loss_of_a_first_block_unlike_the_rest() -> None:
    """Its mean is the shift under which the moments are summed."""
    logits, target, cotangent, _ = draw(5000)
    logits[:, :4096] = 1e4
    leaf = logits.double().requires_grad_()
    want = z_loss(leaf, target, reduction="none")
    out = torch.empty_like(logits)
    score = z_rows(logits, target, a=1.0, b=0.0, eps=1e-12, cotangent=cotangent, out=out)
    near(-F.logsigmoid(score), want.detach(), 1e-5)
    expected = gradient(want, leaf, cotangent)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("value", [0.0, 1.7, -3e4])
def test_z_loss_of_constant_rows(value) -> None:
    logits = torch.full((2, 1000), value, device=DEVICE)
    target = torch.tensor([0, 999], device=DEVICE)
    leaf = logits.double().requires_grad_()
    want = z_loss(leaf, target, reduction="none")
    out = torch.empty_like(logits)
    cotangent = torch.ones(2, device=DEVICE)
    score = z_rows(logits, target, a=1.0, b=0.0, eps=1e-12, cotangent=cotangent, out=out)
    assert (score == 0).all()
    near(out, gradient(want, leaf, cotangent))


@pytest.mark.parametrize("classes", [5, 5000])
@pytest.mark.parametrize("name", ["cross_entropy", "mae", "focal", "symmetric"])
def test_extreme_logits(classes, name) -> None:
    formula, slope, first, second = OF_NLL[name]
    logits, target, cotangent, _ = draw(classes, rows=4)
    logits[0], logits[1] = 3e4, -3e4
    logits[2], logits[3] = -3e4, 3e4
    logits[2, classes // 2], logits[3, classes - 1] = 3e4, -3e4
    target[2], target[3] = 0, classes - 1  # both certain and wrong
    leaf = logits.double().requires_grad_()
    want = negative_log_likelihood(leaf, target)
    out = torch.empty_like(logits)
    nll, _ = softmax_rows(
        logits, target, slope=slope, first=first, second=second, cotangent=cotangent, out=out
    )
    near(nll, want.detach())
    near(out, gradient(formula(want), leaf, cotangent))


@pytest.mark.parametrize("classes", [5, 5000])
def test_entropy_of_extreme_logits(classes) -> None:
    logits, target, cotangent, _ = draw(classes, rows=3)
    logits[0], logits[1] = 3e4, -3e4
    logits[1, classes - 1] = 3e4
    leaf = logits.double().requires_grad_()
    logp = torch.log_softmax(leaf, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    out = torch.empty_like(logits)
    both = torch.stack([torch.zeros_like(cotangent), cotangent], -1)
    _, found = softmax_rows(logits, target, entropy=True, cotangent=both, out=out)
    near(found, entropy.detach())
    near(out, gradient(entropy, leaf, cotangent), 1e-5)


@pytest.mark.parametrize("classes", [5, 128, 5000])
def test_logits_of_minus_infinity(classes) -> None:
    """A forbidden class has probability 0; where it is the label, the loss is infinite and the gradient that of torch."""
    logits, target, cotangent, _ = draw(classes)
    logits[:, classes // 2 :] = -torch.inf
    target[:] = torch.tensor([0, 1, classes - 1])
    leaf = logits.double().requires_grad_()
    want = negative_log_likelihood(leaf, target)
    out = torch.empty_like(logits)
    nll, _ = softmax_rows(logits, target, cotangent=cotangent, out=out)
    assert nll[2] == torch.inf
    near(nll[:2], want[:2].detach())
    near(out, gradient(want, leaf, cotangent))
    # a bounded loss of an impossible label is flat
    softmax_rows(logits, target, slope="comp_sum", first=2.0, cotangent=cotangent, out=out)
    assert (out[2] == 0).all()

    logp = torch.log_softmax(leaf[:2], -1)
    entropy = -(logp.exp() * torch.where(logp == -torch.inf, 0.0, logp)).sum(-1)
    both = torch.stack([torch.zeros_like(cotangent), torch.ones_like(cotangent)], -1)
    _, found = softmax_rows(logits, target, entropy=True, cotangent=both, out=out)
    near(found[:2], entropy.detach())
    p = logp.detach().exp()
    surprise = torch.where(p == 0, 0.0, p * (logp.detach() + entropy.detach()[:, None]))
    near(out[:2], -surprise)


@pytest.mark.parametrize("place", [0, 3, 4999])
@pytest.mark.parametrize("kind", ["softmax", "entropy", "z"])
def test_a_nan_stays_in_its_row(kind, place) -> None:
    logits, target, cotangent, _ = draw(5000)
    logits[1, place] = torch.nan
    out = torch.zeros_like(logits)
    if kind == "z":
        values = z_rows(logits, target, a=1.0, b=0.0, eps=1e-12, cotangent=cotangent, out=out)
    else:
        entropy = kind == "entropy"
        wanted = cotangent.unsqueeze(-1).expand(-1, 2) if entropy else cotangent
        found = softmax_rows(logits, target, entropy=entropy, cotangent=wanted, out=out)
        values = found[1] if entropy else found[0]
    assert values.isnan().tolist() == [False, True, False]
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_a_row_without_a_largest_logit_is_nan() -> None:
    """As torch has it: all of them -inf, or one of them inf."""
    logits, target, cotangent, _ = draw(5000)
    logits[0], logits[1, 7] = -torch.inf, torch.inf
    out = torch.empty_like(logits)
    nll, _ = softmax_rows(logits, target, cotangent=cotangent, out=out)
    assert nll.isnan().tolist() == [True, True, False]
    assert out[:2].isnan().any(-1).all()


@pytest.mark.parametrize("label", [-100, -1, 5, 2**40])
def test_a_label_out_of_range_reads_nothing_and_shows(label) -> None:
    logits, target, cotangent, _ = draw(5)
    target[1] = label
    nll, _ = softmax_rows(logits, target, cotangent=cotangent, out=torch.empty_like(logits))
    assert nll.isnan().tolist() == [False, True, False]
    score = z_rows(logits, target, a=1.0, b=0.0, eps=1e-12)
    assert score.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [5, 5000])
def test_half_precision_logits_and_derivatives(classes, dtype) -> None:
    """Rounded once, at the end; in place and into another matrix."""
    logits, target, cotangent, _ = draw(classes)
    low = logits.to(dtype)
    leaf = low.double().requires_grad_()
    want = negative_log_likelihood(leaf, target)
    expected = gradient(want, leaf, cotangent)
    wide = torch.empty_like(logits)
    nll, _ = softmax_rows(low, target, cotangent=cotangent, out=wide)
    near(nll, want.detach())
    near(wide, expected)
    softmax_rows(low, target, cotangent=cotangent, out=low)
    torch.testing.assert_close(low, wide.to(dtype), rtol=0, atol=0)


def test_in_place_and_between_other_columns() -> None:
    """Rows of a wider matrix: what lies beside them is left as it is."""
    logits, target, cotangent, _ = draw(1000)
    out = torch.empty_like(logits)
    nll, _ = softmax_rows(logits, target, cotangent=cotangent, out=out)
    score = z_rows(logits, target, a=1.0, b=0.0, eps=1e-12, cotangent=cotangent)
    wide = torch.full((ROWS, 1024), 7.0, device=DEVICE)
    wide[:, 8:1008] = logits
    inside = wide[:, 8:1008]
    again, _ = softmax_rows(inside, target, cotangent=cotangent, out=inside)
    torch.testing.assert_close(again, nll, rtol=0, atol=0)
    torch.testing.assert_close(inside, out, rtol=0, atol=0)
    wide[:, 8:1008] = logits
    derivative = torch.empty_like(logits)
    z_rows(logits, target, a=1.0, b=0.0, eps=1e-12, cotangent=cotangent, out=derivative)
    torch.testing.assert_close(
        z_rows(inside, target, a=1.0, b=0.0, eps=1e-12, cotangent=cotangent, out=inside), score
    )
    torch.testing.assert_close(inside, derivative, rtol=0, atol=0)
    assert (wide[:, :8] == 7).all()
    assert (wide[:, 1008:] == 7).all()


def test_labels_and_cotangents_with_gaps() -> None:
    logits, target, cotangent, _ = draw(128)
    want, out = torch.empty_like(logits), torch.empty_like(logits)
    nll, _ = softmax_rows(logits, target, cotangent=cotangent, out=want)
    gaps = torch.stack([target, target * 0 - 1], -1)[:, 0], torch.stack([cotangent, cotangent * 0], -1)[:, 0]
    again, _ = softmax_rows(logits, gaps[0], cotangent=gaps[1], out=out)
    torch.testing.assert_close(again, nll, rtol=0, atol=0)
    torch.testing.assert_close(out, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.3, float("nan")])
def test_scaling_in_place(dtype, factor) -> None:
    tensor = torch.randn(3, 1777, device=DEVICE).to(dtype)
    want = (tensor.float() * factor).to(dtype)
    found = scale_(tensor, torch.tensor(factor, device=DEVICE))
    assert found is tensor
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------- on a GPU only

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@needs_gpu
def test_offsets_beyond_two_to_the_31() -> None:
    rows, classes = 17000, 128256  # 2.2e9 logits
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, -1] = 8.0
    target = torch.full((rows,), classes - 1, device=DEVICE)
    cotangent = torch.ones(rows, device=DEVICE)
    nll, _ = softmax_rows(logits, target, cotangent=cotangent, out=logits)
    even = torch.tensor(float(classes)).log()
    want = (torch.tensor(8.0).exp() + classes - 1).log() - 8
    torch.testing.assert_close(nll[[0, -1]].cpu(), torch.stack([even, want]))
    torch.testing.assert_close(float(logits[-1, -1]), float(torch.expm1(-want)), rtol=1e-2, atol=0)
    torch.testing.assert_close(float(logits[-1, 0]), float((-want - 8).exp()), rtol=1e-2, atol=0)
