"""Which examples count, and how much."""

from telos.data.selection.rejection import CoverageRefill

__all__ = ["CoverageRefill"]
