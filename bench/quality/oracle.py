"""How hard can classifiers be to fool? Cells of a generator that is right in all but its means.

    python -m bench.quality.oracle DATA.h5ad RUN --label cell_type

A trained run takes the part of the truth. Cells are drawn from it as training and as test cells, as many as DATA has.
Then its label rates are changed, so that each label has the mean counts of the drawn training cells. Its cells then
differ from the truth by the sampling error of these means alone, which every generator has that learns from as many
cells. Classifiers tell them from the test cells; beside them stand fresh cells of the truth itself. Prints a row per
repeat.
"""

from __future__ import annotations

import click
import numpy as np
import torch

import wbdit
from bench.quality.peers.cells import Choice, DataSet, Split
from wbdit.counts.denoiser import CountDenoiser
from wbdit.data.normalize import transformed
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
        self.means = self._sums(*(np.concatenate(part) for part in zip(*drawn, strict=True)))

    def draw(self, like: object, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return counts ``(n, G)`` fp64 and label codes ``(n,)`` of cells like the given ones."""
        made = self.generator.generate(like=like, seed=seed)
        return made.X.toarray().astype(np.float64), self.generator.preprocessor.labels.codes(made)[:, 0]

    @torch.no_grad()
    def take_means_of(self, counts: np.ndarray, labels: np.ndarray) -> None:
        """Let each label have the mean counts of cells, which one average cell is added to."""
        sums = self._sums(counts, labels)
        self.restore()
        for label in np.flatnonzero(np.minimum(sums[1], self.means[1]) >= FEWEST):
            right = self.means[0][label] / self.means[1][label]
            found = (sums[0][label] + right) / (sums[1][label] + 1)
            self.rates[label] += torch.from_numpy(np.log((found + FLOOR) / (right + FLOOR))).to(self.rates)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo :meth:`take_means_of`."""
        self.rates.copy_(self.own_rates)

    def _sums(self, counts: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the sum of the counts ``(K, G)`` and the number of cells ``(K,)`` of each label."""
        known = range(len(self.generator.preprocessor.labels.categories[0]))
        return np.array([counts[labels == k].sum(0) for k in known]), np.array([(labels == k).sum() for k in known])


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
        real, fresh = (log_values(truth.draw(split.test, next(seeds))[0]) for _ in range(2))
        truth.take_means_of(*train)
        learned = log_values(truth.draw(split.test, next(seeds))[0])
        for name, values in (("of the truth", fresh), ("with means of the training cells", learned)):
            scores = [two_sample_test(real, values, kind).value for kind in CLASSIFIERS]
            click.echo(f"| {repeat} | {name} | " + " | ".join(f"{score:.3f}" for score in scores) + " |")


def log_values(counts: np.ndarray) -> np.ndarray:
    """Return ln(1 + count per 10,000), ``(n, G)``."""
    return transformed(counts, "lognorm")


if __name__ == "__main__":
    main()
