"""The cells that a model is trained on: checked, told and made dense once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np

from wbdit.data.preprocessor import Preprocessor


@dataclass(frozen=True)
class TrainingData:
    """Cells in memory, with all that is known of them.

    Attributes
    ----------
    preprocessor
        Genes, labels and values.
    matrix
        Expression in the space of the cells over the preprocessor's genes, ``(n, G)`` fp32.
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
        max_genes: int = 2000,
        lognorm: bool = False,
        centered: bool = True,
    ) -> TrainingData:
        """Learn a preprocessor from cells and take them; arguments and errors as in :meth:`Preprocessor.fit_matrix`."""
        preprocessor, matrix = Preprocessor.fit_matrix(
            adata, label=label, max_genes=max_genes, lognorm=lognorm, centered=centered
        )
        return cls(preprocessor, matrix, preprocessor.labels.codes(adata))

    @classmethod
    def of(cls, preprocessor: Preprocessor, adata: ad.AnnData) -> TrainingData:
        """Take the cells of an earlier run again.

        Raises
        ------
        InputError
            If genes or labels are missing, or the cells are in another space.
        """
        return cls(preprocessor, preprocessor.matrix(adata), preprocessor.labels.codes(adata))

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def counts(self) -> np.ndarray | None:
        """Raw counts ``(n, G)`` fp32 where their likelihood is modelled, else None."""
        return self.matrix if self.preprocessor.values == "log1p" else None

    @property
    def values(self) -> np.ndarray:
        """Cells as the model sees them, ``(n, G)`` fp32."""
        return self.preprocessor.scaled(self.matrix)

    def take(self, rows: np.ndarray) -> TrainingData:
        """Return the cells of some rows."""
        return TrainingData(self.preprocessor, self.matrix[rows], self.codes[rows])
