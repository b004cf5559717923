"""Derivatives of row-wise losses written by hand, for the fused output layer.

Each takes logits (M, C) and labels (M,), returns values (M,) and slopes (M,), and leaves ``g`` in the logits, with
``d values / d logits = slope * g``: one buffer instead of the several that autograd keeps for every chunk.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from telos.kernels.fused_linear import softmax_nll_
from telos.losses._algebra import ClassificationLoss
from telos.losses.classification.comp_sum import CompSumLoss, _phi
from telos.losses.classification.cross_entropy import CrossEntropyLoss, LabelSmoothingLoss
from telos.losses.classification.focal import FocalLoss
from telos.losses.classification.ldr import LDRKLLoss, WestonWatkinsLoss
from telos.losses.classification.noise_robust import _MAE_TAU, GCELoss, MAELoss, SCELoss
from telos.losses.classification.stablemax import StableMaxCrossEntropyLoss
from telos.losses.classification.z_loss import (
    SphericalMSELoss,
    SphericalSoftmaxLoss,
    TaylorSoftmaxLoss,
    ZLoss,
)

Derivative = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def row_derivative(loss: ClassificationLoss) -> Derivative | None:
    """The derivative of a loss on labels, where there is one.

    Exact types only: a subclass may have changed the formula.
    """
    kind = type(loss)
    if kind is CrossEntropyLoss:
        return lambda logits, target: comp_sum(logits, target, 1.0)
    if kind in (CompSumLoss, GCELoss, MAELoss):
        tau = comp_sum_tau(loss)
        return lambda logits, target: comp_sum(logits, target, tau)
    if isinstance(loss, FocalLoss) and kind is FocalLoss:
        gamma = loss.gamma
        return lambda logits, target: focal(logits, target, gamma)
    if isinstance(loss, SCELoss) and kind is SCELoss:
        alpha, reverse = loss.alpha, -loss.beta * loss.log_zero
        return lambda logits, target: symmetric(logits, target, alpha, reverse)
    if isinstance(loss, LabelSmoothingLoss) and kind is LabelSmoothingLoss:
        smoothing = loss.smoothing
        return lambda logits, target: label_smoothing(logits, target, smoothing)
    if isinstance(loss, LDRKLLoss) and kind is LDRKLLoss and loss.normalize is None:
        temperature, margin = loss.temperature, loss.margin
        return lambda logits, target: ldr_kl(logits, target, temperature, margin)
    if isinstance(loss, WestonWatkinsLoss) and kind is WestonWatkinsLoss:
        at = loss.margin
        return lambda logits, target: weston_watkins(logits, target, at)
    if kind is StableMaxCrossEntropyLoss:
        return stablemax
    if isinstance(loss, ZLoss) and kind is ZLoss:
        a, b, eps = loss.a, loss.b, loss.eps
        return lambda logits, target: z_score(logits, target, a, b, eps)
    if isinstance(loss, SphericalSoftmaxLoss) and kind is SphericalSoftmaxLoss:
        floor = loss.eps
        return lambda logits, target: spherical_softmax(logits, target, floor)
    if kind is TaylorSoftmaxLoss:
        return taylor_softmax
    if kind is SphericalMSELoss:
        return squared_error
    return None


def comp_sum_tau(loss: ClassificationLoss) -> float:
    """The exponent by which a comp-sum loss, GCE or MAE is ``Phi_tau`` of the negative log-likelihood."""
    if isinstance(loss, CompSumLoss):
        return loss.tau
    return 1 + loss.q if isinstance(loss, GCELoss) else _MAE_TAU


def comp_sum(logits: Tensor, target: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """``Phi_tau(nll)``, with slope ``p_y^(tau - 1)``."""
    nll = softmax_nll_(logits, target)
    if tau == 1:
        return nll, torch.ones_like(nll)
    return _phi(nll, tau), ((1 - tau) * nll).exp()


def focal(logits: Tensor, target: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """``m^gamma nll`` of the miss ``m = 1 - p_y``, with slope ``m^gamma + gamma m^(gamma - 1) p_y nll``."""
    nll = softmax_nll_(logits, target)
    miss = (-torch.expm1(-nll)).clamp_min(torch.finfo(nll.dtype).tiny)
    weight = miss.pow(gamma)
    return weight * nll, weight + gamma * miss.pow(gamma - 1) * (-nll).exp() * nll


def symmetric(logits: Tensor, target: Tensor, alpha: float, reverse: float) -> tuple[Tensor, Tensor]:
    """Symmetric cross-entropy: ``alpha nll + reverse Phi(nll)`` with the Phi of MAE, whose slope is ``p_y``."""
    nll = softmax_nll_(logits, target)
    return alpha * nll + reverse * _phi(nll, _MAE_TAU), alpha + reverse * ((1 - _MAE_TAU) * nll).exp()


def label_smoothing(logits: Tensor, target: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """``(1 - s) nll_y + s mean_k nll_k``: ``g = p - (1 - s) onehot - s / C``."""
    classes, column = logits.shape[-1], target.unsqueeze(-1)
    own, mean = logits.gather(-1, column), logits.mean(-1)
    nll = softmax_nll_(logits, target)
    logits.sub_(smoothing / classes)
    logits.scatter_add_(-1, column, torch.full_like(own, smoothing))
    return nll + smoothing * (own.squeeze(-1) - mean), torch.ones_like(nll)


def ldr_kl(logits: Tensor, target: Tensor, temperature: float, margin: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``(logits - margin onehot) / T``, times T, less ``T log C``."""
    column = target.unsqueeze(-1)
    logits.scatter_add_(-1, column, torch.full_like(logits[:, :1], -margin))
    if temperature != 1:
        logits.div_(temperature)
    nll = softmax_nll_(logits, target)
    return temperature * (nll - math.log(logits.shape[-1])), torch.ones_like(nll)


