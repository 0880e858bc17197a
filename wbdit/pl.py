"""Plots of real and synthetic cells, and of a training, on matplotlib axes.

Each function draws on the given axes or on a new figure, and returns the axes. Save a figure with
``ax.figure.savefig("map.pdf", bbox_inches="tight")``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd

from wbdit.data.expression import check_labels
from wbdit.errors import InputError, need_extra
from wbdit.evaluation import distances
from wbdit.evaluation.align import Aligned, CellSet, align
from wbdit.evaluation.evaluate import Evaluation
from wbdit.evaluation.figure_data import MAP_COMPONENTS, umap_layout
from wbdit.generator import CellGenerator
from wbdit.report.summary_png import GRADE_COLORS, INK, LINE, REAL, SOFT, SYNTHETIC, TYPE_COLORS, draw_distances

__all__ = ["genes", "history", "scores", "umap"]

SETS = (("real", "Real cells", REAL), ("synthetic", "Synthetic cells", SYNTHETIC))
MAP_GENES = 2000  # most variable genes, as in an evaluation
VALUES, MEANS = "viridis", "Reds"  # color maps of a map, and of dots as in scanpy
FEW = 10  # fewer cells are drawn one by one, not as a violin
DOT = 210.0  # area in points^2 of the dot of a gene that all cells express


def umap(
    real: ad.AnnData,
    synthetic: ad.AnnData,
    color: str | None = None,
    *,
    n_cells: int = 2000,
    seed: int = 0,
    ax: Any = None,
) -> Any:
    """Draw real and synthetic cells on one UMAP.

    The map is that of the evaluation report: UMAP (McInnes et al. 2018) of 30 joint principal components of
    log-normalized values.

    Parameters
    ----------
    real, synthetic
        Cells with gene names in common.
    color
        None to color real and synthetic cells on one panel. A column of ``obs``, such as the cell type, or a gene, to
        draw them side by side with a color scale for both.
    n_cells
        Largest number of cells to draw from each set.
    seed
        Seed of the choice of cells.
    ax
        Matplotlib axes to draw on: one, or two for `color`. New ones by default.

    Returns
    -------
    The axes; with `color` an array of two, for real and for synthetic cells.

    Raises
    ------
    InputError
        If the cells cannot be compared, `color` is neither a column nor a gene of both sets, the number of axes is
        wrong, or matplotlib or umap-learn is not installed.

    Examples
    --------
    >>> axes = wbdit.pl.umap(cells[:100], wbdit.example(100), color="bulk_labels")
    >>> [each.get_title(loc="left") for each in axes]
    ['Real cells', 'Synthetic cells']
    """
    plt = _pyplot()
    axes = _axes(ax, 1 if color is None else 2, lambda n: plt.subplots(1, n, figsize=(4.2 * n + 1.2, 4.2))[1])
    sets = _sample({"real": real, "synthetic": synthetic}, n_cells, seed)
    shades = None if color is None else _shades(sets, color)
    aligned = align(sets, label=None, n_genes=MAP_GENES)
    one, other = (aligned.sets[name].values.toarray() for name, *_ in SETS)
    points = umap_layout(np.vstack(distances.joint_pca(one, other, MAP_COMPONENTS)))
    is_synthetic = np.repeat([False, True], [len(one), len(other)])
    if shades is None:
        _draw_overlay(axes[0], points, is_synthetic)
    elif isinstance(shades, pd.Categorical):
        _draw_types(axes, points, is_synthetic, shades)
    else:
        _draw_values(axes, points, is_synthetic, shades, str(color))
    for each in axes:
        each.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
        each.xaxis.label.set(color=SOFT, fontsize=9)
        each.yaxis.label.set(color=SOFT, fontsize=9)
        each.spines[:].set_visible(False)
    return axes[0] if color is None else axes


def genes(
    real: ad.AnnData,
    synthetic: ad.AnnData,
    genes: str | Sequence[str],
    *,
    label: str | None = None,
    kind: Literal["dots", "violins"] = "dots",
    ax: Any = None,
) -> Any:
    """Compare the expression of chosen genes in real and synthetic cells, by label.

    Values are ln(1 + counts per 10,000), normalized over the genes that both sets share.

    Parameters
    ----------
    real, synthetic
        Cells with gene names in common.
    genes
        One gene or several.
    label
        Column of ``obs`` with the labels. By default, the first label column that the synthetic cells were generated
        with; all cells are one group if there is none.
    kind
        "dots" draws two panels with a dot per gene and label: its color is the mean, its size the share of cells that
        express the gene. "violins" draws one panel per gene with the distributions per label, real ones on the left
        half and synthetic ones on the right half; a line marks the mean. Fewer than 10 cells are drawn as dots.
    ax
        Matplotlib axes to draw on: two for "dots", one per gene for "violins". New ones by default.

    Returns
    -------
    An array of the axes.

    Raises
    ------
    InputError
        If the cells cannot be compared, a gene or the label column is missing, `kind` is unknown or "dots" for scaled
        values, the number of axes is wrong, or matplotlib is not installed.

    Examples
    --------
    >>> axes = wbdit.pl.genes(cells, wbdit.example(50), ["CD79A", "NKG7"], label="bulk_labels")
    >>> [text.get_text() for text in axes[0].get_xticklabels()]
    ['CD79A', 'NKG7']
    """
    plt = _pyplot()
    names = [genes] if isinstance(genes, str) else list(genes)
    if not names:
        raise InputError("give at least one gene in `genes`")
    if kind not in ("dots", "violins"):
        raise InputError(f"no `kind` {kind!r}: choose dots or violins")
    sets = {"real": real, "synthetic": synthetic}
    aligned = align(sets, label=_label(synthetic) if label is None else label, n_genes=sys.maxsize)
    if aligned.space == "scaled" and kind == "dots":
        raise InputError(
            'scaled values do not show which cells express a gene: choose `kind="violins"`, or give counts'
        )
    values = _of_genes(aligned, sets, names)
    labels = {name: _labels_or_one(cells) for name, cells in aligned.sets.items()}
    groups = _order(labels["real"], labels["synthetic"])
    if kind == "violins":
        size = (1.6 + 0.75 * len(groups), 1.9 * len(names) + 0.6)
        axes = _axes(ax, len(names), lambda n: plt.subplots(n, 1, figsize=size, sharex=True, squeeze=False)[1])
        _draw_violins(axes, values, labels, groups, names)
    else:
        size = (2 * (0.42 * len(names) + 0.6) + 3.6, 0.34 * len(groups) + 1.9)
        axes = _axes(ax, 2, lambda n: plt.subplots(1, n, figsize=size, sharey=True, gridspec_kw={"wspace": 0.08})[1])
        _draw_dots(axes, values, labels, groups, names)
    return axes


def history(generator: CellGenerator, *, ax: Any = None) -> Any:
    """Draw the training log of a generator: the loss and the learning rate per optimizer step.

    Parameters
    ----------
    generator
        From :func:`wbdit.fit` or :func:`wbdit.load`. Its log needs at least two records, which are made every few
        seconds.
    ax
        Two matplotlib axes to draw on. New ones by default.

    Returns
    -------
    An array of two axes: loss, with that of held-out cells if it was recorded, and learning rate.

    Raises
    ------
    InputError
        If the log is empty, the number of axes is wrong, or matplotlib is not installed.

    Examples
    --------
    >>> axes = wbdit.pl.history(generator)
    >>> axes[1].get_ylabel()
    'learning rate'
    """
    plt = _pyplot()
    records = generator.history
    if not records:
        raise InputError("the generator has no training log: its run has no metrics.jsonl")
    axes = _axes(ax, 2, lambda n: plt.subplots(n, 1, figsize=(5.2, 4.6), sharex=True, height_ratios=(2, 1))[1])
    drawn = (
        (axes[0], "loss", "training", REAL),
        (axes[0], "validation_loss", "held-out cells", SYNTHETIC),
        (axes[1], "learning_rate", "", INK),
    )
    for each, key, name, color in drawn:
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            marker = "o" if len(points) < 3 else None
            each.plot(*zip(*points, strict=True), color=color, linewidth=1.4, label=name, marker=marker, markersize=3)
    axes[0].set_ylabel("loss")
    axes[0].legend(frameon=False, fontsize=8.5, labelcolor=INK)
    axes[1].set(ylabel="learning rate", xlabel="optimizer step", ylim=(0, None))
    for each in axes:
        _plain(each)
    return axes


def scores(evaluation: Evaluation, *, ax: Any = None) -> Any:
    """Draw how far each score of an evaluation is from its floor, in units of the metric's tolerance.

    0 is the floor, the score of other real cells. Up to 1 a score is at the floor, up to 2 close to it. Gray scores are
    blind: with so few cells they see no set that is worse on purpose.

    Parameters
    ----------
    evaluation
        From :func:`wbdit.evaluate`.
    ax
        Matplotlib axes to draw on. New ones by default.

    Returns
    -------
    The axes.

    Raises
    ------
    InputError
        If matplotlib is not installed.

    Examples
    --------
    >>> quick = dict(n_cells=30, n_genes=50, seeds=(0,), bootstrap=4, progress=False)
    >>> axes = wbdit.pl.scores(wbdit.evaluate(cells[:60], generator.generate(30), **quick))
    >>> axes.get_xlabel()
    'distance from real cells, in tolerances'
    """
    shown = list(evaluation.scores.values())
    plt = _pyplot()
    axes = _axes(ax, 1, lambda n: plt.subplots(figsize=(5.6, 1 + 0.22 * len(shown)))[1])[0]
    draw_distances(axes, shown, [SOFT if score.is_unknown else GRADE_COLORS[score.grade] for score in shown], size=25)
    axes.set(xlim=(-0.1, 3), ylim=(len(shown) - 0.4, -0.6), xlabel="distance from real cells, in tolerances")
    axes.set_yticks(range(len(shown)), [score.metric.title for score in shown], fontsize=8, color=INK)
    _plain(axes)
    return axes


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise need_extra("matplotlib") from None
    return plt


def _axes(given: Any, n: int, new: Any) -> np.ndarray:
    """Return `n` axes as an array: the given ones, or new ones."""
    axes = np.atleast_1d(np.asarray(new(n) if given is None else given, dtype=object)).ravel()
    if len(axes) != n:
        raise InputError(f"this plot needs {n} axes in `ax`, not {len(axes)}")
    return axes


def _sample(sets: dict[str, ad.AnnData], n: int, seed: int) -> dict[str, ad.AnnData]:
    """Return at most `n` cells of each set, chosen at random."""
    if n < 2:
        raise InputError(f"`n_cells` must be at least 2, not {n}")
    rng = np.random.default_rng(seed)
    return {
        name: cells[np.sort(rng.choice(cells.n_obs, n, replace=False))] if cells.n_obs > n else cells
        for name, cells in sets.items()
    }


def _shades(sets: dict[str, ad.AnnData], color: str) -> pd.Categorical | np.ndarray:
    """Return what colors the real and then the synthetic cells: labels, numbers of a column, or a gene's values."""
    if not any(color in cells.obs.columns for cells in sets.values()):
        values = _of_genes(align(sets, label=None, n_genes=sys.maxsize), sets, [color])
        return np.concatenate([values[name][:, 0] for name, *_ in SETS])
    for name, cells in sets.items():
        if color not in cells.obs.columns:
            raise InputError(f"no column {color!r} in obs of the {name} cells")
        check_labels(cells, color)
    both = pd.concat([cells.obs[color] for cells in sets.values()], ignore_index=True)
    if pd.api.types.is_numeric_dtype(both) and not pd.api.types.is_bool_dtype(both):
        return both.to_numpy(float)
    named, n = both.astype(str).to_numpy(), sets["real"].n_obs
    return pd.Categorical(named, categories=_order(named[:n], named[n:]))


