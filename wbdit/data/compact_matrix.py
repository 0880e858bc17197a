"""The training cells in their smallest form: in memory if they fit, else in a temporary file.

Random rows of a compressed file are slow, since each needs a whole chunk to be decompressed. So the genes that a run
uses are copied once, in the order of the cells: about 3 bytes per non-zero count. From then on any row is read in
microseconds, and all sources give the same cells in the same random order. The file has no name, so that the system
removes it when the process ends, however it ends.
"""

from __future__ import annotations

import errno
import logging
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp

from wbdit._cache import cache_folders
from wbdit.data.capacity import fits, in_words
from wbdit.data.cell_matrix import CellMatrix, SelectedMatrix, chunks
from wbdit.data.contents import sampled_cells
from wbdit.errors import InputError

VALUE_TYPES = (np.uint8, np.uint16, np.float32)  # the first that holds all values exactly is used

logger = logging.getLogger("wbdit")


class CompactMatrix:
    """Cells by genes in the smallest number types that hold them; :meth:`of` and :meth:`collect` make one.

    Parameters
    ----------
    pointers
        ``(cells + 1,)`` int64, start of each cell's entries.
    indices
        Gene of each entry.
    values
        Value of each entry.
    genes
        Number of genes.

    Examples
    --------
    >>> from wbdit.data.cell_matrix import MemoryMatrix
    >>> from wbdit.data.compact_matrix import CompactMatrix
    >>> compact = CompactMatrix.of(MemoryMatrix(cells.X))
    >>> compact.shape, compact.nbytes < cells.X.data.nbytes + cells.X.indices.nbytes
    ((700, 765), True)
    >>> (compact.rows(np.array([4, 1])) != cells.X[[4, 1]]).nnz
    0
    """

    def __init__(self, pointers: np.ndarray, indices: _Numbers, values: _Numbers, genes: int) -> None:
        self.pointers = pointers
        self.indices = indices
        self.values = values
        self.genes = genes

    @classmethod
    def of(cls, matrix: CellMatrix) -> CompactMatrix:
        """Copy a matrix in one pass.

        Raises
        ------
        InputError
            If the cells fit neither into memory nor into the cache folder.
        """
        if isinstance(matrix, cls):
            return matrix
        n, genes = matrix.shape
        some = sampled_cells(n)
        per_cell = matrix.rows(some).nnz / len(some)
        return cls.collect((X for _, X in chunks(matrix)), genes, expected=int(n * (4 * per_cell + 8)))

    @classmethod
    def collect(cls, pieces: Iterable[sp.csr_matrix], genes: int, expected: int | None) -> CompactMatrix:
        """Copy canonical CSR pieces of consecutive cells.

        Parameters
        ----------
        pieces
            Cells by genes.
        genes
            Number of genes.
        expected
            Expected size in bytes, which decides where the cells are kept; None for a file.

        Raises
        ------
        InputError
            As :meth:`of`.
        """
        folder = None if expected is not None and fits(expected) else _folder_with(expected or 0)
        kind = _InMemory if folder is None else _InFile
        indices: _Numbers = kind(np.min_scalar_type(max(genes - 1, 0)), folder)
        values: _Numbers = kind(np.dtype(VALUE_TYPES[0]), folder)
        counted = [np.zeros(1, np.int64)]
        try:
            for X in pieces:
                counted.append(np.diff(X.indptr).astype(np.int64))
                indices.append(X.indices)
                while not _holds(values.dtype, X.data):
                    values.change_type(np.dtype(VALUE_TYPES[VALUE_TYPES.index(values.dtype.type) + 1]))
                values.append(X.data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
                raise
            raise InputError(
                f"{folder} is full: the training cells need more space there; set WBDIT_CACHE to a larger folder"
            ) from error
        indices.close_writing()
        values.close_writing()
        made = cls(np.cumsum(np.concatenate(counted)), indices, values, genes)
        if folder is not None:
            logger.info(f"the training cells take {in_words(made.nbytes)} in {folder} until wbdit ends")
        return made

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        return len(self.pointers) - 1, self.genes

    @property
    def nbytes(self) -> int:
        """Size in bytes, in memory or in the file."""
        entries = int(self.pointers[-1])
        return self.pointers.nbytes + entries * (self.indices.dtype.itemsize + self.values.dtype.itemsize)

    def rows(self, index: np.ndarray) -> sp.csr_matrix:
        """Return the cells with these indices, see :meth:`wbdit.data.cell_matrix.CellMatrix.rows`."""
        index = np.asarray(index)
        starts, lengths = self.pointers[index], self.pointers[index + 1] - self.pointers[index]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        if len(index) and (starts[1:] == starts[:-1] + lengths[:-1]).all():  # neighbors: one piece
            starts, lengths = starts[:1], ends[-1:]
        indices = self.indices.take(starts, lengths).astype(np.int32)
        values = self.values.take(starts, lengths).astype(np.float32)
        return sp.csr_matrix((values, indices, ends.astype(np.int32)), shape=(len(index), self.genes))

    read = rows

    def select(self, cells: np.ndarray | None = None, genes: np.ndarray | None = None) -> SelectedMatrix:
        """Return a part of the matrix, see :meth:`wbdit.data.cell_matrix.CellMatrix.select`."""
        return SelectedMatrix(self, cells, genes)


class _Numbers(Protocol):
    """Numbers of one type, appended first and taken in pieces later."""

    dtype: np.dtype[Any]

    def append(self, numbers: np.ndarray) -> None: ...

    def change_type(self, dtype: np.dtype[Any]) -> None:
        """Change the type of all numbers."""

    def close_writing(self) -> None: ...

    def take(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the pieces with these starts and lengths, one after the other."""


class _InMemory:
    def __init__(self, dtype: np.dtype[Any], folder: Path | None) -> None:
        self.dtype = dtype
        self.pieces: list[np.ndarray] = []
        self.all = np.zeros(0, dtype)

    def append(self, numbers: np.ndarray) -> None:
        self.pieces.append(numbers.astype(self.dtype))

    def change_type(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.pieces = [piece.astype(dtype) for piece in self.pieces]

    def close_writing(self) -> None:
        self.all = np.concatenate([self.all.astype(self.dtype), *self.pieces])
        self.pieces = []

    def take(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if len(starts) == 1:
            return self.all[starts[0] : starts[0] + lengths[0]]
        ends = np.cumsum(lengths)
        return self.all[np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)]


class _InFile:
    """Read with positions rather than mapped into memory, so that the process does not grow with the cells."""

    def __init__(self, dtype: np.dtype[Any], folder: Path | None) -> None:
        self.dtype = dtype
        self.folder = folder
        self._open()
        self.lock = threading.Lock()  # of the file's position

    def append(self, numbers: np.ndarray) -> None:
        left = numbers.astype(self.dtype).view(np.uint8).data
        while left:
            left = left[self.file.write(left) :]

    def change_type(self, dtype: np.dtype[Any]) -> None:
        narrow, file = self.dtype, self.file
        self._open()
        self.dtype = dtype
        file.seek(0)
        while piece := file.read(2**24):
            self.append(np.frombuffer(piece, narrow))
        file.close()

    def close_writing(self) -> None:
        pass

    def take(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        size = self.dtype.itemsize
        taken = np.empty(int(lengths.sum()), self.dtype)
        buffer, place = taken.view(np.uint8).data, 0
        with self.lock:
            for start, length in zip((starts * size).tolist(), (lengths * size).tolist(), strict=True):
                self.file.seek(start)
                self._fill(buffer[place : place + length])
                place += length
        return taken

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            read = self.file.readinto(buffer)
            if not read:
                raise OSError(errno.EIO, "the temporary file of the training cells is cut short")
            buffer = buffer[read:]

    def _open(self) -> None:
        self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115, as long as this object
        weakref.finalize(self, self.file.close)


def _holds(dtype: np.dtype[Any], values: np.ndarray) -> bool:
    """Return whether a number type holds all values exactly."""
    if dtype == np.float32 or len(values) == 0:
        return True
    if values.min() < 0 or values.max() > np.iinfo(dtype).max:
        return False
    return bool((values == np.rint(values)).all())


def _folder_with(size: int) -> Path:
    """Return the first writable cache folder, if it has this many bytes free."""
    failed: OSError | None = None
    for folder in cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            free = shutil.disk_usage(folder).free
        except OSError as error:
            failed = error
            continue
        if free < size:
            raise InputError(
                f"the training cells need {in_words(size)} on disk, and {folder} has {in_words(free)} "
                "free: set WBDIT_CACHE to a folder with more space, or use fewer genes"
            )
        return folder
    raise InputError(f"no cache folder can be written ({failed}): set WBDIT_CACHE to one") from failed
