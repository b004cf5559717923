"""Comp-sum losses: the H-consistency bound, MAE on many classes, and adversarial training on digits."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from telos.evidence._protocol import Effect, Study
from telos.losses import (
    comp_sum_attack,
    comp_sum_loss,
    cross_entropy_loss,
    pgd_attack,
    smooth_adversarial_comp_sum_loss,
)
from telos.theory import best_conditional_risk, h_consistency_gamma, h_consistency_transform


@dataclass(frozen=True)
class Size:
    """What a budget buys: problems per class count, epochs and learning rates of the mixture, digits."""

    problems: int
    epochs: int
    rates: tuple[float, ...]
    digits_epochs: int
    digits_train: int
    digits_test_steps: int


SIZES = {
    "smoke": Size(20, 1, (0.1,), 1, 256, 2),
    "small": Size(1000, 20, (0.01, 0.1, 1.0), 30, 1347, 20),
    "full": Size(20000, 60, (0.01, 0.03, 0.1, 0.3, 1.0), 90, 1347, 100),
}
RADIUS = 0.1
Objective = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def run(seed: int, budget: str) -> dict[str, float]:
    """The three parts of the study."""
    torch.set_num_threads(1)
    size = SIZES[budget]
    violations, tightest = bound_violations(seed, size.problems)
    many = mixture_accuracies(60, seed, size.epochs, size.rates)
    few = mixture_accuracies(10, seed, size.epochs, size.rates)
    robust = digits_accuracies(seed, size.digits_epochs, size.digits_train, size.digits_test_steps)
    return {
        "bound_holds": float(-violations),
        "many_classes_gap": many[1.0] - many[2.0],
        "few_classes_tie": 0.02 - (few[1.0] - few[2.0]),
        "robust_gain": robust["adv_comp_sum"][1] - robust["cross_entropy"][1],
        "robust_gain_over_trades": robust["adv_comp_sum"][1] - robust["trades"][1],
        "tightest_ratio": tightest,
        **{f"accuracy_{n}_tau_{tau:g}": found[tau] for n, found in ((60, many), (10, few)) for tau in found},
        **{f"{name}_clean": clean for name, (clean, _) in robust.items()},
        **{f"{name}_robust": attacked for name, (_, attacked) in robust.items()},
    }


def bound_violations(seed: int, problems: int) -> tuple[int, float]:
    """How often a problem breaks the bound, and the largest zero-one regret as a fraction of the bound.

    A problem has five inputs of random probabilities, random class probabilities and random scores at each.
    """
    rng = np.random.default_rng(seed)
    violations, tightest = 0, 0.0
    for classes in (3, 10):
        inputs = rng.dirichlet(np.ones(5), size=problems)
        p = rng.dirichlet(np.full(classes, 0.7), size=(problems, 5))
        # from scores close to the best ones, where little regret is left, to wild ones
        width = 10.0 ** rng.uniform(-2, 0.5, size=(problems, 1, 1))
        scores = np.log(p) + width * rng.standard_normal(p.shape)
        picked = np.take_along_axis(p, scores.argmax(-1, keepdims=True), -1)[..., 0]
        zero_one = (inputs * (p.max(-1) - picked)).sum(-1)
        for tau in (0.0, 0.5, 1.0, 1.5, 2.0):
            risk = comp_sum_loss(torch.tensor(scores), torch.tensor(p), tau=tau, reduction="none").numpy()
            regret = (inputs * (risk - best_conditional_risk(p, tau))).sum(-1)
            rounding = 1e-12 * (1 + (inputs * risk).sum(-1))
            # the same as zero-one regret <= Gamma(regret), without the square root of a rounding error
            violations += int((h_consistency_transform(zero_one, tau, classes) > regret + rounding).sum())
            gamma = h_consistency_gamma(np.maximum(regret, 1e-9), tau, classes)
            tightest = max(tightest, float((zero_one / gamma).max()))
    return violations, tightest


def mixture_accuracies(classes: int, seed: int, epochs: int, rates: tuple[float, ...]) -> dict[float, float]:
    """Test accuracy of cross-entropy (tau = 1) and MAE (tau = 2), each at its best learning rate."""
    generator = torch.Generator().manual_seed(1000 * classes + seed)
    means = 1.1 * torch.randn(classes, 30, generator=generator)

    def draw(per_class: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(classes).repeat_interleave(per_class)
        return means[labels] + torch.randn(len(labels), 30, generator=generator), labels

    train, held_out, test = draw(20), draw(30), draw(30)
    start = mlp(30, 128, classes, generator)
    orders = [torch.randperm(len(train[1]), generator=generator) for _ in range(epochs)]
    accuracies = {}
    for tau in (1.0, 2.0):
        models = [fit_mixture(copy.deepcopy(start), train, orders, tau, rate) for rate in rates]
        best = max(models, key=lambda model: accuracy(model, *held_out))
        accuracies[tau] = accuracy(best, *test)
    return accuracies


def fit_mixture(
    model: nn.Module, train: tuple[Tensor, Tensor], orders: list[Tensor], tau: float, rate: float
) -> nn.Module:
    """SGD with momentum and clipped gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for order in orders:
        for batch in order.split(64):
            optimizer.zero_grad()
            comp_sum_loss(model(train[0][batch]), train[1][batch], tau=tau).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
    return model


