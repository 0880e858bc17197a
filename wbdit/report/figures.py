"""The report's figures as inline SVG. The page's CSS sets their colors, so they follow light and dark mode."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from wbdit.evaluation.figure_data import FigureData
from wbdit.report.svg import Scale, scale_of, svg

SIDE = 1000  # side length of a map in SVG units
MARGIN = 30
CHUNKS = 16  # real and synthetic dots alternate in this many paths, so that neither set covers the other
N_COLORS = 12
NUMBER_SIZE = 46  # numbers on a map closer than this are moved apart, in SVG units

WIDTH, HEIGHT = 600, 560  # gene panel
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 14, 64


def dots(points: np.ndarray, css: str) -> str:
    """Return one path with a round dot at each of the points ``(n, 2)``."""
    steps = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in points)
    return f'<path class="dot {css}" d="{steps}"/>' if steps else ""


def fit_map(layout: np.ndarray) -> np.ndarray:
    """Return the points ``(n, 2)`` in SVG units. Each axis fills the square, because UMAP axes have no unit."""
    low, high = layout.min(axis=0), layout.max(axis=0)
    share = (layout - low) / np.maximum(high - low, 1e-9)
    return MARGIN + np.column_stack([share[:, 0], 1 - share[:, 1]]) * (SIDE - 2 * MARGIN)


def overlay_map(points: np.ndarray, is_synthetic: np.ndarray) -> str:
    """Return the map of real and synthetic cells together."""
    order = np.random.default_rng(0).permutation(len(points))
    paths = []
    for chunk in np.array_split(order, CHUNKS):
        paths.append(dots(points[chunk[~is_synthetic[chunk]]], "real"))
        paths.append(dots(points[chunk[is_synthetic[chunk]]], "synthetic"))
    n = int(is_synthetic.sum())
    return _map("".join(paths), f"UMAP of {len(points) - n} real and {n} synthetic cells, drawn together.")


def type_map(points: np.ndarray, labels: np.ndarray, types: Sequence[str], centers: np.ndarray, whose: str) -> str:
    """Return the map of one set's cells colored by type, each type numbered at its center.

    Parameters
    ----------
    points, labels
        Points ``(n, 2)`` and cell types ``(n,)`` of this set.
    types, centers
        All types, and the positions of their numbers, ``(types, 2)``; NaN for no number.
    whose
        ``"real"`` or ``"synthetic"``.
    """
    body = "".join(dots(points[labels == name], color_class(i)) for i, name in enumerate(types))
    for i, (x, y) in enumerate(centers):
        if np.isfinite(x):
            body += f'<text class="number" x="{x:.0f}" y="{y:.0f}">{i + 1}</text>'
    present = [f"{i + 1} {name} ({int(np.sum(labels == name))})" for i, name in enumerate(types)]
    return _map(body, f"UMAP of the {whose} cells by type: {', '.join(present)}.")


def single_type_map(data: FigureData, points: np.ndarray, name: str, background: str) -> str:
    """Return the map of one type's cells over all cells in gray, which the page has under the id ``background``."""
    assert data.labels is not None
    ours = data.labels == name
    real, synthetic = points[ours & ~data.is_synthetic], points[ours & data.is_synthetic]
    body = f'<use href="#{background}"/>' + dots(real, "real large") + dots(synthetic, "synthetic large")
    return _map(body, f"{name}: {len(real)} real and {len(synthetic)} synthetic cells on the map.")


def type_centers(data: FigureData, points: np.ndarray) -> np.ndarray:
    """Return the positions of the types' numbers, ``(types, 2)``; NaN for a type without real cells.

    A number is placed at the median of the type's real cells, then moved away from numbers nearby.
    """
    assert data.labels is not None
    rows = [(data.labels == name) & ~data.is_synthetic for name in data.types()]
    centers = np.array([np.median(points[row], axis=0) if row.any() else (np.nan, np.nan) for row in rows])
    turn = np.arange(len(centers))
    # separate coincident centers, which have no direction to move in
    centers = centers + np.column_stack([np.cos(turn), np.sin(turn)])
    for _ in range(30):
        away = centers[:, None] - centers[None]
        distance = np.linalg.norm(away, axis=-1) + np.eye(len(centers)) * SIDE
        push = np.nan_to_num(np.clip(NUMBER_SIZE - distance, 0, None) / np.maximum(distance, 1))
        centers = centers + (np.nan_to_num(away) * push[..., None]).sum(axis=1) / 2
    return centers


def color_class(i: int) -> str:
    """Return the CSS class of the i-th type; colors repeat after :data:`N_COLORS` types."""
    return f"t{i % N_COLORS}"


def gene_panel(values: dict[str, np.ndarray], what: str, *, log: bool) -> str:
    """Return a scatter plot of one statistic with one dot per gene.

    The x axis shows the real cells, the y axis the synthetic cells and, in gray, other real cells (the floor).

    Parameters
    ----------
    values
        The statistic ``(genes,)`` for ``"real"``, ``"synthetic"`` and ``"floor"``.
    what
        Name of the statistic, for the axes.
    log
        Use logarithmic axes if no value is negative.
    """
    scale = scale_of(np.concatenate(list(values.values())), log=log)

    def at(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        across = LEFT + scale.place(x) * (WIDTH - LEFT - RIGHT)
        return np.column_stack([across, HEIGHT - BOTTOM - scale.place(y) * (HEIGHT - TOP - BOTTOM)])

    ends = np.array([scale.low, scale.high])
    (x0, y0), (x1, y1) = at(ends, ends)
    body = "".join(_tick(scale, tick, at, (x0, x1, y0, y1)) for tick in scale.ticks)
    body += dots(at(values["real"], values["floor"]), "floor") + dots(
        at(values["real"], values["synthetic"]), "synthetic"
    )
    body += f'<path class="identity" d="M{x0:.0f} {y0:.0f}L{x1:.0f} {y1:.0f}"/>'
    body += f'<text class="axis" x="{(x0 + x1) / 2:.0f}" y="{HEIGHT - 10}">{escape(what)}, real</text>'
    turned = f'transform="translate(20 {(y0 + y1) / 2:.0f}) rotate(-90)"'
    body += f'<text class="axis" {turned}>{escape(what)}, synthetic or other real</text>'
    alt = f"Scatter of {what} for {len(values['real'])} genes: synthetic against real, other real cells in gray."
    return svg(body, f"0 0 {WIDTH} {HEIGHT}", alt, "panel")


def _tick(scale: Scale, tick: float, at: object, box: tuple[float, float, float, float]) -> str:
    x0, x1, y0, y1 = box
    (x, y), *_ = at(np.array([tick]), np.array([tick]))  # type: ignore[operator]
    text = f"{tick:g}"
    return (
        f'<path class="grid" d="M{x:.0f} {y0:.0f}V{y1:.0f}M{x0:.0f} {y:.0f}H{x1:.0f}"/>'
        f'<text class="tick" x="{x:.0f}" y="{y0 + 26:.0f}">{text}</text>'
        f'<text class="tick left" x="{x0 - 8:.0f}" y="{y + 7:.0f}">{text}</text>'
    )


def _map(body: str, alt: str) -> str:
    return svg(body, f"0 0 {SIDE} {SIDE}", alt, "map")
