"""Exact SGD on an output layer of D classes in O(d^2) per example, for losses of the spherical family.

A spherical loss sees the logits ``o = W h`` (W is D x d) only through the logits of the targets, their sum
and their sum of squares. With ``W = V U + 1 omega^T``, ``Q = W^T W`` and ``w_bar = W^T 1`` these cost O(d^2),
and so does a step of plain SGD: it changes U, omega, Q, w_bar and the few rows of V that belong to targets.
"""

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

SphericalKind: TypeAlias = Literal["z", "mse", "taylor", "spherical"]


class SphericalState(NamedTuple):
    """A D x d weight matrix ``W = V U + 1 omega^T`` in factored form.

    Attributes:
        V: (D, d) rows, of which a step touches those of its targets.
        U: (d, d).
        U_inv_t: (d, d) inverse transpose of U.
        omega: (d,) what is common to all rows.
        Q: (d, d) ``W^T W``.
        w_bar: (d,) sum of the rows of W.
    """

    V: Tensor
    U: Tensor
    U_inv_t: Tensor
    omega: Tensor
    Q: Tensor
    w_bar: Tensor


class SphericalStatistics(NamedTuple):
    """What a spherical loss sees of the logits.

    Attributes:
        selected: logits of the targets, of the shape of ``index``.
        sums: (m,) sum of all D logits.
        squares: (m,) sum of the squares of all D logits.
    """

    selected: Tensor
    sums: Tensor
    squares: Tensor


class SphericalStep(NamedTuple):
    """Result of :func:`spherical_step`.

    Attributes:
        loss: mean over the examples, before the step.
        grad_inputs: (m, d) gradient of ``loss`` with respect to the inputs.
        state: the layer after the step.
    """

    loss: Tensor
    grad_inputs: Tensor
    state: SphericalState


