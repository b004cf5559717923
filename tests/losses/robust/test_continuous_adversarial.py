"""CAT and CAPO: the attack against closed forms, the losses against their parts written out.

``CAdvULLoss`` and ``CAdvIPOLoss`` take a model where other losses take tensors, so that the generic conformance
leaves them out: their contracts are tested here.
"""

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from telos.losses import Mixture, sequence_logps
from telos.losses.preference.dpo import dpo_loss, ipo_loss
from telos.losses.robust.continuous_adversarial import (
    CAdvIPOLoss,
    CAdvULLoss,
    embedding_attack,
    log_one_minus_p_loss,
    relative_eps,
    toward_away_loss,
)
from telos.nn.models.tiny_lm import TinyLM
from tests.declaration import Declaration, Inputs
from tests.golden.adapters import Case, gradients

Batch = dict[str, Tensor]

# ------------------------------------------------------------------------------------------------ conformance


def cross_entropies(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    """Around both cut-offs of the default."""
    draws = torch.rand(3, n, generator=generator, dtype=torch.float64)
    return {
        "ce_safe": draws[0].to(dtype),
        "ce_harm": (3 + 4 * draws[1]).to(dtype),
        "ce_utility": draws[2].to(dtype),
    }


def token_rows(n: int, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    logits = torch.randn(n, 3, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (n, 3), generator=generator)
    labels[:, 0] = -100
    return {"logits": logits.to(dtype), "labels": labels}


declarations = [
    Declaration(
        function=toward_away_loss,
        module=None,
        sample=cross_entropies,
        differentiable=("ce_safe", "ce_harm", "ce_utility"),
        extreme="ce_harm",
        kinks="at both cut-offs, where the value jumps by leak times the cut-off",
    ),
    Declaration(
        function=log_one_minus_p_loss,
        module=None,
        sample=token_rows,
        kinks="at the threshold, below which a token has no loss",
    ),
]


# ----------------------------------------------------------------------------------------------------- golden


def golden_continuous_adversarial_llm(case: Case) -> dict[str, Any]:
    function = {
        "adversarial_ipo": golden_preference,
        "cutoff_sequence_logps": golden_logps,
        "log_1_minus_p": golden_unlikelihood,
        "embedding_attack": golden_attack,
    }[case.params["function"]]
    return function(case)


def golden_preference(case: Case) -> dict[str, Any]:
    chosen, rejected = case.leaf("policy_chosen_logps"), case.leaf("policy_rejected_logps")
    references = case.inputs["ref_chosen_logps"], case.inputs["ref_rejected_logps"]
    options = {"beta": case.params["beta"]}
    if case.params["loss_type"] == "sigmoid":
        options["label_smoothing"] = case.params["label_smoothing"]
    function = {"ipo": ipo_loss, "sigmoid": dpo_loss}[case.params["loss_type"]]
    loss = function(chosen, rejected, *references, **options)
    slopes = gradients(loss, chosen, rejected)
    return {
        "loss": loss,
        "per_example": function(chosen, rejected, *references, **options, reduction="none"),
        "grad_policy_chosen_logps": slopes[0],
        "grad_policy_rejected_logps": slopes[1],
    }


def golden_logps(case: Case) -> dict[str, Any]:
    logits, labels = case.leaf("logits"), case.inputs["labels"]
    logps = sequence_logps(
        logits[:, :-1],
        torch.where(labels == case.params["ignore_index"], -100, labels)[:, 1:],
        reduction="mean" if case.params["average"] else "sum",
        lower_cutoff=case.params["lower_cutoff"],
        upper_cutoff=case.params["upper_cutoff"],
        cutoff="zero",
    )
    return {"logps": logps, "grad_logits_of_sum": gradients(logps, logits)[0]}


def golden_unlikelihood(case: Case) -> dict[str, Any]:
    logits, labels = case.leaf("logits"), case.inputs["labels"]
    # the function itself does not shift, unless the case says that logits at t score labels at t + 1
    words = case.inputs.get("alignment", "").lower().replace(" ", "")
    shift = any(sign in words for sign in ("t+1", "[:,1:]", "nexttoken", "shiftinside", "shiftedinside"))
    loss = log_one_minus_p_loss(
        logits[:, :-1] if shift else logits,
        labels[:, 1:] if shift else labels,
        threshold=case.params["threshold"],
        ignore_index=case.params["ignore_index"],
    )
    return {"loss": loss, "grad_logits": gradients(loss, logits)[0]}


def golden_attack(case: Case) -> dict[str, Any]:
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    matrix, labels = case.inputs["embedding_matrix"], case.inputs["labels"]
    answer = labels > 0  # as recorded: a token of id 0 counts as a part of the prompt
    prompt = ~answer & (mask != 0)
    embeds, losses = matrix[ids], []

    def toy(moved: Tensor) -> Tensor:
        attended = mask.to(moved.dtype).unsqueeze(-1)
        mean = (attended * moved).cumsum(1) / attended.cumsum(1).clamp_min(1)
        logits = torch.tanh(mean @ case.inputs["W"]) @ case.inputs["U"]
        loss = F.cross_entropy(logits[:, :-1][answer[:, 1:]], labels[:, 1:][answer[:, 1:]])
        losses.append(loss.detach())
        return loss

    eps = relative_eps(matrix, case.params["eps_relative"])
    delta = embedding_attack(
        toy,
        embeds,
        prompt,
        eps=eps,
        step_size=case.params["step_size"],
        steps=case.params["steps"],
        rule=case.params["optimizer"],
    )
    return {
        "eps_absolute": eps,
        "attack_losses": torch.stack(losses),
        "perturbation": delta,
        "perturbation_mask": prompt.long(),
        "adversarial_embeds": embeds + delta,
        "max_token_l2": delta.norm(dim=-1).max(),
    }


# ----------------------------------------------------------------------------------------------------- attack

SLOPE = torch.tensor([3.0, -4.0, 0.0, 12.0], dtype=torch.float64)  # of length 13


def linear(embeds: Tensor) -> Tensor:
    return (embeds @ SLOPE).sum()


def zeros(n: int = 2, tokens: int = 3) -> tuple[Tensor, Tensor]:
    mask = torch.ones(n, tokens, dtype=torch.long)
    mask[0, -1] = 0
    return torch.zeros(n, tokens, 4, dtype=torch.float64), mask


def test_eps_is_a_share_of_the_mean_length() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert relative_eps(weight, 0.1) == pytest.approx(0.1 * 2)
    assert relative_eps(weight.bfloat16(), 0.1) == pytest.approx(0.1 * 2)


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_steps_on_a_linear_loss_until_the_ball_ends(steps: int) -> None:
    embeds, mask = zeros()
    counts = mask[..., None].double()
    sign = embedding_attack(linear, embeds, mask, eps=0.5, step_size=0.1, steps=steps)
    # three coordinates move, so that the ball of 0.5 ends at 0.5 / sqrt(3)
    want = -min(0.1 * steps, 0.5 / math.sqrt(3)) * SLOPE.sign()
    torch.testing.assert_close(sign, counts * want)
    euclidean = embedding_attack(linear, embeds, mask, eps=0.5, step_size=0.1, steps=steps, rule="l2")
    torch.testing.assert_close(euclidean, counts * (-min(0.1 * steps, 0.5) * SLOPE / 13))
    adam = embedding_attack(linear, embeds, mask, eps=0.5, step_size=0.1, steps=steps, rule="adam")
    # the gradient is constant, so that every step of Adam is a sign step but for its epsilon
    torch.testing.assert_close(adam, counts * want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule", ["sign", "l2", "adam"])
def test_ball_and_mask_hold_on_a_model(rule: str) -> None:
    model = language_model()
    batch = padded(HARMFUL, "left")
    loss = CAdvULLoss(eps_rel=0.3, step_size=None, steps=5, rule=rule)
    delta = loss.attack(model, batch)
    eps = relative_eps(model.embedding.weight, 0.3)
    lengths = delta.norm(dim=-1)
    prompt = (batch["attention_mask"] == 1) & (batch["labels"] == -100)
    assert (lengths <= eps * (1 + 1e-6)).all()
    assert (lengths[~prompt] == 0).all()
    assert (lengths[prompt] > 0.5 * eps).all()
    assert harm_of(model, batch, delta) < harm_of(model, batch, torch.zeros_like(delta)) - 0.01


def test_step_size_of_the_radius() -> None:
    embeds, mask = zeros()
    far = embedding_attack(linear, embeds, mask, eps=0.5, step_size=None, steps=10, rule="l2")
    torch.testing.assert_close(far, -0.5 * SLOPE / 13 * mask[..., None])
    one = embedding_attack(linear, embeds, mask, eps=0.5, step_size=None, steps=4)
    same = embedding_attack(linear, embeds, mask, eps=0.5, step_size=2.5 * 0.5 / 4 / 2, steps=4)
    assert torch.equal(one, same)


def test_no_slope_or_no_ball_no_move() -> None:
    embeds, mask = zeros()
    for rule in ("sign", "l2", "adam"):
        assert not embedding_attack(linear, embeds, mask, eps=0.0, step_size=0.1, rule=rule).any()
        assert not embedding_attack(lambda x: 0 * x.sum(), embeds, mask, eps=1.0, rule=rule).any()


def test_half_precision_embeddings_keep_a_float32_perturbation() -> None:
    embeds, mask = torch.ones(1, 2, 4).bfloat16(), torch.ones(1, 2, dtype=torch.bool)
    seen = []

    def loss_fn(moved: Tensor) -> Tensor:
        seen.append(moved.dtype)
        return moved.sum()

    delta = embedding_attack(loss_fn, embeds, mask, eps=1.0, step_size=1e-4, steps=40)
    # next to 1, bfloat16 cannot hold 1e-4: only the sum is rounded, after forty steps have added up
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, torch.full((1, 2, 4), -4e-3))
    assert set(seen) == {torch.bfloat16}


def test_works_without_gradients_and_returns_a_detached_result() -> None:
    embeds, mask = zeros()
    embeds.requires_grad_()
    for rule in ("sign", "l2", "adam"):
        with torch.no_grad():
            delta = embedding_attack(linear, embeds, mask, eps=1.0, step_size=0.1, steps=2, rule=rule)
        assert not delta.requires_grad
        assert delta.abs().max() > 0.1
    assert embeds.grad is None


@pytest.mark.bare
def test_what_cannot_be_attacked_is_refused() -> None:
    embeds, mask = zeros()
    for wrong, message in [
        ({"eps": -0.1}, r"eps must lie in \[0.0, inf\], got -0.1"),
        ({"steps": -1}, "steps must lie in"),
        ({"step_size": -1.0}, "step_size must lie in"),
        ({"rule": "rms"}, "rule must be 'sign', 'l2' or 'adam', got 'rms'"),
    ]:
        with pytest.raises(ValueError, match=message):
            embedding_attack(linear, embeds, mask, **{"eps": 1.0, **wrong})
        for loss in (CAdvULLoss, CAdvIPOLoss):
            with pytest.raises(ValueError, match=message):
                loss(**wrong)
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\), got \(2, 2\)"):
        embedding_attack(linear, embeds, mask[:, :2], eps=1.0)
    with pytest.raises(TypeError, match="embeds must have a floating-point dtype"):
        embedding_attack(linear, embeds.long(), mask, eps=1.0)
    with pytest.raises(ValueError, match="eps_rel must lie in"):
        relative_eps(embeds[0], -1.0)
    with pytest.raises(ValueError, match="embedding_weight must have shape"):
        relative_eps(embeds)


# ------------------------------------------------------------------------------------------------------ terms


def test_the_cut_is_continuous_up_to_the_leak() -> None:
    tiny = 1e-9
    for leak in (0.0, 1e-3):
        options = {"away_weight": 0.0, "toward_weight": 1.0, "leak": leak}
        none = torch.zeros((), dtype=torch.float64)
        above = toward_away_loss(torch.tensor(0.5 + tiny, dtype=torch.float64), none, **options)
        below = toward_away_loss(torch.tensor(0.5 - tiny, dtype=torch.float64), none, **options)
        assert (below - above).item() == pytest.approx(0.5 * leak, abs=1e-8)
    low = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    value = toward_away_loss(torch.zeros_like(low), low, toward_weight=0.0, away_weight=1.0)
    assert value.item() == pytest.approx(-5 - 0.007)
    assert torch.autograd.grad(value, low)[0].item() == pytest.approx(-1e-3)


def test_without_a_cutoff_the_leak_does_not_matter() -> None:
    safe, harm = torch.rand(5, dtype=torch.float64), 1e3 * torch.rand(5, dtype=torch.float64).requires_grad_()
    values = [
        toward_away_loss(safe, harm, toward_cutoff=-math.inf, away_cutoff=-math.inf, leak=leak)
        for leak in (0.0, 0.7)
    ]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], 0.5 * (safe - harm).mean())
    assert torch.isfinite(torch.autograd.grad(values[1], harm)[0]).all()


