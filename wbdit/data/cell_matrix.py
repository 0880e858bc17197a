"""Expression matrices that are read by rows: the one interface to cells in memory, in a file or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp

CHUNK_VALUES = 2**23  # of a dense chunk: 32 MB in fp32


class CellMatrix(Protocol):
    """Expression of cells by genes, read by rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""

    def rows(self, index: np.ndarray) -> sp.csr_matrix:
        """Return the cells with indices ``(B,)`` int64, in this order, as canonical CSR fp32 ``(B, genes)``."""

    def select(self, cells: np.ndarray | None = None, genes: np.ndarray | None = None) -> CellMatrix:
        """Return the cells and genes with these indices, in this order; None for all."""


class MemoryMatrix:
    """A matrix in memory.

    Parameters
    ----------
    X
        ``(cells, genes)`` CSR without duplicates or a dense array, of any number type.

    Examples
    --------
    >>> from wbdit.data.cell_matrix import MemoryMatrix
    >>> matrix = MemoryMatrix(cells.X)
    >>> matrix.shape, matrix.rows(np.array([3, 0])).shape
    ((700, 765), (2, 765))
    >>> matrix.select(genes=np.arange(10)).shape
    (700, 10)
    """

    def __init__(self, X: Any) -> None:
        self.X = X

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        return self.X.shape

    def rows(self, index: np.ndarray) -> sp.csr_matrix:
        """Return the cells with these indices, see :meth:`CellMatrix.rows`."""
        rows = sp.csr_matrix(self.X[index], dtype=np.float32)
        rows.sort_indices()
        return rows

    def select(self, cells: np.ndarray | None = None, genes: np.ndarray | None = None) -> MemoryMatrix:
        """Return a part of the matrix, see :meth:`CellMatrix.select`."""
        X = self.X if cells is None else self.X[cells]
        return MemoryMatrix(X if genes is None else X[:, genes])


def chunks(matrix: CellMatrix, cells: int | None = None) -> Iterator[tuple[slice, sp.csr_matrix]]:
    """Yield all cells in order, as slices of their indices and CSR chunks.

    Parameters
    ----------
    matrix
        Cells by genes.
    cells
        Cells per chunk; by default so many that a dense chunk has about :data:`CHUNK_VALUES` values. The number does
        not depend on where the cells are, so sums over chunks are the same for all sources.

    Examples
    --------
    >>> from wbdit.data.cell_matrix import MemoryMatrix, chunks
    >>> [(part.start, part.stop, X.shape[1]) for part, X in chunks(MemoryMatrix(cells.X), cells=400)]
    [(0, 400, 765), (400, 700, 765)]
    """
    n, genes = matrix.shape
    size = cells or max(1, CHUNK_VALUES // max(genes, 1))
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        yield part, matrix.rows(np.arange(part.start, part.stop))


def dense_chunks(matrix: CellMatrix, cells: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield all cells in order, as slices of their indices and dense fp32 chunks; arguments as in :func:`chunks`."""
    for part, X in chunks(matrix, cells):
        yield part, X.toarray()
