"""Models of the built-in kinds of data, and the reference from outside: scikit-learn's own learners."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from telos.losses import TaskInfo
from telos.trials._words import UsageError, import_symbol, nearest

ARCHITECTURES = {
    "linear": "one linear layer",
    "mlp": "a network with two hidden layers",
    "conv": "a small convolution net",
}
BOOSTED = 5_000  # beyond this many features times outputs, trees take too long to be a reference


@dataclass(frozen=True)
class DataInfo(TaskInfo):
    """What a model may know of a task's data, beside what a loss may know.

    Attributes:
        input_shape: of one example: ``(features,)`` or ``(channels, height, width)``.
    """

    input_shape: tuple[int, ...] = ()

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for an example: one per class, or one."""
        return self.num_classes or 1


def linear(input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """One linear layer on all the numbers of an example.

    Example:
        >>> sum(weights.numel() for weights in linear((1, 8, 8), 10).parameters())
        650
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), outputs))


def mlp(features: int, outputs: int, width: int, hidden: int = 1) -> nn.Module:
    """A multilayer perceptron with ReLU.

    Example:
        >>> mlp(4, 2, width=8)(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    layers: list[nn.Module] = []
    for _ in range(hidden):
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, outputs))


def conv(input_shape: tuple[int, ...], outputs: int, width: int) -> nn.Module:
    """Three convolutions of 3 x 3 with group norm, halving the image while it has a side of 4, and a mean.

    Example:
        >>> conv((3, 20, 32), 7, width=32)(torch.zeros(2, 3, 20, 32)).shape
        torch.Size([2, 7])
    """
    channels, side = input_shape[0], min(input_shape[1:])
    layers: list[nn.Module] = []
    for wanted in (max(4, width // 4), max(4, width // 2), width):
        layers += [nn.Conv2d(channels, wanted, 3, padding=1), nn.GroupNorm(1, wanted), nn.ReLU()]
        if side >= 4:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        channels = wanted
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))


def build(architecture: str, info: DataInfo, width: int) -> nn.Module:
    """The model that ``model=`` names.

    Args:
        architecture: one of ``ARCHITECTURES``, or ``module:factory``, a function of ``(info, input_shape)``.
        info: of the task.
        width: hidden units, or channels of the last convolution.

    Raises:
        telos.trials.UsageError: for an unknown name, or what does not fit the data.
    """
    if ":" in architecture:
        made = import_symbol(architecture, "model")(info, info.input_shape)
        if not isinstance(made, nn.Module):
            raise UsageError(f"model={architecture} must return a torch.nn.Module, got {type(made).__name__}")
        return made
    if architecture == "linear":
        return linear(info.input_shape, info.outputs)
    if architecture == "mlp":
        features = math.prod(info.input_shape)
        return nn.Sequential(nn.Flatten(), *mlp(features, info.outputs, width, hidden=2).children())
    return conv(info.input_shape, info.outputs, width)


def check_architecture(architecture: str, input_shape_is_image: bool) -> None:
    """Refuse a ``model=`` that is no name of a model, or a convolution on what is no image."""
    if ":" in architecture:
        import_symbol(architecture, "model")
    elif architecture not in ARCHITECTURES:
        raise UsageError(
            f"unknown model={architecture}; {nearest(architecture, ARCHITECTURES)}, "
            "and module:factory brings your own"
        )
    elif architecture == "conv" and not input_shape_is_image:
        raise UsageError("model=conv needs images; the data are rows of numbers")


def check_model(architecture: str, info: DataInfo, width: int) -> None:
    """Build a model that the user brought once, and look at what it makes of two examples.

    Raises:
        telos.trials.UsageError: where it cannot be built or does not fit the data.
    """
    examples = torch.zeros(2, *info.input_shape)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            found = build(architecture, info, width).eval()(examples)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"model={architecture} fails on inputs of shape {tuple(examples.shape)}: "
                f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            ) from error
    fits = [(2, info.outputs)] + ([(2,)] if info.num_classes is None else [])
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape not in fits:
        raise UsageError(
            f"model={architecture} must turn inputs of shape {tuple(examples.shape)} into outputs of shape "
            f"{fits[0]}, got {shape}"
        )


def reference_name(info: DataInfo) -> str:
    """Which of scikit-learn's learners :func:`reference` trains."""
    if len(info.input_shape) == 1 and info.input_shape[0] * info.outputs <= BOOSTED:
        return "gradient boosting"
    return "logistic regression" if info.num_classes else "ridge regression"


def reference(train: Mapping[str, Tensor], test: Mapping[str, Tensor], info: DataInfo, seed: int) -> Tensor:
    """What a learner from outside makes of the test split: log-probabilities (N, C) or predictions (N,).

    Gradient-boosted trees for tables; logistic or ridge regression for images and for data with very many
    features or classes. All with scikit-learn's defaults: a line to hold results against, not a contestant.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    boosted = reference_name(info) == "gradient boosting"
    learner: Any
    if info.num_classes:
        learner = (
            HistGradientBoostingClassifier(random_state=seed)
            if boosted
            else LogisticRegression(max_iter=300, random_state=seed)
        )
    else:
        learner = HistGradientBoostingRegressor(random_state=seed) if boosted else Ridge(random_state=seed)
    inputs, asked = (split["inputs"].flatten(1).numpy() for split in (train, test))
    # the same number of threads everywhere, as for the runs that it stands beside
    with threadpool_limits(1):
        learner.fit(inputs, train["target"].numpy())
        if not info.num_classes:
            return torch.from_numpy(np.asarray(learner.predict(asked), dtype=np.float64))
        shares = np.full((len(asked), info.num_classes), 1e-12)
        shares[:, learner.classes_] = np.maximum(learner.predict_proba(asked), 1e-12)
    return torch.from_numpy(np.log(shares))
