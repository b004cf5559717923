"""The store: what is committed stays, and every obstacle is one sentence."""

import os
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy

from telos.trials import Run, Store, StoreError

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
    with pytest.raises(StoreError, match="has schema version 99 and this telos reads version 1"):
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
