"""Expression matrices that are read by rows: the one interface to cells in memory, in a file or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp

from wbdit._progress import pass_over

CHUNK_VALUES = 2**23  # of a dense chunk: 32 MB in fp32


class CellMatrix(Protocol):
    """Expression of cells by genes, read by rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""

    def read(self, index: np.ndarray) -> Any:
        """Return the cells with indices ``(B,)`` int64 as stored: CSR without duplicates or an array, of any type."""

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

    def read(self, index: np.ndarray) -> Any:
        """Return the cells with these indices as they are, see :meth:`CellMatrix.read`."""
        return self.X[_as_slice(index)]

    def rows(self, index: np.ndarray) -> sp.csr_matrix:
        """Return the cells with these indices, see :meth:`CellMatrix.rows`."""
        return as_rows(self.read(index))

    def select(self, cells: np.ndarray | None = None, genes: np.ndarray | None = None) -> SelectedMatrix:
        """Return a part of the matrix, see :meth:`CellMatrix.select`."""
        return SelectedMatrix(self, cells, genes)


class SelectedMatrix:
    """Some cells and genes of a matrix, which is not copied.

    Parameters
    ----------
    matrix
        The whole matrix.
    cells, genes
        Indices of the cells and genes to take, in this order; None for all.

    Examples
    --------
    >>> from wbdit.data.cell_matrix import MemoryMatrix, SelectedMatrix
    >>> part = SelectedMatrix(MemoryMatrix(cells.X), cells=np.array([5, 2, 9]), genes=np.arange(20))
    >>> part.shape, part.rows(np.array([0])).nnz == cells.X[5, :20].nnz
    ((3, 20), True)
    """

    def __init__(self, matrix: CellMatrix, cells: np.ndarray | None = None, genes: np.ndarray | None = None) -> None:
        self.matrix = matrix
        self.cells = cells
        self.genes = genes

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        n, genes = self.matrix.shape
        return n if self.cells is None else len(self.cells), genes if self.genes is None else len(self.genes)

    def read(self, index: np.ndarray) -> Any:
        """Return the cells with these indices as stored, see :meth:`CellMatrix.read`."""
        X = self.matrix.read(index if self.cells is None else self.cells[index])
        return X if self.genes is None else X[:, self.genes]

    def rows(self, index: np.ndarray) -> sp.csr_matrix:
        """Return the cells with these indices, see :meth:`CellMatrix.rows`."""
        return as_rows(self.read(index))

    def select(self, cells: np.ndarray | None = None, genes: np.ndarray | None = None) -> SelectedMatrix:
        """Return a part of the matrix, see :meth:`CellMatrix.select`."""
        return SelectedMatrix(self.matrix, _of(self.cells, cells), _of(self.genes, genes))


class RoundedMatrix:
    """A matrix with its values rounded to integers as they are read.

    Examples
    --------
    >>> from wbdit.data.cell_matrix import MemoryMatrix, RoundedMatrix
    >>> RoundedMatrix(MemoryMatrix(np.array([[0.2, 1.7]]))).read(np.array([0]))
    array([[0., 2.]])
    """

    def __init__(self, matrix: CellMatrix) -> None:
        self.matrix = matrix

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        return self.matrix.shape

    def read(self, index: np.ndarray) -> Any:
        """Return the cells with these indices, rounded, see :meth:`CellMatrix.read`."""
        X = self.matrix.read(index)
        if not sp.issparse(X):
            return np.rint(X)
        X = sp.csr_matrix((np.rint(X.data), X.indices, X.indptr), shape=X.shape)
        X.eliminate_zeros()
        return X

    def rows(self, index: np.ndarray) -> sp.csr_matrix:
        """Return the cells with these indices, rounded, see :meth:`CellMatrix.rows`."""
        return as_rows(self.read(index))

    def select(self, cells: np.ndarray | None = None, genes: np.ndarray | None = None) -> RoundedMatrix:
        """Return a part of the matrix, see :meth:`CellMatrix.select`."""
        return RoundedMatrix(self.matrix.select(cells, genes))


