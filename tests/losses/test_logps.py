import pytest
import torch
from torch import Tensor

from telos.losses._logps import sequence_logps, token_logps


def problem() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    lm_head = torch.randn(7, 4, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(7, (3, 5), generator=generator)
    labels[0, 0] = -100
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2] = False
    return hidden, lm_head, labels, mask


def same_gradients(one: Tensor, two: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(one)
    want = torch.autograd.grad(two, inputs, cotangent)
    for got, expected in zip(torch.autograd.grad(one, inputs, cotangent), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy", [False, True])
def test_equals_sequence_logps_on_the_logits(reduction, temperature, entropy) -> None:
    hidden, lm_head, labels, mask = problem()
    keywords = {"temperature": temperature, "reduction": reduction}
    result = token_logps(hidden, lm_head, labels, mask, entropy=entropy, chunk_size=4, **keywords)
    logps = result[0] if entropy else result
    want = sequence_logps(hidden @ lm_head.T, labels, mask, **keywords)
    same_gradients(logps, want, (hidden, lm_head))


def test_sequence_logps_sums_the_log_softmax() -> None:
    hidden, lm_head, labels, _ = problem()
    logits = hidden @ lm_head.T
    want = [
        sum(torch.log_softmax(logits[n, t], -1)[labels[n, t]] for t in range(5) if labels[n, t] >= 0)
        for n in range(3)
    ]
    torch.testing.assert_close(sequence_logps(logits, labels), torch.stack(want))
    mean = sequence_logps(logits, labels, reduction="mean")
    torch.testing.assert_close(mean, torch.stack(want) / torch.tensor([4, 5, 5]))


def test_entropy_is_that_of_the_softmax() -> None:
    hidden, lm_head, labels, mask = problem()
    _, entropy = token_logps(hidden, lm_head, labels, mask, temperature=0.5, entropy=True, chunk_size=4)
    want = torch.distributions.Categorical(logits=hidden @ lm_head.T / 0.5).entropy()
    same_gradients(entropy, want * mask * (labels >= 0), (hidden, lm_head))


def test_entropy_at_extreme_logits() -> None:
    hidden = torch.tensor([[[3e4, 0.0], [0.0, 0.0]]], requires_grad=True)
    _, entropy = token_logps(hidden, torch.eye(2), torch.zeros(1, 2, dtype=torch.long), entropy=True)
    torch.testing.assert_close(entropy, torch.tensor([[0.0, 2.0]]).log1p() * torch.tensor([0.0, 0.6309297]))
    (gradient,) = torch.autograd.grad(entropy.sum(), hidden)
    assert gradient.isfinite().all()


def test_tokens_that_do_not_count_reach_nothing() -> None:
    hidden, lm_head, labels, mask = problem()
    poisoned = hidden.detach().clone()
    poisoned[2] = torch.nan
    poisoned.requires_grad_()
    total = token_logps(poisoned, lm_head, labels, mask, reduction="mean").sum()
    got = torch.autograd.grad(total, (poisoned, lm_head))
    want = torch.autograd.grad(
        sequence_logps(hidden @ lm_head.T, labels, mask, reduction="mean").sum(), (hidden, lm_head)
    )
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_nan_logits_of_a_masked_token() -> None:
    logits = torch.zeros(1, 2, 3)
    logits[0, 1] = torch.nan
    logits.requires_grad_()
    total = sequence_logps(logits, torch.tensor([[0, -100]]))
    total.sum().backward()
    torch.testing.assert_close(total, -torch.tensor([3.0]).log())
    assert logits.grad is not None
    assert (logits.grad[0, 1] == 0).all()


def test_bias_and_bfloat16() -> None:
    hidden, lm_head, labels, mask = (t.detach() for t in problem())
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64)
    want = sequence_logps(hidden @ lm_head.T + bias, labels, mask, reduction="none")
    torch.testing.assert_close(token_logps(hidden, lm_head, labels, mask, bias=bias), want)
    low = token_logps(hidden.bfloat16(), lm_head.bfloat16(), labels, mask)
    exact = sequence_logps(
        hidden.bfloat16().double() @ lm_head.bfloat16().double().T, labels, mask, reduction="none"
    )
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-5)


def test_without_gradients() -> None:
    hidden, lm_head, labels, mask = problem()
    with torch.no_grad():
        assert not token_logps(hidden, lm_head, labels, mask).requires_grad


