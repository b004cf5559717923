"""Modules that a method needs beside its loss: norms, heads, layers, small models."""

from telos.nn.calibrators import (
    AdaptiveTemperature,
    TemperatureScaling,
    default_views,
    fit_calibrator,
    transform_consistency_features,
    view_logits,
)
from telos.nn.init import ibp_init_
from telos.nn.models.cnn7 import cnn7
from telos.nn.models.tiny_lm import TinyLM
from telos.nn.naive_bayes import (
    ClassStatistics,
    LogisticFit,
    NaiveBayesHead,
    class_statistics,
    fit_logistic,
    logistic_probe,
    merge_statistics,
)
from telos.nn.prototypes import HypersphericalHead
from telos.nn.spherical import SphericalLinear

__all__ = [
    "AdaptiveTemperature",
    "ClassStatistics",
    "HypersphericalHead",
    "LogisticFit",
    "NaiveBayesHead",
    "SphericalLinear",
    "TemperatureScaling",
    "TinyLM",
    "class_statistics",
    "cnn7",
    "default_views",
    "fit_calibrator",
    "fit_logistic",
    "ibp_init_",
    "logistic_probe",
    "merge_statistics",
    "transform_consistency_features",
    "view_logits",
]
