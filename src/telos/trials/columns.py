"""What a column of a table is: number, boolean, date, category, text, or nothing to learn from.

A column's kind is decided once for the whole file, without looking at the target. What is *fitted* (medians,
scales, categories, vocabularies) is fitted on each training split alone; see :mod:`telos.trials.tables`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from telos.trials._words import UsageError

# cells that say "nothing here"
MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "?")
MOST = 0.95  # a column is of a kind when this share of its cells is; the others count as missing
HIGHEST = 1e100  # the square of a larger number has no place in double precision
FEWEST = 20  # rows below which distinct values prove no identifier
TRUE, FALSE = ("true", "yes", "t", "y"), ("false", "no", "f", "n")

_ZEROS = r"^[+-]?0\d{2,}$"
_DECORATED = r"^[+-]?[$€£]?[+-]?\d{1,3}(,\d{3})+(\.\d+)?%?$|^[+-]?[$€£][+-]?\d+(\.\d+)?$|^[+-]?\d+(\.\d+)?%$"
_DECIMAL_COMMA = r"^[+-]?\d+,\d+$|^[+-]?\d{1,3}(\.\d{3})+(,\d+)?$|^[+-]?\d+$"
_UUID = r"^[0-9a-fA-F]{8}-?([0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}$"
_ID_NAME = re.compile(r"(?:^|[\s_.-])(?i:id|uuid|guid)$|[a-z](?:ID|Id)$")
_SPACELESS = r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]"  # kana, Chinese characters, Thai
_DATES = (
    (r"^\d{4}-\d{1,2}-\d{1,2}", ("%Y-%m-%d",)),
    (r"^\d{4}/\d{1,2}/\d{1,2}", ("%Y/%m/%d",)),
    (r"^\d{1,2}\.\d{1,2}\.\d{4}", ("%d.%m.%Y",)),
    (r"^\d{1,2}/\d{1,2}/\d{4}", ("%m/%d/%Y", "%d/%m/%Y")),
)
_TIMES = ("", " %H:%M", " %H:%M:%S%.f")


@dataclass
class Typed:
    """A column after it was read.

    Attributes:
        name: of the column.
        kind: ``number``, ``boolean``, ``date``, ``string``, ``empty`` or ``nested``.
        values: Float64, Datetime or String, with null for what is missing.
        whole: whether all numbers are whole.
        notices: what was changed on the way.
    """

    name: str
    kind: str
    values: pl.Series
    whole: bool = False
    notices: list[str] = field(default_factory=list)


def typed(raw: pl.Series, main: int, *, decimal_comma: bool = False) -> Typed:
    """Find out what the cells of a column are.

    Args:
        raw: as the file has it; strings from a CSV file.
        main: how many of the first rows decide; those after them come from a test file.
        decimal_comma: whether ``1,5`` is a number.
    """
    name, dtype = raw.name, raw.dtype
    if dtype == pl.Null:
        return Typed(name, "empty", raw.cast(pl.Float64))
    if dtype == pl.Boolean:
        return Typed(name, "boolean", raw.cast(pl.Float64), whole=True)
    if dtype.is_numeric():
        return _finite(Typed(name, "number", raw.cast(pl.Float64)), main)
    if dtype in (pl.Date, pl.Datetime):
        moments = raw.dt.replace_time_zone(None) if getattr(dtype, "time_zone", None) else raw
        return _present(Typed(name, "date", moments.cast(pl.Datetime("us"))), main)
    if dtype == pl.Duration:
        return _finite(Typed(name, "number", raw.dt.total_microseconds().cast(pl.Float64) / 1e6), main)
    if dtype == pl.Time:
        return _finite(Typed(name, "number", raw.cast(pl.Int64).cast(pl.Float64) / 1e9), main)
    if dtype in (pl.Categorical, pl.Enum):
        raw, dtype = raw.cast(pl.String), pl.String()
    if dtype != pl.String:
        return Typed(name, "nested", raw)
    return _present(_parsed(name, tidied(raw), main, decimal_comma), main)


def tidied(raw: pl.Series) -> pl.Series:
    """Strings without blanks around them, and null for what says that nothing is there."""
    cells = raw.str.strip_chars()
    return cells.set(cells.is_in(MISSING), None)


def _parsed(name: str, cells: pl.Series, main: int, decimal_comma: bool) -> Typed:
    known = cells.head(main).drop_nulls()
    if not len(known):
        return Typed(name, "empty", cells)
    for kind, parse in (("boolean", _booleans), ("number", _numbers), ("date", _dates)):
        values, said = parse(cells, main, decimal_comma)
        if values is None:
            continue
        found = Typed(name, kind, values, kind == "boolean", [f"{name}: {said}"] if said else [])
        lost = cells.filter(cells.is_not_null() & values.is_null())
        if len(lost):
            found.notices.append(
                f"{name}: cells that are no {kind}s count as missing ({len(lost):,}, such as {_short(lost[0])})"
            )
        return _finite(found, main) if kind == "number" else found
    return Typed(name, "string", cells)


def _present(found: Typed, main: int) -> Typed:
    if found.values.head(main).null_count() == main:
        found.kind = "empty"
    return found


def _finite(found: Typed, main: int) -> Typed:
    """What is infinite, or as good as that, and NaN become missing; is every number whole?"""
    cells = found.values.to_numpy(writable=True)  # null is NaN there
    infinite = np.abs(cells) > HIGHEST
    if infinite.any():
        found.notices.append(f"{found.name}: infinite cells count as missing ({infinite.sum():,})")
        cells[infinite] = np.nan
    found.values = pl.Series(found.name, cells, nan_to_null=True)
    known = cells[:main][~np.isnan(cells[:main])]
    found.whole = bool(len(known)) and bool((known == np.round(known)).all())
    return _present(found, main)


def _booleans(cells: pl.Series, main: int, decimal_comma: bool) -> tuple[pl.Series | None, str]:
    # a column of the one word "yes" and blanks is a category: what is missing there says something
    known = cells.head(main).drop_nulls()
    if known.head(100).n_unique() > 4:  # most columns are not, and this is quick
        return None, ""
    words = sorted(known.unique().str.to_lowercase().unique())
    if len(words) != 2 or not (words[0] in FALSE and words[1] in TRUE):
        return None, ""
    lower = cells.str.to_lowercase()
    return lower.is_in(TRUE).cast(pl.Float64).set(~lower.is_in(TRUE + FALSE), None).set(
        cells.is_null(), None
    ), ""


def _numbers(cells: pl.Series, main: int, decimal_comma: bool) -> tuple[pl.Series | None, str]:
    known = cells.head(main).drop_nulls()
    # leading zeros are part of a code (a postcode, say), not of a number
    if known.str.contains(_ZEROS).any():
        return None, ""
    comma = known.str.contains(",", literal=True).any()
    if decimal_comma and comma and known.str.contains(_DECIMAL_COMMA).all():
        plain = cells.str.replace_all(".", "", literal=True).str.replace(",", ".", literal=True)
        return plain.cast(pl.Float64, strict=False), "read with decimal commas"
    numbers = cells.cast(pl.Float64, strict=False)
    if _mostly(numbers, cells, main):
        return numbers, ""
    plain_too = (
        known.str.contains(_DECORATED)
        | numbers.head(main).filter(cells.head(main).is_not_null()).is_not_null()
    )
    if plain_too.all():
        plain = cells.str.replace_all(r"[$€£,%]", "").cast(pl.Float64, strict=False)
        return plain, "read as numbers without their signs for money, thousands and per cent"
    return None, ""


def _mostly(parsed: pl.Series, cells: pl.Series, main: int) -> bool:
    """All cells of the deciding rows, or nearly all where there are many values."""
    known = len(cells.head(main).drop_nulls())
    own = parsed.head(main).drop_nulls()
    return len(own) == known or (len(own) >= MOST * known and own.n_unique() > FEWEST)


def _dates(cells: pl.Series, main: int, decimal_comma: bool) -> tuple[pl.Series | None, str]:
    sample = cells.head(main).drop_nulls().head(200)
    for pattern, days in _DATES:
        if sample.str.contains(pattern).mean() < MOST:  # type: ignore[operator]
            continue
        tidy, fits = _tidy_moments(cells), {}
        for day in days:
            moments = [tidy.str.to_datetime(day + clock, time_unit="us", strict=False) for clock in _TIMES]
            fits[day] = pl.select(pl.coalesce(moments)).to_series().alias(cells.name)
        best = max(days, key=lambda day: len(fits[day].head(main).drop_nulls()))
        if _mostly(fits[best], cells, main):
            return fits[best], "read as month/day/year" if best == "%m/%d/%Y" else ""
    return None, ""


def _tidy_moments(cells: pl.Series) -> pl.Series:
    """``T`` to a blank; a zone is left off, as in one column it rarely changes."""
    return cells.str.replace(r"^(\S+?)T(\d)", "${1} ${2}").str.replace(r"\s*(Z|UTC|[+-]\d{2}:?\d{2})$", "")


def calendar(name: str, moments: pl.Series) -> dict[str, pl.Series]:
    """The numbers that a date is expanded into: elapsed days, year, and the cycles of month, week and day."""
    parts = {
        "days": moments.dt.epoch("us").cast(pl.Float64) / 86_400e6,
        "year": moments.dt.year().cast(pl.Float64),
        "day of month": moments.dt.day().cast(pl.Float64),
    }
    cycles = {"month": (moments.dt.month(), 12), "day of week": (moments.dt.weekday(), 7)}
    seconds = moments.dt.hour().cast(pl.Int64) * 3600 + moments.dt.minute() * 60 + moments.dt.second()
    if (seconds.drop_nulls() != 0).any():
        cycles["time of day"] = (seconds, 86_400)
    for cycle, (place, length) in cycles.items():
        angle = place.cast(pl.Float64) * (2 * 3.141592653589793 / length)
        parts[f"{cycle} (sine)"], parts[f"{cycle} (cosine)"] = angle.sin(), angle.cos()
    return {f"{name}: {part}": values.alias(f"{name}: {part}") for part, values in parts.items()}


def identifier(column: Typed, main: int) -> str | None:
    """Why a column looks like an identifier, or ``None``. Missing cells do not hide one."""
    values = column.values.head(main)
    known = values.drop_nulls()
    if len(known) < FEWEST:
        return None
    distinct = known.n_unique()
    named = _ID_NAME.search(column.name) is not None
    if column.kind == "string":
        if known.head(1000).str.contains(_UUID).mean() >= MOST:  # type: ignore[operator]
            return "it holds UUIDs"
        if distinct >= MOST * len(known) and words(known) < 2 and not spaceless(known):
            return f"{_count(distinct, known)} of its values differ"
    if column.kind == "number" and column.whole:
        if distinct == len(known):
            steps = known.diff().drop_nulls()
            if (steps > 0).all() or (steps < 0).all():
                return "its values are whole numbers in order, each once"
            if float(known.max() - known.min()) < 1.1 * main:  # type: ignore[operator, arg-type]
                return "its values are the whole numbers of a range, each once"
        if named and distinct >= MOST * len(known):
            return f"{_count(distinct, known)} of its values differ"
    discrete = column.kind == "string" or (column.kind == "number" and column.whole)
    if named and discrete and distinct > FEWEST and len(known) < 5 * distinct:
        return "few rows share a value; group= with it keeps those rows in one split"
    return None


def coded(column: Typed) -> bool:
    """Whether a column of whole numbers is named as an identifier: its numbers have no order to learn from."""
    return column.kind == "number" and column.whole and _ID_NAME.search(column.name) is not None


def is_text(known: pl.Series) -> bool:
    """Whether strings are sentences rather than names of categories."""
    distinct = known.n_unique()
    if distinct <= FEWEST:
        return False
    share, length = distinct / len(known), words(known)
    return (share >= 0.5 and (length >= 2 or spaceless(known))) or (share >= 0.05 and length >= 5)


def words(known: pl.Series) -> float:
    """The mean number of words of a cell."""
    return float(known.str.count_matches(r"\S+").mean())  # type: ignore[arg-type]


def spaceless(known: pl.Series) -> bool:
    """Whether the strings are in a script that puts no blanks between words."""
    letters = float(known.str.len_chars().mean())  # type: ignore[arg-type]
    return letters >= 4 and float(known.str.count_matches(_SPACELESS).mean()) >= 0.3 * letters  # type: ignore[arg-type]


def moments_or_numbers(column: Typed) -> pl.Series:
    """A column to order rows by.

    Raises:
        telos.trials.UsageError: for what has no order.
    """
    if column.kind == "date":
        return column.values.dt.epoch("us").cast(pl.Float64)
    if column.kind == "number":
        return column.values
    example = f", such as {_short(column.values.drop_nulls()[0])}" if column.kind == "string" else ""
    raise UsageError(
        f"time={column.name} must hold dates or numbers, and it is a column of kind {column.kind}{example}"
    )


def _count(distinct: int, known: pl.Series) -> str:
    return "all" if distinct == len(known) else f"{distinct:,} of {len(known):,}"


def _short(cell: object) -> str:
    text = str(cell)
    return repr(text if len(text) <= 30 else text[:27] + "...")
