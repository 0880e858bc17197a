"""The data set that comes with the package."""

import numpy as np
import pytest
import scipy.sparse as sp

from wbdit.datasets import LABEL, blood_cells


def test_blood_cells_are_counts():
    cells = blood_cells()
    assert cells.shape == (700, 765)
    assert sp.issparse(cells.X)
    counts = cells.X.toarray()
    assert np.array_equal(counts, np.rint(counts))
    assert (counts.min(), counts.max(), int(counts.sum())) == (0, 259, 486651)
    assert cells.obs[LABEL].nunique() == 10
    assert cells.obs_names.is_unique
    assert cells.var_names.is_unique


def test_each_call_returns_its_own_cells():
    blood_cells().X.data[:] = 0
    assert blood_cells().X.sum() == 486651


def test_blood_cells_are_scanpys():
    """Normalizing these counts gives the values that scanpy stores, which are rounded to three decimals."""
    datasets = pytest.importorskip("scanpy").datasets
    try:
        stored = datasets.pbmc68k_reduced()
    except Exception as error:  # later versions of scanpy download the file
        pytest.skip(f"scanpy has no such file here: {error}")
    cells = blood_cells()
    again = np.log1p(cells.X.toarray() / stored.obs["n_counts"].to_numpy()[:, None] * 1e4)
    np.testing.assert_allclose(again, stored.raw.X.toarray(), atol=6e-4)
    assert (cells.obs[LABEL].astype(str) == stored.obs[LABEL].astype(str)).all()
    assert list(cells.obs_names) == list(stored.obs_names)
    assert list(cells.var_names) == list(stored.raw.var_names)
