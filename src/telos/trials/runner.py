"""Runs: one job is one training run; several processes of one thread each work through a list of them."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

import telos
from telos.fit import Diverged, fit
from telos.trials._words import UsageError
from telos.trials.loading import fold_of, task_of
from telos.trials.recipes import Hyperparameters, Recipe, parse_recipes
from telos.trials.sources import fingerprint, modules
from telos.trials.store import Run
from telos.trials.tasks import Batches, derive_seed


class WorkerLostError(RuntimeError):
    """No worker can be had: processes that do not start, a cluster that cannot be reached."""


class OutOfTimeError(Exception):
    """A run reached the end of its time before its last epoch; it has no result."""


@dataclass(frozen=True)
class Job:
    """One run to do.

    Attributes:
        task: as the user named it.
        loss: as the user wrote it.
        optim: as the user wrote it.
        recipe: canonical text of loss and optimizer.
        role: ``"tuning"``, ``"evaluation"`` or ``"reference"``; tuning does not look at the test split.
        trial: number of the configuration.
        hyperparameters: what the trial chose.
        seed: decides split, initialisation and batch order.
        epochs: how long to train; 0 for a reference, which has none.
        code: from :func:`code_hash`.
        data: from :func:`brought_hash` of the task alone; says which of its versions is loaded.
        brought: from :func:`brought_hash`; where it is given, the run is refused where data or code differ.
    """

    task: str
    loss: str
    optim: str
    recipe: str
    role: str
    trial: int
    hyperparameters: Hyperparameters
    seed: int
    epochs: int
    code: str
    data: str = ""
    brought: str = ""

    @property
    def key(self) -> str:
        """Hash of all that decides the numbers: not the recipe's spelling, nor the trial's number."""
        beside = ("loss", "optim", "trial", "data", "brought")
        decisive = {name: value for name, value in asdict(self).items() if name not in beside}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()


def run_job(job: Job, seconds: float | None = None) -> Run:
    """Train one model and measure it; divergence and exceptions come back as a status and a reason.

    Random numbers come from (task, seed, purpose), so that for one seed all recipes share the split, the
    initial weights and the order of batches. The learning rate falls to zero along a cosine. Torch's global
    generator and number of threads are as before afterwards.

    Args:
        job: what to run.
        seconds: time it may take, looked at after every step; without an end if not given.

    Raises:
        OutOfTimeError: when the time is over before the run is.
    """
    start = time.perf_counter()
    until = math.inf if seconds is None else time.monotonic() + seconds
    history: list[dict[str, float]] = []
    metrics: dict[str, float] = {}
    threads = torch.get_num_threads()
    try:
        # one thread: the order of additions, and so the numbers, must not depend on the machine's load
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            if job.role == "reference":
                metrics, taken = _refer(job)
            else:
                metrics, history = _train(job, until)
                # training with its evaluations, without the start-up of a process or the loading of data
                taken = history[-1]["seconds"]
        return _outcome(job, "finished", None, taken, metrics, history)
    except OutOfTimeError:
        raise
    except Diverged as error:
        return _outcome(job, "diverged", str(error), time.perf_counter() - start, {}, error.history)
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return _outcome(job, "failed", reason, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)


def _outcome(
    job: Job,
    status: str,
    reason: str | None,
    seconds: float,
    metrics: dict[str, float] | None = None,
    history: Sequence[dict[str, float]] = (),
) -> Run:
    return Run(
        key=job.key,
        task=job.task,
        recipe=job.recipe,
        role=job.role,
        trial=job.trial,
        seed=job.seed,
        epochs=job.epochs,
        code=job.code,
        hyperparameters=job.hyperparameters,
        status=status,
        # databases do not take the character zero
        reason=None if reason is None else reason.replace("\0", ""),
        metrics=metrics or {},
        curve=[{name: _six_digits(value) for name, value in record.items()} for record in history],
        seconds=seconds,
        versions=versions(),
        loss=job.loss,
        optim=job.optim,
    )


def _train(job: Job, until: float) -> tuple[dict[str, float], list[dict[str, float]]]:
    (recipe,) = parse_recipes(job.loss, job.optim)
    _check_brought(job, recipe)
    task, fold = task_of(job.task, job.data), fold_of(job.task, job.data, job.seed)
    torch.manual_seed(derive_seed(task.name, job.seed, "model"))
    model = task.model(fold.info)
    torch.manual_seed(derive_seed(task.name, job.seed, "loss"))
    loss = recipe.build_loss(fold.info, job.hyperparameters)
    torch.manual_seed(derive_seed(task.name, job.seed, "training"))
    order = torch.Generator().manual_seed(derive_seed(task.name, job.seed, "order"))
    batches = Batches(fold.train, task.batch_size, order)
    optimizer, scheduled = recipe.build_optimizer(
        [*model.parameters(), *loss.parameters()],
        learning_rate=job.hyperparameters["learning_rate"],
        weight_decay=job.hyperparameters["weight_decay"],
    )
    steps = job.epochs * len(batches)
    cosine = LambdaLR(scheduled, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    def watch(steps: int = 0, losses: Mapping[str, float] | None = None) -> None:
        if time.monotonic() > until:
            raise OutOfTimeError

    def measured(split: str, history: list[dict[str, float]]) -> dict[str, float]:
        watch()
        found = task.evaluate(model, loss, getattr(fold, split))
        if lacking := sorted(task.metrics.keys() - found.keys()):
            raise ValueError(f"the task's evaluate gave no {', '.join(lacking)}")
        return _measured(split, found, history)

    seen: list[dict[str, float]] = []

    def on_epoch(record: dict[str, float]) -> dict[str, float]:
        found = measured("validation", seen)
        seen.append({**record, **found})
        return found

    model.train()
    loss.train()
    history = fit(
        task.training_step(model, loss),
        batches,
        optimizer,
        epochs=job.epochs,
        scheduler=cosine,
        on_step=watch,
        on_epoch=on_epoch,
    )
    metrics = {name: value for name, value in history[-1].items() if name.startswith("validation_")}
    if job.role == "evaluation":
        metrics.update(measured("test", history))
    return metrics, history


def _refer(job: Job) -> tuple[dict[str, float], float]:
    """Metrics of the task's reference learner, and the time it took."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    _check_brought(job, None)
    task, fold = task_of(job.task, job.data), fold_of(job.task, job.data, job.seed)
    refer = getattr(task, "reference", None)
    if refer is None:
        raise UsageError(f"task {job.task} has no reference")
    start = time.perf_counter()
    with threadpool_limits(1):
        found = refer(fold, job.seed)
    return _measured("test", found, []), time.perf_counter() - start


