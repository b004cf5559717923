"""Losses that pick or bound their own worst case, and the attacks that they share."""

from telos.losses.robust.attacks import pgd_attack

__all__ = ["pgd_attack"]
