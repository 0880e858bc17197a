"""The figures of a readout as SVG: heat maps by block and noise level, curves by block, and the genes of heads."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise

import numpy as np

from wbdit.report.svg import Scale, scale_of, svg
from wbdit.whitebox.ablations import Steering
from wbdit.whitebox.closed_form import ClosedFormShares
from wbdit.whitebox.explain import Explanation
from wbdit.whitebox.gene_loadings import type_means

# CRATE-Small's first and last layers, read approximately from the published curves (Yu et al. 2023)
CRATE_RATE = 1100.0, 700.0
CRATE_NON_ZERO = 0.45, 0.20

CELL, LABEL, HEAD = 92, 74, 46  # heat map: width of a column, space for row labels, space for column labels
WIDTH, HEIGHT = 600, 420  # curves
LEFT, RIGHT, TOP, BOTTOM = 70, 90, 16, 58
NAMES = 150  # space for gene names
GENES = 8  # per end of a head's axis
ROW = 22  # line height in a head's panel


def heat_map(values: np.ndarray, timesteps: Sequence[int], what: str, *, form: str, signed: bool) -> str:
    """Return a heat map of values ``(T, L)``: one row per noise level, the highest on top, and one column per block.

    Parameters
    ----------
    values
        The values, which are also printed in the cells.
    timesteps
        Timesteps of the rows.
    what
        Description of the values, for the alternative text.
    form
        Number format, such as ``"+.0%"``.
    signed
        Use one color for negative values and another for positive ones. Otherwise all values have one color.
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
    return svg(body, box, f"{what}, one column per block. {rows}.", "heat")


def curves(
    values: np.ndarray, timesteps: Sequence[int], ticks: Sequence[str], what: str, dashed: tuple[float, float] | None
) -> str:
    """Return a plot of values ``(T, points)``: one line per noise level, and a dashed line for CRATE-Small.

    Parameters
    ----------
    values
        The values along the x axis, for each noise level.
    timesteps
        Timesteps of the lines.
    ticks
        Labels of the x axis, one per point.
    what
        Description of the plot, for the alternative text.
    dashed
        First and last value of the dashed line; None for no line.
    """
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
        # less noise, more opaque
        strength = 0.25 + 0.75 * row / max(len(timesteps) - 1, 1)
        body += f'<polyline class="line" points="{points}" stroke-opacity="{strength:.2f}"/>'
    first, last = up(values[[0, -1], -1])
    last += max(0.0, 24 - abs(last - first)) * (1 if last > first else -1)  # keeps the two labels from overlapping
    for y, t in zip((first, last), (timesteps[0], timesteps[-1]), strict=True):
        body += f'<text class="tick right" x="{WIDTH - RIGHT + 8}" y="{y + 6:.0f}">t = {t}</text>'
    if dashed is not None:
        y0, y1 = up(np.array(dashed))
        body += f'<path class="identity" d="M{LEFT} {y0:.1f}L{WIDTH - RIGHT} {y1:.1f}"/>'
    return svg(body, f"0 0 {WIDTH} {HEIGHT}", what, "panel")


def head_panel(explanation: Explanation, unit: int) -> str:
    """Return a panel of an axis: the top genes of its two ends, and the mean position of each cell type."""
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


def dose_curves(steering: Steering) -> str:
    """Return a plot of the genes that follow a head's axis: change of their mean log expression, one line per gene."""
    doses, zero = np.array(steering.doses), steering.doses.index(0.0)
    change = steering.expression - steering.expression[zero]  # [doses, genes]
    scale = scale_of(change, log=False)
    across = LEFT + (doses - doses[0]) / (doses[-1] - doses[0]) * (WIDTH - LEFT - NAMES)
    classes = ["risen" if values[-1] > values[0] else "fallen" for values in change.T]
    body = _named_lines(scale, across, [_number(dose, "g") for dose in doses], change.T, steering.genes, classes)
    alt = (
        f"Cells moved along {steering.name}: change of the mean log expression of {', '.join(steering.genes)}, by dose."
    )
    return svg(body, f"0 0 {WIDTH} {HEIGHT}", alt, "panel")


def share_curves(shares: ClosedFormShares) -> str:
    """Return a plot of the share of the cells that the network and the Gaussian explain, by noise level."""
    lines = {"network": shares.network[:, -1], "Gaussian": shares.gaussian, "no block": shares.network[:, 0]}
    scale = scale_of(np.concatenate([[0.0], *lines.values()]), log=False)
    across = np.linspace(LEFT, WIDTH - NAMES, len(shares.timesteps))
    ticks, names = [f"{t}" for t in shares.timesteps], list(lines)
    body = _named_lines(scale, across, ticks, np.stack(list(lines.values())), names, ["line", "risen", "identity"])
    rows = "; ".join(
        f"t = {t}: {', '.join(_number(value[i], '.0%') for value in lines.values())}" for i, t in enumerate(ticks)
    )
    alt = f"Share of the cells' squared distance from their label's mean that is explained, by {', '.join(names)}"
    return svg(body, f"0 0 {WIDTH} {HEIGHT}", f"{alt}. {rows}.", "panel")


