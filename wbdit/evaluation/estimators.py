"""Families of metrics on two sets of cells, as values with intervals.

Unless stated otherwise, ``real`` and ``other`` are dense float64 arrays ``(n, genes)`` with equally many cells.
``halves`` are their resamples, from :meth:`wbdit.evaluation.intervals.Halves.draw`. Examples assume
``from wbdit.evaluation.estimators import *``.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from wbdit.evaluation import distances, genes, memorization
from wbdit.evaluation.figure_data import AlignedCells
from wbdit.evaluation.intervals import Estimate, Halves, auc, normal, proportion

CFGEN_COMPONENTS = 30
SCDIFFUSION_COMPONENTS = 50
LISI_COMPONENTS = 20

Estimates = dict[str, Estimate]


class Basis(NamedTuple):
    """CFGen's principal components: fitted on real cells, applied to every set."""

    mean: np.ndarray
    axes: np.ndarray

    @classmethod
    def fit(cls, real: AlignedCells) -> Basis:
        """Fit the components on real cells."""
        return cls(*distances.pca_axes(real.values, CFGEN_COMPONENTS))

    def project(self, values: np.ndarray) -> np.ndarray:
        """Project ``(n, genes)`` values to ``(n, components)``."""
        return (values - self.mean) @ self.axes


def cfgen_distances(real: np.ndarray, other: np.ndarray, halves: Halves) -> Estimates:
    """Compute the CFGen family for two sets ``(n, components)``, projected by :class:`Basis`.

    Examples
    --------
    >>> real, other = np.random.default_rng(0).normal(size=(2, 40, 5))
    >>> estimates = cfgen_distances(real, other, Halves.draw(40, 20, np.random.default_rng(1)))
    >>> {name: round(estimate.value, 2) for name, estimate in estimates.items()}
    {'w1': 1.53, 'w2': 1.6, 'mmd_cfgen': 0.15}
    """
    return {
        "w1": normal(*distances.transport(real, other, 1)),
        "w2": normal(*distances.transport(real, other, 2)),
        "mmd_cfgen": _mmd(distances.cfgen_kernel(real, other), halves),
    }


