"""From rows to a number: torch's conventions, denominators, and rows that do not count."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import CrossEntropyLoss, comp_sum_loss, cross_entropy_loss, reduce
from telos.losses._reduction import (
    at_least_float32,
    at_target,
    check_reduction,
    classification_rows,
    safe_sqrt,
)

cross_entropy_rows = partial(F.cross_entropy, reduction="none")


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(7, 4, dtype=torch.float64)


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 3, -100, 1, 1, -100, 2])


@pytest.fixture
def class_weight() -> Tensor:
    return torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)


def probabilities(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).softmax(-1)


# ---------------------------------------------------------------------------------------- torch's conventions


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_labels_as_in_torch(
    logits: Tensor, labels: Tensor, class_weight: Tensor, reduction: str, weighted: bool
) -> None:
    weight = class_weight if weighted else None
    torch.testing.assert_close(
        cross_entropy_loss(logits, labels, class_weight=weight, reduction=reduction),
        F.cross_entropy(logits, labels, weight=weight, reduction=reduction),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_as_in_torch(
    logits: Tensor, class_weight: Tensor, reduction: str, weighted: bool
) -> None:
    target, weight = probabilities(7, 4), class_weight if weighted else None
    for loss in (cross_entropy_loss, comp_sum_loss):  # torch's own arithmetic, and that of at_target
        torch.testing.assert_close(
            loss(logits, target, class_weight=weight, reduction=reduction),
            F.cross_entropy(logits, target, weight=weight, reduction=reduction),
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_sequences_as_in_torch(class_weight: Tensor, reduction: str, soft: bool) -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    target = probabilities(2, 3, 4) if soft else torch.tensor([[0, 1, -100], [2, -100, 3]])
    found = cross_entropy_loss(logits, target, class_weight=class_weight, reduction=reduction)
    classes_second = target.movedim(-1, 1) if soft else target
    expected = F.cross_entropy(
        logits.movedim(-1, 1), classes_second, weight=class_weight, reduction=reduction
    )
    torch.testing.assert_close(found, expected)


def test_another_ignore_index(logits: Tensor) -> None:
    target = torch.tensor([0, 3, 1, 2, 1, 1, 0])
    torch.testing.assert_close(
        cross_entropy_loss(logits, target, ignore_index=1), F.cross_entropy(logits, target, ignore_index=1)
    )
    # it names a label, so that it means nothing for probabilities
    soft = probabilities(7, 4)
    torch.testing.assert_close(
        cross_entropy_loss(logits, soft, ignore_index=1), F.cross_entropy(logits, soft)
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_labels_of_a_narrow_integer_dtype(dtype: torch.dtype) -> None:
    """156 is -100 modulo 256, and 300 classes do not fit into a byte: neither may wrap around."""
    target = torch.tensor([44, 100] if dtype == torch.int8 else [156, 200]).to(dtype)
    logits = torch.randn(2, 300, dtype=torch.float64)
    values, weights = classification_rows(cross_entropy_rows, logits, target)
    assert weights.tolist() == [1, 1]
    torch.testing.assert_close(values, cross_entropy_rows(logits, target.long()))


# ------------------------------------------------------------------------------------------- sample weights


def test_sample_weight_is_a_weighted_mean(logits: Tensor, labels: Tensor, class_weight: Tensor) -> None:
    weight = torch.tensor([1.0, 2.0, 5.0, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    rows = F.cross_entropy(logits, labels, reduction="none")
    kept = weight * (labels != -100)
    found = cross_entropy_loss(logits, labels, sample_weight=weight)
    torch.testing.assert_close(found, (kept * rows).sum() / kept.sum())
    both = kept * class_weight[labels.clamp_min(0)]
    found = cross_entropy_loss(logits, labels, sample_weight=weight, class_weight=class_weight)
    torch.testing.assert_close(found, (both * rows).sum() / both.sum())


def test_whole_sample_weights_repeat_examples(logits: Tensor) -> None:
    target, times = torch.tensor([0, 3, 2, 1, 1, 0, 2]), torch.tensor([1, 0, 2, 3, 1, 0, 1])
    repeated = F.cross_entropy(logits.repeat_interleave(times, 0), target.repeat_interleave(times))
    torch.testing.assert_close(cross_entropy_loss(logits, target, sample_weight=times.double()), repeated)


def test_gradient_reaches_the_sample_weights(logits: Tensor) -> None:
    weight = torch.rand(7, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 2, 1, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda w: cross_entropy_loss(logits, target, sample_weight=w), weight)


# --------------------------------------------------------------------------------------------- denominators


def test_denominators() -> None:
    values, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.5, 0.0])
    assert reduce(values, weights) == 2 / 1.5
    assert reduce(values, weights, "sum") == 2
    assert reduce(values, weights, "none").tolist() == [1, 1, 0]
    assert reduce(values, weights, denominator=4) == 0.5
    assert reduce(values, weights, denominator=torch.tensor(4)) == 0.5
    assert reduce(values, weights, denominator="global") == 2 / 1.5  # one process
    assert reduce(values, weights, denominator=0) == 2
    assert reduce(values, weights, denominator=torch.tensor(0.0)) == 2


def test_accumulation_over_parts_of_a_batch(logits: Tensor, labels: Tensor, class_weight: Tensor) -> None:
    whole = cross_entropy_loss(logits, labels, class_weight=class_weight)
    total = class_weight[labels[labels != -100]].sum()
    parts = [
        cross_entropy_loss(logits[part], labels[part], class_weight=class_weight, denominator=total)
        for part in (slice(0, 3), slice(3, 7))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


@pytest.mark.bare
def test_unknown_reductions_and_denominators_are_refused() -> None:
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'average'"):
        check_reduction("average")
    with pytest.raises(ValueError, match="needs reduction='mean', got 'sum'"):
        check_reduction("sum", 3.0)
    with pytest.raises(ValueError, match=r"denominator must be .*, got 'local'"):
        check_reduction("mean", "local")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'average'"):
        CrossEntropyLoss(reduction="average")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ rows that do not count


def test_nan_in_rows_that_do_not_count_reaches_neither_value_nor_gradient(
    logits: Tensor, labels: Tensor, class_weight: Tensor
) -> None:
    weight = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0], dtype=torch.float64)
    # out: row 0 by its weight, 1 by its class, 2 and 5 by their label (5 with a weight that is NaN itself)
    out, kept = [0, 1, 2, 5], [3, 4, 6]
    broken = logits.clone()
    broken[out] = torch.tensor([math.nan, math.inf, -math.inf, 0.0], dtype=torch.float64)
    broken.requires_grad_()
    loss = cross_entropy_loss(broken, labels, sample_weight=weight, class_weight=class_weight)
    expected = F.cross_entropy(logits[kept], labels[kept], weight=class_weight)
    torch.testing.assert_close(loss, expected)
    (slope,) = torch.autograd.grad(loss, broken)
    assert torch.count_nonzero(slope[out]) == 0
    assert torch.isfinite(slope).all()
    assert slope[kept].abs().sum() > 0


def test_nan_in_soft_rows_of_weight_zero(logits: Tensor) -> None:
    soft, weight = probabilities(7, 4), torch.ones(7, dtype=torch.float64)
    weight[2], broken, broken_soft = 0.0, logits.clone(), soft.clone()
    broken[2], broken_soft[2] = math.nan, math.nan
    broken.requires_grad_()
    kept = [0, 1, 3, 4, 5, 6]
    for loss in (cross_entropy_loss, comp_sum_loss):
        value = loss(broken, broken_soft, sample_weight=weight)
        torch.testing.assert_close(value, F.cross_entropy(logits[kept], soft[kept]))
        assert torch.isfinite(torch.autograd.grad(value, broken)[0]).all()


def test_nan_in_a_row_that_counts_propagates(logits: Tensor) -> None:
    target = torch.tensor([0, 3, 2, 1, 1, 0, 2])
    broken = logits.clone()
    broken[1, 2] = math.nan
    assert cross_entropy_loss(broken, target).isnan()
    rows = cross_entropy_loss(broken, target, reduction="none")
    assert rows.isnan().tolist() == [False, True] + 5 * [False]
    weight = torch.ones(7, dtype=torch.float64)
    weight[4] = math.nan
    assert cross_entropy_loss(logits, target, sample_weight=weight).isnan()


@pytest.mark.parametrize("case", ["empty", "empty sequence", "ignored", "weightless", "weightless class"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_where_nothing_counts_the_loss_is_zero_with_a_graph(case: str, reduction: str) -> None:
    shape = {"empty": (0, 3), "empty sequence": (2, 0, 3)}.get(case, (4, 3))
    logits = torch.full(shape, math.nan, requires_grad=True)
    target = torch.full(shape[:-1], -100 if case == "ignored" else 1)
    weights = {
        "weightless": {"sample_weight": torch.zeros(4)},
        "weightless class": {"class_weight": torch.tensor([1.0, 0.0, 1.0])},
    }.get(case, {})
    loss = cross_entropy_loss(logits, target, reduction=reduction, **weights)
    assert loss == 0
    (slope,) = torch.autograd.grad(loss, logits)
    assert slope.shape == shape
    assert torch.count_nonzero(slope) == 0


def test_empty_batch_without_reduction_keeps_its_shape() -> None:
    assert cross_entropy_loss(
        torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), reduction="none"
    ).shape == (0,)
    assert cross_entropy_loss(torch.zeros(2, 0, 3), torch.zeros(2, 0, 3), reduction="none").shape == (2, 0)


# ------------------------------------------------------------------------------------------------ companions


def inner_product(first: Tensor, target: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(-1)


def test_companions_are_flattened_raised_and_masked_with_the_logits() -> None:
    logits, partner = torch.randn(2, 3, 4), torch.randn(2, 3, 4).half()
    target = torch.tensor([[0, 1, -100], [2, 3, 0]])
    partner[0, 2] = math.nan
    logits[0, 2] = math.nan
    values, weights = classification_rows(inner_product, logits, target, companions={"partner": partner})
    assert weights.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert values.dtype == torch.float32
    expected = (logits * partner.float()).sum(-1)
    expected[0, 2] = 0
    torch.testing.assert_close(values, expected)


@pytest.mark.bare
def test_companions_are_checked_by_name() -> None:
    logits, target = torch.randn(2, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"partner must have shape \(2, 4\), got \(2, 3\)"):
        classification_rows(inner_product, logits, target, companions={"partner": torch.zeros(2, 3)})
    wrong = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(TypeError, match=r"partner must have a floating-point dtype, got torch\.int64"):
        classification_rows(inner_product, logits, target, companions={"partner": wrong})


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (100 * torch.randn(6, 5)).to(dtype).requires_grad_()
    target, weight = torch.tensor([0, 1, 2, 3, 4, 0]), torch.rand(5).to(dtype)
    loss = cross_entropy_loss(logits, target, class_weight=weight, sample_weight=torch.ones(6, dtype=dtype))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.detach().float(), target, weight=weight.float()))
    assert torch.autograd.grad(loss, logits)[0].dtype == dtype


def test_dtype_follows_the_logits() -> None:
    target = torch.tensor([0, 1])
    double = torch.zeros(2, 3, dtype=torch.float64)
    assert cross_entropy_loss(double, target, sample_weight=torch.ones(2)).dtype == torch.float64
    assert cross_entropy_loss(double, torch.ones(2, 3) / 3, class_weight=torch.ones(3)).dtype == torch.float64
    assert at_least_float32(double) is double
    assert at_least_float32(torch.zeros(1).bfloat16()).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- pieces


def test_safe_sqrt() -> None:
    squared = torch.tensor([0.0, 4.0, 1e-300, -1.0], dtype=torch.float64, requires_grad=True)
    root = safe_sqrt(squared)
    assert root.tolist() == [0.0, 2.0, 1e-150, 0.0]
    (slope,) = torch.autograd.grad(root[:2].sum(), squared)
    assert slope.tolist() == [0.0, 0.25, 0.0, 0.0]
    assert safe_sqrt(torch.tensor(math.nan)).isnan()
    assert safe_sqrt(torch.tensor(math.inf)) == math.inf


def test_at_target_picks_or_averages() -> None:
    per_class = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert at_target(per_class, torch.tensor([2, 0])).tolist() == [3, 4]
    assert at_target(per_class, torch.tensor([2, 0]), torch.square).tolist() == [9, 16]
    soft = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    assert at_target(per_class, soft, torch.square).tolist() == [5, 25]


def test_an_absent_class_adds_nothing_though_its_loss_and_slope_are_infinite() -> None:
    per_class = torch.tensor([[1.0, 1e30]], requires_grad=True)
    value = at_target(per_class, torch.tensor([[1.0, 0.0]]), torch.exp)
    torch.testing.assert_close(value, torch.tensor([math.e]))
    torch.testing.assert_close(torch.autograd.grad(value, per_class)[0], torch.tensor([[math.e, 0.0]]))
