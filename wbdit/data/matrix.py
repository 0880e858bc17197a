"""The matrix to use: X, ``raw.X`` or a layer, and its expression space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from wbdit.data.cell_matrix import CellMatrix, MemoryMatrix, RoundedMatrix, parts
from wbdit.data.cells import Cells
from wbdit.data.contents import Contents, sampled_cells
from wbdit.data.expression import is_text
from wbdit.data.space import FEWEST, SPACES, Reading, Space, describe, read_values
from wbdit.errors import InputError

# parts of a cell's molecules (velocyto, scVelo): never all of its counts if another matrix holds counts
VELOCITY_LAYERS = ("spliced", "unspliced", "ambiguous", "spanning", "mature", "nascent")


@dataclass(frozen=True)
class Source:
    """The user's choice of the matrix to use; nothing is chosen by default.

    Attributes
    ----------
    layer
        Name of a layer, or "X" for X.
    use_raw
        Use ``raw.X`` and the genes of ``raw``.
    space
        Expression space of the matrix, where its values do not tell.
    round_counts
        Round counts that are not integers.
    """

    layer: str | None = None
    use_raw: bool = False
    space: Space | None = None
    round_counts: bool = False

    def __post_init__(self) -> None:
        if self.layer is not None and self.use_raw:
            raise InputError("give either `layer` or `use_raw`, not both")
        if self.space is not None and self.space not in SPACES:
            raise InputError(f"unknown `space` {self.space!r}: choose one of {', '.join(SPACES)}")
        if self.round_counts and self.space not in (None, "counts"):
            raise InputError(f"`round_counts` gives counts, so leave out `space={self.space!r}`")

    @property
    def name(self) -> str | None:
        """Name of the chosen matrix, as in messages; None if none is chosen."""
        if self.use_raw:
            return "raw.X"
        return self.layer and ("X" if self.layer == "X" else f"layers[{self.layer!r}]")


@dataclass(frozen=True)
class Expression:
    """The matrix to use.

    Attributes
    ----------
    matrix
        Cells by genes, to be read by rows.
    space
        Its expression space.
    var
        Annotation of its genes; the index holds their names.
    name
        "X", "raw.X" or "layers['counts']".
    source
        The choice that gives this matrix.
    found
        A sentence that says what was found and chosen.
    """

    matrix: CellMatrix
    space: Space
    var: pd.DataFrame
    name: str
    source: Source
    found: str

    @property
    def X(self) -> Any:
        """All cells ``(cells, genes)`` in memory: CSR or a dense array."""
        if isinstance(self.matrix, MemoryMatrix):
            return self.matrix.X
        return self.matrix.read(np.arange(self.matrix.shape[0]))


def find_expression(adata: ad.AnnData | Cells, source: Source | None = None) -> Expression:
    """Find the matrix to use, and its expression space.

    Counts in X are used. If X holds other values, counts are looked for in ``raw.X`` and all layers. A single matrix of
    counts is used; of equal ones, the one with the genes of X. Layers of RNA velocity count only if there is no other.
    Without counts anywhere, X is used. Where this leaves two readings, the error names the arguments that choose.

    Parameters
    ----------
    adata
        Cells by genes, in memory or in a file. Each matrix is read at most once to find what it holds.
    source
        The user's choice, if any.

    Raises
    ------
    InputError
        If there is more than one reading, the values cannot be used (:mod:`wbdit.data.space`), or genes have duplicate
        or empty names.

    Examples
    --------
    >>> from wbdit.data.matrix import Source, find_expression
    >>> expression = find_expression(cells)
    >>> expression.X.shape, expression.space, expression.found
    ((700, 765), 'counts', 'X is raw counts')
    >>> find_expression(cells, Source(layer="counts"))
    Traceback (most recent call last):
    wbdit.errors.InputError: there is no layer 'counts'; the layers are: none (`layer="X"` is X)
    """
    source, matrices = source or Source(), _Matrices(Cells.of(adata))
    name, note = (source.name, "") if source.name is not None else _choose(matrices, source)
    matrix, space, rounded = _settle(name, matrices, source)
    found = f"{name} is {describe(space)}{rounded}{note}"
    if name != "X" and source.name is None:
        what = f"using the {describe(space)} in {name}{matrices.genes_note(name)}{rounded}"
        found = f"X {_what(matrices.reading('X'))}; {what}"
    var = matrices.var(name)
    check_gene_names(var.index)
    return Expression(matrix, space, var, name, replace(source, **matrices.choice(name)), found)


def find_again(adata: ad.AnnData | Cells, source: Source, space: Space) -> Expression:
    """Find the matrix of a run in other cells: the same one if it is there, else one in the run's space.

    Parameters
    ----------
    adata
        Cells by genes.
    source
        How the run's training cells were read.
    space
        The run's expression space.

    Raises
    ------
    InputError
        If no matrix or more than one is in this space, or as :func:`find_expression`.

    Examples
    --------
    >>> from wbdit.data.matrix import Source, find_again
    >>> find_again(cells, Source(use_raw=True), "counts").name
    'X'
    """
    if space == "lognorm" and adata.n_obs < FEWEST:  # too few values to recognize them by
        source = replace(source, space=space)
    cells = Cells.of(adata)
    matrices = _Matrices(cells)
    for name in (source.name, "X"):
        if name in matrices.present and matrices.space(name, source) == space:
            return find_expression(cells, replace(source, **matrices.choice(name)))
    names = matrices.different([name for name in matrices.others if matrices.reading(name).space == space])
    if len(names) == 1:
        return find_expression(cells, Source(**matrices.choice(names[0])))
    if names:
        raise InputError(f"the run was trained on {space}, and here {_and(names)} {space}: put the right ones into X")
    x = matrices.reading("X")
    raise InputError(f"the run was trained on {space}, these cells hold {x.space or 'other values: X ' + x.problem}")


def check_gene_names(names: pd.Index) -> None:
    """Check that gene names are text, not empty, and differ.

    Raises
    ------
    InputError
        If they do not.
    """
    duplicated = names[names.duplicated()]
    if len(duplicated):
        raise InputError(
            f"duplicate gene names ({duplicated[0]!r} and {len(duplicated) - 1} more): "
            "call adata.var_names_make_unique(), before adata.raw is set"
        )
    broken = [name for name in names if not is_text(name)]
    if broken:
        raise InputError(f"the gene name {broken[0]!a} holds characters that a file cannot hold: rename it")
    empty = np.flatnonzero(names.str.strip() == "")
    if len(empty):
        raise InputError(f"gene {empty[0]} of var_names has an empty name: name it or drop it")


class _Matrices:
    """The matrices of cells by name, and what they hold."""

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        self.layers = cells.layers

    @property
    def others(self) -> list[str]:
        """All matrices but X; the layers first, as they have the genes of X."""
        return [*self.layers, *(["raw.X"] if "raw.X" in self.cells.names else [])]

    @property
    def present(self) -> list[str]:
        """All matrices."""
        return list(self.cells.names)

    def choice(self, name: str) -> dict[str, Any]:
        """Return the arguments that choose a matrix."""
        return {"layer": None if name == "raw.X" else self.layers.get(name, "X"), "use_raw": name == "raw.X"}

    def flag(self, name: str) -> str:
        """Return the argument that chooses a matrix, for a message."""
        return "`use_raw=True`" if name == "raw.X" else f'`layer="{self.layers.get(name, "X")}"`'

    def choices(self, names: list[str]) -> str:
        """Return how to choose one of several matrices."""
        return f"choose with {' or '.join(map(self.flag, names))}"

    def __getitem__(self, name: str) -> CellMatrix:
        """Return the matrix; raise an InputError if there is none."""
        if name == "X" and "X" in self.layers.values():
            raise InputError('a layer is called "X": rename it, as `layer="X"` chooses X itself')
        if name not in self.cells.names:
            if name == "X":
                raise InputError("there is no X matrix: put the counts into adata.X, or choose a layer with `layer`")
            if name == "raw.X":
                raise InputError("these cells have no raw, so leave out `use_raw=True`")
            known = ", ".join(map(str, self.layers.values())) or "none"
            raise InputError(f'there is no layer {name[7:-1]}; the layers are: {known} (`layer="X"` is X)')
        return self.cells.matrix(name)

    def contents(self, name: str) -> Contents:
        """Return what a pass over the matrix finds."""
        self[name]
        return self.cells.contents(name)

    def reading(self, name: str) -> Reading:
        """Return what the matrix holds."""
        if name == "X" and "X" not in self.cells.names:
            return Reading(None, "is missing")
        if mixed := self._mixed(name):
            return Reading(None, mixed)
        reading = read_values(self.contents(name))
        made = self.cells.uns.get("wbdit") if name == "X" else None
        if isinstance(made, Mapping) and reading.may_be_log and made.get("trained_on") == "lognorm":
            return Reading("lognorm")  # generated log values lack the structure of counts, but say what they are
        return reading

    def may_be_counts(self, name: str) -> bool:
        """Return whether a few cells hold only integers, which spares a pass over most other matrices."""
        matrix = self[name]
        some = Contents.of(matrix.select(cells=sampled_cells(matrix.shape[0])))
        return some.holds_numbers and not some.fractional

    def _mixed(self, name: str) -> str:
        """Return how the sets that were joined differ in what they hold, from a few cells of each; else nothing."""
        spaces: dict[str, str] = {}
        for of, cells in self.cells.sets:
            matrix = cells.matrix(name)
            space = read_values(Contents.of(matrix.select(cells=sampled_cells(matrix.shape[0])))).space
            spaces.setdefault(describe(space) if space else "other values", of)
        if len(spaces) < 2:
            return ""
        held = " and ".join(f"{what} in {of}" for what, of in spaces.items())
        return f"holds {held}: give files of one kind"

    def space(self, name: str, source: Source) -> Space | None:
        """Return the space of the matrix if it is read as a run's source says; None if it cannot be."""
        try:
            return _settle(name, self, source)[1]
        except InputError:
            return None

    def var(self, name: str) -> pd.DataFrame:
        """Annotation of the matrix's genes."""
        return self.cells.genes(name)

    def genes_note(self, name: str) -> str:
        """Return " with its 20000 genes (X has 2000)" if the genes are not those of X."""
        own, of_x = len(self.var(name)), self.cells.n_vars
        return f" with its {own} genes (X has {of_x})" if own != of_x else ""

    def equal(self, a: str, b: str) -> bool:
        """Return whether two matrices are equal on the genes of X; a pass over both ends at the first difference."""
        both = []
        for name in (a, b):
            matrix, names, of_x = self[name], self.var(name).index, self.cells.genes("X").index
            if name == "raw.X" and not names.equals(of_x):
                columns = names.get_indexer(of_x) if names.is_unique else np.array([-1])
                if (columns < 0).any():
                    return False
                matrix = matrix.select(genes=columns)
            both.append(matrix)
        one, other = both
        if one.shape != other.shape:
            return False
        rows = (np.arange(part.start, part.stop) for part in parts(one.shape))
        return all((sp.csr_matrix(one.read(some)) != sp.csr_matrix(other.read(some))).nnz == 0 for some in rows)

    def different(self, names: list[str]) -> list[str]:
        """Return the matrices without those that equal an earlier one."""
        kept: list[str] = []
        for name in names:
            if not any(self.equal(name, other) for other in kept):
                kept.append(name)
        return kept