def _order(real: np.ndarray, synthetic: np.ndarray) -> list[str]:
    """Return all labels, the most frequent among real cells first, as in the report."""
    names = sorted({str(name) for name in (*real, *synthetic)})
    return sorted(names, key=lambda name: -int(np.sum(real == name)))


def _of_genes(aligned: Aligned, sets: dict[str, ad.AnnData], names: list[str]) -> dict[str, np.ndarray]:
    """Return the values ``(cells, genes)`` of chosen genes for each set."""
    places = {str(gene): i for i, gene in enumerate(aligned.genes)}
    for gene in names:
        if gene not in places:
            lacking = [name for name, cells in sets.items() if gene not in cells.var_names]
            raise InputError(
                f"no gene {gene!r} in the {' and '.join(lacking)} cells; a generator keeps only the most variable genes"
            )
    chosen = [places[gene] for gene in names]
    return {name: cells.values[:, chosen].toarray() for name, cells in aligned.sets.items()}


def _label(synthetic: ad.AnnData) -> str | None:
    """Return the first label column that the cells were generated with, if any."""
    columns = np.atleast_1d(synthetic.uns.get("wbdit", {}).get("label", []))
    return str(columns[0]) if len(columns) else None


def _labels_or_one(cells: CellSet) -> np.ndarray:
    return np.repeat("all cells", len(cells)) if cells.labels is None else cells.labels


