"""Selection of the most variable genes, as scanpy selects them.

scanpy itself is not used: with its own dependencies it adds about 430 MB to an installation that only trains and
generates. The two rankings are short, and a test compares them with scanpy's. The loess fit comes from scikit-misc, as
in scanpy.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import scipy.sparse as sp

from wbdit.data.cell_matrix import CellMatrix, chunks
from wbdit.data.moments import Moments
from wbdit.data.space import Space
from wbdit.errors import InputError

SPAN = 0.3  # of the loess fit
MEAN_BINS = 20
NO_VARIANCE = 1e-12  # of the squared mean: the rounding error of equal values


def variable_genes(matrix: CellMatrix, space: Space, n: int, batches: np.ndarray | None = None) -> np.ndarray:
    """Return a mask ``(genes,)`` bool of at most `n` genes, the most variable ones.

    Genes of counts are ranked by their variance beyond the fitted mean-variance curve (``seurat_v3``; Stuart et al.
    2019), genes of log-normalized values by binned dispersion (``seurat``; Satija et al. 2015). Genes without
    expression are never chosen. Counts take two passes over the cells, log-normalized values one.

    Parameters
    ----------
    matrix
        Cells by genes, in this expression space.
    space
        Expression space.
    n
        Number of genes.
    batches
        Batch of each cell, ``(cells,)``. Genes are ranked in each batch, and those that are variable in most batches
        are kept.

    Raises
    ------
    InputError
        For scaled values, whose variances carry no information, or if a batch has too few cells.

    Examples
    --------
    >>> from wbdit.data.cell_matrix import MemoryMatrix
    >>> from wbdit.data.variable_genes import variable_genes
    >>> mask = variable_genes(MemoryMatrix(cells.X), "counts", 100)
    >>> mask.shape, int(mask.sum())
    ((765,), 100)
    """
    if space == "scaled":
        raise InputError(
            f"variable genes cannot be chosen from scaled values: keep at most {n} genes, choose them with `genes`, or "
            "give counts"
        )
    cells, genes = matrix.shape
    batch = np.zeros(cells, np.int64) if batches is None else np.unique(batches, return_inverse=True)[1]
    moments = [Moments(genes) for _ in range(int(batch.max()) + 1)]
    for one, X in _parts(matrix, batch):
        moments[one].add(X if space == "counts" else X.expm1())
    expressed = np.sum([known.sums for known in moments], axis=0) > 0
    if expressed.sum() <= n:
        return expressed
    if min(known.n for known in moments) < 2:
        raise InputError("a batch of `batch_key` has one cell: merge it into another batch or drop it")
    if space == "counts":
        chosen = _by_variance(_standardized_variances(matrix, batch, moments, expressed), n)
    else:
        chosen = _by_dispersion([(known.mean[expressed], known.variance(1)[expressed]) for known in moments], n)
    mask = np.zeros(genes, bool)
    mask[np.flatnonzero(expressed)[chosen]] = True
    return mask


def _parts(matrix: CellMatrix, batch: np.ndarray) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Yield all cells in chunks of one batch each: the batch and its cells, CSR fp64."""
    for part, X in chunks(matrix):
        X = X.astype(np.float64)
        present = np.unique(batch[part])
        for one in present:
            yield int(one), X if len(present) == 1 else X[batch[part] == one]


def _by_variance(scores: np.ndarray, n: int) -> np.ndarray:
    """Return the columns of the `n` genes with the largest scores ``(batches, genes)``, by median rank."""
    ranks = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1).astype(float)
    ranks[ranks >= n] = np.nan
    found = np.sum(~np.isnan(ranks), axis=0)
    median = np.ma.median(np.ma.masked_invalid(ranks), axis=0).filled(np.nan)
    table = pd.DataFrame({"rank": median, "batches": found})
    return table.sort_values(["rank", "batches"], ascending=[True, False], na_position="last").index[:n].to_numpy()


