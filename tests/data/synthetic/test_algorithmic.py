"""Sums modulo p."""

import pytest
import torch

from telos.data.synthetic import modular_sums


def test_train_and_test_are_the_whole_table() -> None:
    sums = modular_sums(7, 0.4, one_hot=False, generator=torch.Generator().manual_seed(0))
    pairs = torch.cat([sums.train_inputs, sums.test_inputs])
    assert len(sums.train_inputs) == 19
    assert sorted(map(tuple, pairs.tolist())) == [(a, b) for a in range(7) for b in range(7)]
    target = torch.cat([sums.train_target, sums.test_target])
    assert target.tolist() == [(a + b) % 7 for a, b in pairs.tolist()]


def test_one_hot_pairs_are_the_same_pairs() -> None:
    plain, encoded = (
        modular_sums(5, one_hot=one_hot, generator=torch.Generator().manual_seed(1))
        for one_hot in (False, True)
    )
    assert encoded.train_inputs.dtype == torch.float32
    halves = encoded.train_inputs.reshape(-1, 2, 5)
    assert (halves.sum(-1) == 1).all()
    assert torch.equal(halves.argmax(-1), plain.train_inputs)
    assert torch.equal(encoded.test_target, plain.test_target)


def test_split_follows_the_generator() -> None:
    first, again, other = (
        modular_sums(9, one_hot=False, generator=torch.Generator().manual_seed(seed)).train_inputs
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.bare
def test_doors() -> None:
    with pytest.raises(ValueError, match="modulus must be at least 2, got 1"):
        modular_sums(1)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"train_share must lie in \(0, 1\)"):
            modular_sums(5, share)
