"""Tables: what becomes of columns, what is fitted on which rows, and data from which nothing can be learned."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from telos.trials import UsageError, load_task, sources
from telos.trials.splits import stratified
from telos.trials.tasks import derive_seed

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes columns to a CSV file in the folder where the test stands, and names it."""
    monkeypatch.chdir(tmp_path)

    def written(columns: dict[str, Any] | pl.DataFrame, name: str = "some.csv") -> str:
        pl.DataFrame(columns, strict=False).write_csv(tmp_path / name)
        return name

    return written


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def plain(rows: int = 60, seed: int = 0) -> dict[str, Any]:
    """Two numbers that say something about two classes."""
    made = rng(seed)
    label = np.arange(rows) % 2
    return {
        "height": (made.normal(size=rows) + label).round(3),
        "width": made.normal(size=rows).round(3),
        "label": np.array(["no", "yes"])[label],
    }


def mixed(rows: int = 400, seed: int = 0) -> dict[str, Any]:
    """A column of every kind, with blanks."""
    made = rng(seed)
    label = np.arange(rows) % 3
    columns: dict[str, list] = {
        "amount": (made.lognormal(size=rows) + label).round(3).tolist(),
        "count": made.integers(0, 9, rows).tolist(),
        "member": made.choice(["yes", "no"], rows).tolist(),
        "colour": made.choice(["red", "green", "blue"], rows).tolist(),
        "city": [f"city {number}" for number in made.geometric(0.02, rows)],
        "joined": (np.datetime64("2020-01-01") + made.integers(0, 900, rows)).astype(str).tolist(),
        "comment": [
            " ".join(made.choice(["good", "bad", "late", "soon", "never", "box", "again"], 6))
            + f" {place % 50}"
            for place in range(rows)
        ],
    }
    for cells in columns.values():
        for place in made.choice(rows, rows // 20, replace=False):
            cells[place] = None
    return {
        **columns,
        "ticket": [f"T{place:05d}" for place in range(rows)],
        "label": [f"c{one}" for one in label],
    }


def column(task: Any, name: str) -> dict[str, Any]:
    return next(one for one in task.columns if one["name"] == name)


# ---------------------------------------------------------------------------------------- what becomes of columns


def test_every_kind_of_column(write: Write) -> None:
    task = load_task(f"{write(mixed())} target=label")
    kinds = {one["name"]: one["kind"] for one in task.columns}
    assert kinds == {
        "label": "target",
        "amount": "number",
        "count": "number",
        "member": "boolean",
        "colour": "category",
        "city": "category",
        "joined": "date",
        "comment": "text",
        "ticket": "identifier",
    }
    assert column(task, "amount")["missing"] == 0.05
    assert all(one["treatment"] for one in task.columns)
    fold = task.fold(0)
    assert fold.info.class_counts == (80, 80, 80)
    assert fold.info.input_shape == fold.train["inputs"].shape[1:]
    for part in (fold.train, fold.validation, fold.test):
        assert part["inputs"].dtype == torch.float32
        assert torch.isfinite(part["inputs"]).all()
        assert part["target"].dtype == torch.long
        assert torch.equal(part["index"], torch.arange(len(part["target"])))
    notices = "\n".join(task.notices)
    assert (
        "ticket is left out as an identifier: all of its values differ; keep=ticket brings it back" in notices
    )
    assert "comment is text: TF-IDF of at most 2,000 words" in notices
    assert "city has many categories" in notices
    assert "1 text" in task.description
    assert "400 examples of some.csv in 3 classes" in task.description


def test_numbers_are_imputed_indicated_and_standardised_by_the_training_rows(write: Write) -> None:
    columns = plain(100)
    columns["height"] = [None if place % 7 == 0 else value for place, value in enumerate(columns["height"])]
    task = load_task(f"{write(columns)} target=label")
    fold = task.fold(3)
    labels = (np.array(columns["label"]) == "yes").astype(np.int64)
    parts = stratified(labels, np.random.default_rng(derive_seed("some", 3, "split")))
    height = np.array([np.nan if value is None else value for value in columns["height"]])
    width = np.asarray(columns["width"])
    train = parts[0]
    filled = np.where(np.isnan(height), np.nanmedian(height[train]), height)
    for rows, part in zip(parts, (fold.train, fold.validation, fold.test), strict=True):
        assert (part["target"].numpy() == labels[rows]).all()
        expected = [(values[rows] - values[train].mean()) / values[train].std() for values in (filled, width)]
        expected.append(np.isnan(height)[rows])
        np.testing.assert_allclose(part["inputs"].numpy(), np.stack(expected, 1), rtol=1e-5, atol=1e-5)


def test_nothing_is_fitted_on_other_rows_than_those_of_training(write: Write) -> None:
    columns = mixed()
    before = load_task(f"{write(columns)} target=label").fold(0)
    labels = np.unique(columns["label"], return_inverse=True)[1]
    *_, test = stratified(labels, np.random.default_rng(derive_seed("some", 0, "split")))
    made = rng(1)
    changed = {name: list(cells) for name, cells in columns.items()}
    for place in test:
        changed["amount"][place] = 1e6 * made.random()
        changed["count"][place] = int(made.integers(50, 90))
        changed["member"][place] = None
        changed["colour"][place] = "ultraviolet"
        changed["city"][place] = f"village {made.integers(0, 50)}"
        changed["joined"][place] = "2031-12-24"
        changed["comment"][place] = f"other words altogether on row {place}"
    after = load_task(f"{write(changed)} target=label").fold(0)
    assert torch.equal(before.train["inputs"], after.train["inputs"])
    assert torch.equal(before.validation["inputs"], after.validation["inputs"])
    assert not torch.equal(before.test["inputs"], after.test["inputs"])
    assert torch.isfinite(after.test["inputs"]).all()
    assert after.test["inputs"].abs().max() <= 10


def test_a_number_that_is_constant_in_training_is_zero_everywhere(write: Write) -> None:
    columns = plain(60)
    labels = (np.array(columns["label"]) == "yes").astype(np.int64)
    parts = stratified(labels, np.random.default_rng(derive_seed("some", 0, "split")))
    late = np.full(60, 7.0)
    late[parts[2][:3]] = [8.0, 9.0, 1e9]
    fold = load_task(f"{write({**columns, 'late': late})} target=label").fold(0)
    assert torch.count_nonzero(fold.test["inputs"][:, 2]) == 0


def test_folds_are_the_same_every_time_and_differ_by_seed(write: Write) -> None:
    words = f"{write(mixed())} target=label"
    one = load_task(words).fold(0)
    sources._from_files.cache_clear()
    two = load_task(words).fold(0)
    assert one is not two
    for part in ("train", "validation", "test"):
        for key, values in getattr(one, part).items():
            assert torch.equal(values, getattr(two, part)[key])
    assert not torch.equal(one.train["inputs"], load_task(words).fold(1).train["inputs"])


@pytest.mark.slow
def test_folds_do_not_depend_on_the_process(write: Write) -> None:
    words = f"{write(mixed())} target=label"
    code = (
        "import hashlib; from telos.trials import load_task\n"
        f"fold = load_task({words!r}).fold(0)\n"
        "print(hashlib.sha256(fold.train['inputs'].numpy().tobytes()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "POLARS_MAX_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "4"))
    }
    assert len(seen) == 1
    assert len(seen.pop().strip()) == 64


