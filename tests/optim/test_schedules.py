"""The smoothed schedule against its formula; its golden values are those of fast_certified_ibp."""

from itertools import pairwise

import pytest

from telos.optim.schedules import SmoothedEpsSchedule


def plain(step: int, eps_max: float, batches: int, start: int, length: int, mid: float, beta: float) -> float:
    """The coefficients as the source writes them."""
    s0, s1 = (start - 1) * batches, (start + length - 1) * batches
    sm = s0 + int((s1 - s0) * mid)
    power = (sm - s0) ** (beta - 1)
    a = eps_max / ((s1 - sm) * beta * power + (sm - s0) * power)
    if step <= s0:
        return 0.0
    if step < sm:
        return a * (step - s0) ** beta
    reached = a * (sm - s0) ** beta
    return min(reached + (eps_max - reached) * (step - sm) / (s1 - sm), eps_max)


@pytest.mark.parametrize(
    "settings", [(0.4, 5, 2, 4, 0.25, 4.0), (8 / 255, 13, 1, 7, 0.6, 2.0), (1.0, 3, 5, 20, 0.4, 5.5)]
)
def test_formula(settings: tuple) -> None:
    schedule = SmoothedEpsSchedule(*settings)
    for step in range(settings[1] * (settings[2] + settings[3] + 3)):
        assert schedule(step) == pytest.approx(plain(step, *settings), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("mid", [0.0, 0.01, 0.25, 0.5, 1.0])
def test_it_rises_without_a_jump(mid: float) -> None:
    schedule = SmoothedEpsSchedule(0.3, batches_per_epoch=50, start=2, length=4, mid=mid)
    values = [schedule(step) for step in range(400)]
    assert values[:51] == [0.0] * 51
    assert values[250:] == [0.3] * 150
    steps = [after - before for before, after in pairwise(values)]
    assert min(steps) >= 0
    assert max(steps[51:249]) <= 4.01 * 0.3 / 200  # the steepest: the power of 4 over all steps


def test_line_alone_without_a_power() -> None:
    schedule = SmoothedEpsSchedule(1.0, batches_per_epoch=4, start=1, length=2, mid=0.0)
    assert [schedule(step) for step in range(9)] == pytest.approx([step / 8 for step in range(9)])


@pytest.mark.bare
@pytest.mark.parametrize(
    ("name", "value"),
    [("eps_max", 0.0), ("batches_per_epoch", 0), ("start", 0), ("length", 0), ("mid", 1.5), ("beta", 1.0)],
)
def test_doors(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        SmoothedEpsSchedule(**{"eps_max": 0.1, "batches_per_epoch": 5, name: value})
