"""Tasks: data, a model, a training step and metrics, and what they can tell a loss."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from telos.losses import TaskInfo
from telos.losses._algebra import call_keywords
from telos.trials._words import UsageError, import_symbol, nearest

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Fold:
    """One split of a task: three dicts of tensors (``inputs``, ``target``, ``index``) and their facts."""

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


@dataclass(eq=False)
class ClassificationTask:
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

    @property
    def description(self) -> str:
        """The task in a sentence or two, for reports."""
        inputs, target = self.load()
        words = (
            f"{len(target):,} examples with {inputs.shape[1]} features in {int(target.max()) + 1} classes; "
        )
        words += f"a network with one hidden layer of {self.width} units."
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
        train, validation, test = _stratified(target, rng, (0.60, 0.15, 0.25))
        train = _long_tail(train, target, rng, self.imbalance)
        seen = _noisy(target, rng, self.noise)
        mean, deviation = inputs[train].mean(0), inputs[train].std(0)
        scaled = (inputs - mean) / np.where(deviation > 0, deviation, 1.0)

        def split(rows: np.ndarray, labels: np.ndarray) -> Batch:
            return {
                "inputs": torch.tensor(scaled[rows], dtype=torch.float32),
                "target": torch.tensor(labels[rows], dtype=torch.long),
                "index": torch.arange(len(rows)),
            }

        classes = int(target.max()) + 1
        info = TaskInfo(
            family="classification",
            num_classes=classes,
            num_examples=len(train),
            dim=self.width,
            class_counts=tuple(np.bincount(seen[train], minlength=classes).tolist()),
            supplies=frozenset({"index"}),
        )
        return Fold(split(train, seen), split(validation, seen), split(test, target), info)

    def model(self, info: TaskInfo) -> nn.Module:
        """A multilayer perceptron with one hidden layer."""
        assert info.num_classes is not None
        features = self.load()[0].shape[1]
        return nn.Sequential(
            nn.Linear(features, self.width), nn.ReLU(), nn.Linear(self.width, info.num_classes)
        )

    def training_step(self, model: nn.Module, loss: nn.Module) -> Callable[[Batch], Mapping[str, Tensor]]:
        """The loss of a batch; ``index`` goes to losses whose call names it."""
        accepted = call_keywords(loss) or frozenset()
        supplied = sorted(accepted & {"index"})

        def step(batch: Batch) -> Mapping[str, Tensor]:
            extra = {name: batch[name] for name in supplied}
            return {"loss": loss(model(batch["inputs"]), batch["target"], **extra)}

        return step

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loss: nn.Module, split: Batch) -> dict[str, float]:
        """Accuracy, macro-F1, NLL and ECE, with the model in evaluation mode.

        A loss whose probabilities are not the softmax of the logits says so with a method
        ``log_probabilities(logits)``; all others are read through softmax.
        """
        was_training = model.training
        logits = model.eval()(split["inputs"])
        model.train(was_training)
        own = getattr(loss, "log_probabilities", None)
        if own is not None:
            logits = own(logits)
        return classification_metrics(logits, split["target"])


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


def _stratified(
    target: np.ndarray, rng: np.random.Generator, shares: tuple[float, float, float]
) -> list[np.ndarray]:
    # the counts of a class depend on its size alone, so that every seed has splits of the same sizes
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in np.unique(target):
        rows = rng.permutation(np.flatnonzero(target == label))
        held = [max(1, round(share * len(rows))) for share in shares[1:]]
        cuts = [len(rows) - sum(held), len(rows) - held[1]]
        for part, chosen in zip(parts, np.split(rows, cuts), strict=True):
            part.append(chosen)
    return [np.sort(np.concatenate(part)) for part in parts]


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


def _noisy(target: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    if noise == 0:
        return target
    classes = int(target.max()) + 1
    shift = rng.integers(1, classes, size=len(target))
    return np.where(rng.random(len(target)) < noise, (target + shift) % classes, target)


def _bundled(name: str) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    cache: list[tuple[np.ndarray, np.ndarray]] = []

    def load() -> tuple[np.ndarray, np.ndarray]:
        # scikit-learn takes a second to import: only for those who use its data, and once
        if not cache:
            from sklearn import datasets

            inputs, target = getattr(datasets, f"load_{name}")(return_X_y=True)
            cache.append((np.asarray(inputs, dtype=np.float64), np.asarray(target, dtype=np.int64)))
        return cache[0]

    return load


_digits = _bundled("digits")

BUILT_IN: dict[str, ClassificationTask] = {
    task.name: task
    for task in (
        ClassificationTask("digits", _digits),
        ClassificationTask("digits_noisy", _digits, noise=0.4),
        ClassificationTask("digits_longtail", _digits, imbalance=50.0, batch_size=32, epochs=60),
        ClassificationTask("breast_cancer", _bundled("breast_cancer"), width=32, batch_size=32, epochs=40),
        ClassificationTask("wine", _bundled("wine"), width=32, batch_size=16, epochs=40),
    )
}


def load_task(spec: str) -> Task:
    """The task of a name, or of ``package.module:Task``: an object, or a class or function that returns one.

    Args:
        spec: a built-in name or where to import the task from.

    Returns:
        An object with the attributes of :class:`Task`.

    Raises:
        telos.trials.UsageError: for an unknown name, or an object that is not a task.

    Example:
        >>> load_task("digits_noisy").noise
        0.4
    """
    if ":" not in spec:
        if spec in BUILT_IN:
            return BUILT_IN[spec]
        raise UsageError(
            f"unknown task {spec!r}; {nearest(spec, BUILT_IN)}, and package.module:Task brings your own"
        )
    found: Any = import_symbol(spec, "task")
    if isinstance(found, type) or (callable(found) and _lacks(found)):
        try:
            found = found()
        except Exception as error:
            raise UsageError(f"{spec} could not be built: {type(error).__name__}: {error}") from error
    if missing := _lacks(found):
        raise UsageError(f"{spec} is not a task: it lacks {', '.join(missing)}")
    return cast(Task, found)


def _lacks(candidate: Any) -> list[str]:
    # statically, because reading `info` may load the data
    wanted = {name for name in vars(Task) if not name.startswith("_")} | set(Task.__annotations__)
    absent = object()
    return sorted(name for name in wanted if inspect.getattr_static(candidate, name, absent) is absent)