def _draw_overlay(axes: Any, points: np.ndarray, is_synthetic: np.ndarray) -> None:
    """Draw both sets in random order, so that neither covers the other."""
    order = np.random.default_rng(0).permutation(len(points))
    colors = np.where(is_synthetic[order], SYNTHETIC, REAL)
    axes.scatter(*points[order].T, s=_dot_size(len(points)), c=colors, linewidths=0, alpha=0.7, rasterized=True)
    for (_, title, color), n in zip(SETS, (int((~is_synthetic).sum()), int(is_synthetic.sum())), strict=True):
        axes.scatter([], [], s=24, c=color, linewidths=0, label=f"{title.lower()} ({n:,})")
    _legend(axes, 2)


def _draw_types(axes: np.ndarray, points: np.ndarray, is_synthetic: np.ndarray, types: pd.Categorical) -> None:
    """Draw each set by type in its panel, over the other set in gray."""
    names = list(types.categories)
    for each, (_, title, _), rows in zip(axes, SETS, (~is_synthetic, is_synthetic), strict=True):
        each.scatter(*points[~rows].T, s=_dot_size(len(points)), c=LINE, linewidths=0, rasterized=True)
        for i in range(len(names)):
            chosen = points[rows & (types.codes == i)]
            color = TYPE_COLORS[i % len(TYPE_COLORS)]
            each.scatter(*chosen.T, s=_dot_size(len(points)), c=color, linewidths=0, alpha=0.85, rasterized=True)
        _title(each, title, int(rows.sum()))
    for i, name in enumerate(names):
        axes[-1].scatter([], [], s=24, c=TYPE_COLORS[i % len(TYPE_COLORS)], linewidths=0, label=name)
    _legend(axes[-1], math.ceil(len(names) / 20), beside=True)


