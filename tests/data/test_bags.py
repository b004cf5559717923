"""Bags: random assignment, whole-bag batches and the private release."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from telos.data import BagSampler, bag_means, make_bags, private_bag_means
from telos.losses import bag_loss


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_bags_are_equal_disjoint_and_random() -> None:
    bag_index = make_bags(12, 3, generator())
    assert torch.equal(torch.bincount(bag_index), torch.full((4,), 3))
    assert torch.equal(bag_index, make_bags(12, 3, generator()))
    assert not torch.equal(bag_index, make_bags(12, 3, generator(1)))
    assert torch.equal(torch.bincount(make_bags(11, 4, generator())), torch.tensor([4, 4, 3]))
    assert make_bags(0, 4).shape == (0,)


def test_every_pair_shares_a_bag_equally_often() -> None:
    source = generator()
    together = torch.zeros(6, 6)
    for _ in range(4000):
        bag_index = make_bags(6, 2, source)
        together += bag_index[:, None] == bag_index[None]
    share = together[~torch.eye(6, dtype=torch.bool)] / 4000
    # one partner among five; 5 standard errors
    assert (share - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / 4000)


def test_bag_means() -> None:
    y = torch.tensor([[1.0, 10.0], [3.0, 30.0], [5.0, 0.0]])
    assert torch.equal(bag_means(y, torch.tensor([1, 1, 0])), torch.tensor([[5.0, 0.0], [2.0, 20.0]]))


def test_sampler_yields_whole_bags_once() -> None:
    bag_index = make_bags(23, 3, generator())
    sampler = BagSampler(bag_index, 3, generator=generator(1))
    batches = list(sampler)
    assert len(batches) == len(sampler) == 3
    assert sorted(example for batch in batches for example in batch) == list(range(23))
    seen = [set(bag_index[batch].tolist()) for batch in batches]
    assert [len(bags) for bags in seen] == [3, 3, 2]
    assert len(set.union(*seen)) == 8
    dropped = list(BagSampler(bag_index, 3, drop_last=True, generator=generator(1)))
    assert dropped == batches[:2]


def test_sampler_reshuffles_and_repeats_with_its_generator() -> None:
    bag_index = make_bags(40, 2, generator())
    sampler = BagSampler(bag_index, 5, generator=generator(1))
    first, second = list(sampler), list(sampler)
    assert first != second
    again = BagSampler(bag_index, 5, generator=generator(1))
    assert (list(again), list(again)) == (first, second)
    fixed = BagSampler(bag_index, 5, shuffle=False)
    assert list(fixed) == list(fixed)


def test_sampler_feeds_a_loss_through_a_loader() -> None:
    """Batches of equally many bags average to the loss of the whole data set."""
    bag_index = make_bags(24, 2, generator())
    prediction = torch.randn(24, generator=generator(1))
    response = torch.randn(12, generator=generator(2))
    loader = DataLoader(
        TensorDataset(prediction, bag_index), batch_sampler=BagSampler(bag_index, 4, generator=generator(3))
    )
    losses = []
    for values, bag in loader:
        bags, local = torch.unique(bag, return_inverse=True)
        losses.append(bag_loss(values, response[bags], local))
    torch.testing.assert_close(torch.stack(losses).mean(), bag_loss(prediction, response, bag_index))


def test_one_label_moves_a_bag_mean_by_at_most_the_sensitivity() -> None:
    """Both releases draw the same noise, so it cancels; end to end of the clip meets the bound."""
    bag_index = torch.tensor([0, 0, 0, 0, 1, 1])
    y = torch.tensor([-9.0, 0.5, 0.1, 7.0, 1.0, -1.0], dtype=torch.float64)
    changes = []
    for example in range(6):
        for value in (-100.0, 0.3, 100.0):
            other = y.clone()
            other[example] = value
            pair = [private_bag_means(labels, bag_index, 1.5, 1.0, generator()) for labels in (y, other)]
            change = (pair[1] - pair[0]).abs()
            assert change[1 - bag_index[example]] == 0
            bound = 2 * 1.5 / torch.bincount(bag_index)
            assert (change <= bound + 1e-12).all()
            changes.append((change / bound).max())
    assert max(changes) == pytest.approx(1.0, rel=1e-12)


def test_noise_is_laplace_of_the_stated_scale() -> None:
    bags, size = 200_000, 2
    bag_index = torch.arange(bags).repeat(size)
    y = torch.full((bags * size,), 0.7, dtype=torch.float64)
    noise = private_bag_means(y, bag_index, clip=1.5, epsilon=0.5, generator=generator()) - 0.7
    scale = 2 * 1.5 / (size * 0.5)
    # standard errors times sqrt(n): sqrt(2) b of the mean, sqrt(20) b^2 of the variance, b of E|x|
    assert abs(noise.mean()) < 5 * math.sqrt(2 / bags) * scale
    assert abs(noise.var() - 2 * scale**2) < 5 * math.sqrt(20 / bags) * scale**2
    assert abs(noise.abs().mean() - scale) < 5 * scale / math.sqrt(bags)


def test_no_noise_without_a_budget_and_the_same_with_the_same_generator() -> None:
    y, bag_index = torch.tensor([5.0, 1.0, -0.5]), torch.tensor([0, 0, 1])
    assert torch.equal(private_bag_means(y, bag_index, 2.0, math.inf), torch.tensor([1.5, -0.5]))
    first = private_bag_means(y, bag_index, 2.0, 1.0, generator())
    assert torch.equal(first, private_bag_means(y, bag_index, 2.0, 1.0, generator()))
    assert not torch.equal(first, private_bag_means(y, bag_index, 2.0, 1.0, generator(1)))


@pytest.mark.bare
def test_refuses_what_it_cannot_mean() -> None:
    y = torch.zeros(3)
    with pytest.raises(ValueError, match="bag_size must lie in"):
        make_bags(3, 0)
    with pytest.raises(ValueError, match="got no example of bag 1"):
        bag_means(y, torch.tensor([0, 0, 2]))
    with pytest.raises(ValueError, match="bag_index must not be negative, got -1"):
        bag_means(y, torch.tensor([0, 0, -1]))
    with pytest.raises(ValueError, match="epsilon must lie in"):
        private_bag_means(y, torch.tensor([0, 0, 1]), 1.0, 0.0)
    with pytest.raises(ValueError, match="clip must lie in"):
        private_bag_means(y, torch.tensor([0, 0, 1]), 0.0, 1.0)
    with pytest.raises(TypeError, match="bag_index must have an integer dtype"):
        BagSampler(y, 2)
    with pytest.raises(ValueError, match="bags_per_batch must lie in"):
        BagSampler(torch.tensor([0, 1]), 0)
