"""How many calls of the model cells need: one training, and every metric against sampler and number of calls.

    python -m bench.calls DATA.h5ad --label cell_type [--sampler ddim ...] [--calls 5,8,10,15,20,50,100]

Prints a Markdown table: the floor first, then a row for each sampler and number.
"""

import click

import wbdit
from bench.peers.cells import Choice, DataSet
from bench.study import SHOWN, scores
from wbdit import samplers
from wbdit.scorecard import format_value


@click.command()
@click.argument("data")
@click.option("--label", default="cell_type", show_default=True)
@click.option("--minutes", default=10.0, show_default=True, help="Most to train.")
@click.option("--sampler", "names", multiple=True, default=["ddim"], type=click.Choice(list(samplers.BY_NAME)))
@click.option("--grid", help="The sampler's own by default.")
@click.option("--calls", default="5,8,10,15,20,50,100", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(data, label, minutes, names, grid, calls, seed):
    cells = DataSet.parse(data, [label])
    split = cells.split(Choice(), seed)
    generator = wbdit.fit(split.train, label=cells.labels, minutes=minutes, seed=seed)
    click.echo("| sampler | calls | " + " | ".join(f"`{name}`" for name in SHOWN) + " |")
    click.echo("|" + "---|" * (2 + len(SHOWN)))
    for i, (name, steps) in enumerate((name, int(steps)) for name in names for steps in calls.split(",")):
        made = generator.generate(like=split.test, sampler=name, steps=steps, grid=grid, seed=seed)
        found = scores(split, made, cells.labels[0], seed)
        if i == 0:
            click.echo("| real cells (floor) | | " + " | ".join(format_value(found[m].floor) for m in SHOWN) + " |")
        click.echo(f"| {name} | {steps} | " + " | ".join(format_value(found[m].value) for m in SHOWN) + " |")


if __name__ == "__main__":
    main()
