"""Families of metrics on two sets of cells, as values with intervals.

Unless stated otherwise, ``real`` and ``other`` are dense float64 arrays ``(n, genes)`` with equally many cells.
``halves`` are their resamples, from :meth:`wbdit.evaluation.intervals.Halves.draw`. Examples assume
``from wbdit.evaluation.estimators import *``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from wbdit.evaluation import classifiers, differential, distances, fidelity, genes, memorization, within
from wbdit.evaluation.differential import Contrasts
from wbdit.evaluation.figure_data import AlignedCells
from wbdit.evaluation.intervals import Estimate, Halves, auc, normal, proportion

CFGEN_COMPONENTS = 30
SCDIFFUSION_COMPONENTS = 50
LISI_COMPONENTS = 20
OVERLAP_COMPONENTS = 30
TESTED_HALVES = 20  # for intervals of what Wilcoxon tests find, which take longer
SPLITS = 8  # of each type, for the tests where there is nothing to find

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

    def project_sparse(self, values: sp.csr_matrix) -> np.ndarray:
        """Project CSR values without making them dense."""
        return np.asarray(values @ self.axes) - self.mean @ self.axes


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


def neighborhoods(real: np.ndarray, other: np.ndarray, halves: Halves) -> Estimates:
    """Compute fidelity, diversity, and the Fréchet and energy distances of two sets in joint principal components.

    In components that are fitted on the real cells alone, these lie farther out than other cells of the same
    distribution: with 350 cells and 765 genes, other real cells got a density of 6 and a recall of 0.1.

    Examples
    --------
    >>> real, other = np.random.default_rng(0).normal(size=(2, 40, 5))
    >>> estimates = neighborhoods(real, other, Halves.draw(40, 20, np.random.default_rng(1)))
    >>> {name: round(estimate.value, 2) for name, estimate in estimates.items()}
    {'precision': 0.97, 'recall': 0.95, 'density': 1.03, 'coverage': 1.0, 'frechet': 0.35, 'energy': -0.02}
    """
    real, other = real[:, :OVERLAP_COMPONENTS], other[:, :OVERLAP_COMPONENTS]  # components are nested
    n, together = len(real), np.vstack([real, other])
    apart = np.sqrt(distances.squared_distances(together, together))

    def overlap(a: np.ndarray, b: np.ndarray) -> fidelity.Overlap:
        b = n + b
        return fidelity.overlap(apart[np.ix_(a, a)], apart[np.ix_(a, b)], apart[np.ix_(b, b)])

    every = np.arange(n)
    whole, parts = overlap(every, every), [overlap(a, b) for a, b in halves.rows()]
    found = {name: halves.estimate(getattr(whole, name), [getattr(p, name) for p in parts]) for name in whole._fields}
    found["frechet"] = halves.recomputed(fidelity.frechet(real, other), fidelity.frechet, real, other)
    even = np.full(n, 1 / n)
    replicates = fidelity.energy_distance(apart, halves.real, halves.other)
    found["energy"] = halves.estimate(float(fidelity.energy_distance(apart, even, even)), replicates)
    return found


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


def gene_structure(real: np.ndarray, other: np.ndarray, halves: Halves, *, modules: bool) -> Estimates:
    """Compute the metrics of gene variances, distributions and co-expression, with or without ``module_ari``.

    Examples
    --------
    >>> real, other = np.random.default_rng(0).normal(size=(2, 40, 15))
    >>> list(gene_structure(real, other, Halves.draw(40, 2, np.random.default_rng(1)), modules=True))
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
    structure = (("corr_fro", genes.corr_fro), ("module_ari", genes.module_ari))
    for name, metric in structure if modules else structure[:1]:
        found[name] = halves.recomputed(metric(real, other), metric, real, other)
    return found


