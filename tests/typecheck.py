"""The run-time type check of the ordinary test run: jaxtyping shapes, enforced by beartype."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

# the numeric tower: an int is a float, as PEP 484 has it
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the annotations of ``function`` at every call."""
    try:
        return _checked(function)
    except BeartypeDecorHintPep673Exception:
        # beartype knows `Self` only in decorated classes, and the import hook decorates methods one by one
        return function
