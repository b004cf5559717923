"""Gaussian classes whose means lie on one line, with their smallest possible error."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from telos.losses._checks import check_floating, check_range, check_shape


def two_level_covariance(
    dim: int, *, correlated: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    r"""Covariance of the classes: variance d in the first half of the features and 1 in the others.

    With ``correlated`` the entries off the diagonal are those of ``A^T A`` with A uniform in (-1, 1). That matrix S is
    in general not positive; the authors' generator then draws, through its singular value decomposition, from the
    covariance ``|S|``, the matrix with the absolute eigenvalues of S, which is what is returned here.

    Args:
        dim: number of features d.
        correlated: the "hard" mode of the authors' code instead of the "easy" one.
        generator: source of A.

    Returns:
        (d, d) float64.

    Raises:
        ValueError: for ``dim`` below 1.

    Source:
        Revisiting Discriminative vs. Generative Classifiers: Theory and Implications, arXiv 2302.02334.

    Example:
        >>> two_level_covariance(4).diagonal().tolist()
        [4.0, 4.0, 1.0, 1.0]
    """
    check_range("dim", dim, 1, math.inf)
    diagonal = torch.ones(dim, dtype=torch.float64)
    diagonal[: dim // 2] = dim
    if not correlated:
        return diagonal.diag()
    factor = 2 * torch.rand(dim, dim, generator=generator, dtype=torch.float64) - 1
    matrix = factor.T @ factor
    matrix.diagonal().copy_(diagonal)
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.abs()) @ vectors.T


def make_gaussian_classes(
    n: int,
    covariance: Float[Tensor, "dim dim"],
    num_classes: int = 2,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Classes of one covariance whose means are -1, 1, 2, 4, ..., ``2^(K-2)`` in every feature.

    For more than two classes features are shifted and scaled, ``x <- (x - s) / s`` with ``s = 2^(K-3)``.

    Args:
        n: number of examples N.
        covariance: (d, d) of every class, before scaling; see :func:`two_level_covariance`.
        num_classes: number of classes K, at least 2.
        generator: source of the draws.

    Returns:
        ``(features, target)``: (N, d) in the dtype of the covariance and (N,) labels, in random order, class sizes
        equal to within one.

    Raises:
        ValueError: for a covariance that is not square or not positive, ``num_classes`` below 2 or negative ``n``.
        TypeError: for a covariance that is not floating.

    Source:
        Revisiting Discriminative vs. Generative Classifiers: Theory and Implications, arXiv 2302.02334.

    Example:
        >>> import torch
        >>> features, target = make_gaussian_classes(6, two_level_covariance(4), num_classes=3)
        >>> features.shape, target.bincount().tolist()
        (torch.Size([6, 4]), [2, 2, 2])
    """
    check_range("n", n, 0, math.inf)
    levels = _levels(num_classes).to(covariance.device)
    root = _root(covariance)
    labels = torch.arange(n) % num_classes
    target = labels[torch.randperm(n, generator=generator)].to(covariance.device)
    noise = torch.randn(n, len(covariance), generator=generator, dtype=covariance.dtype)
    features = levels.to(covariance)[target, None] + noise.to(covariance.device) @ root.T
    if num_classes > 2:
        scale = 2.0 ** (num_classes - 3)
        features = (features - scale) / scale
    return features, target


def gaussian_classes_error(covariance: Float[Tensor, "dim dim"], num_classes: int = 2) -> float:
    r"""Smallest error that any classifier can have on :func:`make_gaussian_classes`.

    All means lie on the line of the vector of ones, so the classes are told apart along one direction, where they have
    unit variance and stand ``s`` times as far apart, ``s^2 = 1^T S^-1 1``, with thresholds half way::

        error = (2 / K) sum_k Phi(-s gap_k / 2),        gaps between means 2, 1, 2, 4, ...

    Args:
        covariance: (d, d) of every class.
        num_classes: number of classes K, at least 2.

    Returns:
        The error, in [0, 1].

    Raises:
        ValueError: for a covariance that is not square or not positive, or ``num_classes`` below 2.
        TypeError: for a covariance that is not floating.

    Note:
        The numbers in the authors' simulation script are smaller for d = 2 to 20; they count the variances otherwise.

    Source:
        The normal distribution; written for the data of arXiv 2302.02334.

    Example:
        >>> round(gaussian_classes_error(two_level_covariance(4)), 4)
        0.0569
    """
    levels = _levels(num_classes)
    ones = torch.ones(len(covariance), 1, dtype=covariance.dtype, device=covariance.device)
    spread = torch.linalg.solve_triangular(_root(covariance), ones, upper=False).double().norm().cpu()
    return float(2 / num_classes * torch.special.ndtr(-spread * levels.diff() / 2).sum())


def _levels(num_classes: int) -> Tensor:
    check_range("num_classes", num_classes, 2, math.inf)
    return torch.tensor([-1.0] + [2.0**k for k in range(num_classes - 1)], dtype=torch.float64)


def _root(covariance: Tensor) -> Tensor:
    check_floating("covariance", covariance)
    check_shape("covariance", covariance, (len(covariance), len(covariance)))
    root, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        raise ValueError("covariance must be symmetric and positive definite")
    return root
