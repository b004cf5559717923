"""linear_loss and token_logps where models are trained: several ranks, shards, autocast, compiled callers, memory.

The truth is the plain expression, ``loss(x @ weight.T + bias, target)`` in float64 on one process with the whole batch.
"""

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from telos.losses import (
    ClassificationLoss,
    CrossEntropyLoss,
    FocalLoss,
    LinearLoss,
    ZLoss,
    linear_loss,
    sequence_logps,
    token_logps,
)
from tests.conformance.ranks import on_ranks
from tests.kernels.test_fused_linear import Products
from tests.losses.test_linear import LOSSES as EVERY_LOSS
from tests.losses.test_linear import Peak, peak_bytes

CLASSES, DIM, LENGTH, SEQUENCES = 7, 5, 3, 8
EDGES = {2: [0, 3, 8], 3: [0, 2, 2, 8]}  # where the batch is cut; of three ranks one has nothing


class Scaled(ClassificationLoss):
    """A loss with a parameter of its own (one number in a vector: fully_shard takes no scalars)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.3]))

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.scale * logits, target, reduction="none")


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross_entropy": CrossEntropyLoss,
    "z_loss": ZLoss,
    "focal": FocalLoss,  # differentiated by autograd, a chunk at a time
    # two denominators
    "mixture": lambda: CrossEntropyLoss(class_weight=torch.linspace(0.5, 2, CLASSES)) + 0.3 * FocalLoss(),
    "parameter": Scaled,
}
each_loss = pytest.mark.parametrize("name", LOSSES)
each_world = pytest.mark.parametrize("world", EDGES)


class Head(nn.Module):
    """Output layer and loss in one module, so that the weight is whole in its forward."""

    def __init__(self, name: str, fused: bool = True) -> None:
        super().__init__()
        self.lm_head = nn.Linear(DIM, CLASSES)
        self.loss = LOSSES[name]()
        self.fused = fused

    def forward(self, hidden: Tensor, target: Tensor, denominator: Any = None) -> Tensor:
        if not self.fused:
            return self.loss(self.lm_head(hidden), target, denominator=denominator)
        return linear_loss(
            hidden,
            self.lm_head.weight,
            target,
            self.loss,
            self.lm_head.bias,
            chunk_size=4,
            denominator=denominator,
        )


class LanguageModel(nn.Module):
    """Embedding, MLP and head; its forward returns the loss, or the hidden states where no target is given."""

    def __init__(self, name: str = "cross_entropy", *, fused: bool = True, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(CLASSES, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 6), nn.Tanh(), nn.Linear(6, DIM))
        self.head = Head(name, fused)
        if tied:
            self.head.lm_head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor, target: Tensor | None = None, denominator: Any = None) -> Tensor:
        hidden = self.mlp(self.embedding(tokens))
        return hidden if target is None else self.head(hidden, target, denominator)


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and their targets, of which each sequence has another number that count."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(CLASSES, (SEQUENCES, LENGTH), generator=generator)
    target = torch.randint(CLASSES, (SEQUENCES, LENGTH), generator=generator)
    target[0, 1:] = target[3, 0] = target[5, :2] = -100
    return tokens, target


def own_batch() -> tuple[Tensor, ...]:
    low, high = list(pairwise(EDGES[dist.get_world_size()]))[dist.get_rank()]
    return tuple(part[low:high] for part in batch())


def parameter_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def truth(name: str, tied: bool = False, denominator: Any = None) -> dict[str, Tensor]:
    model = LanguageModel(name, fused=False, tied=tied)
    model(*batch(), denominator=denominator).backward()
    return parameter_gradients(model)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(
            found[name].to(want.dtype),
            want,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# ---------------------------------------------------------------------------------- DistributedDataParallel


def with_ddp(name: str, options: dict[str, Any], tied: bool) -> dict[str, Tensor]:
    model = DistributedDataParallel(LanguageModel(name, tied=tied), **options)
    for _ in range(2):
        model.zero_grad()
        model(*own_batch(), denominator="global").backward()
    return parameter_gradients(model)


@pytest.mark.xdist_group("distributed")
@each_world
@each_loss
def test_ddp_equals_one_process(name: str, world: int) -> None:
    for found in on_ranks(world, with_ddp, name, {}, False):
        assert_same(found, truth(name))


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph", "gradient_as_bucket_view"])
def test_options_of_ddp(option: str, tied: bool) -> None:
    for found in on_ranks(2, with_ddp, "focal", {option: True}, tied):
        assert_same(found, truth("focal", tied))


def with_accumulation(name: str) -> dict[str, Tensor]:
    """Micro-batches of one sequence, of which the last one synchronises."""
    model = DistributedDataParallel(LanguageModel(name))
    tokens, target = own_batch()
    # what one rank divides by: the tokens that count in all micro-batches of all ranks, over the ranks
    count = (target != -100).sum().double()
    dist.all_reduce(count)
    denominator = count / dist.get_world_size()
    *first, last = zip(tokens.split(1), target.split(1), strict=True)
    with model.no_sync():
        for micro in first:
            model(*micro, denominator=denominator).backward()
    model(*last, denominator=denominator).backward()
    return parameter_gradients(model)


@pytest.mark.xdist_group("distributed")
@each_world
@each_loss
def test_accumulation_without_synchronising_equals_one_process(name: str, world: int) -> None:
    _, target = batch()
    expected = truth(name, denominator=(target != -100).sum())
    for found in on_ranks(world, with_accumulation, name):
        assert_same(found, expected)


@each_loss
def test_accumulation_on_one_process(name: str) -> None:
    tokens, target = batch()
    count = (target != -100).sum()
    model = LanguageModel(name)
    for micro in zip(tokens.split(3), target.split(3), strict=True):
        model(*micro, denominator=count).backward()
    assert_same(parameter_gradients(model), truth(name, denominator=count))


def with_the_loss_outside(find_unused_parameters: bool) -> dict[str, Tensor] | str:
    model = DistributedDataParallel(LanguageModel(), find_unused_parameters=find_unused_parameters)
    tokens, target = own_batch()
    hidden, layer = model(tokens), model.module.head.lm_head
    loss = linear_loss(hidden, layer.weight, target, CrossEntropyLoss(), layer.bias, denominator="global")
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return parameter_gradients(model)


@pytest.mark.xdist_group("distributed")
@each_world
def test_output_layer_outside_the_forward_of_ddp(world: int) -> None:
    """Right as well, since DDP waits for the gradient of every parameter, wherever it was used."""
    for found in on_ranks(world, with_the_loss_outside, False):
        assert_same(found, truth("cross_entropy"))


@pytest.mark.xdist_group("distributed")
def test_output_layer_outside_the_forward_of_ddp_that_looks_for_unused_parameters() -> None:
    """DDP takes the output layer for unused then, and says so when its gradient comes all the same."""
    for found in on_ranks(2, with_the_loss_outside, True):
        assert "marked as ready twice" in found or "mark a variable ready only once" in found


# ---------------------------------------------------------------------------------- FSDP2


def with_shards(name: str, how: str) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = LanguageModel(name, tied=how == "tied")
    keywords: dict[str, Any] = {"mesh": mesh}
    if how == "layers":
        fully_shard(model.mlp, **keywords)
        fully_shard(model.head, **keywords)
    elif how == "half precision":
        keywords["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, **keywords)
    for _ in range(2):
        model.zero_grad()
        model(*own_batch(), denominator="global").backward()
    return {n: p.grad.full_tensor() for n, p in model.named_parameters()}


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("how", ["root", "layers"])
@each_loss
def test_fully_sharded_equals_one_process(name: str, how: str) -> None:
    for found in on_ranks(2, with_shards, name, how):
        assert_same(found, truth(name))


@pytest.mark.xdist_group("distributed")
def test_fully_sharded_on_three_ranks_with_tied_embeddings() -> None:
    for found in on_ranks(3, with_shards, "focal", "tied"):
        assert_same(found, truth("focal", tied=True))


@pytest.mark.xdist_group("distributed")
@each_loss
def test_fully_sharded_in_bfloat16(name: str) -> None:
    """Within a few roundings of parameters and hidden states to 8 bits."""
    for found in on_ranks(2, with_shards, name, "half precision"):
        assert_same(found, truth(name), tolerance=2e-2)


def with_a_sharded_weight(what: str) -> str:
    """The output layer is sharded by itself, or used outside every forward: the weight is a DTensor."""
    model = LanguageModel()
    tokens, target = own_batch()
    hidden = model(tokens).detach()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.head.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(TypeError) as error:
        if what == "linear_loss":
            linear_loss(hidden, model.head.lm_head.weight, target, CrossEntropyLoss())
        elif what == "token_logps":
            token_logps(hidden, model.head.lm_head.weight, target)
        else:
            model(tokens, target)
    return str(error.value)


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize(
    "what", ["linear_loss", "token_logps", "forward of a model with its output layer apart"]
)
def test_a_sharded_weight_is_refused_with_a_way_out(what: str) -> None:
    for message in on_ranks(2, with_a_sharded_weight, what):
        assert message.startswith("weight of a fused linear layer must be whole, got a DTensor")
        assert "in the forward of the module that was sharded" in message


# ---------------------------------------------------------------------------------- one process


def head_problem(rows: int = 96, dim: int = 48, classes: int = 200) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, dim, generator=generator)
    weight = 0.3 * torch.randn(classes, dim, generator=generator)
    bias = torch.randn(classes, generator=generator)
    return x, weight, bias, torch.randint(classes, (rows,), generator=generator)


def value_and_gradients(
    how: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype
) -> list[Tensor]:
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
    value = how(*leaves)
    return [value.detach().double(), *(g.double() for g in torch.autograd.grad(value, leaves))]


def loss_for(name: str, classes: int) -> nn.Module:
    if name == "mixture":
        return CrossEntropyLoss(class_weight=torch.linspace(0.5, 2, classes)) + 0.3 * FocalLoss()
    return LOSSES[name]()


@each_loss
def test_bfloat16_is_closer_to_the_truth_than_the_plain_expression(name: str) -> None:
    *inputs, target = (t.bfloat16() if t.is_floating_point() else t for t in head_problem())
    loss = loss_for(name, 200)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return loss(x @ weight.T + bias, target)

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_loss(x, weight, target, loss, bias, chunk_size=32)

    exact = value_and_gradients(plain, tuple(inputs), torch.float64)
    eager = value_and_gradients(plain, tuple(inputs), torch.bfloat16)
    ours = value_and_gradients(fused, tuple(inputs), torch.bfloat16)
    for what, right, theirs, found in zip(("loss", "x", "weight", "bias"), exact, eager, ours, strict=True):
        assert (found - right).norm() < (theirs - right).norm(), what


@each_loss
def test_autocast_is_closer_to_the_truth_than_the_plain_expression(name: str) -> None:
    """Both round x and weight to bfloat16, which changes nothing here; only the plain expression rounds the logits."""
    *inputs, target = (t.bfloat16().float() if t.is_floating_point() else t for t in head_problem())
    loss = loss_for(name, 200)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
            return loss(F.linear(x, weight, bias), target)

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            value = linear_loss(x, weight, target, loss, bias, chunk_size=32)
        assert value.dtype == torch.float32
        return value

    exact = value_and_gradients(plain, tuple(inputs), torch.float64)
    eager = value_and_gradients(plain, tuple(inputs), torch.float32)
    ours = value_and_gradients(fused, tuple(inputs), torch.float32)
    for what, right, theirs, found in zip(("loss", "x", "weight", "bias"), exact, eager, ours, strict=True):
        assert (found - right).norm() < (theirs - right).norm(), what


@each_loss
def test_a_model_under_autocast_with_a_scaled_loss(name: str) -> None:
    model = LanguageModel(name).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch())
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = parameter_gradients(model)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert_same(found, truth(name), tolerance=2e-2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["nothing", "x", "weight", "x and weight"])
@each_loss
def test_products_that_nothing_asks_for_are_not_computed(name: str, frozen: str, reduction: Any) -> None:
    x, weight, _, target = head_problem()
    x.requires_grad_("x" not in frozen)
    weight.requires_grad_("weight" not in frozen)
    with Products() as products:
        loss = linear_loss(x, weight, target, loss_for(name, 200), reduction=reduction)
        if loss.requires_grad:
            loss.sum().backward()
    # the logits, once more where the gradients wait for backward, and one for each gradient
    backward = loss.requires_grad
    assert products.count == 1 + (reduction == "none" and backward) + x.requires_grad + weight.requires_grad
    assert backward is (frozen != "x and weight" or name == "parameter")


def test_a_frozen_model_builds_no_graph_and_keeps_nothing() -> None:
    x, weight, _, target = head_problem()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Products() as products:
            loss = linear_loss(
                x.requires_grad_(not torch.is_inference_mode_enabled()), weight, target, FocalLoss()
            )
        assert not loss.requires_grad
        assert products.count == 1


@each_loss
def test_tied_embeddings(name: str) -> None:
    model = LanguageModel(name, tied=True)
    model(*batch()).backward()
    assert_same(parameter_gradients(model), truth(name, tied=True))


@pytest.mark.bare
@pytest.mark.parametrize("what", ["linear_loss", "LinearLoss", "token_logps"])
def test_a_compiled_caller_has_one_graph_break(what: str) -> None:
    x, weight, bias, target = head_problem()
    module, focal = LinearLoss(FocalLoss()), FocalLoss()

    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        hidden = x.sin()
        if what == "linear_loss":
            return 2 * linear_loss(hidden, weight, target, focal, bias)
        if what == "LinearLoss":
            return 2 * module(hidden, weight, target, bias)
        return 2 * token_logps(hidden[None], weight, target[None], bias=bias).sum()

    torch.compiler.reset()
    explained = torch._dynamo.explain(step)(x, weight, bias)
    assert (explained.graph_break_count, explained.graph_count) == (1, 2)
    compiled = torch.compile(step, backend="aot_eager")
    inputs = (x, weight, bias)
    for got, want in zip(
        value_and_gradients(compiled, inputs, torch.float64),
        value_and_gradients(step, inputs, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.bare
@each_loss
def test_a_compiled_model(name: str) -> None:
    torch.compiler.reset()
    model = LanguageModel(name)
    torch.compile(model, backend="aot_eager")(*batch()).backward()
    assert_same(parameter_gradients(model), truth(name))


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_loss
def test_activation_checkpointing(name: str, use_reentrant: bool) -> None:
    model = LanguageModel(name)
    tokens, target = batch()
    hidden = model.embedding(tokens)

    def block(hidden: Tensor) -> Tensor:
        return model.head(model.mlp(hidden), target)

    checkpoint(block, hidden, use_reentrant=use_reentrant).backward()
    assert_same(parameter_gradients(model), truth(name))


@each_loss
def test_functional_call(name: str) -> None:
    model = LanguageModel(name)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    loss = torch.func.functional_call(model, leaves, batch())
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert_same(found, truth(name))
    assert parameter_gradients(model) == {}


@pytest.mark.bare
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_transforms_are_refused(transform: Any) -> None:
    x, weight, _, target = head_problem()

    def loss(x: Tensor) -> Tensor:
        return linear_loss(x, weight, target, FocalLoss())

    def logps(x: Tensor) -> Tensor:
        return token_logps(x[None], weight, target[None]).sum()

    for function in (loss, logps):
        with pytest.raises(RuntimeError, match=r"no transform of torch\.func; compute the logits"):
            transform(function)(x if transform is torch.func.grad else x[None])


@each_loss
def test_copies_of_the_module(name: str) -> None:
    x, weight, bias, target = head_problem()
    module = LinearLoss(loss_for(name, 200), softcap=5.0, chunk_size=40)
    want = module(x, weight, target, bias)
    fresh = LinearLoss(loss_for(name, 200), softcap=5.0)
    fresh.load_state_dict(module.state_dict())
    for twin in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        torch.testing.assert_close(twin(x, weight, target, bias), want)
    assert repr(module)


def test_a_weight_that_is_computed() -> None:
    """A normalised output layer: the gradient flows on through the weight."""
    *inputs, target = head_problem()

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(x @ F.normalize(weight).T + bias, target)

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_loss(x, F.normalize(weight), target, CrossEntropyLoss(), bias)

    for got, want in zip(
        value_and_gradients(fused, tuple(inputs), torch.float64),
        value_and_gradients(plain, tuple(inputs), torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_an_optimizer_that_steps_in_backward() -> None:
    """Its hook runs once for each parameter, with the whole gradient."""
    model = LanguageModel("focal")
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert name not in found
            found[name] = parameter.grad.clone()  # type: ignore[union-attr]
            parameter.grad = None

        return hook

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(keep(name))
    model(*batch()).backward()
    assert_same(found, truth("focal"))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_loss
def test_backward_again_and_a_second_derivative(name: str, reduction: Any) -> None:
    x, weight, _, target = head_problem(rows=9, dim=4, classes=CLASSES)
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    loss = LOSSES[name]().double()
    inputs = (x, weight, *loss.parameters())
    fused = linear_loss(x, weight, target, loss, chunk_size=4, reduction=reduction)
    for part in loss.modules():
        if isinstance(part, ClassificationLoss):
            part.reduction = reduction
    plain = loss(x @ weight.T, target)
    weights = torch.linspace(1, 2, 9, dtype=torch.float64)[: fused.numel()].reshape(fused.shape)
    first, _, third = (
        checked_gradients(fused, plain, inputs, factor * weights) for factor in (1.0, -2.0, 0.5)
    )
    for one, other in zip(first, third, strict=True):  # no backward writes into what an earlier one gave away
        torch.testing.assert_close(0.5 * one, other, rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fused, x, weights, create_graph=True)


def checked_gradients(
    fused: Tensor, plain: Tensor, inputs: tuple[Tensor, ...], cotangent: Tensor
) -> tuple[Tensor, ...]:
    found, expected = (
        torch.autograd.grad(value, inputs, cotangent, retain_graph=True) for value in (fused, plain)
    )
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    return found


# ---------------------------------------------------------------------------------- memory


ROWS, WIDTH, MANY, CHUNK = 512, 16, 2048, 32


def extra_bytes(how: Callable[[Tensor, Tensor], Tensor], gradients: bool = True) -> int:
    """Most bytes alive at once beyond inputs, output and gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator).requires_grad_(gradients)
    weight = torch.randn(MANY, WIDTH, generator=generator).requires_grad_(gradients)
    with torch.set_grad_enabled(gradients), Peak() as peak:
        peak.sizes.update(
            {tensor.untyped_storage()._cdata: 0 for tensor in (x, weight)}
        )  # nor do their views count
        value = how(x, weight)
        if gradients:
            value.sum().backward()
    return peak.peak - value.nbytes - gradients * (x.nbytes + weight.nbytes)


