"""Splits: stratified, by group, by time."""

import numpy as np
import pytest

from telos.trials.splits import SHARES, WITHOUT_TEST, chronological, grouped, shuffled, stratified


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def is_partition(parts: list[np.ndarray], count: int) -> bool:
    return sorted(np.concatenate(parts).tolist()) == list(range(count))


@pytest.mark.parametrize("shares", [SHARES, WITHOUT_TEST])
def test_every_class_is_dealt_by_the_shares(shares: tuple[float, ...]) -> None:
    target = rng(5).permutation(np.repeat([0, 1, 2], [400, 80, 4]))
    one, two = stratified(target, rng(1), shares), stratified(target, rng(2), shares)
    assert is_partition(one, 484)
    for part, other, share in zip(one, two, shares, strict=True):
        counts = np.bincount(target[part], minlength=3)
        np.testing.assert_allclose(counts[:2] / [400, 80], share, atol=0.01)
        assert counts[2] >= 1
        assert (counts == np.bincount(target[other], minlength=3)).all()
    assert not np.array_equal(one[0], two[0])


def test_numbers_are_dealt_by_the_shares() -> None:
    parts = shuffled(1000, rng())
    assert is_partition(parts, 1000)
    assert [len(part) for part in parts] == [600, 150, 250]


@pytest.mark.parametrize("seed", range(8))
def test_no_group_straddles_and_shares_are_kept(seed: int) -> None:
    made = rng(seed)
    groups = np.unique(made.integers(0, 60, 900), return_inverse=True)[1]
    labels = (made.random(900) < 0.2).astype(np.int64)
    parts = grouped(groups, labels, rng(seed))
    assert is_partition(parts, 900)
    owners = [set(groups[part]) for part in parts]
    assert sum(map(len, owners)) == len(set(groups))
    for part, share in zip(parts, SHARES, strict=True):
        assert abs(len(part) / 900 - share) < 0.05
        assert abs(labels[part].mean() - labels.mean()) < 0.06


def test_groups_are_stratified_better_than_by_chance() -> None:
    made = rng(3)
    groups = np.repeat(np.arange(40), 10)
    labels = np.repeat((made.random(40) < 0.3).astype(np.int64), 10)  # a class of its own for every group

    def off(parts: list[np.ndarray]) -> float:
        return max(abs(labels[part].mean() - labels.mean()) for part in parts)

    chosen = [off(grouped(groups, labels, rng(seed))) for seed in range(20)]
    blind = [off(grouped(groups, None, rng(seed))) for seed in range(20)]
    assert np.mean(chosen) < 0.5 * np.mean(blind)


@pytest.mark.parametrize("seed", range(10))
def test_the_training_split_has_every_class_where_groups_hold_one_each(seed: int) -> None:
    # twelve classes of one group, and groups that hold none of them
    groups = np.arange(30).repeat(4)
    labels = np.where(groups < 12, groups + 1, 0)
    parts = grouped(groups, labels, rng(seed))
    assert set(labels[parts[0]]) == set(range(13))
    assert all(len(part) for part in parts)


@pytest.mark.parametrize("seed", range(5))
def test_as_few_groups_as_splits_are_enough(seed: int) -> None:
    parts = grouped(np.array([0, 0, 1, 2, 2, 2]), None, rng(seed))
    assert sorted(map(len, parts)) == [1, 2, 3]


def test_too_few_groups() -> None:
    with pytest.raises(ValueError, match="2 groups cannot be dealt to 3 splits"):
        grouped(np.array([0, 1, 1]), None, rng())
    # both classes must be in training, which leaves two splits one group
    with pytest.raises(ValueError, match="3 groups are too few"):
        grouped(np.array([0, 1, 2]), np.array([0, 0, 1]), rng(1))


def test_the_past_comes_first_and_moments_stay_together() -> None:
    time = rng().integers(0, 40, 500).astype(float)
    parts = chronological(time)
    assert is_partition(parts, 500)
    assert time[parts[0]].max() < time[parts[1]].min()
    assert time[parts[1]].max() < time[parts[2]].min()
    for part, share in zip(parts, SHARES, strict=True):
        assert abs(len(part) / 500 - share) < 0.04


def test_one_huge_moment_leaves_no_split_empty() -> None:
    time = np.array([1.0] * 50 + [2.0, 3.0])
    assert [len(part) for part in chronological(time)] == [50, 1, 1]
    with pytest.raises(ValueError, match="2 moments cannot be dealt to 3 splits"):
        chronological(time[:51])