def _standardized_variances(
    matrix: CellMatrix, batch: np.ndarray, moments: list[Moments], expressed: np.ndarray
) -> np.ndarray:
    """Return the variance of each expressed gene in each batch, ``(batches, expressed genes)``.

    Counts are standardized by a fitted curve and clipped at the square root of the number of cells.
    """
    deviations = np.ones((len(moments), len(expressed)))
    for known, row in zip(moments, deviations, strict=True):
        row[expressed] = _fitted_deviation(known.mean[expressed], known.variance(1)[expressed], known.n)
    cells = np.array([known.n for known in moments])[:, None]
    means = np.stack([known.mean for known in moments])
    most = deviations * np.sqrt(cells) + means
    totals, squares = np.zeros_like(most), np.zeros_like(most)
    for one, X in _parts(matrix, batch):
        clipped = np.minimum(X.data, most[one, X.indices])
        totals[one] += np.bincount(X.indices, clipped, minlength=X.shape[1])
        squares[one] += np.bincount(X.indices, clipped**2, minlength=X.shape[1])
    scores = (cells * means**2 + squares - 2 * totals * means) / ((cells - 1) * deviations**2)
    return scores[:, expressed]


def _fitted_deviation(mean: np.ndarray, variance: np.ndarray, n: int) -> np.ndarray:
    """Return the standard deviation that a gene of each mean has, by a curve fitted to genes in `n` cells."""
    from skmisc.loess import loess

    varies = variance > 0
    fitted = np.zeros(len(mean))
    try:
        if SPAN * varies.sum() < 3:  # points for a parabola; with fewer, the library crashes
            raise ValueError("too few genes")
        model = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=SPAN, degree=2)
        model.fit()
    except ValueError as error:
        raise InputError(
            f"variable genes cannot be chosen from these {n} cells (the curve of variance over mean cannot be fitted): "
            "choose genes with `genes`, or keep all with a larger `max_genes`"
        ) from error
    fitted[varies] = model.outputs.fitted_values
    return np.sqrt(10**fitted)


def _by_dispersion(moments: list[tuple[np.ndarray, np.ndarray]], n: int) -> np.ndarray:
    """Return the columns of the `n` genes with the largest normalized dispersion: by batches, then mean.

    `moments` holds the mean and the variance of each gene in each batch.
    """
    scores, tops = zip(*(_dispersion_in(mean, variance, n) for mean, variance in moments), strict=True)
    if not np.any(tops):
        raise InputError(
            "variable genes cannot be chosen, because no gene varies between the cells: choose genes with `genes`, or "
            "keep all with a larger `max_genes`"
        )
    if len(tops) == 1:
        return np.flatnonzero(tops[0])
    table = pd.DataFrame({"batches": np.sum(tops, axis=0), "score": pd.DataFrame(scores).mean()})
    return table.sort_values(["batches", "score"], ascending=False, na_position="last").index[:n].to_numpy()


def _dispersion_in(mean: np.ndarray, variance: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of a batch, 0 for genes without expression in it, and a mask of its `n` largest ones."""
    score, top = np.zeros(len(mean)), np.zeros(len(mean), bool)
    expressed = mean > 0
    score[expressed] = _normalized_dispersion(mean[expressed], variance[expressed])
    top[expressed] = _largest(score[expressed], n)
    return score, top


def _largest(scores: np.ndarray, n: int) -> np.ndarray:
    """Return a mask of the `n` largest scores, and of those that equal the last of them."""
    known = np.sort(scores[~np.isnan(scores)])[::-1]
    if not len(known):
        return np.zeros(len(scores), bool)
    return np.nan_to_num(scores, nan=-np.inf) >= known[min(n, len(known)) - 1]


def _normalized_dispersion(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return each expressed gene's log dispersion, standardized among genes of similar mean."""
    dispersion = np.where(variance > NO_VARIANCE * mean**2, variance / mean, np.nan)
    table = pd.DataFrame({"dispersion": np.log(dispersion), "bin": pd.cut(np.log1p(mean), bins=MEAN_BINS)})
    groups = table.groupby("bin", observed=True)["dispersion"]
    average, deviation = groups.transform("mean"), groups.transform("std")
    alone = deviation.isna()  # one gene in its bin: its score is one
    average, deviation = average.mask(alone, 0.0), deviation.mask(alone, average)
    return ((table["dispersion"] - average) / deviation).to_numpy()
