"""Cells without one combination of labels, and its real cells in two halves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp

from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.data.expression import read_h5ad
from wbdit.data.matrix import find_expression
from wbdit.data.variable_genes import variable_genes

GENES = 2000


@dataclass(frozen=True)
class Change:
    """A change of one label column: cells are known `before`, and some labels of `column` lack `after`."""

    column: str
    condition: str
    before: str
    after: str


@dataclass(frozen=True)
class LeftOut:
    """Training cells and what they lack.

    Attributes
    ----------
    train
        Counts of the training cells.
    before, truth
        Halves of the label's real cells before and after the change, for the judge.
    own, other
        The other halves: the label's own cells, for methods that change cells, and the ceiling.
    name
        The label whose combination is left out.
    """

    train: ad.AnnData
    before: ad.AnnData
    truth: ad.AnnData
    own: ad.AnnData
    other: ad.AnnData
    name: str


def read(path: Path, change: Change, drop: Sequence[str]) -> ad.AnnData:
    """Return raw counts in X and the two label columns of the cells whose label is not in `drop`."""
    cells = read_h5ad(path)
    found = find_expression(cells)
    obs = cells.obs[[change.column, change.condition]].astype(str)
    kept = ~obs[change.column].isin(drop).to_numpy()
    X = sp.csr_matrix(found.X, dtype=np.float32)[np.flatnonzero(kept)]
    return ad.AnnData(X, obs=obs[kept].astype("category"), var=found.var[[]])


def leave_out(
    cells: ad.AnnData, change: Change, left: Sequence[str], seed: int, real: int = 0, seen: Sequence[str] = ()
) -> LeftOut:
    """Leave the cells of ``label/after`` out, for the labels `left`; the first of them is judged.

    2,000 genes are chosen on cells without those. Half of the labels' cells before the change are left out too, since
    all is compared with them. `real` cells of the first label after the change are given after all, none of them among
    those that all is compared with. With `seen`, only such halves of these labels are left out.
    """
    label, condition = (cells.obs[name].to_numpy(str) for name in (change.column, change.condition))
    names = sorted({*left, *seen})
    out = np.isin(label, names) & (condition == change.after)
    keep = np.flatnonzero(variable_genes(MemoryMatrix(cells.X[np.flatnonzero(~out)]), "counts", GENES))
    train, halves = ~out, {}
    for name in names:
        rng = np.random.default_rng([seed, *name.encode()])
        after, before = (
            rng.permutation(np.flatnonzero((label == name) & (condition == which)))
            for which in (change.after, change.before)
        )
        halves[name] = before[::2], after[::2], before[1::2], after[1::2]
        train[before[::2]] = False
        if seen:
            train[after[1::2]] = True
    before, truth, own, other = halves[left[0]]
    train[other[:real]] = True
    parts = (np.flatnonzero(train), before, truth, own, other)
    return LeftOut(*(cells[rows, keep].copy() for rows in parts), left[0])
