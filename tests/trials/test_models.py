"""Models of the built-in kinds of data, models that a user brings, and the reference from outside."""

import numpy as np
import pytest
import torch
from torch import nn

from telos.trials import UsageError
from telos.trials.models import DataInfo, build, check_architecture, check_model, reference, reference_name

ROWS = DataInfo("classification", num_classes=3, input_shape=(5,))
PICTURES = DataInfo("classification", num_classes=3, input_shape=(1, 12, 9))
NUMBERS = DataInfo("regression", input_shape=(5,))


def factory(info: DataInfo, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(input_shape)), info.outputs))


def flat(info: DataInfo, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Linear(input_shape[0], 1), nn.Flatten(0))


def too_wide(info: DataInfo, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Linear(input_shape[-1], info.outputs + 1)


def wrong_input(info: DataInfo, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Linear(input_shape[-1] + 1, info.outputs)


def no_module(info: DataInfo, input_shape: tuple[int, ...]) -> str:
    return "a model"


def drawing(info: DataInfo, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Linear(input_shape[0], info.outputs)


@pytest.mark.parametrize("info", [ROWS, PICTURES, NUMBERS])
@pytest.mark.parametrize("architecture", ["linear", "mlp", "conv", "tests.trials.test_models:factory"])
def test_models_have_one_output_for_each_class_or_one(info: DataInfo, architecture: str) -> None:
    if architecture == "conv" and len(info.input_shape) != 3:
        return
    model = build(architecture, info, width=16)
    found = model(torch.zeros(4, *info.input_shape))
    assert found.shape == (4, info.num_classes or 1)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_convolution_sees_where_things_are() -> None:
    torch.manual_seed(0)
    model = build("conv", PICTURES, width=16)
    one, other = torch.zeros(2, 1, 1, 12, 9)
    one[0, 0, 2, 2], other[0, 0, 9, 6] = 1.0, -1.0
    assert not torch.allclose(model(one), model(other))


@pytest.mark.parametrize(
    ("architecture", "image", "message"),
    [
        ("mpl", False, "unknown model=mpl; nearest: mlp, and module:factory brings your own"),
        ("conv", False, "model=conv needs images"),
        ("no.such:factory", False, "model no.such:factory: cannot import no.such"),
        ("tests.trials.test_models:factry", True, "has no 'factry'; nearest: factory"),
    ],
)
def test_names_of_no_model(architecture: str, image: bool, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_architecture(architecture, image)


@pytest.mark.parametrize(
    ("name", "info", "message"),
    [
        (
            "too_wide",
            ROWS,
            r"must turn inputs of shape \(2, 5\) into outputs of shape \(2, 3\), got \(2, 4\)",
        ),
        ("flat", ROWS, r"into outputs of shape \(2, 3\), got \(2,\)"),
        ("wrong_input", ROWS, r"fails on inputs of shape \(2, 5\): RuntimeError: mat1 and mat2"),
        ("no_module", ROWS, "must return a torch.nn.Module, got str"),
    ],
)
def test_a_model_that_does_not_fit(name: str, info: DataInfo, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_model(f"tests.trials.test_models:{name}", info, 8)
    assert "\n" not in str(caught.value)


def test_a_model_that_fits_and_draws_nothing_while_it_is_checked() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_model("tests.trials.test_models:drawing", ROWS, 8)
    check_model("tests.trials.test_models:flat", NUMBERS, 8)
    assert torch.equal(before, torch.get_rng_state())


def batch(rows: int = 200, classes: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.randn(rows, 5, generator=generator)
    score = inputs[:, 0] * inputs[:, 1]  # no linear model finds this
    return {"inputs": inputs, "target": (score > 0).long() if classes else score}


def test_the_reference_is_boosted_trees_for_tables() -> None:
    from sklearn.ensemble import HistGradientBoostingClassifier

    train, test = batch(400), batch(100)
    info = DataInfo("classification", num_classes=2, input_shape=(5,))
    assert reference_name(info) == "gradient boosting"
    logs = reference(train, test, info, seed=3)
    torch.testing.assert_close(logs.exp().sum(1), torch.ones(100, dtype=torch.float64))
    own = HistGradientBoostingClassifier(random_state=3).fit(train["inputs"], train["target"])
    assert (logs.argmax(1).numpy() == own.predict(test["inputs"])).all()
    assert (logs.argmax(1) == test["target"]).double().mean() > 0.85


def test_the_reference_of_numbers() -> None:
    train, test = batch(400, classes=False), batch(100, classes=False)
    found = reference(train, test, NUMBERS, seed=0)
    assert found.shape == (100,)
    assert (found - test["target"]).square().mean() < 0.4 * test["target"].var()


def test_the_reference_of_images_and_of_very_many_features() -> None:
    assert reference_name(PICTURES) == "logistic regression"
    assert (
        reference_name(DataInfo("classification", num_classes=9, input_shape=(700,))) == "logistic regression"
    )
    assert reference_name(DataInfo("regression", input_shape=(20_000,))) == "ridge regression"
    made = torch.randn(60, 1, 12, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 3
    made[labels == 1, :, 3] += 4
    made[labels == 2, :, 6] += 4
    logs = reference({"inputs": made, "target": labels}, {"inputs": made, "target": labels}, PICTURES, seed=0)
    assert (logs.argmax(1) == labels).all()


def test_a_class_that_training_lacks_has_a_small_probability() -> None:
    train, test = batch(100), batch(10)
    logs = reference(train, test, DataInfo("classification", num_classes=3, input_shape=(5,)), seed=0)
    assert logs.shape == (10, 3)
    assert torch.isfinite(logs).all()
    assert (logs[:, 2].exp() < 1e-9).all()
