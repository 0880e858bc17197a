"""Structure of sparse matrices, checked before compiled code follows their pointers.

scipy's compiled loops trust ``indptr`` and ``indices``: a damaged matrix makes them read and write beyond the arrays.
Everything here reads its arrays in chunks, so they may be numpy arrays or datasets of a file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from wbdit.errors import InputError

CHUNK = 2**20  # entries that are read at once
COMPRESSED = ("csr", "csc")


def check_csr(indptr: Any, indices: Any, data: Any, shape: Sequence[int], name: str = "X") -> None:
    """Check the arrays of a CSR matrix; those of a CSC matrix are the CSR of its transpose.

    Parameters
    ----------
    indptr
        ``(rows + 1,)`` integers: from 0 up to the number of entries, never falling.
    indices
        ``(entries,)`` integers: the column of each entry, from 0 to ``columns - 1``.
    data
        ``(entries,)`` numbers.
    shape
        Rows and columns.
    name
        Name of the matrix in the message.

    Raises
    ------
    InputError
        If an array does not fit the others or the shape.

    Examples
    --------
    >>> from wbdit.data.structure import check_csr
    >>> check_csr([0, 2, 3], [0, 4, 1], [1.0, 2.0, 1.0], (2, 5))
    >>> check_csr([0, 2, 3], [0, 5, 1], [1.0, 2.0, 1.0], (2, 5))
    Traceback (most recent call last):
    wbdit.errors.InputError: X is damaged: an index is 5, but there are 5 columns; save the cells again from ...
    """
    indptr, indices, data = (x if hasattr(x, "dtype") else np.asarray(x) for x in (indptr, indices, data))
    check_pointers(indptr, indices, data, shape, name)
    for chunk in _chunks(indices):
        check_indices(chunk, shape[1], name)


def check_pointers(indptr: Any, indices: Any, data: Any, shape: Sequence[int], name: str = "X") -> None:
    """Check everything about a CSR matrix but the values of its indices; arguments and errors as in :func:`check_csr`.

    A reader of a file calls this once, and :func:`check_indices` for the rows that it reads.

    Examples
    --------
    >>> from wbdit.data.structure import check_pointers
    >>> check_pointers(cells.X.indptr, cells.X.indices, cells.X.data, cells.X.shape)
    """
    if len(shape) != 2 or not all(isinstance(n, (int, np.integer)) and 0 <= n <= sys.maxsize for n in shape):
        raise _damaged(name, f"its shape is {_short(shape)}")
    for array, what in ((indptr, "pointers"), (indices, "indices"), (data, "values")):
        if np.ndim(array) != 1:
            raise _damaged(name, f"its {what} have {np.ndim(array)} dimensions, not one")
    for array, what in ((indptr, "pointers"), (indices, "indices")):
        if array.dtype.kind not in "iu":
            raise _damaged(name, f"its {what} are {array.dtype}, not integers")
    if data.dtype.kind not in "biufc":
        raise _damaged(name, f"its values are {data.dtype}, not numbers")
    if data.dtype == np.float16:
        raise InputError(f"{name} is sparse in float16, which scipy does not compute with: convert it to float32")
    rows, entries = int(shape[0]), int(indices.shape[0])
    if indptr.shape[0] != rows + 1:
        raise _damaged(name, f"it has {indptr.shape[0]} pointers, but {rows} rows or columns need {rows + 1}")
    if data.shape[0] != entries:
        raise _damaged(name, f"it has {data.shape[0]} values and {entries} indices")
    last = 0
    for i, chunk in enumerate(_chunks(indptr)):
        if i == 0 and int(chunk[0]) != 0:
            raise _damaged(name, f"its first pointer is {chunk[0]}, not 0")
        if int(chunk[0]) < last or bool((chunk[1:] < chunk[:-1]).any()):
            raise _damaged(name, "a pointer is lower than the one before it")
        last = int(chunk[-1])
        if last > entries:
            break
    if last != entries:
        raise _damaged(name, f"its last pointer is {last}, but it has {entries} entries")


def check_indices(indices: np.ndarray, columns: int, name: str = "X") -> None:
    """Check some indices of a CSR matrix, such as those of the rows that were just read.

    Raises
    ------
    InputError
        If an index is negative, or not below the number of columns.

    Examples
    --------
    >>> from wbdit.data.structure import check_indices
    >>> check_indices(cells.X.indices[:100], cells.n_vars)
    """
    if len(indices) == 0:
        return
    lowest, highest = int(indices.min()), int(indices.max())
    if lowest < 0 or highest >= columns:
        raise _damaged(name, f"an index is {lowest if lowest < 0 else highest}, but there are {columns} columns")


def check_sparse(X: Any, name: str = "X") -> None:
    """Check a sparse matrix of scipy, or a CSR or CSC matrix in a file; of the latter, all but the indices.

    Raises
    ------
    InputError
        If the matrix is damaged.

    Examples
    --------
    >>> from wbdit.data.structure import check_sparse
    >>> check_sparse(cells.X)
    >>> check_sparse(cells.X.tocsc())
    """
    if not sp.issparse(X):  # in a file
        group = X.group
        indptr, indices, data = (group[part] for part in ("indptr", "indices", "data"))
        shape = tuple(group.attrs["shape"] if "shape" in group.attrs else group.attrs["h5sparse_shape"])
        check_pointers(indptr, indices, data, shape if X.format == "csr" else shape[::-1], name)
    elif X.format in COMPRESSED:
        for array in (X.indptr, X.indices):
            if array.dtype not in (np.int32, np.int64):
                raise _damaged(name, f"its indices are {array.dtype}, not int32 or int64")
        check_csr(X.indptr, X.indices, X.data, X.shape if X.format == "csr" else X.shape[::-1], name)
    elif X.format == "bsr":
        height, width = X.blocksize
        blocks = X.data.reshape(len(X.data), -1)[:, :1].ravel() if X.data.size else np.zeros(len(X.data))
        check_csr(X.indptr, X.indices, blocks, (X.shape[0] // height, X.shape[1] // width), name)
    elif X.format == "coo":
        if len(X.row) != len(X.data) or len(X.col) != len(X.data):
            raise _damaged(name, f"it has {len(X.data)} values, {len(X.row)} rows and {len(X.col)} columns of them")
        for indices, n in zip((X.row, X.col), X.shape, strict=True):
            check_indices(indices, n, name)


def check_matrices(adata: ad.AnnData) -> None:
    """Check the structure of all sparse matrices of an AnnData.

    A view is checked through the AnnData that it belongs to, because to read the view's matrix is to compute it.

    Raises
    ------
    InputError
        If one is damaged.

    Examples
    --------
    >>> from wbdit.data.structure import check_matrices
    >>> check_matrices(cells)
    """
    whole = getattr(adata, "_adata_ref", None)
    if adata.is_view and whole is not None:
        return check_matrices(whole)
    for name, X, shape in _matrices(adata):
        if X is not None and tuple(X.shape[: len(shape)]) != shape:
            raise _damaged(name, f"its shape is {_short(tuple(X.shape))}, but there are {' x '.join(map(str, shape))}")
        if sp.issparse(X) or hasattr(X, "group"):
            check_sparse(X, name)
    return None


def _matrices(adata: ad.AnnData) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Yield each matrix with its name and the first part of its shape, as the names of cells and genes tell it."""
    n, genes = len(adata.obs_names), len(adata.var_names)
    yield "X", adata.X, (n, genes)
    if adata.raw is not None and not adata.isbacked:  # a backed one is read on each access
        yield "raw.X", adata.raw.X, (n, len(adata.raw.var_names))
    shapes = {"layers": (n, genes), "obsm": (n,), "varm": (genes,), "obsp": (n, n), "varp": (genes, genes)}
    for part, shape in shapes.items():
        try:
            own = getattr(adata, part)
        except ValueError as error:  # of another shape than the cells
            raise _damaged(part, str(error).rstrip(".")) from error
        for name in own:
            # what AnnData holds is looked at without its own check, whose error is no line for a user
            yield f"{part}[{name!r}]", getattr(own, "_data", own)[name], shape


def _chunks(array: Any) -> Iterator[np.ndarray]:
    for start in range(0, array.shape[0], CHUNK):
        yield np.asarray(array[start : start + CHUNK])


def _damaged(name: str, reason: str) -> InputError:
    return InputError(f"{name} is damaged: {reason}; save the cells again from their source")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
