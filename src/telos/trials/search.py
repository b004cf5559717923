"""Search: the same number of trials for every recipe, the first untuned, the others a quasi-random sequence.

A trial's configuration is decided by the recipe and the trial's number alone, so asking for more trials later
keeps the earlier ones. Learning rate and weight decay are always searched, since the scale of a loss must not
decide who wins; then come the ranges that the loss declares, without what the user fixed.

A trial that can no longer win is not run to its end: see :func:`hopeless`. The rule asks nothing but the
trial's own runs and the earlier trials of its recipe, so it is the same for every recipe.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from telos.losses._space import Choice, Integers, LogUniform, Range, Uniform
from telos.trials.recipes import Hyperparameters, Recipe
from telos.trials.store import Run
from telos.trials.tasks import Task, derive_seed


def search_space(recipe: Recipe, task: Task) -> dict[str, Range]:
    """What the trials of a recipe vary, in the order of the sequence's dimensions."""
    centred = recipe.optimizer_space(task.learning_rate, task.weight_decay)
    fixed = recipe.optimizer.fixed
    optimizer = {
        name: span
        for name, (_, span) in centred.items()
        if {"learning_rate": "lr"}.get(name, name) not in fixed
    }
    return {**optimizer, **recipe.space}


def configuration(recipe: Recipe, task: Task, trial: int) -> Hyperparameters:
    """The hyper-parameters of a trial.

    Args:
        recipe: what is tuned.
        task: gives the untuned learning rate and weight decay.
        trial: 0 for the defaults, 1 and up for the points of a scrambled Halton sequence seeded by the
            recipe.

    Returns:
        ``learning_rate``, ``weight_decay`` and the searched hyper-parameters of the loss. Trial 0 leaves the
        loss's own
        out: its defaults hold.

    Example:
        >>> from telos.trials import load_task, parse_recipes
        >>> (recipe,) = parse_recipes("cross_entropy")
        >>> configuration(recipe, load_task("digits"), 0)
        {'learning_rate': 0.001, 'weight_decay': 0.01}
    """
    centred = recipe.optimizer_space(task.learning_rate, task.weight_decay)
    chosen: Hyperparameters = {name: default for name, (default, _) in centred.items()}
    if "lr" in recipe.optimizer.fixed:
        chosen["learning_rate"] = recipe.optimizer.fixed["lr"]
    if "weight_decay" in recipe.optimizer.fixed:
        chosen["weight_decay"] = recipe.optimizer.fixed["weight_decay"]
    space = search_space(recipe, task)
    if trial > 0 and space:
        point = _halton(recipe.canonical, len(space), trial)
        chosen.update(
            {name: _rounded(span.at(u)) for (name, span), u in zip(space.items(), point, strict=True)}
        )
    return chosen


def describe(span: Range) -> str:
    """A range in words, for reports."""
    match span:
        case LogUniform(low, high):
            return f"{low:.3g} to {high:.3g}, logarithmic"
        case Uniform(low, high):
            return f"{low:.3g} to {high:.3g}"
        case Integers(low, high):
            return f"whole numbers {low} to {high}"
        case Choice(options):
            return "one of " + ", ".join(map(str, options))


def best_trial(scores: Sequence[float | None], direction: str) -> int | None:
    """The trial with the best score; of equals the earlier, and ``None`` where none has a score.

    Example:
        >>> best_trial([0.8, None, 0.9, 0.9], "max")
        2
    """
    scored = [
        (score if direction == "min" else -score, trial)
        for trial, score in enumerate(scores)
        if score is not None
    ]
    return min(scored)[1] if scored else None


def score(values: Sequence[float]) -> float:
    """The score of a trial: the mean over its tuning seeds."""
    return float(np.mean(values))


