"""H-consistency bounds of comp-sum losses: how much zero-one regret a small surrogate regret can still hide.

For a symmetric and complete hypothesis set H, with minimizability gaps M (0 when H holds all functions)::

    R_01(h) - R_01*(H)  <=  Gamma_tau( R_tau(h) - R_tau*(H) + M_tau(H) ) - M_01(H)

``Gamma_tau`` is the inverse of ``T_tau``. For tau > 1 it grows with the number of classes, which is the
paper's explanation of why generalised cross-entropy and MAE fall behind on many classes. All values are
float64.
"""

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[np.float64]
Values: TypeAlias = Array | float  # numpy gives a float64 scalar for a scalar


def h_consistency_transform(beta: ArrayLike, tau: float, num_classes: int) -> Values:
    r"""The transform ``T_tau``: the least surrogate regret that goes with a zero-one regret of ``beta``.

    With ``q = 1 / (2 - tau)`` and ``S = ((1 + beta)^q + (1 - beta)^q) / 2``::

        0 <= tau < 1:  T = 2^(1 - tau) / (1 - tau) * (1 - S^(2 - tau))
        tau = 1:       T = (1 + beta)/2 log(1 + beta) + (1 - beta)/2 log(1 - beta)
        1 < tau < 2:   T = (S^(2 - tau) - 1) / ((tau - 1) C^(tau - 1))
        tau >= 2:      T = beta / ((tau - 1) C^(tau - 1))

    It is increasing and convex in beta, and continuous in tau. That it bounds the regret is RECONSTRUCTED for
    0 <= tau < 2: derived again, and searched by brute force over random conditional distributions.

    Args:
        beta: zero-one regret in [0, 1], any shape.
        tau: parameter of the comp-sum loss, at least 0.
        num_classes: number of classes C, at least 2; it enters for tau > 1 only.

    Returns:
        Surrogate regret, of the shape of ``beta``.

    Raises:
        ValueError: for an argument out of range.

    Source:
        Cross-Entropy Loss Functions: Theoretical Analysis and Applications, arXiv 2304.07288.

    Example:
        >>> h_consistency_transform([0.0, 0.6, 1.0], tau=0.0, num_classes=10).round(12).tolist()
        [0.0, 0.2, 1.0]
    """
    _check_parameters(tau, num_classes)
    beta = _in_range("beta", beta, 1.0)
    with np.errstate(divide="ignore"):  # log 0 at beta = 1 is wanted: it is minus infinity
        logs = np.stack([np.log1p(beta), np.log1p(-beta)], -1)
    scale = 2.0 ** (1 - tau) if tau < 1 else float(num_classes) ** (1 - tau)
    # adding 0.0 turns the -0.0 of beta = 0 into 0.0
    return scale * _power_mean_excess(np.stack([1 + beta, 1 - beta], -1), logs, 0.5, tau) + 0.0


def h_consistency_gamma(regret: ArrayLike, tau: float, num_classes: int) -> Values:
    r"""``Gamma_tau``, the inverse of :func:`h_consistency_transform`: the most zero-one regret left.

    Args:
        regret: surrogate regret (with the minimizability gap added), at least 0, any shape.
        tau: parameter of the comp-sum loss, at least 0.
        num_classes: number of classes C, at least 2.

    Returns:
        Zero-one regret in [0, 1], of the shape of ``regret``; 1 from ``T_tau(1)`` on, where it says nothing.

    Raises:
        ValueError: for an argument out of range.

    Source:
        Cross-Entropy Loss Functions: Theoretical Analysis and Applications, arXiv 2304.07288.

    Example:
        >>> h_consistency_gamma([0.0, 0.2, 5.0], tau=0.0, num_classes=10).round(12).tolist()
        [0.0, 0.6, 1.0]
    """
    _check_parameters(tau, num_classes)
    regret = _in_range("regret", regret, math.inf)
    if tau >= 2:
        return np.minimum(h_consistency_bound(regret, tau, num_classes), 1.0)
    low, high = np.zeros_like(regret), np.ones_like(regret)
    for _ in range(64):  # bisection, since T is increasing
        middle = (low + high) / 2
        below = h_consistency_transform(middle, tau, num_classes) < regret
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(regret < h_consistency_transform(1.0, tau, num_classes), high, 1.0)