@torch.no_grad()
def spherical_state(weight: Float[Tensor, "classes features"]) -> SphericalState:
    """Factor a weight matrix: ``V = W``, ``U = I``, ``omega = 0``, in O(D d^2).

    Never start from zeros: equal logits have no standard deviation, and the Z-loss no direction.

    Args:
        weight: (D, d), float32 or float64; copied.

    Returns:
        The state.

    Raises:
        ValueError: for a wrong shape.
        TypeError: for another dtype.

    Example:
        >>> import torch
        >>> state = spherical_state(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        >>> state.Q
        tensor([[2., 1.],
                [1., 5.]])
        >>> state.w_bar
        tensor([2., 3.])
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (D, d), got {tuple(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight must be float32 or float64, got {weight.dtype}")
    V = weight.detach().clone()
    identity = torch.eye(V.shape[1], dtype=V.dtype, device=V.device)
    return SphericalState(V, identity, identity.clone(), torch.zeros_like(V[0]), V.T @ V, V.sum(0))


@torch.no_grad()
def spherical_weight(state: SphericalState) -> Tensor:
    """The weight matrix ``W = V U + 1 omega^T`` (D, d), in O(D d^2).

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        >>> bool((spherical_weight(spherical_state(weight)) == weight).all())
        True
    """
    return state.V @ state.U + state.omega


@torch.no_grad()
def spherical_forward(
    state: SphericalState, H: Float[Tensor, "examples features"], index: Integer[Tensor, "examples *targets"]
) -> SphericalStatistics:
    """The statistics of the logits ``H W^T``, without computing them: O(d^2) per example.

    ::

        squares_i = <H_i, Q H_i>    sums_i = <H_i, w_bar>    selected_ik = <U H_i, V[index_ik]> + <H_i, omega>

    Args:
        state: the layer.
        H: (m, d) inputs.
        index: (m,) or (m, K) target classes.

    Returns:
        The three statistics.

    Raises:
        ValueError: for a wrong shape.

    Example:
        >>> import torch
        >>> state = spherical_state(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        >>> spherical_forward(state, torch.tensor([[1.0, 1.0]]), torch.tensor([1]))  # logits 1, 2, 2
        SphericalStatistics(selected=tensor([2.]), sums=tensor([5.]), squares=tensor([9.]))
    """
    rows = _target_rows(state, H, index)
    selected = torch.einsum("md,mkd->mk", H @ state.U.T, state.V[rows]) + (H @ state.omega).unsqueeze(1)
    squares = ((H @ state.Q) * H).sum(1)
    return SphericalStatistics(selected.reshape(index.shape), H @ state.w_bar, squares)


def spherical_statistics_loss(
    selected: Float[Tensor, "examples *targets"],
    sums: Float[Tensor, " examples"],
    squares: Float[Tensor, " examples"],
    num_classes: int,
    *,
    kind: SphericalKind = "z",
    a: float = 1.0,
    b: float = 0.0,
    eps: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    r"""A spherical loss from the statistics of its logits; autograd gives the gradients that a step needs.

    With the target's logit A, the sum s and the sum of squares q of D logits::

        z           mu = s / D,  sigma = sqrt(q / D - mu^2) + eps,  softplus(a (b - (A - mu) / sigma)) / a
        mse         q - 2 A + 1
        taylor      log(D + s + q / 2) - log(1 + A + A^2 / 2)
        spherical   log(q + D eps) - log(A^2 + eps)

    The variance ``q / D - mu^2`` cancels where the logits share a large constant; it is formed in float64,
    which cannot restore what float32 sums have already lost: keep the layer in float64 or its logits centred
    then. Where it is 0 to rounding, the scores are left unscaled, as in :func:`telos.losses.z_loss`.

    Args:
        selected: (m,) or (m, K) logits of the targets; the losses of K targets are added.
        sums: (m,) sums of all logits.
        squares: (m,) sums of the squares of all logits.
        num_classes: D.
        kind: ``"z"``, ``"mse"``, ``"taylor"`` or ``"spherical"``.
        a: sharpness of the Z-loss, above 0.
        b: location of the Z-loss.
        eps: of ``"z"`` (default 1e-12) or ``"spherical"`` (default 0.1).
        reduction: over the examples: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss: a scalar, or (m,) with ``reduction="none"``.

    Raises:
        ValueError: for fewer than two classes, an unknown kind or reduction, or a parameter out of range.

    Source:
        The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family,
        arXiv 1604.08859; An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family,
        arXiv 1511.05042.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[3.0, 0.0, 0.0]])
        >>> spherical_statistics_loss(logits[:, 0], logits.sum(1), logits.square().sum(1), 3)
        tensor(0.2176)
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    A = selected.unsqueeze(1) if selected.ndim == 1 else selected
    s, q = sums.unsqueeze(1), squares.unsqueeze(1)
    if kind == "z":
        values = _z_rows(A, s, q, num_classes, a, b, 1e-12 if eps is None else eps)
    elif kind == "mse":
        values = q - 2 * A + 1
    elif kind == "taylor":
        # 1 + A + A^2 / 2 as a sum of positive terms
        values = (num_classes + s + q / 2).log() - (((A + 1).square() + 1) / 2).log()
    elif kind == "spherical":
        eps = 0.1 if eps is None else eps
        if not eps > 0:
            raise ValueError(f"eps must be above 0 for kind='spherical', got {eps}")
        values = (q + num_classes * eps).log() - (A.square() + eps).log()
    else:
        raise ValueError(f"kind must be 'z', 'mse', 'taylor' or 'spherical', got {kind!r}")
    values = values.sum(1)
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / max(values.shape[0], 1)


def _z_rows(A: Tensor, s: Tensor, q: Tensor, num_classes: int, a: float, b: float, eps: float) -> Tensor:
    if not a > 0:
        raise ValueError(f"a must be above 0, got {a}")
    mean, mean_square = s.double() / num_classes, q.double() / num_classes
    variance = mean_square - mean.square()
    constant = variance <= torch.finfo(q.dtype).eps * mean_square
    sigma = torch.where(constant, torch.ones_like(variance), variance).sqrt()
    z = (A.double() - mean) / torch.where(constant, sigma, sigma + eps)
    return (-F.logsigmoid(a * (z - b)) / a).to(A.dtype)


