"""Wilcoxon tests against scanpy, agreement by hand, and the calibration of tests where there is nothing to find."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy.stats import kstest

from wbdit.evaluation.differential import (
    Contrasts,
    _distance_from_uniform,
    against_rest,
    agreement,
    null_calibration,
    wilcoxon,
)


@pytest.fixture
def cells():
    """Return log values ``(90, 25)`` with many ties, and labels of three types."""
    rng = np.random.default_rng(0)
    labels = np.array(["B", "NK", "T"])[np.arange(90) % 3]
    counts = rng.poisson(0.8, (90, 25)).astype(float)
    counts[labels == "B", :6] += rng.poisson(1.5, (30, 6))
    counts[:, 24] = 0  # a gene that no cell expresses
    return np.log1p(counts), labels


def test_p_values_are_those_of_scanpy(cells):
    values, labels = cells[0][:, :24], cells[1]  # scanpy divides by zero for the last gene
    adata = ad.AnnData(values.copy())
    adata.obs["type"] = pd.Categorical(labels)
    sc.tl.rank_genes_groups(adata, "type", method="wilcoxon", tie_correct=True)
    tests = against_rest(values, labels, ["B", "NK", "T"])
    for row, name in enumerate(["B", "NK", "T"]):
        theirs = sc.get.rank_genes_groups_df(adata, name).set_index("names").loc[adata.var_names]
        np.testing.assert_allclose(tests.p[row], theirs["pvals"], rtol=1e-6)
        np.testing.assert_allclose(tests.adjusted[row], theirs["pvals_adj"], rtol=1e-6)


def test_a_gene_that_no_cell_expresses_is_no_call(cells):
    tests = against_rest(*cells, ["B", "NK", "T"])
    assert (tests.p[:, 24] == 1.0).all()
    assert not tests.called[:, 24].any()


def test_a_call_needs_a_small_p_and_a_change(cells):
    values, labels = cells
    tests = against_rest(values, labels, ["B"])
    assert tests.called[0, :6].sum() >= 4
    assert (np.abs(tests.log2_change[tests.called]) > 0.25).all()
    slight = np.log1p(np.repeat([[0.0], [1.0]], 500, axis=0)) * 0.1  # certain, but small: 0.1 in log2
    certain = wilcoxon(slight, (np.arange(1000) < 500)[None])
    assert certain.adjusted[0, 0] < 1e-50
    assert not certain.called.any()


def test_agreement_by_hand():
    """Of four genes called in real cells, synthetic ones have three, one of them the wrong way, and one more."""
    p = np.array([[1e-9, 1e-8, 1e-7, 1e-6, 0.5]])
    real = Contrasts(p, p, np.array([[1.0, 1.0, -1.0, 1.0, 0.0]]))
    q = np.array([[1e-9, 1e-8, 1e-7, 0.5, 1e-6]])
    other = Contrasts(q, q, np.array([[1.0, -1.0, -1.0, 1.0, 1.0]]))
    found = agreement(real, other)
    assert found.de_jaccard == pytest.approx(2 / 5)
    assert found.de_precision == pytest.approx(2 / 4)
    assert found.de_recall == pytest.approx(2 / 4)
    assert found.de_calls == pytest.approx(1.0)
    assert found.padj_corr == pytest.approx(0.9)  # ranks 5 4 3 2 1 and 5 4 3 1 2


def test_agreement_without_calls_is_undefined():
    ones = np.ones((1, 3))
    nothing = Contrasts(ones, ones, np.zeros((1, 3)))
    assert np.isnan(agreement(nothing, nothing)).all()


def test_null_calibration_sees_repeated_cells():
    """Halves of independent cells differ by chance alone; of repeated cells, they differ less or more than that."""
    rng = np.random.default_rng(1)
    independent = np.log1p(rng.poisson(2.0, (200, 300)).astype(float))
    labels = np.repeat(["B", "T"], 100)
    distance, called = null_calibration(independent, labels, ["B", "T"], 20, np.random.default_rng(2)).mean(axis=0)
    assert distance < 0.1
    assert called < 0.01
    batches = independent.copy()
    batches[:100] += np.where(np.arange(100)[:, None] % 2, 1.0, 0.0)  # a hidden state that halves split at random
    assert null_calibration(batches, labels, ["B"], 20, np.random.default_rng(2))[:, 0].mean() > 2 * distance


def test_distance_from_uniform_is_that_of_scipy():
    p = np.random.default_rng(0).random((3, 40)) ** 1.3
    theirs = [kstest(row, "uniform").statistic for row in p]
    np.testing.assert_allclose(_distance_from_uniform(p), theirs, rtol=1e-12)


def test_null_calibration_without_varying_genes_is_undefined():
    assert np.isnan(null_calibration(np.ones((20, 4)), np.repeat("B", 20), ["B"], 1, np.random.default_rng(0))).all()
