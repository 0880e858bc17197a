"""Labels that cells are conditioned on: columns of ``obs``, their categories and observed combinations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from wbdit.data.expression import check_label_sizes, check_labels, is_text, label_text
from wbdit.errors import InputError

SEPARATOR = "/"  # between the labels of several columns, as in "NK/stim"
OPEN = "*"  # wildcard for a label: any, in the proportions of the training cells
MOST_NUMBERS = 20  # a column with more different fractional numbers is continuous


@dataclass(frozen=True)
class Labels:
    """Label columns of the training cells.

    A cell's labels are indices ``(C,)``, one per column, into the column's categories. A run without labels has no
    columns.

    Attributes
    ----------
    columns
        ``(C,)`` columns of ``obs``.
    categories
        ``K_c`` labels of each column, sorted.
    combinations
        Combinations of labels in the training cells, ``(M, C)`` int64, in lexicographic order.
    sizes
        Number of training cells with each combination, ``(M,)`` int64.

    Examples
    --------
    >>> from wbdit.data.labels import Labels
    >>> labels = Labels.fit(cells, "bulk_labels")
    >>> labels.summary()
    '10 labels'
    >>> labels.codes_from_counts({"Dendritic": 2, "CD19+ B": 1}).ravel()
    array([9, 9, 1])
    """

    columns: tuple[str, ...]
    categories: tuple[tuple[str, ...], ...]
    combinations: np.ndarray
    sizes: np.ndarray

    @classmethod
    def fit(cls, adata: ad.AnnData, columns: str | Sequence[str] | None) -> Labels:
        """Learn the labels from training cells.

        Parameters
        ----------
        adata
            Training cells.
        columns
            Column of ``obs``, or several, or none.

        Raises
        ------
        InputError
            If a column is unknown, named twice, incomplete or continuous, a label has one cell, or labels cannot be
            told apart in a request.
        """
        names = (columns,) if isinstance(columns, str) else tuple(columns or ())
        twice = [name for i, name in enumerate(names) if name in names[:i]]
        if twice:
            raise InputError(f"label column {twice[0]!r} is named twice: name it once")
        for name in names:
            check_labels(adata, name)
            _check_values(adata.obs[name], name)
            check_label_sizes(adata, name)
        categories = tuple(tuple(map(str, np.unique(label_text(adata.obs[name]).to_numpy()))) for name in names)
        empty = cls(names, categories, np.zeros((0, len(names)), np.int64), np.zeros(0, np.int64))
        codes = empty.codes(adata)
        _, first, sizes = np.unique(empty._keys(codes), return_index=True, return_counts=True)
        return cls(names, categories, codes[first], sizes)

    @property
    def label_sizes(self) -> tuple[int, ...]:
        """Number of labels of each column, as :class:`wbdit.WBDiT` takes it."""
        return tuple(map(len, self.categories))

    def summary(self) -> str:
        """Return the number of labels as text, such as "10 x 2 labels, 19 of their 20 combinations"."""
        if not self.columns:
            return "no labels"
        sizes = [len(categories) for categories in self.categories]
        combined = f", {len(self.sizes)} of their {math.prod(sizes)} combinations" if len(sizes) > 1 else ""
        return f"{' x '.join(map(str, sizes))} labels{combined}"

    def codes(self, adata: ad.AnnData) -> np.ndarray:
        """Return the label indices ``(cells, C)`` int64 of cells.

        Raises
        ------
        InputError
            If a column is missing or incomplete, or a label is unknown.
        """
        found = []
        for column, (name, categories) in enumerate(zip(self.columns, self.categories, strict=True)):
            check_labels(adata, name)
            labels = label_text(adata.obs[name])
            codes = pd.Index(categories).get_indexer(pd.Index(labels))
            if (codes < 0).any():
                raise self._unknown(column, labels.iloc[int(np.argmax(codes < 0))])
            found.append(codes)
        return np.array(found, np.int64).reshape(len(found), adata.n_obs).T.copy()

    def training_codes(self, n: int) -> np.ndarray:
        """Return the labels ``(n, C)`` int64 of `n` cells, in the proportions of the training cells."""
        return self.combinations[apportion(self.sizes, n)]

    def codes_like(self, codes: np.ndarray, n: int) -> np.ndarray:
        """Return the labels ``(n, C)`` of `n` cells, in the proportions of cells with labels ``(cells, C)``."""
        return codes[self.rows_like(codes, n)]

    def rows_like(self, codes: np.ndarray, n: int) -> np.ndarray:
        """Return `n` rows of labels ``(cells, C)``, sorted by combination and in the cells' proportions.

        The rows of each combination are evenly spaced among the cells that have it.
        """
        _, which, sizes = np.unique(self._keys(codes), return_inverse=True, return_counts=True)
        groups = np.split(np.argsort(which, kind="stable"), np.cumsum(sizes)[:-1])
        wanted = np.bincount(apportion(sizes, n), minlength=len(sizes))
        return np.concatenate(
            [rows[np.arange(k) * len(rows) // k] for rows, k in zip(groups, wanted, strict=True) if k]
        )

    def codes_from_counts(self, counts: Mapping[str | tuple[str, ...], int], *, keep_open: bool = False) -> np.ndarray:
        """Return the labels ``(cells, C)`` int64 of given numbers of cells per combination.

        Parameters
        ----------
        counts
            Number of cells per label. With several columns, a key names one label per column, in order: ``"NK/stim"``
            or ``("NK", "stim")``. ``"*"`` stands for any label, in the proportions of the training cells that match the
            other columns.
        keep_open
            Return -1 for ``"*"``, for labels that are drawn later.

        Raises
        ------
        InputError
            If a name is ambiguous or unknown, or no training cell matches a name with ``"*"``.
        """
        if not self.columns:
            raise InputError("this run was trained without labels: give only a number of cells")
        return np.concatenate([self._fitting(name, n, keep_open) for name, n in counts.items()])

    def matching(self, codes: np.ndarray, name: str | tuple[str, ...]) -> np.ndarray:
        """Return which cells with labels ``(cells, C)`` match a name, ``(cells,)`` bool.

        Parameters
        ----------
        codes
            Labels of the cells.
        name
            As in :meth:`codes_from_counts`.

        Raises
        ------
        InputError
            If the name is ambiguous or names an unknown label.
        """
        wanted = self._read(name)
        return ((wanted < 0) | (codes == wanted)).all(1)

    def replace(self, codes: np.ndarray, toward: Mapping[str, str]) -> np.ndarray:
        """Return the labels ``(cells, C)`` with the labels of some columns replaced.

        Raises
        ------
        InputError
            If a column or a label is unknown.
        """
        moved = codes.copy()
        for name, label in toward.items():
            column = self.position(name)
            code = self._code(column, label)
            if code is None or code < 0:
                raise self._unknown(column, label)
            moved[:, column] = code
        return moved

    def position(self, column: str) -> int:
        """Return the index of a label column; raise an InputError if the run does not have it."""
        if column not in self.columns:
            raise InputError(
                f"{column!r} is no label column of this run, which has: {', '.join(self.columns) or 'none'}"
            )
        return self.columns.index(column)

    def combination_index(self, codes: np.ndarray) -> np.ndarray:
        """Return the index of each cell's labels in :attr:`combinations`, ``(cells,)``; -1 for unseen combinations."""
        known, asked = self._keys(self.combinations), self._keys(codes)
        place = np.minimum(np.searchsorted(known, asked), len(known) - 1)
        return np.where(known[place] == asked, place, -1)

    def training_cells(self, codes: np.ndarray) -> dict[str, int]:
        """Return the number of training cells of each combination in labels ``(cells, C)``, by its name."""
        rows = np.unique(codes, axis=0)
        index = self.combination_index(rows)
        return {self.name(row): int(self.sizes[k]) if k >= 0 else 0 for row, k in zip(rows, index, strict=True)}

    def name(self, row: Iterable[int]) -> str:
        """Return the name of a combination of labels ``(C,)``, such as "NK/stim"."""
        return SEPARATOR.join(labels[code] for labels, code in zip(self.categories, row, strict=True))

    def obs(self, codes: np.ndarray) -> dict[str, pd.Categorical]:
        """Return cells' labels ``(cells, C)`` as columns of ``obs``."""
        return {
            name: pd.Categorical.from_codes(codes[:, column], categories=list(self.categories[column]))
            for column, name in enumerate(self.columns)
        }

    def facts(self) -> dict[str, Any]:
        """Return the columns and categories for ``uns``: a name and an array, or an array of names and a dict."""
        categories = [np.array(labels, dtype=object) for labels in self.categories]
        if len(self.columns) == 1:
            return {"label": self.columns[0], "categories": categories[0]}
        if not self.columns:
            return {}
        by_column = dict(zip(self.columns, categories, strict=True))
        return {"label": np.array(self.columns, dtype=object), "categories": by_column}

    def _keys(self, codes: np.ndarray) -> np.ndarray:
        """Return one key per row of labels ``(cells, C)``, which sorts like the row: its codes, highest byte first."""
        if not self.columns:
            return np.zeros(len(codes), np.int64)
        # one integer for all columns would overflow: 12 columns of 64 labels have 2^72 combinations
        rows = np.ascontiguousarray(codes, ">i8")
        return rows.view(f"V{rows.itemsize * len(self.columns)}")[:, 0]

    def _unknown(self, column: int, label: str) -> InputError:
        known = ", ".join(self.categories[column])
        return InputError(f"unknown label {label!r} in {self.columns[column]!r}; the labels are: {known}")

    def _fitting(self, name: str | tuple[str, ...], n: int, keep_open: bool) -> np.ndarray:
        """Return the labels ``(n, C)`` of `n` cells that match a name."""
        wanted = self._read(name)
        if (wanted >= 0).all():
            return np.tile(wanted, (n, 1))
        fits = self.matching(self.combinations, name)
        if not fits.any():
            raise InputError(f"no training cell is {name!r}, so {OPEN} has no match: name a label in each column")
        if keep_open:
            return np.tile(wanted, (n, 1))
        return self.combinations[fits][apportion(self.sizes[fits], n)]

    def _read(self, name: str | tuple[str, ...]) -> np.ndarray:
        """Return the labels ``(C,)`` of a name, -1 for a wildcard.

        Labels may contain the separator, so the name is split such that all parts are known labels.
        """
        cuts = [name] if isinstance(name, tuple) else _cuts(name, len(self.columns))
        cuts = [parts for parts in cuts if len(parts) == len(self.columns)]
        if not cuts:
            form = SEPARATOR.join(self.columns)
            raise InputError(f"{name!r} does not name a label in each of {form}: write {OPEN} for any label")
        read = [[self._code(column, label) for column, label in enumerate(parts)] for parts in cuts]
        whole = [codes for codes in read if None not in codes]
        if len(whole) > 1:
            raise InputError(
                f"{name!r} can be split in more than one way: give its labels as a tuple in Python, or cells that have "
                "them with `like`"
            )
        if not whole:
            parts, codes = min(zip(cuts, read, strict=True), key=lambda cut: cut[1].count(None))
            raise self._unknown(codes.index(None), parts[codes.index(None)])
        return np.array(whole[0], np.int64)

    def _code(self, column: int, label: str) -> int | None:
        """Return the index of a label, -1 for the wildcard, None for an unknown label.

        Spaces around a label do not matter, as no two labels differ only by them.
        """
        found = [code for code, own in enumerate(self.categories[column]) if own.strip() == str(label).strip()]
        return found[0] if found else -1 if label == OPEN else None


