"""Losses that pick or bound their own worst case, ``loss(model, inputs, target)``, and their attacks."""

from telos.losses.robust.attacks import AdversarialLoss, pgd_attack
from telos.losses.robust.continuous_adversarial import (
    CAdvIPOLoss,
    CAdvULLoss,
    embedding_attack,
    log_one_minus_p_loss,
    relative_eps,
    toward_away_loss,
)
from telos.losses.robust.ibp import (
    FastIBPLoss,
    certified_cross_entropy_loss,
    relu_balance_regularizer,
    tightness_regularizer,
)
from telos.losses.robust.interval import IntervalTensor, margin_lower_bounds

__all__ = [
    "AdversarialLoss",
    "CAdvIPOLoss",
    "CAdvULLoss",
    "FastIBPLoss",
    "IntervalTensor",
    "certified_cross_entropy_loss",
    "embedding_attack",
    "log_one_minus_p_loss",
    "margin_lower_bounds",
    "pgd_attack",
    "relative_eps",
    "relu_balance_regularizer",
    "tightness_regularizer",
    "toward_away_loss",
]
