"""How often at least one of several attempts succeeds, how rare failures are, and what it costs to cause one."""

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Integer, Real
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from telos.losses._checks import (
    check_bool,
    check_floating,
    check_integer,
    check_range,
    check_shape,
    values_can_be_read,
)
from telos.losses._reduction import at_least_float32

Side: TypeAlias = Literal["both", "upper", "lower"]


class FailureInterval(NamedTuple):
    """A failure rate and an exact interval around it.

    Attributes:
        rate: failures divided by trials, float64; NaN without trials.
        low: lower confidence bound, 0 without failures.
        high: upper confidence bound, 1 where every trial failed.
    """

    rate: Tensor
    low: Tensor
    high: Tensor


class SurvivalCurve(NamedTuple):
    """How many attacks have not succeeded yet.

    Attributes:
        cost: (K,) the distinct costs at which an attack ended, in ascending order, float64.
        survival: (K,) estimated share of attacks that need more than this cost.
    """

    cost: Tensor
    survival: Tensor


class AttackCost(NamedTuple):
    """What attacks cost, where some were given up before they succeeded.

    Attributes:
        attacks: how many there were.
        successes: how many of them succeeded.
        median: Kaplan-Meier median of the cost to success; infinite where less than half succeed within the
            costs that were tried, NaN without attacks.
        restricted_mean: mean cost, every attack cut off at the largest cost that was tried: the area under
            the Kaplan-Meier curve. NaN without attacks.
        geometric_mean: of the successes alone, NaN without one. It leaves out the attacks that were given up,
            so it compares two models only where nearly all succeed.
    """

    attacks: Tensor
    successes: Tensor
    median: Tensor
    restricted_mean: Tensor
    geometric_mean: Tensor


# ---------------------------------------------------------------------------------------------- attempts


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


# ---------------------------------------------------------------------------------------------- rare failures


def failure_rate_interval(
    failures: Integer[Tensor, "*rates"] | int,
    trials: Integer[Tensor, "*rates"] | int,
    confidence: float = 0.95,
    *,
    side: Side = "both",
) -> FailureInterval:
    r"""Exact (Clopper-Pearson) confidence interval of a failure rate, however rare the failures.

    For k failures in n trials, with the quantiles B of beta distributions and a tail of ``(1 - confidence) / 2``::

        low  = B(tail;     k, n - k + 1)        0 if k = 0
        high = B(1 - tail; k + 1, n - k)        1 if k = n

    The interval holds the true rate with at least ``confidence``, for every n. One bound alone has the whole
    ``1 - confidence`` as its tail: without failures the upper one is ``1 - (1 - confidence)^(1/n)``, about 3 / n at
    95 %. Needs scipy.

    Args:
        failures: k, how many trials failed: a number, or a tensor of any shape.
        trials: n, of the same shape.
        confidence: that the interval holds the rate, in (0, 1).
        side: ``"both"`` bounds, or one of them: ``"upper"`` has ``low = 0``, ``"lower"`` has ``high = 1``.

    Returns:
        Rate and bounds in float64.

    Raises:
        ValueError: for a wrong shape, more failures than trials, a negative number, a confidence out of range
            or an unknown side.
        TypeError: for counts that are no integers.

    Source:
        The use of confidence or fiducial limits illustrated in the case of the binomial (Clopper and Pearson, 1934);
        used for Adversarial Training for High-Stakes Reliability, arXiv 2205.01663.

    Example:
        >>> rate, low, high = failure_rate_interval(3, 100_000)
        >>> print(f"{rate:.1e} ({low:.1e} to {high:.1e})")
        3.0e-05 (6.2e-06 to 8.8e-05)
        >>> print(f"{failure_rate_interval(0, 1000, side='upper').high:.4f}")
        0.0030
    """
    from scipy.special import betainccinv, betaincinv

    _check_confidence(confidence)
    if side not in ("both", "upper", "lower"):
        raise ValueError(f"side must be 'both', 'upper' or 'lower', got {side!r}")
    failed, total = torch.as_tensor(failures), torch.as_tensor(trials)
    check_integer("failures", failed)
    check_integer("trials", total)
    check_shape("trials", total, tuple(failed.shape))
    if ((failed < 0) | (failed > total)).any():
        raise ValueError("failures must lie in [0, trials], got a number outside")
    tail = (1 - confidence) / (2 if side == "both" else 1)
    k, n = failed.double(), total.double()
    low, high = torch.zeros_like(k), torch.ones_like(k)
    if side != "upper":
        some = k > 0
        low[some] = _numpy_function(betaincinv, k[some], (n - k + 1)[some], tail)
    if side != "lower":
        some = k < n
        high[some] = _numpy_function(betainccinv, (k + 1)[some], (n - k)[some], tail)
    return FailureInterval(k / n, low, high)


