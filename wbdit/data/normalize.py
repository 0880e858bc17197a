"""Normalization of expression, library sizes and selection of variable genes."""

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
    """Transform cells ``(n, G)`` to a kind of values; :mod:`wbdit.data.preprocessor` defines the kinds.

    Examples
    --------
    >>> from wbdit.data.normalize import transformed
    >>> transformed(np.array([[0.0, 1.0, 3.0]]), "log1p").round(2)
    array([[0.  , 0.69, 1.39]])
    """
    if values == "as is":
        return dense
    if values == "lognorm":
        dense = dense * (TARGET_SUM / np.maximum(dense.sum(1, keepdims=True), 1))
    return np.log1p(dense)


def log_normalized(matrix: sp.csr_matrix, space: Space) -> sp.csr_matrix:
    """Return ``log1p`` of cells scaled to a total of 10,000 each.

    Parameters
    ----------
    matrix
        ``(cells, genes)`` counts or log values. A cell without counts stays zero.
    space
        Expression space of `matrix`; "lognorm" values are first inverted by ``expm1``.

    Examples
    --------
    >>> from wbdit.data.normalize import log_normalized
    >>> values = log_normalized(cells.X, "counts")
    >>> np.allclose(values.expm1().sum(axis=1), 1e4)
    True
    """
    linear = matrix.expm1() if space == "lognorm" else matrix
    totals = np.asarray(linear.sum(axis=1)).ravel()
    factors = np.divide(TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
    return sp.csr_matrix(sp.diags(factors) @ linear).log1p()


def log_library_sizes(counts: np.ndarray) -> np.ndarray:
    """Return the natural log of the library sizes ``(n,)`` of cells ``(n, G)``; 0 for an empty cell.

    Examples
    --------
    >>> from wbdit.data.normalize import log_library_sizes
    >>> log_library_sizes(np.array([[1, 2], [0, 0]])).round(2)
    array([1.1, 0. ])
    """
    return np.log(np.maximum(counts.sum(1), 1))


def variable_genes(X: Any, space: Space, n: int) -> np.ndarray:
    """Return a mask ``(genes,)`` bool of at most `n` genes, the most variable ones according to scanpy.

    Genes of counts are ranked by their variance beyond the fitted mean-variance curve (``seurat_v3``), genes of
    log-normalized values by binned dispersion (``seurat``). Genes without expression are never chosen.

    Raises
    ------
    InputError
        For scaled values, whose variances carry no information, or if scanpy is not installed.

    Examples
    --------
    >>> from wbdit.data.normalize import variable_genes
    >>> mask = variable_genes(cells.X, "counts", 100)
    >>> mask.shape, int(mask.sum())
    ((765,), 100)
    """
    if space == "scaled":
        raise InputError(f"variable genes cannot be chosen from scaled values: keep at most {n} genes, or give counts")
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
    torch.set_num_threads(threads)  # scanpy runs numba, which changes OpenMP's number of threads
    chosen[expressed] = ranked["highly_variable"].to_numpy()
    return chosen
