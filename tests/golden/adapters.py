"""Golden cases: reading them, finding the adapter of a slug, comparing what it returns.

A file ``<slug>.json`` holds cases with ``params``, ``inputs`` and ``expected``. The adapter is the function
``golden_<slug>(case)`` in the method's test file; it returns a value for every key of ``case.expected``.
"""

import importlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).parents[1]
Adapter = Callable[["Case"], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One recorded call. Lists of numbers among ``inputs`` are tensors of ``dtype``, at any depth."""

    slug: str
    name: str
    params: dict[str, Any]
    inputs: dict[str, Any]
    expected: dict[str, Any]
    dtype: torch.dtype = torch.float64

    def leaf(self, name: str) -> Tensor:
        """An input as a leaf that records its gradient."""
        return self.inputs[name].clone().requires_grad_()


def read_cases(path: Path) -> Iterator[Case]:
    """The cases of one file."""
    content = _content(path)
    for case in content["cases"]:
        dtype = torch.float32 if str(case.get("dtype", "float64")).startswith("float32") else torch.float64
        yield Case(
            content["slug"],
            case["name"],
            case.get("params", {}),
            {name: to_tensors(value, dtype) for name, value in case["inputs"].items()},
            case["expected"],
            dtype,
        )


def slug_of(path: Path) -> str:
    """The slug that a file says it is about, whatever the file is called."""
    return _content(path)["slug"]


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict) or not {"slug", "cases"} <= content.keys():
        raise ValueError(f"{path} must hold an object with 'slug' and 'cases'")
    return content


def golden_directory(given: str | None) -> Path:
    """Where the golden files are: the directory that was given, or the suite's own."""
    directory = Path(given) if given else Path(__file__).parent
    if not any(directory.glob("*.json")):
        raise FileNotFoundError(f"--golden-dir {directory} holds no golden file <slug>.json")
    return directory


def to_tensors(value: Any, dtype: torch.dtype) -> Any:
    """Rectangular lists of numbers become tensors (whole numbers int64); anything else is walked through."""
    if isinstance(value, dict):
        return {key: to_tensors(entry, dtype) for key, entry in value.items()}
    if not isinstance(value, list):
        return value
    try:
        tensor = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return [to_tensors(entry, dtype) for entry in value]
    if tensor.is_floating_point():
        return torch.tensor(value, dtype=dtype)
    return tensor


@cache
def find_adapter(slug: str) -> Adapter | None:
    """The function ``golden_<slug>`` of whichever test file defines it."""
    pattern = re.compile(rf"^def golden_{re.escape(slug)}\(", re.MULTILINE)
    for path in sorted(TESTS.rglob("test_*.py")):
        if pattern.search(path.read_text()):
            module = ".".join(path.relative_to(TESTS.parent).with_suffix("").parts)
            return getattr(importlib.import_module(module), f"golden_{slug}")
    return None


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a loss (of its sum, if it is not a scalar) with respect to leaves."""
    return torch.autograd.grad(loss.sum(), leaves)


def differences(actual: Any, expected: Any, rtol: float, atol: float, where: str = "") -> list[str]:
    """Where ``actual`` departs from ``expected``, one sentence each; every expected key must be answered."""
    if isinstance(expected, dict):
        if not isinstance(actual, dict):
            return [f"{where}: expected a mapping, got {type(actual).__name__}"]
        missing = [f"{where}.{key}: not returned by the adapter" for key in expected if key not in actual]
        return missing + [
            line
            for key, value in expected.items()
            if key in actual
            for line in differences(actual[key], value, rtol, atol, f"{where}.{key}")
        ]
    if isinstance(expected, str | bool) or expected is None:
        return [] if actual == expected else [f"{where}: expected {expected!r}, got {actual!r}"]
    try:
        target = torch.as_tensor(expected, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        if len(actual) != len(expected):
            return [f"{where}: expected {len(expected)} entries, got {len(actual)}"]
        return [
            line
            for position, (have, want) in enumerate(zip(actual, expected, strict=True))
            for line in differences(have, want, rtol, atol, f"{where}[{position}]")
        ]
    value = _as_float64(actual)
    if value.shape != target.shape:
        return [f"{where}: expected shape {tuple(target.shape)}, got {tuple(value.shape)}"]
    close = torch.isclose(value, target, rtol=rtol, atol=atol, equal_nan=True)
    if close.all():
        return []
    worst = (value - target).abs()[~close].max().item()
    return [f"{where}: {int((~close).sum())} of {close.numel()} entries differ, by up to {worst:.3g}"]


def _as_float64(actual: Any) -> Tensor:
    if isinstance(actual, list | tuple):
        rows = [_as_float64(entry) for entry in actual]
        return torch.stack(rows) if rows else torch.empty(0, dtype=torch.float64)
    if isinstance(actual, Tensor):
        return actual.detach().to(torch.float64)
    # without a dtype a Python float would become float32
    return torch.as_tensor(actual, dtype=torch.float64)
