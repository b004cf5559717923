"""Ranges of hyper-parameters: where a position in [0, 1) lands."""

import copy
import math
import pickle

import pytest

from telos.losses import choice, integers, log_uniform, uniform

POSITIONS = [index / 1000 for index in range(1000)]
LAST = math.nextafter(1.0, 0.0)


def test_uniform_is_even() -> None:
    span = uniform(-1.0, 3.0)
    assert [span.at(u) for u in (0.0, 0.25, 0.5)] == [-1.0, 0.0, 1.0]
    values = [span.at(u) for u in [*POSITIONS, LAST]]
    assert values == sorted(values)
    assert all(-1.0 <= value <= 3.0 for value in values)


def test_log_uniform_is_even_in_the_logarithm() -> None:
    span = log_uniform(1e-4, 1.0)
    assert [span.at(u) for u in (0.25, 0.5, 0.75)] == pytest.approx([1e-3, 1e-2, 1e-1], rel=1e-12)
    values = [span.at(u) for u in [*POSITIONS, LAST]]
    assert values == sorted(values)
    assert values[0] == pytest.approx(1e-4, rel=1e-12)
    assert values[-1] == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, 1.0)])
def test_log_uniform_needs_a_positive_range(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"log_uniform needs 0 < low < high, got low={low}, high={high}"):
        log_uniform(low, high)


def test_integers_are_equally_likely_ends_included() -> None:
    span = integers(3, 7)
    values = [span.at(u) for u in POSITIONS]
    assert {value: values.count(value) for value in values} == {3: 200, 4: 200, 5: 200, 6: 200, 7: 200}
    assert all(type(value) is int for value in values)
    assert span.at(LAST) == 7
    assert span.at(1.0) == 7  # a sampler's rounding does not step outside
    assert integers(-2, -2).at(0.7) == -2
    assert [integers(-2, 1).at(u) for u in (0.0, 0.25, 0.5, 0.75)] == [-2, -1, 0, 1]


def test_choice_is_even_and_keeps_the_objects() -> None:
    options = ("adam", None, 0.5)
    span = choice(*options)
    assert [span.at(u) for u in (0.0, 0.34, 0.67, LAST, 1.0)] == ["adam", None, 0.5, 0.5, 0.5]


def test_ranges_are_inert_data() -> None:
    for span in (uniform(0.0, 1.0), log_uniform(0.1, 1.0), integers(1, 5), choice("a", "b")):
        assert span == copy.deepcopy(span) == pickle.loads(pickle.dumps(span))
        assert hash(span) == hash(copy.deepcopy(span))
        with pytest.raises(AttributeError):
            span.low = 3  # type: ignore[misc]
