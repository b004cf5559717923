"""Losses on two views of the same examples: ``loss(z1 (N, D), z2 (N, D), index=None)``."""

from telos.losses.contrastive.info_nce import InfoNCELoss, NTXentLoss, info_nce_loss, ntxent_loss
from telos.losses.contrastive.sogclr import (
    ISogCLRLoss,
    ISogCLRState,
    SogCLRLoss,
    SogCLRState,
    isogclr_loss,
    kl_radius_temperature,
    sogclr_loss,
)

__all__ = [
    "ISogCLRLoss",
    "ISogCLRState",
    "InfoNCELoss",
    "NTXentLoss",
    "SogCLRLoss",
    "SogCLRState",
    "info_nce_loss",
    "isogclr_loss",
    "kl_radius_temperature",
    "ntxent_loss",
    "sogclr_loss",
]
