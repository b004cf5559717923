"""The leaderboard: recipes, their metrics and paired differences, as data frame, terminal table and words."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

import polars as pl
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from telos.trials import Comparison, Entry, Estimate, UsageError
from telos.trials.suite import Suite

TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "nll": "NLL",
    "ece": "ECE",
    "brier": "Brier score",
    "top1_brier": "top-1 Brier score",
    "auroc": "AUROC",
    "robust_accuracy": "robust accuracy",
    "fgsm_accuracy": "accuracy under FGSM",
    "map_at_r": "MAP@R",
    "recall_at_1": "recall@1",
    "probe_accuracy": "probe accuracy",
    "naive_bayes_accuracy": "naive Bayes accuracy",
    "rmse": "RMSE",
    "mae": "MAE",
    "median_absolute_error": "median error",
    "r2": "R²",
}


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One dict per recipe, best first; recipes without results last, with the reason.

    The columns: ``rank``, ``recipe``, ``status``, ``seeds``, the mean of every test metric, the interval of
    the plan's metric, ``difference`` to the baseline with its interval and Holm-corrected p-value,
    ``verdict``, ``seconds`` a run, ``hyperparameters``, ``reason``. What does not exist is ``None``.
    """
    differences = comparison.differences()
    ranked = comparison.ranked
    rest = [entry for entry in comparison.entries if not entry.finished]
    table = []
    for rank, entry in enumerate([*ranked, *rest], start=1):
        name = entry.recipe.label
        difference = differences.get(name)
        interval = comparison.estimate(entry) if entry.finished else None
        paired = difference.estimate if difference else None
        table.append(
            {
                "rank": rank if entry.finished else None,
                "recipe": name,
                "status": entry.status,
                "seeds": len(entry.finished),
                **{metric: _number(entry.mean(f"test_{metric}")) for metric in comparison.plan.metrics},
                "low": _number(interval.low) if interval else None,
                "high": _number(interval.high) if interval else None,
                "difference": _number(paired.mean) if paired else None,
                "difference_low": _number(paired.low) if paired else None,
                "difference_high": _number(paired.high) if paired else None,
                "p_holm": _number(difference.p_corrected) if difference else None,
                "verdict": "baseline"
                if entry is comparison.baseline
                else difference.verdict
                if difference
                else None,
                "seconds": _number(entry.seconds),
                "trial": entry.chosen,
                "hyperparameters": entry.hyperparameters if entry.finished else None,
                "reason": entry.reason,
            }
        )
    return table


def frame(comparison: Comparison) -> pl.DataFrame:
    """The leaderboard as a data frame; hyper-parameters in words."""
    flat = [{**row, "hyperparameters": settings(row["hyperparameters"])} for row in rows(comparison)]
    return pl.DataFrame(flat, infer_schema_length=None)


def table(comparison: Comparison, width: int = 120) -> Table:
    """The leaderboard for a terminal; a narrow one shows the plan's metric alone."""
    plan = comparison.plan
    board = Table(
        title=f"{escape(plan.title or plan.task)}: test split, mean of {_seeds(comparison.seeds_counted)}",
        title_justify="left",
        box=SIMPLE,
    )
    others = [metric for metric in plan.metrics if metric != plan.metric] if width >= 110 else []
    board.add_column("recipe", overflow="fold", min_width=14)
    for title in (
        TITLES.get(plan.metric, plan.metric),
        "minus baseline",
        *(TITLES.get(m, m) for m in others),
        "s/run",
    ):
        board.add_column(escape(title), justify="right", no_wrap=True)
    board.add_column("verdict", overflow="fold", min_width=14)
    for row in rows(comparison):
        if not row["seeds"]:
            empty = [""] * (len(others) + 3)
            board.add_row(escape(row["recipe"]), *empty, f"[yellow]{escape(said(row))}[/yellow]")
            continue
        gap = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        if row["difference_low"] is not None:
            # the interval is symmetric
            gap += f" [dim]± {row['difference_high'] - row['difference']:.4f}[/dim]"
        colour = {"better": "green", "worse": "red", "baseline": "bold"}.get(row["verdict"] or "", "dim")
        board.add_row(
            escape(row["recipe"]),
            f"{row[plan.metric]:.4f}",
            gap,
            *(f"{row[metric]:.4f}" for metric in others),
            f"{row['seconds']:.2f}",
            f"[{colour}]{escape(said(row))}[/{colour}]",
        )
    if comparison.reference is not None and comparison.reference.finished:
        outside = comparison.reference
        board.add_section()
        board.add_row(
            escape(outside.recipe.label),
            f"{outside.mean(comparison.metric):.4f}",
            "",
            *(_shown(outside, metric) for metric in others),
            f"{outside.seconds:.2f}",
            "[dim]outside reference: not tuned, not ranked[/dim]",
        )
    return board


