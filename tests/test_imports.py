"""Imports point one way: cli -> {lab, evidence} -> trials -> ... -> losses -> kernels -> torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "telos"
LAYERS = (
    ("kernels",),
    ("losses",),
    ("fit",),
    ("metrics", "optim", "nn"),
    ("data",),
    ("surgery",),
    ("online", "theory"),
    ("trials",),
    ("lab", "evidence"),
    ("cli",),
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
RANK["integrations"] = RANK["trials"]  # beside trials: it may import anything below, and nothing imports it
EVERYWHERE = {"_catalogue"}  # reads a JSON file with the standard library alone
CORE = {"torch", "numpy", "jaxtyping"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path, source: str | None = None) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function, as an absolute name."""
    package = ["telos", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(source or path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            # `from telos import losses` imports the room
            yield from (
                (".".join([*base, a.name]) for a in node.names) if base == ["telos"] else (".".join(base),)
            )


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("telos.")} & {
        *RANK,
        *EVERYWHERE,
    }
    if room in EVERYWHERE or room == "__init__":
        assert not rooms, f"{room} must stand alone"
        return
    wrong = sorted(other for other in rooms - EVERYWHERE - {room} if RANK[other] >= RANK[room])
    assert not wrong, f"{room} may not import {', '.join(wrong)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_losses_and_kernels_need_no_more_than_the_core(path: Path) -> None:
    if room_of(path) not in ("losses", "kernels"):
        return
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"telos"}
    assert outside <= CORE | {"triton"}


def test_every_room_has_its_layer() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {
        path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"
    }
    assert rooms <= {*RANK, *EVERYWHERE}


def test_imports_of_functions_rooms_and_parents_are_seen() -> None:
    source = (
        "def f():\n    from telos.trials import tasks\n    from telos import nn\n    from .. import _space\n"
    )
    seen = imported(PACKAGE / "losses" / "classification" / "imaginary.py", source)
    assert set(seen) == {"telos.trials", "telos.nn", "telos.losses"}


def test_importing_telos_costs_nothing() -> None:
    """`import telos` loads no room and no torch, so it cannot cost more than `import torch`."""
    code = (
        "import sys, telos; print([m for m in sys.modules if m.split('.')[0] in ('telos', 'torch', 'numpy')])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "['telos']"


def test_every_room_loads_by_attribute() -> None:
    import telos

    for room in telos._ROOMS:
        assert getattr(telos, room).__name__ == f"telos.{room}"
    with pytest.raises(AttributeError, match="rooms are"):
        _ = telos.imaginary
