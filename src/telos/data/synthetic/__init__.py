"""Generated worlds that experiments and tests share, one file per kind."""

from telos.data.synthetic.algorithmic import ModularSums, modular_sums
from telos.data.synthetic.gaussian_classes import (
    gaussian_classes_error,
    make_gaussian_classes,
    two_level_covariance,
)
from telos.data.synthetic.label_noise import pairwise_label_noise, uniform_label_noise
from telos.data.synthetic.scenes import SceneGraph, SceneGraphWorld

__all__ = [
    "ModularSums",
    "SceneGraph",
    "SceneGraphWorld",
    "gaussian_classes_error",
    "make_gaussian_classes",
    "modular_sums",
    "pairwise_label_noise",
    "two_level_covariance",
    "uniform_label_noise",
]