@torch.no_grad()
def spherical_update(
    state: SphericalState,
    H: Float[Tensor, "examples features"],
    index: Integer[Tensor, "examples *targets"],
    grad_selected: Float[Tensor, "examples *targets"],
    grad_sums: Float[Tensor, " examples"],
    grad_squares: Float[Tensor, " examples"],
    lr: float,
    *,
    weight_decay: float = 0.0,
    inplace: bool = False,
) -> tuple[Tensor, SphericalState]:
    r"""One exact step of SGD on W from the gradients of the statistics: O(d^2) per example, whatever D.

    The new state represents ``W - lr (G^T H + weight_decay W)`` with G (m x D) the gradient with respect to
    the logits, as ``torch.optim.SGD`` has it. Repeated targets, within an example and between examples, are
    accumulated. Momentum and adaptive rates are impossible in this form.

    Args:
        state: the layer.
        H: (m, d) inputs.
        index: (m,) or (m, K) target classes.
        grad_selected: gradient with respect to the targets' logits, of the shape of ``index``.
        grad_sums: (m,) gradient with respect to the sums.
        grad_squares: (m,) gradient with respect to the sums of squares.
        lr: rate.
        weight_decay: coefficient of the L2 penalty, below ``1 / lr``.
        inplace: write the touched rows into ``state.V`` itself; without it V is copied, which costs O(D d).

    Returns:
        The gradient (m, d) with respect to ``H`` (at the old weights), and the new state.

    Raises:
        ValueError: for a wrong shape, or a decay that would erase the weights.

    Source:
        Efficient Exact Gradient Update for training Deep Networks with Very Large Sparse Targets, arXiv
        1412.7091.

    Example:
        >>> import torch
        >>> state = spherical_state(torch.eye(3, 2))
        >>> H, index, one = torch.tensor([[1.0, 2.0]]), torch.tensor([2]), torch.ones(1)
        >>> _, state = spherical_update(state, H, index, -one, 0 * one, 0 * one, lr=0.5)
        >>> spherical_weight(state)  # minus half the gradient: H / 2 is added to row 2
        tensor([[1.0000, 0.0000],
                [0.0000, 1.0000],
                [0.5000, 1.0000]])
    """
    keep = 1.0 - lr * weight_decay
    if not keep > 0:
        raise ValueError(f"weight_decay must lie below 1 / lr, got weight_decay={weight_decay}, lr={lr}")
    rows = _target_rows(state, H, index)
    for name, gradient, shape in (
        ("grad_selected", grad_selected, index.shape),
        ("grad_sums", grad_sums, H.shape[:1]),
        ("grad_squares", grad_squares, H.shape[:1]),
    ):
        if gradient.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(gradient.shape)}")
    V, U, U_inv_t, omega, Q, w_bar = state
    gA, gs, gq = grad_selected.reshape(rows.shape), grad_sums, grad_squares.unsqueeze(1)
    # W <- keep W - lr G^T H is the step at rate lr / keep followed by a rescaling of W by keep
    rate = lr / keep

    target_sum = gA.sum(1)
    Wt_Y = torch.einsum("mk,mkd->md", gA, V[rows]) @ U + torch.outer(target_sum, omega)
    Z = Wt_Y + torch.outer(gs, w_bar)
    B = 2 * gq * H
    grad_H = B @ Q + Z

    # M = G G^T (m x m), G the gradient with respect to the logits; equal targets meet in Yt_Y
    flat, weights = rows.flatten(), gA.flatten()
    meeting = torch.where(flat.unsqueeze(1) == flat, torch.outer(weights, weights), 0.0)
    Yt_Y = meeting.reshape(*rows.shape, *rows.shape).sum((1, 3))
    half = B @ Q @ B.T / 2 + Yt_Y / 2 + torch.outer(gs, V.shape[0] / 2 * gs + target_sum) + B @ Z.T
    M = half + half.T

    new_U = U - rate * (H @ U.T).T @ B
    identity = torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
    new_U_inv_t = U_inv_t + rate * (U_inv_t @ B.T) @ torch.linalg.solve(identity - rate * H @ B.T, H)
    new_omega = omega - rate * H.T @ (2 * grad_squares * (H @ omega) + gs)
    # V takes the new inverse: (V + dV) U_new = V U_new + (what the targets' rows gain)
    change = -rate * gA.unsqueeze(-1) * (H @ new_U_inv_t.T).unsqueeze(1)
    add_rows = V.index_add_ if inplace else V.index_add
    new_V = add_rows(0, flat, change.reshape(-1, H.shape[1]))
    cross = grad_H.T @ H
    new_Q = Q - rate * (cross + cross.T) + rate**2 * H.T @ M @ H
    new_w_bar = w_bar - rate * H.T @ (2 * grad_squares * (H @ w_bar) + target_sum + V.shape[0] * gs)
    new_state = SphericalState(new_V, new_U, new_U_inv_t, new_omega, new_Q, new_w_bar)
    return grad_H, new_state if weight_decay == 0 else _rescaled(new_state, keep)