def test_empty_batch() -> None:
    for entropy in (False, True):
        result = token_logps(
            torch.zeros(0, 4, 3),
            torch.zeros(5, 3),
            torch.zeros(0, 4, dtype=torch.long),
            reduction="sum",
            entropy=entropy,
        )
        assert (result[0] if entropy else result).shape == (0,)


@pytest.mark.bare
def test_doors() -> None:
    hidden, lm_head, labels, mask = problem()
    with pytest.raises(ValueError, match="lm_head must have shape"):
        token_logps(hidden, lm_head[:, :2], labels)
    with pytest.raises(ValueError, match="labels must have shape"):
        token_logps(hidden, lm_head, labels[:, :2])
    with pytest.raises(ValueError, match="labels must lie in"):
        token_logps(hidden, lm_head, labels + 50 * (labels >= 0))
    with pytest.raises(TypeError, match="mask must be boolean or integer"):
        token_logps(hidden, lm_head, labels, mask.double())
    with pytest.raises(ValueError, match="mask must have shape"):
        sequence_logps(hidden @ lm_head.T, labels, mask[:2])
    with pytest.raises(ValueError, match="temperature"):
        sequence_logps(hidden @ lm_head.T, labels, temperature=0.0)
    with pytest.raises(ValueError, match="reduction"):
        token_logps(hidden, lm_head, labels, reduction="average")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(token_logps(hidden, lm_head, labels).sum(), hidden, create_graph=True)


def logits_of(*probabilities: float) -> Tensor:
    """(1, T, 2) logits under which token 0 has these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p, 1 - p], -1).log().unsqueeze(0).requires_grad_()


@pytest.mark.parametrize(("cutoff", "low", "high"), [("clamp", -2.0, -0.5), ("zero", 0.0, 0.0)])
def test_cutoffs_by_hand(cutoff, low, high) -> None:
    logits = logits_of(0.01, 0.3, 0.9, 0.5)  # log-probabilities -4.6, -1.2, -0.1, -0.7
    labels = torch.tensor([[0, 0, 0, -100]])
    bounds = {"lower_cutoff": -2.0, "upper_cutoff": -0.5, "cutoff": cutoff}
    tokens = sequence_logps(logits, labels, reduction="none", **bounds)
    inside = torch.tensor(0.3).double().log().item()
    torch.testing.assert_close(tokens, torch.tensor([[low, inside, high, 0.0]], dtype=torch.float64))
    # what is cut stays in the divisor, and has no gradient
    mean = sequence_logps(logits, labels, reduction="mean", **bounds)
    assert mean.item() == pytest.approx((low + inside + high) / 3)
    (gradient,) = torch.autograd.grad(mean.sum(), logits)
    assert (gradient[0, [0, 2, 3]] == 0).all()
    torch.testing.assert_close(gradient[0, 1], torch.tensor([0.7, -0.7], dtype=torch.float64) / 3)


def test_one_cutoff_alone_and_a_nan_that_stays() -> None:
    logits, labels = logits_of(0.01, 0.9), torch.tensor([[0, 0]])
    plain = sequence_logps(logits, labels, reduction="none")
    low = sequence_logps(logits, labels, reduction="none", lower_cutoff=-2.0)
    high = sequence_logps(logits, labels, reduction="none", upper_cutoff=-2.0)
    torch.testing.assert_close(low, torch.tensor([[-2.0, 0.0]]) + plain * torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(high, torch.tensor([[0.0, -2.0]]) + plain * torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(sequence_logps(logits, labels, reduction="none", lower_cutoff=-5.0), plain)
    assert sequence_logps(torch.full((1, 1, 2), torch.nan), labels[:, :1], lower_cutoff=-1.0).isnan()


@pytest.mark.bare
def test_doors_of_the_cutoffs() -> None:
    logits, labels = logits_of(0.5), torch.tensor([[0]])
    with pytest.raises(ValueError, match="cutoff must be 'clamp' or 'zero', got 'drop'"):
        sequence_logps(logits, labels, cutoff="drop")
    with pytest.raises(ValueError, match="lower_cutoff must not exceed upper_cutoff, got -1.0 and -2.0"):
        sequence_logps(logits, labels, lower_cutoff=-1.0, upper_cutoff=-2.0)
