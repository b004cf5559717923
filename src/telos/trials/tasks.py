"""Tasks: data, a model, a training step and metrics, and what they can tell a loss."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from telos.losses import TaskInfo
from telos.losses._algebra import call_keywords
from telos.trials import models
from telos.trials.splits import shuffled, stratified

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Fold:
    """One split of a task: three dicts of tensors (``inputs``, ``target``, ``index``) and their facts.

    The numbers of a regression are standardised, and ``centre`` and ``scale`` lead back to their own units:
    two more tensors (N,), the same number in every row.
    """

    train: Batch
    validation: Batch
    test: Batch
    info: TaskInfo


@dataclass(frozen=True)
class Batches:
    """Shuffled batches of a dict of tensors, in an order that ``generator`` decides."""

    data: Batch
    batch_size: int
    generator: torch.Generator

    def __len__(self) -> int:
        """The number of batches an epoch."""
        return -(-len(self.data["target"]) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """One walk through the data."""
        order = torch.randperm(len(self.data["target"]), generator=self.generator)
        for chosen in order.split(self.batch_size):
            yield {name: values[chosen] for name, values in self.data.items()}


class Task(Protocol):
    """What ``telos compare`` asks of a task; :class:`ClassificationTask` is one.

    A task may also have these, which are asked for with a default:

    - ``description``: of the data and the model, in a sentence or two.
    - ``notices``: what the user should know of the data before the first run, a sentence each.
    - ``columns``: of a table; one dict each with ``name``, ``kind``, ``treatment`` and ``missing`` (a share).
    - ``resplits``: whether every seed draws a new test split; True if absent.
    - ``best``: the best value that a metric can take, by name.
    - ``bands``: differences of a metric that do not matter in practice, by name.
    - ``reference``: ``(fold, seed) -> metrics`` of a learner from outside, and ``reference_name``.

    Attributes:
        name: a short name; with the seed it decides splits, initialisations and batch order.
        epochs: how long to train.
        batch_size: examples a step.
        learning_rate: untuned, for AdamW.
        weight_decay: untuned, for AdamW.
        metric: what tuning maximises or minimises on the validation split.
        metrics: ``"max"`` or ``"min"`` for each metric that ``evaluate`` returns.
    """

    name: str
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    metric: str
    metrics: Mapping[str, str]

    @property
    def info(self) -> TaskInfo:
        """What a loss may know before the first run."""
        ...

    def fold(self, seed: int) -> Fold:
        """The split of a seed."""
        ...

    def model(self, info: TaskInfo) -> nn.Module:
        """A fresh model; draws from torch's global generator, which the runner has seeded."""
        ...

    def training_step(self, model: nn.Module, loss: nn.Module) -> Callable[[Batch], Mapping[str, Tensor]]:
        """What :func:`telos.fit.fit` calls on a batch."""
        ...

    def evaluate(self, model: nn.Module, loss: nn.Module, split: Batch) -> dict[str, float]:
        """The metrics of a model on a split; the loss may know how to read the model's outputs."""
        ...


def _supplying(model: nn.Module, loss: nn.Module) -> Callable[[Batch], Mapping[str, Tensor]]:
    """A training step that gives ``index`` to losses whose call names it."""
    accepted = call_keywords(loss) or frozenset()
    supplied = sorted(accepted & {"index"})

    def step(batch: Batch) -> Mapping[str, Tensor]:
        extra = {name: batch[name] for name in supplied}
        return {"loss": loss(model(batch["inputs"]), batch["target"], **extra)}

    return step


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor, rows: int = 4096) -> Tensor:
    """What the model, in evaluation mode, makes of many examples, some at a time."""
    was_training = model.training
    model.eval()
    found = torch.cat([model(part) for part in inputs.split(rows)])
    model.train(was_training)
    return found


