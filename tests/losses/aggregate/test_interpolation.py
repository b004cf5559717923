"""Bag, instance and interpolated loss: golden values, identity with the variance, Jensen, doors."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import (
    AggregateInterpolationLoss,
    BagLoss,
    InstanceLoss,
    aggregate_interpolation_loss,
    bag_loss,
    instance_loss,
)
from telos.theory import aggregate_ridgeless, asymptotic_risk
from tests.declaration import Declaration, Inputs, Sample
from tests.golden.adapters import Case, gradients


def bags_sample(outputs: tuple[int, ...] = (), response: str = "normal") -> Sample:
    """n examples in about n / 2 bags, none empty and of unequal size."""

    def sample(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        bags = (n + 1) // 2
        prediction = torch.randn(n, *outputs, generator=generator, dtype=torch.float64)
        shape = (bags, *outputs)
        if response == "normal":
            bag_response = torch.randn(shape, generator=generator, dtype=torch.float64)
        elif response == "share":
            bag_response = torch.rand(shape, generator=generator, dtype=torch.float64)
        else:
            bag_response = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1)
        # every bag once, the rest anywhere
        anywhere = torch.randint(max(bags, 1), (n - bags,), generator=generator)
        bag_index = torch.cat([torch.arange(bags), anywhere])[torch.randperm(n, generator=generator)]
        return {
            "prediction": prediction.to(dtype),
            "bag_response": bag_response.to(dtype),
            "bag_index": bag_index,
        }

    return sample


def split_bags(inputs: Inputs, ranks: int) -> list[Inputs]:
    """Whole bags to each rank."""
    bags = inputs["bag_response"].shape[0]
    parts = []
    for rank in range(ranks):
        mine = torch.arange(bags) % ranks == rank
        members = mine[inputs["bag_index"]]
        parts.append(
            {
                "prediction": inputs["prediction"][members],
                "bag_response": inputs["bag_response"][mine],
                "bag_index": (mine.cumsum(0) - 1)[inputs["bag_index"][members]],
            }
        )
    return parts


def declare(function, module, sample: Sample) -> Declaration:
    return Declaration(
        function=function,
        module=module,
        sample=sample,
        differentiable=("prediction", "bag_response"),
        extreme="prediction",
        split=split_bags,
    )


LOGISTIC, SOFTMAX = bags_sample(response="share"), bags_sample((4,), "shares")

# The log losses are options of the same function, so they are declared by module; what the suite checks by
# function (gradient, functional transforms) is checked for them below.
declarations = [
    declare(bag_loss, BagLoss, bags_sample()),
    declare(instance_loss, InstanceLoss, bags_sample()),
    declare(aggregate_interpolation_loss, AggregateInterpolationLoss, bags_sample()),
    declare(None, lambda: AggregateInterpolationLoss(pointwise="logistic"), LOGISTIC),
    declare(None, lambda: BagLoss(pointwise="softmax"), SOFTMAX),
    declare(None, lambda: InstanceLoss(pointwise="softmax"), SOFTMAX),
]


def golden_aggregate_interpolation(case: Case) -> dict:
    params = dict(case.params)
    function = params.pop("function")
    if function == "asymptotic_risk":
        # tensors, since a bare number would be read in single precision
        risk = asymptotic_risk(**params)._asdict()
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in risk.items()}
    if function == "aggregate_ridgeless":
        return {"theta": aggregate_ridgeless(**case.inputs, **params)}
    prediction = case.leaf("prediction")
    rest = (case.inputs["bag_response"].double(), case.inputs["bag_index"])
    loss = aggregate_interpolation_loss(prediction, *rest, **params)
    del params["rho"]
    bag, instance = bag_loss(prediction, *rest, **params), instance_loss(prediction, *rest, **params)
    return {
        "loss": loss,
        "bag_loss": bag,
        "instance_loss": instance,
        "within_bag_variance": instance - bag,
        "grad_prediction": gradients(loss, prediction)[0],
    }


def draw(n: int = 7, seed: int = 0, sample: Sample | None = None) -> Inputs:
    return (sample or bags_sample())(n, torch.Generator().manual_seed(seed), torch.float64)


SAMPLES = {"squared": bags_sample(), "logistic": LOGISTIC, "softmax": SOFTMAX}
each_loss = pytest.mark.parametrize("pointwise", list(SAMPLES))


# -------------------------------------------------------------------------------- against plain loops


def loops(inputs: Inputs, rho: float, pointwise: str) -> Tensor:
    """The definition, bag by bag, on probabilities."""
    values = []
    for bag, response in enumerate(inputs["bag_response"]):
        members = inputs["prediction"][inputs["bag_index"] == bag]
        if pointwise == "squared":
            outputs, loss = members, lambda y, p: (y - p).square()
        elif pointwise == "logistic":
            outputs, loss = members.sigmoid(), lambda y, p: -(y * p.log() + (1 - y) * (1 - p).log())
        else:
            outputs, loss = members.softmax(-1), lambda y, p: -(y * p.log()).sum(-1)
        whole = loss(response, outputs.mean(0))
        single = torch.stack([loss(response, output) for output in outputs]).mean(0)
        values.append((1 - rho) * whole + rho * single)
    return torch.stack(values)


@each_loss
@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_definition(pointwise: str, rho: float) -> None:
    inputs = draw(9, sample=SAMPLES[pointwise])
    values = aggregate_interpolation_loss(**inputs, rho=rho, pointwise=pointwise, reduction="none")
    torch.testing.assert_close(values, loops(inputs, rho, pointwise))


@each_loss
def test_bag_weighting_by_sample(pointwise: str) -> None:
    inputs = draw(9, sample=SAMPLES[pointwise])
    size = torch.bincount(inputs["bag_index"]).double()
    assert size.unique().numel() > 1
    loss = aggregate_interpolation_loss(**inputs, pointwise=pointwise, bag_weighting="sample")
    torch.testing.assert_close(loss, (size * loops(inputs, 0.5, pointwise)).sum() / 9)


def test_pointwise_function_is_called_as_torch_calls_its_losses() -> None:
    inputs = draw(9)
    huber = partial(F.huber_loss, reduction="none", delta=0.3)
    mean = torch.stack([inputs["prediction"][inputs["bag_index"] == bag].mean() for bag in range(5)])
    torch.testing.assert_close(
        bag_loss(**inputs, pointwise=huber), F.huber_loss(mean, inputs["bag_response"], delta=0.3)
    )
    asymmetric = instance_loss(**inputs, pointwise=lambda prediction, response: 2 * prediction - response)
    spread = 2 * mean - inputs["bag_response"]
    torch.testing.assert_close(asymmetric, spread.mean())


def test_several_outputs_are_averaged() -> None:
    inputs = draw(9, sample=bags_sample((3,)))
    single = [
        aggregate_interpolation_loss(
            inputs["prediction"][:, column], inputs["bag_response"][:, column], inputs["bag_index"]
        )
        for column in range(3)
    ]
    torch.testing.assert_close(aggregate_interpolation_loss(**inputs), torch.stack(single).mean())


# -------------------------------------------------------------------------------- oracles


def test_squared_losses_differ_by_the_within_bag_variance() -> None:
    for seed in range(3):
        inputs = draw(11, seed)
        bags = [inputs["prediction"][inputs["bag_index"] == bag] for bag in range(6)]
        variance = torch.stack([bag.var(correction=0) for bag in bags]).mean()
        assert variance > 0
        torch.testing.assert_close(instance_loss(**inputs) - bag_loss(**inputs), variance)
        moved = {**inputs, "bag_response": inputs["bag_response"] + 5}
        torch.testing.assert_close(instance_loss(**moved) - bag_loss(**moved), variance)


@each_loss
def test_instance_loss_is_at_least_the_bag_loss(pointwise: str) -> None:
    for seed in range(20):
        inputs = draw(9, seed, SAMPLES[pointwise])
        gap = instance_loss(**inputs, pointwise=pointwise) - bag_loss(**inputs, pointwise=pointwise)
        assert gap > 0


@each_loss
def test_linear_in_rho(pointwise: str) -> None:
    inputs = draw(9, sample=SAMPLES[pointwise])
    bag, instance = bag_loss(**inputs, pointwise=pointwise), instance_loss(**inputs, pointwise=pointwise)
    for rho in (-0.5, 0.0, 0.25, 1.0, 1.5):
        loss = aggregate_interpolation_loss(**inputs, rho=rho, pointwise=pointwise, allow_extrapolation=True)
        torch.testing.assert_close(loss, bag + rho * (instance - bag))


@each_loss
def test_bags_of_one_do_not_see_rho(pointwise: str) -> None:
    inputs = draw(5, sample=SAMPLES[pointwise])
    inputs = {
        "prediction": inputs["prediction"][:3],
        "bag_response": inputs["bag_response"][:3],
        "bag_index": torch.tensor([2, 0, 1]),
    }
    results = []
    for rho in (0.0, 0.4, 1.0):
        leaf = inputs["prediction"].clone().requires_grad_()
        loss = aggregate_interpolation_loss(**{**inputs, "prediction": leaf}, rho=rho, pointwise=pointwise)
        results.append((loss.detach(), gradients(loss, leaf)[0]))
    for loss, slope in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(slope, results[0][1])


def test_curvature_bounds_the_gap_of_the_log_loss() -> None:
    """As a function of p the log loss has curvature y / p^2 + (1 - y) / (1 - p)^2 >= 1, so the gap is >= V / 2."""
    for seed in range(10):
        inputs = draw(9, seed, LOGISTIC)
        gap = instance_loss(**inputs, pointwise="logistic") - bag_loss(**inputs, pointwise="logistic")
        probabilities = {**inputs, "prediction": inputs["prediction"].sigmoid()}
        assert gap >= (instance_loss(**probabilities) - bag_loss(**probabilities)) / 2


@pytest.mark.parametrize("rho", [0.2, 1.0])
@pytest.mark.parametrize("bag_weighting", ["bag", "sample"])
def test_gradient_descent_reaches_the_closed_form(rho: float, bag_weighting) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    bag_index = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 8] * 3)
    bag_response = torch.randn(9, generator=generator, dtype=torch.float64)
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(3000):
        loss = aggregate_interpolation_loss(
            x @ theta, bag_response, bag_index, rho=rho, bag_weighting=bag_weighting
        )
        (slope,) = gradients(loss, theta)
        theta = (theta - 0.3 * slope).detach().requires_grad_()
    expected = aggregate_ridgeless(x, bag_response, bag_index, rho, bag_weighting=bag_weighting)
    torch.testing.assert_close(theta.detach(), expected)


# -------------------------------------------------------------------------------- numerics and torch


@pytest.mark.parametrize("pointwise", ["logistic", "softmax"])
@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_gradient_of_the_log_losses(pointwise: str, rho: float) -> None:
    inputs = draw(6, sample=SAMPLES[pointwise])

    def value(prediction: Tensor, bag_response: Tensor) -> Tensor:
        return aggregate_interpolation_loss(
            prediction, bag_response, inputs["bag_index"], rho=rho, pointwise=pointwise
        )

    leaves = [inputs[name].requires_grad_() for name in ("prediction", "bag_response")]
    assert torch.autograd.gradcheck(value, leaves)
    stack = torch.stack([draw(6, seed, SAMPLES[pointwise])["prediction"] for seed in range(3)])
    response = inputs["bag_response"].detach()
    slopes = torch.func.vmap(torch.func.grad(value), in_dims=(0, None))(stack, response)
    for entry, slope in zip(stack, slopes, strict=True):
        leaf = entry.clone().requires_grad_()
        torch.testing.assert_close(gradients(value(leaf, response), leaf)[0], slope)


@pytest.mark.parametrize("size", [30.0, 30000.0])
def test_log_losses_of_certain_bags_are_exact(size: float) -> None:
    """Half a bag surely yes, half surely no: log 2; all of it sure and wrong: the size of the logit."""
    prediction = torch.tensor([size, -size, size, size], requires_grad=True)
    response, bag_index = torch.tensor([0.25, 0.0]), torch.tensor([0, 0, 1, 1])
    values = bag_loss(prediction, response, bag_index, pointwise="logistic", reduction="none")
    torch.testing.assert_close(values.detach(), torch.tensor([0.6931472, size]))
    assert torch.isfinite(gradients(values, prediction)[0]).all()
    two = torch.stack([torch.zeros(4), prediction.detach()], 1)
    shares = torch.stack([1 - response, response], 1)
    torch.testing.assert_close(
        bag_loss(two, shares, bag_index, pointwise="softmax", reduction="none"), values.detach()
    )


@each_loss
def test_nan_stays_in_its_bag(pointwise: str) -> None:
    inputs = draw(9, sample=SAMPLES[pointwise])
    clean = aggregate_interpolation_loss(**inputs, pointwise=pointwise, reduction="none")
    for name, where in (("bag_response", 1), ("prediction", 4)):
        bad = inputs[name].clone()
        bad[where] = torch.nan
        values = aggregate_interpolation_loss(**{**inputs, name: bad}, pointwise=pointwise, reduction="none")
        hit = torch.arange(5) == (1 if name == "bag_response" else inputs["bag_index"][4])
        assert torch.equal(values.isnan(), hit)
        torch.testing.assert_close(values[~hit], clean[~hit])


@each_loss
@pytest.mark.parametrize("bag_weighting", ["bag", "sample"])
def test_a_bag_of_weight_zero_does_not_exist(pointwise: str, bag_weighting) -> None:
    inputs = draw(9, sample=SAMPLES[pointwise])
    options = {"pointwise": pointwise, "bag_weighting": bag_weighting}
    outputs = inputs["bag_response"].shape[1:]
    nan = torch.full((1, *outputs), torch.nan, dtype=torch.float64)
    # one more bag that holds NaN, and one that is empty
    padded = {
        "prediction": torch.cat([inputs["prediction"], nan]).requires_grad_(),
        "bag_response": torch.cat([inputs["bag_response"], nan, nan]).requires_grad_(),
        "bag_index": torch.cat([inputs["bag_index"], torch.tensor([5])]),
        "bag_weight": torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64),
    }
    loss = aggregate_interpolation_loss(**padded, **options)
    torch.testing.assert_close(loss.detach(), aggregate_interpolation_loss(**inputs, **options))
    slope, response_slope = gradients(loss, padded["prediction"], padded["bag_response"])
    assert torch.count_nonzero(slope[9]) == 0
    assert torch.count_nonzero(response_slope[5:]) == 0
    assert torch.isfinite(slope).all()
    assert torch.isfinite(response_slope).all()


def test_bag_weight_of_two_is_a_bag_twice() -> None:
    inputs = draw(6)
    twice = {
        "prediction": torch.cat([inputs["prediction"], inputs["prediction"][inputs["bag_index"] == 0]]),
        "bag_response": torch.cat([inputs["bag_response"], inputs["bag_response"][:1]]),
        "bag_index": torch.cat([inputs["bag_index"], torch.full(((inputs["bag_index"] == 0).sum(),), 3)]),
    }
    weight = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    for bag_weighting in ("bag", "sample"):
        torch.testing.assert_close(
            aggregate_interpolation_loss(**inputs, bag_weight=weight, bag_weighting=bag_weighting),
            aggregate_interpolation_loss(**twice, bag_weighting=bag_weighting),
        )


@each_loss
def test_unseen_empty_bag_is_nan(pointwise: str) -> None:
    """Where the index cannot be read (here: under a transform) an empty bag is at least not silent."""
    inputs = draw(9, sample=SAMPLES[pointwise])
    inputs["bag_index"] = torch.where(inputs["bag_index"] == 2, 0, inputs["bag_index"])
    rest = (inputs["bag_response"], inputs["bag_index"])
    values = torch.func.vmap(
        lambda prediction: aggregate_interpolation_loss(
            prediction, *rest, pointwise=pointwise, reduction="none"
        )
    )(inputs["prediction"].unsqueeze(0))
    assert torch.equal(values[0].isnan(), torch.arange(5) == 2)


# -------------------------------------------------------------------------------- doors


@pytest.mark.bare
def test_refuses_what_it_cannot_mean() -> None:
    inputs = draw(6)
    index = inputs["bag_index"]
    with pytest.raises(ValueError, match=r"must name every bag in \[0, 3\), got no example of bag 1"):
        bag_loss(**{**inputs, "bag_index": torch.where(index == 1, 0, index)})
    with pytest.raises(ValueError, match=r"bag_index must lie in \[0, 3\), got 3"):
        instance_loss(**{**inputs, "bag_index": index + 1})
    with pytest.raises(ValueError, match=r"bag_index must lie in \[0, 3\), got -1"):
        instance_loss(**{**inputs, "bag_index": index - 1})
    with pytest.raises(ValueError, match="bag_response must have shape"):
        bag_loss(**{**inputs, "bag_response": inputs["bag_response"].unsqueeze(1)})
    with pytest.raises(ValueError, match="bag_weight must have shape"):
        bag_loss(**inputs, bag_weight=torch.ones(6, dtype=torch.float64))
    with pytest.raises(TypeError, match="bag_index must have an integer dtype"):
        bag_loss(**{**inputs, "bag_index": index.double()})
    with pytest.raises(ValueError, match="pointwise must be"):
        bag_loss(**inputs, pointwise="absolute")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bag_weighting must be"):
        BagLoss(bag_weighting="examples")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prediction must have at least 2 dimensions"):
        bag_loss(**inputs, pointwise="softmax")


@pytest.mark.parametrize("rho", [-0.1, 1.1, float("nan")])
def test_rho_outside_the_unit_interval_must_be_asked_for(rho: float) -> None:
    inputs = draw(6)
    with pytest.raises(ValueError, match="rho must lie in"):
        aggregate_interpolation_loss(**inputs, rho=rho)
    with pytest.raises(ValueError, match="rho must lie in"):
        AggregateInterpolationLoss(rho=rho)
