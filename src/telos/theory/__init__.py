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
from telos.theory.perceptron import (
    LogisticPath,
    PerceptronPath,
    batch_perceptron,
    logistic_gd,
    maximum_margin,
    perceptron,
    separation_bound,
    worst_case_dataset,
)
from telos.theory.probe_complexity import SampleCurve, sample_curve, sample_sizes, samples_to_reach

__all__ = [
    "AggregateRisk",
    "LogisticPath",
    "OptimalBagSize",
    "PerceptronPath",
    "SampleCurve",
    "aggregate_ridgeless",
    "asymptotic_risk",
    "batch_perceptron",
    "best_conditional_risk",
    "h_consistency_bound",
    "h_consistency_gamma",
    "h_consistency_transform",
    "logistic_gd",
    "maximum_margin",
    "optimal_bag_size",
    "optimal_rho",
    "perceptron",
    "sample_curve",
    "sample_sizes",
    "samples_to_reach",
    "separation_bound",
    "worst_case_dataset",
]
