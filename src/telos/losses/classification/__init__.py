"""Losses on scores and labels: ``loss(logits (N, C), target (N,) or (N, C))``; sequences are (N, T, V), (N, T)."""

from telos.losses.classification.comp_sum import (
    CompSumLoss,
    SmoothAdversarialCompSumLoss,
    comp_sum_attack,
    comp_sum_loss,
    rho_margin_comp_sum_loss,
    smooth_adversarial_comp_sum_loss,
)
from telos.losses.classification.cross_entropy import (
    CrossEntropyLoss,
    LabelSmoothingLoss,
    cross_entropy_loss,
    label_smoothing_loss,
)
from telos.losses.classification.focal import FocalLoss, focal_loss

__all__ = [
    "CompSumLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "LabelSmoothingLoss",
    "SmoothAdversarialCompSumLoss",
    "comp_sum_attack",
    "comp_sum_loss",
    "cross_entropy_loss",
    "focal_loss",
    "label_smoothing_loss",
    "rho_margin_comp_sum_loss",
    "smooth_adversarial_comp_sum_loss",
]
