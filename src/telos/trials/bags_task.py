"""Learning from bags: of the training examples only the mean response of each bag is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from telos.data import bag_means, make_bags
from telos.losses import TaskInfo
from telos.trials import models
from telos.trials._words import UsageError
from telos.trials.splits import shuffled
from telos.trials.tasks import (
    Batch,
    Fold,
    _network,
    _outputs,
    _scaled_inputs,
    _Single,
    _small_network,
    derive_seed,
    own_units,
    regression_bands,
    regression_metrics,
)

METRICS = ("rmse", "mae", "r2")


@dataclass(eq=False)
class BagsTask:
    """Regression from bags: the model sees every example's features, and the mean response of its bag.

    Every seed splits the data anew, 60 % to train on, 15 % to tune on, 25 % to test on, and puts the rows of
    each split into random bags. In the training and the validation split **a row is a whole bag**: ``inputs``
    (B, size, D) and ``target`` (B,), the mean response. Those splits hold no response of a single example; rows
    that fill no bag are left out. In the test split a row is one example with its own response.

    The metrics are in the response's own units, of what a split holds: of single examples on the test split, of
    bag means on the validation split, so that tuning sees what could be seen without single responses.
    ``bag_rmse`` is that of bag means on both.

    Features are standardised with the training split's mean and deviation. The response is centred on the mean
    of the training bags and divided by ``sqrt(size)`` times their deviation, which is what a single response
    spreads where bags are random.

    Args:
        name: a short name; with the seed it decides splits, bags, initialisations and batch order.
        load: returns inputs (N, D) and responses (N,).
        size: examples in a bag.
        width: hidden units.
        epochs: how long to train.
        batch_size: bags a step.
        learning_rate: untuned, for AdamW.
        weight_decay: untuned, for AdamW.
        metric: what tuning looks at, on the validation split.
        metrics: ``"max"`` or ``"min"`` for each metric.
        architecture: ``"linear"`` or ``module:factory`` in place of the network.

    Raises:
        telos.trials.UsageError: for a bag size below 1; by ``fold``, for one that leaves fewer than two bags to
            tune on.

    Example:
        >>> from telos.trials import load_task
        >>> fold = load_task("bags size=8").fold(seed=0)
        >>> fold.info.family, fold.train["inputs"].shape, fold.train["target"].shape
        ('aggregate', torch.Size([33, 8, 10]), torch.Size([33]))
    """

    words: ClassVar[Mapping[str, type]] = {"size": int}
    best: ClassVar[Mapping[str, float]] = {"rmse": 0.0, "mae": 0.0, "r2": 1.0, "bag_rmse": 0.0}

    name: str
    load: Callable[[], tuple[np.ndarray, np.ndarray]]
    size: int = 4
    width: int = 32
    epochs: int = 40
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    metric: str = "rmse"
    metrics: Mapping[str, str] = field(
        default_factory=lambda: {"rmse": "min", "mae": "min", "r2": "max", "bag_rmse": "min"}
    )
    architecture: str = ""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"size must be at least 1, got {self.size}")

    @property
    def description(self) -> str:
        """The task in a few sentences, for reports."""
        inputs, target = self.load()
        return (
            f"{len(target):,} examples with {inputs.shape[1]} features, a number from {target.min():.4g} to "
            f"{target.max():.4g} to predict, known only as the mean of random bags of {self.size} in the "
            f"training and the validation split; {_network(self.architecture, self.width)}. A row to train or "
            "tune on is a bag, and tuning looks at the error of bag means; a row to test on is one example."
        )

    @property
    def info(self) -> TaskInfo:
        """What a loss may know before the first run."""
        return self.fold(0).info

    @property
    def bands(self) -> Mapping[str, float]:
        """Differences that do not matter in practice: a hundredth of the deviation of what is predicted."""
        single = regression_bands(self.load()[1])
        bag = float(f"{single['rmse'] / math.sqrt(self.size):.2g}")
        return {**{name: single[name] for name in METRICS}, "bag_rmse": bag}

    def fold(self, seed: int) -> Fold:
        """The split of a seed and its bags; the same seed gives the same, whatever the recipe."""
        inputs, target = self.load()
        rng = np.random.default_rng(derive_seed(self.name, seed, "split"))
        train, validation, test = shuffled(len(target), rng)
        if len(validation) < 2 * self.size:
            raise UsageError(
                f"size must be at most {len(validation) // 2}, so that there are two bags to tune on, "
                f"got {self.size}"
            )
        features = torch.tensor(_scaled_inputs(inputs, train), dtype=torch.float32)
        responses = torch.tensor(target, dtype=torch.float64)
        generator = torch.Generator().manual_seed(derive_seed(self.name, seed, "bags"))
        learnt, tuned = (self._bags(torch.tensor(rows), generator) for rows in (train, validation))
        known = responses[learnt].mean(1)
        centre, scale = known.mean(), math.sqrt(self.size) * known.std(correction=0)
        scale = torch.where(scale > 1e-12 * known.abs().max(), scale, 1.0)

        def split(rows: Tensor, response: Tensor) -> Batch:
            return {
                "inputs": features[rows],
                "target": ((response - centre) / scale).float(),
                "centre": centre.expand(len(rows)),
                "scale": scale.expand(len(rows)),
            }

        tested = torch.tensor(test)
        info = models.DataInfo(
            family="aggregate", num_examples=learnt.numel(), dim=self.width, input_shape=inputs.shape[1:]
        )
        return Fold(
            split(learnt, known),
            split(tuned, responses[tuned].mean(1)),
            {**split(tested, responses[tested]), "bag_index": make_bags(len(test), self.size, generator)},
            info,
        )

    def _bags(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The rows of each full bag, (B, size)."""
        order = torch.argsort(make_bags(len(rows), self.size, generator), stable=True)
        full = len(rows) // self.size
        return rows[order[: full * self.size]].reshape(full, self.size)

    def model(self, info: TaskInfo) -> nn.Module:
        """A multilayer perceptron with one hidden layer, or what ``architecture`` names."""
        return _small_network(self.architecture, info, self.load()[0].shape[1], self.width)

    def training_step(self, model: nn.Module, loss: nn.Module) -> Callable[[Batch], Mapping[str, Tensor]]:
        """``loss(prediction (N,), bag_response (B,), bag_index (N,))`` of whole bags."""
        single = nn.Sequential(model, _Single())

        def step(batch: Batch) -> Mapping[str, Tensor]:
            inputs = batch["inputs"]
            bags, size = inputs.shape[:2]
            bag_index = torch.arange(bags, device=inputs.device).repeat_interleave(size)
            return {"loss": loss(single(inputs.flatten(0, 1)), batch["target"], bag_index)}

        return step

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loss: nn.Module, split: Batch) -> dict[str, float]:
        """RMSE, MAE and R2 of single examples on the test split, of bag means elsewhere; RMSE of bag means."""
        inputs, target = split["inputs"], own_units(split["target"], split)
        if "bag_index" not in split:
            single = _Single()(_outputs(model, inputs.flatten(0, 1)))
            prediction = own_units(single.double().reshape(inputs.shape[:2]).mean(1), split)
            bags = found = regression_metrics(prediction, target)
        else:
            prediction = own_units(_Single()(_outputs(model, inputs)), split)
            found = regression_metrics(prediction, target)
            index = split["bag_index"]
            bags = regression_metrics(bag_means(prediction, index), bag_means(target, index))
        return {**{name: found[name] for name in METRICS}, "bag_rmse": bags["rmse"]}
