"""Every public kernel agrees with the plain formula it replaces, and keeps the contracts of a function of tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import telos.kernels
from telos.kernels import (
    SphericalState,
    fused_linear_rows,
    softmax_nll_,
    spherical_forward,
    spherical_refactor,
    spherical_stabilize,
    spherical_state,
    spherical_statistics_loss,
    spherical_step,
    spherical_update,
    spherical_weight,
    triplet_counts,
)
from telos.kernels.contrast import contrast_both_ways, contrast_labels, contrast_rows, label_counts
from telos.kernels.spherical import spherical_backward, spherical_grad_norm
from telos.losses import sequence_logps, token_logps, z_loss
from tests.declaration import Inputs

Random = torch.Generator
N = 5


@dataclass(frozen=True)
class Kernel:
    """One kernel, or one way to call it.

    Attributes:
        name: of the public function, with what tells its ways apart in brackets.
        call: the kernel on the sample's inputs; returns tensors in any nesting.
        plain: what it must return, by the plain formula on the same inputs.
        sample: ``sample(n, generator, dtype)`` gives the inputs for n examples.
        differentiable: the inputs to which a gradient flows; the results of the others have none.
        half: whether half precision is taken, to be computed and returned in float32.
        writes: inputs that the kernel overwrites.
        no_meta: why it cannot run on the meta device; "" if it does.
    """

    name: str
    call: Callable[..., Any]
    plain: Callable[..., Any]
    sample: Callable[[int, Random, torch.dtype], Inputs]
    differentiable: tuple[str, ...] = ()
    half: bool = False
    writes: tuple[str, ...] = ()
    no_meta: str = ""


# ---------------------------------------------------------------------------------------------- fused rows


def normal(*shape: int, generator: Random, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def layer(n: int, generator: Random, dtype: torch.dtype) -> Inputs:
    """An output layer of 6 classes and its input."""
    shapes = {"x": (n, 4), "weight": (6, 4), "bias": (6,)}
    return {name: normal(*shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def rows_sample(n: int, generator: Random, dtype: torch.dtype) -> Inputs:
    inputs = layer(n, generator, dtype)
    inputs["offset"] = normal(n, generator=generator, dtype=dtype)
    inputs["row_weight"] = (
        normal(n, generator=generator, dtype=dtype).abs().masked_fill(torch.arange(n) == 2, 0)
    )
    return inputs


def waves(logits: Tensor, offset: Tensor) -> Tensor:
    return (logits.sin() * logits).sum(-1) * offset


def rows(reduction: str) -> Kernel:
    def call(x, weight, bias, offset, row_weight):
        return fused_linear_rows(
            x,
            weight,
            bias,
            waves,
            offset,
            row_weight=row_weight,
            softcap=3.0,
            chunk_size=2,
            reduction=reduction,
        )

    def plain(x, weight, bias, offset, row_weight):
        values = row_weight * waves(3 * torch.tanh((x @ weight.T + bias) / 3), offset)
        return values.sum() if reduction == "sum" else values

    return Kernel(
        f"fused_linear_rows[{reduction}]", call, plain, rows_sample, ("x", "weight", "bias"), half=True
    )


def nll_sample(n: int, generator: Random, dtype: torch.dtype) -> Inputs:
    target = torch.randint(6, (n,), generator=generator)
    return {"logits": normal(n, 6, generator=generator, dtype=dtype), "target": target}


def nll(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    derivative = logits.softmax(-1) - F.one_hot(target, logits.shape[-1])
    return F.cross_entropy(logits, target, reduction="none"), derivative


def tokens_sample(n: int, generator: Random, dtype: torch.dtype) -> Inputs:
    inputs = layer(3 * n, generator, dtype)
    labels = torch.randint(6, (n, 3), generator=generator)
    labels[:, 1] = -100
    return {**inputs, "x": inputs["x"].reshape(n, 3, 4), "labels": labels}


def token_logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.log_softmax((x @ weight.T + bias) / 0.7, -1)


def logps_of_tokens(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    picked = token_logits(x, weight, bias).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels >= 0, picked, 0.0)


def logps_and_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logps = token_logits(x, weight, bias)
    return logps_of_tokens(x, weight, bias, labels), -(logps.exp() * logps).sum(-1) * (labels >= 0)


def token_kernel(entropy: bool) -> Kernel:
    def call(x, weight, bias, labels):
        return token_logps(x, weight, labels, bias=bias, temperature=0.7, entropy=entropy, chunk_size=2)

    plain = logps_and_entropy if entropy else logps_of_tokens
    name = f"token_logps[{'entropy' if entropy else 'logps'}]"
    return Kernel(name, call, plain, tokens_sample, ("x", "weight", "bias"), half=True)


def sequence_sample(n: int, generator: Random, dtype: torch.dtype) -> Inputs:
    inputs = tokens_sample(n, generator, dtype)
    return {"logits": normal(n, 3, 6, generator=generator, dtype=dtype), "labels": inputs["labels"]}


def logps_of_sequences(logits: Tensor, labels: Tensor) -> Tensor:
    identity = torch.eye(6, dtype=logits.dtype)
    return logps_of_tokens(logits, identity, 0 * identity[0], labels).sum(-1)


# ---------------------------------------------------------------------------------------------- contrast, triplets


def contrast_sample(n: int, generator: Random, dtype: torch.dtype) -> Inputs:
    return {name: normal(n, 4, generator=generator, dtype=dtype) for name in ("queries", "keys")}


def both_ways(queries: Tensor, keys: Tensor) -> Tensor:
    logits = queries @ keys.T
    return logits.logsumexp(-1) + logits.logsumexp(0) - 2 * logits.diagonal()


def labelled_sample(n: int, generator: Random, dtype: torch.dtype) -> Inputs:
    labels = torch.randint(3, (n,), generator=generator) * 7 - 5
    return {**contrast_sample(n, generator, dtype), "labels": labels}


def label_contrast(queries: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
    logits = queries @ keys.T
    itself = torch.eye(len(labels), dtype=torch.bool)
    positive = (labels[:, None] == labels) & ~itself
    nll = logits.masked_fill(itself, -torch.inf).logsumexp(-1, keepdim=True) - logits
    return torch.where(positive, nll, 0.0).sum(-1) / positive.sum(-1).clamp_min(1)


def picked_sample(n: int, generator: Random, dtype: torch.dtype) -> Inputs:
    """Each query has a key of its own, which is no candidate, and two keys belong to none."""
    inputs = contrast_sample(n + 2, generator, dtype)
    itself = torch.arange(n)
    return {**inputs, "queries": inputs["queries"][:n], "positive": itself + 1, "itself": itself}


def picked(queries: Tensor, keys: Tensor, positive: Tensor, itself: Tensor) -> Tensor:
    logits = (queries @ keys.T).scatter(-1, itself[:, None], -torch.inf)
    return F.cross_entropy(logits, positive, reduction="none")


def rows_of_contrast(summed: bool) -> Kernel:
    def plain(**inputs: Tensor) -> Tensor:
        return picked(**inputs).sum() if summed else picked(**inputs)

    def call(**inputs: Tensor) -> Tensor:
        return contrast_rows(**inputs, chunk_size=2, summed=summed)

    name = f"contrast_rows[{'sum' if summed else 'values'}]"
    return Kernel(name, call, plain, picked_sample, ("queries", "keys"), half=True)


def contrast_of_labels(summed: bool) -> Kernel:
    def plain(**inputs: Tensor) -> Tensor:
        return label_contrast(**inputs).sum() if summed else label_contrast(**inputs)

    def call(queries: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
        return contrast_labels(queries, keys, labels, label_counts(labels), chunk_size=2, summed=summed)

    name = f"contrast_labels[{'sum' if summed else 'values'}]"
    return Kernel(name, call, plain, labelled_sample, ("queries", "keys"), half=True)


def distances_sample(n: int, generator: Random, dtype: torch.dtype) -> Inputs:
    inputs = labelled_sample(n, generator, dtype)
    return {"distances": torch.cdist(inputs["queries"].double(), inputs["keys"].double()).to(dtype), **inputs}


def counted(distances: Tensor, labels: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool)
    active = (
        (distances[:, :, None] - distances[:, None, :] + 0.5 > 0) & positive[:, :, None] & ~same[:, None, :]
    )
    active = active.to(distances.dtype)
    return active.sum(2) - active.sum(1), active.sum((1, 2))


# ---------------------------------------------------------------------------------------------- spherical


def spherical_sample(n: int, generator: Random, dtype: torch.dtype) -> Inputs:
    """A layer of 9 classes that some steps have changed, a batch, and gradients of its statistics."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    V, U, omega = draw(9, 3).to(dtype), torch.eye(3, dtype=torch.float64) + 0.3 * draw(3, 3), draw(3)
    W = V.double() @ U + omega
    state = SphericalState(V, U, torch.linalg.inv(U).T.contiguous(), omega, W.T @ W, W.sum(0))
    index = torch.randint(9, (n, 2), generator=generator)
    gradients = {"grad_selected": draw(n, 2), "grad_sums": draw(n), "grad_squares": 0.1 * draw(n)}
    gradients = {name: gradient.to(dtype) for name, gradient in gradients.items()}
    return {"state": state, "H": draw(n, 3).to(dtype), "index": index, **gradients}


