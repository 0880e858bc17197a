"""Labels, covariates and library sizes of new cells, drawn jointly from the training cells.

The three are correlated: cells late in a pseudotime have other labels and other library sizes than early ones. So what
a request leaves open is taken from one training cell that fits the rest of the request.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from wbdit.data.covariates import Covariates
from wbdit.data.labels import Labels

NEAREST_SHARE, NEAREST = 0.05, 50  # training cells around a point: this share, but at least this many


class Drawn(NamedTuple):
    """Labels ``(n, C)`` int64, covariates ``(n, K)`` fp64 and library sizes ``(n,)`` fp64 of new cells."""

    codes: np.ndarray
    covariates: np.ndarray
    library: np.ndarray


class TrainingDraws:
    """Draws of labels, covariates and library sizes from the training cells.

    Parameters
    ----------
    labels
        Label columns, with the observed combinations and their sizes.
    covariates
        Covariates, with the training cells' values.
    library
        Library sizes of the training cells ``(n,)``; empty if they held no counts. Cells are grouped by
        ``labels.combinations``, here and in ``covariates.values``.
    """

    def __init__(self, labels: Labels, covariates: Covariates, library: np.ndarray) -> None:
        self.labels = labels
        self.covariates = covariates
        self.combination = np.repeat(np.arange(len(labels.sizes)), labels.sizes)
        self.library = library if len(library) else np.ones(len(self.combination), np.float32)

    def draw(self, codes: np.ndarray, at: np.ndarray, u: np.ndarray) -> Drawn:
        """Complete the request of each cell.

        Parameters
        ----------
        codes
            Labels ``(n, C)`` int64; -1 to draw. A combination that no training cell had draws from all training cells
            with its first label; their library sizes are multiplied by the factor that a sum of the labels' effects
            on the mean log library size lets expect, within the range of the training cells.
        at
            Covariates ``(n, K)``; NaN to draw. If any are given, cells are drawn from the training cells nearest to
            them, :data:`NEAREST_SHARE` of those that have the labels, but at least :data:`NEAREST`, and all that are as
            near as the last of these. Distances are Euclidean in units of each column's standard deviation.
        u
            Uniform numbers ``(n,)`` in (0, 1): the quantile of the cell's library size among those it is drawn from.
            Library sizes are interpolated between training cells; labels and covariates are those of the cell whose
            library size is closest.
        """
        drawn = Drawn(codes.copy(), at.copy(), np.empty(len(codes)))
        asked = np.concatenate([codes.astype(np.float64), at], axis=1)
        for same in _equal_rows(asked):
            pool = self._nearest(self._with_labels(codes[same[0]]), at[same[0]])
            pool = pool[np.argsort(self.library[pool], kind="stable")]
            sizes = np.quantile(self.library[pool], u[same]) * self._factor(codes[same[0]], pool)
            drawn.library[same] = np.clip(sizes, self.library.min(), self.library.max())
            source = pool[np.rint(u[same] * (len(pool) - 1)).astype(int)]
            drawn.codes[same] = np.where(
                codes[same] < 0, self.labels.combinations[self.combination[source]], codes[same]
            )
            if self.covariates.columns:
                drawn.covariates[same] = np.where(np.isnan(at[same]), self.covariates.values[source], at[same])
        return drawn

    def _with_labels(self, wanted: np.ndarray) -> np.ndarray:
        """Return the training cells with labels ``(C,)``, or with the first one if there are none."""
        fits = ((wanted < 0) | (self.labels.combinations == wanted)).all(1)
        if not fits.any():
            fits = self.labels.combinations[:, 0] == wanted[0]
        return np.flatnonzero(fits[self.combination])

    def _factor(self, wanted: np.ndarray, pool: np.ndarray) -> float:
        """Return the expected ratio of library sizes of a combination ``(C,)`` to those of training cells."""
        if (wanted < 0).any() or (self.labels.combinations == wanted).all(1).any():
            return 1.0
        first = np.cumsum([0, *self.labels.label_sizes[:-1]])
        log_library = np.bincount(self.combination, np.log(np.maximum(self.library, 1))) / self.labels.sizes
        columns = np.zeros((len(log_library), sum(self.labels.label_sizes)))
        columns[np.arange(len(columns))[:, None], self.labels.combinations + first] = 1
        # each label's effect is shrunk as by one more cell without it
        weighted = columns * self.labels.sizes[:, None]
        mean = np.average(log_library, weights=self.labels.sizes)
        effects = np.linalg.solve(weighted.T @ columns + np.eye(columns.shape[1]), weighted.T @ (log_library - mean))
        of_pool = np.mean((columns @ effects)[self.combination[pool]])
        return float(np.exp(effects[wanted + first].sum() - of_pool))

    def _nearest(self, pool: np.ndarray, point: np.ndarray) -> np.ndarray:
        """Return the training cells of `pool` that are nearest to a point ``(K,)``; all of them if it is all NaN."""
        given = ~np.isnan(point)
        n = max(NEAREST, int(NEAREST_SHARE * len(pool)))
        if not given.any() or n >= len(pool):
            return pool
        away = (self.covariates.values[pool][:, given] - point[given]) / self.covariates.scale[given]
        squared = (away**2).sum(1)
        return pool[squared <= np.partition(squared, n - 1)[n - 1]]


def _equal_rows(table: np.ndarray) -> list[np.ndarray]:
    """Return the indices of each group of rows ``(n, k)`` that are equal in all bits, as NaN is to itself."""
    if table.shape[1] == 0:
        return [np.arange(len(table))]
    keys = np.ascontiguousarray(table).view(np.dtype((np.void, table.itemsize * table.shape[1])))[:, 0]
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    return np.split(np.argsort(group, kind="stable"), np.cumsum(sizes)[:-1])
