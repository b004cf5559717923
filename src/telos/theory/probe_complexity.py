"""How many examples a probe of frozen features needs: error against sample size, measured."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._checks import check_floating, check_integer, check_range, check_shape

Probe = Callable[[Tensor], Tensor]


class SampleCurve(NamedTuple):
    """Test error against sample size; see :func:`sample_curve`.

    Attributes:
        sizes: (S,) numbers of training examples, increasing.
        errors: (S, R) share of wrong predictions of each of the R repeats.
    """

    sizes: Tensor
    errors: Tensor

    @property
    def mean(self) -> Tensor:
        """(S,) mean error of each size."""
        return self.errors.mean(-1)


def sample_sizes(dim: int, num_classes: int, largest: int) -> list[int]:
    r"""Sizes of the paper's simulation: from 2 K in steps of ``ceil(log d)``, below ``largest``.

    Args:
        dim: number of features d, at least 2.
        num_classes: number of classes K.
        largest: the sizes stay below it; the authors take ``100 d``.

    Returns:
        The sizes.

    Raises:
        ValueError: for ``dim`` below 2 or ``num_classes`` below 1.

    Source:
        Revisiting Discriminative vs. Generative Classifiers: Theory and Implications, arXiv 2302.02334.

    Example:
        >>> sample_sizes(dim=100, num_classes=2, largest=20)
        [4, 9, 14, 19]
    """
    check_range("dim", dim, 2, math.inf)
    check_range("num_classes", num_classes, 1, math.inf)
    return list(range(2 * num_classes, largest, math.ceil(math.log(dim))))


def sample_curve(
    fit: Callable[[Tensor, Tensor], Probe],
    features: Float[Tensor, "examples dim"],
    target: Integer[Tensor, " examples"],
    test_features: Float[Tensor, "tests dim"],
    test_target: Integer[Tensor, " tests"],
    sizes: Sequence[int],
    *,
    repeats: int = 5,
    scale: bool = False,
    stop_below: float | None = None,
    generator: torch.Generator | None = None,
) -> SampleCurve:
    r"""Test error of a probe that is fitted to random subsets of each size.

    A subset that lacks a class is drawn again, as in the authors' protocol, so that every class can be predicted;
    the test set serves all sizes. For the same state of ``generator`` two probes see the same subsets.

    Args:
        fit: ``fit(features, target)`` gives a callable from (N, d) features to (N, K) logits, such as
            ``logistic_probe`` or ``NaiveBayesHead(d, K).fit``.
        features: (M, d) pool of training features.
        target: (M,) labels in [0, K).
        test_features: (N, d).
        test_target: (N,).
        sizes: sample sizes, increasing, from K to M.
        repeats: subsets of each size.
        scale: bring each feature to [0, 1] by the smallest and largest value in the subset (the authors' treatment of
            network features); a feature that is constant there becomes its distance from that constant.
        stop_below: end with the first size whose mean error is below it.
        generator: source of the subsets.

    Returns:
        Sizes, as far as they were measured, and errors.

    Raises:
        ValueError: for a wrong shape, sizes that do not increase or that the pool cannot give, ``repeats`` below 1, or
            where 1,000 draws of a size all lack a class.
        TypeError: for a wrong dtype.

    Source:
        Revisiting Discriminative vs. Generative Classifiers: Theory and Implications, arXiv 2302.02334. In theory the
        size at which naive Bayes is within a given distance of its own best error grows like log d and that of
        multinomial logistic regression like d (RECONSTRUCTED from the abstract); for the bound on the logistic
        surrogate behind it see :func:`telos.theory.h_consistency_bound`.

    Example:
        >>> import torch
        >>> from telos.nn.naive_bayes import NaiveBayesHead
        >>> target = torch.arange(40) % 2
        >>> features = torch.randn(40, 3) + 10 * target[:, None]
        >>> curve = sample_curve(NaiveBayesHead(3, 2).fit, features, target, features, target, [4, 8, 16])
        >>> curve.sizes.tolist(), curve.errors.shape, curve.mean[-1].item()
        ([4, 8, 16], torch.Size([3, 5]), 0.0)
    """
    check_floating("features", features)
    check_shape("features", features, ("M", "d"))
    check_integer("target", target)
    check_shape("target", target, (len(features),))
    check_floating("test_features", test_features)
    check_shape("test_features", test_features, ("N", features.shape[1]))
    check_integer("test_target", test_target)
    check_shape("test_target", test_target, (len(test_features),))
    check_range("repeats", repeats, 1, math.inf)
    classes = target.unique().numel()
    bad = [size for size in sizes if not classes <= size <= len(features)]
    if not sizes or bad or any(b <= a for a, b in pairwise(sizes)):
        raise ValueError(
            f"sizes must increase and lie in [{classes}, {len(features)}], from all classes to the whole pool, got "
            f"{list(sizes)}"
        )
    errors: list[list[float]] = []
    for size in sizes:
        row = []
        for _ in range(repeats):
            chosen = _subset(target, size, classes, generator)
            train, test = features[chosen], test_features
            if scale:
                train, test = _to_unit_range(train, test)
            predicted = fit(train, target[chosen])(test).argmax(-1)
            row.append((predicted != test_target).double().mean().item())
        errors.append(row)
        if stop_below is not None and sum(row) / repeats < stop_below:
            break
    return SampleCurve(torch.tensor(sizes[: len(errors)]), torch.tensor(errors, dtype=torch.float64))


def samples_to_reach(curve: SampleCurve, level: float) -> int | None:
    """The smallest sample size whose mean error is below a level, or ``None`` if none is.

    Args:
        curve: what :func:`sample_curve` measured.
        level: the error to get below; the paper takes the best possible error plus 0.01.

    Returns:
        The number of training examples.

    Source:
        Revisiting Discriminative vs. Generative Classifiers: Theory and Implications, arXiv 2302.02334.

    Example:
        >>> import torch
        >>> curve = SampleCurve(torch.tensor([4, 8, 16]), torch.tensor([[0.3], [0.04], [0.01]]))
        >>> samples_to_reach(curve, 0.05), samples_to_reach(curve, 0.001)
        (8, None)
    """
    below = (curve.mean < level).nonzero()
    return int(curve.sizes[below[0, 0]]) if len(below) else None


def _subset(target: Tensor, size: int, classes: int, generator: torch.Generator | None) -> Tensor:
    for _ in range(1000):
        chosen = torch.randperm(len(target), generator=generator)[:size].to(target.device)
        if target[chosen].unique().numel() == classes:
            return chosen
    raise ValueError(f"no subset of size {size} with all {classes} classes in 1,000 draws; take larger sizes")


def _to_unit_range(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    low, high = train.amin(0), train.amax(0)
    width = torch.where(high > low, high - low, 1)
    return (train - low) / width, (test - low) / width
