"""Adversaries that search for accepted failures, and the rounds of training against what they find."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from telos.data.selection.rejection import threshold_at_fpr
from telos.losses._checks import check_bool, check_floating, check_integer, check_range, check_shape
from telos.losses._reduction import at_least_float32
from telos.losses.robust.attacks import evaluation_mode

Embed: TypeAlias = Callable[[Tensor], Tensor]
Score: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Oracle: TypeAlias = Callable[[Tensor], Tensor]
Proposals: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


class Guard(NamedTuple):
    """A classifier of failures in two steps, so that an adversary can ask for gradients at the embeddings.

    Attributes:
        score: ``score(embeddings (M, L, D), tokens (M, L))`` gives the risks (M,): logits of the failure. The tokens
            are there for masks of padding.
        embed: ``embed(tokens (M, L))`` gives the embeddings (M, L, D).
    """

    score: Score
    embed: Embed

    def risks(self, tokens: Tensor) -> Tensor:
        """The risks (M,) of tokens (M, L), without gradients, in at least float32."""
        return _risks(self.score, self.embed, tokens)


@dataclass(frozen=True)
class AttackResult:
    """What an adversary found, one row for each attack.

    Attributes:
        tokens: (N, L) the accepted failures, and whatever the other attacks ended with.
        success: (N,) whether the row is a failure whose risk lies below the threshold.
        queries: (N,) candidates that the classifier scored, until the success or until the attack was given up.
        scores: (N,) risks of ``tokens``.
        oracle_calls: how many candidates the oracle judged, over all attacks.
    """

    tokens: Tensor
    success: Tensor
    queries: Tensor
    scores: Tensor
    oracle_calls: int = 0

    @property
    def censored(self) -> Tensor:
        """(N,) the attacks that were given up, as :func:`telos.metrics.cost_to_failure` wants them."""
        return ~self.success


Adversary: TypeAlias = Callable[[Guard, Tensor, Tensor, float, torch.Generator], AttackResult]


def token_saliency(
    score: Score, embed: Embed, tokens: Integer[Tensor, "examples length"]
) -> Float[Tensor, "examples length"]:
    r"""How much each token matters to the risk: the norm of the gradient at its embedding.

    ::

        sal_j = || d score / d e_j ||_2

    Args:
        score: ``score(embeddings (M, L, D), tokens (M, L))`` gives risks (M,), each of its own row alone.
        embed: ``embed(tokens (M, L))`` gives embeddings (M, L, D).
        tokens: (N, L) sequences.

    Returns:
        (N, L). Parameter gradients are not touched.

    Raises:
        ValueError: for a wrong shape.
        TypeError: for a wrong dtype.

    Source:
        The tool of Adversarial Training for High-Stakes Reliability, arXiv 2205.01663.

    Example:
        >>> import torch
        >>> weights = torch.tensor([3.0, 0.0, -4.0])
        >>> token_saliency(lambda e, tokens: e[..., 0] @ weights, lambda tokens: tokens[..., None].float(),
        ...                torch.tensor([[5, 1, 2]]))
        tensor([[3., 0., 4.]])
    """
    return _gradients(score, embed, tokens).norm(dim=-1)


class TokenSubstitutionAdversary:
    r"""Makes failures look harmless by exchanging one token after another, guided by the classifier's gradient.

    Every row is a search of its own, and all rows are searched at once::

        repeat up to budget:  position j ~ softmax( c sal_j / max_j sal_j )
                              candidate: token j exchanged for one of the proposals
                              taken if its risk is lower and the oracle still calls it a failure
                              success as soon as the risk is below the threshold

    ``sal_j`` is :func:`token_saliency` of the sequence as it is then. A row that starts below the threshold is a success
    of 0 queries. Each scored candidate is a query; gradients, one at the start and one after each step that was taken,
    are not counted. The oracle judges the starts and the candidates of lower risk, nothing else.

    Each row draws from a seed of its own, so that a row's search does not depend on the rest of the batch: attacks may be
    split over batches and ranks.

    RECONSTRUCTED: the paper's tool shows saliencies and ranked candidates to a person, who picks. This search replaces
    the person; its defaults are this library's.

    Args:
        proposals: the tokens (V,) that candidates are drawn from uniformly, or
            ``proposals(tokens (M, L), positions (M,), uniform (M,))``, which gives tokens (M,): a language model, say.
            Its randomness should come from the numbers ``uniform`` in [0, 1), one for each row.
        oracle: ``oracle(tokens (M, L))`` says which are failures, boolean (M,): a rule, a stronger model, a label.
        budget: most queries for one row, at least 0.
        use_saliency: draw positions by saliency; if not, uniformly.
        sharpness: c, at least 0; the larger, the more a search keeps to the most salient token.
        first_order: draw candidates from this many proposals, those which lower the risk most by the first-order
            estimate ``<grad_j, e_v>``; ``None`` for all alike. It needs proposals that are tokens.
        editable: ``editable(tokens (N, L))`` says which positions of the starts may change, boolean (N, L), at least one
            in each row; all if not given. Keep padding and prompts out with it.
        edit: ``"substitute"`` exchanges token j; ``"insert"`` puts the candidate before it and drops the last token.
        progress: called after each query with the number of queries so far and of rows still searched.

    Raises:
        ValueError: for an option out of range, or an empty vocabulary.
        TypeError: for proposals that are neither tokens nor a function.

    Source:
        Adversarial Training for High-Stakes Reliability, arXiv 2205.01663.

    Example:
        >>> import torch
        >>> risk = torch.tensor([-1.0, 0.0, 2.0, 1.0])  # of each token; a failure holds token 2 or token 3
        >>> adversary = TokenSubstitutionAdversary(torch.arange(4), lambda tokens: (tokens >= 2).any(1), budget=100)
        >>> found = adversary.attack(
        ...     lambda e, tokens: e.sum((1, 2)), lambda tokens: risk[tokens].unsqueeze(-1),
        ...     torch.tensor([[2, 2, 2], [0, 0, 3]]), threshold=0.0, generator=torch.Generator().manual_seed(0),
        ... )
        >>> found.success, found.queries[1], found.tokens[1]
        (tensor([True, True]), tensor(0), tensor([0, 0, 3]))
    """

    def __init__(
        self,
        proposals: Tensor | Proposals,
        oracle: Oracle,
        budget: int = 300,
        use_saliency: bool = True,
        *,
        sharpness: float = 2.0,
        first_order: int | None = None,
        editable: Callable[[Tensor], Tensor] | None = None,
        edit: str = "substitute",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        check_range("budget", budget, 0, math.inf)
        check_range("sharpness", sharpness, 0.0, math.inf)
        if edit not in ("substitute", "insert"):
            raise ValueError(f"edit must be 'substitute' or 'insert', got {edit!r}")
        if isinstance(proposals, Tensor):
            check_integer("proposals", proposals)
            check_shape("proposals", proposals, ("V",))
            if not len(proposals):
                raise ValueError("proposals must hold at least one token, got none")
        elif not callable(proposals):
            raise TypeError(f"proposals must be tokens or a function, got {type(proposals).__name__}")
        if first_order is not None:
            check_range("first_order", first_order, 1, math.inf)
            if not isinstance(proposals, Tensor):
                raise ValueError(
                    "first_order ranks a vocabulary, so proposals must be tokens, got a function"
                )
        self.proposals, self.oracle, self.budget = proposals, oracle, budget
        self.use_saliency, self.sharpness = use_saliency, sharpness
        self.first_order, self.editable, self.edit, self.progress = first_order, editable, edit, progress

    def __call__(
        self, guard: Guard, failures: Tensor, earlier: Tensor, threshold: float, generator: torch.Generator
    ) -> AttackResult:
        """Attack the fresh failures of a round; see :class:`AdversarialRounds`."""
        return self.attack(guard.score, guard.embed, failures, threshold=threshold, generator=generator)

    def attack(
        self,
        score: Score,
        embed: Embed,
        tokens: Integer[Tensor, "examples length"],
        *,
        threshold: float,
        seeds: Integer[Tensor, " examples"] | None = None,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Search from each of some failures for one that the classifier accepts.

        Modules among ``score`` and ``embed`` are searched in evaluation mode; of closures that is up to you.

        Args:
            score: ``score(embeddings (M, L, D), tokens (M, L))`` gives the risks (M,), logits of the failure, each of
                its own row alone.
            embed: ``embed(tokens (M, L))`` gives the embeddings (M, L, D).
            tokens: (N, L) the starts, all of them failures.
            threshold: risks strictly below it are accepted.
            seeds: (N,) int64, the seed of each row's search; drawn from ``generator`` if not given.
            generator: source of the seeds.

        Returns:
            What each search ended with. Every success is a failure by the oracle, with a risk below the threshold.

        Raises:
            ValueError: for a wrong shape, a start that is no failure or a row without editable position.
            TypeError: for a wrong dtype.
        """
        check_integer("tokens", tokens)
        check_shape("tokens", tokens, ("N", "L"))
        if math.isnan(threshold):
            raise ValueError("threshold must be a number, got nan")
        editable = (
            torch.ones_like(tokens, dtype=torch.bool) if self.editable is None else self.editable(tokens)
        )
        check_bool("editable(tokens)", editable)
        check_shape("editable(tokens)", editable, tuple(tokens.shape))
        if not editable.any(1).all():
            raise ValueError("editable(tokens) must leave a position in each row, got a row without")
        if seeds is None:
            device = tokens.device if generator is None else generator.device
            seeds = torch.randint(
                -(2**63), 2**63 - 1, tokens.shape[:1], generator=generator, device=device, dtype=torch.long
            )
        check_integer("seeds", seeds)
        check_shape("seeds", seeds, tuple(tokens.shape[:1]))
        if not (given := _judged(self.oracle, tokens)).all():
            raise ValueError(
                f"tokens must all be failures by the oracle, got {int((~given).sum())} of {len(given)} that are not"
            )
        return self._search(score, embed, tokens, threshold, editable, seeds.to(tokens.device).long())

    def _search(
        self, score: Score, embed: Embed, start: Tensor, threshold: float, editable: Tensor, seeds: Tensor
    ) -> AttackResult:
        tokens, oracle_calls = start.clone(), len(start)
        # a NaN is as far from the threshold as can be
        scores = _risks(score, embed, tokens).nan_to_num(torch.inf, torch.inf, -torch.inf)
        queries = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        guided = self.use_saliency or self.first_order is not None
        rows = (~(scores < threshold)).nonzero().squeeze(1)
        guide = scores.new_zeros(*tokens.shape, 1)
        if guided and len(rows):
            first = self._guide(score, embed, tokens[rows])
            guide = first.new_zeros(*tokens.shape, first.shape[-1])
            guide[rows] = first
        vocabulary = self._embedded_vocabulary(embed, tokens) if len(rows) else None
        for query in range(self.budget):
            if not len(rows):
                break
            position = self._positions(guide[rows], editable[rows], _uniform(seeds[rows], 2 * query))
            proposed = self._proposed(
                tokens[rows], position, guide[rows], vocabulary, _uniform(seeds[rows], 2 * query + 1)
            )
            candidates = _edited(tokens[rows], position, proposed, self.edit)
            risk = _risks(score, embed, candidates)
            queries[rows] += 1
            lower = (risk < scores[rows]).nonzero().squeeze(1)  # never a NaN
            if len(lower):
                oracle_calls += len(lower)
                taken = lower[_judged(self.oracle, candidates[lower])]
                tokens[rows[taken]], scores[rows[taken]] = candidates[taken], risk[taken]
                moved = rows[taken[~(risk[taken] < threshold)]]
                if guided and len(moved):
                    guide[moved] = self._guide(score, embed, tokens[moved])
                rows = rows[~(scores[rows] < threshold)]
            if self.progress is not None:
                self.progress(query + 1, len(rows))
        return AttackResult(tokens, scores < threshold, queries, scores, oracle_calls)

    def _guide(self, score: Score, embed: Embed, tokens: Tensor) -> Tensor:
        """Gradients (M, L, D); where only their sizes matter, those (M, L, 1)."""
        gradients = _gradients(score, embed, tokens)
        return gradients if self.first_order is not None else gradients.norm(dim=-1, keepdim=True)

    def _positions(self, guide: Tensor, editable: Tensor, uniform: Tensor) -> Tensor:
        """A position (M,) for each row, by saliency or uniformly."""
        if not self.use_saliency:
            return _drawn(editable, uniform)
        saliency = guide.double().norm(dim=-1).nan_to_num(0.0).masked_fill(~editable, 0.0)
        largest = saliency.amax(1, keepdim=True)
        relative = saliency / torch.where(largest > 0, largest, 1.0)
        return _drawn((self.sharpness * (relative - 1)).exp() * editable, uniform)

    def _embedded_vocabulary(self, embed: Embed, tokens: Tensor) -> Tensor | None:
        if self.first_order is None or not isinstance(self.proposals, Tensor):
            return None
        with torch.no_grad():
            return at_least_float32(embed(self.proposals.to(tokens).unsqueeze(0))[0])

    def _proposed(
        self, tokens: Tensor, position: Tensor, guide: Tensor, vocabulary: Tensor | None, uniform: Tensor
    ) -> Tensor:
        """The token (M,) that each row tries at its position."""
        if not isinstance(self.proposals, Tensor):
            proposed = self.proposals(tokens, position, uniform)
            check_integer("proposals(...)", proposed)
            check_shape("proposals(...)", proposed, (len(tokens),))
            return proposed.to(tokens)
        choices = self.proposals.to(tokens)
        if vocabulary is None or self.first_order is None:
            return choices[(uniform * len(choices)).long()]
        here = guide[torch.arange(len(tokens), device=tokens.device), position]
        best = (here @ vocabulary.T).topk(min(self.first_order, len(choices)), largest=False).indices
        pick = (uniform * best.shape[1]).long().unsqueeze(1)
        return choices[best.gather(1, pick).squeeze(1)]


