"""Cells to compare on: a file, its label columns, and one split and choice of genes for all peers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp

from bench.quality.peers.peer import LABEL, joined
from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.data.expression import check_cells, check_labels, read_h5ad
from wbdit.data.matrix import find_expression
from wbdit.data.split import split
from wbdit.data.variable_genes import variable_genes
from wbdit.errors import InputError

FEWEST = 3  # cells per label: two to train on and one to hold out


@dataclass(frozen=True)
class Choice:
    """The split of the cells, and the selection of cells and genes.

    Attributes
    ----------
    share
        Share of each label's cells to train on, rounded up.
    genes
        Maximum number of genes; the most variable ones in the training cells are kept.
    cells
        Maximum number of held-out cells, chosen at random; as many are generated and scored.
    leave_out
        Labels whose cells are dropped.
    """

    share: float = 2 / 3
    genes: int = 2000
    cells: int = 1000
    leave_out: tuple[str, ...] = ("unassigned",)


@dataclass(frozen=True)
class Split:
    """Raw counts of the chosen genes, with the label columns in ``obs``; `notes` list what was left out."""

    train: ad.AnnData
    test: ad.AnnData
    notes: tuple[str, ...]


@dataclass(frozen=True)
class DataSet:
    """An ``.h5ad`` file and the columns of ``obs`` to condition on; the first defines the types for scores by type."""

    path: Path
    labels: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, default: Sequence[str]) -> DataSet:
        """Read ``FILE.h5ad`` or ``FILE.h5ad:column,column``."""
        path, colon, columns = text.rpartition(":")
        if not colon or columns.endswith(".h5ad"):
            return cls(Path(text), tuple(default))
        return cls(Path(path), tuple(column.strip() for column in columns.split(",")))

    @property
    def name(self) -> str:
        return self.path.stem

    def digest(self) -> str:
        """Return the file's SHA-256 digest, a part of the key of a result."""
        if not self.path.is_file():
            raise InputError(f"no such file: {self.path}")
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def split(self, choice: Choice, seed: int) -> Split:
        """Split the cells into training and held-out cells, stratified by combination of labels.

        Raises
        ------
        InputError
            If the file has no raw counts or lacks a label.
        """
        adata = read_h5ad(self.path)
        check_cells(adata, self.labels[0])
        for label in self.labels[1:]:
            check_labels(adata, label)
        expression = find_expression(adata)
        if expression.space != "counts":
            raise InputError(f"{self.path}: {expression.found}, but peers need raw counts")
        counts = sp.csr_matrix(expression.X, dtype=np.float32)
        cells = ad.AnnData(counts, obs=adata.obs[list(self.labels)], var=expression.var[[]])
        cells.obs[LABEL] = joined(cells.obs, self.labels)
        cells, notes = _without(cells, self.labels, choice.leave_out)
        train, test = split(cells, label=LABEL, share=choice.share, seed=seed)
        if test.n_obs > choice.cells:
            notes.append(f"{choice.cells} of {test.n_obs} held-out cells are used")
            test = test[np.sort(np.random.default_rng(seed).choice(test.n_obs, choice.cells, replace=False))]
        if train.n_vars > choice.genes:
            keep = variable_genes(MemoryMatrix(train.X), "counts", choice.genes)
            train, test = train[:, keep], test[:, keep]
            notes.append(f"{keep.sum()} variable genes of {cells.n_vars}, chosen on the training cells")
        train, test = (_with_counts(part, name, notes) for part, name in ((train, "training"), (test, "held-out")))
        return Split(train, test, tuple(notes))


def _without(cells: ad.AnnData, labels: Sequence[str], leave_out: Sequence[str]) -> tuple[ad.AnnData, list[str]]:
    """Drop cells whose label is in `leave_out`, and labels with too few cells to split."""
    notes = []
    unnamed = cells.obs[list(labels)].astype(str).isin(leave_out).any(axis=1).to_numpy()
    rare = cells.obs.loc[~unnamed, LABEL].value_counts().loc[lambda sizes: sizes < FEWEST].index
    few = cells.obs[LABEL].isin(rare).to_numpy() & ~unnamed
    if unnamed.any():
        notes.append(f"{unnamed.sum()} cells labeled {' or '.join(leave_out)} are left out")
    if few.any():
        notes.append(f"{few.sum()} cells of labels with fewer than {FEWEST} are left out")
    if (unnamed | few).all():
        raise InputError("no cells are left: all labels are left out or too rare; check --label and --leave-out")
    return cells[~(unnamed | few)].copy(), notes


def _with_counts(cells: ad.AnnData, name: str, notes: list[str]) -> ad.AnnData:
    """Drop cells without any count over the chosen genes, for all peers; scVI does not accept such cells."""
    empty = np.asarray(cells.X.sum(1)).ravel() == 0
    if empty.any():
        notes.append(f"{empty.sum()} {name} cells without any count over these genes are left out")
    cells = cells[~empty].copy()
    del cells.obs[LABEL]
    return cells
