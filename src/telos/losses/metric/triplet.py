"""Triplet margin loss over all triplets of a batch, at the cost of sorting its distances."""

import sys

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from telos.kernels.triplets import Mining, triplet_counts
from telos.losses._algebra import Loss
from telos.losses._checks import check_embeddings, check_range, values_can_be_read
from telos.losses._distributed import gather_with_gradient
from telos.losses._pairs import normalized_rows, scaled_products
from telos.losses._reduction import Denominator, Reduction, at_least_float32, check_reduction, reduce
from telos.losses._space import log_uniform


def triplet_margin_loss(
    embeddings: Float[Tensor, "batch dim"],
    labels: Integer[Tensor, " batch"],
    *,
    margin: float = 0.05,
    mining: Mining = "all",
    normalize: bool = True,
    gather_distributed: bool = False,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Triplet margin loss: the mean over every active triplet of the batch, exactly and without listing them.

    With Euclidean distances d (not squared) of the embeddings at unit length, and the triplets (a, p, n) of an
    anchor, another example of its label and an example of another label::

        loss = mean_{(a, p, n) in A} (d_ap - d_an + margin)

        mining        A, the active triplets
        "all"         d_an < d_ap + margin                        (every triplet whose loss is above 0)
        "semi_hard"   d_an < d_ap + margin  and  d_an > d_ap
        "hard"        d_an < d_ap + margin  and  d_an <= d_ap

    Semi-hard and hard part all active triplets in two; with margin 0 none is semi-hard, and a negative exactly
    as far as the positive is not active. Triplets are counted, not listed: the loss is linear in the distances,
    with the number of active triplets of each pair as coefficient (:func:`telos.kernels.triplet_counts`), which
    takes O(N^2 log N) time and O(N^2) memory. Where a triplet becomes active the mean jumps, for the number it
    divides by changes; the gradient is that of the value everywhere else.

    Args:
        embeddings: (N, D).
        labels: (N,) of an integer dtype, any values.
        margin: finite, 0 or above, in units of distance; unit embeddings are at most 2 apart.
        mining: which triplets count.
        normalize: whether to scale embeddings to unit length first.
        gather_distributed: whether other ranks' examples form triplets too. The loss is then that of the whole
            batch.
        reduction: ``"mean"`` over the active triplets, ``"sum"`` over them, or ``"none"``: one value per anchor,
            the sum over its active triplets. Of a gathered batch those are the anchors of all ranks.
        denominator: what the mean divides by, instead of the number of active triplets; see
            :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``. It is 0, with a graph, where no triplet is active.
        Distances are computed in float64 (where the device has it) and the result is in float32 for inputs of
        float32 or less.

    Raises:
        ValueError: for a wrong shape, a margin that is negative or infinite, or an unknown mining or reduction.
        TypeError: for a wrong dtype.

    Source:
        FaceNet: A Unified Embedding for Face Recognition and Clustering, arXiv 1503.03832 (semi-hard
        negatives); In Defense of the Triplet Loss for Person Re-Identification, arXiv 1703.07737 (all triplets
        of a batch, the mean over those above 0, distances not squared). The counting is ours.

    Example:
        >>> import torch
        >>> angle = torch.tensor([0.0, torch.pi / 3, torch.pi])  # on the unit circle: distances 1, 2 and 3 ** 0.5
        >>> z = torch.stack([angle.cos(), angle.sin()], dim=1)
        >>> triplet_margin_loss(z, torch.tensor([0, 0, 1]), margin=1.5)  # mean of 0.5 and 2.5 - 3 ** 0.5
        tensor(0.6340)
    """
    check_reduction(reduction, denominator)
    _check_options(margin, mining)
    check_embeddings(embeddings, labels)
    if gather_distributed:
        embeddings, labels = gather_with_gradient(embeddings, labels)
    dtype = at_least_float32(embeddings).dtype
    distances = _distances(embeddings, normalize)
    largest = int(labels.unique(return_counts=True)[1].max()) if _worth_reading(labels) else None
    coefficients, active = triplet_counts(distances, labels, margin, mining, largest_class=largest)
    values = ((coefficients * distances).sum(-1) + margin * active) / active.clamp_min(1)
    # a NaN distance makes no triplet active, and must not hide behind their number of 0
    active = torch.where(values.isnan(), values.detach(), active)
    return reduce(values, active, reduction, denominator).to(dtype)


class TripletMarginLoss(Loss):
    """Triplet margin loss over all triplets of a batch; see :func:`triplet_margin_loss`.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> TripletMarginLoss(margin=0.5)(z, torch.tensor([0, 0, 1]))  # 2 ** 0.5 - 0 + 0.5, and 0.5
        tensor(1.2071)
    """

    family = "metric"
    space = {"margin": log_uniform(0.01, 1.0)}

    def __init__(
        self,
        margin: float = 0.05,
        mining: Mining = "all",
        *,
        normalize: bool = True,
        gather_distributed: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        _check_options(margin, mining)
        self.margin, self.normalize = margin, normalize
        self.mining: Mining = mining
        self.gather_distributed = gather_distributed
        self.reduction: Reduction = reduction

    def forward(self, embeddings: Tensor, labels: Tensor, *, denominator: Denominator = None) -> Tensor:
        """The loss of embeddings (N, D) and labels (N,)."""
        return triplet_margin_loss(
            embeddings,
            labels,
            margin=self.margin,
            mining=self.mining,
            normalize=self.normalize,
            gather_distributed=self.gather_distributed,
            reduction=self.reduction,
            denominator=denominator,
        )


def _check_options(margin: float, mining: str) -> None:
    check_range("margin", margin, 0.0, sys.float_info.max)
    if mining not in ("all", "semi_hard", "hard"):
        raise ValueError(f"mining must be 'all', 'semi_hard' or 'hard', got {mining!r}")


def _worth_reading(labels: Tensor) -> bool:
    return labels.numel() > 0 and values_can_be_read(labels)


def _distances(embeddings: Tensor, normalize: bool) -> Tensor:
    """(N, N) Euclidean distances, 0 with gradient 0 where rows agree to rounding.

    A difference of inner products has an absolute error of eps, hence the distance one of eps / d: in float64
    this stays below float32's own rounding down to d of 1e-8, at the price of a plain matrix product.
    """
    wide = at_least_float32(embeddings) if embeddings.device.type == "mps" else embeddings.double()
    rows = normalized_rows(wide) if normalize else wide
    length, one = rows.square().sum(-1, keepdim=True), rows.new_ones(rows.shape[0], 1)
    # |x|^2 - 2 x y + |y|^2 as one product, for each further pass over N^2 numbers costs as much
    squared = scaled_products(torch.cat([-2 * rows, length, one], -1), torch.cat([rows, one, length], -1))
    # rows of other lengths than x are far from it, so that the rounding to allow for is that of |x|^2
    same = squared <= 64 * torch.finfo(rows.dtype).eps * length.detach()
    # asked this way round, so that a NaN is not "the same" and propagates
    return torch.where(same, 1.0, squared).sqrt().masked_fill(same, 0.0)