def _measured(split: str, found: Mapping[str, float], history: list[dict[str, float]]) -> dict[str, float]:
    values = {f"{split}_{name}": float(value) for name, value in found.items()}
    bad = [name for name, value in found.items() if not math.isfinite(value)]
    if bad:
        raise Diverged(f"{', '.join(bad)} on the {split} split is not finite", history)
    return values


# ---------------------------------------------------------------------------------------------------- workers

GRACE = 0.5
"""Seconds before a deadline at which a worker is asked to end its run; at the deadline it is killed."""
POLL = 0.5
"""Seconds until a schedule that had nothing to do is asked again."""


@dataclass(frozen=True)
class Lost:
    """A worker that ended without an answer, and what is known about it."""

    reason: str


class Pool(Protocol):
    """Places where jobs run: what :func:`dispatch` asks of an engine."""

    def slots(self) -> int:
        """How many jobs may run at a time."""
        ...

    def start(self, job: Job, seconds: float | None) -> Hashable:
        """Begin a job that may take so many seconds, and return a handle of it."""
        ...

    def wait(self, handles: Sequence[Any], timeout: float | None) -> list[tuple[Hashable, Run | Lost | None]]:
        """What ended within the time; ``None`` where a run's own time was over."""
        ...

    def stop(self, handles: Sequence[Any]) -> None:
        """End running jobs at once; nobody waits for them any more."""
        ...


