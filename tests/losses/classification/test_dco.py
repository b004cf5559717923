import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from telos.losses import TaskInfo, misfit, token_logps
from telos.losses.classification.dco import (
    DCOLoss,
    SequenceDCOLoss,
    coverage_from_logps,
    dco_factor,
    dco_loss,
    dco_weighted_nll_loss,
    group_dco_loss,
    sequence_dco_loss,
)
from tests.declaration import Declaration, Inputs, classification_sample, shifted
from tests.golden.adapters import Case, gradients


def sequences(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    """Four tokens of five classes, the first two of them a prompt."""
    labels = torch.randint(5, (n, 4), generator=generator)
    labels[:, :2] = -100
    logits = torch.randn(n, 4, 5, generator=generator, dtype=torch.float64)
    return {"logits": logits.to(dtype), "labels": labels}


def estimates(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    nll, p_hat = torch.rand(2, n, generator=generator, dtype=torch.float64)
    return {"nll": 5 * nll.to(dtype), "p_hat": p_hat.to(dtype)}


def steps(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    logps = torch.rand(n, generator=generator, dtype=torch.float64).log()
    return {"step_logps": logps.to(dtype), "proof_index": torch.arange(n) // 3}


declarations = [
    Declaration(
        function=dco_loss,
        module=DCOLoss,
        sample=classification_sample(),
        invariances={"shift of the logits": shifted(3.7)},
    ),
    Declaration(
        function=sequence_dco_loss,
        module=SequenceDCOLoss,
        sample=sequences,
        invariances={"shift of the logits": shifted(3.7)},
    ),
    Declaration(
        function=dco_weighted_nll_loss,
        module=None,
        sample=estimates,
        differentiable=("nll",),
        extreme="nll",
    ),
    Declaration(
        function=group_dco_loss,
        module=None,
        sample=steps,
        differentiable=("step_logps",),
        extreme="step_logps",
    ),
]

DOUBLE = torch.float64
CLOSE = {"rtol": 1e-10, "atol": 1e-13}


def authors_factor(p: Tensor, n: int) -> Tensor:
    """The factor with the rational approximation of the authors' code where N p < 0.1, and otherwise the library's.

    Both truncated series of (1 - p)^(N - 1) and (1 - (1 - p)^N) / (N p) end after the second power of p.
    """
    exact = dco_factor(p.log(), n_samples=n)
    if n == 1:
        return exact
    first, second = (n - 1) * p, (n - 1) * (n - 2) * p**2
    approximate = (1 - first + second / 2) / (1 - first / 2 + second / 6)
    small = n * p < 0.1
    torch.testing.assert_close(exact[small], approximate[small], rtol=2e-4, atol=0)
    return torch.where(small, approximate, exact)


def golden_dco_loss(case: Case) -> dict[str, object]:
    n = case.params["N"]
    if "p" in case.inputs:
        return {"factor": authors_factor(case.inputs["p"].to(DOUBLE), n)}
    logits, labels = case.leaf("logits"), case.inputs["labels"]
    # at N = 1 the loss is the negative log-probability
    nll = sequence_dco_loss(logits, labels, n_samples=1, reduction="none").detach()
    mean_nll = sequence_dco_loss(
        logits, labels, n_samples=1, length_normalize=True, reduction="none"
    ).detach()
    factor, exact = authors_factor((-nll).exp(), n), dco_factor(-nll, n_samples=n)
    correction = torch.where(exact == 0, 1.0, factor / exact)

    def gradient(length_normalize: bool) -> Tensor:
        loss = sequence_dco_loss(
            logits, labels, n_samples=n, length_normalize=length_normalize, reduction="none"
        )
        return gradients((correction * loss).mean(), logits)[0]

    def reported(values: Tensor) -> Tensor:
        return correction * dco_weighted_nll_loss(values, (-nll).exp(), n_samples=n, reduction="none")

    return {
        "log_prob": -nll,
        "factor": factor,
        "loss_token_mean": reported(mean_nll).mean(),
        "loss_token_mean_per_sequence": reported(mean_nll),
        "grad_logits_token_mean": gradient(True),
        "loss_token_sum": reported(nll).mean(),
        "grad_logits_token_sum": gradient(False),
    }


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.randn(n, 5, generator=generator, dtype=DOUBLE), torch.randint(
        5, (n,), generator=generator
    )


def tensor(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=DOUBLE)


# ---------------------------------------------------------------------------------------------- factor and coverage


@pytest.mark.parametrize("n", [1.0, 1.5, 2.0, 7.0, 64.0])
def test_factor_and_coverage_by_definition(n: float) -> None:
    p = torch.linspace(0.02, 0.98, 25, dtype=DOUBLE)
    torch.testing.assert_close(coverage_from_logps(p.log(), n_samples=n), (1 - (1 - p) ** n).log(), **CLOSE)
    torch.testing.assert_close(
        dco_factor(p.log(), n_samples=n), n * p * (1 - p) ** (n - 1) / (1 - (1 - p) ** n), **CLOSE
    )


def test_two_samples_in_closed_form() -> None:
    p = torch.linspace(0, 1, 21, dtype=DOUBLE)
    torch.testing.assert_close(dco_factor(p.log(), n_samples=2), 2 * (1 - p) / (2 - p), **CLOSE)


@pytest.mark.parametrize("n", [2.0, 16.0, 1e6])
def test_limits_of_the_factor(n: float) -> None:
    assert dco_factor(tensor(-math.inf, -1e5, 0.0), n_samples=n).tolist() == [1.0, 1.0, 0.0]
    assert dco_factor(tensor(-math.inf, -1e5, 0.0), n_samples=1).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("x", [0.1, 1.0, 5.0])
def test_many_samples_of_a_rare_answer(x: float) -> None:
    """With p = x / N, (1 - p)^N tends to exp(-x)."""
    n = 1e9
    logp = tensor(x / n).log()
    torch.testing.assert_close(
        coverage_from_logps(logp, n_samples=n), tensor(1 - math.exp(-x)).log(), rtol=1e-7, atol=1e-8
    )
    torch.testing.assert_close(dco_factor(logp, n_samples=n), tensor(x / math.expm1(x)), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1.5, 16.0, 4096.0])
def test_no_seam_where_the_series_takes_over(dtype: torch.dtype, n: float) -> None:
    """Against 60 digits, on both sides of the switch and at both ends."""
    from decimal import Decimal, localcontext

    seam = (-16.0 if dtype == torch.float64 else -8.0) - math.log(n)
    at = torch.tensor([-200.0, seam - 1e-3, seam + 1e-3, -3.0, -0.7, -0.69, -1e-3, -1e-6], dtype=dtype)
    coverage, factor = [], []
    with localcontext() as context:
        context.prec = 200  # at log p = -200, 1 - p is 1 in any fewer than 87 digits
        for logp in at.tolist():
            p, power = Decimal(logp).exp(), Decimal(n)
            miss = power * (1 - p).ln()
            coverage.append(float((1 - miss.exp()).ln()))
            factor.append(float(power * p * (miss - (1 - p).ln()).exp() / (1 - miss.exp())))
    eps = torch.finfo(dtype).eps
    found = coverage_from_logps(at, n_samples=n)
    torch.testing.assert_close(found.double(), tensor(*coverage), rtol=16 * eps, atol=1e-30)
    found = dco_factor(at, n_samples=n)
    # the factor of a confident answer is a large power of 1 - p
    torch.testing.assert_close(found.double(), tensor(*factor), rtol=16 * eps * n, atol=1e-30)


@pytest.mark.parametrize("n", [1.0, 1.1, 2.0, 64.0])
@pytest.mark.parametrize("logp", [-1e-100, -1e-9, -1e-3, -1.0, -20.0, -200.0])
def test_slope_of_the_coverage_is_the_factor(n: float, logp: float) -> None:
    logps = tensor(logp).requires_grad_()
    slope = gradients(coverage_from_logps(logps, n_samples=n), logps)[0]
    torch.testing.assert_close(slope, dco_factor(logps, n_samples=n), rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("n", [1.1, 2.0, 64.0])
def test_slope_next_to_certainty_is_nothing(n: float) -> None:
    logps = tensor(-5e-324, -1e-300, 0.0, 1e-9).requires_grad_()
    assert (gradients(coverage_from_logps(logps, n_samples=n), logps)[0].abs() < 1e-29).all()


@pytest.mark.parametrize("logp", [-1e-3, -1.0, -20.0])
def test_slope_by_finite_differences(logp: float) -> None:
    step = 1e-5 * abs(logp)
    high, low = coverage_from_logps(tensor(logp + step, logp - step), n_samples=16.0)
    torch.testing.assert_close(
        ((high - low) / (2 * step)).unsqueeze(0),
        dco_factor(tensor(logp), n_samples=16.0),
        rtol=1e-6,
        atol=1e-9,
    )


def test_second_derivatives_are_finite() -> None:
    """Meta-learned weights and Hessian-vector products differentiate twice."""
    logps = tensor(-math.inf, -200.0, -3.0, -1e-6, 0.0).requires_grad_()
    (slope,) = torch.autograd.grad(coverage_from_logps(logps, n_samples=4.0).sum(), logps, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), logps)
    assert torch.isfinite(curvature).all()


# ---------------------------------------------------------------------------------------------- classes


def test_one_sample_is_cross_entropy() -> None:
    logits, target = batch()
    weight = torch.linspace(0.5, 2.0, 5, dtype=DOUBLE)
    leaf = logits.clone().requires_grad_()
    loss, plain = (
        dco_loss(leaf, target, n_samples=1, class_weight=weight),
        F.cross_entropy(leaf, target, weight),
    )
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients(loss, leaf)[0], gradients(plain, leaf)[0])


def test_gradient_is_the_factor_times_that_of_cross_entropy() -> None:
    logits, target = batch()
    logits.requires_grad_()
    nll = F.cross_entropy(logits, target, reduction="none")
    expected = gradients((dco_factor(-nll, n_samples=5.0) * nll).mean(), logits)[0]
    torch.testing.assert_close(gradients(dco_loss(logits, target, n_samples=5.0), logits)[0], expected)


def test_falls_with_the_number_of_samples_and_with_confidence() -> None:
    logits, target = batch()
    by_samples = torch.stack(
        [dco_loss(logits, target, n_samples=n, reduction="none") for n in (1, 1.5, 4, 64)]
    )
    assert (by_samples.diff(dim=0) < 0).all()
    scores = torch.stack([torch.linspace(-40, 5, 50, dtype=DOUBLE), torch.zeros(50, dtype=DOUBLE)], 1)
    by_confidence = dco_loss(scores, torch.zeros(50, dtype=torch.long), n_samples=4, reduction="none")
    assert (by_confidence.diff() < 0).all()


def test_probabilities_average_the_labels() -> None:
    logits, _ = batch()
    probabilities = torch.softmax(-logits, -1)
    expected = sum(
        probabilities[:, y] * dco_loss(logits, torch.full((6,), y), reduction="none") for y in range(5)
    )
    torch.testing.assert_close(dco_loss(logits, probabilities, reduction="none"), expected)


def test_it_fits_a_classification_task() -> None:
    info = TaskInfo(family="classification", num_classes=10)
    assert misfit(DCOLoss, info) is None
    assert "sequence loss" in (misfit(SequenceDCOLoss, info) or "")


@pytest.mark.bare
@pytest.mark.parametrize("n", [0.5, math.inf, math.nan])
def test_number_of_samples_is_checked(n: float) -> None:
    logits, target = batch()
    logps = logits[:, 0]
    for refused in (
        lambda: dco_loss(logits, target, n_samples=n),
        lambda: DCOLoss(n),
        lambda: SequenceDCOLoss(n),
        lambda: coverage_from_logps(logps, n_samples=n),
        lambda: dco_factor(logps, n_samples=n),
        lambda: dco_weighted_nll_loss(logps, logps.sigmoid(), n_samples=n),
        lambda: group_dco_loss(logps, target, n_samples=n),
    ):
        with pytest.raises(ValueError, match="n_samples must be finite and at least 1"):
            refused()


# ---------------------------------------------------------------------------------------------- sequences


def text(n: int = 4, length: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(n, length, 5, generator=generator, dtype=DOUBLE)
    labels = torch.randint(5, (n, length), generator=generator)
    labels[:, :2] = -100
    return logits, labels


def test_sequence_of_one_token_is_a_class() -> None:
    logits, target = batch()
    loss = sequence_dco_loss(logits.unsqueeze(1), target.unsqueeze(1), n_samples=3, shift=False)
    torch.testing.assert_close(loss, dco_loss(logits, target, n_samples=3))


def test_sequences_by_definition() -> None:
    logits, labels = text()
    logp = sum(
        logits[:, t].log_softmax(-1).gather(1, labels[:, t + 1].unsqueeze(1)).squeeze(1) for t in range(1, 5)
    )
    expected = -(1 - (1 - logp.exp()) ** 9).log()
    torch.testing.assert_close(sequence_dco_loss(logits, labels, n_samples=9, reduction="none"), expected)
    torch.testing.assert_close(
        sequence_dco_loss(logits, labels, n_samples=9, length_normalize=True), (expected / 4).mean()
    )


def test_another_ignored_label() -> None:
    logits, labels = text()
    other = torch.where(labels == -100, -1, labels)
    torch.testing.assert_close(
        sequence_dco_loss(logits, other, ignore_index=-1), sequence_dco_loss(logits, labels)
    )


def test_sequence_without_a_token_does_not_count() -> None:
    logits, labels = text()
    labels[1] = -100
    logits[1] = torch.nan
    kept = [0, 2, 3]
    logits.requires_grad_()
    loss = sequence_dco_loss(logits, labels)
    torch.testing.assert_close(loss, sequence_dco_loss(logits[kept], labels[kept]))
    assert (gradients(loss, logits)[0][1] == 0).all()


def test_weight_of_a_sequence() -> None:
    logits, labels = text()
    poisoned = logits.clone()
    poisoned[0] = torch.nan
    loss = sequence_dco_loss(poisoned, labels, sample_weight=tensor(0, 2, 1, 1))
    torch.testing.assert_close(loss, sequence_dco_loss(logits[[1, 1, 2, 3]], labels[[1, 1, 2, 3]]))


def test_without_building_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(4, 6, 3, generator=generator, dtype=DOUBLE),
        torch.randn(5, 3, generator=generator, dtype=DOUBLE),
    )
    _, labels = text()
    logps = token_logps(hidden, head, labels, reduction="sum")
    torch.testing.assert_close(
        -coverage_from_logps(logps).mean(), sequence_dco_loss(hidden @ head.T, labels, shift=False)
    )


def test_long_sequences_in_float32() -> None:
    """At log p of about -3000 the loss is cross-entropy minus log N, and the factor 1."""
    logits = torch.zeros(1, 2001, 5).requires_grad_()
    loss = sequence_dco_loss(logits, torch.zeros(1, 2001, dtype=torch.long), n_samples=64)
    torch.testing.assert_close(loss.item(), 2000 * math.log(5) - math.log(64), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(loss, logits)[0][0, 0, 0].item(), -0.8, rtol=1e-6, atol=0)


@pytest.mark.bare
def test_sequence_doors() -> None:
    logits, labels = text()
    with pytest.raises(ValueError, match="labels must lie in"):
        sequence_dco_loss(logits, labels + 5 * (labels >= 0))
    with pytest.raises(ValueError, match="sample_weight must have shape"):
        sequence_dco_loss(logits, labels, sample_weight=torch.ones(4, 6, dtype=DOUBLE))
    with pytest.raises(ValueError, match="logits must have shape"):
        sequence_dco_loss(logits[0], labels)


# ---------------------------------------------------------------------------------------------- estimates and proofs


def test_estimated_probability_of_the_answer_itself_is_the_same_gradient() -> None:
    logits, labels = text()
    logits.requires_grad_()
    nll = sequence_dco_loss(logits, labels, n_samples=1, reduction="none")
    estimated = dco_weighted_nll_loss(nll, (-nll).exp(), n_samples=100)
    exact = sequence_dco_loss(logits, labels, n_samples=100)
    torch.testing.assert_close(gradients(estimated, logits)[0], gradients(exact, logits)[0])


def test_no_estimate_is_cross_entropy_and_certainty_nothing() -> None:
    nll = tensor(4.0, 2.0)
    assert dco_weighted_nll_loss(nll, torch.zeros_like(nll), n_samples=64).item() == 3.0
    assert dco_weighted_nll_loss(nll, torch.ones_like(nll), n_samples=64).item() == 0.0


def test_weight_zero_hides_a_nan_estimate() -> None:
    nll, p_hat = tensor(math.nan, 2.0), tensor(math.nan, 0.0)
    assert dco_weighted_nll_loss(nll, p_hat, sample_weight=tensor(0.0, 3.0)).item() == 2.0


@pytest.mark.bare
def test_estimate_out_of_range() -> None:
    with pytest.raises(ValueError, match="p_hat must lie in"):
        dco_weighted_nll_loss(tensor(1.0), tensor(1.5))


def test_proofs_sum_their_steps() -> None:
    logps, proof = tensor(-1.0, -2.0, -0.5, -0.1), torch.tensor([2, 0, 2, 2])
    found = group_dco_loss(logps, proof, n_samples=8, reduction="none")
    wholes = -coverage_from_logps(tensor(-2.0, -1.6), n_samples=8)
    torch.testing.assert_close(found, torch.stack([wholes[0], tensor(0.0)[0], wholes[1], tensor(0.0)[0]]))
    torch.testing.assert_close(group_dco_loss(logps, proof, n_samples=8), wholes.mean())


def test_steps_stand_alone() -> None:
    logps, proof = tensor(-1.0, -2.0, -0.5), torch.tensor([0, 0, 1])
    torch.testing.assert_close(group_dco_loss(logps, proof, mode="step"), -coverage_from_logps(logps).mean())


def test_one_factor_for_all_steps_of_a_proof() -> None:
    logps = tensor(-1.0, -2.0, -0.5).requires_grad_()
    loss = group_dco_loss(logps, torch.tensor([0, 0, 0]), n_samples=8)
    expected = -dco_factor(tensor(-3.5), n_samples=8).expand(3)
    torch.testing.assert_close(gradients(loss, logps)[0], expected)


@pytest.mark.bare
def test_proof_doors() -> None:
    with pytest.raises(ValueError, match="proof_index must lie in"):
        group_dco_loss(tensor(-1.0, -1.0), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="mode must be"):
        group_dco_loss(tensor(-1.0), torch.tensor([0]), mode="tree")  # type: ignore[arg-type]
