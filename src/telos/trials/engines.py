"""Engines: where runs are trained. Their numbers are the same everywhere.

``local`` is processes on this machine (:class:`telos.trials.runner.Workers`), ``ray`` a Ray cluster.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from telos.trials._words import UsageError, nearest
from telos.trials.runner import (
    Job,
    Lost,
    OutOfTimeError,
    WorkerLostError,
    Workers,
    dispatch,
    own_source,
    run_job,
)
from telos.trials.store import Run

ENGINES = ("local", "ray")


class Engine(Protocol):
    """Trains runs; what it holds on to ends with its ``with`` block."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def run(self, jobs: Iterable[Job | None], deadline: float | None = None) -> Iterator[Run]:
        """The runs of a schedule, as they end; see :func:`telos.trials.runner.dispatch`."""
        ...


def open_engine(name: str = "local", processes: int = 0) -> Engine:
    """The engine of a name.

    Args:
        name: ``"local"`` or ``"ray"``.
        processes: for ``local``, how many worker processes, with 0 for none but this one; for ``ray``, the size
            of the cluster that is started on this machine where ``RAY_ADDRESS`` names none, with 0 for one
            process per core.

    Raises:
        telos.trials.UsageError: for another name, a negative number, or where Ray is not installed.

    Example:
        >>> with open_engine("local") as engine:
        ...     list(engine.run([]))
        []
    """
    if processes < 0:
        raise UsageError(f"processes must be at least 0, got {processes}")
    if name == "local":
        return Workers(processes)
    if name == "ray":
        return RayEngine(processes)
    raise UsageError(f"unknown engine {name!r}; {nearest(name, ENGINES)}")


class RayEngine:
    """Runs jobs on a Ray cluster, in actors of one core each.

    It connects to the cluster of the environment variable ``RAY_ADDRESS``, or to the one that this process is
    connected to already, or starts one on this machine and ends it again. Every machine of a cluster needs
    telos, the same versions, and the data and modules of the task under the same paths. A cluster that asks
    for Ray's token needs ``RAY_AUTH_MODE=token`` here as well.

    Args:
        processes: cores of a cluster started here; 0 for all of this machine.
    """

    def __init__(self, processes: int = 0) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError("engine=ray needs Ray; install telos with its extra: telos[ray]") from error
        self._ray: Any = ray
        self.processes = processes
        self._actor: Any = None
        self._started = False
        self._idle: list[Any] = []
        self._busy: dict[Any, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._ray.is_initialized():
            for actor in (*self._idle, *self._busy.values()):
                self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()
        self._idle, self._busy, self._actor, self._started = [], {}, None, False

    def run(self, jobs: Iterable[Job | None], deadline: float | None = None) -> Iterator[Run]:
        """The runs, as they end; see :func:`telos.trials.runner.dispatch`.

        Raises:
            WorkerLostError: when the cluster cannot be reached, or its machines have another telos.
        """
        return dispatch(self, jobs, deadline)

    def slots(self) -> int:
        """The number of cores of the cluster as it is now; machines may join and leave."""
        self._connect()
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def start(self, job: Job, seconds: float | None) -> Hashable:
        """Hand a job to an idle actor, or to a new one."""
        actor = self._idle.pop() if self._idle else self._actor.remote(own_source())
        handle = actor.run.remote(job, seconds, str(Path.cwd()), tuple(sys.path))
        self._busy[handle] = actor
        return handle

    def wait(self, handles: Sequence[Any], timeout: float | None) -> list[tuple[Hashable, Run | Lost | None]]:
        """What ended within the time."""
        done, _ = self._ray.wait(list(handles), num_returns=1, timeout=timeout)
        return [(handle, self._answer(handle)) for handle in done]

    def stop(self, handles: Sequence[Any]) -> None:
        """End running jobs at once, with their actors."""
        for handle in handles:
            if actor := self._busy.pop(handle, None):
                self._ray.kill(actor)

    def _answer(self, handle: Any) -> Run | Lost | None:
        actor = self._busy.pop(handle)
        try:
            run = self._ray.get(handle)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            broken = isinstance(error, self._ray.exceptions.RayTaskError)
            if broken or getattr(error, "actor_init_failed", False):
                # not the job's own errors, which are part of its run
                reason = [line for line in str(error).splitlines() if line.strip()][-1].strip()
                raise WorkerLostError(f"a Ray worker cannot run jobs: {reason}") from error
            return Lost(f"its Ray worker was lost ({type(error).__name__})")
        self._idle.append(actor)
        return run

    def _connect(self) -> None:
        if self._actor is not None:
            return
        if not self._ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            address = os.environ.get("RAY_ADDRESS")
            size = {} if address else {"num_cpus": self.processes or os.cpu_count()}
            try:
                if address:
                    _knock(address)
                self._ray.init(
                    address=address or "local",
                    include_dashboard=None if address else False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **size,
                )
            except (OSError, RuntimeError, ValueError) as error:
                where = f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                if address and isinstance(error, ConnectionError) and error.errno is None:
                    reason += "; where it asks for Ray's token, set RAY_AUTH_MODE=token"
                raise WorkerLostError(f"cannot reach {where}: {reason}") from error
            self._started = True
        # a lost worker is our business: dispatch tries its job once more
        self._actor = self._ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(_RayWorker)


class _RayWorker:
    """What an actor does: one job after another."""

    def __init__(self, source: str) -> None:
        if own_source() != source:
            raise RuntimeError("its telos, torch, numpy or scikit-learn is of another version")

    def run(self, job: Job, seconds: float | None, folder: str, path: Sequence[str]) -> Run | None:
        """Run a job where the user's modules and relative paths are those of the command."""
        sys.path += [place for place in path if place not in sys.path]
        if Path(folder).is_dir():
            os.chdir(folder)
        try:
            return run_job(job, seconds)
        except OutOfTimeError:
            return None


def _knock(address: str) -> None:
    """Find out at once whether anybody listens; Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
