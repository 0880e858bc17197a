"""The labels that cells are conditioned on: columns of obs, their categories, which combinations there were."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from wbdit.data.expression import check_label_sizes, check_labels
from wbdit.errors import InputError

SEPARATOR = "/"  # between the labels of several columns, as in "NK/stim"
OPEN = "*"  # in place of a label: any, as often as in training


@dataclass(frozen=True)
class Labels:
    """The label columns of the training cells.

    A cell's labels are indices ``(C,)``, one into each column's categories; a run without labels has no columns.

    Attributes
    ----------
    columns
        ``(C,)`` columns of ``obs``.
    categories
        The ``K_c`` labels of each column, sorted.
    combinations
        The combinations of labels that training cells had ``(M, C)`` int64, in lexicographic order.
    sizes
        How many cells had each, ``(M,)`` int64.
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
            The cells.
        columns
            Column of ``obs``, or several, or none.

        Raises
        ------
        InputError
            If a column is unknown, named twice or incomplete, or a label has one cell.
        """
        names = (columns,) if isinstance(columns, str) else tuple(columns or ())
        twice = [name for i, name in enumerate(names) if name in names[:i]]
        if twice:
            raise InputError(f"label column {twice[0]!r} is named twice: once is enough")
        for name in names:
            check_labels(adata, name)
            check_label_sizes(adata, name)
        categories = tuple(tuple(map(str, np.unique(adata.obs[name].astype(str).to_numpy()))) for name in names)
        empty = cls(names, categories, np.zeros((0, len(names)), np.int64), np.zeros(0, np.int64))
        codes = empty.codes(adata)
        _, first, sizes = np.unique(empty._keys(codes), return_index=True, return_counts=True)
        return cls(names, categories, codes[first], sizes)

    @property
    def label_sizes(self) -> tuple[int, ...]:
        """Number of labels of each column, as :class:`wbdit.WBDiT` takes it."""
        return tuple(map(len, self.categories))

    def summary(self) -> str:
        """Return the number of labels in words, such as "10 x 2 labels, 19 of their 20 combinations"."""
        if not self.columns:
            return "no labels"
        sizes = [len(categories) for categories in self.categories]
        combined = f", {len(self.sizes)} of their {math.prod(sizes)} combinations" if len(sizes) > 1 else ""
        return f"{' x '.join(map(str, sizes))} labels{combined}"

    def codes(self, adata: ad.AnnData) -> np.ndarray:
        """Return the labels ``(cells, C)`` int64 of cells.

        Raises
        ------
        InputError
            If a column is missing or incomplete, or a label unknown.
        """
        found = []
        for column, (name, categories) in enumerate(zip(self.columns, self.categories, strict=True)):
            check_labels(adata, name)
            labels = adata.obs[name].astype(str)
            codes = pd.Index(categories).get_indexer(pd.Index(labels))
            if (codes < 0).any():
                raise self._unknown(column, labels.iloc[int(np.argmax(codes < 0))])
            found.append(codes)
        return np.array(found, np.int64).reshape(len(found), adata.n_obs).T.copy()

    def training_codes(self, n: int) -> np.ndarray:
        """Return the labels ``(n, C)`` int64 of `n` cells whose combinations are composed as the training cells'."""
        return self.combinations[apportion(self.sizes, n)]

    def codes_like(self, codes: np.ndarray, n: int) -> np.ndarray:
        """Return the labels ``(n, C)`` of `n` cells, composed of combinations as cells of labels ``(cells, C)`` are."""
        _, first, sizes = np.unique(self._keys(codes), return_index=True, return_counts=True)
        return codes[first][apportion(sizes, n)]

    def codes_from_counts(self, counts: Mapping[str | tuple[str, ...], int]) -> np.ndarray:
        """Return the labels ``(cells, C)`` int64 of so many cells of each combination.

        Parameters
        ----------
        counts
            Number of cells by label; with several columns by their labels in order, ``"NK/stim"`` or
            ``("NK", "stim")``. ``"*"`` leaves a column open: drawn as the training cells that fit the rest have it.

        Raises
        ------
        InputError
            If a name cannot be read or is unknown, or no training cell fits one with an open column.
        """
        if not self.columns:
            raise InputError("this run was trained without labels: ask for a number of cells only")
        return np.concatenate([self._fitting(name, n) for name, n in counts.items()])

    def replace(self, codes: np.ndarray, toward: Mapping[str, str]) -> np.ndarray:
        """Return the labels ``(cells, C)`` of cells with those of some columns replaced.

        Raises
        ------
        InputError
            If a column or a label is unknown.
        """
        moved = codes.copy()
        for name, label in toward.items():
            column = self.position(name)
            if label not in self.categories[column]:
                raise self._unknown(column, label)
            moved[:, column] = self.categories[column].index(label)
        return moved

    def position(self, column: str) -> int:
        """Return where a column stands among the run's; an InputError if it is none of them."""
        if column not in self.columns:
            raise InputError(
                f"{column!r} is no label column of this run, which has: {', '.join(self.columns) or 'none'}"
            )
        return self.columns.index(column)

    def combination_index(self, codes: np.ndarray) -> np.ndarray:
        """Return where cells' labels are in :attr:`combinations`, ``(cells,)``; -1 where no training cell had them."""
        known, asked = self._keys(self.combinations), self._keys(codes)
        place = np.minimum(np.searchsorted(known, asked), len(known) - 1)
        return np.where(known[place] == asked, place, -1)

    def unseen(self, codes: np.ndarray) -> list[str]:
        """Name the combinations among cells' labels ``(cells, C)`` that no training cell had."""
        return [self.name(row) for row in np.unique(codes[self.combination_index(codes) < 0], axis=0)]

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
        """Return columns and categories for ``uns``: of one column itself, of several a list and a dict."""
        categories = [np.array(labels, dtype=object) for labels in self.categories]
        if len(self.columns) == 1:
            return {"label": self.columns[0], "categories": categories[0]}
        if not self.columns:
            return {}
        by_column = dict(zip(self.columns, categories, strict=True))
        return {"label": np.array(self.columns, dtype=object), "categories": by_column}

    def _keys(self, codes: np.ndarray) -> np.ndarray:
        """Return a number for each cell's labels ``(cells, C)``, in lexicographic order."""
        keys = np.zeros(len(codes), np.int64)
        for column, labels in enumerate(self.categories):
            keys = keys * len(labels) + codes[:, column]
        return keys

    def _unknown(self, column: int, label: str) -> InputError:
        known = ", ".join(self.categories[column])
        return InputError(f"unknown label {label!r} in {self.columns[column]!r}; the run knows: {known}")

    def _fitting(self, name: str | tuple[str, ...], n: int) -> np.ndarray:
        """Return the labels ``(n, C)`` of `n` cells that fit a name."""
        wanted = self._read(name)
        if (wanted >= 0).all():
            return np.tile(wanted, (n, 1))
        fits = ((wanted < 0) | (self.combinations == wanted)).all(1)
        if not fits.any():
            raise InputError(f"no training cell is {name!r}, to tell what is open in it: name a label in each column")
        return self.combinations[fits][apportion(self.sizes[fits], n)]

    def _read(self, name: str | tuple[str, ...]) -> np.ndarray:
        """Return the labels ``(C,)`` of a name, -1 where it leaves a column open.

        Labels may hold the separator: the name is cut where all parts are labels.
        """
        cuts = [name] if isinstance(name, tuple) else _cuts(name, len(self.columns))
        cuts = [parts for parts in cuts if len(parts) == len(self.columns)]
        if not cuts:
            form = SEPARATOR.join(self.columns)
            raise InputError(
                f"{name!r} does not name a label in each of {form}: write {OPEN} for one that is left open"
            )
        read = [[self._code(column, label) for column, label in enumerate(parts)] for parts in cuts]
        whole = [codes for codes in read if None not in codes]
        if len(whole) > 1:
            raise InputError(f"{name!r} can be read in more than one way: name its labels one by one, as a tuple")
        if not whole:
            parts, codes = min(zip(cuts, read, strict=True), key=lambda cut: cut[1].count(None))
            raise self._unknown(codes.index(None), parts[codes.index(None)])
        return np.array(whole[0], np.int64)

    def _code(self, column: int, label: str) -> int | None:
        """Return the index of a label, -1 for an open column, None for an unknown label."""
        if label in self.categories[column]:
            return self.categories[column].index(label)
        return -1 if label == OPEN else None


def apportion(shares: np.ndarray, n: int) -> np.ndarray:
    """Return `n` indices in the proportions of `shares`, sorted, by largest remainders."""
    exact = n * shares / shares.sum()
    whole = np.floor(exact).astype(int)
    for k in np.argsort(whole - exact, kind="stable")[: n - whole.sum()]:
        whole[k] += 1
    return np.repeat(np.arange(len(shares)), whole)


def _cuts(name: str, columns: int) -> list[tuple[str, ...]]:
    """Return all ways to cut a name into a label for each column at the separators."""
    pieces = name.split(SEPARATOR)
    ends = combinations(range(1, len(pieces)), columns - 1)
    bounds = [(0, *cut, len(pieces)) for cut in ends]
    return [tuple(SEPARATOR.join(pieces[i:j]) for i, j in pairwise(bound)) for bound in bounds]
