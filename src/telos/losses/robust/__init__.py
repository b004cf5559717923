"""Losses that pick or bound their own worst case, ``loss(model, inputs, target)``, and their attacks."""

from telos.losses.robust.attacks import AdversarialLoss, pgd_attack
from telos.losses.robust.ibp import (
    FastIBPLoss,
    certified_cross_entropy_loss,
    relu_balance_regularizer,
    tightness_regularizer,
)
from telos.losses.robust.interval import IntervalTensor, margin_lower_bounds

__all__ = [
    "AdversarialLoss",
    "FastIBPLoss",
    "IntervalTensor",
    "certified_cross_entropy_loss",
    "margin_lower_bounds",
    "pgd_attack",
    "relu_balance_regularizer",
    "tightness_regularizer",
]
