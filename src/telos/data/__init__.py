"""Which examples: samplers, weights, bags, selections and synthetic worlds."""

from telos.data.bags import BagSampler, bag_means, make_bags, private_bag_means

__all__ = ["BagSampler", "bag_means", "make_bags", "private_bag_means"]
