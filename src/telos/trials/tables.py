"""Tables: a CSV or Parquet file, or any data frame, as numbers that a network can learn from.

What a column *is* is decided once for the whole file (:mod:`telos.trials.columns`), without the target. What is
*fitted* (medians, scales, categories, vocabularies) is fitted by :meth:`Table.preprocess` on the training rows
of each split alone, with scikit-learn's transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from telos.trials import columns as kinds
from telos.trials._words import UsageError, nearest
from telos.trials.columns import Typed, typed
from telos.trials.sheets import Sheet
from telos.trials.splits import ROWS_OF_A_CLASS

MISSING_CATEGORY = "(missing)"
CATEGORIES = 64  # one-hot columns of one category column, at most
ONE_HOT = 2_000  # one-hot columns of a table, at most (four for each column in any case)
WORDS = 2_000  # words of a text column, at most
WORD_CELLS = 1e8  # words times rows of all text columns together, at most (200 words in any case)
BUCKETS = 2**18  # into which words are hashed
LENGTH = 10**0.5  # of a text's features: it weighs as much as ten standardised numbers
FARTHEST = 10.0  # standardised numbers are cut off here
LARGEST = 4e9  # bytes of all features together
UNITS: dict[str, dict[str, Any]] = {
    # signs count too: they are what some texts consist of
    "words": {"token_pattern": r"(?u)\w+|[^\w\s]"},
    "characters": {"analyzer": "char", "ngram_range": (1, 2)},
}


@dataclass(frozen=True)
class Wanted:
    """What the words of a command say about a table; see :data:`telos.trials.sources.TASK_KEYS`."""

    target: str
    kind: str | None = None
    group: str | None = None
    time: str | None = None
    drop: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    category: tuple[str, ...] = ()
    drop_rare: bool = False


@dataclass(eq=False)
class Table:
    """Columns made ready, targets, and what splits need; rows of a test file stand at the end.

    Attributes:
        name: of the file.
        frame: one Float64 column per number, one Int32 column of codes per category, one String column per text.
        target: (N,) int64 classes or float64 numbers.
        classes: their names, or ``None`` for numbers.
        main: how many of the rows are not from a test file.
        groups: (main,) number of each row's group.
        time: (main,) by which rows are ordered.
        numbers: names in ``frame`` whose missing cells get an indicator.
        calendars: numbers whose missing cells another column already shows.
        categories: names in ``frame``.
        most: one-hot columns of a category, at most.
        frequent: categories with more values than that.
        texts: names in ``frame``, each with the unit that is counted, ``"words"`` or ``"characters"``.
        words: of a text, at most.
        columns: one dict per column of the file: ``name``, ``kind``, ``treatment``, ``missing`` (share).
        notices: sentences.
        target_name: of the target's column.
        labels: the file's column behind the first part of each name in ``frame``.
    """

    name: str
    frame: pl.DataFrame
    target: np.ndarray
    classes: tuple[str, ...] | None
    main: int
    groups: np.ndarray | None = None
    time: np.ndarray | None = None
    numbers: list[str] = field(default_factory=list)
    calendars: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    most: int = CATEGORIES
    frequent: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    words: int = WORDS
    columns: tuple[dict[str, Any], ...] = ()
    notices: tuple[str, ...] = ()
    target_name: str = "the target"
    labels: dict[str, str] = field(default_factory=dict)
    images = False

    def label(self, key: str) -> str:
        """The column of the file from which a column of ``frame`` was made."""
        return self.labels[key.partition(":")[0]]

    def leaks(self) -> list[str]:
        """Sentences on columns that give the target away."""
        from telos.trials.leaks import giveaways

        return giveaways(self)

    @cached_property
    def counts(self) -> dict[str, Any]:
        """How often each word stands in each text: counting needs no fitting, so it is done once."""
        return {
            name: HashingVectorizer(
                n_features=BUCKETS, alternate_sign=False, norm=None, dtype=np.float32, **UNITS[unit]
            ).transform(self.frame[name])
            for name, unit in self.texts.items()
        }

    @property
    def examples(self) -> int:
        """Rows, those of a test file included."""
        return len(self.target)

    @property
    def what(self) -> str:
        """The columns in words: ``12 numbers, 2 categories and 1 text``."""
        found = Counter(str(column["kind"]) for column in self.columns)
        names = {"number": "numbers", "boolean": "booleans", "date": "dates", "category": "categories"}
        parts = [
            f"{found[kind]} {names.get(kind, kind + 's') if found[kind] > 1 else kind}"
            for kind in (*names, "text")
            if found[kind]
        ]
        return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]

    def preprocess(self, train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Fit on the training rows; the result turns any rows into features (n, D), float32."""
        steps: list[tuple[str, Any, Any]] = []
        if numbers := [*self.numbers, *self.calendars]:
            median = SimpleImputer(strategy="median", keep_empty_features=True)
            steps.append(("numbers", make_pipeline(median, _Standard()), numbers))
        if self.numbers:
            steps.append(("missing", MissingIndicator(error_on_new=False), self.numbers))
        if self.categories:
            encoder = OneHotEncoder(
                max_categories=self.most,
                min_frequency=3,
                handle_unknown="infrequent_if_exist",
                sparse_output=False,
                dtype=np.float32,
            )
            steps.append(("categories", encoder, self.categories))
        if self.frequent:
            steps.append(("frequencies", make_pipeline(_Frequency(), _Standard()), self.frequent))
        dense = ColumnTransformer(steps, sparse_threshold=0.0) if steps else None
        # fitting makes the training rows' features on the way: they are handed out once
        ready = [] if dense is None else [dense.fit_transform(self.frame[train])]
        texts = [_Words(counts, train, self.words) for counts in self.counts.values()]

        def features(rows: np.ndarray) -> np.ndarray:
            parts = []
            if dense is not None:
                parts = [ready.pop() if rows is train and ready else dense.transform(self.frame[rows])]
            parts += [words.features(rows) for words in texts]
            return np.concatenate(parts, axis=1).astype(np.float32, copy=False)

        return features


