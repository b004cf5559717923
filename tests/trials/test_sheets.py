"""Reading files: what is unusual is said, what is broken is an error of one sentence that says where."""

from pathlib import Path

import polars as pl
import pytest

from telos.trials import UsageError
from telos.trials.sheets import read_sheet


def written(folder: Path, content: bytes | str, name: str = "some.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("a,b\n1,x\n2,y\n", [("1", "x"), ("2", "y")]),
        ("\ufeffa,b\r\n1,x\r\n", [("1", "x")]),
        ("a,b\n\n1,x\n\n", [("1", "x")]),
        ("\n\na,b\n1,x\n2,\n", [("1", "x"), ("2", None)]),
        ('\n"a",b\n1,5" x\n', [("1", '5" x')]),
        ('a,b\n1,"x, and\nmore"\n', [("1", "x, and\nmore")]),
        ('a,b\n1,5" disk\n2,y\n', [("1", '5" disk'), ("2", "y")]),
        (" a , b\n1,x\n", [("1", "x")]),
        ("a;b\n1;x,y\n", [("1", "x,y")]),
        ("a\tb\n1\tx\n", [("1", "x")]),
        ("a|b\n1|x\n", [("1", "x")]),
        ("a,b\n1,\n2,y\n", [("1", None), ("2", "y")]),
        ('"a","b"\n1,"ein ""Wort"" für ü"\n', [("1", 'ein "Wort" für ü')]),
    ],
)
def test_what_can_be_read(tmp_path: Path, content: str, rows: list) -> None:
    frame = read_sheet(written(tmp_path, content)).frame
    assert frame.columns == ["a", "b"]
    assert frame.rows() == rows


def test_tabs_by_suffix_and_columns_left_out(tmp_path: Path) -> None:
    frame = read_sheet(written(tmp_path, "a\tb,c\n1\t2,3\n", "some.tsv")).frame
    assert frame.rows() == [("1", "2,3")]
    assert read_sheet(written(tmp_path, "a,b\n1,2\n"), drop=("a",)).frame.columns == ["b"]


def test_signs_in_a_path_are_no_pattern(tmp_path: Path) -> None:
    written(tmp_path, "a,b\n9,9\n", "some1.csv")
    assert read_sheet(written(tmp_path, "a,b\n1,2\n", "some[1].csv")).frame.rows() == [("1", "2")]
    pl.DataFrame({"a": [9]}).write_parquet(tmp_path / "any.parquet")
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "an*.parquet")
    assert read_sheet(tmp_path / "an*.parquet").frame.rows() == [(1,)]


def test_names_that_occur_twice_or_not_at_all(tmp_path: Path) -> None:
    for cell in ("3", '5" x'):  # the second goes through the slow reader
        sheet = read_sheet(written(tmp_path, f"a,a,,a\n1,2,{cell},4\n"))
        assert sheet.frame.columns == ["a", "a_duplicated_0", "column 3", "a_duplicated_1"]
        assert sheet.notices == (
            "the header of some.csv names 'a' 3 times; the later ones are called a_duplicated_0 and so on",
        )


def test_a_separator_that_is_no_comma_is_said(tmp_path: Path) -> None:
    assert read_sheet(written(tmp_path, "a;b\n1;2\n")).notices == ("some.csv is separated by ';'",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "some.csv is empty"),
        (b"\n \n", "some.csv is empty"),
        ("a,b\n1,2\n3\n4,5\n", r"some.csv, line 3: 1 cells where the header has 2"),
        ("a,b\n1,2\n3,4,5\n", r"some.csv, line 3: 3 cells where the header has 2"),
        ("\na,b\n1,2\n3\n", r"some.csv, line 4: 1 cells where the header has 2"),
        ('a,b\n"1\n1",2\n3\n', r"some.csv, line 4: 1 cells where the header has 2"),
        ('a,b\n1,2\n3,"4\n', r"some.csv, line 3: a quotation mark is not closed"),
        ("a,b\r1,2\r", r"some.csv, line 1: a carriage return stands alone"),
        ("a,b\n1,2\n3\r4,5,6\n", r"some.csv, line 3: a carriage return stands alone"),
        (b"a,b\n1,2\n3,caf\xe9\n", r"some.csv is not UTF-8: line 3 holds the byte 0xe9"),
        (b"caf\xe9,b\n1,2\n", r"some.csv is not UTF-8: line 1 holds the byte 0xe9"),
        ("a,b\n1,2\n".encode("utf-16"), "some.csv is not a CSV file but UTF-16 text"),
        (b"PK\x03\x04\x14\x00\x06\x00", "some.csv is not a CSV file but a zip archive"),
        (b"PAR1\x15\x04", "some.csv is not a CSV file but a Parquet file: name it .parquet"),
        (b"\x1f\x8b\x08\x00", "some.csv is not a CSV file but compressed"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "some.csv is a binary file, not CSV"),
    ],
)
def test_what_is_broken(tmp_path: Path, content: bytes | str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_sheet(written(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_broken_encoding_far_down_is_found(tmp_path: Path) -> None:
    content = b"a,b\n" + b"1,x\n" * 50_000 + b"1,\xff\n"
    with pytest.raises(UsageError, match="line 50002 holds the byte 0xff"):
        read_sheet(written(tmp_path, content))


def test_parquet(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [1, None], "b": ["x", "y"], "c": [[1], [2]]})
    frame.write_parquet(tmp_path / "some.parquet")
    assert read_sheet(tmp_path / "some.parquet").frame.equals(frame)
    assert read_sheet(tmp_path / "some.parquet", drop=("c",)).frame.columns == ["a", "b"]
    for content in (b"", b"a,b\n1,2\n", (tmp_path / "some.parquet").read_bytes()[:-20]):
        with pytest.raises(UsageError, match=r"broken.parquet cannot be read: ") as caught:
            read_sheet(written(tmp_path, content, "broken.parquet"))
        assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "a,b\n1,2\n")

    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UsageError, match=r"some.csv cannot be read: Permission denied"):
        read_sheet(path)
