"""A fingerprint of training cells, by which a resumed run recognizes them."""

from __future__ import annotations

import hashlib

import numpy as np
import scipy.sparse as sp

from wbdit.data.cell_matrix import chunks
from wbdit.data.sources import TrainingData


class Fingerprint:
    """SHA-256 of cells, which are given in any number of parts.

    It depends neither on the parts nor on how the matrix is stored. Zeros are left out, so that sparse cells are hashed
    at the speed of their nonzero values.

    Examples
    --------
    >>> from wbdit.data.fingerprint import Fingerprint
    >>> whole, parts = Fingerprint(), Fingerprint()
    >>> x, codes, none = np.eye(4, dtype=np.float32), np.arange(4)[:, None], np.zeros((4, 0))
    >>> whole.update(x, codes, none)
    >>> for rows in (slice(0, 1), slice(1, 4)):
    ...     parts.update(x[rows], codes[rows], none[rows])
    >>> whole.digests() == parts.digests()
    True
    """

    def __init__(self) -> None:
        self._matrix = [hashlib.sha256() for _ in range(3)]  # numbers of nonzeros, their columns, their values
        self._labels = hashlib.sha256()
        self._covariates = hashlib.sha256()

    @classmethod
    def of(cls, *parts: TrainingData | None) -> dict[str, str]:
        """Return the digests of cells, such as the training cells and those held out, if any."""
        own = cls()
        for data in parts:
            if data is not None:
                for rows, matrix in chunks(data.cells):
                    own.update(matrix, data.codes[rows], data.covariates[rows])
        return own.digests()

    def update(self, matrix: np.ndarray | sp.csr_matrix, codes: np.ndarray, covariates: np.ndarray) -> None:
        """Add cells.

        Parameters
        ----------
        matrix
            Expression ``(n, G)``, dense or CSR; hashed as fp32.
        codes
            Labels ``(n, C)`` int64.
        covariates
            Covariates ``(n, K)`` fp64.
        """
        rows = sp.csr_matrix(matrix, copy=sp.issparse(matrix))
        rows.sum_duplicates()  # sorts the columns too
        rows.eliminate_zeros()
        parts = (np.diff(rows.indptr).astype("<i8"), rows.indices.astype("<i8"), rows.data.astype("<f4"))
        for digest, part in zip(self._matrix, parts, strict=True):
            digest.update(part.tobytes())
        self._labels.update(np.ascontiguousarray(codes, "<i8").tobytes())
        self._covariates.update(np.ascontiguousarray(covariates, "<f8").tobytes())

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of the expression, the labels and the covariates."""
        matrix = hashlib.sha256(b"".join(digest.digest() for digest in self._matrix))
        parts = {"expression": matrix, "labels": self._labels, "covariates": self._covariates}
        return {name: digest.hexdigest() for name, digest in parts.items()}
