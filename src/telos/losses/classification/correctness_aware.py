"""Correctness-aware loss: a calibrator's confidence towards 1 on right predictions and towards 0 on wrong ones."""

from functools import partial

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from telos.losses._algebra import Loss
from telos.losses._checks import check_shape
from telos.losses._distributed import gather_with_gradient
from telos.losses._reduction import Denominator, Reduction, check_reduction, classification_rows, reduce
from telos.losses._space import choice


def _values(logits: Tensor, target: Tensor, *, correct: Tensor | None) -> Tensor:
    predicted = logits.argmax(-1, keepdim=True)
    confidence = logits.softmax(-1).gather(-1, predicted).squeeze(-1)
    if target.is_floating_point():
        mass = target.sum(-1)  # 1, or the class weight that the target carries
        right = target.gather(-1, predicted).squeeze(-1) if correct is None else correct * mass
    else:
        mass = torch.ones_like(confidence)
        right = (predicted.squeeze(-1) == target if correct is None else correct).to(confidence.dtype)
    return right * (1 - confidence).square() + (mass - right) * confidence.square()


def _balance(correct: Tensor, weights: Tensor) -> Tensor:
    """Half of the total weight for the right rows, half for the wrong ones; 1 where one of the two is empty."""
    right = torch.where(correct, weights, 0.0).sum()
    wrong = torch.where(correct, 0.0, weights).sum()
    both = (right != 0) & (wrong != 0)
    own = torch.where(both, torch.where(correct, right, wrong), 1.0)
    return torch.where(both, (right + wrong) / (2 * own), 1.0)


def correctness_aware_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    balanced: bool = False,
    correct: Bool[Tensor, "*batch"] | None = None,
    gather_distributed: bool = False,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Squared error between the confidence in the predicted class and whether the prediction is right.

    ::

        conf_i = max_k softmax(logits_i)_k,     c_i = 1[argmax_k logits_ik = y_i]     (c_i is a constant)

        plain      mean_i (conf_i - c_i)^2
        balanced   1/2 mean over right rows + 1/2 mean over wrong rows
                   = sum_i v_i (conf_i - c_i)^2 / sum_i v_i,   v_i = 1 - r if c_i else r,   r = mean_i c_i

    It trains a *calibrator* of a frozen classifier, such as :class:`telos.nn.AdaptiveTemperature`, not the
    classifier: it says that a wrong prediction should be less sure, not what the right class is. On a narrow miss
    cross-entropy can raise the confidence in the wrong class; this loss always lowers it.

    The paper's equation is the plain mean (RECONSTRUCTED in its details), a proper score for being right. The
    authors' code is balanced, which aims at as many right as wrong predictions: where accuracy is high it pulls
    confidence far below accuracy. Where all rows are right, or all wrong, balanced is the plain mean (the authors'
    code gives NaN).

    Args:
        logits: (N, C) or (N, T, C) calibrated scores.
        target: (N,) or (N, T) labels in [0, C), or probabilities q of the shape of ``logits``: the loss is then
            ``sum_y q_y loss(y)``.
        balanced: let right and wrong predictions weigh the same in the batch.
        correct: which predictions count as right, one flag per example; by default those whose largest logit is
            the target's. Give it where the calibrator can change the prediction. The target then only tells which
            rows are ignored and what they weigh.
        gather_distributed: compute the loss of the batches of all ranks, on each of them, so that ``balanced``
            sees all of it.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example; balanced shares are shares of the weight.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``; ``"sum"`` and ``"none"``, in which balanced rows carry the factor that makes their
            mean the balanced one (with ``gather_distributed`` the values of all ranks, flattened).
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in [0, 1]: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a single class, a label out of range or an unknown reduction.
        TypeError: for a wrong dtype, or ``balanced`` with probabilities as target and no ``correct``.

    Source:
        Optimizing Calibration by Gaining Aware of Prediction Correctness, arXiv 2404.13016.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])  # confidence 0.88, two of three right
        >>> target = torch.tensor([0, 0, 1])
        >>> correctness_aware_loss(logits, target)
        tensor(0.2681)
        >>> correctness_aware_loss(logits, target, balanced=True)
        tensor(0.3950)
    """
    check_reduction(reduction, denominator)
    if correct is not None:
        if correct.dtype != torch.bool:
            raise TypeError(f"correct must have dtype torch.bool, got {correct.dtype}")
        check_shape("correct", correct, tuple(logits.shape[:-1]))
    flat = None if correct is None else correct.reshape(-1)
    values, weights = classification_rows(
        partial(_values, correct=flat),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    if not balanced:
        if gather_distributed:
            values, weights = gather_with_gradient(values.reshape(-1), weights.reshape(-1))
        return reduce(values, weights, reduction, denominator)
    if correct is None:
        if target.is_floating_point():
            raise TypeError(
                "target must hold labels where balanced=True and no correct is given, got probabilities"
            )
        correct = logits.detach().argmax(-1) == target
    if gather_distributed:
        values, weights, correct = gather_with_gradient(
            values.reshape(-1), weights.reshape(-1), correct.reshape(-1)
        )
    values = values * _balance(correct, weights)
    return reduce(values, weights, reduction, denominator)


class CorrectnessAwareLoss(Loss):
    """Correctness-aware loss; see :func:`correctness_aware_loss`.

    Example:
        >>> import torch
        >>> logits, target = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> CorrectnessAwareLoss(balanced=True)(logits, target)
        tensor(0.3950)
    """

    family = "classification"
    space = {"balanced": choice(False, True)}
    class_weight: Tensor | None

    def __init__(
        self,
        balanced: bool = False,
        gather_distributed: bool = False,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.balanced = balanced
        self.gather_distributed = gather_distributed
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        correct: Tensor | None = None,
        sample_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The loss of calibrated logits (N, C) and labels (N,)."""
        return correctness_aware_loss(
            logits,
            target,
            balanced=self.balanced,
            correct=correct,
            gather_distributed=self.gather_distributed,
            class_weight=self.class_weight,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            denominator=denominator,
        )
