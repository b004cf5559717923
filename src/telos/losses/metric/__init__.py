"""Losses on embeddings and labels: ``loss(embeddings (N, D), labels (N,))``."""

from telos.losses.metric.normalized_softmax import NormalizedSoftmaxLoss, normalized_softmax_loss
from telos.losses.metric.supcon import SupConLoss, supcon_loss
from telos.losses.metric.triplet import TripletMarginLoss, triplet_margin_loss

__all__ = [
    "NormalizedSoftmaxLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "normalized_softmax_loss",
    "supcon_loss",
    "triplet_margin_loss",
]