def _named_lines(
    scale: Scale,
    across: np.ndarray,
    ticks: Sequence[str],
    lines: np.ndarray,
    names: Sequence[str],
    classes: Sequence[str],
) -> str:
    """Return axes, and lines ``(lines, points)`` with a name at the end of each."""

    def up(values: np.ndarray) -> np.ndarray:
        return HEIGHT - BOTTOM - scale.place(values) * (HEIGHT - TOP - BOTTOM)

    body = ""
    for tick in scale.ticks:
        y = float(up(np.array(tick)))
        body += f'<path class="grid" d="M{LEFT} {y:.0f}H{WIDTH - NAMES}"/>'
        body += f'<text class="tick left" x="{LEFT - 8}" y="{y + 7:.0f}">{_number(tick, "g")}</text>'
    for x, tick_name in zip(across, ticks, strict=True):
        body += f'<text class="tick" x="{x:.0f}" y="{HEIGHT - BOTTOM + 28}">{tick_name}</text>'
    places = _apart(up(lines[:, -1]), ROW)
    for name, values, css, y in zip(names, lines, classes, places, strict=True):
        points = " ".join(f"{x:.1f},{at:.1f}" for x, at in zip(across, up(values), strict=True))
        body += f'<polyline class="{css}" points="{points}"/>'
        body += f'<text class="tick right" x="{WIDTH - NAMES + 8}" y="{y + 6:.0f}">{escape(name)}</text>'
    return body


def _apart(places: np.ndarray, least: float) -> np.ndarray:
    """Return places moved down where they are closer to the one above than `least`, and up again at the bottom."""
    order = np.argsort(places, kind="stable")
    moved = places.astype(float).copy()
    for above, own in pairwise(order):
        moved[own] = max(moved[own], moved[above] + least)
    bottom = float(HEIGHT - BOTTOM)
    for own in order[::-1]:
        moved[own] = min(moved[own], bottom)
        bottom = moved[own] - least
    return moved


def all_figures(explanation: Explanation) -> dict[str, str]:
    """Return all figures of a readout by file name without extension."""
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
            objective[1] / objective[0] - 1, t, "Change of the lasso objective by shrinkage", form="+.0%", signed=True
        ),
        "non-zero": heat_map(means["non_zero"], t, "Fraction of nonzero coefficients", form=".0%", signed=False),
        "rate": curves(rate, t, half_steps, "Coding rate before and after each block's attention, in nats.", None),
        "rate-beside-crate": curves(
            after / after[:, :1], t, blocks, "Coding rate after attention / after block 1; dashed: CRATE-Small.",
            (1.0, CRATE_RATE[1] / CRATE_RATE[0]),
        ),
        "non-zero-beside-crate": curves(
            means["non_zero"], t, blocks, "Fraction of nonzero coefficients; dashed: CRATE-Small.", CRATE_NON_ZERO
        ),
    }  # fmt: skip
    for unit in explanation.units.first_axes():
        figures[head_name(explanation, unit)] = head_panel(explanation, unit)
    shares = explanation.closed_form
    if shares is not None:
        figures["closed-form"] = share_curves(shares)
        for name, what, values in (
            ("cells", "Share of the cells that the network explains", shares.network),
            ("update", "Share of the network's update that the Gaussian explains", shares.of_update),
        ):
            figures[f"closed-form-{name}"] = heat_map(values[:, 1:], shares.timesteps, what, form=".0%", signed=False)
    if explanation.ablations is not None:
        figures |= {f"{one.name}-doses": dose_curves(one) for one in explanation.ablations.steerings}
    return figures


def head_name(explanation: Explanation, unit: int) -> str:
    """Return the file name of a head's panel without extension: ``"block-1-head-2"``."""
    return f"block-{explanation.units.block[unit] + 1}-head-{explanation.units.number[unit] + 1}"


def _side(sign: int) -> str:
    """Return the CSS class for text to the left (-1) or right (1) of its point."""
    return "left" if sign < 0 else "right"


def _number(value: float, form: str) -> str:
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def _ticks(high: float) -> list[float]:
    step = 10 ** np.floor(np.log10(high))
    step = next(step * part for part in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if high / (step * part) <= 6)
    return [float(tick) for tick in np.arange(0, high, step)]
