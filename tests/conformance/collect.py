"""All declarations of the test suite, found by convention: a list ``declarations`` in a test file under tests/losses."""

import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from telos.losses._algebra import call_keywords
from tests.declaration import Declaration, Inputs

TESTS = Path(__file__).parents[1]


@cache
def all_declarations() -> tuple[Declaration, ...]:
    """Every declaration, in the order of files."""
    found: list[Declaration] = []
    for path in sorted((TESTS / "losses").rglob("test_*.py")):
        if "\ndeclarations = [" in path.read_text():
            module = importlib.import_module(".".join(path.relative_to(TESTS.parent).with_suffix("").parts))
            found.extend(module.declarations)
    return tuple(found)


def draw(declaration: Declaration, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    """The declaration's sample of n examples."""
    return declaration.sample(n, torch.Generator().manual_seed(seed), dtype)


def build(declaration: Declaration, inputs: Inputs | None = None) -> nn.Module:
    """The declared module; parameters that the function takes as inputs (class proxies) are set to them."""
    assert declaration.module is not None
    torch.manual_seed(0)
    module = declaration.module()
    for name, parameter in module.named_parameters():
        if inputs is not None and name in inputs:
            # assigned, not copied into, so that the parameter takes the sample's dtype
            parameter.data = inputs[name].detach().clone()
    return module


def call(target, inputs: Inputs) -> Tensor:
    """The loss of a function or module on the keywords that it takes; of a stateful function the first result."""
    if isinstance(target, nn.Module):
        accepted = call_keywords(target)
        inputs = {name: value for name, value in inputs.items() if accepted is None or name in accepted}
    result = target(**inputs)
    return result[0] if isinstance(result, tuple) else result


def callables(declaration: Declaration, inputs: Inputs) -> Iterator[tuple[str, object]]:
    """The function and the module, whichever there are."""
    if declaration.function is not None:
        yield "function", declaration.function
    if declaration.module is not None:
        yield "module", build(declaration, inputs)


def floating(inputs: Inputs) -> dict[str, Tensor]:
    """The floating-point tensors among the inputs."""
    return {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}


def batched(declaration: Declaration, inputs: Inputs, n: int) -> list[str]:
    """Names of the inputs whose first dimension is the batch: state and parameters are not among them."""
    outside = set(declaration.state) | _parameter_names(declaration)
    return [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == n and name not in outside
    ]


def _parameter_names(declaration: Declaration) -> set[str]:
    if declaration.module is None:
        return set()
    return {name for name, _ in build(declaration).named_parameters()}
