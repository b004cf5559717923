"""The words that name a task, and the kinds of data behind them."""

import hashlib
import os
import pickle
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import scipy.sparse
import torch
from sklearn.utils import Bunch

from telos.trials import UsageError, compare, load_task
from telos.trials.sources import TASK_KEYS, Words, data_files, fingerprint, modules, task_title


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def table(rows: int = 60) -> pl.DataFrame:
    made, label = rng(), np.arange(rows) % 2
    return pl.DataFrame({"a": made.normal(size=rows) + label, "b": made.normal(size=rows), "y": label})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    table().write_csv(tmp_path / "some.csv")
    return tmp_path


# functions that a user may name: sklearn.datasets:load_iris and the like
def load_pair() -> tuple[np.ndarray, np.ndarray]:
    return table()[["a", "b"]].to_numpy(), table()["y"].to_numpy()


def load_frame() -> Bunch:
    # only what a pandas data frame and a polars one share is used
    return Bunch(data=table()[["a", "b"]], target=table()["y"], target_names=np.array(["no", "yes"]))


def load_sparse() -> Bunch:
    return Bunch(data=scipy.sparse.csr_matrix(load_pair()[0]), target=load_pair()[1])


def load_texts() -> Bunch:
    said = [f"it is {['bad', 'good'][place % 2]} to be number {place}" for place in range(60)]
    return Bunch(data=said, target=np.arange(60) % 2)


def load_images() -> tuple[np.ndarray, np.ndarray]:
    return rng().random((60, 8, 8)), np.arange(60) % 3


def load_two_targets() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((60, 2)), np.zeros((60, 2))


def load_uneven() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((60, 2)), np.zeros(50)


# ---------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "name a task; there are: bags, breast_cancer"),
        ("some.csv 'target=y", "has a quotation mark that is not closed"),
        ("some.csv y", "'y' after the task some.csv must read key=value"),
        ("some.csv traget=y", "unknown key 'traget' in 'traget=y'; nearest: target"),
        ("some.csv target=y target=a", "target= is given twice"),
        ("some.csv target=", "target= has no value; it is the column to predict"),
        ("some.csv", "target= is missing: name the column of some.csv to predict, one of a, b, y"),
        ("smoe.csv target=y", "there is no file smoe.csv; nearest: some.csv"),
        ("some.xlsx target=y", "some.xlsx is a file of a kind that telos does not read; it reads .csv"),
        ("some.csv target=y size=8", "size= does not apply to some.csv, a table; it takes target="),
        ("digits target=y", "target= does not apply to digits, which is built in; it takes model="),
        (
            "tests.trials.examples:blobs model=linear",
            "model= does not apply to .*, a task of its own; it takes no",
        ),
        ("some.csv target=y width=big", "width must be a whole number, got 'big'"),
        ("some.csv target=y batch_size=0", "batch_size must be at least 1, got 0"),
        ("some.csv target=y noise=1", r"noise must lie in \[0, 1\), got 1"),
        ("some.csv target=y noise=much", "noise must be a number, got 'much'"),
        ("some.csv target=y kind=ranking", "kind must be classification or regression, got 'ranking'"),
        ("some.csv target=y drop_rare=yes", "drop_rare must be true or false, got 'yes'"),
        ("some.csv target=y model=mpl", "unknown model=mpl; nearest: mlp"),
        ("some.csv target=y model=conv", "model=conv needs images"),
        (
            "some.csv target=y model=tests.trials.test_models:too_wide",
            r"into outputs of shape \(2, 2\), got \(2, 3\)",
        ),
        ("some.csv target=y test=folder", "test=folder must be of the same kind as some.csv"),
        ("some.csv target=y test=some.npz", "test=some.npz must be a table"),
        ("diabetes noise=0.1", "noise= replaces labels, and the target of diabetes is numbers"),
        ("digits model=conv", "model=conv needs images"),
        ("digits model=tests.trials.test_models:too_wide", r"into outputs of shape \(2, 10\), got \(2, 11\)"),
        ("sklearn.datasets:load_iris test=some.csv", "test= does not apply to sklearn.datasets:load_iris"),
        ("tests.trials.test_sources:load_two_targets", r"must have shape \(N,\), got \(60, 2\)"),
        ("tests.trials.test_sources:load_uneven", "holds 60 inputs and 50 targets"),
    ],
)
def test_words_that_make_no_sense(here: Path, text: str, message: str) -> None:
    (here / "some.xlsx").write_bytes(b"PK\x03\x04")
    (here / "some.npz").write_bytes(b"")
    (here / "folder").mkdir()
    with pytest.raises(UsageError, match=message) as caught:
        load_task(text)
    assert "\n" not in str(caught.value)