def hopeless(
    values: Sequence[float], seeds: int, best: float | None, incumbent: float | None, direction: str
) -> bool:
    """Whether the rest of a trial cannot make it the chosen one.

    Let a trial have values ``v_1 .. v_k`` on the first k of n tuning seeds, let ``b`` be the best value that
    the metric can take, and ``s*`` the best score among the complete trials before it. The trial is hopeless
    when, for a metric that is maximised::

        mean(v_1, ..., v_k, b, ..., b) <= s*

    This never changes which trial is chosen. Proof: whatever the n - k missing values are, none is better
    than ``b``. A mean computed in floating point, over the same places in the same order, does not fall when
    one of its terms rises, because rounding keeps order. So the trial's score would be at most the left-hand
    side, hence at most ``s*``; and of equal scores the earlier trial wins, which is not this one. Nor does
    leaving it out change what later trials are held against: its score would not have raised ``s*``.

    Args:
        values: of the metric on the first tuning seeds.
        seeds: number of all tuning seeds.
        best: the best value that the metric can take; where it is not known, no trial is hopeless.
        incumbent: best score of the complete trials before this one, if there is any.
        direction: ``"max"`` or ``"min"``.

    Example:
        >>> hopeless([0.60], 2, best=1.0, incumbent=0.85, direction="max")
        True
        >>> hopeless([0.75], 2, best=1.0, incumbent=0.85, direction="max")
        False
    """
    if best is None or incumbent is None or len(values) >= seeds:
        return False
    bound = score([*values, *[best] * (seeds - len(values))])
    return bound <= incumbent if direction == "max" else bound >= incumbent


@dataclass(frozen=True)
class Trial:
    """What became of a trial.

    Attributes:
        status: ``"finished"``; ``"stopped"``, because it was hopeless; ``"diverged"`` or ``"failed"`` on one
            of its seeds, so that it is out; ``"repeated"``, with the configuration of an earlier one;
            ``"open"`` while runs are to be done.
        score: its mean, where it finished.
        runs: those that led to this, by seed; what another process ran beyond is left out.
    """

    status: str
    score: float | None
    runs: tuple[Run, ...]


class Standing:
    """How the trials of one recipe stand.

    What it says depends on the runs alone, not on the order in which they ended: with more processes a trial
    may have run on for a while before it was known to be hopeless, and the surplus does not count.

    Args:
        seeds: the tuning seeds, in order.
        metric: as the runs name it.
        direction: ``"max"`` or ``"min"``.
        best: the best value that the metric can take, if there is one.
        repeats: trials with the configuration of an earlier one; they are not run.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        metric: str,
        direction: str,
        best: float | None,
        repeats: Collection[int] = (),
    ) -> None:
        self.seeds, self.metric, self.direction, self.best = tuple(seeds), metric, direction, best
        self.repeats = frozenset(repeats)
        self.runs: dict[tuple[int, int], Run] = {}
        self._complete: dict[int, float] = {}

    def add(self, trial: int, run: Run) -> None:
        """Take a run into account."""
        self.runs[trial, run.seed] = run
        values = self._values(trial)
        if len(values) == len(self.seeds):
            self._complete[trial] = score(values)

    def trial(self, number: int) -> Trial:
        """The state of a trial, judged seed by seed against the complete trials before it."""
        if number in self.repeats:
            return Trial("repeated", None, ())
        before = [value for trial, value in self._complete.items() if trial < number]
        incumbent = (max(before) if self.direction == "max" else min(before)) if before else None
        values: list[float] = []
        runs: list[Run] = []
        for seed in self.seeds:
            if hopeless(values, len(self.seeds), self.best, incumbent, self.direction):
                return Trial("stopped", None, tuple(runs))
            run = self.runs.get((number, seed))
            if run is None:
                return Trial("open", None, tuple(runs))
            runs.append(run)
            if not run.finished:
                return Trial(run.status, None, tuple(runs))
            values.append(run.metrics[self.metric])
        return Trial("finished", score(values), tuple(runs))

    def _values(self, trial: int) -> list[float]:
        runs = [self.runs.get((trial, seed)) for seed in self.seeds]
        return [run.metrics[self.metric] for run in runs if run is not None and run.finished]


def _halton(recipe: str, dimensions: int, trial: int) -> list[float]:
    from scipy.stats import qmc

    sequence = qmc.Halton(dimensions, scramble=True, rng=derive_seed("search", recipe))
    return sequence.fast_forward(trial - 1).random(1)[0].tolist()


def _rounded(value: Any) -> Any:
    # six digits: what the report prints is what was run
    return float(f"{value:.6g}") if isinstance(value, float) else value
