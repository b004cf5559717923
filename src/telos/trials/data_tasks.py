"""Tasks on data that a user brings: a table, an archive of arrays, a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from telos.losses import TaskInfo
from telos.trials import models
from telos.trials._words import UsageError
from telos.trials.splits import SHARES, WITHOUT_TEST, chronological, grouped, shuffled, stratified
from telos.trials.tasks import (
    Batch,
    Classifying,
    Fold,
    Regressing,
    classes_info,
    classification_metrics,
    derive_seed,
    noisy,
    numbers_info,
    own_units,
    regression_bands,
    regression_metrics,
    standardised,
)


class Data(Protocol):
    """What :class:`DataTask` asks of data: rows, answers, and how training rows become features.

    Attributes:
        name: of the file or folder.
        target: (N,) int64 classes from 0 or float64 numbers; rows that are only tested on stand at the end.
        classes: names of the classes, or ``None`` for numbers.
        main: how many rows are not only tested on.
        groups: (main,) number of each row's group, or ``None``.
        time: (main,) what orders the rows, or ``None``.
        columns: one dict per column, for tables.
        notices: sentences.
        images: whether an example is an image (channels, height, width).
    """

    name: str
    target: np.ndarray
    classes: tuple[str, ...] | None
    main: int
    groups: np.ndarray | None
    time: np.ndarray | None
    columns: tuple[dict[str, Any], ...]
    notices: tuple[str, ...]
    images: bool

    @property
    def what(self) -> str:
        """What an example consists of, in words."""
        ...

    def preprocess(self, train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Fit on the training rows; the result turns any rows into float32 features."""
        ...

    def leaks(self) -> list[str]:
        """Sentences on features that give the target away."""
        ...


class DataTask:
    """A task on data that a user brings: a table, an archive of arrays, a folder of images.

    By default every seed splits the rows anew, 60 % to train on, 15 % to tune on and 25 % to test on,
    stratified by class. Groups are kept together where there are any. Where the data have an order in time the
    past is trained on, and where they have a test file of their own that is tested on; then the test split is
    the same for every seed. All preprocessing is fitted on the training split alone.

    Args:
        name: a short name; with the seed it decides splits, initialisations and batch order.
        data: the rows.
        architecture: of the model; see :data:`telos.trials.models.ARCHITECTURES`. By default ``"conv"`` for
            images and ``"mlp"`` for all else.
        width: hidden units, or channels of the last convolution.
        batch_size: examples a step; by default what suits the number of rows.
        noise: probability that a training or validation label is replaced by another class, drawn evenly.

    Raises:
        telos.trials.UsageError: where the rows cannot be split as asked, or the model does not fit them.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 1e-2

    def __init__(
        self,
        name: str,
        data: Data,
        *,
        architecture: str = "",
        width: int | None = None,
        batch_size: int | None = None,
        noise: float = 0.0,
    ) -> None:
        self.name, self.data, self.noise = name, data, noise
        self.architecture = architecture or ("conv" if data.images else "mlp")
        models.check_architecture(self.architecture, data.images)
        if self.architecture == "linear":
            self.learning_rate = 1e-2
        self.width = width or (64 if self.architecture == "conv" else 128)
        self.classes, self._target = data.classes, data.target
        self._own_notices: list[str] = []
        rows = 0.6 * data.main if data.main == len(data.target) else 0.8 * data.main
        self.batch_size = batch_size or next(
            (size for limit, size in ((300, 16), (1_000, 32), (10_000, 64), (50_000, 256)) if rows < limit),
            512,
        )
        # about three thousand steps, within 3 and 60 walks through the data
        self.epochs = round(min(60, max(3, 3_000 * self.batch_size / rows)))
        self._parts = None if data.time is None else self._by_time(data.time)
        self._kept: tuple[int, Fold] | None = None
        self._fixed: list[Tensor] | None = None
        self._leaks: list[str] | None = None
        if ":" in self.architecture:
            models.check_model(self.architecture, self.info, self.width)

    @property
    def resplits(self) -> bool:
        """Whether every seed draws a new test split."""
        return self._parts is None and self.data.main == len(self.data.target)

    @property
    def columns(self) -> tuple[dict[str, Any], ...]:
        """What every column of a table is and what was done with it."""
        return self.data.columns

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of the data before the first run."""
        if self._leaks is None:
            self._leaks = self.data.leaks()
        return (*self.data.notices, *self._own_notices, *self._leaks)

    @property
    def description(self) -> str:
        """The task in a sentence or two, for reports."""
        data = self.data
        asked = f"in {len(self.classes)} classes" if self.classes else "with a number to predict"
        model = models.ARCHITECTURES.get(self.architecture, f"the model {self.architecture}")
        units = f" (width {self.width})" if self.architecture in ("mlp", "conv") else ""
        words = (
            f"{len(data.target):,} examples of {data.name} {asked}, each with {data.what}; {model}{units}. "
        )
        words += f"{self._how_split} Preprocessing is fitted on the training split."
        if self.noise:
            words += f" {self.noise:.0%} of the training and validation labels were replaced by wrong ones."
        return words

    @property
    def _how_split(self) -> str:
        held = len(self.data.target) - self.data.main
        if self._parts is not None:
            tested = f"{held:,} examples of the test file are" if held else "the last quarter is"
            return f"The past is trained on and what came after validated on; {tested} tested on."
        kept = "groups kept together" if self.data.groups is not None else ""
        dealt = "".join(f", {how}" for how in ("stratified by class" if self.classes else "", kept) if how)
        if held:
            return (
                f"{held:,} examples of the test file are tested on; each seed deals the others 80/20{dealt}."
            )
        return f"Each seed deals the examples 60/15/25{dealt}."

    @property
    def info(self) -> models.DataInfo:
        """What a loss or a model may know before the first run (the numbers are those of seed 0)."""
        info = self.fold(0).info
        assert isinstance(info, models.DataInfo)
        return info

    def fold(self, seed: int) -> Fold:
        """The split of a seed; the same seed gives the same split, whatever the recipe."""
        if self._kept is None or self._kept[0] != seed:
            self._kept = seed, self._fold(seed)
        return self._kept[1]

    def _fold(self, seed: int) -> Fold:
        rng = np.random.default_rng(derive_seed(self.name, seed, "split"))
        parts = self._rows(rng)
        train = parts[0]
        inputs = self._fixed
        if inputs is None:
            features = self.data.preprocess(train)
            inputs = [torch.from_numpy(features(rows)) for rows in parts]
            if self._parts is not None:
                # all seeds have this split, and share what was made of it
                self._fixed = inputs
        seen = noisy(self._target, rng, self.noise) if self.classes else self._target
        numbers = None if self.classes else standardised(self._target, train)

        answers = (seen, seen, self._target)  # labels to test on stay as they are
        splits: list[Batch] = []
        for rows, known, given in zip(parts, inputs, answers, strict=True):
            target = {"target": torch.from_numpy(given[rows])} if numbers is None else numbers(rows)
            splits.append({"inputs": known, **target, "index": torch.arange(len(rows))})
        shape = tuple(inputs[0].shape[1:])
        info = (
            classes_info(seen[train], len(self.classes), shape, self.width)
            if self.classes
            else numbers_info(len(train), shape, self.width)
        )
        return Fold(splits[0], splits[1], splits[2], info)

    def model(self, info: TaskInfo) -> nn.Module:
        """A fresh model; draws from torch's global generator."""
        assert isinstance(info, models.DataInfo)
        return models.build(self.architecture, info, self.width)

    @property
    def reference_name(self) -> str:
        """The learner that :meth:`reference` trains."""
        return models.reference_name(self.info)

    def _rows(self, rng: np.random.Generator) -> list[np.ndarray]:
        """The rows of training, validation and test split."""
        if self._parts is not None:
            return self._parts
        own = self._target[: self.data.main]
        held = np.arange(self.data.main, len(self._target))
        shares = SHARES if not len(held) else WITHOUT_TEST
        if self.data.groups is not None:
            try:
                parts = grouped(self.data.groups, own if self.classes else None, rng, shares)
            except ValueError as error:
                raise UsageError(f"group= of {self.data.name}: {error}") from error
        elif self.classes:
            parts = stratified(own, rng, shares)
        else:
            parts = shuffled(len(own), rng, shares)
        return [*parts, held] if len(held) else parts

    def _by_time(self, time: np.ndarray) -> list[np.ndarray]:
        """The splits in order of time; what no recipe could know of is left out of the later ones."""
        held = np.arange(self.data.main, len(self._target))
        try:
            parts = chronological(time, WITHOUT_TEST if len(held) else SHARES)
        except ValueError as error:
            raise UsageError(f"time= of {self.data.name}: {error}") from error
        parts += [held] if len(held) else []
        if not self.classes:
            return parts
        known = np.unique(self._target[parts[0]])
        if len(known) < 2:
            raise UsageError(
                f"the first 60 % of {self.data.name} in time hold one class only; nothing can be learned"
            )
        unseen = [label for place, label in enumerate(self.classes) if place not in known]
        kept = [rows[np.isin(self._target[rows], known)] for rows in parts]
        lost = sum(map(len, parts)) - sum(map(len, kept))
        if unseen:
            self._own_notices.append(
                f"classes that do not occur in the training split are left out of the later ones "
                f"({', '.join(unseen[:5])}; {lost:,} rows)"
            )
            if not all(map(len, kept)):
                raise UsageError(
                    f"time= of {self.data.name}: a later split holds only classes that were not there before"
                )
            self.classes = tuple(self.classes[place] for place in known)
            self._target = np.searchsorted(known, self._target)
        return kept


