"""Exact SGD on an output layer of D classes in O(d^2) per example, for losses of the spherical family.

A spherical loss sees the logits ``o = W h`` (W is D x d) only through the logits of the targets, their sum
and their sum of squares. With ``W = V U + 1 omega^T``, ``Q = W^T W`` and ``w_bar = W^T 1`` these cost O(d^2),
and so does a step of plain SGD: it changes U, omega, Q, w_bar and the few rows of V that belong to targets.

All arithmetic is done in the dtype of U, which :func:`spherical_state` makes float64: over 1,000 steps with float32
rows the weights then stay five to twelve times closer to exact SGD than with float32 throughout, and closer than
dense SGD in float32, at up to twice the time. The rows of V, where the memory is, are raised and rounded as they are
met.
"""

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

SphericalKind: TypeAlias = Literal["z", "mse", "taylor", "spherical"]


class SphericalState(NamedTuple):
    """A D x d weight matrix ``W = V U + 1 omega^T`` in factored form.

    V is float32 or float64; the others have one dtype, in which every step is computed.

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
        The state: V in the dtype of ``weight``, the small matrices in float64.

    Raises:
        ValueError: for a wrong shape.
        TypeError: for another dtype.

    Example:
        >>> import torch
        >>> state = spherical_state(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        >>> state.Q
        tensor([[2., 1.],
                [1., 5.]], dtype=torch.float64)
        >>> state.w_bar
        tensor([2., 3.], dtype=torch.float64)
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (D, d), got {tuple(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight must be float32 or float64, got {weight.dtype}")
    return _factored(weight.detach().clone(), torch.float64)


def _factored(V: Tensor, dtype: torch.dtype) -> SphericalState:
    """``W = V`` as it is, the small matrices in ``dtype``."""
    features = V.shape[1]
    Q = torch.zeros(features, features, dtype=dtype, device=V.device)
    w_bar = torch.zeros(features, dtype=dtype, device=V.device)
    for part in _parts(V):
        rows = part.to(dtype)
        Q.addmm_(rows.T, rows)
        w_bar += rows.sum(0)
    identity = torch.eye(features, dtype=dtype, device=V.device)
    return SphericalState(V, identity, identity.clone(), torch.zeros_like(w_bar), Q, w_bar)


def _parts(V: Tensor) -> tuple[Tensor, ...]:
    """Views of V few enough rows long that a float64 copy of one is small."""
    return V.split(max(1, 2**21 // V.shape[1]))


@torch.no_grad()
def spherical_weight(state: SphericalState) -> Tensor:
    """The weight matrix ``W = V U + 1 omega^T`` (D, d) in the dtype of V, in O(D d^2).

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        >>> bool((spherical_weight(spherical_state(weight)) == weight).all())
        True
    """
    weight = torch.empty_like(state.V)
    _write_weight(state, weight)
    return weight


def _write_weight(state: SphericalState, out: Tensor) -> None:
    parts = _parts(state.V)
    for rows, written in zip(parts, out.split(parts[0].shape[0]), strict=True):
        written.copy_(rows.to(state.U.dtype) @ state.U + state.omega)


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
        The three statistics, in the dtype of ``state.U``.

    Raises:
        ValueError: for a wrong shape.

    Example:
        >>> import torch
        >>> state = spherical_state(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        >>> selected, sums, squares = spherical_forward(state, torch.tensor([[1.0, 1.0]]), torch.tensor([1]))
        >>> selected.item(), sums.item(), squares.item()  # of the logits 1, 2, 2
        (2.0, 5.0, 9.0)
    """
    rows = _target_rows(state, H, index)
    H = H.to(state.U.dtype)
    V_rows = state.V[rows].to(H.dtype)
    selected = torch.einsum("md,mkd->mk", H @ state.U.T, V_rows) + (H @ state.omega).unsqueeze(1)
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
    target_weight: Float[Tensor, "examples *targets"] | None = None,
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
        target_weight: what the loss of each target is multiplied by, of the shape of ``selected``.
        reduction: over the examples: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss: a scalar, or (m,) with ``reduction="none"``.

    Raises:
        ValueError: for fewer than two classes, an unknown kind or reduction, a wrong shape, or a parameter out of
            range.

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
    if target_weight is not None and target_weight.shape != selected.shape:
        raise ValueError(
            f"target_weight must have shape {tuple(selected.shape)}, got {tuple(target_weight.shape)}"
        )
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
    if target_weight is not None:
        values = values * target_weight.reshape(A.shape)
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


class _Call(NamedTuple):
    """A batch with the gradients of its statistics, in the dtype of the small matrices."""

    H: Tensor
    rows: Tensor  # (m, K) classes of the targets
    grad_selected: Tensor  # (m, K)
    grad_sums: Tensor
    grad_squares: Tensor
    B: Tensor  # 2 diag(grad_squares) H
    target_sum: Tensor  # (m,) of grad_selected
    Wt_Y: Tensor  # (m, d) sum over the targets of grad_selected times their row of W


