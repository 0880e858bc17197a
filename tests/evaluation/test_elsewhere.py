"""The metrics that other packages and published scripts have too are equal to theirs, on the same points.

The optional packages: pip install -e ".[interop]"; without them their tests are skipped. CFGen and scDiffusion are no
packages: their formulas, read from their published scripts, are written down once more.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import pearsonr, spearmanr

from wbdit.evaluation import estimators
from wbdit.evaluation.differential import against_rest, agreement
from wbdit.evaluation.intervals import Halves
from wbdit.evaluation.registry import METRICS

NAMED = [(metric.name, name) for metric in METRICS.values() for name in metric.elsewhere]
theirs_may_warn = pytest.mark.filterwarnings("ignore")  # of imports and deprecations inside other packages


def assignment(order):
    """For sets of equal size, an optimal transport plan is a permutation: no need of POT, which we use."""

    def distance(real, other):
        cost = cdist(real, other) ** order
        return cost[linear_sum_assignment(cost)].mean() ** (1 / order)

    return distance


def biased_mmd(kernel, n):
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def cfgen_mmd(real, other):
    squared = cdist(np.vstack([real, other]), np.vstack([real, other])) ** 2
    return biased_mmd(sum(np.exp(-squared / (2 * sigma**2)) for sigma in (0.01, 0.1, 1, 10, 100)), len(real))


def scdiffusion_mmd(real, other):
    squared = cdist(np.vstack([real, other]), np.vstack([real, other])) ** 2
    mean = squared.sum() / (len(squared) ** 2 - len(squared))
    return biased_mmd(sum(np.exp(-squared / (mean * 2.0**i)) for i in range(-2, 3)), len(real))


def scdiffusion_forest(real, other):
    """Compute the AUC with real cells as the positive class."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import train_test_split

    cells, is_real = np.vstack([real, other]), np.repeat([1, 0], [len(real), len(other)])
    train, test, train_is, test_is = train_test_split(cells, is_real, test_size=0.25, random_state=1)
    forest = RandomForestClassifier(1000, max_depth=5, class_weight="balanced", random_state=1).fit(train, train_is)
    return roc_auc_score(test_is, forest.predict_proba(test)[:, 1])


def prdc(key):
    def score(real, other):
        package = pytest.importorskip("prdc")
        return package.compute_prdc(real[:, :30], other[:, :30], nearest_k=5)[key]

    return score


def scib_ilisi(real, other):
    """Compute it of ten neighbors, which scib-metrics takes with the cell itself, in double precision.

    A process of its own imports jax, which warns of any fork from then on: other tests fork.
    """
    if importlib.util.find_spec("scib_metrics") is None:
        pytest.skip("could not import 'scib_metrics'")
    together = np.vstack([real, other])[:, :20]
    distances = cdist(together, together)
    nearest = np.argsort(distances, axis=1)[:, :11]
    arrays = {"indices": nearest, "distances": np.take_along_axis(distances, nearest, axis=1)}
    code = (
        "import json, sys, numpy as np, scib_metrics\n"
        "from scib_metrics.nearest_neighbors import NeighborsResults\n"
        "given = json.load(sys.stdin)\n"
        "neighbors = NeighborsResults(**{name: np.array(rows) for name, rows in given['neighbors'].items()})\n"
        "print(scib_metrics.ilisi_knn(neighbors, np.array(given['batches']), perplexity=10 / 3))\n"
    )
    given = {"neighbors": {name: rows.tolist() for name, rows in arrays.items()}}
    given["batches"] = ["real"] * len(real) + ["other"] * len(other)
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"},
    )
    return float(done.stdout.splitlines()[-1])


class Check(NamedTuple):
    """The value of another package for two sets ``(n, 50)``, and the relative tolerance."""

    theirs: Callable
    rel: float = 1e-9


