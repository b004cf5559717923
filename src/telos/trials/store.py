"""The store: every finished run, committed before the next begins.

A run is filed under a hash of all that decides its numbers (:attr:`telos.trials.runner.Job.key`), the source
of telos, the data and the versions of torch and numpy among them. So the same command finds its runs again
after a crash, a larger command reuses those it shares, and numbers of two versions never mix: changed code
looks for its runs under other keys and trains anew, while the old rows stay where they are.

Several processes may work on one store. A run that two of them trained is the same run twice, and the store
keeps one. On a database server they also share the work: whoever begins a run claims it first.

What is read is checked before it is used, since a store may come from elsewhere: nothing in it is executed,
and a row of a wrong shape is an error that names the row.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sql
from sqlalchemy.exc import DatabaseError, DBAPIError, IntegrityError, SQLAlchemyError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
SCHEMA = 2
ATTEMPTS = 5
STATUSES = ("finished", "diverged", "failed")
ROLES = ("tuning", "evaluation", "reference")
REFERENCE = "reference:gradient_boosting"
"""The recipe of reference runs: a learner from outside, trained on the same splits."""


class _Json(sql.TypeDecorator[Any]):
    """JSON as text, in every database alike; text that is no JSON is left for the check of the row."""

    impl = sql.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else json.dumps(value, allow_nan=False)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        try:
            return json.loads(value)
        except (ValueError, TypeError, RecursionError):
            return value


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
    sql.Column("hyperparameters", _Json, nullable=False),
    sql.Column("status", sql.String(16), nullable=False),
    sql.Column("reason", sql.Text),
    sql.Column("metrics", _Json, nullable=False),
    sql.Column("curve", _Json, nullable=False),
    sql.Column("seconds", sql.Float, nullable=False),
    sql.Column("versions", _Json, nullable=False),
    sql.Column("ended", sql.String(32), nullable=False),
    sql.Column("loss", sql.Text, nullable=False, server_default=""),
    sql.Column("optim", sql.Text, nullable=False, server_default=""),
)
_plans = sql.Table(
    "plans",
    _tables,
    sql.Column("key", sql.String(64), primary_key=True),
    sql.Column("plan", _Json, nullable=False),
    sql.Column("begun", sql.String(32), nullable=False),
    sql.Column("budget", _Json),
)
_claims = sql.Table(
    "claims",
    _tables,
    sql.Column("key", sql.String(64), primary_key=True),
    sql.Column("owner", sql.String(64), nullable=False),
    sql.Column("until", sql.Float, nullable=False),
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
        role: ``"tuning"``, ``"evaluation"`` or ``"reference"``; the last two have ``test_`` metrics.
        trial: which configuration of the recipe.
        seed: decides split, initialisation and batch order.
        epochs: how long it was to train; 0 for a reference.
        code: hash of the source, the data and the versions it ran on.
        hyperparameters: what the trial chose.
        status: ``"finished"``, ``"diverged"`` or ``"failed"``.
        reason: why it did not finish.
        metrics: ``validation_...`` and ``test_...`` numbers.
        curve: one record per epoch.
        seconds: wall time.
        versions: of telos, its source revision, torch, numpy and Python.
        loss: as the user wrote it.
        optim: as the user wrote it.
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
    loss: str = ""
    optim: str = ""

    @property
    def finished(self) -> bool:
        """Whether the run has numbers to compare."""
        return self.status == "finished"


@dataclass(frozen=True)
class Budget:
    """What a plan with a time limit has used of it, and what the limit has decided.

    Attributes:
        limit: the ``max_time`` in seconds under which the decisions fell.
        tuning: seconds spent on tuning, over all commands that worked on the plan.
        total: seconds spent.
        trials: number of trials that count, where time ended the tuning.
        stopped: whether the time was over before all runs were done.
    """

    limit: float | None = None
    tuning: float = 0.0
    total: float = 0.0
    trials: int | None = None
    stopped: bool = False


@dataclass(frozen=True)
class StoredPlan:
    """A plan as the store holds it: ``telos.trials.Plan.from_json(stored.plan)`` reads it."""

    key: str
    begun: str
    plan: dict[str, Any]
    budget: Budget


class Store:
    """Runs and plans in a database.

    Args:
        where: path of an SQLite file, made if absent, or any SQLAlchemy URL.
        create: whether a missing SQLite file may be made.

    Raises:
        StoreError: where it cannot be opened, is no store, or is of a schema version that this telos does not
            know. A store of an older version is brought up to date; its runs stay.
    """

    def __init__(self, where: str | Path, *, create: bool = True) -> None:
        self.where = str(where)
        url = self.where if "://" in self.where else self._file(Path(where), create)
        try:
            lite = sql.make_url(url).get_backend_name() == "sqlite"
            # another process may hold the file for a moment: wait for it rather than fail
            self._engine = sql.create_engine(url, connect_args={"timeout": 60} if lite else {})
        except (SQLAlchemyError, ImportError) as error:
            raise StoreError(f"cannot open the store {self.where}: {_first_line(error)}") from error
        self.shared = not lite
        """Whether other machines can work on it, so that runs are claimed before they begin."""
        if lite:
            _own_transactions(self._engine)
        with self._sentence("open"):
            self._check_schema()

    # ------------------------------------------------------------------------------------------------ runs

    def find(self, keys: Iterable[str]) -> dict[str, Run]:
        """The stored runs among ``keys``."""
        wanted = list(keys)
        # databases limit the number of variables of a statement
        chunks = [wanted[start : start + 500] for start in range(0, len(wanted), 500)]
        return {run.key: run for chunk in chunks for run in self._read(_runs.c.key.in_(chunk))}

    def runs(self, **wanted: Any) -> list[Run]:
        """Runs by any of their columns, ordered by task, recipe, role, trial and seed.

        Args:
            wanted: for example ``task="digits", role="evaluation", status=("diverged", "failed")``; a
                collection means any of its values. Every run if nothing is given.

        Raises:
            ValueError: for a column that runs do not have.
            StoreError: where a row cannot be read.
        """
        return self._read(*_conditions(wanted))

    def run(self, key: str) -> Run:
        """The run of a key, or of the first letters of one.

        Raises:
            StoreError: where no run, or more than one, begins with them.
        """
        found = self._read(_runs.c.key.startswith(key, autoescape=True))
        return _only(found, key, "run", self.where)

    def of_plan(self, task: str, codes: Iterable[str], epochs: int) -> list[Run]:
        """The runs of a task, of the given versions of the code; references, which have no epochs, as well."""
        return self.runs(task=task, code=sorted(set(codes)), epochs=(0, epochs))

    def of_other_code(self, task: str, codes: Iterable[str]) -> int:
        """How many runs of a task come from other versions of the code or the data, and are not used."""
        query = sql.select(sql.func.count()).where(
            _runs.c.task == task, _runs.c.code.not_in(sorted(set(codes)))
        )
        with self._sentence("read"), self._engine.connect() as connection:
            return connection.execute(query).scalar_one()

    def add(self, run: Run) -> None:
        """Write a run and commit it, in place of an earlier one of the same key.

        A failed run takes the place of no other: where two processes train the same run, the better end
        counts.
        """
        row = {**asdict(run), "ended": _now()}
        old = _runs.delete().where(_runs.c.key == run.key)
        if run.status == "failed":
            old = old.where(_runs.c.status == "failed")
        for attempt in range(ATTEMPTS):
            try:
                with self._sentence("write to"), self._writing() as connection:
                    connection.execute(_claims.delete().where(_claims.c.key == run.key))
                    connection.execute(old)
                    connection.execute(_runs.insert().values(**row))
                return
            except StoreError as error:
                # another process wrote the same run between the two statements
                if not isinstance(error.__cause__, IntegrityError) or attempt == ATTEMPTS - 1:
                    raise
                if run.status == "failed" and not self.runs(key=run.key, status="failed"):
                    return

    def remove_runs(self, **wanted: Any) -> int:
        """Delete runs, chosen as in :meth:`runs`; returns their number.

        Raises:
            ValueError: where nothing is given: all runs are removed by removing the store.
        """
        if not wanted:
            raise ValueError("remove_runs must be told which runs, got nothing")
        gone = _runs.delete().where(*_conditions(wanted))
        with self._sentence("write to"), self._writing() as connection:
            return connection.execute(gone).rowcount

    # ----------------------------------------------------------------------------------------------- plans

    def add_plan(self, key: str, plan: dict[str, Any]) -> None:
        """Write what a command set out to do; the same plan again replaces itself."""
        change = {"plan": plan, "begun": _now()}
        for attempt in range(ATTEMPTS):
            try:
                with self._sentence("write to"), self._writing() as connection:
                    if not connection.execute(
                        _plans.update().where(_plans.c.key == key).values(**change)
                    ).rowcount:
                        connection.execute(_plans.insert().values(key=key, **change))
                return
            except StoreError as error:
                if not isinstance(error.__cause__, IntegrityError) or attempt == ATTEMPTS - 1:
                    raise

    def list_plans(self) -> list[StoredPlan]:
        """Every plan, the last begun first."""
        return self._stored_plans()

    def plan(self, key: str) -> StoredPlan:
        """The plan of a key, or of the first letters of one.

        Raises:
            StoreError: where no plan, or more than one, begins with them.
        """
        return _only(
            self._stored_plans(_plans.c.key.startswith(key, autoescape=True)), key, "plan", self.where
        )

    def last_plan(self) -> dict[str, Any] | None:
        """The plan begun last."""
        plans = self._stored_plans()
        return plans[0].plan if plans else None

    def remove_plan(self, key: str, *, runs: bool = False) -> int:
        """Delete a plan, and with ``runs=True`` its runs that no other plan shares; returns their number."""
        gone = self.plan(key)
        kept = {row for plan in self.list_plans() if plan.key != gone.key for row in _rows_of(plan.plan)}
        removed = 0
        with self._sentence("write to"), self._writing() as connection:
            connection.execute(_plans.delete().where(_plans.c.key == gone.key))
            for task, recipe, code, epochs in _rows_of(gone.plan) - kept if runs else ():
                removed += connection.execute(
                    _runs.delete().where(
                        *_conditions({"task": task, "recipe": recipe, "code": code, "epochs": epochs})
                    )
                ).rowcount
        return removed

    def budget(self, key: str) -> Budget:
        """What a plan has used of its time."""
        found = self._stored_plans(_plans.c.key == key)
        return found[0].budget if found else Budget()

    def spend(self, key: str, budget: Budget) -> None:
        """Note what a plan has used of its time."""
        with self._sentence("write to"), self._writing() as connection:
            connection.execute(_plans.update().where(_plans.c.key == key).values(budget=asdict(budget)))

    # ---------------------------------------------------------------------------------------------- claims

    def claim(self, key: str, owner: str, seconds: float) -> bool:
        """Whether ``owner`` may do a run: nobody else has claimed it, or the claim has run out.

        The clocks of the machines that share a store must agree to within a few seconds.
        """
        now = time.time()
        change = {"owner": owner, "until": now + seconds}
        mine = sql.or_(_claims.c.owner == owner, _claims.c.until < now)
        try:
            with self._sentence("write to"), self._writing() as connection:
                taken = _claims.update().where(_claims.c.key == key, mine).values(**change)
                if not connection.execute(taken).rowcount:
                    connection.execute(_claims.insert().values(key=key, **change))
        except StoreError as error:
            if isinstance(error.__cause__, IntegrityError):
                return False
            raise
        return True

    def renew(self, owner: str, seconds: float) -> None:
        """Hold on to what ``owner`` has claimed."""
        with self._sentence("write to"), self._writing() as connection:
            connection.execute(
                _claims.update().where(_claims.c.owner == owner).values(until=time.time() + seconds)
            )

    def release(self, owner: str) -> None:
        """Let go of what ``owner`` has claimed, and of what has run out."""
        with self._sentence("write to"), self._writing() as connection:
            old = sql.or_(_claims.c.owner == owner, _claims.c.until < time.time())
            connection.execute(_claims.delete().where(old))

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    # --------------------------------------------------------------------------------------------- reading

    def _read(self, *conditions: sql.ColumnElement[bool]) -> list[Run]:
        order = (_runs.c.task, _runs.c.recipe, _runs.c.role, _runs.c.trial, _runs.c.seed, _runs.c.key)
        query = sql.select(_runs).where(*conditions)
        with self._sentence("read"), self._engine.connect() as connection:
            rows = [dict(row._mapping) for row in connection.execute(query.order_by(*order))]
        for row in rows:
            del row["ended"]
        return [self._checked("run", row["key"], partial(_checked_run, row)) for row in rows]

    def _stored_plans(self, *conditions: sql.ColumnElement[bool]) -> list[StoredPlan]:
        query = sql.select(_plans).where(*conditions).order_by(_plans.c.begun.desc(), _plans.c.key)
        with self._sentence("read"), self._engine.connect() as connection:
            rows = [dict(row._mapping) for row in connection.execute(query)]
        return [
            self._checked(
                "plan", row["key"], partial(from_json, StoredPlan, {**row, "budget": row["budget"] or {}})
            )
            for row in rows
        ]

    def _checked(self, kind: str, key: object, read: Callable[[], T]) -> T:
        try:
            return read()
        except ValueError as error:
            raise StoreError(
                f"the store {self.where} holds a {kind} that cannot be read, {str(key)[:64]}: {error}"
            ) from error

    # ---------------------------------------------------------------------------------------------- schema

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
        for attempt in range(ATTEMPTS):
            with self._engine.connect() as connection:
                version = self._version(connection)
            if version == SCHEMA:
                return
            try:
                with self._writing() as connection:
                    # another process may have been faster
                    version = self._version(connection)
                    if version is None:
                        _tables.create_all(connection)
                        connection.execute(_schema.insert().values(version=SCHEMA))
                    elif version != SCHEMA:
                        _migrate(connection, version)
                return
            except DBAPIError:
                # on a server, two processes may both have found it empty, and the slower one fails
                if attempt == ATTEMPTS - 1 or not self.shared:
                    raise
                time.sleep(0.2 * (attempt + 1))

    def _version(self, connection: sql.Connection) -> int | None:
        """The schema version of a store, or ``None`` of an empty database."""
        tables = set(sql.inspect(connection).get_table_names())
        if not tables:
            return None
        if _schema.name not in tables:
            raise StoreError(
                f"{self.where} is a database of something else, not a store of telos; choose another out="
            )
        version = connection.execute(sql.select(sql.func.max(_schema.c.version))).scalar_one_or_none()
        if not isinstance(version, int) or not 1 <= version <= SCHEMA:
            raise StoreError(
                f"the store {self.where} has schema version {version} and this telos reads versions 1 to "
                f"{SCHEMA}; choose another out= or the telos that wrote it"
            )
        return version

    def _writing(self) -> Any:
        return self._engine.execution_options(telos_writes=True).begin()

    @contextmanager
    def _sentence(self, verb: str) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            reason, hint = _first_line(error.orig), ""
            if isinstance(error, DatabaseError) and "not a database" in reason:
                hint = "; choose another out= or move the file away"
            elif "disk is full" in reason or "No space left" in reason:
                hint = "; finished runs are in it, and the same command goes on once there is space"
            raise StoreError(f"cannot {verb} the store {self.where}: {reason}{hint}") from error
        except (SQLAlchemyError, ValueError, RecursionError, OSError) as error:
            raise StoreError(f"cannot {verb} the store {self.where}: {_first_line(error)}") from error


def _own_transactions(engine: sql.Engine) -> None:
    """Begin SQLite's transactions ourselves: Python's driver leaves changes of the schema outside them."""

    @sql.event.listens_for(engine, "connect")
    def connect(connection: Any, record: object) -> None:
        connection.isolation_level = None
        # a file from elsewhere may bring functions in its schema: they are not to be trusted
        connection.execute("PRAGMA trusted_schema = OFF")

    @sql.event.listens_for(engine, "begin")
    def begin(connection: sql.Connection) -> None:
        # a writer takes its place at once and waits for it; asking in the middle could not wait
        writes = connection.get_execution_options().get("telos_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(connection: sql.Connection, version: int) -> None:
    """Bring an older store up to date, within one transaction."""
    if version < 2:
        # the recipe as the user wrote it, the use of max_time, and claims
        for table, column, kind in (
            ("runs", "loss", "TEXT NOT NULL DEFAULT ''"),
            ("runs", "optim", "TEXT NOT NULL DEFAULT ''"),
            ("plans", "budget", "TEXT"),
        ):
            connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
        if connection.dialect.name == "postgresql":
            for table, column in (
                *((_runs.name, name) for name in ("hyperparameters", "metrics", "curve", "versions")),
                (_plans.name, "plan"),
            ):
                connection.exec_driver_sql(
                    f"ALTER TABLE {table} ALTER COLUMN {column} TYPE TEXT USING {column}::text"
                )
        _claims.create(connection)
        for (plan,) in connection.execute(sql.select(_plans.c.plan)).all():
            for recipe in plan.get("recipes", []) if isinstance(plan, dict) else []:
                words = {name: recipe.get(name) for name in ("canonical", "loss", "optim")}
                if all(isinstance(word, str) for word in words.values()):
                    connection.execute(
                        _runs.update()
                        .where(_runs.c.recipe == words.pop("canonical"), _runs.c.loss == "")
                        .values(**words)
                    )
    connection.execute(_schema.update().values(version=SCHEMA))


def _conditions(wanted: Mapping[str, Any]) -> list[sql.ColumnElement[bool]]:
    found: list[sql.ColumnElement[bool]] = []
    for name, value in wanted.items():
        if name not in _runs.c:
            raise ValueError(f"runs have no column {name!r}; there are: {', '.join(_runs.c.keys())}")
        several = isinstance(value, Collection) and not isinstance(value, str)
        found.append(_runs.c[name].in_(list(value)) if several else _runs.c[name] == value)
    return found


def _rows_of(plan: dict[str, Any]) -> set[tuple[str, str, str, int]]:
    """Task, recipe, code and epochs of the runs that a plan uses."""
    try:
        rows = {
            (plan["task"], recipe["canonical"], recipe["code"], plan["epochs"]) for recipe in plan["recipes"]
        }
        return rows | {(plan["task"], REFERENCE, plan["task_code"], 0)} if plan.get("reference") else rows
    except (KeyError, TypeError):
        return set()


def _checked_run(row: dict[str, Any]) -> Run:
    run = from_json(Run, row)
    if run.status not in STATUSES:
        raise ValueError(f"its status must be one of {', '.join(STATUSES)}, got {run.status[:40]!r}")
    if run.role not in ROLES:
        raise ValueError(f"its role must be one of {', '.join(ROLES)}, got {run.role[:40]!r}")
    if run.seconds < 0 or min(run.trial, run.seed, run.epochs) < 0:
        raise ValueError("its seconds, trial, seed and epochs must be at least 0")
    if any(record.keys() != run.curve[0].keys() for record in run.curve):
        raise ValueError("the records of its curve must hold the same names")
    _check_finite(run.hyperparameters)
    return run


def _check_finite(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"its hyperparameters must be finite, got {value}")
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inside:
        _check_finite(part)


def from_json(kind: type[T], values: Any) -> T:
    """A dataclass from what was read of it; unknown names are left out, as a newer telos may have written them.

    Raises:
        ValueError: where a value is missing, is not finite or is not of its declared type; one sentence.
    """
    from pydantic import ValidationError

    declared: Any = kind
    try:
        return _adapter(declared).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "row"
        raise ValueError(f"its {place}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error
    except (TypeError, RecursionError) as error:
        raise ValueError("it holds what is neither text nor a number") from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    # pydantic reads the setting from the class; the class itself stays as it is
    kind.__pydantic_config__ = {"allow_inf_nan": False}
    return TypeAdapter(kind)


def _only(found: list[T], key: str, kind: str, where: str) -> T:
    if len(found) == 1:
        return found[0]
    exact = [one for one in found if getattr(one, "key", None) == key]
    if exact:
        return exact[0]
    if not found:
        raise StoreError(f"the store {where} holds no {kind} whose key begins with {key!r}")
    raise StoreError(f"{len(found)} {kind}s in the store {where} have a key that begins with {key!r}")


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
