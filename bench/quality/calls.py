"""Quality by number of model calls: train once, then score every sampler and number of calls.

    python -m bench.quality.calls DATA.h5ad --label cell_type [--sampler unipc ...] [--calls 5,8,10,15] [--draws 3]

Prints a Markdown table: the floor first, then one row per sampler and number of calls. Counts are drawn at random, so a
single draw does not resolve differences under 3 %; with --draws, a row is the mean over several.
"""

from statistics import mean

import click

import wbdit
from bench.quality.peers.cells import Choice, DataSet
from bench.quality.study import SHOWN, scores
from wbdit import samplers
from wbdit.evaluation.scores import format_value


def row(name: str, calls: object, values: list[dict[str, float]]) -> str:
    """Return a row of the table, with means over the draws."""
    return f"| {name} | {calls} | " + " | ".join(format_value(mean(v[m] for v in values)) for m in SHOWN) + " |"


@click.command()
@click.argument("data")
@click.option("--label", default="cell_type", show_default=True)
@click.option("--minutes", default=10.0, show_default=True, help="Limit of the training time.")
@click.option("--sampler", "names", multiple=True, default=["unipc"], type=click.Choice(list(samplers.BY_NAME)))
@click.option("--spacing", help="Spacing of the timesteps.  [default: uniform]")
@click.option("--calls", default="5,8,10,15,20,50,100", show_default=True)
@click.option("--draws", default=1, show_default=True, help="Number of times to generate and score.")
@click.option("--seed", default=0, show_default=True, help="Seed of the split, the training and the first draw.")
def main(data, label, minutes, names, spacing, calls, draws, seed):
    cells = DataSet.parse(data, [label])
    split = cells.split(Choice(), seed)
    generator = wbdit.fit(split.train, label=cells.labels, minutes=minutes, seed=seed)
    click.echo("| sampler | calls | " + " | ".join(f"`{name}`" for name in SHOWN) + " |")
    click.echo("|" + "---|" * (2 + len(SHOWN)))
    for i, (name, steps) in enumerate((name, int(steps)) for name in names for steps in calls.split(",")):
        found = []
        for draw in range(seed, seed + draws):
            made = generator.generate(like=split.test, sampler=name, calls=steps, spacing=spacing, seed=draw)
            found.append(scores(split, made, cells.labels[0], draw))
        if i == 0:
            click.echo(row("real cells (floor)", "", [{m: one[m].floor for m in SHOWN} for one in found]))
        click.echo(row(name, steps, [{m: one[m].value for m in SHOWN} for one in found]))


if __name__ == "__main__":
    main()
