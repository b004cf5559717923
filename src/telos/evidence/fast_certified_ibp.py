"""Fast IBP: verified error on digits after a short warm-up, with and without its parts."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from telos.evidence._protocol import Effect, Study
from telos.losses import CrossEntropyLoss, pgd_attack
from telos.losses.robust.ibp import FastIBPLoss
from telos.losses.robust.interval import IntervalTensor, margin_lower_bounds
from telos.metrics.robustness import verified_error
from telos.nn.init import ibp_init_
from telos.optim.schedules import SmoothedEpsSchedule

EPS = 0.05
RADII = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07)
LIMITS = (0.0, 1.0)
BATCH = 64


@dataclass(frozen=True)
class Size:
    """What a budget buys: training images, epochs, and the epochs of the warm-up."""

    train: int
    epochs: int
    warm_up: int


SIZES = {"smoke": Size(64, 2, 1), "small": Size(1258, 24, 8), "full": Size(1258, 24, 8)}
LONG = Size(1258, 60, 20)

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Arm:
    """One way to train: initialisation, normalisation, weight of the regularisers."""

    ibp_init: bool
    batch_norm: bool
    regularization: float


ARMS = {
    "plain": Arm(False, False, 0.0),
    "batch_norm": Arm(False, True, 0.0),
    "fast": Arm(True, True, 0.5),
}


def run(seed: int, budget: str) -> dict[str, float]:
    """Verified and other errors of the three arms on one split."""
    torch.set_num_threads(1)
    size = SIZES[budget]
    train, test = digits(seed, size.train)
    models = {name: trained(arm, train, seed, size) for name, arm in ARMS.items()}
    certified = {name: verified(model, test, EPS) for name, model in models.items()}
    attacked = {name: attack_error(model, test, seed) for name, model in models.items()}
    numbers = {
        "gain_over_plain": certified["plain"] - certified["fast"],
        "within_of_batch_norm": 0.02 - (certified["fast"] - certified["batch_norm"]),
        "attacks_stay_below": min(certified[name] - attacked[name] for name in ARMS),
        **{f"attacked_error_{name}": error for name, error in attacked.items()},
        **{
            f"verified_error_{name}_at_{radius:g}": verified(model, test, radius)
            for name, model in models.items()
            for radius in RADII
        },
    }
    if budget == "full":
        for name, arm in ARMS.items():
            numbers[f"verified_error_{name}_long"] = verified(trained(arm, train, seed, LONG), test, EPS)
    return numbers


def digits(seed: int, train: int) -> tuple[Data, Data]:
    """Digits in [0, 1], 70 % of them (or the first ``train`` of these) to train on and 30 % to test on."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    inputs, target = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    split = 1258
    return (inputs[:train], target[:train]), (inputs[split:], target[split:])


def network(arm: Arm, seed: int) -> nn.Module:
    """An MLP of four hidden layers of 100, drawn by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for width in (64, 100, 100, 100):
            layers += [nn.Linear(width, 100), *([nn.BatchNorm1d(100)] if arm.batch_norm else []), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(100, 10))
    return ibp_init_(model, generator=torch.Generator().manual_seed(seed)) if arm.ibp_init else model


def trained(arm: Arm, data: Data, seed: int, size: Size) -> nn.Module:
    """The first epoch clean, then the warm-up, then the full radius; Adam with two drops of its rate."""
    inputs, target = data
    model = network(arm, seed)
    loss = FastIBPLoss(EPS, arm.regularization, bounds=LIMITS)
    # the last incomplete batch is left out
    batches = len(target) // BATCH
    schedule = SmoothedEpsSchedule(EPS, batches, start=2, length=size.warm_up)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    drops = [int(share * size.epochs) for share in (0.75, 0.9)]
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.2)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(size.epochs):
        order = torch.randperm(len(target), generator=generator)[: batches * BATCH]
        for batch, index in enumerate(order.split(BATCH)):
            optimizer.zero_grad()
            loss(model, inputs[index], target[index], eps=schedule(epoch * batches + batch)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
        decay.step()
    return model.eval()


@torch.no_grad()
def verified(model: nn.Module, data: Data, radius: float) -> float:
    """Share of images that are not proved right in the whole box; at radius 0 the plain test error."""
    inputs, target = data
    box = IntervalTensor.around(inputs, radius, LIMITS, clean=False)
    return float(verified_error(margin_lower_bounds(model(box), target)))


def attack_error(model: nn.Module, data: Data, seed: int) -> float:
    """Error under 20 steps of PGD at the radius of training: no proof may claim less."""
    inputs, target = data
    frozen = copy.deepcopy(model).requires_grad_(False)
    base = CrossEntropyLoss(reduction="sum")
    moved = pgd_attack(
        lambda points: base(frozen(points), target),
        inputs,
        radius=EPS,
        steps=20,
        bounds=LIMITS,
        generator=torch.Generator().manual_seed(seed),
    )
    return float((frozen(moved).argmax(1) != target).float().mean())


STUDY = Study(
    slug="fast_certified_ibp",
    claim=(
        "On digits with a warm-up of 8 epochs, interval training with the IBP initialisation, batch normalisation "
        "and both regularisers has a verified error at eps 0.05 that is more than 0.1 lower than without them, and no "
        "more than 0.02 higher than with batch normalisation alone."
    ),
    protocol=(
        "scikit-learn's digits over 16, 1258 images to train on and 539 to test on, split by the seed. MLP "
        "64-100-100-100-100-10; l-inf radius 0.05 cut to [0, 1]; one clean epoch, smoothed growth of the radius over "
        "8 epochs, 24 epochs in all; Adam at 2e-3, times 0.2 after 75 % and 90 % of the epochs, batches of 64, gradient "
        "norm clipped at 10. Three arms on the same split and batch order: plain (default initialisation, no batch "
        "normalisation, no regulariser), batch_norm (the same with batch normalisation), fast (IBP initialisation, "
        "batch normalisation, regularisers of weight 0.5 and tolerance 0.5). Verified error of every arm at the radii "
        "0, 0.01, 0.02, 0.03, 0.05 and 0.07 is reported, and the error under 20 steps of PGD at 0.05. The full budget "
        "adds 60 epochs with 20 of warm-up, without a condition."
    ),
    decision=(
        "Reproduced if the lower 95 % bound of the gain in verified error over plain exceeds 0.1, that of 0.02 minus "
        "the difference to batch_norm exceeds 0, and no attack finds more errors than the bounds leave unverified."
    ),
    effects=(
        Effect(
            "gain_over_plain",
            "verified error at 0.05 of plain interval training minus that of the whole recipe",
            0.1,
        ),
        Effect(
            "within_of_batch_norm",
            "0.02 minus the excess of the whole recipe's verified error over that of batch normalisation alone",
            0.0,
        ),
        Effect(
            "attacks_stay_below",
            "verified error minus the error under PGD at 0.05, the smallest of the three arms",
            -1e-6,
        ),
    ),
    pilot=(
        "An earlier trial of the same design with an implementation of its own, 2 seeds, verified error: plain .415, "
        "initialisation alone .629, batch normalisation alone .176, whole recipe .119; with 60 epochs and 20 of warm-up "
        ".148, .083 (batch normalisation) and .085 (whole recipe), so that the advantage is one of short schedules. Its "
        "rule was the median over seeds; here it is the bound on the mean. This "
        "code, seeds 0 and 1: plain .499 and .386, batch normalisation .180 and .180, whole recipe .115 and .111; "
        "nothing was changed after them."
    ),
    run=run,
)
