"""``telos compare`` and ``telos report``: words in, a leaderboard and a page out."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from telos.lab.leaderboard import conclusion, frame, rows, table
from telos.lab.report import write_report
from telos.trials import (
    Comparison,
    Job,
    Plan,
    Run,
    Store,
    StoreError,
    UsageError,
    WorkerLostError,
    execute,
    make_plan,
)
from telos.trials._words import nearest
from telos.trials.comparison import tuning_jobs
from telos.trials.runner import run_job

FLAGS = ("--dry-run", "--json", "--quiet", "--resume")
DEFAULTS: dict[str, Any] = {
    "loss": "",
    "optim": "adamw",
    "seeds": 10,
    "trials": 20,
    "tuning_seeds": 3,
    "epochs": 0,
    "metric": "",
    "band": 0.01,
    "processes": 2,
    "out": "",
    "store": "",
}
USAGE = (
    "telos compare TASK loss=A,B,... [optim=adamw,sgd] [seeds=10] [trials=20] [tuning_seeds=3] [epochs=N] "
    "[metric=accuracy] [band=0.01] [processes=2] [out=FOLDER] [store=FILE_OR_URL] "
    "[--dry-run] [--quiet] [--json]"
)


@dataclass(frozen=True)
class Words:
    """The words of a command, parsed: the task, a value for every key, and the flags."""

    task: str
    values: dict[str, Any]
    flags: frozenset[str]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Words:
        """Sort the words; anything unknown is an error that names what is nearest."""
        tasks: list[str] = []
        given: dict[str, str] = {}
        flags: set[str] = set()
        for word in words:
            key, equals, value = word.partition("=")
            if word.startswith("-"):
                if word not in FLAGS:
                    raise UsageError(f"unknown flag {word}; {nearest(word, FLAGS)}")
                flags.add(word)
            elif equals and ":" not in key:
                if key not in DEFAULTS:
                    raise UsageError(f"unknown key {key!r} in {word!r}; {nearest(key, DEFAULTS)}")
                if key in given:
                    raise UsageError(f"{key}= is given twice")
                given[key] = value
            else:
                tasks.append(word)
        if len(tasks) != 1:
            got = f"got {', '.join(map(repr, tasks))}" if tasks else "got none"
            raise UsageError(f"name one task, {got}; the form is: {USAGE}")
        if not given.get("loss"):
            raise UsageError(
                f"loss= is missing; write for example: telos compare {tasks[0]} loss=cross_entropy,focal"
            )
        return cls(tasks[0], {key: _typed(key, given.get(key)) for key in DEFAULTS}, frozenset(flags))

    def plan(self) -> Plan:
        """What the words ask for, checked."""
        chosen = self.values
        return make_plan(
            self.task,
            chosen["loss"],
            optim=chosen["optim"],
            seeds=chosen["seeds"],
            trials=chosen["trials"],
            tuning_seeds=chosen["tuning_seeds"],
            epochs=chosen["epochs"] or None,
            metric=chosen["metric"] or None,
            band=chosen["band"],
            command=self.command,
        )

    @property
    def command(self) -> str:
        """The command that repeats this one."""
        changed = [f"{key}={value}" for key, value in self.values.items() if value != DEFAULTS[key]]
        return shlex.join(["telos", "compare", self.task, *changed])

    def folder(self, plan: Plan) -> Path:
        """Where the page and, by default, the store go."""
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", self.task)
        return Path(self.values["out"] or Path("runs") / f"{name}-{plan.key[:8]}")

    def store(self, plan: Plan) -> str:
        """The store's path or URL."""
        return self.values["store"] or str(self.folder(plan) / "store.sqlite")


def compare(words: list[str]) -> int:
    """Run ``telos compare WORDS...``.

    Args:
        words: the task, ``key=value`` words, and flags.

    Returns:
        The exit code: 0 when at least one recipe finished, 1 when none did or the store cannot be used, 2
        when the words make no sense or no recipe fits the task, 130 when interrupted.
    """
    return _guarded("compare", lambda: _compare(Words.parse(words)))


def report(words: list[str]) -> int:
    """Run ``telos report STORE OUT``: write the page of a store's last comparison again, without training.

    Args:
        words: the store (a file, its folder, or a URL), then the folder or the ``.html`` file to write; the
            store's own folder if left out.

    Returns:
        The exit code, as for :func:`compare`.
    """
    return _guarded("report", lambda: _report(words))


def _compare(words: Words) -> int:
    plan = words.plan()
    screen = Console(stderr=True, quiet="--quiet" in words.flags)
    for recipe in plan.recipes:
        if recipe.refused:
            screen.print(
                f"[yellow]refused[/yellow] {escape(recipe.label)}: {escape(recipe.refused)}", soft_wrap=True
            )
    if "--dry-run" in words.flags:
        return _dry_run(words, plan)
    start = perf_counter()
    store = Store(words.store(plan))
    try:
        if stale := store.of_other_code(plan.task, [recipe.code for recipe in plan.runnable]):
            screen.print(
                f"{stale} stored runs of this task come from other versions of the code or of torch; "
                "they are kept and not used",
                soft_wrap=True,
            )
        comparison = _with_progress(plan, store, words.values["processes"], screen)
    finally:
        store.close()
    page = _write(comparison, words.folder(plan) / "report.html")
    if "--json" in words.flags:
        print(json.dumps(_summary(comparison, page), indent=2))
    elif "--quiet" in words.flags:
        print(page)
    else:
        _show(comparison, page)
        screen.print(f"[dim]{plan.runs} runs, {perf_counter() - start:.0f} s[/dim]")
    return 0 if comparison.ranked else 1


