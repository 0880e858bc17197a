"""Files of cells that are written and read by rows: ``.h5ad`` and ``.zarr``, without all cells in memory.

A file has the elements and encodings that ``AnnData.write_h5ad`` and ``write_zarr`` give it. Its bytes depend on the
cells alone, not on the portions in which they arrive: rows are regrouped, and arrays grow by whole HDF5 chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from wbdit._io import disk_error, hdf5_file, sync
from wbdit.errors import InputError

GROUP = 4096  # rows that are handled at a time
CHUNK = 2**16  # elements per chunk of an array on disk
BUFFER = 16 * CHUNK  # elements that an array grows by
FORMATS = (".h5ad", ".zarr")


class Rows(NamedTuple):
    """Consecutive cells: `X` and `layers`, CSR or dense, and `obs`."""

    X: Any
    layers: dict[str, Any]
    obs: pd.DataFrame

    @classmethod
    def of(cls, cells: ad.AnnData) -> Rows:
        """Return all cells of an AnnData."""
        return cls(cells.X, dict(cells.layers), cells.obs)

    def slice(self, first: int, last: int) -> Rows:
        """Return some of the rows."""
        layers = {name: layer[first:last] for name, layer in self.layers.items()}
        return Rows(self.X[first:last], layers, self.obs.iloc[first:last])


def check_format(path: Path) -> None:
    """Raise an InputError if the name does not end in one of :data:`FORMATS`, or zarr is not installed.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit.cell_files import check_format
    >>> check_format(Path("cells.h5ad"))
    """
    if path.suffix not in FORMATS:
        raise InputError(f"cannot write {path}: the name must end in {' or '.join(FORMATS)}")
    if path.suffix == ".zarr":
        _zarr()


def write_rows(path: Path, rows: Iterable[Rows], var: pd.DataFrame, uns: dict[str, Any]) -> None:
    """Write cells to a new file; it is on the disk when the function returns.

    Parameters
    ----------
    path
        A path that ends in ``.h5ad`` or ``.zarr``; what is there is replaced.
    rows
        The cells, in portions of any size, at least one cell in all.
    var, uns
        As in an AnnData.

    Raises
    ------
    InputError
        If the file cannot be written.

    Examples
    --------
    >>> from pathlib import Path
    >>> from wbdit.cell_files import Rows, write_rows
    >>> few = generator.generate(5, calls=2)
    >>> write_rows(Path("few.h5ad"), [Rows.of(few[:2]), Rows.of(few[2:])], few.var, few.uns)
    >>> Path("few.h5ad").exists()
    True
    """
    try:
        with _creating(path) as root:
            portions = regrouped(rows)
            file = _Writer(root, next(portions), var, uns)
            for portion in portions:
                file.append(portion)
            file.finish()
        for written in [path, *(path.rglob("*") if path.is_dir() else ())]:
            sync(written)
    except OSError as error:
        raise disk_error(f"cannot write {path}", error) from error


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Yield the root of a file of cells, an HDF5 file or a zarr group.

    Raises
    ------
    InputError
        If there is no such file, or it cannot be opened.
    """
    import h5py

    if not path.exists():
        raise InputError(f"no such file: {path}")
    try:
        if path.is_dir():
            yield _zarr().open_group(path, mode="r")
            return
        with h5py.File(path, "r") as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {path} ({error})") from error


def read_rows(root: Any, first: int = 0) -> Iterator[Rows]:
    """Yield the cells of a file in portions of at most :data:`GROUP`.

    Parameters
    ----------
    root
        As :func:`reading` yields it.
    first
        Index of the file's first cell among all cells: portions end at multiples of :data:`GROUP`.

    Raises
    ------
    InputError
        If a matrix is damaged.
    """
    from anndata.io import read_elem

    obs = read_elem(root["obs"])
    matrices = [_Matrix(root["X"]), *(_Matrix(root[f"layers/{name}"]) for name in _names(root, "layers"))]
    edges = np.unique([0, *range(GROUP - first % GROUP, len(obs), GROUP), len(obs)])
    for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        X, *layers = (matrix.rows(a, b) for matrix in matrices)
        yield Rows(X, dict(zip(_names(root, "layers"), layers, strict=True)), obs.iloc[a:b])


