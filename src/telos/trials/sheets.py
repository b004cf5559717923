"""Sheets: a CSV or Parquet file read as it stands, or one sentence that says where it is broken.

Files are read by their format and nothing in them is executed. A CSV file is read as strings: what a column
holds is decided later, from all of it.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import polars as pl

from telos.trials._words import UsageError

SUFFIXES = (".csv", ".tsv", ".parquet", ".pq")


@dataclass(frozen=True)
class Sheet:
    """A file after it was read: its columns as they stand there.

    Attributes:
        name: of the file, for messages.
        frame: the columns; strings from a CSV file.
        decimal_comma: whether ``1,5`` may be a number.
        notices: what was unusual about the file.
    """

    name: str
    frame: pl.DataFrame
    decimal_comma: bool = False
    notices: tuple[str, ...] = ()


def read_sheet(path: Path, drop: Sequence[str] = ()) -> Sheet:
    """Read a table by its file's suffix.

    Args:
        path: a ``.csv``, ``.tsv``, ``.parquet`` or ``.pq`` file.
        drop: columns that are not read.

    Raises:
        telos.trials.UsageError: for what is no such table; the sentence says where it goes wrong.
    """
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            return Sheet(
                path.name, _collected(pl.scan_parquet(path, glob=False, hive_partitioning=False), drop)
            )
        return _read_csv(path, drop)
    except pl.exceptions.PolarsError as error:
        raise UsageError(f"{path} cannot be read: {_first_line(error)}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


def _collected(scan: pl.LazyFrame, drop: Sequence[str]) -> pl.DataFrame:
    known = scan.collect_schema().names()
    return scan.select([name for name in known if name.strip() not in drop]).collect()


def _read_csv(path: Path, drop: Sequence[str]) -> Sheet:
    with path.open("rb") as file:
        start = file.read(1 << 16)
    _check_start(path, start)
    lines = _lines(path)
    header_line = next((line for line in lines if line.strip()), "")
    separator = "\t" if path.suffix.lower() == ".tsv" else _separator(header_line)
    try:
        header = next(csv.reader(chain([header_line], lines), delimiter=separator), [])
    except csv.Error as error:
        raise UsageError(f"{path}, line 1: {_reason(error)}") from error
    notices = [
        f"the header of {path.name} names {name!r} {count} times; the later ones are called "
        f"{name}_duplicated_0 and so on"
        for name, count in Counter(header).items()
        if count > 1
    ]
    if separator not in (",", "\t"):
        notices.append(f"{path.name} is separated by {separator!r}")
    try:
        scan = pl.scan_csv(path, separator=separator, infer_schema=False, glob=False)
        frame = _collected(scan, drop)
    except pl.exceptions.NoDataError as error:
        raise UsageError(f"{path} has no rows") from error
    except pl.exceptions.PolarsError:
        # the slow reader says what is wrong and where, or reads what the quick one is too strict for
        frame = _read_slowly(path, header, separator).drop(drop, strict=False)
    # a row that is too short leaves its last cell empty
    if frame.width and frame.height and frame.to_series(-1).null_count():
        _check_rows(path, header, separator)
    frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))
    return Sheet(path.name, _named(frame), separator == ";", tuple(notices))


def _check_start(path: Path, start: bytes) -> None:
    if not start.strip():
        raise UsageError(f"{path} is empty")
    known = {
        b"PK\x03\x04": "a zip archive (a spreadsheet?): save it as CSV",
        b"PAR1": "a Parquet file: name it .parquet",
        b"\x1f\x8b": "compressed: unpack it",
        b"\xff\xfe": "UTF-16 text: save it as UTF-8",
        b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    }
    for magic, what in known.items():
        if start.startswith(magic):
            raise UsageError(f"{path} is not a CSV file but {what}")
    if b"\0" in start:
        raise UsageError(f"{path} is a binary file, not CSV")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, each as UTF-8, or an error that names the line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"{path} is not UTF-8: line {number} holds the byte 0x{line[error.start]:02x}; "
                    "save the file with the encoding UTF-8"
                ) from error


def _separator(header: str) -> str:
    plain = re.sub(r'"[^"]*"', "", header)
    return max(",;\t|", key=plain.count)


def _reason(error: csv.Error) -> str:
    if "end of data" in str(error):
        return "a quotation mark is not closed"
    if "new-line" in str(error):
        return "a carriage return stands alone; save the file with ordinary line breaks"
    return str(error)


def _records(path: Path, header: Sequence[str], separator: str) -> Iterator[list[str]]:
    """The rows below the header, or an error that names the first line that does not fit."""
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(path), delimiter=separator, strict=True)
    above = True  # the header, and what is blank before it
    try:
        for record in reader:
            if not any(record):
                continue
            if len(record) != len(header):
                raise UsageError(
                    f"{path}, line {reader.line_num}: {len(record)} cells where the header has {len(header)}"
                )
            if not above:
                yield record
            above = False
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {_reason(error)}") from error
    finally:
        csv.field_size_limit(limit)


def _check_rows(path: Path, header: Sequence[str], separator: str) -> None:
    for _ in _records(path, header, separator):
        pass


def _read_slowly(path: Path, header: Sequence[str], separator: str) -> pl.DataFrame:
    names = [
        name if name not in header[:place] else f"{name}_duplicated_{header[:place].count(name) - 1}"
        for place, name in enumerate(header)
    ]
    rows = list(_records(path, header, separator))
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def _named(frame: pl.DataFrame) -> pl.DataFrame:
    """Names without blanks around them; a column without a name is called by its place."""
    names = [name.strip() or f"column {place}" for place, name in enumerate(frame.columns, start=1)]
    if len(set(names)) == len(names):
        frame.columns = names
    return frame


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
