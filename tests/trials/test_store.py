"""The store: what is committed stays, and every obstacle is one sentence."""

import contextlib
import json
import os
import sqlite3
import stat
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import sqlalchemy

import telos.trials.store
from telos.trials import Comparison, Job, Plan, Run, Store, StoreError, compare, execute, make_plan, runner
from telos.trials.store import REFERENCE, Budget
from tests.trials.misbehaving import compare_at_once

BLOBS = "tests.trials.examples:BLOBS"

RUN = Run(
    key="k1",
    task="digits",
    recipe="FocalLoss @ AdamW",
    role="evaluation",
    trial=2,
    seed=7,
    epochs=3,
    code="c1",
    hyperparameters={"learning_rate": 0.1, "gamma": 2.0},
    status="finished",
    metrics={"test_accuracy": 0.1 + 0.2},
    curve=[{"epoch": 1.0, "loss": 2.0}],
    seconds=0.5,
    versions={"torch": "2", "revision": None},
)


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "store.sqlite"
    store = Store(path)
    lost = replace(RUN, key="k2", status="diverged", reason="loss is nan", metrics={}, curve=[])
    store.add(RUN)
    store.add(lost)
    store.close()
    again = Store(path)
    assert again.find(["k1", "k2", "k3"]) == {"k1": RUN, "k2": lost}
    assert again.find(f"x{i}" for i in range(2000)) == {}
    assert again.of_plan("digits", ["c1"], 3) == [RUN, lost]
    assert again.of_plan("digits", ["c2"], 3) == again.of_plan("wine", ["c1"], 3) == []
    assert again.of_other_code("digits", ["c2"]) == 2
    assert again.of_other_code("digits", ["c1"]) == 0
    again.add(replace(RUN, seconds=9.0))
    assert again.find(["k1"])["k1"].seconds == 9.0


