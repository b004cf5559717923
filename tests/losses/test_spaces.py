"""Every numeric hyper-parameter of a public loss has a range, or a sentence that says why it has none.

The sentence is the string below ``space``. It names in double backticks exactly the parameters without a range::

    space = {"lam": uniform(-1.0, 1.0)}
    \"\"\"Not searched: ``clip`` and ``shift``, which only keep the numbers finite.\"\"\"
"""

import ast
import inspect
import itertools
import re
import textwrap
import types
import typing
from dataclasses import fields

import pytest

import telos.losses
from telos.losses import Loss, TaskInfo, choice, integers, log_uniform, uniform
from telos.losses._space import Choice, Range

LOSSES = [
    found
    for name in telos.losses.__all__
    if isinstance(found := getattr(telos.losses, name), type) and issubclass(found, Loss)
]
# what a task knows, and the mark of rows that do not count: nobody tunes them
FACTS = {field.name for field in fields(TaskInfo)} | {"ignore_index"}
REASON = re.compile(r"Not searched: ``\w+``[^`]*")


def is_number(kind: object) -> bool:
    """Whether an annotation admits a number: ``float``, or ``float | None``."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(is_number(part) for part in typing.get_args(kind))
    return kind in (int, float)


def hyper_parameters(kind: type[Loss]) -> dict[str, object]:
    """The numeric arguments of a constructor that a user may tune, with their defaults."""
    found = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        default = parameter.default
        number = isinstance(default, int | float) and not isinstance(default, bool)
        unset = default in (None, parameter.empty) and is_number(parameter.annotation)
        if name not in FACTS and (number or unset):
            found[name] = default
    return found


def sentence(kind: type[Loss]) -> str:
    """The string below ``space``, in the class that declares it."""
    for owner in kind.__mro__:
        if "space" in vars(owner):
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
            for line, below in itertools.pairwise(body):
                targets = [line.target] if isinstance(line, ast.AnnAssign) else getattr(line, "targets", [])
                if any(isinstance(target, ast.Name) and target.id == "space" for target in targets):
                    text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                    return " ".join(str(below.value.value).split()) if text else ""  # type: ignore[attr-defined]
    return ""


def holds(span: Range, default: object) -> bool:
    """Whether a range contains a default."""
    return default in span.options if isinstance(span, Choice) else span.low <= default <= span.high  # type: ignore[operator]


def complaints(kind: type[Loss]) -> list[str]:
    """What is undeclared, or declared wrongly."""
    tunable, text = hyper_parameters(kind), sentence(kind)
    named = set(re.findall(r"``(\w+)``", text))
    silent = tunable.keys() - kind.space.keys()
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    found = [f"{name} has neither a range nor a reason" for name in sorted(silent - named)]
    found += [f"{name} has a reason and is no number without a range" for name in sorted(named - silent)]
    if named and (
        not REASON.match(text) or len(re.sub(r"``\w+``|Not searched:|and|,", "", text).split()) < 4
    ):
        found.append("the sentence must read: Not searched: ``name``, ``name``, and a reason")
    for name, span in kind.space.items():
        if not holds(span, defaults[name]):
            found.append(f"the range of {name} does not hold its default {defaults[name]}")
    return found


@pytest.mark.parametrize("kind", LOSSES, ids=lambda kind: kind.__name__)
def test_every_number_has_a_range_with_its_default_or_a_reason(kind: type[Loss]) -> None:
    assert not complaints(kind)


def test_all_families_are_looked_at() -> None:
    assert {kind.family for kind in LOSSES} >= {
        *("aggregate", "classification", "contrastive", "metric", "regression", "robust")
    }
    assert len(LOSSES) > 35
    # and the losses with numbers are seen to have them
    assert sum(bool(hyper_parameters(kind)) for kind in LOSSES) > 20


class Silent(Loss):
    space = {"a": uniform(0.0, 1.0)}

    def __init__(self, num_examples: int, a: float = 0.5, b: float = 1.0, ignore_index: int = -100) -> None:
        super().__init__()


class Reasoned(Loss):
    space = {"a": uniform(0.0, 1.0), "balanced": choice(False, True), "k": integers(1, 4)}
    """Not searched: ``b``, which keeps the numbers finite, and ``limit``, which the data decide."""

    def __init__(
        self, a: float = 0.5, balanced: bool = False, k: int = 4, b: float = 1.0, limit: float | None = None
    ) -> None:
        super().__init__()


class Inheriting(Reasoned):
    def __init__(self, a: float = 0.5, balanced: bool = False, k: int = 1, b: float = 2.0) -> None:
        super().__init__(a, balanced, k, b)


class Outside(Loss):
    space = {"a": log_uniform(0.1, 1.0), "mode": choice("x", "y")}

    def __init__(self, a: float = 2.0, mode: str = "z") -> None:
        super().__init__()


class Mistaken(Loss):
    space = {"a": log_uniform(0.1, 10.0)}
    """Not searched: ``a``, ``c``."""

    def __init__(self, a: float = 2.0) -> None:
        super().__init__()


def test_what_the_check_finds() -> None:
    assert complaints(Silent) == ["b has neither a range nor a reason"]
    assert complaints(Reasoned) == []
    assert complaints(Inheriting) == ["limit has a reason and is no number without a range"]
    assert complaints(Outside) == [
        "the range of a does not hold its default 2.0",
        "the range of mode does not hold its default z",
    ]
    assert complaints(Mistaken) == [
        "a has a reason and is no number without a range",
        "c has a reason and is no number without a range",
        "the sentence must read: Not searched: ``name``, ``name``, and a reason",
    ]
