"""What does the judge say of real cells? They should not be told from real ones.

    python -m bench.quality.verdicts pbmc3k.h5ad paul15_bone_marrow.h5ad --seeds 5

For each seed, the cells of a file are split at random into three parts: the held-out cells, the training cells, and a
third that takes the place of the synthetic cells. Prints the verdict of each, and what was not at the floor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
from anndata import AnnData

import wbdit
from bench.results import refuse
from wbdit.data.expression import read_h5ad
from wbdit.errors import InputError
from wbdit.evaluation.evaluate import Evaluation

PARTS = 3


def evaluations(
    cells: AnnData, seeds: Sequence[int], label: str, condition: str | None, full: bool
) -> Iterator[Evaluation]:
    """Yield an evaluation of a random third of the cells, for each seed."""
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(cells.n_obs)
        real, train, other = (cells[np.sort(order[i::PARTS])].copy() for i in range(PARTS))
        yield wbdit.evaluate(
            real, other, train=train, label=label, condition=condition, full=full, seeds=[seed], progress=False
        )


@click.command()
@click.argument("data", nargs=-1, required=True)
@click.option("--label", default="cell_type", show_default=True)
@click.option("--condition", default="condition", show_default=True, help="Column of conditions, where a file has it.")
@click.option("--seeds", default=5, show_default=True)
@click.option("--full", is_flag=True, help="All metrics.")
def main(data, label, condition, seeds, full):
    """Print the verdict on real cells of each of DATA."""
    right = total = 0
    for path in map(Path, data):
        try:
            cells = read_h5ad(path)
            column = condition if condition in cells.obs else None
            for seed, result in enumerate(evaluations(cells, range(seeds), label, column, full)):
                off = [
                    f"{name} ({score.grade})" for name, score in result.scores.items() if score.grade != "at the floor"
                ]
                total, right = total + 1, right + (result.verdict.level == "floor")
                click.echo(
                    f"{path.stem}, seed {seed}: {result.verdict.headline}; {', '.join(off) or 'all at the floor'}"
                )
        except InputError as error:
            refuse(f"verdicts: {error}")
    click.echo(f"{right} of {total}: cannot be told from real cells")


if __name__ == "__main__":
    main()
