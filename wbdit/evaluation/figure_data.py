"""Data for the figures of the report: gene statistics and a UMAP of the cells."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from wbdit.errors import need_extra
from wbdit.evaluation import distances

MAP_COMPONENTS = 30
NEIGHBORS = 15


class AlignedCells(NamedTuple):
    """A sample of cells: dense float64 ``values (n, genes)``; ``totals (n, 2)`` and columns ``(n,)``, or None."""

    values: np.ndarray
    labels: np.ndarray | None
    totals: np.ndarray | None = None
    conditions: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> AlignedCells:
        """Return the cells at ``rows``, which may repeat."""
        columns = (None if column is None else column[rows] for column in self[1:])
        return AlignedCells(self.values[rows], *columns)


@dataclass(frozen=True)
class FigureData:
    """Data of one seed for the figures; ``metrics.json`` holds none of it.

    Attributes
    ----------
    genes
        ``(genes,)`` names.
    means, variances, zeros
        ``(genes,)`` arrays for ``"real"``, ``"synthetic"`` and ``"floor"``.
    components
        ``(2 n, k)`` joint principal components: n real cells, then n synthetic ones.
    labels
        ``(2 n,)`` or None.
    """

    genes: np.ndarray
    means: dict[str, np.ndarray]
    variances: dict[str, np.ndarray]
    zeros: dict[str, np.ndarray]
    components: np.ndarray
    labels: np.ndarray | None

    @classmethod
    def of(cls, drawn: dict[str, AlignedCells], genes: np.ndarray) -> FigureData:
        """Compute the statistics of equally many ``"real"``, ``"synthetic"`` and ``"floor"`` cells."""
        real, synthetic = drawn["real"], drawn["synthetic"]
        labels = None
        if real.labels is not None and synthetic.labels is not None:
            labels = np.concatenate([real.labels, synthetic.labels])
        return cls(
            genes=genes,
            means={name: cells.values.mean(axis=0) for name, cells in drawn.items()},
            variances={name: cells.values.var(axis=0) for name, cells in drawn.items()},
            zeros={name: (cells.values == 0).mean(axis=0) for name, cells in drawn.items()},
            components=np.vstack(distances.joint_pca(real.values, synthetic.values, MAP_COMPONENTS)),
            labels=labels,
        )

    @property
    def is_synthetic(self) -> np.ndarray:
        """``(2 n,)`` bool, True for the synthetic cells."""
        n = len(self.components) // 2
        return np.repeat([False, True], n)

    @cached_property
    def layout(self) -> np.ndarray:
        """UMAP of real and synthetic cells together, ``(2 n, 2)``; deterministic."""
        return umap_layout(self.components)

    def types(self) -> list[str]:
        """Return the labels, most frequent among real cells first; empty without labels."""
        if self.labels is None:
            return []
        real = self.labels[~self.is_synthetic]
        names = sorted({str(name) for name in self.labels})
        return sorted(names, key=lambda name: -int(np.sum(real == name)))


def umap_layout(components: np.ndarray) -> np.ndarray:
    """Return a UMAP (McInnes et al. 2018) of points ``(n, k)`` as ``(n, 2)``; deterministic.

    Raises
    ------
    InputError
        If umap-learn is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numba and umap raise deprecation warnings on import
            from umap import UMAP
    except ImportError:
        raise need_extra("umap-learn") from None
    reducer = UMAP(
        n_neighbors=min(NEIGHBORS, len(components) - 1),
        min_dist=0.5,
        init="pca",
        negative_sample_rate=2,  # clusters stay closer, so less of the map is empty
        random_state=0,
        n_jobs=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(reducer.fit_transform(components), dtype=np.float64)
