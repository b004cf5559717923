"""Which examples: samplers, weights, bags, selections and synthetic worlds."""

from telos.data.adversaries import (
    AdversarialExamples,
    AdversarialRounds,
    AttackResult,
    Guard,
    RoundReport,
    TokenSubstitutionAdversary,
    first_occurrences,
    paraphrase_adversary,
    token_saliency,
)
from telos.data.bags import BagSampler, bag_means, make_bags, private_bag_means
from telos.data.selection import (
    CoverageRefill,
    Filtered,
    FilteredPolicy,
    conservative_threshold,
    filtered_policy,
    rejection_filter,
    threshold_at_fpr,
)

__all__ = [
    "AdversarialExamples",
    "AdversarialRounds",
    "AttackResult",
    "BagSampler",
    "CoverageRefill",
    "Filtered",
    "FilteredPolicy",
    "Guard",
    "RoundReport",
    "TokenSubstitutionAdversary",
    "bag_means",
    "conservative_threshold",
    "filtered_policy",
    "first_occurrences",
    "make_bags",
    "paraphrase_adversary",
    "private_bag_means",
    "rejection_filter",
    "threshold_at_fpr",
    "token_saliency",
]