def test_categories_unseen_in_training_are_the_infrequent_one(write: Write) -> None:
    colour = ["red"] * 20 + ["green"] * 20 + ["blue"] * 18 + ["pink", "grey"]
    train = {"colour": colour, "label": ["a", "b"] * 30}
    test = {"colour": ["red", "mauve", "pink", None], "label": ["a", "b", "a", "b"]}
    task = load_task(f"{write(train)} target=label test={write(test, 'other.csv')}")
    rows = task.fold(0).test["inputs"].numpy()
    # red has a column of its own; pink (seen once) and mauve (never seen) share one
    assert (rows[1] == rows[2]).all()
    assert not (rows[0] == rows[1]).all()
    assert rows[1].sum() == 1


def test_a_hundred_thousand_categories(write: Write) -> None:
    rows = 120_000
    made = rng()
    code = [f"k{number}" for number in np.concatenate([np.arange(100_000), made.integers(0, 100, 20_000)])]
    order = made.permutation(rows)
    columns = {
        "code": np.array(code)[order],
        "size": made.normal(size=rows).round(2),
        "label": np.arange(rows) % 2,
    }
    columns["shop"] = np.char.add("s", made.integers(0, 100_000, rows).astype(str))
    task = load_task(f"{write(columns)} target=label keep=code")
    fold = task.fold(0)
    assert column(task, "code")["treatment"].startswith("one-hot for the 63 most frequent of 100,000 values")
    assert fold.train["inputs"].shape[1] == 2 * (64 + 1) + 1
    assert fold.train["inputs"].nelement() * 4 < 50e6
    assert fold.info.num_examples == 72_000