def test_the_last_plan_begun(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    assert store.last_plan() is None
    store.add_plan("a", {"n": 1})
    store.add_plan("b", {"n": 2})
    assert store.last_plan() == {"n": 2}
    store.add_plan("a", {"n": 1})
    assert store.last_plan() == {"n": 1}


def test_any_url(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/by_url.sqlite")
    store.add(RUN)
    assert Store(tmp_path / "by_url.sqlite").find(["k1"])
    with pytest.raises(StoreError, match="cannot open the store nosuch://somewhere"):
        Store("nosuch://somewhere")


def test_another_schema_version(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("update telos_schema set version = 99")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="has schema version 99 and this telos reads versions 1 to 2"):
        Store(path)
    assert path.read_bytes() == before


def test_a_database_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("create table songs (title text)")
    with pytest.raises(StoreError, match="is a database of something else"):
        Store(path)


def test_a_corrupt_file(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"certainly not a database " * 100)
    with pytest.raises(
        StoreError, match=r"cannot open the store .*: file is not a database; choose another out="
    ):
        Store(path)
    assert path.read_bytes().startswith(b"certainly")


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store at"):
        Store(tmp_path / "none.sqlite", create=False)
    assert not (tmp_path / "none.sqlite").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot make the folder .*file/runs for the store: Not a directory"):
        Store(tmp_path / "file" / "runs" / "store.sqlite")


def test_a_store_that_may_only_be_read(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    store = Store(path)
    store.add(RUN)
    store.close()
    # as SQLite sees a file in a read-only folder, also for the superuser, whom permissions do not stop
    readonly = Store(f"sqlite:///file:{path}?mode=ro&uri=true")
    assert readonly.find(["k1"]) == {"k1": RUN}
    with pytest.raises(
        StoreError, match="cannot write to the store .*: attempt to write a readonly database"
    ):
        readonly.add(replace(RUN, key="k2"))
    assert Store(path).find(["k1", "k2"]) == {"k1": RUN}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(StoreError, match="unable to open database file"):
        Store(tmp_path / "store.sqlite")


def test_a_full_disk_loses_nothing_finished(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    store = Store(path)
    store.add(RUN)

    @sqlalchemy.event.listens_for(store._engine, "begin")
    def no_more_pages(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("pragma max_page_count = 1")

    big = replace(RUN, key="k2", curve=[{"loss": float(i)} for i in range(5000)])
    with pytest.raises(StoreError, match="cannot write to the store .*: database or disk is full"):
        store.add(big)
    store.close()
    assert Store(path).find(["k1", "k2"]) == {"k1": RUN}


# -------------------------------------------------------------------------------------------- older versions

# as telos 0.1 made it
VERSION_1 = """
CREATE TABLE telos_schema (version INTEGER NOT NULL, PRIMARY KEY (version));
CREATE TABLE runs (
    "key" VARCHAR(64) NOT NULL, task TEXT NOT NULL, recipe TEXT NOT NULL, role VARCHAR(16) NOT NULL,
    trial INTEGER NOT NULL, seed INTEGER NOT NULL, epochs INTEGER NOT NULL, code VARCHAR(64) NOT NULL,
    hyperparameters JSON NOT NULL, status VARCHAR(16) NOT NULL, reason TEXT, metrics JSON NOT NULL,
    curve JSON NOT NULL, seconds FLOAT NOT NULL, versions JSON NOT NULL, ended VARCHAR(32) NOT NULL,
    PRIMARY KEY ("key"));
CREATE INDEX ix_runs_code ON runs (code);
CREATE TABLE plans ("key" VARCHAR(64) NOT NULL, plan JSON NOT NULL, begun VARCHAR(32) NOT NULL, PRIMARY KEY ("key"));
INSERT INTO telos_schema VALUES (1);
"""


def version_1(path: Path) -> None:
    """A store of schema version 1 with two runs and a plan."""
    recipes = [
        {"label": "focal", "loss": "focal:gamma=2", "optim": "adamw", "canonical": "FocalLoss @ AdamW"}
    ]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(VERSION_1)
        for key, status, reason, metrics in (
            ("k1", "finished", None, {"test_accuracy": 0.1 + 0.2}),
            ("k2", "diverged", "loss is nan", {}),
        ):
            connection.execute(
                f"INSERT INTO runs VALUES ({', '.join('?' * 16)})",
                (
                    *(key, "digits", "FocalLoss @ AdamW", "evaluation", 2, 7, 3, "c1"),
                    *('{"learning_rate": 0.1, "gamma": 2.0}', status, reason, json.dumps(metrics)),
                    *('[{"epoch": 1.0, "loss": 2.0}]', 0.5, '{"torch": "2", "revision": null}', "2025-01-01"),
                ),
            )
        connection.execute(
            "INSERT INTO plans VALUES ('p1', ?, '2025-01-01')", (json.dumps({"recipes": recipes}),)
        )
        connection.commit()


def test_a_store_of_version_1_is_brought_up_to_date_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    version_1(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        before = connection.execute("select * from runs order by key").fetchall()
        plan = connection.execute("select * from plans").fetchall()
    store = Store(path)
    one = replace(RUN, loss="focal:gamma=2", optim="adamw")
    two = replace(one, key="k2", status="diverged", reason="loss is nan", metrics={})
    assert store.find(["k1", "k2"]) == {"k1": one, "k2": two}
    assert [found.key for found in store.list_plans()] == ["p1"]
    assert store.budget("p1") == Budget()
    store.add(replace(RUN, key="k3"))
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        columns = (
            "key, task, recipe, role, trial, seed, epochs, code, hyperparameters, status, reason, metrics"
        )
        columns += ", curve, seconds, versions, ended"
        after = connection.execute(f"select {columns} from runs where key != 'k3' order by key").fetchall()
        assert after == before
        assert connection.execute("select key, plan, begun from plans").fetchall() == plan
        assert connection.execute("select version from telos_schema").fetchall() == [(2,)]
    assert len(Store(path).runs()) == 3


def test_a_migration_that_fails_leaves_the_store_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.sqlite"
    version_1(path)
    before = path.read_bytes()

    def fail(connection: object) -> None:
        raise sqlalchemy.exc.OperationalError("create claims", {}, Exception("database or disk is full"))

    monkeypatch.setattr(telos.trials.store._claims, "create", fail)
    with pytest.raises(
        StoreError, match="cannot open the store .*: database or disk is full; finished runs are"
    ):
        Store(path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert len(Store(path).runs()) == 2


# ------------------------------------------------------------------------------------- looking and removing


def filled(path: Path) -> Store:
    store = Store(path)
    for number, (role, seed, status) in enumerate(
        [("tuning", 5, "finished"), ("evaluation", 0, "finished"), ("evaluation", 1, "failed")]
    ):
        store.add(replace(RUN, key=f"ab{number}", role=role, seed=seed, status=status))
    store.add(replace(RUN, key="ac", task="wine"))
    return store


def test_runs_are_found_by_any_of_their_columns(tmp_path: Path) -> None:
    store = filled(tmp_path / "s.sqlite")
    assert [run.key for run in store.runs()] == ["ab1", "ab2", "ab0", "ac"]
    assert [run.key for run in store.runs(task="digits", status="finished")] == ["ab1", "ab0"]
    assert [run.key for run in store.runs(seed=(0, 1), status=["failed"])] == ["ab2"]
    assert store.runs(task="none") == []
    with pytest.raises(ValueError, match="runs have no column 'sede'; there are: key, task"):
        store.runs(sede=1)
    assert store.run("ac").task == "wine"
    assert store.run("ab1").seed == 0
    with pytest.raises(StoreError, match="3 runs in the store .* have a key that begins with 'ab'"):
        store.run("ab")
    with pytest.raises(StoreError, match="holds no run whose key begins with '%'"):
        store.run("%")


def test_runs_are_removed_only_as_told(tmp_path: Path) -> None:
    store = filled(tmp_path / "s.sqlite")
    assert store.remove_runs(status="failed") == 1
    assert store.remove_runs(key=["ab0", "nothing"]) == 1
    assert [run.key for run in store.runs()] == ["ab1", "ac"]
    with pytest.raises(ValueError, match="must be told which runs"):
        store.remove_runs()
    with pytest.raises(ValueError, match="no column"):
        store.remove_runs(everything=True)
    assert len(store.runs()) == 2


def test_plans_are_listed_and_removed_with_the_runs_that_are_theirs_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")

    def plan(*recipes: str) -> dict:
        return {
            "task": "digits",
            "epochs": 3,
            "recipes": [{"canonical": recipe, "code": "c1"} for recipe in recipes],
        }

    store.add_plan("aa1", plan("A", "B"))
    store.add_plan("aa2", {**plan("B", "C"), "reference": True, "task_code": "c0"})
    for recipe in "ABC":
        store.add(replace(RUN, key=recipe, recipe=recipe))
    store.add(replace(RUN, key="R", recipe=REFERENCE, role="reference", epochs=0, code="c0"))
    assert [stored.key for stored in store.list_plans()] == ["aa2", "aa1"]
    assert store.plan("aa1").plan == plan("A", "B")
    with pytest.raises(StoreError, match="2 plans in the store"):
        store.plan("aa")
    with pytest.raises(StoreError, match="no plan whose key begins with 'b'"):
        store.remove_plan("b")
    assert store.remove_plan("aa2", runs=True) == 2
    assert [run.key for run in store.runs()] == ["A", "B"]
    assert store.remove_plan("aa") == 0
    assert store.last_plan() is None
    assert len(store.runs()) == 2


def test_the_use_of_time_is_kept_with_the_plan(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.add_plan("p", {"n": 1})
    assert store.budget("p") == Budget()
    used = Budget(60.0, 12.5, 20.25, 3, True)
    store.spend("p", used)
    store.add_plan("p", {"n": 2})
    assert store.budget("p") == used
    assert store.plan("p").plan == {"n": 2}
    assert store.budget("q") == Budget()


def test_a_failed_run_takes_the_place_of_no_other(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    failed = replace(RUN, status="failed", reason="no memory", metrics={}, curve=[])
    store.add(failed)
    store.add(replace(failed, reason="again no memory"))
    assert store.run("k1").reason == "again no memory"
    store.add(RUN)
    store.add(failed)
    assert store.run("k1") == RUN
    store.add(replace(RUN, status="diverged", metrics={}))
    assert store.run("k1").status == "diverged"


# -------------------------------------------------------------------------------------- stores from elsewhere


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("metrics", "[1, 2]", "its metrics: input should be an object"),
        ("metrics", "not json", "its metrics: input should be an object"),
        ("metrics", '{"test_accuracy": NaN}', "its metrics.test_accuracy: input should be a finite number"),
        ("metrics", '{"test_accuracy": 1e999}', "its metrics.test_accuracy: input should be a finite number"),
        ("metrics", '{"test_accuracy": "0.9"}', "its metrics.test_accuracy: input should be a valid number"),
        ("metrics", '{"a": ' + "9" * 5000 + "}", "its metrics: input should be an object"),
        ("metrics", "[" * 100_000, "its metrics: input should be an object"),
        ("curve", '{"loss": 1}', "its curve: input should be a valid array"),
        ("curve", '[{"loss": null}]', "its curve.0.loss: input should be a valid number"),
        ("curve", '[{"loss": 1}, {"lost": 1}]', "the records of its curve must hold the same names"),
        ("hyperparameters", "null", "its hyperparameters: input should be an object"),
        ("hyperparameters", '{"gamma": [Infinity]}', "its hyperparameters must be finite, got inf"),
        ("versions", '{"torch": 2}', "its versions.torch: input should be a valid string"),
        ("status", "splendid", "its status must be one of finished, diverged, failed, got 'splendid'"),
        ("role", "boss", "its role must be one of tuning, evaluation, reference, got 'boss'"),
        ("seed", "first", "its seed: input should be a valid integer"),
        ("seed", -1, "its seconds, trial, seed and epochs must be at least 0"),
        ("seconds", -0.5, "its seconds, trial, seed and epochs must be at least 0"),
        ("trial", 1.5, "its trial: input should be a valid integer"),
        ("task", b"\xff\xfe", "it holds what is neither text nor a number"),
        ("reason", 5.5, None),
    ],
)
def test_a_row_of_a_wrong_shape_is_named(
    tmp_path: Path, column: str, value: object, reason: str | None
) -> None:
    path = tmp_path / "s.sqlite"
    store = Store(path)
    store.add(RUN)
    store.add(replace(RUN, key="bad", task="digits"))
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"update runs set {column} = ? where key = 'bad'", (value,))
        connection.commit()
    opened = Store(path)
    if reason is None:  # SQLite itself turned the number into a text
        assert opened.run("bad").reason == "5.5"
        return
    with pytest.raises(StoreError) as caught:
        opened.runs()
    assert str(caught.value) == f"the store {path} holds a run that cannot be read, bad: {reason}"
    # and it can be removed
    assert opened.remove_runs(key="bad") == 1
    assert opened.runs() == [RUN]


def test_a_plan_of_a_wrong_shape_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    store = Store(path)
    store.add_plan("good", {"n": 1})
    store.add_plan("bad", {"n": 2})
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for column, value, reason in (
            ("plan", "[]", "its plan: input should be an object"),
            ("plan", "{", "its plan: input should be an object"),
            ("budget", '{"tuning": "long"}', "its budget.tuning: input should be a valid number"),
        ):
            connection.execute("update plans set plan = '{}', budget = null where key = 'bad'")
            connection.execute(f"update plans set {column} = ? where key = 'bad'", (value,))
            connection.commit()
            with pytest.raises(StoreError) as caught:
                store.list_plans()
            assert str(caught.value) == f"the store {path} holds a plan that cannot be read, bad: {reason}"
    assert store.plan("good").plan == {"n": 1}


def plan_values() -> dict:
    return asdict(make_plan(BLOBS, "cross_entropy,focal", seeds=2, trials=2, tuning_seeds=1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seeds": 0}, "its seeds must lie between 1 and 1000000, got 0"),
        ({"trials": 10**9}, "its trials must lie between 1 and 1000000, got 1000000000"),
        ({"trials": 10**6, "tuning_seeds": 10**6}, "its trials times tuning_seeds must be at most 1000000"),
        ({"seeds": "ten"}, "its seeds: input should be a valid integer"),
        ({"metric": "luck"}, "its metric 'luck' has no direction"),
        ({"direction": "up"}, "its metric 'accuracy' has no direction"),
        (
            {"sizes": {"train": 10, "validation": 5}},
            "its sizes must count train, validation and test examples",
        ),
        ({"sizes": {"train": 0, "validation": 5, "test": 1}}, "its sizes must count train, validation and"),
        ({"recipes": []}, "it holds no recipe that fits"),
        ({"recipes": [{"label": "x"}]}, "its recipes.0.loss: field required"),
        ({"band": float("nan")}, "its band: input should be a finite number"),
        ({"band": -1.0}, "its band must be at least 0"),
        ({"task": None}, "its task: input should be a valid string"),
    ],
)
def test_a_plan_that_makes_no_sense_is_one_sentence(changes: dict, reason: str) -> None:
    with pytest.raises(StoreError) as caught:
        Plan.from_json({**plan_values(), **changes})
    assert str(caught.value).startswith(f"a plan cannot be read: {reason}")
    assert "\n" not in str(caught.value)


def test_what_a_newer_telos_has_written_beside_is_left_out() -> None:
    values = plan_values()
    values["recipes"][0]["colour"] = "red"
    assert Plan.from_json({**values, "mood": "good"}) == Plan.from_json(plan_values())


def test_a_finished_run_without_the_metric_is_named(tmp_path: Path) -> None:
    plan = make_plan(BLOBS, "focal", seeds=2, trials=1)
    store = Store(tmp_path / "s.sqlite")
    execute(plan, store)
    lacking = store.runs(seed=1)[0]
    store.add(replace(lacking, metrics={"test_luck": 1.0}))
    with pytest.raises(
        StoreError, match=f"holds a run that cannot be read, {lacking.key}: it lacks test_accura"
    ):
        Comparison.load(store)


# --------------------------------------------------------------------------------- full disks, other processes


def test_a_disk_that_fills_up_during_a_comparison(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    plan = make_plan(BLOBS, "cross_entropy,focal", seeds=10, trials=1)
    store = Store(path)

    @sqlalchemy.event.listens_for(store._engine, "begin")
    def limited(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("pragma max_page_count = 14")

    message = (
        r"^cannot write to the store .*s.sqlite: database or disk is full; finished runs are in it, "
        r"and the same command goes on once there is space$"
    )
    with pytest.raises(StoreError, match=message):
        execute(plan, store)
    store.close()
    with_space = Store(path)
    before = with_space.runs()
    assert 3 <= len(before) < 20
    trained: list[Run] = []
    found = execute(plan, with_space, on_run=lambda done, total, job, run: trained.append(run))
    assert trained[: len(before)] == [run for run in trained if run in before]
    assert found.complete
    fresh = execute(plan, Store("sqlite://"))
    assert [run.metrics for run in with_space.runs()] == [
        run.metrics for run in sorted(_all(fresh), key=lambda run: (run.recipe, run.seed))
    ]


def _all(comparison: Comparison) -> list[Run]:
    return [run for entry in comparison.entries for run in (*entry.tuning, *entry.evaluation)]


def test_the_same_plan_started_twice_on_one_store(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    context = runner._context()
    barrier = context.Barrier(2)
    started = [context.Process(target=compare_at_once, args=(str(path), barrier)) for _ in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    # both found no file and made it, and both went through the whole plan
    assert [process.exitcode for process in started] == [0, 0]
    found = Comparison.load(Store(path))
    assert found.complete
    alone = compare(BLOBS, "cross_entropy,focal", seeds=6, trials=3, tuning_seeds=2)
    assert [run.metrics for run in _all(found)] == [run.metrics for run in _all(alone)]


def test_a_writer_waits_for_another(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    store = Store(path)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("begin immediate")
    release = threading.Timer(0.5, lambda: other.execute("rollback"))
    release.start()
    start = time.monotonic()
    store.add(RUN)
    assert time.monotonic() - start > 0.4
    release.join()
    other.close()
    assert store.run("k1") == RUN


def test_what_another_process_did_meanwhile_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    plan = make_plan(BLOBS, "cross_entropy", seeds=4, trials=1)
    store, other = Store(path), Store(path)
    trained: list[int] = []

    def someone_else(done: int, total: int, job: Job, run: Run) -> None:
        trained.append(run.seed)
        if done == 1:
            execute(plan, other)

    seconds = {run.seed: run.seconds for run in _all(execute(plan, store, on_run=someone_else))}
    assert trained == [0, 1, 2, 3]
    assert seconds == {run.seed: run.seconds for run in other.runs()}
