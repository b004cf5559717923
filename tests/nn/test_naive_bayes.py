"""The naive Bayes head and its comparator."""

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from telos.nn.naive_bayes import (
    NaiveBayesHead,
    class_statistics,
    fit_logistic,
    logistic_probe,
    merge_statistics,
)
from tests.conformance.ranks import on_ranks
from tests.golden.adapters import Case


def golden_naive_bayes_probe(case: Case) -> dict[str, Any]:
    calls = [(call["x"], call["y"].long()) for call in case.inputs["fit_calls"]]
    classes = int(max(target.max() for _, target in calls)) + 1
    head = NaiveBayesHead(calls[0][0].shape[1], classes, eps=case.params.get("val_epsilon", 1e-9))
    for features, target in calls:
        head.partial_fit(features, target)
    return {
        "means": head.mean,
        "class_variances": head.class_variance(),
        "prior": head.log_prior().exp(),
        "shared_variance": head.shared_variance(),
        "log_likelihood": head.log_likelihood(case.inputs["x_test"]),
        "prediction": head(case.inputs["x_test"]).argmax(-1),
    }


def examples(n: int = 60, dim: int = 4, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.multinomial(torch.arange(1.0, classes + 1), n, True, generator=generator)
    centers = 2 * torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    spread = torch.rand(dim, generator=generator, dtype=torch.float64) + 0.5
    noise = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return centers[target] + spread * noise, target


# ---------------------------------------------------------------------------------------------- statistics


def test_statistics_are_those_of_numpy() -> None:
    features, target = examples()
    found = class_statistics(features, target, 3)
    for label in range(3):
        own = features[target == label].numpy()
        assert found.counts[label] == len(own)
        np.testing.assert_allclose(found.mean[label], own.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.m2[label] / len(own), own.var(0), rtol=1e-12)


def test_any_split_gives_the_same_head_however_far_from_the_origin() -> None:
    features, target = examples(100)
    features = features + 1e5
    whole = NaiveBayesHead(4, 3).fit(features, target)
    for sizes in ([1] * 100, [3, 50, 0, 47], [99, 1]):
        head = NaiveBayesHead(4, 3)
        for part, labels in zip(features.split(sizes), target.split(sizes), strict=True):
            head.partial_fit(part, labels)
        torch.testing.assert_close(head.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(head.shared_variance(), whole.shared_variance(), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        whole.shared_variance(),
        NaiveBayesHead(4, 3).fit(features - 1e5, target).shared_variance(),
        rtol=1e-8,
        atol=0,
    )


def test_merging_does_not_depend_on_the_order_and_takes_absent_classes() -> None:
    features, target = examples()
    first = class_statistics(features[target == 0], target[target == 0], 4)
    second = class_statistics(features[target > 0], target[target > 0], 4)
    whole = class_statistics(features, target, 4)
    for merged in (merge_statistics(first, second), merge_statistics(second, first)):
        for have, want in zip(merged, whole, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-13, atol=1e-14)


def test_eps_counts_once_however_many_blocks() -> None:
    """The authors add it to the variances of each block and average those: v + eps again, also for a large eps."""
    features, target = examples()
    blocks = [(features[:30], target[:30]), (features[30:], target[30:])]
    head = NaiveBayesHead(4, 3, eps=0.5)
    for block in blocks:
        head.partial_fit(*block)
    (n1, mean1, m1), (n2, mean2, m2) = (class_statistics(*block, 3) for block in blocks)
    n1, n2 = n1[:, None], n2[:, None]
    squares = n1 * (m1 / n1 + 0.5) + n2 * (m2 / n2 + 0.5) + n1 * n2 / (n1 + n2) * (mean1 - mean2).square()
    torch.testing.assert_close(head.class_variance(), squares / (n1 + n2), rtol=1e-12, atol=0)


def test_a_weight_is_a_repetition_and_weight_zero_is_absence() -> None:
    features, target = examples(6)
    weight = torch.tensor([2.0, 0.0, 1.0, 3.0, 1.0, 1.0])
    repeated = weight.long()
    want = NaiveBayesHead(4, 3).partial_fit(
        features.repeat_interleave(repeated, 0), target.repeat_interleave(repeated)
    )
    features[1] = torch.nan
    head = NaiveBayesHead(4, 3).partial_fit(features, target, weight)
    for have, expected in zip(head.statistics, want.statistics, strict=True):
        torch.testing.assert_close(have, expected, rtol=1e-12, atol=1e-14)


def test_nan_that_counts_is_seen() -> None:
    features, target = examples(10)
    features[3, 2] = torch.nan
    head = NaiveBayesHead(4, 3).partial_fit(features, target)
    assert head.shared_variance().isnan().tolist() == [False, False, True, False]


# ---------------------------------------------------------------------------------------------- predictions


def test_log_likelihood_is_that_of_independent_normals() -> None:
    features, target = examples()
    head = NaiveBayesHead(4, 3).fit(features, target)
    within = torch.stack([features[target == k].var(0, correction=0) for k in range(3)])
    prior = target.bincount() / 60
    scale = (prior.double() @ within + 1e-9).sqrt()
    want = [
        torch.distributions.Normal(features[target == k].mean(0), scale).log_prob(features).sum(-1)
        for k in range(3)
    ]
    torch.testing.assert_close(head.log_likelihood(features), torch.stack(want, -1), rtol=1e-7, atol=1e-7)
    posterior = (head.log_likelihood(features) + head.log_prior()).log_softmax(-1)
    torch.testing.assert_close(head(features).log_softmax(-1), posterior)


def test_equals_scikit_learns_where_all_classes_have_one_variance() -> None:
    """Every class is the same cloud at another place, so that GaussianNB's variances are all equal."""
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    centers = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    features, target = (centers[:, None] + cloud).flatten(0, 1), torch.arange(4).repeat_interleave(20)
    theirs = GaussianNB(var_smoothing=0).fit(features, target)
    head = NaiveBayesHead(3, 4, eps=0.0).fit(features, target)
    torch.testing.assert_close(head(features).softmax(-1), torch.tensor(theirs.predict_proba(features)))


def test_is_linear_discriminant_analysis_where_features_are_uncorrelated_within_classes() -> None:
    """Deviations are made orthogonal, so that the pooled covariance is diagonal."""
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(cloud - cloud.mean(0)).Q * torch.tensor([1.0, 2.0, 3.0, 4.0])
    centers = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    features, target = (centers[:, None] + basis).flatten(0, 1), torch.arange(3).repeat_interleave(20)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(features, target)
    layer = NaiveBayesHead(4, 3, eps=0.0).fit(features, target).to_linear(torch.float64)
    coefficients = torch.tensor(theirs.coef_)
    torch.testing.assert_close(layer.weight[1:] - layer.weight[0], coefficients[1:] - coefficients[0])
    torch.testing.assert_close(
        (layer.bias[1:] - layer.bias[0]).detach(), torch.tensor(theirs.intercept_[1:] - theirs.intercept_[0])
    )


def test_linear_layer_has_the_same_softmax() -> None:
    features, target = examples()
    head = NaiveBayesHead(4, 3).fit(features + 100, target)
    layer = head.to_linear(torch.float64)
    assert isinstance(layer, nn.Linear)
    assert layer.weight.requires_grad
    torch.testing.assert_close(layer(features + 100).softmax(-1), head(features + 100).softmax(-1))
    assert head.to_linear().weight.dtype == torch.get_default_dtype()


def test_equal_priors_and_one_variance_give_the_nearest_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    cloud = torch.cat([torch.eye(3), -torch.eye(3)]).double()  # variance 1/3 in every feature
    centers = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    head = NaiveBayesHead(3, 4).fit((centers[:, None] + cloud).flatten(0, 1), torch.arange(24) // 6)
    points = 2 * torch.randn(200, 3, generator=generator, dtype=torch.float64)
    assert torch.equal(head(points).argmax(-1), torch.cdist(points, centers).argmin(-1))


def test_scaling_and_shifting_features_changes_no_posterior() -> None:
    features, target = examples()
    factor = torch.tensor([1e-2, 1.0, 30.0, -5.0], dtype=torch.float64)
    head = NaiveBayesHead(4, 3, eps=0.0).fit(features, target)
    other = NaiveBayesHead(4, 3, eps=0.0).fit(factor * features + 7, target)
    torch.testing.assert_close(
        other(factor * features + 7).softmax(-1), head(features).softmax(-1), rtol=1e-8, atol=1e-12
    )


def test_no_prediction_depends_on_the_order_of_examples() -> None:
    features, target = examples()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    head, other = NaiveBayesHead(4, 3).fit(features, target), NaiveBayesHead(4, 3)
    torch.testing.assert_close(other.fit(features[order], target[order])(features), head(features))


def test_two_known_classes_by_hand() -> None:
    """Means -2 and 3, variance 1, priors 1/2: logits differ by 5 x - 2.5."""
    features = torch.tensor([[-1.0], [-3.0], [2.0], [4.0]], dtype=torch.float64)
    head = NaiveBayesHead(1, 2, eps=0.0).fit(features, torch.tensor([0, 0, 1, 1]))
    points = torch.tensor([[-1.0], [0.0], [0.5], [2.0]], dtype=torch.float64)
    logits = head(points)
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], 5 * points[:, 0] - 2.5)


def test_an_absent_class_is_never_predicted_and_spoils_nothing() -> None:
    features, target = examples()
    head, wider = NaiveBayesHead(4, 3).fit(features, target), NaiveBayesHead(4, 5).fit(features, target)
    logits = wider(features)
    assert torch.all(logits[:, 3:] == -math.inf)
    torch.testing.assert_close(logits[:, :3], head(features))
    assert torch.isfinite(wider.log_likelihood(features)).all()
    loss = cross_entropy(wider(features.requires_grad_()), target)
    (slope,) = torch.autograd.grad(loss, features)
    assert torch.isfinite(slope).all()


def test_one_example_per_class_gives_the_nearest_of_them() -> None:
    features = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    with pytest.warns(UserWarning, match="2 of 2 features are constant"):
        head = NaiveBayesHead(2, 3).fit(features, torch.arange(3))
    assert head(torch.tensor([[1.0, 0.5], [3.0, 1.0], [1.0, 3.0]])).argmax(-1).tolist() == [0, 1, 2]
    assert torch.isfinite(head(features)).all()


def test_floor_of_the_variances_tames_a_constant_feature() -> None:
    features, target = examples()
    features[:, 1] = target.double()
    with pytest.warns(UserWarning, match="1 of 4 features"):
        free = NaiveBayesHead(4, 3).fit(features, target)
    assert free.shared_variance()[1] == 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = NaiveBayesHead(4, 3, var_smoothing=0.01).fit(features, target)
    variance = head.shared_variance()
    assert variance[1] == 0.01 * variance.max()
    others = [0, 2, 3]
    assert torch.equal(variance[others], free.shared_variance()[others])


def test_a_feature_that_is_constant_everywhere_changes_no_prediction() -> None:
    features, target = examples()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = NaiveBayesHead(5, 3).fit(torch.cat([features, torch.full((60, 1), 0.1)], 1), target)
    strange = torch.cat([features, torch.full((60, 1), 9.0)], 1)
    torch.testing.assert_close(head(strange), NaiveBayesHead(4, 3).fit(features, target)(features))


# ---------------------------------------------------------------------------------------------- the module


def test_fit_forgets_and_reset_forgets_all() -> None:
    features, target = examples()
    head = NaiveBayesHead(4, 3).fit(*examples(seed=5)).fit(features, target)
    assert torch.equal(head(features), NaiveBayesHead(4, 3).fit(features, target)(features))
    assert not head.reset().count.any()


def test_statistics_are_saved_and_keep_their_digits() -> None:
    features, target = examples()
    head = NaiveBayesHead(4, 3).fit(features, target)
    other = NaiveBayesHead(4, 3)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(features), head(features))
    low = copy.deepcopy(head).half()
    assert low.mean.dtype == torch.float64
    assert torch.equal(low(features), head(features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_logits(dtype: torch.dtype) -> None:
    features, target = examples()
    head = NaiveBayesHead(4, 3).fit(features.to(dtype), target)
    logits = head(features.to(dtype))
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    want = NaiveBayesHead(4, 3).fit(features.to(dtype).double(), target)(features.to(dtype).double())
    torch.testing.assert_close(logits, want.to(logits.dtype))


def test_leading_axes_and_gradient() -> None:
    features, target = examples()
    head = NaiveBayesHead(4, 3).fit(features, target)
    assert torch.equal(head(features.reshape(5, 12, 4)), head(features).reshape(5, 12, 3))
    points = features[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(head, points)
    assert torch.autograd.gradcheck(head.log_likelihood, points)


def _synchronized(features: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    part = slice(dist.get_rank(), None, dist.get_world_size())
    if dist.get_rank() == 1:  # a rank without examples of class 0
        keep = target[part] != 0
        features, target = features[part][keep], target[part][keep]
    else:
        features, target = features[part], target[part]
    head = NaiveBayesHead(4, 3).partial_fit(features, target)
    return tuple(head.synchronize().statistics)


def test_ranks_together_have_all_examples() -> None:
    features, target = examples()
    kept = ~((torch.arange(60) % 2 == 1) & (target == 0))
    want = class_statistics(features[kept], target[kept], 3)
    for statistics in on_ranks(2, _synchronized, features, target):
        for have, expected in zip(statistics, want, strict=True):
            torch.testing.assert_close(have, expected, rtol=1e-12, atol=1e-12)


def test_a_single_process_synchronizes_to_itself() -> None:
    head = NaiveBayesHead(4, 3).fit(*examples())
    before = [part.clone() for part in head.statistics]
    assert all(torch.equal(a, b) for a, b in zip(before, head.synchronize().statistics, strict=True))


# ---------------------------------------------------------------------------------------------- logistic regression


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("C", [0.1, 1.0, 10.0])
def test_logistic_probe_is_scikit_learns(classes: int, C: float) -> None:
    features, target = examples(classes=classes)
    theirs = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(features, target)
    probe = logistic_probe(features, target, C=C, tol=1e-9)
    want = torch.tensor(theirs.predict_proba(features))
    torch.testing.assert_close(probe(features).softmax(-1).detach(), want, rtol=1e-5, atol=1e-7)


def test_logistic_probe_stands_where_the_gradient_vanishes() -> None:
    features, target = examples()
    weights = torch.rand(60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = fit_logistic(features, target, C=0.5, tol=1e-9, sample_weight=weights)
    weight, bias = found.weight.requires_grad_(), found.bias.requires_grad_()
    losses = cross_entropy(features @ weight.T + bias, target, reduction="none")
    (0.5 * (weights * losses).sum() + 0.5 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(weight.grad, torch.zeros_like(weight), rtol=0, atol=1e-7)
    torch.testing.assert_close(bias.grad, torch.zeros_like(bias), rtol=0, atol=1e-7)
    torch.testing.assert_close(weight.sum(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-7)


def test_logistic_weights_are_repetitions_and_weight_zero_is_absence() -> None:
    features, target = examples(8)
    weight = torch.tensor([2.0, 0.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    twice = weight.long()
    want = fit_logistic(features.repeat_interleave(twice, 0), target.repeat_interleave(twice), 3, tol=1e-10)
    features[1] = torch.nan
    found = fit_logistic(features, target, 3, tol=1e-10, sample_weight=weight)
    torch.testing.assert_close(found.weight, want.weight, rtol=1e-6, atol=1e-8)


def test_logistic_probe_works_under_no_grad_and_warns_when_cut_short() -> None:
    features, target = examples()
    with torch.no_grad():
        probe = logistic_probe(features, target)
    assert torch.equal(probe.weight, logistic_probe(features, target).weight)
    assert logistic_probe(features.float(), target).weight.dtype == torch.float32
    with pytest.warns(UserWarning, match="max_iter=1"):
        logistic_probe(features, target, max_iter=1)


# ---------------------------------------------------------------------------------------------- doors


@pytest.mark.bare
def test_doors() -> None:
    features, target = examples()
    head = NaiveBayesHead(4, 3)
    with pytest.raises(RuntimeError, match="no examples"):
        head(features)
    with pytest.raises(ValueError, match=r"features must have shape \(..., 4\), got \(60, 3\)"):
        head.partial_fit(features[:, :3], target)
    with pytest.raises(ValueError, match="target must have shape"):
        head.partial_fit(features, target[:-1])
    with pytest.raises(ValueError, match=r"target must lie in \[0, 3\)"):
        head.partial_fit(features, target + 1)
    with pytest.raises(TypeError, match="features must have a floating-point dtype"):
        head.partial_fit(features.long(), target)
    with pytest.raises(TypeError, match="target must have an integer dtype"):
        head.partial_fit(features, target.double())
    with pytest.raises(ValueError, match="sample_weight must be at least 0"):
        head.partial_fit(features, target, -torch.ones(60))
    assert not head.count.any(), "a refused block leaves nothing behind"
    with pytest.raises(ValueError, match="C must lie"):
        logistic_probe(features, target, C=0.0)
    with pytest.raises(ValueError, match="num_classes must lie"):
        logistic_probe(features, torch.zeros_like(target))
    with pytest.raises(ValueError, match="at least one example"):
        logistic_probe(features[:0], target[:0])
    with pytest.raises(ValueError, match="sample_weight must be above 0"):
        logistic_probe(features, target, sample_weight=torch.zeros(60))


@pytest.mark.bare
@pytest.mark.parametrize(
    "arguments",
    [
        {"in_features": 0},
        {"num_classes": 0},
        {"eps": -1.0},
        {"var_smoothing": 1.5},
    ],
)
def test_constructor_refuses(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        NaiveBayesHead(**{"in_features": 4, "num_classes": 3, **arguments})