def test_many_category_columns_share_the_one_hot_columns(write: Write) -> None:
    made = rng()
    columns = {f"c{place}": [f"v{one}" for one in made.integers(0, 60, 300)] for place in range(80)}
    fold = load_task(f"{write({**columns, 'label': np.arange(300) % 2})} target=label").fold(0)
    assert fold.train["inputs"].shape[1] <= 80 * (2_000 // 80 + 1)


def test_texts_are_counted_once_and_weighed_in_every_split(write: Write) -> None:
    columns = {"comment": mixed()["comment"], "label": mixed()["label"]}
    task = load_task(f"{write(columns)} target=label text=comment")
    assert column(task, "comment")["treatment"].startswith(
        "TF-IDF of at most 2,000 words, the most frequent ones"
    )
    first, second = task.fold(0), task.fold(1)
    assert task.data.counts is task.data.counts
    # the seven words, and those of the fifty numbers that stand in two training texts or more
    assert 7 < first.info.input_shape[0] <= 57
    assert not torch.equal(first.train["inputs"], second.train["inputs"])


def test_weights_of_words_agree_with_scikit_learn(write: Write) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    made = rng()
    said = [
        " ".join(made.choice(["red", "green", "blue", "old", "new"], 4)) + f" {place}" for place in range(80)
    ]
    label = np.arange(80) % 2
    fold = load_task(f"{write({'said': said, 'label': label})} target=label").fold(0)
    train, _, test = stratified(label, np.random.default_rng(derive_seed("some", 0, "split")))
    counter = TfidfVectorizer(min_df=2, sublinear_tf=True).fit([said[row] for row in train])
    assert sorted(counter.vocabulary_) == ["blue", "green", "new", "old", "red"]
    expected = 10**0.5 * counter.transform([said[row] for row in test]).toarray()
    found = fold.test["inputs"].numpy()
    # the columns stand in the order of the hash: each has its own in the other
    assert found.shape == expected.shape
    distance = np.abs(found.T[:, None] - expected.T[None]).max(-1)
    np.testing.assert_allclose(distance.min(0), 0, atol=1e-6)
    np.testing.assert_allclose(distance.min(1), 0, atol=1e-6)


def test_the_number_of_words_falls_with_the_number_of_rows(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("telos.trials.tables.WORD_CELLS", 400 * 250)
    columns = mixed()
    columns["comment"] = [f"w{place} v{place} w{place + 1} v{place + 1} also" for place in range(400)]
    task = load_task(
        f"{write(columns)} target=label text=comment drop=amount,count,member,colour,city,joined"
    )
    assert "at most 250 words" in column(task, "comment")["treatment"]
    assert task.fold(0).info.input_shape == (250,)


def test_a_text_that_begins_later_or_says_nothing_in_training(write: Write) -> None:
    columns = {**plain(), "day": np.arange(60)}
    columns["said"] = [f"now there are words {place}" if place > 40 else None for place in range(60)]
    fold = load_task(f"{write(columns)} target=label time=day text=said").fold(0)
    assert fold.info.input_shape == (2,)


def test_text_says_something(write: Write) -> None:
    made = rng()
    label = np.arange(300) % 2
    filler = ["the", "a", "it", "was", "then", "there", "one", "more"]
    said = [
        " ".join([*made.choice(filler, 8), ["awful", "lovely"][one], str(place)])
        for place, one in enumerate(label)
    ]
    fold = load_task(f"{write({'said': said, 'label': label})} target=label").fold(0)
    from sklearn.linear_model import LogisticRegression

    learner = LogisticRegression(max_iter=1000).fit(fold.train["inputs"], fold.train["target"])
    assert learner.score(fold.test["inputs"], fold.test["target"]) > 0.95
    torch.testing.assert_close(
        fold.train["inputs"].square().sum(1), torch.full((180,), 10.0), atol=1e-3, rtol=0
    )


def test_words_that_decide_what_a_column_is(write: Write) -> None:
    made = rng()
    columns = plain(80)
    columns["code"] = made.integers(1, 5, 80)
    columns["number"] = np.arange(80)
    columns["motto"] = made.choice(["live and let live", "all in good time"], 80)
    path = write(columns)
    plainly = load_task(f"{path} target=label")
    assert [column(plainly, name)["kind"] for name in ("code", "number", "motto")] == [
        "number",
        "identifier",
        "category",
    ]
    told = load_task(f"{path} target=label category=code keep=number text=motto drop=width,height")
    assert [column(told, name)["kind"] for name in ("code", "number", "motto")] == [
        "category",
        "number",
        "text",
    ]
    assert {one["name"] for one in told.columns} == {"label", "code", "number", "motto"}


def test_columns_with_nothing_to_learn_from_are_left_out_and_named(write: Write) -> None:
    columns = plain()
    columns |= {"empty": [None] * 60, "void": ["NA"] * 60, "same": [3] * 60, "again": columns["height"]}
    task = load_task(f"{write(columns)} target=label")
    assert task.fold(0).train["inputs"].shape[1] == 2
    assert "left out because every cell is missing: empty, void" in task.notices
    assert "left out because every cell is the same: same" in task.notices
    assert "left out because another column has the same content: again (as height)" in task.notices
    assert {one["kind"] for one in task.columns if one["treatment"].startswith("left out")} == {
        "empty", "constant", "duplicate",
    }  # fmt: skip


def test_a_column_that_is_only_there_or_not_is_kept(write: Write) -> None:
    columns = {**plain(), "flag": ["x" if place % 3 else None for place in range(60)]}
    task = load_task(f"{write(columns)} target=label")
    assert column(task, "flag")["kind"] == "category"
    assert task.fold(0).train["inputs"].shape[1] == 4


def test_parquet_gives_what_csv_gives(write: Write, tmp_path: Path) -> None:
    columns = mixed()
    from_csv = load_task(f"{write(columns)} target=label").fold(0)
    frame = pl.read_csv(tmp_path / "some.csv", try_parse_dates=True)
    assert frame["joined"].dtype == pl.Date
    frame.with_columns(pl.Series("lists", [[1, 2]] * 400)).write_parquet(tmp_path / "some.parquet")
    task = load_task("some.parquet target=label")
    assert torch.equal(task.fold(0).train["inputs"], from_csv.train["inputs"])
    assert "left out because the cells are of a type that cannot be learned from: lists" in task.notices


def test_large_numbers_keep_the_digits_that_tell_them_apart(write: Write) -> None:
    # 2**40 + k is the same number for many k in float32
    columns = {**plain(), "stamp": 2**40 + 7 * rng().integers(0, 900, 60)}
    fold = load_task(f"{write(columns)} target=label").fold(0)
    assert len(torch.unique(fold.train["inputs"][:, 2])) > 25


# ---------------------------------------------------------------------------------------------------- the target


@pytest.mark.parametrize(
    ("cells", "classes"),
    [
        (["no", "yes"], ("no", "yes")),
        (["True", "False"], ("False", "True")),
        ([3, 10], ("3", "10")),
        ([0.0, 1.0], ("0", "1")),
        (["b", "a", "c"], ("a", "b", "c")),
        ([-1.5, 2.5], None),
    ],
)
def test_classes_or_numbers(write: Write, cells: list, classes: tuple | None) -> None:
    columns = {**plain(), "label": (cells * 60)[:60]}
    task = load_task(f"{write(columns)} target=label")
    assert task.classes == classes
    assert task.fold(0).info.family == ("classification" if classes else "regression")


def test_whole_numbers_are_classes_only_where_there_are_few(write: Write) -> None:
    columns = {**plain(200), "label": np.arange(200) % 40}
    assert load_task(f"{write(columns)} target=label").classes is None
    assert len(load_task(f"{write(columns)} target=label kind=classification").classes) == 40
    columns["label"] = np.arange(200) % 3
    assert load_task(f"{write(columns)} target=label").classes == ("0", "1", "2")
    assert load_task(f"{write(columns)} target=label kind=regression").classes is None


def test_rows_without_a_target_are_left_out_and_counted(write: Write) -> None:
    columns = plain()
    columns["label"] = [None if place < 6 else label for place, label in enumerate(columns["label"])]
    task = load_task(f"{write(columns)} target=label")
    assert "rows of some.csv without label are left out (6 of 60)" in task.notices
    assert (
        sum(len(part["target"]) for part in (task.fold(0).train, task.fold(0).validation, task.fold(0).test))
        == 54
    )
    assert column(task, "label")["missing"] == pytest.approx(0.1)


def test_imbalance_is_said(write: Write) -> None:
    columns = {**plain(200), "label": ["rare" if place % 20 == 0 else "usual" for place in range(200)]}
    task = load_task(f"{write(columns)} target=label")
    assert any(
        notice.startswith("the classes are uneven: usual is 95.0% of the rows") for notice in task.notices
    )
    assert not any(
        "uneven" in notice for notice in load_task(f"{write(plain(), 'even.csv')} target=label").notices
    )


def test_classes_with_too_few_rows(write: Write) -> None:
    columns = {**plain(), "label": ["odd"] + ["no", "yes"] * 29 + ["no"]}
    path = write(columns)
    with pytest.raises(
        UsageError, match="class 'odd' of target=label has 1 row and needs 4 to be in every split"
    ):
        load_task(f"{path} target=label")
    task = load_task(f"{path} target=label drop_rare=true")
    assert task.classes == ("no", "yes")
    assert "classes with fewer than 4 rows are left out (odd; 1 row)" in task.notices


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({}, "target=lable", "target=lable: some.csv has no such column; nearest: label"),
        (
            {},
            "target=nothing",
            "target=nothing: some.csv has no such column; there are: height, label, width",
        ),
        ({"label": ["a"] * 60}, "target=label", "target=label of some.csv has one value only, 'a'"),
        ({"label": [2] * 60}, "target=label", "target=label of some.csv has one value only, '2'"),
        ({"label": [None] * 60}, "target=label", "target=label has no value in some.csv"),
        ({"label": ["2024-01-31", "2024-02-01"] * 30}, "target=label", "column of kind date, not classes"),
        (
            {},
            "target=label kind=regression",
            "kind=regression needs numbers, and target=label is .* kind string",
        ),
        ({}, "target=label drop=width,height", "some.csv has no column left to learn label from"),
        ({}, "target=label drop=wdth", "drop=wdth: some.csv has no such column; nearest: width"),
        ({}, "target=label drop=label", "target=label is also in drop="),
        ({}, "target=label group=label", "group=label is the target"),
        ({}, "target=label group=patient", "group=patient: some.csv has no such column"),
        ({}, "target=label time=hight", "time=hight: some.csv has no such column; nearest: height"),
        ({}, "target=label keep=wdth", "keep=wdth: some.csv has no such column; nearest: width"),
        ({}, "target=label text=width category=width", "width is both in text= and in category="),
        (
            {"g": ["a", "b"] * 30},
            "target=label group=g",
            "group= of some.csv: 2 groups cannot be dealt to 3 splits",
        ),
        (
            {"t": [1, 2] * 30},
            "target=label time=t",
            "time= of some.csv: 2 moments cannot be dealt to 3 splits",
        ),
        ({"t": ["a", "b"] * 30}, "target=label time=t", "time=t must hold dates or numbers"),
        ({"g": ["a", "b"] * 30}, "target=label group=g time=width", "group= and time= cannot be combined"),
        ({}, "target=width noise=0.1", "noise= replaces labels, and the target of some.csv is numbers"),
    ],
)
def test_data_from_which_nothing_can_be_learned(
    write: Write, changes: dict, words: str, message: str
) -> None:
    path = write({**plain(), **changes})
    with pytest.raises(UsageError, match=message) as caught:
        load_task(f"{path} {words}").fold(0)
    assert "\n" not in str(caught.value)


