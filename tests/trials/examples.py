"""Small things that tests bring from outside: a task, losses that misbehave."""

import os
import signal

import numpy as np
import torch
from torch import Tensor, nn

from telos.losses import ClassificationLoss
from telos.trials import ClassificationTask


def _blobs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    target = np.repeat(np.arange(3), 40)
    centres = np.array([[0.0, 2.0, 0.0], [2.0, -1.0, 0.0], [-2.0, -1.0, 0.0]])
    return centres[target] + rng.normal(size=(120, 3)), target


def blobs() -> ClassificationTask:
    """Three overlapping clouds; an epoch takes a millisecond or two."""
    return ClassificationTask("blobs", _blobs, width=8, epochs=2, batch_size=36)


BLOBS = blobs()


class NotATask:
    name = "nothing"


def broken() -> ClassificationTask:
    raise RuntimeError("no data today")


class Exploding(ClassificationLoss):
    """Fine on the first two batches, then infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        values = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        return values * (float("inf") if self.calls > 2 else 1.0)


class Raising(nn.Module):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("<b>this loss</b> never works\nsecond line")


class Killing(nn.Module):
    """Ends the process that calls it."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return logits.sum()


class Remembering(ClassificationLoss):
    """Needs the sample index and checks that it runs through the training split."""

    needs = frozenset({"index"})

    def __init__(self, num_examples: int) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(num_examples, dtype=torch.long))

    @classmethod
    def from_task(cls, info, **hyperparameters):
        return cls(num_examples=info.num_examples, **hyperparameters)

    def forward(self, logits: Tensor, target: Tensor, *, index: Tensor) -> Tensor:  # type: ignore[override]
        self.seen[index] += 1
        return torch.nn.functional.cross_entropy(logits, target)
