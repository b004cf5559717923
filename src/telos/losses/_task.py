"""What a loss may ask of the task it is trained on, and whether the two fit."""

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class TaskInfo:
    """The facts of a task from which ``Loss.from_task`` builds a loss.

    Attributes:
        family: the call signature that the task's training step uses, for example ``"classification"``.
        num_classes: number of classes C, where there are classes.
        num_examples: number of training examples; a per-example memory has this many entries.
        dim: width of the embeddings, for losses on embeddings.
        class_counts: training examples of each class, for reweighting.
        supplies: keywords that the training step can pass beside the family's call, for example ``{"index"}``.
    """

    family: str
    num_classes: int | None = None
    num_examples: int | None = None
    dim: int | None = None
    class_counts: tuple[int, ...] | None = None
    supplies: frozenset[str] = field(default_factory=frozenset)


def misfit(loss: type[nn.Module] | nn.Module, info: TaskInfo) -> str | None:
    """Why ``loss`` cannot be trained on a task, in one sentence, or ``None`` where it can.

    ``loss`` may be a class (before it is built) or a module; a plain ``nn.Module`` declares nothing and is
    taken to fit.

    Example:
        >>> from telos.losses import FocalLoss
        >>> misfit(FocalLoss, TaskInfo(family="metric"))
        'FocalLoss is a classification loss and the task calls a metric loss'
    """
    name = loss.__name__ if isinstance(loss, type) else type(loss).__name__
    family = getattr(loss, "family", None)
    if family is not None and family != info.family:
        return f"{name} is {_a(family)} loss and the task calls {_a(info.family)} loss"
    missing = sorted(frozenset(getattr(loss, "needs", ())) - info.supplies)
    if missing:
        return f"{name} needs {', '.join(missing)}, which the task does not supply"
    if getattr(loss, "binary_only", False) and info.num_classes != 2:
        return f"{name} is for two classes and the task has {info.num_classes}"
    return None


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
