import math

import pytest
import torch

from telos.data.synthetic import pairwise_label_noise, uniform_label_noise

CLASSES = 5


def labels(n: int = 50_000) -> torch.Tensor:
    return torch.arange(n) % CLASSES


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("probability", [0.3, 0.6, 0.9])
def test_uniform_noise_redraws_over_all_classes(probability: float) -> None:
    """P(y' | y) is p / C for every other class and 1 - p + p / C for the class itself."""
    clean = labels()
    noisy = uniform_label_noise(clean, CLASSES, probability, generator=generator())
    each = 4 * math.sqrt(0.25 / (len(clean) / CLASSES))  # four standard errors of a share
    for y in range(CLASSES):
        share = torch.bincount(noisy[clean == y], minlength=CLASSES).double() / (clean == y).sum()
        expected = torch.full((CLASSES,), probability / CLASSES, dtype=torch.float64)
        expected[y] += 1 - probability
        torch.testing.assert_close(share, expected, rtol=0, atol=each)


def test_pairwise_noise_flips_to_the_next_class_only() -> None:
    clean = labels()
    noisy = pairwise_label_noise(clean, CLASSES, 0.3, generator=generator())
    flipped = noisy != clean
    assert (noisy[flipped] == (clean[flipped] + 1) % CLASSES).all()
    assert flipped.double().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / len(clean)))


def test_pairwise_noise_follows_the_partners() -> None:
    clean = labels()
    partner = torch.tensor([1, 0, 2, 4, 4])
    noisy = pairwise_label_noise(clean, CLASSES, 1.0, partner=partner, generator=generator())
    assert torch.equal(noisy, partner[clean])


@pytest.mark.parametrize("noise", [uniform_label_noise, pairwise_label_noise])
def test_probability_zero_keeps_the_labels_and_a_seed_repeats(noise) -> None:
    clean = labels(100)
    assert torch.equal(noise(clean, CLASSES, 0.0, generator=generator()), clean)
    first = noise(clean, CLASSES, 0.5, generator=generator(1))
    assert torch.equal(noise(clean, CLASSES, 0.5, generator=generator(1)), first)
    assert not torch.equal(noise(clean, CLASSES, 0.5, generator=generator(2)), first)


@pytest.mark.parametrize("noise", [uniform_label_noise, pairwise_label_noise])
def test_shape_and_dtype_stay_and_the_input_is_left_alone(noise) -> None:
    clean = labels(60).reshape(3, 20).to(torch.uint8)
    before = clean.clone()
    noisy = noise(clean, CLASSES, 0.9, generator=generator())
    assert noisy.shape == (3, 20)
    assert noisy.dtype == torch.uint8
    assert torch.equal(clean, before)


@pytest.mark.bare
@pytest.mark.parametrize("noise", [uniform_label_noise, pairwise_label_noise])
def test_doors(noise) -> None:
    with pytest.raises(ValueError, match="probability must lie in"):
        noise(labels(10), CLASSES, 1.5)
    with pytest.raises(ValueError, match="labels must lie in"):
        noise(labels(10), 4, 0.5)
    with pytest.raises(TypeError, match="labels must have an integer dtype"):
        noise(labels(10).float(), CLASSES, 0.5)


@pytest.mark.bare
def test_partner_doors() -> None:
    with pytest.raises(ValueError, match="partner must have shape"):
        pairwise_label_noise(labels(10), CLASSES, 0.5, partner=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="partner must lie in"):
        pairwise_label_noise(labels(10), CLASSES, 0.5, partner=torch.full((CLASSES,), 7))
