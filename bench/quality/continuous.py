"""Cells in an interval of a continuous covariate that training never saw: pseudotime in the mouse pancreas.

    OMP_NUM_THREADS=1 python -m bench.quality.continuous mouse_pancreas_endocrinogenesis.h5ad [--seed 0] [--epochs 10]

Pseudotime is obs["pseudotime"] if the file has it, else scanpy's diffusion pseudotime on all cells. Its root is the
cell of the label --root that is outermost on the first diffusion component. The cells whose rank lies in an interval
are left out. A model of the other cells, by default without labels, generates one cell per left-out cell, at its
pseudotime. The result is the energy distance to the left-out cells, 2 E|X - Y| - E|X - X'| - E|Y - Y'| over pairs of
different cells, on 50 principal components of ln(1 + counts per 10,000) of all real cells. The estimate is unbiased,
so it can be slightly negative.

Rows for comparison: the training cells of the label that is nearest by this distance, which is what one has without the
covariate; the training cells next to the interval, half of them on each side; and the floor, one half of the left-out
cells against the other.
"""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import click
import numpy as np
from scipy.spatial.distance import cdist

import wbdit
from wbdit.data.expression import to_dense
from wbdit.data.normalize import log_normalized
from wbdit.evaluation.distances import pca_axes

COMPONENTS, SPLITS = 50, 20


def pseudotime(cells: ad.AnnData, root: str) -> np.ndarray:
    """Return the diffusion pseudotime ``(cells,)``, rooted in the label `root`."""
    import scanpy as sc

    graph = cells.copy()
    sc.pp.normalize_total(graph)
    sc.pp.log1p(graph)
    sc.pp.pca(graph, n_comps=30)
    sc.pp.neighbors(graph, n_neighbors=30)
    sc.tl.diffmap(graph)
    first = graph.obsm["X_diffmap"][:, 1]
    roots = np.flatnonzero(cells.obs["cell_type"] == root)
    outward = np.sign(first[roots].mean() - first.mean())
    graph.uns["iroot"] = roots[np.argmax(outward * first[roots])]
    sc.tl.dpt(graph)
    return graph.obs["dpt_pseudotime"].to_numpy(float)


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased energy distance of cells ``(n, k)`` and ``(m, k)``."""

    def within(cells: np.ndarray) -> float:
        return cdist(cells, cells).sum() / (len(cells) * (len(cells) - 1))

    return float(2 * cdist(x, y).mean() - within(x) - within(y))


class Interval:
    """The left-out cells, the training cells and the distances between them."""

    def __init__(self, cells: ad.AnnData, low: float, high: float) -> None:
        time = cells.obs["pseudotime"].to_numpy()
        self.edges = np.quantile(time, [low, high])
        inside = (time >= self.edges[0]) & (time <= self.edges[1])
        self.heldout, self.train = cells[inside].copy(), cells[~inside].copy()
        self.mean, self.axes = pca_axes(to_dense(log_normalized(cells.X, "counts")), COMPONENTS)
        self.real, self.known = self.project(self.heldout), self.project(self.train)

    def project(self, cells: ad.AnnData) -> np.ndarray:
        """Return cells on the principal components, ``(cells, k)``."""
        return (to_dense(log_normalized(cells.X, "counts"), np.float64) - self.mean) @ self.axes

    def nearest_label(self) -> tuple[str, float]:
        """Return the label whose training cells are nearest to the left-out cells, and their distance."""
        labels = self.train.obs["cell_type"].to_numpy()
        of_label = {name: energy_distance(self.known[labels == name], self.real) for name in np.unique(labels)}
        return min(of_label.items(), key=lambda item: item[1])

    def neighbors(self) -> float:
        """Return the distance of the training cells next to the interval, half of them on each side."""
        time, n = self.train.obs["pseudotime"].to_numpy(), len(self.real) // 2
        order = np.argsort(time)
        first = np.searchsorted(time[order], self.edges[0])
        return energy_distance(self.known[order[max(first - n, 0) : first + n]], self.real)

    def floor(self) -> float:
        """Return the mean distance between random halves of the left-out cells."""
        rng, halves = np.random.default_rng(0), []
        for _ in range(SPLITS):
            one, other = np.array_split(rng.permutation(len(self.real)), 2)
            halves.append(energy_distance(self.real[one], self.real[other]))
        return float(np.mean(halves))


@click.command()
@click.argument("data")
@click.option("--root", default="Ductal", show_default=True, help="Label of the first cells.")
@click.option("--low", default=0.4375, show_default=True, help="Rank of the interval's lower edge.")
@click.option("--high", default=0.5625, show_default=True, help="Rank of the interval's upper edge.")
@click.option("--label", help="Label column to train with as well.  [default: none]")
@click.option("--epochs", default=10.0, show_default=True, help="Passes over the training cells.")
@click.option("--seed", "seeds", multiple=True, type=int, default=[0, 1, 2], show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for the trained runs.")
def main(data, root, low, high, label, epochs, seeds, keep):
    cells = ad.read_h5ad(data)
    if "pseudotime" not in cells.obs:
        cells.obs["pseudotime"] = pseudotime(cells, root)
    interval = Interval(cells, low, high)
    nearest, apart = interval.nearest_label()
    edges = " to ".join(f"{edge:.3f}" for edge in interval.edges)
    click.echo(f"{len(interval.real)} cells left out, pseudotime {edges}; nearest label {nearest}")
    rows = {"label": apart, "neighbors": interval.neighbors(), "floor": interval.floor()}
    for name, value in rows.items():
        click.echo(json.dumps({"row": name, "distance": round(value, 3), "ratio": round(value / apart, 4)}))
    at = {"pseudotime": interval.heldout.obs["pseudotime"].to_numpy()}
    for seed in seeds:
        out = keep / f"run-{seed}" if keep else None
        options = {"label": label, "epochs": epochs, "seed": seed, "out": out, "progress": False}
        generator = wbdit.fit(interval.train, continuous="pseudotime", **options)
        made = generator.generate(len(interval.real), at=at, seed=seed)
        value = energy_distance(interval.project(made), interval.real)
        facts = {"steps": generator.config.trained.steps, "seconds": generator.config.trained.seconds}
        click.echo(
            json.dumps({"row": f"seed {seed}", "distance": round(value, 3), "ratio": round(value / apart, 4), **facts})
        )


if __name__ == "__main__":
    main()
