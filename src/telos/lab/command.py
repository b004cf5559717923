"""``telos compare`` and its companions: words in, a leaderboard and a page out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
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

from telos.lab.export import export_run, repeats, winner
from telos.lab.leaderboard import (
    conclusion,
    rows,
    settings,
    suite_frame,
    suite_table,
    table,
    write_table,
)
from telos.lab.report import write_report
from telos.lab.result import last_plans, load, store_of
from telos.lab.words import Words, configuration
from telos.trials import (
    Comparison,
    Job,
    Plan,
    Run,
    Store,
    StoreError,
    UsageError,
    WorkerLostError,
    estimate_seconds,
    execute,
    extend_plan,
)
from telos.trials._words import nearest
from telos.trials.suite import Suite


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
            store's own folder if left out. A name that ends in ``.csv``, ``.parquet``, ``.tex`` or ``.md``
            gets the table alone.

    Returns:
        The exit code, as for :func:`compare`.
    """
    return _guarded("report", lambda: _report(words))


def runs(words: list[str]) -> int:
    """Run ``telos runs [STORE]``, ``telos runs show KEY [STORE]`` or ``telos runs remove KEY [STORE]``.

    Args:
        words: what to do, the first letters of a run's or a comparison's key, the store, and flags: ``--all``
            lists tuning runs too, ``--runs`` removes a comparison's runs with it, ``--json``.

    Returns:
        The exit code, as for :func:`compare`.
    """
    return _guarded("runs", lambda: _runs(words))


def export(words: list[str]) -> int:
    """Run ``telos export RUN [STORE] [OUT]``: loss, script and weights of a run, or of the best one.

    Args:
        words: the first letters of a run's key, or ``best``; the store; the folder to write.

    Returns:
        The exit code, as for :func:`compare`; 1 too where training again gave other numbers.
    """
    return _guarded("export", lambda: _export(words))


def init(words: list[str]) -> int:
    """Run ``telos init [FILE] [WORDS...]``: write a commented TOML file that ``telos compare`` runs.

    Args:
        words: the file (``comparison.toml``), then a task and words as for :func:`compare`.

    Returns:
        The exit code, as for :func:`compare`.
    """
    return _guarded("init", lambda: _init(words))


# -------------------------------------------------------------------------------------------------- compare


def _compare(words: Words) -> int:
    start = monotonic()
    screen = Console(stderr=True, quiet="--quiet" in words.flags)
    if "--add" in words.flags:
        store, plans, folder = _extended(words)
    else:
        plans = words.plans()
        store, folder = None, words.folder(plans)
    try:
        for plan in plans:
            _tell(plan, screen, several=len(plans) > 1)
        if "--dry-run" in words.flags:
            return _dry_run(words, plans, store)
        store = store or Store(words.store(plans))
        found = []
        for plan in plans:
            if stale := store.of_other_code(plan.task, plan.codes):
                screen.print(
                    f"{stale} stored runs of {plan.title} come from other versions of the code, of the data or of "
                    "torch; they are kept and not used",
                    soft_wrap=True,
                )
            found.append(_with_progress(plan, store, words, screen, start if plan is plans[0] else None))
    finally:
        if store is not None:
            store.close()
    result = found[0] if len(found) == 1 else Suite(tuple(found))
    page = _write(result, folder / "report.html")
    if "--json" in words.flags:
        print(json.dumps(_summary(result, page), indent=2))
    elif "--quiet" in words.flags:
        print(page)
    else:
        _show(result, page)
        done = sum(len(e.tuning) + len(e.evaluation) for c in found for e in c.entries)
        screen.print(f"[dim]{done} runs, {monotonic() - start:.0f} s[/dim]")
    return 0 if all(comparison.ranked for comparison in found) else 1