def weston_watkins(logits: Tensor, target: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """``mean_k max(0, margin + o_k - o_y)`` over the other classes."""
    classes, column = logits.shape[-1], target.unsqueeze(-1)
    logits.sub_(logits.gather(-1, column) - margin).clamp_(min=0)
    logits.scatter_(-1, column, 0.0)
    values = logits.mean(-1)
    logits.sign_()
    logits.scatter_(-1, column, -logits.sum(-1, keepdim=True))
    return values, torch.full_like(values, 1 / classes)


def stablemax(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``log sum_k s(z_k) - log s(z_y)``.

    With ``w = 1 / (1 + max(-z, 0))`` the function is ``s = w + max(z, 0)`` and its slope ``w^2``;
    ``d log s(z) / dz = 1 / (1 + |z|)``.
    """
    column = target.unsqueeze(-1)
    own = logits.gather(-1, column)
    positive = torch.relu(logits).sum(-1, keepdim=True)
    logits.clamp_(max=0).neg_().add_(1).reciprocal_()
    total = logits.sum(-1, keepdim=True) + positive
    logits.square_()
    logits.scatter_add_(-1, column, -total / (1 + own.abs()))
    log_own = torch.where(own < 0, -1.0, 1.0) * torch.log1p(own.abs())
    return (total.log() - log_own).squeeze(-1), (1 / total).squeeze(-1)


def z_score(logits: Tensor, target: Tensor, a: float, b: float, eps: float) -> tuple[Tensor, Tensor]:
    """Z-loss: ``d loss / d o_k = -(g / std) (1[k = y] - 1/D - z_y z_k / D)``, ``g = sigmoid(a (b - z_y))``."""
    classes, column = logits.shape[-1], target.unsqueeze(-1)
    mean = logits.mean(-1, keepdim=True)
    logits.sub_(mean)
    logits.sub_(logits.mean(-1, keepdim=True))
    spread = torch.linalg.vector_norm(logits, dim=-1, keepdim=True) / math.sqrt(classes)
    # a row that is constant to rounding is left unscaled, with the derivative of its centred logit
    constant = spread <= torch.finfo(logits.dtype).eps * mean.abs()
    scale = torch.where(constant, torch.ones_like(spread), spread + eps)
    own = logits.gather(-1, column) / scale
    values = -F.logsigmoid(a * (own - b)) / a
    slope = -torch.sigmoid(a * (b - own)) / scale
    # d z_y / d o_k of centred c: (1[k = y] - 1/D) / scale - c_y c_k / (D spread scale^2)
    factor = torch.where(
        constant, torch.zeros_like(own), own / (classes * torch.where(constant, 1.0, spread))
    )
    logits.mul_(-factor).sub_(1 / classes)
    logits.scatter_add_(-1, column, torch.ones_like(own))
    return values.squeeze(-1), slope.squeeze(-1)


def spherical_softmax(logits: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``log q - log(o_y^2 + eps)`` with ``q = sum o^2 + C eps``: ``g = o - onehot o_y q / (o_y^2 + eps)``."""
    return _quadratic(logits, target, constant=eps)


def taylor_softmax(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The same on ``o + 1`` with eps 1: ``1 + o + o^2 / 2 = ((o + 1)^2 + 1) / 2``."""
    return _quadratic(logits.add_(1), target, constant=1.0)


def _quadratic(logits: Tensor, target: Tensor, constant: float) -> tuple[Tensor, Tensor]:
    column = target.unsqueeze(-1)
    own = logits.gather(-1, column)
    squares = torch.linalg.vector_norm(logits, dim=-1, keepdim=True).square()
    total, term = squares + logits.shape[-1] * constant, own.square() + constant
    logits.scatter_add_(-1, column, -own * total / term)
    return (total.log() - term.log()).squeeze(-1), (2 / total).squeeze(-1)


def squared_error(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_k (o_k - onehot_k)^2``."""
    column = target.unsqueeze(-1)
    own = logits.gather(-1, column)
    values = torch.linalg.vector_norm(logits, dim=-1).square() - 2 * own.squeeze(-1) + 1
    logits.scatter_add_(-1, column, torch.full_like(own, -1.0))
    return values, torch.full_like(values, 2.0)


def adaptive_ldr_kl(
    logits: Tensor, target: Tensor, old: Tensor, *, temperature: float, alpha: float, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ALDR-KL on scores ``f = C s / S``, ``s = softplus(z)`` of sum S, and the new temperatures (M,).

    With ``g = p* - onehot`` the gradient of LDR-KL in the scores::

        d / dz_j = (C / S) (g_j - sum_k g_k s_k / S) sigmoid(z_j),    sigmoid(z) = 1 - exp(-s)

    Scores do not see a common factor of s. A row that lies below -36 altogether, where ``s = exp(z)``, is first
    raised to -36, so that its sum cannot underflow. As p adds up to 1, its divergence from the uniform distribution is
    ``sum_k p_k log p_k + log C``, and the smoothing of p can stay outside the sum.
    """
    classes, column = logits.shape[-1], target.unsqueeze(-1)
    old = old.to(logits.dtype).unsqueeze(-1)
    logits.sub_((logits.amax(-1, keepdim=True) + 36).clamp_(max=0))
    soft = F.softplus(logits)
    total = soft.sum(-1, keepdim=True)
    # one step of the temperature from p = softmax(f / old), smoothed by 1e-5
    p = torch.mul(soft, classes / (total * old), out=logits)
    whole = 1 + 1e-5 * classes
    torch.softmax(p, -1, out=p).add_(1e-5)
    divergence = torch.linalg.vecdot(p, p.log()).div_(whole).add_(math.log(classes / whole))
    divergence = divergence.clamp_min_(0).unsqueeze(-1)
    new = temperature * (1 - divergence / (alpha * math.log(classes)))
    torch.mul(soft, classes / (total * new), out=logits)
    logits.scatter_add_(-1, column, -margin / new)
    nll = softmax_nll_(logits, target)
    penalty = alpha * math.log(classes) / (2 * temperature) * (new - temperature).square()
    values = new.squeeze(-1) * (nll - math.log(classes)) - penalty.squeeze(-1)
    inner = torch.linalg.vecdot(logits, soft).unsqueeze(-1) / total
    logits.sub_(inner).mul_(soft.neg_().expm1_())
    return values, (-classes / total).squeeze(-1), new.squeeze(-1)
