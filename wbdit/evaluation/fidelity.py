"""Fidelity apart from diversity: whether synthetic cells are among the real ones, and real ones among them.

Points are cells in joint principal components, equally many of both sets. Examples assume
``from wbdit.evaluation.fidelity import *``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from wbdit.evaluation.distances import squared_distances

Array = np.ndarray[Any, Any]

NEIGHBORS = 5


class Overlap(NamedTuple):
    """How two sets of points overlap, after Naeem et al. (ICML 2020, arXiv 2002.09797).

    A cell's ball reaches to its k-th nearest cell of the same set.

    Attributes
    ----------
    precision
        Share of synthetic cells in the ball of at least one real cell: fidelity.
    recall
        Share of real cells in the ball of at least one synthetic cell: diversity.
    density
        Mean number of real balls that hold a synthetic cell, over k. Not bounded by 1, which is what real cells get.
        Unlike `precision` it does not rise if one real cell lies far out.
    coverage
        Share of real cells whose ball holds at least one synthetic cell. Unlike `recall` it does not rise if one
        synthetic cell lies far out.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def overlap(between_real: Array, across: Array, between_other: Array, k: int = NEIGHBORS) -> Overlap:
    """Compute precision, recall, density and coverage from distances, squared or not.

    Parameters
    ----------
    between_real, across, between_other
        ``(n, n)`` between real cells, ``(n, m)`` from real to synthetic cells, ``(m, m)`` between synthetic cells.
    k
        Neighbors that a ball reaches, at most n - 1.

    Examples
    --------
    >>> real, other = np.random.default_rng(0).normal(size=(2, 60, 2))
    >>> def scores(other):
    ...     return overlap(*(squared_distances(a, b) for a, b in ((real, real), (real, other), (other, other))))
    >>> [round(score, 2) for score in scores(other)]
    [0.97, 0.97, 0.97, 0.98]
    >>> scores(other + 9)
    Overlap(precision=0.0, recall=0.0, density=0.0, coverage=0.0)
    """
    reach, other_reach = _reach(between_real, k)[:, None], _reach(between_other, k)
    inside = across < reach
    return Overlap(
        precision=float(inside.any(axis=0).mean()),
        recall=float((across < other_reach).any(axis=1).mean()),
        density=float(inside.sum(axis=0).mean() / k),
        coverage=float(inside.any(axis=1).mean()),
    )


def frechet(real: Array, other: Array) -> float:
    """Compute the squared Fréchet distance of the Gaussians with the moments of two sets of points.

    It is ``|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))`` with means m and covariances S (Dowson & Landau, J. Multivar.
    Anal. 12, 1982). It falls with the number of cells: compare values at equal numbers.

    Parameters
    ----------
    real, other
        ``(n, k)`` and ``(m, k)``.

    Returns
    -------
    At least 0, which is best, in squared units of the points. Symmetric.

    Examples
    --------
    >>> cells = np.random.default_rng(0).normal(size=(400, 2))
    >>> round(frechet(cells, cells), 6), round(frechet(cells, cells + [3, 4]), 6)
    (0.0, 25.0)
    """
    a, b = (np.atleast_2d(np.cov(points, rowvar=False)) for points in (real, other))
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    both = np.linalg.eigvalsh(root @ b @ root)  # those of S S', but of a symmetric matrix
    shift = float(np.sum((real.mean(axis=0) - other.mean(axis=0)) ** 2))
    return max(shift + float(np.trace(a) + np.trace(b) - 2 * np.sqrt(np.maximum(both, 0)).sum()), 0.0)


def energy_distance(kernel: Array, real_weights: Array, other_weights: Array) -> Array:
    """Compute the energy distance ``2 E|x - y| - E|x - x'| - E|y - y'|`` of weighted cells, without bias.

    Székely & Rizzo, J. Stat. Plan. Inference 143, 2013. Without bias it can be negative, if the sets are alike.

    Parameters
    ----------
    kernel
        Distances ``(n + m, n + m)``, real cells first.
    real_weights, other_weights
        ``(..., n)`` and ``(..., m)``: equal on the cells that count and 0 on the others; each row sums to 1.

    Returns
    -------
    ``(...)``, in units of the points.

    Examples
    --------
    >>> points = np.array([[0.0], [2.0], [5.0], [7.0]])
    >>> even = np.full(2, 0.5)
    >>> float(energy_distance(np.sqrt(squared_distances(points, points)), even, even))  # 2 * 5 - 2 - 2
    6.0
    """
    n = real_weights.shape[-1]
    across = ((real_weights @ kernel[:n, n:]) * other_weights).sum(axis=-1)
    within = []
    for weights, distances in ((real_weights, kernel[:n, :n]), (other_weights, kernel[n:, n:])):
        size = 1 / weights.max(axis=-1)  # cells that count; a cell's distance to itself does not
        within.append(((weights @ distances) * weights).sum(axis=-1) * size / (size - 1))
    return np.asarray(2 * across - within[0] - within[1])


def _reach(between: Array, k: int) -> Array:
    """Return each cell's distance to its k-th nearest other cell, ``(n,)``."""
    return np.partition(between, min(k, len(between) - 1), axis=1)[:, min(k, len(between) - 1)]


__all__ = ["Overlap", "energy_distance", "frechet", "overlap", "squared_distances"]
