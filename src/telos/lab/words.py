"""The words of ``telos compare``: a task, ``key=value`` words and flags, from the shell or from a TOML file."""

from __future__ import annotations

import math
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telos.trials import Plan, UsageError, make_plan
from telos.trials._words import nearest
from telos.trials.sources import TASK_KEYS, task_title

FLAGS = ("--add", "--dry-run", "--json", "--quiet", "--resume")
DEFAULTS: dict[str, Any] = {
    "loss": "",
    "optim": "adamw",
    "seeds": 10,
    "trials": 20,
    "tuning_seeds": 3,
    "epochs": 0,
    "metric": "",
    "band": "",
    "max_time": "",
    "reference": "",
    "processes": 2,
    "engine": "local",
    "out": "",
    "store": "",
}
HELP = {
    "loss": 'losses to compare, separated by commas; the first is the baseline. "a:key=2" fixes a '
    'hyper-parameter, "a+0.1*b" is a mixture, package.module:Class brings your own',
    "optim": "optimizers, separated by commas; every loss is tried with each",
    "seeds": "evaluation seeds; below 5 nothing can be tested, 10 or more is better",
    "trials": "configurations tried for each recipe, the untuned one among them",
    "tuning_seeds": "seeds on which each trial is judged",
    "epochs": "of every run; the task's own if not given",
    "metric": "what tuning looks at and the leaderboard is ordered by; the task's own if not given",
    "band": "differences of the metric below this do not matter to you",
    "max_time": "an end to it: 90s, 10m, 2h",
    "reference": "true or false: whether gradient boosting, or what the task names, runs as an outside line",
    "processes": "worker processes on this machine",
    "engine": "local, or ray for a cluster",
    "out": "folder of the report and, by default, the store",
    "store": "an SQLite file, or any SQLAlchemy URL",
}
# words that do not change what is compared
_HOW = ("processes", "engine", "out", "store")
USAGE = (
    "telos compare TASK[,TASK...] [target=COLUMN ...] loss=A,B,... [optim=adamw,sgd] [seeds=10] [trials=20] "
    "[tuning_seeds=3] [epochs=N] [metric=accuracy] [band=0.01] [max_time=10m] [processes=2] [engine=local] "
    "[out=FOLDER] [store=FILE_OR_URL] [--dry-run] [--add] [--quiet] [--json]"
)


@dataclass(frozen=True)
class Words:
    """The words of a command, parsed.

    Attributes:
        source: the tasks as the user named them, or, with ``--add``, the store.
        about: words that say more about the data (``target=label``).
        values: a value for every key of the comparison.
        flags: those that were given.
    """

    source: str
    about: dict[str, str]
    values: dict[str, Any]
    flags: frozenset[str]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Words:
        """Sort the words; anything unknown is an error that names what is nearest."""
        sources: list[str] = []
        given: dict[str, str] = {}
        flags: set[str] = set()
        for word in words:
            key, equals, value = word.partition("=")
            if word.startswith("-"):
                if word not in FLAGS:
                    raise UsageError(f"unknown flag {word}; {nearest(word, FLAGS)}")
                flags.add(word)
            elif equals and ":" not in key and not Path(word).exists():
                known = {**DEFAULTS, **TASK_KEYS}
                if key not in known:
                    raise UsageError(f"unknown key {key!r} in {word!r}; {nearest(key, known)}")
                if key in given:
                    raise UsageError(f"{key}= is given twice")
                given[key] = value
            else:
                sources.append(word)
        if len(sources) == 1 and sources[0].endswith(".toml"):
            source, written = read_configuration(Path(sources[0]))
            sources, given = [source], {**written, **given}
        if len(sources) != 1:
            got = f"got {', '.join(map(repr, sources))}" if sources else "got none"
            raise UsageError(f"name one task, {got}; the form is: {USAGE}")
        if not given.get("loss") and not ("--add" in flags and given.get("optim")):
            raise UsageError(
                f"loss= is missing; write for example: telos compare {sources[0]} loss=cross_entropy,focal"
            )
        return cls.of(sources[0], given, flags)

    @classmethod
    def of(cls, source: str, given: Mapping[str, Any], flags: set[str] | frozenset[str]) -> Words:
        """Words from a mapping: those about the data apart from those about the comparison."""
        about = {key: value for key, value in given.items() if key in TASK_KEYS and key not in DEFAULTS}
        if "--add" in flags:
            usable = ("loss", "optim", *_HOW)
            for key in given:
                if key not in usable:
                    raise UsageError(
                        f"{key}= cannot be changed with --add, which keeps the comparison as it was; it takes "
                        f"{', '.join(f'{name}=' for name in usable)}"
                    )
        values = {key: _typed(key, given.get(key)) for key in DEFAULTS}
        if "--add" in flags and "optim" not in given:
            values["optim"] = ""
        return cls(source, {key: str(value) for key, value in about.items()}, values, frozenset(flags))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The text of every task; a comma separates tasks unless a file has it in its name."""
        whole = Path(self.source).exists()
        names = [self.source] if whole else [name.strip() for name in self.source.split(",")]
        if not all(names):
            raise UsageError(f"the list of tasks {self.source!r} has an empty entry")
        if len(set(names)) < len(names):
            raise UsageError(f"the list of tasks {self.source!r} names one twice")
        about = [f"{key}={value}" for key, value in self.about.items()]
        return tuple(shlex.join([name, *about]) for name in names)

    def plans(self) -> tuple[Plan, ...]:
        """What the words ask for, checked: a plan for every task."""
        chosen = self.values
        return tuple(
            make_plan(
                task,
                chosen["loss"],
                optim=chosen["optim"],
                seeds=chosen["seeds"],
                trials=chosen["trials"],
                tuning_seeds=chosen["tuning_seeds"],
                epochs=chosen["epochs"] or None,
                metric=chosen["metric"] or None,
                band=None if chosen["band"] == "" else chosen["band"],
                # several tasks share the time
                max_time=chosen["max_time"] / len(self.tasks) if chosen["max_time"] else None,
                reference=None if chosen["reference"] == "" else chosen["reference"],
                command=self.command,
            )
            for task in self.tasks
        )

    @property
    def command(self) -> str:
        """The command that repeats this one, without the password of a store."""
        changed = [f"{key}={_written(key, v)}" for key, v in self.values.items() if v != DEFAULTS[key]]
        # the command is stored and shown
        changed = [without_password(word) if word.startswith("store=") else word for word in changed]
        about = [f"{key}={value}" for key, value in self.about.items()]
        return shlex.join(["telos", "compare", self.source, *about, *changed])

    @property
    def title(self) -> str:
        """A short name for folders."""
        names = [re.sub(r"[^A-Za-z0-9_.-]+", "_", task_title(task)) for task in self.tasks]
        return names[0] if len(names) == 1 else f"{names[0]}-and-{len(names) - 1}-more"

    def folder(self, plans: Sequence[Plan]) -> Path:
        """Where the page and, by default, the store go."""
        return Path(self.values["out"] or Path("runs") / f"{self.title}-{plans[0].key[:8]}")

    def store(self, plans: Sequence[Plan]) -> str:
        """The store's path or URL."""
        return self.values["store"] or str(self.folder(plans) / "store.sqlite")


