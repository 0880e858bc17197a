"""Is the likelihood right on cells that it was not trained on? By noise level, and by how rare a gene is.

    python -m bench.quality.likelihood DATA.h5ad --label cell_type [--prior 0 --prior 200]

Trains once with each strength of the prior on rare genes, and prints two Markdown tables: the negative log-likelihood
of held-out cells in nats per gene, and in how many of them genes are expected at t = 500, over in how many they are.
"""

from __future__ import annotations

from dataclasses import replace

import click
import numpy as np
import torch

import wbdit
from bench.quality.peers.cells import Choice, DataSet, Split
from wbdit import ops
from wbdit.counts.denoiser import CountDenoiser
from wbdit.data.sources import TrainingData
from wbdit.network_inputs import embedding_of
from wbdit.samplers.noise import PhiloxNoise

TIMESTEPS = (500, 600, 700, 850, 999)
EDGES = (0.01, 0.03, 0.1, 0.3, 1.0)  # mean counts that divide the genes
BATCH = 64


@torch.no_grad()
def held_out(generator: wbdit.CellGenerator, split: Split, t: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Return nats per gene, expected and actual numbers of cells with each gene ``(G,)``, of the test cells at t."""
    model = generator.model
    assert isinstance(model, CountDenoiser)
    preprocessor, cells = generator.preprocessor, split.test
    counts, x0 = preprocessor.matrix(cells), torch.from_numpy(preprocessor.encode(cells))[:, None]
    conditioning = embedding_of(model, preprocessor, cells)
    assert conditioning is not None
    nats, expected = 0.0, np.zeros(counts.shape[1])
    for rows in torch.arange(len(x0)).split(BATCH):
        times = torch.full_like(rows, t)
        x = generator.schedule.noising(x0[rows], times, PhiloxNoise(0, rows, tuple(x0.shape[1:]))(0))
        terms = model._posterior(x, times, *model._answer(x, times, conditioning[rows]))
        levels = torch.from_numpy(model.likelihood.bin_of(counts[rows.numpy()]))
        nats += float(ops.count_nll(*(*terms, levels)).double().sum())
        expected += (1 - torch.exp(-ops.count_nll(*(*terms, torch.zeros_like(levels))))).double().sum(0).numpy()
    return nats / counts.size, expected, (counts > 0).sum(0)


@click.command()
@click.argument("data")
@click.option("--label", default="cell_type", show_default=True)
@click.option("--minutes", default=15.0, show_default=True, help="Limit of the training time.")
@click.option("--prior", "priors", multiple=True, type=float, default=(0.0, 200.0), show_default=True)
@click.option("--seed", default=0, show_default=True, help="Seed of the split, the training and the noise.")
def main(data, label, minutes, priors, seed):
    """Train on DATA and print two tables."""
    cells = DataSet.parse(data, [label])
    split, small = cells.split(Choice(), seed), wbdit.Preset.from_name("small")
    nats, genes = [], []
    for prior in priors:
        preset = replace(small, likelihood=replace(small.likelihood, rate_prior=prior))
        generator = wbdit.fit(split.train, label=cells.labels, preset=preset, minutes=minutes, seed=seed)
        found = {t: held_out(generator, split, t) for t in TIMESTEPS}
        nats.append(f"| {prior:g} | " + " | ".join(f"{found[t][0]:.4f}" for t in TIMESTEPS) + " |")
        _, expected, actual = found[TIMESTEPS[0]]
        group = np.digitize(TrainingData.of(generator.preprocessor, split.train).statistics.matrix_mean, EDGES)
        sums = [(expected[group == k].sum(), actual[group == k].sum()) for k in range(len(EDGES) + 1)]
        genes.append(f"| {prior:g} | " + " | ".join(f"{a / b:.2f}" if b else "" for a, b in sums) + " |")
    table("t = ", TIMESTEPS, nats)
    table("mean count from ", (0, *EDGES), genes)


def table(name: str, columns: tuple[float, ...], rows: list[str]) -> None:
    """Print a Markdown table of one row per prior."""
    click.echo("| prior | " + " | ".join(f"{name}{column:g}" for column in columns) + " |")
    click.echo("|" + "---|" * (1 + len(columns)))
    click.echo("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
