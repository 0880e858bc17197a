"""Draw the remaining differences between real cells and the synthetic cells that ``make peers`` kept.

    python -m bench.quality.residual DATA.h5ad --seeds 3 --out docs/study/residual.svg

Three panels show, per label, the strength of fold changes, the number of detected genes per cell, and the spread of the
label's cells. The fourth shows the nearness of cells to training cells. All four compare with held-out cells; training
cells show the differences expected by chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from anndata import AnnData
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.spatial import cKDTree

from bench.quality.peers.__main__ import PEERS
from bench.quality.peers.cells import Choice, DataSet
from bench.quality.peers.runs import Plan, Run
from bench.results import refuse
from wbdit._io import replacing
from wbdit.data.expression import read_h5ad
from wbdit.errors import InputError
from wbdit.evaluation.align import Aligned, CellSet, align
from wbdit.evaluation.compare import common_types, split_halves
from wbdit.evaluation.distances import fold_change_slope, log_fold_changes
from wbdit.evaluation.estimators import Basis
from wbdit.evaluation.figure_data import AlignedCells
from wbdit.report.summary_png import INK, LINE, OTHER, REAL, SOFT, SYNTHETIC, write_title

SHOWN = {"wbdit": PEERS["wbdit"].title, "scvi-posterior": "scVI, posterior predictive"}
HELD_OUT, TRAINING = "held-out cells", "training cells"
COLORS = dict(zip((*SHOWN.values(), TRAINING, HELD_OUT), (SYNTHETIC, REAL, OTHER, INK), strict=True))
WIDEST = 5  # components
PERCENTILES = np.array([0.5, 1, 2, 5, 10, 20, 50])

Array = np.ndarray[Any, Any]


def fold_changes(sets: Aligned, name: str, types: Sequence[str]) -> Array:
    """Return the slope of each label's fold changes on the held-out cells', ``(types,)``; 1 if equally strong."""
    real, got = (_changes(sets.sets[one], types) for one in ("real", name))
    return np.array([fold_change_slope(real[i], got[i]) for i in range(len(types))])


def detected(sets: Aligned, name: str, types: Sequence[str]) -> Array:
    """Return the mean number of detected genes per cell of each label, relative to held-out cells, ``(types,)``."""
    real, got = ([_detected(sets.sets[one], label) for label in types] for one in ("real", name))
    return np.array(got) / np.array(real)


def spread(sets: Aligned, name: str, types: Sequence[str]) -> Array:
    """Return the spread of each label's cells, relative to held-out cells, ``(types,)``.

    The spread is the standard deviation along the first principal components of the held-out cells, see
    :func:`_held_out`.
    """
    found = []
    for measured, basis in _held_out(sets, 0):
        places = [basis.project(cells.values.toarray())[:, :WIDEST] for cells in (measured, sets.sets[name])]
        labels = measured.labels, sets.sets[name].labels
        real, got = ([place[of == t].var(0).sum() for t in types] for place, of in zip(places, labels, strict=True))
        found.append(np.sqrt(np.array(got) / np.array(real)))
    return np.mean(found, axis=0)


def nearness(sets: Aligned, names: Sequence[str], seed: int) -> dict[str, Array]:
    """Return the share of cells that are close to a training cell, for each of ``PERCENTILES``.

    A cell is close if its distance is at most that percentile of the distances between training cells and their nearest
    other training cell. The metric ``copies`` does the same (:func:`wbdit.evaluation.compare.score_memory`), but here
    all held-out cells are used, see :func:`_held_out`.
    """
    found = []
    for measured, basis in _held_out(sets, seed):
        train = basis.project(sets.sets[TRAINING].values.toarray())
        tree = cKDTree(train)
        limits = np.percentile(tree.query(train, k=2)[0][:, 1], PERCENTILES)  # the first is the cell itself
        shares = {}
        for name, cells in {HELD_OUT: measured, **{name: sets.sets[name] for name in names}}.items():
            distances, _ = tree.query(basis.project(cells.values.toarray()))
            shares[name] = (distances[:, None] <= limits).mean(axis=0)
        found.append(shares)
    return {name: np.mean([one[name] for one in found], axis=0) for name in found[0]}


def _held_out(sets: Aligned, seed: int) -> Iterator[tuple[CellSet, Basis]]:
    """Yield each half of the held-out cells with the principal components of the other half.

    Components fit their own cells best, so projections of these cells would differ from those of all others.
    """
    halves = split_halves(sets.sets["real"], np.random.default_rng(seed))
    for measured, fitted in (halves, halves[::-1]):
        yield measured, Basis.fit(AlignedCells(fitted.values.toarray(), None))


def _changes(cells: CellSet, types: Sequence[str]) -> Array:
    assert cells.labels is not None
    return log_fold_changes(cells.values.toarray(), cells.labels, types)


def _detected(cells: CellSet, label: str) -> float:
    assert cells.totals is not None
    return float(cells.totals[cells.labels == label, 1].mean())


PANELS = {
    fold_changes: ("Strength of fold changes", "slope on held-out cells"),
    detected: ("Detected genes per cell", "relative to held-out cells"),
    spread: ("Spread within a label", f"along {WIDEST} components, relative to held-out cells"),
}


def draw(
    axes: Sequence[Any], per_label: Sequence[dict[str, Array]], near: dict[str, Array], types: Sequence[str]
) -> None:
    """Draw the four panels.

    Parameters
    ----------
    axes
        Four matplotlib axes.
    per_label
        Fold changes, detected genes and spread; each maps a set's name to an array ``(seeds, types)``.
    near
        Shares of close cells, ``(seeds, percentiles)``, by the set's name.
    types
        Labels by decreasing number of cells.
    """
    *panels, last = axes
    for panel, gaps, (title, subtitle) in zip(panels, per_label, PANELS.values(), strict=True):
        write_title(panel, title, subtitle)
        panel.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (5, 4)))
        for i, (name, values) in enumerate(gaps.items()):
            rows = np.arange(len(types)) + 0.2 * (i - (len(gaps) - 1) / 2)
            panel.hlines(rows, values.min(0), values.max(0), color=COLORS[name], linewidth=1.4, alpha=0.5)
            panel.scatter(values.mean(0), rows, s=26, color=COLORS[name], label=name, zorder=3)
        panel.set_yticks(range(len(types)), types, fontsize=9, color=INK)
        panel.set_ylim(len(types) - 0.5, -0.5)
    for panel in panels[1:]:
        panel.set_yticklabels([])
    write_title(last, "Nearness to training cells", "dashed: training cells to each other")
    last.plot(PERCENTILES, PERCENTILES, color=INK, linewidth=0.9, linestyle=(0, (5, 4)))
    for name, shares in near.items():
        last.plot(PERCENTILES, 100 * shares.mean(0), "o-", color=COLORS[name], markersize=4, label=name)
    last.set(xscale="log", yscale="log")
    for axis in (last.xaxis, last.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    last.set_xlabel("percentile of real-to-real distances", fontsize=9, color=SOFT)
    last.set_ylabel("% of cells at least as close", fontsize=9, color=SOFT)
    last.tick_params(axis="y", labelsize=8.5, colors=SOFT, length=3)
    for panel in axes:
        panel.tick_params(axis="x", labelsize=8.5, colors=SOFT, length=3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(LINE)


def measure(data: DataSet, names: Sequence[str], seeds: int, plan: Plan) -> tuple[list[dict], dict, list[str]]:
    """Return the arguments of :func:`draw`: per-label values, nearness, and types."""
    runs = []
    for seed in range(seeds):
        split = data.split(plan.choice, seed)
        kept = {SHOWN[name]: _kept(Run(data, PEERS[name], seed, plan)) for name in names}
        sets = {"real": split.test, TRAINING: split.train, **kept}
        runs.append(align(sets, label=data.labels[0], n_genes=plan.choice.genes))
    labels = [cells.labels for run in runs for cells in run.sets.values()]
    sizes = runs[0].sets["real"].labels
    types = sorted(common_types(labels), key=lambda name: -int(np.sum(sizes == name)))
    shown = [TRAINING, *(SHOWN[name] for name in names)]
    per_label = [{name: np.stack([gap(run, name, types) for run in runs]) for name in shown} for gap in PANELS]
    near = [nearness(run, shown[1:], seed) for seed, run in enumerate(runs)]
    return per_label, {name: np.stack([one[name] for one in near]) for name in near[0]}, types


def _kept(run: Run) -> AnnData:
    if not run.cells.exists():
        raise InputError(f"no {run.cells}: run make peers with the same data, peers, minutes and seeds first")
    return read_h5ad(run.cells)


@click.command()
@click.argument("data")
@click.option("--label", default="cell_type", show_default=True, help="Label column if DATA names none.")
@click.option("--peer", "names", multiple=True, default=list(SHOWN), type=click.Choice(list(SHOWN)), show_default=True)
@click.option("--minutes", default=5.0, show_default=True, help="Same as for make peers.")
@click.option("--seeds", default=3, show_default=True, help="Same as for make peers.")
@click.option("--kept", type=Path, default=Path("bench/out/peers"), show_default=True, help="Results of make peers.")
@click.option("--out", type=Path, required=True, help="Picture to write, SVG or PNG.")
def main(data, label, names, minutes, seeds, kept, out):
    """Draw the remaining differences between held-out cells of DATA and the synthetic cells that make peers kept."""
    try:
        if out.suffix not in (".svg", ".png"):
            raise InputError(f"--out {out}: unknown format; give a name that ends in .svg or .png")
        found = measure(DataSet.parse(data, [label]), names, seeds, Plan(Choice(), minutes, kept))
    except InputError as error:
        refuse(f"residual: {error}")
    per_label, near, types = found
    figure = Figure(figsize=(15, 1.6 + 0.36 * len(types)), facecolor="white", layout="constrained")
    axes = figure.subplots(1, len(PANELS) + 1)
    draw(axes, per_label, near, types)
    handles, shown = axes[0].get_legend_handles_labels()
    line = axes[-1].get_lines()[1]
    figure.legend([*handles, line], [*shown, HELD_OUT], loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    # text stays text in the SVG, and equal numbers give an identical file
    with replacing(out) as temporary, rc_context({"svg.fonttype": "none", "svg.hashsalt": "residual"}):
        figure.savefig(temporary, format=out.suffix.lstrip("."), metadata={"Date": None})
    for (title, _), gaps in zip(PANELS.values(), per_label, strict=True):
        for name, values in gaps.items():
            click.echo(
                f"{title}, {name}: " + ", ".join(f"{t} {v:.3f}" for t, v in zip(types, values.mean(0), strict=True))
            )
    for name, shares in near.items():
        click.echo(
            f"{name}: " + ", ".join(f"{p:g} %: {100 * s:.2f}" for p, s in zip(PERCENTILES, shares.mean(0), strict=True))
        )


if __name__ == "__main__":
    main()
