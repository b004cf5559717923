import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from telos.data.selection.rejection import (
    CoverageRefill,
    conservative_threshold,
    filtered_policy,
    rejection_filter,
    threshold_at_fpr,
)
from telos.losses.classification.dco import DCOLoss, dco_factor


def scores(*p: float) -> Tensor:
    return torch.tensor(p, dtype=torch.float64).log()


def test_hands_out_full_batches_of_what_is_unsolved_in_order() -> None:
    logps = scores(0.9, 0.01, 0.8, 0.02, 0.01, 0.7, 0.03, 0.01, 0.02)
    refill = CoverageRefill(range(9), lambda index: logps[index], batch_size=2, n_samples=16, block_size=4)
    assert [batch.tolist() for batch in refill] == [[1, 3], [4, 6], [7, 8]]
    assert refill.waiting == []
    assert (refill.scored, refill.kept) == (9, 6)
    assert refill.mean_factor == pytest.approx(dco_factor(logps, n_samples=16).mean().item())


def test_what_is_left_comes_first_in_the_next_epoch() -> None:
    logps = scores(0.01, 0.01, 0.01, 0.9)
    refill = CoverageRefill([0, 1, 2, 3], lambda index: logps[index], batch_size=2)
    assert [batch.tolist() for batch in refill] == [[0, 1]]
    assert refill.waiting == [2]
    assert [batch.tolist() for batch in refill] == [[2, 0], [1, 2]]


def test_one_sample_keeps_everything() -> None:
    refill = CoverageRefill(
        range(4), lambda index: scores(0.999).expand(len(index)), batch_size=2, n_samples=1
    )
    assert [batch.tolist() for batch in refill] == [[0, 1], [2, 3]]


def test_solved_examples_end_the_epoch_without_a_batch() -> None:
    refill = CoverageRefill(range(5), lambda index: scores(0.99).expand(len(index)), batch_size=1)
    assert list(refill) == []
    assert (refill.scored, refill.kept) == (5, 0)


def test_threshold() -> None:
    logps = scores(0.1, 0.2, 0.3)
    factors = dco_factor(logps, n_samples=8).tolist()
    refill = CoverageRefill(
        range(3), lambda index: logps[index], batch_size=1, n_samples=8, threshold=factors[1]
    )
    assert [batch.tolist() for batch in refill] == [[0]]  # only what exceeds it