def paraphrase_adversary(
    paraphrase: Callable[[Tensor, torch.Generator], Tensor], oracle: Oracle
) -> Adversary:
    """An adversary that says earlier successes in other words.

    It turns the adversarial examples that were trained on so far (not those held out) into paraphrases, and succeeds with
    those that are still failures and are accepted. Each paraphrase is an attack of one query.

    Args:
        paraphrase: ``paraphrase(tokens (M, L), generator)`` gives paraphrases (K, L), any number of them.
        oracle: says which tokens (M, L) are failures, boolean (M,).

    Returns:
        An adversary for :class:`AdversarialRounds`.

    Source:
        Adversarial Training for High-Stakes Reliability, arXiv 2205.01663.

    Example:
        >>> import torch
        >>> adversary = paraphrase_adversary(lambda tokens, generator: tokens.flip(1), lambda tokens: tokens[:, 0] == 1)
        >>> guard = Guard(lambda e, tokens: e[:, 0, 0], lambda tokens: tokens.unsqueeze(-1).float())
        >>> earlier = torch.tensor([[0, 1], [1, 0]])
        >>> adversary(guard, earlier[:0], earlier, 2.0, torch.Generator()).success
        tensor([ True, False])
    """

    def adversary(
        guard: Guard, failures: Tensor, earlier: Tensor, threshold: float, generator: torch.Generator
    ) -> AttackResult:
        tokens = paraphrase(earlier, generator) if len(earlier) else earlier
        check_shape("paraphrase(...)", tokens, ("K", earlier.shape[1]))
        scores = guard.risks(tokens) if len(tokens) else torch.zeros(0, device=tokens.device)
        success = scores < threshold
        below = success.nonzero().squeeze(1)
        if len(below):
            success[below] = _judged(oracle, tokens[below])
        one_each = torch.ones(len(tokens), dtype=torch.long, device=tokens.device)
        return AttackResult(tokens, success, one_each, scores, len(below))

    return adversary


