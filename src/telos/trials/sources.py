"""Sources: the words that say what the data are, and the task that they name.

A task is named by one text, as in a shell: what the data are, then ``key=value`` words about them::

    digits
    reviews.csv target=label text=comment
    visits.parquet target=cost group=patient test=visits_2024.parquet model=linear
    photos/ size=48
    sklearn.datasets:load_iris
    my_project.tasks:RetrievalTask

Files are read by their format and never executed; nothing is unpickled. ``module:Name`` is the only way to run
code of one's own.
"""

from __future__ import annotations

import hashlib
import inspect
import shlex
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from telos.trials import models
from telos.trials._words import UsageError, import_symbol, nearest
from telos.trials.built_in import BUILT_IN
from telos.trials.data_tasks import data_task
from telos.trials.tasks import Task

if TYPE_CHECKING:
    from telos.trials.sheets import Sheet
    from telos.trials.tables import Wanted

TASK_KEYS: dict[str, str] = {
    "target": "the column to predict",
    "kind": "classification or regression; by default what the target looks like",
    "group": "a column whose rows of one value stay in one split (a patient, a user)",
    "time": "a column of dates or numbers: the past is trained on, what came after is tested on",
    "test": "another file of the same kind, whose rows are only tested on",
    "model": "linear, mlp, conv (for images), or module:factory, a function of (info, input_shape)",
    "width": "hidden units of the mlp (128), or channels of the last convolution (64)",
    "batch_size": "examples a step; by default 16 to 512, by the number of rows",
    "noise": "share of training and validation labels that are replaced by wrong ones, as a test",
    "drop": "columns to leave out, separated by commas",
    "keep": "columns to keep although they look like identifiers",
    "text": "columns to read as text",
    "category": "columns to read as categories, such as codes that are numbers",
    "drop_rare": "true leaves out classes with too few rows for every split, instead of an error",
    "size": "height and width to which images are resized; examples in a bag, for bags",
    "radius": "for digits_adversarial: how far an attack may move an image, with pixels in [0, 1]",
    "norm": "for digits_adversarial: linf or l2, what radius= measures",
    "novel": "for digits_embeddings and digits_views: classes left out of training, which alone are measured",
}
_MODEL_KEYS = ("model", "width", "batch_size", "noise")
_TABLE_KEYS = (
    *("target", "kind", "group", "time", "test", *_MODEL_KEYS),
    *("drop", "keep", "text", "category", "drop_rare"),
)
_INPUTS = ("X", "x", "inputs", "data", "images", "features")
_TARGETS = ("y", "target", "targets", "labels", "label")
SUFFIXES = (".csv", ".tsv", ".parquet", ".pq", ".npz")


