"""Summary figure of an evaluation as PNG, for a README or a slide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wbdit._io import replacing
from wbdit.errors import need_extra
from wbdit.evaluation.evaluate import Evaluation
from wbdit.evaluation.scores import Score, format_pair
from wbdit.report.svg import scale_of

REAL, SYNTHETIC, OTHER, INK, SOFT, LINE = "#1c62b0", "#d9650a", "#a3a7ad", "#1d1e22", "#5b5f69", "#dfdcd4"
GRADE_COLORS = {"at the floor": "#0e7a6d", "close": "#9a6200", "apart": "#b02a50"}
GRADE_SHADES = ("#e6f4f2", "#faf0dd", "#f9e7ec")
# the figure has space for about a dozen metrics
SHOWN = (
    *("w1", "mmd_cfgen", "ilisi", "precision", "coverage", "c2st_logistic", "scc", "var_r2", "zero_mae"),
    *("lfc_slope", "tstr", "mia_auc"),
)
TYPE_COLORS = (
    *("#332288", "#cc6677", "#117733", "#d9a800", "#44aadd", "#882255"),
    *("#44aa99", "#999933", "#aa4499", "#661100", "#6699cc", "#777777"),
)


def write_picture(evaluation: Evaluation, path: str | Path) -> Path:
    """Write the summary figure as PNG: the UMAPs, the scores and the gene statistics on a white background.

    Parameters
    ----------
    evaluation
        From :func:`wbdit.evaluation.evaluate.evaluate`.
    path
        File to write. Its folder is created if it does not exist.

    Returns
    -------
    The path.

    Raises
    ------
    InputError
        If the file cannot be written, or matplotlib or umap-learn is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise need_extra("matplotlib") from None
    path = Path(path)
    figure = Figure(figsize=(13, 8.4), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    _draw_maps(evaluation, figure.add_axes((0.03, 0.535, 0.29, 0.395)), figure.add_axes((0.345, 0.535, 0.29, 0.395)))
    chosen = [score for name, score in evaluation.scores.items() if name in SHOWN]
    _draw_scores(chosen, figure.add_axes((0.785, 0.555, 0.2, 0.375)))
    _draw_genes(evaluation, [figure.add_axes((0.055 + 0.327 * i, 0.07, 0.275, 0.3)) for i in range(3)])
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _draw_maps(evaluation: Evaluation, left: Any, right: Any) -> None:
    data = evaluation.figures
    points, types = data.layout, data.types()
    sets = ((left, "Real cells", ~data.is_synthetic, REAL), (right, "Synthetic cells", data.is_synthetic, SYNTHETIC))
    for axes, title, rows, color in sets:
        write_title(axes, title, f"joint UMAP, {int(rows.sum())} cells")
        axes.scatter(*points[~rows].T, s=5, c=LINE, linewidths=0)
        for i, name in enumerate(types):
            chosen = points[rows & (np.asarray(data.labels) == name)]
            axes.scatter(*chosen.T, s=9, c=TYPE_COLORS[i % len(TYPE_COLORS)], linewidths=0, alpha=0.85, label=name)
        if not types:
            axes.scatter(*points[rows].T, s=9, c=color, linewidths=0, alpha=0.85)
        axes.set(xlim=_padded(points[:, 0]), ylim=_padded(points[:, 1]), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    if types:
        handles, names = left.get_legend_handles_labels()
        lines, size = (4, 8.5) if len(names) <= 20 else (5, 7)
        left.legend(
            handles, names, loc="upper left", bbox_to_anchor=(-0.02, 0.0), ncols=math.ceil(len(names) / lines),
            frameon=False, fontsize=size, markerscale=2, handletextpad=0.2, columnspacing=1.1, labelcolor=INK,
            borderaxespad=0.3,
        )  # fmt: skip


def _draw_scores(scores: list[Score], axes: Any) -> None:
    """Draw one line per metric: the distance from its floor, in units of its tolerance."""
    write_title(
        axes, "Distance from real cells", "colored bands: our grades; 0: score of real cells (floor)", shift=-0.85
    )
    draw_distances(axes, scores, [GRADE_COLORS[score.grade] for score in scores], size=44)
    for row, score in enumerate(scores):
        for column, text, shade in zip((3.9, 4.85), format_pair(score), (INK, SOFT), strict=True):
            axes.text(column, row, text.split(" ")[0], ha="right", va="center", fontsize=9, color=shade)
    for column, name in ((3.9, "value"), (4.85, "floor")):
        axes.text(column, len(scores) - 0.12, name, ha="right", va="center", fontsize=8.5, color=SOFT)
    axes.set(xlim=(-0.12, 4.9), ylim=(len(scores) - 0.4, -0.6), xticks=(0.5, 1.5, 2.5))
    axes.set_xticklabels(("at floor", "close", "apart"), fontsize=8.5, color=SOFT)
    axes.set_yticks(range(len(scores)), [score.metric.title for score in scores], fontsize=9, color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_distances(axes: Any, scores: Sequence[Score], colors: Sequence[str], *, size: float) -> None:
    """Draw one line per score, as long as its distance from the floor in tolerances, over the bands of the grades."""
    for x, shade in enumerate(GRADE_SHADES):
        axes.axvspan(x, x + 1, color=shade, linewidth=0)
    for row, (score, color) in enumerate(zip(scores, colors, strict=True)):
        place = float(np.clip(score.excess, 0.0, 2.9))
        axes.plot([0, place], [row, row], color=color, linewidth=1.6, solid_capstyle="round", alpha=0.6)
        axes.scatter([place], [row], s=size, color=color, zorder=3, marker=">" if score.excess > 2.9 else "o")


def _draw_genes(evaluation: Evaluation, axes: list[Any]) -> None:
    data = evaluation.figures
    panels = (("mean", data.means, True), ("variance", data.variances, True), ("fraction of zeros", data.zeros, False))
    for i, (each, (name, values, log)) in enumerate(zip(axes, panels, strict=True)):
        if name == "fraction of zeros" and evaluation.space == "scaled":
            each.set_visible(False)
            continue
        scale = scale_of(np.concatenate(list(values.values())), log=log)
        real = np.clip(values["real"], scale.low, scale.high)
        for kind, color, size in (("floor", OTHER, 5), ("synthetic", SYNTHETIC, 6)):
            shown = np.clip(values[kind], scale.low, scale.high)
            words = {"floor": "real against real", "synthetic": "synthetic against real"}[kind]
            each.scatter(real, shown, s=size, c=color, linewidths=0, alpha=0.6, label=words, rasterized=True)
        each.plot([scale.low, scale.high], [scale.low, scale.high], color=INK, linewidth=0.9, linestyle=(0, (5, 4)))
        if scale.log:
            each.set(xscale="log", yscale="log")
        write_title(each, f"Gene {name}" if i < 2 else "Fraction of zeros", "one dot per gene")
        each.set_xlabel("real", fontsize=9, color=SOFT)
        each.set_ylabel("synthetic or other real", fontsize=9, color=SOFT)
        each.tick_params(labelsize=8.5, colors=SOFT, length=3)
        each.minorticks_off()
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(LINE)
        if i == 0:
            each.legend(
                frameon=False, fontsize=8.5, markerscale=2.5, handletextpad=0.2, labelcolor=INK, loc="upper left"
            )


def write_title(axes: Any, title: str, subtitle: str, shift: float = 0.0) -> None:
    """Write a title and a subtitle above the axes, moved ``shift`` axes widths to the right."""
    for text, above, size, weight, color in ((title, 19, 12.5, "bold", INK), (subtitle, 6, 9, "normal", SOFT)):
        axes.annotate(
            text, (shift, 1), xycoords="axes fraction", xytext=(0, above), textcoords="offset points",
            fontsize=size, fontweight=weight, color=color,
        )  # fmt: skip


def _padded(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    pad = 0.04 * max(high - low, 1e-9)
    return low - pad, high + pad