def first_occurrences(
    tokens: Integer[Tensor, "examples length"], seen: Integer[Tensor, "others length"] | None = None
) -> Bool[Tensor, " examples"]:
    """Which sequences occur for the first time, so that the same attack is not counted twice.

    Args:
        tokens: (N, L) sequences.
        seen: (M, L) sequences that came before them.

    Returns:
        (N,) True for those that are neither among ``seen`` nor earlier in ``tokens``.

    Raises:
        ValueError: for a wrong shape.
        TypeError: for a wrong dtype.

    Example:
        >>> import torch
        >>> first_occurrences(torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6]]), torch.tensor([[5, 6]]))
        tensor([ True,  True, False, False])
    """
    check_integer("tokens", tokens)
    check_shape("tokens", tokens, ("N", "L"))
    seen = tokens[:0] if seen is None else seen
    check_integer("seen", seen)
    check_shape("seen", seen, ("M", tokens.shape[1]))
    if not len(tokens):
        return torch.zeros(0, dtype=torch.bool, device=tokens.device)
    every = torch.cat([seen.to(tokens), tokens])
    same = torch.unique(every, dim=0, return_inverse=True)[1]
    index = torch.arange(len(every), device=tokens.device)
    first = torch.full_like(index, len(every)).scatter_reduce(0, same, index, "amin")
    return (first[same] == index)[len(seen) :]