def _extended(words: Words) -> tuple[Store, tuple[Plan, ...], Path]:
    """The store of a comparison, its plans with more recipes, and the folder of its report."""
    where = words.values["store"] or store_of(words.source)
    store = Store(where, create=False)
    try:
        plans = last_plans(store)
        command = plans[0].command
        plans = tuple(
            extend_plan(plan, loss=words.values["loss"], optim=words.values["optim"], command=command)
            for plan in plans
        )
    except BaseException:
        store.close()
        raise
    folder = Path(words.values["out"]) if words.values["out"] else None
    if folder is None:
        if "://" in where:
            store.close()
            raise UsageError("out= is missing: a store at a URL has no folder of its own for the report")
        folder = Path(where).parent
    return store, plans, folder


def _tell(plan: Plan, screen: Console, several: bool) -> None:
    """What the user should know before the first run."""
    name = f"{escape(plan.title)}: " if several else ""
    for notice in plan.notices:
        screen.print(f"{name}[cyan]note[/cyan] {escape(notice)}", soft_wrap=True)
    for recipe in plan.recipes:
        if recipe.refused:
            screen.print(
                f"{name}[yellow]refused[/yellow] {escape(recipe.label)}: {escape(recipe.refused)}",
                soft_wrap=True,
            )


def _with_progress(
    plan: Plan, store: Store, words: Words, screen: Console, started: float | None
) -> Comparison:
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
    doing = {"tuning": "tuning", "evaluation": "evaluating", "reference": "running"}
    with bar:
        line = bar.add_task("starting", total=plan.runs)

        def on_run(done: int, total: int, job: Job, run: Run) -> None:
            name = names.get(job.recipe, plan.reference_name)
            what = f"{doing[job.role]} {escape(name)}"
            bar.update(line, completed=done, total=total, description=what)
            if not run.finished and job.role == "evaluation":
                lost = f"{name}, seed {run.seed}: {run.reason}"
                bar.console.print(f"[yellow]{run.status}[/yellow] {escape(lost)}", soft_wrap=True)

        values = words.values
        return execute(
            plan,
            store,
            processes=values["processes"],
            engine=values["engine"],
            on_run=on_run,
            started=started,
        )


def _dry_run(words: Words, plans: Sequence[Plan], store: Store | None) -> int:
    console = Console()
    seconds = 0.0
    where = words.store(plans) if store is None else ""
    existing = "://" not in where and Path(where).is_file() if where else False
    opened = Store(where, create=False) if existing else None
    try:
        for plan in plans:
            board = Table(
                title=f"{escape(plan.title)}: at most {plan.runs} runs of {plan.epochs} epochs",
                title_justify="left",
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
            tuned = (
                f"{plan.trials} trials on {len(plan.tuning)} tuning seeds"
                if plan.tuning
                else "the untuned trial"
            )
            console.print(f"each recipe: {tuned}, then {plan.seeds} evaluation seeds")
            cost = estimate_seconds(plan, store or opened, processes=max(1, words.values["processes"]))
            seconds += cost.seconds
            console.print(
                f"{cost.runs} runs to do, {cost.stored} in the store; about {cost.seconds_per_run:.1f} s a run"
            )
    finally:
        if opened is not None:
            opened.close()
    console.print(f"about {max(1, round(seconds))} s with {max(1, words.values['processes'])} processes")
    return 0


# ---------------------------------------------------------------------------------------------------- report


def _report(words: list[str]) -> int:
    if not 1 <= len(words) <= 2:
        raise UsageError("the form is: telos report STORE OUT")
    if len(words) == 1 and "://" in words[0]:
        raise UsageError("name the folder to write to; the form is: telos report STORE OUT")
    result = load(words[0])
    out = Path(words[1]) if len(words) == 2 else result.folder
    if out.suffix in (".csv", ".parquet", ".tex", ".md"):
        print(_written(lambda: write_table(result.found, out), out))
        return 0
    page = out if out.suffix == ".html" else out / "report.html"
    _show(result.found, _write(result.found, page))
    return 0


def _write(found: Comparison | Suite, page: Path) -> Path:
    def write() -> Path:
        write_report(found, page)
        write_table(found, page.parent / "leaderboard.csv")
        return page

    return _written(write, page)


def _written(write: Callable[[], Path], path: Path) -> Path:
    try:
        return write()
    except OSError as error:
        raise StoreError(f"the runs are in the store, but {path} cannot be written: {error}") from error


def _show(found: Comparison | Suite, page: Path) -> None:
    console = Console()
    if isinstance(found, Suite):
        console.print(suite_table(found))
        console.print(escape(found.conclusion()), soft_wrap=True)
    else:
        console.print(table(found, console.width))
        console.print(escape(conclusion(found)), soft_wrap=True)
    console.print(f"report: {escape(str(page))}", soft_wrap=True)


def _summary(found: Comparison | Suite, page: Path) -> dict[str, Any]:
    if isinstance(found, Suite):
        return {
            "conclusion": found.conclusion(),
            "ranks": suite_frame(found).to_dicts(),
            "left_out": found.left_out,
            "tasks": [_facts(comparison) for comparison in found.comparisons],
            "report": str(page),
        }
    return {**_facts(found), "report": str(page)}


def _facts(comparison: Comparison) -> dict[str, Any]:
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
        "reference": None
        if comparison.reference is None
        else {
            "name": comparison.reference.recipe.label,
            **{
                m: comparison.reference.mean(f"test_{m}")
                for m in plan.metrics
                if comparison.reference.finished
            },
        },
        "notices": list(plan.notices),
        "versions": plan.versions,
        "command": plan.command,
    }


