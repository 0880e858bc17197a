"""Metrics of genes: means, variances, zeros, distributions and co-expression in generated and real cells.

Functions on cells take real cells ``(n, genes)`` and generated cells ``(m, genes)``, log-normalized, and compute in
float64. Functions on statistics, such as :func:`rank_correlation`, serve the intervals, which evaluate them on many
resamples. Examples assume ``from wbdit.evaluation.genes import *``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wbdit.errors import need_extra

Array = np.ndarray[Any, Any]

HISTOGRAM_BINS = 50
HISTOGRAM_EPS = 1e-10
CORRELATED_GENES = 500
MODULES = 10


def scc(real: Array, generated: Array) -> float:
    """Compute the Spearman correlation of mean expression per gene (scDiffusion).

    Returns
    -------
    -1 to 1; 1 is best. NaN if all gene means of a set are equal.

    Examples
    --------
    >>> real = np.array([[1.0, 0.0, 4.0], [3.0, 0.0, 4.0]])
    >>> round(scc(real, real**2), 6)  # the ranks of the genes are the same
    1.0
    """
    return rank_correlation(_means(real), _means(generated))


def pcc(real: Array, generated: Array) -> float:
    """Compute the Pearson correlation of mean expression per gene (scDiffusion).

    Returns
    -------
    -1 to 1; 1 is best. NaN if all gene means of a set are equal.

    Examples
    --------
    >>> real = np.array([[1.0, 0.0, 4.0], [3.0, 0.0, 4.0]])
    >>> round(pcc(real, real**2), 3)
    0.977
    """
    return correlation(_means(real), _means(generated))


def var_r2(real: Array, generated: Array) -> float:
    """Compute the coefficient of determination of generated gene variances against real ones.

    It is ``1 - sum (v_generated - v_real)^2 / sum (v_real - mean v_real)^2`` over genes. A squared correlation would
    give 1 to variances that are too small in proportion; this does not.

    Returns
    -------
    At most 1, which is best. 0 is no better than the mean variance for all genes. NaN if real variances are equal.

    Examples
    --------
    >>> real = np.array([[0.0, 0.0], [2.0, 4.0]])
    >>> var_r2(real, real), var_r2(real, 0.5 * real)
    (1.0, -1.125)
    """
    return determination(_variances(real), _variances(generated))


def zero_mae(real: Array, generated: Array) -> float:
    """Compute the mean over genes of the absolute difference in the fraction of zeros.

    Parameters
    ----------
    real, generated
        ``(n, genes)`` and ``(m, genes)``: counts, or log values that keep the zeros of counts.

    Returns
    -------
    0 to 1; 0 is best. Symmetric.

    Examples
    --------
    >>> zero_mae(np.array([[0, 1], [0, 1]]), np.array([[0, 1], [3, 1]]))
    0.25
    """
    return float(np.abs(_means(np.asarray(real) == 0) - _means(np.asarray(generated) == 0)).mean())


def wasserstein_genes(real: Array, generated: Array) -> float:
    """Compute the Wasserstein-1 distance of each gene's values, averaged over genes.

    This is our definition: the white-box transformer paper does not give its Wasserstein distance in full. With sets of
    equal size, a gene's distance is the mean absolute difference of its sorted values.

    Returns
    -------
    At least 0, which is best, in units of the values. Symmetric.

    Raises
    ------
    ValueError
        If the two sets differ in size.

    Examples
    --------
    >>> real = np.random.default_rng(0).normal(size=(40, 5))
    >>> round(wasserstein_genes(real, real + 0.5), 6)
    0.5
    """
    if len(real) != len(generated):
        raise ValueError(f"equal numbers of cells are needed, not {len(real)} and {len(generated)}")
    return float(np.abs(np.sort(real, axis=0) - np.sort(generated, axis=0)).mean())


def kl_hist(real: Array, generated: Array, n_bins: int = HISTOGRAM_BINS, eps: float = HISTOGRAM_EPS) -> float:
    """Compute the Kullback-Leibler divergence of each gene's histograms, real from generated, averaged over genes.

    This is our definition: the white-box transformer paper does not give its divergence in full. Bins have equal width
    over the range of both sets; ``eps`` is added to each bin's share of cells, and the shares are normalized. A bin
    with real cells but no generated cells adds about ``share * 20``, so the floor is far from 0.

    Returns
    -------
    At least 0, which is best, in nats.

    Examples
    --------
    >>> real = np.random.default_rng(0).normal(size=(1000, 5))
    >>> kl_hist(real, real) < 0.1 < kl_hist(real, 2 * real)
    True
    """
    real, generated = np.asarray(real, dtype=np.float64), np.asarray(generated, dtype=np.float64)
    low = np.minimum(real.min(axis=0), generated.min(axis=0))
    width = np.maximum(real.max(axis=0), generated.max(axis=0)) - low
    scale = np.divide(n_bins, width, out=np.zeros_like(width), where=width > 0)

    def shares(cells: Array) -> Array:
        bins = np.minimum(((cells - low) * scale).astype(np.int64), n_bins - 1)
        flat = (bins + np.arange(cells.shape[1]) * n_bins).ravel()
        counts = np.bincount(flat, minlength=cells.shape[1] * n_bins).reshape(-1, n_bins)
        share = counts / len(cells) + eps
        return share / share.sum(axis=1, keepdims=True)

    p, q = shares(real), shares(generated)
    return float((p * np.log(p / q)).sum(axis=1).mean())


def most_variable(real: Array, n_genes: int = CORRELATED_GENES) -> Array:
    """Return the columns of the ``n_genes`` most variable genes in the real cells, in ascending order.

    Examples
    --------
    >>> most_variable(np.array([[0, 0, 0], [9, 1, 5]]), n_genes=2)
    array([0, 2])
    """
    return np.sort(np.argsort(-_variances(real), kind="stable")[:n_genes])


def gene_correlations(cells: Array) -> Array:
    """Compute Pearson correlations ``(genes, genes)``; a constant gene has 0 with all others and 1 with itself.

    Examples
    --------
    >>> gene_correlations(np.array([[0.0, 4.0, 1.0], [1.0, 2.0, 1.0], [2.0, 0.0, 1.0]])).round(3)
    array([[ 1., -1.,  0.],
           [-1.,  1.,  0.],
           [ 0.,  0.,  1.]])
    """
    centered = np.asarray(cells, dtype=np.float64) - _means(cells)
    norm = np.sqrt((centered**2).sum(axis=0))
    centered = np.divide(centered, norm, out=np.zeros_like(centered), where=norm > 1e-12)
    correlations = np.clip(centered.T @ centered, -1, 1)
    np.fill_diagonal(correlations, 1)
    return correlations


def corr_fro(real: Array, generated: Array) -> float:
    """Compute the Frobenius distance of gene-gene correlations; select the genes by :func:`most_variable` first.

    Returns
    -------
    At least 0, which is best. Symmetric.

    Examples
    --------
    >>> real = np.array([[0.0, 0.0], [1.0, 1.0]])
    >>> corr_fro(real, real), round(corr_fro(real, real * [1, -1]), 3)  # correlations of 1 and -1
    (0.0, 2.828)
    """
    return float(np.linalg.norm(gene_correlations(real) - gene_correlations(generated)))


def co_expression_modules(correlations: Array, n_modules: int = MODULES) -> Array:
    """Cluster genes into co-expression modules: Ward's clustering of correlation profiles, cut to ``n_modules``.

    A gene's profile is its row of ``correlations``. Two genes that correlate with the same others share a module, even
    if low counts weaken the correlation between the two.

    Returns
    -------
    ``(genes,)`` module numbers, from 1.

    Examples
    --------
    >>> correlations = np.kron(np.eye(2), np.ones((3, 3)))  # two blocks of three genes
    >>> co_expression_modules(correlations, n_modules=2).tolist()
    [1, 1, 1, 2, 2, 2]
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    inner = correlations @ correlations.T  # ten times as fast as pairwise distances
    norms = np.diag(inner)
    squared = (norms[:, None] + norms - 2 * inner)[np.triu_indices(len(inner), 1)]
    tree = linkage(np.sqrt(np.maximum(squared, 0)), "ward")
    return np.asarray(fcluster(tree, n_modules, criterion="maxclust"))


