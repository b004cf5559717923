"""Learning curves of probes."""

from functools import partial

import pytest
import torch
from torch import Tensor

from telos.data.synthetic.gaussian_classes import (
    gaussian_classes_error,
    make_gaussian_classes,
    two_level_covariance,
)
from telos.nn.naive_bayes import NaiveBayesHead, logistic_probe
from telos.theory.probe_complexity import (
    Probe,
    SampleCurve,
    sample_curve,
    sample_sizes,
    samples_to_reach,
)


def pool(n: int = 200, dim: int = 5, seed: int = 0, classes: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return make_gaussian_classes(n, two_level_covariance(dim), classes, generator=generator)


def naive_bayes(features: Tensor, target: Tensor) -> Probe:
    return NaiveBayesHead(features.shape[1], 2).partial_fit(features, target)


def test_naive_bayes_tends_to_the_smallest_possible_error() -> None:
    """The covariance is diagonal, so naive Bayes is right in the limit; 4 standard errors of 100,000 tests."""
    optimal = gaussian_classes_error(two_level_covariance(4))
    head = naive_bayes(*pool(20_000, 4))
    features, target = pool(100_000, 4, seed=1)
    error = (head(features).argmax(-1) != target).double().mean().item()
    assert error == pytest.approx(optimal, abs=4 * (optimal / 100_000) ** 0.5)


def test_every_subset_holds_every_class_and_has_its_size() -> None:
    seen = []

    def fit(features: Tensor, target: Tensor) -> Probe:
        seen.append((len(features), target.unique().numel()))
        return naive_bayes(features, target)

    sample_curve(fit, *pool(), *pool(seed=1), [2, 3, 10], repeats=20)
    assert seen == [(size, 2) for size in (2, 3, 10) for _ in range(20)]


def test_two_probes_see_the_same_subsets() -> None:
    seen: dict[str, list[Tensor]] = {"one": [], "other": []}

    def fit(name: str, features: Tensor, target: Tensor) -> Probe:
        seen[name].append(features)
        return naive_bayes(features, target)

    for name in seen:
        generator = torch.Generator().manual_seed(4)
        sample_curve(partial(fit, name), *pool(), *pool(seed=1), [4, 8], generator=generator)
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))
    assert not torch.equal(seen["one"][0], seen["one"][1])


def test_errors_are_shares_of_wrong_predictions() -> None:
    features, target = pool()

    def always_zero(features: Tensor, target: Tensor) -> Probe:
        return lambda x: torch.tensor([1.0, 0.0]).expand(len(x), 2)

    curve = sample_curve(always_zero, features, target, features[:8], torch.tensor([0] * 6 + [1] * 2), [10])
    assert curve.errors.tolist() == [[0.25] * 5]


def test_stops_with_the_first_size_below_the_level() -> None:
    arguments = (*pool(400, 40), *pool(1000, 40, seed=1), [4, 8, 16, 32, 64])
    whole = sample_curve(naive_bayes, *arguments, generator=torch.Generator().manual_seed(0))
    short = sample_curve(naive_bayes, *arguments, stop_below=0.02, generator=torch.Generator().manual_seed(0))
    reached = samples_to_reach(whole, 0.02)
    assert reached is not None
    assert reached < 64
    assert short.sizes[-1] == reached
    assert torch.equal(short.errors, whole.errors[: len(short.sizes)])


def test_scaling_uses_the_subset_alone() -> None:
    features = torch.tensor([[0.0, 5.0], [4.0, 5.0]])
    seen = []

    def fit(train: Tensor, target: Tensor) -> Probe:
        def predict(test: Tensor) -> Tensor:
            seen.append((train.sort(0).values, test))
            return torch.zeros(len(test), 2)

        return predict

    test = torch.tensor([[8.0, 6.0]])
    sample_curve(fit, features, torch.tensor([0, 1]), test, torch.tensor([0]), [2], repeats=1, scale=True)
    assert seen[0][0].tolist() == [[0.0, 0.0], [1.0, 0.0]]
    assert seen[0][1].tolist() == [[2.0, 1.0]]


def test_naive_bayes_needs_fewer_examples_on_the_papers_simulation() -> None:
    needed = {}
    for name, fit in (("nb", naive_bayes), ("lr", logistic_probe)):
        curve = sample_curve(
            fit,
            *pool(400, 40),
            *pool(1000, 40, seed=1),
            [4, 8, 16, 32, 64, 128, 256],
            generator=torch.Generator().manual_seed(0),
        )
        needed[name] = samples_to_reach(curve, 0.02)
    assert needed["nb"] is not None
    assert needed["lr"] is not None
    assert 2 * needed["nb"] < needed["lr"]


def test_samples_to_reach_is_strict_and_uses_the_mean() -> None:
    curve = SampleCurve(torch.tensor([2, 4, 8]), torch.tensor([[0.5, 0.0], [0.25, 0.25], [0.1, 0.1]]))
    assert samples_to_reach(curve, 0.25) == 8
    assert samples_to_reach(curve, 0.26) == 2
    assert samples_to_reach(curve, 0.05) is None


def test_sizes_of_the_papers_simulation() -> None:
    assert sample_sizes(1000, 3, 30) == [6, 13, 20, 27]


@pytest.mark.bare
def test_doors() -> None:
    features, target = pool()
    for sizes in ([], [1], [4, 4], [8, 4], [201]):
        with pytest.raises(ValueError, match="sizes must increase"):
            sample_curve(naive_bayes, features, target, features, target, sizes)
    with pytest.raises(ValueError, match="repeats"):
        sample_curve(naive_bayes, features, target, features, target, [4], repeats=0)
    with pytest.raises(ValueError, match="test_features must have shape"):
        sample_curve(naive_bayes, features, target, features[:, :2], target, [4])
    with pytest.raises(TypeError, match="target must have an integer dtype"):
        sample_curve(naive_bayes, features, target.double(), features, target, [4])
    rare = torch.zeros(10_000, dtype=torch.long)
    rare[0] = 1
    with pytest.raises(ValueError, match="no subset of size 2 with all 2 classes"):
        sample_curve(naive_bayes, torch.zeros(10_000, 1), rare, features[:, :1], target, [2])
    with pytest.raises(ValueError, match="dim"):
        sample_sizes(1, 2, 10)