@dataclass(frozen=True)
class Words:
    """A task's text, sorted: what the data are, and a value for each key that was given."""

    source: str
    values: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Words:
        """Sort the words; anything unknown is an error that names what is nearest."""
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"the task {text!r} has a quotation mark that is not closed") from error
        if not words:
            raise UsageError(f"name a task; {nearest('', BUILT_IN)}, or a file such as reviews.csv")
        source, *rest = words
        values: dict[str, str] = {}
        for word in rest:
            key, equals, value = word.partition("=")
            if not equals:
                raise UsageError(
                    f"{word!r} after the task {source} must read key=value (quote a path that has blanks)"
                )
            if key not in TASK_KEYS:
                raise UsageError(f"unknown key {key!r} in {word!r}; {nearest(key, TASK_KEYS)}")
            if key in values:
                raise UsageError(f"{key}= is given twice")
            if not value:
                raise UsageError(f"{key}= has no value; it is {TASK_KEYS[key]}")
            values[key] = value
        return cls(source, values)

    @property
    def built_in(self) -> bool:
        """Whether the data come with telos."""
        return self.source in BUILT_IN

    @property
    def module(self) -> bool:
        """Whether the data are brought by code of the user's own."""
        return not self.built_in and ":" in self.source and not self.path.exists() and not self.file

    @property
    def path(self) -> Path:
        """The file or folder."""
        return Path(self.source).expanduser()

    @property
    def file(self) -> bool:
        """Whether the source has the suffix of a file that can be read."""
        return not self.built_in and self.path.suffix.lower() in SUFFIXES

    @property
    def test(self) -> Path | None:
        """The file or folder of ``test=``."""
        return Path(self.values["test"]).expanduser() if "test" in self.values else None

    def only(self, keys: Sequence[str], what: str) -> None:
        """Refuse words that mean nothing for this kind of data."""
        for key in self.values:
            if key not in keys:
                usable = (
                    f"it takes {', '.join(f'{known}=' for known in keys)}" if keys else "it takes no words"
                )
                raise UsageError(f"{key}= does not apply to {self.source}, {what}; {usable}")

    def number(self, key: str, low: int) -> int | None:
        """A whole number, or ``None`` where it was not given."""
        if key not in self.values:
            return None
        try:
            value = int(self.values[key])
        except ValueError as error:
            raise UsageError(f"{key} must be a whole number, got {self.values[key]!r}") from error
        if value < low:
            raise UsageError(f"{key} must be at least {low}, got {value}")
        return value

    def of_type(self, key: str, kind: type) -> Any:
        """The value of a word that one built-in task understands: a text, a number or a whole number."""
        try:
            return kind(self.values[key])
        except ValueError as error:
            what = "whole number" if kind is int else "number"
            raise UsageError(f"{key} must be a {what}, got {self.values[key]!r}") from error

    def names(self, key: str, known: Sequence[str] = ()) -> tuple[str, ...]:
        """Column names separated by commas; a name that holds a comma stands alone."""
        text = self.values.get(key, "")
        if text in known:
            return (text,)
        return tuple(name.strip() for name in text.split(",") if name.strip())

    @property
    def options(self) -> dict[str, Any]:
        """What a task on files is told about model and labels."""
        noise = self.values.get("noise", "0")
        try:
            share = float(noise)
        except ValueError as error:
            raise UsageError(f"noise must be a number, got {noise!r}") from error
        if not 0 <= share < 1:
            raise UsageError(f"noise must lie in [0, 1), got {noise}")
        return {
            "architecture": self.values.get("model", ""),
            "width": self.number("width", 1),
            "batch_size": self.number("batch_size", 1),
            "noise": share,
        }


def load(text: str) -> Task:
    """The task that some words name; see :func:`telos.trials.load_task`."""
    words = Words.parse(text)
    if words.built_in:
        return _built_in(words)
    if words.module:
        return _imported(words)
    if words.file or words.path.is_dir():
        if words.test is not None and words.test.is_dir() != words.path.is_dir():
            raise UsageError(f"test={words.values['test']} must be of the same kind as {words.source}")
        # the same task as long as no file has changed: a table is read once a process
        return _from_files(text, _stamps(words))
    if words.path.is_file():
        raise UsageError(
            f"{words.source} is a file of a kind that telos does not read; it reads {', '.join(SUFFIXES)}, "
            "and folders of images (class/name.png)"
        )
    raise UsageError(
        f"unknown task {words.source!r}; {nearest(words.source, BUILT_IN)}, and package.module:Task brings "
        f"your own, as does a file ({', '.join(SUFFIXES)}) or a folder of images"
    )


def task_title(text: str) -> str:
    """A short name for titles and folders.

    Example:
        >>> task_title("data/reviews.csv target=label"), task_title("sklearn.datasets:load_iris")
        ('reviews', 'iris')
    """
    words = Words.parse(text)
    if words.module:
        name = words.source.rpartition(":")[2]
        return name.removeprefix("load_").removeprefix("fetch_")
    if words.file:
        return words.path.stem
    return words.source if words.built_in else words.path.resolve().name


def data_files(text: str) -> list[Path]:
    """The files behind a task; none for what is built in or imported."""
    words = Words.parse(text)
    return [path for part in _parts(words) for path in part]


def modules(text: str) -> list[str]:
    """The modules of a user's own code that a task runs: ``module:Task`` and ``model=module:factory``."""
    words = Words.parse(text)
    named = [words.source] if words.module else []
    named += [words.values["model"]] if ":" in words.values.get("model", "") else []
    return [spec.partition(":")[0] for spec in named]


