"""Recipes: what varies between the things compared, as a user writes it and as it is built.

A loss is ``[weight*]name[:key=value]...``, terms are joined by ``+``, recipes by commas::

    cross_entropy,focal:gamma=2,z_loss+0.1*focal,package.module:MyLoss:key=1

A name is that of the public function (with or without ``_loss``) or of the class; underscores and case do not
matter.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import telos.losses
from telos.losses import ClassificationLoss, Loss, Mixture, TaskInfo, misfit
from telos.losses._space import LogUniform, Range
from telos.trials._words import UsageError, import_symbol, nearest

Hyperparameters = dict[str, Any]


@dataclass(frozen=True)
class Term:
    """One loss of a recipe: its weight, its class, and the hyper-parameters that the user fixed."""

    weight: float
    loss: type[nn.Module]
    fixed: Hyperparameters

    @property
    def canonical(self) -> str:
        """The term without freedom of spelling, so that ``focal`` and ``FocalLoss`` share their runs."""
        return f"{self.weight!r}*{_canonical(self.loss, self.fixed)}"


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer class, what the user fixed, and where its search is centred."""

    text: str
    optimizer: type
    fixed: Hyperparameters

    @property
    def canonical(self) -> str:
        """The choice without freedom of spelling."""
        return _canonical(self.optimizer, self.fixed)


@dataclass(frozen=True)
class Recipe:
    """A loss (one term or a mixture) and an optimizer.

    Attributes:
        loss: as the user wrote it.
        optim: as the user wrote it.
        terms: the loss, parsed.
        optimizer: the optimizer, parsed.
    """

    loss: str
    optim: str
    terms: tuple[Term, ...]
    optimizer: OptimizerChoice

    @property
    def canonical(self) -> str:
        """What decides the numbers, without freedom of spelling."""
        return f"{' + '.join(term.canonical for term in self.terms)} @ {self.optimizer.canonical}"

    @property
    def space(self) -> dict[str, Range]:
        """Ranges of the loss's free hyper-parameters; in a mixture their names start with the class's."""
        ranges: dict[str, Range] = {}
        for prefix, term in self._prefixed():
            declared = getattr(term.loss, "space", {})
            ranges.update({prefix + key: span for key, span in declared.items() if key not in term.fixed})
        return ranges

    def misfit(self, info: TaskInfo) -> str | None:
        """Why the recipe cannot run on a task, or ``None``; the loss is built once to find out."""
        for term in self.terms:
            if reason := misfit(term.loss, info):
                return reason
        try:
            self.build_loss(info, {})
        except Exception as error:
            return str(error) or type(error).__name__
        if self.optimizer.optimizer in (AdamW, SGD) and not self.optimizer.fixed:
            return None  # torch takes a second to build its first optimizer
        if "closure" in getattr(self.optimizer.optimizer, "needs", ()):
            return f"{self.optim} steps from the losses of the examples, and a recipe gives it their gradient"
        try:
            self.build_optimizer([nn.Parameter(torch.zeros(1))], learning_rate=1e-3, weight_decay=0.0)
        except Exception as error:
            return f"{self.optim} cannot be built: {error}"
        return None

    def build_loss(self, info: TaskInfo, chosen: Hyperparameters) -> nn.Module:
        """The loss with the fixed and the chosen hyper-parameters, and defaults for the rest."""
        built = []
        for prefix, term in self._prefixed():
            own = {
                key: chosen[prefix + key] for key in getattr(term.loss, "space", {}) if prefix + key in chosen
            }
            make = getattr(term.loss, "from_task", None)
            keywords = {**own, **term.fixed}
            built.append(make(info, **keywords) if make else term.loss(**keywords))
        if len(built) == 1 and self.terms[0].weight == 1:
            return built[0]
        return Mixture([(term.weight, loss) for term, loss in zip(self.terms, built, strict=True)])

    def build_optimizer(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
    ) -> tuple[Any, Optimizer]:
        """The optimizer, and the one inside it that a schedule drives (the same where nothing is wrapped)."""
        keywords: Hyperparameters = {"lr": learning_rate, "weight_decay": weight_decay}
        kind, fixed = self.optimizer.optimizer, self.optimizer.fixed
        if _wraps(kind):
            inner = AdamW(parameters, **{**keywords, **{k: fixed[k] for k in keywords if k in fixed}})
            return kind(inner, **{k: v for k, v in fixed.items() if k not in keywords}), inner
        if kind is SGD:
            keywords["momentum"] = 0.9
        plain = kind(parameters, **{**keywords, **fixed})
        return plain, plain

    def optimizer_space(
        self, learning_rate: float, weight_decay: float
    ) -> dict[str, tuple[float, LogUniform]]:
        """Untuned value and range of learning rate and weight decay, from the task's defaults for AdamW.

        The range of the learning rate runs from a tenth of the default to thirty times it, that of weight
        decay from a tenth (next to nothing) to a hundred times. SGD (with momentum 0.9) starts at thirty
        times AdamW's learning rate; optimizers that add weight decay to the gradient start at a twentieth of
        the decoupled default.
        """
        kind = self.optimizer.optimizer
        if kind is SGD:
            learning_rate = 30 * learning_rate
        if not _wraps(kind) and kind is not AdamW:
            weight_decay = weight_decay / 20
        return {
            "learning_rate": (learning_rate, LogUniform(learning_rate / 10, learning_rate * 30)),
            "weight_decay": (weight_decay, LogUniform(weight_decay / 10, weight_decay * 100)),
        }

    def _prefixed(self) -> list[tuple[str, Term]]:
        if len(self.terms) == 1:
            return [("", self.terms[0])]
        names = [term.loss.__name__ for term in self.terms]
        counted = [
            name if names.count(name) == 1 else f"{name}{names[: place + 1].count(name)}"
            for place, name in enumerate(names)
        ]
        return [(f"{name}.", term) for name, term in zip(counted, self.terms, strict=True)]


