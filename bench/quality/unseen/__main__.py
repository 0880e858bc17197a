"""Leave combinations of labels out, one at a time, and judge what stands in for them.

    python -m bench.quality.unseen kang_ifnb_pbmc.h5ad --epochs 15 --seeds 0,1,2

Scores are kept in the folder, so an interrupted run goes on where it stopped. See docs/unseen.md.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import anndata as ad
import click
import numpy as np

from bench.quality.unseen import methods
from bench.quality.unseen.cells import Change, leave_out, read
from bench.quality.unseen.judge import MEASURES, Judge
from bench.results import refuse
from wbdit._io import write_atomically
from wbdit.errors import InputError

LEFT_OUT = ("NK", "CD14 Mono", "CD16 Mono", "B,activated B")
METHODS = ("baselines", "tables", "wbdit", "seen", "scvi")
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """What is the same for all runs: cells, the change, the labels that are left out in turn, and the folder."""

    cells: ad.AnnData
    change: Change
    left_out: Sequence[Sequence[str]]
    epochs: float
    real: int
    out: Path

    def scores(self, left: Sequence[str], seed: int, method: str) -> Scores:
        """Return the scores of all that a method makes for the left-out labels, computed only once."""
        place = self.out / f"{left[0]}-{seed}".replace(" ", "_")
        name = f"{method}-{self.real}" if self.real and method == "wbdit" else method
        kept = place / f"{name}.json"
        if not kept.exists():
            seen = sorted({label for labels in self.left_out for label in labels}) if method == "seen" else []
            case = leave_out(self.cells, self.change, left, seed, self.real if method == "wbdit" else 0, seen)
            judge = Judge(case, seed)
            run = self.out / f"seen-{seed}" if seen else place / name
            made = self._made(method)(case, self.change, seed, run)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, json.dumps({name: judge(cells) for name, cells in made.items()}, indent=1))
        scores: Scores = json.loads(kept.read_text())
        return scores

    def _made(self, method: str) -> methods.Method:
        if method in ("wbdit", "seen"):
            return methods.Diffusion(self.epochs, "wbdit" if method == "wbdit" else "wbdit, seen")
        return {"baselines": methods.baselines, "tables": methods.tables, "scvi": methods.autoencoder}[method]


@click.command()
@click.argument("data", type=Path)
@click.option("--columns", default="cell_type,condition", show_default=True, help="Label and condition.")
@click.option("--change", default="ctrl,stim", show_default=True, help="The condition before and after.")
@click.option("--left-out", multiple=True, default=LEFT_OUT, show_default=True, help="Labels; the first is judged.")
@click.option("--drop", multiple=True, default=["unassigned"], show_default=True, help="Labels to drop.")
@click.option("--method", "names", multiple=True, type=click.Choice(METHODS), help="By default all.")
@click.option("--epochs", default=15.0, show_default=True, help="Training of wbdit, in passes over the cells.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--real", default=0, show_default=True, help="Real cells of the combination that wbdit gets after all.")
@click.option("--out", type=Path, default=Path("bench/out/unseen"), show_default=True)
def main(data, columns, change, left_out, drop, names, epochs, seeds, real, out):
    """Score every method on DATA, and print a table."""
    found: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    try:
        what = Change(*columns.split(","), *change.split(","))
        left = [tuple(labels.split(",")) for labels in left_out]
        plan = Plan(read(data, what, drop), what, left, epochs, real, out / data.stem)
        for seed, labels, method in product(map(int, seeds.split(",")), left, names or METHODS):
            click.echo(f"seed {seed}, without {labels[0]}/{what.after}: {method}", err=True)
            for name, scores in plan.scores(labels, seed, method).items():
                found[name][labels[0]].append(scores)
    except (InputError, TypeError, ValueError) as error:
        refuse(f"unseen: {error}")
    click.echo("\n".join(table(found)))


def table(found: dict[str, dict[str, list[dict[str, float]]]]) -> Iterator[str]:
    """Yield the lines of a Markdown table: means over seeds, by method and left-out label."""
    yield f"| method | left out | {' | '.join(MEASURES)} |"
    yield f"|---|---|{'---|' * len(MEASURES)}"
    for name, by_label in found.items():
        means = {label: [np.mean([s[m] for s in scores]) for m in MEASURES] for label, scores in by_label.items()}
        for label, values in (means | {"**mean**": list(np.mean(list(means.values()), axis=0))}).items():
            yield f"| {name} | {label} | {' | '.join(f'{x:.3f}' for x in values)} |"


if __name__ == "__main__":
    sys.exit(main())