class _Standard(StandardScaler):
    """Mean 0 and deviation 1 on the training rows; 0 for what is constant there; outliers are cut off."""

    def transform(self, X: np.ndarray, copy: bool | None = None) -> np.ndarray:
        scaled = super().transform(X, copy=copy).astype(np.float32, copy=False)
        scaled[:, (self.scale_ == 1) & (self.var_ < 0.5)] = 0
        return np.clip(scaled, -FARTHEST, FARTHEST, out=scaled)


class _Frequency(TransformerMixin, BaseEstimator):
    """The logarithm of how often a category occurs among the training rows; scikit-learn has no such encoder."""

    def fit(self, X: Any, y: object = None) -> _Frequency:
        codes = np.asarray(X)
        self.counts_ = [np.bincount(column, minlength=int(column.max()) + 1) for column in codes.T]
        return self

    def transform(self, X: Any) -> np.ndarray:
        found = [
            np.where(column < len(counts), counts[np.minimum(column, len(counts) - 1)], 0)
            for column, counts in zip(np.asarray(X).T, self.counts_, strict=True)
        ]
        return np.log1p(np.stack(found, axis=1))


class _Words:
    """TF-IDF weights of the words that most training texts have, of those in two or more."""

    def __init__(self, counts: Any, train: np.ndarray, most: int) -> None:
        known = counts[train]
        texts = np.bincount(known.indices, minlength=counts.shape[1])
        order = np.argsort(-texts, kind="stable")[:most]
        chosen = np.sort(order[texts[order] >= 2])
        self.counts = counts[:, chosen]
        self.weights = TfidfTransformer(sublinear_tf=True).fit(self.counts[train]) if len(chosen) else None

    def features(self, rows: np.ndarray) -> np.ndarray:
        """Weights (n, words); a text without a known word is a row of zeros."""
        found = self.counts[rows]
        return LENGTH * (found if self.weights is None else self.weights.transform(found)).toarray()


