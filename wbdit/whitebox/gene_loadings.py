"""Gene loadings of heads and dictionary atoms, and their overlap with the marker genes of cell types.

A *unit* is an axis of a head's subspace or an atom of a block's dictionary. Its activation is read at the cell token,
or at the mean of the patch tokens in a model without one. A gene's loading is the change of the activation per standard
deviation of the gene. Loadings follow the direct path from the embedding to the block. They leave out the contributions
that reach a deeper block through earlier blocks.
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
from wbdit.nn.activations import axes_of, iterate_blocks, projections, site
from wbdit.nn.heads import gene_embedding
from wbdit.nn.wbdit import WBDiT, WhiteBoxBlock

MARKERS = 50  # marker genes per type, and top genes per end of a unit
BINS = 20  # bins of genes with similar standard deviation; permutations stay within a bin
PERMUTATIONS = 999


class Units(NamedTuple):
    """The U units of a network: axes of heads, and atoms.

    Attributes
    ----------
    kind
        "head" or "atom", ``(U,)``.
    block, number, axis
        Indices from 0: the block, the head or atom in it, and the axis of a head (0 for atoms), ``(U,)`` int64.
    activation
        Activation of each unit by each cell, fp32 ``(U, cells)``; never negative for an atom.
    loading
        Change of the activation per standard deviation of each gene, fp32 ``(U, G)``.
    """

    kind: np.ndarray
    block: np.ndarray
    number: np.ndarray
    axis: np.ndarray
    activation: np.ndarray
    loading: np.ndarray

    def name(self, unit: int) -> str:
        """Return a unit's name, counted from 1: ``"block 1, head 2, axis 1"``."""
        axis = f", axis {self.axis[unit] + 1}" if self.kind[unit] == "head" else ""
        return f"block {self.block[unit] + 1}, {self.kind[unit]} {self.number[unit] + 1}{axis}"

    def first_axes(self) -> list[int]:
        """Return the unit of each head's first principal axis."""
        return [int(unit) for unit in np.flatnonzero((self.kind == "head") & (self.axis == 0))]

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of all units: their units ``(E,)`` and their signs 1 or -1 ``(E,)``.

        An axis has a positive and a negative end. An atom has only a positive one, as its activation is never negative.
        """
        heads = np.flatnonzero(self.kind == "head")
        units = np.concatenate([np.arange(len(self.kind)), heads])
        return units, np.concatenate([np.ones(len(self.kind), int), -np.ones(len(heads), int)])

    def top(self, unit: int, sign: int, count: int) -> np.ndarray:
        """Return the genes with the largest loadings in the direction ``sign``, largest first, ``(count,)`` int64."""
        return np.argsort(-sign * self.loading[unit], kind="stable")[:count]


class Hit(NamedTuple):
    """The best match of a cell type: the end of a unit that shares the most genes with the type's markers.

    Attributes
    ----------
    type
        The cell type.
    unit, sign
        The unit and its end, 1 or -1.
    shared
        Number of genes that the end's top :data:`MARKERS` genes share with the type's :data:`MARKERS` markers.
    p
        p-value of ``shared``, see :func:`enrichment`.
    fires
        The cell type with the strongest mean activation in this direction.
    """

    type: str
    unit: int
    sign: int
    shared: int
    p: float
    fires: str


@torch.no_grad()
def read_units(model: WBDiT, x: Tensor, t: Tensor, conditioning: Tensor | None, spread: Tensor) -> Units:
    """Return the units of all blocks, with their activations by cells and their gene loadings.

    Parameters
    ----------
    model, x, t, conditioning
        The denoiser and its inputs, see :class:`wbdit.WBDiT`.
    spread
        Standard deviation of each gene's value ``(G,)``.

    Examples
    --------
    >>> from wbdit.whitebox.gene_loadings import read_units
    >>> model = wbdit.WBDiT(input_size=24, patch_size=4, hidden_size=16, num_heads=2)
    >>> units = read_units(model, torch.randn(9, 1, 24), torch.full((9,), 500), None, torch.ones(24))
    >>> units.activation.shape, units.loading.shape  # 2 heads x 3 axes + 16 atoms; by cells, by genes
    ((22, 9), (22, 24))
    >>> units.name(0), units.name(21)
    ('block 1, head 1, axis 1', 'block 1, atom 16')
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
        head_axes = _head_axes(block, site(model, seen.before), genes * scale1)
        kinds += ["head"] * len(head_axes[0])
        places += [(number, *divmod(i, len(head_axes[0]) // block.attn.num_heads)) for i in range(len(head_axes[0]))]
        atoms = site(model, seen.code).T, _atom_loadings(block, genes * scale2)
        kinds += ["atom"] * len(atoms[0])
        places += [(number, i, 0) for i in range(len(atoms[0]))]
        activations += [head_axes[0], atoms[0]]
        loadings += [head_axes[1], atoms[1]]
    block_of, number_of, axis_of = np.array(places).T
    activation, loading = (torch.cat(parts).float().cpu().numpy() for parts in (activations, loadings))
    return Units(np.array(kinds), block_of, number_of, axis_of, activation, loading)


def _head_axes(block: WhiteBoxBlock, z: Tensor, genes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the heads' principal axes: activations ``(h AXES, B)`` by tokens ``(B, d)``, loadings ``(h AXES, G)``."""
    w, axes = axes_of(block, z)
    return (axes @ w.mT).flatten(0, 1), (axes @ projections(block) @ genes.T).flatten(0, 1)


def _atom_loadings(block: WhiteBoxBlock, genes: Tensor) -> Tensor:
    """Return the contributions of genes ``(G, d)`` to each atom before the threshold, ``(atoms, G)``."""
    return (genes + block.mlp.eta * (genes @ block.mlp.folded().float())).T


def marker_genes(values: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the marker genes of each cell type: the first :data:`MARKERS` genes of scanpy's Wilcoxon ranking.

    Parameters
    ----------
    values
        Log-normalized expression ``(n, G)``.
    labels
        Cell types ``(n,)``. Types with fewer than three cells are left out.

    Returns
    -------
    Columns of the marker genes by type, the best marker first; empty with fewer than two types.

    Raises
    ------
    InputError
        If scanpy is not installed.

    Examples
    --------
    The first ten genes are higher in type "a":

    >>> from wbdit.whitebox.gene_loadings import marker_genes
    >>> values = np.random.default_rng(0).normal(size=(20, 60))
    >>> values[:10, :10] += 3
    >>> markers = marker_genes(values, np.repeat(["a", "b"], 10))
    >>> sorted(markers["a"][:10].tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
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
        warnings.simplefilter("ignore")  # about fold changes, which are not used
        sc.tl.rank_genes_groups(cells, "type", method="wilcoxon", n_genes=min(MARKERS, values.shape[1]))
    ranked = cells.uns["rank_genes_groups"]["names"]  # var_names are column numbers
    return {name: ranked[name].astype(int) for name in cells.obs["type"].cat.categories}


def enrichment(
    units: Units, markers: dict[str, np.ndarray], labels: np.ndarray, spread: np.ndarray, seed: int = 0
) -> dict[str, list[Hit]]:
    """Return the best match of each cell type among heads and among atoms, with a p-value by permutation.

    A permutation shuffles the genes within bins of similar standard deviation, so a unit gains nothing by loading
    variable genes. It then takes the best of all units of the kind, which corrects for the number of units. The
    p-value is ``(1 + k) / (1 + PERMUTATIONS)``, where k permutations share at least as many genes. Permutations break
    the correlation between genes: the null distribution is slightly too narrow, and p slightly too small.

    Parameters
    ----------
    units
        From :func:`read_units`.
    markers
        From :func:`marker_genes`.
    labels
        Types of the cells that activated the units, ``(cells,)``.
    spread
        Standard deviation of each gene ``(G,)``.
    seed
        Seed of the :data:`PERMUTATIONS` permutations.

    Returns
    -------
    One :class:`Hit` per type, under "head" and under "atom".

    Examples
    --------
    >>> from wbdit.whitebox.gene_loadings import enrichment, read_units
    >>> model = wbdit.WBDiT(input_size=96, patch_size=4, hidden_size=16, num_heads=2)
    >>> units = read_units(model, torch.randn(4, 1, 96), torch.full((4,), 500), None, torch.ones(96))
    >>> markers = {"B": np.arange(50), "T": np.arange(46, 96)}
    >>> hits = enrichment(units, markers, np.array(["B", "B", "T", "T"]), np.ones(96))
    >>> [(hit.type, hit.p > 0.001) for hit in hits["head"]]  # random weights match no type
    [('B', True), ('T', True)]
    """
    numbers, signs = units.ends()
    top = np.zeros((1, len(numbers), units.loading.shape[1]), np.float32)
    for end, (unit, sign) in enumerate(zip(numbers, signs, strict=True)):
        top[0, end, units.top(unit, sign, MARKERS)] = 1
    kinds = {kind: np.flatnonzero(units.kind[numbers] == kind) for kind in ("head", "atom")}
    found = overlaps({kind: top[:, rows] for kind, rows in kinds.items()}, markers, spread, seed)
    hits: dict[str, list[Hit]] = {}
    for kind, rows in kinds.items():
        hits[kind] = []
        for match in found[kind]:
            unit, sign = int(numbers[rows[match.end]]), int(signs[rows[match.end]])
            hits[kind].append(
                Hit(match.type, unit, sign, match.shared, match.p, firing_type(units, unit, sign, labels))
            )
    return hits


class Match(NamedTuple):
    """The one of several sets of genes that shares the most with a type's markers, how many, and its p-value."""

    type: str
    end: int
    shared: int
    p: float


def overlaps(
    sets: dict[str, np.ndarray], markers: dict[str, np.ndarray], spread: np.ndarray, seed: int
) -> dict[str, list[Match]]:
    """Return the best match of each type among sets of genes, with p-values as in :func:`enrichment`.

    Parameters
    ----------
    sets
        By kind, 1 for the genes of each of E sets: fp32 ``(1, E, G)``, or ``(types, E, G)`` if each type has its own.
    markers, spread, seed
        As in :func:`enrichment`.

    Examples
    --------
    >>> from wbdit.whitebox.gene_loadings import overlaps
    >>> sets = np.zeros((1, 2, 96), np.float32)
    >>> sets[0, 1, :40] = 1
    >>> spread = np.random.default_rng(0).random(96)
    >>> found = overlaps({"head": sets}, {"B": np.arange(50)}, spread, seed=0)
    >>> found["head"]
    [Match(type='B', end=1, shared=40, p=0.001)]
    """
    genes = len(spread)
    wanted = np.zeros((len(markers), genes), np.float32)
    for row, some in enumerate(markers.values()):
        wanted[row, some] = 1
    shared = {kind: _shared(some, wanted) for kind, some in sets.items()}
    reached = {kind: np.zeros(len(markers)) for kind in sets}
    rng = np.random.default_rng(seed)
    bins = np.array_split(np.argsort(spread, kind="stable"), min(BINS, genes))
    for _ in range(PERMUTATIONS):
        order = np.empty(genes, int)
        for rows in bins:
            order[rows] = rng.permutation(rows)
        for kind, some in sets.items():
            reached[kind] += _shared(some, wanted[:, order]).max(1) >= shared[kind].max(1)
    return {
        kind: [
            Match(name, int(counts.argmax()), int(counts.max()), float((1 + above) / (1 + PERMUTATIONS)))
            for name, counts, above in zip(markers, shared[kind], reached[kind], strict=True)
        ]
        for kind in sets
    }


def _shared(sets: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the number of genes that each set shares with each type's markers ``(types, G)``: ``(types, E)``."""
    return wanted @ sets[0].T if len(sets) == 1 else (sets @ wanted[..., None])[..., 0]


def type_means(units: Units, unit: int, labels: np.ndarray) -> dict[str, float]:
    """Return a unit's mean activation by the cells of each type, see :class:`Units`.

    Examples
    --------
    >>> from wbdit.whitebox.gene_loadings import Units, type_means
    >>> activation = np.array([[3.0, 5.0, -1.0]])
    >>> units = Units(np.array(["head"]), *np.zeros((3, 1), int), activation, np.zeros((1, 9)))
    >>> type_means(units, 0, np.array(["B", "B", "T"]))
    {'B': 4.0, 'T': -1.0}
    """
    return {str(name): float(units.activation[unit, labels == name].mean()) for name in np.unique(labels)}


def firing_type(units: Units, unit: int, sign: int, labels: np.ndarray) -> str:
    """Return the cell type with the strongest mean activation of a unit in the direction ``sign`` (1 or -1).

    Examples
    --------
    >>> from wbdit.whitebox.gene_loadings import Units, firing_type
    >>> activation = np.array([[3.0, 5.0, -1.0]])
    >>> units = Units(np.array(["head"]), *np.zeros((3, 1), int), activation, np.zeros((1, 9)))
    >>> firing_type(units, 0, -1, np.array(["B", "B", "T"]))
    'T'
    """
    means = type_means(units, unit, labels)
    return max(means, key=lambda name: sign * means[name])
