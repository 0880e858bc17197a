"""Which genes a head or an atom of the dictionary speaks for, and whether they are some type's markers.

A *unit* is an axis of a head's subspace, or an atom of a block's dictionary. It is read where the whole cell is seen:
at the cell token, or where there is none, at the mean of the patches' tokens. Its genes come from the weights alone,
by the path that leads from the embedding straight to it: a gene's loading is how far one standard deviation of the gene
moves the unit. What reaches a deeper block through the attention of earlier ones is not in it.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple, cast

import anndata as ad
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from wbdit.errors import need_extra
from wbdit.nn.embeddings import LocalLinear
from wbdit.nn.wbdit import WBDiT, WhiteBoxBlock
from wbdit.whitebox.measures import iterate_blocks

AXES = 3  # of each head's subspace: the widest over the cells
MARKERS = 50  # genes of a type, and of a unit's end
BINS = 20  # genes are permuted among those that vary about as much
PERMUTATIONS = 999


class Units(NamedTuple):
    """The units of a network, U of them.

    Attributes
    ----------
    kind
        "head" or "atom", ``(U,)``.
    block, number, axis
        Where each is, from 0: the block, the head or atom, and the axis in a head's subspace, ``(U,)`` int64.
    activation
        What each answered to each cell, ``(U, cells)`` fp32. An atom's is never negative.
    loading
        What one standard deviation of each gene adds to it, ``(U, G)`` fp32.
    """

    kind: np.ndarray
    block: np.ndarray
    number: np.ndarray
    axis: np.ndarray
    activation: np.ndarray
    loading: np.ndarray

    def name(self, unit: int) -> str:
        """Name a unit as people count: ``"block 1, head 2, axis 1"``."""
        axis = f", axis {self.axis[unit] + 1}" if self.kind[unit] == "head" else ""
        return f"block {self.block[unit] + 1}, {self.kind[unit]} {self.number[unit] + 1}{axis}"

    def first_axes(self) -> list[int]:
        """Return the unit of each head's widest axis."""
        return [int(unit) for unit in np.flatnonzero((self.kind == "head") & (self.axis == 0))]

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends at which units have genes: their numbers ``(E,)``, and 1 or -1 ``(E,)``.

        A head's axis has two. An atom has one: it fires or it does not.
        """
        heads = np.flatnonzero(self.kind == "head")
        units = np.concatenate([np.arange(len(self.kind)), heads])
        return units, np.concatenate([np.ones(len(self.kind), int), -np.ones(len(heads), int)])

    def top(self, unit: int, sign: int, count: int) -> np.ndarray:
        """Return the genes that move a unit most in one direction, the strongest first, ``(count,)`` int64."""
        return np.argsort(-sign * self.loading[unit], kind="stable")[:count]


class Hit(NamedTuple):
    """The unit's end with the most of a type's markers.

    Attributes
    ----------
    type
        The type.
    unit, sign
        Which end of which unit.
    shared
        How many of its first :data:`MARKERS` genes are among as many markers of the type.
    p
        How often chance does as well with the best of all units of the kind, see :func:`enrichment`.
    fires
        The type whose cells move the unit farthest toward this end.
    """

    type: str
    unit: int
    sign: int
    shared: int
    p: float
    fires: str


def gene_embedding(model: WBDiT) -> Tensor:
    """Return what each gene adds to the token that is read, a unit of its value, ``(G, d)``."""
    if model.has_cell_token:
        return model.cell_token.proj.weight.detach().T[: model.input_size]
    embedder = model.x_embedder
    if isinstance(embedder.proj, LocalLinear):
        rows = embedder.proj.weight.detach()[:, : embedder.patch_size].flatten(0, 1)
    else:
        rows = embedder.proj.weight.detach()[:, 0, :, 0].T.repeat(embedder.num_patches, 1)
    return rows[: model.input_size] / embedder.num_patches


@torch.no_grad()
def read_units(model: WBDiT, x: Tensor, t: Tensor, conditioning: Tensor | None, spread: Tensor) -> Units:
    """Return the heads' axes and the atoms, with their genes and what they answer to cells.

    Parameters
    ----------
    model, x, t, conditioning
        The denoiser and what it is called with.
    spread
        Standard deviation of each gene's value ``(G,)``.
    """
    genes = gene_embedding(model) * spread[:, None]
    kinds: list[str] = []
    places: list[tuple[int, int, int]] = []
    activations, loadings = [], []
    modulations = model.modulations(t, conditioning=conditioning)
    shown = iterate_blocks(model, x, t, conditioning=conditioning)
    for number, (block, seen) in enumerate(zip(model.blocks, shown, strict=True)):
        block = cast(WhiteBoxBlock, block)
        scale1, scale2 = (1 + modulations[number][part].mean(0) for part in (1, 4))
        head_axes = _head_axes(block, _site(model, seen.before), genes * scale1)
        kinds += ["head"] * len(head_axes[0])
        places += [(number, *divmod(i, len(head_axes[0]) // block.attn.num_heads)) for i in range(len(head_axes[0]))]
        atoms = _site(model, seen.code).T, _atom_loadings(block, genes * scale2)
        kinds += ["atom"] * len(atoms[0])
        places += [(number, i, 0) for i in range(len(atoms[0]))]
        activations += [head_axes[0], atoms[0]]
        loadings += [head_axes[1], atoms[1]]
    block_of, number_of, axis_of = np.array(places).T
    activation, loading = (torch.cat(parts).float().cpu().numpy() for parts in (activations, loadings))
    return Units(np.array(kinds), block_of, number_of, axis_of, activation, loading)


def _head_axes(block: WhiteBoxBlock, z: Tensor, genes: Tensor) -> tuple[Tensor, Tensor]:
    """Return each head's widest axes: answers to tokens ``(B, d)``, ``(h AXES, B)``, and genes ``(h AXES, G)``."""
    heads = block.attn.num_heads
    projections = block.attn.qkv.weight.unflatten(0, (heads, -1))  # [h, p, d]
    w = (z @ projections.mT).float()  # [h, B, p]
    axes = torch.linalg.svd(w - w.mean(1, keepdim=True), full_matrices=False).Vh[:, :AXES]  # [h, AXES, p]
    longest = axes.gather(-1, axes.abs().argmax(-1, keepdim=True))
    axes = axes * longest.sign()  # an axis has no sign of its own: let it be the same wherever it is found
    return (axes @ w.mT).flatten(0, 1), (axes @ projections @ genes.T).flatten(0, 1)


