"""The page of several data sets, section by section."""

from __future__ import annotations

from telos.lab._charts import Detail, mark, places
from telos.lab._markup import Html, card, column, figure, join, line, number, table, tag, words
from telos.lab._sections import SECONDS, filter_box, how, key_of, repeat, runs_of, sections, top
from telos.lab._sentences import cautions, counted, duration, form_of, headline, suite_headline, title
from telos.lab.leaderboard import conclusion, suite_titles
from telos.trials import Comparison
from telos.trials.suite import MINIMUM_DATA_SETS, Suite

WHOLE = "{:d}".format


def suite_body(suite: Suite, store: str | None, detail: Detail) -> Html:
    """Everything between the first heading and the scripts."""
    names, standings = suite_titles(suite), suite.standings()
    first = suite.comparisons[0].plan
    runs = [run for comparison in suite.comparisons for run in runs_of(comparison)]
    best = f"the recipe with the first mean rank ({standings[0].label}) on {names[0]}" if standings else None
    facts: dict[str, object] = {
        "data sets": len(names),
        "recipes ranked": len(standings),
        "evaluation seeds": first.seeds,
        "trials a recipe": first.trials,
        "training runs": f"{len(runs):,}",
        "of training, in all": duration(sum(run.seconds for run in runs)),
    }
    return join(
        [
            top(
                f"{counted(len(names), 'data set')}: {counted(len(first.recipes), 'recipe')} compared",
                ", ".join(names),
                suite_headline(suite),
                suite.conclusion(),
                facts,
            ),
            _ranks(suite),
            _diagrams(suite),
            _left_out(suite),
            tag("h2", "Each data set", class_="tasks"),
            *(
                _task(name, comparison, place, detail)
                for place, (name, comparison) in enumerate(zip(names, suite.comparisons, strict=True))
            ),
            how(suite.comparisons[0]),
            repeat(first, store, best),
        ]
    )


def _ranks(suite: Suite) -> Html:
    standings, place_of = suite.standings(), places(suite.comparisons[0])
    scores = suite.scores() if standings else {}
    metrics = " or ".join(sorted({title(comparison.plan.metric) for comparison in suite.comparisons}))
    heads = [
        column("recipe", sorts=True),
        *(column(head, "number", sorts=True) for head in ("mean rank", "better", "worse", "score")),
        *(column(name, "number", sorts=True) for name in suite_titles(suite)),
    ]
    forms = [form_of(s.means[task] for s in standings) for task in range(len(suite.comparisons))]
    lines = [
        line(
            s.label,
            number(s.mean_rank, SECONDS),
            number(s.better, WHOLE),
            number(s.worse, WHOLE),
            number(scores[s.label], SECONDS),
            *(
                number(mean, form, tag("span", f"({rank:g})", class_="interval"))
                for mean, rank, form in zip(s.means, s.ranks, forms, strict=True)
            ),
            look=mark(place_of[s.label]),
        )
        for s in standings
    ]
    note = (
        f"Mean test {metrics} on each data set with the rank in brackets; rank 1 is first. Better and worse count "
        f"the data sets with such a verdict against {suite.baseline}. The score is the area under the performance "
        "profile, from 0 to 1."
    )
    return card(
        "Ranks",
        2,
        tag("p", note, class_="note"),
        filter_box(),
        table("Recipes in the order of mean rank over the data sets", heads, lines, sorts=True),
        place="leaderboard",
    )


def _diagrams(suite: Suite) -> Html | None:
    labels = [standing.label for standing in suite.standings()]
    if not labels:
        return None
    note = (
        "The share of data sets on which a recipe reaches what the baseline ends with, in validation metric, "
        "within a multiple of the epochs that the fastest recipe needs."
    )
    areas = ", ".join(f"{label} {score:.2f}" for label, score in suite.scores().items())
    profiles = figure(
        "suite-profiles",
        "Performance profiles",
        note,
        f"Performance profiles; the areas under them: {areas}.",
        2,
        key=key_of(suite.comparisons[0], labels),
    )
    return tag("div", _critical_difference(suite), profiles, class_="grid")


def _critical_difference(suite: Suite) -> Html:
    head, standings = "Critical differences", suite.standings()
    distance, tested = suite.critical_difference(), suite.friedman()
    if distance is None or tested is None:
        here = f"{counted(len(suite.comparisons), 'data set')} and {counted(len(standings), 'recipe')}"
        return card(
            head,
            2,
            tag(
                "p",
                f"There is no critical-difference diagram: ranks can be tested with {MINIMUM_DATA_SETS} or more "
                f"data sets and two or more recipes, and here are {here}.",
            ),
        )
    if tested.p_value < 0.05:
        says = "ranks differ by more than chance"
    else:
        says = "ranks do not differ by more than chance, so no two recipes count as different"
    note = (
        f"Friedman's test: {says} (p = {tested.p_value:.2g}). Nemenyi's: two recipes differ when their mean ranks "
        f"lie {distance:.2f} or more apart; a thick bar joins those that the ranks cannot tell apart."
    )
    ranks = ", ".join(f"{standing.label} {standing.mean_rank:.2f}" for standing in standings)
    joined = "; ".join(" and ".join(group) for group in suite.groups()) or "none"
    spoken = f"Mean ranks: {ranks}. Critical difference: {distance:.2f}. Not told apart: {joined}."
    return figure("suite-ranks", head, note, spoken, 2)


def _left_out(suite: Suite) -> Html | None:
    if not suite.left_out:
        return None
    lines = [line(label, words(why), filtered=False) for label, why in suite.left_out.items()]
    head = "Left out of the ranks"
    return card(head, 2, table(head, [column("recipe"), column("why")], lines))


def _task(name: str, comparison: Comparison, place: int, detail: Detail) -> Html:
    """A data set of its own, behind its name."""
    known = cautions(comparison)
    notice = f" ({counted(len(known), 'thing')} worth knowing first)" if known else ""
    return tag(
        "details",
        tag("summary", tag("h2", name), tag("span", headline(comparison) + notice, class_="soft")),
        tag("p", comparison.plan.description, class_="soft") if comparison.plan.description else None,
        tag("p", conclusion(comparison), class_="lead"),
        tag("p", comparison.interval_note, class_="note"),
        *sections(comparison, place, detail, level=3, alone=False),
        class_="task",
    )
