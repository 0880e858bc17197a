"""Selection of the most variable genes, as scanpy selects them.

scanpy itself is not used: with its own dependencies it adds about 430 MB to an installation that only trains and
generates. The two rankings are short, and a test compares them with scanpy's. The loess fit comes from scikit-misc, as
in scanpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from wbdit.data.space import Space
from wbdit.errors import InputError

SPAN = 0.3  # of the loess fit
MEAN_BINS = 20


def variable_genes(X: Any, space: Space, n: int, batches: np.ndarray | None = None) -> np.ndarray:
    """Return a mask ``(genes,)`` bool of at most `n` genes, the most variable ones.

    Genes of counts are ranked by their variance beyond the fitted mean-variance curve (``seurat_v3``; Stuart et al.
    2019), genes of log-normalized values by binned dispersion (``seurat``; Satija et al. 2015). Genes without
    expression are never chosen.

    Parameters
    ----------
    X
        ``(cells, genes)`` dense or sparse, in this expression space.
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
    >>> from wbdit.data.variable_genes import variable_genes
    >>> mask = variable_genes(cells.X, "counts", 100)
    >>> mask.shape, int(mask.sum())
    ((765,), 100)
    """
    if space == "scaled":
        raise InputError(
            f"variable genes cannot be chosen from scaled values: keep at most {n} genes, choose them with `genes`, or "
            "give counts"
        )
    matrix = sp.csr_matrix(X, dtype=np.float64)
    expressed = np.asarray((matrix > 0).sum(0)).ravel() > 0
    if expressed.sum() <= n:
        return expressed
    matrix = matrix[:, np.flatnonzero(expressed)]
    parts = [matrix] if batches is None else [matrix[batches == batch] for batch in np.unique(batches)]
    if min(part.shape[0] for part in parts) < 2:
        raise InputError("a batch of `batch_key` has one cell: merge it into another batch or drop it")
    rank = _by_variance if space == "counts" else _by_dispersion
    chosen = np.zeros(len(expressed), bool)
    chosen[np.flatnonzero(expressed)[rank(parts, n)]] = True
    return chosen


def _by_variance(parts: list[sp.csr_matrix], n: int) -> np.ndarray:
    """Return the columns of the `n` genes with the largest standardized variance: by median rank over the batches."""
    scores = np.stack([_standardized_variance(part) for part in parts])
    ranks = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1).astype(float)
    ranks[ranks >= n] = np.nan
    found = np.sum(~np.isnan(ranks), axis=0)
    median = np.ma.median(np.ma.masked_invalid(ranks), axis=0).filled(np.nan)
    table = pd.DataFrame({"rank": median, "batches": found})
    return table.sort_values(["rank", "batches"], ascending=[True, False], na_position="last").index[:n].to_numpy()


def _standardized_variance(counts: sp.csr_matrix) -> np.ndarray:
    """Return each gene's variance after standardization by a fitted curve and clipping at the square root of n."""
    from skmisc.loess import loess

    n, (mean, variance) = counts.shape[0], _moments(counts)
    varies = variance > 0
    fitted = np.zeros(len(mean))
    try:
        model = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=SPAN, degree=2)
        model.fit()
    except ValueError as error:
        raise InputError(
            f"variable genes cannot be chosen from these {n} cells (the curve of variance over mean cannot be fitted): "
            "choose genes with `genes`, or keep all with a larger `max_genes`"
        ) from error
    fitted[varies] = model.outputs.fitted_values
    sd = np.sqrt(10**fitted)
    clipped = counts.copy()
    clipped.data = np.minimum(clipped.data, (sd * np.sqrt(n) + mean)[clipped.indices])
    total = np.asarray(clipped.sum(0)).ravel()
    squares = np.asarray(clipped.power(2).sum(0)).ravel()
    return (n * mean**2 + squares - 2 * total * mean) / ((n - 1) * sd**2)


def _by_dispersion(parts: list[sp.csr_matrix], n: int) -> np.ndarray:
    """Return the columns of the `n` genes with the largest normalized dispersion: by batches, then mean."""
    scores, tops = zip(*(_dispersion_in(part, n) for part in parts), strict=True)
    if len(tops) == 1:
        return np.flatnonzero(tops[0])
    table = pd.DataFrame({"batches": np.sum(tops, axis=0), "score": pd.DataFrame(scores).mean()})
    return table.sort_values(["batches", "score"], ascending=False, na_position="last").index[:n].to_numpy()


def _dispersion_in(part: sp.csr_matrix, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of a batch, 0 for genes without expression in it, and a mask of its `n` largest ones."""
    score, top = np.zeros(part.shape[1]), np.zeros(part.shape[1], bool)
    expressed = np.flatnonzero(np.asarray((part > 0).sum(0)).ravel())
    score[expressed] = _normalized_dispersion(part[:, expressed])
    top[expressed] = _largest(score[expressed], n)
    return score, top


def _largest(scores: np.ndarray, n: int) -> np.ndarray:
    """Return a mask of the `n` largest scores, and of those that equal the last of them."""
    known = np.sort(scores[~np.isnan(scores)])[::-1]
    return np.nan_to_num(scores, nan=-np.inf) >= known[min(n, len(known)) - 1]


def _normalized_dispersion(values: sp.csr_matrix) -> np.ndarray:
    """Return each gene's log dispersion, standardized among genes of similar mean."""
    mean, variance = _moments(values.expm1())
    mean[mean == 0] = 1e-12
    dispersion = variance / mean
    dispersion[dispersion == 0] = np.nan
    table = pd.DataFrame({"dispersion": np.log(dispersion), "bin": pd.cut(np.log1p(mean), bins=MEAN_BINS)})
    groups = table.groupby("bin", observed=True)["dispersion"]
    average, deviation = groups.transform("mean"), groups.transform("std")
    alone = deviation.isna()  # one gene in its bin: its score is one
    average, deviation = average.mask(alone, 0.0), deviation.mask(alone, average)
    return ((table["dispersion"] - average) / deviation).to_numpy()


def _moments(matrix: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return each gene's mean and unbiased variance, fp64, in two passes."""
    n, genes = matrix.shape
    mean = np.asarray(matrix.mean(0)).ravel()
    squares = np.bincount(matrix.indices, (matrix.data - mean[matrix.indices]) ** 2, minlength=genes)
    zeros = n - np.bincount(matrix.indices, minlength=genes)
    return mean, (squares + zeros * mean**2) / max(n - 1, 1)
