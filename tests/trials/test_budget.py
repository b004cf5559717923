"""Budgets: time that is kept, trials that are not run to their end, and estimates before the first run."""

import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from telos.trials import Comparison, Job, Plan, Run, Store, UsageError, compare, execute, make_plan, runner
from telos.trials.comparison import estimate_seconds, tuning_jobs
from telos.trials.runner import OutOfTimeError, run_job

BLOBS = "tests.trials.examples:BLOBS"
SCALED = "tests.trials.misbehaving:Scaled"


def numbers(comparison: Comparison) -> list[tuple]:
    """Everything that a comparison says, apart from wall times."""
    return [
        (
            entry.recipe.label,
            entry.status,
            entry.chosen,
            entry.scores,
            entry.trials,
            [(run.key, run.status, run.metrics) for run in (*entry.tuning, *entry.evaluation)],
        )
        for entry in comparison.entries
    ]


class Clock:
    """A clock that only runs go by: one second each, unless told otherwise."""

    def __init__(self) -> None:
        self.now, self.log, self.slow = 0.0, [], {}

    def __call__(self) -> float:
        return self.now

    def run(self, job: Job, seconds: float | None = None) -> Run:
        takes = self.slow.get(job.loss, 1.0)
        if seconds is not None and seconds < takes:
            self.now += seconds
            raise OutOfTimeError
        self.now += takes
        self.log.append(job)
        return run_job(job)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "monotonic", found)
    monkeypatch.setattr(runner, "run_job", found.run)
    return found


def timed_plan(max_time: float | None, **changes: int) -> Plan:
    """Two recipes, four runs a trial, two runs an evaluation seed, and no trial that is hopeless."""
    asked = {"seeds": 6, "trials": 5, "tuning_seeds": 2, **changes}
    plan = make_plan(BLOBS, "cross_entropy,focal", max_time=max_time, **asked)
    return replace(plan, best=None)


