"""Taking a run home: its loss and optimizer as Python, a script that trains it again, and its weights.

Nothing that is written needs ``telos.lab`` or the store.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch.optim import SGD, AdamW

import telos.losses
from telos.losses import Loss
from telos.trials import Comparison, Run, StoreError, UsageError, parse_recipes
from telos.trials.recipes import Recipe, _wraps
from telos.trials.suite import Suite

SCRIPT = '''\
"""Trains one run again: {what}.

Run it where the comparison was run, so that the data are found; it needs telos, torch and safetensors.
"""

import math
from pathlib import Path

import torch
from recipe import build_loss, build_optimizer
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR

from telos.fit import fit
from telos.trials import Batches, derive_seed, load_task

torch.set_num_threads(1)
task, seed, epochs = load_task({task!r}), {seed}, {epochs}
fold = task.fold(seed)
torch.manual_seed(derive_seed(task.name, seed, "model"))
model = task.model(fold.info)
torch.manual_seed(derive_seed(task.name, seed, "loss"))
loss = build_loss(fold.info)
torch.manual_seed(derive_seed(task.name, seed, "training"))
order = torch.Generator().manual_seed(derive_seed(task.name, seed, "order"))
batches = Batches(fold.train, task.batch_size, order)
optimizer, scheduled = build_optimizer([*model.parameters(), *loss.parameters()])
steps = epochs * len(batches)
cosine = LambdaLR(scheduled, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def validate(record):
    return {{f"validation_{{k}}": v for k, v in task.evaluate(model, loss, fold.validation).items()}}


model.train(), loss.train()
fit(task.training_step(model, loss), batches, optimizer, epochs=epochs, scheduler=cosine, on_epoch=validate)
for name, value in task.evaluate(model, loss, fold.test).items():
    print(f"test_{{name}} {{value!r}}")
parts = {{"model": model, "loss": loss}}
weights = {{f"{{part}}.{{k}}": v.clone() for part, m in parts.items() for k, v in m.state_dict().items()}}
save_file(weights, Path(__file__).with_name("weights.safetensors"))
'''


def winner(found: Comparison | Suite) -> Run:
    """The first seed's run of the recipe with the best mean; of several tasks, on the first.

    Raises:
        telos.trials.UsageError: where no recipe has a result.
    """
    comparison = found.comparisons[0] if isinstance(found, Suite) else found
    if isinstance(found, Suite) and (standings := found.standings()):
        label = standings[0].label
        return next(e for e in comparison.entries if e.recipe.label == label).finished[0]
    if not comparison.ranked:
        raise UsageError("no recipe has a result, so there is nothing to export")
    return comparison.ranked[0].finished[0]


def export_run(run: Run, folder: Path) -> dict[str, Any]:
    """Write ``recipe.py``, ``train.py``, ``weights.safetensors`` and ``run.json``; trains the run again.

    Args:
        run: an evaluation run that finished.
        folder: where to write; made if absent.

    Returns:
        What ``run.json`` holds, with the metrics of the second training under ``again``.

    Raises:
        telos.trials.UsageError: for a run without a model to export.
        telos.trials.StoreError: where the folder cannot be written, or the script fails.
    """
    if run.role != "evaluation" or not run.finished:
        raise UsageError(
            f"run {run.key[:12]} is a {run.role} run that {run.status}; only an evaluation run that finished "
            "has a model to export"
        )
    (recipe,) = parse_recipes(run.loss, run.optim)
    what = f"{run.task}, loss={run.loss} optim={run.optim}, seed {run.seed}"
    script = SCRIPT.format(what=_quotable(what), task=run.task, seed=run.seed, epochs=run.epochs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.py").write_text(recipe_code(recipe, run.hyperparameters), encoding="utf-8")
        (folder / "train.py").write_text(script, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"the run is in the store, but {folder} cannot be written: {error}") from error
    # modules of the user's own are found from here, as they were when the run was compared
    search = [str(Path.cwd()), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, str(folder / "train.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StoreError(f"the run could not be trained again: {last}")
    again = dict(line.split() for line in done.stdout.splitlines() if line.startswith("test_"))
    facts = {
        "key": run.key,
        "task": run.task,
        "loss": run.loss,
        "optim": run.optim,
        "seed": run.seed,
        "epochs": run.epochs,
        "hyperparameters": run.hyperparameters,
        "metrics": run.metrics,
        "again": {name: float(value) for name, value in again.items()},
        "versions": run.versions,
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return facts


def repeats(facts: dict[str, Any]) -> bool:
    """Whether the second training gave the stored numbers."""
    return all(
        math.isclose(value, facts["metrics"].get(name, math.nan), rel_tol=1e-9, abs_tol=1e-12)
        for name, value in facts["again"].items()
    )


def recipe_code(recipe: Recipe, chosen: dict[str, Any]) -> str:
    """Loss and optimizer of a run as Python.

    Example:
        >>> (recipe,) = parse_recipes("cross_entropy+0.1*focal:gamma=3")
        >>> print(recipe_code(recipe, {"learning_rate": 0.001, "weight_decay": 0.01}).split("def")[1])
         build_loss(info):
            return Mixture([(1.0, CrossEntropyLoss()), (0.1, FocalLoss(gamma=3))])
        <BLANKLINE>
        <BLANKLINE>
        <BLANKLINE>
    """
    imports: dict[str, set[str]] = {}

    def named(kind: type) -> str:
        public = getattr(telos.losses, kind.__name__, None) is kind
        module = "telos.losses" if public else kind.__module__
        imports.setdefault(module if not module.startswith("torch.optim") else "torch.optim", set()).add(
            kind.__qualname__
        )
        return kind.__qualname__

    losses = []
    for prefix, term in recipe._prefixed():
        own = {key: chosen[prefix + key] for key in getattr(term.loss, "space", {}) if prefix + key in chosen}
        arguments = _arguments({**own, **term.fixed})
        make = getattr(term.loss, "from_task", None)
        # the inherited one only passes its keywords on
        if make is not None and make.__func__ is not Loss.from_task.__func__:  # type: ignore[attr-defined]
            call = f"{named(term.loss)}.from_task({', '.join(['info', arguments]) if arguments else 'info'})"
        else:
            call = f"{named(term.loss)}({arguments})"
        losses.append((term.weight, call))
    if len(losses) == 1 and losses[0][0] == 1:
        loss = losses[0][1]
    else:
        imports.setdefault("telos.losses", set()).add("Mixture")
        loss = f"Mixture([{', '.join(f'({weight!r}, {call})' for weight, call in losses)}])"
    optimizer = _optimizer_code(recipe, chosen, named)
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    return (
        f'"""The loss and the optimizer of a run: {_quotable(recipe.loss)} with {_quotable(recipe.optim)}."""\n\n'
        + "\n".join(lines)
        + f"\n\n\ndef build_loss(info):\n    return {loss}\n\n\n"
        + f"def build_optimizer(parameters):\n{optimizer}"
    )


def _optimizer_code(recipe: Recipe, chosen: dict[str, Any], named: Any) -> str:
    """The body of ``build_optimizer``: the optimizer, and the one that the schedule drives."""
    kind, fixed = recipe.optimizer.optimizer, recipe.optimizer.fixed
    rates = {"lr": chosen["learning_rate"], "weight_decay": chosen["weight_decay"]}
    if _wraps(kind):
        inner = {**rates, **{key: fixed[key] for key in rates if key in fixed}}
        outer = _arguments({key: value for key, value in fixed.items() if key not in rates})
        return (
            f"    base = {named(AdamW)}(parameters, {_arguments(inner)})\n"
            f"    return {named(kind)}({', '.join(['base', outer]) if outer else 'base'}), base\n"
        )
    extra = {"momentum": 0.9} if kind is SGD else {}
    arguments = _arguments({**rates, **extra, **fixed})
    return f"    optimizer = {named(kind)}(parameters, {arguments})\n    return optimizer, optimizer\n"


def _quotable(text: str) -> str:
    """A text that cannot end the docstring it stands in."""
    return "".join(letter if letter.isprintable() and letter not in '\\"' else " " for letter in text)


def _arguments(values: dict[str, Any]) -> str:
    for key in values:
        # a class that takes any keyword lets any text through the parser; here it would become code
        if not key.isidentifier():
            raise UsageError(
                f"the hyper-parameter {key!r} is no name, so the run cannot be written as Python"
            )
    return ", ".join(f"{key}={_literal(value)}" for key, value in values.items())


def _literal(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)
