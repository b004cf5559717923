"""What an experiment states before it runs, and the rule that turns its numbers into a verdict."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

SEEDS = range(100, 108)
"""The seeds of a recorded run. None of them is used to design an experiment; pilots use seeds 0 to 2."""

BUDGETS = ("smoke", "small", "full")
"""A second, about two minutes on two cores, and whatever a GPU makes worth while."""

CONFIDENCE = 0.95
MINIMUM_SEEDS = 8

REPRODUCED = "REPRODUCED"
NOT_REPRODUCED = "NOT REPRODUCED"
INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True)
class Effect:
    """One number of a study, and what the claim says of it: its mean over seeds lies above ``threshold``.

    A claim that a difference stays small is written as ``tolerance - |difference| > 0``.

    Attributes:
        name: key of the number in the dict that the study's ``run`` returns.
        description: what the number is, in words, with its unit.
        threshold: what the mean has to exceed.
        required: whether the verdict depends on it.

    Example:
        >>> Effect("accuracy_gain", "test accuracy minus that of cross-entropy", threshold=0.0).required
        True
    """

    name: str
    description: str
    threshold: float
    required: bool = True


@dataclass(frozen=True)
class Study:
    """A paper's claim as a small experiment whose decision rule is fixed before it runs.

    Attributes:
        slug: the paper's name in the catalogue.
        claim: what is tested, in one sentence and at the scale at which it is tested.
        protocol: data, models, tuning and measurements.
        decision: when the claim counts as reproduced, in words.
        effects: the numbers that decide.
        pilot: what was run while the experiment was designed, and on which seeds.
        run: ``run(seed, budget)`` gives every effect of one seed, and other numbers worth reporting.

    Example:
        >>> two = Effect("two", "twice one", threshold=1.0)
        >>> study = Study("toy", "Two exceeds one.", "Count.", "The bound exceeds 1.", (two,), "None.",
        ...               lambda seed, budget: {"two": 2.0})
        >>> study.run(100, "smoke")
        {'two': 2.0}
    """

    slug: str
    claim: str
    protocol: str
    decision: str
    effects: tuple[Effect, ...]
    pilot: str
    run: Callable[[int, str], dict[str, float]]


@dataclass(frozen=True)
class Finding:
    """An effect over the seeds: its mean, one-sided 95 % bounds on it, and its own verdict.

    Attributes:
        effect: what was measured.
        values: the effect of each seed.
        mean: average over the seeds.
        sd: standard deviation over the seeds (n - 1 in the denominator); NaN for a single seed.
        lower: the mean lies above it with 95 % confidence.
        upper: the mean lies below it with 95 % confidence.
        verdict: one of the three verdicts, for this effect alone.
        reason: why the verdict is what it is.
    """

    effect: Effect
    values: tuple[float, ...]
    mean: float
    sd: float
    lower: float
    upper: float
    verdict: str
    reason: str

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.values)


def t_bounds(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """One-sided lower and upper bound of a mean, each at ``confidence``, from Student's t.

    ::

        mean -+ t(confidence, n - 1) * sd / sqrt(n)

    Args:
        values: at least two finite numbers.
        confidence: of each bound on its own.

    Returns:
        The lower and the upper bound.

    Raises:
        ValueError: for fewer than two values.

    Example:
        >>> [round(bound, 3) for bound in t_bounds([1.0, 2.0, 3.0])]
        [0.314, 3.686]
    """
    from scipy import stats  # half a second that only a finished run has to pay

    if len(values) < 2:
        raise ValueError(f"values must hold at least two numbers for a bound, got {len(values)}")
    mean, sd = _mean(values), _standard_deviation(values)
    half_width = float(stats.t.ppf(confidence, len(values) - 1)) * sd / math.sqrt(len(values))
    return mean - half_width, mean + half_width


def finding(effect: Effect, values: Sequence[float]) -> Finding:
    """Judges one effect.

    Args:
        effect: what was measured and its threshold.
        values: the effect of each seed.

    Returns:
        REPRODUCED if the lower bound lies above the threshold, NOT REPRODUCED if the upper bound lies below
        it, and INCONCLUSIVE otherwise: between the bounds, with fewer than eight seeds, or with a non-finite
        value.

    Example:
        >>> finding(Effect("gain", "accuracy gain", 0.0), [0.1, 0.2] * 4).verdict
        'REPRODUCED'
        >>> finding(Effect("gain", "accuracy gain", 0.0), [0.1, float("nan")] * 4).reason
        'gain is not finite on 4 of 8 seeds'
    """
    values = tuple(float(value) for value in values)
    n, name = len(values), effect.name
    mean, sd, lower, upper = (math.nan,) * 4
    broken = sum(not math.isfinite(value) for value in values)
    if n and not broken:
        mean = _mean(values)
    if n > 1 and not broken:
        sd = _standard_deviation(values)
        lower, upper = t_bounds(values)
    if broken:
        verdict, reason = INCONCLUSIVE, f"{name} is not finite on {broken} of {n} seeds"
    elif n < MINIMUM_SEEDS:
        verdict, reason = INCONCLUSIVE, f"{n} of the {MINIMUM_SEEDS} seeds that a verdict needs"
    elif lower > effect.threshold:
        verdict, reason = REPRODUCED, f"{name}: lower bound {lower:.4g} > {effect.threshold:g}"
    elif upper < effect.threshold:
        verdict, reason = NOT_REPRODUCED, f"{name}: upper bound {upper:.4g} < {effect.threshold:g}"
    else:
        verdict = INCONCLUSIVE
        reason = f"{name}: bounds {lower:.4g} and {upper:.4g} enclose {effect.threshold:g}"
    return Finding(effect, values, mean, sd, lower, upper, verdict, reason)


def judge(study: Study, per_seed: Sequence[Mapping[str, float]]) -> tuple[str, str, tuple[Finding, ...]]:
    """The verdict of a study from what ``run`` returned for each seed.

    Args:
        study: names the effects and their thresholds.
        per_seed: one dict for each seed, with at least every effect of the study.

    Returns:
        The verdict, the reason for it and the finding of every effect. REPRODUCED takes every required
        effect, one required effect is enough for NOT REPRODUCED, and anything else is INCONCLUSIVE.

    Raises:
        ValueError: if a seed lacks an effect.

    Example:
        >>> two = Effect("two", "twice one", threshold=1.0)
        >>> study = Study("toy", "", "", "", (two,), "", lambda seed, budget: {"two": 2.0})
        >>> judge(study, [{"two": 2.0}] * 8)[:2]
        ('REPRODUCED', 'two: lower bound 2 > 1')
    """
    for numbers in per_seed:
        missing = [effect.name for effect in study.effects if effect.name not in numbers]
        if missing:
            raise ValueError(f"run() of {study.slug} must return {', '.join(missing)}, got {sorted(numbers)}")
    findings = tuple(
        finding(effect, [numbers[effect.name] for numbers in per_seed]) for effect in study.effects
    )
    required = [found for found in findings if found.effect.required]
    for verdict in (NOT_REPRODUCED, INCONCLUSIVE):
        reasons = [found.reason for found in required if found.verdict == verdict]
        if reasons:
            return verdict, "; ".join(dict.fromkeys(reasons)), findings
    return REPRODUCED, "; ".join(found.reason for found in required), findings


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