def within_types(real: AlignedCells, other: AlignedCells, types: list[str], halves: Halves) -> Estimates:
    """Compute the metrics of structure within types, over the most variable genes."""
    variable = genes.most_variable(real.values)
    values = real.values[:, variable], other.values[:, variable]
    inside = [[np.asarray(cells.labels) == name for cells in (real, other)] for name in types]

    def parts(a: np.ndarray, b: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        chosen = [(values[0][a[own[a]]], values[1][b[theirs[b]]]) for own, theirs in inside]
        known = [(one, two) for one, two in chosen if min(len(one), len(two)) > 1]
        return [one for one, _ in known], [two for _, two in known]

    every = np.arange(len(real.values)), np.arange(len(other.values))
    whole, halved = parts(*every), [parts(a, b) for a, b in halves.rows()]
    return {
        name: halves.estimate(metric(*whole), (metric(*part) for part in halved))
        for name, metric in (("within_corr", within.within_corr), ("within_var", within.within_var))
    }


def gene_curves(real: np.ndarray, other: np.ndarray, halves: Halves, *, has_zeros: bool) -> Estimates:
    """Compute ``mean_var``, ``cell_cell`` and, if zeros mean "not detected", ``dropout_mean``."""
    sides = [(real, halves.real), (other, halves.other)]
    means = [weights @ cells for cells, weights in sides]
    variances = [
        np.stack([mean, weights @ cells**2 - mean**2], axis=1)
        for (cells, weights), mean in zip(sides, means, strict=True)
    ]
    found = {"mean_var": halves.pairwise(within.mean_var(real, other), within.variance_curves, *variances)}
    if has_zeros:
        zeros = [
            np.stack([mean, weights @ (cells == 0).astype(float)], axis=1)
            for (cells, weights), mean in zip(sides, means, strict=True)
        ]
        found["dropout_mean"] = halves.pairwise(within.dropout_mean(real, other), within.zero_curves, *zeros)
    pairs = [genes.gene_correlations(cells.T) for cells in (real, other)]
    halved = (within.pair_distance(pairs[0][np.ix_(a, a)], pairs[1][np.ix_(b, b)]) for a, b in halves.rows())
    return found | {"cell_cell": halves.estimate(within.pair_distance(*pairs), halved)}


def two_sample_tests(real: np.ndarray, other: np.ndarray, kinds: Sequence[str]) -> Estimates:
    """Compute the AUC of some of :data:`wbdit.evaluation.classifiers.CLASSIFIERS`."""
    return {kind: classifiers.two_sample_test(real, other, kind) for kind in kinds}


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


def differential_expression(
    other: AlignedCells, test: Callable[[AlignedCells], Contrasts], real: RealTests, halves: Halves
) -> Estimates:
    """Compute how the calls of Wilcoxon tests on two sets agree.

    Parameters
    ----------
    test
        Tests the contrasts on some cells, such as each type against the rest.
    real
        The same tests on the real cells, and on the real cells of each half.
    """
    whole = differential.agreement(real.whole, test(other))
    rows = (b for _, b in halves.rows())
    halved = [differential.agreement(one, test(other.take(b))) for one, b in zip(real.halved, rows, strict=False)]
    return {
        name: halves.estimate(getattr(whole, name), [getattr(part, name) for part in halved]) for name in whole._fields
    }


class RealTests(NamedTuple):
    """Tests on the real cells, and on the first :data:`TESTED_HALVES` of their halves; they serve all sets."""

    whole: Contrasts
    halved: list[Contrasts]

    @classmethod
    def of(cls, real: AlignedCells, test: Callable[[AlignedCells], Contrasts], halves: Halves) -> RealTests:
        """Test the real cells."""
        rows = islice((a for a, _ in halves.rows()), TESTED_HALVES)
        return cls(test(real), [test(real.take(a)) for a in rows])


def null_calibration(cells: AlignedCells, types: list[str], rng: np.random.Generator) -> Estimates:
    """Compute ``null_ks`` and ``null_calls``, over several random splits of each type.

    Calls are rare. The error of their share is at least one call among all tests.
    """
    assert cells.labels is not None
    distance, called = differential.null_calibration(cells.values, cells.labels, types, SPLITS, rng).T
    one = 1 / (SPLITS * len(types) * cells.values.shape[1])
    return {
        "null_ks": normal(float(distance.mean()), float(distance.std(ddof=1))),
        "null_calls": normal(float(called.mean()), float(np.hypot(called.std(ddof=1), one))),
    }


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
