"""The values that models and metrics see of counts, and the choice of variable genes."""

from __future__ import annotations

from typing import Any, Literal

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch

from wbdit.data.expression import Space
from wbdit.errors import InputError, need_extra

Values = Literal["log1p", "lognorm", "as is"]
TARGET_SUM = 1e4


def transformed(dense: np.ndarray, values: Values) -> np.ndarray:
    """Return cells ``(n, G)`` as values of a kind, see :mod:`wbdit.data.preprocessor`."""
    if values == "as is":
        return dense
    if values == "lognorm":
        dense = dense * (TARGET_SUM / np.maximum(dense.sum(1, keepdims=True), 1))
    return np.log1p(dense)


def log_normalized(matrix: sp.csr_matrix, space: Space) -> sp.csr_matrix:
    """Return ``log1p`` of the cells brought to 10,000 each; log values are first turned back by ``expm1``.

    Parameters
    ----------
    matrix
        ``(cells, genes)`` counts or log values. A cell without any count stays zero.
    """
    linear = matrix.expm1() if space == "lognorm" else matrix
    totals = np.asarray(linear.sum(axis=1)).ravel()
    factors = np.divide(TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
    return sp.csr_matrix(sp.diags(factors) @ linear).log1p()


def log_library_sizes(counts: np.ndarray) -> np.ndarray:
    """Return the natural logarithm of the library sizes of cells ``(n, G)``, ``(n,)``; 0 for an empty cell."""
    return np.log(np.maximum(counts.sum(1), 1))


def variable_genes(X: Any, space: Space, n: int) -> np.ndarray:
    """Return which `n` genes vary most, ``(genes,)`` bool, chosen by scanpy.

    Counts by the variance beyond the fitted mean-variance curve (``seurat_v3``), log-normalized values by binned
    dispersion (``seurat``).

    Raises
    ------
    InputError
        For scaled values, whose variance says nothing, or if scanpy is not installed.
    """
    if space == "scaled":
        raise InputError(f"scaled values do not tell variable genes: keep at most {n} genes yourself, or give counts")
    try:
        import scanpy as sc
    except ImportError as error:
        raise need_extra("scanpy (to choose variable genes)") from error
    cells = ad.AnnData(sp.csr_matrix(X, dtype=np.float32))
    expressed = np.asarray((cells.X > 0).sum(0)).ravel() > 0
    chosen = np.zeros(cells.n_vars, bool)
    if expressed.sum() <= n:
        return expressed
    flavor = "seurat_v3" if space == "counts" else "seurat"
    threads = torch.get_num_threads()
    ranked = sc.pp.highly_variable_genes(cells[:, expressed], flavor=flavor, n_top_genes=n, inplace=False)
    torch.set_num_threads(threads)  # numba, which scanpy runs, has set OpenMP's number to its own
    chosen[expressed] = ranked["highly_variable"].to_numpy()
    return chosen
