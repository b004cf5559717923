"""Columns that give the target away: one column alone predicts it almost perfectly on rows it has not seen."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.feature_selection import f_classif, f_regression
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.naive_bayes import CategoricalNB
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

if TYPE_CHECKING:
    from telos.trials.tables import Table

ROWS = 5_000  # a sample is enough to see what is almost perfect
COLUMNS = 200  # of more numbers than this, those that go with the target most are looked at
LEFT = 0.02  # share of the errors of guessing that a column may leave


def giveaways(table: Table) -> list[str]:
    """One sentence for each column that alone predicts the target almost perfectly.

    A small tree (for categories: the most frequent class of each) is fitted on two thirds of at most ``ROWS``
    rows and judged on the last third, in turn. A column is named when at most ``LEFT`` of the errors of
    guessing the most frequent class, or of the variance of the target's ranks, are left.
    """
    rows = np.arange(table.main)
    if len(rows) > ROWS:
        rows = np.sort(np.random.default_rng(0).permutation(len(rows))[:ROWS])
    target = table.target[rows]
    if not table.classes:
        # ranks: the few largest numbers shall not decide what is almost perfect
        target = np.unique(target, return_inverse=True)[1].astype(np.float64)
    guess = _errors(target, table, None)
    if not guess:
        return []
    found = []
    for key, values in _candidates(table, rows, target):
        left = _errors(target, table, _predicted(values, target, table, key in table.categories)) / guess
        if left <= LEFT:
            found.append(
                f"{table.label(key)} alone predicts {table.target_name} almost perfectly "
                f"({1 - left:.1%} of what guessing misses): is it known before the target is?"
            )
    return found


def _candidates(table: Table, rows: np.ndarray, target: np.ndarray) -> list[tuple[str, np.ndarray]]:
    numbers = {key: table.frame[key].gather(rows).to_numpy().astype(np.float64) for key in table.numbers}
    if len(numbers) > COLUMNS:
        known = np.stack([np.nan_to_num(values, nan=np.nanmedian(values)) for values in numbers.values()], 1)
        score = f_classif if table.classes else f_regression
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # a constant column has no score
            order = np.argsort(-np.nan_to_num(score(known, target)[0]))[:COLUMNS]
        names = list(numbers)
        numbers = {names[place]: numbers[names[place]] for place in sorted(order)}
    categories = {key: table.frame[key].gather(rows).to_numpy() for key in table.categories}
    return [*numbers.items(), *categories.items()]


def _predicted(values: np.ndarray, target: np.ndarray, table: Table, category: bool) -> np.ndarray:
    learner: Any
    folds: Any = KFold(3, shuffle=True, random_state=0)
    if category:
        values = np.unique(values, return_inverse=True)[1]
    if not table.classes:
        learner = DecisionTreeRegressor(max_leaf_nodes=256, random_state=0)
    else:
        smallest = np.bincount(target).min(initial=3, where=np.bincount(target) > 0)
        folds = StratifiedKFold(3, shuffle=True, random_state=0) if smallest >= 3 else folds
        if category:
            learner = CategoricalNB(alpha=1e-6, min_categories=int(values.max()) + 1)
        else:
            learner = DecisionTreeClassifier(max_leaf_nodes=4 * len(table.classes), random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are many classes is known
        return cross_val_predict(learner, values.reshape(-1, 1), target, cv=folds)


def _errors(target: np.ndarray, table: Table, predicted: np.ndarray | None) -> float:
    """Share of wrong classes, or mean squared error; of guessing where nothing was predicted."""
    if table.classes:
        if predicted is None:
            return 1 - float(np.bincount(target).max()) / len(target)
        return float((predicted != target).mean())
    return float(np.square(target - (target.mean() if predicted is None else predicted)).mean())