def only(*names: str) -> Callable[[int, Random, torch.dtype], Inputs]:
    """The inputs of a spherical layer that a kernel takes."""

    def sample(n: int, generator: Random, dtype: torch.dtype) -> Inputs:
        return {name: value for name, value in spherical_sample(n, generator, dtype).items() if name in names}

    return sample


def weight_of(state: SphericalState) -> Tensor:
    return state.V @ state.U + state.omega


def grad_logits(state, H, index, grad_selected, grad_sums, grad_squares) -> Tensor:
    logits = H @ weight_of(state).T
    gradient = 2 * grad_squares[:, None] * logits + grad_sums[:, None]
    return gradient.scatter_add(1, index, grad_selected)


def factored(W: Tensor) -> SphericalState:
    identity = torch.eye(W.shape[1], dtype=W.dtype)
    return SphericalState(W, identity, identity, torch.zeros_like(W[0]), W.T @ W, W.sum(0))


def what_it_stands_for(state: SphericalState) -> tuple[Tensor, ...]:
    """All that the factors mean: the weights, Q, w_bar, and the product of U and its inverse."""
    return spherical_weight(state), state.Q, state.w_bar, state.U @ state.U_inv_t.T


def spread(result: tuple[Any, ...]) -> list[Any]:
    """A state among the results by what it stands for: its factors are not unique."""
    return [what_it_stands_for(entry) if isinstance(entry, SphericalState) else entry for entry in result]


