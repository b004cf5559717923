"""Losses on log-probabilities of answer pairs: ``loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected)``."""

from telos.losses.preference.dpo import DPOLoss, IPOLoss, dpo_loss, ipo_loss

__all__ = ["DPOLoss", "IPOLoss", "dpo_loss", "ipo_loss"]
