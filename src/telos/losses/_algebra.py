"""Losses of a family form a small algebra: ``ZLoss() + 0.1 * FocalLoss()`` is a loss of the family."""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor, nn

from telos.losses._reduction import (
    Denominator,
    Reduction,
    check_reduction,
    classification_rows,
    reduce,
)
from telos.losses._space import Space
from telos.losses._task import TaskInfo

Weight: TypeAlias = float | Callable[[int], float]


class Loss(nn.Module):
    """What every loss of telos declares about itself, and the arithmetic of losses.

    Attributes:
        family: the call signature, for example ``"classification"``.
        needs: keywords that the call requires beyond the family's.
        binary_only: whether the loss is defined for two classes only.
        space: the ranges in which its hyper-parameters are worth searching; the default is the value to use
            untuned.

    Example:
        >>> import torch
        >>> from telos.losses import CrossEntropyLoss
        >>> sorted(CrossEntropyLoss().terms(torch.zeros(1, 2), torch.tensor([0])))
        ['cross_entropy_loss']
    """

    family: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    binary_only: ClassVar[bool] = False
    space: ClassVar[Space] = {}

    @classmethod
    def from_task(cls, info: TaskInfo, **hyperparameters: Any) -> Self:
        """Build the loss from what a task knows about itself."""
        return cls(**hyperparameters)

    def terms(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The named terms whose weighted sum ``forward`` returns; one for a plain loss."""
        return {term_name(self): self(*args, **kwargs)}

    def __add__(self, other: nn.Module) -> "Mixture":
        return Mixture([*_weighted_terms(self), *_weighted_terms(other)])

    def __radd__(self, other: nn.Module | int) -> "Mixture":
        # sum([...]) starts from the number 0
        if isinstance(other, int) and other == 0:
            return Mixture(_weighted_terms(self))
        return Mixture([*_weighted_terms(other), *_weighted_terms(self)])

    def __mul__(self, weight: Weight) -> "Mixture":
        return Mixture([(_product(weight, old), loss) for old, loss in _weighted_terms(self)])

    __rmul__ = __mul__


class ClassificationLoss(Loss):
    """A row-wise loss on ``(logits (..., C), target)``: a subclass writes its formula as ``values``.

    ``rows`` gives the values and weights of the examples, ``forward`` reduces them. A loss whose probabilities are not
    the softmax of its logits also has ``log_probabilities(logits)``, by which predictions are read.

    Example:
        >>> import torch
        >>> class Brier(ClassificationLoss):
        ...     def values(self, logits, target):
        ...         p = logits.softmax(-1)
        ...         return p.square().sum(-1) - 2 * p.gather(-1, target[:, None]).squeeze(-1) + 1
        >>> Brier()(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(0.7500)
    """

    family = "classification"
    minimum_classes: ClassVar[int] = 2
    class_weight: Tensor | None

    def __init__(
        self,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """The formula: logits (M, C) and target (M,) or (M, C) to values (M,)."""
        raise NotImplementedError(f"{type(self).__name__} must define values(logits, target)")

    def rows(
        self, logits: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One value and one weight per example, each of the shape of the batch."""
        return classification_rows(
            self.values,
            logits,
            target,
            class_weight=self.class_weight,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
            minimum_classes=self.minimum_classes,
        )

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The reduced loss; see :func:`telos.losses.reduce` for ``denominator``."""
        values, weights = self.rows(logits, target, sample_weight=sample_weight)
        return reduce(values, weights, self.reduction, denominator)


class Mixture(Loss):
    """A weighted sum of losses that share a call.

    Args:
        weighted: pairs ``(weight, loss)``. A weight is a number or a schedule, a function of the number of training
            steps taken so far; a loss is any ``nn.Module`` with the family's call.

    Each term keeps its own denominator. Keywords go to the terms whose call accepts them; a keyword that no term
    accepts raises ``TypeError``, and so does ``sample_weight`` or ``denominator`` where a term would not honour it.

    Example:
        >>> import torch
        >>> from telos.losses import FocalLoss, ZLoss
        >>> loss = ZLoss() + 0.1 * FocalLoss()
        >>> logits, target = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
        >>> sorted(loss.terms(logits, target))
        ['focal_loss', 'z_loss']
        >>> bool(loss(logits, target) == ZLoss()(logits, target) + 0.1 * FocalLoss()(logits, target))
        True
    """

    steps: Tensor

    def __init__(self, weighted: Sequence[tuple[Weight, nn.Module]]) -> None:
        super().__init__()
        if not weighted:
            raise ValueError("weighted must hold at least one (weight, loss) pair, got none")
        families = sorted({str(family) for _, loss in weighted if (family := getattr(loss, "family", None))})
        if len(families) > 1:
            raise ValueError(f"losses of a mixture must share a call, got the families {', '.join(families)}")
        self.weights: list[Weight] = [weight for weight, _ in weighted]
        self.losses = nn.ModuleList(loss for _, loss in weighted)
        self.names = _unique([term_name(loss) for loss in self.losses])
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._scheduled = any(callable(weight) for weight in self.weights)
        # a mixture declares what its terms declare, so it overrides the class attributes
        self.family = families[0] if families else ""  # type: ignore[misc]
        self.needs = frozenset().union(*(getattr(loss, "needs", ()) for loss in self.losses))  # type: ignore[misc]
        self.binary_only = any(getattr(loss, "binary_only", False) for loss in self.losses)  # type: ignore[misc]

    def current_weights(self) -> list[float]:
        """The weights at the present step."""
        return [float(w(int(self.steps.item()))) if callable(w) else float(w) for w in self.weights]

    def terms(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The unweighted value of every term, by name."""
        routed = self._route(kwargs)
        return {
            name: loss(*args, **keywords)
            for name, loss, keywords in zip(self.names, self.losses, routed, strict=True)
        }

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum of the terms."""
        values = list(self.terms(*args, **kwargs).values())
        total = sum(weight * value for weight, value in zip(self.current_weights(), values, strict=True))
        if self._scheduled and self.training and torch.is_grad_enabled():
            self.steps += 1
        return total  # type: ignore[return-value]

    def _route(self, keywords: dict[str, Any]) -> list[dict[str, Any]]:
        accepted = [call_keywords(loss) for loss in self.losses]
        for keyword in keywords:
            takers = sum(1 for names in accepted if names is None or keyword in names)
            if not takers:
                raise TypeError(f"no term of {' + '.join(self.names)} takes the keyword {keyword!r}")
            if keyword in ("sample_weight", "denominator") and takers < len(accepted):
                deaf = [
                    n
                    for n, names in zip(self.names, accepted, strict=True)
                    if names is not None and keyword not in names
                ]
                raise TypeError(f"{keyword} would be ignored by {', '.join(deaf)}")
        return [
            {key: value for key, value in keywords.items() if names is None or key in names}
            for names in accepted
        ]

    def extra_repr(self) -> str:
        """Names and weights, for ``print``."""
        weights = ("schedule" if callable(weight) else f"{weight:g}" for weight in self.weights)
        return " + ".join(f"{weight} * {name}" for weight, name in zip(weights, self.names, strict=True))


def term_name(loss: nn.Module) -> str:
    """The snake-case name of a loss's class: ``ZLoss`` gives ``z_loss``, ``LDRKLLoss`` gives ``ldrkl_loss``."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(loss).__name__)
    return name.lower()


def call_keywords(loss: nn.Module) -> frozenset[str] | None:
    """The keywords that a loss's call accepts, or ``None`` where it accepts any."""
    if isinstance(loss, Mixture):
        inner = [call_keywords(term) for term in loss.losses]
        return (
            None
            if any(names is None for names in inner)
            else frozenset().union(*(n for n in inner if n is not None))
        )
    parameters = inspect.signature(loss.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY)


def _weighted_terms(loss: Any) -> list[tuple[Weight, nn.Module]]:
    if isinstance(loss, Mixture):
        return list(zip(loss.weights, loss.losses, strict=True))
    if isinstance(loss, nn.Module):
        return [(1.0, loss)]
    raise TypeError(f"a loss can be added to a torch.nn.Module, got {type(loss).__name__}")


def _product(first: Weight, second: Weight) -> Weight:
    if not callable(first) and not isinstance(first, int | float):
        raise TypeError(f"a weight must be a number or a function of the step, got {type(first).__name__}")
    if not callable(first) and not callable(second):
        return float(first) * float(second)
    return _Scheduled(first, second)


@dataclass(frozen=True)
class _Scheduled:
    """A product of weights of which at least one is a schedule; a closure could not be pickled."""

    first: Weight
    second: Weight

    def __call__(self, step: int) -> float:
        weights = (self.first, self.second)
        return math.prod(weight(step) if callable(weight) else float(weight) for weight in weights)


def _unique(names: list[str]) -> list[str]:
    return [
        name if names.count(name) == 1 else f"{name}_{names[: position + 1].count(name)}"
        for position, name in enumerate(names)
    ]
