"""The readout of a run: measurements of each block on noised real cells, and the genes of its heads and atoms."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from wbdit.counts.denoiser import COMPONENTS
from wbdit.data.components import Residuals
from wbdit.data.expression import label_text
from wbdit.errors import InputError
from wbdit.generator import CellGenerator, make_model
from wbdit.network_inputs import LEVELS, conditioning_of, noise_levels
from wbdit.nn.activations import iterate_blocks
from wbdit.nn.wbdit import WBDiT, WhiteBoxBlock
from wbdit.samplers.noise import PhiloxNoise
from wbdit.whitebox.ablations import Ablations
from wbdit.whitebox.ablations import ablate as ablations
from wbdit.whitebox.closed_form import ClosedFormShares, closed_form_shares
from wbdit.whitebox.gene_loadings import PERMUTATIONS, Hit, Units, enrichment, marker_genes, read_units, type_means
from wbdit.whitebox.measures import Measures, WeightStats, largest_rate, measure, weight_stats

CELLS = 500
BATCH = 100  # cells per forward pass

logger = logging.getLogger("wbdit")


@dataclass(frozen=True)
class Explanation:
    """Measurements of a run on n real cells, at T noise levels and in L blocks. Made by :func:`explain`.

    Attributes
    ----------
    timesteps
        Timesteps of the noise levels, from high to low, ``(T,)``.
    means
        Each field of :class:`wbdit.whitebox.measures.Measures`, averaged over the cells, fp64 ``(T, L)``. Coding rates
        are summed over heads.
    lowered
        Fraction of cells, fp64 ``(T, L)``, in which attention lowered the coding rate ("rate") and in which shrinkage
        lowered the lasso objective ("objective").
    weights
        Statistics of each block's weights, L of them.
    largest_rate
        Upper bound of the coding rate summed over heads, in nats.
    genes
        Gene names ``(G,)``.
    units
        Axes of the heads and atoms of the dictionaries, at the lowest noise level.
    labels
        Cell types ``(n,)``; None if the run has no labels.
    hits, untrained
        Best match of each cell type under "head" and "atom", in the trained network and in the same network before
        training. Empty without labels, or if fewer than two types have at least three cells.
    n
        Number of cells.
    facts
        Version, preset, model hash, training and seed, by name.
    ablations
        What the heads cause; None if it was not asked for.
    closed_form
        The network beside the Gaussians that sampling starts from; None for a run that has none.
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
    ablations: Ablations | None = None
    closed_form: ClosedFormShares | None = None

    @property
    def objective(self) -> tuple[np.ndarray, np.ndarray]:
        """The lasso objective before and after shrinkage, mean over the cells, ``(T, L)`` each."""
        before, after = (self.means[f"fit_{when}"] + self.means[f"size_{when}"] for when in ("before", "after"))
        return before, after

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: all but the values of single cells."""
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
            **({} if self.closed_form is None else {"closed_form": self.closed_form.to_dict()}),
            **({} if self.ablations is None else {"ablations": self.ablations.to_dict()}),
        }

    def top_genes(self, unit: int, sign: int, count: int = 10) -> list[str]:
        """Return the names of the genes with the largest loadings on a unit, in the direction ``sign`` (1 or -1)."""
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
    ablate: bool = False,
) -> Explanation:
    """Measure the blocks of a trained run on noised real cells, and find the genes of their heads and atoms.

    Progress goes to the logger ``"wbdit"``.

    Parameters
    ----------
    generator
        A trained run with white-box blocks.
    adata
        Real cells with the run's genes and labels.
    cells
        Maximum number of cells. A larger data set is sampled at random.
    seed
        Seed of that sample, of the noise and of the permutations.
    ablate
        Also generate cells without each head, and cells that are moved along some heads' axes; takes minutes. See
        :mod:`wbdit.whitebox.ablations`.

    Returns
    -------
    The measurements. :func:`wbdit.report.explain.write_explanation` writes them to files.

    Raises
    ------
    InputError
        If the run has DiT blocks, if there are no cells or they do not fit the run, or if the run has labels and scanpy
        is not installed; with `ablate`, if there are not two types of at least three cells.

    Examples
    --------
    >>> subset = cells[cells.obs["bulk_labels"].isin(["Dendritic", "CD19+ B"])]
    >>> explanation = wbdit.explain(generator, subset, cells=20)
    >>> explanation.means["non_zero"].shape  # noise levels and blocks
    (8, 3)
    >>> [hit.type for hit in explanation.hits["head"]]
    ['CD19+ B', 'Dendritic']
    """
    model = generator.denoiser
    if not isinstance(model, WBDiT):
        raise InputError(
            'this run has DiT blocks, which are black boxes: explain a run trained with `preset="small"` or "base"'
        )
    if cells < 1 or adata.n_obs < 1:
        raise InputError("there are no cells to explain: give at least one as `cells`")
    if ablate and not generator.preprocessor.labels.columns:
        raise InputError("ablations compare cell types, but this run was trained without labels: leave `ablate` out")
    if adata.n_obs > cells:
        adata = adata[np.sort(np.random.default_rng(seed).choice(adata.n_obs, cells, replace=False))]
    x0 = torch.from_numpy(generator.preprocessor.encode(adata))[:, None].to(model.pos_embed.device)
    conditioning = conditioning_of(generator.model, generator.preprocessor, adata)
    levels = noise_levels(generator.schedule, generator.model.stop)
    logger.info(f"measuring {adata.n_obs} cells at {len(levels)} noise levels")
    means, lowered = _measure_all(generator, model, x0, conditioning, levels, seed)
    closed_form = closed_form_shares(generator, adata, levels, seed)
    columns = generator.preprocessor.labels.columns
    labels = label_text(adata.obs[columns[0]]).to_numpy() if columns else None
    logger.info("finding the genes of heads and atoms")
    markers = {} if labels is None else marker_genes(_log_values(generator, adata), labels)
    units, hits, untrained = _genes(generator, model, x0, conditioning, levels[-1], labels, markers, seed)
    removed = None
    if ablate:
        if labels is None or not markers:
            raise InputError("ablations compare cell types: give cells of at least two types, three of each")
        atoms = sorted({(int(units.block[hit.unit]), int(units.number[hit.unit])) for hit in hits["atom"]})
        removed = ablations(*(generator, adata, labels, markers, atoms), partial(_log_values, generator), seed)
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
        ablations=removed,
        closed_form=closed_form,
    )


def _measure_all(
    generator: CellGenerator, model: WBDiT, x0: Tensor, conditioning: Tensor | None, levels: list[int], seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return :class:`Explanation`'s ``means`` and ``lowered``."""
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
    """Return the noise of some cells at a noise level; it does not depend on the other cells of the batch."""
    return PhiloxNoise(seed, rows, tuple(x0.shape[1:]))(level)


