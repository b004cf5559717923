"""The store: every finished run, committed before the next begins.

A run is filed under a hash of all that decides its numbers (:attr:`telos.trials.runner.Job.key`), the source
of telos and the versions of torch and numpy among them. So the same command finds its runs again after a
crash, a larger command reuses those it shares, and numbers of two versions never mix: changed code looks for
its runs under other keys and trains anew, while the old rows stay where they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import DatabaseError, DBAPIError, SQLAlchemyError

SCHEMA = 1

_tables = sql.MetaData()
_schema = sql.Table("telos_schema", _tables, sql.Column("version", sql.Integer, primary_key=True))
_runs = sql.Table(
    "runs",
    _tables,
    sql.Column("key", sql.String(64), primary_key=True),
    sql.Column("task", sql.Text, nullable=False),
    sql.Column("recipe", sql.Text, nullable=False),
    sql.Column("role", sql.String(16), nullable=False),
    sql.Column("trial", sql.Integer, nullable=False),
    sql.Column("seed", sql.Integer, nullable=False),
    sql.Column("epochs", sql.Integer, nullable=False),
    sql.Column("code", sql.String(64), nullable=False, index=True),
    sql.Column("hyperparameters", sql.JSON, nullable=False),
    sql.Column("status", sql.String(16), nullable=False),
    sql.Column("reason", sql.Text),
    sql.Column("metrics", sql.JSON, nullable=False),
    sql.Column("curve", sql.JSON, nullable=False),
    sql.Column("seconds", sql.Float, nullable=False),
    sql.Column("versions", sql.JSON, nullable=False),
    sql.Column("ended", sql.String(32), nullable=False),
)
_plans = sql.Table(
    "plans",
    _tables,
    sql.Column("key", sql.String(64), primary_key=True),
    sql.Column("plan", sql.JSON, nullable=False),
    sql.Column("begun", sql.String(32), nullable=False),
)


class StoreError(RuntimeError):
    """The store cannot be read or written; one sentence says why. What was finished is still in it."""


@dataclass(frozen=True)
class Run:
    """One training run and how it ended.

    Attributes:
        key: hash of all that decides the numbers.
        task: as the user named it.
        recipe: canonical text.
        role: ``"tuning"`` or ``"evaluation"``; only the latter has ``test_`` metrics.
        trial: which configuration of the recipe.
        seed: decides split, initialisation and batch order.
        epochs: how long it was to train.
        code: hash of the source and versions it ran on.
        hyperparameters: what the trial chose.
        status: ``"finished"``, ``"diverged"`` or ``"failed"``.
        reason: why it did not finish.
        metrics: ``validation_...`` and ``test_...`` numbers.
        curve: one record per epoch.
        seconds: wall time.
        versions: of telos, its source revision, torch, numpy and Python.
    """

    key: str
    task: str
    recipe: str
    role: str
    trial: int
    seed: int
    epochs: int
    code: str
    hyperparameters: dict[str, Any]
    status: str
    reason: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    versions: dict[str, str | None] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the run has numbers to compare."""
        return self.status == "finished"


class Store:
    """Runs and plans in a database.

    Args:
        where: path of an SQLite file, made if absent, or any SQLAlchemy URL.
        create: whether a missing SQLite file may be made.

    Raises:
        StoreError: where it cannot be opened, is no store, or is of another schema version.
    """

    def __init__(self, where: str | Path, *, create: bool = True) -> None:
        self.where = str(where)
        url = self.where if "://" in self.where else self._file(Path(where), create)
        try:
            self._engine = sql.create_engine(url)
        except (SQLAlchemyError, ImportError) as error:
            raise StoreError(f"cannot open the store {self.where}: {_first_line(error)}") from error
        with self._sentence("open"):
            self._check_schema()

    def find(self, keys: Iterable[str]) -> dict[str, Run]:
        """The stored runs among ``keys``."""
        wanted, found = list(keys), {}
        with self._sentence("read"), self._engine.connect() as connection:
            # databases limit the number of variables of a statement
            for start in range(0, len(wanted), 500):
                query = sql.select(_runs).where(_runs.c.key.in_(wanted[start : start + 500]))
                found.update({row.key: _run(row) for row in connection.execute(query)})
        return found

    def of_plan(self, task: str, codes: Iterable[str], epochs: int) -> list[Run]:
        """The runs of a task, of the given versions of the code."""
        query = sql.select(_runs).where(
            _runs.c.task == task, _runs.c.code.in_(sorted(set(codes))), _runs.c.epochs == epochs
        )
        with self._sentence("read"), self._engine.connect() as connection:
            return [_run(row) for row in connection.execute(query)]

    def of_other_code(self, task: str, codes: Iterable[str]) -> int:
        """How many runs of a task come from other versions of the code, and are therefore not used."""
        query = sql.select(sql.func.count()).where(
            _runs.c.task == task, _runs.c.code.not_in(sorted(set(codes)))
        )
        with self._sentence("read"), self._engine.connect() as connection:
            return connection.execute(query).scalar_one()

    def add(self, run: Run) -> None:
        """Write a run and commit it."""
        row = {**asdict(run), "ended": _now()}
        with self._sentence("write to"), self._engine.begin() as connection:
            connection.execute(_runs.delete().where(_runs.c.key == run.key))
            connection.execute(_runs.insert().values(**row))

    def add_plan(self, key: str, plan: dict[str, Any]) -> None:
        """Write what a command set out to do; the same plan again replaces itself."""
        with self._sentence("write to"), self._engine.begin() as connection:
            connection.execute(_plans.delete().where(_plans.c.key == key))
            connection.execute(_plans.insert().values(key=key, plan=plan, begun=_now()))

    def last_plan(self) -> dict[str, Any] | None:
        """The plan begun last."""
        query = sql.select(_plans.c.plan).order_by(_plans.c.begun.desc()).limit(1)
        with self._sentence("read"), self._engine.connect() as connection:
            return connection.execute(query).scalar_one_or_none()

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def _file(self, path: Path, create: bool) -> str:
        if not create and not path.is_file():
            raise StoreError(f"there is no store at {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot make the folder {path.parent} for the store: {error.strerror}"
            ) from error
        return f"sqlite:///{path.absolute()}"

    def _check_schema(self) -> None:
        tables = set(sql.inspect(self._engine).get_table_names())
        if not tables:
            with self._engine.begin() as connection:
                _tables.create_all(connection)
                connection.execute(_schema.insert().values(version=SCHEMA))
            return
        if _schema.name not in tables:
            raise StoreError(
                f"{self.where} is a database of something else, not a store of telos; choose another out="
            )
        with self._engine.connect() as connection:
            version = connection.execute(sql.select(sql.func.max(_schema.c.version))).scalar_one_or_none()
        if version != SCHEMA:
            raise StoreError(
                f"the store {self.where} has schema version {version} and this telos reads version {SCHEMA}; "
                "choose another out= or the telos that wrote it"
            )

    @contextmanager
    def _sentence(self, verb: str) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            corrupt = isinstance(error, DatabaseError) and "not a database" in str(error.orig)
            hint = "; choose another out= or move the file away" if corrupt else ""
            raise StoreError(
                f"cannot {verb} the store {self.where}: {_first_line(error.orig)}{hint}"
            ) from error
        except (SQLAlchemyError, json.JSONDecodeError, OSError) as error:
            raise StoreError(f"cannot {verb} the store {self.where}: {_first_line(error)}") from error


def _run(row: Any) -> Run:
    values = dict(row._mapping)
    del values["ended"]
    return Run(**values)


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
