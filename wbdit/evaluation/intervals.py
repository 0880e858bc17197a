"""95 % intervals: how far a score would move with other cells from the same sources.

An ordinary bootstrap draws cells twice, and most metrics here take twins for structure: distances, densities,
forests and differences of noisy means all grow. So cells are resampled without replacement, in random halves of both
sets, the m-out-of-n bootstrap with m = n / 2 (Politis & Romano, Ann. Statist. 22, 1994; Bickel, Götze & van Zwet,
Statist. Sinica 7, 1997). Of n cells, halves spread about as the score itself does with n: the variance of an average
over m of n cells is ``(n - m) / (n m)``, over n new ones ``1 / n``, which is the delete-d jackknife (Shao & Wu, Ann.
Statist. 17, 1989). What shifts with the number of cells, as a floor does, shifts all halves alike, so only their spread
is used, about the score. Where a score stands at its floor the interval is on the wide side.

Where theory gives the spread directly, nothing is resampled: see :func:`auc`, :func:`proportion` and
:func:`wbdit.evaluation.distances.transport`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

Z = 1.959964  # of 95 %
AT_MOST = 40  # resamples of a statistic that must go through the cells again; the spread is then known to a ninth


class Estimate(NamedTuple):
    """A score and its 95 % interval, None where there is none."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Halves:
    """Random halves of two equally large sets.

    Attributes
    ----------
    real, other
        ``(resamples, n)`` weights, equal for the chosen half of the cells, 0 for the rest, with sum 1; fewer
        columns where some cells are left out.
    n
        Cells of each set that the halves were drawn from.
    """

    real: Array
    other: Array
    n: int

    @classmethod
    def draw(cls, n: int, resamples: int, rng: np.random.Generator) -> Halves:
        """Draw ``resamples`` halves of each of two sets of ``n`` cells."""
        m = n // 2
        order = rng.random((2, resamples, n)).argsort(axis=-1)
        real, other = (order < m) / m
        return cls(real, other, n)

    def estimate(self, value: float, replicates: Iterable[float]) -> Estimate:
        """Return the value with the interval that its replicates, one for each half, spread to."""
        m = self.n // 2
        found = np.array([each for each in replicates if np.isfinite(each)])
        if len(found) < 2:
            return Estimate(value)
        return normal(value, float(np.std(found, ddof=1)) * (m / (self.n - m)) ** 0.5)

    def pairwise(self, value: float, statistic: Callable[[Array, Array], float], real: Array, other: Array) -> Estimate:
        """Return the value with the interval from ``statistic`` of what each half has in ``real`` and ``other``.

        Parameters
        ----------
        real, other
            ``(resamples, ...)``: a row for each half, such as the genes' means.
        """
        return self.estimate(value, (statistic(a, b) for a, b in zip(real, other, strict=True)))

    def rows(self) -> Iterable[tuple[Array, Array]]:
        """Yield each half as two arrays of row numbers, at most ``AT_MOST`` times."""
        for real, other in zip(self.real[:AT_MOST], self.other[:AT_MOST], strict=True):
            yield np.flatnonzero(real), np.flatnonzero(other)

    def recomputed(
        self, value: float, statistic: Callable[[Array, Array], float], real: Array, other: Array
    ) -> Estimate:
        """Return the value with the interval from ``statistic`` of the cells of each half."""
        return self.estimate(value, (statistic(real[a], other[b]) for a, b in self.rows()))


def normal(value: float, error: float) -> Estimate:
    """Return the value plus and minus 1.96 standard errors."""
    return Estimate(value, (value - Z * error, value + Z * error))


def auc(negative: Array, positive: Array) -> Estimate:
    """Area under the ROC curve, and the interval of DeLong, DeLong & Clarke-Pearson (Biometrics 44, 1988).

    The interval is that of the classifier at hand on other cells; it does not fit the classifier again.

    Parameters
    ----------
    negative, positive
        ``(n,)`` and ``(m,)`` values, two or more of each; ties count half.
    """
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([negative, positive]))
    below = (ranks[len(negative) :] - rankdata(positive)) / len(negative)  # of the negative ones, for each positive
    above = 1 - (ranks[: len(negative)] - rankdata(negative)) / len(positive)
    error = (np.var(above, ddof=1) / len(negative) + np.var(below, ddof=1) / len(positive)) ** 0.5
    return normal(float(below.mean()), float(error))


def proportion(hits: Array) -> Estimate:
    """Share of ``hits``, and Wilson's interval (J. Am. Stat. Assoc. 22, 1927), which holds for no hit at all too."""
    n, p = len(hits), float(np.mean(hits))
    center = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5
    return Estimate(p, (center - half, center + half))
