"""CNN-7: the layout of the paper."""

import pytest
import torch
from torch import nn

from telos.losses.robust.interval import IntervalTensor
from telos.nn.models.cnn7 import cnn7


def test_layout() -> None:
    net = cnn7(3, 32, 10)
    convolutions = [part for part in net if isinstance(part, nn.Conv2d)]
    assert [(c.out_channels, c.stride[0]) for c in convolutions] == [
        (64, 1),
        (64, 1),
        (128, 2),
        (128, 1),
        (128, 1),
    ]
    kinds = [type(part).__name__ for part in net]
    # every hidden layer has its own normalisation before its ReLU, the output layer has none
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * 5 + [
        *("Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear")
    ]
    assert net[16].in_features == 128 * 16 * 16
    plain = [type(part).__name__ for part in cnn7(batch_norm=False)]
    assert plain == [kind for kind in kinds if not kind.startswith("BatchNorm")]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_bounds_and_gradients_reach_every_parameter(batch_norm: bool) -> None:
    net = cnn7(1, 8, 4, width=4, linear_width=16, batch_norm=batch_norm)
    logits = net(IntervalTensor.around(torch.rand(3, 1, 8, 8), 0.1))
    assert logits.shape == (3, 4)
    (logits.upper.square().sum() + logits.lower.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.bare
def test_odd_images_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size"):
        cnn7(1, 7)