def test_time_is_shared_fairly(clock: Clock) -> None:
    store = Store("sqlite://")
    # tuning has 12 s: three trials of two recipes on two seeds; evaluation has 8 s: four seeds
    found = execute(timed_plan(20), store)
    assert clock.now == 20
    assert [job.role for job in clock.log] == ["tuning"] * 12 + ["evaluation"] * 8
    assert [job.trial for job in clock.log[:12]] == [0] * 4 + [1] * 4 + [2] * 4
    assert [job.seed for job in clock.log[12:]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (found.trials_counted, found.seeds_counted, found.seeds) == (3, 4, (0, 1, 2, 3))
    assert found.stopped_by_time
    assert found.complete
    for entry in found.entries:
        assert len(entry.scores) == len(entry.trials) == 3
        assert len(entry.tuning) == 6
        assert (entry.status, entry.missing, len(entry.evaluation)) == ("finished", 0, 4)
    assert found.differences()["focal"].estimate.n == 4
    # what is read back from the store is the same
    assert numbers(Comparison.load(store)) == numbers(found)
    assert Comparison.load(store).stopped_by_time


def test_a_trial_that_not_all_recipes_completed_does_not_count(clock: Clock) -> None:
    store = Store("sqlite://")
    # 14.4 s of tuning: a fourth trial begins, and only one recipe gets through its first seed
    found = execute(timed_plan(24), store)
    assert [job.trial for job in clock.log].count(3) == 2
    assert found.trials_counted == 3
    assert {len(entry.tuning) for entry in found.entries} == {6}
    assert len(store.runs(role="tuning")) == 14


def test_a_seed_that_not_all_recipes_have_does_not_count(clock: Clock) -> None:
    found = execute(timed_plan(9, trials=1), Store("sqlite://"))
    assert len(clock.log) == 9
    assert found.seeds_counted == 4
    assert [len(entry.evaluation) for entry in found.entries] == [4, 4]
    assert found.trials_counted == 1


def test_without_time_for_a_trial_nothing_is_tuned(clock: Clock) -> None:
    clock.slow = {"focal": 4.0}
    found = execute(timed_plan(16), Store("sqlite://"))
    assert found.trials_counted == 0
    assert [entry.chosen for entry in found.entries] == [0, 0]
    assert [entry.scores for entry in found.entries] == [(), ()]
    assert found.seeds_counted == 1


def test_a_recipe_that_never_ends_does_not_hide_the_others(clock: Clock) -> None:
    clock.slow = {"focal": 100.0}
    found = execute(timed_plan(5, trials=1), Store("sqlite://"))
    first, second = found.entries
    assert (first.status, len(first.evaluation)) == ("finished", 1)
    assert (second.status, second.reason) == (
        "unfinished",
        "the time was over before any of its evaluation runs counted",
    )
    assert [entry.recipe.label for entry in found.ranked] == ["cross_entropy"]


def test_a_reference_has_what_time_is_left(clock: Clock) -> None:
    asked = {"seeds": 3, "trials": 1, "max_time": 4.0}
    plan = make_plan("tests.trials.misbehaving:REFERRING", "cross_entropy", **asked)
    found = execute(plan, Store("sqlite://"))
    assert [job.role for job in clock.log] == ["evaluation"] * 3 + ["reference"]
    # every recipe has all its seeds, so the comparison itself was not stopped
    assert (found.stopped_by_time, found.complete, found.seeds_counted) == (False, True, 3)
    assert found.reference is not None
    assert (found.reference.status, len(found.reference.evaluation)) == ("finished", 1)
    without = execute(replace(plan, max_time=3.0), Store("sqlite://"))
    assert without.reference is not None
    assert (without.reference.status, without.complete) == ("unfinished", True)


def test_the_same_command_has_used_its_time_and_one_with_more_goes_on(clock: Clock) -> None:
    store = Store("sqlite://")
    first = execute(timed_plan(20), store)
    before = len(clock.log)
    assert numbers(execute(timed_plan(20), store)) == numbers(first)
    assert len(clock.log) == before
    # tuning now has 18 s, of which 12 are used: six runs, and so one more trial that counts
    longer = execute(timed_plan(30), store)
    assert [job.role for job in clock.log[before:]].count("tuning") == 6
    assert (longer.trials_counted, longer.stopped_by_time) == (4, True)
    assert timed_plan(30).key == timed_plan(20).key == timed_plan(None).key
    # and without an end all of it is done, and no run twice
    whole = execute(timed_plan(None), store)
    assert (whole.trials_counted, whole.seeds_counted, whole.stopped_by_time) == (5, 6, False)
    assert len({job.key for job in clock.log}) == len(clock.log)
    assert numbers(whole) == numbers(execute(timed_plan(None), Store("sqlite://")))


def test_time_that_suffices_changes_nothing(clock: Clock) -> None:
    plenty = execute(timed_plan(1000), Store("sqlite://"))
    assert not plenty.stopped_by_time
    assert plenty.trials_counted == 5
    assert numbers(plenty) == numbers(execute(timed_plan(None), Store("sqlite://")))


def test_a_killed_command_does_not_use_its_time_twice(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("sqlite://")

    def killed(number: int, total: int, job: Job, run: Run) -> None:
        if number == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(timed_plan(20), store, on_run=killed)
    # the tuning was over; its outcome stands
    assert Comparison.load(store).trials_counted == 3
    used = store.budget(timed_plan(20).key)
    assert (used.tuning, used.trials) == (12, 3)
    assert 15 <= used.total <= 16
    found = execute(timed_plan(20), store)
    assert (found.trials_counted, found.seeds_counted) == (3, 4)


def test_the_clock_starts_where_the_caller_says(clock: Clock) -> None:
    clock.now = 15.0
    found = execute(timed_plan(20, trials=1), Store("sqlite://"), started=0.0)
    assert clock.now == 20
    assert found.seeds_counted == 2


def test_a_run_that_hangs_is_ended_in_time() -> None:
    start = time.monotonic()
    found = compare(
        BLOBS,
        "cross_entropy,tests.trials.misbehaving:Stuck",
        seeds=2,
        trials=1,
        max_time=6,
        processes=1,
    )
    # one step alone takes a minute
    assert time.monotonic() - start < 25
    assert found.stopped_by_time
    assert found.entries[1].status == "unfinished"
    assert found.entries[1].evaluation == ()


@pytest.mark.parametrize("max_time", [0, -1.0, float("inf"), float("nan")])
def test_a_time_that_makes_no_sense(max_time: float) -> None:
    with pytest.raises(UsageError, match="max_time must be above 0 seconds, got"):
        make_plan(BLOBS, "focal", max_time=max_time)


# ------------------------------------------------------------------------------------------ hopeless trials


def test_tuning_without_hopeless_trials_chooses_as_exhaustive_tuning_does() -> None:
    asked = {"seeds": 2, "trials": 10, "tuning_seeds": 3, "epochs": 12, "optim": "sgd"}
    plan = make_plan(BLOBS, f"cross_entropy,{SCALED}", **asked)
    assert plan.best == 1.0
    store, whole = Store("sqlite://"), Store("sqlite://")
    totals: list[int] = []
    short = execute(plan, store, on_run=lambda done, total, job, run: totals.append(total))
    exhaustive = execute(replace(plan, best=None), whole)
    spared = len(whole.runs(role="tuning")) - len(store.runs(role="tuning"))
    assert spared >= 5
    # the number of all runs shrinks to those that were done
    assert (totals[0], totals[-1]) == (plan.runs, len(totals))
    assert sorted(totals, reverse=True) == totals
    for one, other in zip(short.entries, exhaustive.entries, strict=True):
        assert one.chosen == other.chosen
        assert [run.metrics for run in one.evaluation] == [run.metrics for run in other.evaluation]
        for state, score, full in zip(one.trials, one.scores, other.scores, strict=True):
            assert state in ("finished", "stopped")
            assert score == (full if state == "finished" else None)
        assert len(one.tuning) == len(store.runs(role="tuning", recipe=one.recipe.canonical))
    assert short.trials_counted == 10
    assert short.complete


def test_a_trial_that_is_out_is_not_run_to_its_end() -> None:
    found = compare(BLOBS, "cross_entropy,tests.trials.examples:Exploding", seeds=1, trials=2, tuning_seeds=3)
    exploding = found.entries[1]
    assert exploding.trials == ("diverged", "diverged")
    assert len(exploding.tuning) == 2
    assert (exploding.chosen, exploding.missing, exploding.status) == (None, 0, "diverged")


def test_nothing_is_tried_twice_where_there_is_nothing_to_search() -> None:
    plan = make_plan(
        BLOBS, "cross_entropy", optim="adamw:lr=0.01:weight_decay=0.0", seeds=2, trials=4, tuning_seeds=2
    )
    assert plan.recipes[0].repeats == (1, 2, 3)
    assert plan.runs == 2 + 2
    found = execute(plan, Store("sqlite://"))
    (entry,) = found.entries
    assert entry.trials == ("finished", "repeated", "repeated", "repeated")
    assert (entry.chosen, entry.status, found.complete) == (0, "finished", True)


# ------------------------------------------------------------------------------------------------ estimates


def test_an_estimate_counts_what_the_store_has(tmp_path: Path) -> None:
    slow = "tests.trials.misbehaving:Slow"
    plan = make_plan(BLOBS, f"cross_entropy,{slow}", seeds=3, trials=3, tuning_seeds=2)
    cost = estimate_seconds(plan)
    assert (cost.runs, cost.stored) == (2 * (3 * 2 + 3), 0)
    # the slow recipe sleeps 0.04 s a run, and both recipes have as many runs
    assert cost.seconds_per_run >= 0.02
    assert cost.splitting > 0
    assert cost.seconds == pytest.approx(cost.runs * cost.seconds_per_run + cost.splitting)
    store = Store(tmp_path / "s.sqlite")
    execute(make_plan(BLOBS, f"cross_entropy,{slow}", seeds=2, trials=1), store)
    begun = estimate_seconds(plan, store, processes=2)
    assert begun.stored == 4
    # which trial will be chosen is not known yet, so the two runs of the untuned one may not help
    assert begun.runs == cost.runs
    assert begun.seconds == pytest.approx(begun.runs * begun.seconds_per_run / 2 + begun.splitting)
    done = execute(plan, store)
    assert done.complete
    after = estimate_seconds(plan, store)
    assert (after.runs, after.seconds, after.seconds_per_run) == (0, 0.0, 0.0)
    assert after.stored == sum(len(entry.tuning) + len(entry.evaluation) for entry in done.entries) + (
        2 * sum(entry.chosen != 0 for entry in done.entries)
    )
    assert estimate_seconds(replace(plan, max_time=0.01)).seconds == 0.01
    assert not store.runs(seed=1_000_005)


def test_the_exhaustive_jobs_are_all_there_trial_by_trial() -> None:
    plan = make_plan(BLOBS, "cross_entropy,focal", seeds=3, trials=3, tuning_seeds=2)
    jobs = tuning_jobs(plan)
    assert len(jobs) == plan.runs - 6
    assert [job.trial for job in jobs] == sorted(job.trial for job in jobs)
    assert [job.recipe for job in jobs[:2]] == [recipe.canonical for recipe in plan.recipes]


def test_old_plans_have_no_budget(tmp_path: Path) -> None:
    plan = make_plan(BLOBS, "focal", seeds=1, trials=1)
    new = ("title", "family", "best", "max_time", "reference", "reference_name", "task_code", "resplits")
    old = {
        name: value
        for name, value in asdict(plan).items()
        if name not in (*new, "data", "notices", "columns")
    }
    old["recipes"] = [
        {k: v for k, v in recipe.items() if k not in ("repeats", "brought")} for recipe in old["recipes"]
    ]
    loaded = Plan.from_json(old)
    recipes = tuple(replace(recipe, brought="") for recipe in plan.recipes)
    assert loaded == replace(plan, title="", best=None, task_code="", data="", recipes=recipes)
    assert loaded.key == plan.key
    store = Store("sqlite://")
    store.add_plan(plan.key, old)
    assert Comparison.load(store).plan == loaded