class Classifying:
    """How a classification task trains and measures: ``loss(logits (N, C), target (N,))``."""

    best: Mapping[str, float] = {"accuracy": 1.0, "macro_f1": 1.0, "nll": 0.0, "ece": 0.0}

    def training_step(self, model: nn.Module, loss: nn.Module) -> Callable[[Batch], Mapping[str, Tensor]]:
        """The loss of a batch; ``index`` goes to losses whose call names it."""
        return _supplying(model, loss)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loss: nn.Module, split: Batch) -> dict[str, float]:
        """Accuracy, macro-F1, NLL and ECE, with the model in evaluation mode.

        A loss whose probabilities are not the softmax of the logits says so with a method
        ``log_probabilities(logits)``; all others are read through softmax.
        """
        logits = _outputs(model, split["inputs"])
        own = getattr(loss, "log_probabilities", None)
        if own is not None:
            logits = own(logits)
        return classification_metrics(logits, split["target"])


class Regressing:
    """How a regression task trains and measures: ``loss(prediction (N,), target (N,))``, target standardised."""

    best: Mapping[str, float] = {"rmse": 0.0, "mae": 0.0, "median_absolute_error": 0.0, "r2": 1.0}

    def training_step(self, model: nn.Module, loss: nn.Module) -> Callable[[Batch], Mapping[str, Tensor]]:
        """The loss of a batch; a last dimension of one output is taken off."""
        return _supplying(nn.Sequential(model, _Single()), loss)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loss: nn.Module, split: Batch) -> dict[str, float]:
        """RMSE, MAE, median absolute error and R2 in the target's own units, in evaluation mode."""
        prediction = _Single()(_outputs(model, split["inputs"]))
        return regression_metrics(own_units(prediction, split), own_units(split["target"], split))


class _Single(nn.Module):
    def forward(self, prediction: Tensor) -> Tensor:
        return prediction.squeeze(-1) if prediction.ndim == 2 else prediction


def own_units(values: Tensor, split: Batch) -> Tensor:
    """Standardised numbers of a split in the target's own units."""
    return values.double() * split["scale"] + split["centre"]


def standardised(target: np.ndarray, train: np.ndarray) -> Callable[[np.ndarray], Batch]:
    """The numbers of some rows in deviations of the training rows, and the way back."""
    known = target[train]
    centre, scale = float(known.mean()), float(known.std())
    if not scale > 1e-12 * np.abs(known).max():  # constant, but for rounding
        scale = 1.0

    def of(rows: np.ndarray) -> Batch:
        return {
            "target": torch.tensor((target[rows] - centre) / scale, dtype=torch.float32),
            "centre": torch.tensor(centre, dtype=torch.float64).expand(len(rows)),
            "scale": torch.tensor(scale, dtype=torch.float64).expand(len(rows)),
        }

    return of


def _scaled_inputs(inputs: np.ndarray, train: np.ndarray) -> np.ndarray:
    mean, deviation = inputs[train].mean(0), inputs[train].std(0)
    return (inputs - mean) / np.where(deviation > 0, deviation, 1.0)


