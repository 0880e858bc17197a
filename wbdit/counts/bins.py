"""Bins of counts: the discrete levels of the count likelihood."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

EXACT_COUNTS = 10  # each count below this has its own bin; above, bins widen
WIDENING = 1.25  # ratio of successive edges of the wide bins
MAX_BINS = 64  # limit of the kernels
HEADROOM = 1.3  # the bins cover this multiple of the largest training count


class CountBins(NamedTuple):
    """Bins of counts: one per count for small counts, ever wider ones above.

    Attributes
    ----------
    lowest, highest
        Smallest and largest count of each bin, ``(L,)`` integers.
    """

    lowest: np.ndarray
    highest: np.ndarray

    @classmethod
    def up_to(cls, largest: float) -> CountBins:
        """Return bins that cover :data:`HEADROOM` times a largest count."""
        # steeper if MAX_BINS bins would not reach the largest count
        widening = max(WIDENING, ((HEADROOM * largest + 2) / EXACT_COUNTS) ** (1 / (MAX_BINS - EXACT_COUNTS - 1)))
        edges = list(range(EXACT_COUNTS + 1))
        while edges[-1] <= HEADROOM * largest + 2:
            edges.append(max(edges[-1] + 1, math.ceil(edges[-1] * widening)))
        return cls(np.array(edges[:-1]), np.array(edges[1:]) - 1)

    @property
    def middle(self) -> np.ndarray:
        """Mean count of each bin, ``(L,)`` fp64."""
        return (self.lowest + self.highest) / 2

    def of(self, counts: np.ndarray) -> np.ndarray:
        """Return the bin index of each count, uint8."""
        return np.searchsorted(self.highest, counts, side="left").astype(np.uint8)