def _call(
    state: SphericalState,
    H: Tensor,
    index: Tensor,
    grad_selected: Tensor,
    grad_sums: Tensor,
    grad_squares: Tensor,
) -> _Call:
    rows = _target_rows(state, H, index)
    for name, gradient, shape in (
        ("grad_selected", grad_selected, index.shape),
        ("grad_sums", grad_sums, H.shape[:1]),
        ("grad_squares", grad_squares, H.shape[:1]),
    ):
        if gradient.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(gradient.shape)}")
    dtype = state.U.dtype
    H, gs, gq = H.to(dtype), grad_sums.to(dtype), grad_squares.to(dtype)
    gA = grad_selected.reshape(rows.shape).to(dtype)
    target_sum = gA.sum(1)
    Wt_Y = torch.einsum("mk,mkd->md", gA, state.V[rows].to(dtype)) @ state.U
    Wt_Y += torch.outer(target_sum, state.omega)
    return _Call(H, rows, gA, gs, gq, 2 * gq.unsqueeze(1) * H, target_sum, Wt_Y)


def _grad_inputs(state: SphericalState, call: _Call) -> Tensor:
    return call.B @ state.Q + call.Wt_Y + torch.outer(call.grad_sums, state.w_bar)


class _Slots(NamedTuple):
    """Entries of equal class share a slot; as many slots as entries, so that no size depends on a value."""

    of_entry: Tensor
    classes: Tensor  # of each slot; 0 for those that are not used

    def total(self, entries: Tensor) -> Tensor:
        """(slots, d) sum over the entries of each slot; (m, K, d) entries."""
        flat = entries.flatten(0, 1)
        return torch.zeros_like(flat).index_add_(0, self.of_entry, flat)


def _slots(rows: Tensor) -> _Slots:
    flat = rows.flatten()
    order = flat.argsort()
    ordered = flat[order]
    rank = F.pad((ordered[1:] != ordered[:-1]).long(), (min(1, flat.numel()), 0)).cumsum(0)
    of_entry = torch.empty_like(flat).scatter_(0, order, rank)
    return _Slots(of_entry, torch.zeros_like(flat).scatter_(0, of_entry, flat))


class _Products(NamedTuple):
    """Products of W and the gradient N = G^T H (D x d), G (m x D) the gradient with respect to the logits."""

    Wt_N: Tensor
    Nt_N: Tensor
    total: Tensor  # N^T 1


def _products(state: SphericalState, call: _Call, grad_H: Tensor, slots: _Slots) -> _Products:
    """``N = W S + 1 (gs H) + T`` with ``S = B^T H`` and T the targets' part; nothing is m x m unless m < d."""
    H, rows, gA, gs, gq, B, target_sum, Wt_Y = call
    total = (2 * gq * (H @ state.w_bar) + target_sum + state.V.shape[0] * gs) @ H
    Wt_N = grad_H.T @ H
    T = slots.total(gA.unsqueeze(-1) * H.unsqueeze(1))
    Yt_T = torch.einsum("mk,mkd->md", gA, T[slots.of_entry].reshape(*rows.shape, H.shape[1]))
    # N^T N = H^T (G N), and the four terms of G = Y + gs 1^T + B W^T make G N
    G_N = torch.linalg.multi_dot([Wt_Y, B.T, H]) + torch.outer(target_sum, gs @ H) + Yt_T
    G_N += torch.outer(gs, total) + B @ Wt_N
    Nt_N = H.T @ G_N
    return _Products(Wt_N, (Nt_N + Nt_N.T) / 2, total)


@torch.no_grad()
def spherical_backward(
    state: SphericalState,
    H: Float[Tensor, "examples features"],
    index: Integer[Tensor, "examples *targets"],
    grad_selected: Float[Tensor, "examples *targets"],
    grad_sums: Float[Tensor, " examples"],
    grad_squares: Float[Tensor, " examples"],
) -> Tensor:
    """Gradient with respect to the inputs from those of the statistics: O(d^2) per example.

    Args:
        state: the layer.
        H: (m, d) inputs.
        index: (m,) or (m, K) target classes.
        grad_selected: gradient with respect to the targets' logits, of the shape of ``index``.
        grad_sums: (m,) gradient with respect to the sums.
        grad_squares: (m,) gradient with respect to the sums of squares.

    Returns:
        (m, d), in the dtype of ``H``.

    Raises:
        ValueError: for a wrong shape.

    Example:
        >>> import torch
        >>> state = spherical_state(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> H, index, one = torch.ones(1, 2), torch.tensor([1]), torch.ones(1)
        >>> spherical_backward(state, H, index, one, 0 * one, 0 * one)
        tensor([[0., 2.]])
    """
    call = _call(state, H, index, grad_selected, grad_sums, grad_squares)
    return _grad_inputs(state, call).to(H.dtype)


