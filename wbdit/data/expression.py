"""Input cells: read AnnData, check it, and detect its expression space."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import scipy.sparse as sp

from wbdit.errors import InputError

Space = Literal["counts", "lognorm", "scaled"]

# ln(1 + x) of any sequenced cell is well below this; linear CPM or TPM is not
LARGEST_LOG_VALUE = 25.0


def read_h5ad(path: str | Path) -> ad.AnnData:
    """Read an ``.h5ad`` file.

    Raises
    ------
    InputError
        If the file is missing or is not a readable ``.h5ad``.

    Examples
    --------
    >>> from wbdit.data.expression import read_h5ad
    >>> cells[:5].copy().write_h5ad("few.h5ad")
    >>> read_h5ad("few.h5ad").shape
    (5, 765)
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # check_cells reports the ones that matter in one line
            return ad.read_h5ad(path)
    except Exception as error:  # h5py and anndata raise many types for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read {path} as .h5ad ({reason}); is the file complete?") from error


def check_cells(adata: ad.AnnData, label: str | None = None) -> None:
    """Check that cells can be used; the error says what to fix.

    Parameters
    ----------
    adata
        Cells by genes; ``X`` dense or sparse.
    label
        Column of ``obs`` that holds the labels, if any.

    Raises
    ------
    InputError
        For no genes, fewer than two cells, no ``X``, NaN or infinite values, duplicate gene names, an unknown label
        column or missing labels.

    Examples
    --------
    >>> from wbdit.data.expression import check_cells
    >>> check_cells(cells, "bulk_labels")
    >>> check_cells(cells[:1])
    Traceback (most recent call last):
    wbdit.errors.InputError: at least two cells are needed, there is one
    """
    if adata.X is None:
        raise InputError("the file has no X matrix: put the counts into adata.X")
    if adata.n_vars == 0:
        raise InputError("there are no genes (0 columns)")
    if adata.n_obs < 2:
        raise InputError(f"at least two cells are needed, there {_are(adata.n_obs)}")
    duplicated = adata.var_names[adata.var_names.duplicated()]
    if len(duplicated):
        raise InputError(
            f"duplicate gene names ({duplicated[0]!r} and {len(duplicated) - 1} more): "
            "call adata.var_names_make_unique()"
        )
    values = matrix_values(adata.X)
    if not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values):
        raise InputError(f"X holds {values.dtype} values, not numbers")
    bad = int(np.size(values) - np.isfinite(values).sum())
    if bad:
        raise InputError(f"X holds {bad} NaN or infinite values: remove or replace them first")
    if label is not None:
        check_labels(adata, label)


def check_labels(adata: ad.AnnData, label: str) -> None:
    """Check that a label column exists and is complete.

    Raises
    ------
    InputError
        If the column is unknown or labels are missing.

    Examples
    --------
    >>> from wbdit.data.expression import check_labels
    >>> check_labels(cells, "cell_type")
    Traceback (most recent call last):
    wbdit.errors.InputError: no column 'cell_type' in obs; the columns are: bulk_labels
    """
    if label not in adata.obs.columns:
        keys = ", ".join(map(str, adata.obs.columns)) or "none"
        raise InputError(f"no column {label!r} in obs; the columns are: {keys}")
    missing = int(adata.obs[label].isna().sum())
    if missing:
        raise InputError(f"{missing} cells have no {label!r}: label them or remove them first")


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
    sizes = adata.obs[label].astype(str).value_counts()
    if (sizes == 1).any():
        lonely = sizes.index[sizes == 1][0]
        raise InputError(f"label {lonely!r} in {label!r} has one cell: merge it into another label or drop it")


def matrix_values(X: Any) -> np.ndarray:
    """Return the stored values of a dense or sparse matrix as a flat array.

    The zeros that a sparse matrix does not store are left out.

    Examples
    --------
    >>> from wbdit.data.expression import matrix_values
    >>> matrix_values(np.eye(2)), len(matrix_values(cells.X))
    (array([1., 0., 0., 1.]), 174400)
    """
    return np.asarray(X.data if sp.issparse(X) else X).ravel()


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


def detect_space(X: Any) -> Space:
    """Detect from the values whether expression is raw counts, log-normalized or scaled.

    Parameters
    ----------
    X
        ``(cells, genes)`` dense or sparse, finite values.

    Returns
    -------
    ``"counts"`` for non-negative integers, ``"lognorm"`` for non-negative values up to :data:`LARGEST_LOG_VALUE`,
    ``"scaled"`` for values of both signs.

    Raises
    ------
    InputError
        For negative counts, normalized values without a logarithm, only zeros, or mostly zeros with negative values.

    Examples
    --------
    >>> from wbdit.data.expression import detect_space
    >>> detect_space(cells.X), detect_space(cells.X.log1p())
    ('counts', 'lognorm')
    """
    values = matrix_values(X)
    if values.size == 0 or not values.any():
        raise InputError("X holds only zeros: give cells with nonzero expression")
    integers = bool((values == np.rint(values)).all())
    lowest, highest = float(values.min()), float(values.max())
    if integers:
        if lowest < 0:
            raise InputError(f"X holds negative counts (lowest {lowest:g}): counts are zero or more")
        return "counts"
    if lowest >= 0:
        if highest > LARGEST_LOG_VALUE:
            raise InputError(
                f"X holds non-integer values up to {highest:.4g}: neither counts nor log values; "
                "give raw counts, or take the logarithm first (scanpy.pp.log1p)"
            )
        return "lognorm"
    stored_zeros = int((values == 0).sum()) + (int(np.prod(X.shape)) - values.size)
    if stored_zeros > 0.5 * np.prod(X.shape):
        raise InputError(
            f"X holds negative values (lowest {lowest:.4g}) although most entries are zero: "
            "neither counts, log-normalized nor scaled values"
        )
    return "scaled"


def find_expression(adata: ad.AnnData) -> tuple[Any, Space, str]:
    """Return the expression matrix: ``layers["counts"]`` if only this layer holds counts, else ``X``.

    Returns
    -------
    The matrix, its expression space, and a message that describes them.

    Raises
    ------
    InputError
        As :func:`detect_space`.

    Examples
    --------
    >>> from wbdit.data.expression import find_expression
    >>> X, space, message = find_expression(cells)
    >>> X.shape, space, message
    ((700, 765), 'counts', 'X is raw counts')
    """
    space = detect_space(adata.X)
    if space != "counts" and "counts" in adata.layers:
        layer = adata.layers["counts"]
        if np.isfinite(matrix_values(layer)).all() and detect_space(layer) == "counts":
            return layer, "counts", f"X is {describe(space)}; using the raw counts in layers['counts']"
    return adata.X, space, f"X is {describe(space)}"


def describe(space: Space) -> str:
    """Return an expression space in words.

    Examples
    --------
    >>> from wbdit.data.expression import describe
    >>> describe("lognorm")
    'log-normalized'
    """
    words = {"counts": "raw counts", "lognorm": "log-normalized", "scaled": "scaled (centered values of both signs)"}
    return words[space]


def _are(n: int) -> str:
    return "are none" if n == 0 else "is one"
