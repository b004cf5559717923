"""Supervised contrastive loss: every example is pulled towards all others of its class."""

import math

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from telos.kernels.contrast import check_chunk_size, contrast_labels, label_counts, tile_rows
from telos.kernels.fused_linear import ChunkSize
from telos.losses._algebra import Loss
from telos.losses._checks import check_embeddings, check_range
from telos.losses._distributed import gather_with_gradient
from telos.losses._pairs import diagonal, normalized_rows, positive_pairs, scaled_products
from telos.losses._reduction import Denominator, Reduction, at_least_float32, check_reduction, divisor, reduce
from telos.losses._space import log_uniform


def supcon_loss(
    embeddings: Float[Tensor, "batch dim"],
    labels: Integer[Tensor, " batch"],
    *,
    temperature: float = 0.1,
    normalize: bool = True,
    gather_distributed: bool = False,
    chunk_size: ChunkSize | None = "auto",
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Supervised contrastive loss, with the mean over positives outside the logarithm (L_out).

    With cosines ``s``, ``P(i)`` the other examples of the label of i, and the sum over all examples but i::

        l_i = -mean_{p in P(i)} log( exp(s_ip / temperature) / sum_{k != i} exp(s_ik / temperature) )

    An anchor without a positive does not count: its value is 0 and the mean leaves it out (``denominator=N``
    is the mean over all anchors, as in the authors' code). Several views of an example are stacked with its
    label repeated; two views of examples that all differ in label give NT-Xent.

    Args:
        embeddings: (N, D).
        labels: (N,) of an integer dtype, any values.
        temperature: above 0. The authors multiply the loss by temperature / 0.07, which is left to the
            caller.
        normalize: whether to scale embeddings to unit length first; without, s are inner products.
        gather_distributed: whether other ranks' examples are pairs too. The loss is then that of the whole
            batch.
        chunk_size: how many rows of similarities are held at a time, so that memory grows with N and not N^2.
            ``"auto"`` is 1024, and all rows in compiled code. A number always tiles (compiled callers break
            their graph there), ``None`` never. The tiled loss is the same number but has no second
            derivative; transforms of ``torch.func`` hold all rows.
        reduction: ``"mean"`` over the anchors that have a positive, ``"sum"``, or ``"none"`` (one value per
            anchor).
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``. It is 0 where no anchor has a positive.

    Raises:
        ValueError: for a wrong shape, a temperature of 0 or below, an unknown reduction, or a chunk size below 1.
        TypeError: for a wrong dtype.
        RuntimeError: at a backward with ``create_graph=True`` through the tiled loss.

    Source:
        Supervised Contrastive Learning, arXiv 2004.11362.

    Example:
        >>> import torch
        >>> supcon_loss(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]))  # all alike: log(4 - 1)
        tensor(1.0986)
    """
    check_reduction(reduction, denominator)
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    check_embeddings(embeddings, labels)
    if gather_distributed:
        embeddings, labels = gather_with_gradient(embeddings, labels)
    embeddings = normalized_rows(embeddings) if normalize else at_least_float32(embeddings)
    tile = tile_rows(chunk_size, embeddings.shape[0], embeddings.shape[0])
    if tile is not None:
        counts = label_counts(labels)
        loss = contrast_labels(
            embeddings / temperature, embeddings, labels, counts, chunk_size=tile, summed=reduction != "none"
        )
        return loss / divisor((counts > 1).to(loss.dtype), denominator) if reduction == "mean" else loss
    logits = scaled_products(embeddings, embeddings, 1 / temperature)
    itself = diagonal(embeddings.shape[0], embeddings.device)
    # a lone example has no candidate but itself, and is kept finite by it
    itself = itself & (embeddings.shape[0] > 1)
    log_sum = logits.masked_fill(itself, -math.inf).logsumexp(-1)
    positives = positive_pairs(labels)
    count = positives.sum(-1)
    # inner products are subtracted before the mean, so that large ones cancel instead of adding their
    # rounding
    distances = torch.where(positives, log_sum.unsqueeze(-1) - logits, 0.0)
    values = distances.sum(-1) / count.clamp_min(1)
    return reduce(values, (count > 0).to(values.dtype), reduction, denominator)


class SupConLoss(Loss):
    """Supervised contrastive loss; see :func:`supcon_loss`.

    Example:
        >>> import torch
        >>> SupConLoss()(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]))
        tensor(1.0986)
    """

    family = "metric"
    space = {"temperature": log_uniform(0.03, 1.0)}

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        normalize: bool = True,
        gather_distributed: bool = False,
        chunk_size: ChunkSize | None = "auto",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        check_range("temperature", temperature, 0.0, math.inf, open_low=True)
        check_chunk_size(chunk_size)
        self.temperature, self.normalize = temperature, normalize
        self.gather_distributed = gather_distributed
        self.chunk_size: ChunkSize | None = chunk_size
        self.reduction: Reduction = reduction

    def forward(self, embeddings: Tensor, labels: Tensor, *, denominator: Denominator = None) -> Tensor:
        """The loss of embeddings (N, D) and labels (N,)."""
        return supcon_loss(
            embeddings,
            labels,
            temperature=self.temperature,
            normalize=self.normalize,
            gather_distributed=self.gather_distributed,
            chunk_size=self.chunk_size,
            reduction=self.reduction,
            denominator=denominator,
        )
