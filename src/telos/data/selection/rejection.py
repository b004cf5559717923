"""Rejection: candidates are scored first, and only those worth an update are trained on."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from telos.losses._checks import check_floating, check_range, check_shape
from telos.losses.classification.dco import dco_factor


class CoverageRefill:
    r"""Full batches of the examples that N samples do not solve yet, for training with :func:`~telos.losses.dco_loss`.

    The gradient of DCO is that of cross-entropy times a factor that is nearly 0 for most examples of a trained model.
    So score a block of candidates without gradients, keep those whose factor exceeds a threshold, and hand out a batch
    as soon as enough are waiting::

        keep i  if  F(N, p_i) > threshold

    One pass over this object is an epoch. Between two batches the caller updates the model, so that each block is
    scored by the model as it is then; the loss recomputes the factor of what is handed out. Examples still waiting at
    the end of an epoch come first in the next.

    On several ranks every rank must hand out the same examples: let ``score`` gather the log-probabilities.

    Args:
        indices: the candidates of an epoch, a sampler or any other iterable that can be passed over again.
        score: gives the log-probabilities (B,) of the right answers of examples (B,); called under
            ``torch.no_grad``.
        batch_size: examples of a batch.
        n_samples: N, at least 1. At 1 all factors are 1 and every example is kept.
        threshold: smallest factor that is worth an update, in [0, 1); the authors' is 0.1.
        block_size: candidates that are scored at once; ``batch_size`` if not given, as in the authors' code.

    Attributes:
        waiting: examples that were kept and not yet handed out.
        scored: candidates of the current epoch so far.
        kept: how many of them were kept.
        mean_factor: mean of their factors; near 0 there is little left to learn at this N.

    Raises:
        ValueError: for an argument out of range, or scores of a wrong shape.

    Source:
        The batch refilling of Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves
        Mathematical Reasoning, arXiv 2502.07154.

    Example:
        >>> import torch
        >>> p = torch.tensor([0.9, 0.01, 0.02, 0.8, 0.01, 0.7])  # at N = 16 only three are unsolved
        >>> refill = CoverageRefill(range(6), lambda index: p[index].log(), batch_size=2, n_samples=16)
        >>> [batch.tolist() for batch in refill], refill.waiting
        ([[1, 2]], [4])
    """

    def __init__(
        self,
        indices: Iterable[int],
        score: Callable[[Tensor], Tensor],
        *,
        batch_size: int,
        n_samples: float = 16.0,
        threshold: float = 0.1,
        block_size: int | None = None,
    ) -> None:
        check_range("batch_size", batch_size, 1, float("inf"))
        check_range("n_samples", n_samples, 1.0, float("inf"))
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
        block_size = batch_size if block_size is None else block_size
        check_range("block_size", block_size, 1, float("inf"))
        self.indices = indices
        self.score = score
        self.batch_size = batch_size
        self.n_samples = n_samples
        self.threshold = threshold
        self.block_size = block_size
        self.waiting: list[int] = []
        self.scored = self.kept = 0
        self.mean_factor = float("nan")

    def __iter__(self) -> Iterator[Tensor]:
        """The batches of an epoch: examples (batch_size,) of int64."""
        self.scored = self.kept = 0
        total = 0.0
        candidates = iter(self.indices)
        while block := list(islice(candidates, self.block_size)):
            factors = self._factors(torch.tensor(block))
            chosen = [example for example, f in zip(block, factors, strict=True) if f > self.threshold]
            self.scored += len(block)
            self.kept += len(chosen)
            total += sum(factors)
            self.mean_factor = total / self.scored
            self.waiting += chosen
            while len(self.waiting) >= self.batch_size:
                batch, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
                yield torch.tensor(batch)

    @torch.no_grad()
    def _factors(self, examples: Tensor) -> list[float]:
        logps = self.score(examples)
        check_floating("score(examples)", logps)
        check_shape("score(examples)", logps, tuple(examples.shape))
        factors: list[float] = dco_factor(logps, n_samples=self.n_samples).tolist()
        return factors
