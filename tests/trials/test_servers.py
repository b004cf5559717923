"""A store on PostgreSQL: a real server that is made for the tests and thrown away."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy

from telos.trials import Comparison, Store, StoreError, compare, comparison, execute, make_plan, runner
from telos.trials.store import Budget
from tests.trials.misbehaving import compare_at_once
from tests.trials.test_store import RUN

BLOBS = "tests.trials.examples:BLOBS"


def programs() -> Path | None:
    """Where the server's programs are; Debian keeps them out of the path."""
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((place for place in reversed(places) if (place / "pg_ctl").is_file()), None)


def obstacle() -> str | None:
    if programs() is None:
        return "PostgreSQL is not installed"
    if importlib.util.find_spec("psycopg") is None:
        return "its driver psycopg is not installed"
    if os.geteuid() == 0 and subprocess.run(["id", "postgres"], capture_output=True, check=False).returncode:
        return "PostgreSQL refuses to run as the superuser, and there is no user postgres"
    return None


pytestmark = [
    pytest.mark.skipif(obstacle() is not None, reason=str(obstacle())),
    pytest.mark.xdist_group("postgresql"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a running server, on a socket in a folder of its own."""
    bin_folder = programs()
    assert bin_folder is not None
    folder = Path(tempfile.mkdtemp(prefix="telos-postgresql-"))
    root = os.geteuid() == 0
    if root:
        shutil.chown(folder, "postgres")

    def run(program: str, *words: str) -> None:
        line = [str(bin_folder / program), "-D", str(folder / "data"), *words]
        done = subprocess.run(
            ["runuser", "-u", "postgres", "--", *line] if root else line,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,
            stderr=subprocess.STDOUT if program == "initdb" else subprocess.DEVNULL,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout

    try:
        run("initdb", "-U", "telos", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        run("pg_ctl", "-w", "-t", "60", "-o", options, "-l", str(folder / "log"), "start")
        try:
            yield f"postgresql+psycopg://telos@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def url(server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty database for one test."""
    name = f"t{abs(hash(request.node.name))}"
    engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield server.replace("/postgres?", f"/{name}?")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    engine.dispose()


def numbers(found: Comparison) -> list[tuple]:
    return [
        (entry.chosen, entry.scores, [(run.key, run.metrics) for run in (*entry.tuning, *entry.evaluation)])
        for entry in found.entries
    ]


def test_what_goes_in_comes_out(url: str) -> None:
    store = Store(url)
    assert store.shared
    failed = replace(RUN, key="k2", status="failed", reason="no \u2028 memory, 'quoted' %s", metrics={})
    store.add(RUN)
    store.add(failed)
    store.add(replace(RUN, seconds=9.0))
    store.add(replace(failed, key="k1"))
    assert Store(url).find(["k1", "k2"]) == {"k1": replace(RUN, seconds=9.0), "k2": failed}
    store.add_plan("p", {"n": 1})
    store.spend("p", Budget(1.0, 2.0))
    store.add_plan("p", {"n": 2})
    assert (store.plan("p").plan, store.budget("p")) == ({"n": 2}, Budget(1.0, 2.0))
    assert store.remove_runs(status="failed") == 1
    assert store.remove_plan("p") == 0
    assert [run.key for run in store.runs()] == ["k1"]


def test_a_comparison_has_the_numbers_of_a_local_one(url: str) -> None:
    asked = {"seeds": 2, "trials": 3, "tuning_seeds": 2}
    found = compare(BLOBS, "cross_entropy,focal", store=url, **asked)
    assert numbers(found) == numbers(compare(BLOBS, "cross_entropy,focal", **asked))
    assert numbers(Comparison.load(Store(url))) == numbers(found)


def test_two_processes_share_the_work(url: str, tmp_path: Path) -> None:
    context = runner._context()
    barrier = context.Barrier(2)
    logs = [tmp_path / "one", tmp_path / "two"]
    started = [context.Process(target=compare_at_once, args=(url, barrier, str(log))) for log in logs]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0]
    trained = [log.read_text().split() for log in logs]
    both = [*trained[0], *trained[1]]
    # no run twice, and each did some
    assert len(set(both)) == len(both)
    assert min(map(len, trained)) >= 3
    found = Comparison.load(Store(url))
    assert found.complete
    alone = compare(BLOBS, "cross_entropy,focal", seeds=6, trials=3, tuning_seeds=2)
    assert numbers(found) == numbers(alone)


def test_what_a_dead_process_claimed_is_done_by_another(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(BLOBS, "cross_entropy", seeds=3, trials=1)
    store = Store(url)
    jobs = comparison.evaluation_jobs(plan, {"cross_entropy": 0})
    assert store.claim(jobs[0].key, "ghost", 2.0)
    assert not store.claim(jobs[0].key, "someone", 2.0)
    assert store.claim(jobs[0].key, "ghost", 2.0)
    start = time.monotonic()
    order: list[int] = []
    found = execute(plan, store, on_run=lambda done, total, job, run: order.append(run.seed))
    assert time.monotonic() - start >= 1.5
    assert order == [1, 2, 0]
    assert found.complete
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("select count(*) from claims").scalar_one() == 0


def test_a_claim_is_held_while_its_process_lives(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "LEASE", 0.6)
    store = Store(url)
    with comparison._claiming(store) as owner:
        assert store.claim("k", owner, 0.6)
        time.sleep(1.5)
        assert not store.claim("k", "someone", 0.6)
    assert store.claim("k", "someone", 0.6)


def test_a_failed_run_of_another_process_does_not_hold_this_one_up(url: str) -> None:
    store = Store(url)
    raising = "tests.trials.examples:Raising"
    plan = make_plan(BLOBS, raising, seeds=2, trials=1)
    first = execute(plan, store)
    again = execute(plan, store)
    assert [run.status for run in again.entries[0].evaluation] == ["failed", "failed"]
    assert first.complete


def test_an_older_store_is_brought_up_to_date(url: str) -> None:
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        for line in (
            "CREATE TABLE telos_schema (version INTEGER PRIMARY KEY)",
            "CREATE TABLE runs (key VARCHAR(64) PRIMARY KEY, task TEXT NOT NULL, recipe TEXT NOT NULL, "
            "role VARCHAR(16) NOT NULL, trial INTEGER NOT NULL, seed INTEGER NOT NULL, epochs INTEGER NOT NULL, "
            "code VARCHAR(64) NOT NULL, hyperparameters JSON NOT NULL, status VARCHAR(16) NOT NULL, reason TEXT, "
            "metrics JSON NOT NULL, curve JSON NOT NULL, seconds FLOAT NOT NULL, versions JSON NOT NULL, "
            "ended VARCHAR(32) NOT NULL)",
            "CREATE TABLE plans (key VARCHAR(64) PRIMARY KEY, plan JSON NOT NULL, begun VARCHAR(32) NOT NULL)",
            "INSERT INTO telos_schema VALUES (1)",
            "INSERT INTO runs VALUES ('k1', 'digits', 'FocalLoss @ AdamW', 'evaluation', 2, 7, 3, 'c1', "
            """'{"learning_rate": 0.1, "gamma": 2.0}', 'finished', NULL, '{"test_accuracy": 0.30000000000000004}', """
            """'[{"epoch": 1.0, "loss": 2.0}]', 0.5, '{"torch": "2", "revision": null}', '2025')""",
            'INSERT INTO plans VALUES (\'p\', \'{"recipes": [{"canonical": "FocalLoss @ AdamW", '
            '"loss": "focal:gamma=2", "optim": "adamw"}]}\', \'2025\')',
        ):
            connection.execute(sqlalchemy.text(line.replace(":", "\\:")))
    engine.dispose()
    # two at once: one brings it up to date, the other waits or finds it done
    opened: list[Store] = []
    threads = [threading.Thread(target=lambda: opened.append(Store(url))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(opened) == 2
    assert opened[0].runs() == [replace(RUN, loss="focal:gamma=2", optim="adamw")]
    opened[1].add(replace(RUN, key="k2"))
    opened[1].add_plan("p", {"n": 1})
    assert len(opened[0].runs()) == 2


def test_a_server_that_is_not_there_is_one_sentence(server: str) -> None:
    with pytest.raises(StoreError, match="cannot open the store") as caught:
        Store(server.replace("?host=", "?host=/nowhere"))
    assert "\n" not in str(caught.value)
    other = sqlalchemy.make_url(server).set(database="absent").render_as_string()
    with pytest.raises(StoreError, match='database "absent" does not exist'):
        Store(other)


def test_a_server_that_goes_away_leaves_what_is_finished(url: str, server: str) -> None:
    plan = make_plan(BLOBS, "cross_entropy", seeds=4, trials=1)
    store = Store(url)
    name = sqlalchemy.make_url(url).database

    def cut(done: int, total: int, job: object, run: object) -> None:
        if done == 2:
            engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                connection.exec_driver_sql(
                    f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
                )
            engine.dispose()

    with pytest.raises(StoreError, match="cannot (read|write to) the store"):
        execute(plan, store, on_run=cut)
    with contextlib.suppress(StoreError):
        store.close()
    assert len(Store(url).runs()) == 2
    assert execute(plan, Store(url)).complete