def regrouped(rows: Iterable[Rows]) -> Iterator[Rows]:
    """Yield the same cells in portions of :data:`GROUP`; only the last may be smaller."""
    waiting: list[Rows] = []
    n = 0
    for portion in rows:
        waiting.append(portion)
        n += len(portion.obs)
        if n >= GROUP:
            whole = _joined(waiting)
            for start in range(0, n - GROUP + 1, GROUP):
                yield whole.slice(start, start + GROUP)
            waiting, n = [whole.slice(n - n % GROUP, n)], n % GROUP
    if n:
        yield _joined(waiting)


def _joined(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    layers = {name: _stacked([part.layers[name] for part in parts]) for name in parts[0].layers}
    return Rows(_stacked([part.X for part in parts]), layers, pd.concat([part.obs for part in parts]))


def _stacked(matrices: list[Any]) -> Any:
    return sp.vstack(matrices, "csr") if sp.issparse(matrices[0]) else np.concatenate(matrices)


def _names(root: Any, group: str) -> list[str]:
    return sorted(root[group]) if group in root else []


class _Matrix:
    """A matrix of a file, read by rows."""

    def __init__(self, element: Any) -> None:
        self.element = element
        self.is_sparse = "indptr" in element if element.attrs.get("encoding-type") == "csr_matrix" else False
        if self.is_sparse:
            self.indptr = element["indptr"][:]
            self.columns = int(element.attrs["shape"][1])

    def rows(self, first: int, last: int) -> Any:
        if not self.is_sparse:
            return self.element[first:last]
        places = self.indptr[first : last + 1]
        some = slice(int(places[0]), int(places[-1]))
        indptr = (places - places[0]).astype(np.int32)
        try:
            part = self.element["data"][some], self.element["indices"][some].astype(np.int32), indptr
            found = sp.csr_matrix(part, shape=(last - first, self.columns))
            found.check_format(full_check=True)
        except (ValueError, IndexError, TypeError) as error:
            raise InputError(f"a matrix of {self.element.name} is damaged ({error})") from error
        return found


class _Array:
    """A one-dimensional array of a file that grows by whole chunks."""

    def __init__(self, parent: Any, name: str, dtype: Any) -> None:
        self.array = _new_array(parent, name, np.zeros(0, dtype), (None,), (CHUNK,))
        self.waiting: list[np.ndarray] = []
        self.n = 0

    def append(self, values: np.ndarray) -> None:
        self.waiting.append(values)
        self.n += len(values)
        if self.n >= BUFFER:
            self._write(self.n - self.n % BUFFER)

    def finish(self) -> None:
        self._write(self.n)

    def _write(self, n: int) -> None:
        if n == 0:
            return
        values = np.concatenate(self.waiting)
        _extend(self.array, values[:n])
        self.waiting, self.n = [values[n:]], len(values) - n


class _Writer:
    """A file of cells that is being written, with its first portion."""

    def __init__(self, root: Any, first: Rows, var: pd.DataFrame, uns: dict[str, Any]) -> None:
        root.attrs["encoding-type"], root.attrs["encoding-version"] = "anndata", "0.1.0"
        self.n = 0
        self.matrices = {"X": _matrix(root, "X", first.X)}
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            _write(root, name, {})
        for name, layer in first.layers.items():
            self.matrices[f"layers/{name}"] = _matrix(root["layers"], name, layer)
        table = ad.AnnData(var=var)
        table.strings_to_categoricals()  # as AnnData does when it writes
        _write(root, "var", table.var)
        _write(root, "uns", _in_order(uns))
        self.obs = _Table(root, first.obs)
        self.append(first)

    def append(self, rows: Rows) -> None:
        """Append cells."""
        self.matrices["X"].append(rows.X)
        for name, layer in rows.layers.items():
            self.matrices[f"layers/{name}"].append(layer)
        self.obs.append(rows.obs)

    def finish(self) -> None:
        """Write what waits in memory."""
        for matrix in self.matrices.values():
            matrix.finish()
        self.obs.finish()


def _matrix(parent: Any, name: str, first: Any) -> _Sparse | _Dense:
    return _Sparse(parent, name, first) if sp.issparse(first) else _Dense(parent, name, first)


class _Sparse:
    """A CSR matrix that grows by rows. The row pointers stay in memory, 8 bytes per cell, until the end."""

    def __init__(self, parent: Any, name: str, first: sp.csr_matrix) -> None:
        self.group = parent.create_group(name)
        self.group.attrs["encoding-type"], self.group.attrs["encoding-version"] = "csr_matrix", "0.1.0"
        self.columns = first.shape[1]
        self.data = _Array(self.group, "data", first.dtype)
        self.indices = _Array(self.group, "indices", np.int32)
        self.lengths: list[np.ndarray] = []

    def append(self, matrix: sp.csr_matrix) -> None:
        self.data.append(matrix.data)
        self.indices.append(matrix.indices.astype(np.int32, copy=False))
        self.lengths.append(np.diff(matrix.indptr))

    def finish(self) -> None:
        self.data.finish()
        self.indices.finish()
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(self.lengths), dtype=np.int64)])
        fits = indptr[-1] <= np.iinfo(np.int32).max
        _write(self.group, "indptr", indptr.astype(np.int32 if fits else np.int64))
        self.group.attrs["shape"] = (len(indptr) - 1, self.columns)