def _genes(
    generator: CellGenerator,
    model: WBDiT,
    x0: Tensor,
    conditioning: Tensor | None,
    t: int,
    labels: np.ndarray | None,
    markers: dict[str, np.ndarray],
    seed: int,
) -> tuple[Units, dict[str, list[Hit]], dict[str, list[Hit]]]:
    """Return the units at timestep `t`, and the best matches of each type after and before training."""
    rows = torch.arange(len(x0), device=x0.device)
    times = torch.full_like(rows, t)
    x = generator.schedule.noising(x0, times, _noise(seed, rows, LEVELS - 1, x0))
    spread = x0[:, 0].std(0)
    units = read_units(model, x, times, conditioning, spread)
    if labels is None or not markers:
        return units, {}, {}
    before = read_units(_untrained(generator, x0), x, times, conditioning, spread)
    found = (enrichment(one, markers, labels, spread.cpu().numpy(), seed) for one in (units, before))
    return units, *found  # type: ignore[return-value]


def _log_values(generator: CellGenerator, adata: ad.AnnData) -> np.ndarray:
    """Return the values for ranking marker genes: counts as ln(1 + counts per 10,000), other values unchanged."""
    values = generator.preprocessor.matrix(adata)
    if generator.preprocessor.space != "counts":
        return values
    return np.log1p(1e4 * values / np.maximum(values.sum(1, keepdims=True), 1))


def _untrained(generator: CellGenerator, x0: Tensor) -> WBDiT:
    """Return the network before training; its cell token is initialized from these cells ``(n, 1, G)``."""
    model = make_model(generator.config)
    denoiser = cast(WBDiT, model.network)
    if denoiser.has_cell_token:
        values = sp.csr_matrix(x0[:, 0].cpu().numpy())
        found = Residuals(values, np.ones((len(x0), 1))).components(COMPONENTS)
        denoiser.cell_token.init_principal_components(*map(torch.from_numpy, found))
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
