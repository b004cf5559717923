"""A fair comparison: the same trials, the same seeds, the same splits for every recipe.

The protocol, which the report repeats:

1. Every recipe gets the same number of *trials*. Trial 0 is untuned, the others are fixed by (recipe, trial).
2. Trials run on *tuning seeds*, which no evaluation uses, and are judged by one metric on the validation
   split alone, averaged over those seeds. Where a task has noisy labels, that split has them too. Of equals
   the earlier trial wins; a trial that diverges on any tuning seed is out. A trial is not run to its end once
   even the best possible values on its remaining seeds could not make it the chosen one; this is the same
   rule for every recipe, and the chosen trial is that of exhaustive tuning (:func:`telos.trials.search.hopeless`).
3. The chosen configuration runs once on every *evaluation seed*. Only these runs look at the test split.
4. Recipes are compared with the first one by paired differences over the evaluation seeds.
5. Where the task has a *reference* (a learner from outside), it runs once on every evaluation seed too, after
   the recipes. It is a line in the report: it is not tuned, ranked or tested.
6. With ``max_time``, trials are walked one after another over all recipes, so that none gets more of them
   than another. Tuning ends after 60 % of the time, and then only the trials that every recipe completed
   count (with none, the untuned configuration is taken). Evaluation walks seed by seed until the time is
   over, and the seeds that every evaluated recipe has count. Runs that the end cuts short give nothing.

Every seed draws its own split of one data set, so the examples on which a recipe was tuned occur in other
seeds' test splits. That is the same for all recipes, and it only ever chose between ``trials``
configurations. Where the task fixes its test split, seeds vary initialisation and order of batches only, and
the intervals cover no more than that.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from telos.trials._words import UsageError
from telos.trials.engines import Engine, open_engine
from telos.trials.loading import fold_of, task_of
from telos.trials.plan import (
    FIRST_TUNING_SEED,
    Plan,
    PlannedRecipe,
    evaluation_jobs,
    extend_plan,
    job_of,
    make_plan,
    parsed_recipes,
    reference_job,
    tuning_jobs,
)
from telos.trials.recipes import Recipe
from telos.trials.runner import Job, run_job
from telos.trials.search import Standing, best_trial, configuration
from telos.trials.statistics import MINIMUM_SEEDS, Estimate, holm, resampled_interval, verdict
from telos.trials.store import REFERENCE, Budget, Run, Store, StoreError

__all__ = [
    "Comparison",
    "Cost",
    "Difference",
    "Entry",
    "Plan",
    "PlannedRecipe",
    "compare",
    "estimate_seconds",
    "evaluation_jobs",
    "execute",
    "extend_plan",
    "make_plan",
    "tuning_jobs",
]

TUNING_SHARE = 0.6
"""Of ``max_time``, what tuning may use."""
LEASE = 60.0
"""Seconds for which a run of a shared store is claimed; renewed while the process lives."""

Place: TypeAlias = tuple[str, str, int, int]


def _place(job: Job | Run) -> Place:
    return job.recipe, job.role, job.trial, job.seed


@dataclass(frozen=True)
class Entry:
    """What became of one recipe.

    Attributes:
        recipe: as planned.
        tuning: its tuning runs, by trial and seed.
        scores: of each trial that counts: the mean over tuning seeds, or ``None`` without one.
        chosen: the trial with the best score.
        evaluation: the chosen trial's runs, by seed, on the seeds that count.
        missing: runs still to do, at most.
        trials: of each trial that counts: ``finished``; ``stopped``, because it could no longer win;
            ``diverged`` or ``failed``; ``repeated``, an earlier one again; or ``open``.
    """

    recipe: PlannedRecipe
    tuning: tuple[Run, ...]
    scores: tuple[float | None, ...]
    chosen: int | None
    evaluation: tuple[Run, ...]
    missing: int
    trials: tuple[str, ...] = ()

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
        if not lost or (self.chosen is not None and not self.evaluation):
            return "unfinished"
        return max(sorted(set(lost)), key=lost.count)

    @property
    def reason(self) -> str | None:
        """Why the recipe, or some of its seeds, did not finish."""
        if self.recipe.refused is not None:
            return self.recipe.refused
        if self.chosen is not None and not self.evaluation and not self.missing:
            return "the time was over before any of its evaluation runs counted"
        return next((run.reason for run in (*self.evaluation, *self.tuning) if run.reason), None)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What the chosen trial set; the loss's defaults hold for the rest."""
        return next(
            (run.hyperparameters for run in (*self.evaluation, *self.tuning) if run.trial == self.chosen), {}
        )

    def values(self, metric: str) -> dict[int, float]:
        """A metric of every finished evaluation run, by seed."""
        return {run.seed: run.metrics[metric] for run in self.finished if metric in run.metrics}

    def mean(self, metric: str) -> float:
        """The mean of a metric over the finished evaluation seeds."""
        values = list(self.values(metric).values())
        return float(np.mean(values)) if values else math.nan

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
    """A plan and what came of it; all statistics are computed from the runs.

    Attributes:
        plan: what was to be done.
        entries: what became of each recipe.
        reference: the task's reference learner, where it ran; it is not among the entries.
        stopped_by_time: whether ``max_time`` ended it before all its trials or seeds.
        completed_trials: trials that every recipe has completed; all of the plan's if not given.
    """

    plan: Plan
    entries: tuple[Entry, ...]
    reference: Entry | None = None
    stopped_by_time: bool = False
    completed_trials: int | None = None

    @classmethod
    def load(cls, store: Store, plan: Plan | None = None) -> Comparison:
        """The runs that a store holds of a plan, or of the last one begun; nothing is trained.

        Raises:
            telos.trials.UsageError: where the store holds no comparison.
            StoreError: where what it holds cannot be read.
        """
        if plan is None:
            last = store.last_plan()
            if last is None:
                raise UsageError(f"the store {store.where} holds no comparison")
            plan = Plan.from_json(last)
        budget = store.budget(plan.key)
        if plan.max_time is None or budget.limit != plan.max_time:
            budget = Budget()
        runs = _by_place(plan, store)
        standings = {recipe.canonical: _standing(plan, recipe, runs) for recipe in plan.runnable}
        entries = [
            _entry(plan, recipe, standings.get(recipe.canonical), runs, budget) for recipe in plan.recipes
        ]
        outside = _reference(plan, runs, budget) if plan.reference else None
        # the seeds that every recipe has which has any
        ended = [{run.seed for run in entry.evaluation} for entry in entries if entry.evaluation]
        seeds = set.intersection(*ended) if ended else set()
        lacking = any(entry.chosen is not None and len(entry.evaluation) < plan.seeds for entry in entries)
        return cls(
            plan,
            tuple(_on_seeds(entry, seeds) for entry in entries),
            None if outside is None else _on_seeds(outside, seeds),
            budget.trials is not None or (budget.stopped and lacking),
            _completed(plan, standings.values()) if budget.trials is None else budget.trials,
        )

    @property
    def trials_counted(self) -> int:
        """The trials out of which every recipe chose: those that all of them completed."""
        return self.plan.trials if self.completed_trials is None else self.completed_trials

    @property
    def complete(self) -> bool:
        """Whether every recipe that fits has run to its end, or for as long as ``max_time`` allows."""
        outside = () if self.reference is None else (self.reference,)
        return not any(entry.missing for entry in (*self.entries, *outside))

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
    def seeds(self) -> tuple[int, ...]:
        """The evaluation seeds that count: those of every recipe that has any."""
        return tuple(sorted({run.seed for entry in self.entries for run in entry.evaluation}))

    @property
    def seeds_counted(self) -> int:
        """How many evaluation seeds count."""
        return len(self.seeds)

    @property
    def test_share(self) -> float:
        """``n_test / n_train``, for the corrected interval; 0 where all seeds share one test split."""
        return self.plan.sizes["test"] / self.plan.sizes["train"] if self.plan.resplits else 0.0

    @property
    def interval_note(self) -> str:
        """What the intervals cover, in a sentence or two for the report."""
        if self.plan.resplits:
            return (
                "Every seed draws its own split, initial weights and order of batches, and the intervals cover "
                "all three; training sets of different seeds overlap, so the corrected resampled variance "
                f"(1/n + n_test/n_train) s² is used, with n_test/n_train = {self.test_share:.3f}."
            )
        return (
            "All seeds share one test split, so the intervals cover initial weights and the order of batches "
            "only: they do not say how the recipes would compare on other examples."
        )

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
    band: float | None = None,
    max_time: float | None = None,
    reference: bool | None = None,
    processes: int = 0,
    engine: str = "local",
    store: str | Path = "sqlite://",
    command: str = "",
    on_run: Callable[[int, int, Job, Run], None] | None = None,
) -> Comparison:
    """Compare recipes on a task: ``telos compare`` as a function.

    Args:
        task: see :func:`make_plan`, also for the next ten arguments.
        loss: recipes separated by commas.
        optim: optimizers separated by commas.
        seeds: evaluation seeds.
        trials: configurations tried for each recipe.
        tuning_seeds: seeds on which each trial is judged.
        epochs: of every run.
        metric: for tuning.
        band: differences that do not matter in practice.
        max_time: seconds that it may take.
        reference: whether the task's reference learner runs too.
        processes: worker processes; 0 trains in this one. A script that asks for more needs the usual
            ``if __name__ == "__main__":``.
        engine: ``"local"`` or ``"ray"``.
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
    started = time.monotonic()
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
        max_time=max_time,
        reference=reference,
        command=command,
    )
    opened = Store(store)
    try:
        return execute(plan, opened, processes=processes, engine=engine, on_run=on_run, started=started)
    finally:
        opened.close()


def execute(
    plan: Plan,
    store: Store,
    *,
    processes: int = 0,
    engine: str = "local",
    on_run: Callable[[int, int, Job, Run], None] | None = None,
    started: float | None = None,
) -> Comparison:
    """Do what is missing of a plan; runs that the store already holds are not repeated.

    Args:
        plan: what to do. Its ``max_time`` counts over all commands that work on the plan: the same plan again
            finds its time used up, and one with more time goes on.
        store: where the runs are and go.
        processes: see :func:`telos.trials.engines.open_engine`.
        engine: ``"local"`` or ``"ray"``; the numbers do not depend on it.
        on_run: called with (number done, number of all, job, run) after each run is committed. The number of
            all shrinks when trials turn out to be hopeless.
        started: since when the time of the plan runs, in :func:`time.monotonic`; from now if not given.

    Returns:
        The plan and its runs, with their statistics.

    Raises:
        telos.trials.UsageError: for an unknown engine or a negative number of processes.
        StoreError: where the store cannot be read or written.
        WorkerLostError: where no worker can be had.
    """
    with open_engine(engine, processes) as workers:
        store.add_plan(plan.key, asdict(plan))
        with _claiming(store) as owner:
            session = _Session(plan, store, workers, on_run, owner, started)
            session.tune()
            session.evaluate()
    return Comparison.load(store, plan)


class _Session:
    """One command's work on a plan."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        engine: Engine,
        on_run: Callable[[int, int, Job, Run], None] | None,
        owner: str,
        started: float | None,
    ) -> None:
        self.plan, self.store, self.engine, self.on_run, self.owner = plan, store, engine, on_run, owner
        self.begun = time.monotonic() if started is None else started
        self.task, self.parsed = task_of(plan.task, plan.data), parsed_recipes(plan)
        self.running: dict[str, Job] = {}
        self.done = self.saved = 0
        self.before = store.budget(plan.key)
        if self.before.limit != plan.max_time:
            # what another limit has decided is open again; the time is spent
            self.before = replace(self.before, limit=plan.max_time, trials=None, stopped=False)
        self.budget = self.before
        stored = _by_place(plan, store)
        # a diverged run is a result; one that raised may do better on the next attempt
        self.failed = {run.key for run in stored.values() if run.status == "failed"}
        self.found = {place: run for place, run in stored.items() if run.status != "failed"}
        self.standings = {
            planned.canonical: _standing(plan, planned, self.found) for planned in plan.runnable
        }

    def tune(self) -> None:
        """Walk the trials until all are judged or the time for it is over."""
        for planned, recipe in self.parsed:
            for (trial, seed), run in sorted(self.standings[planned.canonical].runs.items()):
                self._tell(self._tuning_job(planned, recipe, trial, seed), run)
        if self.budget.trials is None:
            self._work(self._tuning(), "tuning")
            counted = _completed(self.plan, self.standings.values())
            if counted < self.plan.trials:
                self._note("tuning", trials=counted)

    def evaluate(self) -> None:
        """Walk the evaluation seeds until all are done or the time is over."""
        chosen = {
            entry.recipe.label: entry.chosen for entry in Comparison.load(self.store, self.plan).entries
        }
        jobs = evaluation_jobs(self.plan, chosen)
        self.saved += self.plan.seeds * sum(chosen[planned.label] is None for planned, _ in self.parsed)
        for job in jobs:
            if run := self.found.get(_place(job)):
                self._tell(job, run)
        self._work((job for job in jobs if _place(job) not in self.found), "evaluation")
        self._note("evaluation", stopped=any(_place(job) not in self.found for job in jobs))

    def _tuning(self) -> Iterator[Job]:
        """What to tune next, trial by trial, decided one run at a time by how the trials stand then."""
        for trial in range(self.plan.trials):
            for seed in self.plan.tuning:
                for planned, recipe in self.parsed:
                    standing = self.standings[planned.canonical]
                    if (trial, seed) in standing.runs:
                        continue
                    if standing.trial(trial).status == "open":
                        yield self._tuning_job(planned, recipe, trial, seed)
                    elif trial not in planned.repeats:
                        self.saved += 1

    def _tuning_job(self, planned: PlannedRecipe, recipe: Recipe, trial: int, seed: int) -> Job:
        return job_of(self.plan, planned, "tuning", trial, configuration(recipe, self.task, trial), seed)

    def _work(self, jobs: Iterator[Job], phase: str) -> None:
        """Run jobs in what is left of the time."""
        deadline = None
        if self.plan.max_time is not None:
            deadline = self.begun + self.plan.max_time - self.before.total
            if phase == "tuning":
                share = TUNING_SHARE * self.plan.max_time
                deadline = min(deadline, self.begun + share - self.before.tuning)
        for run in self.engine.run(self._shared(jobs), deadline):
            self.store.add(run)
            self._take(self.running.pop(run.key), run)
            self._note(phase)
        self._note(phase)

    def _shared(self, jobs: Iterator[Job]) -> Iterator[Job | None]:
        """The jobs that nobody else has done or does; ``None`` while others have yet to end theirs."""
        elsewhere: list[Job] = []
        for job in jobs:
            match self._ask(job):
                case True:
                    yield job
                case False:
                    elsewhere.append(job)
        while elsewhere:
            waiting, elsewhere = elsewhere, []
            for job in waiting:
                match self._ask(job):
                    case True:
                        yield job
                    case False:
                        elsewhere.append(job)
            if elsewhere:
                yield None

    def _ask(self, job: Job) -> bool | None:
        """Whether a job is ours; ``None`` where its run has come into the store in the meantime."""
        # first claimed, then looked for: another may store the run and let go of it in between
        mine = not self.store.shared or self.store.claim(job.key, self.owner, LEASE)
        run = self.store.find([job.key]).get(job.key)
        if run is not None and (run.status != "failed" or run.key not in self.failed):
            self._take(job, run)
            return None
        if not mine:
            return False
        self.running[job.key] = job
        return True

    def _take(self, job: Job, run: Run) -> None:
        self.found[_place(job)] = run
        if job.role == "tuning":
            self.standings[job.recipe].add(job.trial, run)
        self._tell(job, run)

    def _tell(self, job: Job, run: Run) -> None:
        self.done += 1
        if self.on_run is not None:
            self.on_run(self.done, max(self.done, self.plan.runs - self.saved), job, run)

    def _note(self, phase: str, **decided: Any) -> None:
        """Write down the time that was used, so that a killed command cannot use it again."""
        if self.plan.max_time is None:
            return
        elapsed = time.monotonic() - self.begun
        self.budget = replace(self.budget, total=self.before.total + elapsed, **decided)
        if phase == "tuning":
            self.budget = replace(self.budget, tuning=self.before.tuning + elapsed)
        self.store.spend(self.plan.key, self.budget)


