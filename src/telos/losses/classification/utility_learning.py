"""Utility learning: cross-entropy's gradient, read as preferring the chosen class to what the model would choose."""

from functools import partial

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._algebra import ClassificationLoss
from telos.losses._checks import check_floating, check_shape
from telos.losses._reduction import Denominator, Reduction, at_target, classification_rows, reduce


def _values(
    logits: Tensor,
    target: Tensor,
    *,
    sampled: bool,
    noise: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    # utilities count from the largest, whose level cancels: nothing is lost to a common offset
    utilities = logits - logits.detach().amax(-1, keepdim=True)
    policy = utilities.detach().softmax(-1)
    if sampled:
        rival = utilities.gather(-1, _draw(policy, noise, generator)).squeeze(-1)
    else:
        # a class of probability 0 may have utility -inf
        rival = torch.where(policy == 0, 0.0, policy * utilities).sum(-1)
    return at_target(rival.unsqueeze(-1) - utilities, target)


def _draw(policy: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """One class of each row (M, 1), by inverting the distribution function at a uniform number."""
    if noise is None:
        device = policy.device if generator is None else generator.device
        noise = torch.rand(policy.shape[0], generator=generator, dtype=policy.dtype, device=device)
    cumulated = policy.cumsum(-1)
    # 1 - noise lies in (0, 1], so that the first class to reach it has a probability above 0
    reached = (1 - noise.to(policy)).unsqueeze(-1) * cumulated[..., -1:]
    return (cumulated < reached).sum(-1, keepdim=True)


def utility_learning_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    sampled: bool = False,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "*batch"] | None = None,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Raise the utility of the class that was chosen against those that the model would choose itself.

    With the logits read as utilities u and ``p = softmax(u)`` held constant::

        loss     = sum_j p_j (u_j - u_y) = E_p[u] - u_y
        gradient = p - onehot(y)                                        that of cross-entropy
        sampled  = u_J - u_y,   J drawn from p                          the same gradient on average

    So every step of maximum likelihood is one of utility learning. The value is a regret under the present policy
    p, not a log-likelihood: it has no lower bound from one step to the next and may be negative. Log cross-entropy,
    and stop early by it. The backward is by design not the derivative of the value, in which p depends on u.

    What is learned is an order: ``u_a > u_b`` where the data choose a more often than b. For probabilities to decide
    with, see :func:`telos.metrics.utility_to_probability`.

    The identity is exact; that the paper writes the step this way is RECONSTRUCTED.

    Args:
        logits: (N, C) or (N, T, C) utilities u; -inf excludes a class that is not the target.
        target: (N,) or (N, T) labels in [0, C), or probabilities q of the shape of ``logits``: the loss is then
            ``sum_y q_y (E_p[u] - u_y)``.
        sampled: one rival of each example, drawn from p, in place of the mean over all.
        generator: source of the draws. Without one it is torch's default generator of the device of ``logits``.
        noise: one number in [0, 1) per example in place of a draw, to repeat a sampled loss.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in units of the logits: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label out of range, an unknown reduction, or noise without ``sampled``.
        TypeError: for a wrong dtype.

    Source:
        Utility-Probability Duality of Neural Networks, arXiv 2305.14859.

    Example:
        >>> import torch
        >>> utilities = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> loss = utility_learning_loss(utilities, torch.tensor([1]))
        >>> loss.backward()
        >>> loss, utilities.grad  # p - onehot(y)
        (tensor(0.7311, grad_fn=<DivBackward0>), tensor([[ 0.7311, -0.7311]]))
    """
    if noise is not None:
        if not sampled:
            raise ValueError("noise is for sampled=True, got it with sampled=False")
        check_floating("noise", noise)
        check_shape("noise", noise, tuple(logits.shape[:-1]))
        noise = noise.reshape(-1)
    values, weights = classification_rows(
        partial(_values, sampled=sampled, noise=noise, generator=generator),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class UtilityLearningLoss(ClassificationLoss):
    """Utility learning; see :func:`utility_learning_loss`.

    Example:
        >>> import torch
        >>> UtilityLearningLoss()(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
        tensor(0.7311)
    """

    def __init__(
        self,
        sampled: bool = False,
        generator: torch.Generator | None = None,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        self.sampled, self.generator = sampled, generator

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``E_p[u] - u_y`` of each row, or ``u_J - u_y`` with a drawn rival."""
        return _values(logits, target, sampled=self.sampled, noise=None, generator=self.generator)
