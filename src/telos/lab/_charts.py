"""What the charts of the page show, as JSON, and the colours and marks of recipes in both schemes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from telos.lab._markup import Html, tag
from telos.lab._sentences import Form, metric_forms, signed, title
from telos.lab.leaderboard import rows, settings
from telos.lab.plots import BASELINE, COLOURS, SYMBOLS
from telos.trials import Comparison, Entry, Run
from telos.trials.suite import Suite

CARDS = {"light": "#ffffff", "dark": "#181c23"}
"""What the charts are drawn on; ``page.css`` has the same."""
DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
MARKS = {
    "circle": "M0-5.5A5.5 5.5 0 1 0 0 5.5A5.5 5.5 0 1 0 0-5.5Z",
    "square": "M-5-5H5V5H-5Z",
    "diamond": "M0-6.5 6.5 0 0 6.5-6.5 0Z",
    "cross": "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    "triangle-up": "M0-6 6 5H-6Z",
    "x": "M-5.7-2.9-2.9-5.7 0-2.9 2.9-5.7 5.7-2.9 2.9 0 5.7 2.9 2.9 5.7 0 2.9-2.9 5.7-5.7 2.9-2.9 0Z",
    "star": "M0-6.5 1.6-2.1 6.2-2 2.5.8 3.8 5.3 0 2.6-3.8 5.3-2.5.8-6.2-2-1.6-2.1Z",
    "pentagon": "M0-6 5.7-1.9 3.5 4.9H-3.5L-5.7-1.9Z",
}


@dataclass(frozen=True)
class Detail:
    """How much of a comparison the page holds.

    Attributes:
        points: of a curve, at most.
        every_metric: whether there are curves of all metrics, or of the plan's and the training loss.
        trials: of all recipes together, at most.
        columns: of a table's description, at most.
    """

    points: int
    every_metric: bool
    trials: int
    columns: int


def places(comparison: Comparison) -> dict[str, int]:
    """Every recipe's place among the others, as in :func:`telos.lab.plots.colours`; the baseline's is -1."""
    others = [entry.recipe.label for entry in comparison.entries if entry is not comparison.baseline]
    return {comparison.baseline.recipe.label: -1, **{label: place for place, label in enumerate(others)}}


def colour_class(place: int) -> str:
    """The class, and with ``--`` before it the variable, of a colour."""
    return "rb" if place < 0 else f"r{place % len(COLOURS)}"


def symbol(place: int) -> str:
    """A mark that no other recipe of the same colour has; the baseline has the circle."""
    return SYMBOLS[0] if place < 0 else SYMBOLS[(place + 1 + place // len(COLOURS)) % len(SYMBOLS)]


def dash(place: int) -> str:
    """A kind of line; the baseline's is solid."""
    return "solid" if place < 0 else DASHES[place % len(DASHES)]


def look(place: int) -> dict[str, str]:
    """How the charts show a recipe."""
    return {"colour": f"--{colour_class(place)}", "symbol": symbol(place), "dash": dash(place)}


def mark(place: int) -> Html:
    """A recipe's mark for the text."""
    path = tag("path", d=MARKS[symbol(place)])
    return tag("svg", path, class_=f"mark {colour_class(place)}", viewBox="-7 -7 14 14", aria_hidden="true")


def palette(scheme: str) -> str:
    """The colours of recipes as CSS variables, as light or dark as three to one against the card asks."""
    colours = {"rb": BASELINE, **{f"r{place}": colour for place, colour in enumerate(COLOURS)}}
    return "".join(f"--{name}:{visible(colour, CARDS[scheme])};" for name, colour in colours.items())


def visible(colour: str, ground: str, ratio: float = 3.0) -> str:
    """The colour, mixed with black or white by as little as gives it a contrast to the ground.

    Example:
        >>> visible("#0072b2", "#ffffff")  # as it is
        '#0072b2'
        >>> 3 <= contrast(visible("#e69f00", "#ffffff"), "#ffffff") < 3.1
        True
    """
    end = 0.0 if luminance(ground) > 0.4 else 255.0
    start = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)], dtype=float)
    for share in np.linspace(0, 1, 101):
        mixed = "#" + "".join(f"{round(part):02x}" for part in (1 - share) * start + share * end)
        if contrast(mixed, ground) >= ratio:
            break
    return mixed