def dense_state(W: Tensor) -> tuple[Tensor, ...]:
    return W, W.T @ W, W.sum(0), torch.eye(W.shape[1], dtype=W.dtype)


def dense_step(state: SphericalState, H: Tensor, index: Tensor) -> tuple[Any, ...]:
    H, W = (tensor.detach().requires_grad_() for tensor in (H, weight_of(state)))
    loss = z_loss(H @ W.T, index[:, 0]) + z_loss(H @ W.T, index[:, 1])
    grad_H, grad_W = torch.autograd.grad(loss, (H, W))
    return loss.detach(), grad_H, *dense_state((W - 0.1 * grad_W).detach())


def statistics_loss(logits: Tensor, target: Tensor) -> Tensor:
    picked = logits.gather(-1, target[:, None]).squeeze(-1)
    return spherical_statistics_loss(picked, logits.sum(-1), logits.square().sum(-1), 6)


GRADIENTS = ("state", "H", "index", "grad_selected", "grad_sums", "grad_squares")
KERNELS = [
    rows("sum"),
    rows("none"),
    Kernel(
        "softmax_nll_",
        lambda logits, target: (softmax_nll_(logits, target), logits),
        nll,
        nll_sample,
        writes=("logits",),
    ),
    token_kernel(entropy=False),
    token_kernel(entropy=True),
    Kernel(
        "sequence_logps",
        lambda logits, labels: sequence_logps(logits, labels, temperature=0.7),
        logps_of_sequences,
        sequence_sample,
        ("logits",),
        half=True,
    ),
    rows_of_contrast(summed=True),
    rows_of_contrast(summed=False),
    contrast_of_labels(summed=True),
    contrast_of_labels(summed=False),
    Kernel(
        "contrast_both_ways",
        lambda queries, keys: contrast_both_ways(queries, keys, chunk_size=2),
        both_ways,
        contrast_sample,
        ("queries", "keys"),
        half=True,
    ),
    Kernel(
        "label_counts",
        lambda labels, **_: label_counts(labels),
        lambda labels, **_: (labels[:, None] == labels).sum(-1),
        labelled_sample,
    ),
    Kernel(
        "triplet_counts",
        lambda distances, labels, **_: triplet_counts(distances, labels, 0.5),
        counted,
        distances_sample,
    ),
    Kernel(
        "spherical_state",
        lambda state: spherical_state(state.V),
        lambda state: factored(state.V),
        only("state"),
    ),
    Kernel("spherical_weight", spherical_weight, weight_of, only("state")),
    Kernel(
        "spherical_forward",
        spherical_forward,
        lambda state, H, index: (
            (H @ weight_of(state).T).gather(1, index),
            (H @ weight_of(state).T).sum(1),
            (H @ weight_of(state).T).square().sum(1),
        ),
        only("state", "H", "index"),
    ),
    Kernel("spherical_statistics_loss", statistics_loss, z_loss, nll_sample, ("logits",)),
    Kernel(
        "spherical_backward",
        spherical_backward,
        lambda state, **rest: grad_logits(state, **rest) @ weight_of(state),
        only(*GRADIENTS),
    ),
    Kernel(
        "spherical_grad_norm",
        spherical_grad_norm,
        lambda state, H, **rest: (grad_logits(state, H, **rest).T @ H).norm(),
        only(*GRADIENTS),
    ),
    Kernel(
        "spherical_update",
        lambda **inputs: spread(spherical_update(**inputs, lr=0.05, weight_decay=0.2)),
        lambda state, H, **rest: (
            grad_logits(state, H, **rest) @ weight_of(state),
            *dense_state(0.99 * weight_of(state) - 0.05 * grad_logits(state, H, **rest).T @ H),
        ),
        only(*GRADIENTS),
    ),
    Kernel(
        "spherical_step",
        lambda **inputs: spread(spherical_step(**inputs, lr=0.1)),
        dense_step,
        only("state", "H", "index"),
    ),
    Kernel(
        "spherical_stabilize",
        lambda state: what_it_stands_for(spherical_stabilize(state, low=0.9, high=1.1)),
        lambda state: dense_state(weight_of(state)),
        only("state"),
        no_meta="the singular values that left their range decide the shapes",
    ),
    Kernel("spherical_refactor", spherical_refactor, lambda state: factored(weight_of(state)), only("state")),
]