def test_a_mean_is_cut_as_one_value_and_examples_each_on_their_own() -> None:
    harm = torch.tensor([4.0, 8.0], dtype=torch.float64)
    safe = torch.ones_like(harm)
    whole = toward_away_loss(safe.mean(), harm.mean())
    each = toward_away_loss(safe, harm)
    assert whole.item() == pytest.approx(0.5 + 0.5 * (-5 - 0.006))
    assert each.item() == pytest.approx(0.5 + 0.5 * (-4 + (-5 - 0.008)) / 2)


def test_unlikelihood_is_exact_at_both_ends() -> None:
    label = torch.zeros(1, 1, dtype=torch.long)
    for margin in (-4.0, 0.0, 5.0, 60.0, 3e4):
        logits = torch.tensor([[[margin, 0.0]]])
        # -log(1 - p) of two classes is log(1 + e^margin)
        want = math.log1p(math.exp(-abs(margin))) + max(margin, 0.0)
        assert log_one_minus_p_loss(logits, label).item() == pytest.approx(want, rel=1e-6)
    rare = torch.tensor([[[-20.0, 0.0]]], dtype=torch.float64)
    found = log_one_minus_p_loss(rare, label, threshold=-30.0).item()
    assert found == pytest.approx(math.exp(-20), rel=1e-8)