@contextmanager
def _claiming(store: Store) -> Iterator[str]:
    """A name under which to claim runs; the claims are held until the end of the block."""
    owner, over = uuid.uuid4().hex, threading.Event()

    def hold() -> None:
        while not over.wait(LEASE / 3):
            # a database that is gone is an error where runs are written; it says so
            with suppress(StoreError):
                store.renew(owner, LEASE)

    if not store.shared:
        yield owner
        return
    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    try:
        yield owner
    finally:
        over.set()
        thread.join()
        with suppress(StoreError):
            store.release(owner)


@dataclass(frozen=True)
class Cost:
    """What a plan asks for.

    Attributes:
        runs: how many runs there are at most, without those that the store holds; hopeless trials will spare
            some.
        stored: how many of its runs the store holds.
        seconds_per_run: mean over the runs to do.
        splitting: seconds for making the splits of all seeds.
        seconds: for all of them and for splitting the data, and no more than ``max_time``.
    """

    runs: int
    stored: int
    seconds_per_run: float
    splitting: float
    seconds: float


def estimate_seconds(
    plan: Plan, store: Store | None = None, *, processes: int = 1, patience: float = 10.0
) -> Cost:
    """Estimate the time of a plan: from the runs that a store has, else by training for one epoch.

    Args:
        plan: what to do.
        store: runs in it are not done again, and say how long a recipe takes.
        processes: worker processes.
        patience: seconds after which recipes that were not timed are taken to be as slow as the others.

    Returns:
        Counts and seconds, start-up of processes not included.
    """
    start = time.monotonic()
    timed: dict[str, list[float]] = {}
    missing = {
        recipe.canonical: len(plan.tuning) * (plan.trials - len(recipe.repeats)) + plan.seeds
        for recipe in plan.runnable
    }
    if plan.reference:
        missing[REFERENCE] = plan.seeds
    stored: dict[Place, Run] = {}
    if store is not None:
        stored = _by_place(plan, store)
        found = Comparison.load(store, plan)
        missing = {
            entry.recipe.canonical: entry.missing
            for entry in (*found.entries, *([found.reference] if found.reference else []))
        }
        for (recipe, *_), run in stored.items():
            if run.finished:
                timed.setdefault(recipe, []).append(run.seconds)
    probes = tuning_jobs(replace(plan, trials=2, tuning_seeds=1))[: len(plan.runnable)]
    if plan.reference:
        probes.append(reference_job(plan, FIRST_TUNING_SEED))
    splitting = 0.0
    if any(missing.values()):
        task_of(plan.task, plan.data)
        begin = time.perf_counter()
        fold_of(plan.task, plan.data, FIRST_TUNING_SEED)
        # every process makes the splits for itself
        splitting = (time.perf_counter() - begin) * (len(plan.tuning) + plan.seeds)
    if any(missing.get(job.recipe) and job.recipe not in timed for job in probes):
        run_job(replace(probes[0], epochs=1))  # untimed: it pays for start-up
    for job in probes:
        if missing.get(job.recipe) and job.recipe not in timed:
            if timed and time.monotonic() - start > patience:
                break
            run = run_job(replace(job, epochs=min(1, job.epochs)))
            timed[job.recipe] = [run.seconds * max(1, job.epochs)]
    means = {recipe: float(np.mean(seconds)) for recipe, seconds in timed.items()}
    usual = float(np.mean(list(means.values()))) if means else 0.0
    runs = sum(missing.values())
    work = sum(count * means.get(recipe, usual) for recipe, count in missing.items())
    seconds = work / max(1, min(processes, runs)) + splitting
    if plan.max_time is not None:
        seconds = min(seconds, plan.max_time)
    return Cost(runs, len(stored), work / runs if runs else 0.0, splitting, seconds)


