"""How well generated cells keep what genes do: means, variances, zeros, distributions, co-expression.

Functions on cells take real cells first, ``(n, genes)`` and ``(m, genes)``, log-normalized, and work in float64. The
ones on statistics, such as :func:`rank_correlation`, are what intervals use, which need the same of many resamples.
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
    """Spearman correlation of the genes' mean expression (scDiffusion).

    Returns
    -------
    -1 to 1; 1 is best. NaN where all means of a set are equal.
    """
    return rank_correlation(_means(real), _means(generated))


def pcc(real: Array, generated: Array) -> float:
    """Pearson correlation of the genes' mean expression (scDiffusion).

    Returns
    -------
    -1 to 1; 1 is best. NaN where all means of a set are equal.
    """
    return correlation(_means(real), _means(generated))


def var_r2(real: Array, generated: Array) -> float:
    """Coefficient of determination of generated gene variances against real ones.

    ``1 - sum (v_generated - v_real)^2 / sum (v_real - mean v_real)^2`` over genes; not a squared correlation,
    so that variances which are right in order but too small do not score 1.

    Returns
    -------
    At most 1, which is best; 0 is no better than one variance for all genes. NaN where real variances are equal.
    """
    return determination(_variances(real), _variances(generated))


def zero_mae(real: Array, generated: Array) -> float:
    """Mean over genes of the absolute difference in the fraction of zeros.

    Parameters
    ----------
    real, generated
        ``(n, genes)`` and ``(m, genes)``, counts, or log values that keep the zeros of counts.

    Returns
    -------
    0 to 1; 0 is best. Symmetric.
    """
    return float(np.abs(_means(np.asarray(real) == 0) - _means(np.asarray(generated) == 0)).mean())


def wasserstein_genes(real: Array, generated: Array) -> float:
    """Wasserstein-1 distance of each gene's values, the mean over genes.

    Our definition of the white-box transformer paper's Wasserstein distance, which it does not give in full. The sets
    are equally large, so that each gene's distance is the mean difference of its sorted values.

    Returns
    -------
    At least 0, which is best, in units of the values. Symmetric.

    Raises
    ------
    ValueError
        If the two sets differ in size.
    """
    if len(real) != len(generated):
        raise ValueError(f"equal numbers of cells are needed, not {len(real)} and {len(generated)}")
    return float(np.abs(np.sort(real, axis=0) - np.sort(generated, axis=0)).mean())


def kl_hist(real: Array, generated: Array, n_bins: int = HISTOGRAM_BINS, eps: float = HISTOGRAM_EPS) -> float:
    """Kullback-Leibler divergence of each gene's histograms, real from generated, the mean over genes.

    Our definition of the white-box transformer paper's divergence, which it does not give in full: equal bins over
    the range of both sets, ``eps`` added to each share, then normalized. A bin that real cells fill and generated ones
    do not costs about ``share * 20``, so the floor is far from 0.

    Returns
    -------
    At least 0, which is best, in nats.
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
    """Columns of the genes with the largest variance among the real cells, at most ``n_genes``, in order."""
    return np.sort(np.argsort(-_variances(real), kind="stable")[:n_genes])


def gene_correlations(cells: Array) -> Array:
    """Pearson correlations ``(genes, genes)``; 0 for a gene that never changes, and 1 with itself."""
    centered = np.asarray(cells, dtype=np.float64) - _means(cells)
    norm = np.sqrt((centered**2).sum(axis=0))
    centered = np.divide(centered, norm, out=np.zeros_like(centered), where=norm > 1e-12)
    correlations = np.clip(centered.T @ centered, -1, 1)
    np.fill_diagonal(correlations, 1)
    return correlations


def corr_fro(real: Array, generated: Array) -> float:
    """Frobenius distance of the gene-gene correlations, over genes chosen by :func:`most_variable`.

    Returns
    -------
    At least 0, which is best. Symmetric.
    """
    return float(np.linalg.norm(gene_correlations(real) - gene_correlations(generated)))


def co_expression_modules(correlations: Array, n_modules: int = MODULES) -> Array:
    """Modules of genes that go together: Ward's clustering of their correlation profiles, cut to ``n_modules``.

    A gene's profile is its row of ``correlations``: two genes that correlate with the same others belong together,
    even where few counts leave their own correlation weak.

    Returns
    -------
    ``(genes,)`` of module numbers.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    inner = correlations @ correlations.T  # ten times as fast as distances pair by pair
    norms = np.diag(inner)
    squared = (norms[:, None] + norms - 2 * inner)[np.triu_indices(len(inner), 1)]
    tree = linkage(np.sqrt(np.maximum(squared, 0)), "ward")
    return np.asarray(fcluster(tree, n_modules, criterion="maxclust"))


def module_ari(real: Array, generated: Array) -> float:
    """Agreement of co-expression modules found in either set (adjusted Rand index), over :func:`most_variable` genes.

    Returns
    -------
    At most 1, the same modules, which is best; 0 is what chance gives.
    """
    try:
        from sklearn.metrics import adjusted_rand_score
    except ImportError:
        raise need_extra("scikit-learn") from None
    modules = [co_expression_modules(gene_correlations(cells)) for cells in (real, generated)]
    return float(adjusted_rand_score(*modules))


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman correlation of two vectors; NaN where one is constant."""
    from scipy.stats import rankdata

    return correlation(rankdata(a), rankdata(b))


def correlation(a: Array, b: Array) -> float:
    """Pearson correlation of two vectors; NaN where one is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def determination(wanted: Array, got: Array) -> float:
    """Coefficient of determination of ``got`` as a guess of ``wanted``; NaN where all that is wanted is one value."""
    spread = ((wanted - wanted.mean()) ** 2).sum()
    return float(1 - ((got - wanted) ** 2).sum() / spread) if spread > 0 else float("nan")


def _means(cells: Array) -> Array:
    return np.asarray(cells, dtype=np.float64).mean(axis=0)


def _variances(cells: Array) -> Array:
    return np.asarray(cells, dtype=np.float64).var(axis=0)
