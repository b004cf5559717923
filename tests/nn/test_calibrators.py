"""Temperature scaling, the adaptive temperature and its views."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from telos.losses.classification.correctness_aware import CorrectnessAwareLoss
from telos.losses.classification.cross_entropy import CrossEntropyLoss
from telos.nn.calibrators import (
    AdaptiveTemperature,
    TemperatureScaling,
    default_views,
    fit_calibrator,
    transform_consistency_features,
    view_logits,
)


def held_out(n: int = 300, classes: int = 5, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from the softmax of the logits over ``scale``."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial((logits / scale).softmax(-1), 1, generator=generator).squeeze(-1)


# ---------------------------------------------------------------------------------------------- one temperature


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_scaling_stands_at_the_minimum_of_cross_entropy(scale: float) -> None:
    logits, target = held_out(scale=scale)
    scaling = TemperatureScaling(7.0).double().fit(logits, target)
    assert scaling.temperature.item() == pytest.approx(scale, rel=0.2)
    F.cross_entropy(scaling(logits), target).backward()
    assert scaling.log_temperature.grad is not None
    assert scaling.log_temperature.grad.abs() < 1e-7


def test_scaling_finds_the_true_temperature_from_many() -> None:
    logits, target = held_out(n=100_000, scale=2.5)
    assert TemperatureScaling().fit(logits, target).temperature.item() == pytest.approx(2.5, rel=0.02)


def test_scaling_undoes_a_scale_and_keeps_predictions() -> None:
    logits, target = held_out()
    once = TemperatureScaling().double().fit(logits, target)
    twice = TemperatureScaling().double().fit(100 * logits, target)
    torch.testing.assert_close(twice(100 * logits), once(logits), rtol=1e-6, atol=1e-9)
    assert torch.equal(once(logits).argmax(-1), logits.argmax(-1))


@torch.no_grad()
def test_scaling_fits_under_no_grad_sequences_and_ignored_labels() -> None:
    logits, target = held_out()
    expected = TemperatureScaling().fit(logits[100:], target[100:]).temperature
    ignored = torch.where(torch.arange(300) < 100, -100, target)
    found = TemperatureScaling().fit(logits.reshape(30, 10, 5).requires_grad_(), ignored.reshape(30, 10))
    torch.testing.assert_close(found.temperature, expected)
    assert logits.grad is None


def test_half_logits_are_divided_in_float32() -> None:
    scaling, adaptive = TemperatureScaling(0.1), AdaptiveTemperature(3, t_min=0.05, init_temperature=0.1)
    logits = torch.full((2, 4), 30000.0, dtype=torch.float16)
    for found in (scaling(logits), adaptive(logits, torch.rand(2, 3, dtype=torch.float16))):
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert (found > 65504).all()


# ---------------------------------------------------------------------------------------------- features and views


def test_features_by_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    views = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64)
    found = transform_consistency_features(logits, views, k=2)
    for i in range(6):
        top = sorted(range(5), key=lambda c: -logits[i, c].item())[:2]
        expected = [views[v, i].softmax(-1)[c].item() for v in range(3) for c in top]
        assert found[i].tolist() == pytest.approx(expected, rel=1e-14)
    assert torch.equal(transform_consistency_features(logits, list(views), k=2), found)


def test_features_do_not_depend_on_the_batch_or_on_a_shift() -> None:
    logits, views = torch.randn(6, 5), torch.randn(3, 6, 5)
    found = transform_consistency_features(logits, views)
    torch.testing.assert_close(transform_consistency_features(logits[2:4], views[:, 2:4]), found[2:4])
    torch.testing.assert_close(transform_consistency_features(logits + 4, views - 2), found)


def test_views_are_seen_frozen_and_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    inputs = torch.randn(8, 3)
    found = view_logits(model, inputs, [torch.neg, torch.sin])
    assert model.training
    assert not found.requires_grad
    torch.testing.assert_close(model.state_dict(), before)
    model.eval()
    torch.testing.assert_close(found, torch.stack([model(-inputs), model(inputs.sin())]))


def image(channels: int = 3) -> Tensor:
    return torch.rand(2, channels, 8, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("channels", [1, 3])
def test_image_views_keep_shape_and_range(channels: int) -> None:
    images = image(channels)
    for view in default_views():
        found = view(images)
        assert found.shape == images.shape
        assert found.min() >= 0
        assert found.max() <= 1
        assert torch.equal(view(images[1:]), found[1:]), "an image's view does not depend on its batch"


def test_image_views_that_change_nothing() -> None:
    rotated, grey, jittered = default_views(degrees=0.0, jitter=0.0)
    torch.testing.assert_close(rotated(image()), image(), rtol=0, atol=1e-5)
    torch.testing.assert_close(jittered(image()), image())
    assert torch.equal(grey(image(1)), image(1))


def test_rotation_is_rigid_on_images_that_are_not_square() -> None:
    """A half turn reverses both axes; a quarter turn takes a row to a column of the same length."""
    half, *_ = default_views(degrees=180.0)
    torch.testing.assert_close(half(image()), image().flip(-1, -2), rtol=0, atol=1e-5)
    bar = torch.zeros(1, 1, 8, 12)
    bar[..., 3:5, 3:9] = 1.0  # 2 by 6, about the centre
    quarter, *_ = default_views(degrees=90.0)
    expected = torch.zeros(1, 1, 8, 12)
    expected[..., 1:7, 5:7] = 1.0
    torch.testing.assert_close(quarter(bar), expected, rtol=0, atol=1e-5)


def test_grey_has_no_colour_and_jitter_more_of_it() -> None:
    _, grey, jittered = default_views(jitter=0.3)
    assert (grey(image()).diff(dim=1) == 0).all()
    muted = 0.4 + 0.05 * image()
    spread = (muted - muted.mean(1, keepdim=True)).abs().mean()
    found = jittered(muted)
    # brightness, contrast and saturation each by 1.3
    assert ((found - found.mean(1, keepdim=True)).abs().mean() / spread).item() == pytest.approx(
        1.3**3, rel=1e-4
    )


# ---------------------------------------------------------------------------------------------- adaptive temperature


@pytest.mark.parametrize("parametrization", ["clamp", "softplus"])
def test_without_features_it_is_one_temperature(parametrization: str) -> None:
    logits, _ = held_out(n=8)
    calibrator = AdaptiveTemperature(4, init_temperature=2.5, parametrization=parametrization).double()  # type: ignore[arg-type]
    nn.init.zeros_(calibrator.output.weight)
    torch.testing.assert_close(
        calibrator(logits, torch.rand(8, 4)), TemperatureScaling(2.5).double()(logits), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("parametrization", ["clamp", "softplus"])
def test_temperature_keeps_its_bounds_and_predictions(parametrization: str) -> None:
    logits, _ = held_out(n=64)
    torch.manual_seed(0)
    calibrator = AdaptiveTemperature(4, t_min=0.5, t_max=3.0, parametrization=parametrization).double()  # type: ignore[arg-type]
    nn.init.normal_(calibrator.output.weight, std=30.0, generator=torch.Generator().manual_seed(0))
    features = torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
    temperature = calibrator.temperature(features)
    smooth = parametrization == "softplus"  # approaches its lower bound
    assert 0.5 <= temperature.min() < (0.501 if smooth else 0.5 + 1e-12)
    assert temperature.max() == 3.0
    assert torch.equal(calibrator(logits, features).argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(calibrator(logits, features), logits / temperature[:, None])


def test_softplus_learns_where_clamp_is_dead() -> None:
    logits, features = torch.randn(8, 3), torch.rand(8, 4)
    for parametrization, alive in (("clamp", False), ("softplus", True)):
        calibrator = AdaptiveTemperature(4, parametrization=parametrization)  # type: ignore[arg-type]
        nn.init.zeros_(calibrator.output.weight)
        nn.init.constant_(calibrator.output.bias, -5.0)
        CorrectnessAwareLoss()(calibrator(logits, features), logits.argmin(-1)).backward()
        grad = calibrator.output.bias.grad
        assert grad is not None
        assert bool(grad.abs() > 0) == alive


def test_starts_near_the_initial_temperature_with_a_gradient() -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        calibrator = AdaptiveTemperature(12)
        temperature = calibrator.temperature(torch.rand(100, 12))
        assert ((temperature - 1).abs() < 0.9).all()


def trained(
    loss: nn.Module, seed: int = 0, **options: object
) -> tuple[AdaptiveTemperature, list[dict[str, float]]]:
    """Right where the first feature is above one half, and sure of itself everywhere."""
    generator = torch.Generator().manual_seed(3)
    features = torch.rand(200, 2, generator=generator)
    logits = 3 * F.one_hot(torch.randint(4, (200,), generator=generator), 4).float()
    target = torch.where(features[:, 0] > 0.5, logits.argmax(-1), (logits.argmax(-1) + 1) % 4)
    torch.manual_seed(0)
    calibrator = AdaptiveTemperature(2, hidden=8)
    generator = torch.Generator().manual_seed(seed)
    settings = {"lr": 3e-2, "epochs": 60, "batch_size": 50, "generator": generator, **options}
    return calibrator, fit_calibrator(calibrator, logits, features, target, loss, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("balanced", [False, True])
def test_training_tells_wrong_from_right(balanced: bool) -> None:
    calibrator, history = trained(CorrectnessAwareLoss(balanced))
    assert len(history) == 60
    assert history[-1]["loss"] < history[0]["loss"] / 3
    low, high = calibrator.temperature(torch.tensor([[0.9, 0.5], [0.1, 0.5]])).tolist()
    assert low < 0.9
    assert high > 5


def test_training_by_hand() -> None:
    """Ten full-batch steps of Adam on the balanced loss, with the network and the loss written out."""
    logits, target = held_out(n=40)
    features = torch.rand(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(0)
    calibrator = AdaptiveTemperature(4).double()
    w1, b1, w2, b2 = weights = [p.detach().clone().requires_grad_() for p in calibrator.parameters()]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    correct = (logits.argmax(-1) == target).double()
    r = correct.mean()
    assert 0 < r < 1
    balance = torch.where(correct == 1, 1 - r, r)
    losses = []
    for _ in range(10):
        temperature = ((features @ w1.T + b1).clamp_min(0) @ w2.T + b2).clamp(0.1, 10)
        confidence = (logits / temperature).softmax(-1).amax(-1)
        loss = (balance * (confidence - correct) ** 2).sum() / balance.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    history = fit_calibrator(calibrator, logits, features, target, CorrectnessAwareLoss(True), lr=1e-2)
    assert [record["loss"] for record in history] == pytest.approx(losses, rel=1e-12)
    torch.testing.assert_close(list(calibrator.parameters()), weights, rtol=1e-10, atol=1e-12)


def test_training_depends_on_the_generator_alone() -> None:
    first, again, other = (trained(CrossEntropyLoss(), seed, epochs=3)[0].state_dict() for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_leaves_the_classifier_alone() -> None:
    logits, target = held_out(n=20)
    logits.requires_grad_()
    features = torch.rand(20, 4, requires_grad=True)
    calibrator = AdaptiveTemperature(4).double().eval()
    with torch.no_grad():
        fit_calibrator(calibrator, logits, features, target, epochs=2)
    assert logits.grad is None
    assert features.grad is None
    assert not calibrator.training


def test_narrow_miss_goes_to_the_highest_temperature() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.0, -1.0]])
    calibrator = AdaptiveTemperature(1)
    features, target = torch.ones(1, 1), torch.tensor([1])
    fit_calibrator(calibrator, logits, features, target, lr=0.1, epochs=300)
    assert calibrator.temperature(features).item() == 10
    start = AdaptiveTemperature(1)
    fit_calibrator(start, logits, features, target, CrossEntropyLoss(), lr=0.01, epochs=1000)
    assert start.temperature(features).item() == pytest.approx(0.671, abs=2e-3)


# ---------------------------------------------------------------------------------------------- doors


@pytest.mark.bare
def test_doors() -> None:
    logits, features = torch.randn(4, 3), torch.rand(4, 2)
    for bad, name in (
        ({"t_min": 0.0}, "t_min and t_max"),
        ({"t_max": 0.05}, "t_min and t_max"),
        ({"init_temperature": math.inf}, "init_temperature"),
        ({"parametrization": "exp"}, "parametrization"),
    ):
        with pytest.raises(ValueError, match=name):
            AdaptiveTemperature(2, **bad)
    with pytest.raises(ValueError, match="temperature must lie in"):
        TemperatureScaling(0.0)
    calibrator = AdaptiveTemperature(2)
    with pytest.raises(ValueError, match=r"features must have shape \(4, 2\), got \(3, 2\)"):
        calibrator(logits, features[1:])
    with pytest.raises(ValueError, match=r"features must have shape \(\.\.\., 2\), got \(4, 3\)"):
        calibrator(logits, torch.rand(4, 3))
    with pytest.raises(TypeError, match="features must have a floating-point dtype"):
        calibrator(logits, features.long())
    with pytest.raises(TypeError, match="logits must have a floating-point dtype"):
        TemperatureScaling()(logits.long())
    views = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match=r"k must lie in \[1, 3\], the number of classes, got 4"):
        transform_consistency_features(logits, views)
    with pytest.raises(ValueError, match=r"view_logits must have shape \(V, 4, 3\)"):
        transform_consistency_features(logits, views[:, 1:], k=2)
    with pytest.raises(ValueError, match="at least one view"):
        transform_consistency_features(logits, [], k=2)
    with pytest.raises(ValueError, match="at least one callable"):
        view_logits(nn.Identity(), logits, [])
    for view in default_views():
        with pytest.raises(ValueError, match=r"images must have shape \(N, 1 or 3, H, W\)"):
            view(torch.rand(2, 4, 8, 8))
    with pytest.raises(ValueError, match="jitter must lie in"):
        default_views(jitter=-2.0)
    target = torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"features must have shape \(4, F\), got \(3, 2\)"):
        fit_calibrator(calibrator, logits, features[1:], target)
    with pytest.raises(ValueError, match="target must lie in"):
        fit_calibrator(calibrator, logits, features, target + 1)
