"""HTML in which every text is escaped unless it is markup already, and the pieces of the page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape

VOID = frozenset({"input", "path", "wbr"})


class Html(str):
    """Text that is markup."""

    __slots__ = ()


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element.

    Args:
        name: of the element.
        children: what stands in it: :class:`Html` as it is, anything else as text, ``None`` not at all.
        attributes: ``class_`` stands for ``class`` and ``aria_label`` for ``aria-label``; ``True`` for an
            attribute without a value, ``None`` and ``False`` for none.

    Example:
        >>> tag("td", "a < b", class_="wide", hidden=False, data_value='"')
        '<td class="wide" data-value="&quot;">a &lt; b</td>'
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Parts one after another, each escaped unless it is markup."""
    return Html(
        "".join(part if isinstance(part, Html) else escape(str(part)) for part in parts if part is not None)
    )


def named(label: str) -> Html:
    """A name that may be broken where it has punctuation."""
    parts = re.findall(r"[^._:+,/=]*[._:+,/=]+|[^._:+,/=]+", label)
    return tag("span", join(piece for part in parts for piece in (part, tag("wbr"))))


def card(head: str, level: int, *inside: object, kind: str = "", place: str | None = None) -> Html:
    """A section under its heading; ``place`` is an id to which a link leads."""
    return tag(
        "section",
        tag(f"h{level}", head),
        *inside,
        class_=f"card {kind}".strip(),
        id=place,
        tabindex=None if place is None else "-1",
    )


def figure(
    place: str,
    head: str,
    note: str,
    spoken: str,
    level: int,
    *,
    control: Html | None = None,
    key: Html | None = None,
    more: Html | None = None,
) -> Html:
    """A chart.

    Args:
        place: its id; the script draws into it.
        head: its heading.
        note: how to read it.
        spoken: the same for those who do not see it.
        level: of the heading.
        control: stands beside the heading.
        key: of its marks.
        more: what stands below it.
    """
    whole = tag(
        "div",
        tag("div", tag(f"h{level}", head), control, class_="head"),
        tag("p", note, class_="note"),
        tag("div", id=place, class_="chart", role="img", aria_label=spoken),
        key,
        class_="plot",
    )
    return tag("section", whole, more, class_="card")


def table(
    caption: str,
    heads: Sequence[Html],
    lines: Sequence[Html],
    foot: Html | None = None,
    *,
    sorts: bool = False,
) -> Html:
    """A table in a box that scrolls by itself, also from the keyboard."""
    inside = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *heads)),
        tag("tbody", *lines),
        foot,
        class_="sortable" if sorts else None,
    )
    return tag("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption)


def column(head: str, kind: str | None = None, *, sorts: bool = False) -> Html:
    """The head of a column; a button in it sorts by it."""
    if not sorts:
        return tag("th", head, scope="col", class_=kind)
    return tag("th", tag("button", head, type="button"), scope="col", class_=kind, aria_sort="none")


def line(
    label: str, *cells: Html, look: Html | None = None, under: Html | None = None, filtered: bool = True
) -> Html:
    """The row of a recipe, headed by its mark, its name and what stands under that; the filter hides it."""
    first = tag(
        "th",
        look,
        named(label),
        None if under is None else tag("span", under, class_="under"),
        class_="recipe" if look else None,
        scope="row",
        data_value=label,
    )
    return tag("tr", first, *cells, data_recipe=label if filtered else None)


def number(value: float | None, form: Callable[[float], str], after: Html | None = None) -> Html:
    """The cell of a number, empty where there is none."""
    if value is None:
        return tag("td", class_="number", data_value="")
    inside = (form(value),) if after is None else (form(value), " ", after)
    return tag("td", *inside, class_="number", data_value=repr(value))


def words(text: object) -> Html:
    """The cell of a sentence."""
    return tag("td", text, class_="wide")


def folded(what: Html) -> Html:
    """The numbers behind a chart, for those who ask."""
    return tag("details", tag("summary", "The numbers"), what, class_="numbers")


def code(text: str) -> Html:
    """Something to type, with a button that copies it."""
    button = tag("button", "Copy", type="button", class_="copy")
    return tag("div", tag("pre", tag("code", text)), button, class_="code")
