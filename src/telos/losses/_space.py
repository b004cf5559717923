"""Ranges of hyper-parameters: inert data that a search reads.

A loss declares ``space = {"a": log_uniform(0.1, 10.0)}``. A range only knows how to map a number ``u`` in
[0, 1) to a value, so that any sampler (quasi-random, grid, adaptive) can drive it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Uniform:
    """Real numbers between ``low`` and ``high``, evenly spread."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"uniform needs low < high, got low={self.low}, high={self.high}")

    def at(self, u: float) -> float:
        """The value at position ``u`` in [0, 1)."""
        return self.low + u * (self.high - self.low)


@dataclass(frozen=True)
class LogUniform:
    """Positive real numbers between ``low`` and ``high``, evenly spread in the logarithm."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"log_uniform needs 0 < low < high, got low={self.low}, high={self.high}")

    def at(self, u: float) -> float:
        """The value at position ``u`` in [0, 1)."""
        value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        return min(self.high, max(self.low, value))  # rounding must not leave the range


@dataclass(frozen=True)
class Integers:
    """Whole numbers from ``low`` to ``high``, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"integers needs low <= high, got low={self.low}, high={self.high}")

    def at(self, u: float) -> int:
        """The value at position ``u`` in [0, 1)."""
        return min(self.high, self.low + int(u * (self.high - self.low + 1)))


@dataclass(frozen=True)
class Choice:
    """One of finitely many options."""

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError("choice needs at least one option, got none")

    def at(self, u: float) -> Any:
        """The option at position ``u`` in [0, 1)."""
        return self.options[min(len(self.options) - 1, int(u * len(self.options)))]


Range: TypeAlias = Uniform | LogUniform | Integers | Choice
Space: TypeAlias = Mapping[str, Range]


def uniform(low: float, high: float) -> Uniform:
    """Real numbers between ``low`` and ``high``, evenly spread.

    Example:
        >>> uniform(0.0, 2.0).at(0.25)
        0.5
    """
    return Uniform(low, high)


def log_uniform(low: float, high: float) -> LogUniform:
    """Positive real numbers between ``low`` and ``high``, evenly spread in the logarithm.

    Example:
        >>> round(log_uniform(0.1, 10.0).at(0.5), 6)
        1.0
    """
    return LogUniform(low, high)


def integers(low: int, high: int) -> Integers:
    """Whole numbers from ``low`` to ``high``, both included.

    Example:
        >>> [integers(1, 3).at(u) for u in (0.0, 0.5, 0.99)]
        [1, 2, 3]
    """
    return Integers(low, high)


def choice(*options: Any) -> Choice:
    """One of finitely many options.

    Example:
        >>> choice("linf", "l2").at(0.7)
        'l2'
    """
    return Choice(options)
