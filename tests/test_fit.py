"""The training loop."""

import pytest
import torch
from torch import Tensor, nn

from telos.fit import Diverged, fit


def quadratic(start: float = 1.0) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.tensor(start))
    return weight, torch.optim.SGD([weight], lr=0.25)


def test_it_takes_the_steps_that_one_would_take_by_hand() -> None:
    weight, optimizer = quadratic()
    history = fit(lambda target: {"loss": (weight - target) ** 2}, [torch.tensor(3.0)], optimizer, epochs=3)
    # w <- w - 0.25 * 2 (w - 3) halves the distance of 2 each time
    assert [record["loss"] for record in history] == [4.0, 1.0, 0.25]
    assert weight.item() == 2.75
    assert [record["epoch"] for record in history] == [1.0, 2.0, 3.0]
    assert all(record["seconds"] >= 0 for record in history)


def test_named_losses_are_summed_and_reported_apart() -> None:
    weight, optimizer = quadratic()
    history = fit(
        lambda x: {"a": weight * x, "b": 2 * weight * x}, [torch.tensor(1.0)] * 2, optimizer, epochs=1
    )
    # the gradient is 3 both times: 1 -> 0.25 -> -0.5; the record holds the means of the two batches
    assert weight.item() == -0.5
    assert history[0]["a"] == pytest.approx((1.0 + 0.25) / 2)
    assert history[0]["b"] == pytest.approx((2.0 + 0.5) / 2)


def test_the_gradient_is_clipped_by_its_total_norm() -> None:
    weights = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weights], lr=1.0)
    fit(lambda g: {"loss": -(weights * g).sum()}, [torch.tensor([3.0, 4.0])], optimizer, epochs=1, clip=1.0)
    torch.testing.assert_close(weights.detach(), torch.tensor([0.6, 0.8]), rtol=1e-5, atol=1e-6)


def test_the_schedule_advances_once_a_step() -> None:
    weight, optimizer = quadratic(0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    fit(lambda _: {"loss": -weight}, [None, None], optimizer, epochs=2, scheduler=schedule)
    assert weight.item() == 0.25
    assert schedule.last_epoch == 4


def test_callbacks_see_steps_and_add_to_records() -> None:
    weight, optimizer = quadratic()
    steps: list[tuple[int, dict[str, float]]] = []
    history = fit(
        lambda target: {"loss": (weight - target) ** 2},
        [torch.tensor(1.0)] * 3,
        optimizer,
        epochs=2,
        on_step=lambda step, losses: steps.append((step, losses)),
        on_epoch=lambda record: {"twice": 2 * record["epoch"]},
    )
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0][1] == {"loss": 0.0}
    assert [record["twice"] for record in history] == [2.0, 4.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_loss_stops_before_its_step(bad: float) -> None:
    weight, optimizer = quadratic()

    def step(target: Tensor) -> dict[str, Tensor]:
        return {"good": (weight - target) ** 2, "bad": weight * (bad if target == 5 else 0.0)}

    with pytest.raises(Diverged, match=r"bad is (nan|inf) at step 4, in epoch 2") as caught:
        # the second epoch meets the bad batch
        batches = iter([[1.0, 1.0], [1.0, 5.0]])

        class Loader:
            def __iter__(self):
                return iter(torch.tensor(next(batches)))

        fit(step, Loader(), optimizer, epochs=2)
    assert weight.isfinite()
    assert [record["epoch"] for record in caught.value.history] == [1.0]


def test_an_empty_loader_is_an_error() -> None:
    _, optimizer = quadratic()
    with pytest.raises(ValueError, match="at least one batch"):
        fit(lambda _: {}, [], optimizer, epochs=1)
