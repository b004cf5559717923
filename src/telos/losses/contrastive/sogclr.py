"""SogCLR and iSogCLR: contrastive losses with a moving average, and in iSogCLR a temperature, per example.

Both train well with small batches: the sum over negatives, which belongs to the whole training set, is
estimated by what each example remembers. Their gradient is that of the global objective, not of the number
they return.
"""

import math
import warnings
from functools import cache
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from telos.losses._algebra import Loss
from telos.losses._checks import check_floating, check_integer, check_range, check_shape, check_two_views
from telos.losses._distributed import gather_with_gradient, own_rows
from telos.losses._memory import SampleMemory, log_ema
from telos.losses._pairs import diagonal, normalized_rows, scaled_products
from telos.losses._reduction import Reduction, at_least_float32, check_reduction, reduce
from telos.losses._space import log_uniform, uniform
from telos.losses._task import TaskInfo

Value: TypeAlias = Literal["surrogate", "objective"]


class SogCLRState(NamedTuple):
    """What SogCLR remembers of each example of a batch; (N,), or (N, 2) for two modalities.

    Attributes:
        log_average: log of the moving average s of ``mean exp(h / temperature)``; minus infinity at first.
    """

    log_average: Tensor


class ISogCLRState(NamedTuple):
    """What iSogCLR remembers of each example of a batch; (N,), or (N, 2) for two modalities.

    Attributes:
        log_average: log of the moving average s of ``mean exp(h / temperature)``; minus infinity at first.
        gradient_average: moving average u of the temperature's gradient; 0 at first.
        temperatures: the temperature of each example.
    """

    log_average: Tensor
    gradient_average: Tensor
    temperatures: Tensor


class _Anchors(NamedTuple):
    """Each anchor's surrogate loss, new log s, objective ``t * (log s + rho)``, and its derivative in t."""

    surrogate: Tensor
    log_average: Tensor
    objective: Tensor
    slope: Tensor


def _anchors(
    scores: Tensor,
    kept: Tensor,
    negatives: int,
    rho: float,
    log_average: Tensor,
    temperatures: Tensor,
    gamma: Tensor,
    log_floor: Tensor | None,
) -> _Anchors:
    """Anchors (M,) against the kept ones of their candidates, by scores (M, K)."""
    with torch.no_grad():
        exponent = scores.detach() / temperatures.unsqueeze(-1)
        log_mean = exponent.masked_fill(~kept, -math.inf).logsumexp(-1) - math.log(negatives)
        log_average = log_ema(log_average, log_mean, gamma)
        log_divisor = log_average if log_floor is None else torch.logaddexp(log_average, log_floor)
        # cannot overflow: the average holds this very batch with weight gamma
        weights = (exponent - log_divisor.unsqueeze(-1)).masked_fill(~kept, -math.inf).exp() / negatives
        objective = temperatures * (log_average + rho)
        slope = log_average + rho - (weights * exponent).sum(-1)
    return _Anchors((weights * scores).sum(-1), log_average, objective, slope)


def _two_views(
    z1: Tensor, z2: Tensor, rho: float, subtract_positive: bool, include_positive: bool, *state: Tensor | None
) -> _Anchors:
    """Both views of an example are anchors and share its memory; all views of the others are negatives."""
    count = z1.shape[0]
    views = torch.cat([z1, z2])
    scores = scaled_products(views, views)
    positive = (z1 * z2).sum(-1).repeat(2)
    itself = diagonal(2 * count, z1.device)
    kept = ~itself if include_positive else ~(itself | itself.roll(count, 0))
    relative = scores - positive.unsqueeze(-1) if subtract_positive else scores
    state = tuple(None if entry is None else entry.repeat(2) for entry in state)
    rows = _anchors(relative, kept, 2 * count - 2, rho, *state)  # type: ignore[arg-type]
    shift = torch.zeros_like(positive) if subtract_positive else positive
    return _Anchors(
        (rows.surrogate - shift).view(2, count).sum(0),
        rows.log_average.view(2, count).logsumexp(0) - math.log(2.0),
        (rows.objective - shift.detach()).view(2, count).sum(0),
        rows.slope.view(2, count).mean(0),
    )


