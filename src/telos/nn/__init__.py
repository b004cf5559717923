"""Modules that a method needs beside its loss: norms, heads, layers, small models."""

from telos.nn.prototypes import HypersphericalHead
from telos.nn.spherical import SphericalLinear

__all__ = [
    "HypersphericalHead",
    "SphericalLinear",
]
