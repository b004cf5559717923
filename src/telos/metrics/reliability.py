"""How often at least one of several attempts succeeds."""

from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torchmetrics import Metric

from telos.losses._checks import (
    check_floating,
    check_integer,
    check_range,
    check_shape,
    values_can_be_read,
)
from telos.losses._reduction import at_least_float32


def pass_at_k(
    num_correct: Integer[Tensor, "*problems"], num_samples: Integer[Tensor, "*problems"], k: int
) -> Float[Tensor, "*problems"]:
    r"""Unbiased estimate of the probability that one of k samples is right, from n samples of which c were.

    ::

        1 - C(n - c, k) / C(n, k)

    Args:
        num_correct: right samples c of each problem, any shape.
        num_samples: all samples n of each problem, at least ``k``.
        k: how many attempts there will be.

    Returns:
        One estimate per problem, float64; their mean is pass@k.

    Raises:
        ValueError: for a wrong shape, fewer than k samples, or more right samples than samples.
        TypeError: for a wrong dtype.

    Source:
        Evaluating Large Language Models Trained on Code, arXiv 2107.03374.

    Example:
        >>> import torch
        >>> pass_at_k(torch.tensor([0, 1, 2]), torch.tensor([4, 4, 4]), k=2)
        tensor([0.0000, 0.5000, 0.8333], dtype=torch.float64)
    """
    check_integer("num_correct", num_correct)
    check_integer("num_samples", num_samples)
    check_shape("num_samples", num_samples, tuple(num_correct.shape))
    check_range("k", k, 1, float("inf"))
    if values_can_be_read(num_samples) and values_can_be_read(num_correct) and num_samples.numel():
        if (fewest := int(num_samples.min())) < k:
            raise ValueError(f"num_samples must be at least k = {k}, got {fewest}")
        if ((num_correct < 0) | (num_correct > num_samples)).any():
            raise ValueError("num_correct must lie in [0, num_samples], got a number outside")
    n, wrong = num_samples.double(), (num_samples.long() - num_correct.long()).double()
    possible = wrong >= k  # with fewer wrong samples than attempts one of them is right
    wrong = torch.where(possible, wrong, n)
    # paired so that both differences are exactly 0 without a right sample
    log_share = ((wrong + 1).lgamma() - (n + 1).lgamma()) + ((n - k + 1).lgamma() - (wrong - k + 1).lgamma())
    return torch.where(possible, 0.0 - torch.expm1(log_share.clamp_max(0.0)), 1.0)


def expected_pass_at_n(p: Float[Tensor, "*problems"], n: float) -> Float[Tensor, "*problems"]:
    r"""Probability that one of n samples is right where that of a single one is known: ``1 - (1 - p)^n``.

    Args:
        p: probabilities in [0, 1], any shape.
        n: how many attempts there will be, at least 0, not necessarily whole.

    Returns:
        One probability per problem, float32 for half precision; their mean is pass@n.

    Raises:
        ValueError: for a probability or a number out of range.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> expected_pass_at_n(torch.tensor([0.0, 0.5, 1.0]), 2)
        tensor([0.0000, 0.7500, 1.0000])
    """
    check_floating("p", p)
    check_range("n", n, 0, float("inf"))
    if values_can_be_read(p) and (bad := (p < 0) | (p > 1)).any():
        raise ValueError(f"p must lie in [0, 1], got {p[bad][0].item()}")
    if n == 0:
        return torch.zeros_like(at_least_float32(p))
    return -torch.expm1(n * torch.log1p(-at_least_float32(p)))


class PassAtK(Metric):
    """pass@k over batches and ranks: the mean of :func:`pass_at_k`.

    Example:
        >>> import torch
        >>> metric = PassAtK(k=2)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([4, 4]))
        >>> metric.update(torch.tensor([4]), torch.tensor([4]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    solved: Tensor
    problems: Tensor

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("k", k, 1, float("inf"))
        self.k = k
        self.add_state("solved", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("problems", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, num_correct: Tensor, num_samples: Tensor) -> None:
        """Count problems with their right samples and all their samples."""
        estimates = pass_at_k(num_correct, num_samples, self.k)
        self.solved += estimates.sum()
        self.problems += estimates.numel()

    def compute(self) -> Tensor:
        """The mean so far, 0 without problems."""
        return self.solved / self.problems.clamp_min(1)
