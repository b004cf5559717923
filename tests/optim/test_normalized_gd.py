"""NormalizedGD: the paper's counts, its perceptron limit, and the loss with the same gradient."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel

from telos.losses import NormalizedLogisticLoss, cross_entropy_loss
from telos.optim import NormalizedGD
from telos.theory import batch_perceptron, maximum_margin, separation_bound, worst_case_dataset
from tests.conformance.ranks import on_ranks


def separable(seed: int, examples: int = 40, features: int = 3) -> Tensor:
    """Examples times their labels, separated by a drawn direction with room."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(4 * examples, features, generator=generator, dtype=torch.float64)
    direction = torch.randn(features, generator=generator, dtype=torch.float64)
    heights = points @ direction / direction.norm()
    return (points * heights.sign().unsqueeze(1))[heights.abs() > 0.2][:examples]


def steps_to_separate(signed: Tensor, lr: float, most: int = 2000) -> tuple[int, Tensor]:
    theta = torch.zeros(signed.shape[1], dtype=signed.dtype, requires_grad=True)
    optimizer = NormalizedGD([theta], lr=lr)
    for count in range(most):
        optimizer.step(lambda: softplus(-signed @ theta))
        if optimizer.separated:
            return count, theta.detach()
    raise AssertionError("not separated")


@pytest.mark.parametrize(("lr", "count"), [(100.0, 2), (10.0, 2), (1.0, 16), (0.1, 157)])
def test_the_counts_of_the_paper(lr: float, count: int) -> None:
    """Table 1, the worst-case data of a thousand examples."""
    features, labels = worst_case_dataset(1000)
    found, theta = steps_to_separate(features.double() * labels.unsqueeze(1), lr)
    assert found == count
    assert (labels * (features.double() @ theta) > 0).all()


@pytest.mark.parametrize("lr", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds(seed: int, lr: float) -> None:
    signed = separable(seed)
    labels = torch.ones(len(signed), dtype=torch.long)
    radius = float(signed.norm(dim=1).max())
    margin, _ = maximum_margin(signed, labels)
    count, _ = steps_to_separate(signed, lr)
    assert count <= separation_bound(radius, margin, len(signed), lr)


@pytest.mark.parametrize("seed", range(4))
def test_large_rates_are_the_batch_perceptron(seed: int) -> None:
    signed = separable(seed)
    labels = torch.ones(len(signed), dtype=torch.long)
    path = batch_perceptron(signed, labels, normalized=True)
    lr = 1e7
    theta = torch.zeros(signed.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = NormalizedGD([theta], lr=lr)
    for want in path.theta[1:]:
        optimizer.step(lambda: softplus(-signed @ theta))
        torch.testing.assert_close(theta.detach() / lr, want, rtol=1e-6, atol=1e-9)


def test_the_same_step_as_the_loss_under_sgd() -> None:
    torch.manual_seed(0)
    inputs, target = torch.randn(12, 5, dtype=torch.float64), torch.randint(3, (12,))
    one, other = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
    other.load_state_dict(one.state_dict())
    ours = NormalizedGD(one.parameters(), lr=0.7)
    theirs, loss = torch.optim.SGD(other.parameters(), lr=0.7), NormalizedLogisticLoss()
    for _ in range(5):
        mean = ours.step(lambda: cross_entropy_loss(one(inputs), target, reduction="none"))
        theirs.zero_grad()
        value = loss(other(inputs), target)
        value.backward()
        theirs.step()
        torch.testing.assert_close(mean, value.detach())
    torch.testing.assert_close(one.weight, other.weight)
    torch.testing.assert_close(one.bias, other.bias)


def test_what_is_separated_stays() -> None:
    signed = separable(0)
    _, theta = steps_to_separate(signed, 10.0)
    start = theta.clone().requires_grad_()
    optimizer = NormalizedGD([start], lr=10.0)
    optimizer.step(lambda: softplus(-signed @ start))
    assert optimizer.separated
    assert torch.equal(start.detach(), theta)
    onward = NormalizedGD([start], lr=10.0, stop_when_separated=False)
    onward.step(lambda: softplus(-signed @ start))
    # beta keeps the step as long as an example, however small the loss
    assert (start.detach() - theta).norm() > 1.0


def test_no_loss_left_and_no_examples() -> None:
    theta = torch.full((2,), 1e4, requires_grad=True)
    optimizer = NormalizedGD([theta], lr=1.0, stop_when_separated=False)
    assert optimizer.step(lambda: softplus(-torch.eye(2) @ theta)) == 0
    assert torch.equal(theta.detach(), torch.full((2,), 1e4))
    assert optimizer.step(lambda: softplus(-torch.empty(0, 2) @ theta)) == 0
    assert torch.isfinite(theta).all()


def test_a_nan_is_not_taken_for_success() -> None:
    theta = torch.zeros(2, requires_grad=True)
    optimizer = NormalizedGD([theta], lr=1.0)
    optimizer.step(lambda: softplus(-torch.tensor([[math.nan, 1.0]]) @ theta))
    assert not optimizer.separated


def test_groups_have_rates_of_their_own() -> None:
    one, other = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = NormalizedGD([{"params": [one]}, {"params": [other], "lr": 3.0}], lr=1.0)
    optimizer.step(lambda: softplus(-(one + other)))
    torch.testing.assert_close(other.detach(), 3 * one.detach())
    assert optimizer.state_dict()["param_groups"][1]["lr"] == 3.0


@pytest.mark.bare
def test_doors() -> None:
    theta = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="lr must be above 0, got 0"):
        NormalizedGD([theta], lr=0)
    optimizer = NormalizedGD([theta])
    with pytest.raises(ValueError, match="step needs a closure"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"with their graph, got \(\)"):
        optimizer.step(lambda: theta.sum())
    with pytest.raises(ValueError, match="with their graph, got float"):
        optimizer.step(lambda: 1.0)  # type: ignore[arg-type, return-value]


def _on_a_rank(parts: list[Tensor]) -> Tensor:
    signed = parts[torch.distributed.get_rank()]
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    wrapped = DistributedDataParallel(model)
    optimizer = NormalizedGD(wrapped.parameters(), lr=2.0, gather_distributed=True)
    for _ in range(3):
        optimizer.step(lambda: softplus(-wrapped(signed).squeeze(-1)))
    return model.weight.detach()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_make_the_step_of_one_process(world: int) -> None:
    """Parts of unequal length; with labels turned so that nothing is separated on the way."""
    signed = separable(1) * torch.where(torch.arange(40) % 3 == 0, -1.0, 1.0).unsqueeze(1)
    parts = list(signed.split([5, 35] if world == 2 else [5, 13, 22]))
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = NormalizedGD([theta], lr=2.0)
    for _ in range(3):
        optimizer.step(lambda: softplus(-signed @ theta))
    for found in on_ranks(world, _on_a_rank, parts):
        torch.testing.assert_close(found.squeeze(0), theta.detach())
