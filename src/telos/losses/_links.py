"""Margin links: convex losses of a margin ``s``, which is positive where a prediction is right."""

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic(margin: Tensor) -> Tensor:
    """``log(1 + exp(-s))``, the binary cross-entropy of a margin."""
    return -F.logsigmoid(margin)


def hinge(margin: Tensor, at: float = 1.0) -> Tensor:
    """``max(0, at - s)``: nothing to pay for a margin of ``at`` or more."""
    return torch.relu(at - margin)


def exponential(margin: Tensor) -> Tensor:
    """``exp(-s)``; overflows to infinity for a very negative margin."""
    return torch.exp(-margin)
