import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import TaskInfo, misfit
from telos.losses.classification.normalized_logistic import NormalizedLogisticLoss, normalized_logistic_loss
from tests.declaration import Declaration, classification_sample, shifted

declarations = [
    Declaration(
        function=normalized_logistic_loss,
        module=NormalizedLogisticLoss,
        sample=classification_sample(),
        rows=False,
        surrogate="the gradient of the value is divided by the mean of the weights, which is not differentiated",
        superlinear="",
        invariances={"shift of the logits": shifted(1.5)},
    )
]


def problem(classes: int = 4, n: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(classes, (n,), generator=generator)


def slope(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("classes", [2, 4])
def test_gradient_is_beta_times_that_of_cross_entropy(classes) -> None:
    logits, target = problem(classes)
    miss = 1 - logits.softmax(-1).gather(1, target[:, None]).squeeze(1)
    plain = F.cross_entropy(logits, target)
    loss = normalized_logistic_loss(logits, target)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(slope(loss, logits), slope(plain, logits) / miss.mean().detach())


def test_two_logits_one_logit_and_a_column_are_one_loss() -> None:
    logits, target = problem(2)
    score = (logits[:, 1] - logits[:, 0]).detach().requires_grad_()
    loss = normalized_logistic_loss(score, target)
    torch.testing.assert_close(loss, normalized_logistic_loss(logits, target))
    torch.testing.assert_close(
        slope(loss, score), slope(normalized_logistic_loss(logits, target), logits)[:, 1]
    )
    column = score.detach().unsqueeze(1).requires_grad_()
    torch.testing.assert_close(
        slope(normalized_logistic_loss(column, target), column).squeeze(1),
        slope(normalized_logistic_loss(score, target), score),
    )


def test_gradient_keeps_its_length_where_every_weight_underflows() -> None:
    # sigmoid(-5000) is 0 even in float64
    score = torch.tensor([5000.0, 6000.0], dtype=torch.float64, requires_grad=True)
    loss = normalized_logistic_loss(score, torch.tensor([1, 1]))
    assert loss.item() == 0
    assert slope(loss, score).tolist() == [-1.0, 0.0]


def test_repeating_every_example_changes_nothing() -> None:
    logits, target = problem()
    once = normalized_logistic_loss(logits, target)
    twice = normalized_logistic_loss(torch.cat([logits, logits]), torch.cat([target, target]))
    torch.testing.assert_close(once, twice)
    torch.testing.assert_close(slope(once, logits), slope(twice, logits))


def test_a_weight_of_two_is_a_repeated_example() -> None:
    logits, target = problem()
    weight = torch.ones(9, dtype=torch.float64)
    weight[0] = 2
    weighted = normalized_logistic_loss(logits, target, sample_weight=weight)
    repeated = normalized_logistic_loss(torch.cat([logits, logits[:1]]), torch.cat([target, target[:1]]))
    torch.testing.assert_close(weighted, repeated)
    torch.testing.assert_close(slope(weighted, logits), slope(repeated, logits))


def test_the_total_gradient_of_the_margins_is_one() -> None:
    score = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    loss = normalized_logistic_loss(score, torch.ones(7, dtype=torch.long))
    assert slope(loss, score).sum().item() == pytest.approx(-1.0)


def test_reductions_agree() -> None:
    logits, target = problem()
    mean = slope(normalized_logistic_loss(logits, target), logits)
    none = slope(normalized_logistic_loss(logits, target, reduction="none").mean(), logits)
    total = slope(normalized_logistic_loss(logits, target, reduction="sum"), logits)
    torch.testing.assert_close(none, mean)
    torch.testing.assert_close(total, 9 * mean)


def test_ignored_examples_take_no_part() -> None:
    logits, target = problem()
    poisoned = logits.detach().clone()
    poisoned[[0, 4]] = math.nan
    poisoned.requires_grad_()
    ignored = target.clone()
    ignored[[0, 4]] = -100
    kept = [1, 2, 3, 5, 6, 7, 8]
    loss = normalized_logistic_loss(poisoned, ignored)
    rest = normalized_logistic_loss(logits[kept], target[kept])
    torch.testing.assert_close(loss, rest)
    torch.testing.assert_close(slope(loss, poisoned)[kept], slope(rest, logits)[kept])
    assert (slope(normalized_logistic_loss(poisoned, ignored), poisoned)[[0, 4]] == 0).all()


def test_nothing_that_counts_is_zero_with_a_graph() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = normalized_logistic_loss(logits, torch.full((3,), -100))
    assert loss.item() == 0
    assert (slope(loss, logits) == 0).all()


def test_a_step_of_sgd_is_one_of_normalized_gradient_descent() -> None:
    from telos.theory.perceptron import logistic_gd

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.rand(20, generator=generator) < 0.5, -1, 1)
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    path = logistic_gd(features, labels, gamma=3.0, max_steps=5, stop_when_separated=False)
    for step in range(5):
        gradient = slope(normalized_logistic_loss(features @ theta, (labels + 1) // 2), theta)
        theta = (theta - 3.0 * gradient).detach().requires_grad_()
        torch.testing.assert_close(theta, path.theta[step + 1], rtol=1e-10, atol=1e-12)


def test_it_fits_a_classification_task() -> None:
    assert misfit(NormalizedLogisticLoss, TaskInfo(family="classification", num_classes=10)) is None


@pytest.mark.bare
def test_errors() -> None:
    with pytest.raises(TypeError, match="target"):
        normalized_logistic_loss(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="target"):
        normalized_logistic_loss(torch.zeros(4, 3), torch.zeros(2, dtype=torch.long))
