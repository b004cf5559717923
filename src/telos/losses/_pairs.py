"""What losses on pairs share: cosine scores, exact under autocast, and masks that say which pairs count."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import normalize

from telos.losses._reduction import at_least_float32


def normalized_rows(embeddings: Tensor) -> Tensor:
    """Rows of unit length, in float32 or better; a zero row has no direction and keeps gradient 0."""
    embeddings = at_least_float32(embeddings)
    has_direction = (embeddings != 0).any(-1, keepdim=True)
    # the slope of a clamped norm would be 1e12 there
    return normalize(torch.where(has_direction, embeddings, embeddings.detach()), dim=-1, eps=1e-12)


def scaled_products(queries: Tensor, keys: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """``scale * queries @ keys.T`` in float32 or better, also under autocast."""
    queries, keys = at_least_float32(queries), at_least_float32(keys)
    with _without_autocast(queries.device):
        return scale * (queries @ keys.mT.to(queries.dtype))


def cosine_logits(embeddings: Tensor, weight: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Cosine of every embedding with every row of ``weight``, times ``scale``.

    Both are normalised (eps 1e-12) and multiplied in float32 or better, also under autocast.

    Args:
        embeddings: (..., N, D).
        weight: (..., C, D) class weights, prototypes or keys.
        scale: factor s, the inverse of a temperature.

    Returns:
        (..., N, C) logits in [-s, s].
    """
    return scaled_products(normalized_rows(embeddings), normalized_rows(weight), scale)


def diagonal(size: int, device: torch.device) -> Tensor:
    """(N, N) mask of each example with itself."""
    return torch.eye(size, dtype=torch.bool, device=device)


def same_label(labels: Tensor) -> Tensor:
    """(N, N) mask of the pairs of equal labels, each example with itself included."""
    return labels.unsqueeze(-1) == labels.unsqueeze(-2)


def positive_pairs(labels: Tensor) -> Tensor:
    """(N, N) mask of the pairs of two different examples with equal labels."""
    return same_label(labels) & ~diagonal(labels.shape[-1], labels.device)


def negative_pairs(labels: Tensor) -> Tensor:
    """(N, N) mask of the pairs of unequal labels."""
    return ~same_label(labels)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    # a device without autocast (meta) refuses even to switch it off
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
