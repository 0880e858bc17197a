"""Input cells: read AnnData, check and split cells, and bring a matrix into memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from wbdit._io import check_regular
from wbdit.data.structure import check_matrices, check_sparse
from wbdit.data.trial import try_h5ad
from wbdit.errors import InputError


def read_h5ad(path: str | Path, *, tried: bool = False) -> ad.AnnData:
    """Read an ``.h5ad`` file.

    The file may come from anyone: its sizes are checked before anything is read, and its sparse matrices before
    anything is computed.

    Parameters
    ----------
    path
        The file.
    tried
        Whether :func:`wbdit.data.trial.try_h5ad` has been called.

    Raises
    ------
    InputError
        If the file is missing, is not a readable ``.h5ad``, claims more than it holds, or has a damaged matrix.

    Examples
    --------
    >>> from wbdit.data.expression import read_h5ad
    >>> cells[:5].copy().write_h5ad("few.h5ad")
    >>> read_h5ad("few.h5ad").shape
    (5, 765)
    """
    path = Path(path)
    check_regular(path)
    try:
        if not tried:
            try_h5ad(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # check_cells reports the ones that matter in one line
            adata = ad.read_h5ad(path)
        check_matrices(adata)
        return adata
    except InputError as error:
        raise InputError(f"cannot use {path}: {error}") from error
    except Exception as error:  # h5py and anndata raise many types for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot read {path} as .h5ad ({reason}); is the file complete?") from error


def check_cells(adata: ad.AnnData, label: str | None = None) -> None:
    """Check that cells can be used; the error says what to fix.

    Parameters
    ----------
    adata
        Cells by genes. :func:`wbdit.data.matrix.find_expression` checks the values and the names of the genes.
    label
        Column of ``obs`` that holds the labels, if any.

    Raises
    ------
    InputError
        For no genes, fewer than two cells, a damaged sparse matrix, an unknown label column or missing labels.

    Examples
    --------
    >>> from wbdit.data.expression import check_cells
    >>> check_cells(cells, "bulk_labels")
    >>> check_cells(cells[:1])
    Traceback (most recent call last):
    wbdit.errors.InputError: at least two cells are needed, there is one
    """
    if adata.n_vars == 0:
        raise InputError("there are no genes (0 columns)")
    if adata.n_obs < 2:
        raise InputError(f"at least two cells are needed, there {_are(adata.n_obs)}")
    if isinstance(adata, ad.AnnData):  # other cells are checked as they are read
        check_matrices(adata)
    if label is not None:
        check_labels(adata, label)


def check_labels(adata: ad.AnnData, label: str) -> None:
    """Check that a label column exists once and is complete.

    Raises
    ------
    InputError
        If the column is unknown or there twice, holds no labels, or labels are missing.

    Examples
    --------
    >>> from wbdit.data.expression import check_labels
    >>> check_labels(cells, "cell_type")
    Traceback (most recent call last):
    wbdit.errors.InputError: no column 'cell_type' in obs; the columns are: bulk_labels
    """
    columns = adata.obs.columns
    if label not in columns:
        raise no_column(adata, label)
    if (columns == label).sum() > 1:
        raise InputError(f"obs has {(columns == label).sum()} columns {label!r}: rename or drop all but one")
    try:
        adata.obs[label].unique()
    except TypeError:
        raise InputError(f"{label!r} holds lists or other objects, not labels: choose another column") from None
    missing = int(adata.obs[label].isna().sum())
    if missing:
        raise InputError(f"{missing} cells have no {label!r}: label them or remove them first")


def label_text(column: pd.Series) -> pd.Series:
    """Return labels as text. pandas itself fails for a categorical column without categories.

    Examples
    --------
    >>> from wbdit.data.expression import label_text
    >>> label_text(cells.obs["bulk_labels"]).iloc[0]
    'CD14+ Monocyte'
    """
    return column.astype(object).astype(str)


def is_text(name: str) -> bool:
    r"""Return whether files and terminals can hold a name: it has no null character and no half of a character.

    Examples
    --------
    >>> from wbdit.data.expression import is_text
    >>> is_text("CD8+ T"), is_text("CD8\0"), is_text("\ud800")
    (True, False, False)
    """
    return "\0" not in name and not any("\ud800" <= character <= "\udfff" for character in name)


def no_column(adata: Any, name: str) -> InputError:
    """Return the error for a column that obs lacks, or the obs of one of the sets that cells were joined from.

    Examples
    --------
    >>> from wbdit.data.expression import no_column
    >>> no_column(cells, "cell_type")
    InputError("no column 'cell_type' in obs; the columns are: bulk_labels")
    """
    lacking = [(of, part) for of, part in getattr(adata, "sets", ()) if name not in part.obs.columns]
    of, part = lacking[0] if lacking else ("", adata)
    columns = ", ".join(map(str, part.obs.columns)) or "none"
    return InputError(f"no column {name!r} in obs{of and f' of {of}'}; the columns are: {columns}")


def check_label_sizes(adata: ad.AnnData, label: str) -> None:
    """Check that each label has at least two cells; one cell does not define a distribution.

    Raises
    ------
    InputError
        If a label has one cell.

    Examples
    --------
    >>> from wbdit.data.expression import check_label_sizes
    >>> check_label_sizes(cells, "bulk_labels")
    >>> check_label_sizes(cells[:9], "bulk_labels")
    Traceback (most recent call last):
    wbdit.errors.InputError: label 'CD14+ Monocyte' in 'bulk_labels' has one cell: merge it into another label or ...
    """
    sizes = label_text(adata.obs[label]).value_counts()
    if (sizes == 1).any():
        lonely = sizes.index[sizes == 1][0]
        more = f"; so have {(sizes == 1).sum() - 1} more of its {len(sizes)} labels" if (sizes == 1).sum() > 1 else ""
        raise InputError(f"label {lonely!r} in {label!r} has one cell: merge it into another label or drop it{more}")


def to_dense(X: Any, dtype: Any = np.float32) -> np.ndarray:
    """Return a dense or sparse matrix as a dense ``(cells, genes)`` array of a dtype.

    Examples
    --------
    >>> from wbdit.data.expression import to_dense
    >>> dense = to_dense(cells.X)
    >>> type(dense).__name__, dense.shape, dense.dtype
    ('ndarray', (700, 765), dtype('float32'))
    """
    return np.asarray(X.toarray() if sp.issparse(X) else X, dtype=dtype)


def in_memory(X: Any) -> Any:
    """Return a matrix of any kind as CSR or as a dense array in memory: sparse, backed by a file, or lazy (dask).

    Raises
    ------
    InputError
        If a sparse matrix is damaged.

    Examples
    --------
    >>> from wbdit.data.expression import in_memory
    >>> in_memory(cells.X.tocsc()).format
    'csr'
    """
    if hasattr(X, "to_memory"):  # sparse, in a file
        if hasattr(X, "group"):
            check_sparse(X)
        X = X.to_memory()
    elif hasattr(X, "compute"):  # dask
        X = X.compute()
    if not sp.issparse(X):
        X = np.asarray(X)  # also reads a dense matrix from a file
        return X.astype(np.float32) if X.dtype == np.float16 else X
    check_sparse(X)
    X = sp.csr_matrix(X)
    check_sparse(X)  # the other formats become one that can be checked
    if not X.has_canonical_format:
        X = X.copy()
        X.sum_duplicates()
    return X


def _are(n: int) -> str:
    return "are none" if n == 0 else "is one"
