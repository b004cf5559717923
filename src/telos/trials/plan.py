"""Plans: what a comparison sets out to do, checked before the first run, and the jobs that this makes."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

from telos.losses._space import Choice, Integers
from telos.trials._words import UsageError, nearest
from telos.trials.loading import keep_task, task_of
from telos.trials.recipes import Recipe, label, parse_recipes
from telos.trials.runner import Job, brought_hash, code_hash, versions
from telos.trials.search import configuration, describe, search_space
from telos.trials.sources import fingerprint, task_title
from telos.trials.store import REFERENCE, StoreError, from_json
from telos.trials.tasks import Fold, Task, load_task

FIRST_TUNING_SEED = 1_000_000
MOST = 1_000_000
"""No number of a plan may be larger: evaluation seeds must stay below the tuning seeds."""


@dataclass(frozen=True)
class PlannedRecipe:
    """A recipe of a plan.

    Attributes:
        label: its name in tables.
        loss: as the user wrote it.
        optim: as the user wrote it.
        canonical: both without freedom of spelling.
        code: hash of the code and data that decide its numbers.
        space: what its trials vary, in words.
        refused: why it does not fit the task, if it does not.
        brought: hash of the data and code of the user's own among these.
        repeats: trials that would repeat the configuration of an earlier one, and are left out.
    """

    label: str
    loss: str
    optim: str
    canonical: str
    code: str
    space: dict[str, str]
    refused: str | None = None
    repeats: tuple[int, ...] = ()
    brought: str = ""


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
        title: short name of the task.
        family: of the losses that fit the task.
        best: the best value that the metric can take, if there is one.
        max_time: seconds that the comparison may take.
        reference: whether the task's reference learner runs too.
        reference_name: what the reference learner is called.
        task_code: hash of the data and the code that every run depends on.
        resplits: whether every seed draws its own test split.
        data: hash of the files and the user's own code behind the task.
        notices: what the user should know about the data, a sentence each.
        columns: of a table: name, kind, what was done with it, share missing.
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
    title: str = ""
    family: str = "classification"
    best: float | None = None
    max_time: float | None = None
    reference: bool = False
    reference_name: str = ""
    task_code: str = ""
    resplits: bool = True
    data: str = ""
    notices: tuple[str, ...] = ()
    columns: tuple[dict[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """Hash of what is compared (not of how it was typed, on which versions, or in what time)."""
        names = (
            *("task", "seeds", "trials", "tuning_seeds", "epochs", "metric", "direction", "metrics"),
            *("band", "sizes", "classes"),
        )
        decisive = {name: getattr(self, name) for name in names}
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
    def codes(self) -> tuple[str, ...]:
        """The versions of the code that the plan's runs come from."""
        return tuple(dict.fromkeys([*(recipe.code for recipe in self.recipes), self.task_code]))

    @property
    def runs(self) -> int:
        """How many runs there are at most."""
        repeated = sum(len(recipe.repeats) for recipe in self.runnable)
        tuning = len(self.tuning) * (len(self.runnable) * self.trials - repeated)
        return tuning + (len(self.runnable) + self.reference) * self.seeds

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """The inverse of ``dataclasses.asdict``, also of plans that an older telos wrote.

        Raises:
            StoreError: where something is missing or makes no sense.
        """
        try:
            plan = from_json(cls, values)
            for name in ("seeds", "trials", "tuning_seeds", "epochs"):
                if not 1 <= getattr(plan, name) <= MOST:
                    raise ValueError(f"its {name} must lie between 1 and {MOST}, got {getattr(plan, name)}")
            if plan.trials * plan.tuning_seeds > MOST:
                raise ValueError(f"its trials times tuning_seeds must be at most {MOST}")
            if plan.metrics.get(plan.metric) != plan.direction or plan.direction not in ("max", "min"):
                raise ValueError(f"its metric {plan.metric!r} has no direction")
            if min(plan.sizes.get(name, 0) for name in ("train", "validation", "test")) < 1:
                raise ValueError("its sizes must count train, validation and test examples")
            if not plan.runnable:
                raise ValueError("it holds no recipe that fits")
            if plan.band < 0:
                raise ValueError("its band must be at least 0")
        except ValueError as error:
            raise StoreError(f"a plan cannot be read: {error}") from error
        return plan


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
    band: float | None = None,
    max_time: float | None = None,
    reference: bool | None = None,
    command: str = "",
) -> Plan:
    """Check everything that can be checked before the first run.

    Args:
        task: the words that say what the data are; see :func:`telos.trials.load_task`.
        loss: recipes separated by commas; see :mod:`telos.trials.recipes`.
        optim: optimizers separated by commas; every loss is tried with each.
        seeds: evaluation seeds.
        trials: configurations tried for each recipe, the untuned one among them.
        tuning_seeds: seeds on which each trial is judged.
        epochs: of every run; the task's own if not given.
        metric: of the validation split, for tuning; the task's own if not given.
        band: differences of the metric below this do not matter in practice; if not given, what the task says
            of the metric, else 0.01, or 0 for regression, where only the user knows what matters.
        max_time: seconds that the comparison may take; without an end if not given.
        reference: whether the task's reference learner runs too; if not given, where there is one.
        command: what to type to repeat the comparison.

    Returns:
        The plan; recipes that do not fit the task carry the reason.

    Raises:
        telos.trials.UsageError: for an unknown name, a number out of range, or when no recipe fits.
    """
    for name, value in (("seeds", seeds), ("trials", trials), ("tuning_seeds", tuning_seeds)):
        if not 1 <= value <= MOST:
            words = "at least 1" if value < 1 else f"at most {MOST:,}"
            raise UsageError(f"{name} must be {words}, got {value}")
    if epochs is not None and epochs < 1:
        raise UsageError(f"epochs must be at least 1, got {epochs}")
    if band is not None and not 0 <= band < math.inf:
        raise UsageError(f"band must be at least 0, got {band}")
    if max_time is not None and not 0 < max_time < math.inf:
        raise UsageError(f"max_time must be above 0 seconds, got {max_time}")
    loaded, fold = _load(task)
    metric = metric or loaded.metric
    if metric not in loaded.metrics:
        raise UsageError(f"task {task} has no metric {metric!r}; {nearest(metric, loaded.metrics)}")
    if reference and getattr(loaded, "reference", None) is None:
        raise UsageError(f"task {task} has no reference to run")
    if reference is None:
        reference = getattr(loaded, "reference", None) is not None
    if band is None:
        band = getattr(loaded, "bands", {}).get(metric, 0.0 if fold.info.family == "regression" else 0.01)
    planned = _planned(task, loaded, fold, parse_recipes(loss, optim, fold.info.family), trials)
    if all(recipe.refused for recipe in planned):
        reasons = "; ".join(f"{recipe.label}: {recipe.refused}" for recipe in planned)
        raise UsageError(f"no recipe fits the task {task}: {reasons}")
    return Plan(
        recipes=planned,
        seeds=seeds,
        trials=trials,
        tuning_seeds=tuning_seeds,
        epochs=epochs or loaded.epochs,
        metric=metric,
        direction=loaded.metrics[metric],
        band=band,
        best=getattr(loaded, "best", {}).get(metric),
        max_time=max_time,
        reference=reference,
        reference_name=str(getattr(loaded, "reference_name", "reference")) if reference else "",
        command=command,
        **_facts(task, loaded, fold),
    )


