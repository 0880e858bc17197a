"""Statistics of genes and cells, learned in one pass over the cells in chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from wbdit.data.cell_matrix import CellMatrix, chunks
from wbdit.data.covariates import quantile_bins
from wbdit.data.moments import Moments
from wbdit.data.normalize import Values, transformed_rows

# of all combinations of labels, and of them by all genes
MOST_COMBINATIONS, MOST_TABLE_VALUES = 1024, 4 * 10**6


class Groups(NamedTuple):
    """The group of each cell, ``(n,)`` int64, and the number of groups."""

    of_cell: np.ndarray
    size: int


class Sums(NamedTuple):
    """Sums over the cells of each group: of counts, and of ln(1 + count per 10,000), ``(groups, G)`` fp64 each."""

    counts: np.ndarray
    log: np.ndarray


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
    matrix_mean, matrix_variance
        The same of the matrix itself, as :attr:`mean` and :attr:`variance`.
    largest
        Each gene's largest entry of the matrix itself, ``(G,)`` fp32.
    totals
        Sum of the matrix itself over the genes of each cell, ``(n,)`` fp64.
    sums
        Sums of the matrix itself over the cells of each group, ``(groups, G)`` fp64, one table per grouping.
    by_combination
        Sums over the cells of each combination of labels; None if they were not asked for.
    """

    mean: np.ndarray
    variance: np.ndarray
    smallest: np.ndarray
    matrix_mean: np.ndarray
    matrix_variance: np.ndarray
    largest: np.ndarray
    totals: np.ndarray
    sums: tuple[np.ndarray, ...] = ()
    by_combination: Sums | None = None

    @classmethod
    def of(
        cls,
        matrix: CellMatrix,
        values: Values,
        groupings: Sequence[Groups] = (),
        combinations: Groups | None = None,
    ) -> Statistics:
        """Return the statistics of cells, whose values are transformed to a kind of values.

        Parameters
        ----------
        matrix
            Cells by genes.
        values
            Kind of values.
        groupings
            Groupings of the cells for :attr:`sums`, such as :func:`training_groups`.
        combinations
            Grouping of the cells for :attr:`by_combination`, such as :func:`training_combinations`.

        Examples
        --------
        >>> from wbdit.data.cell_matrix import MemoryMatrix
        >>> from wbdit.data.statistics import Statistics
        >>> found = Statistics.of(MemoryMatrix(cells.X), "log1p")
        >>> found.mean.shape, found.totals.shape, found.largest.max()
        ((765,), (700,), np.float32(259.0))
        """
        n, genes = matrix.shape
        seen, stored = Moments(genes), Moments(genes)
        smallest, largest = np.full(genes, np.inf, np.float32), np.full(genes, -np.inf, np.float32)
        totals, sums = np.zeros(n), tuple(np.zeros((grouping.size, genes)) for grouping in groupings)
        pooled = None
        if combinations is not None:
            pooled = Sums(np.zeros((combinations.size, genes)), np.zeros((combinations.size, genes)))
        for part, X in chunks(matrix):
            changed = transformed_rows(X, values)
            seen.add(changed)
            stored.add(X)
            above = changed.data > 0
            np.minimum.at(smallest, changed.indices[above], changed.data[above])
            np.maximum.at(largest, X.indices, X.data)
            has_zeros = np.bincount(X.indices, minlength=genes) < X.shape[0]
            largest[has_zeros] = np.maximum(largest[has_zeros], 0)
            totals[part] = np.asarray(X.sum(1, dtype=np.float64)).ravel()
            for table, grouping in zip(sums, groupings, strict=True):
                add_by_group(table, grouping.of_cell[part], X)
            if combinations is not None and pooled is not None:
                add_by_group(pooled.counts, combinations.of_cell[part], X)
                add_by_group(pooled.log, combinations.of_cell[part], transformed_rows(X, "lognorm"))
        moments = seen.mean, seen.variance(), smallest, stored.mean, stored.variance()
        return cls(*moments, largest, totals, sums, pooled)


def training_groups(
    codes: np.ndarray, label_sizes: Sequence[int], covariates: np.ndarray | None = None
) -> list[Groups]:
    """Return the groupings of training cells by each label column, then by quantile bins of each covariate.

    Parameters
    ----------
    codes
        Labels ``(n, C)`` int64.
    label_sizes
        Number of labels of each column, ``(C,)``.
    covariates
        Scaled covariates ``(n, K)``, if any.

    Examples
    --------
    >>> from wbdit.data.statistics import training_groups
    >>> ages = np.linspace(-1, 1, 100)[:, None]
    >>> [grouping.size for grouping in training_groups(np.zeros((100, 1), int), [2], ages)]
    [2, 64]
    """
    bins = [] if covariates is None else [quantile_bins(x) for x in covariates.T]
    by_label = [Groups(column, size) for column, size in zip(codes.T, label_sizes, strict=True)]
    return [*by_label, *(Groups(found, int(found.max()) + 1) for found in bins)]


def most_combinations(genes: int) -> int:
    """Return the largest number of combinations of labels that have tables of all genes."""
    return min(MOST_COMBINATIONS, MOST_TABLE_VALUES // genes)


def training_combinations(codes: np.ndarray, label_sizes: Sequence[int], genes: int) -> Groups | None:
    """Return the grouping of training cells by their combination of labels, in lexicographic order.

    None for less than two label columns, or if tables of all combinations of their labels would be too large.

    Examples
    --------
    >>> from wbdit.data.statistics import training_combinations
    >>> training_combinations(np.array([[0, 1], [0, 0], [0, 1]]), [1, 2], 10)
    Groups(of_cell=array([1, 0, 1]), size=2)
    """
    combinations = math.prod(label_sizes)
    if len(label_sizes) < 2 or combinations > most_combinations(genes):
        return None
    known, of_cell = np.unique(codes, axis=0, return_inverse=True)
    return Groups(of_cell.reshape(-1), len(known))


def add_by_group(table: np.ndarray, group: np.ndarray, X: sp.csr_matrix) -> None:
    """Add cells ``(B, G)`` to the sums ``(groups, G)`` fp64 of their groups ``(B,)``.

    Examples
    --------
    >>> from wbdit.data.statistics import add_by_group
    >>> table = np.zeros((2, 765))
    >>> add_by_group(table, np.arange(700) % 2, cells.X)
    >>> table.sum() == cells.X.sum()
    np.True_
    """
    cells = np.arange(len(group))
    member = sp.csr_matrix((np.ones(len(group)), (group, cells)), shape=(len(table), len(group)))
    found = (member @ X).tocoo()
    table[found.row, found.col] += found.data