def _draw_values(axes: np.ndarray, points: np.ndarray, is_synthetic: np.ndarray, values: np.ndarray, what: str) -> None:
    """Draw each set by a number in its panel, with one color scale."""
    drawn = None
    limits = {"vmin": float(values.min()), "vmax": float(values.max())}
    for each, (_, title, _), rows in zip(axes, SETS, (~is_synthetic, is_synthetic), strict=True):
        order = np.flatnonzero(rows)[np.argsort(values[rows], kind="stable")]  # the highest on top
        drawn = each.scatter(
            *points[order].T, s=_dot_size(len(points)), c=values[order], cmap=VALUES, linewidths=0, rasterized=True,
            **limits,
        )  # fmt: skip
        _title(each, title, int(rows.sum()))
    for each in axes:
        each.set(xlim=_span(points[:, 0]), ylim=_span(points[:, 1]))
    bar = axes[-1].inset_axes((1.04, 0.25, 0.03, 0.5))
    axes[-1].figure.colorbar(drawn, cax=bar, label=what)
    _plain_bar(bar)


def _draw_dots(
    axes: np.ndarray, values: dict[str, np.ndarray], labels: dict[str, np.ndarray], groups: list[str], names: list[str]
) -> None:
    """Draw a dot per gene and label: its color is the mean, its size the share of expressing cells."""
    across, down = np.meshgrid(np.arange(len(names)), np.arange(len(groups)))
    stats = {name: [_of_groups(values[name], labels[name], groups, fn) for fn in (_mean, _share)] for name, *_ in SETS}
    top = max(float(np.nanmax(mean)) for mean, _ in stats.values())
    drawn = None
    for each, (name, title, _) in zip(axes, SETS, strict=True):
        mean, share = stats[name]
        drawn = each.scatter(
            across, down, s=DOT * np.nan_to_num(share), c=mean, cmap=MEANS, vmin=0, vmax=top or 1, edgecolors=SOFT,
            linewidths=0.5,
        )  # fmt: skip
        _title(each, title, len(labels[name]))
        each.set(xlim=(-0.6, len(names) - 0.4), ylim=(len(groups) - 0.4, -0.6))
        each.set_xticks(range(len(names)), names, rotation=90, style="italic", fontsize=9, color=INK)
        each.set_yticks(range(len(groups)), groups, fontsize=9, color=INK)
        each.tick_params(length=0)
        each.spines[:].set_color(LINE)
    bar = axes[-1].inset_axes((1.08, 0.0, 0.06, 0.42))
    axes[-1].figure.colorbar(drawn, cax=bar, label="mean, ln(1 + per 10,000)")
    _plain_bar(bar)
    for part in (0.25, 0.5, 1.0):
        axes[-1].scatter([], [], s=DOT * part, c="white", edgecolors=SOFT, linewidths=0.5, label=f"{part:.0%}")
    axes[-1].legend(
        title="expressing", loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8.5, labelcolor=INK,
        title_fontsize=8.5, labelspacing=0.9,
    )  # fmt: skip