@dataclass(eq=False)
class ClassificationTask(Classifying):
    """Classification of rows of numbers by a small network with one hidden layer.

    Every seed splits the data anew, stratified by class: 60 % to train on, 15 % to tune on, 25 % to test on.
    Features are standardised with the training split's mean and deviation.

    Args:
        name: a short name.
        load: returns inputs (N, D) and labels (N,) in [0, C).
        noise: probability that a training or validation label is replaced by another class, drawn evenly;
            test labels stay clean.
        imbalance: how many times more training examples the first class keeps than the last, with classes
            between them thinned exponentially. Validation and test splits stay as they were.
        width: hidden units.
        epochs: how long to train.
        batch_size: examples a step.
        learning_rate: untuned, for AdamW.
        weight_decay: untuned, for AdamW.
        metric: what tuning looks at, on the validation split.
        metrics: ``"max"`` or ``"min"`` for each metric.
        architecture: ``"linear"`` or ``module:factory`` in place of the network.

    Example:
        >>> task = load_task("wine")
        >>> fold = task.fold(seed=0)
        >>> fold.train["inputs"].shape, fold.info.num_classes, sorted(fold.info.supplies)
        (torch.Size([106, 13]), 3, ['index'])
    """

    name: str
    load: Callable[[], tuple[np.ndarray, np.ndarray]]
    noise: float = 0.0
    imbalance: float = 1.0
    width: int = 128
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    metric: str = "accuracy"
    metrics: Mapping[str, str] = field(
        default_factory=lambda: {"accuracy": "max", "macro_f1": "max", "nll": "min", "ece": "min"}
    )
    architecture: str = ""

    @property
    def description(self) -> str:
        """The task in a sentence or two, for reports."""
        inputs, target = self.load()
        words = (
            f"{len(target):,} examples with {inputs.shape[1]} features in {int(target.max()) + 1} classes; "
        )
        words += f"{_network(self.architecture, self.width)}."
        if self.noise:
            words += (
                f" {self.noise:.0%} of the training and validation labels are wrong; test labels are clean."
            )
        if self.imbalance != 1:
            words += (
                f" The training split has {self.imbalance:g} times more of the first class than of the last."
            )
        return words

    @property
    def info(self) -> TaskInfo:
        """What a loss may know before the first run (the class counts are those of seed 0)."""
        return self.fold(0).info

    def fold(self, seed: int) -> Fold:
        """The split of a seed; the same seed gives the same split, whatever the recipe."""
        inputs, target = self.load()
        rng = np.random.default_rng(derive_seed(self.name, seed, "split"))
        train, validation, test = stratified(target, rng)
        train = _long_tail(train, target, rng, self.imbalance)
        seen = noisy(target, rng, self.noise)
        scaled = self.features(inputs, train)

        def split(rows: np.ndarray, labels: np.ndarray) -> Batch:
            return {
                "inputs": torch.tensor(scaled[rows], dtype=torch.float32),
                "target": torch.tensor(labels[rows], dtype=torch.long),
                "index": torch.arange(len(rows)),
            }

        info = classes_info(seen[train], int(target.max()) + 1, inputs.shape[1:], self.width)
        return Fold(split(train, seen), split(validation, seen), split(test, target), info)

    def features(self, inputs: np.ndarray, train: np.ndarray) -> np.ndarray:
        """What the model sees of all rows; ``train`` are those from which a scale may be learnt."""
        return _scaled_inputs(inputs, train)

    def model(self, info: TaskInfo) -> nn.Module:
        """A multilayer perceptron with one hidden layer, or what ``architecture`` names."""
        assert info.num_classes is not None
        return _small_network(self.architecture, info, self.load()[0].shape[1], self.width)


