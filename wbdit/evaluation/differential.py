"""Differential expression: whether a Wilcoxon test finds the same genes on synthetic as on real cells.

Examples assume ``from wbdit.evaluation.differential import *``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from wbdit.evaluation.genes import rank_correlation

Array = np.ndarray[Any, Any]

FALSE_DISCOVERIES = 0.05  # rate that adjusted p-values are held to
LOG2_CHANGE = 0.25  # smallest absolute log2 fold change of a call
LEAST_P = 1e-300  # of a logarithm


class Contrasts(NamedTuple):
    """Tests of several contrasts, for each gene.

    Attributes
    ----------
    p, adjusted
        ``(contrasts, genes)`` two-sided p-values, and those adjusted within each contrast (Benjamini & Hochberg 1995).
    log2_change
        ``(contrasts, genes)`` log2 fold changes; positive if the gene is higher in the group.
    """

    p: Array
    adjusted: Array
    log2_change: Array

    @property
    def called(self) -> Array:
        """``(contrasts, genes)`` of bool: FDR below 5 % and an absolute log2 fold change above 0.25."""
        return (self.adjusted < FALSE_DISCOVERIES) & (np.abs(self.log2_change) > LOG2_CHANGE)


class Agreement(NamedTuple):
    """How the calls on synthetic cells agree with those on real ones, over all contrasts and genes.

    Attributes
    ----------
    de_jaccard, de_precision, de_recall
        Calls of both sets, as a share of the calls of either, of the synthetic ones and of the real ones. A call
        counts only if the change has the same sign in both. NaN if there is none to share.
    de_calls
        Number of synthetic calls over that of real ones: above 1, there are too many.
    padj_corr
        Spearman correlation of ``-log10`` adjusted p-values, over what is called in either set.
    """

    de_jaccard: float
    de_precision: float
    de_recall: float
    de_calls: float
    padj_corr: float


def against_rest(cells: Array, labels: Array, types: Sequence[str]) -> Contrasts:
    """Test each type against all other cells.

    Parameters
    ----------
    cells, labels
        ``(n, genes)`` log-normalized and ``(n,)``.
    types
        Labels to test; cells of each, and others, must be present.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["B", "T"], 40)
    >>> cells = rng.gamma(1.0, size=(80, 3))
    >>> cells[:40, 0] += 2
    >>> against_rest(cells, labels, ["B", "T"]).called.tolist()
    [[True, False, False], [True, False, False]]
    """
    return wilcoxon(cells, np.stack([labels == name for name in types]))


def between_conditions(
    cells: Array, labels: Array, conditions: Array, types: Sequence[str], names: Sequence[str]
) -> Contrasts:
    """Test each condition against the others, within each type; with two conditions, the first against the second.

    Parameters
    ----------
    cells, labels, conditions
        ``(n, genes)`` log-normalized, ``(n,)`` and ``(n,)``.
    types
        Labels to test within. One that lacks cells of a condition gives contrasts without calls.
    names
        Names of conditions to test.
    """
    names = names[:1] if len(names) == 2 else names
    found = []
    for name in types:
        rows = labels == name
        found.append(wilcoxon(cells[rows], np.stack([conditions[rows] == other for other in names])))
    return Contrasts(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def wilcoxon(cells: Array, groups: Array) -> Contrasts:
    """Test groups of cells against all other cells by Wilcoxon's rank sums, with the correction for ties.

    As ``scanpy.tl.rank_genes_groups(..., method="wilcoxon", tie_correct=True)``, but each gene is ranked only once, and
    a fold change is taken with a pseudo-count, so that a gene that one group lacks does not get a change of 2^30:
    it is that of :func:`wbdit.evaluation.distances.log_fold_changes`, in units of log 2.

    Parameters
    ----------
    cells
        ``(n, genes)`` log-normalized.
    groups
        ``(contrasts, n)`` of bool. A contrast with cells on one side only has no change and p-values of 1.
    """
    from scipy.stats import false_discovery_control, norm, rankdata

    n, inside = len(cells), groups.sum(axis=1, keepdims=True)
    possible = (inside > 0) & (inside < n)
    if not possible.any():
        ones = np.ones((len(groups), cells.shape[1]))
        return Contrasts(ones, ones, 0 * ones)
    ranks = rankdata(cells, axis=0) - (n + 1) / 2  # centered
    spread = (ranks**2).sum(axis=0) / (n - 1)  # that of ranks without ties, less what ties take
    sums = groups.astype(np.float64) @ ranks
    deviation = np.sqrt(inside * (n - inside) / n * spread)
    z = np.divide(sums, deviation, out=np.zeros_like(sums), where=deviation > 0)
    p = 2 * norm.sf(np.abs(z))
    total, within = cells.sum(axis=0), groups.astype(np.float64) @ cells
    change = within / np.maximum(inside, 1) - (total - within) / np.maximum(n - inside, 1)
    change = np.where(possible, change, 0) / np.log(2)
    return Contrasts(p, false_discovery_control(p, axis=1), change)


def agreement(real: Contrasts, other: Contrasts) -> Agreement:
    """Compare the calls of two sets, for the same contrasts and genes.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(["B", "T"], 60)
    >>> cells = rng.gamma(1.0, size=(120, 50))
    >>> cells[:60, :20] += 1
    >>> tests = against_rest(cells, labels, ["B", "T"])
    >>> [round(score, 3) for score in agreement(tests, tests)]
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    wanted, got = real.called, other.called
    both = wanted & got & (np.sign(real.log2_change) == np.sign(other.log2_change))
    either = wanted | got
    logs = [-np.log10(np.maximum(tests.adjusted[either], LEAST_P)) for tests in (real, other)]
    return Agreement(
        de_jaccard=_share(both, either),
        de_precision=_share(both, got),
        de_recall=_share(both, wanted),
        de_calls=_share(got, wanted),
        padj_corr=_rank_correlation(*logs),
    )