def digits_accuracies(seed: int, epochs: int, train: int, test_steps: int) -> dict[str, tuple[float, float]]:
    """Clean and robust (PGD on cross-entropy) test accuracy of three ways to train on digits."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    inputs = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
    target = torch.tensor(digits.target)[order]
    start = mlp(64, 128, 10, generator)
    accuracies = {}
    objectives: dict[str, Objective] = {
        "cross_entropy": plain,
        "adv_comp_sum": adv_comp_sum,
        "trades": trades,
    }
    for name, objective in objectives.items():
        model, stream = copy.deepcopy(start), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(epochs):
            for batch in torch.randperm(train, generator=stream).split(64):
                optimizer.zero_grad()
                objective(model, inputs[batch], target[batch], stream).backward()
                optimizer.step()
        unseen = (inputs[1347:], target[1347:])
        attacked = pgd_attack(
            partial(total_cross_entropy, model, unseen[1]),
            unseen[0],
            radius=RADIUS,
            steps=test_steps,
            bounds=(0.0, 1.0),
            generator=torch.Generator().manual_seed(seed),
        )
        accuracies[name] = (accuracy(model, *unseen), accuracy(model, attacked, unseen[1]))
    return accuracies


def total_cross_entropy(model: nn.Module, target: Tensor, inputs: Tensor) -> Tensor:
    """What the test's attack maximises."""
    return cross_entropy_loss(model(inputs), target, reduction="sum")


def plain(model: nn.Module, inputs: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy on clean inputs."""
    return cross_entropy_loss(model(inputs), target)


def adv_comp_sum(model: nn.Module, inputs: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """The smooth adversarial loss at tau = 0.4, rho = 1, nu = 1."""
    moved = comp_sum_attack(model, inputs, target, radius=RADIUS, steps=10, generator=generator)
    return smooth_adversarial_comp_sum_loss(
        model(inputs), target, adversarial_logits=model(moved), tau=0.4, rho=1.0, nu=1.0
    )


def trades(model: nn.Module, inputs: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """TRADES (arXiv 1901.08573) at beta = 6: cross-entropy plus the divergence that the attack can cause."""

    def divergence(clean: Tensor, moved: Tensor) -> Tensor:
        logps, clean_logps = model(moved).log_softmax(-1), clean.log_softmax(-1)
        return F.kl_div(logps, clean_logps, reduction="batchmean", log_target=True)

    clean = model(inputs)
    moved = pgd_attack(
        partial(divergence, clean.detach()),
        inputs,
        radius=RADIUS,
        steps=10,
        bounds=(0.0, 1.0),
        start="gaussian",
        generator=generator,
    )
    return cross_entropy_loss(clean, target) + 6.0 * divergence(clean, moved)


def mlp(inputs: int, width: int, outputs: int, generator: torch.Generator) -> nn.Sequential:
    """One hidden layer, with torch's default scale drawn from ``generator``."""
    layers = nn.Linear(inputs, width), nn.Linear(width, outputs)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.uniform_(-1, 1, generator=generator).div_(layer.in_features**0.5)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, target: Tensor) -> float:
    """Fraction of right answers."""
    return (model(inputs).argmax(-1) == target).float().mean().item()


