"""Losses and tasks for the tests of engines, budgets and stores: slow ones, deadly ones, a reference."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from telos.losses import log_uniform
from telos.trials import ClassificationTask, Fold, Job, Run, compare, runner
from tests.trials.examples import _blobs


class Slow(nn.Module):
    """Cross-entropy that takes ten milliseconds a step; it can be stopped between steps."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        time.sleep(0.01)
        return torch.nn.functional.cross_entropy(logits, target)


class Stuck(nn.Module):
    """A step that takes a minute; only the end of its process ends it."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        time.sleep(60)
        return torch.nn.functional.cross_entropy(logits, target)


class KillingOnce(nn.Module):
    """Ends its process the first time: it leaves a mark, and then behaves."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = Path(mark)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.nn.functional.cross_entropy(logits, target)


class Scaled(nn.Module):
    """Cross-entropy times a searched factor, so that a bad trial has a bad score."""

    space = {"factor": log_uniform(1e-6, 1.0)}

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.factor * torch.nn.functional.cross_entropy(logits, target)


def cannot_start(connection: object) -> None:
    """In place of a worker's main function."""
    sys.exit(3)


def compare_at_once(store: str, barrier: Any, log: str | None = None) -> None:
    """One of several commands that start at the same time; it may log the keys of the runs that it trains."""
    run_job = runner.run_job

    def logged(job: Job) -> Run:
        with Path(str(log)).open("a") as lines:
            lines.write(f"{job.key}\n")
        time.sleep(0.05)
        return run_job(job)

    if log is not None:
        runner.run_job = logged  # type: ignore[assignment]
    barrier.wait()
    found = compare(
        "tests.trials.examples:BLOBS", "cross_entropy,focal", seeds=6, trials=3, tuning_seeds=2, store=store
    )
    assert found.complete
    assert [entry.status for entry in found.entries] == ["finished", "finished"]


class Referring(ClassificationTask):
    """Blobs with a learner from outside: the nearest class mean."""

    reference_name = "nearest mean"
    resplits = True

    def reference(self, fold: Fold, seed: int) -> dict[str, float]:
        means = torch.stack([fold.train["inputs"][fold.train["target"] == k].mean(0) for k in range(3)])
        found = torch.cdist(fold.test["inputs"], means).argmin(-1)
        right = float((found == fold.test["target"]).double().mean())
        return {"accuracy": right, "threads": float(torch.get_num_threads())}


REFERRING = Referring("referring", _blobs, width=8, epochs=2, batch_size=36)


class FixedSplit(ClassificationTask):
    """Every seed has the split of seed 0."""

    resplits = False

    def fold(self, seed: int) -> Fold:
        return super().fold(0)


FIXED = FixedSplit("fixed", _blobs, width=8, epochs=2, batch_size=36)
