"""The Z-loss: an exact output layer whose step does not see the number of classes, and top-k errors."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from telos.evidence._protocol import Effect, Study
from telos.kernels import spherical_stabilize, spherical_state, spherical_step, spherical_weight
from telos.losses import (
    cross_entropy_loss,
    spherical_mse_loss,
    spherical_softmax_loss,
    taylor_softmax_loss,
    z_loss,
)


@dataclass(frozen=True)
class Size:
    """What a budget buys: exact steps, class counts and repetitions of the clock, words and epochs."""

    exact_steps: int
    few_classes: int
    many_classes: int
    repetitions: int
    words: int
    train_tokens: int
    test_tokens: int
    epochs: int


SIZES = {
    "smoke": Size(5, 500, 2000, 2, 50, 640, 400, 1),
    "small": Size(200, 1000, 64_000, 15, 500, 16_000, 4_000, 3),
    "full": Size(2000, 1000, 256_000, 50, 500, 16_000, 40_000, 3),
}
RATES = (0.003, 0.03)
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy_loss,
    "z": partial(z_loss, a=1.0, b=5.0),
    "mse": spherical_mse_loss,
    "taylor": taylor_softmax_loss,
    "spherical": spherical_softmax_loss,
}


def run(seed: int, budget: str) -> dict[str, float]:
    """Exactness, step times and the language."""
    torch.set_num_threads(1)
    size = SIZES[budget]
    difference = largest_difference(seed, size.exact_steps)
    times = {
        (name, classes): step_seconds(step, seed, classes, size.repetitions)
        for name, step in (("factored", factored_steps), ("dense", dense_steps))
        for classes in (size.few_classes, size.many_classes)
    }
    factored, dense = (
        times[name, size.many_classes] / times[name, size.few_classes] for name in ("factored", "dense")
    )
    errors = language_errors(seed, size)
    others = ("mse", "taylor", "spherical")
    return {
        "exactness": 1e-9 - difference,
        "top10_gain": errors["cross_entropy"][10] - errors["z"][10],
        "top5_gain": errors["cross_entropy"][5] - errors["z"][5],
        "top10_gain_over_spherical_losses": min(errors[name][10] for name in others) - errors["z"][10],
        "minus_factored_time_ratio": -factored,
        "dense_time_ratio": dense,
        "largest_difference": difference,
        "speedup": times["dense", size.many_classes] / times["factored", size.many_classes],
        **{f"{name}_top{k}_error": error for name, found in errors.items() for k, error in found.items()},
    }


def largest_difference(seed: int, steps: int) -> float:
    """Largest difference between the weights of the factored layer and of dense SGD, in float64."""
    classes, features, examples, rate = 3000, 24, 8, 5.0
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    dense = normal(classes, features)
    state = spherical_state(dense)
    for step in range(steps):
        inputs = normal(examples, features)
        # a hundred frequent classes, so that targets repeat
        target = torch.randint(100, (examples,), generator=generator)
        dense.requires_grad_()
        (gradient,) = torch.autograd.grad(z_loss(inputs @ dense.T, target), dense)
        dense = (dense - rate * gradient).detach()
        state = spherical_step(state, inputs, target, rate, inplace=True).state
        if step % 50 == 49:
            state = spherical_stabilize(state, inplace=True)
    return (spherical_weight(state) - dense).abs().max().item()


def factored_steps(weight: Tensor) -> Callable[[Tensor, Tensor], None]:
    """One SGD step of the factored layer."""
    state = spherical_state(weight)

    def step(inputs: Tensor, target: Tensor) -> None:
        nonlocal state
        state = spherical_step(state, inputs, target, 0.01, inplace=True).state

    return step


def dense_steps(weight: Tensor) -> Callable[[Tensor, Tensor], None]:
    """The same step by autograd."""
    weight = weight.clone().requires_grad_()

    def step(inputs: Tensor, target: Tensor) -> None:
        inputs = inputs.requires_grad_()
        gradient, _ = torch.autograd.grad(z_loss(inputs @ weight.T, target), (weight, inputs))
        with torch.no_grad():
            weight.sub_(gradient, alpha=0.01)

    return step


def step_seconds(
    make: Callable[[Tensor], Callable[[Tensor, Tensor], None]], seed: int, classes: int, repetitions: int
) -> float:
    """The shortest time of a step: 64 features, batch 16, float32."""
    generator = torch.Generator().manual_seed(seed)
    step = make(torch.randn(classes, 64, generator=generator))
    inputs = torch.randn(16, 64, generator=generator)
    target = torch.randint(classes, (16,), generator=generator)
    times = []
    for _ in range(3 + repetitions):
        start = time.perf_counter()
        step(inputs, target)
        times.append(time.perf_counter() - start)
    return min(times[3:])


def language_errors(seed: int, size: Size) -> dict[str, dict[int, float]]:
    """Top-5 and top-10 test error of every loss on a bigram language, each at its best learning rate."""
    generator = torch.Generator().manual_seed(seed)
    train, held_out, test = bigrams(size, generator)
    start = language_model(size.words, generator)
    orders = [torch.randperm(len(train), generator=generator) for _ in range(size.epochs)]
    errors = {}
    for name, loss in LOSSES.items():
        models = [fit(copy.deepcopy(start), loss, train, orders, rate) for rate in RATES]
        best = min(models, key=lambda model: top_error(model, held_out, 10))
        errors[name] = {k: top_error(best, test, k) for k in (5, 10)}
    return errors


def bigrams(size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (word, next word) of one long text, for training, choosing the learning rate, and testing.

    ``P(next | word) = softmax(1.2 A_word . B_next - log rank(next))`` with A, B ~ N(0, I_6).
    """
    left, right = (torch.randn(size.words, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    scores = 1.2 * left @ right.T - torch.arange(1, size.words + 1).log()
    cumulative = scores.softmax(-1).cumsum(-1).numpy()
    total = size.train_tokens + 2 * size.test_tokens
    word, text = 0, []
    for uniform in torch.rand(total + 1, generator=generator, dtype=torch.float64).tolist():
        word = min(int(cumulative[word].searchsorted(uniform)), size.words - 1)
        text.append(word)
    words = torch.tensor(text)
    pairs = torch.stack([words[:-1], words[1:]], 1)
    train, held_out, test = pairs.split([size.train_tokens, size.test_tokens, size.test_tokens])
    return train, held_out, test


def language_model(words: int, generator: torch.Generator) -> nn.Sequential:
    """Embedding of 32, a tanh layer of 64, one output for each word; torch's default scales."""
    embedding, hidden, output = nn.Embedding(words, 32), nn.Linear(32, 64), nn.Linear(64, words)
    with torch.no_grad():
        embedding.weight.normal_(generator=generator)
        for layer in (hidden, output):
            for parameter in layer.parameters():
                parameter.uniform_(-1, 1, generator=generator).div_(layer.in_features**0.5)
    return nn.Sequential(embedding, hidden, nn.Tanh(), output)


def fit(
    model: nn.Module, loss: Callable[..., Tensor], train: Tensor, orders: list[Tensor], rate: float
) -> nn.Module:
    """Adam, batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for order in orders:
        for batch in train[order].split(64):
            optimizer.zero_grad()
            loss(model(batch[:, 0]), batch[:, 1]).backward()
            optimizer.step()
    return model


@torch.no_grad()
def top_error(model: nn.Module, pairs: Tensor, k: int) -> float:
    """Share of pairs whose next word is not among the k highest scores."""
    best = model(pairs[:, 0]).topk(k, -1).indices
    return 1 - (best == pairs[:, 1:]).any(-1).float().mean().item()


STUDY = Study(
    slug="z_loss",
    claim=(
        "The factored layer takes exactly the step of dense SGD; and on a synthetic bigram language of 500 "
        "words the Z-loss has a lower top-5 and top-10 error than cross-entropy and a lower top-10 error "
        "than the other spherical losses."
    ),
    protocol=(
        "(a) Z-loss (a = 1, b = 0), 200 steps of SGD at rate 5 on a layer of 3000 classes and 24 features "
        "in float64, batches of 8 with repeated targets, U stabilised every 50 steps; largest difference "
        "between the factored and the dense weights. (b) Shortest of 15 steps, 64 features, batch 16, "
        "float32, one thread, at 1000 and 64 000 classes. (c) A text drawn from P(next | word) = "
        "softmax(1.2 A_word . B_next - log rank), A and B from N(0, I_6), 500 words: 16 000 tokens for "
        "training, 4000 to choose the learning rate, 4000 for the test. Embedding 32, tanh 64, output 500; "
        "Adam, 3 epochs, batch 64; for each loss the better of the learning rates 0.003 and 0.03 by held- "
        "out top-10 error; all losses share data, initialisation and batch order. Z-loss with a = 1, b = "
        "5; spherical softmax with eps = 0.1, neither tuned here."
    ),
    decision=(
        "Reproduced if the difference in (a) stays below 1e-9 and in (c) cross-entropy's error minus the "
        "Z-loss's exceeds 0 at k = 5 and k = 10, and the best top-10 error among squared error, Taylor "
        "softmax and spherical softmax minus the Z-loss's exceeds 0, each by its one-sided 95 % bound over "
        "seeds. The ratios of step times (below 3 for the factored layer, above 10 for the dense one) are "
        "reported and do not enter, since they depend on the machine. The paper's speed against softmax on "
        "One Billion Word is not tested."
    ),
    effects=(
        Effect("exactness", "1e-9 minus the largest difference of the weights", threshold=0.0),
        Effect("top10_gain", "top-10 test error of cross-entropy minus that of the Z-loss", threshold=0.0),
        Effect("top5_gain", "top-5 test error of cross-entropy minus that of the Z-loss", threshold=0.0),
        Effect(
            "top10_gain_over_spherical_losses",
            "lowest top-10 test error of the other spherical losses minus that of the Z-loss",
            threshold=0.0,
        ),
        Effect(
            "minus_factored_time_ratio",
            "minus the step time at 64 000 classes over that at 1000, factored layer",
            threshold=-3.0,
            required=False,
        ),
        Effect(
            "dense_time_ratio",
            "step time at 64 000 classes over that at 1000, dense layer",
            threshold=10.0,
            required=False,
        ),
    ),
    pilot=(
        "An earlier two-seed trial of the same design, with an implementation of its own: top-10 error "
        "0.271 and 0.265 for the Z-loss, 0.304 and 0.294 for cross-entropy, 0.370 and 0.380 for squared error, "
        "0.330 and 0.329 for Taylor softmax, 0.62 and 0.63 for spherical softmax; a = 1, b = 5 comes from it. "
        "Its time ratios were 1.3 (factored) and 52 (dense), its drift 3e-14. This code, seeds 0 to 2: gains "
        "over cross-entropy 0.025, 0.032 and 0.037 at k = 10 and 0.032, 0.029 and 0.035 at k = 5, over the "
        "best other spherical loss 0.050, 0.051 and 0.067; largest difference 1e-14; time ratios 1.0 to 1.9 "
        "and 32 to 62. Nothing was changed after them."
    ),
    run=run,
)
