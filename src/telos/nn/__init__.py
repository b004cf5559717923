"""Modules that a method needs beside its loss: norms, heads, layers, small models."""

from telos.nn.calibrators import (
    AdaptiveTemperature,
    TemperatureScaling,
    default_views,
    fit_calibrator,
    transform_consistency_features,
    view_logits,
)
from telos.nn.prototypes import HypersphericalHead
from telos.nn.spherical import SphericalLinear

__all__ = [
    "AdaptiveTemperature",
    "HypersphericalHead",
    "SphericalLinear",
    "TemperatureScaling",
    "default_views",
    "fit_calibrator",
    "transform_consistency_features",
    "view_logits",
]