CHECKS = {
    "CFGen: 1-Wasserstein": Check(assignment(1)),
    "CFGen: 2-Wasserstein": Check(assignment(2)),
    "CFGen: RBF_MMD": Check(cfgen_mmd),
    "scDiffusion: mmd_rbf": Check(scdiffusion_mmd),
    "scDiffusion: random forest AUC": Check(scdiffusion_forest),
    "scDiffusion: spearman": Check(lambda real, other: spearmanr(real.mean(axis=0), other.mean(axis=0)).statistic),
    "scDiffusion: pearson": Check(lambda real, other: pearsonr(real.mean(axis=0), other.mean(axis=0)).statistic),
    "scib-metrics: ilisi_knn(perplexity=10/3)": Check(scib_ilisi, rel=1e-4),  # theirs stops at an entropy within 1e-5
    "prdc: precision": Check(prdc("precision")),
    "prdc: recall": Check(prdc("recall")),
    "prdc: density": Check(prdc("density")),
    "prdc: coverage": Check(prdc("coverage")),
}


@pytest.fixture(scope="module", params=[0, 1])
def sets(request):
    """Return two sets of cells ``(80, 50)`` that overlap in part."""
    rng = np.random.default_rng(request.param)
    means = rng.normal(size=50)
    return means + rng.normal(size=(80, 50)), means + 0.9 * rng.normal(size=(80, 50)) + 0.3 * rng.normal(size=50)


@pytest.fixture(scope="module")
def ours(sets):
    """Return the values of the judge."""
    halves = Halves.draw(80, 2, np.random.default_rng(0))
    found = estimators.cfgen_distances(*sets, halves) | estimators.neighborhoods(*sets, halves)
    found |= estimators.joint_distances(sets, halves) | estimators.gene_means(*sets, halves)
    return found | {"rf_auc": estimators.forest(*sets)}


def test_each_name_has_a_check():
    names = [name for _, name in NAMED]
    assert sorted(names) == sorted(CHECKS)
    assert all(": " in name for name in names)


@theirs_may_warn
@pytest.mark.parametrize(("metric", "name"), NAMED)
def test_equal(metric, name, sets, ours):
    check = CHECKS[name]
    theirs = float(check.theirs(*sets))
    assert theirs not in (0, 1)  # a value that says little
    assert ours[metric].value == pytest.approx(theirs, rel=check.rel)


@theirs_may_warn
def test_cell_eval_given_our_calls():
    """cell-eval has none of our metrics, because it calls by the FDR alone and scores each contrast on its own.

    Given our calls, as an FDR of 1 for all that is not called, its recalls and counts add up to ours.
    """
    cell_eval = pytest.importorskip("cell_eval")
    import polars as pl
    from cell_eval.metrics import DENsigCounts, DESigGenesRecall

    types, labels = ["B", "NK", "T"], np.array(["B", "NK", "T"])[np.arange(120) % 3]
    rng = np.random.default_rng(0)
    change = rng.normal(0, 0.6, size=(3, 60))[np.arange(120) % 3]
    real, other = (against_rest(change + rng.gamma(1.0, size=(120, 60)), labels, types) for _ in range(2))
    both = real.called & other.called
    assert (np.sign(real.log2_change) == np.sign(other.log2_change))[both].all()  # it does not look at signs

    def table(tests):
        columns = {"p_value": tests.p, "fdr": np.where(tests.called, tests.adjusted, 1.0)}
        columns |= {"log2_fold_change": tests.log2_change}
        names = {"target": np.repeat(types, 60), "feature": [f"gene{i}" for i in range(60)] * 3}
        return pl.DataFrame(names | {name: values.ravel() for name, values in columns.items()})

    def recalled(wanted, got):
        """Return cell-eval's recall per contrast, and its number of calls in both sets."""
        tables = cell_eval.initialize_de_comparison(real=table(wanted), pred=table(got))
        return DESigGenesRecall()(tables), DENsigCounts()(tables)

    found, (recall, counts) = agreement(real, other), recalled(real, other)
    n_real, n_other = (np.array([counts[name][which] for name in types]) for which in ("real", "pred"))
    precision, _ = recalled(other, real)
    assert 0 < found.de_recall < 1
    assert found.de_recall == pytest.approx(np.average([recall[name] for name in types], weights=n_real))
    assert found.de_precision == pytest.approx(np.average([precision[name] for name in types], weights=n_other))
    assert found.de_calls == pytest.approx(n_other.sum() / n_real.sum())
