import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from telos.losses.classification.utility_learning import UtilityLearningLoss, utility_learning_loss
from telos.metrics.calibration import ordinal_agreement, utility_to_probability
from tests.declaration import Declaration, classification_sample, shifted
from tests.golden.adapters import Case, gradients

declarations = [
    Declaration(
        function=utility_learning_loss,
        module=UtilityLearningLoss,
        sample=classification_sample(),
        surrogate="the policy softmax(u) is held constant, so that the backward is that of cross-entropy",
        function_only=("noise",),
        invariances={"shift of the utilities": shifted(3.7)},
    )
]


def golden_utility_probability_duality(case: Case) -> dict[str, Any]:
    if case.params["function"] == "utility_to_probability":
        options = {name: case.params[name] for name in ("beta", "rule")}
        return {"probabilities": utility_to_probability(case.inputs["utilities"], **options)}
    utilities = case.leaf("utilities")
    loss = utility_learning_loss(utilities, case.inputs["target"])
    return {"loss": loss, "grad_utilities": gradients(loss, utilities)[0]}


def batch(n: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    utilities = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return utilities.requires_grad_(), torch.randint(classes, (n,), generator=generator)


def test_gradient_is_that_of_cross_entropy() -> None:
    utilities, target = batch()
    weight = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
    found = gradients(utility_learning_loss(utilities, target, class_weight=weight), utilities)
    expected = gradients(F.cross_entropy(utilities, target, weight=weight), utilities)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_gradient_is_that_of_cross_entropy_for_probabilities() -> None:
    utilities, _ = batch()
    q = torch.softmax(-2 * utilities.detach(), -1)
    found = gradients(utility_learning_loss(utilities, q), utilities)
    torch.testing.assert_close(found, gradients(F.cross_entropy(utilities, q), utilities), rtol=0, atol=1e-15)


def test_value_is_a_regret_by_pairs() -> None:
    utilities, target = batch()
    p = utilities.softmax(-1)
    pairs = utilities - utilities.gather(1, target[:, None])
    torch.testing.assert_close(
        utility_learning_loss(utilities, target, reduction="none"), (p * pairs).sum(-1)
    )
    assert utility_learning_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) < 0


def test_keeps_its_digits_under_a_common_offset() -> None:
    """In float32 the mean of 2^20 + 1 and 2^20 is known to a sixteenth only."""
    small = torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(
        utility_learning_loss(small + 2**20, torch.tensor([1])),
        utility_learning_loss(small, torch.tensor([1])),
        rtol=1e-7,
        atol=0,
    )


def test_a_step_of_sgd_is_one_of_maximum_likelihood() -> None:
    inputs, target = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 4
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    twin = copy.deepcopy(model)
    for net, loss in ((model, UtilityLearningLoss()), (twin, nn.CrossEntropyLoss())):
        loss(net(inputs), target).backward()
        torch.optim.SGD(net.parameters(), lr=0.5).step()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-14)


def test_excluded_classes_have_neither_value_nor_gradient() -> None:
    utilities = torch.tensor([[1.0, -torch.inf, 0.5]], dtype=torch.float64, requires_grad=True)
    loss = utility_learning_loss(utilities, torch.tensor([2]))
    without = utilities.detach()[:, [0, 2]].requires_grad_()
    expected = utility_learning_loss(without, torch.tensor([1]))
    torch.testing.assert_close(loss, expected)
    slope = gradients(loss, utilities)[0]
    assert slope[0, 1] == 0
    torch.testing.assert_close(slope[:, [0, 2]], gradients(expected, without)[0])


# ---------------------------------------------------------------------------------------------- sampled


def test_every_rival_comes_with_its_probability() -> None:
    """A fine grid of numbers in [0, 1) gives each class its share, and the mean gradient is the exact one."""
    row = torch.tensor([1.0, -1.0, 0.3, 0.0], dtype=torch.float64)
    n = 20_000
    utilities = row.repeat(n, 1).requires_grad_()
    noise = torch.arange(n, dtype=torch.float64) / n
    target = torch.ones(n, dtype=torch.long)
    loss = utility_learning_loss(utilities, target, sampled=True, noise=noise)
    slope = gradients(loss, utilities)[0].sum(0)
    torch.testing.assert_close(slope, row.softmax(0) - F.one_hot(torch.tensor(1), 4), rtol=0, atol=1 / n)
    torch.testing.assert_close(loss, utility_learning_loss(row[None], target[:1]), rtol=0, atol=4 / n)


def test_drawn_gradient_is_right_on_average() -> None:
    n = 50_000
    row = torch.tensor([1.0, -1.0, 0.3, 0.0], dtype=torch.float64)
    utilities = row.repeat(n, 1).requires_grad_()
    loss = utility_learning_loss(
        utilities,
        torch.ones(n, dtype=torch.long),
        sampled=True,
        generator=torch.Generator().manual_seed(0),
    )
    slope = gradients(loss, utilities)[0].sum(0)
    # five standard errors of a share
    torch.testing.assert_close(
        slope, row.softmax(0) - F.one_hot(torch.tensor(1), 4), rtol=0, atol=5 * 0.5 / n**0.5
    )


def test_excluded_classes_are_never_drawn() -> None:
    row = torch.tensor([-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf])
    edges = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    losses = utility_learning_loss(
        row.repeat(4, 1), torch.ones(4, dtype=torch.long), sampled=True, noise=edges, reduction="none"
    )
    assert (losses == 0).all()


def test_draws_come_from_the_generator_or_from_torchs_own() -> None:
    utilities, target = batch(n=200)

    def drawn(seed: int) -> Tensor:
        return UtilityLearningLoss(True, torch.Generator().manual_seed(seed))(utilities, target)

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    noise = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert drawn(0) == utility_learning_loss(utilities, target, sampled=True, noise=noise)
    torch.manual_seed(5)
    first, second = UtilityLearningLoss(True)(utilities, target), UtilityLearningLoss(True)(utilities, target)
    torch.manual_seed(5)
    assert UtilityLearningLoss(True)(utilities, target) == first != second


def test_a_module_with_a_generator_can_be_stored() -> None:
    utilities, target = batch()
    loss = UtilityLearningLoss(True, torch.Generator().manual_seed(3))
    twin = pickle.loads(pickle.dumps(loss))
    assert twin(utilities, target) == loss(utilities, target)


# ---------------------------------------------------------------------------------------------- the order is learned


def test_tabular_utilities_order_the_choices_as_the_data_do() -> None:
    frequencies = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    utilities = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([utilities], lr=4.0)
    for _ in range(600):
        optimizer.zero_grad()
        utility_learning_loss(utilities, frequencies).backward()
        optimizer.step()
    torch.testing.assert_close(utilities.softmax(-1), frequencies, rtol=1e-6, atol=1e-6)
    assert (ordinal_agreement(utilities.detach(), frequencies) == 1).all()
    assert (ordinal_agreement(utilities.detach().sinh(), frequencies) == 1).all()


@pytest.mark.bare
def test_doors() -> None:
    utilities, target = batch()
    noise = torch.rand(6)
    with pytest.raises(ValueError, match="noise is for sampled=True"):
        utility_learning_loss(utilities, target, noise=noise)
    with pytest.raises(ValueError, match=r"noise must have shape \(6,\), got \(5,\)"):
        utility_learning_loss(utilities, target, sampled=True, noise=noise[1:])
    with pytest.raises(TypeError, match="noise must have a floating-point dtype"):
        utility_learning_loss(utilities, target, sampled=True, noise=target)
