"""Expression matrices in an ``.h5ad`` or ``.zarr`` file, or computed on demand by dask, which are read in pieces."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp

from wbdit._progress import pass_over
from wbdit.data.cell_matrix import CellMatrix, SelectedMatrix, as_rows
from wbdit.data.compact_matrix import CompactMatrix
from wbdit.data.structure import check_indices, check_pointers

PIECE_VALUES = 2**22  # values that are read at once: some 50 MB
BLOCK_VALUES = 2**25  # values that are turned at once, of a matrix that is stored by genes

logger = logging.getLogger("wbdit")


def is_stored(X: Any) -> bool:
    """Return whether a matrix of an AnnData lies outside of memory: in HDF5, in zarr, or computed on demand.

    Examples
    --------
    >>> from wbdit.data.stored_matrix import is_stored
    >>> is_stored(cells.X)
    False
    """
    return hasattr(X, "to_memory") or hasattr(X, "compute") or (hasattr(X, "chunks") and hasattr(X, "shape"))


def stored_matrix(X: Any, name: str = "X") -> CellMatrix:
    """Return a reader of a stored matrix; one that is stored by genes (CSC) is first copied to the cache by cells.

    Parameters
    ----------
    X
        ``(cells, genes)``: a sparse dataset of anndata, a dataset of h5py, an array of zarr or of dask.
    name
        Its name in messages.

    Raises
    ------
    InputError
        If its structure is damaged.

    Examples
    --------
    >>> import anndata as ad
    >>> from wbdit.data.stored_matrix import stored_matrix
    >>> cells.write_h5ad("cells.h5ad")
    >>> matrix = stored_matrix(ad.read_h5ad("cells.h5ad", backed="r").X)
    >>> matrix.shape, (matrix.rows(np.array([7, 3])) != cells.X[[7, 3]]).nnz
    ((700, 765), 0)
    """
    if getattr(X, "format", None) == "csc":
        logger.info(f"{name} is stored by genes: it is first copied by cells; save it by cells to spare this (tocsr())")
        return _by_cells(_Compressed(X, name), X.shape)
    return StoredMatrix(X, name)


class StoredMatrix:
    """A matrix that is stored by cells and read in pieces; :func:`stored_matrix` makes one."""

    def __init__(self, X: Any, name: str) -> None:
        self.shape: tuple[int, int] = (int(X.shape[0]), int(X.shape[1]))
        self._read = _Compressed(X, name) if hasattr(X, "to_memory") else _Dense(X)
        self._per_piece = max(1, int(PIECE_VALUES / max(self._read.per_row, 1)))  # cells
        self._piece: tuple[int, int, Any] = (0, 0, None)  # the last piece: a pass reads it in smaller ones
        self._lock = threading.Lock()

    def read(self, index: np.ndarray) -> Any:
        """Return the cells with these indices, see :meth:`CellMatrix.read`."""
        wanted, places = np.unique(index, return_inverse=True)
        found = [self._rows(part) for part in self._neighbors(wanted)]
        if not found:
            return sp.csr_matrix((0, self.shape[1]), dtype=np.float32)
        stacked = found[0]
        if len(found) > 1:
            stacked = sp.vstack(found, format="csr") if sp.issparse(found[0]) else np.concatenate(found)
        in_order = len(places) == len(wanted) and (np.diff(places) == 1).all()
        return stacked if in_order else stacked[places]

    def rows(self, index: np.ndarray) -> sp.csr_matrix:
        """Return the cells with these indices, see :meth:`CellMatrix.rows`."""
        return as_rows(self.read(index))

    def select(self, cells: np.ndarray | None = None, genes: np.ndarray | None = None) -> SelectedMatrix:
        """Return a part of the matrix, see :meth:`CellMatrix.select`."""
        return SelectedMatrix(self, cells, genes)

    def _neighbors(self, wanted: np.ndarray) -> list[np.ndarray]:
        """Split sorted indices where reading the cells in between would cost more than another read."""
        if not len(wanted):
            return []
        far = np.diff(wanted) > max(1, self._per_piece // 64)
        piece = wanted // self._per_piece
        return np.split(wanted, np.flatnonzero(far | (np.diff(piece) > 0)) + 1)

    def _rows(self, wanted: np.ndarray) -> Any:
        """Return cells of one piece, by their sorted indices."""
        first, last = int(wanted[0]), int(wanted[-1]) + 1
        with self._lock:
            start, stop, X = self._piece
            if not start <= first < last <= stop:
                start, stop = first, last
                if last - first > self._per_piece // 64:  # likely a pass over all cells
                    start = first // self._per_piece * self._per_piece
                    stop = min(start + self._per_piece, self.shape[0])
                X = self._read(start, stop)
                if stop - start > last - first:
                    self._piece = start, stop, X
        whole = len(wanted) == last - first
        return X[first - start : last - start] if whole else X[wanted - start]


class _Compressed:
    """Rows of a sparse dataset in compressed format; those of a CSC matrix are its columns."""

    def __init__(self, X: Any, name: str) -> None:
        group = X.group
        self.name = name
        self.indices, self.data = group["indices"], group["data"]
        rows, self.columns = X.shape if X.format == "csr" else X.shape[::-1]
        pointers = np.asarray(group["indptr"][:])
        check_pointers(pointers, self.indices, self.data, (rows, self.columns), name)
        self.pointers = pointers.astype(np.int64)
        entries = int(self.pointers[-1])
        self.per_row = entries / max(rows, 1)

    def __call__(self, start: int, stop: int) -> sp.csr_matrix:
        pointers = self.pointers[start : stop + 1]
        first, last = int(pointers[0]), int(pointers[-1])
        indices, data = np.asarray(self.indices[first:last]), np.asarray(self.data[first:last])
        check_indices(indices, self.columns, self.name)
        if data.dtype == np.float16:  # which scipy stores, but does not compute with
            data = data.astype(np.float32)
        X = sp.csr_matrix((data, indices.astype(np.int32), pointers - first), shape=(stop - start, self.columns))
        X.sum_duplicates()
        return X


class _Dense:
    """Rows of a dense dataset, or of a dask array, which may consist of sparse pieces."""

    def __init__(self, X: Any) -> None:
        self.X = X
        self.per_row = int(X.shape[1])

    def __call__(self, start: int, stop: int) -> Any:
        X = self.X[start:stop]
        if hasattr(X, "compute"):
            X = X.compute()
        if sp.issparse(X):
            X = sp.csr_matrix(X)
            X.sum_duplicates()
        X = X if sp.issparse(X) else np.asarray(X)
        return X.astype(np.float32) if X.dtype == np.float16 else X


def _by_cells(columns: _Compressed, shape: tuple[int, int]) -> CompactMatrix:
    """Copy a matrix that is stored by genes; each block of cells takes a pass over the file."""
    entries = int(columns.pointers[-1])
    pieces = [(start, min(start + _genes(columns), shape[1])) for start in range(0, shape[1], _genes(columns))]
    per_cell = np.zeros(shape[0], np.int64)
    for start, stop in pieces:
        per_cell += np.bincount(columns(start, stop).indices, minlength=shape[0])
    blocks = np.searchsorted(np.cumsum(per_cell), np.arange(0, entries + 1, BLOCK_VALUES))
    edges = np.unique([0, *blocks[1:].tolist(), shape[0]])

    def turned() -> Iterator[sp.csr_matrix]:
        with pass_over("turning X") as show:
            for first, last in pairwise(edges.tolist()):
                parts = [columns(start, stop)[:, first:last] for start, stop in pieces]
                block = as_rows(sp.vstack(parts, format="csr").T)
                yield block
                show(last / shape[0])

    return CompactMatrix.collect(turned(), shape[1], expected=6 * entries)


def _genes(columns: _Compressed) -> int:
    """Return the genes that are read at once."""
    return max(1, int(PIECE_VALUES / max(columns.per_row, 1)))
