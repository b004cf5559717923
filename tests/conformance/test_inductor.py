"""Inductor compiles one loss of each family; ``TELOS_CONFORMANCE_FULL=1`` (``make conformance-full``) compiles all."""

import os
import shutil

import pytest
import torch

from tests.conformance.collect import all_declarations, build, draw
from tests.conformance.test_contracts import _positional, gradients, with_gradient
from tests.declaration import Declaration


def chosen() -> list[Declaration]:
    candidates = [d for d in all_declarations() if d.module is not None and not d.state and not d.no_compile]
    if os.environ.get("TELOS_CONFORMANCE_FULL") == "1":
        return candidates
    return list({build(d).family: d for d in reversed(candidates)}.values())


@pytest.mark.bare
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor's CPU code needs a C++ compiler")
@pytest.mark.parametrize("declaration", chosen(), ids=lambda d: d.name)
def test_inductor(declaration: Declaration) -> None:
    inputs = draw(declaration, 6, dtype=torch.float32)
    module = build(declaration, inputs)
    loss, slopes = gradients(declaration, module, inputs)
    torch.compiler.reset()
    leaves = with_gradient(inputs, declaration.differentiable)
    result = torch.compile(_positional(module, inputs), fullgraph=True)(leaves)
    torch.testing.assert_close(result.detach(), loss)
    result.backward()
    for name, slope in slopes.items():
        torch.testing.assert_close(leaves[name].grad, slope)
