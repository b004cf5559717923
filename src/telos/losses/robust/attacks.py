"""Attacks: the inner maximisation of robust training, in any space (pixels or embeddings)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from telos.losses._algebra import Loss
from telos.losses._checks import check_floating, check_range, values_can_be_read


def pgd_attack(
    objective: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    radius: float,
    steps: int = 10,
    step_size: float | None = None,
    norm: str = "linf",
    bounds: tuple[float, float] | None = None,
    start: str = "uniform",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent on ``objective`` within a ball around every example (PGD).

    A step moves each example along the steepest ascent direction of the norm and projects back::

        x' <- clip_bounds( project_ball( x' + step_size * direction ) )
        direction = sign(gradient)  for l-inf,   gradient / ||gradient||_2  for l-2

    One step from ``start="zero"`` is the fast gradient sign method (FGSM).

    Args:
        objective: perturbed inputs (N, ...) to a scalar that adds up over examples; it is maximised.
        inputs: (N, ...) centres of the balls: pixels, embeddings, any floating-point space.
        radius: radius of the ball, at least 0, in the unit of ``inputs``.
        steps: number of ascent steps, at least 0.
        step_size: length of a step; ``2.5 * radius / steps`` if not given.
        norm: ``"linf"`` or ``"l2"``, per example over all other dimensions.
        bounds: lowest and highest legal value, which ``inputs`` keep to; ``None`` for an unbounded space.
        start: ``"uniform"`` draws inside the ball, ``"gaussian"`` starts at ``x + 0.001 * N(0, 1)``,
            ``"zero"`` at x.
        generator: source of the random start.

    Returns:
        Perturbed inputs, detached, of the shape and dtype of ``inputs``. Parameter gradients are not touched.

    Raises:
        ValueError: for an unknown norm or start, a parameter out of range, or inputs outside ``bounds``.
        TypeError: if ``inputs`` are not floating point.

    Source:
        Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083; FGSM: Explaining and
        Harnessing Adversarial Examples, arXiv 1412.6572.

    Example:
        >>> import torch
        >>> weight = torch.tensor([1.0, -2.0])
        >>> pgd_attack(lambda x: (x @ weight).sum(), torch.zeros(1, 2), radius=0.5, start="zero")
        tensor([[ 0.5000, -0.5000]])
    """
    _check_attack(radius, steps, step_size, norm, bounds, start)
    check_floating("inputs", inputs)
    if inputs.ndim < 2:
        raise ValueError(
            f"inputs must have shape (N, ...) with at least two dimensions, got {tuple(inputs.shape)}"
        )
    if bounds is not None:
        _check_inside("inputs", inputs, bounds)
    step_size = 2.5 * radius / max(steps, 1) if step_size is None else step_size
    centre = inputs.detach()

    def project(moved: Tensor) -> Tensor:
        moved = centre + _project(moved - centre, radius, norm)
        # the centre lies within the bounds, so that this only brings a point closer to it
        return moved if bounds is None else moved.clamp(*bounds)

    moved = project(centre + _start(centre, radius, norm, start, generator))
    for _ in range(steps):
        with torch.enable_grad():
            moved = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(moved), moved)
        direction = gradient.sign() if norm == "linf" else _unit(gradient)
        moved = project(moved.detach() + step_size * direction)
    return moved.detach()


class AdversarialLoss(Loss):
    """A loss at its worst point within a ball, as :func:`pgd_attack` finds it: adversarial training.

    ::

        max over ||x' - x|| <= radius of base(model(x'), target)

    The attack runs with ``model`` and ``base`` in evaluation mode, so that it moves no running statistics and
    no state; every submodule's own mode is back before the loss itself is computed. Parameter gradients come
    from the last call of the model alone.

    Args:
        base: any ``nn.Module`` with the call ``base(logits, target)``.
        radius: radius of the ball, in the unit of the inputs.
        steps: number of ascent steps.
        step_size: length of a step; ``2.5 * radius / steps`` if not given.
        norm: ``"linf"`` or ``"l2"``.
        bounds: lowest and highest legal input value, or ``None``.
        start: ``"uniform"``, ``"gaussian"`` or ``"zero"``; see :func:`pgd_attack`.

    Raises:
        ValueError: for an unknown norm or start, or a parameter out of range.

    Source:
        Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083.

    Example:
        >>> import torch
        >>> model, inputs = torch.nn.Linear(2, 3), torch.zeros(4, 2)
        >>> target = torch.tensor([0, 1, 2, 0])
        >>> base = torch.nn.CrossEntropyLoss()
        >>> bool(AdversarialLoss(base, radius=0.1)(model, inputs, target) > base(model(inputs), target))
        True
    """

    family = "robust"
    space = {}
    """Not searched: ``radius``, which is the threat, and ``steps`` and ``step_size``: a weaker attack would win."""

    def __init__(
        self,
        base: nn.Module,
        radius: float = 8 / 255,
        steps: int = 10,
        step_size: float | None = None,
        *,
        norm: str = "linf",
        bounds: tuple[float, float] | None = None,
        start: str = "uniform",
    ) -> None:
        super().__init__()
        _check_attack(radius, steps, step_size, norm, bounds, start)
        self.base = base
        self.radius, self.steps, self.step_size = radius, steps, step_size
        self.norm, self.bounds, self.start = norm, bounds, start

    def forward(
        self,
        model: Callable[[Tensor], Tensor],
        inputs: Tensor,
        target: Tensor,
        *,
        generator: torch.Generator | None = None,
        **keywords: Any,
    ) -> Tensor:
        """``base(model(x'), target, **keywords)``; ``generator`` is the source of the random start."""
        with evaluation_mode(model, self.base):
            attacked = pgd_attack(
                lambda moved: self.base(model(moved), target, **keywords).sum(),
                inputs,
                radius=self.radius,
                steps=self.steps,
                step_size=self.step_size,
                norm=self.norm,
                bounds=self.bounds,
                start=self.start,
                generator=generator,
            )
        return self.base(model(attacked), target, **keywords)

    def extra_repr(self) -> str:
        """The attack, for ``print``."""
        return f"radius={self.radius:g}, steps={self.steps}, norm={self.norm!r}, bounds={self.bounds}"


