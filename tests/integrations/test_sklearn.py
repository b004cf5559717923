"""The probes as scikit-learn estimators."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from telos.integrations.sklearn import LogisticProbe, NaiveBayesProbe

X, Y = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[Y]


@pytest.mark.filterwarnings("ignore:.*they decide alone:UserWarning")
@pytest.mark.filterwarnings("ignore:logistic regression stopped:UserWarning")
@parametrize_with_checks([NaiveBayesProbe(), LogisticProbe()])
def test_scikit_learns_own_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.mark.parametrize("probe", [NaiveBayesProbe(), LogisticProbe()])
def test_probabilities_and_decisions_agree(probe: Any) -> None:
    probe = clone(probe).fit(X, NAMES)
    probabilities = probe.predict_proba(X)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.exp(probe.predict_log_proba(X)), probabilities, rtol=1e-12)
    assert (probe.classes_[probe.decision_function(X).argmax(1)] == probe.predict(X)).all()
    linear = X @ probe.coef_.T + probe.intercept_
    np.testing.assert_allclose(
        linear - linear[:, :1], (d := probe.decision_function(X)) - d[:, :1], atol=1e-8
    )
    two = clone(probe).fit(X[:100], NAMES[:100])
    second = two.decision_function(X[:100]) > 0
    assert (two.classes_[second.astype(int)] == two.predict(X[:100])).all()


def test_blocks_give_what_all_examples_give() -> None:
    whole, parts = NaiveBayesProbe().fit(X, NAMES), NaiveBayesProbe()
    for start in range(0, 150, 50):  # each block holds one class only
        block = slice(start, start + 50)
        parts.partial_fit(X[block], NAMES[block], classes=np.unique(NAMES) if start == 0 else None)
    np.testing.assert_allclose(parts.coef_, whole.coef_, rtol=1e-10)
    np.testing.assert_allclose(parts.var_, whole.var_, rtol=1e-12)
    assert parts.class_count_.tolist() == [50, 50, 50]


def test_refused_blocks() -> None:
    with pytest.raises(ValueError, match="classes must be passed"):
        NaiveBayesProbe().partial_fit(X, NAMES)
    with pytest.raises(ValueError, match="not one of the classes"):
        NaiveBayesProbe().partial_fit(X, NAMES, classes=["setosa", "virginica"])
    probe = NaiveBayesProbe().partial_fit(X, NAMES, classes=np.unique(NAMES))
    with pytest.raises(ValueError, match="those of the first call"):
        probe.partial_fit(X, NAMES, classes=["setosa", "virginica"])


def test_logistic_probe_finds_what_scikit_learns_finds() -> None:
    theirs = LogisticRegression(C=2.0, tol=1e-10, max_iter=10_000).fit(X, NAMES)
    ours = LogisticProbe(C=2.0, tol=1e-9).fit(X, NAMES)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-4, atol=1e-6)


def test_stands_in_pipelines_and_searches() -> None:
    search = GridSearchCV(
        make_pipeline(MinMaxScaler(), NaiveBayesProbe()), {"naivebayesprobe__var_smoothing": [0.0, 0.1]}, cv=3
    ).fit(X, NAMES)
    assert search.best_score_ > 0.9
