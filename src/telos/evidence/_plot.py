"""The picture of a result: each effect's seeds, mean and bounds against its threshold."""

import math
from pathlib import Path
from typing import Any

COLOURS = {"REPRODUCED": "#2a7f4f", "NOT REPRODUCED": "#b3382c", "INCONCLUSIVE": "#8a6d1f"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws a row per effect: dots are seeds, the bar spans the bounds, the dashed line is the threshold."""
    from matplotlib.figure import Figure

    effects = result["effects"]
    figure = Figure(figsize=(7.0, 1.1 + 0.95 * len(effects)), layout="constrained")
    rows = figure.subplots(len(effects), 1, squeeze=False)[:, 0]
    for axes, effect in zip(rows, effects, strict=True):
        values = [value for value in effect["values"] if value is not None and math.isfinite(value)]
        colour = COLOURS[effect["verdict"]]
        axes.axvline(effect["threshold"], color="black", linewidth=1, linestyle="--")
        # spread in the order of the seeds, so that equal values stay apart
        heights = [0.25 + 0.1 * (position % 4) for position in range(len(values))]
        axes.plot(values, heights, "o", color=colour, alpha=0.6, markersize=4)
        lower, upper, mean = (effect[key] for key in ("lower", "upper", "mean"))
        if lower is not None and math.isfinite(lower):
            axes.plot([lower, upper], [-0.2, -0.2], color=colour, linewidth=3, solid_capstyle="butt")
        if mean is not None and math.isfinite(mean):
            axes.plot([mean], [-0.2], "D", color=colour, markersize=6)
        optional = "" if effect["required"] else ", reported only"
        axes.set_title(f"{effect['name']} > {effect['threshold']:g}{optional}", fontsize=9, loc="left")
        axes.set_ylim(-0.6, 0.8)
        axes.set_yticks([])
        axes.tick_params(labelsize=8)
        axes.margins(x=0.1)
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
    seeds, budget = len(result["seeds"]), result["budget"]
    figure.suptitle(f"{result['slug']}: {result['verdict']}  ({seeds} seeds, {budget})", fontsize=11)
    figure.supxlabel("dots: seeds, bar: one-sided 95 % bounds of the mean, dashed: threshold", fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})
