"""iSogCLR: do examples of frequent classes learn larger temperatures than examples of rare ones?"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from telos.evidence._protocol import Effect, Study
from telos.losses.contrastive import ISogCLRLoss, SogCLRLoss

LARGEST, RATIO = 120, 0.04
HEAD, TAIL = 50, 12
BATCH = 64
EPOCHS = {"smoke": 1, "small": 80, "full": 400}
RHOS = (0.2, 0.4)


def long_tail(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Digits with class sizes 120 to 5, and all the rest: images, labels and class sizes, images, labels."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 16
    labels = torch.tensor(digits)
    sizes = (LARGEST * RATIO ** (torch.arange(10) / 9)).round().long()
    sizes = sizes[torch.randperm(10, generator=generator)]
    order = torch.randperm(len(labels), generator=generator)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for digit, size in enumerate(sizes.tolist()):
        drawn[order[labels[order] == digit][:size]] = True
    return images[drawn], labels[drawn], sizes, images[~drawn], labels[~drawn]


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to a pixel, a fifth of the pixels dropped, an intensity factor, and noise: (N, 64)."""
    count = len(images)
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    shift = torch.randint(0, 3, (2, count, 1), generator=generator) + torch.arange(8)
    moved = padded[torch.arange(count)[:, None, None], shift[0][:, :, None], shift[1][:, None, :]]
    kept = torch.rand(moved.shape, generator=generator) >= 0.2
    factor = 0.8 + 0.4 * torch.rand(count, 1, 1, generator=generator)
    noise = 0.15 * torch.randn(moved.shape, generator=generator)
    return (moved * kept * factor + noise).flatten(1)


def build() -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder 64-128-128-64 and projector 64-64-32, which ends in a batch norm without affine map."""
    encoder = nn.Sequential(
        nn.Linear(64, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 64),
    )
    projector = nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.BatchNorm1d(32, affine=False)
    )
    return encoder, projector


def train(loss: nn.Module, images: Tensor, epochs: int, seed: int) -> nn.Sequential:
    """Contrastive training of a fresh encoder; initial weights and batches depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, projector = build()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([*encoder.parameters(), *projector.parameters()], lr=2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(BATCH):
            if len(index) < 2:
                continue
            both = torch.cat([view(images[index], generator), view(images[index], generator)])
            z1, z2 = projector(encoder(both)).chunk(2)
            optimizer.zero_grad()
            loss(z1, z2, index=index).backward()
            optimizer.step()
    return encoder.eval()


@torch.no_grad()
def knn_accuracy(
    encoder: nn.Module, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor]
) -> float:
    """Mean over classes of the accuracy of a cosine 10-nearest-neighbour vote."""
    (images, labels), (test_images, test_labels) = train_set, test_set
    keys, queries = (normalize(encoder(x.flatten(1)), dim=-1) for x in (images, test_images))
    nearest = labels[(queries @ keys.T).topk(10, dim=-1).indices]
    votes = nn.functional.one_hot(nearest, 10).sum(1)
    correct = (votes.argmax(-1) == test_labels).float()
    return torch.stack([correct[test_labels == digit].mean() for digit in range(10)]).mean().item()


def run(seed: int, budget: str) -> dict[str, float]:
    """The head-minus-tail temperature gap at two radii, and nearest-neighbour accuracies beside SogCLR."""
    images, labels, sizes, test_images, test_labels = long_tail(torch.Generator().manual_seed(seed))
    head, tail = sizes[labels] >= HEAD, sizes[labels] <= TAIL
    results: dict[str, float] = {}

    def accuracy(loss: nn.Module) -> float:
        encoder = train(loss, images, EPOCHS[budget], seed)
        return knn_accuracy(encoder, (images, labels), (test_images, test_labels))

    for rho in RHOS:
        loss = ISogCLRLoss(
            len(images), rho=rho, temperature=0.1, gamma=0.8, temperature_lr=0.03, momentum=0.5
        )
        results[f"knn_isogclr_rho_{rho}"] = accuracy(loss)
        temperatures = loss.memory_of("temperatures")
        results[f"temperature_gap_rho_{rho}"] = (temperatures[head].mean() - temperatures[tail].mean()).item()
        results[f"temperature_mean_rho_{rho}"] = temperatures.mean().item()
    for temperature in (0.1, 0.3):
        results[f"knn_sogclr_{temperature}"] = accuracy(
            SogCLRLoss(len(images), temperature=temperature, gamma=0.8)
        )
        gain = results["knn_isogclr_rho_0.2"] - results[f"knn_sogclr_{temperature}"]
        results[f"knn_gain_over_{temperature}"] = gain
    return results


STUDY = Study(
    slug="isogclr",
    claim=(
        "On a long tail of digits, training examples of frequent classes learn larger temperatures than "
        "those of rare classes, at both KL radii."
    ),
    protocol=(
        "scikit-learn digits; class sizes 120 * 0.04^(c/9) (120 to 5), digits shuffled over them per seed; "
        "all other images are the test set. Two views: shift by up to a pixel, a fifth of the pixels "
        "dropped, intensity factor in [0.8, 1.2], noise 0.15. Encoder 64-128-128-64 and projector 64-64-32 "
        "with batch norm, Adam 2e-3, batch 64, 80 epochs (400 in the full budget). iSogCLR with radius 0.2 "
        "and 0.4, first temperature 0.1 in [0.05, 1], step 0.03, momentum 0.5, gamma 0.8; SogCLR at 0.1 and "
        "0.3 from the same weights and batches. Mean final temperature of examples of classes with at least "
        "50 images minus that of classes with at most 12; class-averaged accuracy of a cosine 10-nearest-"
        "neighbour vote of encoder features."
    ),
    decision=(
        "Reproduced if the one-sided 95 % bound of the temperature gap over seeds exceeds 0 at both radii. "
        "Accuracy against SogCLR (radius 0.2) is reported and does not enter: this scale did not show the "
        "paper's gain in the pilots."
    ),
    effects=(
        Effect(
            "temperature_gap_rho_0.2",
            "mean temperature of head classes minus that of tail classes, radius 0.2",
            threshold=0.0,
        ),
        Effect(
            "temperature_gap_rho_0.4",
            "mean temperature of head classes minus that of tail classes, radius 0.4",
            threshold=0.0,
        ),
        Effect(
            "knn_gain_over_0.1",
            "nearest-neighbour accuracy of iSogCLR (radius 0.2) minus that of SogCLR at 0.1",
            threshold=0.0,
            required=False,
        ),
        Effect(
            "knn_gain_over_0.3",
            "nearest-neighbour accuracy of iSogCLR (radius 0.2) minus that of SogCLR at 0.3",
            threshold=0.0,
            required=False,
        ),
    ),
    pilot=(
        "An earlier trial of the same design, with an implementation of its own: gaps of 0.095, 0.130 and "
        "0.061 at radius 0.2 on 3 seeds, positive in 9 of 9 runs with radii 0.2, 0.4 and 0.8; accuracies "
        "within 0.03 of SogCLR's with no clear sign. This code, seeds 0 to 2: gaps 0.096, 0.124 and 0.073 at "
        "radius 0.2 and 0.034, 0.120 and 0.076 at radius 0.4; accuracy minus SogCLR's -0.047, -0.047 and "
        "-0.033 (at 0.1), -0.030, -0.017 and -0.020 (at 0.3). Nothing was changed after them."
    ),
    run=run,
)