def fingerprint(text: str) -> str:
    """SHA-256 of the content of the files behind a task; "" where there are none.

    Example:
        >>> fingerprint("digits")
        ''
    """
    words = Words.parse(text)
    digest, some = hashlib.sha256(), False
    for files in _parts(words):
        for path in files:
            some = True
            # the name of an image's folder is its class; that of a table says nothing
            label = path.parent.name + "/" + path.name if len(files) > 1 else ""
            digest.update(label.encode() + b"\0" + _content(*_stamp(path)).encode())
        digest.update(b"\1")
    return digest.hexdigest() if some else ""


def _parts(words: Words) -> list[list[Path]]:
    """The files of the data, and of ``test=``."""
    if words.built_in or words.module:
        return []
    return [_files(path) for path in (words.path, words.test) if path is not None]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        from telos.trials.images import image_files

        return image_files(path)
    if not path.is_file():
        here = path.parent
        others = [other.name for other in here.iterdir() if other.is_file()] if here.is_dir() else []
        close = [other for other in others if Path(other).suffix == path.suffix] or others
        hint = f"; {nearest(path.name, close)}" if 0 < len(close) <= 200 else ""
        raise UsageError(f"there is no file {path}{hint}")
    return [path]


Stamp = tuple[str, int, int]


def _stamp(path: Path) -> Stamp:
    try:
        facts = path.stat()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    return str(path.absolute()), facts.st_mtime_ns, facts.st_size


def _stamps(words: Words) -> tuple[Stamp, ...]:
    return tuple(_stamp(path) for files in _parts(words) for path in files)


@lru_cache(maxsize=100_000)
def _content(path: str, changed: int, size: int) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


# ----------------------------------------------------------------------------------------------- kinds of data


def _built_in(words: Words) -> Task:
    task = BUILT_IN[words.source]
    own: Mapping[str, type] = getattr(task, "words", {})
    words.only((*getattr(task, "model_words", _MODEL_KEYS), *own), "which is built in")
    changes = {key: value for key, value in words.options.items() if value}
    changes |= {key: words.of_type(key, kind) for key, kind in own.items() if key in words.values}
    if not changes:
        return cast(Task, task)
    if "architecture" in changes:
        models.check_architecture(changes["architecture"], False)
    if "noise" in changes and not hasattr(task, "noise"):
        raise UsageError(f"noise= replaces labels, and the target of {words.source} is numbers")
    changed: Any = replace(task, **changes)
    if ":" in getattr(changed, "architecture", ""):
        models.check_model(changed.architecture, cast(models.DataInfo, changed.info), changed.width)
    return cast(Task, changed)


def _imported(words: Words) -> Task:
    found: Any = import_symbol(words.source, "task")
    if isinstance(found, type) or (callable(found) and _lacks(found)):
        try:
            found = found()
        except Exception as error:
            raise UsageError(f"{words.source} could not be built: {type(error).__name__}: {error}") from error
    arrays = _bunch(words.source, found)
    if arrays is not None:
        if words.test is not None:
            raise UsageError(f"test= does not apply to {words.source}, which is no file")
        return _from_arrays(words, arrays.checked(), None)
    if missing := _lacks(found):
        raise UsageError(f"{words.source} is not a task: it lacks {', '.join(missing)}")
    words.only((), "a task of its own")
    return cast(Task, found)


def _lacks(candidate: Any) -> list[str]:
    # statically, because reading `info` may load the data
    wanted = {name for name in vars(Task) if not name.startswith("_")} | set(Task.__annotations__)
    absent = object()
    return sorted(name for name in wanted if inspect.getattr_static(candidate, name, absent) is absent)