def joint_distances(joint: tuple[np.ndarray, np.ndarray], halves: Halves) -> Estimates:
    """Compute the scDiffusion family, except the forest, for two sets in joint principal components.

    Examples
    --------
    >>> joint = np.random.default_rng(0).normal(size=(2, 40, 5))
    >>> sorted(joint_distances(tuple(joint), Halves.draw(40, 20, np.random.default_rng(1))))
    ['ilisi', 'mmd_scdiffusion']
    """
    real, other = (cells[:, :LISI_COMPONENTS] for cells in joint)  # components are nested: PCA-20
    together = np.vstack([real, other])
    squared, n = distances.squared_distances(together, together), len(real)
    chosen = (np.concatenate([a, n + b]) for a, b in halves.rows())
    mixing = (distances.lisi_of_distances(squared[np.ix_(rows, rows)], n // 2) for rows in chosen)
    return {
        "mmd_scdiffusion": _mmd(distances.scdiffusion_kernel(*joint), halves),
        "ilisi": halves.estimate(distances.lisi_of_distances(squared, n), mixing),
    }


def raw_mmd(real: np.ndarray, other: np.ndarray, halves: Halves) -> Estimate:
    """Compute ``mmd_raw`` on all genes of two sets of cells."""
    return _mmd(distances.scdiffusion_kernel(real, other), halves)


def forest(real: np.ndarray, other: np.ndarray) -> Estimate:
    """Compute the AUC of a random forest that separates two sets, in components or genes."""
    return auc(*distances.forest_votes(real, other))


def gene_means(real: np.ndarray, other: np.ndarray, halves: Halves) -> Estimates:
    """Compute ``scc`` and ``pcc``, which compare gene means.

    Examples
    --------
    >>> real = np.random.default_rng(0).normal(size=(40, 5))
    >>> estimates = gene_means(real, real, Halves.draw(40, 20, np.random.default_rng(1)))
    >>> {name: round(estimate.value, 6) for name, estimate in estimates.items()}
    {'scc': 1.0, 'pcc': 1.0}
    """
    means = halves.real @ real, halves.other @ other
    return {
        "scc": halves.pairwise(genes.scc(real, other), genes.rank_correlation, *means),
        "pcc": halves.pairwise(genes.pcc(real, other), genes.correlation, *means),
    }


def gene_structure(real: np.ndarray, other: np.ndarray, halves: Halves) -> Estimates:
    """Compute the metrics of gene variances, distributions and co-expression.

    Examples
    --------
    >>> real, other = np.random.default_rng(0).normal(size=(2, 40, 15))
    >>> list(gene_structure(real, other, Halves.draw(40, 2, np.random.default_rng(1))))
    ['var_r2', 'wasserstein_genes', 'kl_hist', 'corr_fro', 'module_ari']
    """
    found = {}
    variances = (
        halves.real @ real**2 - (halves.real @ real) ** 2,
        halves.other @ other**2 - (halves.other @ other) ** 2,
    )
    found["var_r2"] = halves.pairwise(genes.var_r2(real, other), genes.determination, *variances)
    for name, metric in (("wasserstein_genes", genes.wasserstein_genes), ("kl_hist", genes.kl_hist)):
        found[name] = halves.recomputed(metric(real, other), metric, real, other)
    variable = genes.most_variable(real)
    real, other = real[:, variable], other[:, variable]
    for name, metric in (("corr_fro", genes.corr_fro), ("module_ari", genes.module_ari)):
        found[name] = halves.recomputed(metric(real, other), metric, real, other)
    return found


def zero_fractions(real: np.ndarray, other: np.ndarray, halves: Halves) -> Estimate:
    """Compute ``zero_mae``."""
    fractions = halves.real @ (real == 0).astype(float), halves.other @ (other == 0).astype(float)
    return halves.pairwise(genes.zero_mae(real, other), lambda a, b: float(np.abs(a - b).mean()), *fractions)


def library_sizes(real: np.ndarray, other: np.ndarray, halves: Halves) -> Estimates:
    """Compute the 1-Wasserstein distances of total counts and of detected genes.

    Parameters
    ----------
    real, other
        ``(n, 2)``: total counts and detected genes per cell.
    """
    from scipy.stats import wasserstein_distance

    return {
        name: halves.recomputed(
            float(wasserstein_distance(real[:, i], other[:, i])), wasserstein_distance, real[:, i], other[:, i]
        )
        for i, name in enumerate(("library_w1", "detected_w1"))
    }


def fold_changes(real: AlignedCells, other: AlignedCells, types: list[str], halves: Halves) -> Estimate:
    """Compute ``lfc_slope`` of labeled cells."""
    assert real.labels is not None
    assert other.labels is not None
    value = distances.lfc_slope(real.values, real.labels, other.values, other.labels, types)
    changes = _half_fold_changes(real, types, halves.real), _half_fold_changes(other, types, halves.other)
    return halves.pairwise(value, distances.fold_change_slope, *changes)


def classifier(train: AlignedCells, test: AlignedCells) -> Estimate:
    """Compute ``tstr``: the accuracy on ``test`` of a classifier trained on ``train``.

    Examples
    --------
    >>> cells = AlignedCells(np.array([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]), np.array(["B", "B", "T"]))
    >>> classifier(cells, cells).value
    1.0
    """
    assert train.labels is not None
    assert test.labels is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lbfgs may reach max_iter; the accuracy is still valid
        return proportion(distances.tstr(train.values, train.labels, test.values, test.labels))


def nearness(
    train: np.ndarray, heldout: np.ndarray, other: np.ndarray, resamples: int, rng: np.random.Generator
) -> Estimates:
    """Compute ``mia_auc`` and ``dcr_ratio`` for equally many training, held-out and other cells ``(n, k)``.

    Examples
    --------
    >>> train, heldout = np.random.default_rng(0).normal(size=(2, 40, 5))
    >>> nearness(train, heldout, train, 4, np.random.default_rng(1))["mia_auc"].value  # copies of the training cells
    1.0
    """
    outer, inner = (Halves.draw(len(train), resamples, rng) for _ in range(2))
    halves = [(a, b, c) for (a, b), (c, _) in zip(outer.rows(), inner.rows(), strict=True)]
    return {
        name: outer.estimate(
            metric(train, heldout, other), (metric(train[a], heldout[b], other[c]) for a, b, c in halves)
        )
        for name, metric in (("mia_auc", memorization.mia_auc), ("dcr_ratio", memorization.dcr_ratio))
    }


def _mmd(kernel: np.ndarray, halves: Halves) -> Estimate:
    even = np.full(len(kernel) // 2, 2 / len(kernel))
    replicates = distances.kernel_mmd(kernel, halves.real, halves.other)
    return halves.estimate(float(distances.kernel_mmd(kernel, even, even)), replicates)


def _half_fold_changes(cells: AlignedCells, types: list[str], weights: np.ndarray) -> np.ndarray:
    """Return log fold changes ``(resamples, types, genes)`` per half; NaN where a half lacks a type or its rest."""
    total, size = weights @ cells.values, weights.sum(axis=1, keepdims=True)
    changes = np.full((len(weights), len(types), cells.values.shape[1]), np.nan)
    for i, name in enumerate(types):
        rows = cells.labels == name
        inside, share = weights[:, rows] @ cells.values[rows], weights[:, rows].sum(axis=1, keepdims=True)
        known = ((share > 0) & (share < size - 1e-9)).ravel()
        rest = (total - inside)[known] / (size - share)[known]
        changes[known, i] = inside[known] / share[known] - rest
    return changes