def module_ari(real: Array, generated: Array) -> float:
    """Compute the agreement of co-expression modules between the sets, as the adjusted Rand index.

    Select the genes by :func:`most_variable` first; see :func:`co_expression_modules`.

    Returns
    -------
    At most 1 (the same modules), which is best; 0 is chance.

    Examples
    --------
    >>> real, other = np.random.default_rng(0).normal(size=(2, 40, 60))
    >>> module_ari(real, real) > 0.9 > 0.1 > module_ari(real, other)
    True
    """
    try:
        from sklearn.metrics import adjusted_rand_score
    except ImportError:
        raise need_extra("scikit-learn") from None
    modules = [co_expression_modules(gene_correlations(cells)) for cells in (real, generated)]
    return float(adjusted_rand_score(*modules))


def rank_correlation(a: Array, b: Array) -> float:
    """Compute the Spearman correlation of two vectors; NaN if one is constant.

    Examples
    --------
    >>> round(rank_correlation(np.array([1, 2, 3]), np.array([1, 4, 9])), 6)
    1.0
    """
    from scipy.stats import rankdata

    return correlation(rankdata(a), rankdata(b))


def correlation(a: Array, b: Array) -> float:
    """Compute the Pearson correlation of two vectors; NaN if one is constant.

    Examples
    --------
    >>> round(correlation(np.array([1, 2, 3]), np.array([1, 4, 9])), 3)
    0.99
    """
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def determination(wanted: Array, got: Array) -> float:
    """Compute the coefficient of determination of ``got`` as a prediction of ``wanted``; NaN if ``wanted`` is constant.

    Examples
    --------
    >>> determination(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 2.0]))
    0.5
    """
    spread = ((wanted - wanted.mean()) ** 2).sum()
    return float(1 - ((got - wanted) ** 2).sum() / spread) if spread > 0 else float("nan")


def _means(cells: Array) -> Array:
    return np.asarray(cells, dtype=np.float64).mean(axis=0)


def _variances(cells: Array) -> Array:
    return np.asarray(cells, dtype=np.float64).var(axis=0)
