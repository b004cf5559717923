"""Look at what was learnt: diagnostics in the style of torchmetrics, which this room needs."""

try:
    import torchmetrics  # noqa: F401
except ImportError as error:
    raise ImportError("telos.metrics needs torchmetrics: pip install 'telos[metrics]'") from error

from telos.metrics.calibration import (
    BrierScore,
    ClasswiseCalibrationError,
    ConfidenceAUROC,
    ExpectedCalibrationError,
    ReliabilityBins,
    ReliabilityDiagram,
    brier_score,
    classwise_calibration_error,
    confidence_auroc,
    expected_calibration_error,
    fit_beta,
    minimum_bayes_risk,
    ordinal_agreement,
    reliability_diagram,
    top1_brier,
    utility_to_probability,
)
from telos.metrics.ranking import WeightedTripletRecall, triplet_weights, weighted_triplet_recall
from telos.metrics.reliability import (
    AttackCost,
    CostToFailure,
    FailureInterval,
    FailureRate,
    PassAtK,
    SurvivalCurve,
    cost_to_failure,
    expected_pass_at_n,
    failure_rate_interval,
    kaplan_meier,
    pass_at_k,
    samples_for_bound,
)
from telos.metrics.robustness import VerifiedError, verified_error
from telos.metrics.stability import SoftmaxCollapse, nlm_alignment, softmax_collapse, zero_term_fraction

__all__ = [
    "AttackCost",
    "BrierScore",
    "ClasswiseCalibrationError",
    "ConfidenceAUROC",
    "CostToFailure",
    "ExpectedCalibrationError",
    "FailureInterval",
    "FailureRate",
    "PassAtK",
    "ReliabilityBins",
    "ReliabilityDiagram",
    "SoftmaxCollapse",
    "SurvivalCurve",
    "VerifiedError",
    "WeightedTripletRecall",
    "brier_score",
    "classwise_calibration_error",
    "confidence_auroc",
    "cost_to_failure",
    "expected_calibration_error",
    "expected_pass_at_n",
    "failure_rate_interval",
    "fit_beta",
    "kaplan_meier",
    "minimum_bayes_risk",
    "nlm_alignment",
    "ordinal_agreement",
    "pass_at_k",
    "reliability_diagram",
    "samples_for_bound",
    "softmax_collapse",
    "top1_brier",
    "triplet_weights",
    "utility_to_probability",
    "verified_error",
    "weighted_triplet_recall",
    "zero_term_fraction",
]
