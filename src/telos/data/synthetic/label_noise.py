"""Label noise with a known law, to study what training does about wrong labels."""

import torch
from jaxtyping import Integer
from torch import Tensor

from telos.losses._checks import check_integer, check_label_values, check_range, check_shape


def uniform_label_noise(
    labels: Integer[Tensor, "*batch"],
    num_classes: int,
    probability: float,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Redraws each label with a given probability, uniformly over all classes.

    The true class may be drawn again, so that a label is wrong with probability
    ``probability * (C - 1) / C``; at ``probability = 1`` nothing is left of the labels.

    Args:
        labels: labels in [0, C), any shape.
        num_classes: number of classes C.
        probability: of a label being redrawn, in [0, 1].
        generator: source of the draws.

    Returns:
        New labels of the shape and dtype of ``labels``.

    Raises:
        ValueError: for a probability or a label out of range.
        TypeError: if ``labels`` are not of an integer dtype.

    Source:
        The uniform noise of Label Distributionally Robust Losses for Multi-class Classification, arXiv
        2112.14869.

    Example:
        >>> import torch
        >>> labels = torch.zeros(10000, dtype=torch.long)
        >>> noisy = uniform_label_noise(labels, 4, 0.4, generator=torch.Generator().manual_seed(0))
        >>> round((noisy != labels).float().mean().item(), 1)  # 0.4 * 3 / 4
        0.3
    """
    _check(labels, num_classes, probability)
    device = labels.device if generator is None else generator.device
    redrawn = torch.rand(labels.shape, generator=generator, device=device) < probability
    drawn = torch.randint(num_classes, labels.shape, generator=generator, device=device)
    return torch.where(redrawn.to(labels.device), drawn.to(labels), labels)


def pairwise_label_noise(
    labels: Integer[Tensor, "*batch"],
    num_classes: int,
    probability: float,
    *,
    partner: Integer[Tensor, " classes"] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Flips each label to the partner of its class with a given probability (class-dependent noise).

    Args:
        labels: labels in [0, C), any shape.
        num_classes: number of classes C.
        probability: of a flip, in [0, 1].
        partner: (C,) the class into which each class flips; a class that is its own partner stays clean. The
            next class, ``(y + 1) mod C``, if not given.
        generator: source of the draws.

    Returns:
        New labels of the shape and dtype of ``labels``.

    Raises:
        ValueError: for a probability, a label or a partner out of range, or a wrong shape.
        TypeError: if ``labels`` or ``partner`` are not of an integer dtype.

    Source:
        The class-dependent noise of Label Distributionally Robust Losses for Multi-class Classification,
        arXiv 2112.14869.

    Example:
        >>> import torch
        >>> pairwise_label_noise(torch.tensor([0, 1, 2]), 3, 1.0)
        tensor([1, 2, 0])
        >>> pairwise_label_noise(torch.tensor([0, 1, 2]), 3, 1.0, partner=torch.tensor([1, 0, 2]))
        tensor([1, 0, 2])
    """
    _check(labels, num_classes, probability)
    if partner is None:
        flipped = (labels.long() + 1) % num_classes
    else:
        check_integer("partner", partner)
        check_shape("partner", partner, (num_classes,))
        check_label_values("partner", partner, num_classes)
        flipped = partner.to(labels.device)[labels.long()]
    device = labels.device if generator is None else generator.device
    flips = torch.rand(labels.shape, generator=generator, device=device) < probability
    return torch.where(flips.to(labels.device), flipped.to(labels.dtype), labels)


def _check(labels: Tensor, num_classes: int, probability: float) -> None:
    check_integer("labels", labels)
    check_range("num_classes", num_classes, 1, float("inf"))
    check_label_values("labels", labels, num_classes)
    check_range("probability", probability, 0.0, 1.0)
