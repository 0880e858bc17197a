"""Initial values of the count model: each label's rates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from wbdit.data.cell_matrix import cells_per_chunk

ROUNDS = 5  # over several label columns, whose rates are fitted in turn


def label_rates(
    totals: np.ndarray, by_label: Sequence[np.ndarray], codes: np.ndarray, library: np.ndarray, strength: float = 1.0
) -> np.ndarray:
    """Return the log ratio of each label's expression to the average, per gene.

    The ratio is the observed counts of the label's cells over their expected counts. Both are increased by the counts
    of `strength` average cells: a gamma prior of mean 1, which shrinks the ratios of labels with few cells. With
    several columns the ratios multiply and are fitted in turn. The expected counts follow from the library sizes of
    each combination of labels, so the cells themselves are not read.

    Parameters
    ----------
    totals
        Sum of each gene's counts, ``(G,)``.
    by_label
        Sums over the cells of each label, ``(K_c, G)`` per column.
    codes
        Labels ``(n, C)`` int64.
    library
        Library sizes ``(n,)``.
    strength
        Strength of the prior, in average cells.

    Returns
    -------
    Log ratios ``(sum_c (K_c + 1), G)`` fp32. Each column's last row stands for no label and is zero.
    """
    share = totals / totals.sum() + 1e-9
    prior = strength * library.mean() * share
    combinations, of_combination = _pooled(codes, library)
    ratios = [np.ones_like(observed) for observed in by_label]
    for _ in range(ROUNDS if len(ratios) > 1 else 1):
        for column, (ratio, observed) in enumerate(zip(ratios, by_label, strict=True)):
            expected = _expected_by_label(share, ratios, column, combinations, of_combination)
            ratio[:] = (observed + prior) / (expected + prior)
    tables = [np.concatenate([np.log(ratio), np.zeros((1, len(totals)))]) for ratio in ratios]
    return np.concatenate([np.zeros((0, len(totals))), *tables]).astype(np.float32)


class ExpectedCounts:
    """The counts that labels and library sizes let expect.

    Parameters
    ----------
    totals, codes, library
        As in :func:`label_rates`.
    rates
        Result of :func:`label_rates`.
    label_sizes
        Number of labels K_c of each column.
    """

    def __init__(
        self,
        totals: np.ndarray,
        codes: np.ndarray,
        library: np.ndarray,
        rates: np.ndarray,
        label_sizes: Sequence[int],
    ) -> None:
        first = np.cumsum([0, *(labels + 1 for labels in label_sizes)])[:-1]
        self.share = (totals / totals.sum()).astype(np.float32)
        self.ratios = np.exp(rates)
        self.rows = codes + first
        self.library = library.astype(np.float32)

    def __len__(self) -> int:
        return len(self.library)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return the expected counts of some cells, ``(B, G)`` fp32."""
        found = self.library[part, None] * self.share
        for column in self.rows[part].T:
            found *= self.ratios[column]
        return found


def cell_slices(n: int, genes: int) -> list[slice]:
    """Return slices of `n` cells, each of about :data:`wbdit.data.cell_matrix.CHUNK_VALUES` values."""
    size = cells_per_chunk(genes)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def pooled(group: np.ndarray, size: int, values: np.ndarray) -> np.ndarray:
    """Return the sums ``(size, G)`` of values ``(B, G)`` over groups ``(B,)``."""
    return sp.csr_matrix((np.ones(len(group)), (group, np.arange(len(group)))), shape=(size, len(group))) @ values


def _pooled(codes: np.ndarray, library: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the combinations of labels ``(M, C)`` and the sum of the library sizes of each, ``(M,)``."""
    which = np.zeros(len(codes), np.int64)
    for column in codes.T:  # renumbered for each column, so that no product of label numbers overflows
        which = np.unique(which * (int(column.max()) + 1) + column, return_inverse=True)[1]
    return codes[np.unique(which, return_index=True)[1]], np.bincount(which, library)


def _expected_by_label(
    share: np.ndarray, ratios: Sequence[np.ndarray], column: int, combinations: np.ndarray, library: np.ndarray
) -> np.ndarray:
    """Return the counts that the other columns let expect in the cells of each label of a column, ``(K_c, G)``."""
    expected = np.zeros_like(ratios[column])
    for part in cell_slices(len(combinations), len(share)):
        counts = library[part, None] * share
        for other, ratio in enumerate(ratios):
            if other != column:
                counts *= ratio[combinations[part, other]]
        expected += pooled(combinations[part, column], len(expected), counts)
    return expected
