"""What the page says in words, and how it writes numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from telos.lab.leaderboard import TITLES
from telos.trials import Comparison
from telos.trials.suite import Suite

Form: TypeAlias = Callable[[float], str]


def headline(comparison: Comparison) -> str:
    """What came out, in a few words; ``better`` stands in it only where a verdict says so.

    Example:
        >>> from telos.trials import compare
        >>> headline(compare("wine", "cross_entropy,focal", seeds=2, trials=1, epochs=2))
        '2 seeds are too few to tell'
    """
    base, differences = comparison.baseline.recipe.label, comparison.differences()
    if not comparison.ranked:
        return "Nothing to compare"
    if not comparison.baseline.finished:
        return f"The baseline {base} did not finish"
    if not differences:
        return "One recipe, and nothing to compare it with"
    verdicts = {name: difference.verdict for name, difference in differences.items()}
    seeds = counted(comparison.seeds_counted, "seed")
    so_far = "" if comparison.complete else "So far: "
    if set(verdicts.values()) == {"n too small to test"}:
        return f"{so_far}{seeds} {'is' if comparison.seeds_counted == 1 else 'are'} too few to tell"
    for word in ("better", "worse"):
        names = [name for name, verdict in verdicts.items() if verdict == word]
        if names and (word == "better" or len(names) == len(verdicts)):
            what = f"{'is' if len(names) == 1 else 'are'} {word} than {base} in test {title(comparison.plan.metric)}"
            return f"{so_far}{_who(names)} {what}"
    # recipes may have lost different seeds, and then their verdicts name different numbers
    general = f"no difference that {seeds} can show"
    counts = Counter(general if verdict.startswith("no diff") else verdict for verdict in verdicts.values())
    if len(counts) == 1:
        only = next(iter(counts))
        return so_far + only[0].upper() + only[1:]
    parts = [f"{count} {'with ' if kind == general else ''}{kind}" for kind, count in counts.items()]
    return f"{so_far}Against {base}: {', '.join(parts)}"


def suite_headline(suite: Suite) -> str:
    """What came out over all data sets, in a few words; claims no more than the tests of ranks do."""
    standings, many = suite.standings(), len(suite.comparisons)
    if not standings:
        return "Nothing to rank"
    if len(standings) == 1:
        return "One recipe, and nothing to compare it with"
    tested, distance = suite.friedman(), suite.critical_difference()
    if tested is None or distance is None:
        return f"{counted(many, 'data set')} {'is' if many == 1 else 'are'} too few to test ranks"
    if tested.p_value >= 0.05:
        return f"No difference in ranks that {counted(many, 'data set')} can show"
    base = next((standing.mean_rank for standing in standings if standing.label == suite.baseline), None)
    ahead = [s.label for s in standings if base is not None and base - s.mean_rank >= distance]
    if not ahead:
        return f"No recipe ranks clearly ahead of {suite.baseline}"
    return f"{_who(ahead)} {'ranks' if len(ahead) == 1 else 'rank'} better than {suite.baseline}"


def _who(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) <= 2 else counted(len(names), "recipe")


def cautions(comparison: Comparison) -> list[str]:
    """What a reader should know before the numbers: notices on the data, and what is missing."""
    plan = comparison.plan
    found = [notice[:1].upper() + notice[1:] for notice in plan.notices]
    if not comparison.complete:
        missing = sum(entry.missing for entry in comparison.entries)
        missing += comparison.reference.missing if comparison.reference else 0
        found.append(f"The comparison is not finished: up to {counted(missing, 'run')} are still to do.")
    if comparison.stopped_by_time:
        limit = "" if plan.max_time is None else f" of {duration(plan.max_time)}"
        found.append(
            f"The time limit{limit} ended it: {comparison.trials_counted} of {counted(plan.trials, 'trial')} a "
            f"recipe and {comparison.seeds_counted} of {counted(plan.seeds, 'seed')} count, the same for every "
            "recipe."
        )
    if not plan.resplits:
        found.append(comparison.interval_note)
    if partial := [entry.recipe.label for entry in comparison.entries if entry.status == "partial"]:
        found.append(
            f"Not all seeds of {', '.join(partial)} ended. Means over different seeds are not comparable; "
            "differences use the seeds that both recipes have."
        )
    return found


def protocol(comparison: Comparison) -> list[str]:
    """How the numbers came about, step by step."""
    plan, metric = comparison.plan, title(comparison.plan.metric)
    steps = ["For a seed, all recipes share the split, the initial weights and the order of batches."]
    if plan.tuning:
        steps.append(
            f"Each recipe got {counted(comparison.trials_counted, 'trial')}: the untuned one, then a "
            "quasi-random sequence over learning rate, weight decay and the loss's own ranges. They ran on "
            f"{counted(len(plan.tuning), 'tuning seed')}, which the evaluation does not use; the best mean "
            f"validation {metric} was chosen, of equals the earlier trial."
        )
    else:
        steps.append("Every recipe ran with its default hyper-parameters; nothing was tuned.")
    if plan.tuning and plan.best is not None:
        steps.append(
            f"A trial was stopped once even {plan.best:g}, the best {metric} there can be, on all its remaining "
            "tuning seeds could not have made it the chosen one. The rule is the same for every recipe, and "
            "the chosen trial is the one that running every trial to its end would have given."
        )
    if plan.max_time is not None:
        steps.append(
            f"With a limit of {duration(plan.max_time)}, trials and then seeds were walked in turn over all "
            "recipes, tuning for at most 60 % of the time. Only trials and seeds that every recipe completed "
            "count."
        )
    steps += [
        f"The chosen configuration ran once on each of {counted(plan.seeds, 'evaluation seed')}. Only these "
        "runs looked at the test split.",
        comparison.interval_note,
        "A verdict needs p < 0.05 after Holm's correction over all recipes; it is about the difference to the "
        "baseline, not about two other recipes.",
        "The first of several means is partly luck: read the difference and its interval, not the rank.",
    ]
    if plan.resplits and plan.tuning:
        steps.append(
            "Examples used in tuning occur in other seeds' test splits; that is the same for every recipe."
        )
    if plan.reference:
        steps.append(
            f"{plan.reference_name} is a line from outside: trained on the same splits with settings of its own, "
            "not tuned, ranked or tested."
        )
    return steps


def name_of(comparison: Comparison) -> str:
    """What the task is called."""
    return comparison.plan.title or comparison.plan.task


def title(metric: str) -> str:
    """A metric's name for readers."""
    return TITLES.get(metric, metric)


