"""How to step: optimizers and transforms of gradients."""

from telos.optim.perpgrad import PerpGrad, orthogonalize_
from telos.optim.schedules import SmoothedEpsSchedule

__all__ = [
    "PerpGrad",
    "SmoothedEpsSchedule",
    "orthogonalize_",
]
