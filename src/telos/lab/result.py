"""The result of a comparison: a table, plots, a report, and what came out best."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from telos.lab.leaderboard import (
    TITLES,
    conclusion,
    frame,
    suite_frame,
    write_table,
)
from telos.lab.words import Words
from telos.trials import Comparison, Store, UsageError, execute
from telos.trials._words import nearest
from telos.trials.suite import Suite

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl

PlotKind = Literal["difference", "seeds", "curves", "time", "ranks", "profiles"]
PLOTS: dict[str, tuple[str, ...]] = {
    "comparison": ("difference", "seeds", "curves", "time"),
    "suite": ("ranks", "profiles"),
}


@dataclass(frozen=True)
class Result:
    """What ``telos.lab.compare`` returns; a notebook shows its table and conclusion.

    Attributes:
        found: the comparison, or the :class:`telos.trials.Suite` of several tasks.
        folder: where its report goes unless told otherwise.
    """

    found: Comparison | Suite
    folder: Path

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """One comparison for each task."""
        return self.found.comparisons if isinstance(self.found, Suite) else (self.found,)

    @property
    def table(self) -> pl.DataFrame:
        """The leaderboard, or the ranks over several tasks."""
        return suite_frame(self.found) if isinstance(self.found, Suite) else frame(self.found)

    @property
    def conclusion(self) -> str:
        """What it shows, in two or three sentences that claim no more than it does."""
        return self.found.conclusion() if isinstance(self.found, Suite) else conclusion(self.found)

    def best(self) -> str | None:
        """The recipe that beat the baseline by most, or ``None`` where none did beyond doubt.

        With one task a recipe counts that is ``better`` after Holm's correction; with several, one whose mean
        rank is ahead of the baseline's by the critical difference after Friedman's test. ``conclusion`` says
        why where there is none.
        """
        if isinstance(self.found, Suite):
            distance, tested = self.found.critical_difference(), self.found.friedman()
            if distance is None or tested is None or tested.p_value >= 0.05:
                return None
            standings = self.found.standings()
            base = next((s.mean_rank for s in standings if s.label == self.found.baseline), None)
            top = standings[0]
            return top.label if base is not None and base - top.mean_rank >= distance else None
        found = {name: d for name, d in self.found.differences().items() if d.verdict == "better"}
        sign = 1 if self.found.plan.direction == "max" else -1
        return max(found, key=lambda name: sign * found[name].estimate.mean) if found else None

    def report(self, path: str | Path | None = None) -> Path:
        """Write the page; a folder gets a ``report.html``."""
        from telos.lab.report import write_report

        where = Path(path) if path is not None else self.folder
        page = where if where.suffix == ".html" else where / "report.html"
        write_report(self.found, page)
        return page

    def save(self, path: str | Path) -> Path:
        """Write the table as ``.csv``, ``.parquet``, ``.tex`` or ``.md``."""
        return write_table(self.found, Path(path))

    def plot(self, kind: PlotKind | None = None) -> go.Figure:
        """A plotly figure.

        Args:
            kind: of one task ``"difference"`` (to the baseline, the default), ``"seeds"``, ``"curves"`` or
                ``"time"``; of several ``"ranks"`` (the default) or ``"profiles"``.

        Raises:
            telos.trials.UsageError: for another kind.
        """
        from telos.lab import plots

        known = PLOTS["suite" if isinstance(self.found, Suite) else "comparison"]
        chosen = kind or known[0]
        if chosen not in known:
            raise UsageError(f"unknown plot {chosen!r}; {nearest(chosen, known)}")
        return getattr(plots, chosen)(self.found)

    def _repr_html_(self) -> str:
        from telos.lab.leaderboard import html_table

        return html_table(self.found)


def compare(
    task: str,
    loss: str,
    *,
    optim: str = "adamw",
    seeds: int = 10,
    trials: int = 20,
    tuning_seeds: int = 3,
    epochs: int | None = None,
    metric: str | None = None,
    band: float | None = None,
    max_time: float | str | None = None,
    reference: bool | None = None,
    processes: int = 0,
    engine: str = "local",
    out: str | Path | None = None,
    store: str | Path | None = None,
    **about: Any,
) -> Result:
    """``telos compare`` in Python: the same words, and a result that shows itself.

    Args:
        task: what the data are: a built-in name, a file, a folder of images, ``package.module:Task``; several
            separated by commas.
        loss: losses separated by commas, of which the first is the baseline.
        optim: optimizers separated by commas.
        seeds: evaluation seeds.
        trials: configurations tried for each recipe, the untuned one among them.
        tuning_seeds: seeds on which each trial is judged.
        epochs: of every run; the task's own if not given.
        metric: what tuning looks at; the task's own if not given.
        band: differences of the metric below this do not matter.
        max_time: seconds, or a text such as ``"10m"``.
        reference: whether the task's outside reference runs too; if not given, where there is one.
        processes: worker processes; 0 trains in this one. A script that asks for more needs the usual
            ``if __name__ == "__main__":``.
        engine: ``"local"`` or ``"ray"``.
        out: folder of the report and the store; without it and ``store``, runs are kept in memory only.
        store: an SQLite file or any SQLAlchemy URL.
        about: words about the data, such as ``target="label"``; see ``telos compare --help``.

    Returns:
        The result.

    Raises:
        telos.trials.UsageError: for what makes no sense.
        telos.trials.StoreError: where the store cannot be read or written.

    Example:
        >>> found = compare("wine", "cross_entropy,focal", seeds=2, trials=1, epochs=2)
        >>> found.table["recipe"].sort().to_list()
        ['cross_entropy', 'focal']
        >>> found.best() is None  # two seeds show nothing
        True
    """
    given = {
        "loss": loss,
        "optim": optim,
        "seeds": seeds,
        "trials": trials,
        "tuning_seeds": tuning_seeds,
        "epochs": epochs,
        "metric": metric,
        "band": band,
        "max_time": max_time,
        "reference": reference,
        "processes": processes,
        "engine": engine,
        "out": None if out is None else str(out),
        "store": None if store is None else str(store),
    }
    from telos.trials.sources import TASK_KEYS

    for key in about:
        if key not in TASK_KEYS:
            raise UsageError(f"unknown argument {key!r}; {nearest(key, TASK_KEYS)}")
    words = Words.of(task, {**{k: v for k, v in given.items() if v is not None}, **about}, frozenset())
    plans = words.plans()
    where = words.store(plans) if out is not None or store is not None else "sqlite://"
    opened = Store(where)
    try:
        found = tuple(execute(plan, opened, processes=processes, engine=engine) for plan in plans)
    finally:
        opened.close()
    return Result(found[0] if len(found) == 1 else Suite(found), words.folder(plans))


def load(store: str | Path) -> Result:
    """The last comparison that a store holds, without training; several tasks of one command belong together.

    Args:
        store: an SQLite file, the folder of one, or a URL.

    Returns:
        The result.

    Raises:
        telos.trials.UsageError: where the store holds no comparison.
        telos.trials.StoreError: where it cannot be read.
    """
    where = store_of(store)
    opened = Store(where, create=False)
    try:
        found = tuple(Comparison.load(opened, plan) for plan in last_plans(opened))
    finally:
        opened.close()
    folder = Path() if "://" in where else Path(where).parent
    return Result(found[0] if len(found) == 1 else Suite(found), folder)


def store_of(where: str | Path) -> str:
    """The store of a folder, or what was given."""
    text = str(where)
    return str(Path(text) / "store.sqlite") if "://" not in text and Path(text).is_dir() else text


def last_plans(store: Store) -> tuple[Any, ...]:
    """The plans of the last command, one for each of its tasks, in their order."""
    from telos.trials import Plan

    plans = [Plan.from_json(stored.plan) for stored in store.list_plans()]
    if not plans:
        raise UsageError(f"the store {store.where} holds no comparison")
    last = plans[0]
    together = [plan for plan in plans if last.command and plan.command == last.command]
    # the same task twice under one command: an older telos or older data
    newest = {plan.task: plan for plan in reversed(together or [last])}
    return tuple(newest.values())


__all__ = ["PLOTS", "TITLES", "Result", "compare", "last_plans", "load", "store_of"]
