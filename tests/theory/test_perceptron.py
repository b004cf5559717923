import math
from typing import Any

import pytest
import torch
from torch import Tensor

from telos.theory.perceptron import (
    batch_perceptron,
    logistic_gd,
    maximum_margin,
    perceptron,
    separation_bound,
    worst_case_dataset,
)
from tests.golden.adapters import Case


def golden_normalized_lr_gd(case: Case) -> dict[str, Any]:
    if not case.inputs:
        features, labels = worst_case_dataset(case.params["n"])

        def counts(name: str, normalized: bool) -> dict[str, int | None]:
            gammas = case.expected.get(name, {})
            return {
                gamma: logistic_gd(
                    features, labels, float(gamma), normalized=normalized, max_steps=10 * len(labels)
                ).iterations_to_separate
                for gamma in gammas
            }

        return {
            "normalized": counts("normalized", True),
            "plain": counts("plain", False),
            "batch_perceptron": batch_perceptron(features, labels).iterations_to_separate,
            "normalized_batch_perceptron": batch_perceptron(
                features, labels, normalized=True
            ).iterations_to_separate,
        }
    features, labels = case.inputs["features"], case.inputs["labels"]
    if "steps" in case.params:
        path = logistic_gd(
            features,
            labels,
            case.params["gamma"],
            normalized=case.params["normalized"],
            max_steps=case.params["steps"],
            theta0=case.inputs["theta0"],
            stop_when_separated=False,
        )
        return {
            "theta": path.theta,
            "beta": path.beta,
            "loss": path.loss,
            "iterations_to_separate": path.iterations_to_separate,
        }
    found = batch_perceptron(features, labels, normalized=case.params["normalized"])
    # one recording may hold the whole path, another its end
    whole = torch.tensor(case.expected["theta"]).ndim == 2
    return {
        "theta": found.theta if whole else found.theta[-1],
        "iterations": found.iterations_to_separate,
        "R2": features.square().sum(1).max(),
    }


def separable(seed: int, n: int = 40, dim: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    scores = features @ torch.randn(dim, generator=generator, dtype=torch.float64)
    keep = scores.abs() > 0.3
    return features[keep], torch.where(scores[keep] > 0, 1, -1)


@pytest.mark.parametrize("seed", range(5))
def test_a_huge_step_is_the_batch_perceptron(seed) -> None:
    features, labels = separable(seed)
    steps = batch_perceptron(features, labels)
    assert steps.iterations_to_separate is not None
    path = logistic_gd(features, labels, gamma=1e6, normalized=False, stop_when_separated=False, max_steps=6)
    shared = min(len(steps.theta), 7)
    torch.testing.assert_close(path.theta[:shared] / 1e6, steps.theta[:shared], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma", [0.1, 1.0, 100.0])
def test_the_bounds_hold(seed, gamma) -> None:
    features, labels = separable(seed)
    radius = features.norm(dim=1).max().item()
    margin, _ = maximum_margin(features, labels)
    found = logistic_gd(features, labels, gamma, max_steps=100_000).iterations_to_separate
    assert found is not None
    assert found <= separation_bound(radius, margin, len(labels), gamma) + 1
    for path in (
        batch_perceptron(features, labels, normalized=True),
        perceptron(features, labels),
        perceptron(features, labels, order="random", generator=torch.Generator().manual_seed(seed)),
    ):
        assert path.iterations_to_separate is not None
        assert path.iterations_to_separate <= separation_bound(radius, margin)
    batch = batch_perceptron(features, labels).iterations_to_separate
    assert batch is not None
    assert batch <= len(labels) * separation_bound(radius, margin)


@pytest.mark.parametrize("normalized", [True, False])
def test_duplicating_every_example_changes_nothing(normalized) -> None:
    features, labels = separable(0)
    once = logistic_gd(features, labels, 2.0, normalized=normalized)
    thrice = logistic_gd(features.repeat(3, 1), labels.repeat(3), 2.0, normalized=normalized)
    assert once.iterations_to_separate == thrice.iterations_to_separate
    torch.testing.assert_close(once.theta, thrice.theta)


def test_loss_may_grow_on_the_way_to_separation() -> None:
    # the two-point example of the paper
    features, labels = torch.tensor([[1.0, -1.0], [-1.0, -4.0]]), torch.tensor([1, -1])
    path = logistic_gd(features, labels, gamma=50.0, normalized=False)
    assert path.theta[1].tolist() == pytest.approx([25.0, 37.5])
    assert path.loss[1] > 6
    assert path.iterations_to_separate == 2
    assert (path.theta[2] / 50).tolist() == pytest.approx([1.0, 0.25], abs=1e-4)


def test_normalized_steps_are_finite_where_all_weights_underflow() -> None:
    path = logistic_gd(
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([1, 1]),
        gamma=1e5,
        max_steps=5,
        stop_when_separated=False,
    )
    assert path.theta.isfinite().all()
    assert path.beta[-1] == math.inf
    assert path.iterations_to_separate == 1


def test_data_that_cannot_be_separated_give_the_best_iterate() -> None:
    features, labels = torch.tensor([[1.0], [2.0], [3.0], [-1.0]]), torch.tensor([1, 1, 1, 1])
    path = logistic_gd(features, labels, gamma=0.5, max_steps=20)
    assert path.iterations_to_separate is None
    assert path.errors.min() == 1
    assert (features @ path.best.float() > 0).sum() == 3
    assert batch_perceptron(features, labels, max_steps=50).iterations_to_separate is None
    assert perceptron(features, labels, max_steps=50).iterations_to_separate is None
    assert maximum_margin(features, labels)[0] == 0.0


def test_maximum_margin_against_brute_force() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(12, 2, generator=generator, dtype=torch.float64) + torch.tensor([3.0, 1.0])
    labels = torch.ones(12, dtype=torch.long)
    angles = torch.linspace(0, 2 * math.pi, 200_001, dtype=torch.float64)
    directions = torch.stack([angles.cos(), angles.sin()])
    brute = (features @ directions).amin(0).max().item()
    margin, direction = maximum_margin(features, labels)
    assert margin == pytest.approx(brute, abs=1e-8)
    assert direction.norm().item() == pytest.approx(1.0)
    # a common factor is a common factor of the margin, and says nothing about separability
    assert maximum_margin(features * 1e-6, labels)[0] == pytest.approx(1e-6 * margin)


def test_steps_of_the_worst_case_grow_with_its_size() -> None:
    for n in (100, 500):
        features, labels = worst_case_dataset(n)
        plain = logistic_gd(features, labels, 100.0, normalized=False, max_steps=n).iterations_to_separate
        assert plain is not None
        assert plain >= 0.3 * n
        assert logistic_gd(features, labels, 10.0).iterations_to_separate == 2


@pytest.mark.bare
def test_errors() -> None:
    features, labels = worst_case_dataset(4)
    with pytest.raises(ValueError, match="gamma"):
        logistic_gd(features, labels, 0.0)
    with pytest.raises(ValueError, match="theta0"):
        logistic_gd(features, labels, 1.0, theta0=torch.zeros(3))
    with pytest.raises(ValueError, match=r"-1 or \+1"):
        batch_perceptron(features, (labels + 1) // 2)
    with pytest.raises(ValueError, match="labels must have shape"):
        perceptron(features, labels[:2])
    with pytest.raises(ValueError, match="n above 0"):
        perceptron(features[:0], labels[:0])
    with pytest.raises(ValueError, match="belong together"):
        separation_bound(1.0, 1.0, gamma=1.0)
    with pytest.raises(ValueError, match="num_examples"):
        worst_case_dataset(1)
