"""The network beside the Gaussians that sampling starts from: what their estimates of clean cells explain.

For a cell with clean values x, mu is the network's estimate at pure noise, given labels, library size and covariates.
For the noised cell x_t, the network has an estimate after each block: the final layer is applied to the residual stream
there (a logit lens). The Gaussian of the cell's labels has one in closed form, see :mod:`wbdit.counts.closed_form`. All
shares are of squared distances, summed over cells and genes:

- of the cells, what an estimate explains: ``1 - |x - estimate|^2 / |x - mu|^2``;
- of the network's update, what the Gaussian explains: ``1 - |network - Gaussian|^2 / |network - mu|^2``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import anndata as ad
import numpy as np
import torch
from torch import Tensor

from wbdit import ops
from wbdit.counts.denoiser import CountDenoiser
from wbdit.generator import CellGenerator
from wbdit.network_inputs import embedding_of
from wbdit.nn.activations import iterate_blocks
from wbdit.nn.wbdit import WBDiT
from wbdit.samplers.noise import PhiloxNoise

BATCH = 100  # cells per forward pass
TOP_GENES = 10
SMALLEST = 1e-300  # keeps shares finite


@dataclass(frozen=True)
class ClosedFormShares:
    """Shares of squared distances at T noise levels, for L blocks and G genes, fp64.

    Columns ``1 + L`` stand for the estimate before the first block and after each block.

    Attributes
    ----------
    start
        Timestep at which sampling starts from the Gaussians.
    timesteps
        Timesteps of the noise levels, from high to low, ``(T,)``. The highest is missing: mu is taken there.
    network
        Share of the cells that the network explains, ``(T, 1 + L)``.
    gaussian
        Share of the cells that the Gaussian explains, ``(T,)``.
    error
        Standard error over cells of the network's share minus the Gaussian's, ``(T,)``.
    of_update
        Share of the network's update that the Gaussian explains, ``(T, 1 + L)``.
    sizes
        Squared size of each block's own update, in units of the whole update, ``(T, L)``. The updates of several blocks
        can cancel, so the sum need not be 1.
    genes
        Gene names ``(G,)``.
    gene_network, gene_gaussian
        Shares of each gene at the lowest noise level, ``(G,)``.
    gene_gains
        Squared error of the Gaussian minus that of the network, summed over cells, for each gene at the lowest noise
        level, ``(G,)``.
    """

    start: int
    timesteps: tuple[int, ...]
    network: np.ndarray
    gaussian: np.ndarray
    error: np.ndarray
    of_update: np.ndarray
    sizes: np.ndarray
    genes: tuple[str, ...]
    gene_network: np.ndarray
    gene_gaussian: np.ndarray
    gene_gains: np.ndarray

    @property
    def gain(self) -> np.ndarray:
        """The network's share of the cells minus the Gaussian's, ``(T,)``."""
        return self.network[:, -1] - self.gaussian

    def top_genes(self, count: int = TOP_GENES) -> list[dict[str, Any]]:
        """Return the genes at which the network gains most, at most `count`, with their shares."""
        order = np.argsort(-self.gene_gains, kind="stable")[:count]
        return [
            {
                "gene": self.genes[i],
                "network": float(self.gene_network[i]),
                "gaussian": float(self.gene_gaussian[i]),
                "gain": float(self.gene_gains[i]),
            }
            for i in order
            if self.gene_gains[i] > 0
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; of the genes, those at which the network gains most."""
        return {
            "start": self.start,
            "timesteps": list(self.timesteps),
            "share_of_cells": {
                "network": self.network.tolist(),
                "gaussian": self.gaussian.tolist(),
                "standard_error_of_gain": self.error.tolist(),
            },
            "share_of_update": self.of_update.tolist(),
            "size_of_block_updates": self.sizes.tolist(),
            "genes": self.top_genes(),
        }