def extend_plan(plan: Plan, *, loss: str = "", optim: str = "", command: str | None = None) -> Plan:
    """A plan with more recipes; everything else is kept, and so are the runs that a store has of it.

    Args:
        plan: of a comparison, finished or not.
        loss: recipes to add, separated by commas; those of the plan if not given.
        optim: optimizers to add them with; those of the plan if not given.
        command: what to type to repeat the larger comparison; the plan's if not given.

    Returns:
        The plan with the new recipes after the old ones, so that the baseline stays. Recipes that it has
        already are not added again. Code and data are those of now: where they have changed, the old recipes
        train anew as well.

    Raises:
        telos.trials.UsageError: where nothing is given to add, or nothing of it fits the task.
    """
    if not loss and not optim:
        raise UsageError("give a loss or an optimizer to add")
    loaded, fold = _load(plan.task)
    family = fold.info.family
    old = [parse_recipes(recipe.loss, recipe.optim, family)[0] for recipe in plan.recipes]
    new = parse_recipes(
        loss or ",".join(dict.fromkeys(recipe.loss for recipe in old)),
        optim or ",".join(dict.fromkeys(recipe.optim for recipe in old)),
        family,
    )
    known = {recipe.canonical for recipe in old}
    added = [recipe for recipe in new if recipe.canonical not in known]
    planned = _planned(plan.task, loaded, fold, [*old, *added], plan.trials)
    refused = [recipe for recipe in planned[len(old) :] if recipe.refused]
    if added and len(refused) == len(added):
        reasons = "; ".join(f"{recipe.label}: {recipe.refused}" for recipe in refused)
        raise UsageError(f"nothing that is added fits the task {plan.task}: {reasons}")
    return replace(
        plan,
        recipes=planned,
        command=plan.command if command is None else command,
        **_facts(plan.task, loaded, fold),
    )


