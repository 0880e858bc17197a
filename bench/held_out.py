"""Train on a share of labelled cells, generate the labels of the rest, and compare with it.

    python bench/held_out.py DATA.h5ad --label cell_type --minutes 5 --out DIR

One table of every metric beside its floor, for any data set: how the figures beside other methods in the README are
made. The folder gets train.h5ad, test.h5ad, run/, synthetic.h5ad, metrics.json and report.html.
"""

from pathlib import Path

import click

import wbdit
from wbdit.cells import check_cells, read_h5ad, split_cells
from wbdit.evaluation import evaluate
from wbdit.files import write_h5ad
from wbdit.report import write_report


@click.command()
@click.argument("data", type=Path)
@click.option("--label", required=True)
@click.option("--out", type=Path, required=True)
@click.option("--share", default=2 / 3, show_default=True, help="Of each label to train on.")
@click.option("--minutes", default=5.0, show_default=True)
@click.option("--preset", default="small", show_default=True)
@click.option("--cells", default=800, show_default=True, help="Most cells to compare.")
@click.option("--seed", default=0, show_default=True)
def main(data, label, out, share, minutes, preset, cells, seed):
    adata = read_h5ad(data)
    check_cells(adata, label)
    train, test = split_cells(adata, label, share, seed)
    generator = wbdit.fit(
        train, label=label, preset=preset, minutes=minutes, seed=seed, out=out / "run", say=click.echo
    )
    synthetic = generator.generate(like=test, seed=seed, progress=True)
    for name, part in (("train", train), ("test", test), ("synthetic", synthetic)):
        write_h5ad(part, out / f"{name}.h5ad")
    result = evaluate(test, synthetic, train=train, label=label, n_cells=cells)
    facts = {"Preset": preset, "Training": f"{minutes:g} minutes", "Seed": str(seed)}
    write_report(result, out, title=f"{data.stem}, {train.n_obs} cells trained on, {test.n_obs} held out", facts=facts)
    click.echo(result.table())


if __name__ == "__main__":
    main()
