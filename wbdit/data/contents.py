"""What the values of a matrix are like, found in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from wbdit.data.cell_matrix import CellMatrix, parts

SAMPLED_CELLS = 300


@dataclass(frozen=True)
class Contents:
    """What a pass over a matrix finds.

    Attributes
    ----------
    shape
        Number of cells and of genes.
    dtype
        Number type of the values.
    stored
        Number of values; a sparse matrix does not store all zeros.
    nonzero
        Number of values that are not zero.
    bad
        Number of NaN and infinite values.
    fractional
        Number of values that are not integers.
    lowest, highest
        Range of the stored values.
    cells
        Nonzero values of evenly spaced cells, fp64, without empty cells.

    Examples
    --------
    >>> from wbdit.data.cell_matrix import MemoryMatrix
    >>> from wbdit.data.contents import Contents
    >>> found = Contents.of(MemoryMatrix(cells.X))
    >>> found.lowest, found.highest, found.fractional, len(found.cells)
    (1.0, 259.0, 0, 300)
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    stored: int = 0
    nonzero: int = 0
    bad: int = 0
    fractional: int = 0
    lowest: float = np.inf
    highest: float = -np.inf
    cells: tuple[np.ndarray, ...] = ()

    @classmethod
    def of(cls, matrix: CellMatrix) -> Contents:
        """Return what a matrix holds; one that holds no numbers is not read to its end."""
        n = matrix.shape[0]
        dtype = matrix.read(np.arange(min(n, 1))).dtype
        if not _is_real(dtype):
            return cls(matrix.shape, dtype)
        sampled = sampled_cells(n)
        stored = nonzero = bad = fractional = 0
        lowest, highest = np.inf, -np.inf
        cells: list[np.ndarray] = []
        for part in parts(matrix.shape):
            X = matrix.read(np.arange(part.start, part.stop))
            values = X.data if sp.issparse(X) else np.asarray(X).ravel()
            cells += _nonzero_values(X[sampled[(sampled >= part.start) & (sampled < part.stop)] - part.start])
            stored += values.size
            nonzero += int(np.count_nonzero(values))
            if values.size and np.issubdtype(values.dtype, np.floating):
                bad += values.size - int(np.isfinite(values).sum())
                fractional += int(np.count_nonzero(values != np.rint(values)))
            if values.size:
                lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
        return cls(matrix.shape, dtype, stored, nonzero, bad, fractional, lowest, highest, tuple(cells))

    @property
    def zeros(self) -> int:
        """Number of zeros, stored or not."""
        return self.shape[0] * self.shape[1] - self.nonzero

    @property
    def holds_numbers(self) -> bool:
        """Whether the values are real numbers."""
        return _is_real(self.dtype)


def sampled_cells(n: int) -> np.ndarray:
    """Return the indices of up to :data:`SAMPLED_CELLS` evenly spaced cells among `n`.

    Examples
    --------
    >>> from wbdit.data.contents import sampled_cells
    >>> sampled_cells(700)[:4]
    array([0, 2, 4, 7])
    """
    return np.unique(np.linspace(0, n - 1, min(n, SAMPLED_CELLS)).astype(int))


def _is_real(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iuf"


def _nonzero_values(X: Any) -> list[np.ndarray]:
    cells = np.split(X.data, X.indptr[1:-1]) if sp.issparse(X) else list(np.asarray(X))
    nonzero = [cell[cell != 0].astype(np.float64) for cell in cells]
    return [cell for cell in nonzero if cell.size]