def make_table(sheet: Sheet, wanted: Wanted, test: Sheet | None = None) -> Table:
    """Decide what every column is and make it ready.

    Args:
        sheet: the data.
        wanted: what the user said.
        test: rows that are only tested on; its columns are read as those of ``sheet``.

    Raises:
        telos.trials.UsageError: where nothing can be learned: a missing or constant target, no rows, a class
            with too few rows, no column left.
    """
    _check_names(sheet, wanted)
    if not sheet.frame.height:
        raise UsageError(f"{sheet.name} has no rows")
    notices = list(sheet.notices)
    frame, absent = sheet.frame, set[str]()
    if test is not None:
        frame, absent = _stacked(sheet, test, wanted, notices)
    main = sheet.frame.height
    found = answers_of(sheet, frame[wanted.target], wanted, test)
    notices += found.notices
    target, keeps = found.target, found.keeps
    order = None
    if wanted.time:
        order = kinds.moments_or_numbers(typed(frame[wanted.time], main, decimal_comma=sheet.decimal_comma))
        timeless = order.is_null().to_numpy() & (np.arange(len(order)) < main)
        if count := int((timeless & keeps).sum()):
            notices.append(f"rows without {wanted.time} are left out ({count:,})")
        keeps = keeps & ~timeless
        if not keeps[:main].any():
            raise UsageError(f"{sheet.name} has no row with both {wanted.target} and {wanted.time}")
    if not keeps.all():
        frame, target = frame.filter(pl.Series(keeps)), target[keeps]
        order = order.filter(pl.Series(keeps)) if order is not None else None
        main = int(keeps[:main].sum())
    table = Table(sheet.name, pl.DataFrame(), target, found.classes, main, target_name=wanted.target)
    if test is not None and table.examples == main:
        raise UsageError(f"{test.name} has no row to test on")
    if order is not None:
        table.time = order.head(main).to_numpy()
    if wanted.group:
        grouping = typed(frame[wanted.group], main, decimal_comma=sheet.decimal_comma)
        table.groups = _groups(grouping.values.head(main), wanted.group, notices)
    features = _Features(table, wanted, sheet.decimal_comma)
    for column in frame:
        if column.name not in (wanted.target, wanted.group):
            features.add(column)
    features.finish()
    notices += features.notices
    _check_size(table)
    if missing := [one["name"] for one in features.described if one["used"] and one["name"] in absent]:
        assert test is not None
        one = missing[0]
        raise UsageError(
            f"{test.name} lacks {'the column' if len(missing) == 1 else 'columns'} {', '.join(missing)} of "
            f"{sheet.name}; for {one} {nearest(one, test.frame.columns)}"
        )
    if not table.frame.width:
        raise UsageError(f"{sheet.name} has no column left to learn {wanted.target} from")
    kind = f"{len(found.classes)} classes" if found.classes else "numbers"
    own = [_row(wanted.target, "target", kind, found.missing)]
    own += [_row(wanted.group, "group", "rows that share it stay in one split", None)] if wanted.group else []
    table.columns = tuple(
        {key: value for key, value in one.items() if key != "used"} for one in [*own, *features.described]
    )
    _note_copies(frame, main, sheet, test, notices)
    table.notices = tuple(notices)
    return table


def _check_size(table: Table) -> None:
    """Refuse what would not fit in memory, before it is tried."""
    width = len(table.numbers) + len(table.calendars) + len(table.frequent) + table.words * len(table.texts)
    width += sum(table.frame[key].has_nulls() for key in table.numbers)
    width += sum(min(table.most, table.frame[key].n_unique()) for key in table.categories)
    size = 4.0 * table.examples * width
    if size > LARGEST:
        raise UsageError(
            f"{table.examples:,} rows of about {width:,} features of {table.name} would take {size / 1e9:.1f} GB; "
            "drop= leaves columns out"
        )