def _two_modalities(
    z1: Tensor, z2: Tensor, rho: float, subtract_positive: bool, include_positive: bool, *state: Tensor | None
) -> _Anchors:
    """Rows are anchors of the first modality, columns of the second; each has a memory of its own."""
    scores = scaled_products(z1, z2)
    positive = scores.diagonal()
    itself = diagonal(z1.shape[0], z1.device)
    kept = torch.ones_like(itself) if include_positive else ~itself
    shift = torch.zeros_like(positive) if subtract_positive else positive
    sides: list[_Anchors] = []
    for side, matrix in enumerate((scores, scores.mT)):
        relative = matrix - positive.unsqueeze(-1) if subtract_positive else matrix
        columns = tuple(None if entry is None else entry[:, side] for entry in state)
        sides.append(_anchors(relative, kept, z1.shape[0] - 1, rho, *columns))  # type: ignore[arg-type]
    first, second = sides
    return _Anchors(
        first.surrogate + second.surrogate - 2 * shift,
        torch.stack([first.log_average, second.log_average], -1),
        first.objective + second.objective - 2 * shift.detach(),
        torch.stack([first.slope, second.slope], -1),
    )


def _global_step(
    z1: Tensor,
    z2: Tensor,
    index: Tensor | None,
    *,
    log_average: Tensor,
    temperatures: Tensor,
    seen: Tensor | None,
    gamma: float,
    rho: float,
    bimodal: bool,
    subtract_positive: bool,
    include_positive: bool,
    normalize: bool,
    log_floor: Tensor | None,
    gather_distributed: bool,
) -> tuple[_Anchors, slice]:
    """The step of the (gathered) batch, and which of its rows are this rank's."""
    check_two_views(z1, z2, minimum_examples=0)
    if index is not None:
        check_integer("index", index)
        check_shape("index", index, (z1.shape[0],))
    rows = (z1.shape[0], 2) if bimodal else (z1.shape[0],)
    for name, entry in {
        "log_average": log_average,
        "temperatures": temperatures,
        "log_floor": log_floor,
    }.items():
        if entry is not None:
            check_floating(name, entry)
            check_shape(name, entry, rows)
    z1, z2 = (normalized_rows(z) if normalize else at_least_float32(z) for z in (z1, z2))
    forget = torch.full_like(log_average, gamma)
    if seen is not None:
        check_shape("seen", seen, (z1.shape[0],))
        forget = torch.where(seen.unsqueeze(-1) if bimodal else seen, forget, 1.0)
    state = [log_average, temperatures, forget, *([] if log_floor is None else [log_floor])]
    state = [entry.detach().to(z1.dtype) for entry in state]
    own = slice(None)
    if gather_distributed:
        own = own_rows(z1.shape[0], z1.device)
        z1, z2, *state = gather_with_gradient(z1, z2, *state)
    if z1.shape[0] < 2:
        raise ValueError(
            f"z1 must have at least 2 examples, since others are the negatives, got {z1.shape[0]}"
        )
    step = _two_modalities if bimodal else _two_views
    anchors = step(
        z1, z2, rho, subtract_positive, include_positive, *state, *([None] if log_floor is None else [])
    )
    return anchors, own


def _reduced(step: _Anchors, value: Value, reduction: Reduction) -> Tensor:
    rows = step.surrogate
    if value == "objective":
        rows = step.objective + (rows - rows.detach())
    elif value != "surrogate":
        raise ValueError(f"value must be 'surrogate' or 'objective', got {value!r}")
    return reduce(rows, torch.ones_like(rows), reduction)


