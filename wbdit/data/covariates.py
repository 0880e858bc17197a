"""Continuous covariates that cells are conditioned on: numeric columns of ``obs``, such as age, dose or pseudotime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import anndata as ad
import numpy as np
import pandas as pd

from wbdit.data.expression import no_column
from wbdit.errors import InputError

BINS = 64  # of cells by quantiles of a covariate, in which trends are fitted


@dataclass(frozen=True)
class Covariates:
    """Continuous columns of the training cells.

    The model takes ``(value - center) / scale`` per column. A run without covariates has no columns.

    Attributes
    ----------
    columns
        ``(K,)`` columns of ``obs``.
    center, scale
        ``(K,)`` fp64, mean and standard deviation of each column.
    values
        The training cells' values, ``(n, K)`` fp64; a preprocessor keeps them in the order of its library sizes.

    Examples
    --------
    >>> from wbdit.data.covariates import Covariates
    >>> cells.obs["age"] = np.linspace(20, 60, 700)
    >>> covariates = Covariates.fit(cells, "age")
    >>> covariates.columns, covariates.center.tolist()
    (('age',), [40.0])
    >>> covariates.encode(np.array([[40.0]])).tolist()
    [[0.0]]
    """

    columns: tuple[str, ...] = ()
    center: np.ndarray = field(default_factory=lambda: np.zeros(0))
    scale: np.ndarray = field(default_factory=lambda: np.ones(0))
    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    @classmethod
    def fit(cls, adata: ad.AnnData, columns: str | Sequence[str] | None, labels: Sequence[str] = ()) -> Covariates:
        """Learn the covariates from training cells, with :attr:`values` in the cells' order.

        Parameters
        ----------
        adata
            Training cells.
        columns
            Numeric column of ``obs``, or several, or none. Boolean and integer columns are numeric.
        labels
            Label columns of the run, which cannot be covariates too.

        Raises
        ------
        InputError
            If a column is unknown, named twice, also a label column, not numeric or constant, or a value is missing or
            infinite.
        """
        names = (columns,) if isinstance(columns, str) else tuple(columns or ())
        for i, name in enumerate(names):
            if name in names[:i]:
                raise InputError(f"continuous column {name!r} is named twice: name it once")
            if name in labels:
                raise InputError(
                    f"{name!r} is both a label and a continuous column: give it as `label` or as `continuous`"
                )
        values = _read(adata, names)
        for name, column in zip(names, values.T, strict=True):
            if len(column) and column.min() == column.max():
                raise InputError(
                    f"all cells have the same {name!r} ({column[0]:g}), so nothing can be learned from it: leave it "
                    "out of `continuous`"
                )
        return cls(names, values.mean(0), values.std(0), values)

    def read(self, adata: ad.AnnData, but: Sequence[str] = ()) -> np.ndarray:
        """Return the values ``(cells, K)`` fp64 of cells; NaN in the columns `but`, which need not exist.

        Raises
        ------
        InputError
            If a column is missing or not numeric, or a value is missing or infinite.
        """
        read = [name for name in self.columns if name not in but]
        values = np.full((adata.n_obs, len(self.columns)), np.nan)
        values[:, [self.columns.index(name) for name in read]] = _read(adata, read)
        return values

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Return the model's input for values ``(n, K)``, of the same shape in fp32; NaN stands for "not given"."""
        return ((values - self.center) / self.scale).astype(np.float32)

    def position(self, column: str) -> int:
        """Return the index of a column; raise an InputError if the run does not have it."""
        if column not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise InputError(f"{column!r} is no continuous column of this run, which has: {known}")
        return self.columns.index(column)

    def beyond(self, values: np.ndarray) -> list[str]:
        """Return one message per column of values ``(n, K)`` that exceed the range of the training cells."""
        found = []
        for name, asked, known in zip(self.columns, values.T, self.values.T, strict=True):
            outside = asked[(asked < known.min()) | (asked > known.max())]
            if len(outside):
                worst = outside[np.argmax(np.abs(outside - np.median(known)))]
                found.append(f"{name} = {worst:.4g} (training cells: {known.min():.4g} to {known.max():.4g})")
        return found

    def ranges(self) -> str:
        """Return the columns and the ranges of the training cells as text, such as "age (20 to 60)"."""
        spans = zip(self.columns, self.values.min(0), self.values.max(0), strict=True)
        return ", ".join(f"{name} ({low:.4g} to {high:.4g})" for name, low, high in spans)

    def summary(self) -> str:
        """Return the columns as text, such as ", continuous: pseudotime"; empty without columns."""
        return f", continuous: {', '.join(self.columns)}" if self.columns else ""


def quantile_bins(x: np.ndarray) -> np.ndarray:
    """Return the bin ``(n,)`` int64 of each value ``(n,)``: at most :data:`BINS` quantiles, empty ones left out.

    Examples
    --------
    >>> from wbdit.data.covariates import quantile_bins
    >>> quantile_bins(np.array([0.0, 5.0, 0.0, 7.0])).tolist()
    [0, 1, 0, 2]
    """
    x = x.astype(np.float64)
    edges = np.quantile(x, np.linspace(0, 1, BINS + 1)[1:-1])
    return np.unique(np.searchsorted(edges, x), return_inverse=True)[1]


def _read(adata: ad.AnnData, columns: Sequence[str]) -> np.ndarray:
    """Return columns of ``obs`` as ``(cells, len(columns))`` fp64, all finite."""
    return np.array([_column(adata, name) for name in columns], np.float64).reshape(len(columns), adata.n_obs).T.copy()


def _column(adata: ad.AnnData, name: str) -> np.ndarray:
    if name not in adata.obs.columns:
        raise no_column(adata, name)
    column = adata.obs[name]
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_complex_dtype(column):
        raise InputError(f"column {name!r} in obs is not numeric ({column.dtype}): give it as `label`, or convert it")
    values = column.to_numpy(np.float64, na_value=np.nan)
    for wrong, word in ((np.isnan(values), "no"), (np.isinf(values), "an infinite")):
        if wrong.any():
            raise InputError(f"{int(wrong.sum())} cells have {word} {name!r}: complete them or remove them first")
    return values
