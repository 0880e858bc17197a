"""Cells from files and other sources: opened so that training reads them in pieces, or read into memory."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from wbdit._io import check_regular
from wbdit.data.capacity import fits, in_words
from wbdit.data.cell_matrix import as_rows
from wbdit.data.cells import Cells, stack_tables
from wbdit.data.compact_matrix import CompactMatrix
from wbdit.data.expression import in_memory, read_h5ad
from wbdit.data.structure import check_matrices
from wbdit.data.trial import try_h5ad
from wbdit.errors import InputError

CellSource: TypeAlias = ad.AnnData | Cells | str | Path | Iterable[Any]

logger = logging.getLogger("wbdit")


def open_cells(source: CellSource) -> Cells:
    """Open cells to be read in pieces.

    Parameters
    ----------
    source
        An AnnData, in memory or backed; the path of an ``.h5ad`` or ``.zarr`` file; a list of these, whose cells are
        joined; or any other iterable of AnnData with the same genes, which is iterated once and copied to the cache.
        A ``.zarr`` folder may be a collection of annbatch. Small files are read into memory.

    Raises
    ------
    InputError
        If a file cannot be read, or the sets do not fit together.

    Examples
    --------
    >>> from wbdit.data.files import open_cells
    >>> cells[:300].write_h5ad("a.h5ad")
    >>> cells[300:, 5:].copy().write_h5ad("b.h5ad")
    >>> joined = open_cells(["a.h5ad", "b.h5ad"])
    >>> joined.n_obs, joined.n_vars
    (700, 760)
    """
    if isinstance(source, (ad.AnnData, Cells)):
        return Cells.of(source)
    if isinstance(source, (str, Path)):
        return _open_file(Path(source))
    if isinstance(source, Sequence):
        return _join([(_name(one, i), open_cells(one)) for i, one in enumerate(source)])
    if isinstance(source, Iterable) and not isinstance(source, (np.ndarray, pd.DataFrame, Mapping)):
        return _copied(source)
    raise InputError(f"cells are an AnnData, a file, a list of these or an iterable, not {type(source).__name__}")


def read_cells(path: str | Path) -> ad.AnnData:
    """Read an ``.h5ad`` or ``.zarr`` file into memory.

    Raises
    ------
    InputError
        If the file is missing or cannot be read.

    Examples
    --------
    >>> from wbdit.data.files import read_cells
    >>> cells[:5].copy().write_h5ad("few.h5ad")
    >>> read_cells("few.h5ad").shape
    (5, 765)
    """
    if not Path(path).is_dir():
        return read_h5ad(path)
    with _reading(Path(path), ".zarr"):
        adata = ad.read_zarr(path)
        check_matrices(adata)
        return adata


def _name(source: Any, i: int) -> str:
    return str(source) if isinstance(source, (str, Path)) else f"set {i + 1}"


def _join(sets: Sequence[tuple[str, Cells]]) -> Cells:
    if not sets:
        raise InputError("no cells were given: name at least one file")
    if len(sets) == 1:
        return sets[0][1]
    joined, dropped = Cells.joined([cells for _, cells in sets], [name for name, _ in sets])
    logger.info(f"{len(sets)} sets of cells, {joined.n_obs} in all, share {joined.n_vars} genes{dropped}")
    return joined


def _open_file(path: Path) -> Cells:
    """Open one file, or the files of an annbatch collection."""
    if not path.is_dir():
        check_regular(path)
        with _reading(path, ".h5ad"):
            try_h5ad(path, whole=False)
            file = h5py.File(path, "r")
            large = not fits(_size(file))
        return _open_group(file, path) if large else Cells.of(read_h5ad(path, tried=True))
    with _reading(path, ".zarr"):
        import zarr

        group: Any = zarr.open_group(path, mode="r")
        parts = {name: group[name] for name in sorted(group.group_keys(), key=_number) if "obs" in group[name]}
        if "obs" in group:
            return _open_group(group, path) if not fits(_size(group)) else Cells.of(ad.read_zarr(path))
    if not parts:
        raise InputError(f"{path} holds no cells: it has neither obs nor, as an annbatch collection, parts with obs")
    return _join([(f"{path}/{name}", _open_group(part, path / name)) for name, part in parts.items()])


def _number(name: str) -> tuple[int, str]:
    """Return a key that sorts "dataset_10" after "dataset_9"."""
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1, name


def _open_group(group: Any, path: Path) -> Cells:
    """Open the matrices of an AnnData in HDF5 or zarr, and read its annotation."""
    with _reading(path, path.suffix):
        matrices = _matrices(group)
        adata = ad.AnnData(
            X=matrices.get(("X",)),
            obs=ad.io.read_elem(group["obs"]),
            var=ad.io.read_elem(group["var"]),
            uns=ad.io.read_elem(group["uns"]) if "uns" in group else {},
            layers={place[1]: X for place, X in matrices.items() if place[0] == "layers"},
        )
        cells = Cells.of(adata)
        if ("raw", "X") in matrices:
            cells = cells.with_raw(matrices["raw", "X"], ad.io.read_elem(group["raw"]["var"]))
    logger.info(f"{path} is read in pieces: {adata.n_obs} cells, {in_words(_size(group))} if read as a whole")
    return cells


def _matrices(group: Any) -> dict[tuple[str, ...], Any]:
    """Return the matrices of an AnnData in HDF5 or zarr by their places: ("X",), ("raw", "X"), ("layers", "counts")."""
    places: list[tuple[str, ...]] = [("X",)] if "X" in group else []
    for above in ("raw", "layers"):
        if above in group and hasattr(group[above], "keys"):  # a missing raw may be stored as an empty array
            places += [(above, name) for name in group[above] if above == "layers" or name == "X"]
    found: dict[tuple[str, ...], Any] = {}
    for place in places:
        stored = group["/".join(place)]
        found[place] = ad.io.sparse_dataset(stored) if hasattr(stored, "keys") else stored
    return found


def _size(group: Any) -> int:
    """Return the bytes that the matrices of an AnnData in HDF5 or zarr take in memory."""
    parts = []
    for X in _matrices(group).values():
        parts += [X.group[name] for name in ("data", "indices", "indptr")] if hasattr(X, "group") else [X]
    return sum(int(np.prod(part.shape, dtype=object)) * part.dtype.itemsize for part in parts)


class _reading:
    """Turn any error of a library that reads a file into one line."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind
        self.warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        self.warnings.__enter__()
        warnings.simplefilter("ignore")  # check_cells reports the ones that matter in one line

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.warnings.__exit__(kind, error, trace)
        if isinstance(error, ImportError):
            raise InputError(f"reading {self.path} needs zarr: pip install zarr") from error
        if isinstance(error, InputError):
            raise InputError(f"cannot use {self.path}: {error}") from error
        if isinstance(error, Exception):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"cannot read {self.path} as {self.kind} ({reason}); is it complete?") from error