class DataClassification(Classifying, DataTask):
    """A :class:`DataTask` with classes."""

    metric = "accuracy"
    metrics: Mapping[str, str] = {"accuracy": "max", "macro_f1": "max", "nll": "min", "ece": "min"}

    def reference(self, fold: Fold, seed: int) -> dict[str, float]:
        """Test metrics of scikit-learn's learner on the same split."""
        assert isinstance(fold.info, models.DataInfo)
        logs = models.reference(fold.train, fold.test, fold.info, seed)
        return classification_metrics(logs, fold.test["target"])


class DataRegression(Regressing, DataTask):
    """A :class:`DataTask` with numbers to predict."""

    metric = "rmse"
    metrics: Mapping[str, str] = {"rmse": "min", "mae": "min", "median_absolute_error": "min", "r2": "max"}

    @property
    def bands(self) -> Mapping[str, float]:
        """Differences that do not matter in practice: a hundredth of the target's deviation, or of R2."""
        return regression_bands(self._target)

    def reference(self, fold: Fold, seed: int) -> dict[str, float]:
        """Test metrics of scikit-learn's learner on the same split."""
        assert isinstance(fold.info, models.DataInfo)
        prediction = models.reference(fold.train, fold.test, fold.info, seed)
        return regression_metrics(own_units(prediction, fold.test), own_units(fold.test["target"], fold.test))


def data_task(name: str, data: Data, **options: Any) -> DataClassification | DataRegression:
    """The task of some data: classification where there are classes, else regression."""
    if data.classes is None:
        if options.get("noise"):
            raise UsageError(f"noise= replaces labels, and the target of {data.name} is numbers")
        return DataRegression(name, data, **options)
    return DataClassification(name, data, **options)
