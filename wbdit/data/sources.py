"""Training cells in memory: checked, preprocessed and dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np

from wbdit.data.matrix import Source
from wbdit.data.preprocessor import Preprocessor


@dataclass(frozen=True)
class TrainingData:
    """Training cells as arrays, with their preprocessor.

    Attributes
    ----------
    preprocessor
        Genes, labels and values.
    matrix
        Expression of the preprocessor's genes, in the cells' own space, ``(n, G)`` fp32.
    codes
        Labels ``(n, C)`` int64, see :class:`wbdit.data.labels.Labels`.
    covariates
        Covariates ``(n, K)`` fp64 in the cells' own units, see :class:`wbdit.data.covariates.Covariates`.
    """

    preprocessor: Preprocessor
    matrix: np.ndarray
    codes: np.ndarray
    covariates: np.ndarray

    @classmethod
    def fit(
        cls,
        adata: ad.AnnData,
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
        """Fit a preprocessor and apply it; arguments and errors as in :meth:`Preprocessor.fit_matrix`."""
        preprocessor, matrix = Preprocessor.fit_matrix(
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
        return cls(preprocessor, matrix, preprocessor.labels.codes(adata), preprocessor.covariates.read(adata))

    @classmethod
    def of(cls, preprocessor: Preprocessor, adata: ad.AnnData) -> TrainingData:
        """Apply the preprocessor of an earlier run to cells.

        Raises
        ------
        InputError
            If genes, labels or covariates are missing, or the cells are in another expression space.
        """
        matrix, covariates = preprocessor.matrix(adata), preprocessor.covariates.read(adata)
        return cls(preprocessor, matrix, preprocessor.labels.codes(adata), covariates)

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def counts(self) -> np.ndarray | None:
        """Raw counts ``(n, G)`` fp32 if the model has a count likelihood, else None."""
        return self.matrix if self.preprocessor.values == "log1p" else None

    @property
    def values(self) -> np.ndarray:
        """The model's input, ``(n, G)`` fp32."""
        return self.preprocessor.scaled(self.matrix)

    @property
    def scaled_covariates(self) -> np.ndarray | None:
        """The model's input for covariates, ``(n, K)`` fp32; None for a run without."""
        covariates = self.preprocessor.covariates
        return covariates.encode(self.covariates) if covariates.columns else None

    def take(self, rows: np.ndarray) -> TrainingData:
        """Return the cells at the given rows."""
        return TrainingData(self.preprocessor, self.matrix[rows], self.codes[rows], self.covariates[rows])
