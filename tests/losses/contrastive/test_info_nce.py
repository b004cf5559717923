"""InfoNCE and NT-Xent: plain loops, the limits of the temperature, and what the gradient does to similarities."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from telos.losses import InfoNCELoss, NTXentLoss, info_nce_loss, ntxent_loss
from tests.declaration import Declaration, Inputs, two_view_sample


def scaled_views(inputs: Inputs) -> Inputs:
    return {**inputs, "z1": 3.0 * inputs["z1"], "z2": 0.5 * inputs["z2"]}


def swapped_views(inputs: Inputs) -> Inputs:
    return {**inputs, "z1": inputs["z2"], "z2": inputs["z1"]}


def rotated(inputs: Inputs) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    return {**inputs, "z1": inputs["z1"] @ turn, "z2": inputs["z2"] @ turn}


declarations = [
    Declaration(
        function=info_nce_loss,
        module=InfoNCELoss,
        sample=two_view_sample(),
        differentiable=("z1", "z2"),
        rows=False,
        extreme="",
        growth=2,
        invariances={"scale": scaled_views, "rotation": rotated},
        minimum=2,
    ),
    Declaration(
        function=ntxent_loss,
        module=NTXentLoss,
        sample=two_view_sample(),
        differentiable=("z1", "z2"),
        rows=False,
        extreme="",
        growth=2,
        invariances={"scale": scaled_views, "exchange": swapped_views, "rotation": rotated},
        minimum=2,
    ),
    *(
        Declaration(
            function=None,
            module=tiled,
            sample=two_view_sample(),
            differentiable=("z1", "z2"),
            rows=False,
            extreme="",
            growth=1,
            no_compile="a chunk size that was asked for breaks the graph; tests/kernels/test_contrast.py",
            minimum=2,
        )
        for tiled in (
            lambda: InfoNCELoss(chunk_size=4),
            lambda: InfoNCELoss(symmetric=True, chunk_size=4),
            lambda: NTXentLoss(chunk_size=4),
        )
    ),
]


def views(n: int = 7, dim: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for _ in "12")
    return z1.requires_grad_(), z2.requires_grad_()


def unit_views(n: int = 7, dim: int = 5) -> tuple[Tensor, Tensor]:
    z1, z2 = views(n, dim)
    return normalize(z1.detach(), dim=-1), normalize(z2.detach(), dim=-1)


# ---------------------------------------------------------------------------------------------- definitions


def test_info_nce_is_cross_entropy_with_the_diagonal_as_target() -> None:
    z1, z2 = views()
    logits = normalize(z1, dim=-1) @ normalize(z2, dim=-1).T / 0.2
    one, other = cross_entropy(logits, torch.arange(7)), cross_entropy(logits.T, torch.arange(7))
    torch.testing.assert_close(info_nce_loss(z1, z2, temperature=0.2), one)
    torch.testing.assert_close(info_nce_loss(z1, z2, temperature=0.2, symmetric=True), (one + other) / 2)


def test_ntxent_by_loops() -> None:
    z1, z2 = views(4)
    z = torch.cat([z1, z2])
    total = torch.zeros((), dtype=torch.float64)
    for i in range(8):
        cosines = [z[i] @ z[k] / z[i].norm() / z[k].norm() / 0.3 for k in range(8)]
        candidates = torch.stack([cosines[k] for k in range(8) if k != i])
        total = total + (candidates.exp().sum().log() - cosines[(i + 4) % 8]) / 8
    loss = ntxent_loss(z1, z2, temperature=0.3)
    torch.testing.assert_close(loss, total)
    for slope, want in zip(
        torch.autograd.grad(loss, (z1, z2)), torch.autograd.grad(total, (z1, z2)), strict=True
    ):
        torch.testing.assert_close(slope, want)


@pytest.mark.parametrize("function", [info_nce_loss, ntxent_loss])
def test_inner_products_without_normalisation(function: Any) -> None:
    z1, z2 = views()
    unit = normalize(z1, dim=-1), normalize(z2, dim=-1)
    torch.testing.assert_close(function(*unit, normalize=False), function(z1, z2))
    assert not torch.isclose(function(z1, z2, normalize=False), function(z1, z2), rtol=1e-2)


@pytest.mark.parametrize("function", [info_nce_loss, ntxent_loss])
def test_values_per_example(function: Any) -> None:
    z1, z2 = views()
    each = function(z1, z2, reduction="none")
    assert each.shape == (7,)
    torch.testing.assert_close(each.mean(), function(z1, z2))
    torch.testing.assert_close(each.sum(), function(z1, z2, reduction="sum"))


@pytest.mark.parametrize("module", [InfoNCELoss(), NTXentLoss()])
def test_an_index_changes_nothing(module: torch.nn.Module) -> None:
    """So that a stateless loss can stand where a stateful one is called."""
    z1, z2 = views()
    torch.testing.assert_close(module(z1, z2, index=torch.arange(7)), module(z1, z2), rtol=0.0, atol=0.0)


# ---------------------------------------------------------------------------------------------- tiles


def both_forms(function: Any, views: tuple[Tensor, Tensor], chunk_size: Any, **options: Any) -> None:
    """The tiled form against the dense one: values, and gradients under a random cotangent."""
    tiled, dense = (function(*views, chunk_size=size, **options) for size in (chunk_size, None))
    torch.testing.assert_close(tiled, dense, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(dense)
    inputs = [view for view in views if view.requires_grad]
    for got, want in zip(
        torch.autograd.grad(tiled, inputs, cotangent),
        torch.autograd.grad(dense, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


FORMS = [(info_nce_loss, {}), (info_nce_loss, {"symmetric": True}), (ntxent_loss, {})]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize(("function", "options"), FORMS)
def test_tiles_change_nothing(
    function: Any, options: dict[str, Any], chunk_size: int, normalize: bool, reduction: Any
) -> None:
    for n in (2, 7):
        for temperature in (0.1, 0.01):
            both_forms(
                function,
                views(n),
                chunk_size,
                normalize=normalize,
                temperature=temperature,
                reduction=reduction,
                **options,
            )


@pytest.mark.parametrize(("function", "options"), FORMS)
def test_tiles_of_a_large_batch(function: Any, options: dict[str, Any]) -> None:
    """1,100 examples: more than one tile of 1,024 rows, with a remainder."""
    both_forms(function, views(1100, 3), "auto", **options)


@pytest.mark.parametrize(("function", "options"), FORMS)
def test_a_frozen_view(function: Any, options: dict[str, Any]) -> None:
    for frozen in (0, 1):
        pair = views()
        pair[frozen].requires_grad_(False)
        both_forms(function, pair, 3, **options)


@pytest.mark.parametrize(("function", "options"), FORMS)
def test_second_derivatives_without_tiles(function: Any, options: dict[str, Any]) -> None:
    z1, z2 = views(4)

    def value(z1: Tensor, z2: Tensor) -> Tensor:
        return function(z1, z2, **options)

    assert torch.autograd.gradgradcheck(value, (z1, z2))
    loss = function(z1, z2, chunk_size=2, **options)
    with pytest.raises(RuntimeError, match="pass chunk_size=None"):
        torch.autograd.grad(loss, z1, create_graph=True)


@pytest.mark.parametrize(("function", "options"), FORMS)
def test_functional_transforms_ignore_tiles(function: Any, options: dict[str, Any]) -> None:
    z1, z2 = (z.detach() for z in views())
    stack = torch.stack([z1, 2 * z1 + 1])
    slopes = torch.func.vmap(torch.func.grad(lambda z: function(z, z2, chunk_size=3, **options)))(stack)
    for entry, slope in zip(stack, slopes, strict=True):
        leaf = entry.clone().requires_grad_()
        torch.testing.assert_close(slope, torch.autograd.grad(function(leaf, z2, **options), leaf)[0])


@pytest.mark.bare
@pytest.mark.parametrize(("function", "options"), FORMS)
def test_compiled_code_is_one_graph_at_any_size(function: Any, options: dict[str, Any]) -> None:
    z1, z2 = views(1100, 3)
    torch.compiler.reset()
    compiled = torch.compile(lambda z1, z2: function(z1, z2, **options), fullgraph=True, backend="aot_eager")
    want = function(z1, z2, **options)
    got = compiled(z1, z2)
    torch.testing.assert_close(got, want)
    for one, two in zip(torch.autograd.grad(got, (z1, z2)), torch.autograd.grad(want, (z1, z2)), strict=True):
        torch.testing.assert_close(one, two)


# ---------------------------------------------------------------------------------------------- known values


@pytest.mark.parametrize("n", [2, 5])
def test_equal_views_cannot_be_told_apart(n: int) -> None:
    z = torch.ones(n, 3, dtype=torch.float64)
    torch.testing.assert_close(ntxent_loss(z, z).item(), math.log(2 * n - 1))
    torch.testing.assert_close(info_nce_loss(z, z).item(), math.log(n))


def test_orthonormal_examples() -> None:
    z = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(
        info_nce_loss(z, z, temperature=0.5).item(), math.log(1 + 5 * math.exp(-1 / 0.5))
    )
    # of the 11 candidates one is the partner, 10 are orthogonal
    torch.testing.assert_close(
        ntxent_loss(z, z, temperature=0.5).item(), math.log(1 + 10 * math.exp(-1 / 0.5))
    )


def test_hot_limit_knows_no_hard_negatives() -> None:
    """t (L - log N) tends to -(N - 1) / N s_ii + mean_k s_ik without k = i."""
    z1, z2 = unit_views()
    cosines = z1 @ z2.T
    positive = cosines.diagonal()
    limit = -6 / 7 * positive + (cosines.sum(-1) - positive) / 7
    scaled = 1e4 * (info_nce_loss(z1, z2, temperature=1e4, reduction="none") - math.log(7))
    torch.testing.assert_close(scaled, limit, rtol=0.0, atol=1e-4)
    torch.testing.assert_close(ntxent_loss(z1, z2, temperature=1e6).item(), math.log(13), rtol=0.0, atol=1e-5)


def test_cold_limit_knows_only_the_hardest_negative() -> None:
    """t L tends to max(max_k s_ik - s_ii, 0): a triplet loss without margin."""
    z1, z2 = unit_views()
    cosines = z1 @ z2.T
    others = cosines.masked_fill(torch.eye(7, dtype=torch.bool), -math.inf)
    limit = (others.amax(-1) - cosines.diagonal()).clamp_min(0)
    assert 0 < (limit == 0).sum() < 7
    scaled = 1e-4 * info_nce_loss(z1, z2, temperature=1e-4, reduction="none")
    torch.testing.assert_close(scaled, limit, rtol=0.0, atol=1e-3)


# ---------------------------------------------------------------------------------------------- gradients


def test_pull_balances_push() -> None:
    """With s = z1 z2^T: dL/ds_ii = -(1 - P_ii) / t and dL/ds_ik = P_ik / t, which add up to 0."""
    z1, _ = unit_views(7, 7)
    similarity = (z1 @ z1.T).requires_grad_()
    # the similarities themselves as inner products, with the identity as the second view
    loss = info_nce_loss(similarity, torch.eye(7, dtype=torch.float64), temperature=0.4, normalize=False)
    (slope,) = torch.autograd.grad(7 * loss, similarity)
    torch.testing.assert_close(slope.sum(-1), torch.zeros(7, dtype=torch.float64), rtol=0.0, atol=1e-14)
    probabilities = (similarity / 0.4).softmax(-1)
    torch.testing.assert_close(slope, (probabilities - torch.eye(7, dtype=torch.float64)) / 0.4)


@pytest.mark.parametrize("function", [info_nce_loss, ntxent_loss])
def test_gradient_is_orthogonal_to_every_embedding(function: Any) -> None:
    z1, z2 = views()
    for z, slope in zip((z1, z2), torch.autograd.grad(function(z1, z2), (z1, z2)), strict=True):
        torch.testing.assert_close(
            (z * slope).sum(-1), torch.zeros(7, dtype=torch.float64), rtol=0.0, atol=1e-13
        )


@pytest.mark.parametrize("function", [info_nce_loss, ntxent_loss])
def test_a_zero_embedding_gets_no_gradient(function: Any) -> None:
    """It has no direction to turn in, and the slope of a clamped norm would be of the order of 1e12."""
    z1, z2 = views()
    z1 = z1.detach().clone()
    z1[2] = 0
    z1.requires_grad_()
    loss = function(z1, z2)
    loss.backward()
    assert torch.isfinite(loss)
    assert (z1.grad[2] == 0).all()  # type: ignore[index]
    assert z1.grad.abs().max() < 100  # type: ignore[union-attr]


@pytest.mark.parametrize("function", [info_nce_loss, ntxent_loss])
def test_large_inner_products_stay_finite(function: Any) -> None:
    z1, z2 = (300.0 * z.detach().float().sign() for z in views())
    z1.requires_grad_()
    loss = function(z1, z2, normalize=False, temperature=0.01)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z1.grad).all()  # type: ignore[union-attr]


@pytest.mark.bare
@pytest.mark.parametrize("function", [info_nce_loss, ntxent_loss])
def test_refusals_name_the_argument(function: Any) -> None:
    z1, z2 = views()
    with pytest.raises(ValueError, match="temperature"):
        function(z1, z2, temperature=0.0)
    with pytest.raises(ValueError, match=r"z2 must have shape \(7, 5\)"):
        function(z1, z2[:, :4])
    with pytest.raises(TypeError, match="z1"):
        function(z1.long(), z2)
    with pytest.raises(ValueError, match="at least 2 examples"):
        function(z1[:1], z2[:1])
    with pytest.raises(ValueError, match="chunk_size must be 'auto', None or at least 1, got 0"):
        function(z1, z2, chunk_size=0)
    with pytest.raises(ValueError, match="chunk_size"):
        (InfoNCELoss if function is info_nce_loss else NTXentLoss)(chunk_size=-1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_small_temperatures_do_not_overflow(symmetric: bool) -> None:
    z1, z2 = torch.randn(6, 4), torch.randn(6, 4)
    loss = info_nce_loss(z1, z2, temperature=1e-3, symmetric=symmetric)
    exact = info_nce_loss(z1.double(), z2.double(), temperature=1e-3, symmetric=symmetric)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)
    assert exact > 10
