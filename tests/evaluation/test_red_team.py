"""Eight ways to fool a judge, on real blood cells: each is named by a line of the verdict, and real cells by none."""

from functools import partial

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import wbdit
from wbdit.datasets import LABEL, blood_cells
from wbdit.evaluation import compare

judged = partial(wbdit.evaluate, label=LABEL, n_genes=300, bootstrap=60, progress=False)


@pytest.fixture(autouse=True)
def few_worse_sets(monkeypatch):
    monkeypatch.setattr(compare, "WORSE", {"independent": compare.WORSE["independent"]})


@pytest.fixture(scope="module")
def sets():
    """Return held-out cells, other real cells, and training cells, of the same people."""
    cells = blood_cells()
    order = np.random.default_rng(0).permutation(cells.n_obs)
    return tuple(cells[order[i::3]].copy() for i in range(3))


def with_counts(cells, counts):
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=cells.obs.copy(), var=cells.var.copy())


def copies(cells, rng):
    rows = rng.choice(cells.n_obs, cells.n_obs)
    made = with_counts(cells, cells.X.toarray()[rows])
    made.obs[LABEL] = cells.obs[LABEL].to_numpy()[rows]
    return made


def resampled(cells, rng):
    """Draw each training cell's counts anew, with its own shares of genes."""
    counts = cells.X.toarray().astype(float)
    shares = counts / counts.sum(1, keepdims=True)
    return with_counts(
        cells, np.stack([rng.multinomial(int(n), p) for n, p in zip(counts.sum(1), shares, strict=True)])
    )


def noisy(cells, rng):
    return with_counts(cells, rng.poisson(cells.X.toarray() * rng.lognormal(0, 0.7, cells.shape) + 0.05))


def labels_permuted(cells, rng):
    changed = cells.copy()
    changed.obs[LABEL] = rng.permutation(cells.obs[LABEL].astype(str))
    return changed


def genes_permuted(cells, rng):
    return with_counts(cells, cells.X.toarray()[:, rng.permutation(cells.n_vars)])


def mean_cells(cells, rng):
    """Give each cell the rounded mean of its label."""
    labels, counts = cells.obs[LABEL].astype(str).to_numpy(), cells.X.toarray()
    means = {name: counts[labels == name].mean(0) for name in set(labels)}
    return with_counts(cells, np.round([means[name] for name in labels]) + (np.arange(cells.n_vars) == 0))


def another_donor(cells, rng):
    """Shift genes as people differ: by a factor of their own for each gene."""
    return with_counts(cells, rng.poisson(cells.X.toarray() * rng.lognormal(0, 0.4, cells.n_vars)))


def nearly_empty(cells, rng):
    """Draw droplets without a cell: a few molecules of what floats around."""
    ambient = np.asarray(cells.X.sum(0)).ravel().astype(float)
    return with_counts(cells, rng.multinomial(8, ambient / ambient.sum(), cells.n_obs))


@pytest.mark.parametrize(
    ("attack", "named_by"),
    [
        (copies, {"copies", "mia_auc", "dcr_ratio"}),
        (resampled, {"dcr_ratio", "mia_auc", "copies"}),
        (noisy, {"precision", "corr_fro", "detected_w1", "within_corr"}),
        (labels_permuted, {"tstr", "lfc_slope", "de_recall"}),
        (genes_permuted, {"scc", "pcc", "precision"}),
        (mean_cells, {"recall", "coverage", "within_var"}),
        (another_donor, {"scc", "c2st_logistic", "energy", "ilisi"}),
        (nearly_empty, {"library_w1", "detected_w1"}),
    ],
)
def test_each_attack_is_named(sets, attack, named_by):
    real, other, train = sets
    of_training = attack in (copies, resampled)
    cells = attack(train if of_training else other, np.random.default_rng(1))
    result = judged(real, cells, train=train)
    named = {name for name, score in result.scores.items() if score.grade != "at the floor"}
    assert named & named_by, (named, attack.__name__)
    assert result.verdict.level != "floor"
    assert result.verdict.caution + result.verdict.slight


def test_real_cells_are_not_named(sets):
    real, other, train = sets
    result = judged(real, other, train=train)
    assert [name for name, score in result.scores.items() if score.grade != "at the floor"] == []
    assert result.verdict.headline == "These cells cannot be told from real cells"
