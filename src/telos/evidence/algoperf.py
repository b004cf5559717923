"""Benchmarking training algorithms by time to a result: who wins depends on the set of workloads."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from telos.evidence._protocol import Effect, Study
from telos.losses import log_uniform
from telos.trials.scoring import performance_ratios, profile_score, study_times
from telos.trials.small_workloads import digits_workloads
from telos.trials.workloads import (
    OptimizerAlgorithm,
    Ruleset,
    SearchSpace,
    run_benchmark,
    targets_of,
    with_variants,
)


@dataclass(frozen=True)
class Size:
    """What a budget buys: studies, trials of each, steps."""

    studies: int
    trials: int
    steps: int


SIZES = {"smoke": Size(1, 2, 10), "small": Size(3, 5, 1500), "full": Size(5, 20, 1500)}


def algorithm(
    name: str, optimizer: Callable[..., Optimizer], low: float, high: float, **fixed: float
) -> OptimizerAlgorithm:
    """An optimizer whose learning rate alone is searched, and which is constant."""

    def make(parameters: Iterable[nn.Parameter], chosen: dict[str, float]) -> Optimizer:
        return optimizer(parameters, lr=chosen["learning_rate"], **fixed)

    return OptimizerAlgorithm(name, make, SearchSpace({"learning_rate": log_uniform(low, high)}))


ALGORITHMS = (
    algorithm("sgd", SGD, 2e-2, 5.0, momentum=0.9, fused=True),
    algorithm("adam", Adam, 1e-4, 1e-2, fused=True),
    algorithm("rmsprop", RMSprop, 1e-4, 1e-2),
)


def run(seed: int, budget: str) -> dict[str, float]:
    """The benchmark, scored with and without the variant, and with one trial instead of all."""
    torch.set_num_threads(1)
    size = SIZES[budget]
    every, base_of = with_variants(digits_workloads(seed))
    # here the variant is one more workload
    workloads = [replace(workload, steps=size.steps, variants=()) for workload in every]
    runs = run_benchmark(workloads, ALGORITHMS, Ruleset(size.studies, size.trials), seed=seed)
    targets = targets_of(workloads)
    times = np.median(study_times(runs, targets).times, axis=2)
    untuned = np.median(study_times(runs.filter(pl.col("trial") == 0), targets).times, axis=2)
    bases = [base is None for base in base_of]
    without, whole = profile_score(times[:, bases]), profile_score(times)
    fastest = performance_ratios(times) == 1
    steps = counted(times, size)
    names = [chosen.name for chosen in ALGORITHMS]
    return {
        "ranking_changes": float(not (best(without) & best(whole)).any()),
        "no_universal_winner": float(1 - fastest.mean(1).max()),
        "tuning_slowdown": float((counted(untuned, size) / steps).max()),
        **{f"{name}_score_on_bases": float(score) for name, score in zip(names, without, strict=True)},
        **{f"{name}_score": float(score) for name, score in zip(names, whole, strict=True)},
        **{
            f"{name}_steps_{workload.name}": float(steps[i, j])
            for i, name in enumerate(names)
            for j, workload in enumerate(workloads)
        },
        "mean_last_accuracy": runs.select(pl.col("metric").list.last().mean()).item(),
    }


def best(scores: np.ndarray) -> np.ndarray:
    """Who has the highest score; ties count."""
    return scores == scores.max()


def counted(times: np.ndarray, size: Size) -> np.ndarray:
    """Times with a miss counted as one step more than there are."""
    return np.where(np.isfinite(times), times, size.steps + 1.0)


STUDY = Study(
    slug="algoperf",
    claim=(
        "Timed to a fixed validation accuracy on three networks for small digit images, with the same tuning "
        "budget, none of SGD with momentum, Adam and RMSprop is fastest on every workload, and the one with "
        "the highest benchmark score is another one when a variant with badly scaled inputs is added."
    ),
    protocol=(
        "scikit-learn's digits, 1200 images for training and 597 for validation, split by seed, pixels in "
        "[0, 1], cross-entropy, batches of 64. Three base workloads: a linear model (target: 93 % accuracy), "
        "one hidden layer of 64 ReLU units (95 %), four layers of 32 tanh units (94 %); and a variant of the "
        "second whose inputs are multiplied by scales log-spaced from 0.01 to 10 (92 %). SGD with momentum "
        "0.9, Adam and RMSprop at a constant learning rate. Three studies of five trials; the learning rates "
        "of a study are a scrambled Halton sequence, the same on all workloads, log-uniform on [0.02, 5] for "
        "SGD and [0.0001, 0.01] for the others: the ranges of the paper's Nesterov and AdamW baselines. Time "
        "is counted in steps, at most 1500; accuracy is measured every 10. The time of an algorithm on a "
        "workload is the median over studies of the fastest trial. Score: the area under the performance "
        "profile up to ratio 4, exactly integrated, on the bases alone and on all four workloads."
    ),
    decision=(
        "Reproduced if, by their one-sided 95 % bounds over seeds, the share of seeds on which the best "
        "score on the bases and the best score on all four belong to different optimizers (a shared first "
        "place counts as no change) exceeds one half, and 1 minus the largest share of the four workloads on "
        "which one optimizer is fastest (ties count for all who tie) exceeds 0. That with one trial instead "
        "of five some median time at least doubles (a miss counts as 1501 steps) is reported and does not "
        "enter. The paper's own workloads, baselines and scores are not tested."
    ),
    effects=(
        Effect(
            "ranking_changes",
            "1 where the best scores with and without the variant share no optimizer, else 0",
            threshold=0.5,
        ),
        Effect(
            "no_universal_winner",
            "1 minus the largest share of the workloads on which one optimizer is fastest",
            threshold=0.0,
        ),
        Effect(
            "tuning_slowdown",
            "largest ratio of the median times with one trial and with five",
            threshold=2.0,
            required=False,
        ),
    ),
    pilot=(
        "An earlier trial of the same design, with an implementation of its own and ranges that are not "
        "recorded: steps of SGD, Adam and RMSprop 30, 70 and 60 (linear), 90, 70 and 120 (one hidden layer), "
        "160, 180 and 230 (deep), 580, 90 and 160 (variant); scores 0.968, 0.838 and 0.763 on the bases, "
        "0.726, 0.879 and 0.758 on all four. This code on seed 0 with ranges chosen by eye ([0.003, 1] and "
        "[0.0003, 0.1]): Adam best on the bases and on all four. They were then replaced by the ranges of "
        "the paper's baselines; with those, seeds 0 to 2: the best changes from SGD to RMSprop on seeds 0 "
        "and 2 and stays RMSprop on seed 1, SGD misses the variant on all three, the largest share of fastest "
        "workloads is 0.75, 0.5 and 0.5, and one trial instead of five is 18, 19 and 3.9 times slower at "
        "worst. A rewrite of the loop with other random numbers, timed because it might have been faster and "
        "dropped because it was not, changed the best on all of seeds 0 to 2. After them only the fused forms "
        "of SGD and Adam were taken, with which seeds 0 to 2 give the same verdicts."
    ),
    run=run,
)
