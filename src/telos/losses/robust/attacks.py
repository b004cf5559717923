"""Attacks: the inner maximisation of robust training, in any space (pixels or embeddings)."""

from collections.abc import Callable

import torch
from torch import Tensor

from telos.losses._checks import check_floating, check_range


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
    """Projected gradient ascent on ``objective`` within a ball around every example.

    A step moves each example by ``step_size`` along the steepest ascent direction of the norm (the sign of the
    gradient for l-inf, the normalised gradient for l-2), projects back onto the ball, then onto ``bounds``.

    Args:
        objective: perturbed inputs (N, ...) to a scalar that adds up over examples; it is maximised.
        inputs: (N, ...) centres of the balls: pixels, embeddings, any floating-point space.
        radius: radius of the ball, at least 0.
        steps: number of ascent steps, at least 0.
        step_size: length of a step; ``2.5 * radius / steps`` if not given.
        norm: ``"linf"`` or ``"l2"``, per example over all other dimensions.
        bounds: lowest and highest legal value, or ``None`` for an unbounded space.
        start: ``"uniform"`` draws inside the ball, ``"gaussian"`` starts at ``x + 0.001 * N(0, 1)``, ``"zero"`` at x.
        generator: source of the random start.

    Returns:
        Perturbed inputs, detached, of the shape and dtype of ``inputs``. Parameter gradients are not touched.

    Raises:
        ValueError: for an unknown norm or start, or a parameter out of range.
        TypeError: if ``inputs`` are not floating point.

    Source:
        Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083.

    Example:
        >>> import torch
        >>> weight = torch.tensor([1.0, -2.0])
        >>> pgd_attack(lambda x: (x @ weight).sum(), torch.zeros(1, 2), radius=0.5, start="zero")
        tensor([[ 0.5000, -0.5000]])
    """
    check_floating("inputs", inputs)
    check_range("radius", radius, 0.0, float("inf"))
    check_range("steps", steps, 0, float("inf"))
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    if start not in ("uniform", "gaussian", "zero"):
        raise ValueError(f"start must be 'uniform', 'gaussian' or 'zero', got {start!r}")
    step_size = 2.5 * radius / max(steps, 1) if step_size is None else step_size
    centre = inputs.detach()

    def project(moved: Tensor) -> Tensor:
        moved = centre + _project(moved - centre, radius, norm)
        return moved if bounds is None else moved.clamp(*bounds)

    moved = project(centre + _start(centre, radius, norm, start, generator))
    for _ in range(steps):
        with torch.enable_grad():
            moved = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(moved), moved)
        direction = gradient.sign() if norm == "linf" else gradient / _norm(gradient).clamp_min(1e-12)
        moved = project(moved.detach() + step_size * direction)
    return moved.detach()


def _norm(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).norm(dim=1).reshape(-1, *[1] * (tensor.ndim - 1))


def _project(shift: Tensor, radius: float, norm: str) -> Tensor:
    if norm == "linf":
        return shift.clamp(-radius, radius)
    return shift * (radius / _norm(shift).clamp_min(1e-12)).clamp_max(1.0)


def _start(
    centre: Tensor, radius: float, norm: str, start: str, generator: torch.Generator | None
) -> Tensor:
    if start == "zero":
        return torch.zeros_like(centre)
    device = centre.device if generator is None else generator.device
    noise = torch.randn(centre.shape, generator=generator, dtype=centre.dtype, device=device).to(centre.device)
    if start == "gaussian":
        return 0.001 * noise
    uniform = torch.rand(centre.shape, generator=generator, dtype=centre.dtype, device=device).to(centre.device)
    if norm == "linf":
        return radius * (2 * uniform - 1)
    # a uniform point of the ball: a random direction, at a distance whose d-th power is uniform
    dimension = max(centre[0].numel(), 1) if centre.shape[0] else 1
    distance = uniform.flatten(1)[:, :1].reshape(-1, *[1] * (centre.ndim - 1)) ** (1 / dimension)
    return radius * distance * noise / _norm(noise).clamp_min(1e-12)