def _copied(pieces: Iterable[Any]) -> Cells:
    """Copy the pieces of an iterable to the cache."""
    read = map(_piece, itertools.count(), pieces)
    first = next(read, None)
    if first is None:
        raise InputError("the iterable of cells is empty")
    var, tables = first[2], []

    def rows() -> Iterator[sp.csr_matrix]:
        for i, (X, obs, own) in enumerate(itertools.chain([first], read)):
            columns = own.index.get_indexer(var.index) if own.index.is_unique else np.array([-1])
            if (columns < 0).any():
                raise InputError(f"piece {i} of the cells lacks genes of the first, or has duplicate gene names")
            tables.append(obs)
            yield as_rows(X if own.index.equals(var.index) else X[:, columns])

    matrix = CompactMatrix.collect(rows(), len(var), expected=None)
    return Cells(stack_tables(tables), var, {}, {"X": lambda: matrix})


def _piece(i: int, piece: Any) -> tuple[Any, pd.DataFrame, pd.DataFrame]:
    """Return X, obs and var of an AnnData, or of a batch of annbatch's Loader."""
    if isinstance(piece, Mapping):
        X, obs, var = (piece.get(name) for name in ("X", "obs", "var"))
    else:
        X, obs, var = (getattr(piece, name, None) for name in ("X", "obs", "var"))
    if X is None or not isinstance(obs, pd.DataFrame) or not isinstance(var, pd.DataFrame):
        raise InputError(f"piece {i} of the cells is {type(piece).__name__}, not an AnnData with X, obs and var")
    return in_memory(X), obs, var.set_axis(var.index.astype(str), axis=0)
