"""Losses on numbers: ``loss(prediction (N, ...), target (N, ...), mask=None)``; each row of N is an example."""

from telos.losses.regression.errors import (
    HuberLoss,
    L1Loss,
    LogCoshLoss,
    MSELoss,
    QuantileLoss,
    huber_loss,
    l1_loss,
    log_cosh_loss,
    mse_loss,
    quantile_loss,
)
from telos.losses.regression.robust_errors import (
    CauchyLoss,
    GemanMcClureLoss,
    PseudoHuberLoss,
    cauchy_loss,
    geman_mcclure_loss,
    pseudo_huber_loss,
)

__all__ = [
    "CauchyLoss",
    "GemanMcClureLoss",
    "HuberLoss",
    "L1Loss",
    "LogCoshLoss",
    "MSELoss",
    "PseudoHuberLoss",
    "QuantileLoss",
    "cauchy_loss",
    "geman_mcclure_loss",
    "huber_loss",
    "l1_loss",
    "log_cosh_loss",
    "mse_loss",
    "pseudo_huber_loss",
    "quantile_loss",
]
