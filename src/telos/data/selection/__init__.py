"""Which examples count, and how much."""

from telos.data.selection.rejection import (
    CoverageRefill,
    Filtered,
    FilteredPolicy,
    conservative_threshold,
    filtered_policy,
    rejection_filter,
    threshold_at_fpr,
)

__all__ = [
    "CoverageRefill",
    "Filtered",
    "FilteredPolicy",
    "conservative_threshold",
    "filtered_policy",
    "rejection_filter",
    "threshold_at_fpr",
]
