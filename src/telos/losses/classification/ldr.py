"""Label-distributionally robust losses: from the SVM through cross-entropy to a noise-robust loss."""

import math
from functools import partial
from typing import Literal, Self, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from telos.losses._algebra import ClassificationLoss
from telos.losses._checks import (
    check_classification,
    check_floating,
    check_integer,
    check_label_values,
    check_range,
    check_shape,
    values_can_be_read,
)
from telos.losses._links import hinge, logistic
from telos.losses._memory import SampleMemory
from telos.losses._reduction import Denominator, Reduction, at_target, classification_rows, reduce
from telos.losses._space import choice, log_uniform
from telos.losses._task import TaskInfo

Normalize: TypeAlias = Literal["softplus", "l1"] | None


def _log_softplus(logits: Tensor) -> Tensor:
    # below -36 log(1 + e^f) is e^f to float64 accuracy, and would underflow before its logarithm is taken
    low = logits < -36
    return torch.where(low, logits, F.softplus(torch.where(low, 0.0, logits)).log())


def _normalized(logits: Tensor, normalize: Normalize) -> Tensor:
    """Scores of mean absolute value 1 over the classes, or the logits themselves."""
    if normalize is None:
        return logits
    if normalize == "softplus":  # softplus(f) / mean softplus(f)
        return logits.shape[-1] * torch.softmax(_log_softplus(logits), -1)
    size = logits.abs().mean(-1, keepdim=True)
    return logits / torch.where(size == 0, 1.0, size)


def _logsumexp_of_others(scores: Tensor) -> Tensor:
    """``log sum_{k != y} exp(scores_k)`` for every class y at once, in O(C).

    For all but the largest score it is the whole sum less one term that is at most half of it, which loses no
    digits; for the largest it is summed anew.
    """
    top = scores.argmax(-1, keepdim=True)
    without_top = scores.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True)
    total = torch.logaddexp(scores.gather(-1, top), without_top)
    share = (scores - total).exp().scatter(-1, top, 0.0)
    others = total + torch.log1p(-share)
    return others.scatter(-1, top, without_top)


def _values(
    scores: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor,
    margin: float,
    penalty: float | Tensor = 0.0,
) -> Tensor:
    # psi = T * (log sum_k exp(delta_k / T) - log C); since delta_y = 0, the sum is 1 + exp(-soft margin)
    scaled = scores / temperature
    labels = target.ndim == scores.ndim - 1
    if labels:
        column = target.unsqueeze(-1)
        own = scaled.gather(-1, column)
        others = scaled.scatter(-1, column, -math.inf).logsumexp(-1, keepdim=True)
    else:
        own, others = scaled, _logsumexp_of_others(scaled)
    soft_margin = own - margin / temperature - others
    psi = temperature * (logistic(soft_margin) - math.log(scores.shape[-1])) - penalty
    return psi.squeeze(-1) if labels else at_target(psi, target)


def _ldr_kl_values(
    logits: Tensor, target: Tensor, *, temperature: float, margin: float, normalize: Normalize
) -> Tensor:
    return _values(_normalized(logits, normalize), target, temperature=temperature, margin=margin)


@torch.no_grad()
def _one_step(scores: Tensor, old: Tensor, *, temperature: float, alpha: float) -> Tensor:
    """The authors' update: one fixed-point step from the last temperature (M, 1), without margin."""
    classes = scores.shape[-1]
    p = torch.softmax(scores / old, -1) + 1e-5
    p = p / p.sum(-1, keepdim=True)
    divergence = (p * (classes * p).log()).sum(-1, keepdim=True).clamp_min(0)
    return temperature * (1 - divergence / (alpha * math.log(classes)))


@torch.no_grad()
def _fixed_point(
    scores: Tensor, target: Tensor, *, temperature: float, alpha: float, margin: float, steps: int = 50
) -> Tensor:
    """The largest stationary temperature (M, 1): coordinate ascent downwards from ``temperature``."""
    log_classes = math.log(scores.shape[-1])
    column = target.unsqueeze(-1)
    raised = scores.scatter(-1, column, scores.gather(-1, column) - margin)
    current = torch.full_like(raised[:, :1], temperature)
    for _ in range(steps):
        log_p = torch.log_softmax(raised / current, -1)
        divergence = log_classes + (log_p.exp() * log_p).sum(-1, keepdim=True)
        previous, current = current, temperature * (1 - divergence / (alpha * log_classes))
        if values_can_be_read(current) and not ((current - previous).abs() >= 1e-10).any():
            break
    return current