@lru_cache(maxsize=2)
def _from_files(text: str, stamps: tuple[Stamp, ...]) -> Task:
    words = Words.parse(text)
    if words.path.is_dir():
        from telos.trials.images import read_folder

        words.only((*_MODEL_KEYS, "test", "size"), "a folder of images")
        images = read_folder(words.path, words.number("size", 4), words.test)
        return data_task(task_title(text), images, **words.options)
    if words.path.suffix.lower() == ".npz":
        return _from_archive(words)
    from telos.trials.sheets import SUFFIXES as TABLES
    from telos.trials.sheets import read_sheet

    words.only(_TABLE_KEYS, "a table")
    if words.test is not None and words.test.suffix.lower() not in TABLES:
        raise UsageError(f"test={words.values['test']} must be a table, {', '.join(TABLES)}")
    drop = words.names("drop")
    sheet = read_sheet(words.path)
    return _from_sheet(words, sheet, read_sheet(words.test, drop) if words.test else None)


def _from_sheet(words: Words, sheet: Sheet, test: Sheet | None, target: str = "") -> Task:
    from telos.trials.tables import make_table

    wanted = _wanted(words, sheet, target)
    sheet = replace(sheet, frame=sheet.frame.drop(wanted.drop))
    return data_task(task_title(shlex.quote(words.source)), make_table(sheet, wanted, test), **words.options)


def _wanted(words: Words, sheet: Sheet, target: str) -> Wanted:
    from telos.trials.tables import Wanted

    values, known = words.values, sheet.frame.columns
    if not values.get("target", target):
        shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        raise UsageError(f"target= is missing: name the column of {sheet.name} to predict, one of {shown}")
    if (kind := values.get("kind")) not in (None, "classification", "regression"):
        raise UsageError(f"kind must be classification or regression, got {kind!r}")
    if values.get("drop_rare", "false") not in ("true", "false"):
        raise UsageError(f"drop_rare must be true or false, got {values['drop_rare']!r}")
    drop = words.names("drop", known)
    for name in drop:
        if name not in known:
            raise UsageError(f"drop={name}: {sheet.name} has no such column; {nearest(name, known)}")
    return Wanted(
        target=values.get("target", target),
        kind=kind,
        group=values.get("group"),
        time=values.get("time"),
        drop=drop,
        keep=words.names("keep", known),
        text=words.names("text", known),
        category=words.names("category", known),
        drop_rare=values.get("drop_rare") == "true",
    )


# ------------------------------------------------------------------------------------------------------ arrays


@dataclass(frozen=True)
class _Arrays:
    """Inputs and target side by side, from an archive or a function."""

    name: str
    inputs: Any
    target: np.ndarray
    names: Sequence[str] | None = None
    others: Mapping[str, np.ndarray] = field(default_factory=dict)

    def checked(self) -> _Arrays:
        """Refuse what does not fit together."""
        if self.target.ndim == 2 and self.target.shape[1] == 1:
            return replace(self, target=self.target[:, 0]).checked()
        if self.target.ndim != 1:
            raise UsageError(f"the target of {self.name} must have shape (N,), got {self.target.shape}")
        rows = self.inputs.shape[0] if hasattr(self.inputs, "shape") else len(self.inputs)
        if rows != len(self.target):
            raise UsageError(f"{self.name} holds {rows:,} inputs and {len(self.target):,} targets")
        if not rows:
            raise UsageError(f"{self.name} has no rows")
        return self

    @property
    def images(self) -> bool:
        """Whether an example is an image."""
        return np.ndim(self.inputs) in (3, 4)

    def sheet(self) -> tuple[Sheet, str]:
        """Columns, and the name of the target among them."""
        import polars as pl

        from telos.trials.sheets import Sheet

        inputs = self.inputs
        if hasattr(inputs, "columns"):  # a data frame
            columns = {str(name): np.asarray(inputs[name]) for name in inputs.columns}
        else:
            found = inputs.toarray() if hasattr(inputs, "toarray") else np.asarray(inputs)
            found = found[:, None] if found.ndim == 1 else found
            if found.ndim != 2:
                raise UsageError(f"the inputs of {self.name} must be rows or images, got shape {found.shape}")
            names = self.names if self.names is not None else [f"x{place}" for place in range(found.shape[1])]
            columns = {str(name): found[:, place] for place, name in enumerate(names)}
        columns.update({name: values for name, values in self.others.items() if name not in columns})
        target = "target" if "target" not in columns else "target of " + self.name
        frame = pl.DataFrame(
            [_series(name, values) for name, values in {**columns, target: self.target}.items()]
        )
        return Sheet(self.name, frame), target


