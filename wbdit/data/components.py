"""Principal components of cells, without a matrix of genes by genes and without making the cells dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator, eigsh

from wbdit.data.cell_matrix import CellMatrix, cells_per_chunk
from wbdit.data.normalize import Values, transformed_rows

MOST_CELLS = 20_000  # that components are learned from; more change the leading ones little
MOST_VALUES = 2**24  # nonzero values of these cells, 200 MB in fp64
NEGLIGIBLE = 1e-12  # of a cell's mean squared values: the rounding error of a component without variance
SEED = 0x436F6D706F6E  # of the choice of cells
TOLERANCE = 1e-5  # relative, of the Lanczos iteration's eigenvalues


class Components(NamedTuple):
    """Leading principal components.

    Attributes
    ----------
    variances
        Variance along each axis, ``(K,)`` fp64, descending.
    axes
        Orthonormal axes ``(K, G)`` fp64. The largest entry of each is positive.
    """

    variances: np.ndarray
    axes: np.ndarray


class Residuals:
    """What is left of cells' values after a linear regression on known columns, ``(n, G)``.

    With ``Q`` an orthonormal basis of the columns, the residuals are ``(I - Q Q^T) V``. They are never formed: products
    with them need the sparse values V and Q only.

    Parameters
    ----------
    values
        V, ``(n, G)`` CSR.
    known
        Columns ``(n, P)`` fp64 that the values are regressed on.
    groups
        Rows of each group of cells, which has its own regression; one group of all cells by default. Cells in no group
        are left out.
    corrected
        Multiply the residuals of each group by ``sqrt(n / (n - P))``, so that their variance is unbiased.

    Examples
    --------
    >>> from wbdit.data.components import Residuals
    >>> centered = Residuals(cells.X, np.ones((700, 1)))
    >>> np.allclose(centered.toarray(), cells.X.toarray() - cells.X.toarray().mean(0), atol=1e-4)
    True
    >>> found = centered.components(3)
    >>> found.variances.shape, found.axes.shape
    ((3,), (3, 765))
    """

    def __init__(
        self,
        values: sp.csr_matrix,
        known: np.ndarray,
        groups: Sequence[np.ndarray] | None = None,
        corrected: bool = False,
    ) -> None:
        if groups is None:
            groups = [np.arange(len(known))]
        else:
            values = values[np.concatenate([np.zeros(0, np.int64), *groups])]
        self.values = values.astype(np.float64)
        bases = [_orthonormal(known[group]) for group in groups]
        self.basis = sp.csr_matrix(sp.block_diag([np.zeros((0, 0)), *bases]))
        lost = [max(len(group) - (known.shape[1] if corrected else 0), 1) for group in groups]
        factors = [np.full(len(group), np.sqrt(len(group) / n)) for group, n in zip(groups, lost, strict=True)]
        self.factors = np.concatenate([np.zeros(0), *factors]) if corrected else np.ones(values.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        return self.values.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        """Return the product ``(n, K)`` with a matrix ``(G, K)``; a vector gives a vector."""
        return (self.factors * self._rest(self.values @ x).T).T

    def transposed(self, y: np.ndarray) -> np.ndarray:
        """Return the product ``(G, K)`` of the transpose with a matrix ``(n, K)``; a vector gives a vector."""
        return self.values.T @ self._rest((self.factors * y.T).T)

    def components(self, k: int) -> Components:
        """Return the leading components, at most `k`; those without variance are left out.

        The Lanczos iteration of ARPACK finds them, with some hundred products of the residuals and a vector. It needs
        more cells and genes than components. With few of either a dense decomposition is exact and fast.
        """
        n, genes = self.shape
        k = min(k, n, genes)
        if min(n, genes) <= 3 * k:
            _, singular, axes = np.linalg.svd(self.toarray(), full_matrices=False)
            variances, axes = singular[:k] ** 2 / n, axes[:k]
        else:
            square = LinearOperator((genes, genes), lambda x: self.transposed(self @ x), dtype=np.float64)
            # a fixed start vector makes the axes reproducible
            values, vectors = eigsh(square, k, v0=np.ones(genes), tol=TOLERANCE)
            variances, axes = np.maximum(values[::-1], 0) / n, vectors.T[::-1]
        kept = variances > NEGLIGIBLE * np.sum(self.values.data**2) / n
        return Components(variances[kept], _signed(axes[kept]))

    def toarray(self) -> np.ndarray:
        """Return the residuals themselves, ``(n, G)`` fp64."""
        return (self.factors * self._rest(self.values.toarray()).T).T

    def _rest(self, y: np.ndarray) -> np.ndarray:
        return y - self.basis @ (self.basis.T @ y)


def components_of(cells: CellMatrix, values: Values, k: int) -> Components:
    """Return the leading principal components of cells' values, at most `k`.

    They are those of all cells up to :data:`MOST_CELLS`, else of as many random cells, or fewer with more than
    :data:`MOST_VALUES` nonzero values.

    Examples
    --------
    >>> from wbdit.data.cell_matrix import MemoryMatrix
    >>> from wbdit.data.components import components_of
    >>> components_of(MemoryMatrix(cells.X), "log1p", 8).axes.shape
    (8, 765)
    """
    order = np.random.default_rng(SEED).permutation(cells.shape[0])[:MOST_CELLS]
    X, read = read_some(cells, order)
    return Residuals(transformed_rows(X, values), np.ones((len(read), 1))).components(k)


def read_some(matrix: CellMatrix, cells: np.ndarray) -> tuple[sp.csr_matrix, np.ndarray]:
    """Read cells in blocks until they have :data:`MOST_VALUES` nonzero values.

    Parameters
    ----------
    matrix
        Cells by genes.
    cells
        Indices of the cells to read, in random order: the first ones are read.

    Returns
    -------
    The cells ``(n, G)`` CSR fp32 and their indices ``(n,)``.

    Examples
    --------
    >>> from wbdit.data.cell_matrix import MemoryMatrix
    >>> from wbdit.data.components import read_some
    >>> X, read = read_some(MemoryMatrix(cells.X), np.array([9, 4]))
    >>> X.shape, read.tolist()
    ((2, 765), [4, 9])
    """
    size = cells_per_chunk(matrix.shape[1])
    parts, read, stored = [], [], 0
    for start in range(0, len(cells), size):
        block = np.sort(cells[start : start + size])
        parts.append(matrix.rows(block))
        read.append(block)
        stored += parts[-1].nnz
        if stored >= MOST_VALUES:
            break
    return sp.vstack(parts, format="csr"), np.concatenate(read)


def _orthonormal(known: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis ``(n, rank)`` of the columns ``(n, P)``."""
    basis, singular, _ = np.linalg.svd(known.astype(np.float64), full_matrices=False)
    return basis[:, singular > np.finfo(np.float64).eps * max(known.shape) * singular.max(initial=0)]


def _signed(axes: np.ndarray) -> np.ndarray:
    """Return the axes ``(K, G)`` with the sign that makes the largest entry of each positive."""
    largest = np.abs(axes).argmax(1)
    return axes * np.sign(axes[np.arange(len(axes)), largest])[:, None]
