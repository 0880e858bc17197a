"""Classifier two-sample tests: whether a classifier can tell synthetic from real cells, and by which genes.

After Lopez-Paz & Oquab (ICLR 2017, arXiv 1610.06545): if two sets have one distribution, no classifier does better than
chance on cells that it was not trained on. Examples assume ``from wbdit.evaluation.classifiers import *``.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np

from wbdit.errors import need_extra
from wbdit.evaluation.intervals import Estimate, auc, normal, standard_error

Array = np.ndarray[Any, Any]

FOLDS = 5
CLASSIFIERS = ("c2st_logistic", "c2st_trees", "c2st_net")


class Giveaway(NamedTuple):
    """A gene by which synthetic cells can be told from real ones.

    Attributes
    ----------
    gene
        Name.
    auc
        Probability that a synthetic cell has a larger value than a real one; ties count half. 0.5 is chance.
    real_mean, synthetic_mean
        Mean log-normalized values.
    """

    gene: str
    auc: float
    real_mean: float
    synthetic_mean: float


def two_sample_test(real: Array, other: Array, kind: str, seed: int = 0) -> Estimate:
    """Compute the cross-validated AUC of a classifier that tells two sets of cells apart.

    Parameters
    ----------
    real, other
        ``(n, genes)`` and ``(m, genes)``, log-normalized, at least ten cells each.
    kind
        ``"c2st_logistic"``: logistic regression with a penalty; ``"c2st_trees"``: boosted trees; ``"c2st_net"``: a
        network with two hidden layers, stopped early. Genes are standardized for the first and the last.
    seed
        Of the folds and of the network's weights.

    Returns
    -------
    The mean AUC over five folds, 0.5 is chance, and its interval. The variance of a fold, DeLong's, counts
    ``1 / folds + n_test / n_train`` times: the folds share most of the cells that they train on (Nadeau & Bengio,
    Machine Learning 52, 2003).

    Examples
    --------
    >>> real, other = np.random.default_rng(0).normal(size=(2, 60, 5))
    >>> estimate = two_sample_test(real, other + [0, 0, 3, 0, 0], "c2st_logistic")
    >>> estimate.value > 0.95, abs(two_sample_test(real, other, "c2st_logistic").value - 0.5) < 0.2
    (True, True)
    """
    try:
        from sklearn.model_selection import StratifiedKFold
    except ImportError:
        raise need_extra("scikit-learn") from None
    cells, is_other = np.vstack([real, other]), np.repeat([0, 1], [len(real), len(other)])
    values, errors = [], []
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(cells, is_other):
        model = _classifier(kind, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an optimizer that stops at its last iteration is still a classifier
            model.fit(cells[train], is_other[train])
            scores = model.predict_proba(cells[test])[:, 1]
        fold = auc(scores[is_other[test] == 0], scores[is_other[test] == 1])
        assert fold.interval is not None
        values.append(fold.value)
        errors.append(standard_error(fold.interval))
    shared = 1 / FOLDS + 1 / (FOLDS - 1)
    return normal(float(np.mean(values)), float(np.sqrt(shared * np.mean(np.square(errors)))))


def giveaways(real: Array, other: Array, genes: Array, n: int = 10) -> list[Giveaway]:
    """Return the genes that tell two sets apart best, each on its own, best first.

    Examples
    --------
    >>> real, other = np.random.default_rng(0).normal(size=(2, 60, 3))
    >>> giveaways(real, other + [0, 0, 5], np.array(["CD3D", "NKG7", "MS4A1"]), n=1)[0].gene
    'MS4A1'
    """
    from scipy.stats import rankdata

    ranks = rankdata(np.vstack([real, other]), axis=0)[len(real) :]
    areas = (ranks.mean(axis=0) - (len(other) + 1) / 2) / len(real)
    best = np.argsort(-np.abs(areas - 0.5), kind="stable")[:n]
    means = real.mean(axis=0), other.mean(axis=0)
    return [Giveaway(str(genes[i]), float(areas[i]), float(means[0][i]), float(means[1][i])) for i in best]


def _classifier(kind: str, seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind == "c2st_logistic":
        return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    if kind == "c2st_trees":
        return HistGradientBoostingClassifier(max_iter=100, learning_rate=0.1, max_depth=3, random_state=seed)
    if kind == "c2st_net":
        network = MLPClassifier((64, 32), alpha=0.01, max_iter=30, early_stopping=True, random_state=seed)
        return make_pipeline(StandardScaler(), network)
    raise ValueError(f"no such classifier: {kind!r} (there are {', '.join(CLASSIFIERS)})")
