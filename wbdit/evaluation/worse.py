"""Sets that are worse on purpose: what a metric must be able to see before its silence means anything.

Each function takes real cells and returns as many that are worse in one known way, with the same zeros where it can.
Examples assume ``from wbdit.evaluation.worse import *``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from wbdit.evaluation.figure_data import AlignedCells

EFFECTS = 0.1  # share of the effects of types on genes that are halved
LOST = 0.1  # share of cells that the lost type should have
MIN_TYPE = 10  # cells


def independent_genes(cells: AlignedCells, rng: np.random.Generator) -> AlignedCells:
    """Shuffle each gene between the cells of a label: all correlations within labels are gone.

    Examples
    --------
    >>> cells = AlignedCells(np.array([[0.0, 0.0], [1.0, 1.0]]), None)
    >>> independent_genes(cells, np.random.default_rng(0)).values.sum(0).tolist()  # means stay
    [1.0, 1.0]
    """
    values = cells.values.copy()
    for rows in _by_label(cells):
        values[rows] = rng.permuted(values[rows], axis=0)
    return cells._replace(values=values)


def weaker_effects(cells: AlignedCells, rng: np.random.Generator) -> AlignedCells | None:
    """Halve a tenth of the effects of labels on genes: the mean of the label moves half way to that of all cells.

    Values of 0 stay 0, the others are multiplied. None without labels.
    """
    if cells.labels is None or len(np.unique(cells.labels)) < 2:
        return None
    values, overall = cells.values.copy(), cells.values.mean(axis=0)
    for rows in _by_label(cells):
        mean = values[rows].mean(axis=0)
        wanted = np.where(rng.random(len(mean)) < EFFECTS, (mean + overall) / 2, mean)
        values[rows] *= np.divide(wanted, mean, out=np.ones_like(mean), where=mean > 0)
    return cells._replace(values=values)


def lost_type(cells: AlignedCells, rng: np.random.Generator) -> AlignedCells | None:
    """Replace the cells of one label, about a tenth of all, by cells of the others. None without such a label."""
    if cells.labels is None:
        return None
    names, sizes = np.unique(cells.labels, return_counts=True)
    fit = np.flatnonzero((sizes >= MIN_TYPE) & (sizes <= len(cells.labels) / 2))
    if len(fit) == 0:
        return None
    lost = names[fit[np.argmin(np.abs(sizes[fit] - LOST * len(cells.labels)))]]
    gone = cells.labels == lost
    rows = np.arange(len(gone))
    rows[gone] = rng.choice(rows[~gone], gone.sum())
    return cells.take(rows)


def doubled_cells(cells: AlignedCells, rng: np.random.Generator) -> AlignedCells:
    """Take half of the cells, each twice."""
    n = len(cells.values)
    return cells.take(np.resize(rng.permutation(n)[: (n + 1) // 2], n))


#: Every worse set by name, with what it lacks in words.
WORSE: dict[str, tuple[Callable[[AlignedCells, np.random.Generator], AlignedCells | None], str]] = {
    "independent": (independent_genes, "genes of a type drawn one by one"),
    "weaker": (weaker_effects, "a tenth of the differences between types halved"),
    "lost": (lost_type, "a type lost"),
    "doubled": (doubled_cells, "each cell twice"),
}


def _by_label(cells: AlignedCells) -> list[np.ndarray]:
    """Return the rows of each label; all rows without labels."""
    if cells.labels is None:
        return [np.arange(len(cells.values))]
    return [np.flatnonzero(cells.labels == name) for name in np.unique(cells.labels)]