def _adaptive_rows(
    logits: Tensor,
    target: Tensor,
    sample_temperature: Tensor,
    *,
    temperature: float,
    alpha: float,
    margin: float,
    normalize: Normalize,
    exact: bool,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, weights and new temperatures, each of the shape of the batch."""
    if exact:
        check_integer("target", target)
    new = sample_temperature

    def formula(logits: Tensor, target: Tensor) -> Tensor:
        nonlocal new
        scores = _normalized(logits, normalize)
        if exact:
            current = _fixed_point(scores, target, temperature=temperature, alpha=alpha, margin=margin)
        else:
            old = sample_temperature.to(logits.dtype).reshape(-1, 1)
            current = _one_step(scores, old, temperature=temperature, alpha=alpha)
        new = current.reshape(sample_temperature.shape).to(sample_temperature.dtype)
        penalty = alpha * math.log(logits.shape[-1]) / (2 * temperature) * (current - temperature).square()
        return _values(scores, target, temperature=current, margin=margin, penalty=penalty)

    values, weights = classification_rows(
        formula,
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return values, weights, torch.where(weights == 0, sample_temperature, new)


def _crammer_singer_values(logits: Tensor, target: Tensor, *, margin: float) -> Tensor:
    # the best other class is the runner-up for the best class, and the best for every other
    best, runner_up = logits.topk(2, -1).values.split(1, -1)
    top = logits.argmax(-1, keepdim=True)
    margins = logits - best.expand_as(logits).scatter(-1, top, runner_up)
    return at_target(margins, target, partial(hinge, at=margin))


def _weston_watkins_values(logits: Tensor, target: Tensor, *, margin: float) -> Tensor:
    check_integer("target", target)
    column = target.unsqueeze(-1)
    return hinge(logits.gather(-1, column) - logits, at=margin).scatter(-1, column, 0.0).mean(-1)


def ldr_kl_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    temperature: float = 1.0,
    margin: float = 0.1,
    normalize: Normalize = None,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""LDR-KL: an adversary reweights the classes around the label, at a price in KL divergence.

    With scores f, ``delta_k = f_k - f_y + c * 1[k != y]`` and p over the simplex of C classes::

        psi(f, y) = max_p sum_k p_k delta_k - T * KL(p || uniform) = T * log( (1/C) sum_k exp(delta_k / T) )
        gradient wrt f = p* - e_y,   p* = softmax(delta / T)

    The temperature T (the paper's lambda) moves from the Crammer-Singer hinge ``max_k delta_k`` (T to 0)
    through cross-entropy minus ``log C`` (T = 1, c = 0) to the symmetric, noise-robust ``mean_k delta_k`` (T
    to infinity).

    Args:
        logits: (N, C) or (N, T, C) scores.
        target: (N,) or (N, T) labels in [0, C), or probabilities q of the shape of ``logits``: the loss is
            then ``sum_y q_y psi(f, y)``, in O(C) a row.
        temperature: T, above 0.
        margin: c, at least 0.
        normalize: ``"softplus"`` divides ``softplus(logits)`` by its mean over the classes (the authors'
            choice for this loss), ``"l1"`` divides the logits by their mean absolute value, ``None`` takes
            them as they are. The theory needs bounded scores. Gradients flow through the divisor.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss, at least ``-T log C``: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label or a parameter out of range, or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and
        Adaptivity, arXiv 2112.14869.

    Example:
        >>> import torch
        >>> logits, target = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0])
        >>> losses = [ldr_kl_loss(logits, target, temperature=t, margin=1.5) for t in (0.01, 1.0, 100.0)]
        >>> [round(loss.item(), 4) for loss in losses]  # near the largest of (0, -0.5, 0.5); near their mean
        [0.489, 0.0817, 0.0008]
    """
    _check(temperature, margin, normalize)
    values, weights = classification_rows(
        partial(_ldr_kl_values, temperature=temperature, margin=margin, normalize=normalize),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class LDRKLLoss(ClassificationLoss):
    """LDR-KL loss; see :func:`ldr_kl_loss`.

    Example:
        >>> import torch
        >>> LDRKLLoss(margin=0.0)(torch.zeros(1, 3), torch.tensor([0]))  # cross-entropy - log 3
        tensor(0.)
    """

    space = {"temperature": log_uniform(0.1, 10.0), "normalize": choice(None, "softplus")}
    """Not searched: ``margin``, which the authors keep at 0.1."""

    def __init__(
        self,
        temperature: float = 1.0,
        margin: float = 0.1,
        normalize: Normalize = None,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        _check(temperature, margin, normalize)
        self.temperature, self.margin = temperature, margin
        self.normalize: Normalize = normalize

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``T * log( (1/C) sum_k exp(delta_k / T) )`` of each row."""
        return _ldr_kl_values(
            logits, target, temperature=self.temperature, margin=self.margin, normalize=self.normalize
        )


def aldr_kl_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    sample_temperature: Float[Tensor, "*examples"],
    index: Integer[Tensor, " batch"] | None = None,
    temperature: float = 10.0,
    alpha: float = 2.0,
    margin: float = 0.1,
    normalize: Normalize = "softplus",
    exact: bool = False,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> tuple[Tensor, Tensor]:
    r"""ALDR-KL: LDR-KL with a temperature for each training example, learnt beside the model.

    With ``psi_T`` the LDR-KL loss (:func:`ldr_kl_loss`) and ``T_0`` the ``temperature``::

        psi(f, y) = max_{T >= 0} psi_T(f, y) - (a/2) (T - T_0)^2,          a = alpha * log C / T_0
        stationary at  T = T_0 * (1 - KL(p*(T) || uniform) / (alpha * log C)),   T_0 (1 - 1/alpha) <= T <= T_0

    An example with a confident prediction gets a small temperature (its label is trusted), an uncertain one
    keeps ``T_0`` (it is treated as noisy). The authors' algorithm takes one step of that equation from the
    example's last temperature, with ``p = softmax(f / T)`` smoothed by 1e-5 and without the margin. The
    gradient flows through ``psi_T`` at the new T only, so that away from a stationary T it is not the
    derivative of the value; with ``exact`` it is, by the envelope theorem.

    Args:
        logits: (N, C) or (N, T, C) scores f, before normalisation.
        target: labels in [0, C), or probabilities of the shape of ``logits``, linear as in
            :func:`ldr_kl_loss`; with ``exact`` labels only.
        sample_temperature: positive temperatures after each example's last visit, ``temperature`` before the
            first: one per example of the batch, or with ``index`` one per example of the training set. Of no
            consequence with ``exact``.
        index: (N,) positions of the examples in ``sample_temperature``.
        temperature: ``T_0`` (the paper's lambda_0), above 0.
        alpha: price of leaving ``T_0`` (the multiple alpha' of ``log C / T_0``), at least 1, above 1 with
            ``exact``.
        margin: c, at least 0.
        normalize: as in :func:`ldr_kl_loss`. The authors use ``"l1"`` on most of their data; scores that
            cancel around 0 make it unstable, hence the other default.
        exact: iterate from ``T_0`` to the (largest) stationary temperature, margin included, without memory.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss, a scalar or the shape of the batch with ``reduction="none"``, and the new
        ``sample_temperature``, detached. Examples that do not count keep theirs; of an index that occurs
        twice one temperature is kept (the module averages them).

    Raises:
        ValueError: for a wrong shape, a label or a parameter out of range, or an unknown reduction.
        TypeError: for a wrong dtype, or probabilities with ``exact``.

    Source:
        Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and
        Adaptivity, arXiv 2112.14869.

    Example:
        >>> import torch
        >>> logits, target = torch.tensor([[9.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), torch.tensor([0, 0])
        >>> loss, new = aldr_kl_loss(logits, target, sample_temperature=torch.ones(2), temperature=1.0)
        >>> bool(new[0] < 0.9), round(new[1].item(), 4)  # confident: trusted; uniform: KL = 0
        (True, 1.0)
    """
    _check(temperature, margin, normalize, alpha, exact)
    check_classification(logits, target, class_weight, sample_weight, ignore_index)
    check_floating("sample_temperature", sample_temperature)
    if index is None:
        check_shape("sample_temperature", sample_temperature, tuple(logits.shape[:-1]))
        old = sample_temperature.detach()
    else:
        check_shape("sample_temperature", sample_temperature, ("num_examples",))
        check_integer("index", index)
        check_shape("index", index, tuple(logits.shape[:-1]))
        check_label_values("index", index, sample_temperature.shape[0])
        old = sample_temperature.detach()[index.long()]
    values, weights, new = _adaptive_rows(
        logits,
        target,
        old,
        temperature=temperature,
        alpha=alpha,
        margin=margin,
        normalize=normalize,
        exact=exact,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    if index is not None:
        new = sample_temperature.detach().index_copy(0, index.long(), new)
    return reduce(values, weights, reduction, denominator), new


class ALDRKLLoss(ClassificationLoss):
    """ALDR-KL loss with the memory of each training example's temperature; see :func:`aldr_kl_loss`.

    Args:
        num_examples: length of the training set; ``index`` addresses its examples.
        temperature: ``T_0``, with which the memory starts.
        alpha: price of leaving ``T_0``.
        margin: c.
        normalize: how scores are normalised.
        exact: solve for the temperature anew each time; the memory then only records the result.
        class_weight: (C,) weight of each class.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    The call takes ``index`` (N,), the position of each example in the training set. Without it (on data that
    has no memory) every example is treated as one seen for the first time, and nothing is remembered. The
    memory is written in training mode with gradients enabled only.

    Example:
        >>> import torch
        >>> loss = ALDRKLLoss(num_examples=4, temperature=1.0)
        >>> value = loss(torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([0]), index=torch.tensor([2]))
        >>> loss.memory.temperature < 1
        tensor([False, False,  True, False])
    """

    needs = frozenset({"index"})
    space = {"temperature": log_uniform(0.1, 100.0), "alpha": log_uniform(1.5, 10.0)}
    """Not searched: ``margin``, which the authors keep at 0.1."""

    def __init__(
        self,
        num_examples: int,
        temperature: float = 10.0,
        alpha: float = 2.0,
        margin: float = 0.1,
        normalize: Normalize = "softplus",
        exact: bool = False,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        _check(temperature, margin, normalize, alpha, exact)
        self.temperature, self.alpha, self.margin = temperature, alpha, margin
        self.normalize: Normalize = normalize
        self.exact = exact
        self.memory = SampleMemory(num_examples, initial={"temperature": temperature})

    @classmethod
    def from_task(cls, info: TaskInfo, **hyperparameters: object) -> Self:
        """One temperature for each training example of the task."""
        if info.num_examples is None:
            raise ValueError("num_examples must be known to remember a temperature per example, got None")
        return cls(info.num_examples, **hyperparameters)  # type: ignore[arg-type]

    def rows(  # type: ignore[override]
        self,
        logits: Tensor,
        target: Tensor,
        *,
        index: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One value and one weight per example, each of the shape of the batch."""
        check_floating("logits", logits)
        if index is None:
            old = torch.full(logits.shape[:-1], self.temperature, device=logits.device)
        else:
            check_shape("logits", logits, ("N", "C"))
            index = self.memory.check(index, logits.shape[0])
            old = self.memory.read("temperature", index)
        values, weights, new = _adaptive_rows(
            logits,
            target,
            old,
            temperature=self.temperature,
            alpha=self.alpha,
            margin=self.margin,
            normalize=self.normalize,
            exact=self.exact,
            class_weight=self.class_weight,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
        )
        if index is not None and self.training and torch.is_grad_enabled():
            # where it is offered nothing finite the memory keeps what it has: rows that do not count
            self.memory.write(index, temperature=torch.where(weights == 0, math.nan, new))
        return values, weights

    def forward(  # type: ignore[override]
        self,
        logits: Tensor,
        target: Tensor,
        *,
        index: Tensor | None = None,
        sample_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The reduced loss; see :func:`telos.losses.reduce` for ``denominator``."""
        values, weights = self.rows(logits, target, index=index, sample_weight=sample_weight)
        return reduce(values, weights, self.reduction, denominator)


def crammer_singer_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    margin: float = 1.0,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Crammer-Singer multi-class hinge, ``max(0, c + max_{k != y} f_k - f_y)``.

    The limit of :func:`ldr_kl_loss` as its temperature goes to 0.

    Args:
        logits: (N, C) or (N, T, C) scores f.
        target: labels in [0, C), or probabilities q of the shape of ``logits``: ``sum_y q_y loss(f, y)``.
        margin: c, at least 0.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label or a margin out of range, or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        On the Algorithmic Implementation of Multiclass Kernel-based Vector Machines, JMLR 2001.

    Example:
        >>> import torch
        >>> crammer_singer_loss(torch.tensor([[2.0, 0.0, 1.5]]), torch.tensor([0]))
        tensor(0.5000)
    """
    check_range("margin", margin, 0.0, float("inf"))
    values, weights = classification_rows(
        partial(_crammer_singer_values, margin=margin),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class CrammerSingerLoss(ClassificationLoss):
    """Crammer-Singer multi-class hinge; see :func:`crammer_singer_loss`.

    Example:
        >>> import torch
        >>> CrammerSingerLoss()(torch.tensor([[2.0, 0.0, 1.5]]), torch.tensor([0]))
        tensor(0.5000)
    """

    space = {"margin": log_uniform(0.1, 10.0)}

    def __init__(
        self,
        margin: float = 1.0,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        check_range("margin", margin, 0.0, float("inf"))
        self.margin = margin

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``max(0, c + max_{k != y} f_k - f_y)`` of each row."""
        return _crammer_singer_values(logits, target, margin=self.margin)


def weston_watkins_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Integer[Tensor, "*batch"],
    *,
    margin: float = 1.0,
    class_weight: Float[Tensor, " classes"] | None = None,
    sample_weight: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Weston-Watkins multi-class hinge, ``(1/C) sum_{k != y} max(0, c + f_k - f_y)``.

    Divided by the number of classes, as in ``torch.nn.functional.multi_margin_loss``; the SVM paper only
    sums.

    Args:
        logits: (N, C) or (N, T, C) scores f.
        target: labels in [0, C); probabilities are refused, since they would cost O(C^2) a row.
        margin: c, at least 0.
        class_weight: (C,) weight of each class.
        sample_weight: one weight per example.
        ignore_index: label of examples that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss: a scalar, or the shape of the batch with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label or a margin out of range, or an unknown reduction.
        TypeError: for a wrong dtype, or probabilities as target.

    Source:
        Support Vector Machines for Multi-Class Pattern Recognition, ESANN 1999.

    Example:
        >>> import torch
        >>> weston_watkins_loss(torch.tensor([[2.0, 1.75, 1.5, 0.0]]), torch.tensor([0]))
        tensor(0.3125)
    """
    check_range("margin", margin, 0.0, float("inf"))
    values, weights = classification_rows(
        partial(_weston_watkins_values, margin=margin),
        logits,
        target,
        class_weight=class_weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )
    return reduce(values, weights, reduction, denominator)


class WestonWatkinsLoss(ClassificationLoss):
    """Weston-Watkins multi-class hinge; see :func:`weston_watkins_loss`.

    Example:
        >>> import torch
        >>> WestonWatkinsLoss()(torch.tensor([[2.0, 1.75, 1.5, 0.0]]), torch.tensor([0]))
        tensor(0.3125)
    """

    space = {"margin": log_uniform(0.1, 10.0)}

    def __init__(
        self,
        margin: float = 1.0,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(class_weight, ignore_index, reduction)
        check_range("margin", margin, 0.0, float("inf"))
        self.margin = margin

    def values(self, logits: Tensor, target: Tensor) -> Tensor:
        """``(1/C) sum_{k != y} max(0, c + f_k - f_y)`` of each row."""
        return _weston_watkins_values(logits, target, margin=self.margin)


def _check(
    temperature: float, margin: float, normalize: Normalize, alpha: float = 2.0, exact: bool = False
) -> None:
    check_range("temperature", temperature, 0.0, float("inf"), open_low=True)
    check_range("margin", margin, 0.0, float("inf"))
    check_range("alpha", alpha, 1.0, float("inf"), open_low=exact)
    if normalize not in (None, "l1", "softplus"):
        raise ValueError(f"normalize must be None, 'l1' or 'softplus', got {normalize!r}")
