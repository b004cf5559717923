"""Predict before training: closed forms for risks, bounds and learning curves."""

from telos.theory.aggregate import (
    AggregateRisk,
    OptimalBagSize,
    aggregate_ridgeless,
    asymptotic_risk,
    optimal_bag_size,
    optimal_rho,
)
from telos.theory.h_consistency import (
    best_conditional_risk,
    h_consistency_bound,
    h_consistency_gamma,
    h_consistency_transform,
)

__all__ = [
    "AggregateRisk",
    "OptimalBagSize",
    "aggregate_ridgeless",
    "asymptotic_risk",
    "best_conditional_risk",
    "h_consistency_bound",
    "h_consistency_gamma",
    "h_consistency_transform",
    "optimal_bag_size",
    "optimal_rho",
]
