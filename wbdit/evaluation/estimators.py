"""The families of metrics, each taken of two sets of cells and given as values with their intervals."""

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
    """CFGen's principal components: fitted on real cells, used for every set."""

    mean: np.ndarray
    axes: np.ndarray

    @classmethod
    def fit(cls, real: AlignedCells) -> Basis:
        """Fit on real cells."""
        return cls(*distances.pca_axes(real.values, CFGEN_COMPONENTS))

    def project(self, values: np.ndarray) -> np.ndarray:
        """Return ``(n, components)`` of ``(n, genes)``."""
        return (values - self.mean) @ self.axes


def cfgen_distances(real: np.ndarray, other: np.ndarray, halves: Halves) -> Estimates:
    """Return the CFGen family for two sets of projected cells."""
    return {
        "w1": normal(*distances.transport(real, other, 1)),
        "w2": normal(*distances.transport(real, other, 2)),
        "mmd_cfgen": _mmd(distances.cfgen_kernel(real, other), halves),
    }


def joint_distances(joint: tuple[np.ndarray, np.ndarray], halves: Halves) -> Estimates:
    """Return the scDiffusion family, the forest apart, for two sets in joint principal components."""
    real, other = (cells[:, :LISI_COMPONENTS] for cells in joint)  # components are nested: these are PCA-20
    together = np.vstack([real, other])
    squared, n = distances.squared_distances(together, together), len(real)
    chosen = (np.concatenate([a, n + b]) for a, b in halves.rows())
    mixing = (distances.lisi_of_distances(squared[np.ix_(rows, rows)], n // 2) for rows in chosen)
    return {
        "mmd_scdiffusion": _mmd(distances.scdiffusion_kernel(*joint), halves),
        "ilisi": halves.estimate(distances.lisi_of_distances(squared, n), mixing),
    }


def raw_mmd(real: np.ndarray, other: np.ndarray, halves: Halves) -> Estimate:
    """Return ``mmd_raw`` of two sets of cells, all genes."""
    return _mmd(distances.scdiffusion_kernel(real, other), halves)


def forest(real: np.ndarray, other: np.ndarray) -> Estimate:
    """Return the AUC of the forest that tells two sets apart."""
    return auc(*distances.forest_votes(real, other))


def gene_means(real: np.ndarray, other: np.ndarray, halves: Halves) -> Estimates:
    """Return what compares gene means."""
    means = halves.real @ real, halves.other @ other
    return {
        "scc": halves.pairwise(genes.scc(real, other), genes.rank_correlation, *means),
        "pcc": halves.pairwise(genes.pcc(real, other), genes.correlation, *means),
    }


def gene_structure(real: np.ndarray, other: np.ndarray, halves: Halves) -> Estimates:
    """Return what compares gene variances, distributions and co-expression."""
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
    """Return ``zero_mae``."""
    fractions = halves.real @ (real == 0).astype(float), halves.other @ (other == 0).astype(float)
    return halves.pairwise(genes.zero_mae(real, other), lambda a, b: float(np.abs(a - b).mean()), *fractions)


def library_sizes(real: np.ndarray, other: np.ndarray, halves: Halves) -> Estimates:
    """Return the 1-Wasserstein distances of totals and of detected genes, ``(n, 2)`` for each set."""
    from scipy.stats import wasserstein_distance

    return {
        name: halves.recomputed(
            float(wasserstein_distance(real[:, i], other[:, i])), wasserstein_distance, real[:, i], other[:, i]
        )
        for i, name in enumerate(("library_w1", "detected_w1"))
    }


def fold_changes(real: AlignedCells, other: AlignedCells, types: list[str], halves: Halves) -> Estimate:
    """Return ``lfc_slope`` of labeled cells."""
    assert real.labels is not None
    assert other.labels is not None
    value = distances.lfc_slope(real.values, real.labels, other.values, other.labels, types)
    changes = _half_fold_changes(real, types, halves.real), _half_fold_changes(other, types, halves.other)
    return halves.pairwise(value, distances.fold_change_slope, *changes)


def classifier(train: AlignedCells, test: AlignedCells) -> Estimate:
    """Return ``tstr``: the accuracy on ``test`` of a classifier that saw ``train``."""
    assert train.labels is not None
    assert test.labels is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lbfgs may stop at its last iteration; the accuracy is what counts
        return proportion(distances.tstr(train.values, train.labels, test.values, test.labels))


def nearness(
    train: np.ndarray, heldout: np.ndarray, other: np.ndarray, resamples: int, rng: np.random.Generator
) -> Estimates:
    """Return ``mia_auc`` and ``dcr_ratio`` of as many training, held-out and other cells."""
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
    """Return the fold changes ``(resamples, types, genes)`` of each half; NaN where a half lacks a type."""
    total, size = weights @ cells.values, weights.sum(axis=1, keepdims=True)
    changes = np.full((len(weights), len(types), cells.values.shape[1]), np.nan)
    for i, name in enumerate(types):
        rows = cells.labels == name
        inside, share = weights[:, rows] @ cells.values[rows], weights[:, rows].sum(axis=1, keepdims=True)
        known = ((share > 0) & (share < size - 1e-9)).ravel()
        rest = (total - inside)[known] / (size - share)[known]
        changes[known, i] = inside[known] / share[known] - rest
    return changes
