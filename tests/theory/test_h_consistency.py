"""H-consistency bounds against closed forms, a direct evaluation in high precision, and brute force."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from telos.losses import comp_sum_loss
from telos.theory import (
    best_conditional_risk,
    h_consistency_bound,
    h_consistency_gamma,
    h_consistency_transform,
)

TAUS = (0.0, 0.3, 0.7, 1 - 1e-12, 1.0, 1 + 1e-9, 1.2, 1.5, 1.7, 1.99, 2 - 1e-9, 2.0, 2.5)
BETA = np.array([0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-9, 1.0])


def in_sixty_digits(beta: float, tau: float, classes: int) -> float:
    """The paper's four cases, as they stand."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 60, 10**15, -(10**15)
        b, t, one = Decimal(beta), Decimal(tau), Decimal(1)
        if tau >= 2:
            return float(b / ((t - 1) * Decimal(classes) ** (t - 1)))
        if tau == 1:
            return float(sum(x / 2 * x.ln() for x in (1 + b, 1 - b) if x > 0))
        q = one / (2 - t)
        mean = sum(x**q for x in (1 + b, 1 - b) if x > 0) / 2
        if tau < 1:
            return float(2 ** (1 - t) / (1 - t) * (1 - mean ** (2 - t)))
        return float((mean ** (2 - t) - 1) / ((t - 1) * Decimal(classes) ** (t - 1)))


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("tau", TAUS)
def test_transform_equals_the_formula(tau: float, classes: int) -> None:
    expected = [in_sixty_digits(beta, tau, classes) for beta in BETA]
    # small beta: T is of the order of beta^2, and 1 +- beta keep an absolute error of 1e-16
    np.testing.assert_allclose(h_consistency_transform(BETA, tau, classes), expected, rtol=1e-12, atol=1e-21)


def test_transform_at_zero_is_a_circle() -> None:
    np.testing.assert_allclose(
        h_consistency_transform(BETA, 0.0, 10), 1 - np.sqrt((1 - BETA) * (1 + BETA)), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("tau", TAUS)
def test_transform_is_zero_at_zero_increasing_and_convex(tau: float) -> None:
    beta = np.linspace(0, 1, 201)
    values = h_consistency_transform(beta, tau, 5)
    assert values[0] == 0
    assert not np.signbit(values[0])
    assert (np.diff(values) > 0).all()
    assert (np.diff(values, 2) > -1e-14).all()


@pytest.mark.parametrize("joint", [1.0, 2.0])
def test_transform_is_continuous_in_tau(joint: float) -> None:
    middle = h_consistency_transform(BETA, joint, 7)
    for step in (1e-6, 1e-9, 1e-12):
        for side in (joint - step, joint + step):
            difference = np.abs(h_consistency_transform(BETA, side, 7) - middle)
            assert (difference <= 10 * step).all()


def test_class_count_enters_above_one_only() -> None:
    for tau in (0.0, 0.5, 1.0):
        assert h_consistency_transform(0.7, tau, 2) == h_consistency_transform(0.7, tau, 1000)
    for tau in (1.5, 2.0):
        ratio = h_consistency_transform(0.7, tau, 2) / h_consistency_transform(0.7, tau, 200)
        assert ratio == pytest.approx(100 ** (tau - 1), rel=1e-14)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("tau", TAUS)
def test_gamma_inverts_the_transform(tau: float, classes: int) -> None:
    beta = np.linspace(0, 1, 51).reshape(17, 3)
    found = h_consistency_gamma(h_consistency_transform(beta, tau, classes), tau, classes)
    # at beta = 1 the transform has a vertical slope below tau = 1 and beyond it Gamma is 1
    np.testing.assert_allclose(found, beta, rtol=0, atol=1e-12)
    assert h_consistency_gamma(0.0, tau, classes) == pytest.approx(0, abs=1e-15)
    assert h_consistency_gamma(math.inf, tau, classes) == 1


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("tau", TAUS)
def test_explicit_bound_lies_above_gamma_and_meets_it_at_small_regrets(tau: float, classes: int) -> None:
    regret = h_consistency_transform(np.linspace(0, 1, 101), tau, classes)
    gamma, bound = h_consistency_gamma(regret, tau, classes), h_consistency_bound(regret, tau, classes)
    assert (gamma <= bound * (1 + 1e-12) + 1e-12).all()
    if tau <= 1 or tau >= 2:
        small = h_consistency_transform(1e-4, tau, classes)
        assert h_consistency_bound(small, tau, classes) == pytest.approx(1e-4, rel=1e-6)


# ------------------------------------------------------------------------------------------- conditional risk


def conditional_risk(scores: np.ndarray, p: np.ndarray, tau: float) -> np.ndarray:
    values = comp_sum_loss(torch.tensor(scores), torch.tensor(p), tau=tau, reduction="none")
    return values.numpy()


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 1.8])
def test_best_risk_is_reached_by_the_scores_that_reach_it(tau: float) -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), size=30)
    best = best_conditional_risk(p, tau)
    scores = np.log(p) / (2 - tau)  # softmax proportional to p^q
    np.testing.assert_allclose(conditional_risk(scores, p, tau), best, rtol=1e-12)
    nearby = scores + 0.1 * rng.standard_normal(scores.shape)
    assert (conditional_risk(nearby, p, tau) > best).all()