def counted(count: int, noun: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(numbers: Sequence[int]) -> str:
    """Numbers with commas, the first twenty of them."""
    shown = ", ".join(map(str, numbers[:20]))
    return shown if len(numbers) <= 20 else f"{shown} and {len(numbers) - 20} more"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def metric_forms(comparison: Comparison, board: Sequence[dict[str, Any]]) -> dict[str, Form]:
    """How the numbers of each metric are written; differences of the metric as the metric."""
    outside = comparison.reference
    return {
        name: form_of([*(row[name] for row in board), outside.mean(f"test_{name}") if outside else None])
        for name in comparison.plan.metrics
    }


def form_of(values: Iterable[float | None]) -> Form:
    """One form for a column of numbers: four decimals, fewer for large ones, powers of ten for tiny ones.

    Example:
        >>> form_of([0.5, 0.25])(0.5), form_of([1234.5])(1234.5), form_of([2e-5])(2e-5)
        ('0.5000', '1,234.5', '2.00e-05')
    """
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value)]
    largest = max(sizes, default=1.0)
    if 0 < largest < 1e-2:
        return "{:.2e}".format
    decimals = max(0, 4 - math.floor(math.log10(max(largest, 1.0))))
    return f"{{:,.{decimals}f}}".format


def signed(form: Form) -> Form:
    """The form of a difference."""
    return lambda value: f"{'−' if value < 0 else '+'}{form(abs(value))}"


def p_value(value: float) -> str:
    """A p-value, never 0."""
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def finite(value: float) -> float | None:
    """A number, or ``None`` where there is none."""
    return value if math.isfinite(value) else None