def parse_recipes(loss: str, optim: str = "adamw", family: str = "classification") -> list[Recipe]:
    """The grid of every loss with every optimizer.

    Args:
        loss: recipes separated by commas.
        optim: optimizers separated by commas.
        family: of the task; only used to name the nearest losses in an error.

    Returns:
        The recipes, losses varying slowest.

    Raises:
        telos.trials.UsageError: for an unknown name or key, a value that is no literal, or a recipe given
        twice.

    Example:
        >>> [recipe.loss for recipe in parse_recipes("cross_entropy, focal:gamma=2+0.5*CompSumLoss")]
        ['cross_entropy', 'focal:gamma=2+0.5*CompSumLoss']
    """
    losses = [(text, _parse_loss(text, family)) for text in _listed("loss", loss)]
    optimizers = [_parse_optimizer(text) for text in _listed("optim", optim)]
    recipes = [Recipe(text, choice.text, terms, choice) for text, terms in losses for choice in optimizers]
    seen: dict[str, Recipe] = {}
    for recipe in recipes:
        if twin := seen.get(recipe.canonical):
            raise UsageError(
                f"loss={recipe.loss} optim={recipe.optim} is the same recipe as loss={twin.loss}"
            )
        seen[recipe.canonical] = recipe
    return recipes


def label(recipe: Recipe, recipes: Iterable[Recipe]) -> str:
    """The shortest name that tells a recipe from the others: the optimizer is named only where it varies."""
    several = len({other.optim for other in recipes}) > 1
    return f"{recipe.loss} / {recipe.optim}" if several else recipe.loss


def loss_names(family: str) -> dict[str, str]:
    """The names a user may write for the losses of a family, and their classes' names."""
    functions = {_plain(name): name for name in telos.losses.__all__ if name.endswith("_loss")}
    names = {}
    for plain, loss in _losses().items():
        if loss.family == family:
            name = functions.get(plain, loss.__name__)
            names[name if len(plain) < 3 else name.removesuffix("_loss")] = loss.__name__
    return names


@cache
def _losses() -> dict[str, type[Loss]]:
    abstract = {Loss, ClassificationLoss, Mixture}
    public = [getattr(telos.losses, name) for name in telos.losses.__all__]
    return {
        _plain(found.__name__): found
        for found in public
        if isinstance(found, type) and issubclass(found, Loss) and found not in abstract
    }


def _plain(name: str) -> str:
    return name.replace("_", "").lower().removesuffix("loss")


def _listed(key: str, text: str) -> list[str]:
    parts = [part.strip() for part in _split(text, ",")]
    if not all(parts):
        raise UsageError(f"{key}={text} has an empty entry")
    return parts


def _parse_loss(text: str, family: str) -> tuple[Term, ...]:
    terms = []
    for part in _split(text, "+"):
        factor, star, rest = part.strip().partition("*")
        # a star may also stand inside a value: only a leading number is a weight
        weighted = bool(star) and re.fullmatch(r"[^:\[(\"']*", factor) is not None
        body = rest.strip() if weighted else part.strip()
        weight = _number(factor, text) if weighted else 1.0
        spec, fixed = _parse_call(body)
        loss = _loss_class(spec, family)
        _check_keys(spec, loss, fixed)
        terms.append(Term(weight, loss, fixed))
    return tuple(terms)


