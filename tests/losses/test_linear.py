"""linear_loss against the plain expression ``loss(x @ weight.T + bias, target)``."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from telos.losses import (
    ALDRKLLoss,
    ClassificationLoss,
    CompSumLoss,
    CrossEntropyLoss,
    EnsLoss,
    FocalLoss,
    GCELoss,
    InfoNCELoss,
    LabelSmoothingLoss,
    LDRKLLoss,
    MAELoss,
    Mixture,
    SmoothAdversarialCompSumLoss,
    StableMaxCrossEntropyLoss,
    WestonWatkinsLoss,
    ZLoss,
)
from telos.losses.linear import LinearLoss, _row_weights, linear_loss

CLASSES = 7


class Brier(ClassificationLoss):
    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        p = logits.softmax(-1)
        return p.square().sum(-1) - 2 * p.gather(-1, target[:, None]).squeeze(-1) + 1


class Scaled(ClassificationLoss):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.scale * logits, target, reduction="none")


class Doubled(ClassificationLoss):
    """A row contract of its own: even labels weigh twice."""

    def rows(self, logits, target, *, sample_weight=None):
        values, weights = super().rows(logits, target, sample_weight=sample_weight)
        return values, weights * (2 - target % 2)

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none")


def class_weight() -> Tensor:
    return torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)


LOSSES = {
    "cross_entropy": CrossEntropyLoss,
    "cross_entropy_weighted": lambda: CrossEntropyLoss(class_weight=class_weight()),
    "focal": FocalLoss,
    "comp_sum_half": lambda: CompSumLoss(tau=0.5),
    "comp_sum_three_halves": lambda: CompSumLoss(tau=1.5),
    "gce": GCELoss,
    "mae": MAELoss,
    "z_loss": lambda: ZLoss(a=2.0, b=0.5),
    "ldr_kl": lambda: LDRKLLoss(temperature=0.5, normalize="softplus"),
    "stablemax": StableMaxCrossEntropyLoss,
    "weston_watkins": WestonWatkinsLoss,
    "label_smoothing": LabelSmoothingLoss,
    "own": Brier,
    "own_rows": Doubled,
    "mixture": lambda: CrossEntropyLoss(class_weight=class_weight()) + 0.3 * ZLoss(),
}
SOFT = ["cross_entropy_weighted", "label_smoothing", "focal", "comp_sum_half", "z_loss"]


def problem(n: int = 13, dim: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((n, dim), (CLASSES, dim), (CLASSES,))
    )
    target = torch.randint(CLASSES, (n,), generator=generator)
    if n > 6:
        target[[1, 6]], target[4] = -100, 2
    return x, weight, bias, target


def check(fused: Tensor, plain: Tensor, inputs: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, inputs, cotangent)
    for got, want in zip(torch.autograd.grad(fused, inputs, cotangent), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_size", [1, 5, "auto"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_plain_expression(name, chunk_size) -> None:
    x, weight, bias, target = problem()
    loss = LOSSES[name]()
    fused = linear_loss(x, weight, target, loss, bias, chunk_size=chunk_size)
    check(fused, loss(x @ weight.T + bias, target), (x, weight, bias))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mixture"])
def test_other_reductions(name, reduction) -> None:
    x, weight, bias, target = problem()
    loss = LOSSES[name]()
    fused = linear_loss(x, weight, target, loss, bias, chunk_size=5, reduction=reduction)
    loss.reduction = reduction
    check(fused, loss(x @ weight.T + bias, target), (x, weight, bias))


@pytest.mark.parametrize("name", SOFT)
def test_probability_targets(name) -> None:
    x, weight, bias, _ = problem()
    target = torch.randn(13, CLASSES, dtype=torch.float64).softmax(-1)
    loss = LOSSES[name]()
    check(
        linear_loss(x, weight, target, loss, bias, chunk_size=5),
        loss(x @ weight.T + bias, target),
        (x, weight, bias),
    )


@pytest.mark.parametrize("name", ["cross_entropy", "z_loss", "focal", "mixture", "own_rows"])
@pytest.mark.parametrize("denominator", [None, 50.0, "global"])
def test_sample_weights_and_denominators(name, denominator) -> None:
    x, weight, bias, target = problem()
    loss = LOSSES[name]()
    sample_weight = torch.linspace(0, 2, 13, dtype=torch.float64)
    keywords = {"sample_weight": sample_weight, "denominator": denominator}
    fused = linear_loss(x, weight, target, loss, bias, chunk_size=5, **keywords)
    check(fused, loss(x @ weight.T + bias, target, **keywords), (x, weight, bias))


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_rows_are_those_of_the_loss(name) -> None:
    """``_row_weights`` states the rule of ``rows`` without logits; here they are held together."""
    _, _, _, target = problem()
    sample_weight = torch.linspace(0, 2, 13, dtype=torch.float64)
    loss = LOSSES[name]()
    for term in loss.losses if isinstance(loss, Mixture) else [loss]:
        _, want = term.rows(
            torch.zeros(13, CLASSES, dtype=torch.float64), target, sample_weight=sample_weight
        )
        got = _row_weights(term, target, sample_weight, CLASSES, torch.float64)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cross_entropy", "z_loss", "focal", "mixture"])
def test_softcap(name) -> None:
    x, weight, bias, target = problem()
    loss = LOSSES[name]()
    plain = loss(1.5 * torch.tanh((x @ weight.T + bias) / 1.5), target)
    check(linear_loss(x, weight, target, loss, bias, softcap=1.5, chunk_size=5), plain, (x, weight, bias))


def test_sequences_are_flattened() -> None:
    x, weight, bias, target = problem(12)
    x, target = x.detach().reshape(3, 4, 5).requires_grad_(), target.reshape(3, 4)
    loss = CrossEntropyLoss()
    check(linear_loss(x, weight, target, loss, bias), loss(x @ weight.T + bias, target), (x, weight, bias))
    assert linear_loss(x, weight, target, loss, reduction="none").shape == (3, 4)


@pytest.mark.parametrize("name", LOSSES)
def test_nan_in_an_ignored_row_reaches_nothing(name) -> None:
    x, weight, bias, target = problem()
    poisoned = x.detach().clone()
    poisoned[[1, 6]] = torch.nan
    poisoned.requires_grad_()
    loss = LOSSES[name]()
    fused = linear_loss(poisoned, weight, target, loss, bias, chunk_size=5)
    plain = loss(x @ weight.T + bias, target)
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(fused, (poisoned, weight, bias))
    for one, two in zip(got, torch.autograd.grad(plain, (x, weight, bias)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    assert (got[0][[1, 6]] == 0).all()


@pytest.mark.parametrize("name", ["cross_entropy", "z_loss", "focal"])
def test_nan_in_a_counted_row_propagates(name) -> None:
    x, weight, bias, target = problem()
    poisoned = x.detach().clone()
    poisoned[0] = torch.nan
    assert linear_loss(poisoned, weight, target, LOSSES[name](), bias).isnan()


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "mixture", "own_rows"])
@pytest.mark.parametrize("n", [0, 3])
def test_where_nothing_counts_the_loss_is_zero_with_a_graph(name, n) -> None:
    x, weight, bias, _ = problem(n)
    target = torch.full((n,), -100)
    total = linear_loss(x, weight, target, LOSSES[name](), bias)
    assert total == 0
    for gradient in torch.autograd.grad(total, (x, weight, bias)):
        assert (gradient == 0).all()


def test_frozen_sides_get_no_gradient() -> None:
    x, weight, _, target = problem()
    loss = FocalLoss()
    for frozen, free in ((x, weight), (weight, x)):
        frozen.requires_grad_(False)
        check(linear_loss(x, weight, target, loss, chunk_size=5), loss(x @ weight.T, target), (free,))
        frozen.requires_grad_(True)


def test_tied_embeddings_receive_both_gradients() -> None:
    _, weight, bias, target = problem(6)
    tokens = torch.tensor([0, 3, 6, 2, 2, 5])
    loss = CrossEntropyLoss()
    fused = linear_loss(weight[tokens], weight, target, loss, bias)
    check(fused, loss(weight[tokens] @ weight.T + bias, target), (weight, bias))


def test_parameters_of_the_loss_get_their_gradient() -> None:
    x, weight, bias, target = problem()
    loss = Scaled()
    check(
        linear_loss(x, weight, target, loss, bias, chunk_size=5),
        loss(x @ weight.T + bias, target),
        (x, weight, bias, loss.scale),
    )


def test_a_schedule_takes_one_step_per_call() -> None:
    x, weight, _, target = problem()
    loss = CrossEntropyLoss() + (lambda step: 0.5**step) * ZLoss()
    plain = copy.deepcopy(loss)
    for _ in range(3):
        check(linear_loss(x, weight, target, loss), plain(x @ weight.T, target), (x, weight))
    assert int(loss.steps) == 3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_terms_that_ignore_different_labels_keep_their_denominators(reduction) -> None:
    x, weight, bias, target = problem()
    target = target.clamp_min(0)
    terms = [CrossEntropyLoss(ignore_index=2), FocalLoss(ignore_index=0), ZLoss(class_weight=class_weight())]
    loss = Mixture([(0.4, terms[0]), (1.0, terms[1]), (-0.3, terms[2])])
    fused = linear_loss(x, weight, target, loss, bias, chunk_size=5, reduction=reduction)
    for term in terms:
        term.reduction = reduction
    check(fused, loss(x @ weight.T + bias, target), (x, weight, bias))


def test_nested_mixtures() -> None:
    x, weight, bias, target = problem()
    inner = Mixture([(0.5, CrossEntropyLoss()), (2.0, FocalLoss())])
    loss = Mixture([(0.3, inner), (1.0, ZLoss())])
    check(linear_loss(x, weight, target, loss, bias), loss(x @ weight.T + bias, target), (x, weight, bias))


@pytest.mark.parametrize("exact", [False, True])
def test_memory_of_examples_is_read_before_and_written_after(exact) -> None:
    x, weight, bias, target = problem()
    fused, plain = (ALDRKLLoss(20, temperature=0.8, exact=exact) for _ in range(2))
    index = torch.tensor([3, 4, 5, 3, 6, 7, 19, 0, 1, 2, 3, 8, 9])  # example 3 falls into three chunks
    for _ in range(2):
        check(
            linear_loss(x, weight, target, fused, bias, index=index, chunk_size=4),
            plain(x @ weight.T + bias, target, index=index),
            (x, weight, bias),
            tolerance=1e-7 if exact else 1e-10,  # the fixed point stops at 1e-10, by batch or by chunk
        )
        torch.testing.assert_close(fused.memory.temperature, plain.memory.temperature)
    before = fused.memory.temperature.clone()
    with torch.no_grad():
        linear_loss(x, weight, target, fused, bias, index=index)
    torch.testing.assert_close(fused.memory.temperature, before, rtol=0, atol=0)


def test_module_is_the_function() -> None:
    x, weight, bias, target = problem()
    module = LinearLoss(FocalLoss(), softcap=2.0, chunk_size=5, reduction="sum")
    want = linear_loss(x, weight, target, FocalLoss(), bias, softcap=2.0, reduction="sum")
    torch.testing.assert_close(module(x, weight, target, bias), want)


def test_second_derivatives_are_refused() -> None:
    x, weight, _, target = problem()
    total = linear_loss(x, weight, target, CrossEntropyLoss())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, x, create_graph=True)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "z_loss"])
def test_bfloat16_is_closer_to_the_truth_than_the_eager_path(name) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(96, 64, generator=generator).bfloat16()
    weight = (0.3 * torch.randn(300, 64, generator=generator)).bfloat16()
    target = torch.randint(300, (96,), generator=generator)
    loss = {"cross_entropy": CrossEntropyLoss, "focal": FocalLoss, "z_loss": ZLoss}[name]()

    def run(how, dtype):
        a, b = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        value = how(a, b)
        return [value.detach().double(), *(g.double() for g in torch.autograd.grad(value, (a, b)))]

    truth = run(lambda a, b: loss(a @ b.T, target), torch.float64)
    eager = run(lambda a, b: loss(a @ b.T, target), torch.bfloat16)
    fused = run(lambda a, b: linear_loss(a, b, target, loss, chunk_size=32), torch.bfloat16)
    for right, plain, ours in zip(truth, eager, fused, strict=True):
        assert (ours - right).norm() < (plain - right).norm()


def test_half_precision_keeps_dtypes() -> None:
    x, weight, bias, target = problem(dtype=torch.float16)
    total = linear_loss(x, weight, target, CrossEntropyLoss(), bias)
    assert total.dtype == torch.float32
    assert all(g.dtype == torch.float16 for g in torch.autograd.grad(total, (x, weight, bias)))


def test_autocast_rounds_the_operands_and_gives_gradients_in_their_dtype() -> None:
    x, weight, _, target = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_loss(x, weight, target, CrossEntropyLoss())
    want = CrossEntropyLoss()(x.bfloat16().double() @ weight.bfloat16().double().T, target)
    torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=1e-6)
    for got, right in zip(
        torch.autograd.grad(total, (x, weight)), torch.autograd.grad(want, (x, weight)), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, right, rtol=1e-2, atol=1e-3)


class Peak(TorchDispatchMode):
    """Most bytes of storages alive at once that were made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


