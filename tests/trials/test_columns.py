"""What a column is, from its cells alone."""

import datetime

import polars as pl
import pytest

from telos.trials import UsageError
from telos.trials.columns import calendar, identifier, is_text, moments_or_numbers, spaceless, typed


def read(cells: list, name: str = "x", **options):
    return typed(pl.Series(name, cells, strict=False), options.pop("main", len(cells)), **options)


MANY = [str(number) for number in range(100)]


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (["1", " 2.5 ", "1e3", "-4", "+.5"], "number", [1.0, 2.5, 1000.0, -4.0, 0.5]),
        (["1", "", "NA", "nan", "NULL", "?", "n/a"], "number", [1.0] + 6 * [None]),
        (["$1,200.50", "-$3", "45", "7%"], "number", [1200.5, -3.0, 45.0, 7.0]),
        (["1,200", "3"], "number", [1200.0, 3.0]),
        (["08", "12"], "number", [8.0, 12.0]),
        (["01234", "99501"], "string", ["01234", "99501"]),
        (["1", "2", "x"], "string", ["1", "2", "x"]),
        (["yes", "No", None], "boolean", [1.0, 0.0, None]),
        (["TRUE", "false"], "boolean", [1.0, 0.0]),
        (["t", "yes"], "string", ["t", "yes"]),
        ([True, None], "boolean", [1.0, None]),
        ([1, 2], "number", [1.0, 2.0]),
        ([datetime.timedelta(hours=1)], "number", [3600.0]),
        ([datetime.time(1)], "number", [3600.0]),
        ([None, None], "empty", [None, None]),
        (["", "NA"], "empty", [None, None]),
        ([float("nan")], "empty", [None]),
        (["a", "?"], "string", ["a", None]),
    ],
)
def test_kinds(cells: list, kind: str, values: list) -> None:
    found = read(cells)
    assert (found.kind, found.values.to_list()) == (kind, values)


def test_infinite_cells_are_missing_and_said_to_be() -> None:
    for cells in (["1.5", "inf", "-Infinity"], [1.5, float("inf"), float("-inf")]):
        found = read(cells)
        assert found.values.to_list() == [1.5, None, None]
        assert found.notices == ["x: infinite cells count as missing (2)"]


def test_a_few_words_among_many_numbers_are_missing_and_said_to_be() -> None:
    found = read([*MANY, "unknown"])
    assert found.kind == "number"
    assert found.values.to_list()[-2:] == [99.0, None]
    assert found.notices == ["x: cells that are no numbers count as missing (1, such as 'unknown')"]
    # among few values a word is a category of its own
    assert read(["1", "2"] * 50 + ["unknown"]).kind == "string"
    # and many words make it no number
    assert read([*MANY, *["unknown"] * 10]).kind == "string"


def test_decimal_commas_only_where_the_file_may_have_them() -> None:
    assert read(["1,5", "1.234,5", "3"], decimal_comma=True).values.to_list() == [1.5, 1234.5, 3.0]
    assert read(["1,5", "2,25"]).kind == "string"


@pytest.mark.parametrize(
    ("cells", "days"),
    [
        (["2024-01-31", "2024-03-02"], [(2024, 1, 31), (2024, 3, 2)]),
        (
            ["2024-01-31T12:00:00Z", "2024-03-02 23:59", "2024-03-02T01:02:03.5+02:00"],
            [(2024, 1, 31), (2024, 3, 2)],
        ),
        (["2024/01/31", ""], [(2024, 1, 31), None]),
        (["31.01.2024", "2.3.2024 12:30"], [(2024, 1, 31), (2024, 3, 2)]),
        (["1/31/2024", "3/2/2024"], [(2024, 1, 31), (2024, 3, 2)]),
        (["31/1/2024", "2/3/2024"], [(2024, 1, 31), (2024, 3, 2)]),
        ([datetime.date(2024, 1, 31), None], [(2024, 1, 31), None]),
    ],
)
def test_dates(cells: list, days: list) -> None:
    found = read(cells)
    assert found.kind == "date"
    seen = [None if moment is None else (moment.year, moment.month, moment.day) for moment in found.values]
    assert seen[: len(days)] == days


