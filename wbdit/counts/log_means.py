"""Mean log-normalized counts of negative binomials, and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

from wbdit.data.normalize import TARGET_SUM

SIZES = (0.02, 20.0)  # of negative binomials, nearly Poisson at the upper end
LOG_MEANS = np.linspace(np.log(1e-4), np.log(1e4), 160)
LOG_SIZES = np.linspace(np.log(SIZES[0]), np.log(SIZES[1]), 32)
BISECTIONS = 24


class LogMeans(NamedTuple):
    """Means of ln(1 + count per 10,000) of negative binomials, for cells of one library size.

    Attributes
    ----------
    values
        On a grid of the counts' log sizes and log means, ``(32, 160)``; linear in between.

    Examples
    --------
    >>> from wbdit.counts.log_means import LogMeans
    >>> of = LogMeans.at(2000)
    >>> means, log_sizes = np.array([0.1, 5.0]), np.zeros(2)
    >>> of(means, log_sizes).round(2)
    array([0.17, 2.57])
    >>> of.means(of(means, log_sizes), log_sizes).round(2)
    array([0.1, 5. ])
    """

    values: np.ndarray

    @classmethod
    def at(cls, library: float) -> LogMeans:
        """Return the table for cells of a library size."""
        counts, p = _probabilities()
        return cls(p @ np.log1p(counts * (TARGET_SUM / library)))

    def __call__(self, means: np.ndarray, log_sizes: np.ndarray) -> np.ndarray:
        """Return the mean logarithms of counts with given means and log sizes, of one shape."""
        i, u = _between(LOG_MEANS, np.log(np.maximum(means, 1e-12)))
        j, v = _between(LOG_SIZES, log_sizes)
        lower, upper = (self.values[j + k, i] * (1 - u) + self.values[j + k, i + 1] * u for k in (0, 1))
        # below the grid, logarithms are in proportion to means
        return (lower * (1 - v) + upper * v) * np.minimum(means / np.exp(LOG_MEANS[0]), 1)

    def means(self, log_means: np.ndarray, log_sizes: np.ndarray) -> np.ndarray:
        """Return the means of counts with given mean logarithms and log sizes, of one shape."""
        return np.exp(bisect(lambda x: self(np.exp(x), log_sizes) < log_means, log_means.shape, -25, LOG_MEANS[-1]))


def bisect(is_below: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    """Return the numbers between `low` and `high` up to which `is_below` holds, of a shape.

    Examples
    --------
    >>> from wbdit.counts.log_means import bisect
    >>> bisect(lambda x: x**2 < 2, (1,), 0, 2).round(3)
    array([1.414])
    """
    lows, highs = np.full(shape, float(low)), np.full(shape, float(high))
    for _ in range(BISECTIONS):
        middle = (lows + highs) / 2
        below = is_below(middle)
        lows, highs = np.where(below, middle, lows), np.where(below, highs, middle)
    return (lows + highs) / 2


@cache
def _probabilities() -> tuple[np.ndarray, np.ndarray]:
    """Return counts, and their probabilities ``(sizes, means, counts)`` under the negative binomials of the grid."""
    # each count up to 128, then few, each with the probability of those up to the next
    counts = np.unique(np.concatenate([np.arange(129), np.geomspace(129, 1e6, 300).round()]))
    size, mean = np.exp(LOG_SIZES)[:, None, None], np.exp(LOG_MEANS)[None, :, None]
    log_p = gammaln(counts + size) - gammaln(size) - gammaln(counts + 1)
    log_p = log_p + size * np.log(size / (size + mean)) + counts * np.log(mean / (size + mean))
    p = np.exp(log_p) * np.diff(counts, append=counts[-1] + 1)
    return counts, p / p.sum(-1, keepdims=True)


def _between(grid: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the grid's number below each x, and the distance from it in steps of the grid."""
    at = np.clip((x - grid[0]) / (grid[1] - grid[0]), 0, len(grid) - 1)
    below = np.minimum(at.astype(int), len(grid) - 2)
    return below, at - below