# ------------------------------------------------------------------------------------------------------ runs


def _runs(words: list[str]) -> int:
    flags = {word for word in words if word.startswith("-")}
    for flag in flags - {"--all", "--runs", "--json"}:
        raise UsageError(f"unknown flag {flag}; {nearest(flag, ['--all', '--runs', '--json'])}")
    rest = [word for word in words if not word.startswith("-")]
    verb = rest.pop(0) if rest and rest[0] in ("list", "show", "remove") else "list"
    if len(rest) > (1 if verb == "list" else 2) or (verb != "list" and not rest):
        raise UsageError("the form is: telos runs [list] [STORE], or telos runs show|remove KEY [STORE]")
    key = "" if verb == "list" else rest.pop(0)
    store = Store(_store_here(rest), create=False)
    try:
        if verb == "list":
            _list(store, "--all" in flags, "--json" in flags)
        elif verb == "show":
            print(json.dumps(_found(store, key), indent=2))
        else:
            _remove(store, key, "--runs" in flags)
    finally:
        store.close()
    return 0


def _list(store: Store, everything: bool, as_json: bool) -> None:
    plans = store.list_plans()
    chosen = store.runs() if everything else store.runs(role=("evaluation", "reference"))
    if as_json:
        print(
            json.dumps(
                {
                    "comparisons": [
                        {"key": plan.key, "begun": plan.begun, "command": plan.plan.get("command")}
                        for plan in plans
                    ],
                    "runs": [_row(run) for run in chosen],
                },
                indent=2,
            )
        )
        return
    console = Console()
    board = Table(title="comparisons", title_justify="left")
    for title in ("key", "begun (UTC)", "command"):
        board.add_column(title, overflow="fold")
    for plan in plans:
        board.add_row(plan.key[:12], plan.begun[:19], escape(str(plan.plan.get("command", ""))))
    console.print(board)
    board = Table(title="runs", title_justify="left")
    several = len({run.task for run in chosen}) > 1
    board.add_column("key", no_wrap=True)
    for title in (*(["task"] if several else []), "recipe"):
        board.add_column(title, overflow="fold")
    for title in ("role", "trial", "seed", "status", "seconds"):
        board.add_column(title, no_wrap=True)
    board.add_column("settings", overflow="fold")
    for run in chosen:
        name = run.loss + (f" / {run.optim}" if run.optim not in ("", "adamw") else "") or run.recipe
        cells = [run.key[:12], *([run.task] if several else []), name, run.role]
        cells += [str(run.trial), str(run.seed), run.status, f"{run.seconds:.2f}"]
        board.add_row(*map(escape, cells), escape(settings(run.hyperparameters)))
    console.print(board)
    if not everything:
        console.print("[dim]--all shows tuning runs too[/dim]")