def _check_values(column: pd.Series, name: str) -> None:
    """Refuse a continuous column, and labels that a request could not tell apart."""
    values = column.unique()
    if pd.api.types.is_float_dtype(column.dtype) and len(values) > MOST_NUMBERS and (values != np.rint(values)).any():
        raise InputError(
            f"{name!r} holds {len(values)} different numbers, so it is no label: use it as a covariate "
            f"(`continuous={name!r}`), bin it (pandas.cut) or choose another column"
        )
    labels = pd.Index(values.astype(object)).astype(str)
    if labels.has_duplicates:
        raise InputError(f"different values of {name!r} read the same, {labels[labels.duplicated()][0]!r}: rename one")
    stripped = labels.str.strip()
    if stripped.has_duplicates:
        raise InputError(
            f"labels of {name!r} differ only by spaces, such as {stripped[stripped.duplicated()][0]!r}: strip them "
            f"(adata.obs[{name!r}].str.strip())"
        )
    if "" in stripped:
        raise InputError(f"a label of {name!r} is empty: name it or remove its cells")
    if broken := [label for label in labels if not is_text(label)]:
        raise InputError(f"label {broken[0]!a} of {name!r} holds characters that a file cannot hold: rename it")
    if OPEN in stripped:
        raise InputError(f"a label of {name!r} is called {OPEN}, which stands for any label in a request: rename it")


def apportion(shares: np.ndarray, n: int) -> np.ndarray:
    """Return `n` sorted indices in the proportions of `shares`, rounded by largest remainders.

    Examples
    --------
    >>> from wbdit.data.labels import apportion
    >>> apportion(np.array([2, 1, 1]), 6)
    array([0, 0, 0, 1, 1, 2])
    """
    exact = n * shares / shares.sum()
    whole = np.floor(exact).astype(int)
    for k in np.argsort(whole - exact, kind="stable")[: n - whole.sum()]:
        whole[k] += 1
    return np.repeat(np.arange(len(shares)), whole)


def _cuts(name: str, columns: int) -> list[tuple[str, ...]]:
    """Return all ways to split a name at separators into one label per column."""
    pieces = name.split(SEPARATOR)
    ends = combinations(range(1, len(pieces)), columns - 1)
    bounds = [(0, *cut, len(pieces)) for cut in ends]
    return [tuple(SEPARATOR.join(pieces[i:j]) for i, j in pairwise(bound)) for bound in bounds]