def many_labels() -> Tensor:
    target = torch.randint(MANY, (ROWS,), generator=torch.Generator().manual_seed(1))
    target[::7] = -100
    return target


def wide(name: str) -> nn.Module:
    """A loss of the table whose weights fit the many classes."""
    loss = EVERY_LOSS[name]()
    for part in loss.modules():
        if isinstance(part, ClassificationLoss) and part.class_weight is not None:
            part.class_weight = torch.linspace(0.5, 2, MANY)
    return loss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", EVERY_LOSS)
def test_memory_shrinks_to_an_eighth(name: str, reduction: Any) -> None:
    """With chunks of a sixteenth of the rows, of which some are ignored."""
    target, loss = many_labels(), wide(name)
    fused = extra_bytes(
        lambda x, weight: linear_loss(x, weight, target, loss, chunk_size=CHUNK, reduction=reduction)
    )
    plain = extra_bytes(lambda x, weight: loss(x @ weight.T, target))
    assert plain > 2 * 4 * ROWS * MANY  # logits and their gradient
    assert 0 < fused <= plain / 8


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "name", ["cross_entropy", "cross_entropy_weighted", "comp_sum_half", "mae", "z_loss"]
)
def test_losses_with_a_derivative_by_hand_hold_one_chunk(name: str, reduction: Any, gradients: bool) -> None:
    target, loss = many_labels(), wide(name)
    extra = extra_bytes(
        lambda x, weight: linear_loss(x, weight, target, loss, chunk_size=CHUNK, reduction=reduction),
        gradients,
    )
    assert 4 * CHUNK * MANY <= extra <= 1.5 * 4 * CHUNK * MANY


