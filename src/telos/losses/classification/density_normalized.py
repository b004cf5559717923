"""Density-normalised cross-entropy: a weight of annotated edges that does not sink with the number of the others."""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._algebra import Loss
from telos.losses._checks import check_floating, check_integer, check_range
from telos.losses._distributed import gather_with_gradient
from telos.losses._reduction import Denominator, Reduction, check_reduction, classification_rows, reduce
from telos.losses._space import log_uniform

DensityMode: TypeAlias = Literal["dnorm", "dnorm-fgbg", "baseline"]
EmptyForeground: TypeAlias = Literal["sum", "mean"]


def _nll(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def _shares(
    weights: Tensor, foreground: Tensor, mode: DensityMode, alpha: float, beta: float, empty: EmptyForeground
) -> Tensor:
    """What each row's loss is multiplied with, such that the mean over rows is the loss (without gamma)."""
    if mode == "baseline":
        return torch.where(foreground != 0, alpha, beta * torch.ones_like(weights))
    total, positive = weights.sum(), (weights * foreground).sum()
    negative = total - positive
    divisor = positive if mode == "dnorm" else negative
    background = beta * total / torch.where(divisor == 0, 1.0, divisor)
    if mode == "dnorm":
        # without a foreground edge the authors' code sums over the background, and beta has no part in it
        alone = total if empty == "sum" else torch.ones_like(total)
        background = torch.where(positive == 0, alone, background)
    return torch.where(foreground != 0, alpha * total / torch.where(positive == 0, 1.0, positive), background)


def _check(mode: str, alpha: float, beta: float, gamma: float, empty_foreground: str) -> None:
    if mode not in ("dnorm", "dnorm-fgbg", "baseline"):
        raise ValueError(f"mode must be 'dnorm', 'dnorm-fgbg' or 'baseline', got {mode!r}")
    if empty_foreground not in ("sum", "mean"):
        raise ValueError(f"empty_foreground must be 'sum' or 'mean', got {empty_foreground!r}")
    for name, weight in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        check_range(name, weight, 0.0, float("inf"))


def density_normalized_cross_entropy_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"],
    *,
    mode: DensityMode = "dnorm",
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    background_class: int = 0,
    empty_foreground: EmptyForeground = "sum",
    gather_distributed: bool = False,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Cross-entropy over edges, divided by the number of annotated ones instead of the number of all.

    With the cross-entropy l of each of M edges, of which M_FG have a label other than the background class::

        "dnorm"        gamma ( alpha / M_FG sum_FG l + beta / M_FG sum_BG l )
        "dnorm-fgbg"   gamma ( alpha / M_FG sum_FG l + beta / M_BG sum_BG l )
        "baseline"     gamma ( alpha / M    sum_FG l + beta / M    sum_BG l )     cross-entropy at unit weights

    For scene graphs, relation extraction, link typing, detection: wherever the negatives of a batch outnumber its
    positives by a factor that differs from batch to batch. The mean over all edges gives an annotated one the
    weight 1 / M, and M grows with the square of the number of nodes; here it is 1 / M_FG whatever the number of
    background edges. With unit weights ``"dnorm"`` is cross-entropy times M / M_FG, and has no hyper-parameter. The
    loss is that much larger, tens or hundreds of times: clip gradients, or use an optimizer that does not mind.

    Args:
        logits: (M, R) scores of the edges of a whole mini-batch; further batch dimensions are flattened.
        target: (M,) labels. Probabilities are refused: they leave open what is foreground.
        mode: see above.
        alpha: weight of annotated edges, at least 0. The authors' code allows none but 1 in ``"baseline"``.
        beta: weight of background edges, at least 0; likewise.
        gamma: weight of the whole, at least 0 (the paper's lambda acts alike).
        background_class: the label that means "not annotated".
        empty_foreground: what ``"dnorm"`` is in a batch without an annotated edge: the ``"sum"`` over its background
            edges, as in the authors' code, or their ``"mean"``, which is tamer and to be preferred where that happens.
            The paper's formula divides by 0 there. Neither is weighed by beta.
        gather_distributed: count over the batches of all ranks, of which each then computes the loss.
        class_weight: (R,) weight of each class; it enters loss and counts as a repeated edge does.
        sample_weight: one weight per edge, likewise.
        ignore_index: label of edges that do not count.
        reduction: ``"mean"`` is the loss above; ``"sum"`` M times that; ``"none"`` the terms whose mean it is (with
            ``gather_distributed`` those of all ranks, flattened).
        denominator: what takes the place of M where the terms are averaged; see :func:`telos.losses.reduce`. The
            density remains that of the batch.

    Returns:
        The loss in nats: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label, weight or background class out of range, or an unknown option.
        TypeError: for a wrong dtype, or probabilities as target.

    Source:
        Graph Density-Aware Losses for Novel Compositions in Scene Graph Generation, arXiv 2005.08230.

    Example:
        >>> import torch
        >>> target = torch.tensor([0, 0, 0, 2])  # one edge of four is annotated
        >>> density_normalized_cross_entropy_loss(torch.zeros(4, 3), target)  # 4 log 3
        tensor(4.3944)
    """
    _check(mode, alpha, beta, gamma, empty_foreground)
    check_reduction(reduction, denominator)
    check_floating("logits", logits)
    check_integer("target", target)
    values, weights = classification_rows(
        _nll,
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    check_range("background_class", background_class, 0, logits.shape[-1] - 1)
    foreground = (target != background_class).to(weights.dtype)
    if gather_distributed:
        values, weights, foreground = gather_with_gradient(
            values.reshape(-1), weights.reshape(-1), foreground.reshape(-1)
        )
    shares = _shares(weights, foreground, mode, alpha, beta, empty_foreground)
    return reduce(gamma * shares * values, weights, reduction, denominator)


class DensityNormalizedCrossEntropyLoss(Loss):
    """Density-normalised cross-entropy; see :func:`density_normalized_cross_entropy_loss`.

    Example:
        >>> import torch
        >>> DensityNormalizedCrossEntropyLoss()(torch.zeros(4, 3), torch.tensor([0, 0, 0, 2]))
        tensor(4.3944)
    """

    family = "classification"
    space = {"beta": log_uniform(0.1, 10.0)}
    """Not searched: ``alpha`` and ``gamma``, which beside beta only scale the loss, and ``background_class``, a label."""
    class_weight: Tensor | None

    def __init__(
        self,
        mode: DensityMode = "dnorm",
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        background_class: int = 0,
        empty_foreground: EmptyForeground = "sum",
        gather_distributed: bool = False,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check(mode, alpha, beta, gamma, empty_foreground)
        check_reduction(reduction)
        self.mode: DensityMode = mode
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.background_class = background_class
        self.empty_foreground: EmptyForeground = empty_foreground
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
        """The loss of logits (M, R) and labels (M,)."""
        return density_normalized_cross_entropy_loss(
            logits,
            target,
            mode=self.mode,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            background_class=self.background_class,
            empty_foreground=self.empty_foreground,
            gather_distributed=self.gather_distributed,
            class_weight=self.class_weight,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            denominator=denominator,
        )