def test_unlikelihood_by_the_definition_with_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(6, (3, 4), generator=generator)
    labels[0, 0] = -100
    p = logits.softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    kept = (labels != -100) & (p.log() >= -2)
    assert 0 < int(kept.sum()) < 11
    want = -(1 - p)[kept].log().sum() / 11
    got = log_one_minus_p_loss(logits, labels, threshold=-2.0)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, logits)[0], gradients(want, logits)[0])


# ----------------------------------------------------------------------------------------------------- models


def language_model(**options: Any) -> TinyLM:
    torch.manual_seed(5)
    model = TinyLM(13, dim=16, layers=2, heads=2, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0)  # so that what the model says depends on what it is told
    return model


Pair = tuple[list[int], list[int]]
PROMPTS = ([1, 5, 6, 7], [1, 8], [1, 9, 10, 11, 4, 5])
HARMFUL: list[Pair] = [(prompt, [2, prompt[-1]]) for prompt in PROMPTS]
SAFE: list[Pair] = [(prompt, [3] * (k + 1)) for k, prompt in enumerate(PROMPTS)]
USEFUL: list[Pair] = [([1, 12, 4], [4, 12, 1]), ([1, 6], [6])]


def padded(pairs: list[Pair], side: str = "right", extra: int = 1) -> Batch:
    """Tokens, labels and mask of prompts with answers, as a collator gives them."""
    width = max(len(prompt) + len(answer) for prompt, answer in pairs) + extra
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for prompt, answer in pairs:
        gap = width - len(prompt) - len(answer)
        whole = {
            "input_ids": (0, prompt + answer),
            "labels": (-100, [-100] * len(prompt) + answer),
            "attention_mask": (0, [1] * (len(prompt) + len(answer))),
        }
        for key, (filler, row) in whole.items():
            rows[key].append([filler] * gap + row if side == "left" else row + [filler] * gap)
    return {key: torch.tensor(value) for key, value in rows.items()}


