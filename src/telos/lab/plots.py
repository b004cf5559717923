"""Plotly figures of a comparison, for notebooks and pages of one's own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from telos.lab.leaderboard import TITLES, suite_titles
from telos.trials import Comparison
from telos.trials.suite import Suite

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's colours, which the colour-blind can tell apart; the baseline is grey
BASELINE = "#7a8594"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a51a3", "#8c6d31")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "pentagon")


def colours(comparison: Comparison) -> dict[str, str]:
    """A colour for every recipe, the same in every plot."""
    others = [entry.recipe.label for entry in comparison.entries if entry is not comparison.baseline]
    found = {label: COLOURS[place % len(COLOURS)] for place, label in enumerate(others)}
    return {comparison.baseline.recipe.label: BASELINE, **found}


def difference(comparison: Comparison) -> go.Figure:
    """Every recipe's difference to the baseline with its 95 % interval, and the band that does not matter."""
    import plotly.graph_objects as go

    plan, found = comparison.plan, comparison.differences()
    paint = colours(comparison)
    figure = go.Figure()
    for entry in reversed(comparison.ranked):
        label = entry.recipe.label
        if label not in found:
            continue
        estimate = found[label].estimate
        half = estimate.high - estimate.mean
        figure.add_trace(
            go.Scatter(
                x=[estimate.mean],
                y=[label],
                error_x={"array": [0.0 if math.isnan(half) else half]},
                mode="markers",
                marker={"color": paint[label], "size": 10},
                name=label,
                hovertext=found[label].verdict,
            )
        )
    figure.add_vline(x=0, line_color=BASELINE)
    if plan.band:
        figure.add_vrect(x0=-plan.band, x1=plan.band, fillcolor=BASELINE, opacity=0.15, line_width=0)
    figure.update_layout(
        title=f"{plan.title or plan.task}: minus {comparison.baseline.recipe.label}",
        xaxis_title=f"difference in test {TITLES.get(plan.metric, plan.metric)}",
        showlegend=False,
    )
    return figure


def seeds(comparison: Comparison) -> go.Figure:
    """The test metric of every seed, a column of dots for each recipe."""
    import plotly.graph_objects as go

    plan, paint = comparison.plan, colours(comparison)
    figure = go.Figure()
    for entry in comparison.ranked:
        label, values = entry.recipe.label, list(entry.values(comparison.metric).values())
        figure.add_trace(
            go.Box(
                y=values,
                name=label,
                boxpoints="all",
                jitter=0.4,
                pointpos=0,
                fillcolor="rgba(0,0,0,0)",
                line={"width": 1},
                marker={"color": paint[label]},
            )
        )
    if comparison.reference is not None and comparison.reference.finished:
        outside = comparison.reference
        figure.add_hline(
            y=outside.mean(comparison.metric), line_dash="dash", annotation_text=outside.recipe.label
        )
    figure.update_layout(
        title=plan.title or plan.task,
        yaxis_title=f"test {TITLES.get(plan.metric, plan.metric)}",
        showlegend=False,
    )
    return figure


def curves(comparison: Comparison) -> go.Figure:
    """The validation metric by epoch: mean over seeds."""
    import plotly.graph_objects as go

    plan, paint = comparison.plan, colours(comparison)
    name = f"validation_{plan.metric}"
    figure = go.Figure()
    for place, entry in enumerate(comparison.ranked):
        label = entry.recipe.label
        values = np.array([[record[name] for record in run.curve] for run in entry.finished])
        epochs = [record["epoch"] for record in entry.finished[0].curve]
        figure.add_trace(
            go.Scatter(
                x=epochs,
                y=values.mean(0),
                mode="lines+markers",
                name=label,
                line={"color": paint[label]},
                marker={"symbol": SYMBOLS[place % len(SYMBOLS)]},
            )
        )
    figure.update_layout(
        title=plan.title or plan.task,
        xaxis_title="epoch",
        yaxis_title=f"validation {TITLES.get(plan.metric, plan.metric)}",
    )
    return figure


def time(comparison: Comparison) -> go.Figure:
    """The test metric against the wall time of a run."""
    import plotly.graph_objects as go

    plan, paint = comparison.plan, colours(comparison)
    figure = go.Figure()
    for place, entry in enumerate(comparison.ranked):
        label = entry.recipe.label
        estimate = comparison.estimate(entry)
        half = estimate.high - estimate.mean
        figure.add_trace(
            go.Scatter(
                x=[entry.seconds],
                y=[estimate.mean],
                error_y={"array": [0.0 if math.isnan(half) else half]},
                mode="markers",
                marker={"color": paint[label], "size": 10, "symbol": SYMBOLS[place % len(SYMBOLS)]},
                name=label,
            )
        )
    figure.update_layout(
        title=plan.title or plan.task,
        xaxis_title="seconds a run",
        yaxis_title=f"test {TITLES.get(plan.metric, plan.metric)}",
    )
    return figure


def ranks(suite: Suite) -> go.Figure:
    """A critical-difference diagram: mean ranks, and bars over recipes that the ranks cannot tell apart."""
    import plotly.graph_objects as go

    standings = suite.standings()
    figure = go.Figure(
        go.Scatter(
            x=[standing.mean_rank for standing in standings],
            y=[0.0] * len(standings),
            mode="markers+text",
            text=[standing.label for standing in standings],
            textposition=[
                "top center" if place % 2 == 0 else "bottom center" for place in range(len(standings))
            ],
            marker={
                "size": 12,
                "color": [BASELINE if s.label == suite.baseline else COLOURS[0] for s in standings],
            },
            showlegend=False,
        )
    )
    place_of = {standing.label: standing.mean_rank for standing in standings}
    for level, group in enumerate(suite.groups(), start=1):
        ends = [place_of[group[0]], place_of[group[-1]]]
        figure.add_trace(
            go.Scatter(
                x=ends,
                y=[-0.35 - 0.12 * level] * 2,
                mode="lines",
                line={"width": 5, "color": "#444"},
                showlegend=False,
                hovertext="the ranks cannot tell these apart",
            )
        )
    distance = suite.critical_difference()
    words = (
        "too few data sets for a critical difference"
        if distance is None
        else f"critical difference {distance:.2f}"
    )
    figure.update_layout(
        title=f"Mean rank over {len(suite.comparisons)} data sets ({words})",
        xaxis={"title": "mean rank (1 is best)", "range": [0.8, len(standings) + 0.2]},
        yaxis={"visible": False, "range": [-1.4, 0.8]},
    )
    return figure


def profiles(suite: Suite) -> go.Figure:
    """Performance profiles: the share of data sets on which a recipe reaches the baseline's result in time."""
    import plotly.graph_objects as go

    table = suite.profiles()
    figure = go.Figure()
    for place, label in enumerate(suite.labels):
        own = table.filter(table["name"] == label)
        figure.add_trace(
            go.Scatter(
                x=own["tau"].to_list(),
                y=own["share"].to_list(),
                mode="lines",
                line={"shape": "hv", "color": BASELINE if label == suite.baseline else COLOURS[place % 8]},
                name=label,
            )
        )
    figure.update_layout(
        title=f"Reaching what {suite.baseline} ends with: {', '.join(suite_titles(suite))}",
        xaxis_title="epochs, relative to the fastest recipe",
        yaxis_title="share of data sets",
    )
    return figure