@torch.no_grad()
def closed_form_shares(
    generator: CellGenerator, adata: ad.AnnData, levels: list[int], seed: int = 0
) -> ClosedFormShares | None:
    """Compare the network with the Gaussians on noised real cells.

    Parameters
    ----------
    generator
        A trained run.
    adata
        Real cells with the run's genes and labels.
    levels
        Timesteps of the noise levels, from high to low. The first one is pure noise.
    seed
        Seed of the noise.

    Returns
    -------
    None for runs without Gaussians, runs in which they do not hold, and runs with DiT blocks.
    """
    model = generator.model
    if not (isinstance(model, CountDenoiser) and isinstance(model.network, WBDiT)):
        return None
    if model.gaussians is None or not model.first_timestep:
        return None
    device, genes = model.log_library_scale.device, generator.preprocessor.genes
    x0 = torch.from_numpy(generator.preprocessor.encode(adata))[:, None].to(device)
    conditioning = cast(Tensor, embedding_of(model, generator.preprocessor, adata))
    combinations = model.gaussians.rows(torch.from_numpy(generator.preprocessor.labels.codes(adata)).to(device))
    lower = levels[1:]
    gaussians = [model.gaussians.at(*generator.schedule.levels(t)) for t in lower]
    shape = len(lower), 1 + len(model.network.blocks)
    distances = {name: np.zeros(shape) for name in ("cell", "gaussian", "mean", "before")}  # from the estimates
    per_cell = np.zeros((3, len(lower), len(x0)))  # squared distances of mu, Gaussian and network from the cells
    per_gene = np.zeros((3, len(genes)))  # the same at the lowest noise level
    for rows in torch.arange(len(x0), device=device).split(BATCH):
        noise, clean, given = PhiloxNoise(seed, rows, (1, len(genes))), x0[rows], conditioning[rows]
        highest = torch.full_like(rows, generator.schedule.noise_steps - 1)
        mean = model(noise(0), highest, conditioning=given)[:, 0].double()
        for row, (t, noised) in enumerate(zip(lower, gaussians, strict=True)):
            times = torch.full_like(rows, t)
            x = generator.schedule.noising(clean, times, noise(row + 1))
            closed = noised.posterior_mean(x[:, 0], mean.float(), combinations[rows]).double()
            found = torch.stack(estimates(model, x, times, given))[:, :, 0].double()  # [1 + L, B, G]
            before = torch.cat([found[:1], found[:-1]])
            for name, other in (("cell", clean[:, 0]), ("gaussian", closed), ("mean", mean), ("before", before)):
                distances[name][row] += (found - other).square().sum((1, 2)).cpu().numpy()
            errors = (torch.stack([mean, closed, found[-1]]) - clean[:, 0]).square()
            per_cell[:, row, rows.cpu().numpy()] = errors.sum(2).cpu().numpy()
            if t == lower[-1]:
                per_gene += errors.sum(1).cpu().numpy()
    of_mean, of_gaussian, of_network = np.maximum(per_cell.sum(2), SMALLEST)
    gain = (of_gaussian - of_network) / of_mean
    unlike = per_cell[1] - per_cell[2] - gain[:, None] * per_cell[0]  # linearized: the gain is a ratio of sums
    spread, (gene_gaussian, gene_network) = np.maximum(per_gene[0], SMALLEST), per_gene[1:]
    return ClosedFormShares(
        start=model.first_timestep,
        timesteps=tuple(lower),
        network=1 - distances["cell"] / of_mean[:, None],
        gaussian=1 - of_gaussian / of_mean,
        error=np.sqrt(np.square(unlike).sum(1)) / of_mean,
        of_update=1 - distances["gaussian"] / np.maximum(distances["mean"], SMALLEST),
        sizes=distances["before"][:, 1:] / np.maximum(distances["mean"][:, -1:], SMALLEST),
        genes=genes,
        gene_network=1 - gene_network / spread,
        gene_gaussian=1 - gene_gaussian / spread,
        gene_gains=gene_gaussian - gene_network,
    )


@torch.no_grad()
def estimates(model: CountDenoiser, x: Tensor, t: Tensor, conditioning: Tensor) -> list[Tensor]:
    """Return the estimates of the clean values before the first block and after each block, ``(B, 1, G)`` each.

    Parameters
    ----------
    model
        A model with white-box blocks.
    x, t, conditioning
        As in :meth:`wbdit.counts.denoiser.CountDenoiser.forward`, which the last estimate equals.

    Examples
    --------
    >>> from wbdit.whitebox.closed_form import estimates
    >>> x, t = torch.randn(2, 1, len(generator.preprocessor.genes)), torch.tensor([500, 900])
    >>> given = generator.model.embed(torch.tensor([0, 1]), torch.tensor([7.0, 7.5]))
    >>> after = estimates(generator.model, x, t, given)
    >>> len(after)  # the embedded tokens and three blocks
    4
    >>> torch.allclose(after[-1], generator.model(x, t, conditioning=given), atol=1e-4)
    True
    """
    network, vector = cast(WBDiT, model.network), conditioning[:, : model.network.hidden_size]
    shift, scale = network.modulations(t, conditioning=vector)[-1]
    blocks = iterate_blocks(network, x, t, conditioning=vector)
    streams = [network.embed_cells(x), *(activations.stream for activations in blocks)]
    outputs = [network.read_out(ops.adaln(stream, shift, scale)) for stream in streams]
    return [model.posterior_mean(x, t, output, conditioning) for output in outputs]
