"""The leaderboard: recipes, their metrics and paired differences, as data frame, terminal table and words."""

from __future__ import annotations

import math
from typing import Any

import polars as pl
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from telos.trials import Comparison, Estimate

TITLES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "nll": "NLL", "ece": "ECE"}


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
        title=f"{escape(plan.task)}: test split, mean of {plan.seeds} seeds", title_justify="left", box=SIMPLE
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
    return board


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
    base = comparison.baseline.recipe.label
    most = "highest" if plan.direction == "max" else "lowest"
    first = f"On {plan.task}, {name} had the {most} mean test {metric} over {_seeds(len(top.finished))}: "
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
        return first + f" {_seeds(plan.seeds).capitalize()} cannot carry a test of any difference to {base}."
    counts = {kind: verdicts.count(kind) for kind in ("better", "worse", "practically equal")}
    counts["unclear after Holm's correction"] = verdicts.count("unclear after correction")
    counts[f"without a difference that {_seeds(plan.seeds)} can show"] = len(verdicts) - sum(counts.values())
    alone = len(verdicts) == 1
    parts = [words if alone else f"{count} {words}" for words, count in counts.items() if count]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    others = (
        f"{next(iter(differences))} came out" if alone else f"the {len(verdicts)} other recipes came out as"
    )
    second = f" Tested against {base}, {others} {listed}"
    return first + second + "; this holds for this task, model and tuning budget."


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