def read_configuration(path: Path) -> tuple[str, dict[str, str]]:
    """The source and the words of a TOML file; a list is what commas separate on the command line."""
    try:
        with path.open("rb") as file:
            written = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML file: {error}") from error
    known = {"task": "", **DEFAULTS, **TASK_KEYS}
    for key, value in written.items():
        if key not in known:
            raise UsageError(f"{path} has an unknown key {key!r}; {nearest(key, known)}")
        if not isinstance(value, str | int | float | list) or (
            isinstance(value, list) and not all(isinstance(entry, str | int | float) for entry in value)
        ):
            raise UsageError(f"{path}: {key} must be a text, a number or a list of them, got {value!r}")
    if "task" not in written:
        raise UsageError(f'{path} names no task; begin it with: task = "digits"')
    words = {key: _text(value) for key, value in written.items() if key != "task"}
    return _text(written["task"]), {key: value for key, value in words.items() if value != ""}


def configuration(words: Words | None = None) -> str:
    """A commented TOML file of a comparison, which ``telos compare FILE`` runs."""
    source = words.source if words is not None else "digits"
    lines = [
        "# A comparison. Run it with: telos compare THIS_FILE",
        "# A word on the command line, such as seeds=3, takes the place of one here.",
        "",
        "# what the data are: a built-in name, a table, an archive, a folder of images, package.module:Task;",
        "# several are separated by commas",
        f"task = {_toml(source)}",
        "",
    ]
    about = words.about if words is not None else {}
    for key, line in TASK_KEYS.items():
        mark = "" if key in about else "# "
        lines += [f"# {line}", f"{mark}{key} = {_toml(about.get(key, ''))}"]
    lines.append("")
    for key, default in DEFAULTS.items():
        value = words.values[key] if words is not None else default
        if key == "loss":
            value = [part.strip() for part in (value or "cross_entropy,focal").split(",")]
        mark = "" if value != default else "# "
        lines += [f"# {HELP[key]}", f"{mark}{key} = {_toml(_written(key, value))}"]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    # JSON's strings are TOML's basic strings
    import json

    return json.dumps(value, ensure_ascii=False)


def _written(key: str, value: Any) -> Any:
    """A value as the user would write it."""
    if key == "max_time" and value != "":
        return f"{value:g}s"
    if key == "reference" and value != "":
        return str(value).lower()
    return value


def _typed(key: str, given: Any) -> Any:
    default = DEFAULTS[key]
    if given is None or given == "":
        return default
    if key == "max_time":
        return duration(given)
    if key == "reference":
        return _flag(key, given)
    if key == "band":
        return _number(key, given, float)
    if isinstance(default, str):
        return str(given)
    value = _number(key, given, int)
    if key == "epochs" and value < 1:
        raise UsageError(f"epochs must be at least 1, got {value}")
    if key == "processes" and value < 0:
        raise UsageError(f"processes must be at least 0, got {value}")
    return value


def _number(key: str, given: Any, kind: type) -> Any:
    try:
        value = kind(given)
    except (TypeError, ValueError) as error:
        name = "whole number" if kind is int else "number"
        raise UsageError(f"{key} must be a {name}, got {given!r}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{key} must be a finite number, got {given!r}")
    return value


def _flag(key: str, given: Any) -> bool:
    words = {"true": True, "yes": True, "false": False, "no": False}
    if str(given).lower() not in words:
        raise UsageError(f"{key} must be true or false, got {given!r}")
    return words[str(given).lower()]


def duration(given: Any) -> float:
    """Seconds of ``90``, ``90s``, ``10m`` or ``2h``.

    Example:
        >>> duration("1.5m")
        90.0
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([smh]?)\s*", str(given))
    try:
        seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise UsageError(f"max_time must be a time such as 90s, 10m or 2h, got {given!r}")
    return seconds


def without_password(text: str) -> str:
    """A command without the password of a database.

    Example:
        >>> without_password("telos compare digits store=postgresql://me:secret@host/runs")
        'telos compare digits store=postgresql://me:PASSWORD@host/runs'
    """
    return re.sub(r"(://[^:/@\s]*:)[^\s]*@", r"\1PASSWORD@", text)
