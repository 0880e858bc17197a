"""How close generated cells are to real ones: the field's metrics, as pure functions on arrays.

Every function takes real cells first and works in float64. A value means little alone: compare it with
the same function on other real cells, at the same number of cells (see :mod:`wbdit.evaluation`).

Two families are kept apart, because their figures are compared with papers. *CFGen*: principal
components fitted on the real cells, exact Wasserstein distances, MMD with fixed bandwidths.
*scDiffusion*: joint principal components, MMD with bandwidths from the data, random forest AUC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wbdit.errors import need_extra

Array = np.ndarray[Any, Any]

CFGEN_SIGMAS = (0.01, 0.1, 1.0, 10.0, 100.0)
SCDIFFUSION_KERNELS = 5
EMD_ITERATIONS = 50_000_000


def pca_axes(cells: Array, n_components: int) -> tuple[Array, Array]:
    """Fit principal components.

    Parameters
    ----------
    cells
        ``(n, genes)``.
    n_components
        Wished number; fewer come back where ``cells`` cannot carry them.

    Returns
    -------
    The mean ``(genes,)`` and the axes ``(genes, k)``, each with its largest loading positive: project with
    ``(x - mean) @ axes``. ``k`` is 0 where all cells are equal.
    """
    try:
        from sklearn.decomposition import PCA
    except ImportError:
        raise need_extra("scikit-learn") from None
    cells = np.asarray(cells, dtype=np.float64)
    k = min(n_components, len(cells) - 1, cells.shape[1] - 1)
    if k < 1 or not np.ptp(cells, axis=0).any():
        return cells.mean(axis=0), np.zeros((cells.shape[1], 0))
    pca = PCA(k, svd_solver="arpack", random_state=0).fit(cells)
    carried = pca.singular_values_ > 1e-5 * pca.singular_values_[0]
    return pca.mean_, pca.components_[carried].T


def joint_pca(real: Array, generated: Array, n_components: int = 50) -> tuple[Array, Array]:
    """Project both sets on principal components fitted on the two together (scDiffusion).

    Parameters
    ----------
    real, generated
        ``(n, genes)`` and ``(m, genes)``.

    Returns
    -------
    ``(n, k)`` and ``(m, k)``, ``k = min(n_components, what the cells can carry)``.
    """
    mean, axes = pca_axes(np.vstack([real, generated]), n_components)
    return (real - mean) @ axes, (generated - mean) @ axes


def wasserstein(real: Array, generated: Array, order: int = 1) -> float:
    """Exact Wasserstein distance between two clouds of equally weighted points (CFGen: ``w1``, ``w2``).

    Parameters
    ----------
    real, generated
        ``(n, k)`` and ``(m, k)``, in CFGen principal components.
    order
        1, or 2: the square root of the least mean squared transport distance.

    Returns
    -------
    At least 0, in units of the points; 0 is best. Symmetric.
    """
    try:
        import ot
    except ImportError:
        raise need_extra("POT") from None
    if order not in (1, 2):
        raise ValueError(f"order is 1 or 2, not {order}")
    cost = _squared_distances(real, generated)
    if order == 1:
        cost = np.sqrt(cost)
    value, log = ot.emd2([], [], cost, numItermax=EMD_ITERATIONS, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"exact optimal transport did not finish: {log['warning']}")
    return float(max(value, 0.0)) ** (1 / order)


def mmd_cfgen(real: Array, generated: Array, sigmas: Sequence[float] = CFGEN_SIGMAS) -> float:
    """Squared maximum mean discrepancy, Gaussian kernels of fixed width, summed (CFGen).

    The biased estimate: its floor shrinks as 1/n, so compare only at the same number of cells.

    Parameters
    ----------
    real, generated
        ``(n, k)`` and ``(m, k)``, in CFGen principal components.
    sigmas
        Kernel widths; ``k(x, y) = exp(-|x - y|^2 / (2 sigma^2))``.

    Returns
    -------
    0 to ``2 * len(sigmas)``; 0 (identical sets) is best. Symmetric.
    """
    within_real = _squared_distances(real, real)
    within_generated = _squared_distances(generated, generated)
    between = _squared_distances(real, generated)

    def mean_kernel(squared: Array) -> float:
        return float(sum(np.exp(-squared / (2 * sigma**2)).mean() for sigma in sigmas))

    return mean_kernel(within_real) + mean_kernel(within_generated) - 2 * mean_kernel(between)


def mmd_scdiffusion(real: Array, generated: Array) -> float:
    """Squared maximum mean discrepancy with five widths taken from the data (scDiffusion).

    With N points in all, width ``i`` is ``sum |x - y|^2 / (N^2 - N) / 4 * 2^i`` and its kernel
    ``exp(-|x - y|^2 / width)``; the five kernels are added. The biased estimate: compare only at the same n.

    Parameters
    ----------
    real, generated
        ``(n, k)`` each, in joint principal components.

    Returns
    -------
    0 to 10; 0 (identical sets) is best. Symmetric.

    Raises
    ------
    ValueError
        If the two sets differ in size.
    """
    n = len(real)
    if len(generated) != n:
        raise ValueError(f"equal numbers of cells are needed, not {n} and {len(generated)}")
    together = np.vstack([real, generated])
    squared = _squared_distances(together, together)
    total = len(together)
    narrowest = squared.sum() / (total**2 - total) / 4
    if narrowest == 0:  # every point is the same point
        return 0.0
    kernel = np.zeros_like(squared)
    for i in range(SCDIFFUSION_KERNELS):
        kernel += np.exp(-squared / (narrowest * 2**i))
    return float(kernel[:n, :n].mean() + kernel[n:, n:].mean() - kernel[:n, n:].mean() - kernel[n:, :n].mean())


def forest_auc(real: Array, generated: Array, *, n_trees: int = 1000, n_jobs: int = 2) -> float:
    """AUC of a random forest that tells generated cells from real ones (scDiffusion).

    1000 trees of depth 5, balanced, random state 1; a quarter of the cells is held out for the AUC.
    ``rf_auc`` is this on joint principal components, ``rf_auc_genes`` on the genes themselves.

    Parameters
    ----------
    real, generated
        ``(n, k)`` and ``(m, k)``.

    Returns
    -------
    0 to 1: how often the forest finds a generated cell the less real of a random pair. 0.5, a coin, is best;
    1 means always.
    """
    try:
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise need_extra("scikit-learn") from None
    cells = np.vstack([real, generated])
    is_generated = np.repeat([0, 1], [len(real), len(generated)])
    train, test, train_is, test_is = train_test_split(cells, is_generated, test_size=0.25, random_state=1)
    forest = RandomForestClassifier(n_trees, max_depth=5, class_weight="balanced", random_state=1, n_jobs=n_jobs)
    forest.fit(train, train_is)
    forest.set_params(n_jobs=1)  # threads add the votes in any order, which breaks ties differently
    return float(roc_auc_score(test_is, forest.predict_proba(test)[:, 1]))


def scc(real: Array, generated: Array) -> float:
    """Spearman correlation of the genes' mean expression (scDiffusion).

    Parameters
    ----------
    real, generated
        ``(n, genes)`` and ``(m, genes)``, log-normalised.

    Returns
    -------
    -1 to 1; 1 is best. NaN where all means of a set are equal.
    """
    from scipy.stats import rankdata

    ranks = [rankdata(_gene_means(cells)) for cells in (real, generated)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def var_r2(real: Array, generated: Array) -> float:
    """Coefficient of determination of generated gene variances against real ones.

    ``1 - sum (v_generated - v_real)^2 / sum (v_real - mean v_real)^2`` over genes; not a squared correlation,
    so that variances which are right in order but too small do not score 1.

    Parameters
    ----------
    real, generated
        ``(n, genes)`` and ``(m, genes)``, log-normalised.

    Returns
    -------
    At most 1, which is best; 0 is no better than one variance for all genes. NaN where real variances are equal.
    """
    wanted = np.var(np.asarray(real, dtype=np.float64), axis=0)
    got = np.var(np.asarray(generated, dtype=np.float64), axis=0)
    spread = ((wanted - wanted.mean()) ** 2).sum()
    return float(1 - ((got - wanted) ** 2).sum() / spread) if spread > 0 else float("nan")


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
    return float(np.abs((np.asarray(real) == 0).mean(axis=0) - (np.asarray(generated) == 0).mean(axis=0)).mean())


def log_fold_changes(cells: Array, labels: Array, types: Sequence[str]) -> Array:
    """Natural-log fold changes, each type against all other cells.

    scanpy's ``rank_genes_groups`` has ``(expm1(m_type) + e) / (expm1(m_rest) + e)`` with m the mean log value and
    e = 1e-9, which makes +-20 of a gene that one group happens to lack. With e = 1, the pseudo-count of the log
    values themselves, nothing explodes, and its logarithm is simply ``m_type - m_rest``.

    Parameters
    ----------
    cells, labels
        ``(n, genes)`` log-normalised and ``(n,)``.
    types
        Labels to compare; each must have cells, and so must its rest.

    Returns
    -------
    ``(types, genes)``.
    """
    cells = np.asarray(cells, dtype=np.float64)
    inside = [labels == name for name in types]
    return np.stack([cells[rows].mean(axis=0) - cells[~rows].mean(axis=0) for rows in inside])


def lfc_slope(
    real: Array,
    real_labels: Array,
    generated: Array,
    generated_labels: Array,
    types: Sequence[str],
    *,
    at_least: float = 0.5,
) -> float:
    """Least-squares slope (with intercept) of generated on real log fold changes, type against rest.

    Only (type, gene) pairs whose real fold change exceeds ``at_least`` count; see :func:`log_fold_changes`.

    Parameters
    ----------
    real, generated
        ``(n, genes)`` and ``(m, genes)``, log-normalised.
    real_labels, generated_labels
        ``(n,)`` and ``(m,)``.
    types
        Labels to compare, present in both sets.

    Returns
    -------
    Any number; 1 is best, under 1 the differences between types are too weak (attenuation). NaN where fewer than
    two pairs exceed ``at_least``.
    """
    wanted = log_fold_changes(real, real_labels, types).ravel()
    got = log_fold_changes(generated, generated_labels, types).ravel()
    strong = np.abs(wanted) > at_least
    if strong.sum() < 2 or np.ptp(wanted[strong]) == 0:
        return float("nan")
    centred = wanted[strong] - wanted[strong].mean()
    return float(centred @ got[strong] / (centred @ centred))


def tstr(train: Array, train_labels: Array, test: Array, test_labels: Array) -> float:
    """Train on synthetic, test on real: accuracy of a logistic regression.

    Parameters
    ----------
    train, train_labels
        ``(n, genes)`` log-normalised and ``(n,)``: generated cells, or real ones for the floor.
    test, test_labels
        ``(m, genes)`` and ``(m,)``: real cells.

    Returns
    -------
    0 to 1; 1 is best, train-on-real is what to expect.

    Raises
    ------
    ValueError
        If ``train_labels`` holds a single label.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise need_extra("scikit-learn") from None
    model = LogisticRegression(max_iter=1000).fit(np.asarray(train, dtype=np.float64), train_labels)
    return float((model.predict(np.asarray(test, dtype=np.float64)) == test_labels).mean())


def _gene_means(cells: Array) -> Array:
    return np.asarray(cells, dtype=np.float64).mean(axis=0)


def _squared_distances(a: Array, b: Array) -> Array:
    from scipy.spatial.distance import cdist

    return cdist(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64), "sqeuclidean")
