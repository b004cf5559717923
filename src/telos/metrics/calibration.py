"""Calibration: does confidence mean what it says, and do probabilities serve the decisions made with them?"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from telos.losses._checks import (
    check_floating,
    check_integer,
    check_label_values,
    check_range,
    check_shape,
    values_can_be_read,
)
from telos.losses._reduction import at_least_float32

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Probabilities: TypeAlias = Float[Tensor, "*shape"]
Outcomes: TypeAlias = Integer[Tensor, "*batch"] | Bool[Tensor, "*batch"]

GRID = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)


class ReliabilityBins(NamedTuple):
    """Confidence against accuracy, in bins of equal width: what a reliability diagram shows.

    Attributes:
        edges: (B + 1,) from 0 to 1; bin b is (edges[b], edges[b + 1]], the first with its 0.
        counts: (B,) predictions in each bin.
        confidence: (B,) their mean confidence, NaN in an empty bin.
        accuracy: (B,) the share of them that is right, NaN in an empty bin.
    """

    edges: Tensor
    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


# ---------------------------------------------------------------------------------------------- confidence


def reliability_diagram(
    probabilities: Probabilities, target: Outcomes, *, n_bins: int = 25
) -> ReliabilityBins:
    """Mean confidence and accuracy of predictions, binned by confidence.

    Args:
        probabilities: (..., C), of which the most likely class is judged; or (...) confidences.
        target: (...) labels; or whether each prediction was right, as flags or 0 and 1, beside confidences.
        n_bins: bins of equal width.

    Returns:
        Edges, counts, mean confidences and accuracies, in float64.

    Raises:
        ValueError: for a wrong shape, a probability outside [0, 1] (take the softmax of logits first), a label out
            of range, or no bin.
        TypeError: for a wrong dtype.

    Source:
        On Calibration of Modern Neural Networks, arXiv 1706.04599.

    Example:
        >>> import torch
        >>> confidence, right = torch.tensor([0.9, 0.8, 0.3]), torch.tensor([True, False, False])
        >>> bins = reliability_diagram(confidence, right, n_bins=2)
        >>> bins.counts, bins.accuracy
        (tensor([1, 2]), tensor([0.0000, 0.5000], dtype=torch.float64))
    """
    check_range("n_bins", n_bins, 1, float("inf"))
    return _bins(*_binned_sums(probabilities, target, n_bins))


def expected_calibration_error(
    probabilities: Probabilities, target: Outcomes, *, n_bins: int = 25
) -> Float[Tensor, ""]:
    r"""Mean distance between confidence and accuracy over bins of equal width (ECE).

    ::

        sum_b n_b / N |accuracy_b - confidence_b|

    It depends on the number of bins, and with few examples a bin it is above 0 for a calibrated model too: compare
    models on the same examples and bins.

    Args:
        probabilities: (..., C), of which the most likely class is judged; or (...) confidences.
        target: (...) labels; or whether each prediction was right, as flags or 0 and 1, beside confidences.
        n_bins: bins of equal width, (low, high]; 25 as in the second source, 15 is common too.

    Returns:
        A float64 scalar in [0, 1]; 0 without examples.

    Raises:
        ValueError: for a wrong shape, a probability outside [0, 1] (take the softmax of logits first), a label out
            of range, or no bin.
        TypeError: for a wrong dtype.

    Source:
        On Calibration of Modern Neural Networks, arXiv 1706.04599; Optimizing Calibration by Gaining Aware of
        Prediction Correctness, arXiv 2404.13016.

    Example:
        >>> import torch
        >>> probabilities = torch.tensor([[0.5, 0.5], [0.0, 1.0]])  # of both bins all are right
        >>> expected_calibration_error(probabilities, torch.tensor([0, 1]))
        tensor(0.2500, dtype=torch.float64)
    """
    check_range("n_bins", n_bins, 1, float("inf"))
    return _ece(*_binned_sums(probabilities, target, n_bins))


def classwise_calibration_error(
    probabilities: Float[Tensor, "*batch classes"], target: Integer[Tensor, "*batch"], *, n_bins: int = 15
) -> Float[Tensor, ""]:
    r"""The expected calibration error of every class's probability, averaged over classes.

    ::

        1 / C sum_k sum_b n_bk / N |share of class k in bin (b, k) - mean p_k in bin (b, k)|

    It sees all probabilities, where the plain ECE sees only the largest. Most are near 0 with many classes, and so
    is the value.

    Args:
        probabilities: (..., C).
        target: (...) labels.
        n_bins: bins of equal width for each class; 15 as in the source.

    Returns:
        A float64 scalar in [0, 1]; 0 without examples.

    Raises:
        ValueError: for a wrong shape, a probability outside [0, 1], a label out of range, or no bin.
        TypeError: for a wrong dtype.

    Source:
        Beyond temperature scaling: Obtaining well-calibrated multi-class probabilities with Dirichlet calibration,
        arXiv 1910.12656.

    Example:
        >>> import torch
        >>> classwise_calibration_error(torch.tensor([[0.7, 0.3]]), torch.tensor([0]))
        tensor(0.3000, dtype=torch.float64)
    """
    check_range("n_bins", n_bins, 1, float("inf"))
    gap, total = _classwise_gaps(probabilities, target, n_bins)
    return gap.abs().sum() / (gap.shape[0] * max(total, 1))


def brier_score(
    probabilities: Float[Tensor, "*batch classes"], target: Integer[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    r"""Squared distance between probabilities and the one-hot label, ``mean_i sum_k (p_ik - 1[k = y_i])^2``.

    Args:
        probabilities: (..., C).
        target: (...) labels.

    Returns:
        A float64 scalar in [0, 2]; 0 without examples.

    Raises:
        ValueError: for a wrong shape, a probability outside [0, 1] or a label out of range.
        TypeError: for a wrong dtype.

    Source:
        Verification of forecasts expressed in terms of probability, Monthly Weather Review 78, 1950.

    Example:
        >>> import torch
        >>> brier_score(torch.tensor([[0.7, 0.3]]), torch.tensor([1]))
        tensor(0.9800, dtype=torch.float64)
    """
    scores = _brier(probabilities, target)
    return scores.sum() / max(scores.numel(), 1)


def top1_brier(probabilities: Probabilities, target: Outcomes) -> Float[Tensor, ""]:
    r"""Squared error of the confidence as a forecast of being right, ``mean_i (conf_i - 1[prediction_i right])^2``.

    What :func:`telos.losses.correctness_aware_loss` minimises.

    Args:
        probabilities: (..., C), of which the most likely class is judged; or (...) confidences.
        target: (...) labels; or whether each prediction was right, as flags or 0 and 1, beside confidences.

    Returns:
        A float64 scalar in [0, 1]; 0 without examples.

    Raises:
        ValueError: for a wrong shape, a probability outside [0, 1] or a label out of range.
        TypeError: for a wrong dtype.

    Source:
        Optimizing Calibration by Gaining Aware of Prediction Correctness, arXiv 2404.13016.

    Example:
        >>> import torch
        >>> top1_brier(torch.tensor([[0.7, 0.3]]), torch.tensor([1]))
        tensor(0.4900, dtype=torch.float64)
    """
    confidence, correct = _outcomes(probabilities, target)
    return (confidence.double() - correct.double()).square().sum() / max(correct.numel(), 1)


def confidence_auroc(probabilities: Probabilities, target: Outcomes) -> Float[Tensor, ""]:
    r"""How well confidence separates right from wrong predictions: the area under the ROC curve.

    The probability that a right prediction is more confident than a wrong one, a tie counting half. With two classes
    one temperature for all examples does not change it; one for each example can.

    Args:
        probabilities: (..., C), of which the most likely class is judged; or (...) confidences.
        target: (...) labels; or whether each prediction was right, as flags or 0 and 1, beside confidences.

    Returns:
        A float64 scalar in [0, 1]; NaN where all predictions are right, or all wrong.

    Raises:
        ValueError: for a wrong shape, a probability outside [0, 1] or a label out of range.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> confidence_auroc(torch.tensor([0.9, 0.6, 0.6, 0.5]), torch.tensor([1, 1, 0, 0]))
        tensor(0.8750, dtype=torch.float64)
    """
    return _auroc(*_outcomes(probabilities, target))


# ---------------------------------------------------------------------------------------------- decisions


def utility_to_probability(
    utilities: Float[Tensor, "*batch classes"],
    *,
    beta: float = 1.0,
    rule: Literal["gibbs", "sparsemax"] = "gibbs",
) -> Float[Tensor, "*batch classes"]:
    r"""A probability in the order of utilities, for decisions that need one.

    ::

        gibbs       P(a) = exp(beta u_a) / sum_b exp(beta u_b)
        sparsemax   P(a) = beta relu(u_a - c),   c such that they sum to 1

    A network trained by maximum likelihood has learned an order of its choices; the scale of its probabilities fits
    the data's noise, which need not be what sampling or a minimum-risk decision wants. ``beta = 1`` with
    ``"gibbs"`` is the usual softmax, towards 0 all choices become equally likely, towards infinity the best is
    certain. Choose beta on held-out data by the metric of the decision (:func:`fit_beta`): the log-loss of a
    well-fitted model would choose about 1.

    For sequences give the candidates of an input as classes, with ``u = sum_t log p(y_t) / length^gamma``.

    RECONSTRUCTED: the paper has such a transform, and its equation was not available. Both rules are families that
    keep the order of the utilities.

    Args:
        utilities: (..., C), the logits; -inf has probability 0.
        beta: sharpness, at least 0 and finite; above 0 for ``"sparsemax"``.
        rule: ``"gibbs"``, or ``"sparsemax"`` for exact zeros (the Euclidean projection of ``beta u`` on the
            simplex).

    Returns:
        (..., C) probabilities, in float32 or better.

    Raises:
        ValueError: for no class, a beta out of range or an unknown rule.
        TypeError: for a wrong dtype.

    Source:
        Utility-Probability Duality of Neural Networks, arXiv 2305.14859; From Softmax to Sparsemax, arXiv
        1602.02068.

    Example:
        >>> import torch
        >>> utilities = torch.tensor([1.0, 0.5, -1.0])
        >>> utility_to_probability(utilities, beta=4.0)
        tensor([8.8054e-01, 1.1917e-01, 2.9539e-04])
        >>> utility_to_probability(utilities, rule="sparsemax")
        tensor([0.7500, 0.2500, 0.0000])
    """
    check_floating("utilities", utilities)
    if utilities.ndim < 1 or utilities.shape[-1] < 1:
        raise ValueError(f"utilities must have shape (..., C), C at least 1, got {tuple(utilities.shape)}")
    if rule not in ("gibbs", "sparsemax"):
        raise ValueError(f"rule must be 'gibbs' or 'sparsemax', got {rule!r}")
    check_range("beta", beta, 0.0, torch.finfo(torch.float32).max, open_low=rule == "sparsemax")
    utilities = at_least_float32(utilities)
    # from the largest, so that beta u overflows only towards -inf; which beta = 0 must not turn into NaN
    below = utilities - utilities.amax(-1, keepdim=True)
    scaled = torch.where(below == -torch.inf, below, beta * below)
    return scaled.softmax(-1) if rule == "gibbs" else _sparsemax(scaled)


def fit_beta(
    utilities: Float[Tensor, "*batch classes"],
    score_fn: Callable[[Tensor], float | Tensor],
    grid: Sequence[float] = GRID,
    *,
    rule: Literal["gibbs", "sparsemax"] = "gibbs",
) -> float:
    """The sharpness whose probabilities serve a decision best.

    Args:
        utilities: (..., C) of held-out examples.
        score_fn: probabilities (..., C) to a score, higher is better: the metric of the decision rule that will be
            used (accuracy of sampling, expected utility), not the log-likelihood.
        grid: values of beta to try.
        rule: see :func:`utility_to_probability`.

    Returns:
        The first of the best in the order of the grid.

    Raises:
        ValueError: for an empty grid, a beta out of range, or scores that are all NaN.

    Source:
        Utility-Probability Duality of Neural Networks, arXiv 2305.14859 (RECONSTRUCTED).

    Example:
        >>> import torch
        >>> utilities = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> fit_beta(utilities, lambda p: p.diagonal().mean(), grid=(0.5, 1.0, 4.0))
        4.0
    """
    best, best_score = None, -float("inf")
    for beta in grid:
        score = float(score_fn(utility_to_probability(utilities, beta=beta, rule=rule)))
        if score > best_score or (best is None and score == best_score):
            best, best_score = float(beta), score
    if best is None:
        raise ValueError(f"grid must hold a beta with a score that is a number, got none among {list(grid)}")
    return best


def ordinal_agreement(
    utilities: Float[Tensor, "*batch classes"], target_probabilities: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    r"""How far utilities order the choices as probabilities do: Kendall's tau-b of each row.

    ::

        (concordant - discordant pairs) / sqrt(pairs untied in utilities * pairs untied in probabilities)

    Any increasing map of either leaves it as it is. Pairs are counted by merging, in O(C log(C)^2).

    Args:
        utilities: (..., C).
        target_probabilities: (..., C), for example the frequencies of the choices.

    Returns:
        (...) in [-1, 1], in float64: 1 for the same order. NaN where either row is constant or holds a NaN.

    Raises:
        ValueError: for a wrong shape.
        TypeError: for a wrong dtype.

    Source:
        Utility-Probability Duality of Neural Networks, arXiv 2305.14859.

    Example:
        >>> import torch
        >>> utilities = torch.tensor([[3.0, 1.0, -2.0], [3.0, 1.0, -2.0]])
        >>> ordinal_agreement(utilities, torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]]))
        tensor([1.0000, 0.3333], dtype=torch.float64)
    """
    check_floating("utilities", utilities)
    check_floating("target_probabilities", target_probabilities)
    if utilities.ndim < 1:
        raise ValueError(f"utilities must have shape (..., C), got {tuple(utilities.shape)}")
    check_shape("target_probabilities", target_probabilities, tuple(utilities.shape))
    classes = utilities.shape[-1]
    first, second = _dense_ranks(utilities), _dense_ranks(target_probabilities)
    both = first * classes + second
    # sorted by the first, ties by the second: a discordant pair is one that the second then has upside down
    discordant = _inversions(second.gather(-1, both.argsort(-1)))
    pairs = classes * (classes - 1) / 2
    tied, tied_second, tied_both = (_tied_pairs(ranks) for ranks in (first, second, both))
    difference = pairs - tied - tied_second + tied_both - 2 * discordant
    spread = ((pairs - tied) * (pairs - tied_second)).sqrt()
    undefined = (utilities.isnan() | target_probabilities.isnan()).any(-1) | (spread == 0)
    return torch.where(undefined, torch.nan, difference / torch.where(undefined, 1.0, spread))


def minimum_bayes_risk(
    probabilities: Float[Tensor, "*batch classes"], cost: Float[Tensor, "actions classes"]
) -> Integer[Tensor, "*batch"]:
    r"""The action of least expected cost, ``argmin_a sum_b P(b) cost(a, b)``.

    Args:
        probabilities: (..., C).
        cost: (A, C), the cost of action a where the truth is b.

    Returns:
        (...) indices of actions; the first among equals.

    Raises:
        ValueError: for a wrong shape.
        TypeError: for a wrong dtype.

    Source:
        Utility-Probability Duality of Neural Networks, arXiv 2305.14859, among its rules that need probabilities.

    Example:
        >>> import torch
        >>> cost = torch.tensor([[0.0, 10.0], [1.0, 0.0]])  # missing the second is worse
        >>> minimum_bayes_risk(torch.tensor([[0.8, 0.2], [0.95, 0.05]]), cost)
        tensor([1, 0])
    """
    check_floating("probabilities", probabilities)
    check_floating("cost", cost)
    if probabilities.ndim < 1:
        raise ValueError(f"probabilities must have shape (..., C), got {tuple(probabilities.shape)}")
    check_shape("cost", cost, ("A", probabilities.shape[-1]))
    probabilities = at_least_float32(probabilities)
    return (probabilities @ cost.to(probabilities.dtype).T).argmin(-1)


# ---------------------------------------------------------------------------------------------- metrics


class _CalibrationMetric(Metric):
    """What the metrics of this file declare, and their plot."""

    is_differentiable = False
    higher_is_better: bool | None = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the present value, or a value or list of values from before: figure and axes."""
        return self._plot(val, ax)


