"""Normalized logistic loss: the gradient of the logistic loss with its length taken out."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._algebra import Loss
from telos.losses._checks import check_floating, check_integer
from telos.losses._distributed import gather_with_gradient
from telos.losses._links import logistic
from telos.losses._reduction import Denominator, Reduction, check_reduction, classification_rows, reduce


def _target_margins(logits: Tensor, target: Tensor) -> Tensor:
    """``o_y - log sum_{k != y} exp(o_k)``: the logit of being right, so that cross-entropy is its logistic loss."""
    column = target.unsqueeze(-1)
    others = logits.scatter(-1, column, -torch.inf).logsumexp(-1)
    return logits.gather(-1, column).squeeze(-1) - others


def _margin_rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    check_floating("logits", logits)
    check_integer("target", target)
    if logits.shape == target.shape:
        logits = logits.unsqueeze(-1)
    if logits.shape[-1:] == (1,):  # one score is that of class 1 against a class 0 of score 0
        logits = torch.cat([torch.zeros_like(logits), logits], -1)
    return classification_rows(
        _target_margins,
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )


def normalized_logistic_loss(
    logits: Float[Tensor, "*shape"],
    target: Integer[Tensor, "*batch"],
    *,
    gather_distributed: bool = False,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""The logistic loss, with a gradient that does not fade as examples are classified.

    With margins ``m_i`` (``o_y`` minus the log-sum-exp of the other logits, so that ``1 - p_y = sigmoid(-m)``)::

        value     mean_i log(1 + exp(-m_i))                               cross-entropy
        gradient  -sum_i omega_i dm_i,   omega = softmax_i(log sigmoid(-m_i))

    That is beta times the gradient of the value, with ``beta = 1 / mean_i sigmoid(-m_i)``, formed so that it is
    finite for any margin. A full-batch step of SGD with rate gamma is one of Normalized LR+GD: on separable data
    it makes every margin positive within ``R^2 / mu^2 + 2 log(2 N - 1) / (gamma mu^2)`` steps, whatever the
    number N of examples and however unbalanced the classes
    (:func:`telos.theory.logistic_gd` runs it, :func:`telos.theory.separation_bound` is the bound).

    The length of the gradient stays near that of an example even where nothing is left to learn: stop there, or let
    the rate decay. Normalising by a mini-batch, and more than two classes, are extensions of the paper.

    Args:
        logits: (N, C) scores of the classes; or (N,) or (N, 1) scores of class 1 against class 0. Further batch
            dimensions are flattened.
        target: (N,) labels.
        gather_distributed: normalise over the batches of all ranks, of which each then computes the loss.
        class_weight: (C,) weight of each class; it enters value and ``omega`` as a repeated example does.
        sample_weight: one weight per example, likewise.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``; ``"sum"``, with N times its gradient; or ``"none"``, whose mean has the gradient of
            the mean (with ``gather_distributed`` the values of all ranks, flattened).
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label out of range or an unknown reduction.
        TypeError: for a wrong dtype, or probabilities as target.

    Source:
        From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes,
        arXiv 2412.08424.

    Example:
        >>> import torch
        >>> scores = torch.tensor([4.0, 4.0, -4.0], requires_grad=True)
        >>> loss = normalized_logistic_loss(scores, torch.tensor([1, 1, 1]))
        >>> loss.backward()
        >>> loss, scores.grad  # almost all of the gradient is on the example that is wrong
        (tensor(1.3515, grad_fn=<DivBackward0>), tensor([-0.0177, -0.0177, -0.9647]))
    """
    check_reduction(reduction, denominator)
    margins, weights = _margin_rows(logits, target, class_weight, sample_weight, ignore_index)
    shape = margins.shape
    margins, weights = margins.reshape(-1), weights.reshape(-1)
    if gather_distributed:
        margins, weights = gather_with_gradient(margins, weights)
    values = logistic(margins).detach() + _slope(margins.detach(), weights) * (margins.detach() - margins)
    if not gather_distributed:
        values, weights = values.reshape(shape), weights.reshape(shape)
    return reduce(values, weights, reduction, denominator)


def _slope(margins: Tensor, weights: Tensor) -> Tensor:
    """``beta sigmoid(-m)`` of each row, of which the weighted mean is 1; a row of weight 0 has none."""
    counts = weights != 0
    log_misses = torch.nn.functional.logsigmoid(-margins)
    # shifted by the largest, so that margins of any size leave at least one miss
    top = torch.where(counts, log_misses, -torch.inf).max() if margins.numel() else margins.sum()
    misses = torch.where(counts, (log_misses - torch.where(counts.any(), top, 0.0)).exp(), 0.0)
    total = (weights * misses).sum()
    return misses * weights.sum() / torch.where(total == 0, 1.0, total)


class NormalizedLogisticLoss(Loss):
    """Normalized logistic loss; see :func:`normalized_logistic_loss`.

    Example:
        >>> import torch
        >>> NormalizedLogisticLoss()(torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
        tensor(0.1269)
    """

    family = "classification"
    class_weight: Tensor | None

    def __init__(
        self,
        gather_distributed: bool = False,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.gather_distributed = gather_distributed
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The loss of logits (N, C), (N, 1) or (N,) and labels (N,)."""
        return normalized_logistic_loss(
            logits,
            target,
            gather_distributed=self.gather_distributed,
            class_weight=self.class_weight,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            denominator=denominator,
        )
