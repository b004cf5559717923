"""Learning from bag means, predicted: the linear model in closed form and its risk in high dimension."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._checks import check_floating, check_integer, check_range, check_shape


class AggregateRisk(NamedTuple):
    """The limit of ``E ||theta_hat - theta_0||^2``, and what it is made of.

    Attributes:
        excess_risk: bias + variance; the error on a fresh example is this plus the noise variance.
        bias: part that remains without label noise.
        variance: part that is proportional to the noise.
        tau: fixed point of the leverage; infinite where the fit interpolates.
        alpha: factor by which the estimate shrinks the signal, ``<theta_hat, theta_0> / ||theta_0||^2``.
    """

    excess_risk: float
    bias: float
    variance: float
    tau: float
    alpha: float


class OptimalBagSize(NamedTuple):
    """The bag size of least risk under label privacy, the rho that goes with it, and the risk there."""

    bag_size: int
    rho: float
    risk: AggregateRisk


def aggregate_ridgeless(
    x: Float[Tensor, "examples dim"],
    bag_response: Float[Tensor, " bags"],
    bag_index: Integer[Tensor, " examples"],
    rho: float,
    *,
    bag_weighting: Literal["bag", "sample"] = "bag",
) -> Float[Tensor, " dim"]:
    r"""The linear model that minimises the squared interpolating loss, in closed form.

    With P the projection on vectors that are constant within bags (equal bags)::

        theta_hat = ( X^T [P + rho (I - P)] X )^+ X^T P y

    rho = 1 is least squares on broadcast bag means, rho = 0 least squares on bag means. Where the minimiser
    is not unique the one of least norm is returned. It is :func:`telos.losses.aggregate_interpolation_loss`
    of ``x @ theta`` that is minimised, unequal bags included.

    Args:
        x: (N, D) features.
        bag_response: (B,) mean response of each bag.
        bag_index: (N,) the bag of each example, in [0, B); no bag may be empty.
        rho: share of the instance loss, at least 0.
        bag_weighting: ``"bag"`` lets every bag count alike; ``"sample"`` weighs it by its number of examples.

    Returns:
        (D,) coefficients.

    Raises:
        ValueError: for a wrong shape, an index out of range, an empty bag or a negative rho.
        TypeError: for a wrong dtype.

    Source:
        Learning from Aggregate responses: Instance Level versus Bag Level Loss Functions, arXiv 2401.11081.

    Example:
        >>> import torch
        >>> x, bag_index = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0])
        >>> aggregate_ridgeless(x, torch.tensor([2.0]), bag_index, rho=0.0)
        tensor([1.])
        >>> aggregate_ridgeless(x, torch.tensor([2.0]), bag_index, rho=1.0)
        tensor([0.8000])
    """
    check_floating("x", x)
    check_shape("x", x, ("N", "D"))
    check_floating("bag_response", bag_response)
    check_shape("bag_response", bag_response, ("B",))
    check_integer("bag_index", bag_index)
    check_shape("bag_index", bag_index, (x.shape[0],))
    check_range("rho", rho, 0.0, math.inf)
    if bag_weighting not in ("bag", "sample"):
        raise ValueError(f"bag_weighting must be 'bag' or 'sample', got {bag_weighting!r}")
    bags, bag_index = bag_response.shape[0], bag_index.long()
    if bag_index.numel() and (int(bag_index.min()) < 0 or int(bag_index.max()) >= bags):
        raise ValueError(
            f"bag_index must lie in [0, {bags}), got {int(bag_index.min())} to {int(bag_index.max())}"
        )
    size = torch.bincount(bag_index, minlength=bags).to(x.dtype)
    if (size == 0).any():
        raise ValueError(
            f"bag_index must name every bag in [0, {bags}), got no example of bag {int(size.argmin())}"
        )
    mean = x.new_zeros(bags, x.shape[1]).index_add(0, bag_index, x) / size.unsqueeze(1)
    # one least-squares problem: a row for each bag, and a row of response 0 for each example's departure from
    # it
    bag_factor = (torch.ones_like(size) if bag_weighting == "bag" else size).sqrt()
    departure_factor = (math.sqrt(rho) * bag_factor / size.sqrt())[bag_index]
    rows = torch.cat([bag_factor.unsqueeze(1) * mean, departure_factor.unsqueeze(1) * (x - mean[bag_index])])
    response = torch.cat([bag_factor * bag_response.to(x.dtype), x.new_zeros(x.shape[0])])
    # through R, which is D x D: the pseudo-inverse of Q R is R^+ Q^T
    q, r = torch.linalg.qr(rows)
    return torch.linalg.pinv(r) @ (q.mT @ response)


def asymptotic_risk(
    n_over_d: float,
    bag_size: int,
    rho: float,
    signal_norm_sq: float = 1.0,
    noise_var: float = 1.0,
    extra_response_noise_var: float = 0.0,
) -> AggregateRisk:
    r"""What :func:`aggregate_ridgeless` will cost, for isotropic Gaussian features and random equal bags.

    ``x ~ N(0, I_d)``, ``y = <x, theta_0> + noise``, n and d large with n / d fixed. Write ``m = n / (d k)``
    for the bags per dimension and ``q = n / d - m`` for what is left; r2 is the signal, s2 the noise::

        m tau / (1 + tau) + q rho tau / (1 + rho tau) = 1,     tau > 0
        alpha    = m tau / (1 + tau)
        D        = m / (1 + tau)^2 + q rho / (1 + rho tau)^2
        v1       = m tau / (1 + tau)^2 / D
        v2       = q rho^2 tau / (1 + rho tau)^2 / D
        bias     = r2 [ (1 - alpha)^2 (1 + v1) + alpha^2 v2 ]
        variance = s2 v1

    With fewer equations than dimensions the least-norm fit interpolates: tau is infinite, ``alpha = m``,
    ``v1 = m / (1 - n/d)``, ``v2 = q / (1 - n/d)`` (for rho = 0, where only bags count, m stands for n/d and
    v2 is 0).

    RECONSTRUCTED: derived by leaving one row out, and in agreement with simulation; the paper states the
    same limit through a fixed point whose printed form has not been compared.

    Args:
        n_over_d: examples per dimension, above 0.
        bag_size: k, at least 1.
        rho: share of the instance loss, at least 0.
        signal_norm_sq: squared norm of theta_0.
        noise_var: variance of the label noise of one example.
        extra_response_noise_var: variance added to the bag responses, in the scale of ``sqrt(k)`` times a bag
            mean: ``8 C^2 / (k epsilon^2)`` for the release of :func:`telos.data.private_bag_means`.

    Returns:
        The risk and its parts. Infinite where the number of equations equals the number of dimensions.

    Raises:
        ValueError: for a number out of range.

    Source:
        Learning from Aggregate responses: Instance Level versus Bag Level Loss Functions, arXiv 2401.11081.

    Example:
        >>> risk = asymptotic_risk(n_over_d=4.0, bag_size=2, rho=0.3)
        >>> round(risk.bias, 4), round(risk.variance, 4), round(risk.tau, 4)
        (0.1408, 0.3623, 0.5556)
    """
    check_range("n_over_d", n_over_d, 0.0, math.inf, open_low=True)
    check_range("bag_size", bag_size, 1, math.inf)
    check_range("rho", rho, 0.0, math.inf)
    for name, value in (
        ("signal_norm_sq", signal_norm_sq),
        ("noise_var", noise_var),
        ("extra_response_noise_var", extra_response_noise_var),
    ):
        check_range(name, value, 0.0, math.inf)
    m = n_over_d / bag_size
    q = n_over_d - m if rho > 0 else 0.0
    if m + q > 1:
        # the fixed point without its fractions: rho (m + q - 1) tau^2 + b tau - 1 = 0
        b = m - 1 + rho * (q - 1)
        root = math.sqrt(b * b + 4 * rho * (m + q - 1))
        tau = 2 / (b + root) if b > 0 else (root - b) / (2 * rho * (m + q - 1))
        alpha = m * tau / (1 + tau)
        d = m / (1 + tau) ** 2 + q * rho / (1 + rho * tau) ** 2
        v1 = m * tau / (1 + tau) ** 2 / d
        v2 = q * rho**2 * tau / (1 + rho * tau) ** 2 / d
    elif m + q < 1:
        tau, alpha = math.inf, m
        v1, v2 = m / (1 - m - q), q / (1 - m - q)
    else:
        return AggregateRisk(math.inf, math.inf, math.inf, math.inf, m)
    bias = signal_norm_sq * ((1 - alpha) ** 2 * (1 + v1) + alpha**2 * v2)
    variance = (noise_var + extra_response_noise_var) * v1
    return AggregateRisk(bias + variance, bias, variance, tau, alpha)


def optimal_rho(
    n_over_d: float,
    bag_size: int,
    signal_norm_sq: float = 1.0,
    noise_var: float = 1.0,
    extra_response_noise_var: float = 0.0,
) -> float:
    """The share of the instance loss that minimises :func:`asymptotic_risk`, in [0, 1].

    Found on a grid and refined to about 1e-8. With bags of one example every rho is the same, and 1 is
    returned.

    Args:
        n_over_d: examples per dimension, above 0.
        bag_size: k, at least 1.
        signal_norm_sq: squared norm of theta_0.
        noise_var: variance of the label noise of one example.
        extra_response_noise_var: as in :func:`asymptotic_risk`.

    Returns:
        rho*.

    Raises:
        ValueError: for a number out of range.

    Source:
        Learning from Aggregate responses: Instance Level versus Bag Level Loss Functions, arXiv 2401.11081.

    Example:
        >>> round(optimal_rho(n_over_d=10.0, bag_size=4), 2)
        0.13
    """

    def risk(rho: float) -> float:
        return asymptotic_risk(
            n_over_d, bag_size, rho, signal_norm_sq, noise_var, extra_response_noise_var
        ).excess_risk

    if bag_size == 1:
        return 1.0
    grid = [step / 64 for step in range(65)]
    best = min(range(65), key=lambda step: risk(grid[step]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, 64)]
    shrink = (math.sqrt(5) - 1) / 2
    while high - low > 1e-8:
        left, right = high - shrink * (high - low), low + shrink * (high - low)
        low, high = (low, right) if risk(left) <= risk(right) else (left, high)
    return min((low + high) / 2, grid[best], key=risk)


def optimal_bag_size(
    n_over_d: float,
    signal_norm_sq: float = 1.0,
    noise_var: float = 1.0,
    *,
    clip: float,
    epsilon: float,
    rho: float | None = None,
    max_bag_size: int = 64,
) -> OptimalBagSize:
    """The bag size that minimises the risk when bag means are released with label differential privacy.

    A larger bag hides more of each label and needs less noise, but says less about its members. The noise of
    :func:`telos.data.private_bag_means` adds ``8 C^2 / (k epsilon^2)`` to the noise variance; what clipping
    itself does to the responses is not modelled, so choose C beyond most of them. RECONSTRUCTED, as is the
    mechanism.

    Args:
        n_over_d: examples per dimension, above 0.
        signal_norm_sq: squared norm of theta_0.
        noise_var: variance of the label noise of one example.
        clip: C, the bound on a response, above 0.
        epsilon: privacy budget of each label, above 0; infinite adds no noise.
        rho: share of the instance loss; the best one for each bag size if not given.
        max_bag_size: largest bag size that is tried.

    Returns:
        The bag size, its rho and the risk there.

    Raises:
        ValueError: for a number out of range.

    Source:
        Learning from Aggregate responses: Instance Level versus Bag Level Loss Functions, arXiv 2401.11081.

    Example:
        >>> optimal_bag_size(10.0, clip=2.0, epsilon=float("inf")).bag_size
        1
        >>> optimal_bag_size(10.0, clip=2.0, epsilon=0.5).bag_size > 1
        True
    """
    check_range("clip", clip, 0.0, math.inf, open_low=True)
    check_range("epsilon", epsilon, 0.0, math.inf, open_low=True)
    check_range("max_bag_size", max_bag_size, 1, math.inf)

    def best(bag_size: int) -> OptimalBagSize:
        extra = 8 * clip**2 / (bag_size * epsilon**2)
        share = optimal_rho(n_over_d, bag_size, signal_norm_sq, noise_var, extra) if rho is None else rho
        return OptimalBagSize(
            bag_size,
            share,
            asymptotic_risk(n_over_d, bag_size, share, signal_norm_sq, noise_var, extra),
        )

    return min((best(k) for k in range(1, max_bag_size + 1)), key=lambda option: option.risk.excess_risk)
