"""How hard can classifiers be to fool? Cells of a generator that is right in all but its means.

    python -m bench.quality.oracle DATA.h5ad RUN --label cell_type

A trained run takes the part of the truth. Cells are drawn from it as training and as test cells, as many as DATA has.
Then its label rates are changed, so that each label has the mean counts of the drawn training cells. Its cells then
differ from the truth by the sampling error of these means alone, which every generator has that learns from as many
cells. Classifiers tell them from the test cells; beside them stand fresh cells of the truth itself. Prints a row per
repeat.
"""

from __future__ import annotations

import anndata as ad
import click
import numpy as np
import torch

import wbdit
from bench.quality.peers.cells import Choice, DataSet, Split
from bench.quality.unseen.judge import log_values
from wbdit.counts.denoiser import CountDenoiser
from wbdit.counts.init import pooled
from wbdit.evaluation.classifiers import CLASSIFIERS, two_sample_test

ROUNDS = 6  # as many cells as for training are drawn so often for the means of the truth
SEEDS = 10_000  # per repeat
FEWEST = 2  # cells of a label
FLOOR = 1e-6  # counts


class Truth:
    """A run, whose label rates can be changed.

    Parameters
    ----------
    generator
        A run with one label column and a count likelihood.
    split
        Cells with the labels and library sizes that are asked for.
    """

    def __init__(self, generator: wbdit.CellGenerator, split: Split) -> None:
        assert isinstance(generator.model, CountDenoiser)
        self.generator, self.split = generator, split
        self.rates = generator.model.label_rates
        self.own_rates = self.rates.detach().clone()
        drawn = [self.draw(split.train, seed) for seed in range(ROUNDS)]
        self.sums, self.cells = self._by_label(ad.concat(drawn, index_unique="-"))

    def draw(self, like: ad.AnnData, seed: int) -> ad.AnnData:
        """Return cells with the labels and library sizes of the given ones."""
        return self.generator.generate(like=like, seed=seed)

    @torch.no_grad()
    def take_means_of(self, cells: ad.AnnData) -> None:
        """Let each label have the mean counts of cells, which one average cell is added to."""
        sums, numbers = self._by_label(cells)
        self.restore()
        for label in np.flatnonzero(np.minimum(numbers, self.cells) >= FEWEST):
            right = self.sums[label] / self.cells[label]
            found = (sums[label] + right) / (numbers[label] + 1)
            self.rates[label] += torch.from_numpy(np.log((found + FLOOR) / (right + FLOOR))).to(self.rates)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo :meth:`take_means_of`."""
        self.rates.copy_(self.own_rates)

    def _by_label(self, cells: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
        """Return the sum of the counts ``(K, G)`` fp64 and the number of cells ``(K,)`` of each label."""
        labels, size = self.generator.preprocessor.labels.codes(cells)[:, 0], len(self.rates)
        return pooled(labels, size, cells.X.toarray().astype(np.float64)), np.bincount(labels, minlength=size)


@click.command()
@click.argument("data")
@click.argument("run")
@click.option("--label", default="cell_type", show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Seed of the split, as the run had it.")
def main(data, run, label, repeats, seed):
    """Score the cells of RUN as the truth, with labels and library sizes of DATA."""
    split = DataSet.parse(data, [label]).split(Choice(), seed)
    truth = Truth(wbdit.load(run), split)
    click.echo("| repeat | cells | " + " | ".join(f"`{kind}`" for kind in CLASSIFIERS) + " |")
    click.echo("|" + "---|" * (2 + len(CLASSIFIERS)))
    for repeat in range(repeats):
        seeds = iter(range(SEEDS * (repeat + 1), SEEDS * (repeat + 2)))
        truth.restore()
        train = truth.draw(split.train, next(seeds))
        real, fresh = (log_values(truth.draw(split.test, next(seeds))) for _ in range(2))
        truth.take_means_of(train)
        learned = log_values(truth.draw(split.test, next(seeds)))
        for name, values in (("of the truth", fresh), ("with means of the training cells", learned)):
            scores = [two_sample_test(real, values, kind).value for kind in CLASSIFIERS]
            click.echo(f"| {repeat} | {name} | " + " | ".join(f"{score:.3f}" for score in scores) + " |")


if __name__ == "__main__":
    main()
