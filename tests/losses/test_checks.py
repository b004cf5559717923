"""The doors: what is refused, in which words, and what is let through."""

import math

import numpy as np
import pytest
import torch

from telos.losses._checks import (
    check_bool,
    check_classification,
    check_embeddings,
    check_floating,
    check_integer,
    check_label_values,
    check_range,
    check_shape,
    check_two_views,
    values_can_be_read,
)

pytestmark = pytest.mark.bare  # wrong arguments on purpose


# --------------------------------------------------------------------------------------- dtypes and shapes


def test_floating() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        check_floating("x", torch.zeros(2, dtype=dtype))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"^x must have a floating-point dtype, got {dtype}$"):
            check_floating("x", torch.zeros(2, dtype=dtype))
    with pytest.raises(TypeError, match=r"^x must be a tensor, got ndarray$"):
        check_floating("x", np.zeros(2))


def test_integer() -> None:
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64):
        check_integer("x", torch.zeros(2, dtype=dtype))
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"^x must have an integer dtype, got {dtype}$"):
            check_integer("x", torch.zeros(2, dtype=dtype))
    with pytest.raises(TypeError, match=r"^x must be a tensor, got list$"):
        check_integer("x", [0, 1])


def test_shape() -> None:
    check_shape("x", torch.zeros(8), (8,))
    check_shape("x", torch.zeros(8, 3), ("N", 3))
    check_shape("x", torch.zeros(()), ())
    with pytest.raises(ValueError, match=r"^x must have shape \(8,\), got \(7,\)$"):
        check_shape("x", torch.zeros(7), (8,))
    with pytest.raises(ValueError, match=r"^x must have shape \(N, 3\), got \(8, 4\)$"):
        check_shape("x", torch.zeros(8, 4), ("N", 3))
    with pytest.raises(ValueError, match=r"^x must have shape \(N, D\), got \(8,\)$"):
        check_shape("x", torch.zeros(8), ("N", "D"))


# ------------------------------------------------------------------------------------------------- numbers


def test_range() -> None:
    for value in (0, 0.5, 1.0):
        check_range("tau", value, 0.0, 1.0)
    check_range("tau", math.inf, 0.0, math.inf)
    for value in (-1e-9, 1.1, math.nan, -math.inf):
        with pytest.raises(ValueError, match=rf"^tau must lie in \[0.0, 1.0\], got {value}$"):
            check_range("tau", value, 0.0, 1.0)
    check_range("tau", 1.0, 0.0, 1.0, open_low=True)
    for value in (0.0, math.nan):
        with pytest.raises(ValueError, match=rf"^tau must lie in \(0.0, 1.0\], got {value}$"):
            check_range("tau", value, 0.0, 1.0, open_low=True)


# -------------------------------------------------------------------------------------------------- labels


def test_label_values() -> None:
    check_label_values("y", torch.tensor([0, 2, 1]), 3)
    check_label_values("y", torch.tensor([0, -100]), 3, ignore_index=-100)
    check_label_values("y", torch.tensor([], dtype=torch.long), 3)
    with pytest.raises(ValueError, match=r"^y must lie in \[0, 3\), got 3$"):
        check_label_values("y", torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match=r"^y must lie in \[0, 3\), got -100$"):
        check_label_values("y", torch.tensor([-100]), 3)
    with pytest.raises(ValueError, match=r"^y must lie in \[0, 3\) or -1 \(ignored\), got -100$"):
        check_label_values("y", torch.tensor([-1, -100]), 3, ignore_index=-1)


def test_label_values_do_not_wrap_around_in_a_byte() -> None:
    check_label_values("y", torch.tensor([44], dtype=torch.int8), 300)  # 300 is 44 modulo 256
    check_label_values("y", torch.tensor([255], dtype=torch.uint8), 256)
    # 156 is -100 modulo 256, and no ignored label
    with pytest.raises(ValueError, match=r"got 156$"):
        check_label_values("y", torch.tensor([156], dtype=torch.uint8), 100, ignore_index=-100)


def test_values_are_read_where_that_is_free() -> None:
    labels = torch.tensor([0, 1])
    assert values_can_be_read(labels)
    assert values_can_be_read(torch.nn.Parameter(torch.zeros(2)))
    assert not values_can_be_read(labels.to("meta"))

    seen = []

    def look(row: torch.Tensor) -> torch.Tensor:
        seen.append(values_can_be_read(row))
        seen.append(values_can_be_read(labels))  # a plain tensor inside a transform is left alone too
        return row

    torch.func.vmap(look)(labels)
    assert seen == [False, False]
    assert values_can_be_read(labels)


