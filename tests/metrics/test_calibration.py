"""Calibration of confidences and probabilities, and decisions from utilities."""

import matplotlib as mpl
import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from telos.metrics.calibration import (
    GRID,
    BrierScore,
    ClasswiseCalibrationError,
    ConfidenceAUROC,
    ExpectedCalibrationError,
    ReliabilityDiagram,
    brier_score,
    classwise_calibration_error,
    confidence_auroc,
    expected_calibration_error,
    fit_beta,
    minimum_bayes_risk,
    ordinal_agreement,
    reliability_diagram,
    top1_brier,
    utility_to_probability,
)

mpl.use("Agg")


def forecast(n: int = 400, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(-1), torch.randint(classes, (n,), generator=generator)


# ---------------------------------------------------------------------------------------------- confidence


@pytest.mark.parametrize("n_bins", [1, 15, 25])
def test_ece_is_that_of_torchmetrics(n_bins: int) -> None:
    probabilities, target = forecast()
    expected = multiclass_calibration_error(probabilities, target, num_classes=4, n_bins=n_bins)
    found = expected_calibration_error(probabilities, target, n_bins=n_bins)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    for dtype in (torch.float32, torch.float64):
        confidence = torch.tensor([0.0, 0.2, 0.4, 1.0], dtype=dtype)
        counts = reliability_diagram(confidence, torch.ones(4, dtype=torch.bool), n_bins=5).counts
        assert counts.tolist() == [2, 1, 0, 0, 1]


def test_ece_of_a_calibrated_forecast_tends_to_zero() -> None:
    def error(n: int) -> float:
        generator = torch.Generator().manual_seed(0)
        confidence = torch.rand(n, generator=generator, dtype=torch.float64)
        right = torch.rand(n, generator=generator, dtype=torch.float64) < confidence
        return expected_calibration_error(confidence, right).item()

    # about sqrt(2 / pi) * mean sqrt(p (1 - p)) * sqrt(25 / n)
    for n in (2_500, 250_000):
        assert error(n) == pytest.approx(0.31 * (25 / n) ** 0.5, rel=0.4)


def test_bins_by_hand() -> None:
    confidence = torch.tensor([0.1, 0.2, 0.9, 0.7, 0.6])
    right = torch.tensor([0, 1, 1, 1, 0])
    bins = reliability_diagram(confidence, right, n_bins=4)
    assert bins.counts.tolist() == [2, 0, 2, 1]
    assert bins.accuracy.tolist()[0::2] == [0.5, 0.5]
    assert bins.accuracy.isnan().tolist() == bins.confidence.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(bins.confidence[0], torch.tensor(0.15, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(bins.edges, torch.linspace(0, 1, 5, dtype=torch.float64))
    # 2/5 |.15 - .5| + 2/5 |.65 - .5| + 1/5 |.9 - 1|
    assert expected_calibration_error(confidence, right, n_bins=4).item() == pytest.approx(0.22)


def test_labels_and_outcomes_are_two_ways_to_say_it() -> None:
    probabilities, target = forecast()
    confidence, predicted = probabilities.max(-1)
    for function in (expected_calibration_error, top1_brier, confidence_auroc):
        assert function(probabilities, target) == function(confidence, predicted == target)
        assert function(confidence, (predicted == target).int()) == function(confidence, predicted == target)


def test_sequences_are_one_batch() -> None:
    probabilities, target = forecast()
    folded = probabilities.reshape(20, 20, 4), target.reshape(20, 20)
    for function in (
        expected_calibration_error,
        top1_brier,
        confidence_auroc,
        brier_score,
        classwise_calibration_error,
    ):
        assert function(*folded) == function(probabilities, target)


def test_classwise_by_definition() -> None:
    probabilities, target = forecast()
    total = 0.0
    for k in range(4):
        total += expected_calibration_error(probabilities[:, k], target == k, n_bins=15).item()
    found = classwise_calibration_error(probabilities, target, n_bins=15)
    assert found.item() == pytest.approx(total / 4, rel=1e-12)


def test_brier_by_definition_and_of_a_guess() -> None:
    probabilities, target = forecast()
    expected = (probabilities - torch.nn.functional.one_hot(target, 4)).square().sum(-1).mean()
    torch.testing.assert_close(brier_score(probabilities, target), expected)
    assert brier_score(torch.full((3, 4), 0.25), torch.tensor([0, 1, 2])) == 0.75


def test_auroc_with_ties_is_that_of_torchmetrics() -> None:
    probabilities, target = forecast()
    confidence, predicted = probabilities.max(-1)
    confidence = (20 * confidence).round() / 20
    expected = binary_auroc(confidence, (predicted == target).long())
    found = confidence_auroc(confidence, predicted == target)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)


def test_auroc_sees_only_the_order() -> None:
    probabilities, target = forecast()
    confidence, predicted = probabilities.max(-1)
    right = predicted == target
    assert confidence_auroc(confidence**3, right) == confidence_auroc(confidence, right)
    assert confidence_auroc(confidence, ~right).item() == pytest.approx(
        1 - confidence_auroc(confidence, right).item(), rel=1e-12
    )
    assert confidence_auroc(right.double(), right) == 1
    assert confidence_auroc(torch.full((400,), 0.5), right) == 0.5
    assert confidence_auroc(confidence, torch.ones_like(right)).isnan()


def test_half_precision_is_counted_in_full() -> None:
    probabilities, target = forecast()
    half = probabilities.half()
    for function in (expected_calibration_error, top1_brier, brier_score, classwise_calibration_error):
        assert function(half, target).dtype == torch.float64
        assert function(half, target) == function(half.float(), target)


# ---------------------------------------------------------------------------------------------- metrics

METRICS = [
    (ExpectedCalibrationError, {}, expected_calibration_error),
    (ReliabilityDiagram, {}, reliability_diagram),
    (ClasswiseCalibrationError, {"num_classes": 4}, classwise_calibration_error),
    (BrierScore, {}, brier_score),
    (ConfidenceAUROC, {}, confidence_auroc),
]
each = pytest.mark.parametrize(
    ("metric", "options", "function"), METRICS, ids=lambda v: getattr(v, "__name__", "")
)


@each
def test_metric_accumulates_over_unequal_batches_and_resets(metric, options, function) -> None:
    probabilities, target = forecast()
    built: Metric = metric(**options)
    for part in torch.arange(400).split([7, 193, 200]):
        built.update(probabilities[part], target[part])
    torch.testing.assert_close(built.compute(), function(probabilities, target), equal_nan=True)
    built.reset()
    built.update(probabilities[:50], target[:50])
    torch.testing.assert_close(built.compute(), function(probabilities[:50], target[:50]), equal_nan=True)


@each
def test_metric_of_parts_merges(metric, options, function) -> None:
    """What torchmetrics does between ranks: states are added, or put together."""
    probabilities, target = forecast()
    first, second = metric(**options), metric(**options)
    first.update(probabilities[:90], target[:90])
    second.update(probabilities[90:], target[90:])
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), function(probabilities, target), equal_nan=True)