STUDY = Study(
    slug="comp_sum",
    claim=(
        "At small scale: the H-consistency bound holds on random problems; MAE (tau = 2) falls behind "
        "cross-entropy (tau = 1) on 60 classes and not on 10; and ADV-COMP-SUM is more robust than plain "
        "cross-entropy on digits."
    ),
    protocol=(
        "(a) 1000 random problems for each of 3 and 10 classes: five inputs of random probabilities, "
        "random class probabilities and scores; the regrets of tau = 0, 0.5, 1, 1.5 and 2 over all "
        "measurable functions are compared with Gamma_tau. (b) Gaussian mixture in 30 dimensions, unit "
        "variance, class means 1.1 N(0, I), 20 training points per class; MLP of one hidden layer of 128; "
        "SGD with momentum 0.9, 20 epochs, batch 64, gradients clipped at 5; for each tau the best of the "
        "learning rates 0.01, 0.1 and 1 by 30 held-out points per class; accuracy on 30 other test points "
        "per class. Both taus share initialisation and batch order. (c) scikit-learn's digits scaled to "
        "[0, 1], 1347 training images and 450 test images; MLP 64-128-10; Adam at 0.001, 30 epochs, batch "
        "64, no weight decay; l-inf ball of 0.1. ADV-COMP-SUM (tau 0.4, rho 1, nu 1) and TRADES (beta 6) "
        "attack with 10 steps in training; robust accuracy is that under 20 steps of PGD on cross-entropy "
        "from a uniform start."
    ),
    decision=(
        "Reproduced if no bound is violated on any seed, the 60-class accuracy gap exceeds 0.1, the "
        "10-class gap stays below 0.02, and the gain in robust accuracy over cross-entropy exceeds 0.1, "
        "each by its one-sided 95 % bound over seeds. The paper's claim to beat TRADES is reported and "
        "does not enter: the pilots show a tie at best on these data."
    ),
    effects=(
        Effect("bound_holds", "minus the number of violated bounds", threshold=-0.01),
        Effect(
            "many_classes_gap",
            "test accuracy of cross-entropy minus that of MAE on 60 classes",
            threshold=0.1,
        ),
        Effect("few_classes_tie", "0.02 minus the same difference on 10 classes", threshold=0.0),
        Effect(
            "robust_gain", "robust accuracy of ADV-COMP-SUM minus that of plain cross-entropy", threshold=0.1
        ),
        Effect(
            "robust_gain_over_trades",
            "robust accuracy of ADV-COMP-SUM minus that of TRADES",
            threshold=0.0,
            required=False,
        ),
    ),
    pilot=(
        "An earlier trial of the same design, with an implementation of its own: 60-class accuracy 0.98 "
        "against 0.69; robust accuracy 0.75 (clean 0.93) against 0.54 (0.95) for cross-entropy and 0.74 "
        "(0.93) for TRADES; at tau = 1 ADV-COMP-SUM was worse, 0.67 (0.85), so tau = 0.4 was chosen there. "
        "This code, seeds 0 and 1: 60-class gaps 0.30 and 0.29, 10-class gaps 0.003 and 0, robust gains "
        "0.21 and 0.21 over cross-entropy, -0.01 and -0.03 over TRADES; nothing was changed after them."
    ),
    run=run,
)