def dispatch(pool: Pool, jobs: Iterable[Job | None], deadline: float | None = None) -> Iterator[Run]:
    """The runs of jobs, as they end.

    Jobs are asked for one at a time, when there is a place for one, so that a schedule may decide by what has
    ended until then; a job begins only after the runs before it were taken by the caller. A job that ends its
    worker is tried once more with nothing beside it, and then recorded as failed; the others go on.

    Args:
        pool: where to run them.
        jobs: the schedule; ``None`` means that there is nothing to do now and may be in a moment.
        deadline: in :func:`time.monotonic`; runs that have not ended by then are ended, and give nothing.
    """
    waiting, exhausted = iter(jobs), False
    busy: dict[Hashable, Job] = {}
    suspects: deque[Job] = deque()
    alone = False
    try:
        while deadline is None or time.monotonic() < deadline:
            idle = False
            while not (alone or idle) and len(busy) < pool.slots():
                left = None if deadline is None else deadline - GRACE - time.monotonic()
                if left is not None and left <= 0:
                    exhausted, suspects = True, deque()
                    break
                if suspects:
                    if busy:
                        break
                    job, alone = suspects.popleft(), True
                else:
                    try:
                        found = None if exhausted else next(waiting)
                    except StopIteration:
                        found, exhausted = None, True
                    if found is None:
                        idle = not exhausted
                        break
                    job = found
                busy[pool.start(job, left)] = job
            if not busy:
                if exhausted and not suspects:
                    return
                time.sleep(POLL)
                continue
            limits = [POLL] if idle else []
            if deadline is not None:
                limits.append(max(0.0, deadline - time.monotonic()))
            for handle, outcome in pool.wait(list(busy), min(limits, default=None)):
                job = busy.pop(handle)
                if isinstance(outcome, Run):
                    yield outcome
                elif isinstance(outcome, Lost):
                    if alone:
                        reason = f"{outcome.reason}, and again with no other run beside it"
                        yield _outcome(job, "failed", reason, 0.0)
                    else:
                        suspects.append(job)
                alone = False
    finally:
        pool.stop(list(busy))


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    ready: bool = False
    busy: bool = True


class Workers:
    """Processes that run jobs, started when there is a job for them and ended with the ``with`` block.

    Args:
        processes: how many; 0 runs the jobs in this process.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        if self.processes and sys.platform == "linux":
            _context()
            multiprocessing.forkserver.ensure_running()  # it imports while this process goes on
        return self

    def __exit__(self, *error: object) -> None:
        # interrupted, or the store failed: what is still running has nowhere to go
        self.stop([worker for worker in self._workers if worker.busy])
        for worker in self._workers:
            worker.connection.close()  # which it takes as the end
        for worker in self._workers:
            worker.process.join(5)
        self.stop(self._workers)

    def run(self, jobs: Iterable[Job | None], deadline: float | None = None) -> Iterator[Run]:
        """The runs, as they end; see :func:`dispatch`.

        Without processes of its own, a run is ended at the deadline between two of its steps; loading data and
        a reference go on to their end.

        Raises:
            WorkerLostError: when processes cannot start.
        """
        return dispatch(self, jobs, deadline) if self.processes else _run_here(jobs, deadline)

    def slots(self) -> int:
        """The number of processes."""
        return self.processes

    def start(self, job: Job, seconds: float | None) -> Hashable:
        """Give a job to an idle process, or to a new one."""
        for worker in [worker for worker in self._workers if not worker.busy]:
            try:
                worker.connection.send((job, seconds))
            except OSError:  # it died while it had nothing to do
                self.stop([worker])
            else:
                worker.busy = True
                return worker
        context = _context()
        try:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there,))
            process.start()
        except OSError as error:
            raise WorkerLostError(f"a worker did not start: {error.strerror or error}") from error
        there.close()
        worker = _Worker(process, here)
        self._workers.append(worker)
        here.send((job, seconds))
        return worker

    def wait(
        self, handles: Sequence[_Worker], timeout: float | None
    ) -> list[tuple[Hashable, Run | Lost | None]]:
        """What ended within the time."""
        by_connection = {worker.connection: worker for worker in handles}
        ended: list[tuple[Hashable, Run | Lost | None]] = []
        for connection in multiprocessing.connection.wait(list(by_connection), timeout):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                answer = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join(5)
                reason = _end_of(worker.process)
                self.stop([worker])
                if not worker.ready:
                    raise WorkerLostError(
                        f"a worker did not start: {reason}; a script that asks for processes needs "
                        'if __name__ == "__main__": around what it runs'
                    ) from None
                ended.append((worker, Lost(reason)))
                continue
            if answer == READY:
                worker.ready = True
            else:
                worker.busy = False
                ended.append((worker, answer))
        return ended

    def stop(self, handles: Sequence[_Worker]) -> None:
        """End processes at once."""
        for worker in handles:
            worker.process.terminate()
        for worker in handles:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
            worker.connection.close()
        self._workers = [worker for worker in self._workers if worker not in handles]


@cache
def _context() -> Any:
    """How processes begin: never as a copy of this one, since torch's threads do not survive a fork."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["telos.trials._warm"])
    return context


