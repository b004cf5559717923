"""What the parsers of tasks, recipes and commands share: an error, near names, imports by name."""

import difflib
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """The user asked for what does not exist or cannot be; one sentence says what and what is nearest."""


def nearest(word: str, names: Iterable[str]) -> str:
    """The names closest to a word, for the end of an error message."""
    names = sorted(names)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"nearest: {', '.join(close)}" if close else f"there are: {', '.join(names)}"


def import_symbol(spec: str, role: str) -> Any:
    """The object at ``package.module:Name``, also from the folder where the user stands."""
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"{role} {spec}: cannot import {module_name} ({type(error).__name__}: {error})"
        ) from error
    if not name or not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise UsageError(f"{role} {spec}: {module_name} has no {name!r}; {nearest(name, public)}")
    return getattr(module, name)