def h_consistency_bound(regret: ArrayLike, tau: float, num_classes: int) -> Values:
    r"""An explicit upper bound on :func:`h_consistency_gamma`, tight for small regrets.

    ::

        0 <= tau < 1:  sqrt(2^tau (2 - tau) regret)
        1 <= tau < 2:  sqrt(2 C^(tau - 1) regret)
        tau >= 2:      (tau - 1) C^(tau - 1) regret

    Args:
        regret: surrogate regret, at least 0, any shape.
        tau: parameter of the comp-sum loss, at least 0.
        num_classes: number of classes C, at least 2.

    Returns:
        An upper bound on the zero-one regret, not cut off at 1, of the shape of ``regret``.

    Raises:
        ValueError: for an argument out of range.

    Source:
        Cross-Entropy Loss Functions: Theoretical Analysis and Applications, arXiv 2304.07288.

    Example:
        >>> h_consistency_bound([0.02, 0.08], tau=1.0, num_classes=10).round(12).tolist()
        [0.2, 0.4]
    """
    _check_parameters(tau, num_classes)
    regret = _in_range("regret", regret, math.inf)
    if tau < 1:
        return np.sqrt(2.0**tau * (2 - tau) * regret)
    growth = float(num_classes) ** (tau - 1)
    return np.sqrt(2 * growth * regret) if tau < 2 else (tau - 1) * growth * regret


def best_conditional_risk(probabilities: ArrayLike, tau: float) -> Values:
    r"""The least conditional comp-sum risk ``min over h of sum_y p_y loss_tau(h, y)``, over all scores h.

    With the norm ``|p|_q = (sum_y p_y^q)^(1/q)`` and ``q = 1 / (2 - tau)`` (infinite from tau = 2 on)::

        (1 - |p|_q) / (tau - 1),    and the entropy of p at tau = 1

    Args:
        probabilities: (..., C) class probabilities; each row sums to 1.
        tau: parameter of the comp-sum loss, at least 0.

    Returns:
        Risk of each row, of shape (...).

    Raises:
        ValueError: for a negative tau, a wrong shape, or rows that are no probabilities.

    Source:
        Derived here (RECONSTRUCTED) for the losses of arXiv 2304.07288, and checked by minimisation.

    Example:
        >>> [round(float(best_conditional_risk([0.5, 0.5], tau)), 4) for tau in (0.0, 1.0, 2.0)]
        [1.0, 0.6931, 0.5]
    """
    _check_parameters(tau, 2)
    probabilities = _in_range("probabilities", probabilities, 1.0 + 1e-6)
    if probabilities.ndim < 1 or probabilities.shape[-1] < 2:
        raise ValueError(f"probabilities must have shape (..., C) with C >= 2, got {probabilities.shape}")
    if not np.allclose(probabilities.sum(-1), 1.0, rtol=0, atol=1e-6):
        raise ValueError("probabilities must sum to 1 over the last dimension")
    with np.errstate(divide="ignore"):
        return 0.0 - _power_mean_excess(probabilities, np.log(probabilities), 1.0, tau)


def _power_mean_excess(values: Array, logs: Array, weight: float, tau: float) -> Values:
    """``(M - 1) / (tau - 1)`` with ``M = (sum_k weight * values_k^q)^(1/q)`` and ``q = 1 / (2 - tau)``.

    ``sum_k weight * values_k`` must be 1. The limit at tau = 1 is ``sum_k weight * values_k * log values_k``;
    from tau = 2 on, M is the largest value.
    """
    if tau >= 2:
        return np.expm1(logs.max(-1)) / (tau - 1)
    excess_power = (tau - 1) / (2 - tau)  # q - 1
    finite = np.where(values > 0, logs, 0.0)
    if tau == 1:
        return (weight * values * finite).sum(-1)
    # values^q = values + values * expm1((q - 1) log values): nothing cancels near tau = 1 or near values = 1
    near = excess_power * finite
    log_mean = np.log1p((weight * values * np.expm1(np.minimum(near, 700.0))).sum(-1))
    if tau > 1.5:
        # q diverges as tau approaches 2: away from values = 1, take powers relative to the largest value
        top = logs.max(-1)
        relative = np.exp((1 + excess_power) * (logs - top[..., None])).sum(-1)
        far = (1 + excess_power) * top + np.log(weight * relative)
        log_mean = np.where((np.abs(excess_power * logs) < 1).all(-1), log_mean, far)
    return np.expm1((2 - tau) * log_mean) / (tau - 1)


def _check_parameters(tau: float, num_classes: int) -> None:
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau must be a number of at least 0, got {tau}")
    if num_classes != int(num_classes) or num_classes < 2:
        raise ValueError(f"num_classes must be a whole number of at least 2, got {num_classes}")


def _in_range(name: str, values: ArrayLike, high: float) -> Array:
    array = np.asarray(values, dtype=np.float64)
    inside = (array >= 0) & (array <= high)
    if not inside.all():
        raise ValueError(f"{name} must lie in [0, {high:g}], got {array[~inside].flat[0]}")
    return array
