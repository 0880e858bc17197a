"""What cells of a combination of labels would express, told from the combinations that training cells have.

The response of one cell type to a treatment is foretold from how other types respond, weighted by how alike the types
are before it: ``exp(r / 0.1)``, with r the correlation of mean log-normalized expression. What rises is added, since a
gene that others induce from nothing is induced from nothing here too. What falls is multiplied, since expression cannot
fall below zero.

Mean log-normalized counts are foretold, and the sizes of negative binomials. Together they give the rates: a gene that
a treatment induces in all cells is less dispersed than at rest, so that its rate rises less than its mean logarithm
suggests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from wbdit.counts.log_means import SIZES, LogMeans, bisect
from wbdit.data.labels import Labels
from wbdit.data.statistics import Statistics
from wbdit.run_config import CombinationRows, ForetoldFacts

TEMPERATURE = 0.1  # of the correlations
FLOOR = 0.02  # mean logarithms below it are noise
DONOR_CELLS = 20  # a combination with fewer cells says nothing of others, and is foretold itself
PRIOR_CELLS = 25  # as many cells' means are about as exact as what is foretold
SIZE_PRIOR = 20.0  # counts; a gene with fewer in a combination has about the size that it has in all of them


class Profiles(NamedTuple):
    """What the cells of M combinations of labels express.

    Attributes
    ----------
    codes
        Labels, ``(M, C)``.
    cells
        Number of cells, ``(M,)``.
    log_mean
        Mean of ln(1 + count per 10,000), ``(M, G)``.
    log_size
        Logarithm of the size of each gene's negative binomial, ``(M, G)``.
    library
        Mean library size, ``(M,)``.
    alike
        Correlations of the mean logarithms, ``(M, M)``.
    """

    codes: np.ndarray
    cells: np.ndarray
    log_mean: np.ndarray
    log_size: np.ndarray
    library: np.ndarray
    alike: np.ndarray

    @classmethod
    def of(
        cls, codes: np.ndarray, cells: np.ndarray, counts: np.ndarray, logs: np.ndarray, library: np.ndarray
    ) -> Profiles:
        """Return the profiles of combinations.

        Parameters
        ----------
        codes, cells
            As in the class.
        counts, logs
            Sums over the cells of counts, and of ln(1 + count per 10,000), ``(M, G)``.
        library
            Sum of the library sizes, ``(M,)``.
        """
        mean, log_mean, library = counts / cells[:, None], logs / cells[:, None], np.maximum(library / cells, 1)
        tables = [LogMeans.at(size) for size in library]

        def expected(log_size: np.ndarray) -> np.ndarray:
            return np.array([table(*row) for table, *row in zip(tables, mean, log_size, strict=True)])

        low, high = np.log(SIZES)  # less dispersed counts have larger mean logarithms
        everywhere = bisect(
            lambda size: cells @ expected(np.broadcast_to(size, mean.shape)) < cells @ log_mean,
            *(mean.shape[1:], low, high),
        )
        prior = SIZE_PRIOR / np.maximum(mean, 1e-9)
        shrunk = cells[:, None] * log_mean + prior * expected(np.broadcast_to(everywhere, mean.shape))
        shrunk /= cells[:, None] + prior
        log_size = bisect(lambda size: expected(size) < shrunk, mean.shape, low, high)
        with np.errstate(invalid="ignore", divide="ignore"):
            alike = np.nan_to_num(np.corrcoef(log_mean)).reshape(len(codes), len(codes))
        return cls(codes, cells, log_mean, log_size, library, alike)


@dataclass(frozen=True)
class Foretold:
    """What is foretold of one combination of labels.

    Attributes
    ----------
    codes
        Its labels, ``(C,)``.
    log_mean, log_size, library
        As in :class:`Profiles`.
    source
        Mean ln(1 + count per 10,000) before the change, ``(G,)``.
    donor
        Index of the combination after the change that has the largest weight.
    similarity
        Correlation of this donor with the source, both before the change.
    """

    codes: np.ndarray
    log_mean: np.ndarray
    log_size: np.ndarray
    library: float
    source: np.ndarray
    donor: int
    similarity: float

    @property
    def shares(self) -> np.ndarray:
        """Expected share of each gene in a cell's counts, ``(G,)``."""
        means = LogMeans.at(self.library).means(self.log_mean, self.log_size)
        return means / means.sum()

    def given(self, cells: int, log_mean: np.ndarray) -> Foretold:
        """Return what is foretold given some cells of the combination, and their means of ln(1 + count per 10,000)."""
        mixed = (cells * log_mean + PRIOR_CELLS * self.log_mean) / (cells + PRIOR_CELLS)
        return replace(self, log_mean=mixed)

    def error(self, log_mean: np.ndarray) -> float:
        """Return the squared error, given the true means of ln(1 + count per 10,000)."""
        return float(((self.log_mean - log_mean) ** 2).sum())

    def r2(self, log_mean: np.ndarray) -> float:
        """Return the share of the true change that is foretold: 1 - error / squared change, at most 1."""
        return 1 - self.error(log_mean) / max(float(((log_mean - self.source) ** 2).sum()), 1e-12)