def _row(run: Run) -> dict[str, Any]:
    names = (
        "key",
        "task",
        "loss",
        "optim",
        "role",
        "trial",
        "seed",
        "status",
        "reason",
        "seconds",
        "metrics",
    )
    return {name: getattr(run, name) for name in names}


def _found(store: Store, key: str) -> dict[str, Any]:
    try:
        run = store.run(key)
    except StoreError as error:
        try:
            return store.plan(key).plan
        except StoreError:
            raise error from None
    return {**_row(run), "hyperparameters": run.hyperparameters, "curve": run.curve, "versions": run.versions}


def _remove(store: Store, key: str, with_runs: bool) -> None:
    if len(key) < 4:
        raise UsageError(f"give at least 4 letters of the key to remove, got {key!r}")
    try:
        run = store.run(key)
    except StoreError as error:
        try:
            plan = store.plan(key)
        except StoreError:
            raise error from None
        count = store.remove_plan(plan.key, runs=with_runs)
        print(f"removed comparison {plan.key[:12]} and {count} runs of it")
        return
    store.remove_runs(key=run.key)
    print(f"removed run {run.key[:12]}")


def _store_here(words: Sequence[str]) -> str:
    """The store that was named, or the newest under ``runs/``."""
    if words:
        return store_of(words[0])
    known = sorted(Path("runs").glob("*/store.sqlite"), key=lambda path: path.stat().st_mtime)
    if not known:
        raise UsageError("name a store: there is none under runs/ here")
    return str(known[-1])


# ---------------------------------------------------------------------------------------------------- export


def _export(words: list[str]) -> int:
    if not 1 <= len(words) <= 3 or any(word.startswith("-") for word in words):
        raise UsageError("the form is: telos export RUN [STORE] [OUT], where RUN is a run's key or best")
    key, *rest = words
    where = _store_here(rest[:1])
    if key == "best":
        run = winner(load(where).found)
    else:
        store = Store(where, create=False)
        try:
            run = store.run(key)
        finally:
            store.close()
    if len(rest) == 2:
        folder = Path(rest[1])
    elif "://" in where:
        raise UsageError("name the folder to write to; the form is: telos export RUN STORE OUT")
    else:
        folder = Path(where).parent / f"run-{run.key[:8]}"
    facts = export_run(run, folder)
    for name in ("recipe.py", "train.py", "weights.safetensors", "run.json"):
        print(folder / name)
    if not repeats(facts):
        print(
            "telos export: training again gave other numbers than the stored run (other versions or other data?): "
            f"{facts['again']}",
            file=sys.stderr,
        )
        return 1
    print("trained again with the stored numbers")
    return 0


# ------------------------------------------------------------------------------------------------------ init


def _init(words: list[str]) -> int:
    rest = list(words)
    path = Path(rest.pop(0)) if rest and rest[0].endswith(".toml") else Path("comparison.toml")
    if path.exists():
        raise UsageError(f"{path} is there already; name another file")
    given = rest if any(word.startswith("loss=") for word in rest) else [*rest, "loss=cross_entropy,focal"]
    parsed = Words.parse(given) if rest else None
    _written(lambda: _save(path, configuration(parsed)), path)
    print(f"{path}; run it with: telos compare {path}")
    return 0


def _save(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _guarded(name: str, command: Callable[[], int]) -> int:
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
    known = {"compare": compare, "report": report, "runs": runs, "export": export, "init": init}
    sys.exit(known[first](others) if first in known else compare([first, *others]))
