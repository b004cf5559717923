"""Workloads that take seconds on a CPU, and the baselines that set their targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, NAdam, Optimizer

from telos.losses._space import log_uniform
from telos.trials.recipes import Hyperparameters
from telos.trials.scoring import Floats
from telos.trials.tasks import derive_seed
from telos.trials.workloads import OptimizerAlgorithm, SearchSpace, Workload


def warmup_cosine(share: float, warmup: float = 0.05) -> float:
    """A factor that rises linearly over the first steps and then falls to zero along a cosine.

    Args:
        share: of the steps that are done; the factor stays 0 beyond 1.
        warmup: share of the steps over which it rises.

    Example:
        >>> [round(warmup_cosine(share), 3) for share in (0.0, 0.05, 0.525, 1.0, 2.0)]
        [0.0, 1.0, 0.5, 0.0, 0.0]
    """
    if share < warmup:
        return share / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - warmup) / (1 - warmup))))


def baseline_algorithms() -> dict[str, OptimizerAlgorithm]:
    """The paper's four baselines for setting targets: AdamW, NAdamW, Nesterov momentum and heavy ball.

    Each has the :func:`warmup_cosine` schedule and a broad space of learning rate, momentum and weight decay,
    on logarithmic scales. The ranges are those of the official AdamW, NAdamW and Nesterov baselines (momentum
    has NAdamW's), without their label smoothing and dropout, which a small workload has no place for.

    Example:
        >>> list(baseline_algorithms())
        ['adamw', 'nadamw', 'nesterov', 'heavy_ball']
    """
    adam = SearchSpace(
        {
            "learning_rate": log_uniform(1e-4, 1e-2),
            "one_minus_beta1": log_uniform(4e-3, 1e-1),
            "weight_decay": log_uniform(5e-3, 1.0),
        }
    )
    momentum = SearchSpace(
        {
            "learning_rate": log_uniform(2e-2, 5.0),
            "one_minus_momentum": log_uniform(4e-3, 1e-1),
            "weight_decay": log_uniform(1e-7, 5e-5),
        }
    )

    def adamw(parameters: Iterable[nn.Parameter], chosen: Hyperparameters) -> Optimizer:
        betas = (1 - chosen["one_minus_beta1"], 0.999)
        return AdamW(parameters, lr=chosen["learning_rate"], betas=betas, weight_decay=chosen["weight_decay"])

    def nadamw(parameters: Iterable[nn.Parameter], chosen: Hyperparameters) -> Optimizer:
        return NAdam(
            parameters,
            lr=chosen["learning_rate"],
            betas=(1 - chosen["one_minus_beta1"], 0.999),
            weight_decay=chosen["weight_decay"],
            decoupled_weight_decay=True,
        )

    def sgd(nesterov: bool, parameters: Iterable[nn.Parameter], chosen: Hyperparameters) -> Optimizer:
        return SGD(
            parameters,
            lr=chosen["learning_rate"],
            momentum=1 - chosen["one_minus_momentum"],
            weight_decay=chosen["weight_decay"],
            nesterov=nesterov,
        )

    made = (
        OptimizerAlgorithm("adamw", adamw, adam, warmup_cosine),
        OptimizerAlgorithm("nadamw", nadamw, adam, warmup_cosine),
        OptimizerAlgorithm("nesterov", partial(sgd, True), momentum, warmup_cosine),
        OptimizerAlgorithm("heavy_ball", partial(sgd, False), momentum, warmup_cosine),
    )
    return {algorithm.name: algorithm for algorithm in made}


def small_workloads(seed: int = 0) -> dict[str, Workload]:
    """Workloads that take seconds on a CPU, with targets that a tuned baseline reaches in time.

    ``digits_linear``, ``digits_mlp`` (its variant ``digits_mlp_scaled`` has inputs of scales 0.01 to 10),
    ``digits_deep`` (four layers of 32 tanh units), all by accuracy on scikit-learn's digits; ``diabetes``
    and ``teacher`` (a random network with noise) are regressions, by the share of the variance that is left
    unexplained.

    Args:
        seed: of the splits and of the generated world.

    Example:
        >>> list(small_workloads())
        ['digits_linear', 'digits_mlp', 'digits_deep', 'diabetes', 'teacher']
    """
    made = (*digits_workloads(seed), _diabetes(seed), _teacher(seed))
    return {workload.name: workload for workload in made}


def digits_workloads(seed: int = 0) -> tuple[Workload, Workload, Workload]:
    """A linear model, a network with one hidden layer and a deep one on scikit-learn's digits.

    Pixels lie in [0, 1], 1200 images are for training, 597 for validation.

    Args:
        seed: of the split.

    Example:
        >>> [(workload.name, workload.target) for workload in digits_workloads()]
        [('digits_linear', 0.93), ('digits_mlp', 0.95), ('digits_deep', 0.94)]
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(derive_seed("digits", seed, "split")).permutation(len(labels))
    inputs = torch.tensor(images[order] / 16, dtype=torch.float32)
    target = torch.tensor(labels[order], dtype=torch.long)

    def workload(name: str, model: Callable[[], nn.Module], goal: float, inputs: Tensor) -> Workload:
        train = {"inputs": inputs[:1200], "target": target[:1200]}
        validation = {"inputs": inputs[1200:], "target": target[1200:]}
        return Workload(
            name, model, F.cross_entropy, _accuracy, "max", train, validation, target=goal, steps=1500
        )

    scales = torch.logspace(-2, 1, inputs.shape[1])
    scaled = workload("digits_mlp_scaled", partial(_network, 64, [64], 10, nn.ReLU), 0.92, inputs * scales)
    return (
        workload("digits_linear", partial(_network, 64, [], 10, nn.ReLU), 0.93, inputs),
        replace(
            workload("digits_mlp", partial(_network, 64, [64], 10, nn.ReLU), 0.95, inputs), variants=(scaled,)
        ),
        workload("digits_deep", partial(_network, 64, [32] * 4, 10, nn.Tanh), 0.94, inputs),
    )


def _diabetes(seed: int) -> Workload:
    from sklearn.datasets import load_diabetes

    features, progression = load_diabetes(return_X_y=True)
    order = np.random.default_rng(derive_seed("diabetes", seed, "split")).permutation(len(progression))
    # standardised with the training rows alone
    inputs, target = features[order], progression[order, None]
    inputs = (inputs - inputs[:265].mean(0)) / inputs[:265].std(0)
    target = (target - target[:265].mean(0)) / target[:265].std(0)
    return _regression("diabetes", inputs, target, (265, 88, 89), 16, 32, goal=0.65)


def _teacher(seed: int) -> Workload:
    rng = np.random.default_rng(derive_seed("teacher", seed, "world"))
    inputs = rng.normal(size=(2000, 20))
    hidden, output = rng.normal(size=(20, 8)) / math.sqrt(20), rng.normal(size=(8, 1)) / math.sqrt(8)
    signal = np.tanh(2 * inputs @ hidden) @ output
    target = signal / signal.std() + 0.1 * rng.normal(size=signal.shape)
    return _regression("teacher", inputs, target, (1200, 400, 400), 64, 64, goal=0.1)


def _regression(
    name: str,
    inputs: Floats,
    target: Floats,
    sizes: tuple[int, int, int],
    width: int,
    batch_size: int,
    goal: float,
) -> Workload:
    rows = np.cumsum(sizes)[:2]
    train, validation, test = (
        {"inputs": torch.tensor(x, dtype=torch.float32), "target": torch.tensor(y, dtype=torch.float32)}
        for x, y in zip(np.split(inputs, rows), np.split(target, rows), strict=True)
    )
    return Workload(
        name,
        partial(_network, inputs.shape[1], [width], 1, nn.Tanh),
        F.mse_loss,
        _unexplained,
        "min",
        train,
        validation,
        test,
        target=goal,
        steps=1500,
        batch_size=batch_size,
    )


def _network(inputs: int, widths: list[int], outputs: int, activation: Callable[[], nn.Module]) -> nn.Module:
    sizes = [inputs, *widths]
    hidden = [
        layer for before, after in pairwise(sizes) for layer in (nn.Linear(before, after), activation())
    ]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


def _accuracy(logits: Tensor, target: Tensor) -> float:
    return (logits.argmax(-1) == target).double().mean().item()


def _unexplained(outputs: Tensor, target: Tensor) -> float:
    """Squared error relative to that of the mean."""
    return (F.mse_loss(outputs, target) / target.var(correction=0)).item()