def _choose(matrices: _Matrices, source: Source) -> tuple[str, str]:
    """Return the name of the matrix to use, and what else to say of it."""
    x = matrices.reading("X")
    rounding = source.round_counts and x.may_be_counts
    if source.space in ("lognorm", "scaled") or rounding:
        return "X", ""
    counts = _counts(matrices)
    if x.space == "counts":
        others = [name for name in counts if not matrices.equal("X", name)]
        if matrices.contents("X").highest > 1:
            return "X", f"; other counts are in {' and '.join(others)}" if others else ""
        if others:  # zeros and ones may tell detection
            raise InputError(
                f"X holds only zeros and ones; other counts are in {' and '.join(others)}: "
                f"{matrices.choices(['X', *others])}"
            )
        return "X", ", all of them 0 or 1"
    if len(counts) > 1:
        raise InputError(
            f"X {_what(x)}; {' and '.join(counts)} hold different counts: {matrices.choices([*counts, 'X'])}"
        )
    if counts and x.may_be_counts:
        rounded = f"{matrices.flag('X')} and `round_counts=True`"
        raise InputError(
            f"X {_what(x)}, and {counts[0]} holds raw counts: choose with {matrices.flag(counts[0])}, or {rounded}"
        )
    if counts:
        return counts[0], ""
    if x.space != "lognorm":
        logs = [name for name in matrices.others if matrices.reading(name).space == "lognorm"]
        if logs and x.space == "scaled":
            raise InputError(f"X is scaled, {_and(logs)} log-normalized: {matrices.choices([*logs, 'X'])}")
        if logs:
            raise InputError(f"X {x.problem}; {_and(logs)} log-normalized: {matrices.choices(logs)}")
    return "X", ""