def spherical_step(
    state: SphericalState,
    H: Float[Tensor, "examples features"],
    index: Integer[Tensor, "examples *targets"],
    lr: float,
    *,
    kind: SphericalKind = "z",
    a: float = 1.0,
    b: float = 0.0,
    eps: float | None = None,
    weight_decay: float = 0.0,
    inplace: bool = False,
) -> SphericalStep:
    r"""Forward, loss and one exact step of SGD on an output layer, in O(d^2) per example.

    Equal to ``loss = mean_i loss(W H_i, index_i)`` by autograd and ``W <- W - lr dloss/dW`` up to rounding,
    without the D logits. Call :func:`spherical_stabilize` every 100 steps or so: U drifts towards singular.
    Dense SGD with momentum or Adam has no such form. Under data parallelism gather H, ``index`` and apply the
    same step on every rank.

    Args:
        state: the layer.
        H: (m, d) inputs; their gradient comes back in the result.
        index: (m,) or (m, K) target classes, of which the losses are added.
        lr: rate. Squared error (``kind="mse"``) needs ``lr < m / (2 |H_i|^2)``.
        kind: loss; see :func:`spherical_statistics_loss`.
        a: sharpness of the Z-loss.
        b: location of the Z-loss.
        eps: see :func:`spherical_statistics_loss`.
        weight_decay: coefficient of the L2 penalty.
        inplace: write the touched rows into ``state.V`` itself; without it V is copied, which costs O(D d).

    Returns:
        The loss, its gradient with respect to ``H``, and the new state.

    Raises:
        ValueError: for a wrong shape or a parameter out of range.

    Source:
        Efficient Exact Gradient Update for training Deep Networks with Very Large Sparse Targets, arXiv
        1412.7091.

    Example:
        >>> import torch
        >>> state = spherical_state(torch.eye(4, 2))
        >>> H, index = torch.tensor([[1.0, 0.5]]), torch.tensor([3])
        >>> losses = []
        >>> for _ in range(3):
        ...     loss, _, state = spherical_step(state, H, index, lr=0.5)
        ...     losses.append(round(loss.item(), 3))
        >>> losses
        [1.244, 0.526, 0.348]
    """
    statistics = spherical_forward(state, H, index)
    with torch.enable_grad():
        A, s, q = (entry.detach().requires_grad_() for entry in statistics)
        loss = spherical_statistics_loss(A, s, q, state.V.shape[0], kind=kind, a=a, b=b, eps=eps)
        gA, gs, gq = torch.autograd.grad(loss, (A, s, q), materialize_grads=True)
    grad_H, new_state = spherical_update(
        state, H, index, gA, gs, gq, lr, weight_decay=weight_decay, inplace=inplace
    )
    return SphericalStep(loss.detach(), grad_H, new_state)


