"""Tiled contrast against the formulas written with the whole matrix of logits."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from telos.kernels.contrast import (
    check_chunk_size,
    contrast_both_ways,
    contrast_labels,
    contrast_rows,
    label_counts,
    tile_rows,
)

SIZES = [1, 4, 11, 100]  # of tiles, for 11 rows: one by one, with a remainder, exactly all, more than all


def problem(queries: int = 11, keys: int = 11, dim: int = 4, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in (queries, keys))
    return (scale * left).requires_grad_(), right.requires_grad_()


def candidates(queries: Tensor, keys: Tensor, itself: Tensor | None) -> Tensor:
    logits = queries @ keys.T
    if itself is None:
        return logits
    return logits.masked_fill(itself[:, None] == torch.arange(keys.shape[0]), -torch.inf)


def rows(queries: Tensor, keys: Tensor, positive: Tensor, itself: Tensor | None = None) -> Tensor:
    own = (queries * keys[positive]).sum(-1)
    return candidates(queries, keys, itself).exp().sum(-1).log() - own


def by_label(queries: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
    itself = torch.arange(len(labels))
    logits, values = candidates(queries, keys, itself), []
    for i in range(len(labels)):
        others = [p for p in range(len(labels)) if p != i and labels[p] == labels[i]]
        value = sum(logits[i].exp().sum().log() - logits[i, p] for p in others)
        values.append(value / len(others) if others else 0 * queries.sum())
    return torch.stack(values)


def both_ways(queries: Tensor, keys: Tensor) -> Tensor:
    everyone = torch.arange(len(queries))
    return rows(queries, keys, everyone) + rows(keys, queries, everyone)


LABELS = torch.tensor([3, 0, 3, 7, -2, 0, 3, 9, 0, -2, 3])  # 7 and 9 occur once


def tiled(name: str, queries: Tensor, keys: Tensor, chunk_size: int, summed: bool) -> Tensor:
    count = queries.shape[0]
    everyone = torch.arange(count, device=queries.device)
    options: dict[str, Any] = {"chunk_size": chunk_size, "summed": summed}
    if name == "both_ways":
        values = contrast_both_ways(queries, keys, chunk_size=chunk_size)
        return values.sum() if summed else values
    if name == "labels":
        labels = LABELS if count == 11 else everyone // 4
        return contrast_labels(queries, keys, labels, label_counts(labels), **options)
    itself = everyone if name == "itself" else None
    return contrast_rows(queries, keys, everyone.roll(3), itself, **options)


def plain(name: str, queries: Tensor, keys: Tensor) -> Tensor:
    everyone = torch.arange(queries.shape[0])
    if name == "both_ways":
        return both_ways(queries, keys)
    if name == "labels":
        return by_label(queries, keys, LABELS)
    return rows(queries, keys, everyone.roll(3), everyone if name == "itself" else None)


NAMES = ["rows", "itself", "labels", "both_ways"]


def check(got: Tensor, want: Tensor, inputs: tuple[Tensor, ...], cotangent: Tensor | None = None) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(want) if cotangent is None else cotangent
    expected = torch.autograd.grad(want, inputs, cotangent)
    for one, two in zip(torch.autograd.grad(got, inputs, cotangent), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("chunk_size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_formula_with_the_whole_matrix(name: str, chunk_size: int, summed: bool) -> None:
    queries, keys = problem()
    want = plain(name, queries, keys)
    check(tiled(name, queries, keys, chunk_size, summed), want.sum() if summed else want, (queries, keys))


@pytest.mark.parametrize("summed", [True, False])
def test_more_keys_than_queries(summed: bool) -> None:
    queries, keys = problem(7, 12)
    positive, itself = torch.tensor([0, 11, 3, 3, 8, 1, 2]), torch.tensor([5, 4, 4, 11, 0, 0, 9])
    want = rows(queries, keys, positive, itself)
    got = contrast_rows(queries, keys, positive, itself, chunk_size=3, summed=summed)
    check(got, want.sum() if summed else want, (queries, keys))


@pytest.mark.parametrize("name", NAMES)
def test_queries_and_keys_may_be_the_same_tensor(name: str) -> None:
    queries, _ = problem()
    check(tiled(name, 0.5 * queries, queries, 4, True), plain(name, 0.5 * queries, queries).sum(), (queries,))


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_in_the_queries_gets_its_gradient(name: str) -> None:
    queries, keys = problem()
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    check(tiled(name, scale * queries, keys, 4, True), plain(name, scale * queries, keys).sum(), (scale,))


@pytest.mark.parametrize("name", NAMES)
def test_any_layout_of_inputs_and_cotangents(name: str) -> None:
    queries, keys = problem()
    strided = torch.stack([queries, queries], -1)[..., 1], keys.T.contiguous().T
    cotangent = torch.tensor(0.3, dtype=torch.float64).expand(11)
    check(tiled(name, *strided, 4, False), plain(name, queries, keys), (queries, keys), cotangent)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_backward_gives_the_same_gradient(name: str) -> None:
    queries, keys = problem()
    total = tiled(name, queries, keys, 4, True)
    first = torch.autograd.grad(3 * total, (queries, keys), retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(3 * total, (queries, keys)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


def test_examples_without_a_positive_are_keys_only() -> None:
    z, _ = problem()
    values = contrast_labels(z, z, LABELS, label_counts(LABELS), chunk_size=4, summed=False)
    assert (values[[3, 7]] == 0).all()
    assert (values[[0, 1, 2, 4, 5, 6, 8, 9, 10]] > 0).all()
    unique = torch.arange(11)
    total = contrast_labels(z, z, unique, label_counts(unique), chunk_size=4)
    assert total == 0
    assert torch.count_nonzero(torch.autograd.grad(total, z)[0]) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_counts_of_labels(dtype: torch.dtype) -> None:
    labels = torch.tensor([100, 3, 100, 5, 100, 3]).to(dtype)
    strided = torch.stack([labels, labels], -1)[:, 0]
    assert label_counts(strided).tolist() == [3, 2, 3, 1, 3, 2]
    assert label_counts(labels[:0]).shape == (0,)


# ---------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_ten_thousand_in_float64(name: str) -> None:
    """Far beyond where exp overflows, against a softmax that is shifted by its largest logit."""
    queries, keys = problem(scale=3000.0)
    got = tiled(name, queries, keys, 4, False)
    everyone = torch.arange(11)
    itself = everyone if name in ("itself", "labels") else None
    logits = candidates(queries, keys, itself)
    assert logits.masked_fill(logits.isinf(), 0.0).abs().max() > 1e4
    nll = -logits.log_softmax(-1)
    if name == "labels":
        positive = (LABELS[:, None] == LABELS) & (everyone[:, None] != everyone)
        want = torch.where(positive, nll, 0.0).sum(-1) / positive.sum(-1).clamp_min(1)
    elif name == "both_ways":
        want = nll.diagonal() - logits.log_softmax(0).diagonal()
    else:
        want = nll[everyone, everyone.roll(3)]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-10)
    for one, two in zip(
        torch.autograd.grad(got.sum(), (queries, keys)),
        torch.autograd.grad(want.sum(), (queries, keys)),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("name", ["rows", "itself", "labels"])
def test_large_logits_in_float32_never_give_a_negative_value(name: str) -> None:
    """The positive and the sum come from the same product, so that their rounding cancels."""
    queries, keys = (z.detach().float() for z in problem(scale=3000.0))
    assert (tiled(name, queries, keys, 4, False) >= 0).all()


def test_equal_embeddings_of_any_length() -> None:
    """All candidates alike: log of their number, exactly to float32, at logits of 1e8."""
    z = torch.full((11, 4), 5000.0)
    everyone = torch.arange(11)
    together = torch.zeros(11, dtype=torch.long)
    for got, candidates_of_each in (
        (contrast_rows(z, z, everyone, chunk_size=4, summed=False), 11),
        (contrast_rows(z, z, everyone.roll(3), everyone, chunk_size=4, summed=False), 10),
        (contrast_labels(z, z, together, label_counts(together), chunk_size=4, summed=False), 10),
    ):
        want = torch.full((11,), float(candidates_of_each)).log()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    queries, keys = (z.detach().to(dtype).requires_grad_() for z in problem())
    exact = tuple(z.detach().double().requires_grad_() for z in (queries, keys))
    got, want = tiled(name, queries, keys, 4, True), plain(name, *exact).sum()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for one, two in zip(
        torch.autograd.grad(got, (queries, keys)), torch.autograd.grad(want, exact), strict=True
    ):
        assert one.dtype == dtype
        torch.testing.assert_close(one, two.to(dtype), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_reaches_neither_pass(name: str) -> None:
    queries, keys = (z.detach().float().requires_grad_() for z in problem())
    want = torch.autograd.grad(tiled(name, queries, keys, 4, False).sum(), (queries, keys))
    with torch.autocast("cpu", torch.bfloat16):
        total = tiled(name, queries, keys, 4, False).sum()
        got = torch.autograd.grad(total, (queries, keys))
    assert total.dtype == torch.float32
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", NAMES)
def test_nan_propagates(name: str) -> None:
    queries, keys = problem()
    poisoned = keys.detach().clone()
    poisoned[0, 0] = torch.nan
    assert tiled(name, queries, poisoned, 4, True).isnan()
    poisoned = queries.detach().clone()
    poisoned[5, 0] = torch.nan
    values = tiled(name, poisoned, keys, 4, False)
    assert values[5].isnan()
    if name != "both_ways":  # where the query is a candidate of all keys
        assert values.isnan().sum() == 1


# ---------------------------------------------------------------------------------------------- cost


class Products(TorchDispatchMode):
    """Counts products; with one tile each has the size of the matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "frozen", "summed", "products"),
    [
        ("itself", "", True, 3),
        ("itself", "", False, 4),
        ("itself", "queries", True, 2),
        ("itself", "keys", True, 2),
        ("itself", "both", True, 1),
        ("labels", "", True, 3),
        ("both_ways", "", True, 4),
        ("both_ways", "queries", True, 3),
        ("both_ways", "keys", True, 3),
        ("both_ways", "both", True, 1),
    ],
)
def test_products_that_nothing_asks_for_are_not_computed(
    name: str, frozen: str, summed: bool, products: int
) -> None:
    queries, keys = problem()
    queries.requires_grad_(frozen not in ("queries", "both"))
    keys.requires_grad_(frozen not in ("keys", "both"))
    with Products() as counter:
        total = tiled(name, queries, keys, 100, summed).sum()
        if total.requires_grad:
            total.backward()
    assert counter.count == products
    for tensor, is_frozen in ((queries, frozen in ("queries", "both")), (keys, frozen in ("keys", "both"))):
        assert (tensor.grad is None) == is_frozen


