"""Density-normalised edge loss: rare compositions in scene graphs whose density varies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from telos.data.synthetic.scenes import SceneGraph, SceneGraphWorld
from telos.evidence._protocol import Effect, Study
from telos.losses.classification.density_normalized import density_normalized_cross_entropy_loss
from telos.metrics.ranking import weighted_triplet_recall

K, PREDICATES, TEST_EDGES, FEW = 20, 8, 6, 10
STEPS = {"smoke": 20, "small": 1500, "full": 6000}
TEST_GRAPHS = {"smoke": 10, "small": 300, "full": 1000}

OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "baseline": partial(density_normalized_cross_entropy_loss, mode="baseline"),
    "baseline_gamma_10": partial(density_normalized_cross_entropy_loss, mode="baseline", gamma=10.0),
    "dnorm": density_normalized_cross_entropy_loss,
    "dnorm_fgbg": partial(density_normalized_cross_entropy_loss, mode="dnorm-fgbg"),
}


@dataclass(frozen=True)
class Data:
    """Training graphs in their order, test graphs, and how often training annotated each pair of classes."""

    train: list[SceneGraph]
    test: list[SceneGraph]
    counts: Tensor


def run(seed: int, budget: str) -> dict[str, float]:
    """Recalls of all objectives on the same graphs, and their differences."""
    torch.set_num_threads(1)
    data = graphs(seed, STEPS[budget], TEST_GRAPHS[budget])
    recall = {name: recalls(trained(name, data.train, seed), data) for name in OBJECTIVES}
    few = {name: numbers["few_shot"] for name, numbers in recall.items()}
    weighted = {name: numbers["weighted"] for name, numbers in recall.items()}
    zero = {name: numbers["zero_shot"] for name, numbers in recall.items()}
    return {
        "few_shot_gain": few["dnorm"] - few["baseline"],
        "weighted_gain": weighted["dnorm"] - weighted["baseline"],
        "few_shot_gain_over_gamma_10": few["dnorm"] - few["baseline_gamma_10"],
        "zero_shot_gain": zero["dnorm"] - zero["baseline"],
        **{f"{key}_{name}": value for name, numbers in recall.items() for key, value in numbers.items()},
    }


def graphs(seed: int, steps: int, test: int) -> Data:
    """One small or large training graph per step, and large test graphs in which any pair may be annotated."""
    generator = torch.Generator().manual_seed(seed)
    world = SceneGraphWorld(predicates=PREDICATES, generator=generator)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def large() -> int:
        return (12, 16, 20)[integer(0, 2)]

    train = [
        world.draw(integer(3, 5), integer(2, 4), zipf=True, generator=generator)
        if integer(0, 1)
        else world.draw(large(), integer(3, 8), generator=generator)
        for _ in range(steps)
    ]
    counts = torch.zeros_like(world.predicate)
    for graph in train:
        shown = graph.target > 0
        counts.index_put_(
            (graph.subject[shown], graph.object[shown]), torch.ones(int(shown.sum()), dtype=torch.long), True
        )
    tests = [world.draw(large(), TEST_EDGES, training=False, generator=generator) for _ in range(test)]
    return Data(train, tests, counts)


def trained(name: str, train: Sequence[SceneGraph], seed: int) -> nn.Module:
    """An MLP on pairs, one graph per step of Adam; the seed fixes the weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(37, 64), nn.ReLU(), nn.Linear(64, PREDICATES + 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for graph in train:
        optimizer.zero_grad()
        OBJECTIVES[name](model(graph.features), graph.target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    return model


@torch.no_grad()
def recalls(model: nn.Module, data: Data) -> dict[str, float]:
    """Recall at 20 of all, zero-shot and few-shot triplets, and weighted by rarity.

    A triplet's rank is among all (pair, predicate) scores of its graph, without graph constraint.
    """
    ranks, counts = [], []
    for graph in data.test:
        scores = model(graph.features).softmax(-1)[:, 1:]
        pairs = (graph.target > 0).nonzero().squeeze(1)
        own = scores[pairs, graph.target[pairs] - 1]
        ranks.append((scores.flatten() > own.unsqueeze(1)).sum(1))
        counts.append(data.counts[graph.subject[pairs], graph.object[pairs]])
    rank, count = torch.cat(ranks), torch.cat(counts)
    few = (count > 0) & (count <= FEW)

    def plain(chosen: Tensor) -> float:
        return (rank[chosen] < K).double().mean().item() if chosen.any() else 0.0

    return {
        "all": plain(count >= 0),
        "zero_shot": plain(count == 0),
        "few_shot": plain(few),
        "weighted": weighted_triplet_recall(rank, count, k=K).item(),
    }


STUDY = Study(
    slug="density_normalized_edge",
    claim=(
        "On scene graphs of varying density, dividing the edge loss by the number of annotated edges raises the recall "
        "at 20 of triplets seen one to ten times by more than 0.05 over the mean over all edges, also raises the "
        "recall weighted by rarity, and does more than a tenfold weight of the edge loss."
    ),
    protocol=(
        "20 classes with 4 attributes, 8 predicates from a random table of the two attributes; features of an object "
        "its class and attribute vectors with noise 0.5. One graph per step: small (3 to 5 nodes, Zipf classes, 2 to 4 "
        "annotated edges) or large (12, 16 or 20 nodes, uniform classes, 3 to 8), evenly; 15 % of the ordered pairs of "
        "classes are never annotated in training. MLP 37-64-9 with ReLU, Adam at 3e-3, gradient norm clipped at 5, "
        "1500 steps, the same graphs and weights for every loss. 300 large test graphs of six annotated edges each, "
        "each ranked among all (pair, predicate) scores of its graph; recall at 20."
    ),
    decision=(
        "Reproduced if the lower 95 % bounds exceed 0.05 for the few-shot gain over the baseline, and 0 for the gain "
        "in weighted recall and for the few-shot gain over the baseline with gamma = 10. The zero-shot gain over the "
        "baseline is reported beside."
    ),
    effects=(
        Effect("few_shot_gain", "few-shot recall at 20 of dnorm minus that of the baseline", 0.05),
        Effect("weighted_gain", "weighted recall at 20 of dnorm minus that of the baseline", 0.0),
        Effect(
            "few_shot_gain_over_gamma_10",
            "few-shot recall at 20 of dnorm minus that of the baseline with gamma = 10",
            0.0,
        ),
        Effect(
            "zero_shot_gain",
            "zero-shot recall at 20 of dnorm minus that of the baseline",
            0.0,
            required=False,
        ),
    ),
    pilot=(
        "An earlier trial of five seeds fixed the protocol; all / zero-shot / few-shot / weighted: baseline "
        ".258/.140/.189/.168, with gamma = 10 .357/.210/.260/.244, dnorm .410/.224/.327/.274, dnorm-fgbg "
        ".402/.252/.369/.295. Its rule was the median over seeds; here it is the bound on the mean. Seed 0 of this "
        "file was run once for time and correctness: in the same order .287/.164/.184/.191, "
        ".415/.240/.325/.284, .456/.271/.335/.319, .446/.260/.364/.312. Nothing was changed after it, though the lead "
        "over gamma = 10 is smaller than in the earlier trial."
    ),
    run=run,
)
