"""linear_loss with ``compiled=True``: what has no kernel of its own passes through the compiler."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor

from telos.losses import (
    ALDRKLLoss,
    CrossEntropyLoss,
    FocalLoss,
    LabelSmoothingLoss,
    LDRKLLoss,
    LinearLoss,
    ZLoss,
    linear_loss,
)
from telos.losses import linear as module
from tests.losses.test_linear import Doubled, Scaled, check, problem

pytestmark = pytest.mark.bare

LOSSES = {
    "focal": FocalLoss,
    "label_smoothing": LabelSmoothingLoss,
    "ldr_kl": LDRKLLoss,
    "mixture": lambda: CrossEntropyLoss() + 0.3 * ZLoss(),
    "parameter": Scaled,
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    module._compiled.clear()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def quick(monkeypatch) -> None:
    """Traced and differentiated by the compiler, without generating code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_plain_expression(quick, name, softcap) -> None:
    x, weight, bias, target = problem()
    loss = LOSSES[name]()
    inputs = (x, weight, bias, *loss.parameters())
    for reduction in ("mean", "none") if name != "mixture" else ("mean",):
        loss.reduction = reduction
        logits = x @ weight.T + bias
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        fused = linear_loss(
            x, weight, target, loss, bias, softcap=softcap, chunk_size=4, compiled=True, reduction=reduction
        )
        check(fused, loss(logits, target), inputs)
    assert graphs() > 0


def test_generated_code() -> None:
    x, weight, bias, target = problem()
    loss = FocalLoss()
    fused = linear_loss(x, weight, target, loss, bias, softcap=1.5, chunk_size=4, compiled=True)
    check(fused, loss(1.5 * torch.tanh((x @ weight.T + bias) / 1.5), target), (x, weight, bias))
    assert graphs() == 1


def test_probability_targets(quick) -> None:
    x, weight, bias, _ = problem()
    target = torch.randn(13, 7, dtype=torch.float64).softmax(-1)
    loss = FocalLoss()
    fused = linear_loss(x, weight, target, loss, bias, chunk_size=4, compiled=True)
    check(fused, loss(x @ weight.T + bias, target), (x, weight, bias))
    assert graphs() > 0


def test_one_graph_for_all_sizes_of_a_chunk_and_all_calls(quick) -> None:
    """The last chunk is shorter, and how many labels count differs from batch to batch."""
    loss = FocalLoss()
    for n in (13, 14, 30, 8):
        x, weight, bias, target = problem(n)
        fused = linear_loss(x, weight, target, loss, bias, chunk_size=4, compiled=True)
        check(fused, loss(x @ weight.T + bias, target), (x, weight, bias))
    assert graphs() == 1


def test_a_changed_hyper_parameter_is_seen(quick) -> None:
    x, weight, bias, target = problem()
    loss = FocalLoss(gamma=2.0)
    for gamma in (2.0, 3.5):
        loss.gamma = gamma
        fused = linear_loss(x, weight, target, loss, bias, chunk_size=4, compiled=True)
        check(fused, FocalLoss(gamma=gamma)(x @ weight.T + bias, target), (x, weight, bias))


def test_many_losses_of_one_process(quick) -> None:
    """More of them than the compiler allows one function to be recompiled."""
    x, weight, bias, target = problem()
    for k in range(12):
        loss = FocalLoss(gamma=1 + k / 4)
        linear_loss(x, weight, target, loss, bias, chunk_size=4, compiled=True)
        assert graphs() == k + 1


def test_a_loss_that_is_gone_leaves_nothing(quick) -> None:
    x, weight, bias, target = problem()
    loss = FocalLoss()
    linear_loss(x, weight, target, loss, bias, compiled=True).backward()
    gone = weakref.ref(loss)
    del loss
    gc.collect()
    assert gone() is None
    assert len(module._compiled) == 0


def test_what_is_not_compiled(quick) -> None:
    """Rows of the user's own, memories, and on a CPU nothing unless it is asked for."""
    x, weight, bias, target = problem()
    for loss, compiled in (
        (Doubled(), True),
        (ALDRKLLoss(20), True),
        (FocalLoss(), "auto"),
        (FocalLoss(), False),
    ):
        fused = linear_loss(x, weight, target, loss, bias, chunk_size=4, compiled=compiled)
        check(fused, loss(x @ weight.T + bias, target), (x, weight, bias))
    assert graphs() == 0


def test_auto_compiles_large_chunks_where_kernels_run_on_triton(quick, monkeypatch) -> None:
    x, weight, bias, target = problem()
    monkeypatch.setattr(module, "rows_on_triton", lambda tensor: True)
    linear_loss(x, weight, target, LDRKLLoss(), bias)
    assert graphs() == 0
    monkeypatch.setattr(module, "_WORTH_COMPILING", 1)
    linear_loss(x, weight, target, LDRKLLoss(), bias)
    assert graphs() == 1
    linear_loss(x, weight, target, FocalLoss(), bias)  # has a kernel
    assert graphs() == 1


def test_inside_a_compiled_caller(quick) -> None:
    x, weight, bias, target = problem()
    loss = LinearLoss(FocalLoss(), chunk_size=4, compiled=True)

    def step(x: Tensor) -> Tensor:
        return 2 * loss(x.sin(), weight, target, bias)

    check(torch.compile(step)(x), 2 * FocalLoss()(x.sin() @ weight.T + bias, target), (x, weight, bias))


def test_an_error_of_the_compiler_says_how_to_do_without(monkeypatch) -> None:
    def broken(graph, inputs):
        raise NotImplementedError("no code for this")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    x, weight, bias, target = problem()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="no code for this") as caught:
        linear_loss(x, weight, target, FocalLoss(), bias, compiled=True)
    assert any("compiled=False" in note for note in caught.value.__notes__)


def test_the_module_passes_it_on() -> None:
    assert "compiled=False" in repr(LinearLoss(FocalLoss(), compiled=False))