@each
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_seen(metric, options, function) -> None:
    found, direct = metric(**options), function(torch.empty(0, 4), torch.empty(0, dtype=torch.long))
    value = found.compute()
    if metric is ReliabilityDiagram:
        assert value.counts.sum() == direct.counts.sum() == 0
    elif metric is ConfidenceAUROC:
        assert value.isnan()
        assert direct.isnan()
    else:
        assert value == direct == 0


@each
def test_metric_is_drawn(metric, options, function) -> None:
    probabilities, target = forecast()
    built = metric(**options)
    value = built(probabilities, target)
    figure, axes = built.plot()
    figure.canvas.draw()
    assert axes.lines
    other, _ = built.plot(value)
    assert other is not figure


def test_diagram_shows_the_filled_bins() -> None:
    diagram = ReliabilityDiagram(n_bins=4)
    diagram.update(torch.tensor([0.1, 0.2, 0.9, 0.7, 0.6]), torch.tensor([0, 1, 1, 1, 0]))
    _, axes = diagram.plot()
    diagonal, curve = axes.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    np.testing.assert_allclose(curve.get_xydata(), [[0.15, 0.5], [0.65, 0.5], [0.9, 1.0]], rtol=1e-6)
    assert [bar.get_height() for bar in axes.patches] == [0.4, 0.0, 0.4, 0.2]
    assert axes.get_title() == "ECE 0.220"