def test_values_are_not_read_while_compiling() -> None:
    def checked(labels: torch.Tensor) -> torch.Tensor:
        check_label_values("y", labels, 3)
        return labels + 1

    compiled = torch.compile(checked, fullgraph=True, backend="eager")
    assert compiled(torch.tensor([0, 7])).tolist() == [1, 8]


# ------------------------------------------------------------------------------------------------ families


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        ([[0.0, 1.0]], torch.tensor([0]), TypeError, "logits must be a tensor, got list"),
        (
            torch.zeros(2, 3, dtype=torch.long),
            torch.tensor([0, 1]),
            TypeError,
            "logits must have a floating-point",
        ),
        (
            torch.zeros(3),
            torch.tensor(0),
            ValueError,
            r"logits must have shape \(N, C\) or \(N, T, C\), got \(3,\)",
        ),
        (
            torch.zeros(2, 1),
            torch.tensor([0, 0]),
            ValueError,
            "logits must have at least 2 classes, got 1",
        ),
        (torch.zeros(2, 3), [0, 1], TypeError, "target must be a tensor, got list"),
        (
            torch.zeros(2, 3),
            torch.tensor([0]),
            ValueError,
            r"target must have shape \(2,\) \(labels\) or \(2, 3\) ",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3).long(),
            TypeError,
            "target of the shape of logits holds probabilities",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2),
            TypeError,
            "target must have an integer dtype, got torch.float32",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2).bool(),
            TypeError,
            "target must have an integer dtype, got torch.bool",
        ),
        (
            torch.zeros(2, 3),
            torch.tensor([0, 3]),
            ValueError,
            r"target must lie in \[0, 3\) or -100 \(ignored\), got 3",
        ),
    ],
)
def test_classification_door(logits, target, error, message) -> None:
    with pytest.raises(error, match=message):
        check_classification(logits, target, None, None, -100)


def test_classification_door_lets_through() -> None:
    check_classification(torch.zeros(2, 3), torch.tensor([0, -100]), torch.zeros(3), torch.zeros(2), -100)
    check_classification(torch.zeros(2, 3), torch.zeros(2, 3).half(), None, None, -100)
    check_classification(torch.zeros(2, 4, 3), torch.zeros(2, 4).long(), None, torch.zeros(2, 4), -100)
    check_classification(torch.zeros(2, 1), torch.zeros(2).long(), None, None, -100, minimum_classes=1)
    check_classification(torch.zeros(0, 3), torch.zeros(0).long(), None, None, -100)


def test_weights_are_checked() -> None:
    logits, target = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"class_weight must have shape \(3,\), got \(2,\)"):
        check_classification(logits, target, torch.zeros(2), None, -100)
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(2,\), got \(3,\)"):
        check_classification(logits, target, None, torch.zeros(3), -100)
    with pytest.raises(TypeError, match="class_weight must have a floating-point dtype"):
        check_classification(logits, target, torch.ones(3).long(), None, -100)
    with pytest.raises(TypeError, match="sample_weight must have a floating-point dtype"):
        check_classification(logits, target, None, torch.ones(2).long(), -100)


def test_two_views_door() -> None:
    check_two_views(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"z1 must have shape \(N, D\), got \(4,\)"):
        check_two_views(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match=r"z2 must have shape \(4, 3\), got \(5, 3\)"):
        check_two_views(torch.zeros(4, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="z1 must have at least 2 examples, got 1"):
        check_two_views(torch.zeros(1, 3), torch.zeros(1, 3), minimum_examples=2)
    with pytest.raises(TypeError, match="z2 must have a floating-point dtype"):
        check_two_views(torch.zeros(4, 3), torch.zeros(4, 3).long())


def test_embeddings_door() -> None:
    check_embeddings(torch.zeros(4, 3), torch.tensor([0, 0, 7, 1]))
    with pytest.raises(ValueError, match=r"embeddings must have shape \(N, D\), got \(4, 3, 1\)"):
        check_embeddings(torch.zeros(4, 3, 1), torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), got \(3,\)"):
        check_embeddings(torch.zeros(4, 3), torch.zeros(3).long())
    with pytest.raises(TypeError, match="labels must have an integer dtype"):
        check_embeddings(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        check_embeddings(torch.zeros(4, 3), [0, 1, 2, 3])


@pytest.mark.bare
def test_flags_are_booleans() -> None:
    check_bool("kept", torch.tensor([True, False]))
    with pytest.raises(TypeError, match=r"kept must be a boolean tensor, got torch\.int64"):
        check_bool("kept", torch.tensor([1, 0]))
    with pytest.raises(TypeError, match="kept must be a boolean tensor, got list"):
        check_bool("kept", [True])  # type: ignore[arg-type]
