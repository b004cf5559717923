"""What to minimise: one folder per family, and a family is a call signature."""

from telos.losses import aggregate, classification, contrastive, metric, preference, regression, robust
from telos.losses._algebra import ClassificationLoss, Loss, Mixture
from telos.losses._logps import sequence_logps, token_logps
from telos.losses._reduction import at_target, classification_rows, reduce
from telos.losses._space import choice, integers, log_uniform, uniform
from telos.losses._task import TaskInfo, misfit
from telos.losses.aggregate import *  # noqa: F403
from telos.losses.classification import *  # noqa: F403
from telos.losses.contrastive import *  # noqa: F403
from telos.losses.linear import LinearLoss, linear_loss
from telos.losses.metric import *  # noqa: F403
from telos.losses.preference import *  # noqa: F403
from telos.losses.regression import *  # noqa: F403
from telos.losses.robust import *  # noqa: F403

__all__ = [
    "ClassificationLoss",
    "LinearLoss",
    "Loss",
    "Mixture",
    "TaskInfo",
    "at_target",
    "choice",
    "classification_rows",
    "integers",
    "linear_loss",
    "log_uniform",
    "misfit",
    "reduce",
    "sequence_logps",
    "token_logps",
    "uniform",
    *aggregate.__all__,
    *classification.__all__,
    *contrastive.__all__,
    *metric.__all__,
    *preference.__all__,
    *regression.__all__,
    *robust.__all__,
]