def _by_place(plan: Plan, store: Store) -> dict[Place, Run]:
    """The stored runs of a plan, by recipe, role, trial and seed."""
    codes = {recipe.canonical: recipe.code for recipe in plan.runnable}
    if plan.reference:
        codes[REFERENCE] = plan.task_code
    needed = {
        "tuning": {f"validation_{plan.metric}"},
        "evaluation": {f"test_{metric}" for metric in plan.metrics},
        "reference": {f"test_{plan.metric}"},
    }
    tuning = set(plan.tuning)
    found = {}
    for run in store.of_plan(plan.task, plan.codes, plan.epochs):
        meant = run.seed in tuning if run.role == "tuning" else run.seed < plan.seeds
        if codes.get(run.recipe) != run.code or not meant or run.trial >= plan.trials:
            continue
        if run.finished and (lacking := sorted(needed[run.role] - run.metrics.keys())):
            raise StoreError(
                f"the store {store.where} holds a run that cannot be read, {run.key}: it lacks {lacking[0]}"
            )
        found[_place(run)] = run
    return found


def _standing(plan: Plan, recipe: PlannedRecipe, runs: Mapping[Place, Run]) -> Standing:
    standing = Standing(plan.tuning, f"validation_{plan.metric}", plan.direction, plan.best, recipe.repeats)
    for (canonical, role, trial, _), run in runs.items():
        if canonical == recipe.canonical and role == "tuning":
            standing.add(trial, run)
    return standing


