"""From logistic regression to the perceptron: full-batch gradient descent with any step size, and its bounds.

Data are features ``a_i`` (a constant one serves as the bias) and labels ``y_i`` in {-1, +1}; they are *separated* by
theta when ``y_i a_i . theta > 0`` for every i. All arithmetic is float64.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


class LogisticPath(NamedTuple):
    """What gradient descent went through; see :func:`logistic_gd`.

    Attributes:
        theta: (T + 1, d) iterates, from the start on.
        beta: (T,) ``1 / mean_i sigmoid(-m_i)`` at each step; may be infinite.
        loss: (T + 1,) logistic loss of each iterate.
        gradient_norm: (T + 1,) norm of its gradient.
        errors: (T + 1,) examples with a margin that is not positive.
        iterations_to_separate: the first t with no error, or ``None``.
    """

    theta: Tensor
    beta: Tensor
    loss: Tensor
    gradient_norm: Tensor
    errors: Tensor
    iterations_to_separate: int | None

    @property
    def best(self) -> Tensor:
        """(d,) the first iterate with the fewest errors: what to keep of data that cannot be separated."""
        return self.theta[int(self.errors.argmin())]


class PerceptronPath(NamedTuple):
    """What a perceptron went through.

    Attributes:
        theta: (T + 1, d) iterates, from zero on.
        iterations_to_separate: T where the last iterate separates the data, else ``None``.
    """

    theta: Tensor
    iterations_to_separate: int | None


def logistic_gd(
    features: Float[Tensor, "examples features"],
    labels: Integer[Tensor, " examples"],
    gamma: float,
    *,
    normalized: bool = True,
    max_steps: int = 1000,
    theta0: Float[Tensor, " features"] | None = None,
    stop_when_separated: bool = True,
) -> LogisticPath:
    r"""Logistic regression by full-batch gradient descent with a fixed, possibly huge, step size.

    With margins ``m_i = y_i a_i . theta`` and ``w_i = sigmoid(-m_i)``::

        LR+GD              theta <- theta + gamma (1/n) sum_i w_i y_i a_i
        Normalized LR+GD   theta <- theta + gamma sum_i w_i y_i a_i / sum_j w_j

    As gamma grows, ``theta_t / gamma`` of LR+GD tends to the iterates of :func:`batch_perceptron`, which may need
    steps in proportion to n; those of the normalized form are bounded by :func:`separation_bound`. Loss and gradient
    norm say little about progress: both may grow on the way to separation.

    Args:
        features: (n, d), any floating dtype.
        labels: (n,) -1 or +1.
        gamma: step size, above 0.
        normalized: which of the two.
        max_steps: steps taken at most.
        theta0: (d,) start; zeros if not given.
        stop_when_separated: whether to stop at the first iterate that separates. Normalized steps stay long
            afterwards and may lose it again.

    Returns:
        The path.

    Raises:
        ValueError: for a wrong shape, other labels, no example, a step size or number of steps out of range.

    Source:
        From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes,
        arXiv 2412.08424.

    Example:
        >>> features, labels = worst_case_dataset(1000)
        >>> logistic_gd(features, labels, gamma=1.0).iterations_to_separate
        16
        >>> logistic_gd(features, labels, gamma=100.0, normalized=False).iterations_to_separate
        308
    """
    signed = _signed(features, labels)
    if not gamma > 0 or not math.isfinite(gamma):
        raise ValueError(f"gamma must be a finite number above 0, got {gamma}")
    if max_steps < 0:
        raise ValueError(f"max_steps must be at least 0, got {max_steps}")
    theta = signed.new_zeros(signed.shape[1]) if theta0 is None else theta0.detach().double()
    if theta.shape != signed.shape[1:]:
        raise ValueError(f"theta0 must have shape ({signed.shape[1]},), got {tuple(theta.shape)}")
    path, betas, losses, norms, errors = [theta], [], [], [], []
    while True:
        margins = signed @ theta
        log_misses = logsigmoid(-margins)
        # the weighted mean of the examples is formed in logs: its weights and their sum may both underflow
        direction = log_misses.softmax(0) @ signed
        mean_miss = log_misses.exp().mean()
        losses.append(softplus(-margins).mean())
        norms.append((mean_miss * direction).norm())
        errors.append((margins <= 0).sum())
        separated = int(errors[-1]) == 0
        if len(path) > max_steps or (separated and stop_when_separated):
            break
        betas.append(1 / mean_miss)
        theta = theta + gamma * (direction if normalized else mean_miss * direction)
        path.append(theta)
    counts = torch.stack(errors)
    clean = (counts == 0).nonzero().flatten().tolist()
    return LogisticPath(
        torch.stack(path),
        torch.stack(betas) if betas else signed.new_zeros(0),
        torch.stack(losses),
        torch.stack(norms),
        counts,
        clean[0] if clean else None,
    )


def batch_perceptron(
    features: Float[Tensor, "examples features"],
    labels: Integer[Tensor, " examples"],
    *,
    normalized: bool = False,
    max_steps: int = 100_000,
) -> PerceptronPath:
    r"""The batch perceptron, from zero until it separates the data.

    ::

        batch        theta <- theta + (1/n) sum_{i: m_i < 0} y_i a_i        (an example with m_i = 0 weighs 1/2)
        normalized   theta <- theta + (1/|S|) sum_{i in S} y_i a_i,  S = {i: m_i <= 0}

    On separable data the first needs at most ``n R^2 / mu^2`` steps, the second ``R^2 / mu^2``.

    Args:
        features: (n, d).
        labels: (n,) -1 or +1.
        normalized: which of the two.
        max_steps: steps taken at most.

    Returns:
        The path.

    Raises:
        ValueError: for a wrong shape, other labels, no example, or a negative number of steps.

    Source:
        From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes,
        arXiv 2412.08424.

    Example:
        >>> features, labels = worst_case_dataset(1000)
        >>> batch_perceptron(features, labels).iterations_to_separate
        301
        >>> batch_perceptron(features, labels, normalized=True).iterations_to_separate
        2
    """
    signed = _signed(features, labels)
    if max_steps < 0:
        raise ValueError(f"max_steps must be at least 0, got {max_steps}")
    path = [signed.new_zeros(signed.shape[1])]
    while True:
        margins = signed @ path[-1]
        wrong = (margins <= 0).double()
        if not wrong.any() or len(path) > max_steps:
            break
        weight = wrong / wrong.sum() if normalized else torch.where(margins == 0, 0.5, wrong) / len(signed)
        path.append(path[-1] + weight @ signed)
    return PerceptronPath(torch.stack(path), None if wrong.any() else len(path) - 1)


def perceptron(
    features: Float[Tensor, "examples features"],
    labels: Integer[Tensor, " examples"],
    *,
    order: Literal["cyclic", "random"] = "cyclic",
    generator: torch.Generator | None = None,
    max_steps: int = 100_000,
) -> PerceptronPath:
    r"""Rosenblatt's perceptron: ``theta <- theta + y_j a_j`` for one misclassified j at a time.

    At most ``R^2 / mu^2`` steps on separable data.

    Args:
        features: (n, d).
        labels: (n,) -1 or +1.
        order: walk around the examples, or draw among the misclassified ones.
        generator: source of the draws.
        max_steps: steps (changes of theta) at most.

    Returns:
        The path.

    Raises:
        ValueError: for a wrong shape, other labels, no example, another order, or a negative number of steps.

    Source:
        The perceptron: a probabilistic model for information storage and organization in the brain, Psychological
        Review 65 (1958).

    Example:
        >>> features, labels = worst_case_dataset(10)
        >>> perceptron(features, labels).iterations_to_separate
        2
    """
    signed = _signed(features, labels)
    if order not in ("cyclic", "random"):
        raise ValueError(f"order must be 'cyclic' or 'random', got {order!r}")
    if max_steps < 0:
        raise ValueError(f"max_steps must be at least 0, got {max_steps}")
    path, place = [signed.new_zeros(signed.shape[1])], 0
    while True:
        wrong = (signed @ path[-1] <= 0).nonzero().flatten()
        if not len(wrong) or len(path) > max_steps:
            break
        if order == "random":
            chosen = wrong[torch.randint(len(wrong), (1,), generator=generator)][0]
        else:
            chosen = (
                wrong[(wrong >= place).nonzero().flatten()[:1]][0] if (wrong >= place).any() else wrong[0]
            )
            place = int(chosen) + 1
        path.append(path[-1] + signed[chosen])
    return PerceptronPath(torch.stack(path), None if len(wrong) else len(path) - 1)


def separation_bound(
    radius: float, margin: float, num_examples: int | None = None, gamma: float | None = None
) -> float:
    r"""How many steps are enough to separate the data.

    ::

        R^2 / mu^2                                      perceptron, normalized batch perceptron
        R^2 / mu^2 + 2 log(2 n - 1) / (gamma mu^2)      Normalized LR+GD, with num_examples and gamma

    Args:
        radius: R, the largest norm of an example.
        margin: mu, from :func:`maximum_margin`.
        num_examples: n.
        gamma: step size.

    Returns:
        The bound; a step more than its whole part is never needed.

    Raises:
        ValueError: for a number out of range, or one of ``num_examples`` and ``gamma`` without the other.

    Source:
        From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes,
        arXiv 2412.08424.

    Example:
        >>> round(separation_bound(radius=1.25**0.5, margin=0.5, num_examples=1000, gamma=1.0), 2)
        65.8
    """
    if not radius > 0 or not margin > 0:
        raise ValueError(f"radius and margin must be above 0, got {radius} and {margin}")
    if (num_examples is None) != (gamma is None):
        raise ValueError("num_examples and gamma belong together: give both or none")
    bound = radius**2 / margin**2
    if num_examples is None or gamma is None:
        return bound
    if num_examples < 1 or not gamma > 0:
        raise ValueError(f"num_examples must be at least 1 and gamma above 0, got {num_examples} and {gamma}")
    return bound + 2 * math.log(2 * num_examples - 1) / (gamma * margin**2)


def maximum_margin(
    features: Float[Tensor, "examples features"], labels: Integer[Tensor, " examples"]
) -> tuple[float, Tensor]:
    r"""The largest margin of any direction, ``mu = max_{|theta| = 1} min_i y_i a_i . theta``, and that direction.

    The least norm of theta with all margins at least 1 is a least-distance problem, which Lawson and Hanson reduce to
    non-negative least squares (solved by scipy, exactly up to rounding); mu is the inverse of that norm.

    Args:
        features: (n, d).
        labels: (n,) -1 or +1.

    Returns:
        mu and the unit vector (d,); 0 and zeros where no direction separates the data.

    Raises:
        ValueError: for a wrong shape, other labels or no example.

    Source:
        Solving Least Squares Problems, chapter 23 (Lawson and Hanson, 1974).

    Example:
        >>> margin, direction = maximum_margin(*worst_case_dataset(5))
        >>> round(margin, 12), direction.round(decimals=12).tolist()
        (0.5, [1.0, 0.0])
    """
    from scipy.optimize import nnls

    signed = _signed(features, labels).numpy()
    # examples of a common length: the residual that decides about separability is then relative
    scale = float(np.linalg.norm(signed, axis=1).max()) or 1.0
    system = np.vstack([signed.T / scale, np.ones(len(signed))])
    goal = np.zeros(len(system))
    goal[-1] = 1.0
    weights, distance = nnls(system, goal, maxiter=max(100, 30 * system.shape[1]))
    residual = system @ weights - goal
    if distance < 1e-9:
        return 0.0, torch.zeros(signed.shape[1], dtype=torch.float64)
    theta = -residual[:-1] / residual[-1]
    length = float(np.linalg.norm(theta))
    direction = theta / length
    return float((signed @ direction).min()), torch.tensor(direction)


def worst_case_dataset(num_examples: int) -> tuple[Tensor, Tensor]:
    """The data on which the batch perceptron needs steps in proportion to n: mu = 0.5, R^2 = 1.25.

    Args:
        num_examples: n, at least 2: one example (0.5, -1) of class +1, the others (-0.5, -1) of class -1.

    Returns:
        Features (n, 2) and labels (n,).

    Raises:
        ValueError: below two examples.

    Source:
        From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes,
        arXiv 2412.08424, theorem 5.1.

    Example:
        >>> worst_case_dataset(3)[1].tolist()
        [1, -1, -1]
    """
    if num_examples < 2:
        raise ValueError(f"num_examples must be at least 2, got {num_examples}")
    labels = torch.full((num_examples,), -1)
    labels[0] = 1
    return torch.stack([0.5 * labels.double(), -torch.ones(num_examples, dtype=torch.float64)], 1), labels


def _signed(features: Tensor, labels: Tensor) -> Tensor:
    """``y_i a_i`` as (n, d) in float64."""
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must have shape (n, d) with n above 0, got {tuple(features.shape)}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must have shape ({len(features)},), got {tuple(labels.shape)}")
    if not (labels.abs() == 1).all():
        raise ValueError("labels must be -1 or +1")
    return features.detach().double() * labels.double().unsqueeze(1)
