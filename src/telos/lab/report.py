"""The report: one self-contained page that asks nothing of the network."""

from __future__ import annotations

import json
import math
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from telos.lab.leaderboard import TITLES, conclusion, rows, said, settings
from telos.trials import Comparison, Entry

# colours that hold on white and on black; the baseline is grey
BASELINE = "#8792a2"
COLOURS = (
    "#4c8dde",
    "#e8853b",
    "#3aa876",
    "#d4526a",
    "#9a78d8",
    "#b5952a",
    "#2fa9b8",
    "#d97cb5",
    "#7d9a3c",
    "#a9714b",
    "#5f6fd6",
    "#c2563c",
)


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the page; it replaces an older one only when it is complete.

    Args:
        comparison: what to show.
        path: of the ``.html`` file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".html.part")
    unfinished.write_text(render(comparison), encoding="utf-8")
    unfinished.replace(path)


def render(comparison: Comparison) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    plan = comparison.plan
    metric = _title(plan.metric)
    table = rows(comparison)
    colours = _colours(comparison)
    finished = [run for entry in comparison.entries for run in (*entry.tuning, *entry.evaluation)]
    facts = {
        "recipes compared": len(plan.runnable),
        "evaluation seeds": plan.seeds,
        "trials a recipe": plan.trials,
        "training runs": len(finished),
        "examples to train / tune / test": " / ".join(
            f"{plan.sizes[s]:,}" for s in ("train", "validation", "test")
        ),
        "of training, in all": _duration(sum(run.seconds for run in finished)),
    }
    arrow = "higher" if plan.direction == "max" else "lower"
    page = Template((files("telos.lab") / "page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(f"{plan.task}: telos compare"),
        heading=escape(f"{plan.task}: {len(plan.runnable)} recipes compared"),
        description=escape(plan.description),
        conclusion=escape(conclusion(comparison)),
        facts="".join(f"<li><span>{escape(k)}</span><b>{escape(str(v))}</b></li>" for k, v in facts.items()),
        board_note=escape(
            f"Means over evaluation seeds on the test split; {metric} decides the order ({arrow} is better). "
            f"Differences are paired by seed against {comparison.baseline.recipe.label}, with 95 % corrected "
            "resampled intervals; a verdict needs p < 0.05 after Holm's correction. Outputs are read through "
            "softmax unless a loss brings its own log_probabilities."
        ),
        leaderboard=_leaderboard(comparison, table, colours),
        difference_note=escape(
            f"Bars are 95 % intervals; the shaded band of ±{plan.band:g} counts as practically equal."
        ),
        seeds_note=escape(f"Test {metric}: a dot per seed (each with its own split), a bar at the mean."),
        time_note=escape(
            "Wall time of a run, with its evaluation after each epoch, on one thread of this machine; bars "
            "are 95 % intervals."
        ),
        tuning_note=escape(_tuning_note(comparison)),
        lost=_lost(comparison),
        searched=_searched(comparison, colours),
        protocol="".join(f"<li>{escape(step)}</li>" for step in _protocol(comparison)),
        command=escape(plan.command),
        versions="".join(
            f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
            for name, value in plan.versions.items()
            if value
        ),
        plotly=get_plotlyjs(),
        # a closing tag inside a string would end the script element
        data=json.dumps(_data(comparison, table, colours), allow_nan=False).replace("<", "\\u003c"),
    )


def _data(comparison: Comparison, table: list[dict[str, Any]], colours: dict[str, str]) -> dict[str, Any]:
    plan = comparison.plan
    entries = {entry.recipe.label: entry for entry in comparison.entries}
    ordered = [plan.metric, *(metric for metric in plan.metrics if metric != plan.metric)]
    return {
        "title": _title(plan.metric),
        "band": plan.band,
        "curve_metrics": [
            *([f"validation_{name}", f"validation {_title(name)}"] for name in ordered),
            ["loss", "training loss (each its own scale)"],
        ],
        "entries": [
            {
                "label": row["recipe"],
                "colour": colours[row["recipe"]],
                "mean": row[plan.metric],
                "low": row["low"],
                "high": row["high"],
                "seconds": row["seconds"],
                "seeds": entries[row["recipe"]].values(comparison.metric),
                "chosen": row["trial"],
                "difference": None
                if row["difference"] is None
                else {
                    "mean": row["difference"],
                    "low": row["difference_low"],
                    "high": row["difference_high"],
                    "verdict": row["verdict"],
                },
                "curves": _curves(entries[row["recipe"]]),
                "trials": _trials(entries[row["recipe"]]),
            }
            for row in table
            if row["seeds"]
        ],
    }


def _curves(entry: Entry) -> dict[str, dict[str, list[float]]]:
    """Mean and band of one standard deviation, epoch by epoch."""
    curves = [run.curve for run in entry.finished]
    shared = set.intersection(*(set(curve[0]) for curve in curves)) - {"epoch", "seconds"}
    found = {}
    for name in sorted(shared):
        values = np.array([[record[name] for record in curve] for curve in curves])
        mean, spread = values.mean(0), values.std(0)
        found[name] = {
            "mean": _short(mean),
            "low": _short(mean - spread),
            "high": _short(mean + spread),
        }
    return found


def _trials(entry: Entry) -> list[dict[str, Any]]:
    chosen = {run.trial: run.hyperparameters for run in entry.tuning}
    return [
        {
            "trial": trial,
            "score": score,
            "rate": chosen[trial]["learning_rate"],
            "settings": settings(chosen[trial]),
        }
        for trial, score in enumerate(entry.scores)
        if score is not None
    ]


def _leaderboard(comparison: Comparison, table: list[dict[str, Any]], colours: dict[str, str]) -> str:
    plan = comparison.plan
    others = [metric for metric in plan.metrics if metric != plan.metric]
    heads = [
        ("recipe", ""),
        (_title(plan.metric), "number"),
        ("minus baseline [95 %]", "number"),
        ("verdict", ""),
        *((_title(name), "number") for name in others),
        ("seconds", "number"),
    ]
    lines = []
    for row in table:
        name = _named(row["recipe"], colours)
        kind = row["verdict"] if row["verdict"] in ("better", "worse") else "" if row["seeds"] else "lost"
        cells = [
            f'<td data-value="{escape(row["recipe"])}">{name}</td>',
            _cell(row[plan.metric], ".4f"),
            _difference_cell(row),
            f'<td class="wide {kind}">{escape(said(row))}</td>',
            *(_cell(row[other], ".4f") for other in others),
            _cell(row["seconds"], ".2f"),
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    top = "".join(f'<th scope="col" class="{kind}">{escape(title)}</th>' for title, kind in heads)
    return f'<table class="sortable"><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return '<td class="number" data-value=""></td>'
    return f'<td class="number" data-value="{value!r}">{value:{form}}</td>'


def _difference_cell(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return _cell(None, "")
    interval = ""
    if row["difference_low"] is not None:
        interval = (
            f' <span class="interval">[{row["difference_low"]:+.4f}, {row["difference_high"]:+.4f}]</span>'
        )
    return f'<td class="number" data-value="{row["difference"]!r}">{row["difference"]:+.4f}{interval}</td>'


def _searched(comparison: Comparison, colours: dict[str, str]) -> str:
    lines = []
    for entry in comparison.entries:
        if entry.recipe.refused is not None:
            continue
        name = _named(entry.recipe.label, colours)
        tuned = comparison.plan.trials > 1
        ranges = (
            "; ".join(f"{key} {span}" for key, span in entry.recipe.space.items()) if tuned else "nothing"
        )
        chosen = (
            "none"
            if entry.chosen is None
            else f"trial {entry.chosen}{' (untuned)' if entry.chosen == 0 else ''}"
        )
        score = entry.scores[entry.chosen] if entry.chosen is not None and entry.scores else None
        values = settings(entry.hyperparameters) or "its defaults"
        lines.append(
            f'<tr><td>{name}</td><td class="wide">{escape(ranges)}</td><td>{escape(chosen)}</td>'
            f'<td class="wide">{escape(values)}</td>{_cell(score, ".4f")}</tr>'
        )
    metric = escape(_title(comparison.plan.metric))
    return (
        "<table><thead><tr><th>recipe</th><th>searched</th><th>chosen</th><th>values</th>"
        f'<th class="number">validation {metric}</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _lost(comparison: Comparison) -> str:
    """Recipes that were refused, diverged or raised, and trials that did."""
    lines = []
    for entry in comparison.entries:
        name = escape(entry.recipe.label)
        if entry.status in ("refused", "unfinished"):
            reason = entry.reason or f"{entry.missing} runs are still to do"
            lines.append(
                f"<tr><td>{name}</td><td>{entry.status}</td><td class='wide'>{escape(reason)}</td></tr>"
            )
            continue
        for role, runs in (("trial", entry.tuning), ("seed", entry.evaluation)):
            lost = [run for run in runs if not run.finished]
            if lost:
                numbers = sorted({run.trial if role == "trial" else run.seed for run in lost})
                where = f"{role}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
                state = " and ".join(sorted({run.status for run in lost}))
                lines.append(
                    f"<tr><td>{name}</td><td>{escape(state)}: {escape(where)}</td>"
                    f"<td class='wide'>{escape(lost[0].reason or '')}</td></tr>"
                )
    if not lines:
        return ""
    return (
        '<section class="card"><h2>What did not run, or not to the end</h2><div class="scroll"><table><thead>'
        "<tr><th>recipe</th><th>what became of it</th><th>reason</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _named(label: str, colours: dict[str, str]) -> str:
    return f'<span class="swatch" style="background:{colours[label]}"></span>{escape(label)}'


def _tuning_note(comparison: Comparison) -> str:
    plan = comparison.plan
    if not plan.tuning:
        return "Nothing was tuned: every recipe ran with its defaults."
    return (
        f"Every trial by its learning rate: mean validation {_title(plan.metric)} over {len(plan.tuning)} "
        "tuning seeds. Diamonds are the untuned trials; the large outlined mark is the chosen one."
    )


def _protocol(comparison: Comparison) -> list[str]:
    plan = comparison.plan
    if plan.tuning:
        tuning = (
            f"Each recipe got {plan.trials} trials: the untuned one, then a quasi-random sequence over "
            f"learning rate, weight decay and the loss's own ranges. They ran on {len(plan.tuning)} tuning "
            f"seeds, which the evaluation does not use; the best mean validation {_title(plan.metric)} was "
            "chosen, of equals the earlier trial."
        )
    else:
        tuning = "Every recipe ran with its default hyper-parameters; nothing was tuned."
    return [
        "For a seed, all recipes share the split, the initial weights and the order of batches.",
        tuning,
        f"The chosen configuration ran once on each of {plan.seeds} evaluation seeds. Only these runs looked "
        "at the test split.",
        "Seeds resplit one data set, so training sets overlap: intervals use the corrected resampled "
        f"variance (1/n + n_test/n_train) s², with n_test/n_train = {comparison.test_share:.3f}.",
        "The best of several means is partly luck: read the difference and its interval, not the rank. "
        "Examples used in tuning occur in other seeds' test splits; that is the same for every recipe.",
    ]


def _colours(comparison: Comparison) -> dict[str, str]:
    others = [entry.recipe.label for entry in comparison.entries if entry is not comparison.baseline]
    found = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(others)}
    return {comparison.baseline.recipe.label: BASELINE, **found}


def _title(metric: str) -> str:
    return TITLES.get(metric, metric)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values if math.isfinite(value)]
