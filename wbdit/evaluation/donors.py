"""Membership of donors: whether one can find out whose cells a generator was trained on.

Examples assume ``from wbdit.evaluation.donors import *``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wbdit.errors import need_extra
from wbdit.evaluation.intervals import Estimate, auc, normal, standard_error

Array = np.ndarray[Any, Any]

LEVELS = 8  # of a gene's values
GENES = 200  # most variable ones that the densities are of
MIN_DONORS = 5  # of each kind, for a rate over donors
MIN_DONOR_CELLS = 10
CELLS_PER_DONOR = (1, 10, 100)
DRAWS = 20  # of cells, per donor
MOST_CELLS = 2000  # that a density is fitted on


@dataclass(frozen=True)
class Copula:
    """Density of cells: a histogram per gene, joined by a Gaussian copula.

    Attributes
    ----------
    edges
        ``(genes, LEVELS - 1)`` limits of the levels of each gene's values.
    log_share
        ``(genes, LEVELS)`` logarithms of the shares of cells on each level.
    scores
        ``(genes, LEVELS)`` normal scores of the levels.
    precision, log_determinant
        Inverse of the correlation of the scores, shrunk to the identity (Chen et al., IEEE Trans. Signal Process. 58,
        2010), less the identity, ``(genes, genes)``; and the logarithm of the correlation's determinant.
    """

    edges: Array
    log_share: Array
    scores: Array
    precision: Array
    log_determinant: float

    @classmethod
    def fit(cls, cells: Array, edges: Array) -> Copula:
        """Fit the density of cells ``(n, genes)`` on levels from :func:`level_edges`."""
        try:
            from sklearn.covariance import OAS
        except ImportError:
            raise need_extra("scikit-learn") from None
        from scipy.stats import norm

        levels = _levels(cells, edges)
        genes = np.arange(levels.shape[1])
        counts = np.full((len(genes), LEVELS), 0.5)  # half a cell more on each level: none is impossible
        np.add.at(counts, (genes, levels), 1)
        share = counts / counts.sum(axis=1, keepdims=True)
        scores = norm.ppf(share.cumsum(axis=1) - share / 2)
        known = np.take_along_axis(scores, levels.T, axis=1).T
        spread = known.std(axis=0)
        covariance = OAS().fit(known / np.where(spread > 0, spread, 1)).covariance_
        scale = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
        correlation = covariance / scale / scale[:, None]
        np.fill_diagonal(correlation, 1.0)
        _, log_determinant = np.linalg.slogdet(correlation)
        precision = np.linalg.inv(correlation) - np.eye(len(genes))
        return cls(edges, np.log(share), scores, precision, float(log_determinant))

    def log_density(self, cells: Array) -> Array:
        """Return the log probability of each cell's levels, up to the copula's approximation, ``(n,)``."""
        levels = _levels(cells, self.edges).T
        marginal = np.take_along_axis(self.log_share, levels, axis=1).sum(axis=0)
        scores = np.take_along_axis(self.scores, levels, axis=1).T
        return np.asarray(marginal - ((scores @ self.precision) * scores).sum(axis=1) / 2 - self.log_determinant / 2)


@dataclass(frozen=True)
class DonorAttack:
    """How well donors of the training cells are told from others, by some cells of each.

    Attributes
    ----------
    members, others
        Scores of member donors' and of other donors' draws, ``(donors, draws)``: mean log likelihood ratio per cell.
    cells_per_donor
        Cells in each draw.
    """

    members: Array
    others: Array
    cells_per_donor: int

    @property
    def auc(self) -> Estimate:
        """Probability that a member's draw scores higher than another donor's; the interval is over donors."""
        pairs = self.members[:, None, :, None] - self.others[None, :, None, :]
        by_donor = auc(self.others.mean(axis=1), self.members.mean(axis=1))
        assert by_donor.interval is not None
        return normal(float((pairs > 0).mean() + (pairs == 0).mean() / 2), standard_error(by_donor.interval))

    def true_positive_rate(self, false_positives: float) -> float:
        """Return the share of members above the score that this share of other donors exceeds."""
        return float((self.members > np.quantile(self.others, 1 - false_positives)).mean())


def level_edges(cells: Array) -> Array:
    """Return limits of levels of each gene: 0 alone, and equally many of the other values on each other level.

    Examples
    --------
    >>> level_edges(np.arange(8.0)[:, None]).shape
    (1, 7)
    """
    edges = np.empty((cells.shape[1], LEVELS - 1))
    for gene, values in enumerate(np.asarray(cells).T):
        above = values[values > 0]
        edges[gene] = np.quantile(above, np.arange(LEVELS - 1) / (LEVELS - 1)) if len(above) else np.inf
    return edges


def donor_attack(
    synthetic: Array | None,
    cells: Array,
    donors: Array,
    members: Sequence[str],
    others: Sequence[str],
    *,
    cells_per_donor: int,
    draws: int,
    rng: np.random.Generator,
) -> DonorAttack:
    """Score donors by how much likelier their cells are under synthetic cells than under other people's real cells.

    The likelihood ratio is the strongest test of two known densities (Neyman & Pearson 1933); here both are fitted.
    The density of real cells is fitted on those of all other donors, for each donor anew, so a donor who is no member
    is in neither set.

    Parameters
    ----------
    synthetic
        ``(m, genes)``, log-normalized. None for the floor: for each donor, a random half of the other donors' cells
        takes the place of synthetic cells, and the other half that of real ones.
    cells, donors
        Real cells ``(n, genes)`` that the generator has not seen, and their donors ``(n,)``.
    members, others
        Donors with training cells, and without.
    cells_per_donor, draws
        Cells per draw, and draws per donor.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> shift, donors = 2 * rng.random((8, 30)), np.repeat([f"P{i}" for i in range(8)], 100)
    >>> cells = rng.poisson(1 + np.repeat(shift, 100, axis=0)).astype(float)
    >>> known = ["P0", "P1", "P2", "P3"]
    >>> synthetic = rng.poisson(1 + np.repeat(shift[:4], 100, axis=0)).astype(float)
    >>> attack = donor_attack(
    ...     synthetic, cells, donors, known, ["P4", "P5", "P6", "P7"], cells_per_donor=20, draws=4, rng=rng
    ... )
    >>> float(attack.members.min()) > float(attack.others.max())
    True
    """
    edges = level_edges(cells if synthetic is None else np.vstack([synthetic, cells]))
    fitted = None if synthetic is None else Copula.fit(synthetic, edges)

    def scores(donor: str) -> Array:
        own = donors == donor
        known = rng.permutation(np.flatnonzero(~own))
        ours, real = (Copula.fit(cells[known[::2]], edges), known[1::2]) if fitted is None else (fitted, known)
        ratio = ours.log_density(cells[own]) - Copula.fit(cells[real[:MOST_CELLS]], edges).log_density(cells[own])
        chosen = (rng.choice(ratio, cells_per_donor, replace=False) for _ in range(draws))
        return np.array([part.mean() for part in chosen])

    return DonorAttack(
        np.stack([scores(name) for name in members]), np.stack([scores(name) for name in others]), cells_per_donor
    )


def _levels(cells: Array, edges: Array) -> Array:
    """Return the level of each value, ``(n, genes)`` int64: 0 below the first edge."""
    return np.stack(
        [
            np.searchsorted(limits, values, side="right")
            for limits, values in zip(edges, np.asarray(cells).T, strict=True)
        ],
        axis=1,
    )
