"""Which examples: samplers, weights, bags, selections and synthetic worlds."""

from telos.data.bags import BagSampler, bag_means, make_bags, private_bag_means
from telos.data.selection import CoverageRefill

__all__ = [
    "BagSampler",
    "CoverageRefill",
    "bag_means",
    "make_bags",
    "private_bag_means",
]