def _check_names(sheet: Sheet, wanted: Wanted) -> None:
    named = {
        "target": (wanted.target,),
        "group": (wanted.group,) if wanted.group else (),
        "time": (wanted.time,) if wanted.time else (),
        "keep": wanted.keep,
        "text": wanted.text,
        "category": wanted.category,
    }
    for key, names in named.items():
        for name in names:
            if name in wanted.drop:
                raise UsageError(f"{key}={name} is also in drop=")
            if name not in sheet.frame.columns:
                raise UsageError(f"{key}={name}: {sheet.name} has no such column; {_columns(name, sheet)}")
    if wanted.group and wanted.time:
        raise UsageError("group= and time= cannot be combined: a group may last longer than a split")
    for key in ("group", "time"):
        if getattr(wanted, key) == wanted.target:
            raise UsageError(f"{key}={wanted.target} is the target")
    for name in wanted.text:
        if name in wanted.category:
            raise UsageError(f"{name} is both in text= and in category=")


def _columns(name: str, sheet: Sheet) -> str:
    known = sheet.frame.columns
    hint = nearest(name, known)
    # the name of every column of a wide table helps nobody
    return hint if len(known) <= 30 or hint.startswith("nearest") else f"there are {len(known)} columns"


def _stacked(sheet: Sheet, test: Sheet, wanted: Wanted, notices: list[str]) -> tuple[pl.DataFrame, set[str]]:
    """The rows of both files, columns as in the first, and the columns that the second lacks."""
    notices += [notice for notice in test.notices if notice not in notices]
    if not test.frame.height:
        raise UsageError(f"{test.name} has no rows")
    if wanted.target not in test.frame.columns:
        raise UsageError(f"{test.name} has no column {wanted.target}; {_columns(wanted.target, test)}")
    absent = set(sheet.frame.columns) - set(test.frame.columns)
    if extra := [name for name in test.frame.columns if name not in sheet.frame.columns]:
        notices.append(f"{test.name} has columns that {sheet.name} has not; left out: {', '.join(extra)}")
    stacked = []
    for column in sheet.frame:
        other = pl.Series(column.name, [None] * test.frame.height, dtype=column.dtype)
        if column.name not in absent and not column.dtype.is_nested():
            found = test.frame[column.name]
            other = other if found.dtype.is_nested() else found
        if column.dtype != other.dtype:
            common = pl.Float64 if column.dtype.is_numeric() and other.dtype.is_numeric() else pl.String
            column, other = column.cast(common, strict=False), other.cast(common, strict=False)
        stacked.append(pl.concat([column, other]))
    return pl.DataFrame(stacked), absent


@dataclass(frozen=True)
class Answers:
    """A target made ready.

    Attributes:
        target: (N,) int64 classes or float64 numbers.
        classes: names of the classes, or ``None`` for numbers.
        keeps: (N,) which rows have an answer that can be used.
        missing: share of the rows without one.
        notices: sentences.
    """

    target: np.ndarray
    classes: tuple[str, ...] | None
    keeps: np.ndarray
    missing: float
    notices: list[str]


