"""DPO and IPO against their formulas written out with the standard library."""

import math

import pytest
import torch
from torch import Tensor

from telos.losses.preference.dpo import DPOLoss, IPOLoss, dpo_loss, ipo_loss
from tests.declaration import Declaration, Inputs, shifted

LOGPS = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


def pairs(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    """Log-probabilities of n pairs of answers under a policy and a reference."""
    draws = -3 * torch.rand(4, n, generator=generator, dtype=torch.float64)
    return {name: row.to(dtype) for name, row in zip(LOGPS, draws, strict=True)}


def pairs_with_lengths(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    lengths = torch.randint(1, 9, (2, n), generator=generator)
    return {**pairs(n, generator, dtype), "chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}


def both_moved(inputs: Inputs) -> Inputs:
    """A constant of the prompt, in both answers of the policy."""
    return shifted(0.7, LOGPS[0])(shifted(0.7, LOGPS[1])(inputs))


POLICY = LOGPS[:2]
declarations = [
    Declaration(
        function=dpo_loss,
        module=DPOLoss,
        sample=pairs,
        differentiable=POLICY,
        extreme=POLICY[0],
        invariances={"prompt": both_moved},
    ),
    Declaration(
        function=ipo_loss,
        module=IPOLoss,
        sample=pairs_with_lengths,
        differentiable=POLICY,
        extreme=POLICY[0],
    ),
]


def drawn(n: int = 6) -> list[Tensor]:
    return list(pairs(n, torch.Generator().manual_seed(2), torch.float64).values())


def log_ratios(logps: list[Tensor]) -> list[tuple[float, float]]:
    chosen, rejected, ref_chosen, ref_rejected = (row.tolist() for row in logps)
    return [
        (w - rw, l_ - rl) for w, l_, rw, rl in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True)
    ]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_by_hand(label_smoothing: float) -> None:
    logps = drawn()
    want = [
        -(1 - label_smoothing) * math.log(1 / (1 + math.exp(-0.3 * (w - r))))
        - label_smoothing * math.log(1 / (1 + math.exp(0.3 * (w - r))))
        for w, r in log_ratios(logps)
    ]
    got = dpo_loss(*logps, beta=0.3, label_smoothing=label_smoothing, reduction="none")
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_ipo_by_hand() -> None:
    logps, lengths = drawn(), [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]]
    plain = [(w - r - 1 / (2 * 0.2)) ** 2 for w, r in log_ratios(logps)]
    torch.testing.assert_close(
        ipo_loss(*logps, beta=0.2, reduction="none"), torch.tensor(plain, dtype=torch.float64)
    )
    per_token = [
        (w / n_w - r / n_r - 1 / (2 * 0.2)) ** 2
        for (w, r), n_w, n_r in zip(log_ratios(logps), *lengths, strict=True)
    ]
    got = ipo_loss(
        *logps,
        beta=0.2,
        chosen_lengths=torch.tensor(lengths[0]),
        rejected_lengths=torch.tensor(lengths[1]),
        reduction="none",
    )
    torch.testing.assert_close(got, torch.tensor(per_token, dtype=torch.float64))


def test_no_preference_yet() -> None:
    same = torch.tensor([-2.0, -5.0], dtype=torch.float64)
    assert dpo_loss(same, same, same, same).item() == pytest.approx(math.log(2), rel=1e-12)
    assert ipo_loss(same, same, same, same, beta=0.25).item() == 4.0


def test_the_minimum_of_ipo_is_its_margin() -> None:
    logps = drawn()
    moved = logps[1] + (logps[2] - logps[3]) + 1 / (2 * 0.25)
    torch.testing.assert_close(ipo_loss(moved, *logps[1:], beta=0.25), torch.zeros((), dtype=torch.float64))


def test_exchanging_the_answers_flips_the_margin() -> None:
    chosen, rejected, ref_chosen, ref_rejected = drawn()
    swapped = (rejected, chosen, ref_rejected, ref_chosen)
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    one = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.25, reduction="none")
    two = ipo_loss(*swapped, beta=0.25, reduction="none")
    torch.testing.assert_close(two - one, 8 * margin)  # (-m - 2)^2 - (m - 2)^2
    # a wrong label half the time is no label: the smoothed loss of DPO is an average of both orders
    mixed = 0.7 * dpo_loss(chosen, rejected, ref_chosen, ref_rejected) + 0.3 * dpo_loss(*swapped)
    torch.testing.assert_close(
        dpo_loss(chosen, rejected, ref_chosen, ref_rejected, label_smoothing=0.3), mixed
    )


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_without_a_reference(loss) -> None:
    chosen, rejected, *_ = drawn()
    zeros = torch.zeros_like(chosen)
    torch.testing.assert_close(loss(chosen, rejected), loss(chosen, rejected, zeros, zeros))


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_the_reference_has_no_gradient_and_weight_zero_hides_nan(loss) -> None:
    logps = [row.clone().requires_grad_() for row in drawn()]
    weight = torch.tensor([1.0, 0.0, 1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    poisoned = [torch.where(weight == 0, torch.nan, row) for row in logps]
    value = loss(*poisoned, sample_weight=weight)
    value.backward()
    kept = weight != 0
    torch.testing.assert_close(value, loss(*(row[kept] for row in logps), sample_weight=weight[kept]))
    assert logps[2].grad is None
    assert logps[3].grad is None
    for row in logps[:2]:
        assert row.grad is not None
        assert row.grad[1] == 0
        assert (row.grad[kept] != 0).all()


def test_an_empty_answer_has_a_log_ratio_of_zero() -> None:
    zero = torch.zeros(1)
    lengths = torch.tensor([0])
    value = ipo_loss(zero, zero, zero, zero, beta=0.5, chosen_lengths=lengths, rejected_lengths=lengths)
    assert value == 1.0


@pytest.mark.bare
def test_doors() -> None:
    chosen, rejected, ref_chosen, ref_rejected = drawn()
    with pytest.raises(ValueError, match="ref_rejected_logps must be given with the other reference"):
        dpo_loss(chosen, rejected, ref_chosen)
    with pytest.raises(ValueError, match="rejected_lengths must be given with the other lengths"):
        ipo_loss(chosen, rejected, chosen_lengths=torch.ones(6))
    with pytest.raises(ValueError, match=r"chosen_lengths must have shape \(6,\), got \(5,\)"):
        ipo_loss(chosen, rejected, chosen_lengths=torch.ones(5), rejected_lengths=torch.ones(6))
    with pytest.raises(ValueError, match=r"policy_chosen_logps must have shape \(N,\), got \(6, 1\)"):
        dpo_loss(chosen[:, None], rejected, ref_chosen, ref_rejected)
    with pytest.raises(TypeError, match="ref_rejected_logps"):
        dpo_loss(chosen, rejected, ref_chosen, ref_rejected.long())
    for build in (lambda beta: DPOLoss(beta), lambda beta: IPOLoss(beta)):
        with pytest.raises(ValueError, match="beta must lie in"):
            build(0.0)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.5\), got 0.5"):
        DPOLoss(label_smoothing=0.5)