def sogclr_loss(
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
    index: Integer[Tensor, " batch"] | None = None,
    *,
    log_average: Float[Tensor, "batch *sides"],
    seen: Bool[Tensor, " batch"] | None = None,
    temperature: float = 0.1,
    gamma: float = 0.9,
    bimodal: bool = False,
    subtract_positive: bool = True,
    include_positive: bool = False,
    normalize: bool = True,
    value: Value = "surrogate",
    log_floor: Float[Tensor, "batch *sides"] | None = None,
    gather_distributed: bool = False,
    reduction: Reduction = "mean",
) -> tuple[Tensor, SogCLRState]:
    r"""SogCLR: the global contrastive loss, its sum over all negatives remembered per example.

    With cosines ``c`` and ``h_ik = c_ik - c_ip`` (p the positive), the objective over the training set is::

        F = mean_i sum_{anchors of i} temperature * log( mean_{k negative} exp(h_ik / temperature) )

    A batch only holds some of the negatives. So each example keeps the average s of what it saw, without
    gradient::

        g   = mean_{k negative in the batch} exp(h_k / temperature)
        s  <- (1 - gamma) * s + gamma * g                              gamma = 1 at an example's first visit
        loss = mean_i sum_{anchors of i} mean_k w_k h_k,   w_k = exp(h_k / temperature) / s

    ``loss`` is a surrogate: its gradient estimates that of F, its number means little (``value="objective"``
    returns the estimate of F with the same gradient). With two views of one kind an example has two anchors,
    one memory (the mean of the two), and the 2N - 2 views of the other examples as negatives. ``bimodal`` is
    for pairs such as image and text: each side is an anchor against the N - 1 others of the other side, with
    a memory of its own. The averages are held as logarithms, so that small temperatures cannot overflow.

    Args:
        z1: (N, D) embeddings of the first views.
        z2: (N, D) embeddings of the second views of the same examples.
        index: accepted for the family's call; the state is given in the order of the batch.
        log_average: (N,) log s of the batch, (N, 2) if ``bimodal``; minus infinity before the first visit.
        seen: (N,) whether an example was visited before; None takes ``gamma`` for all.
        temperature: above 0 (the paper's tau).
        gamma: weight of the present batch in s, in (0, 1]; 1 forgets the past.
        bimodal: whether the two views are different modalities.
        subtract_positive: use h (the papers); False uses c in s and w and subtracts ``c_ip`` from the loss,
            as the authors' one-modality code does. The two differ only through the memory.
        include_positive: whether the positive stands among the negatives (the mean still divides by their
            number).
        normalize: whether to scale embeddings to unit length first.
        value: what number to return: the ``"surrogate"``, or the ``"objective"`` with the surrogate's
            gradient.
        log_floor: of the shape of ``log_average``: logarithm of a number added to s in the weights only.
        gather_distributed: whether other ranks' examples are negatives too. The loss is then that of the
            whole batch.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per example, the sum over its two anchors).

    Returns:
        The loss, and the new state of the examples of this (rank's) batch.

    Raises:
        ValueError: for fewer than 2 examples, a wrong shape or a parameter out of range.
        TypeError: for a wrong dtype.

    Source:
        Provable Stochastic Optimization for Global Contrastive Learning: Small Batch Does Not Harm
        Performance, arXiv 2202.12387.

    Example:
        >>> import torch
        >>> z = torch.eye(3)
        >>> start, seen = torch.full((3,), -torch.inf), torch.zeros(3, dtype=torch.bool)
        >>> loss, state = sogclr_loss(z, z, log_average=start, seen=seen)
        >>> loss, state.log_average  # every h is -1
        (tensor(-2.), tensor([-10., -10., -10.]))
    """
    check_reduction(reduction)
    check_range("temperature", temperature, 0.0, math.inf, open_low=True)
    check_range("gamma", gamma, 0.0, 1.0, open_low=True)
    step, own = _global_step(
        z1,
        z2,
        index,
        log_average=log_average,
        temperatures=torch.full_like(log_average, temperature),
        seen=seen,
        gamma=gamma,
        rho=0.0,
        bimodal=bimodal,
        subtract_positive=subtract_positive,
        include_positive=include_positive,
        normalize=normalize,
        log_floor=log_floor,
        gather_distributed=gather_distributed,
    )
    return _reduced(step, value, reduction), SogCLRState(step.log_average[own])