def _with_progress(plan: Plan, store: Store, processes: int, screen: Console) -> Comparison:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=screen.quiet,
    )
    names = {recipe.canonical: recipe.label for recipe in plan.recipes}
    with bar:
        line = bar.add_task("starting", total=plan.runs)

        def on_run(done: int, total: int, job: Job, run: Run) -> None:
            doing = "tuning" if job.role == "tuning" else "evaluating"
            bar.update(line, completed=done, total=total, description=f"{doing} {escape(names[job.recipe])}")
            if not run.finished and job.role == "evaluation":
                lost = f"{names[job.recipe]}, seed {run.seed}: {run.reason}"
                bar.console.print(f"[yellow]{run.status}[/yellow] {escape(lost)}", soft_wrap=True)

        return execute(plan, store, processes=processes, on_run=on_run)


def _dry_run(words: Words, plan: Plan) -> int:
    console = Console()
    board = Table(
        title=f"{escape(plan.task)}: {plan.runs} runs of {plan.epochs} epochs", title_justify="left"
    )
    for title in ("recipe", "what is searched"):
        board.add_column(title, overflow="fold")
    for recipe in plan.recipes:
        searched = "\n".join(f"{name}: {span}" for name, span in recipe.space.items())
        board.add_row(
            escape(recipe.label),
            f"[yellow]{escape(recipe.refused)}[/yellow]" if recipe.refused else escape(searched),
        )
    console.print(board)
    tuned = f"{plan.trials} trials on {len(plan.tuning)} tuning seeds" if plan.tuning else "the untuned trial"
    console.print(f"each recipe: {tuned}, then {plan.seeds} evaluation seeds")
    each = _seconds_per_run(plan)
    workers = max(1, words.values["processes"])
    console.print(
        f"about {each:.1f} s a run, {max(1, round(each * plan.runs / workers))} s with {workers} processes"
    )
    return 0


def _seconds_per_run(plan: Plan) -> float:
    """Train the baseline for one epoch and multiply; a first one, untimed, pays for start-up."""
    from dataclasses import replace

    jobs = tuning_jobs(replace(plan, trials=2, tuning_seeds=1))
    quick = replace(jobs[0], epochs=1)
    run_job(quick)
    return run_job(quick).seconds * plan.epochs


def _report(words: list[str]) -> int:
    if not 1 <= len(words) <= 2:
        raise UsageError("the form is: telos report STORE OUT")
    where = words[0]
    if "://" not in where and Path(where).is_dir():
        where = str(Path(where) / "store.sqlite")
    if len(words) == 2:
        out = Path(words[1])
    elif "://" in where:
        raise UsageError("name the folder to write to; the form is: telos report STORE OUT")
    else:
        out = Path(where).parent
    store = Store(where, create=False)
    try:
        comparison = Comparison.load(store)
    finally:
        store.close()
    _show(comparison, _write(comparison, out if out.suffix == ".html" else out / "report.html"))
    return 0


def _write(comparison: Comparison, page: Path) -> Path:
    try:
        write_report(comparison, page)
        frame(comparison).write_csv(page.parent / "leaderboard.csv")
    except OSError as error:
        raise StoreError(f"the runs are in the store, but {page} cannot be written: {error}") from error
    return page


def _show(comparison: Comparison, page: Path) -> None:
    console = Console()
    console.print(table(comparison, console.width))
    console.print(escape(conclusion(comparison)), soft_wrap=True)
    console.print(f"report: {escape(str(page))}", soft_wrap=True)


def _summary(comparison: Comparison, page: Path) -> dict[str, Any]:
    plan = comparison.plan
    return {
        "task": plan.task,
        "metric": plan.metric,
        "seeds": plan.seeds,
        "trials": plan.trials,
        "complete": comparison.complete,
        "baseline": comparison.baseline.recipe.label,
        "conclusion": conclusion(comparison),
        "leaderboard": rows(comparison),
        "versions": plan.versions,
        "command": plan.command,
        "report": str(page),
    }


def _typed(key: str, text: str | None) -> Any:
    default = DEFAULTS[key]
    if text is None:
        return default
    if isinstance(default, str):
        return text
    try:
        value = type(default)(text)
    except ValueError as error:
        kind = "whole number" if isinstance(default, int) else "number"
        raise UsageError(f"{key} must be a {kind}, got {text!r}") from error
    if key == "epochs" and value < 1:
        raise UsageError(f"epochs must be at least 1, got {value}")
    return value


def _guarded(name: str, command: Any) -> int:
    """Errors that a user can mend end in one sentence, not in a traceback."""
    try:
        return command()
    except UsageError as error:
        code, sentence = 2, str(error)
    except (StoreError, WorkerLostError) as error:
        code, sentence = 1, str(error)
    except KeyboardInterrupt:
        code, sentence = (
            130,
            "interrupted; finished runs are in the store and the same command goes on from there",
        )
    print(f"telos {name}: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    # python -m telos.lab.command compare digits loss=...
    first, *others = sys.argv[1:] or ["compare"]
    sys.exit(
        report(others) if first == "report" else compare(others if first == "compare" else [first, *others])
    )