def test_metrics_stand_in_a_collection() -> None:
    probabilities, target = forecast()
    collection = MetricCollection([ExpectedCalibrationError(), BrierScore(), ConfidenceAUROC()])
    collection.update(probabilities, target)
    found = collection.compute()
    assert found["BrierScore"] == brier_score(probabilities, target)
    assert found["ConfidenceAUROC"] == confidence_auroc(probabilities, target)


# ---------------------------------------------------------------------------------------------- decisions


def test_gibbs_is_the_softmax_of_the_scaled_utilities() -> None:
    utilities = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(utility_to_probability(utilities), utilities.softmax(-1))
    torch.testing.assert_close(
        utility_to_probability(utilities, beta=3.0), utility_to_probability(3 * utilities)
    )
    assert (utility_to_probability(utilities, beta=0.0) == 1 / 6).all()


@pytest.mark.parametrize("rule", ["gibbs", "sparsemax"])
def test_large_beta_is_the_best_choice(rule: str) -> None:
    utilities = torch.randn(5, 6, dtype=torch.float64)
    expected = torch.nn.functional.one_hot(utilities.argmax(-1), 6).double()
    torch.testing.assert_close(utility_to_probability(utilities, beta=1e6, rule=rule), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["gibbs", "sparsemax"])
@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_probabilities_keep_the_order_and_sum_to_one(rule: str, beta: float) -> None:
    utilities = torch.randn(50, 6, dtype=torch.float64)
    p = utility_to_probability(utilities, beta=beta, rule=rule)  # type: ignore[arg-type]
    torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=torch.float64))
    ordered = p.gather(-1, utilities.argsort(-1))
    assert (ordered.diff() >= 0).all()
    assert (p >= 0).all()


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    """Its optimality condition: beta u - p is the same where p > 0, and no larger elsewhere."""
    utilities = torch.randn(50, 6, dtype=torch.float64)
    p = utility_to_probability(utilities, beta=1.5, rule="sparsemax")
    rest = 1.5 * utilities - p
    level = torch.where(p > 0, rest, -torch.inf).amax(-1, keepdim=True)
    torch.testing.assert_close(torch.where(p > 0, rest, level), level.expand_as(p))
    assert (rest <= level + 1e-12).all()
    assert 0 < (p == 0).sum() < p.numel() - 50


def test_excluded_and_extreme_choices() -> None:
    utilities = torch.tensor([[1.0, -torch.inf, 1.0]])
    for beta in (0.0, 1.0, 8.0):
        assert utility_to_probability(utilities, beta=beta).tolist() == [[0.5, 0.0, 0.5]]
    assert utility_to_probability(utilities, rule="sparsemax").tolist() == [[0.5, 0.0, 0.5]]
    half = torch.tensor([60000.0, -60000.0], dtype=torch.float16)
    found = utility_to_probability(half, beta=16.0)
    assert found.dtype == torch.float32
    assert found.tolist() == [1.0, 0.0]


def test_beta_follows_the_decision() -> None:
    """Sampling is best sharp; the log-likelihood of well-fitted utilities is best at 1."""
    generator = torch.Generator().manual_seed(0)
    utilities = 2 * torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    target = torch.multinomial(utilities.softmax(-1), 1, generator=generator).squeeze(-1)
    best = utilities.argmax(-1)

    def chosen(p: Tensor, labels: Tensor) -> Tensor:
        return p.gather(-1, labels.unsqueeze(-1))

    assert fit_beta(utilities, lambda p: chosen(p, best).mean()) == GRID[-1]
    assert fit_beta(utilities, lambda p: chosen(p, target).log().mean()) == 1.0
    assert fit_beta(utilities, lambda p: 0.0, grid=(3.0, 2.0)) == 3.0


