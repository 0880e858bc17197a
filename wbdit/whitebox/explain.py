"""The readout of a run: what every block does to real cells, at every level of noise, and which genes it speaks for."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import anndata as ad
import numpy as np
import torch
from torch import Tensor

from wbdit.data.normalize import log_library_sizes
from wbdit.errors import InputError
from wbdit.generator import CellGenerator, make_model
from wbdit.nn.wbdit import WBDiT, WhiteBoxBlock
from wbdit.samplers.noise import PhiloxNoise
from wbdit.whitebox.gene_loadings import PERMUTATIONS, Hit, Units, enrichment, marker_genes, read_units, type_means
from wbdit.whitebox.measures import Measures, WeightStats, iterate_blocks, largest_rate, measure, weight_stats

CELLS = 500
LEVELS = 8  # of noise
BATCH = 100  # cells at a time

logger = logging.getLogger("wbdit")


@dataclass(frozen=True)
class Explanation:
    """What was measured; T noise levels, L blocks.

    Attributes
    ----------
    timesteps
        The noise levels, falling, ``(T,)``: as a sampler goes.
    means
        Each of :class:`wbdit.whitebox.measures.Measures` averaged over the cells, ``(T, L)``; the rates summed over
        heads.
    lowered
        Share of the cells ``(T, L)`` in which attention lowered the coding rate ("rate"), and shrinkage its objective
        ("objective").
    weights
        Of each block.
    largest_rate
        What the coding rate can be at most.
    genes
        Names ``(G,)``.
    units
        Heads' axes and atoms, read at the lowest noise level.
    labels
        Types of the cells, or None where the run has none.
    hits, untrained
        For "head" and "atom" a hit for each type, and the same in the network before training; empty without types.
    n
        Number of cells.
    facts
        Of the run and the cells.
    """

    timesteps: tuple[int, ...]
    means: dict[str, np.ndarray]
    lowered: dict[str, np.ndarray]
    weights: list[WeightStats]
    largest_rate: float
    genes: tuple[str, ...]
    units: Units
    labels: np.ndarray | None
    hits: dict[str, list[Hit]]
    untrained: dict[str, list[Hit]]
    n: int
    facts: dict[str, str]

    @property
    def objective(self) -> tuple[np.ndarray, np.ndarray]:
        """The lasso's objective before and after shrinkage, means over the cells, ``(T, L)`` each."""
        before, after = (self.means[f"fit_{when}"] + self.means[f"size_{when}"] for when in ("before", "after"))
        return before, after

    def to_dict(self) -> dict[str, Any]:
        """Return everything but single cells, for JSON."""
        weights = [{**w._asdict(), "overlap": w.overlap.tolist(), "rank": w.rank.tolist()} for w in self.weights]
        return {
            "n": self.n,
            "timesteps": list(self.timesteps),
            "means": {name: values.tolist() for name, values in self.means.items()},
            "share_of_cells_lowered": {name: values.tolist() for name, values in self.lowered.items()},
            "largest_coding_rate": self.largest_rate,
            "weights": weights,
            "heads": [self._unit(unit) for unit in self.units.first_axes()],
            "markers": {kind: [self._hit(hit) for hit in hits] for kind, hits in self.hits.items()},
            "markers_before_training": {
                kind: [{"type": h.type, "shared": h.shared, "p": h.p} for h in hits]
                for kind, hits in self.untrained.items()
            },
            "permutations": PERMUTATIONS,
            "facts": self.facts,
        }

    def top_genes(self, unit: int, sign: int, count: int = 10) -> list[str]:
        """Return the names of the genes that move a unit most in one direction."""
        return [self.genes[i] for i in self.units.top(unit, sign, count)]

    def _unit(self, unit: int) -> dict[str, Any]:
        means = {} if self.labels is None else {"type_means": type_means(self.units, unit, self.labels)}
        return {"unit": self.units.name(unit), "up": self.top_genes(unit, 1), "down": self.top_genes(unit, -1), **means}

    def _hit(self, hit: Hit) -> dict[str, Any]:
        named = {"unit": self.units.name(hit.unit), "genes": self.top_genes(hit.unit, hit.sign)}
        return {**hit._asdict(), **named}


def explain(
    generator: CellGenerator,
    adata: ad.AnnData,
    *,
    cells: int = CELLS,
    seed: int = 0,
) -> Explanation:
    """Look into the blocks of a run as they denoise real cells; logs what is being done.

    Parameters
    ----------
    generator
        A trained run.
    adata
        Real cells, with the run's genes and labels.
    cells
        Most cells to look at; drawn at random where there are more.
    seed
        Of that draw, of the noise and of the permutations.

    Raises
    ------
    InputError
        If the run's blocks are black boxes, or the cells do not fit the run.
    """
    model = generator.denoiser
    if not isinstance(model, WBDiT):
        raise InputError("this run's blocks are those of a DiT, black boxes: train one with --preset small or base")
    if cells < 1 or adata.n_obs < 1:
        raise InputError("at least one cell is needed")
    if adata.n_obs > cells:
        adata = adata[np.sort(np.random.default_rng(seed).choice(adata.n_obs, cells, replace=False))]
    x0 = torch.from_numpy(generator.preprocessor.encode(adata))[:, None].to(model.pos_embed.device)
    conditioning = conditioning_of(generator, adata)
    levels = noise_levels(generator)
    logger.info(f"{adata.n_obs} cells at {len(levels)} levels of noise")
    means, lowered = _measure_all(generator, model, x0, conditioning, levels, seed)
    columns = generator.preprocessor.labels.columns
    labels = adata.obs[columns[0]].astype(str).to_numpy() if columns else None
    logger.info("the genes of heads and atoms")
    units, hits, untrained = _genes(generator, model, adata, x0, conditioning, levels[-1], labels, seed)
    return Explanation(
        timesteps=tuple(levels),
        means=means,
        lowered=lowered,
        weights=[weight_stats(cast(WhiteBoxBlock, block)) for block in model.blocks],
        largest_rate=largest_rate(model.pos_embed.shape[1], model.hidden_size, model.num_heads),
        genes=generator.preprocessor.genes,
        units=units,
        labels=labels,
        hits=hits,
        untrained=untrained,
        n=adata.n_obs,
        facts=_facts(generator, seed),
    )


