"""A fair comparison: the same trials, the same seeds, the same splits for every recipe.

The protocol, which the report repeats:

1. Every recipe gets the same number of *trials*. Trial 0 is untuned, the others are fixed by (recipe, trial).
2. Trials run on *tuning seeds*, which no evaluation uses, and are judged by one metric on the validation
   split alone, averaged over those seeds. Where a task has noisy labels, that split has them too. Of equals
   the earlier trial wins; a trial that diverges on any tuning seed is out.
3. The chosen configuration runs once on every *evaluation seed*. Only these runs look at the test split.
4. Recipes are compared with the first one by paired differences over the evaluation seeds.

Every seed draws its own split of one data set, so the examples on which a recipe was tuned occur in other
seeds' test splits. That is the same for all recipes, and it only ever chose between ``trials``
configurations.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from telos.trials._words import UsageError, nearest
from telos.trials.recipes import Recipe, label, parse_recipes
from telos.trials.runner import Job, Workers, code_hash, versions
from telos.trials.search import best_trial, configuration, describe, search_space
from telos.trials.statistics import MINIMUM_SEEDS, Estimate, holm, resampled_interval, verdict
from telos.trials.store import Run, Store
from telos.trials.tasks import load_task

FIRST_TUNING_SEED = 1_000_000


@dataclass(frozen=True)
class PlannedRecipe:
    """A recipe of a plan: its label, its texts, what is searched, and why it was refused, if it was."""

    label: str
    loss: str
    optim: str
    canonical: str
    code: str
    space: dict[str, str]
    refused: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a comparison sets out to do; all of it can be written as JSON.

    Attributes:
        task: as the user named it.
        recipes: the first that fits is the baseline.
        seeds: number of evaluation seeds.
        trials: configurations tried for each recipe.
        tuning_seeds: seeds on which each trial is judged.
        epochs: of every run.
        metric: what tuning looks at and the leaderboard is ordered by.
        direction: ``"max"`` or ``"min"``.
        metrics: directions of all metrics.
        band: differences of the metric below this do not matter in practice.
        sizes: number of examples of ``train``, ``validation`` and ``test``.
        classes: number of classes, where there are any.
        versions: of the software.
        description: of the task, in a sentence or two.
        command: what to type to repeat it.
    """

    task: str
    recipes: tuple[PlannedRecipe, ...]
    seeds: int
    trials: int
    tuning_seeds: int
    epochs: int
    metric: str
    direction: str
    metrics: dict[str, str]
    band: float
    sizes: dict[str, int]
    classes: int | None
    versions: dict[str, str | None] = field(default_factory=dict)
    description: str = ""
    command: str = ""

    @property
    def key(self) -> str:
        """Hash of what is compared (not of how it was typed, nor on which versions)."""
        decisive = {
            k: v
            for k, v in asdict(self).items()
            if k not in ("versions", "description", "command", "recipes")
        }
        decisive["recipes"] = [recipe.canonical for recipe in self.recipes]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    @property
    def runnable(self) -> tuple[PlannedRecipe, ...]:
        """The recipes that fit the task."""
        return tuple(recipe for recipe in self.recipes if recipe.refused is None)

    @property
    def tuning(self) -> list[int]:
        """The tuning seeds; none where there is nothing to choose between."""
        return [FIRST_TUNING_SEED + i for i in range(self.tuning_seeds)] if self.trials > 1 else []

    @property
    def runs(self) -> int:
        """How many runs there are at most."""
        return len(self.runnable) * (len(self.tuning) * self.trials + self.seeds)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """The inverse of ``dataclasses.asdict``."""
        recipes = tuple(PlannedRecipe(**recipe) for recipe in values["recipes"])
        return cls(**{**values, "recipes": recipes})


