"""Statistics of genes and cells, learned in one pass over the cells in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wbdit.data.cell_matrix import CellMatrix, dense_chunks
from wbdit.data.normalize import Values, transformed


@dataclass(frozen=True)
class Statistics:
    """Statistics of training cells.

    Sums are in fp64 and in the order of the cells, so they do not depend on where the cells are stored.

    Attributes
    ----------
    mean, variance
        Of each gene's values, ``(G,)`` fp64; the variance is divided by n.
    smallest
        Each gene's smallest value above zero, ``(G,)`` fp32; infinite for a gene without.
    largest
        Largest entry of the matrix itself.
    totals
        Sum of the matrix itself over the genes of each cell, ``(n,)`` fp64.
    """

    mean: np.ndarray
    variance: np.ndarray
    smallest: np.ndarray
    largest: float
    totals: np.ndarray

    @classmethod
    def of(cls, matrix: CellMatrix, values: Values) -> Statistics:
        """Return the statistics of cells, whose values are transformed to a kind of values.

        Examples
        --------
        >>> from wbdit.data.cell_matrix import MemoryMatrix
        >>> from wbdit.data.statistics import Statistics
        >>> found = Statistics.of(MemoryMatrix(cells.X), "log1p")
        >>> found.mean.shape, found.totals.shape, found.largest
        ((765,), (700,), 259.0)
        """
        n, genes = matrix.shape
        first, second, pivot = np.zeros(genes), np.zeros(genes), np.zeros(genes)
        smallest, largest, totals = np.full(genes, np.inf, np.float32), -np.inf, np.zeros(n)
        for part, dense in dense_chunks(matrix):
            seen = transformed(dense, values)
            if part.start == 0:
                pivot = seen.mean(0, dtype=np.float64)  # near the mean, so that the squares do not cancel
            away = seen - pivot
            first += away.sum(0)
            second += np.einsum("ng,ng->g", away, away)
            smallest = np.minimum(smallest, np.where(seen > 0, seen, np.float32(np.inf)).min(0))
            largest = max(largest, float(dense.max()))
            totals[part] = dense.sum(1, dtype=np.float64)
        return cls(pivot + first / n, np.maximum(second / n - (first / n) ** 2, 0), smallest, largest, totals)
