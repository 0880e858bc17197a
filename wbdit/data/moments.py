"""Mean and variance of each gene, gathered over chunks of cells."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp


class Moments:
    """Sum, mean and variance of each gene over cells that are added chunk by chunk, all fp64.

    Sums of integers are exact. Squared deviations are taken from each chunk's own mean and merged (Chan, Golub and
    LeVeque 1983, The American Statistician 37), so they do not cancel.

    Parameters
    ----------
    genes
        Number of genes G.

    Attributes
    ----------
    n
        Number of cells so far.
    sums
        Sum of each gene, ``(G,)``.

    Examples
    --------
    >>> from wbdit.data.moments import Moments
    >>> moments = Moments(765)
    >>> for part in (cells.X[:400], cells.X[400:]):
    ...     moments.add(part)
    >>> np.allclose(moments.variance(), cells.X.toarray().var(0, dtype=np.float64))
    True
    """

    def __init__(self, genes: int) -> None:
        self.n = 0
        self.sums = np.zeros(genes)
        self._squares = np.zeros(genes)  # of the deviations from the mean

    def add(self, X: sp.csr_matrix) -> None:
        """Add cells ``(B, G)``."""
        n, genes = X.shape
        data = X.data.astype(np.float64)
        sums = np.bincount(X.indices, data, minlength=genes)
        mean = sums / n
        zeros = n - np.bincount(X.indices, minlength=genes)
        squares = np.bincount(X.indices, (data - mean[X.indices]) ** 2, minlength=genes) + zeros * mean**2
        if self.n:
            squares += (mean - self.mean) ** 2 * (self.n * n / (self.n + n))
        self._squares += squares
        self.sums += sums
        self.n += n

    @property
    def mean(self) -> np.ndarray:
        """Mean of each gene, ``(G,)``."""
        return self.sums / max(self.n, 1)

    def variance(self, lost: int = 0) -> np.ndarray:
        """Return the variance of each gene, ``(G,)``, divided by the number of cells less `lost`."""
        return self._squares / max(self.n - lost, 1)