@dataclass(eq=False)
class RegressionTask(Regressing):
    """Regression on rows of numbers by a small network with one hidden layer.

    Every seed splits the data anew: 60 % to train on, 15 % to tune on, 25 % to test on. Features and target
    are standardised with the training split's mean and deviation; metrics are in the target's own units.

    Args:
        name: a short name.
        load: returns inputs (N, D) and targets (N,).
        width: hidden units.
        epochs: how long to train.
        batch_size: examples a step.
        learning_rate: untuned, for AdamW.
        weight_decay: untuned, for AdamW.
        metric: what tuning looks at, on the validation split.
        metrics: ``"max"`` or ``"min"`` for each metric.
        architecture: ``"linear"`` or ``module:factory`` in place of the network.

    Example:
        >>> fold = load_task("diabetes").fold(seed=0)
        >>> fold.info.family, fold.train["target"].shape, sorted(fold.train)
        ('regression', torch.Size([266]), ['centre', 'index', 'inputs', 'scale', 'target'])
    """

    name: str
    load: Callable[[], tuple[np.ndarray, np.ndarray]]
    width: int = 128
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    metric: str = "rmse"
    metrics: Mapping[str, str] = field(
        default_factory=lambda: {"rmse": "min", "mae": "min", "median_absolute_error": "min", "r2": "max"}
    )
    architecture: str = ""

    @property
    def description(self) -> str:
        """The task in a sentence or two, for reports."""
        inputs, target = self.load()
        return (
            f"{len(target):,} examples with {inputs.shape[1]} features, a number from {target.min():.4g} to "
            f"{target.max():.4g} to predict; {_network(self.architecture, self.width)}."
        )

    @property
    def info(self) -> TaskInfo:
        """What a loss may know before the first run."""
        return self.fold(0).info

    @property
    def bands(self) -> Mapping[str, float]:
        """Differences that do not matter in practice: a hundredth of the target's deviation, or of R2."""
        return regression_bands(self.load()[1])

    def fold(self, seed: int) -> Fold:
        """The split of a seed; the same seed gives the same split, whatever the recipe."""
        inputs, target = self.load()
        rng = np.random.default_rng(derive_seed(self.name, seed, "split"))
        train, validation, test = shuffled(len(target), rng)
        scaled, answers = _scaled_inputs(inputs, train), standardised(target, train)

        def split(rows: np.ndarray) -> Batch:
            features = torch.tensor(scaled[rows], dtype=torch.float32)
            return {"inputs": features, **answers(rows), "index": torch.arange(len(rows))}

        info = numbers_info(len(train), inputs.shape[1:], self.width)
        return Fold(split(train), split(validation), split(test), info)

    def model(self, info: TaskInfo) -> nn.Module:
        """A multilayer perceptron with one hidden layer, or what ``architecture`` names."""
        return _small_network(self.architecture, info, self.load()[0].shape[1], self.width)


def _network(architecture: str, width: int) -> str:
    if not architecture:
        return f"a network with one hidden layer of {width} units"
    return models.ARCHITECTURES.get(architecture, f"the model {architecture}")


def _small_network(architecture: str, info: TaskInfo, features: int, width: int) -> nn.Module:
    if architecture:
        assert isinstance(info, models.DataInfo)
        return models.build(architecture, info, width)
    return models.mlp(features, info.num_classes or 1, width)


def classes_info(labels: np.ndarray, classes: int, shape: tuple[int, ...], width: int) -> models.DataInfo:
    """The facts of a classification, from the labels of its training split."""
    return models.DataInfo(
        family="classification",
        num_classes=classes,
        num_examples=len(labels),
        dim=width,
        class_counts=tuple(np.bincount(labels, minlength=classes).tolist()),
        supplies=frozenset({"index"}),
        input_shape=tuple(shape),
    )


def numbers_info(examples: int, shape: tuple[int, ...], width: int) -> models.DataInfo:
    """The facts of a regression."""
    return models.DataInfo(
        family="regression",
        num_examples=examples,
        dim=width,
        supplies=frozenset({"index"}),
        input_shape=tuple(shape),
    )


def regression_bands(target: np.ndarray) -> dict[str, float]:
    """Differences that do not matter in practice: a hundredth of the target's deviation, or of R2."""
    unit = float(f"{0.01 * target.std():.2g}")
    return {"rmse": unit, "mae": unit, "median_absolute_error": unit, "r2": 0.01}


# ----------------------------------------------------------------------------------------------------- metrics


def classification_metrics(logits: Tensor, target: Tensor, bins: int = 15) -> dict[str, float]:
    """Accuracy, macro-F1, negative log-likelihood and expected calibration error of ``softmax(logits)``.

    Args:
        logits: (N, C) scores.
        target: (N,) labels.
        bins: bins of equal width for the calibration error.

    Returns:
        ``accuracy``, ``macro_f1`` (the mean over the classes that occur among labels or predictions), ``nll``
        in nats and ``ece``, the mean distance between confidence and accuracy.

    Example:
        >>> import torch
        >>> found = classification_metrics(torch.tensor([[0.0, 0.0], [0.0, 40.0]]), torch.tensor([0, 1]))
        >>> {name: round(value, 4) for name, value in found.items()}
        {'accuracy': 1.0, 'macro_f1': 1.0, 'nll': 0.3466, 'ece': 0.25}
    """
    logits = logits.double()
    logs = torch.log_softmax(logits, -1)
    confidence, predicted = logs.exp().max(-1)
    right = predicted == target
    classes = logits.shape[-1]
    hits = torch.bincount(target[right], minlength=classes)
    named = torch.bincount(target, minlength=classes) + torch.bincount(predicted, minlength=classes)
    f1 = (2 * hits / named.clamp_min(1))[named > 0]
    place = (confidence * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, confidence - right.double())
    return {
        "accuracy": float(right.double().mean()),
        "macro_f1": float(f1.mean()),
        "nll": float(-logs.gather(-1, target.unsqueeze(-1)).mean()),
        "ece": float(gap.abs().sum() / len(target)),
    }


