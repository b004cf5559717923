"""Estimators for scikit-learn: the probes of :mod:`telos.nn.naive_bayes` in pipelines, searches and scores."""

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from telos.nn.naive_bayes import NaiveBayesHead, fit_logistic

Array = NDArray[Any]


class _LinearProbe(ClassifierMixin, BaseEstimator):
    """What the two have in common: logits, and what scikit-learn makes of them."""

    classes_: Array
    coef_: Array
    intercept_: Array

    def decision_function(self, X: ArrayLike) -> Array:
        """Logits (N, K); of two classes the difference, (N,), above 0 for the second."""
        logits = self._logits(X)
        return (logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits).numpy()

    def predict(self, X: ArrayLike) -> Array:
        """The class of the largest logit, (N,)."""
        winner = self._logits(X).argmax(-1).numpy()
        return self.classes_[winner]

    def predict_proba(self, X: ArrayLike) -> Array:
        """Probabilities (N, K), in the order of ``classes_``."""
        return self._logits(X).softmax(-1).numpy()

    def predict_log_proba(self, X: ArrayLike) -> Array:
        """Their logarithms, computed without forming them."""
        return self._logits(X).log_softmax(-1).numpy()

    def _logits(self, X: ArrayLike) -> Tensor:
        check_is_fitted(self)
        features = torch.tensor(validate_data(self, X, reset=False, dtype=np.float64))
        return features @ torch.tensor(self.coef_).T + torch.tensor(self.intercept_)

    def _examples(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None, reset: bool
    ) -> tuple[Tensor, Array, Tensor | None]:
        features, labels = validate_data(self, X, y, reset=reset, dtype=np.float64)
        check_classification_targets(labels)
        if sample_weight is None:
            return torch.tensor(features), labels, None
        weights = _check_sample_weight(sample_weight, features, dtype=np.float64, ensure_non_negative=True)
        return torch.tensor(features), labels, torch.tensor(weights)

    def _positions(self, labels: Array) -> Tensor:
        """Labels as positions in ``classes_``."""
        unknown = np.setdiff1d(labels, self.classes_)
        if len(unknown):
            raise ValueError(f"y holds {unknown[0]!r}, which is not one of the classes {self.classes_}")
        return torch.tensor(np.searchsorted(self.classes_, labels))


class NaiveBayesProbe(_LinearProbe):
    """Gaussian naive Bayes with one diagonal variance for all classes, for scikit-learn.

    The estimator of :class:`telos.nn.NaiveBayesHead`, which see for the mathematics. scikit-learn's own ``GaussianNB``
    has a variance for each class, and is not linear.

    Args:
        eps: added to each variance, in squared units of the features.
        var_smoothing: variances are raised to this share of the largest one; 0 for none.

    Attributes:
        classes_: (K,) labels, sorted.
        head_: the fitted :class:`~telos.nn.NaiveBayesHead`.
        coef_: (K, d) weights of the linear form, intercept_ (K,) its biases.
        class_count_: (K,) examples of each class, or the sum of their weights.
        theta_: (K, d) class means.
        var_: (d,) shared variance.
        n_features_in_: d.

    Source:
        Revisiting Discriminative vs. Generative Classifiers: Theory and Implications, arXiv 2302.02334.

    Example:
        >>> probe = NaiveBayesProbe().fit([[-1.0], [-3.0], [2.0], [4.0]], ["low", "low", "high", "high"])
        >>> probe.predict([[0.4], [0.6]]).tolist()
        ['low', 'high']
    """

    head_: NaiveBayesHead

    def __init__(self, eps: float = 1e-9, var_smoothing: float = 0.0) -> None:
        self.eps = eps
        self.var_smoothing = var_smoothing

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to features (N, d) and labels (N,)."""
        features, labels, weights = self._examples(X, y, sample_weight, reset=True)
        self._start(np.unique(labels), features.shape[1])
        self.head_.fit(features, self._positions(labels), weights)
        return self._finish()

    def partial_fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Add a block; ``classes`` names all of them, and is wanted in the first call only."""
        first = not hasattr(self, "head_")
        features, labels, weights = self._examples(X, y, sample_weight, reset=first)
        if first and classes is None:
            raise ValueError("classes must be passed to the first call of partial_fit")
        if first:
            self._start(np.unique(np.asarray(classes)), features.shape[1])
        elif classes is not None and not np.array_equal(np.unique(np.asarray(classes)), self.classes_):
            raise ValueError(f"classes must be those of the first call, {self.classes_}, got {classes!r}")
        self.head_.partial_fit(features, self._positions(labels), weights)
        return self._finish()

    def _start(self, classes: Array, dim: int) -> None:
        self.classes_ = classes
        self.head_ = NaiveBayesHead(dim, len(classes), self.eps, self.var_smoothing)

    def _finish(self) -> Self:
        head = self.head_
        self.class_count_, self.theta_ = head.count.numpy(), head.mean.numpy()
        self.var_ = head.shared_variance().numpy()
        self.coef_, self.intercept_ = _arrays(head.to_linear(torch.float64))
        return self

    def _logits(self, X: ArrayLike) -> Tensor:
        # the head centres features before it multiplies, which coef_ and intercept_ cannot
        check_is_fitted(self)
        return self.head_(torch.tensor(validate_data(self, X, reset=False, dtype=np.float64)))


class LogisticProbe(_LinearProbe):
    """Multinomial logistic regression with an L2 penalty, for scikit-learn: naive Bayes' comparator.

    The estimator of :func:`telos.nn.logistic_probe`, which see for the objective. It finds what scikit-learn's
    ``LogisticRegression(C=C)`` finds, to a tighter tolerance.

    Args:
        C: inverse strength of the penalty, above 0.
        max_iter: steps of L-BFGS at most.
        tol: largest entry of the gradient at which to stop.

    Attributes:
        classes_: (K,) labels, sorted.
        coef_: (K, d) weights, intercept_ (K,) biases; two rows for two classes.
        n_iter_: (1,) steps taken.
        n_features_in_: d.

    Source:
        Revisiting Discriminative vs. Generative Classifiers: Theory and Implications, arXiv 2302.02334.

    Example:
        >>> probe = LogisticProbe().fit([[-1.0], [-3.0], [2.0], [4.0]], ["low", "low", "high", "high"])
        >>> probe.predict([[0.3], [0.7]]).tolist()
        ['low', 'high']
    """

    n_iter_: Array

    def __init__(self, C: float = 1.0, max_iter: int = 1000, tol: float = 1e-6) -> None:
        self.C = C
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to features (N, d) and labels (N,) of at least two classes."""
        features, labels, weights = self._examples(X, y, sample_weight, reset=True)
        self.classes_ = np.unique(labels)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least two classes, got the one class {self.classes_[0]!r}")
        found = fit_logistic(
            features,
            self._positions(labels),
            len(self.classes_),
            C=self.C,
            max_iter=self.max_iter,
            tol=self.tol,
            sample_weight=weights,
        )
        self.coef_, self.intercept_ = found.weight.numpy(), found.bias.numpy()
        self.n_iter_ = np.array([found.iterations])
        return self


def _arrays(layer: nn.Linear) -> tuple[Array, Array]:
    return layer.weight.detach().numpy(), layer.bias.detach().numpy()
