"""Numerical stability of a classifier that fits its training set: softmax collapse and weight scaling."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor
from torchmetrics import Metric


def softmax_collapse(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, ""]:
    r"""Share of examples whose sum of exponentials has rounded to its largest term.

    ::

        mean_i [ sum_j exp(z_ij - max_j z_ij) == 1 ]          in the dtype of the logits

    There the softmax is exactly one-hot; where its class is correct, the gradient of cross-entropy with
    respect to that class's logit is exactly 0. It takes a gap between the two largest logits of about 5.6 in
    bfloat16, 7.7 in float16, 16.7 in float32 and 36.8 in float64. Pass the logits in the dtype in which the
    loss is computed.

    Args:
        logits: (..., C) scores.

    Returns:
        A float32 scalar in [0, 1]; 0 without examples.

    Raises:
        TypeError: for logits that are not floating point.

    Source:
        Grokking at the Edge of Numerical Stability, arXiv 2501.04697.

    Example:
        >>> import torch
        >>> softmax_collapse(torch.tensor([[20.0, 0.0, 0.0], [5.0, 0.0, 0.0]]))
        tensor(0.5000)
    """
    return _share(_collapsed(logits))


def zero_term_fraction(
    logits: Float[Tensor, "*batch classes"], target: Integer[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    r"""Share of examples whose cross-entropy is exactly 0: correct and collapsed, they no longer teach
    anything.

    Args:
        logits: (..., C) scores, in the dtype in which the loss is computed.
        target: (...) labels.

    Returns:
        A float32 scalar in [0, 1]; 0 without examples.

    Raises:
        ValueError: for a target of another shape.
        TypeError: for logits that are not floating point.

    Source:
        Grokking at the Edge of Numerical Stability, arXiv 2501.04697.

    Example:
        >>> import torch
        >>> zero_term_fraction(torch.tensor([[20.0, 0.0], [20.0, 0.0]]), torch.tensor([0, 1]))
        tensor(0.5000)
    """
    _check_logits(logits)
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"target must have shape {tuple(logits.shape[:-1])}, got {tuple(target.shape)}")
    losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
    return _share(losses == 0)


def nlm_alignment(params: Iterable[Tensor] | Tensor) -> Float[Tensor, ""]:
    r"""Cosine between the descent direction and the weights, over all parameters as one vector.

    ::

        cos(-g, w) = -<w, g> / (|w| |g|)

    In a network that is positively homogeneous in its weights, 1 means that the next step of gradient descent
    only scales the logits (naive loss minimisation).

    Args:
        params: parameters with gradients in ``.grad``; those without one are passed over.

    Returns:
        A scalar in [-1, 1]; 0 where the weights or the gradients vanish.

    Raises:
        ValueError: if no parameter has a gradient.

    Source:
        Grokking at the Edge of Numerical Stability, arXiv 2501.04697.

    Example:
        >>> import torch
        >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> weight.grad = torch.tensor([-6.0, -8.0])
        >>> nlm_alignment([weight])
        tensor(1.)
    """
    tensors = [params] if isinstance(params, Tensor) else params
    pairs = [(p.detach(), p.grad) for p in tensors if p.grad is not None]
    if not pairs:
        raise ValueError("params must hold at least one parameter with a gradient, got none")
    aligned = weight_square = gradient_square = torch.zeros(
        (), dtype=torch.float64, device=pairs[0][0].device
    )
    for weight, gradient in pairs:
        weight, gradient = weight.to(aligned), gradient.to(aligned)
        aligned = aligned + (weight * gradient).sum()
        weight_square = weight_square + weight.square().sum()
        gradient_square = gradient_square + gradient.square().sum()
    lengths = weight_square.sqrt() * gradient_square.sqrt()
    return torch.where(lengths > 0, -aligned / lengths, 0.0).float()


class SoftmaxCollapse(Metric):
    """Share of examples in softmax collapse, over batches and ranks; see :func:`softmax_collapse`.

    Example:
        >>> import torch
        >>> metric = SoftmaxCollapse()
        >>> metric.update(torch.tensor([[20.0, 0.0, 0.0]]))
        >>> metric.update(torch.tensor([[5.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        >>> metric.compute()
        tensor(0.2500)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    collapsed: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("collapsed", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Count the collapsed rows of logits (..., C)."""
        collapsed = _collapsed(logits)
        self.collapsed += collapsed.sum()
        self.total += collapsed.numel()

    def compute(self) -> Tensor:
        """The share so far, 0 without examples."""
        return self.collapsed / self.total.clamp_min(1)


def _collapsed(logits: Tensor) -> Tensor:
    _check_logits(logits)
    logits = logits.detach()
    return (logits - logits.amax(-1, keepdim=True)).exp().sum(-1) == 1


def _share(flags: Tensor) -> Tensor:
    return flags.sum() / max(flags.numel(), 1)


def _check_logits(logits: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must have a floating-point dtype, got {logits.dtype}")
    if logits.ndim < 2 or logits.shape[-1] < 1:
        raise ValueError(
            f"logits must have shape (..., C) with at least one class, got {tuple(logits.shape)}"
        )