# Public names without a row here, and why.
EXEMPT = {"auto_chunk_size": "a number from two numbers; tests/kernels/test_fused_linear.py"}


each = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


def draw(kernel: Kernel, n: int = N, dtype: torch.dtype = torch.float64) -> Inputs:
    return kernel.sample(n, torch.Generator().manual_seed(0), dtype)


def with_gradients(kernel: Kernel, inputs: Inputs) -> Inputs:
    return {
        name: value.clone().requires_grad_() if name in kernel.differentiable else value
        for name, value in inputs.items()
    }


def copied(inputs: Inputs) -> Inputs:
    return tree_map(lambda value: value.clone(), inputs)


def gradients(kernel: Kernel, results: Any, inputs: Inputs) -> list[Tensor]:
    results = tree_leaves(results)
    cotangents = [torch.linspace(1, 2, r.numel(), dtype=r.dtype).reshape(r.shape) for r in results]
    return list(torch.autograd.grad(results, [inputs[name] for name in kernel.differentiable], cotangents))


def assert_close(found: Any, expected: Any, **tolerances: Any) -> None:
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, **tolerances)


def test_every_public_kernel_has_a_row() -> None:
    rows = {kernel.name.partition("[")[0] for kernel in KERNELS}
    public = {name for name in telos.kernels.__all__ if not isinstance(getattr(telos.kernels, name), type)}
    assert public - rows - set(EXEMPT) == set(), "a public kernel needs a row in KERNELS"


