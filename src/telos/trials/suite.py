"""Several data sets at once: ranks, their critical difference, and performance profiles.

A comparison on one data set says how far its numbers carry over to other seeds. Only several data sets say
anything about data that nobody has seen yet, and then a data set, not a seed, is the unit that counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from telos.trials._words import UsageError
from telos.trials.comparison import Comparison, Entry
from telos.trials.scoring import profile_score, profile_table, time_to_target

if TYPE_CHECKING:
    import polars as pl

MINIMUM_DATA_SETS = 5

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Friedman:
    """Whether mean ranks differ by more than chance; see :func:`friedman_test`.

    Attributes:
        statistic: F of Iman and Davenport; infinite where every data set gives the same order.
        p_value: of equal ranks.
        data_sets: N.
        recipes: k.
    """

    statistic: float
    p_value: float
    data_sets: int
    recipes: int


@dataclass(frozen=True)
class Standing:
    """One recipe over all data sets.

    Attributes:
        label: the recipe.
        mean_rank: over data sets; 1 is best, ties share the mean of their ranks.
        ranks: one for each data set.
        means: of the metric, one for each data set.
        better: on how many data sets the recipe was better than the baseline, after Holm's correction.
        worse: on how many it was worse.
    """

    label: str
    mean_rank: float
    ranks: tuple[float, ...]
    means: tuple[float, ...]
    better: int
    worse: int


@dataclass(frozen=True)
class Suite:
    """Comparisons of the same recipes on several data sets.

    Args:
        comparisons: one for each data set, with the same baseline.
    """

    comparisons: tuple[Comparison, ...]

    def __post_init__(self) -> None:
        if not self.comparisons:
            raise UsageError("a suite needs at least one comparison, got none")
        bases = {comparison.baseline.recipe.label for comparison in self.comparisons}
        if len(bases) > 1:
            raise UsageError(
                f"all data sets must have one baseline, got {', '.join(sorted(bases))}: "
                "begin the list with a recipe that fits every task"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The data sets, as the user named them."""
        return tuple(comparison.plan.task for comparison in self.comparisons)

    @property
    def baseline(self) -> str:
        """The label of the baseline."""
        return self.comparisons[0].baseline.recipe.label

    @property
    def left_out(self) -> dict[str, str]:
        """Recipes that do not have a result on every data set, and where and why; they have no rank."""
        reasons: dict[str, str] = {}
        for comparison in self.comparisons:
            for entry in comparison.entries:
                label = entry.recipe.label
                if not entry.finished and label not in reasons:
                    why = entry.reason or f"{entry.missing} runs are still to do"
                    reasons[label] = f"{entry.status} on {comparison.plan.task}: {why}"
        return reasons

    @property
    def labels(self) -> tuple[str, ...]:
        """Recipes with a result on every data set, in the order in which they were named."""
        lost = self.left_out
        return tuple(e.recipe.label for e in self.comparisons[0].entries if e.recipe.label not in lost)

    def means(self) -> Floats:
        """(recipes, data sets): the mean test metric."""
        return np.array(
            [
                [_entry(comparison, label).mean(comparison.metric) for comparison in self.comparisons]
                for label in self.labels
            ]
        ).reshape(len(self.labels), len(self.comparisons))

    def ranks(self) -> Floats:
        """(recipes, data sets): 1 is best; equal means share the mean of their ranks."""
        return rank_recipes(self.means(), [comparison.plan.direction for comparison in self.comparisons])

    def standings(self) -> list[Standing]:
        """Every ranked recipe, the best mean rank first."""
        means, ranks = self.means(), self.ranks()
        verdicts: dict[str, list[str]] = {label: [] for label in self.labels}
        for comparison in self.comparisons:
            for label, difference in comparison.differences().items():
                if label in verdicts:
                    verdicts[label].append(difference.verdict)
        found = [
            Standing(
                label=label,
                mean_rank=float(ranks[row].mean()),
                ranks=tuple(ranks[row].tolist()),
                means=tuple(means[row].tolist()),
                better=verdicts[label].count("better"),
                worse=verdicts[label].count("worse"),
            )
            for row, label in enumerate(self.labels)
        ]
        return sorted(found, key=lambda standing: standing.mean_rank)

    def friedman(self) -> Friedman | None:
        """The test of equal ranks, or ``None`` below two recipes or :data:`MINIMUM_DATA_SETS` data sets."""
        ranks = self.ranks()
        if len(ranks) < 2 or ranks.shape[1] < MINIMUM_DATA_SETS:
            return None
        return friedman_test(ranks)

    def critical_difference(self, alpha: float = 0.05) -> float | None:
        """How far mean ranks must lie apart; ``None`` where there are too few data sets to say."""
        count, data_sets = self.ranks().shape
        if count < 2 or data_sets < MINIMUM_DATA_SETS:
            return None
        return critical_difference(count, data_sets, alpha)

    def groups(self, alpha: float = 0.05) -> list[tuple[str, ...]]:
        """Recipes that the ranks cannot tell apart: the bars of a critical-difference diagram."""
        distance = self.critical_difference(alpha)
        if distance is None:
            return []
        standings = self.standings()
        return [
            tuple(standings[place].label for place in group)
            for group in indistinguishable([standing.mean_rank for standing in standings], distance)
        ]

    def times(self, unit: str = "epoch") -> Floats:
        """(recipes, data sets): time until a recipe first reaches what the baseline ends with.

        The target of a data set is the median over seeds of the baseline's last validation metric; the time
        of a recipe is the median over seeds of its first evaluation that reaches it, ``inf`` for a miss.

        Args:
            unit: ``"epoch"``, which any machine repeats, or ``"seconds"`` of wall time.

        Returns:
            The times.

        Raises:
            ValueError: for another unit.
        """
        if unit not in ("epoch", "seconds"):
            raise ValueError(f"unit must be 'epoch' or 'seconds', got {unit!r}")
        found = np.empty((len(self.labels), len(self.comparisons)))
        for column, comparison in enumerate(self.comparisons):
            plan = comparison.plan
            name = f"validation_{plan.metric}"
            # a store from elsewhere may hold runs without a curve: they reach nothing
            ends = [run.curve[-1][name] for run in comparison.baseline.finished if run.curve]
            target = float(np.median(ends)) if ends else math.inf * (1 if plan.direction == "max" else -1)
            mode = "max" if plan.direction == "max" else "min"
            for row, label in enumerate(self.labels):
                found[row, column] = np.median(
                    [
                        time_to_target(
                            [record[unit] for record in run.curve],
                            [record[name] for record in run.curve],
                            target,
                            mode,  # type: ignore[arg-type]
                        )
                        for run in _entry(comparison, label).finished
                    ]
                )
        return found

    def scores(self, unit: str = "epoch", r_max: float = 4.0) -> dict[str, float]:
        """The AlgoPerf score of every recipe: the area under its performance profile over :meth:`times`."""
        values = profile_score(self.times(unit), r_max)
        return dict(zip(self.labels, values.tolist(), strict=True))

    def profiles(self, unit: str = "epoch", r_max: float = 4.0) -> pl.DataFrame:
        """The performance profiles over :meth:`times`, as a tidy table."""
        return profile_table(self.times(unit), self.labels, r_max)

    def conclusion(self) -> str:
        """What the suite shows, in two or three sentences that claim no more than it does."""
        standings = self.standings()
        count = len(self.comparisons)
        if not standings:
            return "No recipe has a result on every data set. There is nothing to rank."
        top = standings[0]
        leaders = [s.label for s in standings if s.mean_rank == top.mean_rank]
        who = " and ".join(leaders)
        words = f"Over {count} data set{'' if count == 1 else 's'}, {who} had the best mean rank: "
        words += f"{top.mean_rank:.2f} of {len(standings)}"
        base = next((standing for standing in standings if standing.label == self.baseline), None)
        if base is not None and top.label != self.baseline:
            words += f", against {base.mean_rank:.2f} for the baseline {self.baseline}"
        words += "."
        tested = self.friedman()
        if len(standings) < 2:
            return words + " There is no other recipe to compare it with."
        if tested is None:
            return words + (
                f" {count} data sets are too few to say anything about further ones; with "
                f"{MINIMUM_DATA_SETS} or more the ranks are tested."
            )
        distance = critical_difference(len(standings), count)
        if tested.p_value >= 0.05:
            return words + (
                f" The ranks do not differ by more than chance would have them differ "
                f"(Friedman test, p = {tested.p_value:.2g})."
            )
        words += f" Ranks differ by more than chance (Friedman test, p = {tested.p_value:.2g})"
        if base is None:
            return words + f"; {distance:.2f} is the critical difference between two recipes."
        ahead = [s.label for s in standings if base.mean_rank - s.mean_rank >= distance]
        behind = [s.label for s in standings if s.mean_rank - base.mean_rank >= distance]
        parts = [
            f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {word} than the baseline"
            for names, word in ((ahead, "better"), (behind, "worse"))
            if names
        ]
        said = " and ".join(parts) or f"no recipe stands apart from the baseline {self.baseline}"
        return words + f"; at a critical difference of {distance:.2f}, {said}."


