"""Train the run that ``wbdit.example`` generates from, and measure its cells: ``make example-run``.

The run is small (width 64) and learns from 70 % of the package's blood cells. ``wbdit evaluate`` compares its cells
with the other 30 %. The model card ``wbdit/example_run/README.md`` then gets the commands and the scores.
"""

import json
import os
from dataclasses import replace

import click

import wbdit
from wbdit._io import write_atomically
from wbdit.card import CARD
from wbdit.cli import cli
from wbdit.data.expression import read_h5ad
from wbdit.datasets import LABEL, blood_cells
from wbdit.evaluation.scores import format_value
from wbdit.example_run import FOLDER
from wbdit.training.config import PRESETS

WORK = FOLDER.parent.parent / "build" / "example_run"
EPOCHS = 60
SPLIT = f"wbdit split blood_cells.h5ad --label {LABEL} --share 0.7 --train train.h5ad --test heldout.h5ad"
GENERATE = "wbdit generate {run} --like heldout.h5ad --out synthetic.h5ad"
EVALUATE = f"wbdit evaluate heldout.h5ad synthetic.h5ad --train train.h5ad --label {LABEL} --out report"

ADDED = """
## Source of the cells

The training cells are a part of the 700 blood cells that come with wbdit. They are from 10x Genomics (Zheng et al.
2017), CC BY 4.0; `blood_cells.md` in the package has the details.

## Scores

`make example-run` trains this run with a smaller `small` preset and measures it with these commands. `blood_cells.h5ad`
holds `wbdit.datasets.blood_cells()`.

    {split}
    {generate}
    {evaluate}

{headline}: {summary}

{n} cells of each set are compared. The floor is the score of real training cells.

| score | synthetic | floor | best | |
| --- | --- | --- | --- | --- |
{rows}"""


def run(command: str) -> None:
    """Run a command of the package."""
    cli.main(command.split()[1:], standalone_mode=False)


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    os.chdir(WORK)
    blood_cells().write_h5ad("blood_cells.h5ad")
    run(SPLIT)
    small = PRESETS["small"]
    PRESETS["example"] = replace(small, model={**small.model, "hidden_size": 64})
    cells = read_h5ad("train.h5ad")
    # fp32 and a budget in epochs: the same weights again on the same kind of machine
    generator = wbdit.fit(cells, label=LABEL, preset="example", epochs=EPOCHS, precision="fp32", device="cpu")
    generator.save(FOLDER)
    run(GENERATE.format(run=FOLDER))
    run(EVALUATE)
    with open("report/metrics.json") as file:
        found = json.load(file)
    rows = "".join(
        f"| {score['title']} (`{name}`) | {format_value(score['value'])} | {format_value(score['floor'])} "
        f"| {format_value(score['best'])} | {score['grade']} |\n"
        for name, score in found["metrics"].items()
    )
    text = ADDED.format(
        split=SPLIT,
        generate=GENERATE.format(run="example_run"),
        evaluate=EVALUATE,
        rows=rows,
        n=found["n"],
        **found["verdict"],
    )
    card = FOLDER / CARD
    write_atomically(card, card.read_text() + text)
    size = sum(path.stat().st_size for path in FOLDER.iterdir() if path.suffix != ".py")
    click.echo(f"{FOLDER}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