def _atom_loadings(block: WhiteBoxBlock, genes: Tensor) -> Tensor:
    """Return what genes ``(G, d)`` add to each atom before its threshold, ``(atoms, G)``."""
    return (genes + block.mlp.eta * (genes @ block.mlp.folded().float())).T


def _site(model: WBDiT, tokens: Tensor) -> Tensor:
    """Return the tokens ``(B, N, d)`` where they are read, ``(B, d)``."""
    return tokens[:, -1] if model.has_cell_token else tokens.mean(1)


def marker_genes(values: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return each type's markers, :data:`MARKERS` genes by scanpy's Wilcoxon ranking of the cells themselves.

    Parameters
    ----------
    values
        Cells ``(n, G)``, log-normalized.
    labels
        ``(n,)``; types of fewer than three cells have no markers.

    Returns
    -------
    The markers' columns by type; nothing where there are not two types.
    """
    try:
        import scanpy as sc
    except ImportError:
        raise need_extra("scanpy") from None
    names, sizes = np.unique(labels, return_counts=True)
    kept = np.isin(labels, names[sizes >= 3])
    if (sizes >= 3).sum() < 2:
        return {}
    obs = pd.DataFrame({"type": pd.Categorical(labels[kept])}, index=[str(i) for i in range(kept.sum())])
    cells = ad.AnnData(values[kept].astype(np.float32), obs=obs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fold changes, which are not taken
        sc.tl.rank_genes_groups(cells, "type", method="wilcoxon", n_genes=min(MARKERS, values.shape[1]))
    ranked = cells.uns["rank_genes_groups"]["names"]  # names are the columns' numbers
    return {name: ranked[name].astype(int) for name in cells.obs["type"].cat.categories}


def enrichment(
    units: Units, markers: dict[str, np.ndarray], labels: np.ndarray, spread: np.ndarray, seed: int = 0
) -> dict[str, list[Hit]]:
    """Find the unit of each kind that shares the most genes with each type's markers, and ask what chance would do.

    Chance permutes the genes among those that vary about as much, so that a unit which likes variable genes wins
    nothing, and takes the best of all units of the kind each time, so that having looked at hundreds wins nothing
    either. Genes that vary together are permuted apart, which makes chance look a little narrower than it is.

    Parameters
    ----------
    units
        From :func:`read_units`.
    markers
        From :func:`marker_genes`.
    labels
        Types of the cells that the units answered to ``(cells,)``.
    spread
        Standard deviation of each gene ``(G,)``.
    seed
        Of the permutations, :data:`PERMUTATIONS` of them.

    Returns
    -------
    For "head" and "atom" a hit for each type.
    """
    numbers, signs = units.ends()
    genes = units.loading.shape[1]
    ends = np.zeros((len(numbers), genes), np.float32)
    for end, (unit, sign) in zip(ends, zip(numbers, signs, strict=True), strict=True):
        end[units.top(unit, sign, MARKERS)] = 1
    wanted = np.zeros((genes, len(markers)), np.float32)
    for column, rows in enumerate(markers.values()):
        wanted[rows, column] = 1
    kinds = {kind: np.flatnonzero(units.kind[numbers] == kind) for kind in ("head", "atom")}
    shared = ends @ wanted
    best = {kind: shared[rows].max(0) for kind, rows in kinds.items()}
    reached = {kind: np.zeros(len(markers)) for kind in kinds}
    rng = np.random.default_rng(seed)
    bins = np.array_split(np.argsort(spread, kind="stable"), min(BINS, genes))
    for _ in range(PERMUTATIONS):
        order = np.empty(genes, int)
        for rows in bins:
            order[rows] = rng.permutation(rows)
        chance = ends @ wanted[order]
        for kind, rows in kinds.items():
            reached[kind] += chance[rows].max(0) >= best[kind]
    hits: dict[str, list[Hit]] = {}
    for kind, rows in kinds.items():
        hits[kind] = []
        for column, name in enumerate(markers):
            end = rows[shared[rows, column].argmax()]
            p = (1 + reached[kind][column]) / (1 + PERMUTATIONS)
            fires = firing_type(units, numbers[end], signs[end], labels)
            hits[kind].append(Hit(name, int(numbers[end]), int(signs[end]), int(shared[end, column]), float(p), fires))
    return hits


def type_means(units: Units, unit: int, labels: np.ndarray) -> dict[str, float]:
    """Return a unit's mean answer to the cells of each type."""
    return {str(name): float(units.activation[unit, labels == name].mean()) for name in np.unique(labels)}


def firing_type(units: Units, unit: int, sign: int, labels: np.ndarray) -> str:
    """Return the type whose cells move a unit farthest toward one end."""
    means = type_means(units, unit, labels)
    return max(means, key=lambda name: sign * means[name])
