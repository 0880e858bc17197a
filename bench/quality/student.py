"""How good can a generator be that learns from as many cells? One that learns from cells of its own kind.

    python -m bench.quality.student DATA.h5ad RUN --label cell_type

A trained run takes the part of the truth. Cells are drawn from it as training and as test cells, as many as DATA has; a
student with the default settings, as the run should have, learns from them. The truth is within what it can express:
what sets it apart from the test cells is the number of training cells, and how well training makes use of them. Prints
the scores of the student's cells, of the training cells (the floor) and of fresh cells of the truth.
"""

from __future__ import annotations

import anndata as ad
import click

import wbdit
from bench.quality.peers.cells import Choice, DataSet
from wbdit.evaluation.evaluate import evaluate
from wbdit.evaluation.scores import format_value

SHOWN = (
    *("mmd_cfgen", "mmd_scdiffusion", "ilisi", "precision", "recall", "rf_auc", "rf_auc_genes"),
    *("c2st_logistic", "c2st_trees", "c2st_net", "kl_hist", "detected_w1", "lfc_slope"),
)
TRUE_CALLS = 15  # of the denoiser, for cells of the truth


def draw(run: wbdit.CellGenerator, like: ad.AnnData, seed: int) -> ad.AnnData:
    """Return cells of the truth with the labels of the given ones."""
    cells = run.generate(like=like, seed=seed, calls=TRUE_CALLS)
    cells.obs = cells.obs.astype(str)
    return cells


@click.command()
@click.argument("data")
@click.argument("run")
@click.option("--label", default="cell_type", show_default=True)
@click.option("--minutes", default=15.0, show_default=True, help="Limit of the student's training time.")
@click.option("--seed", default=0, show_default=True, help="Seed of the split, as the run had it.")
def main(data, run, label, minutes, seed):
    """Score a student of RUN, with as many cells as DATA and its labels."""
    split = DataSet.parse(data, [label]).split(Choice(), seed)
    truth = wbdit.load(run)
    train, real, fresh = (draw(truth, like, seed + 1 + i) for i, like in enumerate((split.train, *[split.test] * 2)))
    student = wbdit.fit(train, label=label, minutes=minutes, seed=seed, progress=False)
    click.echo("| cells | " + " | ".join(f"`{name}`" for name in SHOWN) + " |")
    click.echo("|" + "---|" * (1 + len(SHOWN)))
    settings = {"train": train, "label": label, "full": True, "bootstrap": 0, "progress": False, "seeds": (seed,)}
    for name, cells in (("student", student.generate(like=real, seed=seed)), ("of the truth", fresh)):
        scores = evaluate(real, cells, **settings).scores
        if name == "student":
            click.echo("| floor | " + " | ".join(format_value(scores[metric].floor) for metric in SHOWN) + " |")
        click.echo(f"| {name} | " + " | ".join(format_value(scores[metric].value) for metric in SHOWN) + " |")


if __name__ == "__main__":
    main()
