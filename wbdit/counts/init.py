"""Initial values of the count model: each label's rates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def label_rates(counts: np.ndarray, codes: np.ndarray, label_sizes: Sequence[int], strength: float = 1.0) -> np.ndarray:
    """Return the log ratio of each label's expression to the average, per gene.

    The ratio is the observed counts of the label's cells over their expected counts. Both are increased by the counts
    of `strength` average cells: a gamma prior of mean 1, which shrinks the ratios of labels with few cells. With
    several columns the ratios multiply and are fitted in turn.

    Parameters
    ----------
    counts
        Raw counts ``(n, G)``.
    codes
        Labels ``(n, C)`` int64.
    label_sizes
        Number of labels K_c of each column.
    strength
        Strength of the prior, in average cells.

    Returns
    -------
    Log ratios ``(sum_c (K_c + 1), G)`` fp32. Each column's last row stands for no label and is zero.
    """
    share = counts.sum(0, dtype=np.float64) / counts.sum(dtype=np.float64) + 1e-9
    library = counts.sum(1, dtype=np.float64)
    prior = strength * library.mean() * share
    tables = [np.zeros((labels + 1, counts.shape[1])) for labels in label_sizes]
    for _ in range(5 if len(tables) > 1 else min(len(tables), 1)):
        for column, table in enumerate(tables):
            others = [other[codes[:, c]] for c, other in enumerate(tables) if c != column]
            expected = library[:, None] * share * np.exp(sum(others)) if others else library[:, None] * share
            for label in range(len(table) - 1):
                cells = codes[:, column] == label
                table[label] = np.log((counts[cells].sum(0) + prior) / (expected[cells].sum(0) + prior))
    return np.concatenate(tables).astype(np.float32) if tables else np.zeros((0, counts.shape[1]), np.float32)


def expected_counts(counts: np.ndarray, codes: np.ndarray, rates: np.ndarray, label_sizes: Sequence[int]) -> np.ndarray:
    """Return the counts ``(n, G)`` fp32 expected from each cell's labels and library size.

    Parameters
    ----------
    counts, codes, label_sizes
        As in :func:`label_rates`.
    rates
        Result of :func:`label_rates`.
    """
    share = counts.sum(0, dtype=np.float64) / counts.sum(dtype=np.float64)
    first = np.cumsum([0, *(labels + 1 for labels in label_sizes)])[:-1]
    log_ratio = rates[codes + first].sum(1)  # [n, G]
    return (counts.sum(1, keepdims=True) * share.astype(np.float32) * np.exp(log_ratio)).astype(np.float32)
