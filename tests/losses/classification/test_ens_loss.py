import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import EnsLoss, TaskInfo, calibrated_derivatives, ens_loss, misfit
from tests.declaration import Declaration, Inputs
from tests.golden.adapters import Case, gradients


def binary_sample(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    logits = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    target = torch.randint(2, (n,), generator=generator)
    return {"logits": logits.to(dtype), "target": target, "noise": noise.to(dtype)}


declarations = [
    Declaration(
        function=ens_loss,
        module=EnsLoss,
        sample=binary_sample,
        rows=False,
        surrogate="the derivatives are drawn and matched to the margins under a stopped gradient",
        module_only=("lam_range",),
        invariances={"shift of the logits": lambda inputs: {**inputs, "logits": inputs["logits"] + 1.5}},
    )
]


def golden_ens_loss(case: Case) -> dict[str, Any]:
    output = case.leaf("output")
    loss = ens_loss(output, case.inputs["target"], lam=case.params["lam"], noise=case.inputs["noise"])
    return {"loss": loss, "grad_output": gradients(loss, output)[0]}


def draws(n: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    margins = 2 * torch.randn(n, generator=generator, dtype=torch.float64)
    return margins, torch.randn(n, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("lam", [-1.0, -0.3, 0.0, 0.5, 1.0])
def test_derivatives_are_those_of_a_convex_calibrated_loss(lam: float) -> None:
    margins, noise = draws()
    derivatives = calibrated_derivatives(margins, noise, lam=lam)
    assert (derivatives[margins.argsort()].diff() >= 0).all()
    assert (derivatives < 0).all()
    assert (derivatives >= -1 - 1e-6).all()
    assert derivatives.unique().numel() > 10, "they are not all clipped"


def test_each_derivative_by_the_algorithm() -> None:
    """Rank by rank: the j-th smallest margin gets the j-th largest magnitude, clipped, and its tail."""
    margins, noise = draws(n=12)
    magnitudes = sorted((min(math.exp(z), 1.0) for z in noise.tolist()), reverse=True)
    for rank, i in enumerate(margins.argsort().tolist()):
        s = margins[i].item()
        expected = -magnitudes[rank] / max(s, 1.0) - 1e-6
        assert calibrated_derivatives(margins, noise)[i].item() == pytest.approx(expected, rel=1e-14)


def test_only_the_values_of_the_noise_matter() -> None:
    margins, noise = draws()
    torch.testing.assert_close(
        calibrated_derivatives(margins, noise.flip(0)), calibrated_derivatives(margins, noise)
    )


def test_margins_carry_their_derivatives_along() -> None:
    margins, noise = draws()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        calibrated_derivatives(margins[order], noise), calibrated_derivatives(margins, noise)[order]
    )


@pytest.mark.parametrize("lam", [-0.7, 0.4, 1.0])
def test_inverse_box_cox(lam: float) -> None:
    """One sample at a time, so that nothing is matched: max(1 + lam z, 0)^(1 / lam)."""
    for z in (-4.0, -1.0, -0.2, 0.3, 4.0):
        base = 1 + lam * z
        power = base ** (1 / lam) if base > 0 else (math.inf if lam < 0 else 0.0)
        derivative = calibrated_derivatives(
            torch.zeros(1, dtype=torch.float64), torch.tensor([z], dtype=torch.float64), lam=lam, clip=3.0
        )
        assert derivative.item() == pytest.approx(-min(power, 3.0) - 1e-6, rel=1e-12)


def test_inverse_box_cox_tends_to_the_exponential() -> None:
    margins, noise = draws()
    limit = calibrated_derivatives(margins, noise, clip=100.0)
    for lam in (1e-9, -1e-9):
        torch.testing.assert_close(
            calibrated_derivatives(margins, noise, lam=lam, clip=100.0), limit, rtol=1e-7, atol=0
        )


def test_mean_derivative_of_a_single_sample() -> None:
    """E[-min(e^z, 1)] = -(1/2 + e^(1/2) Phi(-1)), by the normal law."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, generator=generator, dtype=torch.float64)
    one_by_one = torch.func.vmap(lambda z: calibrated_derivatives(torch.zeros(1, dtype=torch.float64), z))
    derivatives = one_by_one(noise[:, None])
    phi = 0.5 * (1 + math.erf(-1 / math.sqrt(2)))
    expected = -(0.5 + math.exp(0.5) * phi)
    error = derivatives.std().item() / math.sqrt(len(noise))
    assert derivatives.mean().item() == pytest.approx(expected - 1e-6, abs=4 * error)


def test_ties_keep_the_order_of_the_batch() -> None:
    noise = torch.tensor([-0.5, -2.0, -1.0])
    derivatives = calibrated_derivatives(torch.zeros(3), noise, shift=0.0)
    torch.testing.assert_close(derivatives, -torch.tensor([-0.5, -1.0, -2.0]).exp())


def test_a_nan_margin_is_not_sorted_silently() -> None:
    margins, noise = draws(n=6)
    margins[2] = torch.nan
    derivatives = calibrated_derivatives(margins, noise)
    assert derivatives.isnan().tolist() == [i == 2 for i in range(6)]


def test_tail_power_and_clip() -> None:
    derivatives = calibrated_derivatives(
        torch.tensor([4.0]), torch.tensor([5.0]), clip=2.0, shift=0.5, tail_power=0.5
    )
    torch.testing.assert_close(derivatives, torch.tensor([-2.0 / 2.0 - 0.5]))


# ---------------------------------------------------------------------------------------------- the loss


def test_gradient_is_the_sign_times_the_derivative() -> None:
    scores, noise = draws()
    target = torch.randint(2, (64,), generator=torch.Generator().manual_seed(2))
    leaf = scores.clone().requires_grad_()
    (slope,) = gradients(ens_loss(leaf, target, noise=noise, lam=0.3), leaf)
    sign = 2.0 * target - 1
    expected = sign * calibrated_derivatives(sign * scores, noise, lam=0.3) / 64
    assert torch.equal(slope, expected)


def test_positive_noise_gives_the_hinge_loss_below_margin_one() -> None:
    scores, noise = draws()
    target = torch.randint(2, (64,), generator=torch.Generator().manual_seed(2))
    scores = scores.clamp(-0.99, 0.99).requires_grad_()
    loss = ens_loss(scores, target, noise=noise.abs(), shift=0.0)
    hinge = (1 - (2 * target - 1) * scores).clamp_min(0).mean()
    torch.testing.assert_close(gradients(loss, scores)[0], gradients(hinge, scores)[0])


def test_two_scores_share_the_gradient_of_one() -> None:
    scores, noise = draws()
    target = torch.randint(2, (64,), generator=torch.Generator().manual_seed(2))
    one = scores.clone().requires_grad_()
    column = scores[:, None].clone().requires_grad_()
    two = torch.stack([-scores / 2, scores / 2], -1).requires_grad_()
    losses = [ens_loss(leaf, target, noise=noise) for leaf in (one, column, two)]
    (slope,) = gradients(losses[0], one)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
    torch.testing.assert_close(gradients(losses[1], column)[0], slope[:, None])
    torch.testing.assert_close(gradients(losses[2], two)[0], torch.stack([-slope, slope], -1))


def test_rows_that_do_not_count_take_no_part_in_the_sort() -> None:
    """Their margins would otherwise take the strongest derivatives: here they are the most wrong of all."""
    scores, noise = draws(n=8)
    target = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])
    kept = torch.tensor([True, False, True, True, False, True, True, True])
    scores = torch.where(kept, scores, -1000.0 * (2 * target - 1)).requires_grad_()
    for options in ({"sample_weight": kept.double()}, {"ignore_index": 7}):
        labels = target if "sample_weight" in options else torch.where(kept, target, 7)
        loss = ens_loss(scores, labels, noise=noise, **options)
        part = scores.detach()[kept].requires_grad_()
        expected = ens_loss(part, target[kept], noise=noise[kept])
        torch.testing.assert_close(loss, expected)
        (slope,) = gradients(loss, scores)
        torch.testing.assert_close(slope[kept], gradients(expected, part)[0])
        assert (slope[~kept] == 0).all()


def test_weights_scale_what_was_matched() -> None:
    scores, noise = draws(n=8)
    target = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])
    rows = ens_loss(scores, target, noise=noise, reduction="none")
    weight = torch.tensor([1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(
        ens_loss(scores, target, noise=noise, class_weight=weight),
        (weight[target] * rows).sum() / weight[target].sum(),
    )


def test_noise_comes_from_the_generator_or_from_torchs_own() -> None:
    scores, _ = draws()
    target = (scores > 0).long()

    def drawn(seed: int) -> Tensor:
        return ens_loss(scores, target, generator=torch.Generator().manual_seed(seed))

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert drawn(0) == ens_loss(scores, target, noise=noise)
    torch.manual_seed(5)
    first = ens_loss(scores, target)
    second = ens_loss(scores, target)
    torch.manual_seed(5)
    assert ens_loss(scores, target) == first != second


def test_sequences_are_one_batch() -> None:
    scores, noise = draws(n=6)
    target = torch.tensor([0, 1, 0, 1, 1, 0])
    flat = ens_loss(scores, target, noise=noise, reduction="none")
    grid = ens_loss(scores.reshape(2, 3), target.reshape(2, 3), noise=noise.reshape(2, 3), reduction="none")
    torch.testing.assert_close(grid, flat.reshape(2, 3))


# ---------------------------------------------------------------------------------------------- the module


def test_evaluation_is_binary_cross_entropy() -> None:
    scores, _ = draws()
    target = torch.randint(2, (64,), generator=torch.Generator().manual_seed(2))
    loss = EnsLoss().eval()
    expected = F.binary_cross_entropy_with_logits(scores, target.double())
    torch.testing.assert_close(loss(scores, target), expected)
    two = torch.stack([torch.zeros_like(scores), scores], -1)
    torch.testing.assert_close(loss(two, target), F.cross_entropy(two, target))


def test_resample_draws_from_the_range_and_is_saved() -> None:
    loss = EnsLoss(lam_range=(-1.0, 1.0))
    generator = torch.Generator().manual_seed(0)
    drawn = [loss.resample(generator) for _ in range(200)]
    assert loss.lam == drawn[-1]
    assert -1 <= min(drawn) < -0.9
    assert 0.9 < max(drawn) <= 1
    fresh = EnsLoss()
    fresh.load_state_dict(loss.state_dict())
    assert fresh.lam == loss.lam == copy.deepcopy(loss).lam
    assert loss.resample(torch.Generator().manual_seed(3)) == loss.resample(torch.Generator().manual_seed(3))


def test_lam_of_the_module_is_used() -> None:
    scores, noise = draws()
    target = (scores > 0).long()
    loss = EnsLoss(lam=0.0)
    loss.lam = 0.8
    assert loss(scores, target, noise=noise) == ens_loss(scores, target, noise=noise, lam=0.8)
    assert loss(scores, target, noise=noise) != ens_loss(scores, target, noise=noise, lam=0.0)


def test_fits_two_classes_only() -> None:
    assert misfit(EnsLoss, TaskInfo("classification", num_classes=2)) is None
    assert misfit(EnsLoss, TaskInfo("classification", num_classes=3)) is not None


# ---------------------------------------------------------------------------------------------- doors


@pytest.mark.bare
def test_doors() -> None:
    scores, noise = draws(n=4)
    target = torch.tensor([0, 1, 1, 0])
    with pytest.raises(ValueError, match=r"logits must have shape \(4, 2\), \(4, 1\) or \(4,\)"):
        ens_loss(torch.zeros(4, 3), target)
    with pytest.raises(ValueError, match="target must lie in"):
        ens_loss(scores, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(TypeError, match="target must have an integer dtype"):
        ens_loss(torch.zeros(4, 2), torch.full((4, 2), 0.5))
    with pytest.raises(ValueError, match="noise must have shape"):
        ens_loss(scores, target, noise=noise[:2])
    with pytest.raises(TypeError, match="noise"):
        ens_loss(scores, target, noise=target)
    for bad in ({"lam": math.nan}, {"clip": 0.0}, {"shift": -1e-6}, {"tail_power": -1.0}):
        name = next(iter(bad))
        with pytest.raises(ValueError, match=name):
            ens_loss(scores, target, **bad)
        with pytest.raises(ValueError, match=name):
            EnsLoss(**bad)
        with pytest.raises(ValueError, match=name):
            calibrated_derivatives(scores, noise, **bad)
    with pytest.raises(ValueError, match="lam_range"):
        EnsLoss().resample()
    with pytest.raises(ValueError, match="lam_range"):
        EnsLoss(lam_range=(1.0, -1.0))
