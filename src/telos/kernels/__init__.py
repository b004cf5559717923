"""How to compute it fast: plain tensors and callables in, tensors out."""

from telos.kernels.fused_linear import auto_chunk_size, fused_linear_rows, softmax_nll_
from telos.kernels.spherical import (
    SphericalState,
    SphericalStatistics,
    SphericalStep,
    spherical_forward,
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
    "fused_linear_rows",
    "softmax_nll_",
    "spherical_forward",
    "spherical_refactor",
    "spherical_stabilize",
    "spherical_state",
    "spherical_statistics_loss",
    "spherical_step",
    "spherical_update",
    "spherical_weight",
    "triplet_counts",
]