def _run_here(jobs: Iterable[Job | None], deadline: float | None) -> Iterator[Run]:
    for job in jobs:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        if job is None:
            time.sleep(POLL)
            continue
        try:
            run = run_job(job) if left is None else run_job(job, left)
        except OutOfTimeError:
            return
        yield run


READY = "ready"


def _work(connection: Connection) -> None:
    """What a worker process does: jobs in, runs out, until the other end is closed."""
    _begin_worker()
    connection.send(READY)
    while True:
        try:
            job, seconds = connection.recv()
        except EOFError:
            return
        try:
            connection.send(run_job(job, seconds))
        except OutOfTimeError:
            connection.send(None)


def _end_of(process: BaseProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", as happens when memory runs out" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with code {code}"


def _begin_worker() -> None:
    torch.set_num_threads(1)
    # where processes are spawned: its imports belong before the first run's wall time
    torch.optim.AdamW([torch.zeros(1)])
    # the parent handles the interrupt key and ends the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        # a killed parent cannot end its workers, and idle ones would wait for work for ever
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# ------------------------------------------------------------------------------------------------------- code

# what plans, files and judges runs decides none of their numbers
_BESIDE = {
    "__init__",
    "comparison",
    "engines",
    "plan",
    "scoring",
    "search",
    "small_workloads",
    "statistics",
    "store",
    "suite",
    "workloads",
}


def code_hash(task: str, recipe: Recipe | None) -> str:
    """Hash of the code and the data that decide a run's numbers.

    That is the source of the rooms below and in ``telos.trials``, the versions of torch, numpy and
    scikit-learn, and what the user brings. ``recipe`` is ``None`` for the task alone.
    """
    return hashlib.sha256((own_source() + brought_hash(task, recipe)).encode()).hexdigest()


def brought_hash(task: str, recipe: Recipe | None) -> str:
    """Hash of what the user brings: data files, and the source of a task, a model, a loss or an optimizer."""
    foreign = set(modules(task))
    if recipe is not None:
        foreign |= {term.loss.__module__ for term in recipe.terms} | {recipe.optimizer.optimizer.__module__}
    digest = hashlib.sha256(fingerprint(task).encode())
    for module in sorted(name for name in foreign if not name.startswith(("telos.", "torch."))):
        path = getattr(sys.modules.get(module) or importlib.import_module(module), "__file__", None)
        if path is not None and Path(path).is_file():
            digest.update(module.encode() + b"\0" + Path(path).read_bytes())
    return digest.hexdigest()


def _check_brought(job: Job, recipe: Recipe | None) -> None:
    """Refuse a job whose data or code here are not those that its plan was made with."""
    if job.brought and (job.task, job.brought) not in _checked:
        if brought_hash(job.task, recipe) != job.brought:
            raise UsageError(
                "the data or the code here are not those that the comparison began with; "
                "if they have changed, run the command again"
            )
        _checked.add((job.task, job.brought))


_checked: set[tuple[str, str]] = set()


@cache
def own_source() -> str:
    """Hash of telos's own source and of the packages whose versions decide numbers."""
    room = Path(telos.__file__).parent
    files = [room / "fit.py"]
    for name in ("kernels", "losses", "nn", "optim", "metrics", "data", "trials"):
        files += sorted((room / name).rglob("*.py"))
    files = [path for path in files if path.parent != room / "trials" or path.stem not in _BESIDE]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(room).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for package in ("torch", "numpy", "scikit-learn"):
        digest.update(_version(package).encode())
    return digest.hexdigest()


@cache
def versions() -> dict[str, str | None]:
    """What a run ran on: for the record."""
    return {
        "telos": telos.__version__,
        "source": own_source()[:12],
        "revision": _revision(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": _version("scikit-learn"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _revision() -> str | None:
    """The git commit of telos's own source, where it is a checkout."""
    room = Path(telos.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(room), *words], capture_output=True, text=True, timeout=5, check=True
        )
        return done.stdout.strip()

    try:
        # an installed telos may lie inside a checkout of something else
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "--short=12", "HEAD") + (
            "-modified" if git("status", "--porcelain", ".") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _six_digits(value: Any) -> float:
    return float(f"{value:.6g}")
