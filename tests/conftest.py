"""One test run checks every annotation as it goes; tests marked ``bare`` need the plain functions.

``pytest`` runs everything but the bare tests, with the check; ``TELOS_TYPECHECK=0 pytest -m bare`` runs those.
``make test`` runs both.
"""

import os

import jaxtyping
import pytest

import tests.typecheck  # noqa: F401  (the import hook looks it up as an attribute)

TYPECHECK = os.environ.get("TELOS_TYPECHECK", "1") != "0"
CHECKED_ROOMS = ["data", "kernels", "losses", "metrics", "nn", "optim", "surgery", "theory"]

if TYPECHECK:
    jaxtyping.install_import_hook([f"telos.{room}" for room in CHECKED_ROOMS], "tests.typecheck.checker")

import torch  # noqa: E402  (after the hook, so that nothing imports telos before it)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir", default=None, help="directory of golden files <slug>.json (default: tests/golden)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not TYPECHECK:
        return
    bare = [item for item in items if item.get_closest_marker("bare")]
    if bare:
        config.hook.pytest_deselected(items=bare)
        items[:] = [item for item in items if not item.get_closest_marker("bare")]


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