def luminance(colour: str) -> float:
    """Relative luminance, as the Web Content Accessibility Guidelines define it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, from 1 to 21."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# ------------------------------------------------------------------------------------------------ chart data


def comparison_data(comparison: Comparison, detail: Detail, place: int) -> dict[str, Any]:
    """Everything that the charts of one comparison show.

    Args:
        comparison: what to show.
        detail: how much of it.
        place: of the comparison on the page; begins the ids of its charts.
    """
    plan, board = comparison.plan, rows(comparison)
    others = [name for name in plan.metrics if name != plan.metric and detail.every_metric]
    curves = [(f"validation_{name}", f"validation {title(name)}") for name in (plan.metric, *others)]
    curves.append(("loss", "training loss (each its own scale)"))
    names, form = [name for name, _ in curves], metric_forms(comparison, board)[plan.metric]
    entries = {entry.recipe.label: entry for entry in comparison.entries}
    place_of, trials = places(comparison), trials_of(comparison, detail.trials)
    found = []
    for row in board:
        if not row["seeds"]:
            continue
        label = row["recipe"]
        found.append(
            {
                "label": label,
                **look(place_of[label]),
                "mean": row[plan.metric],
                "text": form(row[plan.metric]),
                "low": row["low"],
                "high": row["high"],
                "seconds": row["seconds"],
                "seeds": entries[label].values(comparison.metric),
                "difference": _difference(row, signed(form)),
                "curves": curves_of(entries[label], names, detail.points),
                "trials": trials.get(label, []),
            }
        )
    outside = comparison.reference
    line = None
    if outside is not None and outside.values(comparison.metric):
        mean = outside.mean(comparison.metric)
        line = {"label": outside.recipe.label, "mean": mean, "text": form(mean)}
    return {
        "id": f"c{place}",
        "title": title(plan.metric),
        "direction": plan.direction,
        "band": plan.band,
        "curve_metrics": curves,
        "reference": line,
        "entries": found,
    }


def _difference(row: dict[str, Any], form: Form) -> dict[str, Any] | None:
    if row["difference"] is None:
        return None
    low, high = row["difference_low"], row["difference_high"]
    return {
        "mean": row["difference"],
        "low": low,
        "high": high,
        "verdict": row["verdict"],
        "text": form(row["difference"]),
        "interval": "" if low is None else f"[{form(low)}, {form(high)}]",
    }


def curves_of(
    entry: Entry, names: list[str], points: int
) -> dict[str, dict[str, list[float] | list[float | None]]]:
    """Mean over seeds and band of one standard deviation, at up to ``points`` epochs."""
    runs = [run.curve for run in entry.finished]
    length = min((len(curve) for curve in runs), default=0)
    if not length or not points:
        return {}
    kept = np.unique(np.linspace(0, length - 1, min(length, points)).round().astype(int))
    found: dict[str, dict[str, list[float] | list[float | None]]] = {}
    for name in names:
        if not all(name in curve[0] for curve in runs):
            continue
        values = np.array([[curve[at][name] for at in kept] for curve in runs], dtype=np.float64)
        mean, spread = values.mean(0), values.std(0)
        found[name] = {
            "epoch": [float(runs[0][at].get("epoch", at + 1)) for at in kept],
            "mean": _short(mean),
            "low": _short(mean - spread),
            "high": _short(mean + spread),
        }
    return found


def trials_of(comparison: Comparison, most: int) -> dict[str, list[dict[str, Any]]]:
    """Every trial with its state; of a stopped one the mean over the tuning seeds that it saw."""
    tuned = [entry for entry in comparison.entries if entry.tuning]
    each = most // len(tuned) if tuned else 0
    if not each:
        return {}
    metric = f"validation_{comparison.plan.metric}"
    found = {}
    for entry in tuned:
        by_trial: dict[int, list[Run]] = {}
        for run in entry.tuning:
            by_trial.setdefault(run.trial, []).append(run)
        trials = []
        for number, (state, score) in enumerate(zip(entry.trials, entry.scores, strict=True)):
            runs = by_trial.get(number, [])
            seen = [run.metrics[metric] for run in runs if run.finished]
            if not runs:
                continue
            trials.append(
                {
                    "trial": number,
                    "state": state,
                    "score": score if score is not None else float(np.mean(seen)) if seen else None,
                    "seeds": len(seen),
                    "rate": runs[0].hyperparameters.get("learning_rate"),
                    "settings": settings(runs[0].hyperparameters),
                    "chosen": number == entry.chosen,
                }
            )
        kept = trials[:each]
        # the chosen one is shown in any case
        kept += [trial for trial in trials[each:] if trial["chosen"]]
        found[entry.recipe.label] = kept
    return found


def suite_data(suite: Suite) -> dict[str, Any] | None:
    """Mean ranks, what they cannot tell apart, and performance profiles; ``None`` without a ranked recipe."""
    standings, place_of = suite.standings(), places(suite.comparisons[0])
    if not standings:
        return None
    table = suite.profiles()
    recipes = []
    for standing in standings:
        own = table.filter(table["name"] == standing.label)
        recipes.append(
            {
                "label": standing.label,
                **look(place_of[standing.label]),
                "rank": standing.mean_rank,
                "tau": own["tau"].to_list(),
                "share": own["share"].to_list(),
            }
        )
    return {"recipes": recipes, "distance": suite.critical_difference(), "groups": suite.groups()}


def _short(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
