"""Cosine scores under every precision, and the masks of pairs."""

import pytest
import torch

from telos.losses._pairs import (
    cosine_logits,
    diagonal,
    negative_pairs,
    normalized_rows,
    positive_pairs,
    same_label,
    scaled_products,
)

LABELS = torch.tensor([4, 0, 4, 7])


def rows(n: int, dim: int = 16, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_cosine_of_every_pair() -> None:
    left, right = rows(5), rows(3, seed=1)
    expected = [[torch.cosine_similarity(a, b, dim=0) for b in right] for a in left]
    torch.testing.assert_close(
        cosine_logits(left, right, 7.0), 7.0 * torch.tensor(expected, dtype=torch.float64)
    )


def test_scale_may_be_learned() -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    left, right = rows(5), rows(3, seed=1)
    (slope,) = torch.autograd.grad(cosine_logits(left, right, scale).sum(), scale)
    torch.testing.assert_close(slope, cosine_logits(left, right, 1.0).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_first(dtype: torch.dtype) -> None:
    left, right = rows(5, dtype=dtype), rows(3, dtype=dtype, seed=1)
    logits = cosine_logits(left, right, 30.0)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits.double(), cosine_logits(left.double(), right.double(), 30.0), rtol=1e-5, atol=1e-5
    )


def test_autocast_does_not_reach_the_product() -> None:
    left, right = rows(5, dtype=torch.float32), rows(3, dtype=torch.float32, seed=1)
    expected = cosine_logits(left, right, 30.0), scaled_products(left, right, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (left @ right.T).dtype == torch.bfloat16
        logits, products = cosine_logits(left, right, 30.0), scaled_products(left, right, 0.1)
    assert torch.equal(logits, expected[0])
    assert torch.equal(products, expected[1])


def test_meta_device() -> None:
    assert cosine_logits(rows(5).to("meta"), rows(3).to("meta"), 2.0).shape == (5, 3)


def test_a_zero_row_stays_zero_without_a_gradient() -> None:
    embeddings = rows(3)
    embeddings[1] = 0
    embeddings.requires_grad_()
    unit = normalized_rows(embeddings)
    torch.testing.assert_close(unit.norm(dim=-1), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    (slope,) = torch.autograd.grad(unit.sum(), embeddings)
    assert (slope[1] == 0).all()
    assert (slope[[0, 2]] != 0).all()


def test_rows_far_from_unit_length() -> None:
    """The direction does not depend on the length."""
    direction = normalized_rows(rows(1, dtype=torch.float32))
    torch.testing.assert_close(normalized_rows(1e-9 * direction), direction)
    torch.testing.assert_close(normalized_rows(1e15 * direction), direction)


def test_masks() -> None:
    same = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    itself = torch.eye(4, dtype=torch.bool)
    assert torch.equal(diagonal(4, LABELS.device), itself)
    assert torch.equal(same_label(LABELS), same)
    assert torch.equal(positive_pairs(LABELS), same & ~itself)
    assert torch.equal(negative_pairs(LABELS), ~same)
