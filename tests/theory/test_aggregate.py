"""The linear model on bag means: closed form, asymptotic risk and its limits, simulation."""

import math
from collections.abc import Iterator

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from telos.data import bag_means, make_bags
from telos.theory import aggregate_ridgeless, asymptotic_risk, optimal_bag_size, optimal_rho


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize("rho", [0.0, 0.15, 1.0, 1.7])
def test_equals_the_formula_with_the_projection(rho: float) -> None:
    x, y = normal(12, 2), normal(12, seed=1)
    bag_index = make_bags(12, 3, torch.Generator().manual_seed(2))
    projection = (bag_index[:, None] == bag_index[None]).double() / 3
    middle = projection + rho * (torch.eye(12, dtype=torch.float64) - projection)
    expected = torch.linalg.solve(x.T @ middle @ x, x.T @ projection @ y)
    torch.testing.assert_close(aggregate_ridgeless(x, bag_means(y, bag_index), bag_index, rho), expected)


def test_ends_are_least_squares() -> None:
    x, bag_response = normal(12, 2), normal(4, seed=1)
    bag_index = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3])
    means = torch.stack([x[bag_index == bag].mean(0) for bag in range(4)])
    on_means = torch.linalg.lstsq(means, bag_response).solution
    torch.testing.assert_close(aggregate_ridgeless(x, bag_response, bag_index, 0.0), on_means)
    broadcast = torch.linalg.lstsq(x, bag_response[bag_index]).solution
    torch.testing.assert_close(
        aggregate_ridgeless(x, bag_response, bag_index, 1.0, bag_weighting="sample"), broadcast
    )


def test_fewer_bags_than_dimensions_gives_the_least_norm() -> None:
    x, bag_response, bag_index = normal(8, 6), normal(4, seed=1), torch.arange(8) // 2
    means = (x[0::2] + x[1::2]) / 2
    theta = aggregate_ridgeless(x, bag_response, bag_index, 0.0)
    torch.testing.assert_close(means @ theta, bag_response)
    # of least norm: no part outside the span of the bag means
    torch.testing.assert_close(means.T @ torch.linalg.solve(means @ means.T, means @ theta), theta)


@pytest.mark.bare
def test_closed_form_refuses_what_it_cannot_mean() -> None:
    x, bag_response = normal(4, 2), normal(2)
    with pytest.raises(ValueError, match="got no example of bag 0"):
        aggregate_ridgeless(x, bag_response, torch.tensor([1, 1, 1, 1]), 0.5)
    with pytest.raises(ValueError, match=r"bag_index must lie in \[0, 2\), got 0 to 2"):
        aggregate_ridgeless(x, bag_response, torch.tensor([0, 1, 1, 2]), 0.5)
    with pytest.raises(ValueError, match="rho must lie in"):
        aggregate_ridgeless(x, bag_response, torch.tensor([0, 0, 1, 1]), -0.5)
    with pytest.raises(ValueError, match="bag_index must have shape"):
        aggregate_ridgeless(x, bag_response, torch.tensor([0, 1]), 0.5)


# -------------------------------------------------------------------------------- asymptotic risk