class JoinedMatrix:
    """Matrices with the same genes, one below the other.

    Examples
    --------
    >>> from wbdit.data.cell_matrix import JoinedMatrix, MemoryMatrix
    >>> joined = JoinedMatrix([MemoryMatrix(cells.X[:5]), MemoryMatrix(cells.X[5:8])])
    >>> joined.shape, (joined.rows(np.array([6, 1])) != cells.X[[6, 1]]).nnz
    ((8, 765), 0)
    """

    def __init__(self, matrices: Sequence[CellMatrix]) -> None:
        self.matrices = list(matrices)
        self.ends = np.cumsum([matrix.shape[0] for matrix in matrices])

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        return int(self.ends[-1]), self.matrices[0].shape[1]

    def read(self, index: np.ndarray) -> Any:
        """Return the cells with these indices as stored, see :meth:`CellMatrix.read`; CSR if any part is."""
        part = np.searchsorted(self.ends, index, side="right")
        starts = self.ends - [matrix.shape[0] for matrix in self.matrices]
        used = np.unique(part)
        found = [self.matrices[i].read(index[part == i] - starts[i]) for i in used]
        if len(found) == 1:
            return found[0]
        sparse = any(sp.issparse(X) for X in found)
        stacked = sp.vstack([sp.csr_matrix(X) for X in found], format="csr") if sparse else np.concatenate(found)
        if (part[1:] >= part[:-1]).all():  # the cells are in the order of the matrices
            return stacked
        return stacked[np.argsort(np.argsort(part, kind="stable"), kind="stable")]

    def rows(self, index: np.ndarray) -> sp.csr_matrix:
        """Return the cells with these indices, see :meth:`CellMatrix.rows`."""
        return as_rows(self.read(index))

    def select(self, cells: np.ndarray | None = None, genes: np.ndarray | None = None) -> SelectedMatrix:
        """Return a part of the matrix, see :meth:`CellMatrix.select`."""
        return SelectedMatrix(self, cells, genes)


def as_rows(X: Any) -> sp.csr_matrix:
    """Return cells ``(B, genes)``, CSR without duplicates or an array, as canonical CSR fp32; may be `X` itself.

    Examples
    --------
    >>> from wbdit.data.cell_matrix import as_rows
    >>> as_rows(np.eye(2)).data
    array([1., 1.], dtype=float32)
    """
    rows = sp.csr_matrix(X, dtype=np.float32)
    rows.sort_indices()
    return rows


def _as_slice(index: np.ndarray) -> np.ndarray | slice:
    """Return indices that count up by one as a slice, which is cheaper to read."""
    n = len(index)
    if n and index[-1] - index[0] == n - 1 and (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def _of(chosen: np.ndarray | None, index: np.ndarray | None) -> np.ndarray | None:
    """Return indices among the indices that were chosen before; None stands for all."""
    if index is None:
        return chosen
    return np.asarray(index) if chosen is None else chosen[index]


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
    for part in parts(matrix.shape, cells):
        yield part, matrix.rows(np.arange(part.start, part.stop))


def cells_per_chunk(genes: int) -> int:
    """Return how many cells of as many genes have about :data:`CHUNK_VALUES` values, at least one."""
    return max(1, CHUNK_VALUES // max(genes, 1))


def parts(shape: tuple[int, int], cells: int | None = None) -> Iterator[slice]:
    """Yield the chunks of a pass over all cells, as slices of their indices; a long pass shows its progress.

    Examples
    --------
    >>> from wbdit.data.cell_matrix import parts
    >>> list(parts((700, 765), cells=400))
    [slice(0, 400, None), slice(400, 700, None)]
    """
    n, genes = shape
    size = cells or cells_per_chunk(genes)
    with pass_over("reading cells") as show:
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))
            show(min(start + size, n) / n)


def dense_chunks(matrix: CellMatrix, cells: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield all cells in order, as slices of their indices and dense fp32 chunks; arguments as in :func:`chunks`."""
    for part, X in chunks(matrix, cells):
        yield part, X.toarray()
