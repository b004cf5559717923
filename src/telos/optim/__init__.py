"""How to step: optimizers and transforms of gradients."""

from telos.optim.normalized_gd import NormalizedGD
from telos.optim.perpgrad import PerpGrad, orthogonalize_
from telos.optim.schedules import SmoothedEpsSchedule

__all__ = [
    "NormalizedGD",
    "PerpGrad",
    "SmoothedEpsSchedule",
    "orthogonalize_",
]
