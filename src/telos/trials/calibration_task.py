"""Calibration after training as a task: the classifier is frozen, a temperature for each digit is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from telos.losses import TaskInfo
from telos.trials.models import mlp
from telos.trials.splits import stratified
from telos.trials.tasks import Batch, Classifying, Fold, _outputs, classes_info, derive_seed

FITTED = 100
"""Digits that the classifier is trained on."""
STEPS = 300
"""Full-batch steps of the classifier: enough to be sure of almost everything."""
ROTATION = 20.0
"""Degrees by which the first kind of shifted digits is turned."""

_DIRECTIONS = {
    "brier": "min",
    "nll": "min",
    "top1_brier": "min",
    "ece": "min",
    "auroc": "max",
    "accuracy": "max",
    "shifted_brier": "min",
    "shifted_top1_brier": "min",
    "shifted_ece": "min",
    "shifted_accuracy": "max",
}


@dataclass(eq=False)
class CalibrationTask(Classifying):
    """Post-hoc calibration: ``loss(calibrated logits (N, C), target (N,))`` trains a temperature for each example.

    For every seed the digits are split by class, 60 % to train on, 15 % to tune on, 25 % to test on. Of the first,
    100 are for a classifier (64-64-10, full-batch Adam on cross-entropy), which fits them and is then much surer than
    it is right. It is frozen, and decided by seed and 100 digits alone. What is compared is trained on the others: an
    :class:`telos.nn.AdaptiveTemperature` on :func:`telos.nn.transform_consistency_features` of three views (moved
    down, moved right, noise).

    ``inputs`` (N, C + F) hold the frozen logits and the features; ``shifted`` (N, 2, C + F) the same of the digits
    rotated, and mixed with noise, which are measured and never trained on.

    A temperature keeps the order of the logits, so that accuracy is that of the classifier for every recipe, but for
    losses that read their logits in another order (spherical and Taylor softmax). Tuning looks at the Brier score: a
    proper score, which no calibration can cheat as it can the calibration error, and which none of the usual
    contestants minimises itself, as cross-entropy does NLL and the correctness-aware loss the Brier score of the
    top-1 confidence.

    Args:
        name: a short name.
        load: returns images (N, 64) with values in [0, 16] and labels (N,) in [0, C).
        epochs: how long to train.
        batch_size: examples a step.
        learning_rate: untuned, for AdamW.
        weight_decay: untuned, for AdamW.
        metric: what tuning looks at, on the validation split.
        metrics: ``"max"`` or ``"min"`` for each metric.

    Source:
        Optimizing Calibration by Gaining Aware of Prediction Correctness, arXiv 2404.13016.
    """

    name: str
    load: Callable[[], tuple[np.ndarray, np.ndarray]]
    epochs: int = 50
    batch_size: int = 128
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    metric: str = "brier"
    metrics: Mapping[str, str] = field(default_factory=lambda: dict(_DIRECTIONS))
    _classifiers: dict[int, nn.Module] = field(default_factory=dict, init=False, repr=False)

    model_words = ("batch_size",)  # the words about models that mean something here
    best = {name: float(direction == "max") for name, direction in _DIRECTIONS.items()}
    bands = {
        **dict.fromkeys(_DIRECTIONS, 0.01),
        **dict.fromkeys(("brier", "top1_brier", "shifted_brier", "shifted_top1_brier"), 0.002),
    }
    reference_name = "temperature scaling"

    @property
    def description(self) -> str:
        """The task in a sentence or two, for reports."""
        _, target = self.load()
        return (
            f"{len(target):,} digits. A classifier fitted to {FITTED} of the training split is frozen and "
            "over-confident; what is trained, on the others, is a small network that gives every digit a temperature, "
            "from the frozen logits of three transformed views. Predictions stay as they are, confidence changes. "
            f"Shifted metrics are means over the test digits rotated by {ROTATION:g} degrees and mixed with noise. "
            "Tuned by the Brier score (metric=nll, top1_brier or ece tunes by another)."
        )

    @property
    def info(self) -> TaskInfo:
        """What a loss may know before the first run (the class counts are those of seed 0)."""
        return self.fold(0).info

    def rows(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The digits of a seed: those of the classifier, then training, validation and test split."""
        _, target = self.load()
        rng = np.random.default_rng(derive_seed(self.name, seed, "split"))
        train, validation, test = stratified(target, rng)
        fitted = np.sort(rng.permutation(train)[:FITTED])
        return fitted, np.setdiff1d(train, fitted), validation, test

    def classifier(self, seed: int) -> nn.Module:
        """The frozen classifier of a seed: images (N, 1, 8, 8) to logits; trained once and kept."""
        if seed not in self._classifiers:
            images, target = self._examples(self.rows(seed)[0])
            classes = int(self.load()[1].max()) + 1
            own = derive_seed(self.name, seed, "classifier")
            self._classifiers[seed] = fitted_classifier(images, target, classes, own)
        return self._classifiers[seed]

    def fold(self, seed: int) -> Fold:
        """The split of a seed: frozen logits and features of digits that the classifier has not seen."""
        from telos.nn import default_views, transform_consistency_features, view_logits
        from telos.nn.calibrators import View

        classifier = self.classifier(seed)
        generator = torch.Generator().manual_seed(derive_seed(self.name, seed, "noise"))
        views: list[View] = [_down, _right, partial(_noisy, generator=generator)]
        shifts: list[View] = [default_views(degrees=ROTATION)[0], partial(_mixed, generator=generator)]

        def seen(images: Tensor) -> Tensor:
            logits = classifier(images)
            found = view_logits(classifier, images, views)
            return torch.cat([logits, transform_consistency_features(logits, found)], 1)

        def split(rows: np.ndarray) -> Batch:
            images, target = self._examples(rows)
            shifted = torch.stack([seen(shift(images)) for shift in shifts], 1)
            index = torch.arange(len(rows))
            return {"inputs": seen(images), "target": target, "index": index, "shifted": shifted}

        with _one_thread(), torch.no_grad():
            train, validation, test = (split(rows) for rows in self.rows(seed)[1:])
        classes = int(self.load()[1].max()) + 1
        info = classes_info(train["target"].numpy(), classes, tuple(train["inputs"].shape[1:]), classes)
        return Fold(train, validation, test, info)

    def model(self, info: TaskInfo) -> nn.Module:
        """A fresh calibrator: inputs (N, C + F) to calibrated logits (N, C)."""
        from telos.trials.models import DataInfo

        assert isinstance(info, DataInfo)
        return Calibrator(info.input_shape[0], info.outputs)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loss: nn.Module, split: Batch) -> dict[str, float]:
        """Scores of the calibrated probabilities, with the model in evaluation mode.

        A loss with a method ``log_probabilities(logits)`` is read through it, all others through softmax.
        """
        read = getattr(loss, "log_probabilities", None) or nn.Identity()
        return _scores(lambda inputs: read(_outputs(model, inputs)), split)

    @torch.no_grad()
    def reference(self, fold: Fold, seed: int) -> dict[str, float]:
        """Test metrics of one temperature for all, fitted on the training split by L-BFGS."""
        from telos.nn import TemperatureScaling

        classes = fold.info.num_classes
        scaling = TemperatureScaling().fit(fold.train["inputs"][:, :classes], fold.train["target"])
        return _scores(lambda inputs: scaling(inputs[:, :classes]), fold.test)

    def _examples(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images (N, 1, 8, 8) in [0, 1] and labels of some rows."""
        images, target = self.load()
        pixels = torch.tensor(images[rows] / 16, dtype=torch.float32)
        return pixels.reshape(-1, 1, 8, 8), torch.tensor(target[rows], dtype=torch.long)


class Calibrator(nn.Module):
    """Logits and features side by side (N, C + F) to logits over a temperature for each row (N, C).

    Args:
        numbers: C + F.
        classes: C.
    """

    def __init__(self, numbers: int, classes: int) -> None:
        super().__init__()
        from telos.nn import AdaptiveTemperature

        self.classes = classes
        self.adaptive = AdaptiveTemperature(numbers - classes, init_temperature=1.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """The calibrated logits."""
        return self.adaptive(inputs[:, : self.classes], inputs[:, self.classes :])


def fitted_classifier(images: Tensor, target: Tensor, classes: int, seed: int) -> nn.Module:
    """A network with 64 hidden units, trained on few digits until it is far surer than it is right; frozen.

    Args:
        images: (N, 1, 8, 8) that it is trained on.
        target: (N,) their labels.
        classes: C.
        seed: of its first weights. Torch's global generator is as before afterwards.
    """
    with _one_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), *mlp(images[0].numel(), classes, 64).children())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def calibration_metrics(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Scores of ``softmax(logits)`` as probabilities, and of its largest as a forecast of being right.

    Args:
        logits: (N, C) scores.
        target: (N,) labels.

    Returns:
        ``accuracy``, ``nll`` in nats, ``brier``, ``top1_brier``, ``ece`` (15 bins) and ``auroc``, how well confidence
        separates right from wrong predictions (0.5 where all are right, or all wrong).

    Example:
        >>> import torch
        >>> found = calibration_metrics(torch.tensor([[0.0, 0.0], [0.0, 40.0]]), torch.tensor([0, 1]))
        >>> {name: round(value, 4) for name, value in found.items()}
        {'accuracy': 1.0, 'nll': 0.3466, 'brier': 0.25, 'top1_brier': 0.125, 'ece': 0.25, 'auroc': 0.5}
    """
    from telos.metrics import brier_score, confidence_auroc, expected_calibration_error, top1_brier

    logs = torch.log_softmax(logits.double(), -1)
    shares = logs.exp()
    right = (shares.argmax(-1) == target).double()
    mixed = 0 < float(right.sum()) < len(right)
    return {
        "accuracy": float(right.mean()),
        "nll": float(-logs.gather(-1, target.unsqueeze(-1)).mean()),
        "brier": float(brier_score(shares, target)),
        "top1_brier": float(top1_brier(shares, target)),
        "ece": float(expected_calibration_error(shares, target, n_bins=15)),
        "auroc": float(confidence_auroc(shares, target)) if mixed else 0.5,
    }


def _scores(calibrate: Callable[[Tensor], Tensor], split: Batch) -> dict[str, float]:
    """The metrics of the task: on the split as it is, and means over its shifted copies."""
    target = split["target"]
    found = calibration_metrics(calibrate(split["inputs"]), target)
    shifted = [calibration_metrics(calibrate(inputs), target) for inputs in split["shifted"].unbind(1)]
    for name in ("brier", "top1_brier", "ece", "accuracy"):
        found[f"shifted_{name}"] = sum(copy[name] for copy in shifted) / len(shifted)
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of additions, and so the numbers, must not depend on the machine's number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _down(images: Tensor) -> Tensor:
    """0.6 of the image and 0.4 of it one row lower."""
    return 0.6 * images + 0.4 * F.pad(images, (0, 0, 1, 0))[..., :-1, :]


def _right(images: Tensor) -> Tensor:
    """0.6 of the image and 0.4 of it one column further right."""
    return 0.6 * images + 0.4 * F.pad(images, (1, 0))[..., :-1]


def _noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise of deviation 0.2 on every pixel."""
    return (images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the image and 0.6 of uniform noise."""
    return (0.5 * images + 0.6 * torch.rand(images.shape, generator=generator)).clamp(0, 1)