def peak_bytes(how, x: Tensor, weight: Tensor) -> int:
    """Peak beyond inputs and the gradients of x and weight."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with Peak() as peak:
        how(x, weight).backward()
    return peak.peak - x.nbytes - weight.nbytes


def test_the_count_of_memory_is_right() -> None:
    """What was freed no longer counts."""
    with Peak() as peak:
        first = torch.empty(1000, 1000)
        del first
        second, third = torch.empty(1000, 1000), torch.empty(1000, 1000)
    assert peak.peak == second.nbytes + third.nbytes


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["cross_entropy", "focal", "z_loss", "ldr_kl", "mixture"])
def test_memory_shrinks_to_an_eighth(name, reduction) -> None:
    """Counted without data, at N=4096, D=512, C=50,257 in float32: an eighth of what eager needs."""
    rows, dim, classes = 4096, 512, 50257
    x, weight = torch.empty(rows, dim, device="meta"), torch.empty(classes, dim, device="meta")
    target = torch.empty(rows, dtype=torch.long, device="meta")
    loss = {"mixture": lambda: CrossEntropyLoss() + 0.3 * ZLoss()}.get(name, LOSSES[name])()
    fused = peak_bytes(lambda a, b: linear_loss(a, b, target, loss, reduction=reduction).sum(), x, weight)
    plain = peak_bytes(lambda a, b: loss(a @ b.T, target), x, weight)
    assert plain > 2 * 4 * rows * classes  # logits and their gradient
    assert 0 < fused <= plain / 8


@pytest.mark.bare
def test_compiled_callers_break_their_graph_and_go_on() -> None:
    x, weight, bias, target = problem()

    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return 2 * linear_loss(x.sin(), weight, target, FocalLoss(), bias)

    compiled = torch.compile(step, backend="aot_eager")
    check(compiled(x, weight, bias), step(x, weight, bias), (x, weight, bias))


@pytest.mark.bare
def test_losses_that_are_no_sum_over_rows_are_refused() -> None:
    x, weight, _, target = problem()
    for loss, kind, words in (
        (EnsLoss(), TypeError, "couples the examples"),
        (InfoNCELoss(), TypeError, "each row of logits"),
        (nn.CrossEntropyLoss(), TypeError, "each row of logits"),
        (CrossEntropyLoss() + nn.CrossEntropyLoss(), TypeError, "each row of logits"),
        (SmoothAdversarialCompSumLoss(), ValueError, "needs adversarial_logits"),
        (CrossEntropyLoss(reduction="sum"), ValueError, "pass the same to both"),
    ):
        with pytest.raises(kind, match=words):
            linear_loss(x, weight, target, loss)
        with pytest.raises(kind, match=words):
            LinearLoss(loss)


@pytest.mark.bare
def test_doors() -> None:
    x, weight, bias, target = problem()
    loss = CrossEntropyLoss()
    with pytest.raises(ValueError, match="weight must have shape"):
        linear_loss(x, weight[:, :3], target, loss)
    with pytest.raises(ValueError, match="bias must have shape"):
        linear_loss(x, weight, target, loss, bias[:3])
    with pytest.raises(ValueError, match="target must have shape"):
        linear_loss(x, weight, target[:3], loss)
    with pytest.raises(ValueError, match="target must lie in"):
        linear_loss(x, weight, target + CLASSES + 100, loss)
    with pytest.raises(TypeError, match="dtype of x"):
        linear_loss(x, weight.float(), target, loss)
    with pytest.raises(TypeError, match="x must have a floating-point dtype"):
        linear_loss(x.long(), weight, target, loss)
    with pytest.raises(ValueError, match="sample_weight must have shape"):
        linear_loss(x, weight, target, loss, sample_weight=torch.ones(3))
    with pytest.raises(ValueError, match="softcap"):
        linear_loss(x, weight, target, loss, softcap=0.0)
    with pytest.raises(ValueError, match="sample_weight must not require a gradient"):
        linear_loss(x, weight, target, loss, sample_weight=torch.ones(13).requires_grad_())
    with pytest.raises(ValueError, match="reduction must be"):
        linear_loss(x, weight, target, loss, reduction="average")
    with pytest.raises(ValueError, match="needs reduction='mean'"):
        linear_loss(x, weight, target, loss, reduction="sum", denominator=3.0)
    with pytest.raises(ValueError, match="keeps no memory"):
        linear_loss(x, weight, target, loss, index=torch.arange(13))