class _BinnedMetric(_CalibrationMetric):
    """Counts and sums of the bins of confidence."""

    count: Tensor
    confidence: Tensor
    correct: Tensor

    def __init__(self, n_bins: int = 25, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("n_bins", n_bins, 1, float("inf"))
        self.n_bins = n_bins
        self.add_state("count", torch.zeros(n_bins, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("confidence", torch.zeros(n_bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros(n_bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Add probabilities (..., C) with labels (...), or confidences (...) with outcomes (...)."""
        count, confidence, correct = _binned_sums(probabilities, target, self.n_bins)
        self.count += count
        self.confidence += confidence
        self.correct += correct


class ExpectedCalibrationError(_BinnedMetric):
    """Expected calibration error over batches and ranks; see :func:`expected_calibration_error`.

    Example:
        >>> import torch
        >>> metric = ExpectedCalibrationError(n_bins=25)
        >>> metric.update(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        >>> metric.update(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The error so far, 0 without examples."""
        return _ece(self.count, self.confidence, self.correct)


class ReliabilityDiagram(_BinnedMetric):
    """Confidence against accuracy over batches and ranks; see :func:`reliability_diagram`.

    Example:
        >>> import torch
        >>> metric = ReliabilityDiagram(n_bins=2)
        >>> metric.update(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([True, False, False]))
        >>> metric.compute().accuracy
        tensor([0.0000, 0.5000], dtype=torch.float64)
        >>> figure, axes = metric.plot()
        >>> axes.get_title()
        'ECE 0.333'
    """

    higher_is_better = None

    def compute(self) -> ReliabilityBins:
        """Edges, counts, mean confidences and accuracies so far."""
        return _bins(self.count, self.confidence, self.correct)

    def plot(self, val: ReliabilityBins | None = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw accuracy over confidence with the share of examples below; of the present bins, or of ``val``."""
        bins = self.compute() if val is None else val
        return _draw(ReliabilityBins(*(tensor.detach().cpu() for tensor in bins)), ax)


class ClasswiseCalibrationError(_CalibrationMetric):
    """Classwise calibration error over batches and ranks; see :func:`classwise_calibration_error`.

    Example:
        >>> import torch
        >>> metric = ClasswiseCalibrationError(num_classes=2)
        >>> metric.update(torch.tensor([[0.7, 0.3]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.3000, dtype=torch.float64)
    """

    gap: Tensor
    total: Tensor

    def __init__(self, num_classes: int, n_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("num_classes", num_classes, 1, float("inf"))
        check_range("n_bins", n_bins, 1, float("inf"))
        self.num_classes, self.n_bins = num_classes, n_bins
        self.add_state("gap", torch.zeros(num_classes, n_bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Add probabilities (..., C) with labels (...)."""
        if probabilities.shape[-1:] != (self.num_classes,):
            raise ValueError(
                f"probabilities must have shape (..., {self.num_classes}), got {tuple(probabilities.shape)}"
            )
        gap, total = _classwise_gaps(probabilities, target, self.n_bins)
        self.gap += gap
        self.total += total

    def compute(self) -> Tensor:
        """The error so far, 0 without examples."""
        return self.gap.abs().sum() / (self.num_classes * self.total.clamp_min(1))


class BrierScore(_CalibrationMetric):
    """Brier score over batches and ranks; see :func:`brier_score`.

    Example:
        >>> import torch
        >>> metric = BrierScore()
        >>> metric.update(torch.tensor([[0.7, 0.3], [0.0, 1.0]]), torch.tensor([1, 1]))
        >>> metric.compute()
        tensor(0.4900, dtype=torch.float64)
    """

    plot_upper_bound = 2.0
    score: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("score", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Add probabilities (..., C) with labels (...)."""
        scores = _brier(probabilities, target)
        self.score += scores.sum()
        self.total += scores.numel()

    def compute(self) -> Tensor:
        """The score so far, 0 without examples."""
        return self.score / self.total.clamp_min(1)


class ConfidenceAUROC(_CalibrationMetric):
    """Separation of right from wrong predictions by confidence; see :func:`confidence_auroc`.

    It keeps a confidence and a flag for every prediction.

    Example:
        >>> import torch
        >>> metric = ConfidenceAUROC()
        >>> metric.update(torch.tensor([0.9, 0.6]), torch.tensor([1, 1]))
        >>> metric.update(torch.tensor([0.6, 0.5]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.8750, dtype=torch.float64)
    """

    higher_is_better = True
    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("confidence", [], dist_reduce_fx="cat")
        self.add_state("correct", [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Add probabilities (..., C) with labels (...), or confidences (...) with outcomes (...)."""
        confidence, correct = _outcomes(probabilities, target)
        self.confidence.append(confidence)
        self.correct.append(correct)

    def compute(self) -> Tensor:
        """The area so far, NaN where all predictions are right, or all wrong."""
        if not isinstance(self.confidence, Tensor) and not self.confidence:
            return torch.tensor(torch.nan, dtype=torch.float64, device=self.device)
        return _auroc(dim_zero_cat(self.confidence), dim_zero_cat(self.correct))


# ---------------------------------------------------------------------------------------------- pieces


def _outcomes(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Confidences and whether they were right, each (N,)."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if probabilities.shape != target.shape:
        probabilities, target = _labelled(probabilities, target)
        confidence, predicted = probabilities.max(-1)
        return confidence, predicted == target
    _check_probabilities(probabilities)
    if target.dtype != torch.bool:
        check_integer("target", target)
        check_label_values("target", target, 2)
    return at_least_float32(probabilities.detach()).reshape(-1).contiguous(), target.reshape(-1) != 0


def _labelled(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (N, C) and labels (N,)."""
    _check_probabilities(probabilities)
    if probabilities.ndim < 1 or probabilities.shape[-1] < 1:
        raise ValueError(
            f"probabilities must have shape (..., C), C at least 1, got {tuple(probabilities.shape)}"
        )
    check_shape("target", target, tuple(probabilities.shape[:-1]))
    check_integer("target", target)
    classes = probabilities.shape[-1]
    check_label_values("target", target, classes)
    rows = at_least_float32(probabilities.detach()).reshape(-1, classes).contiguous()
    return rows, target.reshape(-1).long()


def _check_probabilities(probabilities: Tensor) -> None:
    check_floating("probabilities", probabilities)
    if not values_can_be_read(probabilities):
        return
    inside = (probabilities >= 0) & (probabilities <= 1)
    if not inside.all():
        worst = probabilities[~inside][0].item()
        raise ValueError(f"probabilities must lie in [0, 1] (take the softmax of logits first), got {worst}")


def _edges(n_bins: int, like: Tensor) -> Tensor:
    # rounded once to the dtype of the confidences, so that 0.2 in float32 is the edge 0.2 itself
    return torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=like.device).to(like.dtype)


def _binned_sums(probabilities: Tensor, target: Tensor, n_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each bin the number of predictions, the sum of their confidences, and how many are right."""
    confidence, correct = _outcomes(probabilities, target)
    place = torch.bucketize(confidence, _edges(n_bins, confidence)[1:-1])
    return (
        torch.bincount(place, minlength=n_bins),
        torch.bincount(place, weights=confidence.double(), minlength=n_bins),
        torch.bincount(place, weights=correct.double(), minlength=n_bins),
    )


def _ece(count: Tensor, confidence: Tensor, correct: Tensor) -> Tensor:
    return (confidence - correct).abs().sum() / count.sum().clamp_min(1)


def _bins(count: Tensor, confidence: Tensor, correct: Tensor) -> ReliabilityBins:
    size = torch.where(count > 0, count, torch.nan)
    return ReliabilityBins(_edges(len(count), confidence), count, confidence / size, correct / size)


def _classwise_gaps(probabilities: Tensor, target: Tensor, n_bins: int) -> tuple[Tensor, int]:
    """Sums (C, B) of ``p_k - 1[k = y]`` over the rows of each class's bins, and the number of rows."""
    probabilities, target = _labelled(probabilities, target)
    rows, classes = probabilities.shape
    place = torch.bucketize(probabilities, _edges(n_bins, probabilities)[1:-1])
    place = place + n_bins * torch.arange(classes, device=place.device)
    of_label = place.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    size = classes * n_bins
    forecast = torch.bincount(place.flatten(), weights=probabilities.double().flatten(), minlength=size)
    return (forecast - torch.bincount(of_label, minlength=size)).reshape(classes, n_bins), rows


def _brier(probabilities: Tensor, target: Tensor) -> Tensor:
    probabilities, target = _labelled(probabilities, target)
    probabilities = probabilities.double()
    of_label = probabilities.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return probabilities.square().sum(-1) - 2 * of_label + 1


def _auroc(confidence: Tensor, correct: Tensor) -> Tensor:
    """By the rank sum of the right predictions, with mean ranks for ties (Mann and Whitney)."""
    _, group, size = confidence.unique(return_inverse=True, return_counts=True)
    size = size.double()
    rank = (size.cumsum(0) - (size - 1) / 2)[group]
    right = correct.sum().double()
    pairs = right * (correct.numel() - right)
    area = (torch.where(correct, rank, 0.0).sum() - right * (right + 1) / 2) / pairs
    return torch.where(pairs > 0, area, torch.nan)


def _sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection on the simplex: ``relu(scores - c)`` with c from the sorted scores."""
    ordered = scores.sort(-1, descending=True).values
    size = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    excess = ordered.cumsum(-1) - 1
    support = (size * ordered > excess).sum(-1, keepdim=True)
    level = excess.gather(-1, support - 1) / support
    return (scores - level).relu()


def _dense_ranks(values: Tensor) -> Tensor:
    """Integers in [0, C) in the order of each row's values, the same for equal values."""
    return torch.searchsorted(values.sort(-1).values.contiguous(), values.contiguous())


def _tied_pairs(ranks: Tensor) -> Tensor:
    """How many pairs of each row are equal."""
    ordered = ranks.sort(-1).values.contiguous()
    earlier = torch.searchsorted(ordered, ordered)  # the first of those equal to it
    return (torch.arange(ranks.shape[-1], device=ranks.device) - earlier).sum(-1).double()


def _inversions(ranks: Tensor) -> Tensor:
    """How many pairs of each row stand in the wrong order, counted while merging sorted halves of halves."""
    length = max(1 << (ranks.shape[-1] - 1).bit_length(), 1) if ranks.shape[-1] else 1
    # what fills up to a power of two stands at the end and is largest, so that it adds no pair
    padded = torch.nn.functional.pad(ranks, (0, length - ranks.shape[-1]), value=ranks.shape[-1])
    total = torch.zeros(ranks.shape[:-1], dtype=torch.long, device=ranks.device)
    half = 1
    while half < length:
        blocks = padded.reshape(*ranks.shape[:-1], -1, 2, half)
        left, right = blocks[..., 0, :].contiguous(), blocks[..., 1, :].contiguous()
        total = total + (half - torch.searchsorted(left, right, right=True)).sum((-1, -2))
        padded = blocks.flatten(-2).sort(-1).values.flatten(-2)
        half *= 2
    return total.double()


def _draw(bins: ReliabilityBins, ax: "Axes | None") -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(figsize=(4.5, 4.5), layout="constrained").subplots()
    edges, counts, confidence, accuracy = (tensor.numpy() for tensor in bins)
    filled = counts > 0
    share = counts / max(counts.sum(), 1)
    confidence, accuracy = confidence[filled], accuracy[filled]
    error = (share[filled] * abs(accuracy - confidence)).sum()
    ax.bar(edges[:-1], share, 1 / len(counts), align="edge", color="0.85", label="share of examples")
    ax.plot([0, 1], [0, 1], "--", color="black", linewidth=1)
    ax.plot(confidence, accuracy, "o-", color="#2a5d9f", label="accuracy")
    ax.vlines(confidence, confidence, accuracy, color="#b3382c")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    ax.set_title(f"ECE {error:.3f}")
    ax.legend(loc="upper left", frameon=False)
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure, ax