class _Dense:
    """A dense matrix that grows by rows."""

    def __init__(self, parent: Any, name: str, first: np.ndarray) -> None:
        columns = first.shape[1]
        rows = max(1, CHUNK // columns)
        self.array = _new_array(parent, name, np.zeros((0, columns), first.dtype), (None, columns), (rows, columns))

    def append(self, matrix: np.ndarray) -> None:
        _extend(self.array, matrix)

    def finish(self) -> None:
        pass


class _Table:
    """A table ``obs`` that grows by rows: names, categories and numbers."""

    def __init__(self, root: Any, first: pd.DataFrame) -> None:
        _write(root, "obs", first.iloc[:0])  # the form of the table, without rows
        group = root["obs"]
        for name in ("_index", *first):
            column = first.index if name == "_index" else first[name]
            parent, key = (group[name], "codes") if _is_categorical(column) else (group, name)
            dtype = _codes(column).dtype if _is_categorical(column) else column.dtype
            encoding = dict(parent[key].attrs)
            del parent[key]
            _new_array(parent, key, np.zeros(0, dtype), (None,), (CHUNK,))
            parent[key].attrs.update(encoding)
        self.group = group

    def append(self, obs: pd.DataFrame) -> None:
        _extend(self.group["_index"], obs.index.to_numpy(dtype=object))
        for name in obs:
            column = obs[name]
            if _is_categorical(column):
                _extend(self.group[name]["codes"], _codes(column))
            else:
                _extend(self.group[name], column.to_numpy())

    def finish(self) -> None:
        pass


def _in_order(content: Any) -> Any:
    """Return dicts with sorted keys, the order in which a file is read."""
    return {key: _in_order(content[key]) for key in sorted(content)} if isinstance(content, dict) else content


def _is_categorical(column: Any) -> bool:
    return isinstance(column.dtype, pd.CategoricalDtype)


def _codes(column: pd.Series) -> np.ndarray:
    return column.cat.codes.to_numpy()


def _write(parent: Any, name: str, value: Any) -> None:
    from anndata.io import write_elem

    write_elem(parent, name, value, dataset_kwargs=_compression(parent))


def _new_array(parent: Any, name: str, value: np.ndarray, largest: tuple[int | None, ...], chunks: Any) -> Any:
    """Create an array that can grow."""
    from anndata.io import write_elem

    growing = {} if _is_zarr(parent) else {"maxshape": largest}
    write_elem(parent, name, value, dataset_kwargs={**_compression(parent), **growing, "chunks": chunks})
    return parent[name]


def _extend(array: Any, values: np.ndarray) -> None:
    n = array.shape[0]
    array.resize((n + len(values), *array.shape[1:]))
    array[n:] = values


def _compression(parent: Any) -> dict[str, str]:
    return {} if _is_zarr(parent) else {"compression": "gzip"}  # zarr compresses by itself


def _is_zarr(parent: Any) -> bool:
    return type(parent).__module__.startswith("zarr")


@contextmanager
def _creating(path: Path) -> Iterator[Any]:
    if path.suffix == ".zarr":
        zarr = _zarr()
        given = {"zarr_format": ad.settings.zarr_write_format} if hasattr(ad.settings, "zarr_write_format") else {}
        yield zarr.open_group(path, mode="w", **given)
        return
    with hdf5_file(path) as file:
        yield file


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise InputError("`.zarr` needs the package zarr, which anndata 0.12 brings: pip install zarr") from error
    return zarr
