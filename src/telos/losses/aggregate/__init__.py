"""Losses on bags: ``loss(prediction (N, [C]), bag_response (B, [C]), bag_index (N,))``; each row is a bag."""

from telos.losses.aggregate.interpolation import (
    AggregateInterpolationLoss,
    BagLoss,
    InstanceLoss,
    aggregate_interpolation_loss,
    bag_loss,
    instance_loss,
)

__all__ = [
    "AggregateInterpolationLoss",
    "BagLoss",
    "InstanceLoss",
    "aggregate_interpolation_loss",
    "bag_loss",
    "instance_loss",
]