@pytest.mark.parametrize("tau", [2.0, 2.5])
def test_best_risk_from_two_on_is_that_of_the_most_likely_class(tau: float) -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(5), size=30)
    best = best_conditional_risk(p, tau)
    certain = np.where(p == p.max(-1, keepdims=True), 200.0, 0.0)
    np.testing.assert_allclose(conditional_risk(certain, p, tau), best, rtol=1e-12)
    np.testing.assert_allclose(best, (1 - p.max(-1)) / (tau - 1), rtol=1e-15)


def test_best_risk_at_one_is_the_entropy_and_at_certainty_zero() -> None:
    p = np.array([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(best_conditional_risk(p, 1.0), [1.5 * math.log(2), 0], atol=1e-15)
    for tau in TAUS:
        assert best_conditional_risk(p, tau)[1] == 0
        assert best_conditional_risk(p, tau)[0] > 0


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 1.9, 2.0, 2.5])
def test_zero_one_regret_never_exceeds_gamma_of_the_surrogate_regret(tau: float, classes: int) -> None:
    rng = np.random.default_rng(classes)
    p = rng.dirichlet(np.full(classes, 0.7), size=4000)
    # near the best scores, where the bound is tight, and far from them
    width = 10.0 ** rng.uniform(-2, 1, size=(4000, 1))
    scores = np.log(p) + width * rng.standard_normal(p.shape)
    chosen = np.take_along_axis(p, scores.argmax(-1, keepdims=True), -1)[:, 0]
    zero_one = p.max(-1) - chosen
    surrogate = np.maximum(conditional_risk(scores, p, tau) - best_conditional_risk(p, tau), 0)
    assert (zero_one > 0).any()
    assert (zero_one <= h_consistency_gamma(surrogate, tau, classes) + 1e-7).all()


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_bound_is_tight_for_two_equal_scores(tau: float) -> None:
    """Two classes of probabilities (1 +- b)/2 and equal scores: regret b, surrogate regret T(b) exactly."""
    beta = np.linspace(0, 1, 11)
    p = np.stack([(1 + beta) / 2, (1 - beta) / 2], -1)
    surrogate = conditional_risk(np.zeros_like(p), p, tau) - best_conditional_risk(p, tau)
    np.testing.assert_allclose(surrogate, h_consistency_transform(beta, tau, 2), atol=1e-14)


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("function", [h_consistency_transform, h_consistency_gamma, h_consistency_bound])
def test_arguments_out_of_range_are_refused(function) -> None:
    with pytest.raises(ValueError, match="tau must be a number of at least 0, got -1"):
        function(0.1, -1.0, 3)
    with pytest.raises(ValueError, match="tau must be a number of at least 0, got nan"):
        function(0.1, math.nan, 3)
    with pytest.raises(ValueError, match="num_classes must be a whole number of at least 2, got 1"):
        function(0.1, 1.0, 1)
    with pytest.raises(ValueError, match=r"must lie in \[0, .*\], got -0.1"):
        function([0.2, -0.1], 1.0, 3)
    with pytest.raises(ValueError, match=r"must lie in \[0, .*\], got nan"):
        function(math.nan, 1.0, 3)


def test_what_is_no_probability_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got 1.5"):
        h_consistency_transform(1.5, 1.0, 3)
    with pytest.raises(ValueError, match="probabilities must sum to 1"):
        best_conditional_risk([0.5, 0.4], 1.0)
    with pytest.raises(ValueError, match="probabilities must lie in"):
        best_conditional_risk([1.5, -0.5], 1.0)
    with pytest.raises(ValueError, match=r"probabilities must have shape \(..., C\) with C >= 2, got \(1,\)"):
        best_conditional_risk([1.0], 1.0)
