"""Training on perturbed inputs: TRADES, and cross-entropy at the perturbed input alone."""

from functools import partial

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._checks import check_range
from telos.losses._reduction import (
    Denominator,
    Reduction,
    at_least_float32,
    at_target,
    classification_rows,
    reduce,
)
from telos.losses._space import log_uniform
from telos.losses.classification._adversarial import AdversarialRowsLoss
from telos.losses.robust.attacks import evaluation_mode, pgd_attack


def _trades_values(logits: Tensor, target: Tensor, adversarial_logits: Tensor, *, beta: float) -> Tensor:
    clean, moved = logits.log_softmax(-1), adversarial_logits.log_softmax(-1)
    divergence = (clean.exp() * (clean - moved)).sum(-1)
    # linear in a probability target, as the family wants it
    share = target.sum(-1) if target.is_floating_point() else 1.0
    return at_target(-clean, target) + beta * share * divergence


def _moved_values(logits: Tensor, target: Tensor, adversarial_logits: Tensor) -> Tensor:
    return at_target(-adversarial_logits.log_softmax(-1), target)


def trades_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    adversarial_logits: Float[Tensor, "*batch classes"],
    beta: float = 6.0,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""TRADES: cross-entropy on the clean input, and a smooth output around it.

    ::

        l = -log p_y(x) + beta KL( p(x) || p(x') )

    with x' from :func:`trades_attack`. Gradients flow through both outputs, as in the authors' code.

    Args:
        logits: (N, C) or (N, T, C) scores of the clean inputs.
        target: labels in [0, C), or probabilities of the shape of ``logits``.
        adversarial_logits: scores of the perturbed inputs, of the shape of ``logits``.
        beta: weight of robustness against accuracy, at least 0; the authors use 1 to 6.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label out of range, a negative beta or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Theoretically Principled Trade-off between Robustness and Accuracy, arXiv 1901.08573.

    Example:
        >>> import torch
        >>> clean = torch.tensor([[1.0, 0.0]])
        >>> trades_loss(clean, torch.tensor([0]), adversarial_logits=clean)  # nothing moved: cross-entropy
        tensor(0.3133)
    """
    check_range("beta", beta, 0.0, float("inf"))
    values, weights = classification_rows(
        partial(_trades_values, beta=beta),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        companions={"adversarial_logits": adversarial_logits},
    )
    return reduce(values, weights, reduction, denominator)


def adversarial_cross_entropy_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    adversarial_logits: Float[Tensor, "*batch classes"],
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Adversarial (PGD) training: cross-entropy at the perturbed input, ``-log p_y(x')``.

    Args:
        logits: (N, C) or (N, T, C) scores of the clean inputs, which only give the shape.
        target: labels in [0, C), or probabilities of the shape of ``logits``.
        adversarial_logits: scores of the perturbed inputs, of the shape of ``logits``.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label out of range or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083.

    Example:
        >>> import torch
        >>> moved = torch.tensor([[1.0, 0.0]])
        >>> adversarial_cross_entropy_loss(moved.flip(1), torch.tensor([0]), adversarial_logits=moved)
        tensor(0.3133)
    """
    values, weights = classification_rows(
        _moved_values,
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        companions={"adversarial_logits": adversarial_logits},
    )
    return reduce(values, weights, reduction, denominator)


def trades_attack(
    model: torch.nn.Module,
    inputs: Tensor,
    target: Tensor,
    *,
    radius: float = 8 / 255,
    steps: int = 10,
    step_size: float | None = None,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """The inner maximisation of TRADES: PGD on ``KL(p(x) || p(x'))`` from ``x + 0.001 N(0, 1)``.

    Args:
        model: inputs to logits (N, C); attacked in evaluation mode and given its modes back.
        inputs: (N, ...) clean inputs, within ``bounds``.
        target: not used: the attack moves away from the model's own output.
        radius: size of the ball.
        steps: number of ascent steps.
        step_size: length of a step; ``2.5 * radius / steps`` if not given.
        norm: ``"linf"`` or ``"l2"``.
        bounds: lowest and highest legal input value, or ``None``.
        generator: source of the random start.

    Returns:
        Perturbed inputs of the shape of ``inputs``, detached.

    Raises:
        ValueError: for a parameter out of range, or inputs outside ``bounds``.
        TypeError: for a wrong dtype.

    Source:
        Theoretically Principled Trade-off between Robustness and Accuracy, arXiv 1901.08573.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> moved = trades_attack(model, torch.full((1, 2), 0.5), torch.tensor([0]), radius=0.1)
        >>> bool((moved - 0.5).abs().max() <= 0.1 + 1e-6)
        True
    """
    with evaluation_mode(model):
        with torch.no_grad():
            clean = at_least_float32(model(inputs)).log_softmax(-1)

        def divergence(moved: Tensor) -> Tensor:
            output = at_least_float32(model(moved)).log_softmax(-1)
            return (clean.exp() * (clean - output)).sum()

        return pgd_attack(
            divergence,
            inputs,
            radius=radius,
            steps=steps,
            step_size=step_size,
            norm=norm,
            bounds=bounds,
            start="gaussian",
            generator=generator,
        )


class TRADESLoss(AdversarialRowsLoss):
    """TRADES; see :func:`trades_loss`.

    Example:
        >>> import torch
        >>> clean = torch.tensor([[1.0, 0.0]])
        >>> TRADESLoss()(clean, torch.tensor([0]), adversarial_logits=clean)
        tensor(0.3133)
    """

    space = {"beta": log_uniform(0.5, 20.0)}
    attack = staticmethod(trades_attack)

    def __init__(
        self,
        beta: float = 6.0,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        check_range("beta", beta, 0.0, float("inf"))
        self.beta = beta

    def _formula(self, logits: Tensor, target: Tensor, adversarial_logits: Tensor) -> Tensor:
        return _trades_values(logits, target, adversarial_logits, beta=self.beta)


class AdversarialCrossEntropyLoss(AdversarialRowsLoss):
    """Adversarial (PGD) training; see :func:`adversarial_cross_entropy_loss`.

    Example:
        >>> import torch
        >>> moved = torch.tensor([[1.0, 0.0]])
        >>> AdversarialCrossEntropyLoss()(moved.flip(1), torch.tensor([0]), adversarial_logits=moved)
        tensor(0.3133)
    """

    def _formula(self, logits: Tensor, target: Tensor, adversarial_logits: Tensor) -> Tensor:
        return _moved_values(logits, target, adversarial_logits)
