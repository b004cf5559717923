"""Columns that give the target away are named; good columns are not."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from telos.trials import load_task


def leaks(folder: Path, columns: dict, words: str = "") -> list[str]:
    path = folder / "some.csv"
    pl.DataFrame(columns).write_csv(path)
    task = load_task(f"{path} target=label {words}")
    return [notice for notice in task.notices if "almost perfectly" in notice]


def base(rows: int = 300) -> dict:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, rows)
    return {
        "useful": label + 0.6 * rng.normal(size=rows),
        "noise": rng.normal(size=rows),
        "label": label,
    }


def test_good_columns_are_not_named(tmp_path: Path) -> None:
    columns = base()
    columns["shop"] = np.random.default_rng(1).choice(["a", "b", "c"], 300)
    assert leaks(tmp_path, columns) == []


@pytest.mark.parametrize("kind", ["copy", "recoded", "shifted", "word", "absent", "date"])
def test_a_column_that_knows_the_answer_is_named(tmp_path: Path, kind: str) -> None:
    columns = base()
    label, rng = columns["label"], np.random.default_rng(2)
    columns["result"] = {
        "copy": label.astype(float) + 0.25,
        "recoded": np.array([7.5, -3.25, 0.125])[label],
        "shifted": label + 0.1 * rng.random(300),
        "word": np.array(["won", "lost", "drawn"])[label],
        "absent": [None if one == 0 else float(one) + 0.5 for one in label],
        "date": np.array(["2020-01-01", "2021-05-05", "2022-02-02"])[label],
    }[kind]
    found = leaks(tmp_path, columns)
    assert len(found) == 1
    assert found[0].startswith(
        "result alone predicts label almost perfectly (100.0% of what guessing misses)"
    )


def test_ninety_percent_is_not_almost_perfect(tmp_path: Path) -> None:
    columns = base()
    rng = np.random.default_rng(3)
    columns["result"] = np.where(rng.random(300) < 0.1, rng.integers(0, 3, 300), columns["label"])
    assert leaks(tmp_path, columns) == []


def test_a_rare_class_does_not_make_every_column_perfect(tmp_path: Path) -> None:
    columns = base(1000)
    columns["label"] = (np.arange(1000) % 100 == 0).astype(int)
    assert leaks(tmp_path, columns) == []


def test_numbers_that_give_a_number_away(tmp_path: Path) -> None:
    columns = base()
    columns["label"] = columns["useful"] * 3.3
    columns["useful"] = columns["useful"] + np.random.default_rng(4).normal(size=300)
    assert leaks(tmp_path, columns) == []
    columns["euros"] = columns["label"] * 1.1 + 7
    assert [notice.split()[0] for notice in leaks(tmp_path, columns)] == ["euros"]
    # also where a few numbers are far larger than all others
    columns["label"] = np.exp(4 * np.random.default_rng(4).normal(size=300))
    columns["euros"] = columns["label"] * 1.1 + 7
    assert [notice.split()[0] for notice in leaks(tmp_path, columns)] == ["euros"]


def test_one_of_very_many_columns(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    columns = {f"n{place}": rng.normal(size=120) for place in range(300)}
    columns["label"] = np.arange(120) % 2
    columns["n150"] = columns["label"] + 0.01 * rng.normal(size=120)
    assert [notice.split()[0] for notice in leaks(tmp_path, columns)] == ["n150"]