def isogclr_loss(
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
    index: Integer[Tensor, " batch"] | None = None,
    *,
    log_average: Float[Tensor, "batch *sides"],
    gradient_average: Float[Tensor, "batch *sides"],
    temperatures: Float[Tensor, "batch *sides"],
    seen: Bool[Tensor, " batch"] | None = None,
    rho: float = 0.3,
    gamma: float = 0.8,
    temperature_min: float = 0.05,
    temperature_max: float = 1.0,
    temperature_lr: float = 0.03,
    momentum: float = 0.5,
    grad_clip: float | None = 3.0,
    bimodal: bool = False,
    subtract_positive: bool = True,
    include_positive: bool = False,
    normalize: bool = True,
    value: Value = "surrogate",
    log_floor: Float[Tensor, "batch *sides"] | None = None,
    gather_distributed: bool = False,
    reduction: Reduction = "mean",
) -> tuple[Tensor, ISogCLRState]:
    r"""iSogCLR: :func:`sogclr_loss` where every example learns a temperature of its own.

    Each anchor may re-weight its negatives within a KL ball of radius rho around uniform weights, and fears
    the worst; the temperature is the dual variable of that ball::

        F = mean_i sum_{anchors of i} [ t_i * log( mean_{k negative} exp(h_ik / t_i) ) + t_i * rho ]
        dF/dt_i = log g_i + rho - mean_k w_k h_k / t_i = rho - KL(softmax(h_i / t_i) || uniform)    where s = g

    Anchors with many look-alikes (frequent classes) grow a large temperature, rare ones a small one.
    Embeddings follow the surrogate of SogCLR at the present temperatures; these then take a projected step
    with momentum::

        G  = log s + rho - mean_k w_k h_k / t       averaged over an example's two anchors, then clipped
        u <- momentum * u + (1 - momentum) * G
        t <- clip(t - temperature_lr * u, temperature_min, temperature_max)

    A radius of at least log(number of negatives) holds no stationary point (every temperature falls to
    ``temperature_min``) and warns.

    Args:
        z1: (N, D) embeddings of the first views.
        z2: (N, D) embeddings of the second views of the same examples.
        index: accepted for the family's call; the state is given in the order of the batch.
        log_average: (N,) log s of the batch, (N, 2) if ``bimodal``; minus infinity before the first visit.
        gradient_average: the averages u, of the shape of ``log_average``; 0 before the first.
        temperatures: the present temperatures t, of the shape of ``log_average``.
        seen: (N,) whether an example was visited before; None takes ``gamma`` for all.
        rho: radius of the KL ball, at least 0; 0.1 to 0.5 for two views, 6 to 8 in the paper's image-text
            runs.
        gamma: weight of the present batch in s, in (0, 1].
        temperature_min: smallest temperature (the paper's tau_0), above 0.
        temperature_max: largest temperature.
        temperature_lr: step size of the temperatures (eta).
        momentum: weight of the past in u, in [0, 1]; the paper's beta is 1 - momentum.
        grad_clip: bound of abs(G), or None.
        bimodal: whether the two views are different modalities, each with a temperature per pair.
        subtract_positive: use h (the paper) rather than cosines in s, w and G; see :func:`sogclr_loss`.
        include_positive: whether the positive stands among the negatives (the mean still divides by their
            number).
        normalize: whether to scale embeddings to unit length first.
        value: what number to return: the ``"surrogate"``, or the ``"objective"`` with the surrogate's
            gradient.
        log_floor: of the shape of ``log_average``: logarithm of a number added to s in the weights only.
        gather_distributed: whether other ranks' examples are negatives too. The loss is then that of the
            whole batch.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one value per example, the sum over its two anchors).

    Returns:
        The loss, and the new state of the examples of this (rank's) batch.

    Raises:
        ValueError: for fewer than 2 examples, a wrong shape or a parameter out of range.
        TypeError: for a wrong dtype.

    Source:
        Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic Temperature
        Individualization, arXiv 2305.11965.

    Example:
        >>> import torch
        >>> z, start = torch.eye(3), torch.full((3,), -torch.inf)
        >>> loss, state = isogclr_loss(
        ...     z, z, log_average=start, gradient_average=torch.zeros(3), temperatures=torch.full((3,), 0.1),
        ...     seen=torch.zeros(3).bool(), rho=0.3,
        ... )
        >>> state.temperatures  # all negatives alike: KL is 0, and G = rho
        tensor([0.0955, 0.0955, 0.0955])
    """
    check_reduction(reduction)
    _check_temperature_step(rho, gamma, temperature_min, temperature_max, temperature_lr, momentum, grad_clip)
    check_floating("gradient_average", gradient_average)
    check_shape("gradient_average", gradient_average, tuple(log_average.shape))
    step, own = _global_step(
        z1,
        z2,
        index,
        log_average=log_average,
        temperatures=temperatures,
        seen=seen,
        gamma=gamma,
        rho=rho,
        bimodal=bimodal,
        subtract_positive=subtract_positive,
        include_positive=include_positive,
        normalize=normalize,
        log_floor=log_floor,
        gather_distributed=gather_distributed,
    )
    count = step.surrogate.shape[0]
    _warn_without_root(rho, count - 1 if bimodal else 2 * count - 2)
    with torch.no_grad():
        gradient = step.slope[own]
        if grad_clip is not None:
            gradient = gradient.clamp(-grad_clip, grad_clip)
        velocity = momentum * gradient_average.to(gradient.dtype) + (1 - momentum) * gradient
        moved = temperatures.to(gradient.dtype) - temperature_lr * velocity
        state = ISogCLRState(step.log_average[own], velocity, moved.clamp(temperature_min, temperature_max))
    return _reduced(step, value, reduction), state