def regression_metrics(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Root mean squared, mean absolute and median absolute error, and R2.

    Args:
        prediction: (N,) numbers.
        target: (N,) numbers, in the same units.

    Returns:
        ``rmse``, ``mae``, ``median_absolute_error`` and ``r2``, the share of the target's variance that is
        explained (0 for a target without variance).

    Example:
        >>> import torch
        >>> found = regression_metrics(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 2.0, 3.0]))
        >>> {name: round(value, 4) for name, value in found.items()}
        {'rmse': 1.7321, 'mae': 1.0, 'median_absolute_error': 0.0, 'r2': -3.5}
    """
    error = prediction.double() - target.double()
    size, squared = error.abs(), error.square()
    spread = (target.double() - target.double().mean()).square().sum()
    return {
        "rmse": math.sqrt(float(squared.mean())),
        "mae": float(size.mean()),
        "median_absolute_error": float(size.quantile(0.5)) if len(size) < 10**7 else float(size.median()),
        "r2": float(1 - squared.sum() / spread) if spread > 0 else 0.0,
    }


def derive_seed(*parts: Any) -> int:
    """A seed for one purpose: a hash, so that neighbouring seeds and purposes share nothing.

    Example:
        >>> derive_seed("digits", 0, "split") == derive_seed("digits", 0, "split")
        True
        >>> derive_seed("digits", 0, "split") == derive_seed("digits", 0, "model")
        False
    """
    digest = hashlib.sha256("|".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _long_tail(
    rows: np.ndarray, target: np.ndarray, rng: np.random.Generator, imbalance: float
) -> np.ndarray:
    if imbalance == 1:
        return rows
    labels = np.unique(target)
    kept = []
    for position, label in enumerate(labels):
        of_class = rng.permutation(rows[target[rows] == label])
        share = imbalance ** (-position / max(1, len(labels) - 1))
        kept.append(of_class[: max(1, round(share * len(of_class)))])
    return np.sort(np.concatenate(kept))


def noisy(target: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    """Labels of which a share is replaced by another class, drawn evenly."""
    if noise == 0:
        return target
    classes = int(target.max()) + 1
    shift = rng.integers(1, classes, size=len(target))
    return np.where(rng.random(len(target)) < noise, (target + shift) % classes, target)


def load_task(spec: str) -> Task:
    """The task that some words name: what the data are, then ``key=value`` words about them.

    Args:
        spec: words as in a shell. The first is a built-in name, a file (``.csv``, ``.tsv``, ``.parquet``,
            ``.npz``), a folder of images (``class/name.png``), or ``package.module:Name``: a task, a class or
            function that returns one, or a function that returns a scikit-learn bunch. The keys are those of
            ``telos.trials.sources.TASK_KEYS``, for example ``target=`` and ``group=``.

    Returns:
        An object with the attributes of :class:`Task`.

    Raises:
        telos.trials.UsageError: for an unknown name or key, an object that is not a task, or data from which
            nothing can be learned.

    Example:
        >>> load_task("digits_noisy").noise
        0.4
        >>> load_task("digits noise=0.2 model=linear").noise
        0.2
    """
    # files need more than tasks do: polars, scikit-learn and, for images, Pillow
    from telos.trials import sources

    return sources.load(spec)
