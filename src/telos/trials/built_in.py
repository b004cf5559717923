"""The tasks that come with telos, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from telos.trials.adversarial_task import AdversarialTask
from telos.trials.bags_task import BagsTask
from telos.trials.calibration_task import CalibrationTask
from telos.trials.embedding_tasks import EmbeddingTask, ViewsTask
from telos.trials.modular_task import ModularTask
from telos.trials.tasks import ClassificationTask, RegressionTask

BuiltIn: TypeAlias = ClassificationTask | RegressionTask | BagsTask | CalibrationTask | ModularTask


def _bundled(name: str, dtype: type = np.int64) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    cache: list[tuple[np.ndarray, np.ndarray]] = []

    def load() -> tuple[np.ndarray, np.ndarray]:
        # scikit-learn takes a second to import: only for those who use its data, and once
        if not cache:
            from sklearn import datasets

            inputs, target = getattr(datasets, f"load_{name}")(return_X_y=True)
            cache.append((np.asarray(inputs, dtype=np.float64), np.asarray(target, dtype=dtype)))
        return cache[0]

    return load


_digits = _bundled("digits")
_diabetes = _bundled("diabetes", np.float64)

BUILT_IN: dict[str, BuiltIn] = {
    task.name: task
    for task in (
        ClassificationTask("digits", _digits),
        ClassificationTask("digits_noisy", _digits, noise=0.4),
        ClassificationTask("digits_longtail", _digits, imbalance=50.0, batch_size=32, epochs=60),
        ClassificationTask("breast_cancer", _bundled("breast_cancer"), width=32, batch_size=32, epochs=40),
        ClassificationTask("wine", _bundled("wine"), width=32, batch_size=16, epochs=40),
        RegressionTask("diabetes", _diabetes, width=32, batch_size=32, epochs=40),
        AdversarialTask("digits_adversarial", _digits, top=16.0),
        EmbeddingTask("digits_embeddings", _digits),
        ViewsTask("digits_views", _digits, top=16.0),
        BagsTask("bags", _diabetes),
        CalibrationTask("digits_calibration", _digits),
        ModularTask("modular_addition"),
    )
}