@torch.no_grad()
def spherical_grad_norm(
    state: SphericalState,
    H: Float[Tensor, "examples features"],
    index: Integer[Tensor, "examples *targets"],
    grad_selected: Float[Tensor, "examples *targets"],
    grad_sums: Float[Tensor, " examples"],
    grad_squares: Float[Tensor, " examples"],
) -> Tensor:
    """Euclidean norm of the gradient with respect to W, all D d entries of it, in O(d^2) per example.

    Args:
        state: the layer.
        H: (m, d) inputs.
        index: (m,) or (m, K) target classes.
        grad_selected: gradient with respect to the targets' logits, of the shape of ``index``.
        grad_sums: (m,) gradient with respect to the sums.
        grad_squares: (m,) gradient with respect to the sums of squares.

    Returns:
        A scalar, in the dtype of ``state.U``.

    Raises:
        ValueError: for a wrong shape.

    Example:
        >>> import torch
        >>> state = spherical_state(torch.eye(3, 2))
        >>> H, index, one = torch.tensor([[3.0, 4.0]]), torch.tensor([2]), torch.ones(1)
        >>> spherical_grad_norm(state, H, index, one, 0 * one, 0 * one).item()
        5.0
    """
    call = _call(state, H, index, grad_selected, grad_sums, grad_squares)
    Nt_N = _products(state, call, _grad_inputs(state, call), _slots(call.rows)).Nt_N
    # rounding may leave the square of a vanishing norm below 0
    return Nt_N.trace().clamp_min(0).sqrt()


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
        RuntimeError: for a rate at which the new U is singular (on the CPU; elsewhere the weights become infinite).

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
    call = _call(state, H, index, grad_selected, grad_sums, grad_squares)
    # W <- keep W - lr N is the step at rate lr / keep followed by a rescaling of W by keep
    rate = lr / keep
    V, U, _, omega, Q, w_bar = state
    grad_H = _grad_inputs(state, call)
    slots = _slots(call.rows)
    Wt_N, Nt_N, total = _products(state, call, grad_H, slots)
    inputs_dtype = H.dtype
    H, _, gA, gs, gq, B, *_ = call

    new_U = U - rate * torch.linalg.multi_dot([U, H.T, B])
    new_U_inv_t = _updated_inverse(state.U_inv_t, H, B, rate)
    new_omega = omega - rate * ((2 * gq * (H @ omega) + gs) @ H)
    # V takes the new inverse: (V + dV) U_new = V U_new + (what the targets' rows gain)
    change = slots.total(gA.unsqueeze(-1) * (H @ new_U_inv_t.T).unsqueeze(1))
    add_rows = V.index_add_ if inplace else V.index_add
    new_V = add_rows(0, slots.classes, (-rate * change).to(V.dtype))
    new_Q = Q - rate * (Wt_N + Wt_N.T) + rate**2 * Nt_N
    new_state = SphericalState(new_V, new_U, new_U_inv_t, new_omega, new_Q, w_bar - rate * total)
    return grad_H.to(inputs_dtype), new_state if weight_decay == 0 else _rescaled(new_state, keep)


def _updated_inverse(U_inv_t: Tensor, H: Tensor, B: Tensor, rate: float) -> Tensor:
    """Inverse transpose of ``U (I - rate H^T B)``, by the smaller of two equal systems.

    The middle factor is symmetric.
    """
    examples, features = H.shape
    identity = torch.eye(min(examples, features), dtype=H.dtype, device=H.device)
    if examples < features:
        solution, info = torch.linalg.solve_ex(identity - rate * H @ B.T, H)
        inverse = U_inv_t + rate * (U_inv_t @ B.T) @ solution
    else:
        inverse, info = torch.linalg.solve_ex(identity - rate * B.T @ H, U_inv_t, left=False)
    # a GPU is not made to wait for the answer: there a singular matrix shows as weights that are not finite
    if info.device.type == "cpu" and info.item() != 0:
        raise RuntimeError(f"a step at rate {rate} makes the factored layer singular; take another lr")
    return inverse


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
        The loss, its gradient with respect to ``H`` (both in its dtype), and the new state.

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
    return SphericalStep(loss.detach().to(H.dtype), grad_H, new_state)


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
    if not bool(torch.isfinite(state.U).all()):
        return state  # a run that has diverged stays what it is
    left, singular, _ = torch.linalg.svd(state.U)
    outside = (singular < low) | (singular > high)
    count = int(outside.sum())
    if 3 * count > singular.numel():
        return spherical_refactor(state, inplace=inplace)
    U, V = state.U, state.V
    if count:
        directions, values = left[:, outside], singular[outside]
        U = U + (directions * (1 / values - 1)) @ (directions.T @ U)
        stretch = (values - 1).unsqueeze(1) * directions.T
        V = V if inplace else V.clone()
        for part in _parts(V):
            rows = part.to(U.dtype)
            part.copy_(rows.addmm(rows @ directions, stretch))
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
    V = state.V if inplace else torch.empty_like(state.V)
    _write_weight(state, V)
    return _factored(V, state.U.dtype)


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
