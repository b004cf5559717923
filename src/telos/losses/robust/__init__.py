"""Losses that pick or bound their own worst case, ``loss(model, inputs, target)``, and their attacks."""

from telos.losses.robust.attacks import AdversarialLoss, pgd_attack

__all__ = ["AdversarialLoss", "pgd_attack"]
