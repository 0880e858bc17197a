"""Whether generated cells repeat training cells: nearest distances to training cells and to held-out ones.

All distances are Euclidean in CFGen's space, 30 principal components of held-out cells, and the held-out cells that it
was fitted on must not be among those compared with the training cells: components keep the cells they were fitted on
apart from all others, and training cells would look nearer. Distance alone does not measure privacy: a cell can be far
from the cell it gives away, and near to one it does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wbdit.evaluation.distances import squared_distances
from wbdit.evaluation.intervals import auc

Array = np.ndarray[Any, Any]

COPY_PERCENTILE = 1.0


def mia_auc(train: Array, heldout: Array, synthetic: Array) -> float:
    """Membership inference: how well nearness to synthetic cells tells training cells from held-out ones.

    The published score of a cell is ``exp(-d^2)`` with d its least distance to a synthetic cell, which is 0 in
    floating point for d over 27. The AUC depends on the order of the scores only, and ``-d`` has the same.

    Parameters
    ----------
    train, heldout, synthetic
        ``(n, k)``, ``(m, k)`` and ``(s, k)``.

    Returns
    -------
    0 to 1; 0.5, a coin, is best. Above it, training cells can be told by the synthetic ones.
    """
    to_train, to_heldout = squared_distances(train, synthetic), squared_distances(heldout, synthetic)
    return auc(-to_heldout.min(axis=1), -to_train.min(axis=1)).value


def dcr_ratio(train: Array, heldout: Array, synthetic: Array) -> float:
    """Distance to the closest record: synthetic cells' median one to training cells over that to held-out cells.

    Parameters
    ----------
    train, heldout, synthetic
        ``(n, k)``, ``(n, k)`` and ``(s, k)``. More cells are nearer by chance, so
        training and held-out cells must be equally many.

    Returns
    -------
    At least 0; 1 is best, less means that synthetic cells keep to the training cells. NaN where the median distance to
    held-out cells is 0.

    Raises
    ------
    ValueError
        If training and held-out cells differ in number.
    """
    if len(train) != len(heldout):
        raise ValueError(f"equal numbers of cells are needed, not {len(train)} and {len(heldout)}")
    near = [float(np.median(np.sqrt(squared_distances(synthetic, cells).min(axis=1)))) for cells in (train, heldout)]
    return near[0] / near[1] if near[1] > 0 else float("nan")


def copy_distance(train: Array, sample: Array) -> float:
    """Return how near to each other training cells are at the nearest: the first percentile of nearest distances.

    Parameters
    ----------
    train
        ``(n, k)``: all training cells.
    sample
        Row numbers of those whose nearest other training cell is looked for.
    """
    from scipy.spatial import cKDTree

    distances, _ = cKDTree(train).query(train[sample], k=2)
    return float(np.percentile(distances[:, 1], COPY_PERCENTILE))  # the first is the cell itself


def copied(cells: Array, train: Array, limit: float) -> Array:
    """Return which cells are copies: as near to a training cell as ``limit``, or nearer.

    Parameters
    ----------
    cells, train
        ``(n, k)`` and ``(m, k)``: synthetic (or held-out) cells, and all training cells.
    limit
        From :func:`copy_distance`.

    Returns
    -------
    ``(n,)`` of bool; ``copies`` is the mean.
    """
    from scipy.spatial import cKDTree

    return np.asarray(cKDTree(train).query(cells, k=1)[0] <= limit)
