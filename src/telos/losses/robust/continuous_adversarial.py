"""Safety training of language models against small perturbations of the prompt's embeddings (CAT and CAPO)."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from telos.losses._algebra import Loss
from telos.losses._checks import (
    check_floating,
    check_integer,
    check_label_values,
    check_range,
    check_shape,
)
from telos.losses._links import logistic
from telos.losses._logps import Cutoff, sequence_logps
from telos.losses._reduction import (
    Denominator,
    Reduction,
    at_least_float32,
    check_reduction,
    classification_rows,
    reduce,
)
from telos.losses._space import log_uniform, uniform
from telos.losses.classification.cross_entropy import cross_entropy_loss
from telos.losses.preference.dpo import ipo_loss
from telos.losses.robust.attacks import _project, _unit, evaluation_mode

AttackRule: TypeAlias = Literal["sign", "l2", "adam"]
AwayTerm: TypeAlias = Literal["cross_entropy", "log_one_minus_p"]
Batch: TypeAlias = Mapping[str, Any]

_IGNORED = -100


def relative_eps(embedding_weight: Float[Tensor, "tokens dim"], eps_rel: float = 0.05) -> float:
    """The radius of an embedding attack as a share of the mean length of an embedding.

    ::

        eps = eps_rel * mean_v ||e_v||_2

    Args:
        embedding_weight: (V, D) embeddings of all tokens.
        eps_rel: the share, at least 0.

    Returns:
        The radius in the unit of the embeddings.

    Raises:
        ValueError: for a wrong shape or a negative share.
        TypeError: if the embeddings are not floating point.

    Source:
        Efficient Adversarial Training in LLMs with Continuous Attacks, arXiv 2405.15589.

    Example:
        >>> import torch
        >>> relative_eps(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 0.5)
        1.5
    """
    check_floating("embedding_weight", embedding_weight)
    check_shape("embedding_weight", embedding_weight, ("V", "D"))
    check_range("eps_rel", eps_rel, 0.0, float("inf"))
    # summed in float32, without a copy of the matrix in it
    dtype = torch.float64 if embedding_weight.dtype == torch.float64 else torch.float32
    return eps_rel * torch.linalg.vector_norm(embedding_weight.detach(), dim=1, dtype=dtype).mean().item()


def embedding_attack(
    loss_fn: Callable[[Tensor], Tensor],
    embeds: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | Integer[Tensor, "batch tokens"],
    *,
    eps: float,
    step_size: float | None = 1e-4,
    steps: int = 10,
    rule: AttackRule = "sign",
) -> Tensor:
    r"""A perturbation of embeddings, in an l-2 ball around every token, that makes a loss small.

    ::

        delta_0 = 0
        delta  <- delta - step_size * direction        direction of the gradient g of the loss, by the rule:
                                                       sign(g),   g_t / ||g_t||_2 (per token),   Adam's step
        delta_t <- delta_t * eps / max(||delta_t||_2, eps)            for every token t

    and the last iterate is the result. (:func:`telos.losses.pgd_attack` has one ball for an example, and steps
    that go with its norm.) A sign step has length ``step_size * sqrt(D)``, so that ``steps`` of them can reach
    the edge of the ball if ``steps * step_size * sqrt(D) >= eps``. The perturbation is float32 (or float64) also
    where the embeddings are in half precision, and is added before rounding to their dtype.

    Args:
        loss_fn: embeddings (N, T, D) to a scalar, which is minimised. Let it add up over examples and the result
            for one does not depend on the others.
        embeds: (N, T, D).
        mask: (N, T), nonzero at the tokens that may move.
        eps: radius of the ball of a token, at least 0, in the unit of ``embeds``; see :func:`relative_eps`.
        step_size: length of a step (in every coordinate for ``"sign"`` and ``"adam"``), at least 0. The default
            suits embeddings of a few thousand dimensions and length about 1; ``None`` takes steps of which
            ``steps`` could cover 2.5 radii, as :func:`telos.losses.pgd_attack` does.
        steps: number of steps, at least 0.
        rule: ``"sign"`` (the paper), ``"adam"`` (an option of the authors' code; betas 0.9 and 0.999) or ``"l2"``
            (RECONSTRUCTED).

    Returns:
        The perturbation (N, T, D), detached; exactly 0 where ``mask`` is. Parameter gradients are not touched.

    Raises:
        ValueError: for a wrong shape, a parameter out of range or an unknown rule.
        TypeError: for a wrong dtype.

    Source:
        Efficient Adversarial Training in LLMs with Continuous Attacks, arXiv 2405.15589.

    Example:
        >>> import torch
        >>> embeds, slope = torch.zeros(1, 2, 2), torch.tensor([3.0, -4.0])
        >>> mask = torch.tensor([[1, 0]])
        >>> embedding_attack(lambda x: (x @ slope).sum(), embeds, mask, eps=1.0, step_size=0.1, steps=2)
        tensor([[[-0.2000,  0.2000],
                 [ 0.0000,  0.0000]]])
        >>> embedding_attack(lambda x: (x @ slope).sum(), embeds, mask, eps=1.0, step_size=1.0, rule="l2")
        tensor([[[-0.6000,  0.8000],
                 [ 0.0000,  0.0000]]])
    """
    _check_attack(eps, step_size, steps, rule)
    check_floating("embeds", embeds)
    check_shape("embeds", embeds, ("N", "T", "D"))
    check_shape("mask", mask, tuple(embeds.shape[:2]))
    if step_size is None:
        step_size = 2.5 * eps / max(steps, 1) / (1.0 if rule == "l2" else math.sqrt(embeds.shape[-1]))
    moves = (mask != 0).unsqueeze(-1)
    centre = at_least_float32(embeds.detach())
    delta = torch.zeros_like(centre)
    adam = torch.optim.Adam([delta], lr=step_size) if rule == "adam" and steps else None
    for _ in range(steps):
        leaf = delta.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss_fn((centre + leaf).to(embeds.dtype)), leaf)
        gradient = torch.where(moves, gradient, 0.0)
        if adam is not None:
            delta.grad = gradient
            adam.step()
        elif rule == "sign":
            delta = delta - step_size * gradient.sign()
        else:
            delta = delta - step_size * _per_token(_unit, gradient)
        # in place, since Adam keeps its moments with the tensor
        delta.copy_(_per_token(lambda shift: _project(shift, eps, "l2"), delta))
    return delta.detach()


def _per_token(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    # what attacks.py does per example, for every token as an example of its own
    return function(tensor.flatten(0, 1)).reshape(tensor.shape)


def toward_away_loss(
    ce_safe: Float[Tensor, "*batch"],
    ce_harm: Float[Tensor, "*batch"],
    ce_utility: Float[Tensor, "*utility"] | None = None,
    *,
    toward_weight: float = 0.5,
    away_weight: float = 0.5,
    utility_weight: float = 1.0,
    toward_cutoff: float = 0.5,
    away_cutoff: float = -5.0,
    leak: float = 1e-3,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The head of CAT: towards the safe answers, away from the harmful ones, and on with useful ones.

    With cross-entropies (means over tokens) of the safe, harmful and useful answers::

        loss = toward_weight * cut(ce_safe, toward_cutoff) + away_weight * cut(-ce_harm, away_cutoff)
               + utility_weight * ce_utility
        cut(x, c) = x  if x >= c  else  c + leak * x

    Both terms stop to matter, but for the leak, where they are low enough: without the cut the away term has no
    lower bound. The value jumps by ``leak * c`` at a cut. The authors pass the means over a batch, which are then
    cut as such; means of examples, (N,), are cut each on its own.

    Args:
        ce_safe: cross-entropy of the safe answer in nats, () or (N,).
        ce_harm: that of the harmful answer, of the same shape.
        ce_utility: that of useful answers, a scalar or of the same shape; ``None`` for none.
        toward_weight: weight of the safe answers.
        away_weight: weight of the harmful answers.
        utility_weight: weight of the useful answers.
        toward_cutoff: cross-entropy below which a safe answer is safe enough.
        away_cutoff: log-probability (mean over tokens) below which a harmful answer is unlikely enough.
        leak: slope below a cut-off.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the entries.

    Returns:
        The loss in nats: a scalar, or the shape of ``ce_safe`` with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Efficient Adversarial Training in LLMs with Continuous Attacks, arXiv 2405.15589; the cut is that of the
        authors' code.

    Example:
        >>> import torch
        >>> toward_away_loss(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(3.0))
        tensor(3.5000)
        >>> toward_away_loss(torch.tensor(0.2), torch.tensor(8.0))  # both are beyond their cut-off
        tensor(-2.2539)
    """
    check_reduction(reduction)
    check_floating("ce_safe", ce_safe)
    check_floating("ce_harm", ce_harm)
    check_shape("ce_harm", ce_harm, tuple(ce_safe.shape))
    toward = _cut(at_least_float32(ce_safe), toward_cutoff, leak)
    away = _cut(-at_least_float32(ce_harm), away_cutoff, leak)
    values = toward_weight * toward + away_weight * away
    if ce_utility is not None:
        check_floating("ce_utility", ce_utility)
        if ce_utility.ndim:
            check_shape("ce_utility", ce_utility, tuple(ce_safe.shape))
        values = values + utility_weight * at_least_float32(ce_utility)
    return reduce(values, torch.ones_like(values), reduction)


def _cut(values: Tensor, cutoff: float, leak: float) -> Tensor:
    # asked this way round, so that a NaN stays one
    return torch.where(values < cutoff, cutoff + leak * values, values)


def log_one_minus_p_loss(
    logits: Float[Tensor, "batch tokens classes"],
    labels: Integer[Tensor, "batch tokens"],
    *,
    threshold: float = -5.0,
    sample_weight: Float[Tensor, "batch tokens"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: Denominator = None,
) -> Tensor:
    r"""Unlikelihood of tokens: ``-log(1 - p(y))``, for those that are not unlikely yet.

    ::

        l_t = -log(1 - p_t)   if log p_t >= threshold   else 0,      p_t = softmax(logits_t)[y_t]

    With the margin ``m = logits_y - logsumexp(logits of the others)`` this is ``log(1 + exp(m))``, exact for p
    near 0 and near 1. Tokens below the threshold stay in the divisor of the mean.

    Args:
        logits: (N, T, C); ``logits[:, t]`` predicts ``labels[:, t]``.
        labels: (N, T) tokens in [0, C) that are not wanted.
        threshold: log-probability in nats below which a token is unlikely enough.
        sample_weight: (N, T) one weight per token.
        ignore_index: label of tokens that do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over tokens.
        denominator: what the mean divides by; see :func:`telos.losses.reduce`.

    Returns:
        The loss in nats: a scalar, or (N, T) with ``reduction="none"``.

    Raises:
        ValueError: for a wrong shape, a label out of range or an unknown reduction.
        TypeError: for a wrong dtype.

    Source:
        Efficient Adversarial Training in LLMs with Continuous Attacks, arXiv 2405.15589 (an option of the
        authors' code).

    Example:
        >>> import torch
        >>> log_one_minus_p_loss(torch.zeros(1, 1, 4), torch.tensor([[2]]))  # -log(3 / 4)
        tensor(0.2877)
    """
    check_reduction(reduction, denominator)
    check_floating("logits", logits)
    check_shape("logits", logits, ("N", "T", "C"))
    check_integer("labels", labels)
    check_shape("labels", labels, tuple(logits.shape[:2]))
    check_label_values("labels", labels, logits.shape[-1], ignore_index)

    def unlikelihood(rows: Tensor, target: Tensor) -> Tensor:
        own = target.unsqueeze(-1)
        others = rows.scatter(-1, own, -torch.inf).logsumexp(-1)
        margin = rows.gather(-1, own).squeeze(-1) - others
        # -log p is the link of the margin, -log(1 - p) that of its negative
        return torch.where(-logistic(margin) < threshold, 0.0, logistic(-margin))

    values, weights = classification_rows(
        unlikelihood, logits, labels, sample_weight=sample_weight, ignore_index=ignore_index
    )
    return reduce(values, weights, reduction, denominator)


class _Sequences(NamedTuple):
    """A batch with its attended tokens moved to the front: positions are right, padding is on the right."""

    ids: Tensor  # (N, T)
    attended: Tensor  # (N, T)
    prompt: Tensor  # (N, T), the tokens that an attack may move: attended and no part of an answer
    order: Tensor  # (N, T), where each token stood
    places: Tensor  # (N, A), the positions whose logits predict the answer's tokens, then arbitrary ones
    targets: Tensor  # (N, A), these tokens, then -100

    @property
    def answered(self) -> Tensor:
        """Which examples have an answer at all."""
        return (self.targets != _IGNORED).any(1)


def _front(mask: Tensor) -> Tensor:
    """The order that brings the tokens of a mask to the front and keeps their order."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)


def _sequences(name: str, batch: Batch) -> _Sequences:
    for key in ("input_ids", "labels"):
        if key not in batch:
            raise ValueError(
                f"{name} must hold input_ids and labels, got {', '.join(sorted(batch)) or 'nothing'}"
            )
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    check_integer(f"{name}['input_ids']", ids)
    check_shape(f"{name}['input_ids']", ids, ("N", "T"))
    check_integer(f"{name}['labels']", labels)
    check_shape(f"{name}['labels']", labels, tuple(ids.shape))
    if mask is None:
        attended = torch.ones_like(ids, dtype=torch.bool)
    else:
        check_shape(f"{name}['attention_mask']", mask, tuple(ids.shape))
        attended = mask != 0
    order = _front(attended)
    ids, attended = ids.long().gather(1, order), attended.gather(1, order)
    # padding is never scored, whatever its label
    labels = torch.where(attended, labels.long().gather(1, order), _IGNORED)
    following = labels[:, 1:]
    # logits are large: only the answers' are raised to float32. That the length has to be read is nothing beside
    # the passes of the attack
    longest = int((following != _IGNORED).sum(1).max()) if following.numel() else 0
    places = _front(following != _IGNORED)[:, :longest]
    prompt = attended & (labels == _IGNORED)
    return _Sequences(ids, attended, prompt, order, places, following.gather(1, places))


def _same_prompts(harmful: _Sequences, safe: _Sequences) -> None:
    """Refuse pairs whose prompts differ: one perturbation serves both, token by token."""
    if harmful.ids.shape[0] != safe.ids.shape[0]:
        raise ValueError(
            f"harmful and safe must hold the same number of examples, got {harmful.ids.shape[0]} "
            f"and {safe.ids.shape[0]}"
        )
    width = max(harmful.ids.shape[1], safe.ids.shape[1])
    prompts = [
        F.pad(
            torch.where(part.prompt, part.ids, -1).gather(1, _front(part.prompt)),
            (0, width - part.ids.shape[1]),
            value=-1,
        )
        for part in (harmful, safe)
    ]
    if not torch.equal(*prompts):
        example = int((prompts[0] != prompts[1]).any(1).nonzero()[0])
        raise ValueError(
            "harmful and safe must hold the same prompt tokens (attended, labelled -100) in every example, "
            f"but those of example {example} differ"
        )


def _moved_to(safe: _Sequences, harmful: _Sequences, delta: Tensor) -> Tensor:
    """The perturbation of the harmful prompts at the tokens of the safe ones."""
    length = min(safe.ids.shape[1], harmful.ids.shape[1])
    source = _front(harmful.prompt)[:, :length, None].expand(-1, -1, delta.shape[-1])
    goal = _front(safe.prompt)[:, :length, None].expand(-1, -1, delta.shape[-1])
    empty = delta.new_zeros(*safe.ids.shape, delta.shape[-1])
    # beyond the prompts of the shorter of the two, delta is 0 on one side and unused on the other
    return empty.scatter(1, goal, delta.gather(1, source))


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _embedding(model: nn.Module) -> nn.Module:
    find = getattr(_unwrapped(model), "get_input_embeddings", None)
    if find is None:
        raise TypeError(f"model must have get_input_embeddings(), got {type(model).__name__}")
    return find()


def _logits(model: nn.Module, embeds: Tensor, sequences: _Sequences) -> Tensor:
    """(N, A, V), the logits that predict ``sequences.targets``."""
    output = model(inputs_embeds=embeds, attention_mask=sequences.attended.long())
    logits = output if isinstance(output, Tensor) else output.logits
    return logits.take_along_dim(sequences.places.unsqueeze(-1), 1)


def _perturbed_logits(model: nn.Module, sequences: _Sequences, delta: Tensor | None = None) -> Tensor:
    if sequences.ids.numel() == 0:
        # nothing to run the model on; a graph all the same, so that a rank without examples goes along
        total = torch.zeros((), device=sequences.ids.device)
        for parameter in model.parameters():
            total = total + parameter.flatten()[:0].sum().to(total)
        return total.expand(*sequences.targets.shape, 2)
    embeds = _embedding(model)(sequences.ids)
    if delta is not None:
        embeds = (at_least_float32(embeds) + delta).to(embeds.dtype)
    return _logits(model, embeds, sequences)


def _check_attack(eps: float | None, step_size: float | None, steps: int, rule: str) -> None:
    if eps is not None:
        check_range("eps", eps, 0.0, float("inf"))
    if step_size is not None:
        check_range("step_size", step_size, 0.0, float("inf"))
    check_range("steps", steps, 0, float("inf"))
    if rule not in ("sign", "l2", "adam"):
        raise ValueError(f"rule must be 'sign', 'l2' or 'adam', got {rule!r}")


class _ContinuousAdversarialLoss(Loss):
    """What CAT and CAPO share: the attack, and both answers behind the prompts that it perturbed."""

    family = "robust"

    def __init__(
        self, eps_rel: float, eps: float | None, step_size: float | None, steps: int, rule: AttackRule
    ) -> None:
        super().__init__()
        check_range("eps_rel", eps_rel, 0.0, float("inf"))
        _check_attack(eps, step_size, steps, rule)
        self.eps_rel, self.eps = eps_rel, eps
        self.step_size, self.steps = step_size, steps
        self.rule: AttackRule = rule

    def attack(self, model: nn.Module, harmful: Batch) -> Tensor:
        """The perturbation (N, T, D) of a batch of prompts, at their places; 0 elsewhere, detached."""
        sequences = _sequences("harmful", harmful)
        delta = self._attack(model, sequences)
        places = sequences.order.unsqueeze(-1).expand_as(delta)
        return torch.zeros_like(delta).scatter(1, places, delta)

    def _attack(self, model: nn.Module, sequences: _Sequences) -> Tensor:
        model = _unwrapped(model)  # the attack must not wake the gradient exchange
        embedding = _embedding(model)
        eps = self.eps
        if eps is None:
            weight = embedding.weight
            assert isinstance(weight, Tensor)
            eps = relative_eps(weight, self.eps_rel)

        def harm(embeds: Tensor) -> Tensor:
            # a sum of the examples' means: what is found for one does not depend on the others
            logits = _logits(model, embeds, sequences)
            return -sequence_logps(logits, sequences.targets, reduction="mean").sum()

        with torch.no_grad():
            embeds = embedding(sequences.ids)
        with evaluation_mode(model):
            return embedding_attack(
                harm,
                embeds,
                sequences.prompt,
                eps=eps,
                step_size=self.step_size,
                steps=self.steps if embeds.numel() else 0,
                rule=self.rule,
            )

    def _pair(
        self, model: nn.Module, harmful: Batch, safe: Batch
    ) -> tuple[_Sequences, Tensor, _Sequences, Tensor]:
        """Both batches, each with its logits behind the perturbed prompts."""
        rejected, chosen = _sequences("harmful", harmful), _sequences("safe", safe)
        _same_prompts(rejected, chosen)
        delta = self._attack(model, rejected)
        return (
            rejected,
            _perturbed_logits(model, rejected, delta),
            chosen,
            _perturbed_logits(model, chosen, _moved_to(chosen, rejected, delta)),
        )

    def extra_repr(self) -> str:
        """The attack, for ``print``."""
        eps = f"eps_rel={self.eps_rel:g}" if self.eps is None else f"eps={self.eps:g}"
        return f"{eps}, step_size={self.step_size}, steps={self.steps}, rule={self.rule!r}"


class CAdvULLoss(_ContinuousAdversarialLoss):
    r"""CAT: refusal training under continuous attacks, with unlikelihood of the harmful answers (C-AdvUL).

    For prompts with embeddings E, their harmful answers h and safe answers s, and useful prompts with answers u::

        delta = argmin over balls of CE(h | E + delta)                  (embedding_attack, model in evaluation mode)
        loss  = toward_weight * cut(CE(s | E + delta), toward_cutoff)
                + away_weight * cut(-CE(h | E + delta), away_cutoff)
                + utility_weight * CE(u)

    with CE the mean over the answer tokens of the batch and cut that of :func:`toward_away_loss`.

    Each batch is a mapping as the collators of ``transformers`` give it: ``input_ids`` (N, T), ``labels`` (N, T)
    with -100 at all but the answer's tokens, ``attention_mask`` (N, T), all ones if it is missing. A label belongs
    to the token at its own place, as is usual; the shift is made here. Rows may be padded on either side: tokens
    are moved to the front before the model sees them. All attended tokens outside the answers are perturbed, those
    of a chat template included, and the two batches must agree in them, row by row.

    The model has ``get_input_embeddings()`` and takes ``inputs_embeds`` and ``attention_mask``; it returns the
    logits (N, T, V) or an object with ``logits``, as every causal model of ``transformers`` does, and
    :class:`telos.nn.TinyLM`. A step costs one pass forward and backward for each step of the attack, and one each
    for the two answers and the useful batch. Every rank of several cuts the mean over its own batch.

    Args:
        toward_weight: weight of the safe answers.
        away_weight: weight of the harmful answers.
        utility_weight: weight of the useful answers.
        toward_cutoff: cross-entropy in nats below which the safe answers are safe enough.
        away_cutoff: log-probability per token in nats below which harmful answers are unlikely enough.
        leak: slope of a term beyond its cut-off.
        away: ``"cross_entropy"``, or ``"log_one_minus_p"`` for :func:`log_one_minus_p_loss` with the threshold
            ``away_cutoff`` in place of the cut term (an option of the authors' code).
        eps_rel: radius of the ball of a token over the mean length of the model's embeddings.
        eps: the radius itself, in place of ``eps_rel``. The authors take that of the start throughout; where the
            embeddings are trained, fix it with :func:`relative_eps`.
        step_size: length of a step of the attack; ``None`` for one that goes with the radius.
        steps: number of steps of the attack; 0 for plain refusal training.
        rule: ``"sign"``, ``"adam"`` or ``"l2"``; see :func:`embedding_attack`.

    Raises:
        ValueError: for an unknown option, or a radius, step or number of steps out of range.

    Source:
        Efficient Adversarial Training in LLMs with Continuous Attacks, arXiv 2405.15589; defaults of the authors'
        configuration, which draws 12.5 % of a batch from the harmful prompts. Their code takes a token of id 0 in
        an answer for a part of the prompt; here the label -100 decides.

    Example:
        >>> import torch
        >>> from telos.nn.models.tiny_lm import TinyLM
        >>> model = TinyLM(9, dim=8, layers=1, heads=2)
        >>> prompt, ignored = [1, 5, 6], [-100] * 3
        >>> harmful = {"input_ids": torch.tensor([prompt + [7]]), "labels": torch.tensor([ignored + [7]])}
        >>> safe = {"input_ids": torch.tensor([prompt + [2, 2]]), "labels": torch.tensor([ignored + [2, 2]])}
        >>> loss = CAdvULLoss()(model, harmful, safe)
        >>> loss.backward()
    """

    space = {"eps_rel": log_uniform(0.01, 0.3), "away_weight": uniform(0.1, 1.0)}
    """Not searched: ``toward_weight`` and ``utility_weight``, beside which the away term is weighed; ``toward_cutoff``,
    ``away_cutoff`` and ``leak``, which the authors keep; ``eps``, which the relative radius gives; ``step_size`` and
    ``steps``: a weaker attack would win.
    """

    def __init__(
        self,
        toward_weight: float = 0.5,
        away_weight: float = 0.5,
        utility_weight: float = 1.0,
        toward_cutoff: float = 0.5,
        away_cutoff: float = -5.0,
        leak: float = 1e-3,
        *,
        away: AwayTerm = "cross_entropy",
        eps_rel: float = 0.05,
        eps: float | None = None,
        step_size: float | None = 1e-4,
        steps: int = 10,
        rule: AttackRule = "sign",
    ) -> None:
        super().__init__(eps_rel, eps, step_size, steps, rule)
        if away not in ("cross_entropy", "log_one_minus_p"):
            raise ValueError(f"away must be 'cross_entropy' or 'log_one_minus_p', got {away!r}")
        self.toward_weight, self.away_weight, self.utility_weight = toward_weight, away_weight, utility_weight
        self.toward_cutoff, self.away_cutoff, self.leak = toward_cutoff, away_cutoff, leak
        self.away: AwayTerm = away

    def terms(
        self, model: nn.Module, harmful: Batch, safe: Batch, utility: Batch | None = None
    ) -> dict[str, Tensor]:
        """``toward``, ``away`` and, with useful answers, ``utility``, cut but without their weights."""
        rejected, harm, chosen, safety = self._pair(model, harmful, safe)
        toward = self._cut(cross_entropy_loss(safety, chosen.targets), chosen, self.toward_cutoff)
        if self.away == "cross_entropy":
            away = self._cut(-cross_entropy_loss(harm, rejected.targets), rejected, self.away_cutoff)
        else:
            away = log_one_minus_p_loss(harm, rejected.targets, threshold=self.away_cutoff)
        found = {"toward": toward, "away": away}
        if utility is not None:
            useful = _sequences("utility", utility)
            found["utility"] = cross_entropy_loss(_perturbed_logits(model, useful), useful.targets)
        return found

    def _cut(self, value: Tensor, sequences: _Sequences, cutoff: float) -> Tensor:
        # without any answer the term is 0, not the cut-off
        return torch.where(sequences.answered.any(), _cut(value, cutoff, self.leak), value)

    def forward(self, model: nn.Module, harmful: Batch, safe: Batch, utility: Batch | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            model: the language model; in training mode for the loss, whatever the attack needs.
            harmful: prompts with the answers to move away from.
            safe: the same prompts, in the same order, with the answers to move towards.
            utility: prompts with useful answers, as many as you like, or ``None``.

        Returns:
            A scalar in nats. A batch without answers adds 0.

        Raises:
            ValueError: if the prompts of the two batches differ, or for a wrong shape.
            TypeError: for a wrong dtype, or a model without ``get_input_embeddings``.
        """
        weights = {
            "toward": self.toward_weight,
            "away": self.away_weight,
            "utility": self.utility_weight,
        }
        terms = self.terms(model, harmful, safe, utility)
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()


class CAdvIPOLoss(_ContinuousAdversarialLoss):
    r"""CAPO: preference training under continuous attacks, which needs no useful data (C-AdvIPO).

    For prompts with embeddings E, their harmful answers h and safe answers s, with lp the mean log-probability
    of an answer's tokens under the model and lp0 that under a frozen reference::

        delta = argmin over balls of -lp(h | E + delta)                 (embedding_attack, model in evaluation mode)
        m     = [lp(s | E + delta) - lp(h | E + delta)] - [lp0(s | E) - lp0(h | E)]
        loss  = mean ( m - 1 / (2 beta) )^2

    that is :func:`telos.losses.ipo_loss` with the safe answer as the chosen one and the reference at the clean
    prompts. For batches, model and attack see :class:`CAdvULLoss`. Pairs in which an answer is empty do not count.

    The authors' code also cuts the log-probabilities of the model's tokens, which the equation does not, with
    ``away_cutoff=-5, toward_cutoff=0, cutoff="zero"``: a harmful answer that has become unlikely then counts as
    certain, and the margin falls. ``cutoff="clamp"`` has no such turn. The default is the equation (RECONSTRUCTED
    from memory of the paper as far as the absence of cut-offs goes).

    Args:
        beta: above 0; the margin is ``1 / (2 beta)`` nats per token.
        away_cutoff: log-probability in nats below which a token of a harmful answer is unlikely enough, or
            ``None`` for no cut-off.
        toward_cutoff: cross-entropy in nats below which a token of a safe answer is safe enough, or ``None``.
        cutoff: ``"clamp"`` or ``"zero"``; see :func:`telos.losses.sequence_logps`.
        eps_rel: radius of the ball of a token over the mean length of the model's embeddings.
        eps: the radius itself, in place of ``eps_rel``.
        step_size: length of a step of the attack; ``None`` for one that goes with the radius.
        steps: number of steps of the attack; 0 for plain IPO.
        rule: ``"sign"``, ``"adam"`` or ``"l2"``; see :func:`embedding_attack`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the pairs.

    Raises:
        ValueError: for an unknown option or a parameter out of range.

    Source:
        Efficient Adversarial Training in LLMs with Continuous Attacks, arXiv 2405.15589; IPO: A General
        Theoretical Paradigm to Understand Learning from Human Preferences, arXiv 2310.12036. The authors' code
        reads stored references from the end of their list; here they go with their pairs.

    Example:
        >>> import torch
        >>> from telos.nn.models.tiny_lm import TinyLM
        >>> model = TinyLM(9, dim=8, layers=1, heads=2)
        >>> prompt, ignored = [1, 5, 6], [-100] * 3
        >>> harmful = {"input_ids": torch.tensor([prompt + [7]]), "labels": torch.tensor([ignored + [7]])}
        >>> safe = {"input_ids": torch.tensor([prompt + [2, 2]]), "labels": torch.tensor([ignored + [2, 2]])}
        >>> loss = CAdvIPOLoss(beta=0.25, steps=0)
        >>> reference = loss.reference_logps(model, harmful, safe)
        >>> loss(model, harmful, safe, **reference).detach()  # (1 / (2 beta))^2
        tensor(4.)
    """

    needs = frozenset({"ref_chosen_logps", "ref_rejected_logps"})
    space = {"eps_rel": log_uniform(0.01, 0.3), "beta": log_uniform(0.05, 1.0)}
    """Not searched: ``away_cutoff`` and ``toward_cutoff``, off in the paper; ``eps``, which the relative radius gives;
    ``step_size`` and ``steps``: a weaker attack would win.
    """

    def __init__(
        self,
        beta: float = 0.25,
        *,
        away_cutoff: float | None = None,
        toward_cutoff: float | None = None,
        cutoff: Cutoff = "clamp",
        eps_rel: float = 0.05,
        eps: float | None = None,
        step_size: float | None = 1e-4,
        steps: int = 10,
        rule: AttackRule = "sign",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(eps_rel, eps, step_size, steps, rule)
        check_reduction(reduction)
        check_range("beta", beta, 0.0, float("inf"), open_low=True)
        if cutoff not in ("clamp", "zero"):
            raise ValueError(f"cutoff must be 'clamp' or 'zero', got {cutoff!r}")
        self.beta = beta
        self.away_cutoff, self.toward_cutoff = away_cutoff, toward_cutoff
        self.cutoff: Cutoff = cutoff
        self.reduction: Reduction = reduction

    @staticmethod
    def reference_logps(model: nn.Module, harmful: Batch, safe: Batch) -> dict[str, Tensor]:
        """What a reference model gives the clean pairs, by the keywords of the loss.

        Compute it before training and keep it with the pairs, or at each step from a frozen copy; with adapters of
        ``peft`` under ``model.disable_adapter()``.

        Args:
            model: the reference, which is run in evaluation mode and without gradients.
            harmful: prompts with harmful answers.
            safe: the same prompts with safe answers.

        Returns:
            ``ref_chosen_logps`` (N,) of the safe and ``ref_rejected_logps`` (N,) of the harmful answers, in nats per
            token.
        """
        model = _unwrapped(model)
        found = {}
        with torch.no_grad(), evaluation_mode(model):
            for key, name, batch in (
                ("ref_chosen_logps", "safe", safe),
                ("ref_rejected_logps", "harmful", harmful),
            ):
                sequences = _sequences(name, batch)
                logits = _perturbed_logits(model, sequences)
                found[key] = sequence_logps(logits, sequences.targets, reduction="mean")
        return found

    def forward(
        self,
        model: nn.Module,
        harmful: Batch,
        safe: Batch,
        *,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        denominator: Denominator = None,
    ) -> Tensor:
        """The loss of a batch of pairs.

        Args:
            model: the language model; in training mode for the loss, whatever the attack needs.
            harmful: prompts with the rejected answers.
            safe: the same prompts, in the same order, with the chosen answers.
            ref_chosen_logps: (N,) from :meth:`reference_logps`.
            ref_rejected_logps: (N,) likewise.
            denominator: what the mean divides by; see :func:`telos.losses.reduce`.

        Returns:
            The loss in squared nats per token: a scalar, or (N,) with ``reduction="none"``.

        Raises:
            ValueError: if the prompts of the two batches differ, or for a wrong shape.
            TypeError: for a wrong dtype, or a model without ``get_input_embeddings``.
        """
        rejected, harm, chosen, safety = self._pair(model, harmful, safe)
        return ipo_loss(
            sequence_logps(
                safety,
                chosen.targets,
                reduction="mean",
                upper_cutoff=None if self.toward_cutoff is None else -self.toward_cutoff,
                cutoff=self.cutoff,
            ),
            sequence_logps(
                harm, rejected.targets, reduction="mean", lower_cutoff=self.away_cutoff, cutoff=self.cutoff
            ),
            ref_chosen_logps,
            ref_rejected_logps,
            beta=self.beta,
            sample_weight=(chosen.answered & rejected.answered).to(torch.float32),
            reduction=self.reduction,
            denominator=denominator,
        )

    def extra_repr(self) -> str:
        """The margin's beta and the attack, for ``print``."""
        return f"beta={self.beta:g}, {super().extra_repr()}"
