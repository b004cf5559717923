"""How to compute it fast: plain tensors and callables in, tensors out."""

from telos.kernels.contrast import contrast_both_ways, contrast_labels, contrast_rows, label_counts
from telos.kernels.fused_linear import auto_chunk_size, fused_linear_rows, softmax_nll_
from telos.kernels.spherical import (
    SphericalState,
    SphericalStatistics,
    SphericalStep,
    spherical_backward,
    spherical_forward,
    spherical_grad_norm,
    spherical_refactor,
    spherical_stabilize,
    spherical_state,
    spherical_statistics_loss,
    spherical_step,
    spherical_update,
    spherical_weight,
)
from telos.kernels.triplets import TripletCounts, triplet_counts

__all__ = [
    "SphericalState",
    "SphericalStatistics",
    "SphericalStep",
    "TripletCounts",
    "auto_chunk_size",
    "contrast_both_ways",
    "contrast_labels",
    "contrast_rows",
    "fused_linear_rows",
    "label_counts",
    "softmax_nll_",
    "spherical_backward",
    "spherical_forward",
    "spherical_grad_norm",
    "spherical_refactor",
    "spherical_stabilize",
    "spherical_state",
    "spherical_statistics_loss",
    "spherical_step",
    "spherical_update",
    "spherical_weight",
    "triplet_counts",
]