def _shown(entry: Entry, metric: str) -> str:
    value = entry.mean(f"test_{metric}")
    return f"{value:.4f}" if math.isfinite(value) else ""


def said(row: dict[str, Any]) -> str:
    """The verdict of a row, or what became of it, in words."""
    if row["status"] == "partial":
        return f"{row['verdict'] or ''} (only {row['seeds']} seeds ended: {row['reason']})".strip()
    if row["seeds"]:
        return row["verdict"] or ""
    return row["status"] + (f": {row['reason']}" if row["reason"] else "")


def settings(hyperparameters: dict[str, Any] | None) -> str:
    """Hyper-parameters in one line."""
    return ", ".join(f"{name}={_short(value)}" for name, value in (hyperparameters or {}).items())


def conclusion(comparison: Comparison) -> str:
    """What the comparison shows, in two sentences that claim no more than it does."""
    plan, ranked = comparison.plan, comparison.ranked
    if not ranked:
        return "No recipe finished. There is nothing to compare."
    metric = TITLES.get(plan.metric, plan.metric)
    differences = comparison.differences()
    top, name = ranked[0], ranked[0].recipe.label
    tail = "" if comparison.complete else " (the comparison is not finished)"
    if comparison.stopped_by_time:
        tail += f" (max_time ended it after {_count(comparison.trials_counted, 'trial')} a recipe)"
    base = comparison.baseline.recipe.label
    most = "highest" if plan.direction == "max" else "lowest"
    first = f"On {plan.title or plan.task}, {name} had the {most} mean test {metric} over {_seeds(len(top.finished))}: "
    first += f"{top.mean(comparison.metric):.3f}"
    if name in differences:
        first += f", against {comparison.baseline.mean(comparison.metric):.3f} for the baseline {base}"
        first += _interval(differences[name].estimate)
    elif top is comparison.baseline:
        first += ", and it is the baseline"
    first += f"{tail}."
    if not comparison.baseline.finished:
        return first + f" The baseline {base} did not finish, so there are no differences to it."
    if not differences:
        return first + " There is no other recipe to compare it with."
    verdicts = [difference.verdict for difference in differences.values()]
    if all(verdict == "n too small to test" for verdict in verdicts):
        return (
            first
            + f" {_seeds(comparison.seeds_counted).capitalize()} cannot carry a test of any difference to {base}."
        )
    counts = {kind: verdicts.count(kind) for kind in ("better", "worse", "practically equal")}
    counts["unclear after Holm's correction"] = verdicts.count("unclear after correction")
    counts[f"without a difference that {_seeds(comparison.seeds_counted)} can show"] = len(verdicts) - sum(
        counts.values()
    )
    seen = {words: count for words, count in counts.items() if count}
    if len(verdicts) == 1:
        others, listed = f"{next(iter(differences))} came out", next(iter(seen))
    elif len(seen) == 1:
        others, listed = f"all {len(verdicts)} other recipes came out", next(iter(seen))
    else:
        parts = [f"{count} {words}" for words, count in seen.items()]
        others = f"the {len(verdicts)} other recipes came out as"
        listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
    second = f" Tested against {base}, {others} {listed}"
    scope = "this holds for this task, model and tuning budget"
    if not plan.resplits:
        scope = "this holds for this test split, model and tuning budget"
    return first + second + f"; {scope}."


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return ""
    ends = f"{estimate.low:+.3f} to {estimate.high:+.3f}"
    return f" (paired difference {estimate.mean:+.3f}, 95 % interval {ends})"


def _seeds(count: int) -> str:
    return _count(count, "seed")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


# ------------------------------------------------------------------------------------------ several data sets


def suite_frame(suite: Suite) -> pl.DataFrame:
    """Ranks over several tasks, best first: mean rank, wins and losses, score, and the metric of every task."""
    scores = suite.scores()
    titles = suite_titles(suite)
    return pl.DataFrame(
        [
            {
                "recipe": standing.label,
                "mean rank": standing.mean_rank,
                "better": standing.better,
                "worse": standing.worse,
                "score": scores[standing.label],
                **dict(zip(titles, standing.means, strict=True)),
            }
            for standing in suite.standings()
        ]
    )


