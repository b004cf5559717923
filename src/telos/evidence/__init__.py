"""One file per paper: its claim as a small experiment whose decision rule is fixed before the run.

``telos verify SLUG`` runs one. A module here holds ``STUDY``, a :class:`Study`; its numbers on the recorded
seeds stand in ``results/SLUG.json``.
"""

from telos.evidence._protocol import (
    BUDGETS,
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    SEEDS,
    Effect,
    Finding,
    Study,
    finding,
    judge,
    t_bounds,
)

__all__ = [
    "BUDGETS",
    "INCONCLUSIVE",
    "NOT_REPRODUCED",
    "REPRODUCED",
    "SEEDS",
    "Effect",
    "Finding",
    "Study",
    "finding",
    "judge",
    "t_bounds",
]