def rank_recipes(means: Floats, directions: Sequence[str]) -> Floats:
    """Ranks within each data set.

    Args:
        means: (recipes, data sets).
        directions: ``"max"`` or ``"min"`` for each data set.

    Returns:
        (recipes, data sets); 1 is best, equal values share the mean of their ranks.

    Example:
        >>> import numpy as np
        >>> rank_recipes(np.array([[0.9, 0.5], [0.8, 0.5]]), ["max", "max"]).tolist()
        [[1.0, 1.5], [2.0, 1.5]]
    """
    from scipy.stats import rankdata

    signs = np.array([-1.0 if direction == "max" else 1.0 for direction in directions])
    return np.asarray(rankdata(means * signs, axis=0), dtype=np.float64).reshape(means.shape)


def friedman_test(ranks: Floats) -> Friedman:
    r"""Whether recipes have equal mean ranks over data sets: Friedman's test as Iman and Davenport corrected it.

    With rank sums ``R_j`` of k recipes over N data sets, and the tie-corrected spread of the ranks::

        T = (k - 1) sum_j (R_j - N (k + 1) / 2)^2 / (sum_ij r_ij^2 - N k (k + 1)^2 / 4)
        F = (N - 1) T / (N (k - 1) - T),    F_{k-1, (k-1)(N-1)} distributed

    Args:
        ranks: (recipes, data sets), from :func:`rank_recipes`.

    Returns:
        Statistic and p-value; where all ranks are tied, 0 and 1.

    Raises:
        ValueError: below two recipes or two data sets.

    Source:
        Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7 (2006).

    Example:
        >>> import numpy as np
        >>> found = friedman_test(np.array([[1, 1, 1, 2, 1, 1.0], [2, 2, 2, 1, 2, 2], [3, 3, 3, 3, 3, 3]]))
        >>> found.p_value < 0.01
        True
    """
    from scipy.stats import f as f_distribution

    count, data_sets = ranks.shape
    if count < 2 or data_sets < 2:
        raise ValueError(f"ranks must hold at least 2 recipes and 2 data sets, got {count} and {data_sets}")
    spread = float((ranks**2).sum() - data_sets * count * (count + 1) ** 2 / 4)
    if spread <= 1e-12 * data_sets * count**3:
        return Friedman(0.0, 1.0, data_sets, count)
    between = float(((ranks.sum(1) - data_sets * (count + 1) / 2) ** 2).sum())
    chi_square = (count - 1) * between / spread
    rest = data_sets * (count - 1) - chi_square
    if rest <= 1e-12 * data_sets * count:
        return Friedman(math.inf, 0.0, data_sets, count)
    statistic = (data_sets - 1) * chi_square / rest
    p_value = float(f_distribution.sf(statistic, count - 1, (count - 1) * (data_sets - 1)))
    return Friedman(statistic, p_value, data_sets, count)