def make_plan(
    task: str,
    loss: str,
    *,
    optim: str = "adamw",
    seeds: int = 10,
    trials: int = 20,
    tuning_seeds: int = 3,
    epochs: int | None = None,
    metric: str | None = None,
    band: float = 0.01,
    command: str = "",
) -> Plan:
    """Check everything that can be checked before the first run.

    Args:
        task: a built-in name or ``package.module:Task``.
        loss: recipes separated by commas; see :mod:`telos.trials.recipes`.
        optim: optimizers separated by commas; every loss is tried with each.
        seeds: evaluation seeds.
        trials: configurations tried for each recipe, the untuned one among them.
        tuning_seeds: seeds on which each trial is judged.
        epochs: of every run; the task's own if not given.
        metric: of the validation split, for tuning; the task's own if not given.
        band: differences of the metric below this do not matter in practice.
        command: what to type to repeat the comparison.

    Returns:
        The plan; recipes that do not fit the task carry the reason.

    Raises:
        telos.trials.UsageError: for an unknown name, a number out of range, or when no recipe fits.
    """
    for name, value in (("seeds", seeds), ("trials", trials), ("tuning_seeds", tuning_seeds)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if epochs is not None and epochs < 1:
        raise UsageError(f"epochs must be at least 1, got {epochs}")
    if band < 0:
        raise UsageError(f"band must be at least 0, got {band}")
    loaded = load_task(task)
    try:
        fold = loaded.fold(0)
    except Exception as error:
        raise UsageError(
            f"the data of task {task} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    metric = metric or loaded.metric
    if metric not in loaded.metrics:
        raise UsageError(f"task {task} has no metric {metric!r}; {nearest(metric, loaded.metrics)}")
    recipes = parse_recipes(loss, optim, fold.info.family)
    planned = tuple(
        PlannedRecipe(
            label=label(recipe, recipes),
            loss=recipe.loss,
            optim=recipe.optim,
            canonical=recipe.canonical,
            code=code_hash(task, recipe),
            space={name: describe(span) for name, span in search_space(recipe, loaded).items()},
            refused=recipe.misfit(fold.info),
        )
        for recipe in recipes
    )
    if all(recipe.refused for recipe in planned):
        reasons = "; ".join(f"{recipe.label}: {recipe.refused}" for recipe in planned)
        raise UsageError(f"no recipe fits the task {task}: {reasons}")
    return Plan(
        task=task,
        recipes=planned,
        seeds=seeds,
        trials=trials,
        tuning_seeds=tuning_seeds,
        epochs=epochs or loaded.epochs,
        metric=metric,
        direction=loaded.metrics[metric],
        metrics=dict(loaded.metrics),
        band=band,
        sizes={name: len(getattr(fold, name)["target"]) for name in ("train", "validation", "test")},
        classes=fold.info.num_classes,
        versions=dict(versions()),
        description=str(getattr(loaded, "description", "")),
        command=command,
    )


@dataclass(frozen=True)
class Entry:
    """What became of one recipe.

    Attributes:
        recipe: as planned.
        tuning: its tuning runs, by trial and seed.
        scores: of each trial: the mean over tuning seeds, or ``None`` where one of them did not finish.
        chosen: the trial with the best score.
        evaluation: the chosen trial's runs, by seed.
        missing: runs still to do.
    """

    recipe: PlannedRecipe
    tuning: tuple[Run, ...]
    scores: tuple[float | None, ...]
    chosen: int | None
    evaluation: tuple[Run, ...]
    missing: int

    @property
    def finished(self) -> tuple[Run, ...]:
        """The evaluation runs with numbers."""
        return tuple(run for run in self.evaluation if run.finished)

    @property
    def status(self) -> str:
        """``refused``, ``unfinished``, ``diverged`` or ``failed`` everywhere, ``partial``, ``finished``."""
        if self.recipe.refused is not None:
            return "refused"
        if self.missing:
            return "unfinished"
        if self.finished:
            return "finished" if len(self.finished) == len(self.evaluation) else "partial"
        lost = [run.status for run in (*self.evaluation, *self.tuning) if not run.finished]
        return max(sorted(set(lost)), key=lost.count)

    @property
    def reason(self) -> str | None:
        """Why the recipe, or some of its seeds, did not finish."""
        if self.recipe.refused is not None:
            return self.recipe.refused
        return next((run.reason for run in (*self.evaluation, *self.tuning) if run.reason), None)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What the chosen trial set; the loss's defaults hold for the rest."""
        return next(
            (run.hyperparameters for run in (*self.evaluation, *self.tuning) if run.trial == self.chosen), {}
        )

    def values(self, metric: str) -> dict[int, float]:
        """A metric of every finished evaluation run, by seed."""
        return {run.seed: run.metrics[metric] for run in self.finished}

    def mean(self, metric: str) -> float:
        """The mean of a metric over the finished evaluation seeds."""
        return float(np.mean(list(self.values(metric).values()))) if self.finished else math.nan

    @property
    def seconds(self) -> float:
        """Mean wall time of an evaluation run."""
        return float(np.mean([run.seconds for run in self.finished])) if self.finished else math.nan


@dataclass(frozen=True)
class Difference:
    """A recipe against the baseline."""

    estimate: Estimate
    p_corrected: float | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """A plan and what came of it; all statistics are computed from the runs."""

    plan: Plan
    entries: tuple[Entry, ...]

    @classmethod
    def load(cls, store: Store, plan: Plan | None = None) -> Comparison:
        """The runs that a store holds of a plan, or of the last one begun; nothing is trained."""
        if plan is None:
            last = store.last_plan()
            if last is None:
                raise UsageError(f"the store {store.where} holds no comparison")
            plan = Plan.from_json(last)
        runs = store.of_plan(plan.task, [recipe.code for recipe in plan.recipes], plan.epochs)
        return cls(plan, tuple(_entry(plan, recipe, runs) for recipe in plan.recipes))

    @property
    def complete(self) -> bool:
        """Whether every recipe that fits has run to its end."""
        return not any(entry.missing for entry in self.entries)

    @property
    def metric(self) -> str:
        """The name of the metric in the runs: that of the plan, on the test split."""
        return f"test_{self.plan.metric}"

    @property
    def baseline(self) -> Entry:
        """The first recipe that fits the task."""
        return next(entry for entry in self.entries if entry.recipe.refused is None)

    @property
    def ranked(self) -> list[Entry]:
        """Recipes with results, best first; those that lost seeds come after those that did not."""
        sign = -1 if self.plan.direction == "max" else 1
        shown = [entry for entry in self.entries if entry.finished]
        return sorted(shown, key=lambda entry: (entry.status != "finished", sign * entry.mean(self.metric)))

    @property
    def test_share(self) -> float:
        """``n_test / n_train``, for the corrected interval."""
        return self.plan.sizes["test"] / self.plan.sizes["train"]

    def estimate(self, entry: Entry, metric: str | None = None) -> Estimate:
        """Mean of a metric of a recipe, with its interval."""
        return resampled_interval(list(entry.values(metric or self.metric).values()), self.test_share)

    def differences(self) -> dict[str, Difference]:
        """Recipe minus baseline over the seeds that both finished, by label; Holm corrects across recipes."""
        reference = self.baseline.values(self.metric)
        found: dict[str, Estimate] = {}
        for entry in self.entries:
            values = entry.values(self.metric)
            shared = sorted(values.keys() & reference.keys())
            if entry is not self.baseline and shared:
                paired = [values[seed] - reference[seed] for seed in shared]
                found[entry.recipe.label] = resampled_interval(paired, self.test_share)
        tested = [name for name, estimate in found.items() if estimate.n >= MINIMUM_SEEDS]
        corrected = dict(zip(tested, holm([found[name].p_value for name in tested]), strict=True))
        return {
            name: Difference(
                estimate,
                corrected.get(name),
                verdict(estimate, corrected.get(name), self.plan.band, self.plan.direction),
            )
            for name, estimate in found.items()
        }


def compare(
    task: str,
    loss: str,
    *,
    optim: str = "adamw",
    seeds: int = 10,
    trials: int = 20,
    tuning_seeds: int = 3,
    epochs: int | None = None,
    metric: str | None = None,
    band: float = 0.01,
    processes: int = 0,
    store: str | Path = "sqlite://",
    command: str = "",
    on_run: Callable[[int, int, Job, Run], None] | None = None,
) -> Comparison:
    """Compare recipes on a task: ``telos compare`` as a function.

    Args:
        task: see :func:`make_plan`, also for the next eight arguments.
        loss: recipes separated by commas.
        optim: optimizers separated by commas.
        seeds: evaluation seeds.
        trials: configurations tried for each recipe.
        tuning_seeds: seeds on which each trial is judged.
        epochs: of every run.
        metric: for tuning.
        band: differences that do not matter in practice.
        processes: worker processes; 0 trains in this one. A script that asks for more needs the usual
            ``if __name__ == "__main__":``.
        store: path of an SQLite file or an SQLAlchemy URL; in memory if not given.
        command: what to type to repeat the comparison.
        on_run: called with (number done, number of all, job, run) after each run is committed.

    Returns:
        The plan and its runs, with their statistics.

    Raises:
        telos.trials.UsageError: for what :func:`make_plan` refuses.
        telos.trials.StoreError: where the store cannot be read or written.

    Example:
        >>> found = compare("wine", "cross_entropy,focal", seeds=2, trials=1, epochs=2)
        >>> [len(entry.finished) for entry in found.entries]
        [2, 2]
        >>> found.differences()["focal"].verdict
        'n too small to test'
    """
    plan = make_plan(
        task,
        loss,
        optim=optim,
        seeds=seeds,
        trials=trials,
        tuning_seeds=tuning_seeds,
        epochs=epochs,
        metric=metric,
        band=band,
        command=command,
    )
    opened = Store(store)
    try:
        return execute(plan, opened, processes=processes, on_run=on_run)
    finally:
        opened.close()


def execute(
    plan: Plan,
    store: Store,
    *,
    processes: int = 0,
    on_run: Callable[[int, int, Job, Run], None] | None = None,
) -> Comparison:
    """Do what is missing of a plan; runs that the store already holds are not repeated."""
    if processes < 0:
        raise UsageError(f"processes must be at least 0, got {processes}")
    store.add_plan(plan.key, asdict(plan))
    done = 0

    def finish(workers: Workers, jobs: Sequence[Job]) -> dict[str, Run]:
        nonlocal done
        by_key = {job.key: job for job in jobs}
        # a diverged run is a result; one that raised may do better on the next attempt
        found = {key: run for key, run in store.find(by_key).items() if run.status != "failed"}
        for run in found.values():
            done += 1
            if on_run is not None:
                on_run(done, plan.runs, by_key[run.key], run)
        for run in workers.run([job for key, job in by_key.items() if key not in found]):
            store.add(run)
            found[run.key] = run
            done += 1
            if on_run is not None:
                on_run(done, plan.runs, by_key[run.key], run)
        return found

    with Workers(processes) as workers:
        finish(workers, tuning_jobs(plan))
        tuned = Comparison.load(store, plan)
        finish(workers, evaluation_jobs(plan, {entry.recipe.label: entry.chosen for entry in tuned.entries}))
    return Comparison.load(store, plan)


def tuning_jobs(plan: Plan) -> list[Job]:
    """Every trial of every recipe that fits, on every tuning seed.

    Recipes take turns, so that a machine that is busy for a while slows all of them alike.
    """
    task, parsed = load_task(plan.task), _parsed(plan)
    return [
        _job(plan, planned, "tuning", trial, configuration(recipe, task, trial), seed)
        for seed in plan.tuning
        for trial in range(plan.trials)
        for planned, recipe in parsed
    ]


def evaluation_jobs(plan: Plan, chosen: dict[str, int | None]) -> list[Job]:
    """The chosen trial of every recipe that has one, on every evaluation seed; recipes take turns."""
    task, parsed = load_task(plan.task), _parsed(plan)
    return [
        _job(plan, planned, "evaluation", trial, configuration(recipe, task, trial), seed)
        for seed in range(plan.seeds)
        for planned, recipe in parsed
        if (trial := chosen.get(planned.label)) is not None
    ]


def _parsed(plan: Plan) -> list[tuple[PlannedRecipe, Recipe]]:
    return [(planned, parse_recipes(planned.loss, planned.optim)[0]) for planned in plan.runnable]


def _job(plan: Plan, planned: PlannedRecipe, role: str, trial: int, chosen: dict[str, Any], seed: int) -> Job:
    return Job(
        task=plan.task,
        loss=planned.loss,
        optim=planned.optim,
        recipe=planned.canonical,
        role=role,
        trial=trial,
        hyperparameters=chosen,
        seed=seed,
        epochs=plan.epochs,
        code=planned.code,
    )


def _entry(plan: Plan, recipe: PlannedRecipe, runs: Sequence[Run]) -> Entry:
    own = [run for run in runs if run.recipe == recipe.canonical and run.code == recipe.code]
    tuning = sorted(
        (run for run in own if run.role == "tuning" and run.trial < plan.trials and run.seed in plan.tuning),
        key=lambda run: (run.trial, run.seed),
    )
    metric = f"validation_{plan.metric}"
    scores: list[float | None] = []
    for trial in range(plan.trials if plan.tuning else 0):
        ended = [run for run in tuning if run.trial == trial and run.finished]
        judged = len(ended) == len(plan.tuning)
        scores.append(float(np.mean([run.metrics[metric] for run in ended])) if judged else None)
    ran = len(tuning) == plan.trials * len(plan.tuning)
    chosen = (
        (best_trial(scores, plan.direction) if plan.tuning else 0) if ran and not recipe.refused else None
    )
    evaluation = sorted(
        (run for run in own if run.role == "evaluation" and run.trial == chosen and run.seed < plan.seeds),
        key=lambda run: run.seed,
    )
    missing = plan.trials * len(plan.tuning) - len(tuning)
    if chosen is not None or missing:
        missing += plan.seeds - len(evaluation)
    return Entry(
        recipe, tuple(tuning), tuple(scores), chosen, tuple(evaluation), 0 if recipe.refused else missing
    )