def token_nll(model: nn.Module, pair: Pair, delta: Tensor | None = None) -> Tensor:
    """Of the answer's tokens, one sequence at a time, without any padding."""
    prompt, answer = pair
    embeds = model.get_input_embeddings()(torch.tensor([prompt + answer]))
    if delta is not None:
        embeds = embeds + F.pad(delta, (0, 0, 0, len(answer)))
    logits = model(inputs_embeds=embeds)[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(answer), reduction="none")


def harm_of(model: nn.Module, batch: Batch, delta: Tensor) -> float:
    logits = model(
        inputs_embeds=model.get_input_embeddings()(batch["input_ids"]) + delta,
        attention_mask=batch["attention_mask"],
    )
    return -sequence_logps(logits[:, :-1], batch["labels"][:, 1:], reduction="mean").mean().item()


def prompt_deltas(loss: CAdvULLoss | CAdvIPOLoss, model: nn.Module, pairs: list[Pair]) -> list[Tensor]:
    """The attack on every example alone, without padding."""
    return [
        loss.attack(model, padded([pair], extra=0))[0, : len(pair[0])] if pair[1] else torch.zeros(0)
        for pair in pairs
    ]


ATTACK = {"eps_rel": 0.2, "step_size": None, "steps": 4}
RULES = pytest.mark.parametrize("rule", ["sign", "l2", "adam"])
SIDES = pytest.mark.parametrize("sides", [("right", "right"), ("left", "left"), ("left", "right")])