def test_every_key_has_a_line_of_help() -> None:
    assert all(line and "\n" not in line for line in TASK_KEYS.values())


def test_names_with_blanks_and_commas(here: Path) -> None:
    table().rename({"a": "the a, b", "y": "is it"}).write_csv(here / "my data.csv")
    text = shlex.join(["my data.csv", "target=is it", "keep=the a, b"])
    task = load_task(text)
    assert (task.name, task_title(text)) == ("my data", "my data")
    assert Words.parse(text).values["keep"] == "the a, b"


def test_titles() -> None:
    assert task_title("digits noise=0.3") == "digits"
    assert task_title("data/reviews.2.csv target=y") == "reviews.2"
    assert task_title("my.module:RetrievalTask") == "RetrievalTask"
    assert task_title("sklearn.datasets:load_wine") == "wine"
    assert task_title("some/photos/") == "photos"


def test_the_user_s_own_modules_are_named() -> None:
    assert modules("digits") == []
    assert modules("my.module:Task") == ["my.module"]
    assert modules("some.csv target=y model=my.models:make time=at") == ["my.models"]


# ---------------------------------------------------------------------------------------------------- files


def test_files_and_their_fingerprint(here: Path) -> None:
    text = "some.csv target=y"
    assert data_files(text) == [Path("some.csv")]
    assert data_files("digits") == data_files("my.module:Task") == []
    assert fingerprint("digits") == ""
    content = hashlib.sha256((here / "some.csv").read_bytes()).hexdigest()
    before = fingerprint(text)
    # of the content, whatever the words about it
    assert fingerprint("some.csv target=a drop=b") == before
    (here / "other.csv").write_bytes((here / "some.csv").read_bytes())
    assert fingerprint("other.csv target=y") == before
    assert before != content
    assert fingerprint("some.csv target=y test=other.csv") != before
    facts = (here / "some.csv").stat()
    with (here / "some.csv").open("a") as file:
        file.write("1,2,1\n")
    os.utime("some.csv", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert fingerprint(text) != before, "the size tells, if not the time"
    with pytest.raises(UsageError, match="there is no file gone.csv"):
        fingerprint("gone.csv target=y")


def test_a_file_is_read_once_and_again_when_it_changes(here: Path) -> None:
    one = load_task("some.csv target=y")
    assert load_task("some.csv target=y") is one
    table(80).write_csv(here / "some.csv")
    assert len(load_task("some.csv target=y").data.target) == 80


def test_the_model_and_what_it_is_told(here: Path) -> None:
    plain = load_task("some.csv target=y")
    assert (plain.architecture, plain.width, plain.batch_size, plain.epochs) == ("mlp", 128, 16, 60)
    told = load_task("some.csv target=y model=linear batch_size=8")
    assert told.batch_size == 8
    assert sum(weights.numel() for weights in told.model(told.info).parameters()) == 2 * 3
    own = load_task("some.csv target=y model=tests.trials.test_models:factory")
    assert sum(weights.numel() for weights in own.model(own.info).parameters()) == 2 * 3
    assert "the model tests.trials.test_models:factory" in own.description


def test_noise_of_labels(here: Path) -> None:
    table(1000).write_csv(here / "some.csv")
    clean, noisy = load_task("some.csv target=y").fold(0), load_task("some.csv target=y noise=0.3").fold(0)
    assert torch.equal(clean.train["inputs"], noisy.train["inputs"])
    assert torch.equal(clean.test["target"], noisy.test["target"])
    assert abs((clean.train["target"] != noisy.train["target"]).double().mean() - 0.3) < 0.08


def test_built_in_tasks_take_a_few_words() -> None:
    assert load_task("digits") is load_task("digits")
    told = load_task("digits noise=0.25 width=16 batch_size=100 model=linear")
    assert (told.noise, told.width, told.batch_size) == (0.25, 16, 100)
    fold = told.fold(0)
    assert torch.equal(fold.train["inputs"], load_task("digits").fold(0).train["inputs"])
    assert sum(weights.numel() for weights in told.model(fold.info).parameters()) == 650


# ---------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    ("name", "classes", "shape"),
    [
        ("sklearn.datasets:load_iris", ("setosa", "versicolor", "virginica"), (4,)),
        ("sklearn.datasets:load_diabetes", None, (10,)),
        ("tests.trials.test_sources:load_pair", ("0", "1"), (2,)),
        ("tests.trials.test_sources:load_frame", ("no", "yes"), (2,)),
        ("tests.trials.test_sources:load_sparse", ("0", "1"), (2,)),
        ("tests.trials.test_sources:load_images", ("0", "1", "2"), (1, 8, 8)),
    ],
)
def test_functions_that_return_a_bunch_or_a_pair(name: str, classes: tuple | None, shape: tuple) -> None:
    task = load_task(name)
    assert task.classes == classes
    assert task.fold(0).info.input_shape == shape
    assert task.architecture == ("conv" if len(shape) == 3 else "mlp")