def test_an_ambiguous_date_says_how_it_was_read() -> None:
    assert read(["1/2/2024", "3/4/2024"]).notices == ["x: read as month/day/year"]
    assert read(["2024-01-02", "not a date"]).kind == "string"


def test_a_date_becomes_elapsed_days_and_places_in_cycles() -> None:
    found = read(["1970-01-02 06:00", "2024-03-31", None])
    parts = {name: values.to_list() for name, values in calendar("x", found.values).items()}
    assert parts["x: days"][:2] == [1.25, 19813.0]
    assert parts["x: year"] == [1970.0, 2024.0, None]
    assert parts["x: month (sine)"][1] == pytest.approx(1.0)  # March: a quarter of the year
    assert parts["x: time of day (sine)"][0] == pytest.approx(1.0)  # six in the morning
    assert "x: time of day (sine)" not in calendar("x", read(["2024-03-31"]).values)


def test_rows_of_a_test_file_do_not_decide() -> None:
    found = read(["1", "2.5", "x", "3"], main=2)
    assert found.kind == "number"
    assert found.values.to_list() == [1.0, 2.5, None, 3.0]
    assert found.notices == ["x: cells that are no numbers count as missing (1, such as 'x')"]
    assert read([None, None, "y"], main=2).kind == "empty"
    found = read(["yes", "no", "maybe"], main=2)
    assert found.values.to_list() == [1.0, 0.0, None]
    assert found.notices == ["x: cells that are no booleans count as missing (1, such as 'maybe')"]


@pytest.mark.parametrize(
    ("cells", "name"),
    [
        (list(range(50)), "x"),
        (list(range(50, 0, -1)), "x"),
        ([None if place % 20 == 0 else place for place in range(100)], "x"),
        ([f"S{place:04d}" for place in range(50)], "x"),
        ([f"{place:08x}-1234-1234-1234-123456789abc" for place in range(25)] * 2, "x"),
        ([(37 * place) % 101 for place in range(101)], "row"),  # a range in another order
        ([1000 * place + place % 7 for place in range(50, 0, -1)] + [3], "customer_id"),
        ([place // 2 for place in range(60)], "patientId"),
    ],
)
def test_identifiers(cells: list, name: str) -> None:
    assert identifier(read(cells, name), len(cells)) is not None


@pytest.mark.parametrize(
    ("cells", "name"),
    [
        (list(range(10)), "x"),  # too few rows to tell
        ([1, 1] * 25, "x"),
        ([place / 7 for place in range(50)], "x"),  # in order, but no whole numbers
        ([(place * place) % 1009 for place in range(80)], "price"),
        ([f"good thing number {place} to read" for place in range(50)], "x"),
        ([place // 10 for place in range(600)], "store_id"),
        ([round(1.5 + 0.01 * place, 2) for place in range(60)] * 2, "malic_acid"),
    ],
)
def test_no_identifiers(cells: list, name: str) -> None:
    assert identifier(read(cells, name), len(cells)) is None


def test_text_and_categories() -> None:
    sentences = pl.Series(
        [f"it was {word} in the year {place}" for place, word in enumerate(["good", "bad"] * 20)]
    )
    assert is_text(sentences)
    assert not is_text(pl.Series(["very good", "rather bad"] * 50))
    assert not is_text(pl.Series([f"v{place % 30}" for place in range(90)]))
    chinese = pl.Series([f"这个产品非常好用{place}" for place in range(30)])
    assert spaceless(chinese)
    assert is_text(chinese)
    assert identifier(read(chinese.to_list()), 30) is None
    assert not spaceless(sentences)


def test_what_can_order_rows() -> None:
    assert moments_or_numbers(read(["3", "1.5"])).to_list() == [3.0, 1.5]
    moments = moments_or_numbers(read(["2024-01-02", "2024-01-01"])).to_list()
    assert moments[0] - moments[1] == 86_400e6
    with pytest.raises(UsageError, match="time=x must hold dates or numbers.*kind string, such as 'monday'"):
        moments_or_numbers(read(["monday", "tuesday"]))
