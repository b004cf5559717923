"""The doors: shapes, dtypes and values, refused in one sentence that names the argument."""

import torch
from torch import Tensor


def values_can_be_read(tensor: Tensor) -> bool:
    """Whether looking at the numbers is free of side effects: eagerly, on the CPU, outside every transform.

    Reading a value would break a compiled graph, fail under ``torch.func`` or on the meta device, and make a
    GPU wait; there a bad label is the kernel's to report.
    """
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuse anything but a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")


def check_integer(name: str, tensor: Tensor) -> None:
    """Refuse anything but an integer tensor (bool is not one)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {tensor.dtype}")


def check_bool(name: str, flags: Tensor) -> None:
    """Raise ``TypeError`` unless ``flags`` is a boolean tensor."""
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool:
        found = getattr(flags, "dtype", type(flags).__name__)
        raise TypeError(f"{name} must be a boolean tensor, got {found}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Refuse another shape; a string in ``expected`` stands for any size.

    ``check_shape("labels", labels, ("N",))`` and ``check_shape("labels", labels, (8,))``.
    """
    fits = tensor.ndim == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        shape = ", ".join(str(size) for size in expected) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{name} must have shape ({shape}), got {tuple(tensor.shape)}")


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse a number outside [low, high], or (low, high] with ``open_low``."""
    if not (low < value if open_low else low <= value) or not value <= high:
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must lie in {bracket}{low}, {high}], got {value}")


def check_label_values(name: str, labels: Tensor, num_classes: int, ignore_index: int | None = None) -> None:
    """Refuse labels outside [0, num_classes) other than ``ignore_index``, where they can be read."""
    if labels.numel() == 0 or not values_can_be_read(labels):
        return
    labels = labels.long()  # num_classes or ignore_index would wrap around in a narrow integer dtype
    bad = (labels < 0) | (labels >= num_classes)
    if ignore_index is not None:
        bad &= labels != ignore_index
    if bad.any():
        allowed = f"[0, {num_classes})" + ("" if ignore_index is None else f" or {ignore_index} (ignored)")
        raise ValueError(f"{name} must lie in {allowed}, got {labels[bad][0].item()}")


def check_classification(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    minimum_classes: int = 2,
) -> None:
    """The door of the classification family: logits (..., C), target (...) labels or (..., C) probabilities."""
    check_floating("logits", logits)
    if logits.ndim < 2:
        raise ValueError(f"logits must have shape (N, C) or (N, T, C), got {tuple(logits.shape)}")
    classes = logits.shape[-1]
    if classes < minimum_classes:
        raise ValueError(f"logits must have at least {minimum_classes} classes, got {classes}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.shape == logits.shape:
        if not target.is_floating_point():
            raise TypeError(
                f"target of the shape of logits holds probabilities and must be floating, got {target.dtype}"
            )
    elif target.shape == logits.shape[:-1]:
        check_integer("target", target)
        check_label_values("target", target, classes, ignore_index)
    else:
        raise ValueError(
            f"target must have shape {tuple(logits.shape[:-1])} (labels) or {tuple(logits.shape)} (probabilities), "
            f"got {tuple(target.shape)}"
        )
    if class_weight is not None:
        check_floating("class_weight", class_weight)
        check_shape("class_weight", class_weight, (classes,))
    if sample_weight is not None:
        check_floating("sample_weight", sample_weight)
        check_shape("sample_weight", sample_weight, tuple(logits.shape[:-1]))


def check_two_views(z1: Tensor, z2: Tensor, minimum_examples: int = 1) -> None:
    """The door of the contrastive family: two views (N, D) of the same N examples."""
    check_floating("z1", z1)
    check_floating("z2", z2)
    check_shape("z1", z1, ("N", "D"))
    check_shape("z2", z2, tuple(z1.shape))
    if z1.shape[0] < minimum_examples:
        raise ValueError(f"z1 must have at least {minimum_examples} examples, got {z1.shape[0]}")


def check_embeddings(embeddings: Tensor, labels: Tensor) -> None:
    """The door of the metric family: embeddings (N, D) and labels (N,)."""
    check_floating("embeddings", embeddings)
    check_shape("embeddings", embeddings, ("N", "D"))
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    check_shape("labels", labels, (embeddings.shape[0],))
    check_integer("labels", labels)
