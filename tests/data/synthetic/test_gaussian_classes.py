"""Gaussian classes on one line."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from telos.data.synthetic.gaussian_classes import (
    gaussian_classes_error,
    make_gaussian_classes,
    two_level_covariance,
)


@pytest.mark.parametrize(("dim", "error"), [(2, 0.1103), (4, 0.0569), (10, 0.0095), (20, 0.0006)])
def test_smallest_error_of_two_classes(dim: int, error: float) -> None:
    high = dim // 2
    want = norm.cdf(-math.sqrt(high / dim + (dim - high)))
    assert gaussian_classes_error(two_level_covariance(dim)) == pytest.approx(want, rel=1e-10)
    assert round(want, 4) == error


def test_smallest_error_is_that_of_the_likelihood_rule() -> None:
    """Five classes by the rule of the largest density on 200,000 draws; 4 standard errors."""
    generator = torch.Generator().manual_seed(0)
    covariance = 40 * two_level_covariance(4, correlated=True, generator=generator)
    optimal = gaussian_classes_error(covariance, 5)
    features, target = make_gaussian_classes(200_000, covariance, 5, generator=generator)
    levels = (torch.tensor([-1.0, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64) - 4) / 4
    apart = features[:, None] - levels[:, None]
    distance = torch.einsum("nkd,de,nke->nk", apart, torch.linalg.inv(covariance), apart)
    error = (distance.argmin(-1) != target).double().mean().item()
    assert 0.1 < optimal < 0.8
    assert error == pytest.approx(optimal, abs=4 * (optimal * (1 - optimal) / 200_000) ** 0.5)


@pytest.mark.parametrize(
    ("classes", "means"), [(2, [-1, 1]), (3, [-2, 0, 1]), (5, [-1.25, -0.75, -0.5, 0, 1])]
)
def test_means_and_covariance(classes: int, means: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    covariance = two_level_covariance(5)
    features, target = make_gaussian_classes(100_000, covariance, classes, generator=generator)
    scale = 1.0 if classes == 2 else 2.0 ** (classes - 3)
    for label, mean in enumerate(means):
        own = features[target == label]
        width = covariance.diagonal().sqrt() / scale
        assert ((own.mean(0) - mean).abs() < 5 * width / len(own) ** 0.5).all()
        np.testing.assert_allclose(own.T.cov() * scale**2, covariance, rtol=0.05, atol=0.15)


def test_class_sizes_differ_by_one_at_most_and_order_is_random() -> None:
    _, target = make_gaussian_classes(
        11, two_level_covariance(2), 3, generator=torch.Generator().manual_seed(0)
    )
    assert sorted(target.bincount().tolist()) == [3, 4, 4]
    assert target.tolist() != (torch.arange(11) % 3).tolist()


def test_correlated_covariance_is_the_absolute_value_of_the_papers_matrix() -> None:
    dim = 6
    uniform = torch.rand(dim, dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    factor = 2 * uniform.numpy() - 1
    matrix = factor.T @ factor
    np.fill_diagonal(matrix, [dim] * 3 + [1] * 3)
    found = two_level_covariance(dim, correlated=True, generator=torch.Generator().manual_seed(2)).numpy()
    np.testing.assert_allclose(found @ found, matrix @ matrix, rtol=1e-9, atol=1e-9)
    assert np.linalg.eigvalsh(found).min() > 0
    assert np.linalg.eigvalsh(matrix).min() < 0, "else this tests nothing"


@pytest.mark.bare
def test_doors() -> None:
    with pytest.raises(ValueError, match="dim"):
        two_level_covariance(0)
    with pytest.raises(ValueError, match="num_classes"):
        make_gaussian_classes(4, torch.eye(2), 1)
    with pytest.raises(ValueError, match="covariance must have shape"):
        make_gaussian_classes(4, torch.ones(2, 3))
    with pytest.raises(ValueError, match="positive definite"):
        make_gaussian_classes(4, -torch.eye(2))
    with pytest.raises(TypeError, match="covariance"):
        gaussian_classes_error(torch.eye(2).long())
