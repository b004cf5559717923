"""Rejection: candidates are scored first, and only those that pass are trained on, or handed out."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from telos.losses._checks import check_bool, check_floating, check_range, check_shape, values_can_be_read
from telos.losses._reduction import at_least_float32
from telos.losses.classification.dco import dco_factor


class Filtered(NamedTuple):
    """What a rejection filter hands out.

    Attributes:
        samples: (N, ...) one sample for each prompt.
        scores: (N,) their risk, infinite for a NaN.
        draws: (N,) how many samples were drawn for each prompt.
        accepted: (N,) whether the sample passed. Where it did not, it is the one of least risk among all that
            were drawn, and should not be used as if it were safe.
    """

    samples: Tensor
    scores: Tensor
    draws: Tensor
    accepted: Tensor


class FilteredPolicy(NamedTuple):
    """The distribution behind a rejection filter, over outcomes that can be listed.

    Attributes:
        probs: (..., Y) distribution of what is accepted; all zero where nothing is.
        acceptance_rate: (...) probability that a draw is accepted.
        expected_draws: (...) mean number of draws to the first accepted one, infinite where nothing is.
        unfiltered_failure_rate: (...) probability of a failure without the filter; None if failures are not known.
        filtered_failure_rate: (...) the same behind it, 0 where nothing is accepted; None if not known.
    """

    probs: Tensor
    acceptance_rate: Tensor
    expected_draws: Tensor
    unfiltered_failure_rate: Tensor | None
    filtered_failure_rate: Tensor | None


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


def rejection_filter(
    sample: Callable[[Tensor], Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
    num_prompts: int,
    *,
    threshold: float,
    max_draws: int,
    progress: Callable[[int, int], None] | None = None,
) -> Filtered:
    r"""Draws for every prompt until a sample's risk lies below a threshold.

    With the generator's distribution p and the risk r, what is accepted follows::

        q(y) = p(y) [ r(y) < threshold ] / a          a = P_p( r < threshold ),   1 / a draws on average

    The comparison is strict and should be made on logits: probabilities of float32 round to 1 from a logit of 17 on,
    and would all tie. A NaN is never accepted. A prompt without an accepted sample after ``max_draws`` gets the one of
    least risk, and ``accepted`` says so.

    RECONSTRUCTED: the fallback. The paper's generator draws until something passes.

    Args:
        sample: draws one sample for each of the prompts (M,) that it is given, as a tensor (M, ...) whose other
            sizes never change. Its randomness is its own.
        score: ``score(prompts (M,), samples (M, ...))`` gives the risks (M,), logits of the failure.
        num_prompts: N; prompts are numbered from 0.
        threshold: risks below it are accepted; see :func:`threshold_at_fpr`.
        max_draws: most draws for one prompt, at least 1.
        progress: called after each round of draws with the draws so far and the number of prompts still open.

    Returns:
        A sample for each prompt, its risk, the number of draws and whether it was accepted.

    Raises:
        ValueError: for a number out of range, a threshold that is NaN, or scores of a wrong shape.
        TypeError: for scores that are not floating point.

    Source:
        Adversarial Training for High-Stakes Reliability, arXiv 2205.01663.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> found = rejection_filter(
        ...     lambda prompts: torch.randn(len(prompts), generator=generator),
        ...     lambda prompts, samples: samples,
        ...     1000, threshold=-1.0, max_draws=100,
        ... )
        >>> bool((found.samples < -1).all()), round(found.draws.double().mean().item())
        (True, 6)
    """
    check_range("num_prompts", num_prompts, 1, float("inf"))
    check_range("max_draws", max_draws, 1, float("inf"))
    _check_threshold(threshold)

    @torch.no_grad()
    def draw(prompts: Tensor) -> tuple[Tensor, Tensor]:
        samples = sample(prompts)
        risk = score(prompts, samples)
        check_floating("score(prompts, samples)", risk)
        check_shape("score(prompts, samples)", risk, (len(prompts),))
        return samples, at_least_float32(risk).nan_to_num(torch.inf, torch.inf, -torch.inf)

    samples, scores = draw(torch.arange(num_prompts))
    samples, draws = samples.clone(), torch.ones_like(scores, dtype=torch.long)
    for count in range(1, max_draws + 1):
        rows = (~(scores < threshold)).nonzero().squeeze(1)
        if progress is not None:
            progress(count, len(rows))
        if not len(rows) or count == max_draws:
            break
        again, risk = draw(rows.cpu())
        better = risk < scores[rows]
        samples[rows[better]], scores[rows[better]] = again[better], risk[better]
        draws[rows] += 1
    return Filtered(samples, scores, draws, scores < threshold)


def filtered_policy(
    policy_probs: Float[Tensor, "*policies outcomes"],
    risk_scores: Float[Tensor, "*policies outcomes"],
    threshold: float,
    *,
    is_failure: Bool[Tensor, "*policies outcomes"] | None = None,
) -> FilteredPolicy:
    r"""The distribution behind a rejection filter, exactly, over outcomes that can be listed.

    ::

        q(y) = p(y) [ r(y) < threshold ] / a          a = sum_y p(y) [ r(y) < threshold ]

    Args:
        policy_probs: (..., Y) probabilities p of the outcomes.
        risk_scores: (..., Y) their risks r; a NaN is not accepted.
        threshold: risks strictly below it are accepted.
        is_failure: (..., Y) which outcomes are failures, for the failure rates.

    Returns:
        Distribution, acceptance rate, expected draws and failure rates, in the dtype of ``policy_probs`` (float32
        for half precision).

    Raises:
        ValueError: for a wrong shape, probabilities that are negative or do not add up to 1, or a threshold that
            is NaN.
        TypeError: for a wrong dtype.

    Source:
        Adversarial Training for High-Stakes Reliability, arXiv 2205.01663.

    Example:
        >>> import torch
        >>> found = filtered_policy(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([2.0, -1.0, -3.0]), 0.0)
        >>> found.probs, found.expected_draws
        (tensor([0.0000, 0.6000, 0.4000]), tensor(2.))
    """
    check_floating("policy_probs", policy_probs)
    check_floating("risk_scores", risk_scores)
    if policy_probs.ndim < 1:
        raise ValueError("policy_probs must have shape (..., Y), got ()")
    check_shape("risk_scores", risk_scores, tuple(policy_probs.shape))
    _check_threshold(threshold)
    probs = at_least_float32(policy_probs)
    if values_can_be_read(probs):
        total = probs.sum(-1)
        if (probs < 0).any() or ((total - 1).abs() > 1e-2).any():
            raise ValueError("policy_probs must be at least 0 and add up to 1, got others")
    accepted = torch.where(at_least_float32(risk_scores) < threshold, probs, 0.0)
    acceptance = accepted.sum(-1)
    filtered = accepted / torch.where(acceptance > 0, acceptance, 1.0).unsqueeze(-1)
    before = after = None
    if is_failure is not None:
        check_bool("is_failure", is_failure)
        check_shape("is_failure", is_failure, tuple(policy_probs.shape))
        before, after = (torch.where(is_failure, mass, 0.0).sum(-1) for mass in (probs, filtered))
    return FilteredPolicy(filtered, acceptance, acceptance.reciprocal(), before, after)


def threshold_at_fpr(
    scores: Float[Tensor, " examples"], is_failure: Bool[Tensor, " examples"], fpr: float = 0.2
) -> float:
    r"""The lowest threshold that rejects at most a given share of the good examples.

    ::

        smallest t with   #{ good i : not s_i < t } <= fpr * #good

    that is the number just above the (1 - fpr) quantile of the good examples' scores. With ties no more are rejected
    than that; a score of NaN counts as rejected. Take scores that neither training nor an attack has seen, and take
    the threshold again after each training: a classifier whose scores have all moved up would otherwise pass for a
    more robust one.

    Args:
        scores: (N,) risks, logits rather than probabilities, which tie.
        is_failure: (N,) the failures, which are left out; at least one example must be good.
        fpr: largest share of the good examples that may be rejected, in [0, 1]. 0.2 is this library's default;
            the paper's is not established.

    Returns:
        The threshold, for a strict comparison with scores of at least float32. Infinite where too many scores are
        NaN, minus infinite for an ``fpr`` of 1.

    Raises:
        ValueError: for a wrong shape, no good example or a share out of range.
        TypeError: for a wrong dtype.

    Source:
        Adversarial Training for High-Stakes Reliability, arXiv 2205.01663; RECONSTRUCTED.

    Example:
        >>> import torch
        >>> scores = torch.arange(10.0)
        >>> threshold = threshold_at_fpr(scores, torch.zeros(10, dtype=torch.bool), fpr=0.2)
        >>> (scores < threshold).sum()
        tensor(8)
    """
    check_floating("scores", scores)
    check_shape("scores", scores, ("N",))
    check_bool("is_failure", is_failure)
    check_shape("is_failure", is_failure, tuple(scores.shape))
    check_range("fpr", fpr, 0.0, 1.0)
    good = at_least_float32(scores.detach())[~is_failure]
    if not len(good):
        raise ValueError("is_failure must leave at least one good example, got none")
    # 0.29 * 100 is a little less than 29
    kept = len(good) - math.floor(fpr * len(good) + 1e-9)
    if kept == 0:
        return -math.inf
    last = good.sort().values[kept - 1]  # a NaN sorts last
    return math.inf if last.isnan() else torch.nextafter(last, last.new_tensor(math.inf)).item()


def conservative_threshold(
    grid: Sequence[float],
    quality: Callable[[float], tuple[int, int]],
    *,
    target: float = 0.5,
    confidence: float = 0.95,
) -> float | None:
    r"""The lowest threshold of a grid whose filtered outputs are proved good enough.

    A filter that rejects more is safer and, at some point, worse: its outputs are what is left. Outputs are compared
    head to head with unfiltered ones, and the threshold is taken as low as quality allows::

        smallest t with   low( wins(t), comparisons(t) ) >= target

    where ``low`` is the one-sided Clopper-Pearson bound. Thresholds are tried in ascending order until one passes. Any
    of them might pass by luck, so each bound has ``(1 - confidence) / len(grid)`` as its tail; whatever is
    chosen then has the target quality with at least ``confidence``. Needs scipy and torchmetrics.

    RECONSTRUCTED: the paper asks for no loss of quality; grid, bound and correction are this library's.

    Args:
        grid: thresholds to choose from, in any order.
        quality: ``quality(threshold)`` gives (wins, comparisons) of filtered against unfiltered outputs; a tie
            is best settled by a coin. It is called once for each threshold that is tried.
        target: win rate to be reached. At 0.5 filtered outputs must be proved better; to prove that they are not
            noticeably worse, allow for a margin, such as 0.45.
        confidence: of the choice, in (0, 1).

    Returns:
        The threshold, or None where none of the grid passes.

    Raises:
        ValueError: for an empty grid, or a number out of range.

    Source:
        Adversarial Training for High-Stakes Reliability, arXiv 2205.01663.

    Example:
        >>> wins = {-2.0: 430, -1.0: 505, 0.0: 512}
        >>> conservative_threshold(list(wins), lambda threshold: (wins[threshold], 1000), target=0.45)
        -1.0
    """
    from telos.metrics.reliability import failure_rate_interval  # that room needs torchmetrics

    if not grid:
        raise ValueError("grid must hold at least one threshold, got none")
    check_range("target", target, 0.0, 1.0)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    each = 1 - (1 - confidence) / len(grid)
    for threshold in sorted(grid):
        wins, comparisons = quality(threshold)
        if failure_rate_interval(wins, comparisons, each, side="lower").low.item() >= target:
            return threshold
    return None


def _check_threshold(threshold: float) -> None:
    if math.isnan(threshold):
        raise ValueError("threshold must be a number, got nan")
