"""How many calls of the model cells need: every metric of one trained run against the number of calls.

    python -m bench.calls RUN TRAIN.h5ad TEST.h5ad --label cell_type [--sampler ddim ...] [--calls 5,8,10,15,20,50,100]

Prints a Markdown table: a row for each sampler and number, the floor first.
"""

from pathlib import Path

import click

import wbdit
from bench.study import SHOWN
from wbdit import samplers
from wbdit.cells import read_h5ad
from wbdit.evaluation import evaluate
from wbdit.scorecard import format_value


@click.command()
@click.argument("run", type=Path)
@click.argument("train", type=Path)
@click.argument("test", type=Path)
@click.option("--label", required=True)
@click.option("--sampler", "names", multiple=True, default=["ddim"], type=click.Choice(list(samplers.BY_NAME)))
@click.option("--grid", default=None, help="The sampler's own by default.")
@click.option("--calls", default="5,8,10,15,20,50,100", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(run, train, test, label, names, grid, calls, seed):
    generator, train, test = wbdit.load(run), read_h5ad(train), read_h5ad(test)
    train, test = (cells[:, list(generator.recipe.genes)].copy() for cells in (train, test))
    click.echo("| sampler | calls | " + " | ".join(f"`{name}`" for name in SHOWN) + " |")
    click.echo("|" + "---|" * (2 + len(SHOWN)))
    floor = None
    for name in names:
        for steps in map(int, calls.split(",")):
            cells = generator.generate(like=test, sampler=name, steps=steps, grid=grid, seed=seed)
            scores = evaluate(
                test, cells, train=train, label=label, n_cells=800, seeds=(seed,), bootstrap=0, progress=False
            ).scores
            if floor is None:
                floor = [scores[metric].floor for metric in SHOWN]
                click.echo("| real cells (floor) | | " + " | ".join(map(format_value, floor)) + " |")
            values = [format_value(scores[metric].value) for metric in SHOWN]
            click.echo(f"| {name} | {steps} | " + " | ".join(values) + " |")


if __name__ == "__main__":
    main()
