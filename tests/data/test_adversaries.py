"""Searches past a classifier, and the rounds of training against them."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from telos.data.adversaries import (
    AdversarialRounds,
    AttackResult,
    Guard,
    TokenSubstitutionAdversary,
    _drawn,
    _uniform,
    first_occurrences,
    paraphrase_adversary,
    token_saliency,
)
from telos.data.selection.rejection import filtered_policy, threshold_at_fpr
from telos.metrics.reliability import failure_rate_interval
from tests.golden.adapters import Case


def golden_high_stakes_adversarial(case: Case) -> dict[str, Any]:
    params, inputs = case.params, case.inputs
    if params["function"] == "failure_rate_interval":
        assert params["method"] == "clopper-pearson"
        return failure_rate_interval(inputs["failures"], inputs["trials"], params["confidence"])._asdict()
    found = filtered_policy(
        inputs["policy_probs"],
        inputs["risk_scores"],
        params["threshold"],
        is_failure=inputs["is_failure"].bool(),
    )
    return {**found._asdict(), "filtered_probs": found.probs}


# ---------------------------------------------------------------------------------------------- a small world

RISK = torch.tensor([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0], dtype=torch.float64)  # of each token
TOKENS = torch.arange(6)


def embed(tokens: Tensor) -> Tensor:
    return RISK[tokens].unsqueeze(-1)


def score(embeddings: Tensor, tokens: Tensor) -> Tensor:
    return embeddings.sum((1, 2))


def always(tokens: Tensor) -> Tensor:
    return torch.ones(len(tokens), dtype=torch.bool)


def holds_a_high_token(tokens: Tensor) -> Tensor:
    return (tokens >= 4).any(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def starts(n: int, length: int = 5, seed: int = 0) -> Tensor:
    tokens = torch.randint(6, (n, length), generator=generator(seed))
    tokens[:, 0] = 4 + tokens[:, 0] % 2
    return tokens


# ---------------------------------------------------------------------------------------------- saliency


def test_saliency_of_a_linear_score_is_the_size_of_its_weights() -> None:
    weights = torch.randn(7, 3, generator=generator(), dtype=torch.float64)
    table = torch.randn(11, 3, generator=generator(1), dtype=torch.float64)
    tokens = torch.randint(11, (4, 7), generator=generator(2))
    found = token_saliency(lambda e, t: (e * weights).sum((1, 2)), lambda t: table[t], tokens)
    torch.testing.assert_close(found, weights.square().sum(1).sqrt().expand(4, 7))
    scalar = token_saliency(lambda e, t: e[..., 0] @ weights[:, 0], lambda t: table[t][..., :1], tokens)
    torch.testing.assert_close(scalar, weights[:, 0].abs().expand(4, 7))


def test_saliency_leaves_parameters_and_modes_alone() -> None:
    embedding, head = nn.Embedding(6, 4), Head()
    head.train()
    head.dropout.eval()
    token_saliency(head, embedding, TOKENS.reshape(2, 3))
    assert head.seen == {False}  # no dropout while it is attacked
    assert (head.training, head.dropout.training) == (True, False)
    assert all(p.grad is None for p in (*embedding.parameters(), *head.parameters()))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 1), nn.Dropout(0.5)
        self.seen: set[bool] = set()

    def forward(self, embeddings: Tensor, tokens: Tensor) -> Tensor:
        self.seen.add(self.training)
        return self.linear(self.dropout(embeddings)).sum((1, 2))


# ---------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("use_saliency", [False, True])
def test_constant_score(use_saliency: bool) -> None:
    """Never a success above the threshold, always one of no queries below, and at it none: the rule is strict."""
    adversary = TokenSubstitutionAdversary(TOKENS, always, 7, use_saliency)
    tokens = starts(5)
    for constant, succeeds in ((1.0, False), (0.0, False), (-1.0, True)):
        found = adversary.attack(
            lambda e, t, constant=constant: e.sum((1, 2)) * 0 + constant, embed, tokens, threshold=0.0
        )
        assert found.success.tolist() == [succeeds] * 5
        assert found.censored.tolist() == [not succeeds] * 5
        assert found.queries.tolist() == [0 if succeeds else 7] * 5
        assert torch.equal(found.tokens, tokens)


@pytest.mark.parametrize("options", [{}, {"use_saliency": False}, {"first_order": 3}, {"edit": "insert"}])
def test_every_success_is_an_accepted_failure(options: dict[str, Any]) -> None:
    tokens = starts(60)
    adversary = TokenSubstitutionAdversary(TOKENS, holds_a_high_token, 40, **options)
    found = adversary.attack(score, embed, tokens, threshold=-4.0, generator=generator())
    assert 0 < int(found.success.sum()) < 60
    assert holds_a_high_token(found.tokens).all()  # and what did not succeed is a failure still
    risks = RISK[found.tokens].sum(1)
    torch.testing.assert_close(found.scores, risks)
    assert torch.equal(found.success, risks < -4.0)
    assert (risks <= RISK[tokens].sum(1)).all()
    assert (found.queries[~found.success] == 40).all()
    if options.get("edit") != "insert":
        assert ((found.tokens != tokens).sum(1) <= found.queries).all()


def test_queries_are_the_candidates_that_were_scored() -> None:
    scored = 0

    def counting(embeddings: Tensor, tokens: Tensor) -> Tensor:
        nonlocal scored
        scored += 0 if embeddings.requires_grad else len(tokens)
        return score(embeddings, tokens)

    judged = 0

    def oracle(tokens: Tensor) -> Tensor:
        nonlocal judged
        judged += len(tokens)
        return holds_a_high_token(tokens)

    told: list[tuple[int, int]] = []
    adversary = TokenSubstitutionAdversary(
        TOKENS, oracle, 30, progress=lambda query, left: told.append((query, left))
    )
    found = adversary.attack(counting, embed, starts(40), threshold=-3.0, generator=generator())
    assert scored == 40 + int(found.queries.sum())  # the starts are not counted
    assert judged == found.oracle_calls
    still_open = [(query, int((found.queries > query).sum())) for query in range(1, 31)]
    assert told[-1][1] == int(found.censored.sum())
    assert told[:-1] == still_open[: len(told) - 1]


def test_all_that_can_be_reached_is_found() -> None:
    """By exchanging one token after another every sequence that holds a high token can be reached."""
    lowest = min(RISK[list(t)].sum().item() for t in itertools.product(range(6), repeat=3) if max(t) >= 4)
    adversary = TokenSubstitutionAdversary(TOKENS, holds_a_high_token, 600)
    found = adversary.attack(score, embed, starts(50, 3), threshold=lowest + 1e-9, generator=generator())
    assert found.success.all()
    never = adversary.attack(score, embed, starts(2, 3), threshold=lowest, generator=generator())
    assert not never.success.any()


def test_positions_follow_the_saliency() -> None:
    n, weights = 20_000, torch.tensor([1.0, -4.0, 0.0, 2.0], dtype=torch.float64)
    seen: list[Tensor] = []

    def record(tokens: Tensor, position: Tensor, uniform: Tensor) -> Tensor:
        seen.append(position)
        return tokens[:, 0]

    def attack(**options: Any) -> Tensor:
        seen.clear()
        TokenSubstitutionAdversary(record, always, 1, **options).attack(
            lambda e, t: e[..., 0] @ weights + 100,
            embed,
            torch.ones(n, 4, dtype=torch.long),
            threshold=0.0,
            generator=generator(),
        )
        return torch.bincount(seen[0], minlength=4)

    expected = torch.softmax(3.0 * weights.abs() / 4, 0)
    assert chisquare(attack(sharpness=3.0), n * expected).pvalue > 1e-3
    assert chisquare(attack(use_saliency=False)).pvalue > 1e-3
    assert chisquare(attack(sharpness=0.0)).pvalue > 1e-3

    def inner(tokens: Tensor) -> Tensor:
        return torch.tensor([False, True, True, False]).expand(tokens.shape)

    counts = attack(sharpness=3.0, editable=inner)
    assert counts[[0, 3]].tolist() == [0, 0]
    assert chisquare(counts[1:3], n * torch.softmax(torch.tensor([3.0, 0.0]).double(), 0)).pvalue > 1e-3


def test_saliency_is_that_of_the_sequence_as_it_is() -> None:
    """Once the first token is harmless, its gradient is gone and the second comes to matter."""

    def gated(embeddings: Tensor, tokens: Tensor) -> Tensor:
        return 100 * embeddings[:, 0, 0].relu() + embeddings[:, 1, 0]

    for first_order in (None, 1):
        adversary = TokenSubstitutionAdversary(TOKENS[:1], always, 2, sharpness=50.0, first_order=first_order)
        found = adversary.attack(gated, embed, torch.full((20, 2), 5), threshold=-1.0, generator=generator())
        assert found.success.all()
        assert (found.queries == 2).all()


def test_no_weight_is_never_drawn() -> None:
    weights = torch.rand(1000, 3, generator=generator(), dtype=torch.float64) * torch.tensor([0.0, 1.0, 0.0])
    for uniform in (0.0, 1 - 2**-53):
        assert (_drawn(weights, torch.full((1000,), uniform, dtype=torch.float64)) == 1).all()


def test_proposals_are_uniform() -> None:
    n = 12_000
    found = TokenSubstitutionAdversary(torch.tensor([0, 2, 3, 4]), always, 1).attack(
        score, embed, torch.full((n, 1), 5), threshold=-9.0, generator=generator()
    )
    counts = torch.bincount(found.tokens[:, 0], minlength=6)  # each of them lowers the risk
    assert counts[[1, 5]].tolist() == [0, 0]
    assert chisquare(counts[[0, 2, 3, 4]]).pvalue > 1e-3


def test_first_order_finds_the_best_exchange_of_a_linear_score() -> None:
    table = torch.randn(30, 4, generator=generator(), dtype=torch.float64)
    weights = torch.randn(1, 4, generator=generator(1), dtype=torch.float64)
    tokens = torch.randint(30, (50, 1), generator=generator(2))

    def linear(embeddings: Tensor, tokens: Tensor) -> Tensor:
        return (embeddings * weights).sum((1, 2))

    risks = (table * weights).sum(1)
    for top in (1, 3):
        found = TokenSubstitutionAdversary(torch.arange(30), always, 1, first_order=top).attack(
            linear, lambda t: table[t], tokens, threshold=-math.inf, generator=generator()
        )
        best = set(risks.argsort()[:top].tolist())
        moved = found.tokens != tokens
        assert set(found.tokens[moved].tolist()) <= best
        assert set(tokens[~moved].tolist()) <= best


def test_insertion_moves_the_rest() -> None:
    tokens = torch.tensor([[4, 3, 2, 1]])
    for position in range(4):
        expected = tokens[0].tolist()
        expected.insert(position, 0)

        def here(tokens: Tensor, position: int = position) -> Tensor:
            return torch.arange(4).expand(tokens.shape) == position

        found = TokenSubstitutionAdversary(torch.tensor([0]), always, 1, edit="insert", editable=here).attack(
            score, embed, tokens, threshold=-9.0, generator=generator()
        )
        taken = RISK[expected[:4]].sum() < RISK[tokens].sum()
        assert found.tokens[0].tolist() == (expected[:4] if taken else tokens[0].tolist())
        assert taken == (position < 3 or bool(RISK[0] < RISK[1]))


def test_a_row_does_not_depend_on_its_batch() -> None:
    tokens, seeds = starts(20), torch.arange(20) * 7 - 60
    adversary = TokenSubstitutionAdversary(TOKENS, holds_a_high_token, 25)

    def attack(rows: Tensor) -> AttackResult:
        return adversary.attack(score, embed, tokens[rows], threshold=-3.5, seeds=seeds[rows])

    together = attack(torch.arange(20))
    assert 0 < int(together.success.sum()) < 20
    order = torch.randperm(20, generator=generator())
    shuffled = attack(order)
    assert torch.equal(shuffled.tokens, together.tokens[order])
    assert torch.equal(shuffled.queries, together.queries[order])
    for row in range(20):
        alone = attack(torch.tensor([row]))
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert alone.queries[0] == together.queries[row]


def test_the_generator_fixes_the_search() -> None:
    adversary, tokens = TokenSubstitutionAdversary(TOKENS, holds_a_high_token, 25), starts(20)
    first, again, other = (
        adversary.attack(score, embed, tokens, threshold=-3.5, generator=generator(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.queries, again.queries)
    assert not torch.equal(first.tokens, other.tokens)


def test_numbers_of_a_seed_are_those_of_splitmix64() -> None:
    def reference(seed: int, count: int) -> list[int]:
        state, words = seed % 2**64, []
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            word = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
            word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
            words.append(word ^ (word >> 31))
        return words

    # published outputs of the generator, so that the reference is right
    assert reference(1234567, 2) == [6457827717110365317, 3203168211198807973]
    seeds = [0, 1, -1, 1234567, 2**63 - 1, -(2**63)]
    for counter in (0, 1, 599):
        found = _uniform(torch.tensor(seeds), counter)
        assert found.tolist() == [(reference(seed, counter + 1)[-1] >> 11) / 2**53 for seed in seeds]


def test_a_nan_is_no_success() -> None:
    def broken(embeddings: Tensor, tokens: Tensor) -> Tensor:
        risk = score(embeddings, tokens)
        return torch.where((tokens == 0).any(1), torch.nan, risk)

    tokens = torch.tensor([[5, 5, 1], [5, 0, 0]])
    found = TokenSubstitutionAdversary(TOKENS, always, 200).attack(
        broken, embed, tokens, threshold=-1.2, generator=generator()
    )
    assert found.success.tolist() == [True, False]  # [1, 1, 1]; the second has to lose both its zeros at once
    assert not (found.tokens[0] == 0).any()
    assert found.scores.tolist() == [-1.5, math.inf]
    found = TokenSubstitutionAdversary(TOKENS, always, 200).attack(
        broken, embed, torch.tensor([[5, 0, 5]]), threshold=-1.2, generator=generator()
    )
    assert found.tokens.tolist() == [[1, 1, 1]]


def test_half_precision() -> None:
    table, head = torch.randn(6, 4).bfloat16(), torch.randn(4).bfloat16()
    adversary = TokenSubstitutionAdversary(TOKENS, always, 30, first_order=2)
    found = adversary.attack(
        lambda e, t: (e @ head).sum(1), lambda t: table[t], starts(8), threshold=0.0, generator=generator()
    )
    assert found.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores, (table[found.tokens] @ head).sum(1).float())


def test_no_rows() -> None:
    found = TokenSubstitutionAdversary(TOKENS, always).attack(score, embed, starts(3)[:0], threshold=0.0)
    assert found.tokens.shape == (0, 5)
    assert found.success.shape == found.queries.shape == (0,)


# ---------------------------------------------------------------------------------------------- paraphrases


def test_paraphrases_of_earlier_successes() -> None:
    def paraphrase(tokens: Tensor, source: torch.Generator) -> Tensor:
        return torch.cat([tokens.flip(1), torch.zeros_like(tokens)])

    guard = Guard(lambda e, t: e[:, 0, 0], embed)
    earlier = torch.tensor([[5, 1, 0], [0, 2, 5]])
    found = paraphrase_adversary(paraphrase, holds_a_high_token)(guard, TOKENS[:0], earlier, 0.0, generator())
    assert found.tokens.tolist() == [[0, 1, 5], [5, 2, 0], [0, 0, 0], [0, 0, 0]]
    # accepted and a failure; detected; accepted, but no failure
    assert found.success.tolist() == [True, False, False, False]
    assert found.queries.tolist() == [1, 1, 1, 1]
    assert found.oracle_calls == 3
    nothing = paraphrase_adversary(paraphrase, always)(guard, earlier, earlier[:0], 0.0, generator())
    assert nothing.tokens.shape == (0, 3)


def test_first_occurrences_against_a_set() -> None:
    tokens = torch.randint(2, (200, 5), generator=generator())
    seen = torch.randint(2, (10, 5), generator=generator(1))
    known, expected = {tuple(row) for row in seen.tolist()}, []
    for row in map(tuple, tokens.tolist()):
        expected.append(row not in known)
        known.add(row)
    assert first_occurrences(tokens, seen).tolist() == expected
    assert first_occurrences(tokens[:0], seen).tolist() == []


# ---------------------------------------------------------------------------------------------- rounds


def fit(tokens: Tensor, is_failure: Tensor) -> Guard:
    """Log-odds of each token, smoothed so much that it is easily deceived: a function of the data alone."""
    inside = torch.bincount(tokens[is_failure].flatten(), minlength=6) + 100.0
    outside = torch.bincount(tokens[~is_failure].flatten(), minlength=6) + 100.0
    odds = (inside / inside.sum()).log() - (outside / outside.sum()).log()
    return Guard(score, lambda tokens: odds[tokens].unsqueeze(-1))


def draw_failures(n: int, source: torch.Generator) -> Tensor:
    tokens = torch.randint(6, (n, 5), generator=source)
    tokens[:, 0] = 4 + tokens[:, 0] % 2
    return tokens


def labelled(n: int, seed: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(6, (n, 5), generator=generator(seed))
    tokens = torch.where(torch.rand(n, 1, generator=generator(seed + 1)) < 0.5, tokens.clamp_max(3), tokens)
    return tokens, holds_a_high_token(tokens)


def rounds(**options: Any) -> AdversarialRounds:
    adversaries = {
        "substitution": TokenSubstitutionAdversary(TOKENS, holds_a_high_token, 15),
        "flip": paraphrase_adversary(lambda tokens, source: tokens.flip(1), holds_a_high_token),
    }
    keywords = {
        "data": labelled(200, 1),
        "calibration": labelled(200, 3),
        "failures": draw_failures,
        "attacks": 30,
        "held_out": 0.25,
        "seed": 5,
        **options,
    }
    return AdversarialRounds(fit, keywords.pop("adversaries", adversaries), holds_a_high_token, **keywords)


def test_no_rounds_are_the_plain_classifier() -> None:
    loop, (tokens, is_failure) = rounds(), labelled(200, 1)
    plain = fit(tokens, is_failure)
    probe = starts(30)
    assert torch.equal(loop.guard.risks(probe), plain.risks(probe))
    clean, failed = labelled(200, 3)
    assert loop.threshold == threshold_at_fpr(plain.risks(clean), failed, 0.2)
    assert len(loop.examples) == 0
    assert loop.round == 0


def test_rounds_keep_what_is_true_and_new_and_where_it_comes_from() -> None:
    loop = rounds()
    base, labels = loop.data
    known = {tuple(row) for row in base.tolist()}
    for number in (1, 2, 3):
        guard, threshold, before = loop.guard, loop.threshold, len(loop.examples)
        reports = loop.step()
        assert [report.adversary for report in reports] == ["substitution", "flip"]
        fresh = slice(before, None)
        found = loop.examples
        assert (found.rounds[fresh] == number).all()
        assert holds_a_high_token(found.tokens[fresh]).all()
        assert (guard.risks(found.tokens[fresh]) < threshold).all()
        for index, report in enumerate(reports):
            mine = found.adversaries[fresh] == index
            assert int(mine.sum()) == report.trained + report.held_out
            assert int((mine & found.held_out[fresh]).sum()) == report.held_out
            assert report.held_out == round(0.25 * (report.trained + report.held_out))
            assert int(report.success.sum()) == report.trained + report.held_out + report.duplicates
            assert (report.round, report.threshold, report.refused) == (number, threshold, 0)
        assert reports[0].queries.shape == (30,)
    rows = [tuple(row) for row in loop.examples.tokens.tolist()]
    assert len(rows) > 10
    assert len(set(rows)) == len(rows)
    assert not known & set(rows)
    assert sum(len(loop.examples.of(name)) for name in ("substitution", "flip")) == len(rows)
    assert len(loop.examples.of("substitution", held_out=True)) > 0
    tokens, is_failure = loop.training_set
    trained = loop.examples.of(held_out=False)
    assert torch.equal(tokens, torch.cat([base, trained, trained]))
    assert torch.equal(is_failure, torch.cat([labels, torch.ones(2 * len(trained), dtype=torch.bool)]))


def test_the_paraphraser_sees_what_was_trained_on() -> None:
    seen: list[Tensor] = []

    def record(tokens: Tensor, source: torch.Generator) -> Tensor:
        seen.append(tokens)
        return tokens

    loop = rounds()
    loop.adversaries["flip"] = paraphrase_adversary(record, holds_a_high_token)
    loop.step()
    assert not seen  # nothing to paraphrase yet
    known = loop.examples.of(held_out=False)
    report = loop.step(["flip"])[0]
    assert torch.equal(seen[0], known)
    assert report.trained + report.held_out == 0
    assert report.duplicates == int(report.success.sum())


def test_claims_are_checked() -> None:
    def liar(
        guard: Guard, failures: Tensor, earlier: Tensor, threshold: float, source: torch.Generator
    ) -> AttackResult:
        tokens = torch.cat([failures, torch.full_like(failures, 3)])
        every = torch.ones(len(tokens))
        return AttackResult(tokens, every.bool(), every.long(), every)

    loop = rounds(adversaries={"liar": liar}, failures=lambda n, source: torch.full((n, 5), 5), attacks=4)
    risks = loop.guard.risks(torch.tensor([[5] * 5, [3] * 5]))
    assert (risks < loop.threshold).tolist() == [False, True]
    report = loop.step()[0]  # four that are detected, four that are no failures
    assert report.refused == 8
    assert not report.success.any()
    assert len(loop.examples) == 0


def test_a_shift_of_all_scores_is_no_robustness() -> None:
    """The threshold is taken again after each training, at the same false-positive rate."""
    calls = itertools.count()

    def shifting(tokens: Tensor, is_failure: Tensor) -> Guard:
        shift = 64.0 * next(calls)
        return Guard(lambda e, t: score(e, t) + shift, embed)

    loop = AdversarialRounds(
        shifting,
        {
            "none": lambda guard, failures, *rest: AttackResult(
                failures[:0], TOKENS[:0] > 0, TOKENS[:0], RISK[:0]
            )
        },
        holds_a_high_token,
        data=labelled(50, 1),
        calibration=labelled(200, 3),
        failures=draw_failures,
    )
    probe = starts(200)
    accepted = []
    for _ in range(3):
        accepted.append(loop.guard.risks(probe) < loop.threshold)
        loop.step()
    assert accepted[0].any()
    assert torch.equal(accepted[0], accepted[1])
    assert torch.equal(accepted[0], accepted[2])


def test_a_run_goes_on_from_its_state(tmp_path: Path) -> None:
    whole, first, second = rounds(), rounds(), rounds(seed=99)
    for _ in range(3):
        whole.step()
    first.step()
    torch.save(first.state_dict(), tmp_path / "rounds.pt")
    second.load_state_dict(torch.load(tmp_path / "rounds.pt"))
    second.step()
    second.step()
    assert second.round == 3
    for column in ("tokens", "rounds", "adversaries", "queries", "held_out"):
        assert torch.equal(getattr(second.examples, column), getattr(whole.examples, column))
    assert second.threshold == whole.threshold
    with pytest.raises(ValueError, match="state must be of adversaries"):
        rounds(adversaries={"other": whole.adversaries["flip"]}).load_state_dict(first.state_dict())


def test_a_round_that_breaks_changes_nothing() -> None:
    whole, broken = rounds(), rounds()
    for _ in range(2):
        whole.step()
    broken.step()
    flip = broken.adversaries["flip"]

    def failing(*arguments: Any) -> AttackResult:
        raise KeyboardInterrupt

    broken.adversaries["flip"] = failing
    with pytest.raises(KeyboardInterrupt):
        broken.step()
    assert broken.round == 1
    broken.adversaries["flip"] = flip
    broken.step()
    assert torch.equal(broken.examples.tokens, whole.examples.tokens)
    assert torch.equal(broken.examples.held_out, whole.examples.held_out)


def test_rounds_of_their_own_adversary() -> None:
    loop = rounds()
    assert [report.adversary for report in loop.step(["substitution"])] == ["substitution"]
    assert [report.adversary for report in loop.step(["flip"])] == ["flip"]
    with pytest.raises(ValueError, match="names must be among substitution, flip, got people"):
        loop.step(["people"])


# ---------------------------------------------------------------------------------------------- doors


@pytest.mark.bare
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": -1}, ValueError, "budget must lie in"),
        ({"sharpness": -1.0}, ValueError, "sharpness must lie in"),
        ({"edit": "delete"}, ValueError, "edit must be 'substitute' or 'insert', got 'delete'"),
        ({"first_order": 0}, ValueError, "first_order must lie in"),
        ({"proposals": TOKENS[:0]}, ValueError, "proposals must hold at least one token"),
        ({"proposals": RISK}, TypeError, "proposals must have an integer dtype"),
        ({"proposals": "all"}, TypeError, "proposals must be tokens or a function, got str"),
        (
            {"proposals": lambda *a: a[0][:, 0], "first_order": 2},
            ValueError,
            "first_order ranks a vocabulary",
        ),
    ],
)
def test_doors_of_the_adversary(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TokenSubstitutionAdversary(**{"proposals": TOKENS, "oracle": always, **options})


@pytest.mark.bare
def test_doors_of_an_attack() -> None:
    adversary, tokens = TokenSubstitutionAdversary(TOKENS, holds_a_high_token), starts(3)
    with pytest.raises(
        ValueError, match="tokens must all be failures by the oracle, got 1 of 2 that are not"
    ):
        adversary.attack(score, embed, torch.tensor([[5], [0]]), threshold=0.0)
    with pytest.raises(ValueError, match="tokens must have shape"):
        adversary.attack(score, embed, tokens[0], threshold=0.0)
    with pytest.raises(TypeError, match="tokens must have an integer dtype"):
        adversary.attack(score, embed, tokens.double(), threshold=0.0)
    with pytest.raises(ValueError, match="seeds must have shape"):
        adversary.attack(score, embed, tokens, threshold=0.0, seeds=torch.arange(2))
    with pytest.raises(ValueError, match="threshold must be a number"):
        adversary.attack(score, embed, tokens, threshold=math.nan)
    with pytest.raises(ValueError, match=r"score\(embeddings, tokens\) must have shape"):
        adversary.attack(lambda e, t: e.sum((1, 2))[:1], embed, tokens, threshold=0.0)
    with pytest.raises(ValueError, match=r"embed\(tokens\) must have shape"):
        adversary.attack(lambda e, t: e.sum(1), lambda t: RISK[t], tokens, threshold=-99.0)
    with pytest.raises(TypeError, match=r"oracle\(tokens\) must be a boolean tensor"):
        TokenSubstitutionAdversary(TOKENS, lambda t: t[:, 0]).attack(score, embed, tokens, threshold=0.0)
    with pytest.raises(ValueError, match="must leave a position in each row"):
        TokenSubstitutionAdversary(TOKENS, always, editable=lambda t: t > 99).attack(
            score, embed, tokens, threshold=0.0
        )


@pytest.mark.bare
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fpr": 2.0}, "fpr must lie in"),
        ({"attacks": 0}, "attacks must lie in"),
        ({"repeats": 0}, "repeats must lie in"),
        ({"held_out": -0.1}, "held_out must lie in"),
        ({"adversaries": {}}, "adversaries must hold at least one"),
        ({"calibration": (TOKENS.reshape(2, 3), TOKENS[:2] > 0)}, "tokens of calibration must have shape"),
        ({"data": (TOKENS.reshape(2, 3), TOKENS[:3] > 0)}, "is_failure of data must have shape"),
    ],
)
def test_doors_of_the_rounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rounds(**options)