class _PerExampleContrast(Loss):
    """A memory of every training example for each side of a pair, read before a step and written after it."""

    family = "contrastive"
    needs = frozenset({"index"})

    def __init__(
        self, num_examples: int, initial: dict[str, float], bimodal: bool, first_use_gamma_one: bool
    ) -> None:
        super().__init__()
        self.memories = nn.ModuleList(
            SampleMemory(num_examples, initial, logarithms=("log_average",))
            for _ in range(2 if bimodal else 1)
        )
        self.bimodal = bimodal
        self.first_use_gamma_one = first_use_gamma_one

    @classmethod
    def from_task(cls, info: TaskInfo, **hyperparameters: Any) -> Self:
        """Build the loss for a task that knows its number of training examples."""
        if info.num_examples is None:
            raise ValueError(
                f"{cls.__name__} remembers every training example, but the task has no num_examples"
            )
        return cls(info.num_examples, **hyperparameters)

    def memory_of(self, name: str) -> Tensor:
        """What is remembered under ``name``: (num_examples,), or (num_examples, 2) for two modalities."""
        return self._joined([getattr(memory, name) for memory in self.memories])

    def _joined(self, sides: list[Tensor]) -> Tensor:
        return torch.stack(sides, -1) if self.bimodal else sides[0]

    def _read(self, z1: Tensor, z2: Tensor, index: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        check_two_views(z1, z2, minimum_examples=0)
        memory: SampleMemory = self.memories[0]  # type: ignore[assignment]
        index = memory.check(index, z1.shape[0])
        state: dict[str, Any] = {
            name: self._joined([getattr(side, name)[index] for side in self.memories])
            for name in memory.names
        }
        return index, {**state, "seen": memory.seen[index] if self.first_use_gamma_one else None}

    def _write(self, index: Tensor, state: SogCLRState | ISogCLRState) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        for side, memory in enumerate(self.memories):
            values = {
                name: entry[:, side] if entry.ndim == 2 else entry for name, entry in state._asdict().items()
            }
            memory.write(index, **values)  # type: ignore[operator]


class SogCLRLoss(_PerExampleContrast):
    """SogCLR with its memory; see :func:`sogclr_loss`.

    ``memory_of("log_average")`` shows what is remembered. The memory changes only in training mode with
    gradients on. Where an index occurs several times in a batch, its contributions are averaged. Ranks
    exchange their updates; keep the loss outside the module that DistributedDataParallel wraps.

    Args:
        num_examples: number of training examples, which the call's ``index`` addresses.
        first_use_gamma_one: whether an example's first visit fills its memory entirely; False starts it from
            s = 0.

    Example:
        >>> import torch
        >>> loss = SogCLRLoss(num_examples=10)
        >>> loss(torch.eye(3), torch.eye(3), index=torch.tensor([7, 1, 4]))
        tensor(-2.)
    """

    space = {"temperature": log_uniform(0.05, 1.0), "gamma": uniform(0.5, 1.0)}

    def __init__(
        self,
        num_examples: int,
        temperature: float = 0.1,
        gamma: float = 0.9,
        *,
        bimodal: bool = False,
        subtract_positive: bool = True,
        include_positive: bool = False,
        normalize: bool = True,
        first_use_gamma_one: bool = True,
        value: Value = "surrogate",
        gather_distributed: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        check_range("temperature", temperature, 0.0, math.inf, open_low=True)
        check_range("gamma", gamma, 0.0, 1.0, open_low=True)
        check_reduction(reduction)
        super().__init__(num_examples, {"log_average": -math.inf}, bimodal, first_use_gamma_one)
        self.temperature, self.gamma = temperature, gamma
        self.subtract_positive, self.include_positive, self.normalize = (
            subtract_positive,
            include_positive,
            normalize,
        )
        self.value: Value = value
        self.gather_distributed = gather_distributed
        self.reduction: Reduction = reduction

    def forward(self, z1: Tensor, z2: Tensor, index: Tensor | None = None) -> Tensor:
        """The loss of two views (N, D) of the training examples ``index`` (N,)."""
        index, state = self._read(z1, z2, index)
        loss, new_state = sogclr_loss(
            z1,
            z2,
            **state,
            temperature=self.temperature,
            gamma=self.gamma,
            bimodal=self.bimodal,
            subtract_positive=self.subtract_positive,
            include_positive=self.include_positive,
            normalize=self.normalize,
            value=self.value,
            gather_distributed=self.gather_distributed,
            reduction=self.reduction,
        )
        self._write(index, new_state)
        return loss


class ISogCLRLoss(_PerExampleContrast):
    """iSogCLR with its memory and temperatures; see :func:`isogclr_loss`.

    ``memory_of("temperatures")`` shows the learned temperatures: large for examples with many look-alikes.
    The memory changes only in training mode with gradients on; an example never drawn keeps its first
    temperature. Where an index occurs several times in a batch, its contributions are averaged. Ranks
    exchange their updates; keep the loss outside the module that DistributedDataParallel wraps.

    Args:
        num_examples: number of training examples, which the call's ``index`` addresses.
        temperature: of every example at first, between ``temperature_min`` and ``temperature_max``.
        first_use_gamma_one: whether an example's first visit fills its memory entirely; False starts it from
            s = 0.

    Example:
        >>> import torch
        >>> loss = ISogCLRLoss(num_examples=4, rho=0.3)
        >>> _ = loss(torch.eye(3), torch.eye(3), index=torch.tensor([0, 1, 2]))
        >>> loss.memory_of("temperatures")
        tensor([0.0955, 0.0955, 0.0955, 0.1000])
    """

    space = {
        "rho": uniform(0.1, 0.8),
        "temperature": log_uniform(0.05, 0.5),
        "gamma": uniform(0.5, 1.0),
        "temperature_lr": log_uniform(0.001, 0.1),
    }
    """Not searched: ``temperature_min`` and ``temperature_max``, bounds for what is searched by the loss itself, and
    ``momentum`` and ``grad_clip``, which only steady that."""

    def __init__(
        self,
        num_examples: int,
        rho: float = 0.3,
        temperature: float = 0.1,
        gamma: float = 0.8,
        *,
        temperature_min: float = 0.05,
        temperature_max: float = 1.0,
        temperature_lr: float = 0.03,
        momentum: float = 0.5,
        grad_clip: float | None = 3.0,
        bimodal: bool = False,
        subtract_positive: bool = True,
        include_positive: bool = False,
        normalize: bool = True,
        first_use_gamma_one: bool = True,
        value: Value = "surrogate",
        gather_distributed: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        _check_temperature_step(
            rho, gamma, temperature_min, temperature_max, temperature_lr, momentum, grad_clip
        )
        check_range("temperature", temperature, temperature_min, temperature_max)
        check_reduction(reduction)
        initial = {"log_average": -math.inf, "gradient_average": 0.0, "temperatures": temperature}
        super().__init__(num_examples, initial, bimodal, first_use_gamma_one)
        self.rho, self.gamma = rho, gamma
        self.temperature_min, self.temperature_max = temperature_min, temperature_max
        self.temperature_lr, self.momentum, self.grad_clip = temperature_lr, momentum, grad_clip
        self.subtract_positive, self.include_positive, self.normalize = (
            subtract_positive,
            include_positive,
            normalize,
        )
        self.value: Value = value
        self.gather_distributed = gather_distributed
        self.reduction: Reduction = reduction

    def forward(self, z1: Tensor, z2: Tensor, index: Tensor | None = None) -> Tensor:
        """The loss of two views (N, D) of the training examples ``index`` (N,)."""
        index, state = self._read(z1, z2, index)
        loss, new_state = isogclr_loss(
            z1,
            z2,
            **state,
            rho=self.rho,
            gamma=self.gamma,
            temperature_min=self.temperature_min,
            temperature_max=self.temperature_max,
            temperature_lr=self.temperature_lr,
            momentum=self.momentum,
            grad_clip=self.grad_clip,
            bimodal=self.bimodal,
            subtract_positive=self.subtract_positive,
            include_positive=self.include_positive,
            normalize=self.normalize,
            value=self.value,
            gather_distributed=self.gather_distributed,
            reduction=self.reduction,
        )
        self._write(index, new_state)
        return loss


def kl_radius_temperature(
    h: Float[Tensor, "*batch negatives"],
    rho: float,
    *,
    temperature_min: float = 1e-4,
    temperature_max: float = 1e4,
) -> Float[Tensor, "*batch"]:
    r"""The temperature at which ``softmax(h / t)`` lies at KL divergence rho from uniform weights.

    It minimises ``t * log(mean exp(h / t)) + t * rho`` over t: where :func:`isogclr_loss` takes a temperature
    if h stays as it is. ``KL(softmax(h / t) || uniform)`` falls in t from ``log(K / number of largest h)`` to
    0, so bisection finds the root; where there is none the answer is the bound on the side of the minimum.

    Args:
        h: (..., K) scores of the negatives of each anchor, relative or not (a constant does not matter).
        rho: radius, at least 0.
        temperature_min: lower bound, above 0; the answer where the ball holds every weighting.
        temperature_max: upper bound; the answer for rho = 0.

    Returns:
        (...) temperatures, without gradient.

    Raises:
        ValueError: for a negative radius, or bounds out of order.
        TypeError: for scores that are not floating point.

    Source:
        Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic Temperature
        Individualization, arXiv 2305.11965.

    Example:
        >>> import torch
        >>> h = torch.tensor([0.0, -0.5, -1.0])
        >>> t = kl_radius_temperature(h, 0.2)
        >>> p = (h / t).softmax(-1)
        >>> round((p * (3 * p).log()).sum().item(), 4)
        0.2
    """
    check_floating("h", h)
    check_range("rho", rho, 0.0, math.inf)
    check_range("temperature_min", temperature_min, 0.0, math.inf, open_low=True)
    check_range("temperature_max", temperature_max, temperature_min, math.inf)
    scores = at_least_float32(h.detach())
    low = first = scores.new_full(scores.shape[:-1], math.log(temperature_min))
    high = last = scores.new_full(scores.shape[:-1], math.log(temperature_max))
    # each halving wins one bit; float64 over these bounds holds no more than 60
    for _ in range(60):
        middle = (low + high) / 2
        logps = (scores / middle.exp().unsqueeze(-1)).log_softmax(-1)
        divergence = (logps.exp() * logps).sum(-1) + math.log(scores.shape[-1])
        low, high = torch.where(divergence > rho, middle, low), torch.where(divergence > rho, high, middle)
    root = ((low + high) / 2).exp()
    # a bound that never moved is the answer, exactly
    return torch.where(low == first, temperature_min, torch.where(high == last, temperature_max, root))


def _check_temperature_step(
    rho: float,
    gamma: float,
    temperature_min: float,
    temperature_max: float,
    temperature_lr: float,
    momentum: float,
    grad_clip: float | None,
) -> None:
    check_range("rho", rho, 0.0, math.inf)
    check_range("gamma", gamma, 0.0, 1.0, open_low=True)
    check_range("temperature_min", temperature_min, 0.0, math.inf, open_low=True)
    check_range("temperature_max", temperature_max, temperature_min, math.inf)
    check_range("temperature_lr", temperature_lr, 0.0, math.inf)
    check_range("momentum", momentum, 0.0, 1.0)
    if grad_clip is not None:
        check_range("grad_clip", grad_clip, 0.0, math.inf, open_low=True)


def _warn_without_root(rho: float, negatives: int) -> None:
    if rho >= math.log(negatives) and not torch.compiler.is_compiling():
        _warn_once(rho, negatives)


@cache
def _warn_once(rho: float, negatives: int) -> None:
    warnings.warn(
        f"rho={rho} is at least log({negatives} negatives)={math.log(negatives):.3f}: every weighting lies "
        "within that radius, so temperatures fall to temperature_min; take a smaller rho or a larger batch",
        stacklevel=4,
    )
