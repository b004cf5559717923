"""Engines: the same numbers from this process, from worker processes and from a real Ray cluster."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from telos.trials import (
    Comparison,
    Job,
    Store,
    UsageError,
    WorkerLostError,
    Workers,
    compare,
    comparison,
    engines,
    execute,
    make_plan,
    parse_recipes,
    run_job,
)
from telos.trials.engines import RayEngine, open_engine

BLOBS = "tests.trials.examples:BLOBS"
LOSSES = "cross_entropy,focal,tests.trials.examples:Exploding,tests.trials.examples:Raising"
HAS_RAY = importlib.util.find_spec("ray") is not None


def job(loss: str = "cross_entropy", seed: int = 0, epochs: int = 2) -> Job:
    (recipe,) = parse_recipes(loss)
    chosen = {"learning_rate": 0.01, "weight_decay": 0.01}
    return Job(BLOBS, loss, "adamw", recipe.canonical, "evaluation", 0, chosen, seed, epochs, "code")


def everything(comparison: Comparison) -> list[tuple]:
    """What a comparison says, apart from wall times."""
    runs = [
        (
            *(entry.recipe.label, entry.status, entry.chosen, entry.scores, entry.trials),
            [(run.key, run.status, run.reason, run.metrics) for run in (*entry.tuning, *entry.evaluation)],
        )
        for entry in (*comparison.entries, *([comparison.reference] if comparison.reference else []))
    ]
    return [*runs, comparison.trials_counted, comparison.seeds, comparison.differences()]


ASKED = {"seeds": 3, "trials": 4, "tuning_seeds": 2, "epochs": 6, "optim": "sgd"}


@pytest.fixture(scope="module")
def here() -> list[tuple]:
    return everything(compare(BLOBS, LOSSES, **ASKED))


@pytest.mark.parametrize("processes", [1, 3])
def test_numbers_do_not_depend_on_the_number_of_processes(here: list[tuple], processes: int) -> None:
    assert everything(compare(BLOBS, LOSSES, processes=processes, **ASKED)) == here


def test_an_engine_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine("local", 3)
    assert isinstance(engine, Workers)
    assert engine.processes == 3
    with pytest.raises(UsageError, match="unknown engine 'rey'; nearest: ray"):
        open_engine("rey")
    with pytest.raises(UsageError, match="processes must be at least 0, got -2"):
        open_engine("local", -2)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"engine=ray needs Ray; install telos with its extra: telos\[ray\]"):
        open_engine("ray")
    # nothing was written for a comparison that cannot begin
    store = Store("sqlite://")
    with pytest.raises(UsageError, match="unknown engine"):
        execute(make_plan(BLOBS, "focal"), store, engine="ry")
    assert store.list_plans() == []


ray_only = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed (extra telos[ray])"),
    pytest.mark.xdist_group("ray"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayEngine]:
    """A Ray cluster of two cores on this machine, and an engine on it."""
    import ray

    with RayEngine(2) as engine:
        assert engine.slots() == 2
        yield engine
    assert not ray.is_initialized()


class TestRay:
    """On a real cluster; starting it and its workers takes most of the time."""

    pytestmark = ray_only

    def test_lost_workers_deadlines_and_interrupts(self, cluster: RayEngine, tmp_path: Path) -> None:
        # a job that ends its worker is tried again with nothing beside it, and then recorded
        deadly, good = job("tests.trials.examples:Killing"), [job(seed=seed) for seed in range(5)]
        once = job(f"tests.trials.misbehaving:KillingOnce:mark={str(tmp_path / 'mark')!r}")
        asked = ended = 0

        def schedule() -> Iterator[Job | None]:
            nonlocal asked
            for one in (good[0], deadly, once, *good[1:]):
                asked += 1
                # no more are handed over than there are cores
                assert asked - ended <= 2
                yield one
            yield None

        runs = {}
        for run in cluster.run(schedule()):
            ended += run.recipe != deadly.recipe or run.status == "failed"
            runs[run.key] = run
        assert len(runs) == 7
        assert (runs[deadly.key].status, runs[deadly.key].reason) == (
            "failed",
            "its Ray worker was lost (ActorDiedError), and again with no other run beside it",
        )
        assert runs[once.key].finished
        for one in good:
            assert runs[one.key].metrics == run_job(one).metrics
        # what runs at the deadline is ended, be it between two steps or within one
        start = time.monotonic()
        stuck = job("tests.trials.misbehaving:Stuck")
        slow = replace(job("tests.trials.misbehaving:Slow"), epochs=10_000)
        assert list(cluster.run([slow, stuck, good[0]], deadline=start + 3.0)) == []
        assert time.monotonic() - start < 20

        def interrupted() -> Iterator[Job | None]:
            yield stuck
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(cluster.run(interrupted()))
        # the cores are free again
        again = list(cluster.run([good[0], replace(good[1], brought="what the command has")]))
        assert time.monotonic() - start < 60
        assert sorted(run.status for run in again) == ["failed", "finished"]
        assert "not those that the comparison began with" in str([run.reason for run in again])

    def test_numbers_and_modules_are_those_of_the_command(
        self,
        cluster: RayEngine,
        here: list[tuple],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(comparison, "open_engine", lambda name, processes: nullcontext(cluster))
        assert everything(compare(BLOBS, LOSSES, engine="ray", **ASKED)) == here
        # a loss, and a file that it reads, in the folder where the user stands
        (tmp_path / "mine.py").write_text(
            "from pathlib import Path\nfrom torch.nn import CrossEntropyLoss\n"
            "class Mine(CrossEntropyLoss):\n    def __init__(self):\n"
            "        super().__init__(label_smoothing=float(Path('smooth.txt').read_text()))\n"
        )
        (tmp_path / "smooth.txt").write_text("0.25")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        found = compare(BLOBS, "mine:Mine", seeds=2, trials=1, engine="ray")
        assert [run.status for run in found.entries[0].evaluation] == ["finished", "finished"]

    def test_another_version_or_no_cluster_is_one_sentence(
        self, cluster: RayEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import ray

        while cluster._idle:
            ray.kill(cluster._idle.pop())
        with monkeypatch.context() as patch:
            patch.setattr(engines, "own_source", lambda: "an older one")
            message = "a Ray worker cannot run jobs: .*: its telos, torch, numpy or scikit-learn is of another version"
            with pytest.raises(WorkerLostError, match=message):
                list(cluster.run([job()]))
        cluster.__exit__()
        assert not ray.is_initialized()
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        with (
            open_engine("ray") as engine,
            pytest.raises(WorkerLostError, match="cannot reach the Ray cluster at"),
        ):
            list(engine.run([job()]))

    def test_a_cluster_that_somebody_else_started(self, here: list[tuple], tmp_path: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Ray reads this when it is loaded
        words = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.1:{port}"}
        line = ["start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
        with (tmp_path / "log").open("w") as log:
            head = subprocess.Popen(
                [Path(sys.executable).parent / "ray", *line, "--disable-usage-stats"],
                env=words,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            start = time.monotonic()
            while "Ray runtime started" not in (tmp_path / "log").read_text():
                assert head.poll() is None
                assert time.monotonic() - start < 120
                time.sleep(0.2)
            store = tmp_path / "s.sqlite"
            command = f"compare({BLOBS!r}, {LOSSES!r}, engine='ray', store={str(store)!r}, **{ASKED})"
            done = subprocess.run(
                [sys.executable, "-c", f"from telos.trials import compare; {command}"],
                cwd=Path(__file__).parents[2],
                env=words,
                capture_output=True,
                text=True,
                check=False,
                timeout=180,
            )
            assert done.returncode == 0, done.stderr
            assert everything(Comparison.load(Store(store))) == here
            assert head.poll() is None  # it was only visited
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            try:
                head.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)
                head.wait()
