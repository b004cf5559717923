"""DCO: a classifier of overlapping classes that is asked many times, under cross-entropy and under coverage."""

import torch
from torch import Tensor, nn

from telos.evidence._protocol import Effect, Study
from telos.losses.classification.dco import dco_loss
from telos.metrics.reliability import expected_pass_at_n

CLASSES, DIMENSION, SPREAD, TRAIN, BATCH = 20, 10, 0.9, 400, 32
TEST = {"smoke": 200, "small": 2000, "full": 20000}
EPOCHS = {"smoke": (1, 2), "small": (5, 20, 50, 100, 200), "full": (5, 20, 50, 100, 200)}
SAMPLES = (1, 4, 16, 64)

Data = tuple[Tensor, Tensor]


def run(seed: int, budget: str) -> dict[str, float]:
    """pass@n of the models trained for each N, along training."""
    torch.set_num_threads(1)
    train, test = mixture(seed, TEST[budget])
    epochs = EPOCHS[budget]
    curves = {n_samples: trained(n_samples, train, test, seed, epochs) for n_samples in SAMPLES}
    first, last = epochs[0], epochs[-1]
    at_end = {n_samples: curve[last] for n_samples, curve in curves.items()}
    found = {
        "ce_pass_1_rises": at_end[1][1] - curves[1][first][1],
        "ce_pass_64_falls": curves[1][first][64] - at_end[1][64],
        "pass_64_gain": at_end[64][64] - at_end[1][64],
        "pareto_at_1": at_end[1][1] - max(at_end[n][1] for n in SAMPLES if n != 1),
        "pareto_at_64": at_end[64][64] - max(at_end[n][64] for n in SAMPLES if n != 64),
    }
    for n_samples, curve in curves.items():
        found.update({f"pass_{n}_trained_for_{n_samples}": value for n, value in curve[last].items()})
    found.update({f"ce_pass_64_epoch_{epoch}": curves[1][epoch][64] for epoch in epochs})
    return found


def mixture(seed: int, test: int) -> tuple[Data, Data]:
    """Unit Gaussians around 20 random means that overlap; training and test examples."""
    generator = torch.Generator().manual_seed(seed)
    means = SPREAD * torch.randn(CLASSES, DIMENSION, generator=generator)
    labels = torch.randint(CLASSES, (TRAIN + test,), generator=generator)
    inputs = means[labels] + torch.randn(TRAIN + test, DIMENSION, generator=generator)
    return (inputs[:TRAIN], labels[:TRAIN]), (inputs[TRAIN:], labels[TRAIN:])


def trained(
    n_samples: int, train: Data, test: Data, seed: int, epochs: tuple[int, ...]
) -> dict[int, dict[int, float]]:
    """Test pass@n at each of the epochs; the seed fixes weights and batches."""
    inputs, labels = train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(DIMENSION, 256), nn.ReLU(), nn.Linear(256, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    curve = {}
    for epoch in range(1, epochs[-1] + 1):
        for index in torch.randperm(TRAIN, generator=generator).split(BATCH):
            optimizer.zero_grad()
            dco_loss(model(inputs[index]), labels[index], n_samples=n_samples).backward()
            optimizer.step()
        if epoch in epochs:
            curve[epoch] = coverage(model, test)
    return curve


@torch.no_grad()
def coverage(model: nn.Module, data: Data) -> dict[int, float]:
    """Expected pass@n of sampling classes from the model."""
    inputs, labels = data
    p = model(inputs).softmax(-1).gather(1, labels.unsqueeze(1)).double().clamp_max(1.0)
    return {n: expected_pass_at_n(p, n).mean().item() for n in SAMPLES}


STUDY = Study(
    slug="dco_loss",
    claim=(
        "On overlapping classes, long training with cross-entropy raises pass@1 and lowers pass@64, training for "
        "N = 64 samples keeps pass@64 more than 0.1 higher, and each of the two is best at its own number of samples."
    ),
    protocol=(
        "20 unit Gaussians in 10 dimensions around means 0.9 N(0, I); 400 training and 2000 test examples. MLP "
        "10-256-20 with ReLU, AdamW at 2e-3, batches of 32, 200 epochs; DCO with N of 1 (cross-entropy), 4, 16 and 64, "
        "from the same weights and with the same batches. Expected pass@n = mean 1 - (1 - p_y)^n on the test set for n "
        "of 1, 4, 16 and 64, after 5, 20, 50, 100 and 200 epochs."
    ),
    decision=(
        "Reproduced if the lower 95 % bounds exceed: 0 for the rise of cross-entropy's pass@1 from epoch 5 to 200, 0.1 "
        "for the fall of its pass@64, 0.1 for the gain of N = 64 in pass@64 at the end, and 0 for the lead of "
        "cross-entropy at pass@1 and of N = 64 at pass@64 over all others."
    ),
    effects=(
        Effect("ce_pass_1_rises", "pass@1 of cross-entropy after 200 epochs minus after 5", 0.0),
        Effect("ce_pass_64_falls", "pass@64 of cross-entropy after 5 epochs minus after 200", 0.1),
        Effect("pass_64_gain", "pass@64 of N = 64 minus that of cross-entropy after 200 epochs", 0.1),
        Effect("pareto_at_1", "pass@1 of cross-entropy minus the best of N = 4, 16, 64", 0.0),
        Effect("pareto_at_64", "pass@64 of N = 64 minus the best of N = 1, 4, 16", 0.0),
    ),
    pilot=(
        "An earlier trial on seed 0 fixed the protocol: cross-entropy's pass@1 .40 to .55 and pass@64 .99 to .74; at "
        "epoch 200, for N = 1/4/16/64, pass@1 .55/.52/.44/.25 and pass@64 .74/.86/.95/.99. Its rule was the median "
        "over seeds; here it is the bound on the mean. Seed 0 of this file was run once for time and correctness: "
        "rise .13, fall .24, gain .24, leads .026 and .027. Nothing was changed after it."
    ),
    run=run,
)