def test_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some.csv").write_text("a,label\n")
    with pytest.raises(UsageError, match=r"some.csv has no rows"):
        load_task("some.csv target=label")
    Path("some.csv").write_text("a,label\n" + "1.5,2.5\n2.5,3.5\n")
    with pytest.raises(UsageError, match=r"some.csv has 2 rows with a target; that is too few"):
        load_task("some.csv target=label")


def test_features_that_would_not_fit_in_memory(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("telos.trials.tables.LARGEST", 400)
    with pytest.raises(
        UsageError, match=r"60 rows of about 2 features of some.csv would take .* GB; drop= leaves"
    ):
        load_task(f"{write(plain())} target=label")


# ---------------------------------------------------------------------------------------------------- splits


def test_groups_never_straddle(write: Write) -> None:
    made = rng()
    patient = made.integers(0, 40, 300)
    columns = {"patient": patient, "mark": 1000.0 * patient, **plain(300)}
    task = load_task(f"{write(columns)} target=label group=patient")
    assert task.resplits
    assert "groups kept together" in task.description
    assert column(task, "patient")["kind"] == "group"
    for seed in range(5):
        fold = task.fold(seed)
        parts = [set(part["inputs"][:, 0].tolist()) for part in (fold.train, fold.validation, fold.test)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == len(set(patient))


def test_rows_without_a_group_stand_alone(write: Write) -> None:
    patient = [None if place < 5 else place % 10 for place in range(60)]
    task = load_task(f"{write({'patient': patient, **plain()})} target=label group=patient")
    assert "rows without patient are each a group of their own (5)" in task.notices
    assert len(set(task.data.groups)) == 15


def test_the_past_is_trained_on(write: Write) -> None:
    made = rng()
    day = made.permutation(300)
    columns = {"day": (np.datetime64("2020-01-01") + day).astype(str), "mark": day * 1.5, **plain(300)}
    task = load_task(f"{write(columns)} target=label time=day")
    assert not task.resplits
    first, second = task.fold(0), task.fold(1)
    mark = column(task, "mark")
    assert mark["kind"] == "number"
    place = list(first.train["inputs"][:, 0])  # mark grows with time, and standardising keeps the order
    assert max(place) < min(first.validation["inputs"][:, 0])
    assert max(first.validation["inputs"][:, 0]) < min(first.test["inputs"][:, 0])
    assert [len(part["target"]) for part in (first.train, first.validation, first.test)] == [180, 45, 75]
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(first, part)["inputs"], getattr(second, part)["inputs"])
    assert "past" in task.description
    assert column(task, "day")["kind"] == "time"


def test_time_as_a_number_is_no_feature_and_rows_without_it_are_left_out(write: Write) -> None:
    year = [None if place < 4 else 2000 + place % 12 for place in range(60)]
    task = load_task(f"{write({'year': year, **plain()})} target=label time=year")
    assert task.fold(0).train["inputs"].shape[1] == 2
    assert "rows without year are left out (4)" in task.notices


def test_classes_that_begin_later_are_left_out_and_named(write: Write) -> None:
    label = ["a", "b"] * 24 + ["new"] * 6 + ["a", "b"] * 3
    task = load_task(f"{write({**plain(), 'label': label, 'day': np.arange(60)})} target=label time=day")
    assert task.classes == ("a", "b")
    fold = task.fold(0)
    assert fold.info.num_classes == 2
    assert set(fold.test["target"].tolist()) == {0, 1}
    assert any(
        "do not occur in the training split" in notice and "(new; 6 rows)" in notice
        for notice in task.notices
    )


def test_a_test_file_is_tested_on(write: Write) -> None:
    other = plain(40, seed=5)
    task = load_task(f"{write(plain())} target=label test={write(other, 'other.csv')}")
    assert not task.resplits
    one, two = task.fold(0), task.fold(1)
    assert [len(part["target"]) for part in (one.train, one.validation, one.test)] == [48, 12, 40]
    assert torch.equal(one.test["target"], two.test["target"])
    assert not torch.equal(one.train["inputs"], two.train["inputs"])
    assert (one.test["target"].numpy() == (np.array(other["label"]) == "yes")).all()
    # the test file decides nothing about the training features
    wild = {**other, "height": other["height"] * 1e6}
    again = load_task(f"some.csv target=label test={write(wild, 'other.csv')}").fold(0)
    assert torch.equal(one.train["inputs"], again.train["inputs"])
    assert not torch.equal(one.test["inputs"], again.test["inputs"])


def test_a_test_file_with_new_classes_lacking_targets_and_other_columns(write: Write) -> None:
    other = {**plain(), "label": ["no"] * 30 + ["maybe"] * 20 + [None] * 10, "extra": [1] * 60}
    other["width"] = ["wide" if place == 0 else value for place, value in enumerate(other["width"])]
    task = load_task(f"{write(plain(seed=1))} target=label test={write(other, 'other.csv')}")
    assert len(task.fold(0).test["target"]) == 30
    notices = "\n".join(task.notices)
    assert "rows of other.csv of classes that some.csv has not are left out (maybe; 20 rows)" in notices
    assert "rows of other.csv without label are left out (10 of 60)" in notices
    assert "other.csv has columns that some.csv has not; left out: extra" in notices
    assert "width: cells that are no numbers count as missing (1, such as 'wide')" in notices


def test_a_test_file_that_does_not_fit(write: Write) -> None:
    path = write({**plain(), "row": np.arange(60)})
    lacking = {name: cells for name, cells in plain().items() if name != "width"}
    with pytest.raises(UsageError, match=r"other.csv lacks the column width of some.csv"):
        load_task(f"{path} target=label test={write({**lacking, 'wdth': [1] * 60}, 'other.csv')}")
    # a column that is left out anyway may be absent
    assert load_task(f"{path} target=label test={write(plain(), 'other.csv')}").fold(0)
    del lacking["label"]
    with pytest.raises(UsageError, match=r"other.csv has no column label"):
        load_task(f"{path} target=label test={write(lacking, 'other.csv')}")
    strange = {**plain(), "label": ["maybe"] * 60}
    with pytest.raises(UsageError, match=r"other.csv has no row to test on"):
        load_task(f"{path} target=label test={write(strange, 'other.csv')}")
    with pytest.raises(UsageError, match=r"there is no file othr.csv; nearest: other.csv"):
        load_task(f"{path} target=label test=othr.csv")


def test_copies_across_splits_are_said(write: Write) -> None:
    columns = plain()
    twice = {name: np.concatenate([cells, cells]) for name, cells in columns.items()}
    task = load_task(f"{write(twice)} target=label")
    assert (
        "rows that are exact copies of another: 60 of 120; copies may fall into different splits"
        in task.notices
    )
    task = load_task(f"{write(columns)} target=label test={write(columns, 'other.csv')}")
    assert "rows of other.csv that also stand in some.csv: 60 of 60" in task.notices


# ---------------------------------------------------------------------------------------------------- numbers


def priced(rows: int = 120, seed: int = 0) -> dict[str, Any]:
    made = rng(seed)
    area = made.normal(50, 10, rows)
    return {
        "area": area.round(2),
        "age": made.normal(size=rows).round(3),
        "price": (1000 + 30 * area).round(1),
    }


@pytest.mark.parametrize("words", ["", "group=shop", "time=day", "test=other.csv"])
def test_numbers_to_predict_under_every_kind_of_split(write: Write, words: str) -> None:
    columns = {**priced(), "shop": [f"s{place % 12}" for place in range(120)], "day": np.arange(120) % 60}
    write({**priced(30, seed=9), "shop": ["s1"] * 30, "day": [99] * 30}, "other.csv")
    task = load_task(f"{write(columns)} target=price drop={'day' if words != 'time=day' else 'shop'} {words}")
    fold = task.fold(2)
    assert (fold.info.family, task.metric, task.classes) == ("regression", "rmse", None)
    target = fold.train["target"]
    assert target.dtype == torch.float32
    torch.testing.assert_close(target.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)
    own = fold.test["target"].double() * fold.test["scale"] + fold.test["centre"]
    if words.startswith("test"):
        np.testing.assert_allclose(own, priced(30, seed=9)["price"], rtol=1e-5)
    assert set(np.round(own.numpy(), 1)) <= set(np.round(columns["price"], 1)) | set(
        priced(30, seed=9)["price"]
    )
    assert task.resplits == (words in ("", "group=shop"))
    found = task.reference(fold, 0)
    assert set(found) == set(task.metrics) == set(task.bands)
    assert found["r2"] > 0.5
    assert found["rmse"] < 300, "in the units of the price"
    assert "a number to predict" in task.description


def test_a_target_that_is_constant_in_training(write: Write) -> None:
    # the mean of many times 0.1 is not 0.1: what is left must not be taken for a spread
    columns = {**priced(), "day": np.arange(120), "price": [0.1] * 80 + [7.25, 8.5] * 20}
    fold = load_task(f"{write(columns)} target=price time=day").fold(0)
    torch.testing.assert_close(fold.train["target"], torch.zeros(72), atol=1e-6, rtol=0)
    torch.testing.assert_close(fold.test["target"].double() + 0.1, torch.tensor([7.25, 8.5] * 15).double())


# ---------------------------------------------------------------------------------------------------- size


@pytest.mark.slow
def test_hundreds_of_thousands_of_rows(write: Write, tmp_path: Path) -> None:
    rows, made = 200_000, rng()
    words = np.array(["red", "blue", "old", "new", "fast", "slow", "big", "small"])
    columns = {f"n{place}": made.normal(size=rows).round(4) for place in range(6)}
    columns["kind"] = np.char.add("k", made.integers(0, 5_000, rows).astype(str))
    columns["when"] = (np.datetime64("2015-01-01") + made.integers(0, 3000, rows)).astype(str)
    columns["said"] = [" ".join(line) for line in words[made.integers(0, 8, (rows, 5))]]
    columns["row"] = np.arange(rows)
    columns["label"] = made.integers(0, 3, rows)
    path = write(columns)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    task = load_task(f"{path} target=label")
    fold = task.fold(0)
    assert time.process_time() - start < 20
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    features = sum(part["inputs"].nelement() * 4 for part in (fold.train, fold.validation, fold.test))
    # the features themselves, one copy of them in the making, and the table
    assert grown < 4 * features + 400e6
    assert abs(fold.info.num_examples - 120_000) <= 2
    assert load_task(f"{path} target=label") is task, "the file is read once"
