"""EnsLoss: a network that overfits a small, high-dimensional problem, under fixed and random losses."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from telos.evidence._protocol import Effect, Study
from telos.losses import EnsLoss
from telos.losses._links import exponential, hinge, logistic

DIMENSION, INFORMATIVE, TRAIN, BATCH = 300, 10, 200, 50
EPOCHS = {"smoke": 2, "small": 150, "full": 300}
TEST = {"smoke": 200, "small": 2000, "full": 20000}

Data = tuple[Tensor, Tensor]
Objective = Callable[[Tensor, Tensor], Tensor]
"""``(scores (N,), labels (N,))`` to a scalar."""


def run(seed: int, budget: str) -> dict[str, float]:
    """Test accuracies of all objectives on one problem, and their differences."""
    torch.set_num_threads(1)
    train, test = problem(seed, TEST[budget])
    accuracy, fit = {}, {}
    for name, objective in objectives(seed).items():
        model = trained(objective, train, seed, EPOCHS[budget])
        accuracy[name], fit[name] = accuracy_of(model, test), accuracy_of(model, train)
    return {
        "gain_over_bce": accuracy["ens_loss"] - accuracy["bce"],
        "gain_over_hinge": accuracy["ens_loss"] - accuracy["hinge"],
        "gain_over_exponential": accuracy["ens_loss"] - accuracy["exponential"],
        "bce_train_accuracy": fit["bce"],
        **{f"accuracy_{name}": value for name, value in accuracy.items()},
        **{f"train_accuracy_{name}": value for name, value in fit.items()},
    }


def objectives(seed: int) -> dict[str, Objective]:
    """The objectives by name: three fixed margin losses, and a fresh random one at every step."""

    def fixed(link: Callable[[Tensor], Tensor]) -> Objective:
        return lambda scores, labels: link((2 * labels - 1) * scores).mean()

    random, generator = EnsLoss(), torch.Generator().manual_seed(seed)
    return {
        "bce": fixed(logistic),
        "hinge": fixed(hinge),
        "exponential": fixed(exponential),
        "ens_loss": lambda scores, labels: random(scores, labels, generator=generator),
    }


def problem(seed: int, test: int) -> tuple[Data, Data]:
    """``y = 1[w.x / |w| + 0.5 x_0 x_1 + 0.5 eps > 0]``, x normal in 300 dimensions, 10 weights not zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(DIMENSION)
    weight[:INFORMATIVE] = torch.randn(INFORMATIVE, generator=generator)
    inputs = torch.randn(TRAIN + test, DIMENSION, generator=generator)
    noise = torch.randn(TRAIN + test, generator=generator)
    signal = inputs @ weight / weight.norm() + 0.5 * inputs[:, 0] * inputs[:, 1]
    labels = (signal + 0.5 * noise > 0).long()
    return (inputs[:TRAIN], labels[:TRAIN]), (inputs[TRAIN:], labels[TRAIN:])


def trained(objective: Objective, data: Data, seed: int, epochs: int) -> nn.Module:
    """A network by SGD with a cosine schedule; the seed fixes weights and batches."""
    inputs, labels = data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Linear(DIMENSION, 128), nn.ReLU(), nn.BatchNorm1d(128)),
            *(nn.Linear(128, 128), nn.ReLU(), nn.BatchNorm1d(128)),
            nn.Linear(128, 1),
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(TRAIN, generator=generator).split(BATCH):
            optimizer.zero_grad()
            objective(model(inputs[index]).squeeze(-1), labels[index]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy_of(model: nn.Module, data: Data) -> float:
    """The share of scores on the right side of 0."""
    return ((model(data[0]).squeeze(-1) > 0).long() == data[1]).double().mean().item()


STUDY = Study(
    slug="ens_loss",
    claim=(
        "Where a network memorises 200 examples of a 300-dimensional binary problem, training it with "
        "EnsLoss gives a higher test accuracy than with binary cross-entropy or the hinge loss."
    ),
    protocol=(
        "x standard normal in 300 dimensions, y = 1[w.x / |w| + 0.5 x_0 x_1 + 0.5 eps > 0] with ten weights "
        "not zero; 200 training and 2000 test examples. MLP 300-128-128-1 with ReLU, then batch "
        "normalisation, SGD with learning rate 1e-2, momentum 0.9, weight decay 5e-4, cosine over 150 "
        "epochs, batches of 50, the same for every loss and untuned, as in the paper. EnsLoss as published: "
        "lam = 0. Exponential loss reported beside."
    ),
    decision=(
        "Reproduced if the lower 95 % bounds of the gains over binary cross-entropy and over the hinge loss "
        "exceed 0. That cross-entropy reaches a training accuracy of about 1 (the overfitting regime) is "
        "checked beside."
    ),
    effects=(
        Effect("gain_over_bce", "test accuracy of EnsLoss minus that of binary cross-entropy", 0.0),
        Effect("gain_over_hinge", "test accuracy of EnsLoss minus that of the hinge loss", 0.0),
        Effect(
            "gain_over_exponential",
            "test accuracy of EnsLoss minus that of the exponential loss",
            0.0,
            required=False,
        ),
        Effect("bce_train_accuracy", "training accuracy under binary cross-entropy", 0.98, required=False),
    ),
    pilot=(
        "An earlier trial of five seeds fixed the protocol: EnsLoss .624/.653/.630/.627/.610, cross-entropy "
        ".601/.636/.610/.601/.595, hinge .601/.641/.617/.603/.589, exponential .610/.639/.622/.607/.602. Its "
        "rule was the median over seeds; here it is the bound on the mean. Seed 0 of this file was run once "
        "for time and correctness."
    ),
    run=run,
)
