"""Runs: determinism, shared starts, divergence, exceptions, processes that die."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from telos.losses import TaskInfo
from telos.trials import (
    Fold,
    Job,
    Run,
    WorkerLostError,
    Workers,
    make_plan,
    parse_recipes,
    run_job,
    runner,
)
from telos.trials.comparison import evaluation_jobs
from telos.trials.loading import Folds, fold_of, task_of
from telos.trials.runner import Lost, OutOfTimeError, code_hash, dispatch, versions
from telos.trials.store import REFERENCE
from tests.trials import misbehaving
from tests.trials.examples import BLOBS as BLOBS_TASK
from tests.trials.misbehaving import cannot_start

BLOBS = "tests.trials.examples:BLOBS"


def job(
    loss: str = "cross_entropy", optim: str = "adamw", role: str = "evaluation", seed: int = 0, **more
) -> Job:
    (recipe,) = parse_recipes(loss, optim)
    chosen = {"learning_rate": 0.01, "weight_decay": 0.01, **more}
    return Job(BLOBS, loss, optim, recipe.canonical, role, 0, chosen, seed, 2, "code")


def test_a_run_has_metrics_a_curve_and_versions() -> None:
    run = run_job(job())
    assert (run.status, run.reason) == ("finished", None)
    names = {"accuracy", "macro_f1", "nll", "ece"}
    assert set(run.metrics) == {f"{split}_{name}" for split in ("validation", "test") for name in names}
    assert [record["epoch"] for record in run.curve] == [1, 2]
    assert set(run.curve[0]) == {"epoch", "loss", "seconds", *(f"validation_{name}" for name in names)}
    assert run.curve[-1]["validation_nll"] == pytest.approx(run.metrics["validation_nll"], rel=1e-5)
    assert run.seconds > 0
    assert run.versions["torch"] == torch.__version__


def test_tuning_does_not_look_at_the_test_split() -> None:
    assert not [name for name in run_job(job(role="tuning")).metrics if name.startswith("test")]


def test_the_same_job_gives_the_same_numbers_and_another_seed_others() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, other = run_job(job()), run_job(job(seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    second = run_job(job())
    assert first.metrics == second.metrics
    assert first.metrics != other.metrics


def test_recipes_share_split_start_and_order() -> None:
    # a loss that is another's twin must give the twin's numbers
    runs = [run_job(job(loss)) for loss in ("cross_entropy", "torch.nn:CrossEntropyLoss", "comp_sum:tau=1")]
    assert runs[0].metrics == pytest.approx(runs[1].metrics, rel=1e-5)
    assert runs[0].metrics == pytest.approx(runs[2].metrics, rel=1e-5)
    # and the first training loss, before any step, is that of one and the same model
    assert run_job(job(optim="sgd")).metrics != runs[0].metrics


def test_hyperparameters_reach_loss_and_optimizer() -> None:
    base = run_job(job("focal"))
    assert run_job(job("focal", gamma=2.0)).metrics == base.metrics  # the default
    assert run_job(job("focal", gamma=4.0)).metrics != base.metrics
    assert run_job(job("focal", learning_rate=0.02)).metrics != base.metrics
    assert run_job(job("focal:gamma=4")).metrics == run_job(job("focal", gamma=4.0)).metrics


def test_divergence_is_a_result() -> None:
    run = run_job(job("tests.trials.examples:Exploding"))
    assert run.status == "diverged"
    assert run.reason == "loss is inf at step 3, in epoch 2"
    assert [record["epoch"] for record in run.curve] == [1]
    assert run.metrics == {}


def test_outputs_that_overflow_are_divergence() -> None:
    run = run_job(job(optim="sgd", learning_rate=1e30))
    assert run.status == "diverged"
    assert "nan" in str(run.reason) or "not finite" in str(run.reason)


def test_an_exception_is_a_result() -> None:
    run = run_job(job("tests.trials.examples:Raising"))
    assert run.status == "failed"
    assert run.reason == "RuntimeError: <b>this loss</b> never works"


def test_metrics_that_a_task_does_not_give_are_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BLOBS_TASK, "metrics", {**BLOBS_TASK.metrics, "luck": "max"})
    run = run_job(job())
    assert (run.status, run.reason) == ("failed", "ValueError: the task's evaluate gave no luck")


def test_the_sample_index_covers_the_training_split() -> None:
    run = run_job(job("tests.trials.examples:Remembering"))
    assert run.metrics == run_job(job("cross_entropy")).metrics


def test_the_key_holds_what_decides_the_numbers() -> None:
    one = job("focal")
    assert one.key == replace(one, loss="FocalLoss", trial=5).key
    for change in (
        {"seed": 1},
        {"epochs": 3},
        {"role": "tuning"},
        {"code": "other"},
        {"task": "digits"},
        {"recipe": "x"},
        {"hyperparameters": {"learning_rate": 0.02, "weight_decay": 0.01}},
    ):
        assert replace(one, **change).key != one.key


def test_the_code_hash_follows_files_from_outside(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "outside_loss.py"
    path.write_text("from torch.nn import CrossEntropyLoss\nclass Mine(CrossEntropyLoss): pass\n")
    (recipe,) = parse_recipes("outside_loss:Mine")
    (builtin,) = parse_recipes("cross_entropy")
    before, plain = code_hash("digits", recipe), code_hash("digits", builtin)
    path.write_text(path.read_text() + "# changed\n")
    assert code_hash("digits", recipe) != before
    assert code_hash("digits", builtin) == plain
    assert code_hash(BLOBS, builtin) != plain
    assert len(versions()["source"] or "") == 12


def test_jobs_in_processes_give_the_numbers_of_this_process_one_at_a_time() -> None:
    jobs = [job(seed=seed) for seed in range(3)]
    here = {run.key: run.metrics for run in Workers(0).run(jobs)}
    with Workers(2) as workers:
        there = {run.key: run.metrics for run in workers.run(jobs)}
        # the schedule is asked for a job when a process is free, and knows the runs before it
        order: list[str] = []

        def schedule() -> Iterator[Job | None]:
            for number in range(5):
                order.append(f"ask {number}")
                yield job(seed=number)
            yield None  # nothing to do for a moment

        for run in workers.run(schedule()):
            order.append(f"run {run.seed}")
    assert there == here
    assert order[:2] == ["ask 0", "ask 1"]
    assert order[2].startswith("run")
    assert len(order) == 10
    for number in range(2, 5):
        assert sum(word.startswith("run") for word in order[: order.index(f"ask {number}")]) >= number - 1


def test_a_job_that_kills_its_worker_is_tried_again_and_then_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly, good = job("tests.trials.examples:Killing"), [job(seed=seed) for seed in range(3)]
    with Workers(2) as workers:
        runs = {run.key: run for run in workers.run([good[0], deadly, *good[1:]])}
    assert len(runs) == 4
    lost = runs[deadly.key]
    assert (lost.status, lost.metrics) == ("failed", {})
    assert lost.reason == (
        "its process was ended by SIGKILL, as happens when memory runs out, and again with no other run beside it"
    )
    assert all(runs[one.key].finished for one in good)


def test_a_second_attempt_may_succeed(tmp_path: Path) -> None:
    once = job(f"tests.trials.misbehaving:KillingOnce:mark={str(tmp_path / 'mark')!r}")
    with Workers(1) as workers:
        runs = list(workers.run([once, job()]))
    assert [run.status for run in runs] == ["finished", "finished"]
    assert (tmp_path / "mark").exists()


class Places:
    """Two places where jobs end when the test says so."""

    def __init__(self, ends: dict[str, list[Run | Lost | None]]) -> None:
        self.ends, self.log, self.stopped = ends, [], []

    def slots(self) -> int:
        return 2

    def start(self, started: Job, seconds: float | None) -> str:
        self.log.append(f"start {started.recipe}")
        return started.recipe

    def wait(self, handles: list[str], timeout: float | None) -> list[tuple[str, Run | Lost | None]]:
        ended = [(handle, self.ends[handle].pop(0)) for handle in handles if self.ends[handle]]
        self.log += [f"end {handle}" for handle, _ in ended]
        return ended

    def stop(self, handles: list[str]) -> None:
        self.stopped += handles


def test_what_killed_a_worker_runs_again_with_nothing_beside_it() -> None:
    fine = run_job(job())
    places = Places({"a": [Lost("dead"), Lost("dead")], "b": [fine], "c": [fine], "d": [fine]})
    runs = list(dispatch(places, [replace(job(), recipe=name) for name in "abcd"]))
    assert places.log == [
        *("start a", "start b", "end a", "end b", "start a", "end a"),
        *("start c", "start d", "end c", "end d"),
    ]
    assert [run.status for run in runs] == ["finished", "failed", "finished", "finished"]
    assert runs[1].reason == "dead, and again with no other run beside it"


def test_what_still_runs_at_the_end_of_the_loop_is_stopped() -> None:
    places = Places({"a": [run_job(job())], "b": []})
    for _ in dispatch(places, [replace(job(), recipe=name) for name in "ab"]):
        break
    assert places.stopped == ["b"]


def test_a_run_ends_at_its_time_and_gives_nothing() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(OutOfTimeError):
        run_job(replace(job("tests.trials.misbehaving:Slow"), epochs=1000), seconds=0.1)
    assert torch.get_num_threads() == threads
    start = time.monotonic()
    jobs = [job(), replace(job("tests.trials.misbehaving:Slow"), epochs=1000), job(seed=1)]
    runs = list(Workers(0).run(jobs, deadline=start + 0.5))
    assert 0.4 < time.monotonic() - start < 5
    assert [run.seed for run in runs] == [0]
    assert list(Workers(0).run(jobs, deadline=start)) == []


def test_a_process_that_does_not_answer_is_ended_at_the_deadline() -> None:
    with Workers(1) as workers:
        assert [run.status for run in workers.run([job()])] == ["finished"]
        start = time.monotonic()
        # between two steps the process itself sees that its time is over, and stays for the next job
        slow = replace(job("tests.trials.misbehaving:Slow"), epochs=1000)
        (worker,) = workers._workers
        assert list(workers.run([slow, job()], deadline=start + 1.0)) == []
        assert workers._workers == [worker]
        # inside a step only its end helps
        start = time.monotonic()
        assert list(workers.run([job("tests.trials.misbehaving:Stuck")], deadline=start + 1.0)) == []
        assert time.monotonic() - start < 20
        assert not worker.process.is_alive()
        assert [run.status for run in workers.run([job()])] == ["finished"]


def test_workers_that_cannot_start_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_work", cannot_start)
    message = (
        r"a worker did not start: its process ended with code 3; a script that asks for processes needs if"
    )
    with Workers(1) as workers, pytest.raises(WorkerLostError, match=message):
        list(workers.run([job()]))


def test_the_reference_is_trained_on_the_same_split_by_one_thread() -> None:
    task = "tests.trials.misbehaving:REFERRING"
    asked = Job(task, "", "", REFERENCE, "reference", 0, {}, 3, 0, "code")
    run = run_job(asked)
    assert run.status == "finished"
    assert set(run.metrics) == {"test_accuracy", "test_threads"}
    assert run.metrics["test_threads"] == 1
    fold = misbehaving.REFERRING.fold(3)
    assert run.metrics["test_accuracy"] == misbehaving.REFERRING.reference(fold, 3)["accuracy"]
    assert run.curve == []
    lacking = run_job(replace(asked, task=BLOBS))
    assert (lacking.status, lacking.reason) == ("failed", f"UsageError: task {BLOBS} has no reference")


def test_folds_are_kept_as_far_as_memory_allows() -> None:
    def fold(rows: int) -> Fold:
        part = {"inputs": torch.zeros(rows, 10), "target": torch.zeros(rows, dtype=torch.long)}
        return Fold(part, part, part, TaskInfo("classification"))

    size = 100 * (10 * 4 + 8) * 3
    folds = Folds(limit=2 * size)
    small, other = folds.get("a", lambda: fold(100)), folds.get("b", lambda: fold(100))
    assert folds.get("a", lambda: fold(1)) is small
    folds.get("c", lambda: fold(100))  # the least recently used one goes
    assert folds.get("a", lambda: fold(1)) is small
    assert folds.get("b", lambda: fold(100)) is not other
    # one that is larger than all that may be kept is kept while it is in use
    large = folds.get("d", lambda: fold(10_000))
    assert folds.get("d", lambda: fold(1)) is large
    assert len(folds) == 1


def test_a_task_is_loaded_once_for_each_version_of_its_data() -> None:
    spec = "tests.trials.examples:blobs"
    first = task_of(spec, "one")
    assert task_of(spec, "one") is first
    assert task_of(spec, "two") is not first
    assert fold_of(spec, "one", 3) is fold_of(spec, "one", 3)
    assert fold_of(spec, "one", 3) is not fold_of(spec, "two", 3)


def test_a_job_is_refused_where_data_or_code_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "loss_of_mine.py"
    path.write_text("from torch.nn import CrossEntropyLoss\nclass Mine(CrossEntropyLoss): pass\n")
    plan = make_plan(BLOBS, "loss_of_mine:Mine", seeds=1, trials=1)
    (planned,) = evaluation_jobs(plan, {"loss_of_mine:Mine": 0})
    path.write_text(path.read_text() + "# changed meanwhile\n")
    run = run_job(planned)
    assert run.status == "failed"
    assert "not those that the comparison began with" in str(run.reason)
    (again,) = evaluation_jobs(
        make_plan(BLOBS, "loss_of_mine:Mine", seeds=1, trials=1), {"loss_of_mine:Mine": 0}
    )
    assert run_job(again).finished
    assert again.key != planned.key


def test_the_code_hash_follows_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe,) = parse_recipes("cross_entropy")
    before = code_hash("digits", recipe)
    monkeypatch.setattr(runner, "fingerprint", lambda task: f"other data of {task}")
    assert code_hash("digits", recipe) != before