@torch.no_grad()
def spherical_stabilize(
    state: SphericalState, *, low: float = 0.5, high: float = 2.0, inplace: bool = False
) -> SphericalState:
    """Bring the singular values of U back to 1 where they left [low, high]; W stays what it is.

    For a singular value sv with left vector l, U is stretched by 1 / sv along l, its inverse and V by sv: O(D
    d) for each. Where more than a third of the values are outside, the layer is factored afresh
    (:func:`spherical_refactor`). The inverse of U is recomputed.

    Args:
        state: the layer.
        low: smallest singular value left alone, above 0.
        high: largest singular value left alone.
        inplace: change ``state.V`` itself.

    Returns:
        The same layer with a well-conditioned U.

    Raises:
        ValueError: unless ``0 < low <= 1 <= high``.

    Example:
        >>> import torch
        >>> state = spherical_state(torch.eye(4))
        >>> state = state._replace(V=torch.diag(torch.tensor([0.1, 1.0, 1.0, 1.0])),
        ...                        U=torch.diag(torch.tensor([10.0, 1.0, 1.0, 1.0])))
        >>> spherical_stabilize(state).U.diagonal()
        tensor([1., 1., 1., 1.])
    """
    if not 0 < low <= 1 <= high:
        raise ValueError(f"low and high must satisfy 0 < low <= 1 <= high, got low={low}, high={high}")
    left, singular, _ = torch.linalg.svd(state.U)
    outside = (singular < low) | (singular > high)
    count = int(outside.sum())
    if 3 * count > singular.numel():
        return spherical_refactor(state, inplace=inplace)
    U, V = state.U, state.V
    if count:
        directions, values = left[:, outside], singular[outside]
        U = U + (directions * (1 / values - 1)) @ (directions.T @ U)
        change = (V @ directions) @ ((values - 1).unsqueeze(1) * directions.T)
        V = V.add_(change) if inplace else V + change
    return state._replace(V=V, U=U, U_inv_t=torch.linalg.inv(U).T.contiguous())


@torch.no_grad()
def spherical_refactor(state: SphericalState, *, inplace: bool = False) -> SphericalState:
    """The same weight matrix factored afresh: ``V = W``, ``U = I``, ``omega = 0``, Q and w_bar recomputed.

    O(D d^2); it also takes out the drift of Q and w_bar.

    Args:
        state: the layer.
        inplace: write the weights into ``state.V`` itself.

    Returns:
        The layer.

    Example:
        >>> import torch
        >>> state = spherical_state(torch.eye(3, 2))._replace(omega=torch.tensor([1.0, 0.0]))
        >>> spherical_refactor(state).V
        tensor([[2., 0.],
                [1., 1.],
                [1., 0.]])
    """
    fresh = spherical_state(spherical_weight(state))
    return fresh._replace(V=state.V.copy_(fresh.V)) if inplace else fresh


def _rescaled(state: SphericalState, factor: float) -> SphericalState:
    V, U, U_inv_t, omega, Q, w_bar = state
    return SphericalState(V, U * factor, U_inv_t / factor, omega * factor, Q * factor**2, w_bar * factor)


def _target_rows(state: SphericalState, H: Tensor, index: Tensor) -> Tensor:
    """Check the call and give the targets as (m, K)."""
    features = state.V.shape[1]
    if H.ndim != 2 or H.shape[1] != features:
        raise ValueError(f"H must have shape (m, {features}), got {tuple(H.shape)}")
    if index.ndim not in (1, 2) or index.shape[0] != H.shape[0]:
        raise ValueError(
            f"index must have shape ({H.shape[0]},) or ({H.shape[0]}, K), got {tuple(index.shape)}"
        )
    return index.unsqueeze(1) if index.ndim == 1 else index