@dataclass(frozen=True)
class AdversarialExamples:
    """Accepted failures that adversaries found, and where each one comes from.

    Attributes:
        tokens: (A, L) distinct sequences, all of them failures.
        rounds: (A,) the round that found it, from 1.
        adversaries: (A,) who found it, as an index into ``names``.
        queries: (A,) what it cost.
        held_out: (A,) whether it is kept from training, to measure with.
        names: the adversaries.
    """

    tokens: Tensor
    rounds: Tensor
    adversaries: Tensor
    queries: Tensor
    held_out: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, name: str | None = None, *, held_out: bool | None = None) -> Tensor:
        """Tokens (K, L) by one adversary, for training or held out; all of them by default.

        The false-negative rate on an adversary's held-out examples is a :class:`telos.metrics.FailureRate` updated with
        ``guard.risks(examples.of(name, held_out=True)) < threshold``.
        """
        chosen = torch.ones_like(self.held_out)
        if name is not None:
            chosen &= self.adversaries == self.names.index(name)
        if held_out is not None:
            chosen &= self.held_out == held_out
        return self.tokens[chosen]


@dataclass(frozen=True)
class RoundReport:
    """What one adversary did in one round.

    Attributes:
        round: the round, from 1.
        adversary: its name.
        threshold: risks below it were accepted.
        queries: (N,) queries of each attack.
        success: (N,) which attacks succeeded, as the classifier and the oracle confirmed.
        refused: successes that the adversary claimed and that were none.
        duplicates: successes that were known already.
        trained: examples that were added to the training set.
        held_out: examples that were kept from it.
    """

    round: int
    adversary: str
    threshold: float
    queries: Tensor
    success: Tensor
    refused: int
    duplicates: int
    trained: int
    held_out: int