def test_a_bunch_of_texts() -> None:
    task = load_task("tests.trials.test_sources:load_texts")
    assert [one["kind"] for one in task.columns] == ["target", "text"]


def test_columns_of_a_bunch_have_its_names() -> None:
    task = load_task("sklearn.datasets:load_iris drop='petal width (cm)' group='sepal width (cm)'")
    kinds = {one["name"]: one["kind"] for one in task.columns}
    assert kinds == {
        "target": "target",
        "sepal width (cm)": "group",
        "sepal length (cm)": "number",
        "petal length (cm)": "number",
    }


def test_archives(here: Path) -> None:
    inputs, target = load_pair()
    expected = load_task("tests.trials.test_sources:load_pair").fold(0)
    for names in (("X", "y"), ("inputs", "target")):
        np.savez(here / "pair.npz", **dict(zip(names, (inputs, target), strict=True)))
        assert torch.equal(load_task("pair.npz").fold(0).train["inputs"], expected.train["inputs"])
    np.savez(here / "words.npz", X=inputs, y=np.array(["no", "yes"])[target], patient=np.arange(60) // 3)
    task = load_task("words.npz group=patient")
    assert task.classes == ("no", "yes")
    assert len(set(task.data.groups)) == 20
    np.savez(here / "rest.npz", X=inputs[:7], y=target[:7])
    assert len(load_task("pair.npz test=rest.npz").fold(0).test["target"]) == 7


def test_archives_of_images(here: Path) -> None:
    made, label = rng(), np.arange(60) % 3
    for name, shape in (("grey", (60, 9, 8)), ("colour", (60, 9, 8, 3)), ("first", (60, 3, 9, 8))):
        pixels = made.integers(0, 256, shape).astype(np.uint8)
        np.savez(here / f"{name}.npz", X=pixels, y=label)
        task = load_task(f"{name}.npz")
        channels = 1 if name == "grey" else 3
        assert task.fold(0).info.input_shape == (channels, 9, 8)
        mean = task.fold(0).train["inputs"].mean((0, 2, 3))
        torch.testing.assert_close(mean, torch.zeros(channels), atol=1e-5, rtol=0)
        np.savez(here / "rest.npz", X=pixels[:10], y=label[:10] + 1)
        tested = load_task(f"{name}.npz test=rest.npz")
        assert len(tested.fold(0).test["target"]) == 6 + 1  # class 3 is new
    with pytest.raises(
        UsageError, match=r"images of grey.npz have shape \(9, 8\), those of colour.npz \(9, 8, 3\)"
    ):
        load_task("colour.npz test=grey.npz")
    with pytest.raises(UsageError, match="group= does not apply to colour.npz, an array of images"):
        load_task("colour.npz group=patient")
    with pytest.raises(UsageError, match="size= does not apply"):
        load_task("colour.npz size=8")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_nothing_is_unpickled(here: Path) -> None:
    objects = np.array([Bomb()] * 60, dtype=object)
    np.savez(here / "evil.npz", X=objects, y=np.arange(60) % 2)
    with pytest.raises(
        UsageError, match=r"evil.npz cannot be read .*: it holds Python objects, which are never unpickled"
    ):
        load_task("evil.npz")
    (here / "worse.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UsageError, match=r"worse.npz cannot be read as a NumPy archive"):
        load_task("worse.npz")
    assert not (here / "exploded").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "holds the arrays a; telos looks for X and y"),
        ({"X": np.zeros((3, 2)), "y": np.zeros(4)}, "holds 3 inputs and 4 targets"),
        ({"X": np.zeros((0, 2)), "y": np.zeros(0)}, "some.npz has no rows"),
        ({"X": np.zeros((60, 2)), "y": np.zeros(60)}, "has one value only, '0'"),
        (
            {"X": np.zeros((60, 2, 2, 2, 2)), "y": np.arange(60) % 2},
            r"must be rows or images, got shape \(60, 2, 2",
        ),
        ({"X": np.zeros((60, 4, 4)), "y": np.arange(60) // 2}, "class '0' of target=target has 2 rows"),
    ],
)
def test_archives_from_which_nothing_can_be_learned(here: Path, arrays: dict, message: str) -> None:
    np.savez(here / "some.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        load_task("some.npz kind=classification" if arrays.get("X", np.zeros(0)).ndim == 3 else "some.npz")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 broken"])
