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
    """

    preprocessor: Preprocessor
    matrix: np.ndarray
    codes: np.ndarray

    @classmethod
    def fit(
        cls,
        adata: ad.AnnData,
        *,
        label: str | Sequence[str] | None = None,
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
            max_genes=max_genes,
            lognorm=lognorm,
            centered=centered,
            source=source,
            genes=genes,
            batch_key=batch_key,
        )
        return cls(preprocessor, matrix, preprocessor.labels.codes(adata))

    @classmethod
    def of(cls, preprocessor: Preprocessor, adata: ad.AnnData) -> TrainingData:
        """Apply the preprocessor of an earlier run to cells.

        Raises
        ------
        InputError
            If genes or labels are missing, or the cells are in another expression space.
        """
        return cls(preprocessor, preprocessor.matrix(adata), preprocessor.labels.codes(adata))

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

    def take(self, rows: np.ndarray) -> TrainingData:
        """Return the cells at the given rows."""
        return TrainingData(self.preprocessor, self.matrix[rows], self.codes[rows])