def samples_for_bound(rate: float, confidence: float = 0.95, *, failures: int = 0) -> int:
    r"""How many trials prove that failures are rarer than ``rate``.

    The smallest n for which ``failures`` failures in n trials have a one-sided upper bound of at most ``rate``::

        P( X <= failures ) <= 1 - confidence        X ~ Binomial(n, rate)

    Without failures it is ``log(1 - confidence) / log(1 - rate)``, about 3 / rate at 95 %. Needs scipy.

    Args:
        rate: the failure rate to be ruled out, in (0, 1).
        confidence: of the one-sided bound, in (0, 1).
        failures: how many failures the trials may show.

    Returns:
        The number of trials.

    Raises:
        ValueError: for a rate, a confidence or a number out of range.

    Source:
        Inversion of the bound of :func:`failure_rate_interval`.

    Example:
        >>> samples_for_bound(0.01), samples_for_bound(0.01, failures=1)
        (299, 473)
    """
    from scipy.special import betaincc

    _check_confidence(confidence)
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie in (0, 1), got {rate}")
    check_range("failures", failures, 0, float("inf"))

    def proved(trials: int) -> bool:
        return bool(betaincc(failures + 1, trials - failures, rate) <= 1 - confidence)

    short, enough = failures, failures + 1
    while not proved(enough):
        short, enough = enough, 2 * enough
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if proved(middle) else (middle, enough)
    return enough


