"""Runs: one job is one training run; several processes of one thread each work through a list of them."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

import telos
from telos.fit import Diverged, fit
from telos.trials.recipes import Hyperparameters, Recipe, parse_recipes
from telos.trials.store import Run
from telos.trials.tasks import Batches, Fold, Task, derive_seed, load_task


class WorkerLostError(RuntimeError):
    """A worker process ended without an answer, for example because memory ran out."""


@dataclass(frozen=True)
class Job:
    """One run to do.

    Attributes:
        task: as the user named it.
        loss: as the user wrote it.
        optim: as the user wrote it.
        recipe: canonical text of loss and optimizer.
        role: ``"tuning"`` or ``"evaluation"``; only the latter looks at the test split.
        trial: number of the configuration.
        hyperparameters: what the trial chose.
        seed: decides split, initialisation and batch order.
        epochs: how long to train.
        code: from :func:`code_hash`.
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

    @property
    def key(self) -> str:
        """Hash of all that decides the numbers: not the recipe's spelling, nor the trial's number."""
        decisive = {
            name: value for name, value in asdict(self).items() if name not in ("loss", "optim", "trial")
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()


def run_job(job: Job) -> Run:
    """Train one model and measure it; divergence and exceptions come back as a status and a reason.

    Random numbers come from (task, seed, purpose), so that for one seed all recipes share the split, the
    initial weights and the order of batches. The learning rate falls to zero along a cosine. Torch's global
    generator and number of threads are as before afterwards.
    """
    start = time.perf_counter()
    history: list[dict[str, float]] = []
    metrics: dict[str, float] = {}
    threads = torch.get_num_threads()
    try:
        # one thread: the order of additions, and so the numbers, must not depend on the machine's load
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            metrics, history = _train(job)
        status, reason = "finished", None
    except Diverged as error:
        status, reason, history = "diverged", str(error), error.history
    except Exception as error:
        status, reason = "failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        torch.set_num_threads(threads)
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
        reason=reason,
        metrics=metrics,
        curve=[{name: _six_digits(value) for name, value in record.items()} for record in history],
        # training with its evaluations, without the start-up of a process or the loading of data
        seconds=history[-1]["seconds"] if status == "finished" else time.perf_counter() - start,
        versions=versions(),
    )


def _train(job: Job) -> tuple[dict[str, float], list[dict[str, float]]]:
    task, fold = _fold(job.task, job.seed)
    (recipe,) = parse_recipes(job.loss, job.optim, fold.info.family)
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

    def measured(split: str, history: list[dict[str, float]]) -> dict[str, float]:
        found = task.evaluate(model, loss, getattr(fold, split))
        bad = [name for name, value in found.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(f"{', '.join(bad)} on the {split} split is not finite", history)
        return {f"{split}_{name}": value for name, value in found.items()}

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
        on_epoch=on_epoch,
    )
    metrics = {name: value for name, value in history[-1].items() if name.startswith("validation_")}
    if job.role == "evaluation":
        metrics.update(measured("test", history))
    return metrics, history


@lru_cache(maxsize=32)
def _fold(task: str, seed: int) -> tuple[Task, Fold]:
    loaded = load_task(task)
    return loaded, loaded.fold(seed)


class Workers:
    """Processes that run jobs, started at the first job and ended with the ``with`` block.

    Args:
        processes: how many; 0 runs the jobs in this process.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=error[0] is None, cancel_futures=True)
            if error[0] is not None:
                # interrupted, or the store failed: what is still running has nowhere to go
                for process in processes:
                    process.terminate()

    def run(self, jobs: Sequence[Job]) -> Iterator[Run]:
        """The runs, as they end. A job begins only after the run before it was taken by the caller.

        Raises:
            WorkerLostError: when a process ends without an answer.
        """
        if self.processes == 0:
            yield from map(run_job, jobs)
            return
        waiting, pending = iter(jobs), set[Future[Run]]()
        try:
            for job in waiting:
                pending.add(self._submit(job))
                if len(pending) == self.processes:
                    break
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                    for job in waiting:
                        pending.add(self._submit(job))
                        break
        except BrokenProcessPool as error:
            raise WorkerLostError(
                "a worker process ended without an answer (out of memory, or killed); "
                "finished runs are in the store and the same command goes on from there"
            ) from error

    def _submit(self, job: Job) -> Future[Run]:
        if self._pool is None:
            # spawned, not forked: torch's threads do not survive a fork
            self._pool = ProcessPoolExecutor(
                self.processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_worker,
            )
        return self._pool.submit(run_job, job)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    # torch imports its compiler with the first optimizer: now, rather than inside the first run's wall time
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


def code_hash(task: str, recipe: Recipe) -> str:
    """Hash of the code that decides a run's numbers.

    That is the source of the rooms below and in ``telos.trials``, the versions of torch, numpy and
    scikit-learn, and the files of a task, a loss or an optimizer that the user brings.
    """
    foreign = {spec.partition(":")[0] for spec in (task,) if ":" in spec}
    foreign |= {term.loss.__module__ for term in recipe.terms}
    foreign.add(recipe.optimizer.optimizer.__module__)
    digest = hashlib.sha256(_own_source().encode())
    for module in sorted(name for name in foreign if not name.startswith(("telos.", "torch."))):
        source = getattr(sys.modules.get(module) or importlib.import_module(module), "__file__", None)
        if source is not None and Path(source).is_file():
            digest.update(module.encode() + Path(source).read_bytes())
    return digest.hexdigest()


@cache
def _own_source() -> str:
    room = Path(telos.__file__).parent
    files = [room / "fit.py"]
    for name in ("kernels", "losses", "nn", "optim", "trials"):
        files += sorted((room / name).rglob("*.py"))
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
        "source": _own_source()[:12],
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
