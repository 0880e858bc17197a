"""Bins of counts: the levels that a likelihood tells apart."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

EXACT = 10  # counts below this are a level each; above, bins widen
WIDENING = 1.25
MOST = 64  # levels, as many as the kernels take
ROOM = 1.3  # the last level reaches this far beyond the largest count that was seen


class CountBins(NamedTuple):
    """Bins of counts: 0, 1, ... each for itself, then ever wider ones; from `lowest` to `highest`, both ``(L,)``."""

    lowest: np.ndarray
    highest: np.ndarray

    @classmethod
    def up_to(cls, largest: float) -> CountBins:
        """Return the levels that reach beyond a largest count."""
        # as wide as the last of MOST levels asks for, where counts are so large
        widening = max(WIDENING, ((ROOM * largest + 2) / EXACT) ** (1 / (MOST - EXACT - 1)))
        edges = list(range(EXACT + 1))
        while edges[-1] <= ROOM * largest + 2:
            edges.append(max(edges[-1] + 1, math.ceil(edges[-1] * widening)))
        return cls(np.array(edges[:-1]), np.array(edges[1:]) - 1)

    @property
    def middle(self) -> np.ndarray:
        """Mean count of each level, ``(L,)`` fp64."""
        return (self.lowest + self.highest) / 2

    def of(self, counts: np.ndarray) -> np.ndarray:
        """Return the level of each count, uint8."""
        return np.searchsorted(self.highest, counts, side="left").astype(np.uint8)