def suite_titles(suite: Suite) -> tuple[str, ...]:
    """A short, unambiguous name for every task."""
    names = [comparison.plan.title or comparison.plan.task for comparison in suite.comparisons]
    return tuple(
        name if names.count(name) == 1 else comparison.plan.task
        for name, comparison in zip(names, suite.comparisons, strict=True)
    )


def suite_table(suite: Suite) -> Table:
    """Ranks over several tasks for a terminal."""
    board = Table(
        title=f"{len(suite.comparisons)} data sets: ranks by test metric", title_justify="left", box=SIMPLE
    )
    board.add_column("recipe", overflow="fold", min_width=14)
    for title in ("mean rank", "better", "worse", "score", *suite_titles(suite)):
        board.add_column(escape(title), justify="right")
    scores = suite.scores()
    for standing in suite.standings():
        cells = [f"{mean:.4f} ({rank:g})" for mean, rank in zip(standing.means, standing.ranks, strict=True)]
        board.add_row(
            escape(standing.label),
            f"{standing.mean_rank:.2f}",
            str(standing.better),
            str(standing.worse),
            f"{scores[standing.label]:.2f}",
            *cells,
        )
    for label, why in suite.left_out.items():
        board.add_row(escape(label), "", "", "", "", f"[yellow]{escape(why)}[/yellow]")
    return board


# ------------------------------------------------------------------------------------------------ exporting

FORMATS = (".csv", ".parquet", ".tex", ".md")


def write_table(found: Comparison | Suite, path: Path) -> Path:
    """Write the leaderboard, or the ranks over several tasks, by the suffix of ``path``.

    ``.csv`` and ``.parquet`` hold every number; ``.tex`` (booktabs) and ``.md`` what one would print.

    Raises:
        telos.trials.UsageError: for another suffix.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"a table is written as {', '.join(FORMATS)}, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix in (".csv", ".parquet"):
        whole = suite_frame(found) if isinstance(found, Suite) else frame(found)
        (whole.write_csv if suffix == ".csv" else whole.write_parquet)(path)
        return path
    heads, lines = printed(found)
    text = _latex(heads, lines) if suffix == ".tex" else _markdown(heads, lines)
    path.write_text(text, encoding="utf-8")
    return path


def printed(found: Comparison | Suite) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table that one would print, numbers to the right of the first column."""
    if isinstance(found, Suite):
        heads = ["recipe", "mean rank", "better", "worse", *suite_titles(found)]
        lines = [
            [s.label, f"{s.mean_rank:.2f}", str(s.better), str(s.worse), *(f"{m:.4f}" for m in s.means)]
            for s in found.standings()
        ]
        return heads, lines
    metrics = [found.plan.metric, *(name for name in found.plan.metrics if name != found.plan.metric)]
    titles = [TITLES.get(name, name) for name in metrics]
    heads = ["recipe", titles[0], "minus baseline", "95 % interval", *titles[1:], "verdict"]
    lines = []
    for row in rows(found):
        interval = (
            ""
            if row["difference_low"] is None
            else f"{row['difference_low']:+.4f} to {row['difference_high']:+.4f}"
        )
        cells = ["" if row[name] is None else f"{row[name]:.4f}" for name in metrics]
        gap = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        lines.append([row["recipe"], cells[0], gap, interval, *cells[1:], said(row)])
    return heads, lines


def html_table(found: Comparison | Suite) -> str:
    """The table and the conclusion as a piece of HTML, for notebooks; what users wrote stays text."""
    heads, lines = printed(found)
    top = "".join(f"<th>{html.escape(title)}</th>" for title in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    words = found.conclusion() if isinstance(found, Suite) else conclusion(found)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table><p>{html.escape(words)}</p>"


def _markdown(heads: list[str], lines: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        # a bar would end the cell, an angle bracket begin a tag
        safe = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for cell in cells)
        return "| " + " | ".join(" ".join(cell.split()) for cell in safe) + " |\n"

    ruler = "|---" + "|---:" * (len(heads) - 1) + "|\n"
    return line(heads) + ruler + "".join(map(line, lines))


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{letter: "\\" + letter for letter in "&%$#_{}"},
}


def _latex(heads: list[str], lines: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        safe = ("".join(_LATEX.get(letter, letter) for letter in cell) for cell in cells)
        return " & ".join(" ".join(cell.split()) for cell in safe) + r" \\" + "\n"

    columns = "l" + "r" * (len(heads) - 1)
    return (
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(heads)}\\midrule\n"
        + "".join(map(line, lines))
        + "\\bottomrule\n\\end{tabular}\n"
    )