class Peak(TorchDispatchMode):
    """Most elements alive at once in storages that were made inside the block, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.largest, self.sizes = 0, 0, 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            self.sizes[key] = size
            self.live += size
            self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def cost(name: str, count: int, summed: bool) -> Peak:
    queries, keys = (torch.empty(count, 256, device="meta", requires_grad=True) for _ in "12")
    with Peak() as peak:
        tiled(name, queries, keys, 1024, summed).sum().backward()
    return peak


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_memory_is_linear(name: str, summed: bool) -> None:
    """Counted without data: four times the examples, four times the memory; N=32,768 takes a few tiles."""
    small, large = cost(name, 8192, summed), cost(name, 32768, summed)
    assert large.largest == 4 * 1024 * 32768 == 4 * small.largest
    assert large.peak <= 4.01 * small.peak
    assert large.peak < 2**29


def test_memory_is_counted_right() -> None:
    with Peak() as peak:
        queries, keys = torch.empty(1000, 3, device="meta"), torch.empty(1000, 3, device="meta")
        logits = queries @ keys.T
    assert peak.largest == logits.nbytes
    assert peak.peak >= logits.nbytes + queries.nbytes + keys.nbytes


# ---------------------------------------------------------------------------------------------- when


def test_auto_tiles_what_is_large() -> None:
    assert tile_rows("auto", 1024, 1024) is None
    assert tile_rows("auto", 1025, 1024) == 1024
    assert tile_rows("auto", 2**20, 2) == 1024
    assert tile_rows(None, 10**6, 10**6) is None
    assert tile_rows(7, 3, 3) == 7
    inside = []
    torch.func.grad(lambda x: (inside.append(tile_rows(7, 3, 3)), x)[1])(torch.tensor(1.0))
    assert inside == [None]


@pytest.mark.bare
@pytest.mark.parametrize("wrong", [0, -3, 2.5, "all"])
def test_wrong_chunk_sizes(wrong: Any) -> None:
    with pytest.raises(ValueError, match="chunk_size must be 'auto', None or at least 1, got"):
        check_chunk_size(wrong)
    with pytest.raises(ValueError, match="chunk_size"):
        tile_rows(wrong, 3, 3)


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_refused_and_not_wrong(name: str, summed: bool) -> None:
    queries, keys = problem()
    total = tiled(name, queries, keys, 4, summed).sum()
    with pytest.raises(RuntimeError, match="pass chunk_size=None"):
        torch.autograd.grad(total, queries, create_graph=True)


@pytest.mark.bare
@pytest.mark.parametrize("name", NAMES)
def test_compiled_callers_break_their_graph_and_go_on(name: str) -> None:
    queries, keys = problem()

    def step(queries: Tensor, keys: Tensor) -> Tensor:
        return 2 * tiled(name, queries.sin(), keys, 4, True)

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager")
    check(compiled(queries, keys), step(queries, keys), (queries, keys))