class AdversarialRounds:
    r"""A classifier of failures, hardened in rounds by what its adversaries find.

    ::

        train on the data;  threshold at the given false-positive rate on clean examples
        in each round:  every adversary attacks the classifier
                        its distinct, confirmed successes join the data, ``repeats`` times; a share is held out
                        train again from scratch on all of it;  threshold again, at the same rate

    :meth:`step` is one round. ``guard`` and ``threshold`` are those of the data so far; before the first round that is
    the plain classifier. An adversary is any ``adversary(guard, failures, earlier, threshold, generator)`` that gives an
    :class:`AttackResult`: ``failures`` are fresh ones, ``earlier`` the adversarial examples that were trained on so far.
    A person or a service may stand behind it; what it claims is checked.

    A round draws from a generator that the seed and its number fix, and changes nothing before it is complete: save
    :meth:`state_dict` after each one, and a run that was interrupted goes on as if it had not been.

    RECONSTRUCTED: the order of the rounds follows a figure of the paper, where each round has an adversary of its own:
    people, paraphrases, people with a tool (``step(["people"])`` and so on). Sizes and defaults are this library's.

    Args:
        fit: ``fit(tokens (N, L), is_failure (N,))`` trains a classifier from scratch. Let it be a function of its
            arguments alone.
        adversaries: by name, in the order in which they act.
        oracle: ``oracle(tokens (M, L))`` says which are failures, boolean (M,).
        data: the training set: tokens (N, L) and whether each is a failure (N,).
        calibration: clean examples of the same form for the threshold. Neither training nor an adversary may see them.
        failures: ``failures(n, generator)`` draws fresh failures (n, L).
        fpr: false-positive rate of the threshold; see :func:`~telos.data.selection.threshold_at_fpr`.
        attacks: fresh failures for each adversary and round.
        repeats: how often a success is put into the training set.
        held_out: share of the successes of each adversary and round that is kept from training, in [0, 1].
        seed: of all rounds.

    Raises:
        ValueError: for an option out of range, no adversary, or a wrong shape.
        TypeError: for a wrong dtype.

    Source:
        Adversarial Training for High-Stakes Reliability, arXiv 2205.01663.

    Example:
        >>> import torch
        >>> def fit(tokens, is_failure):  # how much more often a token is seen in failures
        ...     counts = torch.stack([torch.bincount(tokens[is_failure == f].flatten(), minlength=4) for f in (0, 1)])
        ...     risk = (counts[1] + 1.0).log() - (counts[0] + 1.0).log()
        ...     return Guard(lambda e, tokens: e.sum((1, 2)), lambda tokens: risk[tokens].unsqueeze(-1))
        >>> def oracle(tokens):
        ...     return (tokens == 3).any(1)
        >>> def failures(n, generator):
        ...     return torch.cat([torch.full((n, 1), 3), torch.randint(4, (n, 2), generator=generator)], 1)
        >>> tokens = torch.randint(4, (200, 3), generator=torch.Generator().manual_seed(0))
        >>> data, clean = (tokens[:100], oracle(tokens[:100])), (tokens[100:], oracle(tokens[100:]))
        >>> rounds = AdversarialRounds(
        ...     fit, {"tokens": TokenSubstitutionAdversary(torch.arange(4), oracle, 20)}, oracle,
        ...     data=data, calibration=clean, failures=failures, attacks=20,
        ... )
        >>> report = rounds.step()[0]
        >>> report.round, report.trained + report.held_out == len(rounds.examples)
        (1, True)
    """

    def __init__(
        self,
        fit: Callable[[Tensor, Tensor], Guard],
        adversaries: Mapping[str, Adversary],
        oracle: Oracle,
        *,
        data: tuple[Tensor, Tensor],
        calibration: tuple[Tensor, Tensor],
        failures: Callable[[int, torch.Generator], Tensor],
        fpr: float = 0.2,
        attacks: int = 400,
        repeats: int = 2,
        held_out: float = 0.1,
        seed: int = 0,
    ) -> None:
        check_range("fpr", fpr, 0.0, 1.0)
        check_range("attacks", attacks, 1, math.inf)
        check_range("repeats", repeats, 1, math.inf)
        check_range("held_out", held_out, 0.0, 1.0)
        if not adversaries:
            raise ValueError("adversaries must hold at least one, got none")
        for name, (tokens, is_failure) in (("data", data), ("calibration", calibration)):
            check_integer(f"tokens of {name}", tokens)
            check_shape(f"tokens of {name}", tokens, ("N", data[0].shape[1]))
            check_bool(f"is_failure of {name}", is_failure)
            check_shape(f"is_failure of {name}", is_failure, (len(tokens),))
        self.fit, self.adversaries, self.oracle = fit, dict(adversaries), oracle
        self.data, self.calibration, self.failures = data, calibration, failures
        self.fpr, self.attacks, self.repeats, self.held_out = fpr, attacks, repeats, held_out
        self.seed, self.round = seed, 0
        nothing = torch.zeros(0, dtype=torch.long, device=data[0].device)
        self.examples = AdversarialExamples(
            data[0][:0], nothing, nothing, nothing, nothing.bool(), tuple(self.adversaries)
        )
        self._trained: tuple[Guard, float] | None = None

    @property
    def training_set(self) -> tuple[Tensor, Tensor]:
        """The data (N, L) and its labels (N,) with all successes so far but those held out."""
        tokens, is_failure = self.data
        found = self.examples.of(held_out=False).repeat(self.repeats, 1)
        if not len(found):
            return tokens, is_failure
        return torch.cat([tokens, found]), torch.cat([is_failure, is_failure.new_ones(len(found))])

    @property
    def guard(self) -> Guard:
        """The classifier of the training set; trained when it is first asked for."""
        return self._train()[0]

    @property
    def threshold(self) -> float:
        """Its threshold at the false-positive rate."""
        return self._train()[1]

    def step(self, names: Iterable[str] | None = None) -> list[RoundReport]:
        """One round.

        Args:
            names: the adversaries that act in it, in this order; all of them if not given.

        Returns:
            What each of them did. The classifier is trained again when it is next asked for.

        Raises:
            ValueError: for an unknown adversary, or a result of a wrong shape.
        """
        acting = list(self.adversaries if names is None else names)
        if unknown := [name for name in acting if name not in self.adversaries]:
            raise ValueError(f"names must be among {', '.join(self.adversaries)}, got {', '.join(unknown)}")
        guard, threshold = self._train()
        generator = torch.Generator().manual_seed(_mixed(self.seed, self.round))
        number, found, reports = self.round + 1, self.examples, []
        for name in acting:
            fresh = self.failures(self.attacks, generator)
            result = self.adversaries[name](
                guard, fresh, self.examples.of(held_out=False), threshold, generator
            )
            found, report = self._added(found, result, name, number, guard, threshold, generator)
            reports.append(report)
        self.examples, self.round, self._trained = found, number, None
        return reports

    def state_dict(self) -> dict[str, Any]:
        """The rounds so far, for ``torch.save``; the classifier is trained again from them."""
        found = self.examples
        return {
            "round": self.round,
            "seed": self.seed,
            "names": list(found.names),
            "tokens": found.tokens,
            "rounds": found.rounds,
            "adversaries": found.adversaries,
            "queries": found.queries,
            "held_out": found.held_out,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run with the same arguments was.

        Raises:
            ValueError: if the state is of other adversaries.
        """
        if tuple(state["names"]) != self.examples.names:
            raise ValueError(
                f"state must be of adversaries {list(self.examples.names)}, got {state['names']}"
            )
        device = self.data[0].device
        columns = ("tokens", "rounds", "adversaries", "queries", "held_out")
        self.examples = AdversarialExamples(
            **{column: state[column].to(device) for column in columns}, names=self.examples.names
        )
        self.round, self.seed, self._trained = state["round"], state["seed"], None

    def _train(self) -> tuple[Guard, float]:
        if self._trained is None:
            guard = self.fit(*self.training_set)
            tokens, is_failure = self.calibration
            self._trained = guard, threshold_at_fpr(guard.risks(tokens), is_failure, self.fpr)
        return self._trained

    def _added(
        self,
        found: AdversarialExamples,
        result: AttackResult,
        name: str,
        number: int,
        guard: Guard,
        threshold: float,
        generator: torch.Generator,
    ) -> tuple[AdversarialExamples, RoundReport]:
        """The examples with what an adversary brought in, as far as it is true and new."""
        tokens = result.tokens.to(found.tokens)
        check_shape("tokens of an adversary", tokens, ("N", found.tokens.shape[1]))
        claimed = result.success.to(tokens.device).nonzero().squeeze(1)
        if len(claimed):
            accepted = guard.risks(tokens[claimed]) < threshold
            confirmed = claimed[accepted & _judged(self.oracle, tokens[claimed])]
        else:
            confirmed = claimed
        success = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        success[confirmed] = True
        new = confirmed[
            first_occurrences(tokens[confirmed], torch.cat([self.data[0].to(tokens), found.tokens]))
        ]
        kept_back = torch.zeros(len(new), dtype=torch.bool)
        kept_back[torch.randperm(len(new), generator=generator)[: round(self.held_out * len(new))]] = True
        queries = result.queries.to(found.queries)
        joined = AdversarialExamples(
            tokens=torch.cat([found.tokens, tokens[new]]),
            rounds=torch.cat([found.rounds, torch.full_like(new, number)]),
            adversaries=torch.cat([found.adversaries, torch.full_like(new, found.names.index(name))]),
            queries=torch.cat([found.queries, queries[new]]),
            held_out=torch.cat([found.held_out, kept_back.to(found.held_out.device)]),
            names=found.names,
        )
        report = RoundReport(
            round=number,
            adversary=name,
            threshold=threshold,
            queries=queries,
            success=success,
            refused=len(claimed) - len(confirmed),
            duplicates=len(confirmed) - len(new),
            trained=len(new) - int(kept_back.sum()),
            held_out=int(kept_back.sum()),
        )
        return joined, report


# ---------------------------------------------------------------------------------------------- pieces


def _risks(score: Score, embed: Embed, tokens: Tensor) -> Tensor:
    with evaluation_mode(score, embed), torch.no_grad():
        risk = score(embed(tokens), tokens)
    _check_risks(risk, tokens)
    return at_least_float32(risk)


def _gradients(score: Score, embed: Embed, tokens: Tensor) -> Tensor:
    """Gradients (M, L, D) of the risks at the embeddings."""
    check_integer("tokens", tokens)
    check_shape("tokens", tokens, ("N", "L"))
    with evaluation_mode(score, embed), torch.enable_grad():
        embeddings = embed(tokens).detach()
        check_floating("embed(tokens)", embeddings)
        check_shape("embed(tokens)", embeddings, (*tokens.shape, "D"))
        risk = score(embeddings.requires_grad_(), tokens)
        _check_risks(risk, tokens)
        (gradient,) = torch.autograd.grad(risk.sum(), embeddings)
    return at_least_float32(gradient)


def _check_risks(risk: Tensor, tokens: Tensor) -> None:
    check_floating("score(embeddings, tokens)", risk)
    check_shape("score(embeddings, tokens)", risk, (len(tokens),))


def _judged(oracle: Oracle, tokens: Tensor) -> Tensor:
    failed = oracle(tokens)
    check_bool("oracle(tokens)", failed)
    check_shape("oracle(tokens)", failed, (len(tokens),))
    return failed.to(tokens.device)


def _edited(tokens: Tensor, position: Tensor, proposed: Tensor, edit: str) -> Tensor:
    index = torch.arange(tokens.shape[1], device=tokens.device)
    at = position.unsqueeze(1)
    if edit == "insert":  # everything from the position on moves by one
        tokens = torch.where(index > at, tokens.roll(1, 1), tokens)
    return torch.where(index == at, proposed.unsqueeze(1), tokens)


def _drawn(weights: Tensor, uniform: Tensor) -> Tensor:
    """An index (M,) for each row of weights (M, K), by inversion of their cumulative sum."""
    cumulative = weights.double().cumsum(1)
    total = cumulative[:, -1:]
    # in float64 a number below 1 times the total stays below the total: a weight of 0 is never drawn
    return torch.searchsorted(cumulative, uniform.unsqueeze(1) * total, right=True).squeeze(1)


_WORD = 2**64


def _signed(word: int) -> int:
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word


_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _uniform(seeds: Tensor, counter: int) -> Tensor:
    """A number in [0, 1) for each seed (M,): the output number ``counter`` of the SplitMix64 generator with that seed.

    A generator of torch gives its numbers to whichever rows are still searched; here each row has its own.
    """
    word = seeds + _signed(_GOLDEN * (counter + 1))
    word = (word ^ _shifted(word, 30)) * _FIRST
    word = (word ^ _shifted(word, 27)) * _SECOND
    word = word ^ _shifted(word, 31)
    return _shifted(word, 11).double() * 2.0**-53


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's keeps the sign."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(seed: int, number: int) -> int:
    """A seed of its own for each round, which neighbouring seeds do not share."""
    word = torch.tensor([_signed(seed)])
    return int(_uniform(word, number).item() * 2**53)