def _load(task: str) -> tuple[Task, Fold]:
    loaded = load_task(task)
    keep_task(task, brought_hash(task, None), loaded)
    try:
        return loaded, loaded.fold(0)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"the data of task {task} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _planned(
    task: str, loaded: Task, fold: Fold, recipes: list[Recipe], trials: int
) -> tuple[PlannedRecipe, ...]:
    return tuple(
        PlannedRecipe(
            label=label(recipe, recipes),
            loss=recipe.loss,
            optim=recipe.optim,
            canonical=recipe.canonical,
            code=code_hash(task, recipe),
            space={name: describe(span) for name, span in search_space(recipe, loaded).items()},
            refused=recipe.misfit(fold.info),
            repeats=_repeats(recipe, loaded, trials),
            brought=brought_hash(task, recipe),
        )
        for recipe in recipes
    )


def _repeats(recipe: Recipe, task: Task, trials: int) -> tuple[int, ...]:
    """The trials whose configuration an earlier trial has; only without a continuous range can there be any."""
    if not all(isinstance(span, Choice | Integers) for span in search_space(recipe, task).values()):
        return ()
    seen: list[dict[str, Any]] = []
    found = []
    for trial in range(trials):
        chosen = configuration(recipe, task, trial)
        if chosen in seen:
            found.append(trial)
        else:
            seen.append(chosen)
    return tuple(found)


def _facts(task: str, loaded: Task, fold: Fold) -> dict[str, Any]:
    """What a plan holds of its task."""
    return {
        "task": task,
        "metrics": dict(loaded.metrics),
        "sizes": {name: len(getattr(fold, name)["target"]) for name in ("train", "validation", "test")},
        "classes": fold.info.num_classes,
        "versions": {**versions(), "data": fingerprint(task)[:12] or None},
        "task_code": code_hash(task, None),
        "description": str(getattr(loaded, "description", "")),
        "title": task_title(task),
        "family": fold.info.family,
        "resplits": bool(getattr(loaded, "resplits", True)),
        "data": brought_hash(task, None),
        "notices": tuple(map(str, getattr(loaded, "notices", ()))),
        "columns": tuple(dict(column) for column in getattr(loaded, "columns", ())),
    }


def tuning_jobs(plan: Plan) -> list[Job]:
    """Every trial of every recipe that fits, on every tuning seed, as if no trial were hopeless.

    Recipes take turns, so that a machine that is busy for a while slows all of them alike.
    """
    task, parsed = task_of(plan.task, plan.data), parsed_recipes(plan)
    return [
        job_of(plan, planned, "tuning", trial, configuration(recipe, task, trial), seed)
        for trial in range(plan.trials)
        for seed in plan.tuning
        for planned, recipe in parsed
        if trial not in planned.repeats
    ]


def evaluation_jobs(plan: Plan, chosen: dict[str, int | None]) -> list[Job]:
    """The chosen trial of every recipe that has one, on every evaluation seed in turn; then the reference."""
    task, parsed = task_of(plan.task, plan.data), parsed_recipes(plan)
    jobs = [
        job_of(plan, planned, "evaluation", trial, configuration(recipe, task, trial), seed)
        for seed in range(plan.seeds)
        for planned, recipe in parsed
        if (trial := chosen.get(planned.label)) is not None
    ]
    if plan.reference:
        jobs += [reference_job(plan, seed) for seed in range(plan.seeds)]
    return jobs


def parsed_recipes(plan: Plan) -> list[tuple[PlannedRecipe, Recipe]]:
    """The recipes of a plan that fit, as planned and as parsed."""
    return [(planned, parse_recipes(planned.loss, planned.optim)[0]) for planned in plan.runnable]


def job_of(
    plan: Plan, planned: PlannedRecipe, role: str, trial: int, chosen: dict[str, Any], seed: int
) -> Job:
    """One run of a recipe."""
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
        data=plan.data,
        brought=planned.brought,
    )


def reference_job(plan: Plan, seed: int) -> Job:
    """The reference learner on a seed."""
    return Job(
        plan.task, "", "", REFERENCE, "reference", 0, {}, seed, 0, plan.task_code, plan.data, plan.data
    )
