"""Alignment of sets of cells to the same genes and the same expression space."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from wbdit.data import normalize
from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.data.expression import check_cells, check_labels, label_text
from wbdit.data.matrix import Expression, Source, find_expression
from wbdit.data.space import Space, describe
from wbdit.data.variable_genes import variable_genes as most_variable
from wbdit.errors import InputError
from wbdit.evaluation.match import gene_names


@dataclass(frozen=True)
class CellSet:
    """Cells of an aligned set.

    Attributes
    ----------
    values
        ``(cells, genes)`` CSR float64.
    labels, conditions, donors
        ``(cells,)`` of str, or None.
    totals
        ``(cells, 2)``: total counts and detected genes per cell over all shared genes. None if any set holds no counts.
    """

    values: sp.csr_matrix
    labels: np.ndarray | None
    totals: np.ndarray | None = None
    conditions: np.ndarray | None = None
    donors: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def take(self, rows: np.ndarray) -> CellSet:
        """Return the cells at ``rows``."""
        columns = self.labels, self.totals, self.conditions, self.donors
        return CellSet(self.values[rows], *(None if column is None else column[rows] for column in columns))


@dataclass(frozen=True)
class Aligned:
    """Sets of cells over the same ``genes`` in the same ``space``; ``notes`` list the steps of the alignment."""

    sets: dict[str, CellSet]
    genes: np.ndarray
    n_shared_genes: int
    space: Space
    notes: list[str]


def align(
    sets: dict[str, ad.AnnData],
    *,
    label: str | None,
    n_genes: int,
    source: Source | None = None,
    condition: str | None = None,
    donor: str | None = None,
) -> Aligned:
    """Align cells to shared, variable genes and one expression space.

    Parameters
    ----------
    sets
        Cells by name. ``"real"`` comes first; it determines the variable genes and the order of the genes.
    label
        Column of ``obs`` with the labels, or None.
    n_genes
        Number of most variable genes to keep, if more are shared.
    source
        The matrix of the real sets, if it is not to be found. Its `space` and `round_counts` apply to all sets.
    condition
        Column of ``obs`` with the conditions, in every set; or None.
    donor
        Column of ``obs`` with the donors of the real sets; or None. Synthetic cells may lack it.

    Raises
    ------
    InputError
        If cells are unusable, the label column is unknown or incomplete, fewer than two genes are shared, or only some
        sets are scaled.

    Examples
    --------
    >>> aligned = align({"real": cells[:50], "synthetic": cells[50:90]}, label="bulk_labels", n_genes=100)
    >>> aligned.sets["synthetic"].values.shape, aligned.n_shared_genes
    ((40, 100), 765)
    """
    for name, adata in sets.items():
        with _naming(name):
            check_cells(adata, label)
            for column in _columns(name, condition, donor):
                check_labels(adata, column)
    notes: list[str] = []
    source = source or Source()
    expressions: dict[str, Expression] = {}
    sentences: dict[str, list[str]] = {}
    for name, adata in sets.items():
        with _naming(name):
            own = replace(source, layer=None, use_raw=False) if name == "synthetic" else source
            expressions[name] = find_expression(adata, own)
        sentences.setdefault(expressions[name].found, []).append(name)
    names = gene_names({name: expression.var for name, expression in expressions.items()}, notes)
    genes = shared_genes(names, notes)
    spaces = {name: expression.space for name, expression in expressions.items()}
    matrices = {
        name: sp.csr_matrix(expression.X, dtype=np.float64)[:, names[name].get_indexer(genes)]
        for name, expression in expressions.items()
    }
    notes += [f"{', '.join(names)} cells: {found}" for found, names in sentences.items()]
    space = common_space(spaces, notes)
    totals = {name: totals_and_detected(matrix) if space == "counts" else None for name, matrix in matrices.items()}
    if space == "counts" or len(set(spaces.values())) > 1:
        matrices = {name: normalize.log_normalized(matrix, spaces[name]) for name, matrix in matrices.items()}
    n_shared = len(genes)
    if n_shared > n_genes:
        keep = variable_genes(matrices["real"], n_genes, space)
        genes = genes[keep]
        matrices = {name: matrix[:, keep] for name, matrix in matrices.items()}
        notes.append(f"the {len(genes)} most variable of {n_shared} shared genes are used, chosen on the real cells")
    if space == "counts":
        notes.append(f"total counts and detected genes are those of the {n_shared} shared genes")
    cells = {
        name: CellSet(
            matrices[name],
            _text(adata, label),
            totals[name],
            _text(adata, condition),
            _text(adata, donor if donor in adata.obs else None),
        )
        for name, adata in sets.items()
    }
    return Aligned(cells, genes, n_shared, space, notes)


def shared_genes(sets: dict[str, pd.Index], notes: list[str]) -> np.ndarray:
    """Return the genes of all sets, in the order of the real cells; note how many genes each set loses."""
    genes = sets["real"]
    for name, names in sets.items():
        shared = genes[genes.isin(names)]
        if len(shared) == 0:
            raise InputError(
                f"real and {name} cells share no genes (real: {genes[0]!r}, {name}: {names[0]!r}): "
                "their var_names must be the same kind of gene name"
            )
        genes = shared
    if len(genes) < 2:
        raise InputError(f"the cells share only one gene ({genes[0]!r}): a comparison needs at least two")
    lost = {name: len(names) - len(genes) for name, names in sets.items()}
    if any(lost.values()):
        parts = ", ".join(f"{n} of {len(sets[name])} {name}" for name, n in lost.items() if n)
        notes.append(f"{len(genes)} genes are shared; left out: {parts} genes")
    return genes.to_numpy()


def common_space(spaces: dict[str, Space], notes: list[str]) -> Space:
    """Return the common expression space; refuse a mixture of scaled and unscaled sets."""
    found = set(spaces.values())
    if len(found) == 1:
        space = next(iter(found))
        if space == "lognorm":
            notes.append("all cells are log-normalized already and are used as they are")
        if space == "scaled":
            notes.append("all cells are scaled and used unchanged: gene means and variances carry little information")
        return space
    if "scaled" in found:
        words = ", ".join(f"{name} is {describe(space)}" for name, space in spaces.items())
        raise InputError(f"scaled values cannot be compared with unscaled ones ({words}): give raw counts for all")
    notes.append(
        "counts are compared with log values: the log values are read as log1p and inverted, and all cells are "
        f"normalized to {normalize.TARGET_SUM:g} over the shared genes"
    )
    return "lognorm"


def totals_and_detected(counts: sp.csr_matrix) -> np.ndarray:
    """Return the total counts and the number of detected genes per cell, ``(cells, 2)``."""
    return np.column_stack([np.asarray(counts.sum(axis=1)).ravel(), np.asarray((counts > 0).sum(axis=1)).ravel()])


def variable_genes(values: sp.csr_matrix, n_genes: int, space: Space) -> np.ndarray:
    """Return the columns of the most variable genes, ascending: by dispersion, or by variance if scaled."""
    if space == "scaled":
        variance = values.power(2).mean(axis=0) - np.square(values.mean(axis=0))
        return np.sort(np.argsort(-np.asarray(variance).ravel(), kind="stable")[:n_genes])
    return np.flatnonzero(most_variable(MemoryMatrix(values), "lognorm", n_genes))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Prefix errors with the name of the set of cells."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name} cells: {error}") from None


def _columns(name: str, condition: str | None, donor: str | None) -> list[str]:
    """Return the columns that a set must have beside the labels."""
    wanted = [condition, None if name == "synthetic" else donor]
    return [column for column in wanted if column is not None]


def _text(adata: ad.AnnData, column: str | None) -> np.ndarray | None:
    return None if column is None else label_text(adata.obs[column]).to_numpy().astype(str)