def _draw_violins(
    axes: np.ndarray, values: dict[str, np.ndarray], labels: dict[str, np.ndarray], groups: list[str], names: list[str]
) -> None:
    """Draw half a violin per set, label and gene."""
    for row, (each, gene) in enumerate(zip(axes, names, strict=True)):
        for (name, title, color), side, shift in zip(SETS, ("low", "high"), (-0.02, 0.02), strict=True):
            for place, group in enumerate(groups):
                own = values[name][labels[name] == group, row]
                if len(own):
                    _draw_half(each, own, place + shift, side, color)
                    ends = [place - 0.16, place + shift] if side == "low" else [place + shift, place + 0.16]
                    each.plot(ends, [own.mean()] * 2, color=INK, linewidth=1.2, solid_capstyle="butt")
            each.scatter([], [], s=30, marker="s", c=color, alpha=0.8, linewidths=0, label=title.lower())
        each.set_ylabel(gene, style="italic")
        each.set_ylim(bottom=0 if min(part[:, row].min() for part in values.values()) >= 0 else None)
        _plain(each)
        each.tick_params(axis="x", length=0)
        each.set_xticks(range(len(groups)), groups, rotation=90 if len(groups) > 1 else 0, fontsize=9, color=INK)
    _legend(axes[0], 2)


def _draw_half(axes: Any, values: np.ndarray, place: float, side: str, color: str) -> None:
    """Draw half a violin, or the cells themselves if they are too few for a density."""
    if len(values) < FEW:
        away = np.linspace(0.05, 0.2, len(values)) * (-1 if side == "low" else 1)
        axes.scatter(place + away, values, s=8, c=color, linewidths=0, alpha=0.8)
        return
    (body,) = axes.violinplot(values, [place], widths=0.85, side=side, showextrema=False)["bodies"]
    body.set(facecolor=color, edgecolor="none", alpha=0.8)


def _of_groups(values: np.ndarray, labels: np.ndarray, groups: Iterable[str], statistic: Any) -> np.ndarray:
    """Return a statistic of each group and gene, ``(groups, genes)``; NaN for a group without cells."""
    nothing = np.full(values.shape[1], np.nan)
    return np.array([statistic(values[labels == name]) if (labels == name).any() else nothing for name in groups])


def _mean(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=0)


def _share(values: np.ndarray) -> np.ndarray:
    return (values > 0).mean(axis=0)


def _dot_size(n: int) -> float:
    return float(np.clip(16000 / n, 3.0, 24.0))


def _span(values: np.ndarray) -> tuple[float, float]:
    pad = 0.04 * float(np.ptp(values))
    return float(values.min()) - pad, float(values.max()) + pad


def _title(axes: Any, title: str, n: int) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_title(f"{n:,} cells", loc="right", fontsize=9, color=SOFT)


def _legend(axes: Any, columns: int, *, beside: bool = False) -> None:
    place = (
        {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        if beside
        else {"loc": "lower left", "bbox_to_anchor": (0, 1)}
    )
    axes.legend(
        **place, ncols=columns, frameon=False, fontsize=9, labelcolor=INK, handletextpad=0.2, columnspacing=1.2,
        borderaxespad=0.2,
    )  # fmt: skip


def _plain(axes: Any) -> None:
    axes.tick_params(labelsize=8.5, colors=SOFT, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.xaxis.label.set(color=SOFT, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)


def _plain_bar(bar: Any) -> None:
    bar.tick_params(labelsize=8.5, colors=SOFT, length=2)
    bar.yaxis.label.set(color=SOFT, fontsize=8.5)
    for spine in bar.spines.values():
        spine.set_visible(False)