def logps_of_logits(logits: Tensor, labels: Tensor, temperature: float, entropy: bool) -> Tensor:
    result = sequence_logps(logits, labels, temperature=temperature)
    if entropy:
        softmax = torch.distributions.Categorical(logits=logits / temperature, validate_args=False)
        result = result + softmax.entropy().sum(-1)
    return result


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_memory_of_token_logps(temperature: float, entropy: bool) -> None:
    labels = many_labels().reshape(8, -1)

    def fused(x: Tensor, weight: Tensor) -> Tensor:
        result = token_logps(
            x.reshape(8, -1, WIDTH),
            weight,
            labels,
            temperature=temperature,
            entropy=entropy,
            chunk_size=CHUNK,
        )
        return torch.stack(result) if isinstance(result, tuple) else result

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return logps_of_logits((x @ weight.T).reshape(8, -1, MANY), labels, temperature, entropy)

    # without an entropy the logits of a chunk are all there is, with one what autograd keeps of a chunk
    for gradients in (True, False):
        extra = extra_bytes(fused, gradients)
        assert 4 * CHUNK * MANY <= extra <= (7 if entropy else 1.5) * 4 * CHUNK * MANY
        assert extra <= extra_bytes(plain) / 8


@pytest.mark.parametrize("entropy", [False, True])
def test_memory_of_token_logps_at_full_size(entropy: bool) -> None:
    """Counted without data, at 4,096 tokens, D=512 and C=50,257 in float32: an eighth of what the logits need."""
    x, weight = torch.empty(4096, 512, device="meta"), torch.empty(50257, 512, device="meta")
    labels = torch.empty(8, 512, dtype=torch.long, device="meta")

    def fused(x: Tensor, weight: Tensor) -> Tensor:
        result = token_logps(x.reshape(8, 512, 512), weight, labels, entropy=entropy)
        return (sum(result) if isinstance(result, tuple) else result).sum()

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return logps_of_logits((x @ weight.T).reshape(8, 512, -1), labels, 1.0, entropy).sum()

    assert 0 < peak_bytes(fused, x, weight) <= peak_bytes(plain, x, weight) / 8
