"""Small algorithmic worlds, where memorising and understanding come apart."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ModularSums(NamedTuple):
    """A split of the table of sums modulo p; see :func:`modular_sums`.

    Attributes:
        train_inputs: (n, 2 p) one-hot pairs, or (n, 2) pairs of whole numbers.
        train_target: (n,) sums.
        test_inputs: the other pairs.
        test_target: their sums.
    """

    train_inputs: Tensor
    train_target: Tensor
    test_inputs: Tensor
    test_target: Tensor


def modular_sums(
    modulus: int,
    train_share: float = 0.4,
    *,
    one_hot: bool = True,
    generator: torch.Generator | None = None,
) -> ModularSums:
    """Addition modulo p: all ``p^2`` pairs (a, b) with target ``(a + b) mod p``, split at random.

    The classic world of grokking: a network fits the training pairs by heart long before, if ever, it adds.

    Args:
        modulus: p, at least 2.
        train_share: share of the pairs for training, rounded down, between 0 and 1.
        one_hot: two one-hot vectors side by side, float32 (n, 2 p); otherwise the pairs themselves, int64 (n,
            2).
        generator: source of the split.

    Returns:
        Training and test inputs and targets.

    Raises:
        ValueError: for a modulus or a share out of range.

    Example:
        >>> import torch
        >>> sums = modular_sums(5, 0.4, one_hot=False, generator=torch.Generator().manual_seed(0))
        >>> sums.train_inputs.shape, sums.test_inputs.shape
        (torch.Size([10, 2]), torch.Size([15, 2]))
        >>> bool((sums.train_inputs.sum(1) % 5 == sums.train_target).all())
        True
    """
    if modulus < 2:
        raise ValueError(f"modulus must be at least 2, got {modulus}")
    if not 0 < train_share < 1:
        raise ValueError(f"train_share must lie in (0, 1), got {train_share}")
    numbers = torch.arange(modulus)
    pairs = torch.cartesian_prod(numbers, numbers)
    target = pairs.sum(1) % modulus
    inputs = F.one_hot(pairs, modulus).flatten(1).float() if one_hot else pairs
    order = torch.randperm(len(pairs), generator=generator)
    train, test = order.tensor_split([int(train_share * len(pairs))])
    return ModularSums(inputs[train], target[train], inputs[test], target[test])