@pytest.mark.parametrize("n_over_d", [1.01, 1.5, 4.0, 30.0])
@pytest.mark.parametrize("bag_size", [1, 2, 7])
@pytest.mark.parametrize("rho", [1e-6, 0.3, 1.0, 5.0])
def test_tau_solves_the_fixed_point(n_over_d: float, bag_size: int, rho: float) -> None:
    m = n_over_d / bag_size
    q = n_over_d - m

    def excess(log_tau: float) -> float:
        tau = math.exp(log_tau)
        return m * tau / (1 + tau) + q * rho * tau / (1 + rho * tau) - 1

    tau = math.exp(brentq(excess, math.log(1e-12), math.log(1e12), xtol=1e-14))
    risk = asymptotic_risk(n_over_d, bag_size, rho)
    assert risk.tau == pytest.approx(tau, rel=1e-9)
    assert risk.alpha == pytest.approx(m * tau / (1 + tau), rel=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("n_over_d", [1.3, 5.0])
def test_bags_of_one_are_ordinary_least_squares(rho: float, n_over_d: float) -> None:
    risk = asymptotic_risk(n_over_d, 1, rho, 3.0, 2.0)
    assert risk.bias == pytest.approx(0.0, abs=1e-12)
    assert risk.variance == pytest.approx(2.0 / (n_over_d - 1), rel=1e-12)


@pytest.mark.parametrize("bag_size", [2, 5])
def test_instance_loss_has_the_variance_of_least_squares_on_means(bag_size: int) -> None:
    assert asymptotic_risk(3.0, bag_size, 1.0, noise_var=2.0).variance == pytest.approx(
        2.0 / (bag_size * (3.0 - 1)), rel=1e-12
    )


@pytest.mark.parametrize("rho", [0.0, 1e-9])
def test_bag_loss_is_unbiased(rho: float) -> None:
    risk = asymptotic_risk(8.0, 2, rho, noise_var=2.0)
    assert risk.bias == pytest.approx(0.0, abs=1e-7)
    assert risk.variance == pytest.approx(2.0 / (4 - 1), rel=1e-7)
    assert risk.alpha == pytest.approx(1.0, rel=1e-7)


def test_least_norm_interpolation_matches_its_known_risk() -> None:
    """Bags of one with n < d: bias 1 - n / d, variance (n / d) / (1 - n / d)."""
    risk = asymptotic_risk(0.4, 1, 1.0, 3.0, 2.0)
    assert risk.bias == pytest.approx(3.0 * 0.6, rel=1e-12)
    assert risk.variance == pytest.approx(2.0 * 0.4 / 0.6, rel=1e-12)
    assert asymptotic_risk(0.4, 2, 0.3) == asymptotic_risk(0.4, 2, 0.9)
    assert asymptotic_risk(1.0, 2, 0.3).excess_risk == math.inf


def test_extra_response_noise_adds_to_the_noise() -> None:
    plain = asymptotic_risk(4.0, 2, 0.3, 1.0, 1.5)
    assert asymptotic_risk(4.0, 2, 0.3, 1.0, 0.5, 1.0) == plain
    assert asymptotic_risk(4.0, 2, 0.3, 1.0, 0.5).variance < plain.variance


SETTINGS = [
    (4.0, 2, 0.02, 1.0),
    (4.0, 2, 0.5, 1.0),
    (3.0, 2, 1.0, 0.25),
    (6.0, 4, 0.2, 1.0),
    (2.0, 4, 0.3, 1.0),
    (0.5, 2, 0.7, 1.0),
    (1.2, 3, 0.0, 0.5),
]


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Small matrices are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(("n_over_d", "bag_size", "rho", "noise_var"), SETTINGS)
def test_simulation_agrees_within_three_percent(
    n_over_d: float, bag_size: int, rho: float, noise_var: float
) -> None:
    dim, draws = 150, 120  # standard error about 1 %
    n = int(n_over_d * dim)
    generator = torch.Generator().manual_seed(11)
    theta = torch.full((dim,), 1 / math.sqrt(dim), dtype=torch.float64)
    errors = []
    for _ in range(draws):
        x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
        y = x @ theta + math.sqrt(noise_var) * torch.randn(n, generator=generator, dtype=torch.float64)
        bag_index = make_bags(n, bag_size, generator)
        estimate = aggregate_ridgeless(x, bag_means(y, bag_index), bag_index, rho)
        errors.append((estimate - theta).square().sum())
    predicted = asymptotic_risk(n_over_d, bag_size, rho, 1.0, noise_var).excess_risk
    assert torch.stack(errors).mean().item() == pytest.approx(predicted, rel=0.03)


# -------------------------------------------------------------------------------- optima


@pytest.mark.parametrize(("n_over_d", "bag_size"), [(4.0, 2), (10.0, 4), (6.0, 3)])
def test_optimal_rho_beats_a_fine_grid(n_over_d: float, bag_size: int) -> None:
    best = optimal_rho(n_over_d, bag_size)
    assert 0 < best < 1
    least = asymptotic_risk(n_over_d, bag_size, best).excess_risk
    grid = [asymptotic_risk(n_over_d, bag_size, step / 2000).excess_risk for step in range(2001)]
    assert least <= min(grid) + 1e-14
    assert abs(best - grid.index(min(grid)) / 2000) <= 1 / 2000


def test_optimal_rho_answers_the_noise() -> None:
    """No signal: shrink as much as allowed. No noise: the bag loss recovers the model exactly."""
    assert optimal_rho(4.0, 2, signal_norm_sq=0.0) == pytest.approx(1.0, abs=1e-6)
    assert optimal_rho(4.0, 2, noise_var=0.0) == pytest.approx(0.0, abs=1e-6)
    assert optimal_rho(4.0, 1) == 1.0


@pytest.mark.parametrize("rho", [None, 0.5])
def test_optimal_bag_size_beats_every_other(rho: float | None) -> None:
    best = optimal_bag_size(10.0, clip=2.0, epsilon=0.7, rho=rho, max_bag_size=20)
    assert 1 < best.bag_size < 20
    for bag_size in range(1, 21):
        extra = 8 * 2.0**2 / (bag_size * 0.7**2)
        share = optimal_rho(10.0, bag_size, 1.0, 1.0, extra) if rho is None else rho
        assert best.risk.excess_risk <= asymptotic_risk(10.0, bag_size, share, 1.0, 1.0, extra).excess_risk


def test_more_privacy_wants_larger_bags() -> None:
    sizes = [
        optimal_bag_size(10.0, clip=2.0, epsilon=epsilon, max_bag_size=32).bag_size
        for epsilon in (8.0, 2.0, 0.7)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.bare
def test_refuses_numbers_out_of_range() -> None:
    with pytest.raises(ValueError, match="n_over_d must lie in"):
        asymptotic_risk(0.0, 2, 0.5)
    with pytest.raises(ValueError, match="bag_size must lie in"):
        asymptotic_risk(4.0, 0, 0.5)
    with pytest.raises(ValueError, match="noise_var must lie in"):
        asymptotic_risk(4.0, 2, 0.5, noise_var=-1.0)
    with pytest.raises(ValueError, match="epsilon must lie in"):
        optimal_bag_size(4.0, clip=1.0, epsilon=0.0)
