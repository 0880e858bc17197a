"""Structure within cell types, and the curves that benchmarks of simulators compare.

Correlations and variances over all cells are mostly those between types: a generator that draws each gene of a type on
its own gets them right. These metrics look within types. Functions take real cells ``(n, genes)`` and other cells
``(m, genes)``, log-normalized. Examples assume ``from wbdit.evaluation.within import *``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wbdit.evaluation.genes import gene_correlations

Array = np.ndarray[Any, Any]

BINS = 20  # of genes, by mean
QUANTILES = 200


def within_corr(real: Sequence[Array], other: Sequence[Array]) -> float:
    """Compute the Frobenius distance of gene-gene correlations within types, averaged over types by real cells.

    Parameters
    ----------
    real, other
        One array per type; select the genes by :func:`wbdit.evaluation.genes.most_variable` first.

    Returns
    -------
    At least 0, which is best. NaN without types.

    Examples
    --------
    >>> cells = np.array([[0.0, 0.0], [1.0, 1.0]])
    >>> round(within_corr([cells, cells], [cells, cells * [1, -1]]), 3)  # correlations of 1 and -1 in one of two types
    1.414
    """
    return _by_type(real, other, lambda a, b: np.linalg.norm(gene_correlations(a) - gene_correlations(b)))


def within_var(real: Sequence[Array], other: Sequence[Array]) -> float:
    """Compute the distance of gene variances within types, ``|v - v'| / |v|``, averaged over types by real cells.

    Parameters
    ----------
    real, other
        One array per type, as in :func:`within_corr`.

    Returns
    -------
    At least 0, which is best. NaN without types.

    Examples
    --------
    >>> cells = np.array([[0.0, 2.0], [1.0, 1.0]])
    >>> within_var([cells], [cells]), round(within_var([cells], [2 * cells]), 6)
    (0.0, 3.0)
    """

    def distance(a: Array, b: Array) -> float:
        wanted = a.var(axis=0)
        size = np.linalg.norm(wanted)
        return float(np.linalg.norm(b.var(axis=0) - wanted) / size) if size > 0 else float("nan")

    return _by_type(real, other, distance)


def mean_var(real: Array, other: Array) -> float:
    """Compute the distance between the curves of a gene's variance over its mean.

    The means and variances of genes are those of all cells. Genes are binned by the logarithm of their mean; a curve
    is the mean log10 variance per bin. SimBench (Cao et al., Nature Communications 12, 2021) and countsimQC (Soneson
    & Robinson, Bioinformatics 34, 2018) compare the same curves, by other distances.

    Returns
    -------
    Mean absolute difference of the curves in decades, weighted by the real genes of a bin. 0 is best.

    Examples
    --------
    >>> cells = np.random.default_rng(0).gamma(1.0, size=(200, 100))
    >>> mean_var(cells, cells), round(mean_var(cells, cells.mean(0) + 10 * (cells - cells.mean(0))), 2)
    (0.0, 2.0)
    """
    return variance_curves(*(np.stack([cells.mean(axis=0), cells.var(axis=0)]) for cells in (real, other)))


def variance_curves(real: Array, other: Array) -> float:
    """Compute :func:`mean_var` from means and variances, ``(2, genes)`` each."""
    return _curves(real[0], _logs(real[1]), other[0], _logs(other[1]))


def dropout_mean(real: Array, other: Array) -> float:
    """Compute the distance between the curves of a gene's share of zeros over its mean; see :func:`mean_var`.

    Returns
    -------
    Mean absolute difference of the curves, 0 to 1. 0 is best.

    Examples
    --------
    >>> cells = np.random.default_rng(0).poisson(0.5, size=(200, 100))
    >>> dropout_mean(cells, cells), round(dropout_mean(cells, np.maximum(cells, 0.001)), 1)
    (0.0, 0.6)
    """
    return zero_curves(*(np.stack([cells.mean(axis=0), (cells == 0).mean(axis=0)]) for cells in (real, other)))


def zero_curves(real: Array, other: Array) -> float:
    """Compute :func:`dropout_mean` from means and shares of zeros, ``(2, genes)`` each."""
    return _curves(real[0], real[1], other[0], other[1])


def cell_cell(real: Array, other: Array) -> float:
    """Compute the Wasserstein-1 distance between the distributions of correlations between pairs of cells (SimBench).

    Returns
    -------
    0 to 2; 0 is best. Symmetric.

    Examples
    --------
    >>> cells = np.random.default_rng(0).normal(size=(100, 50))
    >>> cell_cell(cells, cells), round(cell_cell(cells, np.repeat(cells[:1], 100, axis=0)), 1)
    (0.0, 1.0)
    """
    return pair_distance(*(gene_correlations(np.asarray(cells).T) for cells in (real, other)))


def pair_distance(real: Array, other: Array) -> float:
    """Compute :func:`cell_cell` from correlations between cells, ``(n, n)`` and ``(m, m)``."""
    at = (np.arange(QUANTILES) + 0.5) / QUANTILES
    a, b = (np.quantile(pairs[np.triu_indices(len(pairs), 1)], at) for pairs in (real, other))
    return float(np.abs(a - b).mean())


def _by_type(real: Sequence[Array], other: Sequence[Array], distance: Any) -> float:
    if not real:
        return float("nan")
    values = [float(distance(a, b)) for a, b in zip(real, other, strict=True)]
    return float(np.average(values, weights=[len(cells) for cells in real]))


def _curves(means: Array, heights: Array, other_means: Array, other_heights: Array) -> float:
    """Return the mean distance of two curves over bins of the first one's means; bins empty in either do not count."""
    at, other_at = _logs(means), _logs(other_means)
    edges = np.quantile(at, np.linspace(0, 1, BINS + 1)[1:-1])
    sums, sizes = [], []
    for places, height in ((at, heights), (other_at, other_heights)):
        bins = np.searchsorted(edges, places)
        sizes.append(np.bincount(bins, minlength=BINS))
        sums.append(np.bincount(bins, height, minlength=BINS))
    known = (sizes[0] > 0) & (sizes[1] > 0)
    if not known.any():
        return float("nan")
    apart = np.abs(sums[0][known] / sizes[0][known] - sums[1][known] / sizes[1][known])
    return float(np.average(apart, weights=sizes[0][known]))


def _logs(values: Array) -> Array:
    return np.log10(np.maximum(values, 1e-6))