@pytest.mark.parametrize("classes", [2, 3, 7, 16, 33])
@pytest.mark.parametrize("levels", [3, 1000])
def test_agreement_is_kendalls_tau(classes: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    first, second = (torch.randint(levels, (4, 5, classes), generator=generator).double() for _ in range(2))
    second = torch.where(torch.rand(4, 5, 1, generator=generator) < 0.5, first + second / 4, second)
    found = ordinal_agreement(first, second)
    for i in range(4):
        for j in range(5):
            expected = kendalltau(first[i, j].numpy(), second[i, j].numpy()).statistic
            assert found[i, j].item() == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_agreement_sees_only_the_order() -> None:
    utilities, frequencies = torch.randn(9, 6), torch.rand(9, 6)
    agreement = ordinal_agreement(utilities, frequencies)
    torch.testing.assert_close(ordinal_agreement(utilities.exp(), 3 * frequencies - 1), agreement)
    torch.testing.assert_close(ordinal_agreement(-utilities, frequencies), -agreement)
    assert (ordinal_agreement(utilities, utilities) == 1).all()
    assert ordinal_agreement(torch.ones(2, 4), torch.rand(2, 4)).isnan().all()
    utilities[3, 2] = torch.nan
    assert ordinal_agreement(utilities, frequencies).isnan().nonzero().tolist() == [[3]]


def test_least_risk_under_zero_one_and_squared_cost() -> None:
    p = torch.randn(40, 7, dtype=torch.float64).softmax(-1)
    assert torch.equal(minimum_bayes_risk(p, 1 - torch.eye(7)), p.argmax(-1))
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.5, 3.0, 7.0], dtype=torch.float64)
    squared = (values[:, None] - values).square()
    nearest = ((p @ values)[:, None] - values).abs().argmin(-1)
    assert torch.equal(minimum_bayes_risk(p, squared), nearest)


# ---------------------------------------------------------------------------------------------- doors


@pytest.mark.bare
def test_doors_of_calibration() -> None:
    probabilities, target = forecast(n=4)
    for function in (expected_calibration_error, top1_brier, confidence_auroc, brier_score):
        with pytest.raises(ValueError, match=r"probabilities must lie in \[0, 1\].*softmax"):
            function(4 * probabilities, target)
        with pytest.raises(ValueError, match=r"target must lie in \[0, 4\), got 4"):
            function(probabilities, torch.tensor([0, 1, 2, 4]))
        with pytest.raises(ValueError, match=r"target must have shape \(4,\), got \(3,\)"):
            function(probabilities, target[1:])
        with pytest.raises(TypeError, match="probabilities must have a floating-point dtype"):
            function(target, target)
        with pytest.raises(TypeError, match="target must have an integer dtype"):
            function(probabilities, target.double())
    with pytest.raises(ValueError, match=r"target must lie in \[0, 2\), got 3"):
        confidence_auroc(torch.rand(4), torch.tensor([0, 1, 1, 3]))
    for bad in (expected_calibration_error, reliability_diagram, classwise_calibration_error):
        with pytest.raises(ValueError, match=r"n_bins must lie in"):
            bad(probabilities, target, n_bins=0)
    with pytest.raises(ValueError, match="n_bins must lie in"):
        ExpectedCalibrationError(n_bins=0)
    with pytest.raises(ValueError, match=r"probabilities must have shape \(\.\.\., 3\)"):
        ClasswiseCalibrationError(num_classes=3).update(probabilities, target)


@pytest.mark.bare
def test_doors_of_decisions() -> None:
    utilities = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="rule must be 'gibbs' or 'sparsemax'"):
        utility_to_probability(utilities, rule="softmax")  # type: ignore[arg-type]
    for options in ({"beta": -1.0}, {"beta": float("inf")}, {"beta": 0.0, "rule": "sparsemax"}):
        with pytest.raises(ValueError, match="beta must lie in"):
            utility_to_probability(utilities, **options)
    with pytest.raises(TypeError, match="utilities must have a floating-point dtype"):
        utility_to_probability(utilities.long())
    with pytest.raises(ValueError, match="grid must hold a beta"):
        fit_beta(utilities, lambda p: 1.0, grid=())
    with pytest.raises(ValueError, match="grid must hold a beta"):
        fit_beta(utilities, lambda p: float("nan"))
    with pytest.raises(ValueError, match=r"target_probabilities must have shape \(2, 3\)"):
        ordinal_agreement(utilities, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"cost must have shape \(A, 3\), got \(3, 2\)"):
        minimum_bayes_risk(utilities, torch.zeros(3, 2))