def noise_levels(generator: CellGenerator) -> list[int]:
    """Return the timesteps to look at, falling: evenly between the most noise and where sampling ends."""
    last = generator.schedule.noise_steps - 1
    return [round(t) for t in np.linspace(last, max(generator.model.stop, 0.05 * last), LEVELS)]


@torch.no_grad()
def conditioning_of(generator: CellGenerator, adata: ad.AnnData) -> Tensor | None:
    """Return the conditioning vectors ``(n, d)`` of real cells; None where there are no conditions."""
    preprocessor, model = generator.preprocessor, generator.model
    device = next(model.parameters()).device
    y = torch.from_numpy(preprocessor.labels.codes(adata)).to(device) if preprocessor.labels.columns else None
    if preprocessor.values != "log1p":
        return None if y is None else model.embed(y)
    log_library = torch.from_numpy(log_library_sizes(preprocessor.matrix(adata))).to(device)
    return model.embed(y, log_library)[:, : generator.denoiser.hidden_size]


def _measure_all(
    generator: CellGenerator, model: WBDiT, x0: Tensor, conditioning: Tensor | None, levels: list[int], seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the means over the cells and the shares of cells, each ``(T, L)``."""
    shape = len(levels), len(model.blocks)
    means = {name: np.zeros(shape) for name in Measures._fields}
    lowered = {name: np.zeros(shape) for name in ("rate", "objective")}
    for row, t in enumerate(levels):
        for rows in torch.arange(len(x0), device=x0.device).split(BATCH):
            times = torch.full_like(rows, t)
            x = generator.schedule.noising(x0[rows], times, _noise(seed, rows, row, x0))
            some = None if conditioning is None else conditioning[rows]
            shown = iterate_blocks(model, x, times, conditioning=some)
            for column, (block, activations) in enumerate(zip(model.blocks, shown, strict=True)):
                found = measure(cast(WhiteBoxBlock, block), activations)
                for name, values in found._asdict().items():
                    means[name][row, column] += float(values.double().sum()) / len(x0)
                rate = found.rate_after.sum(1) < found.rate_before.sum(1)
                objective = found.fit_after + found.size_after < found.fit_before + found.size_before
                for name, cells in (("rate", rate), ("objective", objective)):
                    lowered[name][row, column] += float(cells.double().sum()) / len(x0)
    return means, lowered


def _noise(seed: int, rows: Tensor, level: int, x0: Tensor) -> Tensor:
    """Return the noise of some cells at a level, the same whatever cells go with them."""
    return PhiloxNoise(seed, rows, tuple(x0.shape[1:]))(level)


def _genes(
    generator: CellGenerator,
    model: WBDiT,
    adata: ad.AnnData,
    x0: Tensor,
    conditioning: Tensor | None,
    t: int,
    labels: np.ndarray | None,
    seed: int,
) -> tuple[Units, dict[str, list[Hit]], dict[str, list[Hit]]]:
    """Return the units at one noise level, and their hits among the types' markers, after and before training."""
    rows = torch.arange(len(x0), device=x0.device)
    times = torch.full_like(rows, t)
    x = generator.schedule.noising(x0, times, _noise(seed, rows, LEVELS - 1, x0))
    spread = x0[:, 0].std(0)
    units = read_units(model, x, times, conditioning, spread)
    if labels is None:
        return units, {}, {}
    markers = marker_genes(_log_values(generator, adata), labels)
    if not markers:
        return units, {}, {}
    before = read_units(_untrained(generator, x0), x, times, conditioning, spread)
    found = (enrichment(one, markers, labels, spread.cpu().numpy(), seed) for one in (units, before))
    return units, *found  # type: ignore[return-value]


def _log_values(generator: CellGenerator, adata: ad.AnnData) -> np.ndarray:
    """Return the cells as marker genes are ranked on them: ln(1 + counts per 10,000), or as they are."""
    values = generator.preprocessor.matrix(adata)
    if generator.preprocessor.space != "counts":
        return values
    return np.log1p(1e4 * values / np.maximum(values.sum(1, keepdims=True), 1))


def _untrained(generator: CellGenerator, x0: Tensor) -> WBDiT:
    """Return the network as it was before training, but initialized from these cells ``(n, 1, G)``."""
    model = make_model(generator.config)
    denoiser = cast(WBDiT, model.network)
    if denoiser.has_cell_token:
        denoiser.cell_token.init_principal_components(x0[:, 0])
    return denoiser.to(x0.device).eval()


def _facts(generator: CellGenerator, seed: int) -> dict[str, str]:
    config, trained = generator.config, generator.config.trained
    return {
        "wbdit": config.wbdit,
        "preset": config.preset,
        "model hash": config.model_hash,
        "training": f"{trained.steps} steps, {trained.epochs:g} passes over {trained.cells} cells",
        "seed": str(seed),
    }