class FailureRate(Metric):
    """A failure rate with its exact interval, over batches and ranks; see :func:`failure_rate_interval`.

    The failure rate behind a filter is that of the accepted examples. The false-negative rate of a filter is the rate
    at which failures are accepted: ``update(accepted[is_failure])``.

    Args:
        confidence: that the interval holds the rate, in (0, 1).
        side: ``"both"``, ``"upper"`` or ``"lower"``.

    Raises:
        ValueError: for a confidence out of range or an unknown side.

    Example:
        >>> import torch
        >>> metric = FailureRate(side="upper")
        >>> failed = torch.tensor([True, False, False, False])
        >>> metric.update(failed, accepted=torch.tensor([False, True, True, True]))
        >>> metric.update(torch.zeros(297, dtype=torch.bool))
        >>> print(f"{metric.compute().high:.4f}")
        0.0099
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    failures: Tensor
    trials: Tensor

    def __init__(self, confidence: float = 0.95, *, side: Side = "both", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        failure_rate_interval(0, 0, confidence, side=side)  # refuses what compute would
        self.confidence = confidence
        self.side: Side = side
        self.add_state("failures", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("trials", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, failed: Tensor, accepted: Tensor | None = None) -> None:
        """Count which trials failed, boolean of any shape; only those that were ``accepted`` if given."""
        check_bool("failed", failed)
        if accepted is None:
            accepted = torch.ones_like(failed)
        check_bool("accepted", accepted)
        check_shape("accepted", accepted, tuple(failed.shape))
        self.failures += (failed & accepted).sum()
        self.trials += accepted.sum()

    def compute(self) -> FailureInterval:
        """Rate and bounds so far; without trials NaN, 0 and 1."""
        return failure_rate_interval(self.failures, self.trials, self.confidence, side=self.side)


# ---------------------------------------------------------------------------------------------- cost of attacks


def kaplan_meier(cost: Real[Tensor, " attacks"], censored: Bool[Tensor, " attacks"]) -> SurvivalCurve:
    r"""Share of attacks that need more than each cost, where some were given up before they succeeded.

    ::

        S(t) = prod over t_i <= t of ( 1 - d_i / n_i )

    with d_i successes at cost t_i among the n_i attacks that had not ended before. An attack that was given up at a
    cost still counts as open there.

    Args:
        cost: (N,) cost of each attack, at least 0: queries, seconds, whatever is paid.
        censored: (N,) whether it was given up at that cost instead of succeeding.

    Returns:
        The curve at every distinct cost.

    Raises:
        ValueError: for a wrong shape, or a cost that is negative or not finite.
        TypeError: for a wrong dtype.

    Source:
        Nonparametric estimation from incomplete observations (Kaplan and Meier, 1958).

    Example:
        >>> import torch
        >>> cost, censored = torch.tensor([1, 2, 3, 3]), torch.tensor([False, True, False, True])
        >>> kaplan_meier(cost, censored).survival
        tensor([0.7500, 0.7500, 0.3750], dtype=torch.float64)
    """
    _check_attacks(cost, censored)
    times, ended_at = torch.unique(cost.double(), return_inverse=True)
    ended = torch.bincount(ended_at, minlength=len(times))
    succeeded = torch.bincount(ended_at[~censored], minlength=len(times))
    still_open = ended.flip(0).cumsum(0).flip(0)
    return SurvivalCurve(times, torch.cumprod(1 - succeeded.double() / still_open, 0))


def cost_to_failure(cost: Real[Tensor, " attacks"], censored: Bool[Tensor, " attacks"]) -> AttackCost:
    r"""What it costs an adversary to cause a failure: the robustness of a filter against one that tries.

    Attacks end at their first success or are given up at a budget. A mean over the successes would call the filter
    weaker, the more attacks it withstands; the median and the restricted mean of the Kaplan-Meier curve do not::

        median           = min { t : S(t) <= 1/2 }
        restricted mean  = integral of S from 0 to the largest cost

    Args:
        cost: (N,) cost of each attack, at least 0.
        censored: (N,) whether it was given up at that cost instead of succeeding.

    Returns:
        Counts, median and means.

    Raises:
        ValueError: for a wrong shape, or a cost that is negative or not finite.
        TypeError: for a wrong dtype.

    Source:
        Adversarial Training for High-Stakes Reliability, arXiv 2205.01663, which measures contractors' time; the
        estimates are RECONSTRUCTED.

    Example:
        >>> import torch
        >>> queries, censored = torch.tensor([3, 8, 20, 20]), torch.tensor([False, False, True, True])
        >>> found = cost_to_failure(queries, censored)
        >>> found.median, found.restricted_mean
        (tensor(8., dtype=torch.float64), tensor(12.7500, dtype=torch.float64))
    """
    times, survival = kaplan_meier(cost, censored)
    values, nothing = cost.double(), not len(times)
    # a product of shares that is exactly one half may be rounded up
    halved = torch.where(survival <= 0.5 * (1 + 1e-12), times, torch.inf)
    before = torch.cat([survival.new_ones(1), survival])[:-1]
    steps = torch.diff(times, prepend=times.new_zeros(1))
    undefined = values.new_tensor(torch.nan)
    return AttackCost(
        attacks=torch.tensor(len(values), device=cost.device),
        successes=(~censored).sum(),
        median=undefined if nothing else halved.amin(),
        restricted_mean=undefined if nothing else (steps * before).sum(),
        geometric_mean=values[~censored].log().mean().exp(),
    )


class CostToFailure(Metric):
    """Cost of attacks over batches and ranks; see :func:`cost_to_failure`. It keeps every cost.

    Example:
        >>> import torch
        >>> metric = CostToFailure()
        >>> metric.update(torch.tensor([3, 8]), torch.tensor([False, False]))
        >>> metric.update(torch.tensor([20]), torch.tensor([True]))
        >>> metric.compute().median
        tensor(8., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    cost: list[Tensor]
    censored: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("cost", [], dist_reduce_fx="cat")
        self.add_state("censored", [], dist_reduce_fx="cat")

    def update(self, cost: Tensor, censored: Tensor) -> None:
        """Add attacks (N,) with their costs and whether they were given up there."""
        _check_attacks(cost, censored)
        self.cost.append(cost.double())
        self.censored.append(censored)

    def compute(self) -> AttackCost:
        """Counts, median and means so far."""
        if not isinstance(self.cost, Tensor) and not self.cost:
            nothing = torch.empty(0, dtype=torch.float64, device=self.device)
            return cost_to_failure(nothing, nothing.bool())
        return cost_to_failure(dim_zero_cat(self.cost), dim_zero_cat(self.censored))


# ---------------------------------------------------------------------------------------------- pieces


def _numpy_function(function: Any, a: Tensor, b: Tensor, tail: float) -> Tensor:
    return torch.as_tensor(function(a.cpu().numpy(), b.cpu().numpy(), tail), dtype=a.dtype).to(a.device)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")


def _check_attacks(cost: Tensor, censored: Tensor) -> None:
    if not isinstance(cost, Tensor):
        raise TypeError(f"cost must be a tensor, got {type(cost).__name__}")
    check_bool("censored", censored)
    check_shape("cost", cost, ("N",))
    check_shape("censored", censored, tuple(cost.shape))
    if values_can_be_read(cost) and (bad := ~torch.isfinite(cost) | (cost < 0)).any():
        raise ValueError(f"cost must be finite and at least 0, got {cost[bad][0].item()}")
