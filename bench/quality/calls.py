"""Quality by number of model calls: train once, then score every start, sampler and number of calls.

    python -m bench.quality.calls DATA.h5ad --label cell_type [--start noise ...] [--sampler unipc ...] [--calls 4,15]

Prints a Markdown table: the floor first, then one row per start, sampler and number of calls. Counts are drawn at
random, so a single draw does not resolve differences under 3 %; with --draws, a row is the mean over several.
"""

from itertools import product
from statistics import mean

import click

import wbdit
from bench.quality.peers.cells import Choice, DataSet
from bench.quality.study import scores
from wbdit import samplers
from wbdit.counts.denoiser import CountDenoiser
from wbdit.evaluation.scores import format_value

SHOWN = (
    *("mmd_cfgen", "mmd_scdiffusion", "ilisi", "precision", "recall", "rf_auc", "rf_auc_genes"),
    *("kl_hist", "zero_mae", "library_w1", "detected_w1", "lfc_slope", "tstr", "within_var", "mia_auc"),
)
STARTS = ("closed form", "noise")


def row(start: str, sampler: str, calls: object, values: list[dict[str, float]]) -> str:
    """Return a row of the table, with means over the draws."""
    return (
        f"| {start} | {sampler} | {calls} | "
        + " | ".join(format_value(mean(v[m] for v in values)) for m in SHOWN)
        + " |"
    )


@click.command()
@click.argument("data")
@click.option("--label", default="cell_type", show_default=True)
@click.option("--minutes", default=10.0, show_default=True, help="Limit of the training time.")
@click.option("--start", "starts", multiple=True, default=STARTS, type=click.Choice(STARTS))
@click.option("--sampler", "names", multiple=True, default=["unipc"], type=click.Choice(list(samplers.BY_NAME)))
@click.option("--spacing", help="Spacing of the timesteps.  [default: uniform]")
@click.option("--calls", default="1,2,3,4,6,8,15,100", show_default=True)
@click.option("--draws", default=1, show_default=True, help="Number of times to generate and score.")
@click.option("--seed", default=0, show_default=True, help="Seed of the split, the training and the first draw.")
def main(data, label, minutes, starts, names, spacing, calls, draws, seed):
    """Train on DATA and print a table."""
    cells = DataSet.parse(data, [label])
    split = cells.split(Choice(), seed)
    generator = wbdit.fit(split.train, label=cells.labels, minutes=minutes, seed=seed)
    click.echo("| start | sampler | calls | " + " | ".join(f"`{name}`" for name in SHOWN) + " |")
    click.echo("|" + "---|" * (3 + len(SHOWN)))
    floor = True
    for start in starts:
        choose_start(generator, start)
        for name, steps in product(names, map(int, calls.split(","))):
            found = []
            for draw in range(seed, seed + draws):
                made = generator.generate(like=split.test, sampler=name, calls=steps, spacing=spacing, seed=draw)
                found.append(scores(split, made, cells.labels[0], draw))
            if floor:
                click.echo(row("real cells (floor)", "", "", [{m: one[m].floor for m in SHOWN} for one in found]))
                floor = False
            click.echo(row(start, name, steps, [{m: one[m].value for m in SHOWN} for one in found]))


def choose_start(generator: wbdit.CellGenerator, start: str) -> None:
    """Let sampling start in closed form, or from noise."""
    model = generator.model
    if start == "noise" and isinstance(model, CountDenoiser) and model.first_timestep:
        assert model.gaussians is not None
        model.gaussians.timestep.zero_()
    elif start == "closed form" and not model.first_timestep:
        raise click.UsageError("this run has no Gaussians that sampling could start from: use --start noise")


if __name__ == "__main__":
    main()
