"""Naive Bayes against logistic regression: examples that each needs as features become many, and both on digits."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from telos.data.synthetic.gaussian_classes import make_gaussian_classes, two_level_covariance
from telos.evidence._protocol import Effect, Study
from telos.nn.naive_bayes import NaiveBayesHead, logistic_probe
from telos.theory.probe_complexity import Probe, sample_curve, samples_to_reach

DIMS = {"smoke": (20, 40), "small": (20, 40, 80, 160), "full": (20, 40, 80, 160, 320, 640)}
REPEATS = {"smoke": 1, "small": 1, "full": 5}
SUBSETS = {"smoke": 1, "small": 5, "full": 5}
DIGITS = {"smoke": (20,), "small": (20, 50, 100, 200, 500, 1000), "full": (20, 50, 100, 200, 500, 1000)}
LEVEL = 0.02


def run(seed: int, budget: str) -> dict[str, float]:
    """Sample sizes in the simulation, then errors on digits."""
    torch.set_num_threads(1)
    dims, repeats = DIMS[budget], REPEATS[budget]
    found: dict[str, float] = {}
    for dim in dims:
        for name, fit in (("nb", partial(naive_bayes, classes=2)), ("lr", logistic)):
            generator = torch.Generator().manual_seed(1000 * seed + dim)
            found[f"m_{name}_{dim}"] = needed(fit, dim, repeats, generator)
    growth = {name: found[f"m_{name}_{dims[-1]}"] / found[f"m_{name}_{dims[0]}"] for name in ("nb", "lr")}
    found["nb_needs_fewer"] = min(math.log2(found[f"m_lr_{dim}"] / found[f"m_nb_{dim}"]) for dim in dims)
    found["lr_grows"] = math.log2(growth["lr"] / 3)
    found["nb_does_not_grow"] = math.log2(2 / growth["nb"])
    return found | two_regimes(seed, budget)


def needed(
    fit: Callable[[Tensor, Tensor], Probe], dim: int, repeats: int, generator: torch.Generator
) -> float:
    """Examples until the mean error is below the level; the whole pool where that is not enough."""
    covariance = two_level_covariance(dim)
    features, target = make_gaussian_classes(100 * dim, covariance, generator=generator)
    test = make_gaussian_classes(3000, covariance, generator=generator)
    sizes: list[int] = []
    size = 4.0
    while size < len(features):
        if not sizes or int(size) > sizes[-1]:
            sizes.append(int(size))
        size *= 1.2
    curve = sample_curve(
        fit, features, target, *test, sizes, repeats=repeats, stop_below=LEVEL, generator=generator
    )
    reached = samples_to_reach(curve, LEVEL)
    return float(len(features) if reached is None else reached)


def naive_bayes(features: Tensor, target: Tensor, classes: int) -> Probe:
    """The closed form, without the warning of :meth:`NaiveBayesHead.fit`: some subsets hold one example per class."""
    return NaiveBayesHead(features.shape[1], classes).partial_fit(features, target)


def logistic(features: Tensor, target: Tensor) -> Probe:
    """The paper's comparator, at the tolerance that scikit-learn has by default."""
    return logistic_probe(features, target, tol=1e-4)


def two_regimes(seed: int, budget: str) -> dict[str, float]:
    """Mean error on 797 digits for each sample size, pixels brought to [0, 1] in each subset."""
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    features, target = torch.tensor(inputs)[order], torch.tensor(labels)[order]
    probes: dict[str, Callable[[Tensor, Tensor], Probe]] = {
        "nb": partial(naive_bayes, classes=10),
        "lr": logistic,
    }
    found = {}
    for name, fit in probes.items():
        curve = sample_curve(
            fit,
            features[:1000],
            target[:1000],
            features[1000:],
            target[1000:],
            DIGITS[budget],
            repeats=SUBSETS[budget],
            scale=True,
            generator=torch.Generator().manual_seed(seed),
        )
        for size, error in zip(curve.sizes.tolist(), curve.mean.tolist(), strict=True):
            found[f"digits_{name}_{size}"] = error
    return found


STUDY = Study(
    slug="naive_bayes_probe",
    claim=(
        "On Gaussian classes naive Bayes needs fewer examples than logistic regression to reach an error of 0.02, and "
        "from 20 to 160 features the number grows more than threefold for logistic regression and less than twofold "
        "for naive Bayes."
    ),
    protocol=(
        "The paper's easy simulation with two classes and 20, 40, 80 and 160 features: from 4 examples on, their number "
        "is raised by a factor of 1.2 until the test error, on 3,000 examples, is below 0.02 for a random subset (budget "
        "full: the mean over 5 subsets). Logistic regression has C = 1. Mean errors on digits for 20 to 1,000 examples "
        "(5 subsets, pixels brought to [0, 1]) are reported without a condition."
    ),
    decision=(
        "Naive Bayes must need fewer examples at every number of features, and logistic regression more than three "
        "times as many at 160 features as at 20; that naive Bayes needs less than twice as many is reported."
    ),
    effects=(
        Effect("nb_needs_fewer", "log2 of examples of LR over those of NB, the least over dimensions", 0.0),
        Effect("lr_grows", "log2 of the growth of LR's examples from fewest to most features, over 3", 0.0),
        Effect("nb_does_not_grow", "log2 of 2 over the growth of NB's examples", 0.0, required=False),
    ),
    pilot=(
        "Before the study was written one trial of the simulation, with 5 seeds, gave medians of 6, 6, 10 and 5 "
        "examples for naive Bayes and 33, 70, 101 and 177 for logistic regression. Seed 0 was first run with the mean "
        "over 5 subsets instead of the single subset of that trial: 11, 5, 5, 4 and 61, 61, 88, 184, a growth of 3.02 "
        "for logistic regression, close to the threshold."
    ),
    run=run,
)
