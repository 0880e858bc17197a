"""Training cells: checked and preprocessed, made dense only where they are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np

from wbdit.data.cell_matrix import CellMatrix, MemoryMatrix, chunks, dense_chunks
from wbdit.data.cells import Cells
from wbdit.data.compact_matrix import CompactMatrix
from wbdit.data.matrix import Source
from wbdit.data.preprocessor import Preprocessor
from wbdit.data.statistics import Statistics, training_combinations, training_groups


@dataclass(frozen=True)
class TrainingData:
    """Training cells with their preprocessor.

    Attributes
    ----------
    preprocessor
        Genes, labels and values.
    cells
        Expression of the preprocessor's genes, in the cells' own space.
    codes
        Labels ``(n, C)`` int64, see :class:`wbdit.data.labels.Labels`.
    covariates
        Covariates ``(n, K)`` fp64 in the cells' own units, see :class:`wbdit.data.covariates.Covariates`.
    totals
        Sum of each cell's expression over the genes, ``(n,)`` fp64: the library sizes of counts.
    known
        Statistics of the cells, if they were learned before.
    """

    preprocessor: Preprocessor
    cells: CellMatrix
    codes: np.ndarray
    covariates: np.ndarray
    totals: np.ndarray
    known: Statistics | None = None

    @classmethod
    def fit(
        cls,
        adata: ad.AnnData | Cells,
        *,
        label: str | Sequence[str] | None = None,
        continuous: str | Sequence[str] | None = None,
        max_genes: int | None = 2000,
        lognorm: bool = False,
        centered: bool = True,
        source: Source | None = None,
        genes: str | Sequence[str] | None = None,
        batch_key: str | None = None,
    ) -> TrainingData:
        """Fit a preprocessor and apply it; arguments and errors as in :meth:`Preprocessor.fit_cells`."""
        adata = Cells.of(adata)
        preprocessor, cells, found = Preprocessor.fit_cells(
            adata,
            label=label,
            continuous=continuous,
            max_genes=max_genes,
            lognorm=lognorm,
            centered=centered,
            source=source,
            genes=genes,
            batch_key=batch_key,
        )
        codes, covariates = preprocessor.labels.codes(adata), preprocessor.covariates.read(adata)
        return cls(preprocessor, cells, codes, covariates, found.totals, found)

    @classmethod
    def of(cls, preprocessor: Preprocessor, adata: ad.AnnData | Cells) -> TrainingData:
        """Apply the preprocessor of an earlier run to cells.

        Raises
        ------
        InputError
            If genes, labels or covariates are missing, or the cells are in another expression space.
        """
        adata = Cells.of(adata)
        cells, covariates = CompactMatrix.of(preprocessor.cells(adata)), preprocessor.covariates.read(adata)
        totals = np.concatenate([np.asarray(X.sum(1, dtype=np.float64)).ravel() for _, X in chunks(cells)])
        return cls(preprocessor, cells, preprocessor.labels.codes(adata), covariates, totals)

    def __len__(self) -> int:
        return self.cells.shape[0]

    @property
    def has_counts(self) -> bool:
        """Whether the model has a count likelihood, so that it is trained on the counts themselves."""
        return self.preprocessor.values == "log1p"

    @property
    def statistics(self) -> Statistics:
        """Statistics of the cells; learned in one pass if they are not known."""
        if self.known is not None:
            return self.known
        sizes = self.preprocessor.labels.label_sizes
        groups = training_groups(self.codes, sizes, self.scaled_covariates)
        combinations = training_combinations(self.codes, sizes, self.cells.shape[1]) if self.has_counts else None
        return Statistics.of(self.cells, self.preprocessor.values, groups, combinations)

    @property
    def log_library(self) -> np.ndarray:
        """Natural logarithm of the library sizes, ``(n,)`` fp32; 0 for an empty cell."""
        return np.log(np.maximum(self.totals, 1)).astype(np.float32)

    def dense(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the expression of the cells with these indices, ``(B, G)`` fp32."""
        return self.cells.rows(np.arange(len(self))[rows]).toarray()

    def values(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the model's input for the cells with these indices, ``(B, G)`` fp32."""
        return self.preprocessor.scaled(self.dense(rows))

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the expression of all cells in order, as slices of their indices and dense fp32 chunks."""
        return dense_chunks(self.cells)

    @property
    def scaled_covariates(self) -> np.ndarray | None:
        """The model's input for covariates, ``(n, K)`` fp32; None for a run without."""
        covariates = self.preprocessor.covariates
        return covariates.encode(self.covariates) if covariates.columns else None

    def take(self, rows: np.ndarray) -> TrainingData:
        """Return the cells at the given rows."""
        parts = self.codes[rows], self.covariates[rows], self.totals[rows]
        return TrainingData(self.preprocessor, self.cells.select(rows), *parts)

    def with_counts(self, counts: np.ndarray) -> TrainingData:
        """Return cells with the same labels and covariates, and these counts ``(n, G)``."""
        totals = counts.sum(1, dtype=np.float64)
        return TrainingData(self.preprocessor, MemoryMatrix(counts), self.codes, self.covariates, totals)
