"""PerpGrad: any optimizer on the part of each gradient that does not merely rescale the weights."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Scope: TypeAlias = Literal["tensor", "global"]


def orthogonalize_(
    params: Iterable[Tensor] | Tensor,
    scope: Scope = "tensor",
    rescale: bool = True,
    min_numel: int = 2,
    eps: float = 1e-30,
) -> None:
    r"""Replace gradients by their part orthogonal to the weights, in place.

    For weights w with gradient g, both flattened::

        g_perp = g - <w, g> / (<w, w> + eps) * w
        g_out  = g_perp * |g| / (|g_perp| + eps)         the last factor with rescale

    Past the point where a network fits its training set, cross-entropy can be lowered by scaling the weights
    alone; this takes that direction out. Where g is parallel to w to rounding, g_out is 0; where w is 0, g
    stays. Half precision is computed in float32. Nothing is read back from the device.

    The paper states the projection of the whole weight vector; the authors' code projects each tensor and
    rescales, and so do the defaults here.

    Args:
        params: parameters with gradients in ``.grad``; those without one are passed over.
        scope: ``"tensor"`` projects each tensor by itself, ``"global"`` all of them as one vector.
        rescale: give g_out the norm of g.
        min_numel: smaller tensors keep their gradient: a single number (a learned temperature) has no
            orthogonal direction and would freeze.
        eps: added to denominators.

    Raises:
        ValueError: for an unknown scope or ``min_numel`` below 1.
        TypeError: for a sparse gradient.

    Source:
        Grokking at the Edge of Numerical Stability, arXiv 2501.04697.

    Example:
        >>> import torch
        >>> weight = torch.tensor([3.0, 0.0], requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> orthogonalize_([weight])
        >>> weight.grad
        tensor([0., 5.])
    """
    _check(scope, min_numel)
    tensors = [params] if isinstance(params, Tensor) else params
    pairs = [(p, p.grad) for p in tensors if p.grad is not None and p.numel() >= min_numel]
    for parameter, gradient in pairs:
        if gradient.layout != torch.strided:
            raise TypeError(
                f"orthogonalize_ needs dense gradients, got {gradient.layout} for a parameter of shape "
                f"{tuple(parameter.shape)}; build the embedding with sparse=False"
            )
    with torch.no_grad():
        for group in [pairs] if scope == "global" and pairs else [[pair] for pair in pairs]:
            _project(group, rescale, eps)


class PerpGrad(torch.optim.Optimizer):
    """Any optimizer, fed with gradients orthogonal to the weights; see :func:`orthogonalize_`.

    A thin shell around ``base_optimizer``: parameter groups, state and ``state_dict`` are those of the base,
    so a learning-rate schedule, ``GradScaler`` or a checkpoint written for one works with the other. ``step``
    leaves the projected gradients in ``.grad``. A closure is evaluated first, then the gradients are
    projected, then the base steps without it (the authors' code projects before the closure, whose gradients
    then escape).

    Under data parallelism gradients are averaged in the backward pass, that is, before the projection, as
    they should be. Sharded parameters would need the inner products of the whole tensor, which this does not
    gather.

    Args:
        base_optimizer: any optimizer whose step needs no closure.
        scope: ``"tensor"`` or ``"global"``.
        rescale: give the projected gradient the norm of the original.
        min_numel: smaller tensors keep their gradient.
        eps: added to denominators.

    Raises:
        TypeError: for a base that is no optimizer, or that needs a closure (LBFGS).
        ValueError: for an unknown scope or ``min_numel`` below 1.

    Source:
        Grokking at the Edge of Numerical Stability, arXiv 2501.04697.

    Example:
        >>> import torch
        >>> weight = torch.tensor([3.0, 0.0], requires_grad=True)
        >>> optimizer = PerpGrad(torch.optim.SGD([weight], lr=0.1))
        >>> (3 * weight[0] + 4 * weight[1]).backward()
        >>> optimizer.step()
        >>> weight.detach()
        tensor([ 3.0000, -0.5000])
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        scope: Scope = "tensor",
        rescale: bool = True,
        min_numel: int = 2,
        eps: float = 1e-30,
    ) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"base_optimizer must be a torch.optim.Optimizer, got {type(base_optimizer).__name__}"
            )
        if isinstance(base_optimizer, torch.optim.LBFGS):
            raise TypeError("base_optimizer must step without a closure, got LBFGS")
        _check(scope, min_numel)
        self.base_optimizer = base_optimizer
        self.scope: Scope = scope
        self.rescale, self.min_numel, self.eps = rescale, min_numel, eps
        # Optimizer.__init__ would make groups and state of its own; this sets up the rest, as unpickling does
        self.__setstate__({})

    # Views of the base, since loading a checkpoint gives it new groups and a new state.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups of the base."""
        return self.base_optimizer.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The state of the base."""
        return self.base_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the base."""
        return self.base_optimizer.defaults

    def __getstate__(self) -> dict[str, Any]:
        names = ("base_optimizer", "scope", "rescale", "min_numel", "eps")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the base."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the base, written with or without this shell."""
        self.base_optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base."""
        self.base_optimizer.add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Project the gradients, then step the base; with a closure, first evaluate it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        orthogonalize_(parameters, self.scope, self.rescale, self.min_numel, self.eps)
        self.base_optimizer.step()
        return loss


def _project(group: list[tuple[Tensor, Tensor]], rescale: bool, eps: float) -> None:
    """Project the gradients of ``group``, taken as one vector, off its weights."""
    weights, gradients = [_real(w) for w, _ in group], [_real(g) for _, g in group]
    ratio = _dot(weights, gradients) / (_dot(weights, weights) + eps)
    perpendicular = [g - ratio.to(g) * w for w, g in zip(weights, gradients, strict=True)]
    norm, left = _dot(gradients, gradients).sqrt(), _dot(perpendicular, perpendicular).sqrt()
    factor = norm / (left + eps) if rescale else torch.ones_like(norm)
    # what is left of a parallel gradient is rounding, which must not be blown up to the gradient's norm
    rounding = max(
        max(4 * torch.finfo(g.dtype).eps, torch.finfo(stored.dtype).eps)
        for g, (_, stored) in zip(gradients, group, strict=True)
    )
    factor = torch.where(left <= rounding * norm, torch.zeros_like(norm), factor)
    for (_, stored), g in zip(group, perpendicular, strict=True):
        projected = g * factor.to(g)
        stored.copy_(torch.view_as_complex(projected) if stored.is_complex() else projected)


def _real(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as reals of at least single precision."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _dot(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """The inner product of two vectors that are given in pieces."""
    products = [(x * y).sum() for x, y in zip(first, second, strict=True)]
    total = products[0]
    for product in products[1:]:
        total = total + product.to(total.device)
    return total


def _check(scope: str, min_numel: int) -> None:
    if scope not in ("tensor", "global"):
        raise ValueError(f"scope must be 'tensor' or 'global', got {scope!r}")
    if min_numel < 1:
        raise ValueError(f"min_numel must be at least 1, got {min_numel}")