def _counts(matrices: _Matrices) -> list[str]:
    """Return the names of the different matrices of counts beside X; velocity layers only if there are no others."""
    found = [
        name for name in matrices.others if matrices.may_be_counts(name) and matrices.reading(name).space == "counts"
    ]
    whole = [name for name in found if matrices.layers.get(name) not in VELOCITY_LAYERS]
    return matrices.different(whole or found)


def _settle(name: str, matrices: _Matrices, source: Source) -> tuple[CellMatrix, Space, str]:
    """Return the matrix, its space, and ", rounded ..." if it was rounded."""
    X, reading = matrices[name], matrices.reading(name)
    space = reading.space
    if source.round_counts and reading.may_be_counts:
        contents, rounded = matrices.contents(name), RoundedMatrix(X)
        changed = contents.fractional / contents.stored
        settled = read_values(Contents.of(rounded))
        if settled.space == "counts" or settled.may_be_counts:
            return rounded, "counts", f", rounded to integers ({100 * changed:.0f} % of the values were not)"
        raise InputError(f"rounded, {name} {settled.problem}")
    wanted = "counts" if source.round_counts else source.space
    if wanted is not None and space != wanted:
        may = wanted == "scaled" and (space is not None or reading.problem.startswith("holds negative values"))
        if may or (wanted == "lognorm" and reading.may_be_log):
            return X, wanted, ""
        raise InputError(f"{name} {_what(reading)}, so it cannot be used as {describe(wanted)}")
    if space is None:
        raise InputError(f"{name} {reading.problem}")
    return X, space, ""


def _what(reading: Reading) -> str:
    """Return what a matrix holds, as a predicate."""
    return f"is {describe(reading.space)}" if reading.space is not None else reading.problem.split(":")[0].split(";")[0]


def _and(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{' and '.join(names)} are"
