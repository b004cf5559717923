"""Run things fairly: tasks, recipes, search, seeds, the store and the statistics."""

from telos.trials._words import UsageError
from telos.trials.comparison import (
    Comparison,
    Difference,
    Entry,
    Plan,
    PlannedRecipe,
    compare,
    execute,
    make_plan,
)
from telos.trials.recipes import Recipe, loss_names, parse_recipes
from telos.trials.runner import Job, WorkerLostError, Workers, run_job
from telos.trials.search import best_trial, configuration, search_space
from telos.trials.statistics import Estimate, holm, resampled_interval, verdict
from telos.trials.store import Run, Store, StoreError
from telos.trials.tasks import (
    BUILT_IN,
    Batches,
    ClassificationTask,
    Fold,
    Task,
    classification_metrics,
    load_task,
)

__all__ = [
    "BUILT_IN",
    "Batches",
    "ClassificationTask",
    "Comparison",
    "Difference",
    "Entry",
    "Estimate",
    "Fold",
    "Job",
    "Plan",
    "PlannedRecipe",
    "Recipe",
    "Run",
    "Store",
    "StoreError",
    "Task",
    "UsageError",
    "WorkerLostError",
    "Workers",
    "best_trial",
    "classification_metrics",
    "compare",
    "configuration",
    "execute",
    "holm",
    "load_task",
    "loss_names",
    "make_plan",
    "parse_recipes",
    "resampled_interval",
    "run_job",
    "search_space",
    "verdict",
]
