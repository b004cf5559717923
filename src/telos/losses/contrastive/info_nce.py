"""InfoNCE and NT-Xent: pick the other view of an example among those of all examples."""

import math

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.functional import cross_entropy

from telos.kernels.contrast import check_chunk_size, contrast_both_ways, contrast_rows, tile_rows
from telos.kernels.fused_linear import ChunkSize
from telos.losses._algebra import Loss
from telos.losses._checks import check_range, check_two_views
from telos.losses._distributed import gather_with_gradient
from telos.losses._pairs import diagonal, normalized_rows, scaled_products
from telos.losses._reduction import Reduction, at_least_float32, check_reduction, reduce
from telos.losses._space import log_uniform


def _views(z1: Tensor, z2: Tensor, normalize: bool, gather_distributed: bool) -> tuple[Tensor, Tensor]:
    """Two views, checked, gathered and normalised."""
    check_two_views(z1, z2, minimum_examples=0)
    if gather_distributed:
        z1, z2 = gather_with_gradient(z1, z2)
    if z1.shape[0] < 2:
        raise ValueError(
            f"z1 must have at least 2 examples, since others are the negatives, got {z1.shape[0]}"
        )
    return (
        (normalized_rows(z1), normalized_rows(z2))
        if normalize
        else (at_least_float32(z1), at_least_float32(z2))
    )


