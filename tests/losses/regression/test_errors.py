import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses.regression import (
    HuberLoss,
    L1Loss,
    LogCoshLoss,
    MSELoss,
    QuantileLoss,
    huber_loss,
    l1_loss,
    log_cosh_loss,
    mse_loss,
    quantile_loss,
)
from telos.losses.regression._rows import RegressionLoss
from tests.declaration import Declaration, Inputs, Sample


def regression_sample(*entries: int, masked: bool = False) -> Sample:
    """Predictions and targets (n, *entries), and a mask over the entries or their leading dimensions."""

    def sample(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        prediction, target = torch.randn(2, n, *entries, generator=generator, dtype=torch.float64)
        inputs: Inputs = {"prediction": 2 * prediction.to(dtype), "target": target.to(dtype)}
        if masked:
            inputs["mask"] = torch.rand(n, *entries[:1], generator=generator) < 0.6
        return inputs

    return sample


def moved(inputs: Inputs) -> Inputs:
    """The same constant added to both sides."""
    return {**inputs, "prediction": inputs["prediction"] + 3.0, "target": inputs["target"] + 3.0}


def declared(function, module, **flags) -> list[Declaration]:
    """One number an example, several, and several under a mask."""
    samples = (regression_sample(), regression_sample(3), regression_sample(2, 3, masked=True))
    return [
        Declaration(
            function=function,
            module=module,
            sample=sample,
            differentiable=("prediction",),
            extreme="prediction",
            invariances={"shift of both sides": moved},
            **flags,
        )
        for sample in samples
    ]


declarations = [
    *declared(mse_loss, MSELoss),
    *declared(l1_loss, L1Loss, kinks="the absolute value at 0"),
    *declared(huber_loss, HuberLoss),
    *declared(quantile_loss, QuantileLoss, kinks="the two hinges meet at 0"),
    *declared(log_cosh_loss, LogCoshLoss),
]

LOSSES = {
    "mse": (mse_loss, MSELoss()),
    "l1": (l1_loss, L1Loss()),
    "huber": (huber_loss, HuberLoss()),
    "quantile": (quantile_loss, QuantileLoss()),
    "log_cosh": (log_cosh_loss, LogCoshLoss()),
}


def batch(*entries: int, n: int = 6) -> tuple[Tensor, Tensor]:
    inputs = regression_sample(*entries)(n, torch.Generator().manual_seed(3), torch.float64)
    return inputs["prediction"], inputs["target"]


def test_the_functions_agree_with_torch() -> None:
    prediction, target = batch(4)
    torch.testing.assert_close(mse_loss(prediction, target), F.mse_loss(prediction, target))
    torch.testing.assert_close(l1_loss(prediction, target), F.l1_loss(prediction, target))
    for delta in (0.3, 1.0, 4.0):
        torch.testing.assert_close(
            huber_loss(prediction, target, delta=delta), F.huber_loss(prediction, target, delta=delta)
        )


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_the_pinball_loss_by_definition_and_its_minimiser(quantile: float) -> None:
    prediction, target = batch()
    residual = target - prediction
    expected = torch.maximum(quantile * residual, (quantile - 1) * residual)
    torch.testing.assert_close(
        quantile_loss(prediction, target, quantile=quantile, reduction="none"), expected
    )
    # over constant predictions the loss is least at the sample's quantile
    draws = torch.randn(999, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)
    loss = torch.stack([quantile_loss(level.expand(999), draws, quantile=quantile) for level in grid])
    torch.testing.assert_close(grid[loss.argmin()], draws.quantile(quantile), atol=0.011, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_cosh_keeps_its_digits(dtype: torch.dtype) -> None:
    # at 20 the double-precision log(cosh) itself is right to the last digits, at 1e-4 r^2/2 - r^4/12 is
    for size, exact in ((1e-4, 1e-8 / 2 - 1e-16 / 12), (20.0, math.log(math.cosh(20.0))), (1e30, 1e30)):
        found = log_cosh_loss(torch.tensor([size], dtype=dtype), torch.zeros(1, dtype=dtype))
        torch.testing.assert_close(found.item(), exact, rtol=4 * torch.finfo(dtype).eps, atol=0)
    residual = torch.tensor([-30.0, -1.0, -0.999, 0.0, 0.3, 2.0], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(
        log_cosh_loss(residual, torch.zeros(6, dtype=dtype), reduction="sum"), residual
    )
    torch.testing.assert_close(slope, residual.detach().tanh())


@pytest.mark.parametrize("name", LOSSES)
def test_a_masked_entry_does_not_exist(name: str) -> None:
    function, module = LOSSES[name]
    prediction, target = batch(5)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[0, 1:] = False
    mask[3] = False
    expected = torch.stack([function(prediction[i, mask[i]], target[i, mask[i]]) for i in (0, 1, 2, 4, 5)])
    prediction = prediction.masked_fill(~mask, torch.nan).requires_grad_()
    target = target.masked_fill(~mask, torch.nan)
    for loss in (function(prediction, target, mask), module(prediction, target, mask)):
        # every example weighs the same, and the one without an entry not at all
        torch.testing.assert_close(loss, expected.mean())
        (slope,) = torch.autograd.grad(loss, prediction)
        assert torch.count_nonzero(slope[~mask]) == 0
        assert torch.isfinite(slope).all()
    rows = function(prediction, target, mask, reduction="none")
    torch.testing.assert_close(rows[[0, 1, 2, 4, 5]], expected)
    assert rows[3] == 0


def test_a_mask_of_the_leading_dimensions_covers_the_rest() -> None:
    prediction, target = batch(2, 3)
    mask = torch.tensor([[True, False]] * 6)
    torch.testing.assert_close(mse_loss(prediction, target, mask), mse_loss(prediction[:, 0], target[:, 0]))
    whole = mask.unsqueeze(-1).expand(6, 2, 3)
    torch.testing.assert_close(mse_loss(prediction, target, mask), mse_loss(prediction, target, whole))
    of_examples = torch.tensor([True, True, False, True, True, True])
    torch.testing.assert_close(
        mse_loss(prediction, target, of_examples), mse_loss(prediction[of_examples], target[of_examples])
    )


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_examples(name: str) -> None:
    function, module = LOSSES[name]
    prediction, target = batch(2)
    weight = torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    counts = weight.long()
    expected = function(prediction.repeat_interleave(counts, 0), target.repeat_interleave(counts, 0))
    prediction = prediction.clone()
    prediction[2] = torch.nan
    prediction.requires_grad_()
    for loss in (
        function(prediction, target, sample_weight=weight),
        module(prediction, target, sample_weight=weight),
    ):
        torch.testing.assert_close(loss, expected)
        (slope,) = torch.autograd.grad(loss, prediction)
        assert torch.count_nonzero(slope[2]) == 0
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("name", LOSSES)
def test_nan_in_an_entry_that_counts_is_seen(name: str) -> None:
    prediction, target = batch(2)
    prediction[0, 0] = torch.nan
    assert torch.isnan(LOSSES[name][0](prediction, target))


def test_nothing_counts() -> None:
    prediction = torch.randn(3, 2, requires_grad=True)
    loss = mse_loss(prediction, torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert torch.count_nonzero(prediction.grad) == 0


@pytest.mark.bare
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": torch.zeros(4)}, ValueError, r"target must have shape \(4, 3\), got \(4,\)"),
        ({"target": torch.zeros(4, 3).long()}, TypeError, "target must have a floating-point dtype"),
        (
            {"mask": torch.ones(4, 3)},
            TypeError,
            "mask must be a tensor of dtype torch.bool, got torch.float32",
        ),
        (
            {"mask": torch.ones(3, 3).bool()},
            ValueError,
            r"leading dimensions of prediction \(4, 3\), got \(3, 3\)",
        ),
        (
            {"mask": torch.ones(4, 2).bool()},
            ValueError,
            r"leading dimensions of prediction \(4, 3\), got \(4, 2\)",
        ),
        ({"mask": torch.ones(4, 3, 1).bool()}, ValueError, "leading dimensions of prediction"),
        ({"sample_weight": torch.ones(4, 3)}, ValueError, r"sample_weight must have shape \(4,\)"),
        ({"prediction": torch.zeros(4, 0), "target": torch.zeros(4, 0)}, ValueError, "at least one entry"),
        (
            {"prediction": torch.zeros(()), "target": torch.zeros(())},
            ValueError,
            r"shape \(N, ...\), got \(\)",
        ),
    ],
)
def test_doors(changes: dict, error: type[Exception], message: str) -> None:
    inputs = {"prediction": torch.zeros(4, 3), "target": torch.zeros(4, 3), **changes}
    for loss in (mse_loss, MSELoss()):
        with pytest.raises(error, match=message):
            loss(**inputs)


@pytest.mark.parametrize("delta", [0.0, -1.0])
def test_delta_must_be_positive(delta: float) -> None:
    for make in (lambda: HuberLoss(delta), lambda: huber_loss(torch.zeros(1), torch.zeros(1), delta=delta)):
        with pytest.raises(ValueError, match="delta must lie in"):
            make()


@pytest.mark.parametrize("quantile", [0.0, 1.0, 1.5])
def test_quantile_must_lie_inside(quantile: float) -> None:
    for make in (
        lambda: QuantileLoss(quantile),
        lambda: quantile_loss(torch.zeros(1), torch.zeros(1), quantile=quantile),
    ):
        with pytest.raises(ValueError, match=r"quantile must lie in \(0, 1\)"):
            make()


def test_a_formula_of_ones_own() -> None:
    class Overshoot(RegressionLoss):
        def values(self, prediction: Tensor, target: Tensor) -> Tensor:
            return torch.relu(prediction - target)

    prediction, target = batch(3)
    torch.testing.assert_close(Overshoot()(prediction, target), (prediction - target).clamp_min(0).mean())
    with pytest.raises(NotImplementedError, match="RegressionLoss must define values"):
        RegressionLoss()(prediction, target)
