import copy
import math

import pytest
import torch
from torch import nn

from telos.losses._memory import SampleMemory, log_ema


def test_log_ema_is_the_logarithm_of_the_average() -> None:
    old, new = torch.tensor([0.5, 3.0], dtype=torch.float64), torch.tensor([2.0, 0.1], dtype=torch.float64)
    for gamma in (0.0, 0.3, 1.0):
        expected = ((1 - gamma) * old + gamma * new).log()
        torch.testing.assert_close(log_ema(old.log(), new.log(), gamma), expected)


def test_log_ema_neither_overflows_nor_needs_a_past() -> None:
    huge = torch.tensor([1000.0, 1000.0])
    expected = 1000.0 + math.log(0.75 + 0.25 * math.exp(-2.0))
    torch.testing.assert_close(log_ema(huge, huge - 2.0, 0.25), torch.full((2,), expected))
    nothing = torch.full((2,), -math.inf)
    torch.testing.assert_close(log_ema(nothing, torch.zeros(2), 0.25), torch.full((2,), math.log(0.25)))
    torch.testing.assert_close(log_ema(nothing, torch.tensor([3.0, -4.0]), 1.0), torch.tensor([3.0, -4.0]))


def test_log_ema_takes_one_gamma_for_each_example() -> None:
    gamma = torch.tensor([1.0, 0.5])
    average = log_ema(torch.log(torch.tensor([4.0, 4.0])), torch.log(torch.tensor([2.0, 2.0])), gamma)
    torch.testing.assert_close(average, torch.log(torch.tensor([2.0, 3.0])))


def test_writes_where_the_index_points() -> None:
    memory = SampleMemory(5, initial={"a": 1.0, "b": -2.0})
    memory.write(torch.tensor([4, 1]), a=torch.tensor([7.0, 8.0]), b=torch.tensor([9.0, 10.0]))
    assert memory.a.tolist() == [1.0, 8.0, 1.0, 1.0, 7.0]
    assert memory.b.tolist() == [-2.0, 10.0, -2.0, -2.0, 9.0]
    assert memory.seen.tolist() == [False, True, False, False, True]
    assert memory.read("a", torch.tensor([1, 1, 0])).tolist() == [8.0, 8.0, 1.0]


def test_some_of_the_names_may_be_written() -> None:
    memory = SampleMemory(2, initial={"a": 1.0, "b": 2.0})
    memory.write(torch.tensor([0]), b=torch.tensor([5.0]))
    assert (memory.a.tolist(), memory.b.tolist()) == ([1.0, 1.0], [5.0, 2.0])


def test_duplicates_are_averaged_and_the_past_does_not_count() -> None:
    memory = SampleMemory(3, initial={"a": 100.0})
    memory.write(torch.tensor([2, 0, 2, 2]), a=torch.tensor([1.0, 5.0, 2.0, 6.0]))
    torch.testing.assert_close(memory.a, torch.tensor([5.0, 100.0, 3.0]))


def test_duplicates_of_logarithms_are_averaged_before_the_logarithm() -> None:
    memory = SampleMemory(3, initial={"a": -math.inf}, logarithms=("a",))
    memory.write(torch.tensor([2, 2, 0]), a=torch.tensor([math.log(1.0), math.log(3.0), 500.0]))
    torch.testing.assert_close(memory.a, torch.tensor([500.0, -math.inf, math.log(2.0)]))
    memory.write(torch.tensor([1, 1]), a=torch.tensor([1000.0, 1000.0 + math.log(3.0)]))
    assert memory.a[1].item() == pytest.approx(1000.0 + math.log(2.0), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_dropped(bad: float) -> None:
    memory = SampleMemory(3, initial={"a": 1.0, "b": 2.0})
    memory.write(torch.tensor([0, 2]), a=torch.tensor([bad, 5.0]), b=torch.tensor([7.0, 6.0]))
    assert memory.a.tolist() == [1.0, 1.0, 5.0]
    assert memory.b.tolist() == [2.0, 2.0, 6.0], "an example's numbers are written together or not at all"
    assert memory.seen.tolist() == [False, False, True]


def test_an_empty_batch_writes_nothing() -> None:
    memory = SampleMemory(2, initial={"a": 1.0})
    memory.write(torch.zeros(0, dtype=torch.long), a=torch.zeros(0))
    assert memory.a.tolist() == [1.0, 1.0]
    assert not memory.seen.any()


def test_writes_carry_no_graph() -> None:
    memory = SampleMemory(2, initial={"a": 1.0})
    memory.write(torch.tensor([1]), a=torch.ones(1, requires_grad=True) * 3)
    assert not memory.a.requires_grad


def test_half_around_the_loss_leaves_the_digits() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = SampleMemory(2, initial={"a": 1 / 3})
            self.layer = nn.Linear(1, 1)

    third = torch.tensor(1 / 3)
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        holder = change(Holder())
        assert holder.layer.weight.dtype != torch.float32
        assert holder.memory.a.dtype == torch.float32
        assert (holder.memory.a == third).all()
    assert SampleMemory(2, initial={"a": 1 / 3}, dtype=torch.float64).half().a.dtype == torch.float64


def test_half_values_are_remembered_in_float32() -> None:
    memory = SampleMemory(2, initial={"a": 0.0})
    memory.write(torch.tensor([0, 0]), a=torch.tensor([1.0, 1.0009765625], dtype=torch.float16))
    # their mean lies between two float16 numbers
    assert memory.a[0].item() == 1.00048828125


def test_follows_the_device() -> None:
    memory = SampleMemory(2, initial={"a": 1.0}).to("meta")
    assert memory.a.device.type == memory.seen.device.type == "meta"


def test_state_dict_and_copies_keep_it() -> None:
    memory = SampleMemory(3, initial={"a": 1.0}, logarithms=("a",))
    memory.write(torch.tensor([1]), a=torch.tensor([4.0]))
    fresh = SampleMemory(3, initial={"a": 1.0}, logarithms=("a",))
    fresh.load_state_dict(memory.state_dict())
    for twin in (fresh, copy.deepcopy(memory)):
        assert torch.equal(twin.a, memory.a)
        assert torch.equal(twin.seen, memory.seen)
        twin.write(torch.tensor([0]), a=torch.tensor([9.0]))
    assert memory.a.tolist() == [1.0, 4.0, 1.0]


@pytest.mark.bare
def test_index_is_checked() -> None:
    memory = SampleMemory(4, initial={"a": 0.0})
    assert memory.check(torch.tensor([0, 3], dtype=torch.int32), 2).dtype == torch.long
    assert memory.check(torch.zeros(0, dtype=torch.long), 0).numel() == 0
    with pytest.raises(ValueError, match="index must hold the position"):
        memory.check(None, 2)
    with pytest.raises(TypeError, match="index must have an integer dtype"):
        memory.check(torch.tensor([0.0, 1.0]), 2)
    with pytest.raises(ValueError, match=r"index must have shape \(2,\), got \(3,\)"):
        memory.check(torch.tensor([0, 1, 2]), 2)
    for bad in (4, -1):
        with pytest.raises(ValueError, match=rf"index must lie in \[0, 4\), got {bad}"):
            memory.check(torch.tensor([0, bad]), 2)
    with pytest.raises(ValueError, match="num_examples must be at least 1"):
        SampleMemory(0, initial={"a": 0.0})