@RULES
@SIDES
def test_padding_and_company_do_not_change_a_perturbation(rule: str, sides: tuple[str, str]) -> None:
    model, loss = language_model(), CAdvULLoss(**ATTACK, rule=rule)
    batch = padded(HARMFUL, sides[0], extra=2)
    together = loss.attack(model, batch)
    for row, alone in enumerate(prompt_deltas(loss, model, HARMFUL)):
        prompt = (batch["attention_mask"][row] == 1) & (batch["labels"][row] == -100)
        torch.testing.assert_close(together[row][prompt], alone, rtol=1e-6, atol=1e-9)
        assert not together[row][~prompt].any()


@SIDES
def test_cat_of_a_padded_batch_is_written_out_one_by_one(sides: tuple[str, str]) -> None:
    model, loss = language_model(), CAdvULLoss(0.7, 0.4, 0.9, 0.1, **ATTACK)
    deltas = prompt_deltas(loss, model, HARMFUL)

    def mean(pairs: list[Pair], moves: list[Tensor] | list[None]) -> Tensor:
        return torch.cat([token_nll(model, p, d) for p, d in zip(pairs, moves, strict=True)]).mean()

    want = toward_away_loss(
        mean(SAFE, deltas),
        mean(HARMFUL, deltas),
        mean(USEFUL, [None, None]),
        toward_weight=0.7,
        away_weight=0.4,
        utility_weight=0.9,
        toward_cutoff=0.1,
    )
    got = loss(model, padded(HARMFUL, sides[0]), padded(SAFE, sides[1], extra=3), padded(USEFUL, sides[1]))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    parameters = list(model.parameters())
    for one, two in zip(gradients(got, *parameters), gradients(want, *parameters), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


@SIDES
@pytest.mark.parametrize("cutoff", ["clamp", "zero", None])
def test_capo_of_a_padded_batch_is_written_out_one_by_one(sides: tuple[str, str], cutoff: str | None) -> None:
    model, reference = language_model(), language_model(tied=False)
    options = {} if cutoff is None else {"away_cutoff": -2.0, "toward_cutoff": 6.5, "cutoff": cutoff}
    loss = CAdvIPOLoss(beta=0.2, reduction="none", **ATTACK, **options)
    deltas = prompt_deltas(loss, model, HARMFUL)
    value = {"clamp": (-2.0, -6.5), "zero": (0.0, 0.0), None: (math.nan, math.nan)}[cutoff]
    margins, cut = [], torch.zeros(2, dtype=torch.long)
    for harmful, safe, delta in zip(HARMFUL, SAFE, deltas, strict=True):
        harm, safety = -token_nll(model, harmful, delta), -token_nll(model, safe, delta)
        if cutoff is not None:
            cut += torch.stack([(harm < -2).sum(), (safety > -6.5).sum()])
            harm = torch.where(harm < -2, value[0], harm)
            safety = torch.where(safety > -6.5, value[1], safety)
        before = token_nll(reference, harmful).mean() - token_nll(reference, safe).mean()
        margins.append(safety.mean() - harm.mean() - before)
    assert cutoff is None or (cut == 2).all(), "both cut-offs have something to cut"
    want = (torch.stack(margins) - 1 / (2 * 0.2)).square()
    harmful, safe = padded(HARMFUL, sides[0]), padded(SAFE, sides[1], extra=3)
    got = loss(model, harmful, safe, **loss.reference_logps(reference, harmful, safe))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_zero_counts_a_suppressed_answer_as_certain_and_clamp_does_not() -> None:
    model = language_model()
    harmful, safe = padded(HARMFUL), padded(SAFE)
    reference = CAdvIPOLoss.reference_logps(model, harmful, safe)
    cut = {"away_cutoff": -1e-3, "steps": 0, "reduction": "none"}  # below it lies everything here
    margins = {
        # the square root of (margin - 2)^2, for a margin that lies below 2
        cutoff: 2 - CAdvIPOLoss(cutoff=cutoff, **cut)(model, harmful, safe, **reference).sqrt()
        for cutoff in ("zero", "clamp")
    }
    # the model is its own reference, so that the margin is what the cut takes from the harmful answer
    torch.testing.assert_close(margins["zero"], reference["ref_rejected_logps"])
    torch.testing.assert_close(margins["clamp"], reference["ref_rejected_logps"] + 1e-3)


@pytest.mark.parametrize("off", [{"steps": 0}, {"eps_rel": 0.0}, {"eps": 0.0, "eps_rel": 0.3}])
def test_without_an_attack_cat_is_fine_tuning_and_capo_is_ipo(off: dict[str, Any]) -> None:
    model, reference = language_model(), language_model(tied=False)
    harmful, safe = padded(HARMFUL), padded(SAFE)

    def plain(batch: Batch) -> Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    tuned = CAdvULLoss(1.0, 1.0, toward_cutoff=0.0, away_cutoff=-100.0, **off)(model, harmful, safe)
    torch.testing.assert_close(tuned, plain(safe) - plain(harmful))

    def logps(net: nn.Module, batch: Batch) -> Tensor:
        logits = net(batch["input_ids"], attention_mask=batch["attention_mask"])
        return sequence_logps(logits[:, :-1], batch["labels"][:, 1:], reduction="mean")

    loss = CAdvIPOLoss(0.25, **off)
    refs = loss.reference_logps(reference, harmful, safe)
    torch.testing.assert_close(refs["ref_chosen_logps"], logps(reference, safe))
    torch.testing.assert_close(refs["ref_rejected_logps"], logps(reference, harmful))
    torch.testing.assert_close(
        loss(model, harmful, safe, **refs),
        ipo_loss(logps(model, safe), logps(model, harmful), *refs.values(), beta=0.25),
    )


def test_unlikelihood_in_place_of_the_away_term() -> None:
    model, loss = language_model(), CAdvULLoss(away="log_one_minus_p", away_cutoff=-2.5, **ATTACK)
    harmful = padded(HARMFUL)
    embeds = model.embedding(harmful["input_ids"]) + loss.attack(model, harmful)
    logits = model(inputs_embeds=embeds, attention_mask=harmful["attention_mask"])
    want = log_one_minus_p_loss(logits[:, :-1], harmful["labels"][:, 1:], threshold=-2.5)
    terms = loss.terms(model, harmful, padded(SAFE))
    assert list(terms) == ["toward", "away"]
    torch.testing.assert_close(terms["away"], want)
    assert want > 0


def test_the_attack_makes_the_harmful_answer_likelier() -> None:
    model, harmful, safe = language_model(), padded(HARMFUL), padded(SAFE)
    clean, attacked = (
        CAdvULLoss(away_cutoff=-math.inf, eps_rel=0.2, step_size=None, steps=steps).terms(
            model, harmful, safe
        )
        for steps in (0, 6)
    )
    assert attacked["away"] > clean["away"] + 0.1


def test_modes_and_gradients_are_left_alone() -> None:
    model = language_model(dropout=0.5)
    model.blocks[1].eval()  # a part that the user froze
    modes = [part.training for part in model.modules()]
    loss = CAdvULLoss(**ATTACK)
    harmful, safe = padded(HARMFUL), padded(SAFE)
    one = loss.attack(model, harmful)
    assert torch.equal(one, loss.attack(model, harmful)), "no dropout in the attack"
    assert [part.training for part in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    values = [loss(model, harmful, safe).item() for _ in range(2)]
    assert values[0] != values[1], "dropout in the loss"
    model.eval()
    found = gradients(loss(model, harmful, safe), *model.parameters())

    def cross_entropy(pairs: list[Pair]) -> Tensor:
        # the perturbation as a given constant
        return torch.cat(
            [token_nll(model, p, d[: len(p[0])]) for p, d in zip(pairs, one, strict=True)]
        ).mean()

    want = gradients(toward_away_loss(cross_entropy(SAFE), cross_entropy(HARMFUL)), *model.parameters())
    for have, expected in zip(found, want, strict=True):
        torch.testing.assert_close(have, expected, rtol=1e-6, atol=1e-9)


def test_autocast_keeps_the_perturbation_in_float32() -> None:
    model, loss = language_model().float(), CAdvULLoss(**ATTACK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        delta = loss.attack(model, padded(HARMFUL))
        value = loss(model, padded(HARMFUL), padded(SAFE))
    assert delta.dtype == torch.float32
    assert delta.abs().max() > 0
    assert value.dtype == torch.float32
    value.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_a_model_in_half_precision() -> None:
    model, loss = language_model().bfloat16(), CAdvULLoss(**ATTACK)
    assert loss.attack(model, padded(HARMFUL)).dtype == torch.float32
    value = loss(model, padded(HARMFUL), padded(SAFE))
    assert value.dtype == torch.float32
    value.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------- empty and odd


def test_pairs_with_an_empty_answer_do_not_count() -> None:
    model = language_model()
    harmful, safe = [*HARMFUL, ([1, 4], [])], [*SAFE, ([1, 4], [3])]
    loss = CAdvIPOLoss(**ATTACK)
    wide, narrow = (padded(harmful), padded(safe)), (padded(HARMFUL), padded(SAFE))
    torch.testing.assert_close(
        loss(model, *wide, **loss.reference_logps(model, *wide)),
        loss(model, *narrow, **loss.reference_logps(model, *narrow)),
    )
    # the away term of CAT has no token of it, the toward term has one
    terms, without = (CAdvULLoss(**ATTACK).terms(model, *batches) for batches in (wide, narrow))
    torch.testing.assert_close(terms["away"], without["away"])
    assert terms["toward"] != without["toward"]


def test_no_answer_at_all_is_zero_with_a_graph() -> None:
    model = language_model()
    silent = padded([(prompt, []) for prompt in PROMPTS])
    none = {key: value[:0] for key, value in silent.items()}
    for batch in (silent, none, {key: value[:, :0] for key, value in silent.items()}):
        cat, capo = CAdvULLoss(**ATTACK), CAdvIPOLoss(**ATTACK)
        values = [
            cat(model, batch, batch),
            cat(model, batch, batch, batch),
            capo(model, batch, batch, **capo.reference_logps(model, batch, batch)),
        ]
        for value in values:
            assert value == 0
            model.zero_grad()
            value.backward()
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        assert cat.attack(model, batch).shape == (*batch["input_ids"].shape, 16)


def test_without_harmful_examples_the_useful_ones_remain() -> None:
    model = language_model()
    none = {key: value[:0] for key, value in padded(HARMFUL).items()}
    useful = padded(USEFUL)
    value = CAdvULLoss(utility_weight=0.3)(model, none, none, useful)
    want = torch.cat([token_nll(model, pair) for pair in USEFUL]).mean()
    torch.testing.assert_close(value, 0.3 * want)


def test_prompt_tokens_behind_the_answer_and_between_answers() -> None:
    """Two turns: what stands between the answers is a part of the prompt, and is perturbed and handed over."""
    model, loss = language_model(), CAdvULLoss(**ATTACK)
    harmful = {"input_ids": torch.tensor([[1, 5, 2, 6, 7, 2, 4]])}
    harmful["labels"] = torch.tensor([[-100, -100, 2, -100, -100, 2, -100]])
    safe = {"input_ids": torch.tensor([[1, 5, 3, 3, 6, 7, 3, 4]])}
    safe["labels"] = torch.tensor([[-100, -100, 3, 3, -100, -100, 3, -100]])
    delta = loss.attack(model, harmful)
    moved = delta[0].abs().sum(-1) > 0
    assert moved.tolist() == [True, True, False, True, True, False, False]  # the last has no slope
    at_safe = torch.zeros(1, 8, 16, dtype=torch.float64)
    at_safe[0, [0, 1, 4, 5, 7]] = delta[0, [0, 1, 3, 4, 6]]
    logits = model(inputs_embeds=model.embedding(safe["input_ids"]) + at_safe)[:, :-1]
    want = F.cross_entropy(logits.flatten(0, 1), safe["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss.terms(model, harmful, safe)["toward"], want)


class Wrapped(nn.Module):
    """A model with the interface of ``transformers``: keywords alone, and an object with logits."""

    def __init__(self, model: TinyLM) -> None:
        super().__init__()
        self.inner = model

    def get_input_embeddings(self) -> nn.Embedding:
        return self.inner.embedding

    def forward(self, *, inputs_embeds: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        assert attention_mask.dtype == torch.long
        # most models number the positions from the left, whatever the mask says
        assert (attention_mask.diff(dim=1) <= 0).all(), "padding stands on the right"
        return SimpleNamespace(logits=self.inner(inputs_embeds=inputs_embeds, attention_mask=attention_mask))


def test_a_model_that_returns_an_object_with_logits() -> None:
    model = language_model()
    for loss in (CAdvULLoss(**ATTACK), CAdvIPOLoss(**ATTACK)):
        values = []
        for net in (model, Wrapped(model)):
            batches = padded(HARMFUL, "left"), padded(SAFE, "left")
            refs = loss.reference_logps(net, *batches) if isinstance(loss, CAdvIPOLoss) else {}
            values.append(loss(net, *batches, **refs))
        assert torch.equal(*values)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_transformers_model(kind: str, side: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=13, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=13,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
        model = transformers.LlamaForCausalLM(config)
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0)
    harmful, safe, useful = padded(HARMFUL, side), padded(SAFE, side), padded(USEFUL, side)
    cat, capo = CAdvULLoss(**ATTACK), CAdvIPOLoss(**ATTACK)
    for row, pair in enumerate(HARMFUL):
        prompt = (harmful["attention_mask"][row] == 1) & (harmful["labels"][row] == -100)
        alone = cat.attack(model, padded([pair], extra=0))[0, : len(pair[0])]
        torch.testing.assert_close(cat.attack(model, harmful)[row][prompt], alone, rtol=1e-5, atol=1e-8)
    assert model.training
    # Hugging Face's own loss on one clean sequence is the utility term
    model.eval()
    alone = {key: value[:1, :] for key, value in padded(USEFUL[:1], extra=0).items()}
    clean = model(**alone).loss
    torch.testing.assert_close(cat.terms(model, harmful, safe, alone)["utility"], clean.double())
    cat(model, harmful, safe, useful).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    value = capo(model, harmful, safe, **capo.reference_logps(model, harmful, safe))
    assert torch.isfinite(value)


def test_under_distributed_data_parallel_one_rank_is_the_plain_model() -> None:
    model, loss = language_model(), CAdvULLoss(**ATTACK)
    loss(model, padded(HARMFUL), padded(SAFE)).backward()
    want = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel, calls = nn.parallel.DistributedDataParallel(model), []
        parallel.register_forward_pre_hook(lambda *_: calls.append(None))
        for _ in range(2):  # the second step shows whether the first was completed
            model.zero_grad()
            loss(parallel, padded(HARMFUL), padded(SAFE)).backward()
    finally:
        dist.destroy_process_group()
    assert len(calls) == 2 * 2, "the attack stays out of the exchange of gradients"
    for have, parameter in zip(want, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, have)


# ------------------------------------------------------------------------------------------- loss of the family


def test_they_are_losses_of_the_robust_family() -> None:
    cat = CAdvULLoss(**ATTACK)
    mixture = 0.5 * cat + CAdvULLoss(0.0, 1.0, **ATTACK)
    assert isinstance(mixture, Mixture)
    assert mixture.family == "robust"
    model, batches = language_model(), (padded(HARMFUL), padded(SAFE))
    parts = [part(model, *batches) for part in mixture.losses]
    torch.testing.assert_close(mixture(model, *batches), 0.5 * parts[0] + parts[1])
    for loss in (cat, CAdvIPOLoss(eps=0.5)):
        for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert repr(twin) == repr(loss)
        assert set(type(loss).space) <= set(vars(loss))
    assert "eps_rel=0.2" in repr(cat)
    assert "beta=0.25, eps=0.5" in repr(CAdvIPOLoss(eps=0.5))
    assert CAdvIPOLoss.needs == {"ref_chosen_logps", "ref_rejected_logps"}


@pytest.mark.bare
def test_doors() -> None:
    model, harmful, safe = language_model(), padded(HARMFUL), padded(SAFE)
    cat = CAdvULLoss(**ATTACK)
    other = padded([*SAFE[:2], ([1, 9, 10, 11, 4, 6], [3])])
    with pytest.raises(ValueError, match="the same prompt tokens .* but those of example 2 differ"):
        cat(model, harmful, other)
    longer = padded([*SAFE[:1], ([1, 8, 8], [3]), SAFE[2]])
    with pytest.raises(ValueError, match="the same prompt tokens .* but those of example 1 differ"):
        cat(model, harmful, longer)
    with pytest.raises(ValueError, match="the same number of examples, got 3 and 2"):
        cat(model, harmful, padded(SAFE[:2]))
    with pytest.raises(ValueError, match="utility must hold input_ids and labels, got input_ids"):
        cat(model, harmful, safe, {"input_ids": safe["input_ids"]})
    with pytest.raises(ValueError, match=r"safe\['labels'\] must have shape \(3, 10\), got \(3, 9\)"):
        cat(model, harmful, {**safe, "labels": safe["labels"][:, 1:]})
    with pytest.raises(ValueError, match=r"harmful\['attention_mask'\] must have shape"):
        cat(model, {**harmful, "attention_mask": torch.ones(3, 2)}, safe)
    with pytest.raises(TypeError, match=r"harmful\['input_ids'\] must have an integer dtype"):
        cat(model, {**harmful, "input_ids": harmful["input_ids"].float()}, safe)
    with pytest.raises(TypeError, match=r"model must have get_input_embeddings\(\), got Linear"):
        cat(nn.Linear(2, 2), harmful, safe)
    with pytest.raises(ValueError, match="away must be 'cross_entropy' or 'log_one_minus_p', got 'kl'"):
        CAdvULLoss(away="kl")
    with pytest.raises(ValueError, match="cutoff must be 'clamp' or 'zero', got 'drop'"):
        CAdvIPOLoss(cutoff="drop")
    with pytest.raises(ValueError, match="beta must lie in"):
        CAdvIPOLoss(beta=0.0)
    with pytest.raises(ValueError, match="reduction must be"):
        CAdvIPOLoss(reduction="average")