def null_calibration(cells: Array, labels: Array, types: Sequence[str], splits: int, rng: np.random.Generator) -> Array:
    """Compare random halves of each label, where no gene should be called.

    Cells of a label that are copies of each other, or depend on each other in another way, give too few small
    p-values or too many.

    Returns
    -------
    ``(splits, 2)``: the Kolmogorov-Smirnov distance of the p-values from a uniform distribution, and the share of genes
    with an adjusted p-value below 5 %; means over types, weighted by cells. Genes that are equal in all cells of a type
    are left out. NaN if no type has four cells that differ.

    Examples
    --------
    >>> cells, labels = np.random.default_rng(0).gamma(1.0, size=(200, 300)), np.repeat(["B", "T"], 100)
    >>> ((distance, called),) = null_calibration(cells, labels, ["B", "T"], 1, np.random.default_rng(1))
    >>> bool(distance < 0.1), float(called)
    (True, 0.0)
    """
    found, weights = [], []
    for name in types:
        rows = np.flatnonzero(labels == name)
        varying = np.ptp(cells[rows], axis=0) > 0
        if len(rows) < 4 or not varying.any():
            continue
        halves = rng.random((splits, len(rows))).argsort(axis=1) < len(rows) // 2
        tests = wilcoxon(cells[np.ix_(rows, varying)], halves)
        called = (tests.adjusted < FALSE_DISCOVERIES).mean(axis=1)
        found.append(np.stack([_distance_from_uniform(tests.p), called], axis=1))
        weights.append(len(rows))
    return np.average(found, axis=0, weights=weights) if found else np.full((splits, 2), np.nan)


def _distance_from_uniform(p: Array) -> Array:
    """Return the Kolmogorov-Smirnov statistic of each row; `scipy.stats.kstest` would compute its p-value too."""
    n, ordered = p.shape[-1], np.sort(p, axis=-1)
    steps = np.arange(n + 1) / n
    return np.maximum((steps[1:] - ordered).max(axis=-1), (ordered - steps[:-1]).max(axis=-1))


def _share(part: Array, whole: Array) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else float("nan")


def _rank_correlation(a: Array, b: Array) -> float:
    return rank_correlation(a, b) if len(a) > 1 else float("nan")
