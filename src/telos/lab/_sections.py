"""The page of one comparison, section by section."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

from telos.lab._charts import Detail, curves_of, mark, places, trials_of
from telos.lab._markup import (
    Html,
    card,
    code,
    column,
    figure,
    folded,
    join,
    line,
    number,
    table,
    tag,
    words,
)
from telos.lab._sentences import (
    Form,
    cautions,
    counted,
    duration,
    finite,
    form_of,
    headline,
    listed,
    metric_forms,
    name_of,
    p_value,
    protocol,
    signed,
    title,
)
from telos.lab.leaderboard import conclusion, rows, said, settings
from telos.lab.words import without_password
from telos.trials import Comparison, Plan, Run

Board: TypeAlias = Sequence[dict[str, Any]]
ICONS = {"better": "▲ ", "worse": "▼ ", "practically equal": "≈ "}
STATES = ("finished", "stopped", "repeated", "diverged", "failed", "open")
SECONDS = "{:.2f}".format


def comparison_body(comparison: Comparison, store: str | None, detail: Detail) -> Html:
    """Everything between the first heading and the scripts."""
    plan, ranked = comparison.plan, comparison.ranked
    most = "highest" if plan.direction == "max" else "lowest"
    best = f"the recipe with the {most} mean ({ranked[0].recipe.label})" if ranked else None
    return join(
        [
            top(
                f"{name_of(comparison)}: {counted(len(plan.runnable), 'recipe')} compared",
                plan.description,
                headline(comparison),
                conclusion(comparison),
                _facts(comparison),
            ),
            *sections(comparison, 0, detail, level=2, alone=True),
            how(comparison),
            repeat(plan, store, best),
        ]
    )


def sections(
    comparison: Comparison, place: int, detail: Detail, *, level: int, alone: bool
) -> list[Html | None]:
    """What there is to say about one data set.

    Args:
        comparison: what to show.
        place: of it on the page.
        detail: how much of it.
        level: of the headings.
        alone: whether it is all that the page shows; then the filter stands here.
    """
    board = rows(comparison)
    return [
        _cautions(comparison, level),
        _leaderboard(comparison, board, level, alone),
        _lost(comparison, level),
        _charts(comparison, board, f"c{place}", detail, level),
        _searched(comparison, level),
        _columns(comparison, detail, level),
    ]


# ------------------------------------------------------------------------------- what both kinds of page have


def top(name: str, description: str, answer: str, sentences: str, facts: dict[str, object]) -> Html:
    """What was compared, and what came out."""
    pairs = (tag("div", tag("dt", key), tag("dd", value)) for key, value in facts.items())
    return tag(
        "header",
        tag("p", "telos compare", class_="eyebrow"),
        tag("h1", name),
        tag("p", description, class_="soft") if description else None,
        tag("p", answer, class_="answer"),
        tag("p", sentences, class_="lead"),
        tag("dl", *pairs, class_="facts"),
        tag("noscript", tag("p", "The charts need JavaScript; the tables have their numbers.")),
    )


def filter_box() -> Html:
    """The field that hides recipes everywhere on the page."""
    field = tag("input", id="filter", type="search", autocomplete="off", spellcheck="false")
    label = tag("label", "Show recipes named", for_="filter")
    return tag("div", label, field, tag("span", id="count", role="status"), class_="filter")


def key_of(comparison: Comparison, labels: Sequence[str]) -> Html:
    """The marks of a chart; each is a button that hides its recipe."""
    place_of = places(comparison)
    buttons = (
        tag(
            "button",
            mark(place_of[label]),
            tag("span", label),
            type="button",
            aria_pressed="true",
            data_key=label,
        )
        for label in labels
    )
    entries = (tag("li", button) for button in buttons)
    return tag("ul", *entries, class_="key", aria_label="recipes; press one to hide it or to show it again")


def how(comparison: Comparison) -> Html:
    """The protocol."""
    return card("How it was done", 2, tag("ol", *(tag("li", step) for step in protocol(comparison))))


def repeat(plan: Plan, store: str | None, best: str | None) -> Html:
    """The command, what to do with the store, and the versions."""
    where = shlex.quote(store) if store else _store_of(plan.command)
    known = {name: value for name, value in plan.versions.items() if value}
    inside: list[tuple[str, str]] = []
    if plan.command:
        what = (
            "The same command trains the same runs; on these versions and data it gives these numbers again."
        )
        inside.append((what, without_password(plan.command)))
    if best:
        what = f"Loss and optimizer as Python, weights, and a short training script of {best}, first seed:"
        inside.append((what, f"telos export best {where}"))
    what = "More recipes in this comparison; what is trained is kept:"
    inside.append((what, f"telos compare {where} --add loss=ANOTHER_LOSS"))
    inside.append(("This page again, without training:", f"telos report {where}"))
    return card(
        "Repeat it, extend it, take it home",
        2,
        *(join([tag("p", what), code(command)]) for what, command in inside),
        tag(
            "dl",
            *(join([tag("dt", name), tag("dd", value)]) for name, value in known.items()),
            class_="versions",
        ),
    )


def _store_of(command: str) -> str:
    """The store of a command, if it names one that holds no password."""
    try:
        typed = shlex.split(command)
    except ValueError:
        typed = []
    given = dict(word.split("=", 1) for word in typed if word.startswith(("store=", "out=")))
    found = given.get("store", given.get("out", ""))
    return shlex.quote(found) if found and "PASSWORD@" not in without_password(found) else "STORE"


def runs_of(comparison: Comparison) -> list[Run]:
    """All runs of a comparison."""
    entries = [*comparison.entries, *([comparison.reference] if comparison.reference else [])]
    return [run for entry in entries for run in (*entry.tuning, *entry.evaluation)]


# ----------------------------------------------------------------------------------- the leaderboard and around


def _facts(comparison: Comparison) -> dict[str, object]:
    plan, runs = comparison.plan, runs_of(comparison)
    seeds, trials = str(plan.seeds), str(plan.trials)
    if comparison.stopped_by_time:
        seeds, trials = f"{comparison.seeds_counted} of {seeds}", f"{comparison.trials_counted} of {trials}"
    facts: dict[str, object] = {
        "recipes": len(plan.runnable),
        "evaluation seeds": seeds,
        "trials a recipe": trials,
        "training runs": f"{len(runs):,}",
        "rows to train / tune / test": " / ".join(
            f"{plan.sizes[name]:,}" for name in ("train", "validation", "test")
        ),
        "of training, in all": duration(sum(run.seconds for run in runs)),
    }
    return facts if plan.max_time is None else {**facts, "time limit": duration(plan.max_time)}


def _cautions(comparison: Comparison, level: int) -> Html | None:
    found = cautions(comparison)
    if not found:
        return None
    return card("Worth knowing first", level, tag("ul", *(tag("li", one) for one in found)), kind="caution")


def _leaderboard(comparison: Comparison, board: Board, level: int, alone: bool) -> Html:
    plan, metric = comparison.plan, title(comparison.plan.metric)
    more = "higher" if plan.direction == "max" else "lower"
    note = (
        f"Means over {counted(comparison.seeds_counted, 'evaluation seed')} on the test split; {metric} decides "
        f"the order ({more} is better). Differences are paired by seed against "
        f"{comparison.baseline.recipe.label}, with 95 % intervals; a verdict needs p < 0.05 after Holm's "
        "correction."
    )
    if plan.family == "classification":
        note += " Outputs are read through softmax unless a loss brings its own log_probabilities."
    forms, others = metric_forms(comparison, board), [name for name in plan.metrics if name != plan.metric]
    place_of = places(comparison)
    heads = [
        column("recipe", sorts=True),
        column(metric, "number", sorts=True),
        column("minus baseline [95 %]", "number", sorts=True),
        column("verdict", "verdict", sorts=True),
        column("p (Holm)", "number", sorts=True),
        *(column(title(name), "number", sorts=True) for name in others),
        column("s a run", "number", sorts=True),
    ]
    lines = [
        line(
            row["recipe"],
            number(row[plan.metric], forms[plan.metric]),
            _difference(row, signed(forms[plan.metric])),
            tag("td", _verdict(row), class_="verdict", data_value=_words(row)),
            number(row["p_holm"], p_value),
            *(number(row[name], forms[name]) for name in others),
            number(row["seconds"], SECONDS),
            look=mark(place_of[row["recipe"]]),
            under=_verdict(row),
        )
        for row in board
    ]
    return card(
        "Leaderboard",
        level,
        tag("p", note, class_="note"),
        filter_box() if alone else None,
        table(
            f"Recipes on {name_of(comparison)}, in the order of mean test {metric}",
            heads,
            lines,
            _reference_line(comparison, forms, others),
            sorts=True,
        ),
        place="leaderboard" if alone else None,
    )


def _reference_line(comparison: Comparison, forms: dict[str, Form], others: Sequence[str]) -> Html | None:
    outside = comparison.reference
    if outside is None or not outside.finished:
        return None
    means = {name: finite(outside.mean(f"test_{name}")) for name in forms}
    name = tag(
        "th",
        outside.recipe.label,
        tag("span", "outside reference", class_="under"),
        class_="recipe",
        scope="row",
    )
    cells = [
        number(means[comparison.plan.metric], forms[comparison.plan.metric]),
        tag("td"),
        tag("td", "outside reference: not tuned, ranked or tested", class_="verdict"),
        tag("td"),
        *(number(means[other], forms[other]) for other in others),
        number(finite(outside.seconds), SECONDS),
    ]
    return tag("tfoot", tag("tr", name, *cells))


def _words(row: dict[str, Any]) -> str:
    # the reason stands in a section of its own
    return said(row) if row["seeds"] else str(row["status"])


def _verdict(row: dict[str, Any]) -> Html:
    kind = row["verdict"] if row["verdict"] in ("better", "worse") else None if row["seeds"] else "lost"
    icon = tag("span", ICONS[row["verdict"]], aria_hidden="true") if row["verdict"] in ICONS else None
    return tag("span", icon, _words(row), class_=kind)


def _difference(row: dict[str, Any], form: Form) -> Html:
    interval = None
    if row["difference_low"] is not None:
        ends = f"[{form(row['difference_low'])}, {form(row['difference_high'])}]"
        interval = tag("span", ends, class_="interval")
    return number(row["difference"], form, interval)


def _lost(comparison: Comparison, level: int) -> Html | None:
    """Recipes that were refused, diverged or raised, and trials that did."""
    lines = []
    outside = [comparison.reference] if comparison.reference else []
    for entry in (*comparison.entries, *outside):
        label = entry.recipe.label
        if entry.status in ("refused", "unfinished"):
            reason = entry.reason or f"{counted(entry.missing, 'run')} still to do"
            lines.append(line(label, words(entry.status), words(reason), filtered=False))
            continue
        for role, runs in (("trial", entry.tuning), ("seed", entry.evaluation)):
            if lost := [run for run in runs if not run.finished]:
                places = sorted({run.trial if role == "trial" else run.seed for run in lost})
                where = f"{role}{'s' if len(places) > 1 else ''} {listed(places)}"
                state = " and ".join(sorted({run.status for run in lost}))
                reason = lost[0].reason or ""
                lines.append(line(label, words(f"{state}: {where}"), words(reason), filtered=False))
    if not lines:
        return None
    head = "What did not run, or not to the end"
    return card(head, level, table(head, [*map(column, ("recipe", "what became of it", "reason"))], lines))


def _searched(comparison: Comparison, level: int) -> Html:
    plan, place_of = comparison.plan, places(comparison)
    runnable = [entry for entry in comparison.entries if entry.recipe.refused is None]
    form = form_of(score for entry in runnable for score in entry.scores)
    lines = []
    for entry in runnable:
        ranges = "; ".join(f"{key} {span}" for key, span in entry.recipe.space.items())
        tally = Counter(entry.trials)
        states = ", ".join(f"{tally[state]} {state}" for state in STATES if tally[state])
        untuned = " (untuned)" if entry.chosen == 0 else ""
        chosen = "none" if entry.chosen is None else f"trial {entry.chosen}{untuned}"
        score = entry.scores[entry.chosen] if entry.chosen is not None and entry.scores else None
        lines.append(
            line(
                entry.recipe.label,
                words(ranges if plan.tuning else "nothing"),
                tag("td", states),
                tag("td", chosen),
                words(settings(entry.hyperparameters) or "its defaults"),
                number(score, form),
                look=mark(place_of[entry.recipe.label]),
            )
        )
    heads = [
        *map(column, ("recipe", "searched", "trials", "chosen", "values")),
        column(f"validation {title(plan.metric)}", "number"),
    ]
    head = "What was searched, and what was chosen"
    nothing = "Nothing was tuned: every recipe ran with its defaults."
    note = None if plan.tuning else tag("p", nothing, class_="note")
    return card(head, level, note, table(head, heads, lines))


def _columns(comparison: Comparison, detail: Detail, level: int) -> Html | None:
    """What was done with each column of a table."""
    found = comparison.plan.columns
    if not found:
        return None
    lines = []
    for one in found[: detail.columns]:
        missing = one.get("missing")
        share = 100 * missing if isinstance(missing, int | float) else None
        name = tag("th", one.get("name", ""), scope="row")
        cells = [
            tag("td", one.get("kind", "")),
            words(one.get("treatment", "")),
            number(share, "{:.1f} %".format),
        ]
        lines.append(tag("tr", name, *cells))
    heads = [
        *(column(head, sorts=True) for head in ("column", "kind", "what was done with it")),
        column("missing", "number", sorts=True),
    ]
    note = "Medians, scales, categories and vocabularies are fitted on the training rows of each split alone."
    left = len(found) - len(lines)
    inside = tag(
        "details",
        tag("summary", f"{counted(len(found), 'column')}"),
        table("Columns of the data", heads, lines, sorts=True),
        tag("p", f"{counted(left, 'more column')} not shown.", class_="note") if left else None,
        open=len(found) <= 25,
    )
    return card("The data, column by column", level, tag("p", note, class_="note"), inside)


# ---------------------------------------------------------------------------------------------------- charts


def _charts(comparison: Comparison, board: Board, place: str, detail: Detail, level: int) -> Html | None:
    plan, metric = comparison.plan, title(comparison.plan.metric)
    shown = [row for row in board if row["seeds"]]
    if not shown:
        return None
    key = key_of(comparison, [row["recipe"] for row in shown])
    figures = []
    if any(row["difference"] is not None for row in shown):
        band = (
            f"the shaded band of ±{plan.band:g} counts as practically equal."
            if plan.band
            else "no difference was declared too small to matter (band=)."
        )
        note = f"Minus {comparison.baseline.recipe.label}. Bars are 95 % intervals; {band}"
        spoken = _spoken_differences(comparison, shown)
        figures.append(figure(f"{place}-difference", "Difference to the baseline", note, spoken, level))
    note = f"Test {metric}: a mark a seed{' (each with its own split)' if plan.resplits else ''}, a bar at the mean."
    if comparison.reference is not None and comparison.reference.finished:
        note += f" The dashed line is the mean of {comparison.reference.recipe.label}, from outside."
    spoken = f"Test {metric} of every seed; the numbers follow in a table."
    more = _seed_table(comparison, shown)
    figures.append(figure(f"{place}-seeds", "Every seed", note, spoken, level, more=more))
    if detail.points and any(run.curve for entry in comparison.entries for run in entry.finished):
        note = "Mean over the evaluation seeds, with a band of one standard deviation."
        spoken = f"Curves by epoch; a table of validation {metric} follows."
        choice = tag("select", id=f"{place}-metric", aria_label="what the curves show")
        numbers = _curve_table(comparison, shown)
        figures.append(
            figure(
                *(f"{place}-curves", "Learning curves", note, spoken, level),
                control=choice,
                key=key,
                more=numbers,
            )
        )
    note = (
        "Wall time of a run with its evaluation after each epoch, on one thread of the machine that ran it; bars "
        "are 95 % intervals."
    )
    pairs = "; ".join(f"{row['recipe']} {row[plan.metric]:.4g} after {row['seconds']:.2g} s" for row in shown)
    spoken = f"Test {metric} against seconds a run: {pairs}."
    figures.append(figure(f"{place}-time", "Quality and time", note, spoken, level, key=key))
    if trials := trials_of(comparison, detail.trials):
        note = (
            f"Every trial by its learning rate: mean validation {metric} over "
            f"{counted(len(plan.tuning), 'tuning seed')}. Hollow marks are trials that were stopped when they "
            "could no longer be chosen; the large ringed mark is the chosen one."
        )
        spoken = f"Validation {metric} of every trial; the numbers follow in a table."
        more = _trial_table(comparison, trials)
        figures.append(figure(f"{place}-tuning", "Tuning", note, spoken, level, key=key, more=more))
    return tag("div", *figures, class_="grid")


def _spoken_differences(comparison: Comparison, shown: Board) -> str:
    parts = []
    for row in shown:
        if row["difference"] is None:
            continue
        ends = ""
        if row["difference_low"] is not None:
            ends = f", interval {row['difference_low']:+.4g} to {row['difference_high']:+.4g}"
        parts.append(f"{row['recipe']} {row['difference']:+.4g}{ends}, {row['verdict']}")
    what = f"Difference in test {title(comparison.plan.metric)} to {comparison.baseline.recipe.label}"
    return f"{what}: {'; '.join(parts)}."


def _seed_table(comparison: Comparison, shown: Board) -> Html:
    found = {entry.recipe.label: entry.values(comparison.metric) for entry in comparison.entries}
    values = {row["recipe"]: found[row["recipe"]] for row in shown}
    if comparison.reference is not None and comparison.reference.finished:
        values[comparison.reference.recipe.label] = comparison.reference.values(comparison.metric)
    form = form_of(value for own in values.values() for value in own.values())
    heads = [column("recipe"), *(column(f"seed {seed}", "number") for seed in comparison.seeds)]
    lines = [
        line(label, *(number(own.get(seed), form) for seed in comparison.seeds))
        for label, own in values.items()
    ]
    return folded(table(f"Test {title(comparison.plan.metric)} of every seed", heads, lines))


def _curve_table(comparison: Comparison, shown: Board) -> Html | None:
    entries = {entry.recipe.label: entry for entry in comparison.entries}
    name = f"validation_{comparison.plan.metric}"
    found = {row["recipe"]: curves_of(entries[row["recipe"]], [name], 6).get(name) for row in shown}
    curves = {label: curve for label, curve in found.items() if curve}
    if not curves:
        return None
    form = form_of(value for curve in curves.values() for value in curve["mean"])
    epochs = next(iter(curves.values()))["epoch"]
    heads = [column("recipe"), *(column(f"epoch {epoch:g}", "number") for epoch in epochs)]
    lines = [
        line(label, *(number(value, form) for value in curve["mean"])) for label, curve in curves.items()
    ]
    return folded(table(f"Validation {title(comparison.plan.metric)}, mean over seeds", heads, lines))


def _trial_table(comparison: Comparison, trials: dict[str, list[dict[str, Any]]]) -> Html:
    form = form_of(trial["score"] for own in trials.values() for trial in own)
    heads = [
        *map(column, ("recipe", "trial", "state", "values")),
        column("seeds seen", "number"),
        column(f"validation {title(comparison.plan.metric)}", "number"),
    ]
    lines = [
        line(
            label,
            tag("td", f"{trial['trial']}{', chosen' if trial['chosen'] else ''}"),
            tag("td", trial["state"]),
            words(trial["settings"]),
            number(trial["seeds"], "{:g}".format),
            number(trial["score"], form),
        )
        for label, own in trials.items()
        for trial in own
    ]
    return folded(table("Trials", heads, lines))
