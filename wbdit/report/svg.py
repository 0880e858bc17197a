"""Axis scales with ticks, and the SVG element of a figure."""

from __future__ import annotations

from html import escape
from typing import NamedTuple

import numpy as np


class Scale(NamedTuple):
    """The linear or logarithmic scale of an axis, with its ticks."""

    low: float
    high: float
    log: bool
    ticks: list[float]

    def place(self, values: np.ndarray) -> np.ndarray:
        """Return positions from 0 to 1; values outside the range are clipped."""
        low, high = self.low, self.high
        values = np.clip(values, low, high)
        if self.log:
            values, low, high = np.log10(values), np.log10(low), np.log10(high)
        return (values - low) / (high - low)


def scale_of(values: np.ndarray, *, log: bool) -> Scale:
    """Return a scale for values: logarithmic if ``log`` is set and no value is negative."""
    positive = values[values > 0]
    if log and values.min() >= 0 and len(positive):
        low = 10.0 ** np.floor(np.log10(np.quantile(positive, 0.01)))
        high = max(float(values.max()) * 1.1, low * 10)
        exponents = range(int(np.log10(low)), int(np.floor(np.log10(high))) + 1)
        return Scale(float(low), high, True, [10.0**e for e in exponents])
    low, high = float(values.min()), float(values.max())
    high = high if high > low else low + 1
    step = 10 ** np.floor(np.log10(high - low))
    step = next(step * part for part in (0.1, 0.2, 0.25, 0.5, 1, 2) if (high - low) / (step * part) <= 6)
    ticks = np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step
    return Scale(low, high, False, [float(tick) + 0.0 for tick in ticks])  # + 0.0 turns -0.0 into 0.0


def svg(body: str, box: str, alt: str, css: str) -> str:
    """Return an SVG element with `body`, the view box `box`, the alternative text `alt` and the CSS class `css`."""
    words = escape(alt, quote=True)
    return f'<svg class="{css}" viewBox="{box}" role="img" aria-label="{words}"><title>{words}</title>{body}</svg>'
