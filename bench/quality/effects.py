"""Do the effects that `wbdit emit` puts into control cells come out again, and nothing else?

    python -m bench.quality.effects pbmc3k.h5ad mouse_pancreas_endocrinogenesis.h5ad paul15_bone_marrow.h5ad

For each seed, a file is split into two halves. Cells are emitted from one half and compared with the other, which they
have not seen. Without effects, a Wilcoxon test within all cells should call no more genes than between the two halves.
With effects on random genes, measured log fold changes of mean counts should lie on those that were planted.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

import wbdit
from bench.results import refuse
from wbdit.data.expression import read_h5ad
from wbdit.data.matrix import find_expression
from wbdit.data.normalize import transformed
from wbdit.errors import InputError
from wbdit.evaluation.differential import FALSE_DISCOVERIES, wilcoxon

PLANTED, SPREAD = 500, 1.0  # genes, and standard deviation of natural log fold changes
LEAST_MEAN = 0.1  # counts per cell of the genes that a slope is taken over
TESTED = 3000  # genes with the largest means


def halves(path: Path, label: str, seed: int) -> tuple[AnnData, AnnData]:
    """Return two random halves with raw counts in X."""
    cells = read_h5ad(path)
    found = find_expression(cells)
    counts = AnnData(sp.csr_matrix(found.X, dtype=np.float32), obs=cells.obs[[label]], var=found.var[[]])
    order = np.random.default_rng(seed).permutation(counts.n_obs)
    return counts[np.sort(order[::2])].copy(), counts[np.sort(order[1::2])].copy()


def called(one: AnnData, other: AnnData) -> tuple[float, float]:
    """Return the share of genes called between two sets at an FDR of 5 %, and that of p-values below 0.05."""
    means = np.asarray(one.X.mean(axis=0)).ravel()
    genes = np.argsort(-means)[:TESTED]
    values = np.vstack([transformed(cells.X[:, genes].toarray(), "lognorm") for cells in (one, other)])
    tests = wilcoxon(values, (np.arange(len(values)) < one.n_obs)[None])
    return float((tests.adjusted < FALSE_DISCOVERIES).mean()), float((tests.p < 0.05).mean())


def slope(made: AnnData, control: AnnData, effects: pd.Series) -> tuple[float, int]:
    """Return the least squares slope of measured on planted log fold changes, and the number of genes."""
    got, before = (np.asarray(cells.X.mean(axis=0)).ravel() for cells in (made, control))
    places = control.var_names.get_indexer(effects.index)
    kept = (before[places] > LEAST_MEAN) & (got[places] > 0)
    measured = np.log(got[places][kept] / before[places][kept])
    return float(np.polyfit(effects.to_numpy()[kept], measured, 1)[0]), int(kept.sum())


@click.command()
@click.argument("data", nargs=-1, required=True)
@click.option("--label", default="cell_type", show_default=True)
@click.option("--seeds", default=3, show_default=True)
def main(data, label, seeds):
    """Print null calls and slopes for each of DATA."""
    click.echo(
        "| data | called: real halves | no effect | drawn again | p < .05: real, none, again | slope, own | other |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    for path in map(Path, data):
        rows = []
        try:
            for seed in range(seeds):
                control, other = halves(path, label, seed)
                rng = np.random.default_rng(seed)
                nothing = pd.Series(0.0, index=control.var_names[:1])
                same = wbdit.emit(control, nothing, label=label, seed=seed)
                again = wbdit.emit(control, nothing, label=label, n=2 * control.n_obs, seed=seed)[
                    control.n_obs :
                ].copy()
                tests = [called(cells, other) for cells in (control, same, again)]
                seen = np.flatnonzero(np.asarray(control.X.mean(axis=0)).ravel() > 0)
                chosen = control.var_names[rng.choice(seen, PLANTED, replace=False)]
                effects = pd.Series(rng.normal(0, SPREAD, PLANTED), index=chosen)
                made = wbdit.emit(control, effects, label=label, seed=seed)
                found = [slope(made, cells, effects) for cells in (control, other)]
                rows.append([t[0] for t in tests] + [t[1] for t in tests] + [f[0] for f in found])
        except InputError as error:
            refuse(f"effects: {error}")
        m = np.mean(rows, axis=0)
        cells = [
            path.stem,
            *(f"{x:.4f}" for x in m[:3]),
            " ".join(f"{x:.3f}" for x in m[3:6]),
            f"{m[6]:.3f}",
            f"{m[7]:.3f}",
        ]
        click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
