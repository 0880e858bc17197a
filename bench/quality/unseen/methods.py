"""What makes the cells that are left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch

import wbdit
from bench.quality.unseen.baselines import shifted, thinned
from bench.quality.unseen.cells import Change, LeftOut
from wbdit.counts.foretell import Foretelling
from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.data.labels import SEPARATOR, Labels
from wbdit.data.statistics import Statistics, training_combinations

MOST = 2000  # cells
SCVI_EPOCHS = 100  # a few minutes


class Method(Protocol):
    """A method, whose results are named; it may keep files in a folder."""

    def __call__(self, left_out: LeftOut, change: Change, seed: int, folder: Path) -> dict[str, ad.AnnData]:
        """Return sets of cells, in random order."""


def baselines(left_out: LeftOut, change: Change, seed: int, folder: Path) -> dict[str, ad.AnnData]:
    """Return the other half of the real cells, the ceiling, and the label's own cells with the change of others.

    The ceiling of recast cells, which keep their library sizes, is real cells that are thinned to these.
    """
    shifts = {f"shift, {how}": shifted(left_out, change, how, seed) for how in ("mean", "nearest", "kernel")}
    ceilings = {"real, other half": left_out.other, "real, thinned": thinned(left_out.other, left_out.own, seed)}
    return ceilings | shifts


def tables(left_out: LeftOut, change: Change, seed: int, folder: Path) -> dict[str, ad.AnnData]:
    """Return draws of what wbdit foretells before any training, gene by gene."""
    train = left_out.train
    labels = Labels.fit(train, [change.column, change.condition])
    codes, sizes = labels.codes(train), labels.label_sizes
    sums = training_combinations(codes, sizes, train.n_vars)
    foretelling = Foretelling.of(codes, sizes, Statistics.of(MemoryMatrix(train.X), "log1p", (), sums))
    assert foretelling is not None
    name = SEPARATOR.join((left_out.name, change.after))
    one = next(told for told in foretelling.unseen if labels.name(told.codes) == name)
    rng = np.random.default_rng(seed)
    library = rng.choice(np.asarray(left_out.own.X.sum(1)).ravel(), MOST)
    means, size = library[:, None] * one.library / library.mean() * one.shares, np.exp(one.log_size)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(size, means / size)), dtype=np.float32)
    return {"wbdit's tables alone": ad.AnnData(counts, var=train.var[[]])}


@dataclass(frozen=True)
class Diffusion:
    """wbdit, trained for some passes over the cells, whose run is kept."""

    epochs: float
    name: str

    def __call__(self, left_out: LeftOut, change: Change, seed: int, folder: Path) -> dict[str, ad.AnnData]:
        """Return generated cells, and real cells recast."""
        if not (folder / "config.json").exists():
            label = [change.column, change.condition]
            how = {"epochs": self.epochs, "seed": seed, "out": folder, "overwrite": True, "progress": False}
            wbdit.fit(left_out.train, label=label, **how)
        generator = wbdit.load(folder, device="cpu")
        wanted = {(left_out.name, change.after): MOST}
        some = np.random.default_rng(seed).permutation(left_out.own.n_obs)[:MOST]
        before = left_out.own[some].copy()
        return {
            f"{self.name}, generated": generator.generate(n_per_label=wanted, seed=seed),
            f"{self.name}, recast": generator.recast(before, toward={change.condition: change.after}, seed=seed),
        }


def autoencoder(left_out: LeftOut, change: Change, seed: int, folder: Path) -> dict[str, ad.AnnData]:
    """Return cells before the change, encoded by scVI and decoded as cells after: the condition is its batch."""
    import scvi

    scvi.settings.seed = seed
    train = left_out.train.copy()
    scvi.model.SCVI.setup_anndata(train, batch_key=change.condition, labels_key=change.column)
    model = scvi.model.SCVI(train, gene_likelihood="nb")
    model.train(SCVI_EPOCHS, enable_progress_bar=False, logger=False, enable_checkpointing=False)
    obs = train.obs
    rows = np.flatnonzero((obs[change.column] == left_out.name) & (obs[change.condition] == change.before))
    rows, draws = np.random.default_rng(seed).permutation(rows)[:MOST], np.random.default_rng(seed)
    how = {"library_size": "latent", "return_numpy": True, "n_samples": 1}
    rates = model.get_normalized_expression(indices=rows, transform_batch=change.after, **how)
    with torch.no_grad():
        size = model.module.px_r.exp().numpy()
    counts = draws.poisson(draws.gamma(size, rates / size))
    return {"scVI, transform_batch": ad.AnnData(sp.csr_matrix(counts, dtype=np.float32), var=train.var[[]])}