def test_broken_archives(here: Path, content: bytes) -> None:
    (here / "some.npz").write_bytes(content)
    with pytest.raises(UsageError, match=r"some.npz cannot be read as a NumPy archive") as caught:
        load_task("some.npz")
    assert "\n" not in str(caught.value)
    np.save(here / "one.npy", np.zeros(3))
    (here / "some.npz").write_bytes((here / "one.npy").read_bytes())
    with pytest.raises(UsageError, match=r"some.npz holds one array"):
        load_task("some.npz")


# ------------------------------------------------------------------------------------------------- from end to end


def test_a_comparison_on_a_table(here: Path) -> None:
    found = compare("some.csv target=y model=linear", "cross_entropy,focal", seeds=2, trials=1, epochs=3)
    assert [len(entry.finished) for entry in found.entries] == [2, 2]
    assert found.entries[0].mean("test_accuracy") > 0.5
    reference = getattr(found, "reference", SimpleNamespace(values=lambda metric: {0: 1, 1: 1}))
    assert sorted(reference.values("test_accuracy")) == [0, 1]


def test_a_comparison_with_numbers_to_predict(here: Path) -> None:
    made = rng()
    a = made.normal(size=200)
    pl.DataFrame(
        {"a": a, "b": made.normal(size=200), "price": 100 + 20 * a + made.normal(size=200)}
    ).write_csv("p.csv")
    losses = "telos.losses.regression:MSELoss,telos.losses.regression:HuberLoss:delta=0.5"
    found = compare("p.csv target=price model=linear", losses, seeds=2, trials=1, epochs=60, band=0.1)
    assert [len(entry.finished) for entry in found.entries] == [2, 2]
    for entry in found.entries:
        assert 0.5 < entry.mean("test_rmse") < 6
        assert entry.mean("test_r2") > 0.9
    refused = compare(
        "p.csv target=price", f"{losses},cross_entropy", seeds=1, trials=1, epochs=1, band=0.1
    ).entries[-1]
    assert "classification loss and the task calls a regression loss" in str(refused.reason)
