"""telos: training objectives for PyTorch, each with its evidence.

Rooms load on first use, so ``import telos`` costs next to nothing::

    import telos
    loss = telos.losses.ZLoss(a=1.0, b=0.0)
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_ROOMS = (
    "data",
    "evidence",
    "fit",
    "integrations",
    "kernels",
    "lab",
    "losses",
    "metrics",
    "nn",
    "optim",
    "surgery",
    "theory",
    "trials",
)
__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return import_module(f"telos.{name}")
    raise AttributeError(f"module 'telos' has no attribute {name!r}; its rooms are {', '.join(_ROOMS)}")


def __dir__() -> list[str]:
    return sorted(__all__)