@pytest.mark.parametrize("n", [N, 1, 0])
@each
def test_equals_the_plain_formula(kernel: Kernel, n: int) -> None:
    inputs, others = (with_gradients(kernel, draw(kernel, n)) for _ in range(2))
    # before the kernel, which may write into its inputs
    expected = kernel.plain(**others)
    found = kernel.call(**inputs)
    assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if kernel.differentiable:
        slopes = gradients(kernel, found, inputs)
        assert_close(slopes, gradients(kernel, expected, others), rtol=1e-10, atol=1e-10)


@each
def test_single_precision(kernel: Kernel) -> None:
    found, exact = kernel.call(**draw(kernel, dtype=torch.float32)), kernel.call(**draw(kernel))
    assert_close(found, exact, rtol=1e-3, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.half], ids=lambda kernel: kernel.name)
def test_half_precision_is_computed_in_float32(kernel: Kernel, dtype: torch.dtype) -> None:
    half = with_gradients(kernel, draw(kernel, dtype=dtype))
    raised = {k: v.detach().double() if v.is_floating_point() else v for k, v in half.items()}
    raised = with_gradients(kernel, raised)
    found, exact = kernel.call(**half), kernel.call(**raised)
    assert all(result.dtype == torch.float32 for result in tree_leaves(found))
    assert_close(found, exact, rtol=2e-5, atol=2e-6, check_dtype=False)
    for slope, want in zip(gradients(kernel, found, half), gradients(kernel, exact, raised), strict=True):
        assert slope.dtype == dtype
        torch.testing.assert_close(slope, want.to(dtype), rtol=2e-2, atol=1e-4)


@each
def test_memory_layout_does_not_matter(kernel: Kernel) -> None:
    inputs = draw(kernel)
    strided = tree_map(lambda value: torch.stack([value, value], -1)[..., 0], inputs)
    assert not any(value.is_contiguous() for value in tree_leaves(strided) if value.numel() > 1)
    assert_close(kernel.call(**strided), kernel.call(**inputs))


@each
def test_the_same_inputs_give_the_same_numbers_and_stay_what_they_are(kernel: Kernel) -> None:
    inputs = draw(kernel)
    first = kernel.call(**{**inputs, **copied({name: inputs[name] for name in kernel.writes})})
    again = draw(kernel)
    assert_close(kernel.call(**again), first, rtol=0, atol=0)
    untouched = {name: value for name, value in again.items() if name not in kernel.writes}
    assert_close(untouched, {name: inputs[name] for name in untouched}, rtol=0, atol=0)
    assert all(not torch.equal(again[name], inputs[name]) for name in kernel.writes)


@each
def test_a_graph_only_where_one_is_asked_for(kernel: Kernel) -> None:
    inputs = draw(kernel)
    assert not any(result.requires_grad for result in tree_leaves(kernel.call(**copied(inputs))))
    asking = tree_map(lambda value: value.clone().requires_grad_(value.is_floating_point()), inputs)
    with torch.no_grad():
        assert not any(result.requires_grad for result in tree_leaves(kernel.call(**copied(asking))))
    if not kernel.writes:
        graph = [result.requires_grad for result in tree_leaves(kernel.call(**asking))]
        assert all(graph) if kernel.differentiable else not any(graph)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if not k.no_meta], ids=lambda kernel: kernel.name)
def test_runs_on_the_meta_device(kernel: Kernel) -> None:
    inputs = tree_map(lambda value: value.to("meta"), draw(kernel))
    results = tree_leaves(kernel.call(**with_gradients(kernel, inputs)))
    assert all(result.device.type == "meta" for result in results)
    if kernel.differentiable:
        sum(result.sum() for result in results).backward()
