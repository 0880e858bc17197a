"""Normalization of expression, and library sizes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import scipy.sparse as sp

from wbdit.data.space import Space

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


def transformed_rows(rows: sp.csr_matrix, values: Values) -> sp.csr_matrix:
    """Transform cells as :func:`transformed` does, without making them dense: zeros stay zeros.

    Examples
    --------
    >>> from wbdit.data.normalize import transformed, transformed_rows
    >>> rows = transformed_rows(cells.X, "lognorm")
    >>> np.allclose(rows.toarray(), transformed(cells.X.toarray(), "lognorm"))
    True
    """
    if values == "as is":
        return rows
    data = rows.data
    if values == "lognorm":
        totals = np.asarray(rows.sum(1, dtype=np.float64)).ravel()
        data = data * np.repeat(TARGET_SUM / np.maximum(totals, 1), np.diff(rows.indptr)).astype(data.dtype)
    return sp.csr_matrix((np.log1p(data), rows.indices, rows.indptr), shape=rows.shape)


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
