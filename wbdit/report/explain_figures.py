"""The readout's figures as SVG: maps over blocks and noise levels, curves through the blocks, the genes of heads."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from wbdit.report.svg import svg
from wbdit.whitebox.explain import Explanation
from wbdit.whitebox.gene_loadings import type_means

# of CRATE-Small's first and last layers, about, as read off its published curves (Yu et al. 2023)
CRATE_RATE = 1100.0, 700.0
CRATE_NON_ZERO = 0.45, 0.20

CELL, LABEL, HEAD = 92, 74, 46  # of a map: a cell's width, space for row labels, for column labels
WIDTH, HEIGHT = 600, 420  # of a plot of curves
LEFT, RIGHT, TOP, BOTTOM = 70, 90, 16, 58
GENES = 8  # at each end of a head's axis
ROW = 22  # a line of a head's panel


def heat_map(values: np.ndarray, timesteps: Sequence[int], what: str, *, form: str, signed: bool) -> str:
    """Return a map of ``(T, L)`` values: a row a noise level, the noisiest on top, a column a block.

    Parameters
    ----------
    values
        The figures, which are also written into the cells.
    timesteps
        Of the rows.
    what
        What they are, for who cannot see it.
    form
        Format of a figure, such as ``"+.0%"``.
    signed
        Color falls and rises apart, by their size; else all by their value.
    """
    largest = max(float(np.abs(values).max()), 1e-12)
    body = ""
    for column in range(values.shape[1]):
        x = LABEL + (column + 0.5) * CELL
        body += f'<text class="tick" x="{x:.0f}" y="{HEAD - 14}">block {column + 1}</text>'
    for row, t in enumerate(timesteps):
        y = HEAD + row * ROW * 1.6
        body += f'<text class="tick left" x="{LABEL - 10}" y="{y + 24:.0f}">{t}</text>'
        for column, value in enumerate(values[row]):
            css = ("rise" if value > 0 else "fall") if signed else "level"
            strength = 0.12 + 0.6 * abs(value) / largest
            body += (
                f'<rect class="{css}" x="{LABEL + column * CELL}" y="{y:.1f}" width="{CELL - 3}" '
                f'height="{ROW * 1.6 - 3}" fill-opacity="{strength:.2f}"/>'
                f'<text class="value" x="{LABEL + (column + 0.5) * CELL - 2:.0f}" y="{y + 24:.0f}">'
                f"{_number(value, form)}</text>"
            )
    box = f"0 0 {LABEL + values.shape[1] * CELL} {HEAD + len(timesteps) * ROW * 1.6:.0f}"
    rows = "; ".join(
        f"t = {t}: {', '.join(_number(value, form) for value in row)}" for t, row in zip(timesteps, values, strict=True)
    )
    return svg(body, box, f"{what}, a column a block. {rows}.", "heat")


def curves(
    values: np.ndarray, timesteps: Sequence[int], ticks: Sequence[str], what: str, dashed: tuple[float, float] | None
) -> str:
    """Return a line for each noise level ``(T, points)`` through the blocks, and CRATE-Small's ends as a dashed one."""
    ends = [] if dashed is None else list(dashed)
    low, high = 0.0, max(float(values.max()), *ends, 1e-12) * 1.05
    across = np.linspace(LEFT, WIDTH - RIGHT, values.shape[1])

    def up(value: np.ndarray) -> np.ndarray:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    body = ""
    for tick in _ticks(high):
        y = float(up(np.array(tick)))
        body += f'<path class="grid" d="M{LEFT} {y:.0f}H{WIDTH - RIGHT}"/>'
        body += f'<text class="tick left" x="{LEFT - 8}" y="{y + 7:.0f}">{tick:g}</text>'
    for x, name in zip(across, ticks, strict=True):
        body += f'<text class="tick" x="{x:.0f}" y="{HEIGHT - BOTTOM + 28}">{escape(name)}</text>'
    for row in range(len(timesteps)):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, up(values[row]), strict=True))
        # the less noise, the stronger the line
        strength = 0.25 + 0.75 * row / max(len(timesteps) - 1, 1)
        body += f'<polyline class="line" points="{points}" stroke-opacity="{strength:.2f}"/>'
    first, last = up(values[[0, -1], -1])
    last += max(0.0, 24 - abs(last - first)) * (1 if last > first else -1)  # so that names do not overlap
    for y, t in zip((first, last), (timesteps[0], timesteps[-1]), strict=True):
        body += f'<text class="tick right" x="{WIDTH - RIGHT + 8}" y="{y + 6:.0f}">t = {t}</text>'
    if dashed is not None:
        y0, y1 = up(np.array(dashed))
        body += f'<path class="identity" d="M{LEFT} {y0:.1f}L{WIDTH - RIGHT} {y1:.1f}"/>'
    return svg(body, f"0 0 {WIDTH} {HEIGHT}", what, "panel")