def answers_of(sheet: Sheet, raw: pl.Series, wanted: Wanted, test: Sheet | None) -> Answers:
    """Classes or numbers?

    Args:
        sheet: the data, for its name and size.
        raw: the target of its rows and then of those of ``test``.
        wanted: what the user said.
        test: rows that are only tested on.

    Raises:
        telos.trials.UsageError: where there is nothing to learn, or a class has too few rows.
    """
    main, notices = sheet.frame.height, list[str]()
    answers = typed(raw, main, decimal_comma=sheet.decimal_comma)
    if answers.kind == "boolean" and raw.dtype == pl.String:
        # "yes" and "no" are to be called that
        answers = Typed(wanted.target, "string", kinds.tidied(raw))
    name, values = wanted.target, answers.values
    notices += answers.notices
    if answers.kind == "empty":
        raise UsageError(f"target={name} has no value in {sheet.name}")
    if answers.kind in ("date", "nested"):
        raise UsageError(
            f"target={name} of {sheet.name} is a column of kind {answers.kind}, not classes or numbers"
        )
    known = values.is_not_null().to_numpy()
    missing = 1 - float(known[:main].mean())
    for part, where in ((sheet, slice(0, main)), (test, slice(main, None))):
        if part is not None and (count := int((~known[where]).sum())):
            notices.append(
                f"rows of {part.name} without {name} are left out ({count:,} of {part.frame.height:,})"
            )
    own = values.head(main).drop_nulls()
    distinct = own.n_unique()
    if distinct == 1:
        raise UsageError(
            f"target={name} of {sheet.name} has one value only, {_label(own[0], answers)!r}: there is nothing to learn"
        )
    few = answers.whole and distinct <= min(20, max(2, int(len(own) ** 0.5)))
    as_classes = answers.kind != "number" or few if wanted.kind is None else wanted.kind == "classification"
    if not as_classes:
        if answers.kind != "number":
            raise UsageError(
                f"kind=regression needs numbers, and target={name} is a column of kind {answers.kind}"
            )
        if len(own) < 10:
            raise UsageError(f"{sheet.name} has {len(own)} rows with a target; that is too few to learn from")
        return Answers(values.fill_null(0.0).to_numpy(), None, known, missing, notices)
    ordered = own.unique().sort()
    counts = dict(own.value_counts().iter_rows())
    need = ROWS_OF_A_CLASS if test is None else 2
    rare = [value for value in ordered if counts[value] < need]
    # by time or group no split promises every class anyway
    if rare and not wanted.drop_rare and not (wanted.group or wanted.time):
        others = f" (as do {len(rare) - 1:,} others)" if len(rare) > 1 else ""
        raise UsageError(
            f"class {_label(rare[0], answers)!r} of target={name} has {_rows(counts[rare[0]])} "
            f"and needs {need} to be in every split{others}; "
            f"drop_rare=true leaves such classes out"
        )
    if rare and wanted.drop_rare:
        lost = sum(counts[value] for value in rare)
        shown = ", ".join(_label(value, answers) for value in rare[:5]) + (", ..." if len(rare) > 5 else "")
        notices.append(f"classes with fewer than {need} rows are left out ({shown}; {_rows(lost)})")
        ordered = ordered.filter(~ordered.is_in(rare))
        if len(ordered) < 2:
            raise UsageError(f"target={name} of {sheet.name} has fewer than two classes of {need} rows")
    codes = values.replace_strict(ordered, np.arange(len(ordered)), default=None, return_dtype=pl.Int64)
    keeps = known & codes.is_not_null().to_numpy()
    unseen = values.filter(pl.Series(known & ~keeps & (np.arange(len(known)) >= main)))
    if test is not None and len(unseen):
        shown = ", ".join(_label(value, answers) for value in unseen.unique().sort()[:5])
        notices.append(
            f"rows of {test.name} of classes that {sheet.name} has not are left out ({shown}; {_rows(len(unseen))})"
        )
    labels = tuple(_label(value, answers) for value in ordered)
    _note_imbalance(codes.head(main).drop_nulls().to_numpy(), labels, notices)
    return Answers(codes.fill_null(0).to_numpy().astype(np.int64), labels, keeps, missing, notices)


def _note_imbalance(codes: np.ndarray, labels: tuple[str, ...], notices: list[str]) -> None:
    shares = np.bincount(codes, minlength=len(labels)) / len(codes)
    most, least = int(shares.argmax()), int(shares.argmin())
    if shares[most] >= 0.8 or shares[least] <= 0.1 * shares[most]:
        notices.append(
            f"the classes are uneven: {labels[most]} is {shares[most]:.1%} of the rows and {labels[least]} "
            f"{shares[least]:.1%}; always saying {labels[most]} has that accuracy, and metric=macro_f1 counts "
            "every class alike"
        )


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _label(value: Any, answers: Typed) -> str:
    if answers.kind == "boolean":
        return str(bool(value)).lower()
    return str(int(value)) if answers.kind == "number" and float(value).is_integer() else str(value)