def info_nce_loss(
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
    index: Integer[Tensor, " batch"] | None = None,
    *,
    temperature: float = 0.1,
    symmetric: bool = False,
    normalize: bool = True,
    gather_distributed: bool = False,
    chunk_size: ChunkSize | None = "auto",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""InfoNCE, where the negatives of an example are the second views of the others.

    With cosines ``s_ik`` of the first view of i and the second view of k::

        l_i = -log( exp(s_ii / temperature) / sum_k exp(s_ik / temperature) )

    A small temperature looks at the hardest negatives only, a large one at all alike.

    Args:
        z1: (N, D) embeddings of the first views.
        z2: (N, D) embeddings of the second views of the same examples.
        index: accepted for the family's call and not used.
        temperature: above 0.
        symmetric: whether to average with the loss of the exchanged views.
        normalize: whether to scale embeddings to unit length first; without, s are inner products.
        gather_distributed: whether other ranks' examples are negatives too. The loss is then that of the
            whole batch.
        chunk_size: how many rows of similarities are held at a time, so that memory grows with N and not N^2.
            ``"auto"`` is 1024, and all rows in compiled code. A number always tiles (compiled callers break
            their graph there), ``None`` never. The tiled loss is the same number but has no second
            derivative; transforms of ``torch.func`` hold all rows.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per example).

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError: for fewer than 2 examples, a wrong shape, a temperature of 0 or below, an unknown
            reduction, or a chunk size below 1.
        TypeError: for a wrong dtype.
        RuntimeError: at a backward with ``create_graph=True`` through the tiled loss.

    Source:
        Representation Learning with Contrastive Predictive Coding, arXiv 1807.03748; for the role of the
        temperature Understanding the Behaviour of Contrastive Loss, arXiv 2012.09740.

    Example:
        >>> import torch
        >>> z = torch.eye(4)
        >>> info_nce_loss(z, z, temperature=1.0)  # log(1 + 3 / e)
        tensor(0.7437)
    """
    check_reduction(reduction)
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    z1, z2 = _views(z1, z2, normalize, gather_distributed)
    count = z1.shape[0]
    tile = tile_rows(chunk_size, count, count)
    if tile is not None and not symmetric:
        itself = torch.arange(count, device=z1.device)
        loss = contrast_rows(z1 / temperature, z2, itself, chunk_size=tile, summed=reduction != "none")
        return loss / count if reduction == "mean" else loss
    if tile is not None:
        values = contrast_both_ways(z1 / temperature, z2, chunk_size=tile) / 2
    else:
        logits = scaled_products(z1, z2, 1 / temperature)
        values = logits.logsumexp(-1) - logits.diagonal()
        if symmetric:
            values = (values + logits.logsumexp(0) - logits.diagonal()) / 2
    return reduce(values, torch.ones_like(values), reduction)


class InfoNCELoss(Loss):
    """InfoNCE; see :func:`info_nce_loss`.

    Example:
        >>> import torch
        >>> InfoNCELoss(temperature=1.0)(torch.eye(4), torch.eye(4))
        tensor(0.7437)
    """

    family = "contrastive"
    space = {"temperature": log_uniform(0.03, 1.0)}

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        symmetric: bool = False,
        normalize: bool = True,
        gather_distributed: bool = False,
        chunk_size: ChunkSize | None = "auto",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        check_range("temperature", temperature, 0.0, math.inf, open_low=True)
        check_chunk_size(chunk_size)
        self.temperature, self.symmetric, self.normalize = temperature, symmetric, normalize
        self.gather_distributed = gather_distributed
        self.chunk_size: ChunkSize | None = chunk_size
        self.reduction: Reduction = reduction

    def forward(self, z1: Tensor, z2: Tensor, index: Tensor | None = None) -> Tensor:
        """The loss of two views (N, D); ``index`` is not used."""
        return info_nce_loss(
            z1,
            z2,
            temperature=self.temperature,
            symmetric=self.symmetric,
            normalize=self.normalize,
            gather_distributed=self.gather_distributed,
            chunk_size=self.chunk_size,
            reduction=self.reduction,
        )


def ntxent_loss(
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
    index: Integer[Tensor, " batch"] | None = None,
    *,
    temperature: float = 0.1,
    normalize: bool = True,
    gather_distributed: bool = False,
    chunk_size: ChunkSize | None = "auto",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""NT-Xent, the loss of SimCLR: every one of the 2N views picks its partner among the 2N - 1 others.

    With cosines ``s`` of the views ``z = [z1; z2]`` and ``p(i)`` the other view of the same example::

        l_i = -log( exp(s_ip(i) / temperature) / sum_{k != i} exp(s_ik / temperature) ),   i = 1 .. 2N

    The mean is over views, half of what the authors' code returns (it sums the two directions).

    Args:
        z1: (N, D) embeddings of the first views.
        z2: (N, D) embeddings of the second views of the same examples.
        index: accepted for the family's call and not used.
        temperature: above 0.
        normalize: whether to scale embeddings to unit length first; without, s are inner products.
        gather_distributed: whether other ranks' examples are negatives too. The loss is then that of the
            whole batch.
        chunk_size: how many rows of similarities are held at a time, so that memory grows with N and not N^2.
            ``"auto"`` is 1024, and all rows in compiled code. A number always tiles (compiled callers break
            their graph there), ``None`` never. The tiled loss is the same number but has no second
            derivative; transforms of ``torch.func`` hold all rows.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; the values are one per example, the mean of its two
            views.

    Returns:
        The loss: a scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError: for fewer than 2 examples, a wrong shape, a temperature of 0 or below, an unknown
            reduction, or a chunk size below 1.
        TypeError: for a wrong dtype.
        RuntimeError: at a backward with ``create_graph=True`` through the tiled loss.

    Source:
        A Simple Framework for Contrastive Learning of Visual Representations, arXiv 2002.05709; Big
        Self-Supervised Models are Strong Semi-Supervised Learners, arXiv 2006.10029.

    Example:
        >>> import torch
        >>> z = torch.ones(4, 2)
        >>> ntxent_loss(z, z)  # all views alike: log(2 * 4 - 1)
        tensor(1.9459)
    """
    check_reduction(reduction)
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    z1, z2 = _views(z1, z2, normalize, gather_distributed)
    count = z1.shape[0]
    views = torch.cat([z1, z2])
    itself = torch.arange(2 * count, device=z1.device)
    partner = itself.roll(count)
    tile = tile_rows(chunk_size, 2 * count, 2 * count)
    if tile is not None:
        loss = contrast_rows(
            views / temperature, views, partner, itself, chunk_size=tile, summed=reduction != "none"
        )
        if reduction == "none":
            return loss.view(2, count).mean(0)
        return loss / (2 * count if reduction == "mean" else 2)
    logits = scaled_products(views, views, 1 / temperature)
    logits = logits.masked_fill(diagonal(2 * count, z1.device), -math.inf)
    values = cross_entropy(logits, partner, reduction="none").view(2, count).mean(0)
    return reduce(values, torch.ones_like(values), reduction)


class NTXentLoss(Loss):
    """NT-Xent; see :func:`ntxent_loss`.

    Example:
        >>> import torch
        >>> NTXentLoss()(torch.ones(4, 2), torch.ones(4, 2))
        tensor(1.9459)
    """

    family = "contrastive"
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

    def forward(self, z1: Tensor, z2: Tensor, index: Tensor | None = None) -> Tensor:
        """The loss of two views (N, D); ``index`` is not used."""
        return ntxent_loss(
            z1,
            z2,
            temperature=self.temperature,
            normalize=self.normalize,
            gather_distributed=self.gather_distributed,
            chunk_size=self.chunk_size,
            reduction=self.reduction,
        )
