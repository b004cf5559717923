"""Two new digits from twenty examples each: normalised softmax, plain softmax, triplet embedding."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from telos.evidence._protocol import Effect, Study
from telos.losses import NormalizedSoftmaxLoss, cross_entropy_loss
from telos.nn import HypersphericalHead
from telos.surgery import add_class, replace_classes

STEPS = {"smoke": 20, "small": 600, "full": 3000}
DIM, SHOTS, MARGIN = 32, 20, 0.2
Batch = Callable[[Tensor, Tensor], Tensor]


def run(seed: int, budget: str) -> dict[str, float]:
    """Train on eight digits with three losses, add two digits without training, and test on all ten."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    digits: Any = load_digits()
    train, test = train_test_split(
        torch.arange(len(digits.target)).numpy(), train_size=0.6, stratify=digits.target, random_state=seed
    )
    inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
    # known digits are renumbered 0 to 7, the novel ones are 8 and 9
    novel_last = torch.randperm(10, generator=generator).argsort()
    target = novel_last[torch.tensor(digits.target)]
    train, test = torch.tensor(train), torch.tensor(test)
    known = train[target[train] < 8]
    shuffled = train[torch.randperm(len(train), generator=generator)]
    support = torch.cat([shuffled[target[shuffled] == label][:SHOTS] for label in (8, 9)])
    one_shot = support[[0, SHOTS]]
    batches = [known[torch.randint(len(known), (64,), generator=generator)] for _ in range(STEPS[budget])]
    start = network(generator)

    def trained(loss: Batch, parameters: list[nn.Parameter], model: nn.Module) -> None:
        optimizer = torch.optim.Adam([*model.parameters(), *parameters], lr=1e-3)
        for batch in batches:
            optimizer.zero_grad()
            loss(model(inputs[batch]), target[batch]).backward()
            optimizer.step()

    def scores(name: str, joint: Tensor, disjoint: Tensor) -> dict[str, float]:
        truth = target[test]
        right, novel = joint.argmax(1) == truth, truth >= 8
        return {
            f"{name}_joint": right.float().mean().item(),
            f"{name}_novel_recall": right[novel].float().mean().item(),
            f"{name}_disjoint": (disjoint[novel].argmax(1) == truth[novel] - 8).float().mean().item(),
        }

    results: dict[str, float] = {}

    model = copy.deepcopy(start)
    loss = NormalizedSoftmaxLoss(8, DIM, scale=10.0)
    loss.reset_parameters(generator)
    trained(loss, list(loss.parameters()), model)
    with torch.no_grad():
        embeddings = model(inputs)
        for name, shots in (("sphere", support), ("sphere_one_shot", one_shot)):
            grown = add_class(loss, embeddings[shots], target[shots])
            disjoint = replace_classes(loss, embeddings[shots], target[shots])
            results |= scores(name, grown(embeddings[test]), disjoint(embeddings[test]))

    model, plain = copy.deepcopy(start), linear(DIM, 8, generator)
    trained(
        lambda features, labels: cross_entropy_loss(plain(features), labels), list(plain.parameters()), model
    )
    with torch.no_grad():
        embeddings = model(inputs)
        means = torch.stack([embeddings[support[target[support] == label]].mean(0) for label in (8, 9)])
        rescaled = plain.weight.norm(dim=1).mean() * F.normalize(means, dim=1)
        for name, rows in (("linear", means), ("linear_rescaled", rescaled)):
            logits = torch.cat([plain(embeddings[test]), embeddings[test] @ rows.T], 1)
            results |= scores(name, logits, logits[:, 8:])

    model = copy.deepcopy(start)
    trained(batch_hard_triplet_loss, [], model)
    with torch.no_grad():
        embeddings = model(inputs)
        for name, shots in (("triplet", support), ("triplet_one_shot", one_shot)):
            labelled = torch.cat([known, shots])
            # the mean direction of every class, known and novel
            head = replace_classes(HypersphericalHead(DIM, 8), embeddings[labelled], target[labelled])
            logits = head(embeddings[test])
            results |= scores(name, logits, logits[:, 8:])

    return {
        "joint_gain": results["sphere_joint"] - results["linear_joint"],
        "novel_gain": results["sphere_novel_recall"] - results["triplet_novel_recall"],
        "joint_gain_over_rescaled": results["sphere_joint"] - results["linear_rescaled_joint"],
        **results,
    }


def batch_hard_triplet_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Hinge on the farthest positive and the nearest negative of each anchor, at unit length."""
    unit = F.normalize(embeddings, dim=1)
    # bounded away from 0, where a distance has no slope
    distance = (2 - 2 * unit @ unit.T).clamp_min(1e-8).sqrt()
    same = labels[:, None] == labels[None]
    farthest = distance.masked_fill(~same, 0.0).amax(1)
    nearest = distance.masked_fill(same, 2.0).amin(1)
    return (farthest - nearest + MARGIN).clamp_min(0).mean()


def network(generator: torch.Generator) -> nn.Sequential:
    """The embedding: 64-128-32."""
    return nn.Sequential(linear(64, 128, generator), nn.ReLU(), linear(128, DIM, generator))


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A layer with torch's default scale, drawn from ``generator``."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1, 1, generator=generator).div_(inputs**0.5)
    return layer


STUDY = Study(
    slug="hyperspherical_novel_class",
    claim=(
        "On digits, two classes added from 20 examples each to a normalised softmax are recognised together "
        "with the known ones far better than in a plain linear softmax, and with higher recall of the new "
        "classes than in a triplet embedding."
    ),
    protocol=(
        "scikit-learn's digits over 16, stratified 60/40 split, two random digits held out of training; MLP "
        "64-128-32; 600 Adam steps at 0.001, batch 64, on the eight known digits. (A) normalised softmax, "
        "s = 10, mean directions appended; (B) linear softmax with bias, mean raw embeddings appended with "
        "bias 0, and a control whose new rows are rescaled to the mean norm of the old ones; (C) batch-hard "
        "triplet loss, margin 0.2, on unit embeddings, nearest mean direction. All start from the same "
        "network and see the same batches. 20 training examples of each novel digit are the support (one "
        "of them for the one-shot numbers). Joint accuracy over all test digits, recall of the novel ones "
        "among ten, accuracy between the two novel ones alone."
    ),
    decision=(
        "Reproduced if joint accuracy of A exceeds that of B by more than 0.3, and novel recall of A exceeds "
        "that of C, each by its one-sided 95 % bound over seeds. The gain over the rescaled control, which "
        "is what normalised training itself buys, is reported and does not enter."
    ),
    effects=(
        Effect("joint_gain", "joint accuracy of A minus that of B", threshold=0.3),
        Effect("novel_gain", "novel recall of A minus that of C", threshold=0.0),
        Effect(
            "joint_gain_over_rescaled",
            "joint accuracy of A minus that of B with rescaled new rows",
            threshold=0.0,
            required=False,
        ),
    ),
    pilot=(
        "An earlier trial of the same design, with an implementation of its own, means of joint accuracy, "
        "novel recall and disjoint accuracy: A 0.919, 0.708, 0.962; B 0.318, 0.912, 0.918 (joint 0.81 with "
        "rescaled rows); C 0.901, 0.583, 0.930; one-shot A 0.867, 0.471, 0.892 and C 0.858, 0.362, 0.843. "
        "This code, seeds 0 to 2: joint gains 0.68, 0.62 and 0.53, novel gains 0.19, 0.09 and 0.02; nothing "
        "was changed after them."
    ),
    run=run,
)
