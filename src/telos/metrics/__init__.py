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
from telos.metrics.reliability import PassAtK, expected_pass_at_n, pass_at_k
from telos.metrics.robustness import VerifiedError, verified_error
from telos.metrics.stability import SoftmaxCollapse, nlm_alignment, softmax_collapse, zero_term_fraction

__all__ = [
    "BrierScore",
    "ClasswiseCalibrationError",
    "ConfidenceAUROC",
    "ExpectedCalibrationError",
    "PassAtK",
    "ReliabilityBins",
    "ReliabilityDiagram",
    "SoftmaxCollapse",
    "VerifiedError",
    "WeightedTripletRecall",
    "brier_score",
    "classwise_calibration_error",
    "confidence_auroc",
    "expected_calibration_error",
    "expected_pass_at_n",
    "fit_beta",
    "minimum_bayes_risk",
    "nlm_alignment",
    "ordinal_agreement",
    "pass_at_k",
    "reliability_diagram",
    "softmax_collapse",
    "top1_brier",
    "triplet_weights",
    "utility_to_probability",
    "verified_error",
    "weighted_triplet_recall",
    "zero_term_fraction",
]
