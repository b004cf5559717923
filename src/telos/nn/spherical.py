"""An output layer whose training step does not grow with the number of classes."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from telos.kernels.fused_linear import _no_autocast, eager_in_compiled_code
from telos.kernels.spherical import (
    SphericalKind,
    SphericalState,
    _factored,
    _write_weight,
    spherical_backward,
    spherical_forward,
    spherical_grad_norm,
    spherical_refactor,
    spherical_stabilize,
    spherical_statistics_loss,
    spherical_update,
    spherical_weight,
)
from telos.losses._checks import (
    check_floating,
    check_integer,
    check_label_values,
    check_range,
    check_shape,
)
from telos.losses._distributed import gather_padded, gather_sizes, is_distributed
from telos.losses._reduction import Denominator, Reduction, at_least_float32, check_reduction, reduce

# singular values of U within these are left alone
_LOW, _HIGH = 0.5, 2.0


class _Record(NamedTuple):
    """What a backward pass leaves for the step: a batch, and the gradients of its statistics."""

    features: Tensor  # (m, in_features), rows that do not count are 0
    classes: Tensor  # (m, K)
    grad_selected: Tensor  # (m, K)
    grad_sums: Tensor  # (m,)
    grad_squares: Tensor  # (m,)


class SphericalLinear(nn.Module):
    r"""An output layer with its loss, of which neither forward, backward nor SGD step sees the number of classes.

    ::

        loss = head(hidden, target)        hidden gets its gradient from loss.backward(), as from any layer
        loss.backward()
        optimizer.step()                   the network below
        head.step(lr)                      W <- W - lr dloss/dW, b <- b - lr dloss/db

    It is ``nn.Linear`` followed by a loss of the spherical family, which looks at the logits ``o = W h + b`` only
    through the target's logit, their sum and their sum of squares. Held as ``W = V U + 1 omega^T`` with ``W^T W``
    beside it, the layer gives these statistics and takes a step of plain SGD in O(d^2) per example, whatever the
    number of classes C; a step writes the rows of V that belong to targets and no other.

    The step is exact. Measured over 1,000 steps for every loss, the weights differ from those of dense SGD in float64
    by less than 1e-12 in float64 and by 1e-7 to 1e-6 in float32, relative to their norm: less than dense SGD in
    float32 does. (The C rows of V are in the dtype of the layer, the d x d matrices and all arithmetic in float64.)

    :meth:`step` follows the gradient that reached the layer in backward, so that scaled losses, mixtures, gradient
    accumulation and activation checkpointing come out as they do with a parameter: every backward adds to what is
    pending, ``torch.autograd.grad(loss, hidden)`` does not, and :meth:`step` uses it up. Nothing else clears it but
    :meth:`zero_grad` of this module; that of an optimizer or of an enclosing module does not know of it. What is
    pending is the batches themselves, so that memory grows with every backward until one of the two.
    :meth:`grad_norm` and :meth:`scale_grad` serve clipping and loss scaling.

    The weights are buffers, for there is no dense gradient that an optimizer could use: momentum, Adam and losses
    outside the family are impossible in this form (:meth:`to_linear` leaves it). Refused with an error are a step
    between a forward and its backward, and a second derivative (``create_graph=True``). Compiled callers break their
    graph at the layer and go on.

    Under data parallelism keep the layer outside the module that DistributedDataParallel wraps (which would
    broadcast V). :meth:`step` and :meth:`grad_norm` gather the pending batches of all ranks, divide by the number of
    ranks as DistributedDataParallel does, and so take the same step everywhere: all ranks must call them, and start
    from the same weights, which the first step makes sure of.

    Inputs of every dtype, also under autocast, are taken as they come and get their gradient in their dtype.
    ``half()`` and ``bfloat16()`` leave the layer as it is, ``float()`` and ``double()`` convert V.

    Args:
        in_features: width d of the inputs.
        num_classes: number of classes C, at least 2.
        loss: ``"z"`` (:func:`telos.losses.z_loss`), ``"taylor"``, ``"spherical"`` or ``"mse"``; see
            :func:`telos.kernels.spherical_statistics_loss`.
        a: sharpness of the Z-loss, above 0.
        b: location of the Z-loss.
        eps: of ``"z"`` (default 1e-12) or ``"spherical"`` (default 0.1).
        bias: whether the logits have one, as the weight of a constant input.
        bias_scale: that constant, above 0. The bias learns ``bias_scale**2`` times as fast as that of an
            ``nn.Linear``; the authors take 0.001.
        ignore_index: target that does not count.
        reduction: over the examples: ``"mean"``, ``"sum"`` or ``"none"``.
        stabilize_every: the singular values of U are looked at after this many steps at the latest, sooner
            after a start, after larger rates and where they have been moving fast; those that have left [1/2, 2] are
            folded into V in O(C d) each. Squared error at a large rate moves them much, the Z-loss with many classes
            hardly at all.
        gather_distributed: whether the ranks of the default process group take one step together; without it each
            trains a layer of its own.
        dtype: of V: float32 or float64.
        device: of all buffers.
        generator: draws the weights.

    Raises:
        ValueError: for a size or parameter out of range, or an unknown loss or reduction.
        TypeError: for another dtype.

    Source:
        Efficient Exact Gradient Update for training Deep Networks with Very Large Sparse Targets, arXiv 1412.7091;
        The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family, arXiv
        1604.08859.

    Example:
        >>> import torch
        >>> head = SphericalLinear(8, 100_000, generator=torch.Generator().manual_seed(0))
        >>> hidden, target = torch.randn(4, 8, requires_grad=True), torch.tensor([7, 99_999, 7, 3])
        >>> losses = []
        >>> for _ in range(3):
        ...     loss = head(hidden, target)
        ...     loss.backward()
        ...     head.step(lr=1.0)
        ...     losses.append(loss.item())
        >>> losses[0] > losses[1] > losses[2], hidden.grad.shape
        (True, torch.Size([4, 8]))
        >>> head.topk(hidden, 5)[1].shape
        torch.Size([4, 5])
    """

    V: Tensor
    U: Tensor
    U_inv_t: Tensor
    omega: Tensor
    Q: Tensor
    w_bar: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        loss: SphericalKind = "z",
        *,
        a: float = 1.0,
        b: float = 0.0,
        eps: float | None = None,
        bias: bool = True,
        bias_scale: float = 1.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        stabilize_every: int = 100,
        gather_distributed: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1, got {in_features}")
        if stabilize_every < 1:
            raise ValueError(f"stabilize_every must be at least 1, got {stabilize_every}")
        check_range("bias_scale", bias_scale, 0.0, float("inf"), open_low=True)
        check_reduction(reduction)
        nothing = torch.zeros(1, device="cpu")
        spherical_statistics_loss(nothing, nothing, nothing, num_classes, kind=loss, a=a, b=b, eps=eps)
        self.in_features, self.num_classes = in_features, num_classes
        self.loss: SphericalKind = loss
        self.a, self.b, self.eps = a, b, eps
        self.bias_scale = float(bias_scale) if bias else None
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.stabilize_every = stabilize_every
        self.gather_distributed = gather_distributed

        width = in_features + int(bias)
        V = torch.empty(num_classes, width, dtype=dtype, device=device)
        if V.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be float32 or float64, got {V.dtype}")
        self.register_buffer("V", V)
        for name in ("U", "U_inv_t", "Q"):
            self.register_buffer(name, torch.empty(width, width, dtype=torch.float64, device=V.device))
        for name in ("omega", "w_bar"):
            self.register_buffer(name, torch.empty(width, dtype=torch.float64, device=V.device))
        self._records: list[_Record] = []  # of this rank, as backward passes left them
        self._pending: _Record | None = None  # joined, and gathered from all ranks
        self._learns = True
        self._changes = 0  # how often the weights have become others
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights and biases, uniform as those of ``nn.Linear``."""
        bound = self.in_features**-0.5
        self.V.uniform_(-bound, bound, generator=generator)
        if self.bias_scale is not None:
            self.V[:, -1] /= self.bias_scale
        self._hold()

    @classmethod
    def from_linear(cls, linear: nn.Linear, loss: SphericalKind = "z", **options: Any) -> Self:
        """The layer that gives the logits of ``linear``, from a copy of its weights.

        Args:
            linear: half precision is raised to float32.
            loss: see the class.
            options: further arguments of the class but ``bias``, ``dtype``, ``device`` and ``generator``, which
                ``linear`` decides.

        Returns:
            The layer.

        Example:
            >>> import torch
            >>> linear = torch.nn.Linear(3, 5)
            >>> head = SphericalLinear.from_linear(linear, a=2.0)
            >>> bool((head.to_linear().weight == linear.weight).all())
            True
        """
        weight = at_least_float32(linear.weight.detach())
        head = cls(
            linear.in_features,
            linear.out_features,
            loss,
            bias=linear.bias is not None,
            dtype=weight.dtype,
            device="meta",
            generator=None,
            **options,
        ).to_empty(device=weight.device)
        with torch.no_grad():
            head.V[:, : head.in_features] = weight
            if head.bias_scale is not None:
                head.V[:, -1] = linear.bias.detach().to(weight.dtype) / head.bias_scale
        head._hold()
        return head

    def to_linear(self) -> nn.Linear:
        """An ordinary layer of the same logits, with a copy of the weights; O(C d^2).

        Example:
            >>> import torch
            >>> head, hidden = SphericalLinear(3, 5), torch.randn(2, 3)
            >>> bool(torch.allclose(head.to_linear()(hidden), head.logits(hidden)))
            True
        """
        linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.num_classes,
            bias=self.bias_scale is not None,
            dtype=self.V.dtype,
            device=self.V.device,
        )
        with torch.no_grad():
            dense = spherical_weight(self._state())
            linear.weight.copy_(dense[:, : self.in_features])
            if self.bias_scale is not None:
                linear.bias.copy_(dense[:, -1] * self.bias_scale)
        return linear

    @property
    def weight(self) -> Float[Tensor, "classes features"]:
        """The dense weights (C, d), computed anew in O(C d^2) at each access."""
        return spherical_weight(self._state())[:, : self.in_features]

    @property
    def bias(self) -> Float[Tensor, " classes"] | None:
        """The biases (C,), or ``None``; in O(C d)."""
        if self.bias_scale is None:
            return None
        column = self._state()._replace(U=self.U[:, -1:], omega=self.omega[-1:])
        values = self.V.new_empty(self.num_classes, 1)
        _write_weight(column, values)
        return values.squeeze(1) * self.bias_scale

    @eager_in_compiled_code
    def forward(
        self,
        hidden: Float[Tensor, "*batch features"],
        target: Integer[Tensor, "..."],
        *,
        target_weight: Float[Tensor, "..."] | None = None,
        sample_weight: Float[Tensor, "*batch"] | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The loss of the logits of ``hidden``, without computing them.

        An example counts if any of its targets is not ``ignore_index``. The losses of its targets are added, each
        times its weight; their sum is the value of the row that ``sample_weight``, reduction and ``denominator`` see.
        What does not count may hold NaN.

        Args:
            hidden: (N, d) or (N, T, d) inputs, of any floating dtype.
            target: (N,) or (N, T) labels, or (N, K) or (N, T, K) labels of which ``ignore_index`` fills up the
                shorter rows. Repeated labels are added.
            target_weight: what the loss of each target is multiplied by, of the shape of ``target``: the K nonzeros
                of a sparse target distribution.
            sample_weight: one weight per example, (N,) or (N, T).
            denominator: what the mean divides by; see :func:`telos.losses.reduce`.

        Returns:
            The loss: a scalar, or the shape of the batch with ``reduction="none"``; float64 for float64 inputs, else
            float32.

        Raises:
            ValueError: for a wrong shape or label, or a denominator without a mean.
            TypeError: for a wrong dtype.
        """
        check_reduction(self.reduction, denominator)
        self._check_inputs(hidden)
        self._check_targets(hidden, target, target_weight, sample_weight)
        batch = hidden.shape[:-1]
        targets = 1 if target.shape == batch else target.shape[-1]
        index = target.reshape(batch.numel(), targets).long()
        present = index != self.ignore_index
        shares = present.double()
        if target_weight is not None:
            shares = torch.where(present, target_weight.reshape(index.shape).double(), 0.0)
        weights = present.any(1).double()
        if sample_weight is not None:
            # a weight of NaN on a row that does not count must not revive it
            weights = torch.where(weights == 0, weights, sample_weight.reshape(-1).double())
        counts = (weights != 0) & (shares != 0).any(1)
        features = torch.where(counts.unsqueeze(1), hidden.reshape(-1, self.in_features), 0)
        selected, sums, squares = self._statistics(features, torch.where(present, index, 0))
        values = spherical_statistics_loss(
            selected,
            sums,
            squares,
            self.num_classes,
            kind=self.loss,
            a=self.a,
            b=self.b,
            eps=self.eps,
            target_weight=shares,
            reduction="none",
        )
        loss = reduce(values.reshape(batch), weights.reshape(batch), self.reduction, denominator)
        return loss.to(at_least_float32(hidden).dtype)

    @torch.no_grad()
    def step(self, lr: float, *, weight_decay: float = 0.0) -> None:
        """Take the pending gradient as a step of plain SGD, and forget it; without one nothing happens.

        Args:
            lr: rate, at least 0; from a scheduler take ``scheduler.get_last_lr()[0]``.
            weight_decay: coefficient of the L2 penalty, below ``1 / lr``, on weights and biases.

        Raises:
            ValueError: for a rate or decay out of range.
            RuntimeError: where the step would make U singular, or the ranks hold different weights.
        """
        check_range("lr", lr, 0.0, float("inf"))
        pending = self._collect()
        if pending is None:
            return
        _, state = spherical_update(
            self._state(), *self._arguments(pending), lr, weight_decay=weight_decay, inplace=True
        )
        self._adopt(state)
        self._clear()
        self._changes += 1
        self._watch(lr)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the pending gradient."""
        super().zero_grad(set_to_none)
        self._clear()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Whether backward passes leave anything for :meth:`step`; to be called on this module itself."""
        super().requires_grad_(requires_grad)
        self._learns = requires_grad
        return self

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Euclidean norm of the pending gradient, that of all C d weights and the biases, in O(d^2) per example.

        Clipping together with the rest of the network::

            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([*gradients, head.grad_norm()])
            torch.nn.utils.clip_grads_with_norm_(network.parameters(), max_norm, norm)
            head.scale_grad((max_norm / (norm + 1e-6)).clamp(max=1.0))

        Returns:
            A scalar in the dtype of V, 0 where nothing is pending. (With a ``bias_scale`` other than 1 the biases
            enter as the weights of their constant input.)
        """
        pending = self._collect()
        if pending is None:
            return self.V.new_zeros(())
        return spherical_grad_norm(self._state(), *self._arguments(pending)).to(self.V.dtype)

    @torch.no_grad()
    def scale_grad(self, factor: float | Tensor) -> None:
        """Multiply the pending gradient, as clipping does, or ``1 / scaler.get_scale()`` after a scaled loss.

        A loss scaler's test for overflow is ``head.grad_norm().isfinite()``.
        """
        self._records = [_scaled(record, factor) for record in self._records]
        self._pending = None if self._pending is None else _scaled(self._pending, factor)

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch classes"]:
        """All C logits, in the dtype of V; for prediction, without gradient."""
        self._check_inputs(hidden)
        with _no_autocast(self.V):
            projected, offset = self._projected(hidden)
            return torch.addmm(offset, projected, self.V.T).reshape(*hidden.shape[:-1], self.num_classes)

    @torch.no_grad()
    def topk(self, hidden: Float[Tensor, "*batch features"], k: int = 1) -> tuple[Tensor, Tensor]:
        """The k largest logits and their classes, without holding all C; for prediction, without gradient.

        Args:
            hidden: (..., d).
            k: at most C.

        Returns:
            Logits (..., k), largest first, and classes (..., k).

        Raises:
            ValueError: for a wrong shape or k.
        """
        self._check_inputs(hidden)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must lie in [1, {self.num_classes}], got {k}")
        with _no_autocast(self.V):
            projected, offset = self._projected(hidden)
            best = projected.new_empty(projected.shape[0], 0)
            classes = torch.empty_like(best, dtype=torch.long)
            size = max(k, 2**22 // max(projected.shape[0], 1))
            for start in range(0, self.num_classes, size):
                part = torch.addmm(offset, projected, self.V[start : start + size].T)
                values, found = part.topk(min(k, part.shape[1]), -1)
                values, found = torch.cat([best, values], 1), torch.cat([classes, found + start], 1)
                best, chosen = values.topk(min(k, values.shape[1]), -1)
                classes = found.gather(1, chosen)
        shape = (*hidden.shape[:-1], k)
        return best.reshape(shape), classes.reshape(shape)

    def stabilize(self) -> None:
        """Fold the singular values of U outside [1/2, 2] into V; :meth:`step` sees to it."""
        self._adopt(spherical_stabilize(self._state(), low=_LOW, high=_HIGH, inplace=True))

    def refactor(self) -> None:
        """Factor the same weights afresh, which takes out the drift of Q and w_bar; O(C d^2)."""
        self._adopt(spherical_refactor(self._state(), inplace=True))

    @torch.no_grad()
    def consistency_error(self) -> float:
        """How far the parts of the layer have drifted apart: the largest relative error among Q, w_bar, and U's inverse.

        O(C d^2). :meth:`refactor` sets it back to rounding.
        """
        true = spherical_refactor(self._state())
        size = true.Q.trace().sqrt()  # of W
        errors = [
            torch.linalg.matrix_norm(self.Q - true.Q) / torch.linalg.matrix_norm(true.Q),
            torch.linalg.vector_norm(self.w_bar - true.w_bar) / (size * self.num_classes**0.5),
            (self.U @ self.U_inv_t.T - true.U).abs().max(),
        ]
        return torch.stack(errors).max().item()

    def extra_repr(self) -> str:
        """Sizes and options, for ``print``."""
        options = {"a": self.a, "b": self.b} if self.loss == "z" else {}
        options |= {} if self.eps is None else {"eps": self.eps}
        parts = [
            f"in_features={self.in_features}, num_classes={self.num_classes}, loss={self.loss!r}",
            *(f"{name}={value}" for name, value in options.items()),
            f"bias={self.bias_scale is not None}, reduction={self.reduction!r}",
        ]
        return ", ".join(parts)

    def get_extra_state(self) -> Tensor:
        """When U was last looked at, so that a run resumed from ``state_dict`` goes on as it would have."""
        return torch.tensor([self._steps, self._distance, self._allowance], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` gave."""
        steps, self._distance, self._allowance = state.tolist()
        self._steps = int(steps)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restart()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # follow the device; of the dtypes only float32 and float64, and those for V alone
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new: Tensor = getattr(self, name)
            free = name == "V" and new.dtype in (torch.float32, torch.float64)
            if old is not None and new.dtype != old.dtype and not free:
                setattr(self, name, old.to(new.device))
        self._records = [_moved(record, self.V.device) for record in self._records]
        self._pending = None if self._pending is None else _moved(self._pending, self.V.device)
        return self

    def _state(self) -> SphericalState:
        return SphericalState(self.V, self.U, self.U_inv_t, self.omega, self.Q, self.w_bar)

    def _adopt(self, state: SphericalState) -> None:
        """Write into the buffers, so that a ``state_dict`` taken before sees one layer and not parts of two."""
        for held, new in zip(self._state(), state, strict=True):
            if held is not new:
                held.copy_(new)

    def _hold(self) -> None:
        """Take V for the weights."""
        self._adopt(_factored(self.V, torch.float64))
        self._restart()

    def _restart(self) -> None:
        """The weights are others than before."""
        self._clear()
        self._changes += 1
        self._ranks_agree = False
        self._steps, self._distance, self._allowance = 0, 0.0, 0.0

    def _clear(self) -> None:
        self._records.clear()
        self._pending = None

    def _watch(self, lr: float) -> None:
        """Stabilise in time: U moves with the sum of the rates, by which the next look is set."""
        self._steps += 1
        self._distance += lr
        if self._steps < self.stabilize_every and self._distance <= self._allowance:
            return
        if bool(torch.isfinite(self.U).all()):
            singular = torch.linalg.svdvals(self.U).tolist()
            largest, smallest = singular[0], singular[-1]
            if smallest >= _LOW and largest <= _HIGH:
                self._allowance = 2 * self._distance
                self.U_inv_t.copy_(torch.linalg.inv(self.U).T)
            else:
                late = smallest < _LOW**2 or largest > _HIGH**2
                self._allowance = self._distance / 2 if late else self._distance
                self.stabilize()
        self._steps, self._distance = 0, 0.0

    def _inputs(self, features: Tensor) -> Tensor:
        """(m, width) in float64, with the constant input of the bias."""
        features = features.to(self.U.dtype)
        if self.bias_scale is None:
            return features
        return nn.functional.pad(features, (0, 1), value=self.bias_scale)

    def _arguments(self, record: _Record) -> _Record:
        """A record as the kernels take it."""
        return record._replace(features=self._inputs(record.features))

    def _projected(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``U h`` (m, width) and what is common to all logits (m, 1), in the dtype of V."""
        H = self._inputs(hidden.reshape(-1, self.in_features))
        return (H @ self.U.T).to(self.V.dtype), (H @ self.omega).unsqueeze(1).to(self.V.dtype)

    def _statistics(self, features: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # a leaf of the graph that is no parameter: where its gradient is accumulated, a parameter's would be, which
        # is so in a backward over everything and not in torch.autograd.grad(loss, hidden)
        leaf = torch.zeros((), device=features.device, requires_grad=self._learns and torch.is_grad_enabled())
        left: list[_Record] = []
        if leaf.requires_grad:
            leaf.register_post_accumulate_grad_hook(lambda _: self._records.extend(left))
        return _Statistics.apply(features, leaf, index, self, left)  # type: ignore[return-value]

    def _collect(self) -> _Record | None:
        """The pending gradient of all ranks; every rank must call it."""
        fresh = _joined(self._records)
        self._records = []
        if self.gather_distributed and is_distributed():
            fresh = self._gathered(fresh)
        self._pending = _joined([record for record in (self._pending, fresh) if record is not None])
        return self._pending

    def _gathered(self, record: _Record | None) -> _Record | None:
        ranks = torch.distributed.get_world_size()
        if not self._ranks_agree:
            totals = gather_padded(self.w_bar.unsqueeze(0), [1] * ranks)
            if not bool((totals == totals[0]).all()):
                raise RuntimeError(
                    "the ranks hold different weights of SphericalLinear; draw them from the same seed or load the "
                    "same state_dict everywhere"
                )
            self._ranks_agree = True
        if record is None:
            nothing = self.U.new_zeros(0)
            record = _Record(
                self.V.new_zeros(0, self.in_features),
                nothing.long().reshape(0, 0),
                nothing.reshape(0, 0),
                nothing,
                nothing,
            )
        sizes = gather_sizes(record.features.shape[0], self.V.device)
        targets = max(gather_sizes(record.classes.shape[1], self.V.device))
        if targets == 0:
            return None
        features, index, selected, sums, squares = _widened(record, targets)
        gradients = torch.cat([selected, sums.unsqueeze(1), squares.unsqueeze(1)], 1) / ranks
        gradients = gather_padded(gradients, sizes)
        return _Record(
            gather_padded(features.to(self.V.dtype), sizes),
            gather_padded(index, sizes),
            gradients[:, :-2],
            gradients[:, -2],
            gradients[:, -1],
        )

    def _check_inputs(self, hidden: Tensor) -> None:
        check_floating("hidden", hidden)
        if hidden.ndim < 2 or hidden.shape[-1] != self.in_features:
            raise ValueError(
                f"hidden must have shape (N, {self.in_features}) or (N, T, {self.in_features}), got {tuple(hidden.shape)}"
            )

    def _check_targets(
        self, hidden: Tensor, target: Tensor, target_weight: Tensor | None, sample_weight: Tensor | None
    ) -> None:
        check_integer("target", target)
        batch = tuple(hidden.shape[:-1])
        if batch not in (tuple(target.shape), tuple(target.shape[:-1])):
            raise ValueError(f"target must have shape {batch} or {(*batch, 'K')}, got {tuple(target.shape)}")
        check_label_values("target", target, self.num_classes, self.ignore_index)
        if target_weight is not None:
            check_floating("target_weight", target_weight)
            check_shape("target_weight", target_weight, tuple(target.shape))
        if sample_weight is not None:
            check_floating("sample_weight", sample_weight)
            check_shape("sample_weight", sample_weight, batch)


class _Statistics(torch.autograd.Function):
    """The statistics of the logits; backward leaves in ``left`` what the step of the layer will need."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, features: Tensor, leaf: Tensor, index: Tensor, layer: SphericalLinear, left: list[_Record]
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(features, index)
        ctx.layer, ctx.left, ctx.changes = layer, left, layer._changes
        return tuple(spherical_forward(layer._state(), layer._inputs(features), index))  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "SphericalLinear has no second derivative (create_graph=True); use to_linear() and the loss on its logits"
            )
        layer: SphericalLinear = ctx.layer
        if layer._changes != ctx.changes:
            raise RuntimeError(
                "the weights of SphericalLinear have changed between forward and backward; call step() after the "
                "backward passes of all the forward passes that it is to follow"
            )
        features, index = ctx.saved_tensors
        ctx.left[:] = [_Record(features.detach(), index, *(gradient.detach() for gradient in gradients))]
        grad_features = None
        if ctx.needs_input_grad[0]:
            grad_inputs = spherical_backward(layer._state(), layer._inputs(features), index, *gradients)
            grad_features = grad_inputs[:, : layer.in_features].to(features.dtype)
        return grad_features, torch.zeros((), device=features.device), None, None, None


def _scaled(record: _Record, factor: float | Tensor) -> _Record:
    features, classes, *gradients = record
    return _Record(features, classes, *(gradient * factor for gradient in gradients))


def _moved(record: _Record, device: torch.device) -> _Record:
    return _Record(*(part.to(device) for part in record))


def _widened(record: _Record, targets: int) -> _Record:
    """The same with that many targets for each example; those that are added have no gradient."""
    added = (0, targets - record.classes.shape[1])
    return record._replace(
        classes=nn.functional.pad(record.classes, added),
        grad_selected=nn.functional.pad(record.grad_selected, added),
    )


def _joined(records: list[_Record]) -> _Record | None:
    """One batch of all; ``None`` of none."""
    if len(records) < 2:
        return records[0] if records else None
    targets = max(record.classes.shape[1] for record in records)
    wide = [_widened(record, targets) for record in records]
    return _Record(*(torch.cat(parts) for parts in zip(*wide, strict=True)))
