"""Memorization of training cells, measured by nearest distances to training cells and to held-out cells.

All distances are Euclidean in CFGen's space: 30 principal components, fitted on held-out cells. Those held-out cells
must not be the ones compared with the training cells. Components separate the cells that they were fitted on from all
others, so training cells would look closer.

Distance alone does not measure privacy: a synthetic cell can be far from the cell that it discloses, and close to one
that it does not. Examples assume ``from wbdit.evaluation.memorization import *``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wbdit.evaluation.distances import squared_distances
from wbdit.evaluation.intervals import auc

Array = np.ndarray[Any, Any]

COPY_PERCENTILE = 1.0
MOST_PAIRS = 10_000_000  # distances at a time, 80 MB; a tree is slower than all pairs in 30 dimensions


def mia_auc(train: Array, heldout: Array, synthetic: Array) -> float:
    """Compute the AUC of membership inference: training against held-out cells, by distance to synthetic cells.

    The published score of a cell is ``exp(-d^2)``, with d the distance to the nearest synthetic cell. It underflows to
    0 for d over 27. The AUC depends on the order of the scores only, so we use ``-d``, which has the same order.

    Parameters
    ----------
    train, heldout, synthetic
        ``(n, k)``, ``(m, k)`` and ``(s, k)``.

    Returns
    -------
    0 to 1; 0.5 (chance) is best. Above it, training cells are closer to synthetic cells than held-out cells are.

    Examples
    --------
    >>> train, heldout, synthetic = np.random.default_rng(0).normal(size=(3, 150, 8))
    >>> round(mia_auc(train, heldout, synthetic), 2), mia_auc(train, heldout, train + 1e-3)
    (0.5..., 1.0)
    """
    to_train, to_heldout = squared_distances(train, synthetic), squared_distances(heldout, synthetic)
    return auc(-to_heldout.min(axis=1), -to_train.min(axis=1)).value


def dcr_ratio(train: Array, heldout: Array, synthetic: Array) -> float:
    """Compute the ratio of distances to the closest record: training cells over held-out cells.

    Each distance is the median over synthetic cells.

    Parameters
    ----------
    train, heldout, synthetic
        ``(n, k)``, ``(n, k)`` and ``(s, k)``. The nearest of more cells is closer by chance, so the numbers of training
        and held-out cells must be equal.

    Returns
    -------
    At least 0; 1 is best. Below 1, synthetic cells are closer to training cells than to held-out cells. NaN if the
    median distance to held-out cells is 0.

    Raises
    ------
    ValueError
        If training and held-out cells differ in number.

    Examples
    --------
    >>> train, heldout = np.array([[0.0], [10.0]]), np.array([[4.0], [14.0]])
    >>> dcr_ratio(train, heldout, np.array([[1.0], [11.0]]))  # 1 from training cells, 3 from held-out cells
    0.3333333333333333
    """
    if len(train) != len(heldout):
        raise ValueError(f"equal numbers of train and held-out cells are needed, not {len(train)} and {len(heldout)}")
    near = [float(np.median(np.sqrt(squared_distances(synthetic, cells).min(axis=1)))) for cells in (train, heldout)]
    return near[0] / near[1] if near[1] > 0 else float("nan")


def copy_distance(train: Array, sample: Array) -> float:
    """Compute the distance that counts as a copy: the first percentile of distances between nearest training cells.

    Parameters
    ----------
    train
        ``(n, k)``: all training cells.
    sample
        Rows of ``train``. The percentile is over their distances to the nearest other training cell.

    Examples
    --------
    >>> train = np.array([[0.0], [1.0], [3.0], [6.0]])
    >>> round(copy_distance(train, np.arange(4)), 6)  # nearest distances: 1, 1, 2, 3
    1.0
    """
    return float(np.percentile(_nearest(train[sample], train, 2), COPY_PERCENTILE))  # the first is the cell itself


def copied(cells: Array, train: Array, limit: float) -> Array:
    """Find the cells that are copies: those within ``limit`` of a training cell.

    Parameters
    ----------
    cells, train
        ``(n, k)`` and ``(m, k)``: synthetic (or held-out) cells, and all training cells.
    limit
        Distance from :func:`copy_distance`.

    Returns
    -------
    ``(n,)`` of bool; the metric ``copies`` is the mean.

    Examples
    --------
    >>> copied(np.array([[0.1], [2.0]]), train=np.array([[0.0], [1.0]]), limit=0.5)
    array([ True, False])
    """
    return np.asarray(_nearest(cells, train, 1) <= limit)


def _nearest(cells: Array, others: Array, k: int) -> Array:
    """Return the distance of each cell to its k-th nearest other, ``(n,)``."""
    found = []
    for rows in np.array_split(np.arange(len(cells)), max(1, len(cells) * len(others) // MOST_PAIRS)):
        squared = squared_distances(cells[rows], others)
        found.append(np.partition(squared, k - 1, axis=1)[:, k - 1])
    return np.sqrt(np.concatenate(found))
