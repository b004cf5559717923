"""Losses on scores and labels: ``loss(logits (N, C), target (N,) or (N, C))``; sequences are (N, T, V), (N, T)."""

from telos.losses.classification.comp_sum import (
    CompSumLoss,
    SmoothAdversarialCompSumLoss,
    comp_sum_attack,
    comp_sum_loss,
    rho_margin_comp_sum_loss,
    smooth_adversarial_comp_sum_loss,
)
from telos.losses.classification.correctness_aware import CorrectnessAwareLoss, correctness_aware_loss
from telos.losses.classification.cross_entropy import (
    CrossEntropyLoss,
    LabelSmoothingLoss,
    cross_entropy_loss,
    label_smoothing_loss,
)
from telos.losses.classification.dco import (
    DCOLoss,
    SequenceDCOLoss,
    coverage_from_logps,
    dco_factor,
    dco_loss,
    dco_weighted_nll_loss,
    group_dco_loss,
    sequence_dco_loss,
)
from telos.losses.classification.density_normalized import (
    DensityNormalizedCrossEntropyLoss,
    density_normalized_cross_entropy_loss,
)
from telos.losses.classification.ens_loss import EnsLoss, calibrated_derivatives, ens_loss
from telos.losses.classification.focal import FocalLoss, focal_loss
from telos.losses.classification.ldr import (
    ALDRKLLoss,
    CrammerSingerLoss,
    LDRKLLoss,
    WestonWatkinsLoss,
    aldr_kl_loss,
    crammer_singer_loss,
    ldr_kl_loss,
    weston_watkins_loss,
)
from telos.losses.classification.noise_robust import (
    GCELoss,
    MAELoss,
    SCELoss,
    gce_loss,
    mae_loss,
    sce_loss,
)
from telos.losses.classification.normalized_logistic import NormalizedLogisticLoss, normalized_logistic_loss
from telos.losses.classification.stablemax import (
    StableMaxCrossEntropyLoss,
    log_stablemax,
    stablemax_cross_entropy_loss,
)
from telos.losses.classification.trades import (
    AdversarialCrossEntropyLoss,
    TRADESLoss,
    adversarial_cross_entropy_loss,
    trades_attack,
    trades_loss,
)
from telos.losses.classification.utility_learning import UtilityLearningLoss, utility_learning_loss
from telos.losses.classification.z_loss import (
    SphericalMSELoss,
    SphericalSoftmaxLoss,
    TaylorSoftmaxLoss,
    ZLoss,
    spherical_mse_loss,
    spherical_softmax_loss,
    taylor_softmax_loss,
    z_loss,
)

__all__ = [
    "ALDRKLLoss",
    "AdversarialCrossEntropyLoss",
    "CompSumLoss",
    "CorrectnessAwareLoss",
    "CrammerSingerLoss",
    "CrossEntropyLoss",
    "DCOLoss",
    "DensityNormalizedCrossEntropyLoss",
    "EnsLoss",
    "FocalLoss",
    "GCELoss",
    "LDRKLLoss",
    "LabelSmoothingLoss",
    "MAELoss",
    "NormalizedLogisticLoss",
    "SCELoss",
    "SequenceDCOLoss",
    "SmoothAdversarialCompSumLoss",
    "SphericalMSELoss",
    "SphericalSoftmaxLoss",
    "StableMaxCrossEntropyLoss",
    "TRADESLoss",
    "TaylorSoftmaxLoss",
    "UtilityLearningLoss",
    "WestonWatkinsLoss",
    "ZLoss",
    "adversarial_cross_entropy_loss",
    "aldr_kl_loss",
    "calibrated_derivatives",
    "comp_sum_attack",
    "comp_sum_loss",
    "correctness_aware_loss",
    "coverage_from_logps",
    "crammer_singer_loss",
    "cross_entropy_loss",
    "dco_factor",
    "dco_loss",
    "dco_weighted_nll_loss",
    "density_normalized_cross_entropy_loss",
    "ens_loss",
    "focal_loss",
    "gce_loss",
    "group_dco_loss",
    "label_smoothing_loss",
    "ldr_kl_loss",
    "log_stablemax",
    "mae_loss",
    "normalized_logistic_loss",
    "rho_margin_comp_sum_loss",
    "sce_loss",
    "sequence_dco_loss",
    "smooth_adversarial_comp_sum_loss",
    "spherical_mse_loss",
    "spherical_softmax_loss",
    "stablemax_cross_entropy_loss",
    "taylor_softmax_loss",
    "trades_attack",
    "trades_loss",
    "utility_learning_loss",
    "weston_watkins_loss",
    "z_loss",
]
