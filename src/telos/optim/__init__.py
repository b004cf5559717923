"""How to step: optimizers and transforms of gradients."""

from telos.optim.perpgrad import PerpGrad, orthogonalize_

__all__ = ["PerpGrad", "orthogonalize_"]
