"""Modular addition as a task: a network that knows its training pairs by heart long before it adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from telos.losses import TaskInfo
from telos.trials.models import DataInfo
from telos.trials.tasks import (
    Batch,
    Classifying,
    Fold,
    _outputs,
    classes_info,
    classification_metrics,
    derive_seed,
)

TRAIN = 0.4
"""Share of all pairs to train on; of the others a quarter is tuned on."""

_DIRECTIONS = {"accuracy": "max", "nll": "min", "train_accuracy": "max", "collapse": "min"}


@dataclass(eq=False)
class ModularTask(Classifying):
    """Grokking: the sum of two numbers modulo p, of which two fifths of all pairs are known.

    A pair (a, b) is two one-hot vectors side by side, and (b, a) is another pair. Two hidden layers without biases
    fit the training pairs within some dozen steps and add, if ever, much later; the question is whether and how far
    a recipe gets there within ``epochs`` full-batch steps (an epoch is one step). No run stops before its last.

    Weight decay is the classic way there, and tuning always searches it together with the learning rate: a tuned
    baseline may arrive by weight decay alone. ``optim=adamw:weight_decay=0,perp_grad:weight_decay=0`` compares
    without.

    Beside accuracy and NLL of a split there are, for the training pairs of the same model, ``train_accuracy`` and
    ``collapse``: the share whose probabilities, as the loss reads them, have rounded to one class in float32. There
    cross-entropy has no gradient left on the right class.

    Args:
        name: a short name.
        modulus: p, at least 3.
        width: units of each hidden layer.
        epochs: full-batch steps.
        learning_rate: untuned, for AdamW.
        weight_decay: untuned, for AdamW.
        metric: what tuning looks at, on the validation pairs.
        metrics: ``"max"`` or ``"min"`` for each metric.

    Source:
        Grokking at the Edge of Numerical Stability, arXiv 2501.04697.

    Example:
        >>> fold = ModularTask("small", modulus=7).fold(seed=0)
        >>> [len(split["target"]) for split in (fold.train, fold.validation, fold.test)]
        [19, 8, 22]
    """

    name: str
    modulus: int = 59
    width: int = 128
    epochs: int = 300
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    metric: str = "accuracy"
    metrics: Mapping[str, str] = field(default_factory=lambda: dict(_DIRECTIONS))

    model_words = ("width",)  # the words about models that mean something here
    best = {name: float(direction == "max") for name, direction in _DIRECTIONS.items()}

    def __post_init__(self) -> None:
        if self.modulus < 3:
            raise ValueError(
                f"modulus must be at least 3, so that every split has a pair, got {self.modulus}"
            )

    @property
    def batch_size(self) -> int:
        """All training pairs."""
        return int(TRAIN * self.modulus**2)

    @property
    def description(self) -> str:
        """The task in a sentence or two, for reports."""
        return (
            f"Addition modulo {self.modulus}: of all {self.modulus**2:,} pairs, as two one-hot vectors, {TRAIN:.0%} "
            f"to train on, 15% to tune on and 45% to test on; two hidden layers of {self.width} units without biases. "
            "An epoch is one full-batch step. The training pairs are fitted by heart early and the sum is learnt late, "
            "if at all. Weight decay is the classic way to it and is always searched with the learning rate, so a "
            "tuned baseline may arrive by it alone: optim=adamw:weight_decay=0,perp_grad:weight_decay=0 compares "
            "without. collapse is the share of training pairs whose probabilities have rounded to one class."
        )

    @property
    def info(self) -> TaskInfo:
        """What a loss may know before the first run (the class counts are those of seed 0)."""
        return self.fold(0).info

    def fold(self, seed: int) -> Fold:
        """The split of a seed; later splits also hold the training pairs, for what is measured on them."""
        from telos.data.synthetic import modular_sums

        generator = torch.Generator().manual_seed(derive_seed(self.name, seed, "split"))
        sums = modular_sums(self.modulus, TRAIN, generator=generator)
        seen = {"train_inputs": sums.train_inputs, "train_target": sums.train_target}

        def split(inputs: Tensor, target: Tensor) -> Batch:
            return {"inputs": inputs, "target": target, "index": torch.arange(len(target))}

        held = round(len(sums.test_target) / 4)
        train = split(sums.train_inputs, sums.train_target)
        validation = {**split(sums.test_inputs[:held], sums.test_target[:held]), **seen}
        test = {**split(sums.test_inputs[held:], sums.test_target[held:]), **seen}
        shape = tuple(train["inputs"].shape[1:])
        info = classes_info(sums.train_target.numpy(), self.modulus, shape, self.width)
        return Fold(train, validation, test, info)

    def model(self, info: TaskInfo) -> nn.Module:
        """Two hidden ReLU layers without biases, at torch's own scale."""
        assert isinstance(info, DataInfo)
        return nn.Sequential(
            nn.Linear(info.input_shape[0], self.width, bias=False),
            nn.ReLU(),
            nn.Linear(self.width, self.width, bias=False),
            nn.ReLU(),
            nn.Linear(self.width, info.outputs, bias=False),
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loss: nn.Module, split: Batch) -> dict[str, float]:
        """Accuracy and NLL of the split; accuracy and collapse of the training pairs.

        A loss with a method ``log_probabilities(logits)`` is read through it, all others through softmax.
        """
        from telos.metrics import softmax_collapse

        read = getattr(loss, "log_probabilities", None) or nn.Identity()
        found = classification_metrics(read(_outputs(model, split["inputs"])), split["target"])
        known = read(_outputs(model, split["train_inputs"]))
        return {
            "accuracy": found["accuracy"],
            "nll": found["nll"],
            "train_accuracy": float((known.argmax(-1) == split["train_target"]).double().mean()),
            "collapse": float(softmax_collapse(known)),
        }