def _groups(values: pl.Series, name: str, notices: list[str]) -> np.ndarray:
    codes = values.rank("dense").cast(pl.Int64) - 1
    alone = codes.is_null().to_numpy()
    found = codes.fill_null(-1).to_numpy().copy()
    found[alone] = found.max() + 1 + np.arange(alone.sum())
    if alone.any():
        notices.append(f"rows without {name} are each a group of their own ({alone.sum():,})")
    return found


class _Features:
    """Takes the columns one by one and makes the table's features of them."""

    def __init__(self, table: Table, wanted: Wanted, decimal_comma: bool) -> None:
        self.table, self.wanted, self.decimal_comma = table, wanted, decimal_comma
        self.described: list[dict[str, Any]] = []
        self.notices: list[str] = []
        self.ready: dict[str, pl.Series] = {}
        self._categories: list[tuple[dict[str, Any], str, pl.Series]] = []
        self._texts: list[tuple[dict[str, Any], str]] = []
        self._seen: dict[tuple[Any, ...], list[tuple[str, pl.Series]]] = {}
        self._useless: dict[str, list[str]] = {}

    def add(self, raw: pl.Series) -> None:
        """Decide what a column is and make it ready."""
        main, name = self.table.main, raw.name
        column = typed(raw, main, decimal_comma=self.decimal_comma)
        own = _row(name, column.kind, "", column.values.head(main).null_count() / main)
        self.described.append(own)
        if self._left_out(column, own):
            return
        self.notices += column.notices
        own["used"] = True
        # names of features must not collide, whatever the columns are called
        key = str(len(self.described))
        self.table.labels[key] = name
        known = column.values.head(main).drop_nulls()
        if name == self.wanted.time:
            self._add_time(key, column, own)
        elif name in self.wanted.text:
            self._add_text(key, _strings(raw, column), own)
        elif name in self.wanted.category or (kinds.coded(column) and name not in self.wanted.keep):
            self._categories.append((own, key, _strings(raw, column)))
        elif column.kind == "date":
            own["treatment"] = "elapsed days, year, day, and the place in the cycles of year, week and day"
            parts = kinds.calendar(key, column.values)
            self.table.numbers.append(f"{key}: days")
            self.table.calendars += [part for part in parts if part != f"{key}: days"]
            self.ready |= parts
        elif column.kind in ("number", "boolean"):
            imputed = "median and an indicator where missing; " if own["missing"] else ""
            own["treatment"] = f"{imputed}standardised"
            self.table.numbers.append(key)
            self.ready[key] = column.values
        elif column.kind == "string" and kinds.is_text(known):
            self._add_text(key, column.values, own)
        else:
            self._categories.append((own, key, column.values))

    def finish(self) -> None:
        """What depends on how many categories and texts there are, and what was left out."""
        table = self.table
        most = table.most = max(4, min(CATEGORIES, ONE_HOT // max(1, len(self._categories))))
        for own, key, values in self._categories:
            self.ready[key] = values.fill_null(MISSING_CATEGORY).rank("dense").cast(pl.Int32) - 1
            distinct = values.head(table.main).n_unique()
            table.categories.append(key)
            own["kind"], own["treatment"] = "category", f"one-hot ({distinct} values)"
            if distinct > most:
                table.frequent.append(key)
                own["treatment"] = (
                    f"one-hot for the {most - 1} most frequent of {distinct:,} values, the others as one; "
                    "and how often the value occurs"
                )
                self.notices.append(f"{own['name']} has many categories: {own['treatment']}")
        if self._texts:
            cells = WORD_CELLS / table.examples / len(self._texts)
            table.words = int(min(WORDS, max(200, cells)))
        for own, key in self._texts:
            unit = {"words": "words", "characters": "characters and pairs of them"}[table.texts[key]]
            own["treatment"] = (
                f"TF-IDF of at most {table.words:,} {unit}, the most frequent ones of the training split "
                f"(told apart by a hash into {BUCKETS:,} buckets)"
            )
            self.notices.append(f"{own['name']} is text: {own['treatment']}")
        for why, names in self._useless.items():
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            self.notices.append(f"left out because {why}: {', '.join(names[:10])}{more}")
        table.frame = pl.DataFrame([values.alias(key) for key, values in self.ready.items()])

    def _add_time(self, key: str, column: Typed, own: dict[str, Any]) -> None:
        own["kind"], own["treatment"] = "time", "orders the splits; no feature"
        if column.kind == "date":
            own["treatment"] = "orders the splits; the place in the cycles of year, week and day is a feature"
            # what only grows would be out of range in every later split
            parts = {
                name: values
                for name, values in kinds.calendar(key, column.values).items()
                if not name.endswith((": days", ": year"))
            }
            self.table.calendars += list(parts)
            self.ready |= parts

    def _add_text(self, key: str, texts: pl.Series, own: dict[str, Any]) -> None:
        spaceless = kinds.spaceless(texts.head(self.table.main).drop_nulls())
        self.table.texts[key] = "characters" if spaceless else "words"
        self.ready[key] = texts.fill_null("")
        own["kind"] = "text"
        self._texts.append((own, key))

    def _left_out(self, column: Typed, own: dict[str, Any]) -> bool:
        """Whether a column has nothing to learn from; says so."""
        found = self._nothing(column)
        if found is None:
            return False
        own["kind"], why, shown = found
        own["treatment"] = f"left out: {why}"
        if shown:
            self._useless.setdefault(why, []).append(shown)
        return True

    def _nothing(self, column: Typed) -> tuple[str, str, str] | None:
        """Kind, reason, and how to list the column, where it has nothing to learn from."""
        name, wanted = column.name, self.wanted
        values = column.values.head(self.table.main)
        if name == wanted.time:
            return None
        if column.kind == "empty":
            return "empty", "every cell is missing", name
        if column.kind == "nested":
            return "nested", "the cells are of a type that cannot be learned from", name
        if not values.null_count() and values.n_unique() == 1:
            return "constant", "every cell is the same", name
        forced = (*wanted.keep, *wanted.text, *wanted.category)
        if name not in forced and (why := kinds.identifier(column, self.table.main)):
            self.notices.append(f"{name} is left out as an identifier: {why}; keep={name} brings it back")
            return "identifier", f"it looks like an identifier: {why}", ""
        key = (values.dtype, values.null_count(), int(values.hash(0).cast(pl.Float64).sum() or 0))
        for twin, content in self._seen.setdefault(key, []):
            if content.equals(values, null_equal=True):
                return "duplicate", "another column has the same content", f"{name} (as {twin})"
        self._seen[key].append((name, values))
        return None


def _strings(raw: pl.Series, column: Typed) -> pl.Series:
    """The cells as words, for columns that are numbers only by their looks."""
    if raw.dtype == pl.String:
        return kinds.tidied(raw)
    whole = column.kind == "number" and column.whole and float(column.values.abs().max() or 0) < 2**53  # type: ignore[arg-type]
    return (column.values.cast(pl.Int64) if whole else column.values).cast(pl.String)


def _row(name: str | None, kind: str, treatment: str, missing: float | None) -> dict[str, Any]:
    return {"name": name, "kind": kind, "treatment": treatment, "missing": missing, "used": False}


def _note_copies(
    frame: pl.DataFrame, main: int, sheet: Sheet, test: Sheet | None, notices: list[str]
) -> None:
    """Rows that occur twice may be trained on and tested on."""
    plain = [name for name, dtype in frame.schema.items() if not dtype.is_nested()]
    hashes = frame.select(plain).hash_rows(seed=0)
    own, other = hashes.head(main), hashes.slice(main)
    if test is not None:
        if copies := int(np.isin(other.to_numpy(), own.to_numpy()).sum()):
            notices.append(
                f"rows of {test.name} that also stand in {sheet.name}: {copies:,} of {len(other):,}"
            )
    elif (copies := main - own.n_unique()) >= 0.01 * main:
        notices.append(
            f"rows that are exact copies of another: {copies:,} of {main:,}; copies may fall into different splits"
        )