def _series(name: str, values: np.ndarray) -> Any:
    import polars as pl

    if values.dtype.kind == "O":
        return pl.Series(
            name, [None if cell is None or cell != cell else cell for cell in values], strict=False
        )
    return pl.Series(name, np.ascontiguousarray(values))


def _bunch(spec: str, found: Any) -> _Arrays | None:
    """The arrays of a scikit-learn bunch, or of a pair (inputs, target)."""
    if isinstance(found, Mapping) and "data" in found and "target" in found:
        labels, target = found.get("target_names"), np.asarray(found["target"])
        if labels is not None and np.ndim(labels) == 1 and target.dtype.kind in "iu":
            target = np.asarray(labels)[target]
        return _Arrays(spec, found["data"], target, found.get("feature_names"))
    if isinstance(found, tuple) and len(found) == 2:
        return _Arrays(spec, found[0], np.asarray(found[1]))
    return None


def _archive(path: Path, words: Words) -> _Arrays:
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise UsageError(f"{path} holds one array; an archive has inputs and target (numpy.savez)")
        with opened as stored:
            inputs = next((name for name in _INPUTS if name in stored.files), None)
            target = next((name for name in _TARGETS if name in stored.files), None)
            if inputs is None or target is None:
                raise UsageError(
                    f"{path} holds the arrays {', '.join(stored.files) or '(none)'}; telos looks for X and y, "
                    "or inputs and target"
                )
            others = {
                name: stored[name]
                for key in ("group", "time")
                if (name := words.values.get(key, "")) in stored.files
            }
            return _Arrays(path.name, stored[inputs], stored[target], None, others).checked()
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, UsageError):
            raise
        reason = (
            "it holds Python objects, which are never unpickled" if "allow_pickle" in str(error) else error
        )
        raise UsageError(f"{path} cannot be read as a NumPy archive: {reason}") from error


def _from_archive(words: Words) -> Task:
    if words.test is not None and words.test.suffix.lower() != ".npz":
        raise UsageError(f"test={words.values['test']} must be an archive (.npz), as {words.source} is")
    return _from_arrays(
        words, _archive(words.path, words), _archive(words.test, words) if words.test else None
    )


def _from_arrays(words: Words, arrays: _Arrays, test: _Arrays | None) -> Task:
    if not arrays.images:
        words.only(_TABLE_KEYS, "rows of numbers")
        sheet, target = arrays.sheet()
        return _from_sheet(words, sheet, test.sheet()[0] if test else None, target)
    import polars as pl

    from telos.trials.images import from_arrays
    from telos.trials.sheets import Sheet
    from telos.trials.tables import answers_of

    words.only((*_MODEL_KEYS, "kind", "drop_rare", "test"), "an array of images")
    pixels, main = np.asarray(arrays.inputs), len(arrays.target)
    answers = _series("target", arrays.target)
    if test is not None:
        if np.shape(test.inputs)[1:] != pixels.shape[1:]:
            raise UsageError(
                f"images of {test.name} have shape {np.shape(test.inputs)[1:]}, those of {arrays.name} "
                f"{pixels.shape[1:]}"
            )
        pixels = np.concatenate([pixels, test.inputs])
        answers = pl.concat([answers, _series("target", test.target).cast(answers.dtype)])
    sheet = Sheet(arrays.name, pl.DataFrame({"target": arrays.target}))
    wanted = _wanted(words, sheet, "target")
    other = None if test is None else Sheet(test.name, pl.DataFrame({"target": test.target}))
    found = answers_of(sheet, answers, wanted, other)
    keeps = found.keeps
    images = from_arrays(
        arrays.name, pixels[keeps], found.target[keeps], found.classes, int(keeps[:main].sum()), found.notices
    )
    return data_task(task_title(shlex.quote(words.source)), images, **words.options)
