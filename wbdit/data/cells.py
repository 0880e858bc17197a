"""Cells: their annotation in memory, and their matrices wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from pandas.api.types import union_categoricals

from wbdit.data.cell_matrix import CellMatrix, JoinedMatrix, MemoryMatrix
from wbdit.data.contents import Contents
from wbdit.data.expression import in_memory
from wbdit.data.stored_matrix import is_stored, stored_matrix
from wbdit.data.structure import check_matrices
from wbdit.errors import InputError

Open = Callable[[], CellMatrix]


class Cells:
    """Cells whose matrices are read by rows: those of an AnnData, or of several files.

    Parameters
    ----------
    obs, var, uns
        As those of an AnnData, in memory.
    matrices
        Functions that open the matrices, by name: "X", "raw.X" or "layers['counts']". X may be missing.
    raw_var
        Annotation of the genes of ``raw.X``.
    layers
        Names of the layers by the names of their matrices.
    sets
        The sets that these cells were joined from, with their names, if there are several.

    Attributes
    ----------
    names
        Names of the matrices.

    Examples
    --------
    >>> from wbdit.data.cells import Cells
    >>> same = Cells.of(cells)
    >>> same.n_obs, same.names, same.matrix("X").shape
    (700, ('X',), (700, 765))
    >>> same.select(np.array([5, 3])).obs["bulk_labels"].tolist() == cells.obs["bulk_labels"].iloc[[5, 3]].tolist()
    True
    """

    def __init__(
        self,
        obs: pd.DataFrame,
        var: pd.DataFrame,
        uns: Mapping[str, Any],
        matrices: Mapping[str, Open],
        raw_var: pd.DataFrame | None = None,
        layers: Mapping[str, str] | None = None,
        sets: Sequence[tuple[str, Cells]] = (),
    ) -> None:
        self.obs = obs
        self.var = var
        self.uns = uns
        self.raw_var = raw_var
        self.layers = dict(layers or {})
        self.sets = tuple(sets)
        self.names = tuple(matrices)
        self._open = dict(matrices)
        self._opened: dict[str, CellMatrix] = {}
        self._contents: dict[str, Contents] = {}

    @classmethod
    def of(cls, cells: ad.AnnData | Cells) -> Cells:
        """Return the cells of an AnnData, whose matrices may lie in a file."""
        if isinstance(cells, Cells):
            return cells
        return cls._of_anndata(cells)

    @classmethod
    def _of_anndata(cls, cells: Any) -> Cells:
        check_matrices(cells)
        whole = cells._adata_ref if cells.is_view and _has_stored(cells._adata_ref) else cells
        layers = {f"layers[{name!r}]": name for name in whole.layers if name is not None}
        matrices: dict[str, Open] = {} if whole.X is None else {"X": lambda: _opened(whole.X, "X")}
        matrices |= {name: partial(_layer, whole, name, key) for name, key in layers.items()}
        if whole.raw is not None:
            matrices["raw.X"] = lambda: _opened(whole.raw.X, "raw.X")
        raw_var = None if whole.raw is None else whole.raw.var
        found = cls(whole.obs, whole.var, whole.uns, matrices, raw_var, layers)
        if whole is cells:
            return found
        rows, columns = (np.arange(n)[at] for n, at in zip(whole.shape, (cells._oidx, cells._vidx), strict=True))
        genes = None if np.array_equal(columns, np.arange(whole.n_vars)) else columns  # to stay sorted is cheaper
        selected = found._with(cells.obs, lambda matrix, name: matrix.select(rows, None if name == "raw.X" else genes))
        selected.var = cells.var
        return selected

    @classmethod
    def joined(cls, sets: Sequence[Cells], names: Sequence[str]) -> tuple[Cells, str]:
        """Join cells with different gene panels: the genes that all have, in the order of the first.

        Parameters
        ----------
        sets
            The cells.
        names
            Their names, for messages.

        Returns
        -------
        The cells, and the end of a sentence that says what was left out.

        Raises
        ------
        InputError
            If they share no genes, or gene names are not unique.
        """
        genes, dropped = _shared_genes([cells.genes("X").index for cells in sets], names)
        raw_var, raw_genes = None, None
        shared = [name for name in sets[0].names if all(name in cells.names for cells in sets)]
        if "raw.X" in shared:
            raw_genes, _ = _shared_genes([cells.genes("raw.X").index for cells in sets], names)
            raw_var = sets[0].genes("raw.X").loc[raw_genes]

        def opened(name: str) -> CellMatrix:
            wanted = raw_genes if name == "raw.X" else genes
            found = []
            for cells in sets:
                columns = cells.genes(name).index.get_indexer(wanted)
                matrix = cells.matrix(name)
                whole = np.array_equal(columns, np.arange(matrix.shape[1]))
                found.append(matrix if whole else matrix.select(genes=columns))
            return JoinedMatrix(found)

        lost = sorted({name for cells in sets for name in cells.names} - set(shared))
        if lost:
            dropped.append(f"{' and '.join(lost)} {'is' if len(lost) == 1 else 'are'} not in all of them")
        matrices: dict[str, Open] = {name: partial(opened, name) for name in shared}
        layers = {name: key for name, key in sets[0].layers.items() if name in shared}
        obs, var = stack_tables([cells.obs for cells in sets]), sets[0].genes("X").loc[genes]
        joined = cls(obs, var, sets[0].uns, matrices, raw_var, layers, list(zip(names, sets, strict=True)))
        return joined, f"; left out: {', '.join(dropped)}" if dropped else ""

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return len(self.obs)

    @property
    def n_vars(self) -> int:
        """Number of genes of X."""
        return len(self.var)

    def matrix(self, name: str) -> CellMatrix:
        """Return a matrix; it is opened once."""
        if name not in self._opened:
            self._opened[name] = self._open[name]()
        return self._opened[name]

    def contents(self, name: str) -> Contents:
        """Return the contents of a matrix, which takes a pass the first time."""
        if name not in self._contents:
            self._contents[name] = Contents.of(self.matrix(name))
        return self._contents[name]

    def genes(self, name: str) -> pd.DataFrame:
        """Return the annotation of the genes of a matrix, with names as text."""
        var = self.raw_var if name == "raw.X" and self.raw_var is not None else self.var
        return var.set_axis(var.index.astype(str), axis=0)

    def select(self, rows: np.ndarray) -> Cells:
        """Return the cells at the given rows; nothing is copied but the annotation."""
        return self._with(self.obs.iloc[rows], lambda matrix, name: matrix.select(rows))

    def with_raw(self, X: Any, var: pd.DataFrame) -> Cells:
        """Return these cells with a stored matrix as ``raw.X``."""
        matrices = {**self._open, "raw.X": lambda: _opened(X, "raw.X")}
        return Cells(self.obs, self.var, self.uns, matrices, var, self.layers, self.sets)

    def _with(self, obs: pd.DataFrame, change: Callable[[CellMatrix, str], CellMatrix]) -> Cells:
        def opened(name: str) -> CellMatrix:
            return change(self.matrix(name), name)

        matrices: dict[str, Open] = {name: partial(opened, name) for name in self.names}
        return Cells(obs, self.var, self.uns, matrices, self.raw_var, self.layers, self.sets)


def _has_stored(adata: ad.AnnData) -> bool:
    return is_stored(adata.X) or any(is_stored(adata.layers[name]) for name in adata.layers if name is not None)


def _opened(X: Any, name: str) -> CellMatrix:
    return stored_matrix(X, name) if is_stored(X) else MemoryMatrix(in_memory(X))


def _layer(adata: Any, name: str, key: str) -> CellMatrix:
    return _opened(adata.layers[key], name)


def _shared_genes(panels: Sequence[pd.Index], names: Sequence[str]) -> tuple[pd.Index, list[str]]:
    """Return the genes of all panels, in the order of the first, and what each panel loses."""
    for panel, name in zip(panels, names, strict=True):
        if panel.has_duplicates:
            raise InputError(
                f"{name} has two genes named {panel[panel.duplicated()][0]!r}, so files cannot be joined by name: "
                "call adata.var_names_make_unique() and save it"
            )
    genes = panels[0]
    for panel, name in zip(panels[1:], names[1:], strict=True):
        kept = genes[genes.isin(panel)]
        if not len(kept):
            raise InputError(
                f"{names[0]} and {name} share no genes ({genes[0]!r}, {panel[0]!r}): var_names must be of one kind"
            )
        genes = kept
    lost = [(name, len(panel) - len(genes)) for panel, name in zip(panels, names, strict=True)]
    return genes, [f"{n} genes of {name}" for name, n in lost if n]


def stack_tables(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the columns that all tables have, with the rows of one table below those of another."""
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    columns = {}
    for name in shared:
        found = [table[name] for table in tables]
        if all(isinstance(column.dtype, pd.CategoricalDtype) for column in found):
            columns[name] = _categories(found)
        else:
            columns[name] = pd.concat(found, ignore_index=True)
    return pd.DataFrame(columns, index=pd.RangeIndex(sum(map(len, tables))))


def _categories(columns: Sequence[pd.Series]) -> pd.Categorical:
    if all(column.dtype == columns[0].dtype for column in columns):
        return pd.concat(columns, ignore_index=True).array
    used = [column.cat.remove_unused_categories().array for column in columns]
    return union_categoricals(used, ignore_order=True)
