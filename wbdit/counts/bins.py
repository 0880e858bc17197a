"""Bins of counts: the levels that a likelihood tells apart."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

EXACT_COUNTS = 10  # counts below this have a bin each; above, bins widen
WIDENING = 1.25
MAX_BINS = 64  # as many as the kernels take
HEADROOM = 1.3  # the last bin reaches this far beyond the largest count seen


class CountBins(NamedTuple):
    """Bins of counts: 0, 1, ... each for itself, then ever wider ones; from `lowest` to `highest`, both ``(L,)``."""

    lowest: np.ndarray
    highest: np.ndarray

    @classmethod
    def up_to(cls, largest: float) -> CountBins:
        """Return the levels that reach beyond a largest count."""
        # wider where MAX_BINS would not reach the largest count
        widening = max(WIDENING, ((HEADROOM * largest + 2) / EXACT_COUNTS) ** (1 / (MAX_BINS - EXACT_COUNTS - 1)))
        edges = list(range(EXACT_COUNTS + 1))
        while edges[-1] <= HEADROOM * largest + 2:
            edges.append(max(edges[-1] + 1, math.ceil(edges[-1] * widening)))
        return cls(np.array(edges[:-1]), np.array(edges[1:]) - 1)

    @property
    def middle(self) -> np.ndarray:
        """Mean count of each level, ``(L,)`` fp64."""
        return (self.lowest + self.highest) / 2

    def of(self, counts: np.ndarray) -> np.ndarray:
        """Return the level of each count, uint8."""
        return np.searchsorted(self.highest, counts, side="left").astype(np.uint8)