def _completed(plan: Plan, standings: Iterable[Standing]) -> int:
    """How many trials, counted from the first, every recipe has completed."""
    standings = list(standings)
    for trial in range(plan.trials if plan.tuning else 0):
        if any(standing.trial(trial).status == "open" for standing in standings):
            return trial
    return plan.trials


def _entry(
    plan: Plan,
    recipe: PlannedRecipe,
    standing: Standing | None,
    runs: Mapping[Place, Run],
    budget: Budget,
) -> Entry:
    if standing is None:  # refused
        return Entry(recipe, (), (), None, (), 0)
    limit = plan.trials if budget.trials is None else budget.trials
    trials = [standing.trial(trial) for trial in range(limit)] if plan.tuning else []
    scores = [trial.score for trial in trials]
    missing = sum(len(plan.tuning) - len(trial.runs) for trial in trials if trial.status == "open")
    # without a trial to choose from, the untuned one
    chosen = None if missing else best_trial(scores, plan.direction) if trials else 0
    places = (
        [] if chosen is None else [(recipe.canonical, "evaluation", chosen, s) for s in range(plan.seeds)]
    )
    evaluation = [runs[place] for place in places if place in runs]
    if (chosen is not None or missing) and not budget.stopped:
        missing += plan.seeds - len(evaluation)
    return Entry(
        recipe,
        tuple(run for trial in trials for run in trial.runs),
        tuple(scores),
        chosen,
        tuple(evaluation),
        missing,
        tuple(trial.status for trial in trials),
    )


def _reference(plan: Plan, runs: Mapping[Place, Run], budget: Budget) -> Entry:
    planned = PlannedRecipe(plan.reference_name, "", "", REFERENCE, plan.task_code, {})
    found = [
        runs[place] for seed in range(plan.seeds) if (place := (REFERENCE, "reference", 0, seed)) in runs
    ]
    return Entry(planned, (), (), 0, tuple(found), 0 if budget.stopped else plan.seeds - len(found))


def _on_seeds(entry: Entry, seeds: set[int]) -> Entry:
    return replace(entry, evaluation=tuple(run for run in entry.evaluation if run.seed in seeds))