def head_panel(explanation: Explanation, unit: int) -> str:
    """Return a head's widest axis: the genes at its two ends, and where the cells of each type lie between them."""
    units, labels = explanation.units, explanation.labels
    body = ""
    down, up = (explanation.top_genes(unit, sign, GENES) for sign in (-1, 1))
    largest = max(float(np.abs(units.loading[unit]).max()), 1e-12)
    for sign, genes in ((-1, down), (1, up)):
        for row, (gene, place) in enumerate(zip(genes, units.top(unit, sign, GENES), strict=True)):
            y, width = 10 + row * ROW, 170 * abs(float(units.loading[unit, place])) / largest
            css, start, x = ("down", 300 - width, 292 - width) if sign < 0 else ("up", 300, 308 + width)
            body += f'<rect class="{css}" x="{start:.0f}" y="{y}" width="{width:.0f}" height="15" fill-opacity=".55"/>'
            body += f'<text class="tick {_side(sign)}" x="{x:.0f}" y="{y + 14}">{escape(gene)}</text>'
    height = 10 + GENES * ROW + 10
    if labels is not None:
        means = type_means(units, unit, labels)
        reach = max(max(abs(value) for value in means.values()), 1e-12)
        ordered = sorted(means, key=lambda name: means[name])
        body += f'<path class="grid" d="M300 {height}V{height + len(ordered) * ROW}"/>'
        for row, name in enumerate(ordered):
            y, x = height + row * ROW + 10, 300 + 240 * means[name] / reach
            inward = -1 if means[name] > 0 else 1
            body += f'<circle class="mean" cx="{x:.0f}" cy="{y}" r="6"/>'
            body += f'<text class="tick {_side(inward)}" x="{x + 14 * inward:.0f}" y="{y + 6}">{escape(name)}</text>'
        height += len(ordered) * ROW + 6
    alt = f"{units.name(unit)}: down {', '.join(down)}; up {', '.join(up)}."
    return svg(body, f"0 0 600 {height}", alt, "panel head")


def all_figures(explanation: Explanation) -> dict[str, str]:
    """Return every figure of a readout by its file's name, without ending."""
    means, t = explanation.means, explanation.timesteps
    rate = np.stack([means["rate_before"], means["rate_after"]], -1).reshape(len(t), -1)
    half_steps = [part for i in range(len(explanation.weights)) for part in (f"{i + 1}", "")]
    objective = explanation.objective
    blocks = [f"block {i + 1}" for i in range(len(explanation.weights))]
    after = means["rate_after"]
    figures = {
        "rate-change": heat_map(
            after / means["rate_before"] - 1, t, "Change of the coding rate by attention", form="+.0%", signed=True
        ),
        "objective-change": heat_map(
            objective[1] / objective[0] - 1, t, "Change of the lasso's objective by shrinkage", form="+.0%", signed=True
        ),
        "non-zero": heat_map(means["non_zero"], t, "Share of non-zeros in the code", form=".0%", signed=False),
        "rate": curves(rate, t, half_steps, "Coding rate before and after each block's attention, in nats.", None),
        "rate-beside-crate": curves(
            after / after[:, :1], t, blocks, "Coding rate after attention over the first block's; dashed: CRATE-Small.",
            (1.0, CRATE_RATE[1] / CRATE_RATE[0]),
        ),
        "non-zero-beside-crate": curves(
            means["non_zero"], t, blocks, "Share of non-zeros in the code; dashed: CRATE-Small.", CRATE_NON_ZERO
        ),
    }  # fmt: skip
    for unit in explanation.units.first_axes():
        figures[head_name(explanation, unit)] = head_panel(explanation, unit)
    return figures


def head_name(explanation: Explanation, unit: int) -> str:
    """Return the name of a head's panel: ``"block-1-head-2"``."""
    return f"block-{explanation.units.block[unit] + 1}-head-{explanation.units.number[unit] + 1}"


def _side(sign: int) -> str:
    """Return the class of a text that lies to the left or right of its point."""
    return "left" if sign < 0 else "right"


def _number(value: float, form: str) -> str:
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def _ticks(high: float) -> list[float]:
    step = 10 ** np.floor(np.log10(high))
    step = next(step * part for part in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if high / (step * part) <= 6)
    return [float(tick) for tick in np.arange(0, high, step)]
