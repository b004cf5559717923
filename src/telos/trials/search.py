"""Search: the same number of trials for every recipe, the first untuned, the others a quasi-random sequence.

A trial's configuration is decided by the recipe and the trial's number alone, so asking for more trials later
keeps the earlier ones. Learning rate and weight decay are always searched, since the scale of a loss must not
decide who wins; then come the ranges that the loss declares, without what the user fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from telos.losses._space import Choice, Integers, LogUniform, Range, Uniform
from telos.trials.recipes import Hyperparameters, Recipe
from telos.trials.tasks import Task, derive_seed


def search_space(recipe: Recipe, task: Task) -> dict[str, Range]:
    """What the trials of a recipe vary, in the order of the sequence's dimensions."""
    centred = recipe.optimizer_space(task.learning_rate, task.weight_decay)
    fixed = recipe.optimizer.fixed
    optimizer = {
        name: span
        for name, (_, span) in centred.items()
        if {"learning_rate": "lr"}.get(name, name) not in fixed
    }
    return {**optimizer, **recipe.space}


def configuration(recipe: Recipe, task: Task, trial: int) -> Hyperparameters:
    """The hyper-parameters of a trial.

    Args:
        recipe: what is tuned.
        task: gives the untuned learning rate and weight decay.
        trial: 0 for the defaults, 1 and up for the points of a scrambled Halton sequence seeded by the
            recipe.

    Returns:
        ``learning_rate``, ``weight_decay`` and the searched hyper-parameters of the loss. Trial 0 leaves the
        loss's own
        out: its defaults hold.

    Example:
        >>> from telos.trials import load_task, parse_recipes
        >>> (recipe,) = parse_recipes("cross_entropy")
        >>> configuration(recipe, load_task("digits"), 0)
        {'learning_rate': 0.001, 'weight_decay': 0.01}
    """
    centred = recipe.optimizer_space(task.learning_rate, task.weight_decay)
    chosen: Hyperparameters = {name: default for name, (default, _) in centred.items()}
    if "lr" in recipe.optimizer.fixed:
        chosen["learning_rate"] = recipe.optimizer.fixed["lr"]
    if "weight_decay" in recipe.optimizer.fixed:
        chosen["weight_decay"] = recipe.optimizer.fixed["weight_decay"]
    space = search_space(recipe, task)
    if trial > 0 and space:
        point = _halton(recipe.canonical, len(space), trial)
        chosen.update(
            {name: _rounded(span.at(u)) for (name, span), u in zip(space.items(), point, strict=True)}
        )
    return chosen


def describe(span: Range) -> str:
    """A range in words, for reports."""
    match span:
        case LogUniform(low, high):
            return f"{low:.3g} to {high:.3g}, logarithmic"
        case Uniform(low, high):
            return f"{low:.3g} to {high:.3g}"
        case Integers(low, high):
            return f"whole numbers {low} to {high}"
        case Choice(options):
            return "one of " + ", ".join(map(str, options))


def best_trial(scores: Sequence[float | None], direction: str) -> int | None:
    """The trial with the best score; of equals the earlier, and ``None`` where none has a score.

    Example:
        >>> best_trial([0.8, None, 0.9, 0.9], "max")
        2
    """
    scored = [
        (score if direction == "min" else -score, trial)
        for trial, score in enumerate(scores)
        if score is not None
    ]
    return min(scored)[1] if scored else None


def _halton(recipe: str, dimensions: int, trial: int) -> list[float]:
    from scipy.stats import qmc

    sequence = qmc.Halton(dimensions, scramble=True, rng=derive_seed("search", recipe))
    return sequence.fast_forward(trial - 1).random(1)[0].tolist()


def _rounded(value: Any) -> Any:
    # six digits: what the report prints is what was run
    return float(f"{value:.6g}") if isinstance(value, float) else value
