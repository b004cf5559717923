"""The initialisation for interval bounds: its law, what it leaves alone, and the width that it keeps."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from telos.losses.robust.interval import IntervalTensor
from telos.nn.init import ibp_init_


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Block(nn.Module):
    """``last(relu(x + inner(x)))``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.between, self.last = nn.Linear(50, 50), nn.Linear(50, 50), nn.Linear(50, 60)
        self.head = nn.Linear(60, 2)

    def forward(self, x):
        out = torch.relu(self.between(torch.relu(self.inner(x))))
        out += x
        return self.head(torch.relu(self.last(torch.relu(out))))


def test_standard_deviation_counts_the_kernel() -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 64, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(640, 300), nn.Linear(300, 2)
    )
    ibp_init_(net, generator=generator())
    for layer, fan_in in ((net[0], 4 * 9), (net[3], 640)):
        n, sd = layer.weight.numel(), math.sqrt(2 * math.pi) / fan_in
        assert layer.weight.std().item() == pytest.approx(sd, rel=4 / math.sqrt(2 * n))
        assert abs(layer.weight.mean().item()) < 4 * sd / math.sqrt(n)


def test_the_rest_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert ibp_init_(net, generator=generator()) is net
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight"}


def test_the_layer_after_a_sum_is_halved() -> None:
    net = ibp_init_(Block(), generator=generator())
    sd = math.sqrt(2 * math.pi) / 50
    for layer, factor in ((net.inner, 1.0), (net.between, 1.0), (net.last, 0.5)):
        assert layer.weight.std().item() == pytest.approx(
            factor * sd, rel=4 / math.sqrt(2 * layer.weight.numel())
        )


def test_reproducible_by_generator_alone() -> None:
    def weight(seed: int) -> torch.Tensor:
        net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        return ibp_init_(net, generator=generator(seed))[0].weight

    state = torch.get_rng_state()
    nets = [nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)) for _ in range(2)]
    torch.set_rng_state(state)
    ibp_init_(nets[0], generator=generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


def test_width_of_the_bounds_is_kept() -> None:
    """Six wide layers without biases: the default initialisation multiplies the width by 8 or so per layer."""

    def gains(initialise: bool) -> list[float]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Sequential(
                *(part for _ in range(6) for part in (nn.Linear(500, 500, bias=False), nn.ReLU()))
            )
            net.append(nn.Linear(500, 2))
            inputs = torch.rand(20, 500)
        if initialise:
            ibp_init_(net, generator=generator())
        collected: list[IntervalTensor] = []
        with torch.no_grad():
            net(IntervalTensor.around(inputs, 0.1, relu_inputs=collected))
        widths = [box.radius.mean().item() for box in collected]
        return [after / before for before, after in pairwise(widths)]

    assert all(0.7 < gain < 1.4 for gain in gains(True))
    assert all(gain > 4 for gain in gains(False))
