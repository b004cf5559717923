"""LDR losses: digits with most of their labels redrawn, against cross-entropy at the same tuning."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from telos.data.synthetic import uniform_label_noise
from telos.evidence._protocol import Effect, Study
from telos.losses import ALDRKLLoss, LDRKLLoss, cross_entropy_loss

TRAIN, VALIDATION, BATCH = 800, 200, 64
NOISE, MARGIN, TEMPERATURE = 0.6, 0.1, 10.0
RATES = (0.003, 0.03, 0.3)
EPOCHS = {"smoke": 1, "small": 40, "full": 200}

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(logits, labels, positions in the training set)`` to a scalar; a fresh one for every training."""


@dataclass(frozen=True)
class Digits:
    """A training set and a validation set under the same noise, and a clean test set."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def run(seed: int, budget: str) -> dict[str, float]:
    """Test accuracies of all objectives, under noise and without it, and their differences."""
    torch.set_num_threads(1)
    rates = RATES[1:2] if budget == "smoke" else RATES
    noisy, clean = digits(seed, NOISE), digits(seed, 0.0)
    makers = objectives()
    accuracy = {name: tuned(make, noisy, seed, EPOCHS[budget], rates) for name, make in makers.items()}
    untouched = {
        name: tuned(makers[name], clean, seed, EPOCHS[budget], rates)
        for name in ("cross_entropy", "ldr_kl", "aldr_kl")
    }
    return {
        "ldr_kl_gain": accuracy["ldr_kl"] - accuracy["cross_entropy"],
        "aldr_kl_gain": accuracy["aldr_kl"] - accuracy["cross_entropy"],
        "ldr_kl_clean_tie": 0.02 - abs(untouched["ldr_kl"] - untouched["cross_entropy"]),
        "aldr_kl_clean_tie": 0.02 - abs(untouched["aldr_kl"] - untouched["cross_entropy"]),
        "adaptive_gain": accuracy["aldr_kl"] - accuracy["ldr_kl"],
        "gain_beyond_normalisation": accuracy["ldr_kl"] - accuracy["normalised_cross_entropy"],
        **{f"accuracy_{name}": value for name, value in accuracy.items()},
        **{f"clean_accuracy_{name}": value for name, value in untouched.items()},
    }


def objectives() -> dict[str, Callable[[], Objective]]:
    """The objectives by name. Cross-entropy on normalised scores shows what the normalisation alone does."""

    def stateless(loss: Callable[[Tensor, Tensor], Tensor]) -> Objective:
        return lambda logits, labels, index: loss(logits, labels)

    def adaptive() -> Objective:
        loss = ALDRKLLoss(TRAIN, TEMPERATURE, margin=MARGIN, normalize="softplus")
        return lambda logits, labels, index: loss(logits, labels, index=index)

    softplus = partial(LDRKLLoss, normalize="softplus")
    return {
        "cross_entropy": lambda: stateless(cross_entropy_loss),
        "ldr_kl": lambda: stateless(softplus(TEMPERATURE, MARGIN)),
        "aldr_kl": adaptive,
        # without margin LDR-KL is T times the cross-entropy of scores / T, up to a constant
        "normalised_cross_entropy": lambda: stateless(softplus(TEMPERATURE, 0.0)),
        "normalised_cross_entropy_temperature_1": lambda: stateless(softplus(1.0, 0.0)),
    }


def digits(seed: int, noise: float) -> Digits:
    """The split of a seed; all labels but those of the test set are redrawn with probability ``noise``."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    inputs = torch.from_numpy(images).float()[order] / 16
    target = torch.from_numpy(labels).long()[order]
    seen = TRAIN + VALIDATION
    given = uniform_label_noise(target[:seen], 10, noise, generator=generator)
    return Digits(
        (inputs[:TRAIN], given[:TRAIN]), (inputs[TRAIN:seen], given[TRAIN:]), (inputs[seen:], target[seen:])
    )


def tuned(
    make: Callable[[], Objective], data: Digits, seed: int, epochs: int, rates: tuple[float, ...]
) -> float:
    """Test accuracy at the learning rate that is best on the (equally noisy) validation set."""
    models = [trained(make(), data.train, seed, epochs, rate) for rate in rates]
    best = max(models, key=lambda model: accuracy_of(model, data.validation))
    return accuracy_of(best, data.test)


def trained(
    objective: Objective, data: tuple[Tensor, Tensor], seed: int, epochs: int, rate: float
) -> nn.Module:
    """A one-hidden-layer tanh network by SGD, as in the paper; the seed fixes weights and batches."""
    inputs, labels = data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            objective(model(inputs[index]), labels[index], index).backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The share of right predictions; 0 for a model that diverged to NaN."""
    logits = model(data[0])
    right = (logits.argmax(-1) == data[1]) & torch.isfinite(logits).all(-1)
    return right.double().mean().item()


STUDY = Study(
    slug="ldr_losses",
    claim=(
        "With 60 % of the digits' training labels redrawn uniformly, LDR-KL and ALDR-KL at temperature 10 "
        "are more than 2 points more accurate than cross-entropy on clean test data, and within 2 points of "
        "it without noise."
    ),
    protocol=(
        "Digits of scikit-learn: 800 training and 200 validation examples whose labels are redrawn over all "
        "ten classes with probability 0.6, the other 797 a clean test set. MLP 64-128(tanh)-10, SGD with "
        "momentum 0.9 and weight decay 5e-3, batches of 64, 40 epochs; the learning rate is chosen from "
        "0.003, 0.03 and 0.3 by accuracy on the noisy validation set, for every objective alike. Temperature "
        "(lambda, lambda_0) 10, margin 0.1, alpha' 2, scores through softplus and divided by their mean. The "
        "same without noise. Reported beside: cross-entropy on the normalised scores at temperatures 10 and "
        "1, to tell the normalisation's part."
    ),
    decision=(
        "Reproduced if the lower 95 % bounds of both gains over cross-entropy exceed 0.02 and those of 0.02 "
        "- |difference on clean labels| exceed 0. That ALDR-KL beats LDR-KL at the same temperature was not "
        "seen in the pilot; it is reported and decides nothing."
    ),
    effects=(
        Effect("ldr_kl_gain", "test accuracy of LDR-KL minus that of cross-entropy, noisy labels", 0.02),
        Effect("aldr_kl_gain", "test accuracy of ALDR-KL minus that of cross-entropy, noisy labels", 0.02),
        Effect("ldr_kl_clean_tie", "0.02 - |LDR-KL minus cross-entropy| in test accuracy, clean labels", 0.0),
        Effect(
            "aldr_kl_clean_tie", "0.02 - |ALDR-KL minus cross-entropy| in test accuracy, clean labels", 0.0
        ),
        Effect(
            "adaptive_gain",
            "test accuracy of ALDR-KL minus that of LDR-KL, noisy labels",
            0.0,
            required=False,
        ),
        Effect(
            "gain_beyond_normalisation",
            "test accuracy of LDR-KL minus that of cross-entropy on normalised scores / 10, noisy labels",
            0.0,
            required=False,
        ),
    ),
    pilot=(
        "An earlier trial of five seeds fixed the protocol: cross-entropy .81/.84/.85/.84/.84, LDR-KL "
        ".88/.88/.91/.88/.92, ALDR-KL .87/.88/.91/.88/.92. Its rule was the median over seeds; here it is "
        "the bound on the mean. Seed 0 of this file was run once for time and correctness."
    ),
    run=run,
)
