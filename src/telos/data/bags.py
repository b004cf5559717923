"""Bags of examples whose responses are only known on average."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.utils.data import Sampler

from telos.losses._checks import check_floating, check_integer, check_range, check_shape


def make_bags(
    n: int, bag_size: int, generator: torch.Generator | None = None
) -> Integer[Tensor, " examples"]:
    """Random disjoint bags of equal size.

    Args:
        n: number of examples N.
        bag_size: examples in each bag; the last bag takes what is left where it does not divide ``n``.
        generator: source of the random assignment.

    Returns:
        (N,) the bag of each example, in [0, ceil(n / bag_size)).

    Raises:
        ValueError: for a negative ``n`` or a bag size below 1.

    Example:
        >>> import torch
        >>> bag_index = make_bags(6, 2, torch.Generator().manual_seed(0))
        >>> torch.bincount(bag_index)
        tensor([2, 2, 2])
    """
    check_range("n", n, 0, math.inf)
    check_range("bag_size", bag_size, 1, math.inf)
    bag_index = torch.empty(n, dtype=torch.long)
    bag_index[torch.randperm(n, generator=generator)] = torch.arange(n) // bag_size
    return bag_index


def bag_means(
    y: Float[Tensor, "examples *outputs"], bag_index: Integer[Tensor, " examples"]
) -> Float[Tensor, "bags *outputs"]:
    """The mean response of each bag.

    Args:
        y: (N,) or (N, C) responses.
        bag_index: (N,) the bag of each example; the number of bags is its largest entry plus one.

    Returns:
        (B,) or (B, C).

    Raises:
        ValueError: for a wrong shape, a negative index or an empty bag.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> bag_means(torch.tensor([0.0, 2.0, 5.0]), torch.tensor([0, 0, 1]))
        tensor([1., 5.])
    """
    size = _bag_sizes(y, bag_index).to(y.dtype)
    total = y.new_zeros(size.shape[0], *y.shape[1:]).index_add(0, bag_index.long(), y)
    return total / size.reshape(-1, *[1] * (y.ndim - 1))


def private_bag_means(
    y: Float[Tensor, " examples"],
    bag_index: Integer[Tensor, " examples"],
    clip: float,
    epsilon: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " bags"]:
    r"""Bag means under label differential privacy.

    Responses are clipped, averaged, and noise is added that hides any single one of them::

        mean_{i in a} clip(y_i, -C, C) + Laplace( 2 C / (k_a epsilon) )

    One label moves its bag's mean by at most ``2 C / k_a`` and touches no other bag, so the release is
    epsilon-label-differentially private; features and bag memberships are not protected. The noise has
    variance ``8 C^2 / (k_a^2 epsilon^2)``. It is drawn in floating point from a generator that is not
    cryptographic: right for research, not for a release to an adversary.

    RECONSTRUCTED: reviews of the paper say truncate, average, add Laplace noise; the constants follow from
        that.

    Args:
        y: (N,) responses.
        bag_index: (N,) the bag of each example; the number of bags is its largest entry plus one.
        clip: C, the bound on a response, above 0.
        epsilon: privacy budget, above 0; infinite adds no noise.
        generator: source of the noise.

    Returns:
        (B,) noisy means. They may leave the range of the responses.

    Raises:
        ValueError: for a wrong shape, an empty bag, or a bound or budget that is not positive.
        TypeError: for a wrong dtype.

    Source:
        Learning from Aggregate responses: Instance Level versus Bag Level Loss Functions, arXiv 2401.11081.

    Example:
        >>> import torch
        >>> y, bag_index = torch.tensor([0.0, 1.0, 9.0]), torch.tensor([0, 0, 1])
        >>> private_bag_means(y, bag_index, clip=3.0, epsilon=float("inf"))
        tensor([0.5000, 3.0000])
    """
    check_shape("y", y, ("N",))
    check_range("clip", clip, 0.0, math.inf, open_low=True)
    check_range("epsilon", epsilon, 0.0, math.inf, open_low=True)
    size = _bag_sizes(y, bag_index).to(y.dtype)
    means = bag_means(y.clamp(-clip, clip), bag_index)
    # the difference of two exponential variables is a Laplace variable
    above, below = torch.empty_like(means), torch.empty_like(means)
    above.exponential_(generator=generator)
    below.exponential_(generator=generator)
    return means + 2 * clip / (size * epsilon) * (above - below)


class BagSampler(Sampler[list[int]]):
    """Batches of whole bags, for ``DataLoader(batch_sampler=...)``.

    A loss on bag means needs every member of a bag in the same batch. Each batch lists the examples of
    ``bags_per_batch`` bags. Let the data set return each example's bag, and number the bags of a batch from 0
    with ``bags, bag_index = torch.unique(bag, return_inverse=True)``; the responses are then
    ``bag_response[bags]``.

    Args:
        bag_index: (N,) the bag of each example of the data set.
        bags_per_batch: bags in a batch.
        shuffle: draw a new order of bags in every pass.
        drop_last: leave out a last batch of fewer bags.
        generator: source of the order. It advances from pass to pass; nothing has to be told the epoch.

    Raises:
        ValueError: for a wrong shape, an empty bag or fewer than one bag in a batch.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> list(BagSampler(torch.tensor([0, 1, 0, 2]), bags_per_batch=2, shuffle=False))
        [[0, 2, 1], [3]]
    """

    def __init__(
        self,
        bag_index: Integer[Tensor, " examples"],
        bags_per_batch: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        check_range("bags_per_batch", bags_per_batch, 1, math.inf)
        sizes = _bag_sizes(None, bag_index)
        self._members = torch.argsort(bag_index.cpu(), stable=True).split(sizes.tolist())
        self.bags_per_batch, self.shuffle, self.drop_last = bags_per_batch, shuffle, drop_last
        self.generator = generator

    def __iter__(self) -> Iterator[list[int]]:
        bags = len(self._members)
        order = torch.randperm(bags, generator=self.generator) if self.shuffle else torch.arange(bags)
        for chosen in order.split(self.bags_per_batch)[: len(self)]:
            yield torch.cat([self._members[bag] for bag in chosen.tolist()]).tolist()

    def __len__(self) -> int:
        if self.drop_last:
            return len(self._members) // self.bags_per_batch
        return math.ceil(len(self._members) / self.bags_per_batch)


def _bag_sizes(y: Tensor | None, bag_index: Tensor) -> Tensor:
    """Check a bag index (against responses) and count the examples of each bag."""
    check_integer("bag_index", bag_index)
    if y is not None:
        check_floating("y", y)
    check_shape("bag_index", bag_index, ("N",) if y is None else (y.shape[0],))
    if bag_index.numel() and int(bag_index.min()) < 0:
        raise ValueError(f"bag_index must not be negative, got {int(bag_index.min())}")
    sizes = torch.bincount(bag_index.long())
    if (sizes == 0).any():
        raise ValueError(
            f"bag_index must name every bag in [0, {sizes.shape[0]}), "
            f"got no example of bag {int(sizes.argmin())}"
        )
    return sizes
