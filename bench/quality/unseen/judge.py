"""How right is a change of expression? Five figures for a set of cells."""

from __future__ import annotations

import anndata as ad
import numpy as np
from scipy.spatial.distance import cdist, pdist
from sklearn.decomposition import PCA

from bench.quality.unseen.cells import LeftOut
from wbdit.data.normalize import transformed
from wbdit.evaluation.differential import Contrasts, agreement, wilcoxon

MOST = 600  # cells of each set for calls and energies
COMPONENTS = 30
MEASURES = ("r", "slope", "R2d", "jaccard", "gap")


class Judge:
    """Scores of cells that should be like the left-out ones.

    The true change d is that of mean ln(1 + count per 10,000) between the judge's real cells before and after; the
    change p of a method is that of its cells from the other half of the real cells before. Scores are the Pearson
    correlation ``r``, the slope ``<p, d> / <d, d>``, and ``R2d = 1 - |p - d|^2 / |d|^2``, 0 for no change. ``jaccard``
    compares the genes that are called between cells before and after (Wilcoxon, FDR 5 %, log2 fold change above
    0.25). ``gap`` is the share of the energy distance between cells before and after that is closed, 1 for the other
    half of the real cells. It is taken on 30 principal components of all real cells, since those of the few that are
    compared would fit their noise.
    """

    def __init__(self, left_out: LeftOut, seed: int) -> None:
        parts = (left_out.before, left_out.truth, left_out.own, left_out.other)
        before, truth, own, other = map(log_values, parts)
        self.own = own.mean(0)
        self.true = truth.mean(0) - before.mean(0)
        self.before, self.truth, self.base = before[:MOST], truth[:MOST], own[:MOST]
        every = np.concatenate([log_values(left_out.train), truth, other])
        known = PCA(COMPONENTS, random_state=seed).fit(every)
        self.center, self.axes = known.mean_, known.components_
        self.calls = self._calls(self.truth, self.before)
        self.near, self.far = self._energy(other[:MOST]), self._energy(self.before)

    def __call__(self, cells: ad.AnnData) -> dict[str, float]:
        """Return the scores of cells with counts in X, in random order."""
        values = log_values(cells)
        found = values.mean(0) - self.own
        values = values[:MOST]
        called = self._calls(values[: len(self.truth)], self.base[: len(self.before)])
        return {
            "r": float(np.corrcoef(found, self.true)[0, 1]) if found.any() else float("nan"),
            "slope": float(found @ self.true / (self.true @ self.true)),
            "R2d": 1 - float(((found - self.true) ** 2).sum() / (self.true @ self.true)),
            "jaccard": agreement(self.calls, called).de_jaccard,
            "gap": 1 - (self._energy(values) - self.near) / (self.far - self.near),
        }

    @staticmethod
    def _calls(after: np.ndarray, before: np.ndarray) -> Contrasts:
        both = np.concatenate([after, before])
        return wilcoxon(both, (np.arange(len(both)) < len(after))[None])

    def _energy(self, values: np.ndarray) -> float:
        one, other = ((x - self.center) @ self.axes.T for x in (values, self.truth))
        return float(2 * cdist(one, other).mean() - pdist(one).mean() - pdist(other).mean())


def log_values(cells: ad.AnnData) -> np.ndarray:
    """Return ln(1 + count per 10,000) of cells, ``(n, G)`` fp64."""
    return transformed(cells.X.toarray().astype(np.float64), "lognorm")
