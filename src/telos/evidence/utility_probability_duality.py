"""Utility-probability duality: decisions by sharpened probabilities, where the data to learn from are noisy."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from telos.evidence._protocol import Effect, Study
from telos.losses.classification.utility_learning import utility_learning_loss
from telos.metrics.calibration import GRID, utility_to_probability

SYMBOLS, LENGTH, NOISE, WIDTH = 12, 6, 0.3, 64
PAIRS = {"smoke": 64, "small": 3000, "full": 3000}
STEPS = {"smoke": 2, "small": 400, "full": 1600}
SOURCES = {"smoke": (20, 20), "small": (300, 600), "full": (3000, 6000)}


def run(seed: int, budget: str) -> dict[str, float]:
    """The identity of gradients, and token accuracies of three decoders against the clean target."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    cipher = torch.randperm(SYMBOLS, generator=generator)
    sources = drawn(PAIRS[budget], generator)
    model = trained(sources, corrupted(cipher[sources], generator), seed, STEPS[budget], generator)
    validation, test = (drawn(count, generator) for count in SOURCES[budget])

    def accuracy(sources: Tensor, beta: float | None) -> float:
        return (decoded(model, sources, beta, generator) == cipher[sources]).double().mean().item()

    scores = {beta: accuracy(validation, beta) for beta in GRID}
    best = max(scores, key=lambda beta: scores[beta])
    sampling, sharpened, greedy = (accuracy(test, beta) for beta in (1.0, best, None))
    return {
        "identity_within": 1e-6 - gradient_difference(model, validation, cipher[validation]),
        "sharpening_gain": sharpened - sampling,
        "greedy_not_worse": greedy - sharpened + 0.01,
        "accuracy_sampling": sampling,
        "accuracy_sharpened": sharpened,
        "accuracy_greedy": greedy,
        "beta": best,
    }


class Decoder(nn.Module):
    """A GRU that reads the source symbol and the previous target symbol and gives utilities of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(SYMBOLS, WIDTH)
        self.previous = nn.Embedding(SYMBOLS + 1, WIDTH)  # the last one stands before the first
        self.gru = nn.GRU(2 * WIDTH, WIDTH, batch_first=True)
        self.output = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, source: Tensor, previous: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Utilities (N, T, C) and the last state."""
        hidden, state = self.gru(torch.cat([self.source(source), self.previous(previous)], -1), state)
        return self.output(hidden), state


def drawn(count: int, generator: torch.Generator) -> Tensor:
    """Random sources (count, T)."""
    return torch.randint(SYMBOLS, (count, LENGTH), generator=generator)


def corrupted(target: Tensor, generator: torch.Generator) -> Tensor:
    """Every symbol replaced by a random one with probability 0.3."""
    replaced = torch.rand(target.shape, generator=generator) < NOISE
    return torch.where(replaced, torch.randint(SYMBOLS, target.shape, generator=generator), target)


def shifted(target: Tensor) -> Tensor:
    """The previous target symbols."""
    return F.pad(target[:, :-1], (1, 0), value=SYMBOLS)


def trained(sources: Tensor, target: Tensor, seed: int, steps: int, generator: torch.Generator) -> nn.Module:
    """Maximum likelihood by Adam, batches of 128."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(sources), (128,), generator=generator)
        utilities, _ = model(sources[rows], shifted(target[rows]))
        optimizer.zero_grad()
        F.cross_entropy(utilities.flatten(0, 1), target[rows].flatten()).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def decoded(model: nn.Module, sources: Tensor, beta: float | None, generator: torch.Generator) -> Tensor:
    """Targets (N, T), symbol by symbol: sampled at a sharpness, or the best at every step."""
    previous = torch.full((len(sources), 1), SYMBOLS)
    state, symbols = None, []
    for step in range(LENGTH):
        utilities, state = model(sources[:, step : step + 1], previous, state)
        if beta is None:
            previous = utilities[:, 0].argmax(-1, keepdim=True)
        else:
            probabilities = utility_to_probability(utilities[:, 0], beta=beta)
            previous = torch.multinomial(probabilities, 1, generator=generator)
        symbols.append(previous)
    return torch.cat(symbols, 1)


def gradient_difference(model: nn.Module, sources: Tensor, target: Tensor) -> float:
    """Largest difference of the parameters' gradients under utility learning and under cross-entropy."""
    found = []
    for loss in (
        utility_learning_loss,
        lambda utilities, target: F.cross_entropy(utilities.flatten(0, 1), target.flatten()),
    ):
        utilities, _ = model(sources, shifted(target))
        found.append(torch.autograd.grad(loss(utilities, target), list(model.parameters())))
    return max((own - other).abs().max().item() for own, other in zip(*found, strict=True))


STUDY = Study(
    slug="utility_probability_duality",
    claim=(
        "Every step of maximum likelihood is one of utility learning, and where targets are noisy a probability that "
        "keeps the order of the learned utilities but is sharpened lets sampling decide better by more than ten points, "
        "as well as greedy decoding does."
    ),
    protocol=(
        "Sources of 6 symbols out of 12; the target is a fixed permutation of the source symbols, each replaced by a "
        "random symbol with probability 0.3. A GRU of width 64 that is fed the source symbol and the previous target, "
        "3000 pairs, 400 steps of Adam 3e-3 on batches of 128. Decoders: sampling at beta = 1, sampling at the beta of "
        "the grid 0.25 to 16 that agrees best with the clean targets of 300 validation sources, greedy. Token accuracy "
        "on the clean targets of 600 fresh sources. The gradients of the two losses are compared on the trained model."
    ),
    decision=(
        "Reproduced if the lower 95 % bounds say: the gradients differ by less than 1e-6, sharpened sampling gains more "
        "than 0.10 over sampling, and greedy decoding is not more than 0.01 worse. It shows that sharpening pays where "
        "data are noisy, which any temperature would show: it cannot tell the paper's equation, which was not available, "
        "from the family used here."
    ),
    effects=(
        Effect(
            "identity_within", "1e-6 minus the largest difference of gradients to those of cross-entropy", 0.0
        ),
        Effect("sharpening_gain", "token accuracy of sharpened sampling minus that of sampling", 0.10),
        Effect(
            "greedy_not_worse", "0.01 plus token accuracy of greedy decoding minus sharpened sampling", 0.0
        ),
    ),
    pilot=(
        "An earlier trial of five seeds: sampling .71 to .74, sharpened 1.00 at beta 3 to 4, greedy 1.00. Its rule was "
        "the median over seeds; here it is the bound on the mean. Seeds 0 to 2 of this file were run for time and "
        "correctness."
    ),
    run=run,
)