def _parse_optimizer(text: str) -> OptimizerChoice:
    spec, fixed = _parse_call(text)
    if ":" in spec:
        kind = import_symbol(spec, "optimizer")
        if not isinstance(kind, type):
            raise UsageError(f"optimizer {spec} must be a class, got {type(kind).__name__}")
    else:
        known = _optimizers()
        kind = known.get(_plain(spec))
        if kind is None:
            raise UsageError(f"unknown optimizer {spec!r}; {nearest(_plain(spec), known)}")
    _check_keys(spec, kind, fixed, also={"lr", "weight_decay"} if _wraps(kind) else set())
    return OptimizerChoice(text, kind, fixed)


@cache
def _optimizers() -> dict[str, type]:
    import telos.optim

    ours = [getattr(telos.optim, name) for name in getattr(telos.optim, "__all__", ())]
    theirs = [
        torch.optim.AdamW,
        torch.optim.Adam,
        torch.optim.SGD,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
    ]
    usable = [
        kind for kind in ours if isinstance(kind, type) and (issubclass(kind, Optimizer) or _wraps(kind))
    ]
    return {_plain(kind.__name__): kind for kind in (*theirs, *usable)}


def _wraps(kind: type) -> bool:
    """Whether an optimizer is built around another one."""
    return next(iter(_keys(kind)), None) == "base_optimizer"


def _parse_call(text: str) -> tuple[str, Hyperparameters]:
    """``name:key=value:...`` or ``package.module:Class:key=value:...`` to its name and values."""
    parts = [part.strip() for part in _split(text, ":")]
    named = 2 if len(parts) > 1 and "=" not in parts[1] else 1
    spec, fixed = ":".join(parts[:named]), {}
    for part in parts[named:]:
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"{part!r} in {text!r} must read key=value")
        if key in fixed:
            raise UsageError(f"{text!r} gives {key} twice")
        try:
            fixed[key] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError) as error:
            raise UsageError(
                f'the value of {key} in {text!r} must be a literal (2, True, "text", [1, 2]), got {value}'
            ) from error
    return spec, fixed


def _loss_class(spec: str, family: str) -> type[nn.Module]:
    if ":" in spec:
        found = import_symbol(spec, "loss")
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise UsageError(f"loss {spec} must be a subclass of torch.nn.Module")
        return found
    if not spec:
        raise UsageError("a loss has no name; write for example z_loss+0.1*focal")
    found = _losses().get(_plain(spec))
    if found is None:
        names = loss_names(family)
        raise UsageError(
            f"unknown loss {spec!r}; {nearest(spec, names)}, and package.module:Class brings any other"
        )
    return found


def _keys(kind: type) -> dict[str, inspect.Parameter]:
    try:
        parameters = dict(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]
    except (TypeError, ValueError):
        return {}
    parameters.pop("self", None)
    return parameters


def _check_keys(spec: str, kind: type, fixed: Hyperparameters, also: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    parameters = _keys(kind)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    valid = {name for name in parameters if name not in ("reduction", "params", "base_optimizer")} | also
    for key in fixed:
        if key not in valid:
            raise UsageError(f"{spec} has no hyper-parameter {key!r}; {nearest(key, valid)}")


def _canonical(kind: type, fixed: Hyperparameters) -> str:
    name = (
        kind.__name__
        if kind.__module__.startswith(("telos.", "torch.optim"))
        else f"{kind.__module__}:{kind.__qualname__}"
    )
    # 2 and 2.0 are one number
    values = {
        key: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for key, v in fixed.items()
    }
    return name + "".join(f":{key}={values[key]!r}" for key in sorted(values))


def _number(text: str, whole: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(
            f"the weight {text.strip()!r} in {whole!r} must be a finite number, as in z_loss+0.1*focal"
        )
    return number


def _split(text: str, separator: str) -> list[str]:
    """Split where ``separator`` stands outside brackets and quotes; the ``+`` of ``1e+3`` does not split."""
    parts, depth, quote, start = [], 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == separator and depth == 0:
            sign = separator == "+" and (
                re.search(r"(^|[=*:])\s*[0-9.]+[eE]$|[=*]\s*$|^$", text[start:place]) is not None
            )
            if not sign:
                parts.append(text[start:place])
                start = place + 1
    return [*parts, text[start:]]