@contextmanager
def evaluation_mode(*models: object) -> Iterator[None]:
    """Evaluation mode for those ``models`` that are modules; afterwards each submodule is in its own mode."""
    modules: list[nn.Module] = [model for model in models if isinstance(model, nn.Module)]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    roots = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, training in zip(modules, roots, strict=True):
            module.train(training)
        for part, training in modes:
            part.training = training


def _check_attack(
    radius: float,
    steps: int,
    step_size: float | None,
    norm: str,
    bounds: tuple[float, float] | None,
    start: str,
) -> None:
    check_range("radius", radius, 0.0, float("inf"))
    check_range("steps", steps, 0, float("inf"))
    if step_size is not None:
        check_range("step_size", step_size, 0.0, float("inf"))
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    if start not in ("uniform", "gaussian", "zero"):
        raise ValueError(f"start must be 'uniform', 'gaussian' or 'zero', got {start!r}")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (lowest, highest) with lowest < highest, got {bounds}")


def _check_inside(name: str, inputs: Tensor, bounds: tuple[float, float]) -> None:
    """Refuse standardised pixels where [0, 1] was promised: a clamp would quietly ruin them."""
    if inputs.numel() and values_can_be_read(inputs):
        low, high = float(inputs.min()), float(inputs.max())
        # inputs in half precision may round a bound outwards
        slack = torch.finfo(inputs.dtype).eps * max(abs(bounds[0]), abs(bounds[1]))
        if low < bounds[0] - slack or high > bounds[1] + slack:
            raise ValueError(f"{name} must lie within bounds {bounds}, got values from {low:g} to {high:g}")


def _norm(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).norm(dim=1).reshape(-1, *[1] * (tensor.ndim - 1))


def _unit(tensor: Tensor) -> Tensor:
    # divided by the largest entry first: squares of a vanishing gradient underflow and would stall the attack
    largest = tensor.abs().flatten(1).amax(1).reshape(-1, *[1] * (tensor.ndim - 1))
    scaled = tensor / torch.where(largest > 0, largest, 1.0)
    length = _norm(scaled)
    return scaled / torch.where(length > 0, length, 1.0)


def _project(shift: Tensor, radius: float, norm: str) -> Tensor:
    if norm == "linf":
        return shift.clamp(-radius, radius)
    length = _norm(shift)
    return torch.where(length > radius, shift * (radius / torch.where(length > 0, length, 1.0)), shift)


def _start(centre: Tensor, radius: float, norm: str, start: str, generator: torch.Generator | None) -> Tensor:
    device = centre.device if generator is None else generator.device

    def draw(source: Callable[..., Tensor]) -> Tensor:
        return source(centre.shape, generator=generator, dtype=centre.dtype, device=device).to(centre.device)

    if start == "zero":
        return torch.zeros_like(centre)
    if start == "gaussian":
        return 0.001 * draw(torch.randn)
    if norm == "linf":
        return radius * (2 * draw(torch.rand) - 1)
    # a uniform point of the ball: a random direction, at a distance whose d-th power is uniform
    direction, uniform = _unit(draw(torch.randn)), draw(torch.rand)
    distance = uniform.flatten(1)[:, :1].reshape(-1, *[1] * (centre.ndim - 1))
    return radius * distance ** (1 / math.prod(centre.shape[1:])) * direction
