"""Softmax collapse and the alignment of gradients with weights."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from telos.metrics import SoftmaxCollapse, nlm_alignment, softmax_collapse, zero_term_fraction
from telos.optim import orthogonalize_


@pytest.mark.parametrize(
    ("dtype", "gap"),
    [(torch.bfloat16, 5.6), (torch.float16, 7.7), (torch.float32, 16.7), (torch.float64, 36.8)],
)
def test_gap_at_which_each_dtype_collapses(dtype: torch.dtype, gap: float) -> None:
    assert softmax_collapse(torch.tensor([[1.05 * gap, 0.0]], dtype=dtype)) == 1
    assert softmax_collapse(torch.tensor([[0.95 * gap, 0.0]], dtype=dtype)) == 0


def test_is_where_the_gradient_of_the_correct_class_vanishes() -> None:
    logits = torch.linspace(10, 25, 40).unsqueeze(1) * torch.tensor([[1.0, 0.0, 0.0]])
    logits.requires_grad_()
    F.cross_entropy(logits, torch.zeros(40, dtype=torch.long), reduction="sum").backward()
    vanished = logits.grad[:, 0] == 0
    assert 0 < vanished.sum() < 40
    assert softmax_collapse(logits) == vanished.float().mean()


def test_depends_on_differences_only() -> None:
    logits = torch.tensor([[20.0, 0.0], [3.0, 0.0]])
    assert softmax_collapse(logits) == softmax_collapse(logits - 1000) == 0.5


def test_zero_terms_are_the_correct_ones() -> None:
    logits = torch.tensor([[[20.0, 0.0], [20.0, 0.0]], [[1.0, 0.0], [0.0, 30.0]]])
    target = torch.tensor([[0, 1], [0, 1]])
    assert zero_term_fraction(logits, target) == 0.5
    assert softmax_collapse(logits) == 0.75


def test_empty_batches_count_for_nothing() -> None:
    assert softmax_collapse(torch.empty(0, 3)) == 0
    metric = SoftmaxCollapse()
    metric.update(torch.empty(0, 3))
    assert metric.compute() == 0


def test_metric_accumulates_over_unequal_batches_and_resets() -> None:
    metric = SoftmaxCollapse()
    batches = [30 * torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 1, 17)]
    for batch in batches:
        metric.update(batch)
    share = softmax_collapse(torch.cat(batches))
    assert 0 < share < 1
    assert metric.compute() == share
    metric.reset()
    metric.update(torch.zeros(2, 4))
    assert metric.compute() == 0


def test_metric_is_exact_beyond_the_integers_of_float32() -> None:
    metric = SoftmaxCollapse()
    metric.total += 2**24
    metric.update(torch.zeros(1, 2))
    assert metric.total == 2**24 + 1


def test_alignment_is_the_cosine_of_the_whole_vector() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model(torch.randn(5, 3)).square().sum().backward()
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(nlm_alignment(model.parameters()), F.cosine_similarity(-g, w, dim=0))


def test_descent_of_the_norm_is_aligned_by_minus_one_and_a_projected_gradient_by_zero() -> None:
    weight = torch.randn(6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight.square().sum().backward()
    assert nlm_alignment([weight]).item() == pytest.approx(-1)
    weight.grad = torch.randn(6, generator=torch.Generator().manual_seed(1))
    orthogonalize_([weight])
    assert nlm_alignment(weight).item() == pytest.approx(0, abs=1e-6)


def test_alignment_without_weights_or_gradients() -> None:
    weight = torch.zeros(3, requires_grad=True)
    weight.grad = torch.ones(3)
    assert nlm_alignment([weight, nn.Parameter(torch.ones(2))]) == 0
    with pytest.raises(ValueError, match="at least one parameter with a gradient"):
        nlm_alignment([nn.Parameter(torch.ones(2))])


def test_room_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "telos.metrics")
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r"pip install 'telos\[metrics\]'"):
        importlib.import_module("telos.metrics")


@pytest.mark.bare
def test_doors() -> None:
    with pytest.raises(TypeError, match="logits must have a floating-point dtype"):
        softmax_collapse(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"logits must have shape \(\.\.\., C\)"):
        softmax_collapse(torch.zeros(3))
    with pytest.raises(ValueError, match=r"target must have shape \(2,\), got \(3,\)"):
        zero_term_fraction(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
