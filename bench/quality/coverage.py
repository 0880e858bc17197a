"""Do the judge's 95 % intervals cover? Real against real, many times.

    python -m bench.quality.coverage pbmc3k.h5ad mouse_pancreas_endocrinogenesis.h5ad --resamples 200

Each resample draws disjoint random sets of ``--cells`` cells and scores one against the other, as the floor of
``wbdit evaluate`` is scored. The truth that an interval must cover is the mean score over all resamples: what two real
sets of this size get on average. Two disjoint samples of a finite set differ as much as two samples of an infinite one:
``Var(mean a - mean b) = 2 s^2 / n`` for both.

Writes one JSON line per resample, goes on where it stopped, and prints a table of the metrics.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from threadpoolctl import threadpool_limits

from bench.results import refuse
from wbdit.data.expression import read_h5ad
from wbdit.errors import InputError
from wbdit.evaluation.align import Aligned, align
from wbdit.evaluation.compare import HALVES, Compared, Plan, common_types, draw, score_cells, score_copies, score_memory
from wbdit.evaluation.estimators import Basis, Estimates
from wbdit.evaluation.intervals import Halves, standard_error
from wbdit.evaluation.registry import METRICS

LEAST = 0.9  # share of resamples in which each interval must cover
ORDER = 99  # random stream
MEAN = (0.93, 0.98)  # range of the mean share over metrics


def resample(aligned: Aligned, plan: Plan, seed: int) -> Estimates:
    """Score random cells against others of the same set, as a floor is scored."""
    cells = aligned.sets["real"]
    order = np.random.default_rng([seed, ORDER]).permutation(len(cells))
    one, two, three = (cells.take(order[i * plan.n : (i + 1) * plan.n]) for i in range(3))
    real, other = (draw(pool, plan.n, np.random.default_rng(seed)) for pool in (one, two))
    types = common_types([real.labels, other.labels])
    compared = Compared(real, Basis.fit(real), types, plan, seed, has_zeros=aligned.space != "scaled")
    halves = Halves.draw(plan.n, plan.resamples, np.random.default_rng([seed, HALVES]))
    found, _ = score_cells(compared, other, halves, lambda stage: None)
    held_out = cells.take(np.concatenate([order[: plan.n], order[2 * plan.n : 3 * plan.n]]))
    aligned = replace(aligned, sets={"real": held_out, "train": two, "synthetic": three})
    return found | score_memory(aligned, plan, seed).floor | score_copies(aligned, seed).floor


def coverage(rows: Sequence[dict[str, list[float]]]) -> dict[str, tuple[float, float, float]]:
    """Return the mean score, the share of intervals that cover it, and their mean width over the scores' spread."""
    found = {}
    for name in METRICS:
        known = np.array([row[name] for row in rows if name in row])  # value, low, high
        if len(known) < 2:
            continue
        truth = known[:, 0].mean()
        covered = np.mean((known[:, 1] <= truth) & (truth <= known[:, 2]))
        spread = known[:, 0].std(ddof=1)
        widths = standard_error((known[:, 1].mean(), known[:, 2].mean()))
        found[name] = float(truth), float(covered), float(widths / spread) if spread > 0 else float("nan")
    return found


def table(name: str, rows: Sequence[dict[str, list[float]]], n: int) -> str:
    """Return a Markdown table of the metrics of a set, worst first."""
    found = coverage(rows)
    shares = [share for _, share, _ in found.values()]
    low = sum(share < LEAST for share in shares)
    lines = [
        f"### {name}",
        "",
        f"{len(rows)} resamples of {n} against {n} cells. Mean coverage over {len(found)} metrics "
        f"{np.mean(shares):.3f} (wanted: {MEAN[0]} to {MEAN[1]}), {low} metrics below {LEAST:g}.",
        "",
        "| metric | mean | coverage | interval / spread |",
        "|---|---|---|---|",
    ]
    order = sorted(found, key=lambda metric: found[metric][1])
    return "\n".join(lines + ["| `{}` | {:.4g} | {:.3f} | {:.2f} |".format(one, *found[one]) for one in order])


@click.command()
@click.argument("data", nargs=-1, required=True)
@click.option("--label", default="cell_type", show_default=True)
@click.option("--resamples", default=200, show_default=True)
@click.option("--cells", default=500, show_default=True, help="Cells of each set.")
@click.option("--genes", default=2000, show_default=True, help="Number of most variable genes.")
@click.option("--full", is_flag=True, help="Forests, boosted trees, a network and modules too.")
@click.option("--out", type=Path, default=Path("bench/out/coverage"), show_default=True)
def main(data, label, resamples, cells, genes, full, out):
    """Print how often the intervals of each metric cover, on each of DATA."""
    plan = Plan(cells, cells, 200, full=full)
    for path in map(Path, data):
        try:
            aligned = align({"real": read_h5ad(path)}, label=label, n_genes=genes)
        except InputError as error:
            refuse(f"coverage: {error}")
        if len(aligned.sets["real"]) < 3 * cells:
            refuse(f"coverage: {path} has {len(aligned.sets['real'])} cells; give --cells of a third of it, or less")
        kept = out / f"{path.stem}-{cells}-{genes}{'-full' if full else ''}.jsonl"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.touch()
        rows = [json.loads(line) for line in kept.read_text().splitlines()][:resamples]
        with threadpool_limits(1), kept.open("a") as file:
            for seed in range(len(rows), resamples):
                found = resample(aligned, plan, seed)
                row = {name: [each.value, *each.interval] for name, each in found.items() if each.interval is not None}
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
        click.echo(table(path.stem, rows, cells) + "\n")


if __name__ == "__main__":
    main()