def test_each_block_is_scored_by_the_model_as_it_is() -> None:
    """Training on what is handed out solves it, and later blocks then hold less."""
    logits = torch.nn.Parameter(torch.zeros(2))
    target = torch.zeros(6, dtype=torch.long)

    def score(index: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return logits.log_softmax(-1)[target[index]]

    refill = CoverageRefill(range(6), score, batch_size=2, n_samples=4)
    loss, batches = DCOLoss(4), 0
    for batch in refill:
        loss(logits.expand(len(batch), 2), target[batch]).backward()
        with torch.no_grad():
            logits -= 100 * logits.grad
        batches += 1
    assert (batches, refill.scored) == (1, 6)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must lie in"),
        ({"n_samples": 0.5}, "n_samples must lie in"),
        ({"threshold": 1.0}, "threshold must lie in"),
        ({"block_size": 0}, "block_size must lie in"),
    ],
)
def test_doors(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoverageRefill(range(3), lambda index: index.float(), **{"batch_size": 1, **options})


@pytest.mark.bare
def test_scores_are_checked() -> None:
    with pytest.raises(ValueError, match="score"):
        next(iter(CoverageRefill(range(3), lambda index: torch.zeros(5), batch_size=2)))
    with pytest.raises(TypeError, match="score"):
        next(iter(CoverageRefill(range(3), lambda index: index, batch_size=2)))


# ---------------------------------------------------------------------------------------------- filter


PROBS = torch.tensor([0.05, 0.3, 0.1, 0.2, 0.15, 0.2], dtype=torch.float64)
RISKS = torch.tensor([-3.0, 2.0, -1.0, 0.0, float("nan"), -0.5], dtype=torch.float64)


def generator_of(probs: Tensor, seed: int = 0) -> Callable[[Tensor], Tensor]:
    source = torch.Generator().manual_seed(seed)
    return lambda prompts: torch.multinomial(probs, len(prompts), replacement=True, generator=source)


def test_filter_draws_from_the_filtered_policy() -> None:
    n, expected = 20_000, filtered_policy(PROBS, RISKS, 0.0)
    found = rejection_filter(
        generator_of(PROBS), lambda prompts, drawn: RISKS[drawn], n, threshold=0.0, max_draws=1000
    )
    assert found.accepted.all()
    counts = torch.bincount(found.samples, minlength=6)
    possible = expected.probs > 0
    assert possible.tolist() == [True, False, True, False, False, True]  # neither a tie nor a NaN
    assert (counts[~possible] == 0).all()
    assert chisquare(counts[possible], n * expected.probs[possible]).pvalue > 1e-3
    a = expected.acceptance_rate.item()
    assert a == pytest.approx(0.35)
    # draws are geometric; 4 standard errors
    assert found.draws.double().mean().item() == pytest.approx(1 / a, abs=4 * math.sqrt((1 - a) / n) / a)


def test_fallback_is_the_least_risk_and_says_so() -> None:
    risks = iter([[5.0, 1.0, math.nan, 3.0], [4.0, math.nan, 1.9], [4.5, math.nan]])
    rounds, asked, told = iter(range(3)), [], []

    def sample(prompts: Tensor) -> Tensor:
        asked.append(prompts.tolist())
        return torch.stack([prompts, torch.full_like(prompts, next(rounds))], 1)

    found = rejection_filter(
        sample,
        lambda prompts, samples: torch.tensor(next(risks)),
        4,
        threshold=2.0,
        max_draws=3,
        progress=lambda count, left: told.append((count, left)),
    )
    assert asked == [[0, 1, 2, 3], [0, 2, 3], [0, 2]]
    assert told == [(1, 3), (2, 2), (3, 2)]
    assert found.samples.tolist() == [[0, 1], [1, 0], [2, 0], [3, 1]]
    assert found.scores.tolist() == [4.0, 1.0, math.inf, pytest.approx(1.9)]
    assert found.draws.tolist() == [3, 1, 3, 2]
    assert found.accepted.tolist() == [False, True, False, True]


def test_nothing_is_drawn_once_all_are_accepted() -> None:
    told = []
    found = rejection_filter(
        lambda prompts: prompts,
        lambda prompts, samples: samples.half(),
        3,
        threshold=2.5,
        max_draws=9,
        progress=lambda count, left: told.append((count, left)),
    )
    assert told == [(1, 0)]
    assert found.scores.dtype == torch.float32
    assert found.draws.tolist() == [1, 1, 1]


def test_filtered_policy_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    risks = torch.tensor([[0.0, 1.0, 2.0], [3.0, math.nan, 2.0]])
    failure = torch.tensor([[False, True, True], [False, True, True]])
    found = filtered_policy(probs, risks, 2.0, is_failure=failure)
    torch.testing.assert_close(found.probs, torch.tensor([[2 / 3, 1 / 3, 0], [0, 0, 0]]))
    assert found.acceptance_rate.tolist() == [0.75, 0.0]
    assert found.expected_draws.tolist() == [pytest.approx(4 / 3), math.inf]
    assert found.unfiltered_failure_rate.tolist() == [0.5, 0.5]
    assert found.filtered_failure_rate.tolist() == [pytest.approx(1 / 3), 0.0]
    assert filtered_policy(probs, risks, 2.0).filtered_failure_rate is None


def test_failures_get_rarer_with_the_threshold_where_risks_rank_them() -> None:
    source = torch.Generator().manual_seed(0)
    probs = torch.rand(40, generator=source, dtype=torch.float64)
    probs /= probs.sum()
    risks = torch.randn(40, generator=source, dtype=torch.float64)
    failure = risks > 0.3
    thresholds = torch.linspace(2.0, -1.0, 30).tolist()
    rates = [
        filtered_policy(probs, risks, t, is_failure=failure).filtered_failure_rate.item() for t in thresholds
    ]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.2
    assert rates[-1] == 0


# ---------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize("fpr", [0.0, 0.1, 0.29, 0.5, 0.99])
@pytest.mark.parametrize("ties", [False, True])
def test_lowest_threshold_at_a_false_positive_rate(fpr: float, ties: bool) -> None:
    source = torch.Generator().manual_seed(0)
    scores = torch.randn(150, generator=source)
    if ties:
        scores = scores.round()
    failure = torch.arange(150) >= 100
    good, threshold = scores[:100], threshold_at_fpr(scores, failure, fpr)
    allowed = round(100 * fpr)
    assert int((~(good < threshold)).sum()) <= allowed
    # a lower one, such as the highest accepted score itself, would reject more
    assert int((~(good < good[good < threshold].max())).sum()) > allowed
    if not ties:
        assert int((~(good < threshold)).sum()) == allowed


def test_saturated_scores_are_not_all_rejected() -> None:
    probabilities = torch.tensor([17.0, 18.0, 20.0, 25.0, -1.0]).sigmoid()
    good = torch.zeros(5, dtype=torch.bool)
    threshold = threshold_at_fpr(probabilities, good, 0.4)
    assert (probabilities < threshold).all()  # four tie at 1, and only two may be rejected
    logits = torch.tensor([17.0, 18.0, 20.0, 25.0, -1.0])
    assert (logits < threshold_at_fpr(logits, good, 0.4)).tolist() == [True, True, False, False, True]


def test_threshold_ignores_failures_and_counts_a_nan_as_rejected() -> None:
    scores = torch.tensor([1.0, 2.0, math.nan, 3.0, 100.0])
    failure = torch.tensor([False, False, False, False, True])
    assert threshold_at_fpr(scores, failure, 0.25) == torch.nextafter(torch.tensor(3.0), torch.tensor(9.0))
    assert threshold_at_fpr(scores, failure, 0.5) == torch.nextafter(torch.tensor(2.0), torch.tensor(9.0))
    assert threshold_at_fpr(scores, failure, 0.0) == math.inf
    assert threshold_at_fpr(scores, failure, 1.0) == -math.inf


def test_threshold_of_half_precision_holds_in_float32() -> None:
    scores = torch.arange(10.0).bfloat16()
    threshold = threshold_at_fpr(scores, torch.zeros(10, dtype=torch.bool), 0.3)
    assert int((scores.float() < threshold).sum()) == 7


def test_threshold_moves_with_the_scores() -> None:
    """A classifier whose scores all moved accepts exactly what it accepted."""
    source = torch.Generator().manual_seed(0)
    scores, failure = torch.randn(200, generator=source, dtype=torch.float64), torch.arange(200) % 3 == 0
    before = scores < threshold_at_fpr(scores, failure, 0.2)
    after = scores + 5 < threshold_at_fpr(scores + 5, failure, 0.2)
    assert torch.equal(before, after)


def test_conservative_threshold_is_the_lowest_that_is_proved() -> None:
    wins, asked = {0.0: 400, 1.0: 480, 2.0: 520, 3.0: 530}, []

    def quality(threshold: float) -> tuple[int, int]:
        asked.append(threshold)
        return wins[threshold], 1000

    assert conservative_threshold([2.0, 0.0, 3.0, 1.0], quality, target=0.47) == 2.0
    assert asked == [0.0, 1.0, 2.0]
    assert conservative_threshold(list(wins), quality, target=0.55) is None


def test_a_grid_of_worthless_thresholds_rarely_passes() -> None:
    """Twenty thresholds of a true win rate at the target: one of them passes in at most 5 % of the trials."""
    source, trials, passed = torch.Generator().manual_seed(0), 100, 0
    for _ in range(trials):
        drawn = torch.randint(2, (20, 200), generator=source).sum(1).tolist()
        luck = conservative_threshold(
            range(20), lambda threshold, drawn=drawn: (drawn[int(threshold)], 200), target=0.5
        )
        passed += luck is not None
    assert passed <= 0.05 * trials + 3 * math.sqrt(0.05 * 0.95 * trials)


@pytest.mark.bare
def test_doors_of_the_filter() -> None:
    def score(prompts: Tensor, samples: Tensor) -> Tensor:
        return samples.double()

    def sample(prompts: Tensor) -> Tensor:
        return prompts

    with pytest.raises(ValueError, match="max_draws must lie in"):
        rejection_filter(sample, score, 2, threshold=0.0, max_draws=0)
    with pytest.raises(ValueError, match="num_prompts must lie in"):
        rejection_filter(sample, score, 0, threshold=0.0, max_draws=1)
    with pytest.raises(ValueError, match="threshold must be a number, got nan"):
        rejection_filter(sample, score, 2, threshold=math.nan, max_draws=1)
    with pytest.raises(ValueError, match="must have shape"):
        rejection_filter(sample, lambda prompts, samples: torch.zeros(5), 2, threshold=0.0, max_draws=1)
    with pytest.raises(TypeError, match="must have a floating-point dtype"):
        rejection_filter(sample, lambda prompts, samples: samples, 2, threshold=0.0, max_draws=1)
    half = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="add up to 1"):
        filtered_policy(torch.tensor([0.5, 0.7]), half, 0.0)
    with pytest.raises(ValueError, match="risk_scores must have shape"):
        filtered_policy(half, torch.zeros(3), 0.0)
    with pytest.raises(TypeError, match="is_failure must be a boolean tensor, got torch.int64"):
        filtered_policy(half, half, 0.0, is_failure=torch.tensor([0, 1]))


@pytest.mark.bare
def test_doors_of_thresholds() -> None:
    scores, failure = torch.zeros(2), torch.tensor([True, True])
    with pytest.raises(ValueError, match="at least one good example"):
        threshold_at_fpr(scores, failure)
    with pytest.raises(ValueError, match="fpr must lie in"):
        threshold_at_fpr(scores, ~failure, 1.5)
    with pytest.raises(TypeError, match="is_failure must be a boolean tensor"):
        threshold_at_fpr(scores, scores)
    with pytest.raises(ValueError, match="grid must hold at least one"):
        conservative_threshold([], lambda threshold: (1, 2))
    with pytest.raises(ValueError, match="confidence must lie in"):
        conservative_threshold([0.0], lambda threshold: (1, 2), confidence=1.0)
