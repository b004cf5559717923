"""Two linear probes of frozen features: Gaussian naive Bayes in closed form, and logistic regression."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from telos.losses._checks import (
    check_floating,
    check_integer,
    check_label_values,
    check_range,
    check_shape,
    values_can_be_read,
)
from telos.losses._distributed import is_distributed


class ClassStatistics(NamedTuple):
    """Sufficient statistics of Gaussian classes; see :func:`class_statistics`.

    Attributes:
        counts: (K,) examples of each class, or the sum of their weights.
        mean: (K, d) class means; 0 for a class without examples.
        m2: (K, d) sums of squared deviations from the class mean.
    """

    counts: Tensor
    mean: Tensor
    m2: Tensor


def class_statistics(
    features: Float[Tensor, "examples dim"],
    target: Integer[Tensor, " examples"],
    num_classes: int,
    sample_weight: Float[Tensor, " examples"] | None = None,
) -> ClassStatistics:
    """Counts, means and sums of squared deviations of each class, in float64, in two passes.

    Args:
        features: (N, d), any floating dtype.
        target: (N,) labels in [0, K).
        num_classes: number of classes K.
        sample_weight: (N,) weights, at least 0; a row of weight 0 does not count, whatever it holds.

    Returns:
        The statistics, without a graph. Those of two blocks are joined by :func:`merge_statistics`.

    Raises:
        ValueError: for a wrong shape, a label out of range or a negative weight.
        TypeError: for a wrong dtype.

    Source:
        Revisiting Discriminative vs. Generative Classifiers, arXiv 2302.02334.

    Example:
        >>> import torch
        >>> features = torch.tensor([[0.0], [2.0], [5.0]])
        >>> counts, mean, m2 = class_statistics(features, torch.tensor([0, 0, 1]), num_classes=2)
        >>> counts.tolist(), mean.squeeze(1).tolist(), m2.squeeze(1).tolist()
        ([2.0, 1.0], [1.0, 5.0], [2.0, 0.0])
    """
    _check_examples(features, target, num_classes, sample_weight)
    x = _wide(features.detach())
    if sample_weight is None:
        weight = x.new_ones(len(x))
    else:
        weight = sample_weight.detach().to(x)
        x = torch.where(weight[:, None] > 0, x, 0)
    label = target.long()
    # seen from one of the rows, a constant feature is 0, and its means are exact
    origin = x[0] if len(x) else x.new_zeros(x.shape[1])
    x = x - origin
    count = x.new_zeros(num_classes).index_add(0, label, weight)
    zeros = x.new_zeros(num_classes, x.shape[1])
    mean = zeros.index_add(0, label, weight[:, None] * x) / _nonzero(count)[:, None]
    m2 = zeros.index_add(0, label, weight[:, None] * (x - mean[label]).square())
    return ClassStatistics(count, torch.where(count[:, None] > 0, mean + origin, 0), m2)


def merge_statistics(first: ClassStatistics, second: ClassStatistics) -> ClassStatistics:
    r"""Statistics of two blocks of examples together, exactly, without a cancellation (Chan et al.)::

        m = mA + mB,   mean = (mA meanA + mB meanB) / m,   M2 = M2A + M2B + (mA mB / m) (meanA - meanB)^2

    A class may be missing from either block, or from both.

    Args:
        first: statistics of one block.
        second: statistics of the other, of the same shapes.

    Returns:
        The statistics of both.

    Source:
        Revisiting Discriminative vs. Generative Classifiers, arXiv 2302.02334.

    Example:
        >>> import torch
        >>> features, target = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1])
        >>> blocks = [class_statistics(features[part], target[part], 2) for part in (slice(1), slice(1, 3))]
        >>> merge_statistics(*blocks).m2.squeeze(1).tolist()
        [2.0, 0.0]
    """
    count = first.counts + second.counts
    share = (second.counts / torch.where(count > 0, count, 1))[:, None]
    apart = second.mean - first.mean
    # with a share of exactly 1 the sum first.mean + apart could still round
    mean = torch.where(share == 1, second.mean, first.mean + share * apart)
    return ClassStatistics(
        count, mean, first.m2 + second.m2 + (first.counts[:, None] * share) * apart.square()
    )


class NaiveBayesHead(nn.Module):
    r"""Gaussian naive Bayes with one diagonal variance for all classes: a linear head in closed form.

    With class means ``mu_k``, population variances ``v_k`` and priors ``pi_k = m_k / m``::

        v           = sum_k pi_k v_k + eps                                       (d,) shared by all classes
        log N_k(x)  = -1/2 sum_j [ (x_j - mu_kj)^2 / v_j + log(2 pi v_j) ]
        logits_k(x) = log pi_k + log N_k(x) + const(x) = w_k . x + b_k,          w_k = mu_k / v

    One pass over the features fits it, in any number of blocks. It comes near its own best error with O(log d)
    examples, logistic regression with O(d), whose best error may be lower: prefer it for few examples of wide
    features, for streams, and as a start for a linear head.

    A class without examples has logit ``-inf`` and is never predicted. A feature that is constant everywhere changes no
    prediction; one that is constant within every class, but not the same in all, has the variance ``eps`` and decides
    alone: :meth:`fit` warns, and ``var_smoothing`` sets a floor under all variances instead. Scaling or shifting a
    feature changes no prediction (up to ``eps``).

    Args:
        in_features: width d of the features.
        num_classes: number of classes K.
        eps: added to each variance, in squared units of the features; above 0 if a feature may be constant.
        var_smoothing: variances are raised to this share of the largest one; 0 for none (the paper's).

    Raises:
        ValueError: for a size below 1, a negative ``eps`` or a ``var_smoothing`` outside [0, 1].

    Departures:
        The authors' code needs every class in every block and labels 0..K-1 in the first one; here a block may hold
        any of the classes. It adds ``eps`` to the variances of each block before they are merged, which comes to the
        same as adding it once. ``var_smoothing`` is this library's own.

    Note:
        The statistics stay float64 whatever is done to the module's dtype. Logits come in the dtype of the features,
        float32 at least; for speed in
        low precision take :meth:`to_linear`. On several ranks, fit each on its part, then call :meth:`synchronize` once.

    Source:
        Revisiting Discriminative vs. Generative Classifiers: Theory and Implications, arXiv 2302.02334.

    Example:
        >>> import torch
        >>> features, target = torch.tensor([[-1.0], [-3.0], [2.0], [4.0]]), torch.tensor([0, 0, 1, 1])
        >>> head = NaiveBayesHead(in_features=1, num_classes=2).fit(features, target)
        >>> head.mean.squeeze(1).tolist(), round(head.shared_variance().item(), 6)
        ([-2.0, 3.0], 1.0)
        >>> head(torch.tensor([[0.4], [0.6]])).argmax(-1).tolist()
        [0, 1]
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(
        self, in_features: int, num_classes: int, eps: float = 1e-9, var_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        check_range("in_features", in_features, 1, math.inf)
        check_range("num_classes", num_classes, 1, math.inf)
        check_range("eps", eps, 0, math.inf)
        check_range("var_smoothing", var_smoothing, 0, 1)
        self.in_features, self.num_classes = in_features, num_classes
        self.eps, self.var_smoothing = eps, var_smoothing
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(num_classes, in_features, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(num_classes, in_features, dtype=torch.float64))

    # ------------------------------------------------------------------------------------------ fitting

    def reset(self) -> Self:
        """Forget all examples."""
        return self._keep(ClassStatistics(*(torch.zeros_like(part) for part in self.statistics)))

    def fit(
        self,
        features: Float[Tensor, "examples dim"],
        target: Integer[Tensor, " examples"],
        sample_weight: Float[Tensor, " examples"] | None = None,
    ) -> Self:
        """Fit to these examples and no others; warns of features that would decide alone."""
        self.reset().partial_fit(features, target, sample_weight)
        if values_can_be_read(self.m2) and self.var_smoothing == 0 and self.count.any():
            means = self.mean[self.count > 0]
            alone = int(((self.m2.sum(0) == 0) & (means != means[0]).any(0)).sum())
            if alone:
                warnings.warn(
                    f"{alone} of {self.in_features} features are constant within every class but differ between "
                    f"classes: at a variance of eps={self.eps:g} they decide alone; consider var_smoothing",
                    stacklevel=2,
                )
        return self

    def partial_fit(
        self,
        features: Float[Tensor, "examples dim"],
        target: Integer[Tensor, " examples"],
        sample_weight: Float[Tensor, " examples"] | None = None,
    ) -> Self:
        """Add a block of examples; any split of the data gives the same head as all of them at once.

        Args:
            features: (N, d), any floating dtype.
            target: (N,) labels in [0, K); classes may be missing.
            sample_weight: (N,) weights, at least 0; a weight of two is an example twice.

        Raises:
            ValueError: for a wrong shape, a label out of range or a negative weight.
            TypeError: for a wrong dtype.
        """
        self._check_width(features)
        block = class_statistics(features, target, self.num_classes, sample_weight)
        block = ClassStatistics(*(part.to(self.mean) for part in block))
        return self._keep(merge_statistics(self.statistics, block))

    def synchronize(self) -> Self:
        """Merge the examples of all ranks into every rank's head; does nothing in a single process.

        Call it once, after the last :meth:`partial_fit`: examples that were merged before would count again.
        """
        if not is_distributed():
            return self
        own = self.statistics
        count = _sum_over_ranks(own.counts)
        mean = _sum_over_ranks(own.counts[:, None] * own.mean) / _nonzero(count)[:, None]
        m2 = _sum_over_ranks(own.m2 + own.counts[:, None] * (own.mean - mean).square())
        return self._keep(ClassStatistics(count, mean, m2))

    # ------------------------------------------------------------------------------------------ what was fitted

    @property
    def statistics(self) -> ClassStatistics:
        """Counts, means and sums of squared deviations so far."""
        return ClassStatistics(self.count, self.mean, self.m2)

    def log_prior(self) -> Float[Tensor, " classes"]:
        """``log pi_k``; ``-inf`` for a class without examples."""
        return (self.count / self.count.sum()).log()

    def class_variance(self) -> Float[Tensor, "classes dim"]:
        """(K, d) population variance of each class, plus ``eps``."""
        return self.m2 / _nonzero(self.count)[:, None] + self.eps

    def shared_variance(self) -> Float[Tensor, " dim"]:
        """(d,) variance within classes, plus ``eps``, not below the floor of ``var_smoothing``."""
        variance = self.m2.sum(0) / _nonzero(self.count.sum()) + self.eps
        return variance.maximum(self.var_smoothing * variance.max()) if self.var_smoothing else variance

    # ------------------------------------------------------------------------------------------ prediction

    def forward(self, features: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch classes"]:
        """Logits for any classification loss: the log posterior up to a number that all classes share.

        Args:
            features: (..., d), any floating dtype; gradients flow to them.

        Raises:
            RuntimeError: before any example was seen.
        """
        center, weight, bias = self._line()
        x = self._door(features)
        return self._narrow((x - center) @ weight.T + bias, features)

    def log_likelihood(self, features: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch classes"]:
        """``log N(x; mu_k, v)`` of each class, without the prior; add :meth:`log_prior` for the joint density."""
        center, _, _ = self._line()
        variance = self.shared_variance()
        z = (self._door(features) - center) / variance.sqrt()
        u = (self.mean - center) / variance.sqrt()
        # |z - u|^2 opened up, so that no (N, K, d) array is made; centred, so that little cancels
        distance = z.square().sum(-1, keepdim=True) - 2 * z @ u.T + u.square().sum(-1)
        return self._narrow(-0.5 * (distance + (2 * math.pi * variance).log().sum()), features)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A trainable layer with the softmax of this head: its weights are ``(mu_k - mean) / v``.

        The mean of all features is taken from every ``mu_k``, which changes no softmax and keeps weights small. A
        class without examples has bias ``-inf``: set it to a finite number before training with such labels.

        Args:
            dtype: of the layer; the default one of torch if not given.
        """
        center, weight, bias = self._line()
        return _linear(weight, bias - weight @ center, dtype or torch.get_default_dtype())

    def _line(self) -> tuple[Tensor, Tensor, Tensor]:
        """Center c, weights and biases with ``logits(x) = W (x - c) + b``."""
        if values_can_be_read(self.count) and not self.count.any():
            raise RuntimeError(
                "NaiveBayesHead has seen no examples; call fit or partial_fit before predicting"
            )
        # around one of the classes, so that a constant feature has offsets of exactly 0
        first = self.mean[self.count.argmax()]
        center = first + (self.count / _nonzero(self.count.sum())) @ (self.mean - first)
        offset = self.mean - center
        weight = offset / self.shared_variance()
        return center, weight, self.log_prior() - 0.5 * (offset * weight).sum(-1)

    def _door(self, features: Tensor) -> Tensor:
        self._check_width(features)
        return features.to(self.mean.dtype)

    def _check_width(self, features: Tensor) -> None:
        check_floating("features", features)
        if features.ndim < 1 or features.shape[-1] != self.in_features:
            raise ValueError(
                f"features must have shape (..., {self.in_features}), got {tuple(features.shape)}"
            )

    @staticmethod
    def _narrow(logits: Tensor, features: Tensor) -> Tensor:
        return logits.to(torch.promote_types(features.dtype, torch.float32))

    def _keep(self, statistics: ClassStatistics) -> Self:
        self.count, self.mean, self.m2 = statistics
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # half() and float() must not blunt the statistics: follow the device, keep dtype and digits
        before = self.statistics
        super()._apply(fn, recurse)
        return self._keep(
            ClassStatistics(
                *(
                    new if new.dtype == old.dtype else old.to(new.device)
                    for old, new in zip(before, self.statistics, strict=True)
                )
            )
        )

    def extra_repr(self) -> str:
        """Size and options, for ``print``."""
        size = f"in_features={self.in_features}, num_classes={self.num_classes}"
        return f"{size}, eps={self.eps}, var_smoothing={self.var_smoothing}"


class LogisticFit(NamedTuple):
    """What :func:`fit_logistic` found.

    Attributes:
        weight: (K, d) float64.
        bias: (K,) float64.
        iterations: steps of L-BFGS.
        gradient: largest entry of the gradient that is left, of the objective over ``C`` and the total weight.
    """

    weight: Tensor
    bias: Tensor
    iterations: int
    gradient: float


def fit_logistic(
    features: Float[Tensor, "examples dim"],
    target: Integer[Tensor, " examples"],
    num_classes: int | None = None,
    *,
    C: float = 1.0,
    max_iter: int = 1000,
    tol: float = 1e-6,
    sample_weight: Float[Tensor, " examples"] | None = None,
) -> LogisticFit:
    r"""The minimum of :func:`logistic_probe`, with how it was reached; arguments and errors are the same.

    Example:
        >>> import torch
        >>> features, target = torch.tensor([[-1.0], [-3.0], [2.0], [4.0]]), torch.tensor([0, 0, 1, 1])
        >>> found = fit_logistic(features, target)
        >>> found.weight.shape, found.gradient <= 1e-6
        (torch.Size([2, 1]), True)
    """
    check_range("C", C, 0, math.inf, open_low=True)
    check_range("max_iter", max_iter, 1, math.inf)
    check_range("tol", tol, 0, math.inf)
    check_integer("target", target)
    if target.numel() == 0:
        raise ValueError("target must hold at least one example, got none")
    classes = int(target.max()) + 1 if num_classes is None else num_classes
    check_range("num_classes", classes, 2, math.inf)
    _check_examples(features, target, classes, sample_weight)
    x, label = _wide(features.detach()), target.long()
    rows = x.new_ones(len(x)) if sample_weight is None else sample_weight.detach().to(x)
    if not rows.sum() > 0:
        raise ValueError("sample_weight must be above 0 for at least one example")
    x = torch.where(rows[:, None] > 0, x, 0)
    rows = rows / rows.sum()
    # of two classes only the difference of the weights is penalised, as binary logistic regression has it; at the
    # symmetric solution |w1 - w0|^2 / 2 is |w0|^2 + |w1|^2
    total = len(x) if sample_weight is None else sample_weight.detach().to(x).sum()
    penalty = (1.0 if classes == 2 else 0.5) / (C * total)
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        max_eval=25 * max_iter,
        tolerance_grad=tol,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        losses = cross_entropy(x @ weight.T + bias, label, reduction="none")
        value = rows @ losses + penalty * weight.square().sum()
        weight.grad, bias.grad = torch.autograd.grad(value, (weight, bias))
        return value

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
        objective()
    assert weight.grad is not None
    assert bias.grad is not None
    left = max(weight.grad.abs().max().item(), bias.grad.abs().max().item())
    if left > tol:
        warnings.warn(
            f"logistic regression stopped with a gradient of {left:.2g} above tol={tol:g}; scale the features, or "
            f"raise max_iter={max_iter}",
            stacklevel=2,
        )
    iterations = int(solver.state[weight]["n_iter"])
    return LogisticFit(weight.detach(), bias.detach(), iterations, left)


def logistic_probe(
    features: Float[Tensor, "examples dim"],
    target: Integer[Tensor, " examples"],
    num_classes: int | None = None,
    *,
    C: float = 1.0,
    max_iter: int = 1000,
    tol: float = 1e-6,
    sample_weight: Float[Tensor, " examples"] | None = None,
) -> nn.Linear:
    r"""Multinomial logistic regression on frozen features by full-batch L-BFGS: what naive Bayes is compared with.

    The minimum over W and b, the bias unpenalised, in float64 from zero, of::

        C sum_i w_i CE(W x_i + b, y_i) + |W|^2 / 2                        K > 2
        C sum_i w_i CE(W x_i + b, y_i) + |w_1 - w_0|^2 / 2                K = 2: binary logistic regression

    Both are what the authors' comparator (scikit-learn's) minimises. Unlike naive Bayes it depends on the scale of
    each feature: bring features to a common scale first.

    Args:
        features: (N, d), any floating dtype.
        target: (N,) labels in [0, K).
        num_classes: number of classes K; the largest label plus one if not given.
        C: inverse strength of the penalty, above 0.
        max_iter: steps of L-BFGS at most.
        tol: largest entry of the gradient, of the objective over C times the total weight, at which to stop.
        sample_weight: (N,) weights w, at least 0; a row of weight 0 does not count.

    Returns:
        A layer from d features to K logits, in the dtype of the features (float32 at least). Warns where ``tol`` was
        not reached.

    Raises:
        ValueError: for a wrong shape, a value out of range, or fewer than two classes.
        TypeError: for a wrong dtype.

    Source:
        Revisiting Discriminative vs. Generative Classifiers: Theory and Implications, arXiv 2302.02334 (C = 1, 1000
        iterations).

    Example:
        >>> import torch
        >>> features, target = torch.tensor([[-1.0], [-3.0], [2.0], [4.0]]), torch.tensor([0, 0, 1, 1])
        >>> probe = logistic_probe(features, target)
        >>> probe(torch.tensor([[0.3], [0.7]])).argmax(-1).tolist()
        [0, 1]
    """
    found = fit_logistic(
        features, target, num_classes, C=C, max_iter=max_iter, tol=tol, sample_weight=sample_weight
    )
    return _linear(found.weight, found.bias, torch.promote_types(features.dtype, torch.float32))


def _linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def _check_examples(features: Tensor, target: Tensor, num_classes: int, sample_weight: Tensor | None) -> None:
    check_floating("features", features)
    check_shape("features", features, ("N", "d"))
    check_integer("target", target)
    check_shape("target", target, (len(features),))
    check_label_values("target", target, num_classes)
    if sample_weight is not None:
        check_floating("sample_weight", sample_weight)
        check_shape("sample_weight", sample_weight, (len(features),))
        if values_can_be_read(sample_weight) and (sample_weight < 0).any():
            raise ValueError(f"sample_weight must be at least 0, got {sample_weight.min().item()}")


def _wide(tensor: Tensor) -> Tensor:
    """In float64, or float32 on Apple's GPUs, which have no float64."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _nonzero(count: Tensor) -> Tensor:
    """The count as a denominator: 1 where nothing was counted."""
    return torch.where(count > 0, count, 1)


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total