@dataclass(frozen=True)
class Foretelling:
    """What is foretold of the combinations of a run's labels.

    Attributes
    ----------
    profiles
        The combinations of the training cells.
    unseen
        Combinations that no training cell has, and those of fewer than :data:`DONOR_CELLS`. Those from which no other
        differs in one label alone are left out.
    held_out
        The other combinations of the training cells, by their index, each foretold without its own cells.
    """

    profiles: Profiles
    unseen: tuple[Foretold, ...]
    held_out: dict[int, Foretold]

    @classmethod
    def of(cls, codes: np.ndarray, label_sizes: Sequence[int], statistics: Statistics) -> Foretelling | None:
        """Foretell all combinations of labels.

        Parameters
        ----------
        codes
            Labels of the training cells, ``(n, C)``.
        label_sizes
            Number of labels of each column, ``(C,)``.
        statistics
            Of the training cells.

        Returns
        -------
        None if the statistics have no sums by combination.
        """
        if statistics.by_combination is None:
            return None
        seen, which, cells = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
        library = np.bincount(which.reshape(-1), statistics.totals)
        profiles = Profiles.of(seen, cells, *statistics.by_combination, library)
        by_column = [
            {k: one for k, row in enumerate(seen) if (one := foretell(profiles, row, column, k)) is not None}
            for column in range(len(label_sizes))
        ]
        best = _best_first(profiles, by_column)
        without: dict[int, Foretold] = {}
        for column in reversed(best):
            without |= by_column[column]
        few = [k for k in without if cells[k] < DONOR_CELLS]
        known = set(map(tuple, seen.tolist()))
        targets = (np.array(target) for target in np.ndindex(*label_sizes) if target not in known)
        unseen = [next(filter(None, (foretell(profiles, target, c) for c in best)), None) for target in targets]
        unseen += [without.pop(k).given(int(cells[k]), profiles.log_mean[k]) for k in sorted(few)]
        return cls(profiles, tuple(filter(None, unseen)), dict(sorted(without.items())))

    @property
    def seen(self) -> np.ndarray:
        """Indices of the combinations that are not foretold."""
        foretold = {tuple(one.codes) for one in self.unseen}
        return np.array([k for k, row in enumerate(self.profiles.codes) if tuple(row) not in foretold])

    def log_mean(self, k: int) -> np.ndarray:
        """Return a known combination's mean ln(1 + count per 10,000) ``(G,)``, shrunk to what is foretold of it."""
        known, cells = self.profiles.log_mean[k], int(self.profiles.cells[k])
        return self.held_out[k].given(cells, known).log_mean if k in self.held_out else known

    @property
    def rows(self) -> CombinationRows:
        """Numbers of combinations, for :class:`wbdit.counts.combinations.Combinations`."""
        return CombinationRows(len(self.seen), len(self.unseen), len(self.held_out))

    def facts(self, labels: Labels) -> ForetoldFacts:
        """Return what a user is told of it."""
        return ForetoldFacts(
            left_out={labels.name(one.codes): one.r2(self.profiles.log_mean[k]) for k, one in self.held_out.items()},
            nearest={
                labels.name(one.codes): (labels.name(self.profiles.codes[one.donor]), one.similarity)
                for one in self.unseen
            },
        )


def foretell(profiles: Profiles, target: np.ndarray, column: int, without: int | None = None) -> Foretold | None:
    """Foretell a combination from those that differ from it in the label of one column.

    Parameters
    ----------
    profiles
        The known combinations.
    target
        Labels ``(C,)``.
    column
        The column.
    without
        Index of a combination that is not used.

    Returns
    -------
    None if no known combination differs in this label alone, or no others show the same change.
    """
    triples = _triples(profiles, target, column, without)
    if not triples:
        return None
    source, before, after = np.array(triples).T
    alike = profiles.alike[source, before]
    weights = np.exp((alike - alike.max()) / TEMPERATURE)
    weights /= weights.sum()
    start, low, high = (weights @ profiles.log_mean[rows] for rows in (source, before, after))
    log_size, log_library = (
        weights @ (table[source] + table[after] - table[before])
        for table in (profiles.log_size, np.log(profiles.library))
    )
    best = int(weights.argmax())
    return Foretold(
        codes=target,
        log_mean=np.where(high > low, start + high - low, start * (high + FLOOR) / (low + FLOOR)),
        log_size=np.clip(log_size, *np.log(SIZES)),
        library=float(np.exp(log_library)),
        source=start,
        donor=int(after[best]),
        similarity=float(alike[best]),
    )


def _triples(profiles: Profiles, target: np.ndarray, column: int, without: int | None) -> list[tuple[int, int, int]]:
    """Return the indices of sources, and of donors before and after the same change."""
    known = {tuple(row): k for k, row in enumerate(profiles.codes.tolist()) if k != without}
    wanted = target.tolist()
    changed = [(row, k) for row, k in known.items() if row[column] == wanted[column]]
    found = []
    for label in sorted({row[column] for row in known} - {wanted[column]}):
        source = known.get((*wanted[:column], label, *wanted[column + 1 :]))
        if source is None:
            continue
        for row, after in changed:
            before = known.get((*row[:column], label, *row[column + 1 :]))
            if before not in (None, source) and min(profiles.cells[[before, after]]) >= DONOR_CELLS:
                found.append((source, before, after))
    return found


def _best_first(profiles: Profiles, by_column: Sequence[dict[int, Foretold]]) -> list[int]:
    """Return the columns, that first whose changes foretell the known combinations best.

    `by_column` has what each column foretells of the known combinations, by their index.
    """
    comparable = set.intersection(*map(set, by_column))

    def error(column: int) -> float:
        errors = [one.error(profiles.log_mean[k]) for k, one in by_column[column].items() if k in comparable]
        return float(np.mean(errors)) if errors else -len(by_column[column])

    return sorted(range(len(by_column)), key=error)
