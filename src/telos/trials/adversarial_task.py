"""Classification under attack: inputs that an adversary may move a little, in training and in testing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from telos.losses import Mixture, pgd_attack
from telos.losses._algebra import call_keywords
from telos.losses.robust.attacks import evaluation_mode
from telos.trials._words import UsageError
from telos.trials.tasks import Batch, ClassificationTask, Classifying, Fold, derive_seed

RADII = {"linf": 0.1, "l2": 0.5}
"""Radius of the ball of each norm, for pixels in [0, 1]."""
BOUNDS = (0.0, 1.0)

Attack: TypeAlias = Callable[..., Tensor]


@dataclass(eq=False)
class AdversarialTask(ClassificationTask):
    """A :class:`ClassificationTask` on images whose pixels an adversary may move within a ball.

    Splits and model are those of a :class:`ClassificationTask`; pixels are divided by ``top`` and not
    standardised. A loss whose call names ``adversarial_logits`` gets them: the model's output at inputs that
    :func:`attack_of` the loss has moved, made in evaluation mode from a generator of its own. All other losses
    train on the clean inputs alone, and the order of batches is the same for both.

    ``robust_accuracy`` is the share of examples that are right at the clean input, after one step (FGSM) and
    after two attacks of ``test_steps`` steps (PGD): on the cross-entropy, and on the margin of the best other
    class, whose gradient does not vanish where logits are large. ``fgsm_accuracy`` leaves out the last two. The
    attacks are the same for every recipe and start at the same points; they read the model's output as the
    loss does.

    Args:
        name: a short name.
        load: returns pixels (N, D) in [0, top] and labels (N,) in [0, C).
        noise: as in :class:`ClassificationTask`.
        imbalance: as in :class:`ClassificationTask`.
        width: hidden units.
        epochs: how long to train.
        batch_size: examples a step.
        learning_rate: untuned, for AdamW.
        weight_decay: untuned, for AdamW.
        metric: what tuning looks at, on the validation split.
        metrics: ``"max"`` or ``"min"`` for each metric.
        architecture: ``"linear"`` or ``module:factory`` in place of the network.
        top: the largest pixel; pixels are divided by it.
        norm: ``"linf"`` or ``"l2"``, over the pixels of an example.
        radius: of the ball, for pixels in [0, 1]; 0.1 for l-inf and 0.5 for l2 if not given.
        steps: of the attack in training.
        test_steps: of each PGD attack in evaluation.

    Raises:
        telos.trials.UsageError: for an unknown norm, or a radius that is not above 0.

    Example:
        >>> from telos.trials import load_task
        >>> task = load_task("digits_adversarial")
        >>> fold = task.fold(seed=0)
        >>> sorted(fold.info.supplies), float(fold.train["inputs"].max())
        (['adversarial_logits', 'index'], 1.0)
    """

    words: ClassVar[Mapping[str, type]] = {"radius": float, "norm": str}
    best = {**Classifying.best, "robust_accuracy": 1.0, "fgsm_accuracy": 1.0}
    bands: ClassVar[Mapping[str, float]] = dict.fromkeys(best, 0.01)

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 5e-3
    metric: str = "robust_accuracy"
    metrics: Mapping[str, str] = field(
        default_factory=lambda: {
            "robust_accuracy": "max",
            "accuracy": "max",
            "fgsm_accuracy": "max",
            "macro_f1": "max",
            "nll": "min",
            "ece": "min",
        }
    )
    top: float = 1.0
    norm: str = "linf"
    radius: float | None = None
    steps: int = 7
    test_steps: int = 20

    def __post_init__(self) -> None:
        if self.norm not in RADII:
            raise UsageError(f"norm must be {' or '.join(RADII)}, got {self.norm!r}")
        if self.radius is not None and not 0 < self.radius < math.inf:
            raise UsageError(f"radius must be a number above 0, got {self.radius:g}")

    @property
    def ball(self) -> float:
        """The radius that holds: the one given, or that of the norm."""
        return RADII[self.norm] if self.radius is None else self.radius

    @property
    def description(self) -> str:
        """The task in a few sentences, for reports."""
        return (
            f"{super().description} Pixels lie in [0, 1], and an adversary may move them within a ball of "
            f"{self.norm} radius {self.ball:g}. Losses that ask for adversarial_logits train against an attack "
            f"of {self.steps} steps, all others on clean inputs. An example counts for robust_accuracy if it is "
            f"right at the clean input, after FGSM and after {self.test_steps} steps of PGD on the "
            "cross-entropy and on the margin, the same attacks for every recipe."
        )

    def features(self, inputs: np.ndarray, train: np.ndarray) -> np.ndarray:
        """Pixels in [0, 1]."""
        scaled = inputs / self.top
        if scaled.min() < BOUNDS[0] or scaled.max() > BOUNDS[1]:
            raise UsageError(
                f"pixels must lie in [0, {self.top:g}], got values from {inputs.min():g} to {inputs.max():g}"
            )
        return scaled

    def fold(self, seed: int) -> Fold:
        """The split of a seed; its step can supply ``adversarial_logits``."""
        fold = super().fold(seed)
        return replace(
            fold, info=replace(fold.info, supplies=fold.info.supplies | frozenset({"adversarial_logits"}))
        )

    def training_step(self, model: nn.Module, loss: nn.Module) -> Callable[[Batch], Mapping[str, Tensor]]:
        """The loss of a batch; ``adversarial_logits`` and ``index`` go to losses whose call names them.

        The attack's generator is seeded by torch's global seed, which the runner sets, without drawing from it.
        """
        accepted = _accepted(loss)
        if "adversarial_logits" not in accepted:
            return super().training_step(model, loss)
        indexed = accepted & {"index"}
        generator = torch.Generator().manual_seed(derive_seed(self.name, torch.initial_seed(), "attack"))
        attack = partial(
            attack_of(loss),
            radius=self.ball,
            steps=self.steps,
            norm=self.norm,
            bounds=BOUNDS,
            generator=generator,
        )

        def step(batch: Batch) -> Mapping[str, Tensor]:
            inputs, target = batch["inputs"], batch["target"]
            with evaluation_mode(model):
                moved = attack(model, inputs, target)
            extra = {name: batch[name] for name in indexed}
            value = loss(model(inputs), target, adversarial_logits=model(moved), **extra)
            return {"loss": value}

        return step

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loss: nn.Module, split: Batch) -> dict[str, float]:
        """The metrics of a :class:`ClassificationTask` on clean inputs, and two accuracies under attack."""
        inputs, target = split["inputs"], split["target"].unsqueeze(-1)
        own = getattr(loss, "log_probabilities", partial(torch.log_softmax, dim=-1))

        def read(moved: Tensor) -> Tensor:
            # in float64, or the gradient of a confident output would round to 0 and the attack stand still
            logs: Tensor = own(model(moved).double())
            return logs

        def cross_entropy(moved: Tensor) -> Tensor:
            return -read(moved).gather(-1, target).sum()

        def margin(moved: Tensor) -> Tensor:
            logs = read(moved)
            others = logs.scatter(-1, target, -math.inf)
            return (others.amax(-1, keepdim=True) - logs.gather(-1, target)).sum()

        def right(moved: Tensor) -> Tensor:
            return read(moved).argmax(-1, keepdim=True) == target

        attack = partial(pgd_attack, inputs=inputs, radius=self.ball, norm=self.norm, bounds=BOUNDS)
        with evaluation_mode(model):
            fgsm = right(inputs) & right(attack(cross_entropy, steps=1, start="zero"))
            robust = fgsm
            for objective in (cross_entropy, margin):
                # the same start for every recipe
                start = torch.Generator().manual_seed(derive_seed(self.name, "start"))
                robust = robust & right(attack(objective, steps=self.test_steps, generator=start))
        return {
            **super().evaluate(model, loss, split),
            "robust_accuracy": float(robust.double().mean()),
            "fgsm_accuracy": float(fgsm.double().mean()),
        }


def attack_of(loss: nn.Module) -> Attack:
    """The attack that a loss trains against.

    It is called as ``attack(model, inputs, target, radius=, steps=, norm=, bounds=, generator=)``, with the model
    in evaluation mode, and returns the perturbed inputs.

    That is the loss's own ``attack``, as :class:`telos.losses.TRADESLoss` has one, else
    :func:`cross_entropy_attack`. The terms of a mixture share one perturbed input: it comes from the attack of
    those that ask for ``adversarial_logits`` where they agree, else from :func:`cross_entropy_attack`.

    Example:
        >>> from telos.losses import AdversarialCrossEntropyLoss, CrossEntropyLoss, TRADESLoss
        >>> attack_of(CrossEntropyLoss() + 0.5 * TRADESLoss()).__name__
        'trades_attack'
        >>> attack_of(TRADESLoss() + AdversarialCrossEntropyLoss()).__name__
        'cross_entropy_attack'
    """
    if not isinstance(loss, Mixture):
        found: Attack = getattr(loss, "attack", cross_entropy_attack)
        return found
    attacks = [attack_of(term) for term in loss.losses if "adversarial_logits" in _accepted(term)]
    agree = bool(attacks) and all(attack == attacks[0] for attack in attacks)
    return attacks[0] if agree else cross_entropy_attack


def cross_entropy_attack(
    model: nn.Module,
    inputs: Tensor,
    target: Tensor,
    *,
    radius: float,
    steps: int,
    norm: str,
    bounds: tuple[float, float] | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """PGD on the cross-entropy of the model's output, from a random start; see :func:`telos.losses.pgd_attack`.

    Example:
        >>> import torch
        >>> model, inputs = torch.nn.Linear(2, 3), torch.full((1, 2), 0.5)
        >>> settings = {"radius": 0.1, "steps": 5, "norm": "linf", "bounds": (0.0, 1.0)}
        >>> moved = cross_entropy_attack(model, inputs, torch.tensor([0]), **settings)
        >>> bool((moved - 0.5).abs().max() <= 0.1 + 1e-6)
        True
    """

    def objective(moved: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(moved), target, reduction="sum")

    return pgd_attack(
        objective, inputs, radius=radius, steps=steps, norm=norm, bounds=bounds, generator=generator
    )


def _accepted(loss: nn.Module) -> frozenset[str]:
    """The keywords that a loss's call names, or that it says it needs."""
    return (call_keywords(loss) or frozenset()) | frozenset(getattr(loss, "needs", ()))