def critical_difference(recipes: int, data_sets: int, alpha: float = 0.05) -> float:
    r"""The distance of mean ranks from which Nemenyi's test calls two recipes different.

    ::

        CD = q_alpha sqrt(k (k + 1) / (6 N)),    q_alpha: the studentized range over sqrt(2)

    Args:
        recipes: k, at least 2.
        data_sets: N, at least 1.
        alpha: chance of any false difference among all pairs.

    Returns:
        The critical difference.

    Raises:
        ValueError: for a number out of range.

    Source:
        Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7 (2006).

    Example:
        >>> round(critical_difference(4, 14), 2)
        1.25
    """
    from scipy.stats import studentized_range

    if recipes < 2:
        raise ValueError(f"recipes must be at least 2, got {recipes}")
    if data_sets < 1:
        raise ValueError(f"data_sets must be at least 1, got {data_sets}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    quantile = float(studentized_range.ppf(1 - alpha, recipes, math.inf)) / math.sqrt(2)
    return quantile * math.sqrt(recipes * (recipes + 1) / (6 * data_sets))


def indistinguishable(mean_ranks: Sequence[float], distance: float) -> list[tuple[int, ...]]:
    """The largest runs of neighbours, in order of rank, whose ends lie less than ``distance`` apart.

    Args:
        mean_ranks: rising.
        distance: the critical difference.

    Returns:
        Positions of each run of at least two; none lies inside another.

    Example:
        >>> indistinguishable([1.0, 1.8, 2.2, 4.0], 1.0)
        [(0, 1), (1, 2)]
    """
    found: list[tuple[int, ...]] = []
    reached = 0
    for start, rank in enumerate(mean_ranks):
        stop = start
        while stop + 1 < len(mean_ranks) and mean_ranks[stop + 1] - rank < distance:
            stop += 1
        if stop > start and stop > reached:
            found.append(tuple(range(start, stop + 1)))
            reached = stop
    return found


def _entry(comparison: Comparison, label: str) -> Entry:
    return next(entry for entry in comparison.entries if entry.recipe.label == label)
