"""Every docstring example runs, and every public name of a room of methods has one."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import telos

PACKAGE = Path(telos.__file__).parent
# the command's own machinery (trials, lab) is shown by the command line instead
ROOMS = [room for room in (*telos._ROOMS, "fit") if room not in ("trials", "lab")]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def docstrings(path: Path) -> Iterator[tuple[str, str, int]]:
    """Name, text and line of every docstring of a file.

    They are read from the source: what the run-time type check wraps no longer looks like the module's own.
    """
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", path.stem), text, node.body[0].lineno


EXAMPLES = [
    pytest.param(path, text, line, id=f"{path.relative_to(PACKAGE).as_posix()}::{name}")
    for path in sorted(PACKAGE.rglob("*.py"))
    for name, text, line in docstrings(path)
    if ">>> " in text
]


@pytest.mark.parametrize(("path", "text", "line"), EXAMPLES)
def test_example(path: Path, text: str, line: int) -> None:
    module = importlib.import_module(module_name(path))
    example = doctest.DocTestParser().get_doctest(text, dict(vars(module)), path.name, str(path), line)
    torch.manual_seed(0)
    output = io.StringIO()
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, _ = doctest.DocTestRunner(optionflags=flags).run(example, out=output.write)
    assert not failed, output.getvalue()


def public_names() -> Iterator[tuple[str, str]]:
    for room in ROOMS:
        if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").exists():
            module = importlib.import_module(f"telos.{room}")
            for name in getattr(module, "__all__", ()):
                value = getattr(module, name)
                # a record (dataclass, named tuple) is shown by the function that returns it
                record = dataclasses.is_dataclass(value) or (
                    inspect.isclass(value) and issubclass(value, tuple)
                )
                if (inspect.isclass(value) or inspect.isroutine(value)) and not record:
                    yield room, name


@pytest.mark.parametrize(("room", "name"), list(public_names()))
def test_public_name_has_an_example(room: str, name: str) -> None:
    doc = inspect.getdoc(getattr(importlib.import_module(f"telos.{room}"), name)) or ""
    assert ">>> " in doc, f"telos.{room}.{name} has no Example in its docstring"
