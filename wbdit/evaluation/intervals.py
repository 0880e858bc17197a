"""95% intervals of scores: the variation expected with other cells from the same sources.

An ordinary bootstrap draws some cells twice. Duplicates bias most metrics here upwards: distances, densities, forests
and differences of noisy means. So cells are resampled without replacement, in random halves of both sets. This is the
m-out-of-n bootstrap with m = n / 2 (Politis & Romano, Ann. Statist. 22, 1994; Bickel, Götze & van Zwet, Statist.
Sinica 7, 1997).

The spread over halves is about the spread of the score at n cells. The variance of an average is ``(n - m) / (n m)``
over m of n cells and ``1 / n`` over n new cells; their ratio is the correction of the delete-d jackknife (Shao & Wu,
Ann. Statist. 17, 1989). A bias that depends on the number of cells, such as a floor, shifts all halves equally. So
only the spread of the halves is used, centered on the score. For a score at its floor, the interval is on the wide
side.

Where theory gives the spread directly, nothing is resampled: see :func:`auc`, :func:`proportion` and
:func:`wbdit.evaluation.distances.transport`. Examples assume ``from wbdit.evaluation.intervals import *``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

Z = 1.959964  # normal quantile of a two-sided 95% interval
AT_MOST = 40  # resamples of a statistic that is recomputed from cells; the spread's relative error is one ninth


class Estimate(NamedTuple):
    """A score and its 95% interval, or None without one."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Halves:
    """Random halves of two equally large sets.

    Attributes
    ----------
    real, other
        ``(resamples, n)`` weights: equal for the chosen half of the cells, 0 for the others, with sum 1. There are
        fewer columns if labels are ignored.
    n
        Number of cells per set that the halves were drawn from.
    """

    real: Array
    other: Array
    n: int

    @classmethod
    def draw(cls, n: int, resamples: int, rng: np.random.Generator) -> Halves:
        """Draw ``resamples`` random halves from each of two sets of ``n`` cells.

        Examples
        --------
        >>> halves = Halves.draw(10, 4, np.random.default_rng(0))
        >>> halves.real.shape, float(halves.real[0].max())
        ((4, 10), 0.2)
        """
        m = n // 2
        order = rng.random((2, resamples, n)).argsort(axis=-1)
        real, other = (order < m) / m
        return cls(real, other, n)

    def estimate(self, value: float, replicates: Iterable[float]) -> Estimate:
        """Return the value with an interval from the spread of its replicates, one per half."""
        m = self.n // 2
        found = np.array([each for each in replicates if np.isfinite(each)])
        if len(found) < 2:
            return Estimate(value)
        return normal(value, float(np.std(found, ddof=1)) * (m / (self.n - m)) ** 0.5)

    def pairwise(self, value: float, statistic: Callable[[Array, Array], float], real: Array, other: Array) -> Estimate:
        """Return the value with an interval from ``statistic`` of precomputed values per half.

        Parameters
        ----------
        real, other
            ``(resamples, ...)``: one row per half, such as gene means.
        """
        return self.estimate(value, (statistic(a, b) for a, b in zip(real, other, strict=True)))

    def rows(self) -> Iterable[tuple[Array, Array]]:
        """Yield the cells of each half as two arrays of row numbers, for at most ``AT_MOST`` halves."""
        for real, other in zip(self.real[:AT_MOST], self.other[:AT_MOST], strict=True):
            yield np.flatnonzero(real), np.flatnonzero(other)

    def recomputed(
        self, value: float, statistic: Callable[[Array, Array], float], real: Array, other: Array
    ) -> Estimate:
        """Return the value with an interval from ``statistic`` of the cells of each half."""
        return self.estimate(value, (statistic(real[a], other[b]) for a, b in self.rows()))


def normal(value: float, error: float) -> Estimate:
    """Return the value with the interval of plus and minus 1.96 standard errors.

    Examples
    --------
    >>> low, high = normal(1.0, error=0.5).interval
    >>> round(low, 2), round(high, 2)
    (0.02, 1.98)
    """
    return Estimate(value, (value - Z * error, value + Z * error))


def standard_error(interval: tuple[float, float]) -> float:
    """Return the standard error that an interval of :func:`normal` was made of.

    Examples
    --------
    >>> round(standard_error(normal(1.0, error=0.5).interval), 6)
    0.5
    """
    return (interval[1] - interval[0]) / (2 * Z)


def auc(negative: Array, positive: Array) -> Estimate:
    """Compute the area under the ROC curve and the interval of DeLong, DeLong & Clarke-Pearson (Biometrics 44, 1988).

    The interval is that of the fitted classifier on other cells; the classifier is not fitted again.

    Parameters
    ----------
    negative, positive
        ``(n,)`` and ``(m,)`` scores of the two classes, at least two each. Ties count half.

    Examples
    --------
    >>> auc(np.array([0.1, 0.4, 0.2]), np.array([0.3, 0.9, 0.8])).value
    0.888...
    """
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([negative, positive]))
    below = (ranks[len(negative) :] - rankdata(positive)) / len(negative)  # share of negatives below each positive
    above = 1 - (ranks[: len(negative)] - rankdata(negative)) / len(positive)
    error = (np.var(above, ddof=1) / len(negative) + np.var(below, ddof=1) / len(positive)) ** 0.5
    return normal(float(below.mean()), float(error))


def proportion(hits: Array, n: float | None = None) -> Estimate:
    """Compute the share of ``hits`` and Wilson's interval (J. Am. Stat. Assoc. 22, 1927), valid for zero hits too.

    Parameters
    ----------
    hits
        ``(n,)``, 0 to 1.
    n
        Number of independent hits that are worth as much, if they depend on each other.

    Examples
    --------
    >>> share, (low, high) = proportion(np.array([True, False, True, True]))
    >>> share, round(low, 2), round(high, 2)
    (0.75, 0.3, 0.95)
    """
    n, p = len(hits) if n is None else n, float(np.mean(hits))
    center = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5
    return Estimate(p, (center - half, center + half))
