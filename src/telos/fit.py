"""One ordinary training loop."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Diverged(ArithmeticError):  # noqa: N818  (an outcome of training, not a mistake)
    """A loss or an output became infinite or not a number.

    Attributes:
        history: the records of the epochs that were completed before.
    """

    def __init__(self, message: str, history: list[dict[str, float]] | None = None) -> None:
        super().__init__(message)
        self.history = history or []


def fit(
    step: Callable[[Any], Mapping[str, Tensor]],
    loader: Iterable[Any],
    optimizer: Optimizer,
    *,
    epochs: int,
    scheduler: LRScheduler | None = None,
    clip: float | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    on_epoch: Callable[[dict[str, float]], Mapping[str, float] | None] | None = None,
) -> list[dict[str, float]]:
    """Train: for each batch, one step of the optimizer down the sum of the named losses.

    Args:
        step: a batch to a dict of named scalar losses; it closes over the model and puts weights on the
            losses.
        loader: an iterable of batches, walked once an epoch.
        optimizer: whatever has ``zero_grad``, ``step`` and ``param_groups``.
        epochs: number of walks through ``loader``.
        scheduler: a learning-rate schedule, advanced once after every optimizer step.
        clip: largest total norm of the gradient.
        on_step: called after every step with the number of steps taken and the losses.
        on_epoch: called after every epoch with its record; what it returns is added to the record. Evaluate
            here, and leave the model in training mode.

    Returns:
        One record per epoch: ``epoch`` (from 1), ``seconds`` since the start, and the mean of every named
        loss.

    Raises:
        Diverged: when a loss is infinite or not a number, before the optimizer takes that step.
        ValueError: when ``loader`` gives no batch.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor(1.0))
        >>> history = fit(
        ...     lambda target: {"square": (weight - target) ** 2},
        ...     [torch.tensor(3.0)],
        ...     torch.optim.SGD([weight], lr=0.25),
        ...     epochs=3,
        ... )
        >>> [record["square"] for record in history]
        [4.0, 1.0, 0.25]
    """
    history: list[dict[str, float]] = []
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    start, steps = time.perf_counter(), 0
    for epoch in range(1, epochs + 1):
        totals: dict[str, float] = {}
        batches = 0
        for batch in loader:
            losses = step(batch)
            values = {name: float(loss.detach()) for name, loss in losses.items()}
            _check_finite(values, epoch, steps + 1, history)
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            steps, batches = steps + 1, batches + 1
            totals = {name: totals.get(name, 0.0) + value for name, value in values.items()}
            if on_step is not None:
                on_step(steps, values)
        if not batches:
            raise ValueError("loader must give at least one batch an epoch, got none")
        record = {"epoch": float(epoch), **{name: total / batches for name, total in totals.items()}}
        record["seconds"] = time.perf_counter() - start
        if on_epoch is not None:
            record.update(on_epoch(record) or {})
        history.append(record)
    return history


def _check_finite(values: dict[str, float], epoch: int, step: int, history: list[dict[str, float]]) -> None:
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise Diverged(f"{' and '.join(bad)} at step {step}, in epoch {epoch}", history)
