"""Bag means: the risk formula against simulation, and an interior optimum between bag and instance loss."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from telos.data import bag_means, make_bags
from telos.evidence._protocol import Effect, Study
from telos.losses import aggregate_interpolation_loss
from telos.theory import aggregate_ridgeless, asymptotic_risk, optimal_rho

RHOS = (0.02, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
TOLERANCE = 0.06


@dataclass(frozen=True)
class Size:
    """What a budget buys: dimension and draws of the simulation, steps of the network."""

    dim: int
    draws: int
    steps: int


SIZES = {"smoke": Size(20, 2, 3), "small": Size(100, 20, 60), "full": Size(200, 200, 60)}


def run(seed: int, budget: str) -> dict[str, float]:
    """Both settings of the linear model, and a small network on diabetes."""
    torch.set_num_threads(1)
    size, generator = SIZES[budget], torch.Generator().manual_seed(seed)
    found = simulated_risks(4, 2, RHOS, size, generator)
    predicted = {rho: asymptotic_risk(4.0, 2, rho).excess_risk for rho in RHOS}
    off = max(abs(found[rho] / predicted[rho] - 1) for rho in RHOS)
    # chosen by the formula, not by the draws that judge it
    interior = min(RHOS[1:-1], key=lambda rho: predicted[rho])
    best = optimal_rho(10.0, 4)
    large = simulated_risks(10, 4, (best, 1.0), size, generator)
    return {
        "formula_agreement": TOLERANCE - off,
        "interior_over_bag_loss": found[RHOS[0]] - found[interior],
        "interior_over_instance_loss": found[1.0] - found[interior],
        "best_rho_is_small": 0.25 - best,
        "best_rho_gain": 0.7 - large[best] / large[1.0],
        "best_rho_gain_by_formula": 0.7
        - asymptotic_risk(10.0, 4, best).excess_risk / asymptotic_risk(10.0, 4, 1.0).excess_risk,
        "best_rho": best,
        **{f"risk_rho_{rho:g}": risk for rho, risk in found.items()},
        **{f"formula_rho_{rho:g}": risk for rho, risk in predicted.items()},
        **diabetes_scores(seed, size.steps),
    }


def simulated_risks(
    n_over_d: int, bag_size: int, rhos: tuple[float, ...], size: Size, generator: torch.Generator
) -> dict[float, float]:
    """Mean of ``||theta_hat - theta_0||^2`` over draws; every rho sees the same draws."""
    n = n_over_d * size.dim
    total = dict.fromkeys(rhos, 0.0)
    for _ in range(size.draws):
        direction = torch.randn(size.dim, generator=generator, dtype=torch.float64)
        theta = direction / direction.norm()
        x = torch.randn(n, size.dim, generator=generator, dtype=torch.float64)
        y = x @ theta + torch.randn(n, generator=generator, dtype=torch.float64)
        bag_index = make_bags(n, bag_size, generator)
        response = bag_means(y, bag_index)
        for rho in rhos:
            estimate = aggregate_ridgeless(x, response, bag_index, rho)
            total[rho] += (estimate - theta).square().sum().item() / size.draws
    return total


def diabetes_scores(seed: int, steps: int) -> dict[str, float]:
    """Test R^2 of a small network trained on bags of four, by rho."""
    from sklearn.datasets import load_diabetes

    diabetes: Any = load_diabetes()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(diabetes.target), generator=generator)
    train, test = order[:332], order[332:]
    x = torch.tensor(diabetes.data, dtype=torch.float32)
    y = torch.tensor(diabetes.target, dtype=torch.float32)
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    bag_index = make_bags(len(train), 4, generator)
    response = bag_means(y[train], bag_index)
    start = mlp(10, 32, generator)
    scores = {}
    for rho in (0.0, 0.5, 1.0):
        model = copy.deepcopy(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            aggregate_interpolation_loss(model(x[train]).squeeze(-1), response, bag_index, rho=rho).backward()
            optimizer.step()
        scores[f"diabetes_r2_rho_{rho:g}"] = r_squared(model, x[test], y[test])
    return scores


def mlp(inputs: int, width: int, generator: torch.Generator) -> nn.Sequential:
    """One hidden layer, with torch's default scale drawn from ``generator``."""
    layers = nn.Linear(inputs, width), nn.Linear(width, 1)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.uniform_(-1, 1, generator=generator).div_(math.sqrt(layer.in_features))
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


@torch.no_grad()
def r_squared(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the variance that is explained."""
    return 1 - ((model(x).squeeze(-1) - y).square().mean() / y.var(correction=0)).item()


STUDY = Study(
    slug="aggregate_interpolation",
    claim=(
        "For linear regression on bag means the risk follows the asymptotic formula within 6 %, and the best "
        "mixture of bag and instance loss lies strictly between the two."
    ),
    protocol=(
        "Gaussian features in d = 100 dimensions, signal and noise of variance 1, random bags. n = 400, "
        "k = 2: the closed-form estimate at rho = 0.02, 0.1, 0.2, 0.3, 0.5, 0.7 and 1 on the same draws, "
        "squared error of the coefficients averaged over 20 draws; a seed is an independent set of 20 draws. "
        "The interior rho is the one of these that the formula prefers (0.5), fixed before the draws. "
        "n = 1000, k = 4: rho* of the formula against rho = 1, 20 draws. Reported only: an MLP 10-32-1 on "
        "scikit-learn's diabetes, random bags of 4, 332 training and 110 test patients, Adam at 0.01, 60 "
        "full-batch steps, rho = 0, 0.5 and 1."
    ),
    decision=(
        "Reproduced if the largest relative departure of a mean risk from the formula stays below 6 %, the "
        "interior rho has less risk than rho = 0.02 and than rho = 1, rho* for n = 1000 and k = 4 is below "
        "0.25 and the risk there is below 0.7 times that of rho = 1, each by its one-sided 95 % bound over "
        "seeds."
    ),
    effects=(
        Effect(
            "formula_agreement",
            "0.06 minus the largest relative difference between a mean risk and the formula",
            threshold=0.0,
        ),
        Effect(
            "interior_over_bag_loss", "mean risk at rho = 0.02 minus that at the interior rho", threshold=0.0
        ),
        Effect(
            "interior_over_instance_loss",
            "mean risk at rho = 1 minus that at the interior rho",
            threshold=0.0,
        ),
        Effect("best_rho_is_small", "0.25 minus rho* at n / d = 10, k = 4 (a constant)", threshold=0.0),
        Effect(
            "best_rho_gain", "0.7 minus the ratio of mean risks at rho* and at rho = 1 there", threshold=0.0
        ),
    ),
    pilot=(
        "An earlier trial of the same design, with an implementation of its own: mean risks 0.840, 0.622, "
        "0.530, 0.495, 0.475, 0.478 and 0.494 over the seven rhos; by the formula rho* = 0.13 at n = 1000, "
        "k = 4, with risk 0.364 against 0.611 at rho = 1. This code, seeds 0 to 2: largest departures from "
        "the formula 4.6, 1.6 and 2.4 %, gains of the interior rho 0.41, 0.41 and 0.37 over rho = 0.02 and "
        "0.028, 0.020 and 0.024 over rho = 1, margins of the ratio 0.116, 0.098 and 0.121. After them only "
        "the steps of the reported network were cut from 300, where it overfits, to 60."
    ),
    run=run,
)
