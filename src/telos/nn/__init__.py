"""Modules that a method needs beside its loss: norms, heads, layers, small models."""

from telos.nn.prototypes import HypersphericalHead

__all__ = ["HypersphericalHead"]
