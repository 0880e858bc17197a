"""The trend of each gene's expression along a continuous covariate: a natural cubic spline of its log rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from wbdit.counts.init import ExpectedCounts, cell_slices, pooled
from wbdit.data.covariates import quantile_bins

KNOTS = 5  # per covariate; few, so that the trend bridges an interval without training cells
PRIOR_PRECISION = 1.0  # of a coefficient of a standardized basis function
NEWTON_STEPS = 25


class Spline(NamedTuple):
    """A standardized natural cubic spline basis: knots ``(S,)``, and its transform ``(S, S)`` from the raw basis."""

    knots: np.ndarray
    transform: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray) -> Spline:
        """Place the knots at quantiles of values ``(n,)`` and standardize the basis over them.

        Values with few distinct levels, such as doses, get only as many functions as these levels determine.
        """
        levels = np.unique(x)
        knots = np.quantile(x, np.linspace(0.05, 0.95, KNOTS))
        if len(np.unique(knots)) < KNOTS:  # ties, as in a column with few levels
            knots = np.linspace(levels[0], levels[-1], KNOTS)
        basis = natural_basis(torch.from_numpy(x), torch.from_numpy(knots)).numpy()
        rest = basis[:, 1:]
        deviations = rest - rest.mean(0)
        values, axes = np.linalg.eigh(deviations.T @ deviations / len(x))
        kept = values > 1e-6 * values[-1]
        whitening = axes * np.where(kept, 1 / np.sqrt(np.maximum(values, 1e-12)), 0)
        transform = np.zeros((KNOTS, KNOTS))
        transform[0, 0] = 1
        transform[1:, 1:] = whitening
        transform[0, 1:] = -rest.mean(0) @ whitening
        return cls(knots, transform)


def natural_basis(x: Tensor, knots: Tensor) -> Tensor:
    """Return the natural cubic spline basis ``(..., S)`` of values ``(...)``, given S knots.

    The first two functions are 1 and x; all are linear beyond the outer knots (Hastie, Tibshirani and Friedman 2009,
    The Elements of Statistical Learning, equations 5.4 and 5.5).
    """
    cubes = (x[..., None] - knots).clamp(min=0) ** 3
    slopes = (cubes[..., :-1] - cubes[..., -1:]) / (knots[-1] - knots[:-1])
    return torch.cat([torch.ones_like(x)[..., None], x[..., None], slopes[..., :-1] - slopes[..., -1:]], dim=-1)


def spline_basis(x: np.ndarray) -> np.ndarray:
    """Return the standardized basis ``(n, S)`` of values ``(n,)`` at the values themselves."""
    spline = Spline.fit(x)
    return natural_basis(torch.from_numpy(x), torch.from_numpy(spline.knots)).numpy() @ spline.transform


def fit_trend(x: np.ndarray, spline: Spline, counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Fit each gene's log rate along a covariate by Poisson regression, with a Gaussian prior on the coefficients.

    Parameters
    ----------
    x
        Mean covariate of each bin of cells, ``(bins,)``.
    spline
        Basis of the trend.
    counts, expected
        Observed counts ``(bins, G)`` and the counts expected without the covariate, summed over the cells of each bin.

    Returns
    -------
    Coefficients ``(S, G)`` of the standardized basis.
    """
    basis = natural_basis(torch.from_numpy(x), torch.from_numpy(spline.knots)).numpy() @ spline.transform
    observed, exposure = counts + 1e-9, expected + 1e-9
    penalty = np.full(basis.shape[1], PRIOR_PRECISION)
    penalty[0] = 1e-3
    beta = np.zeros((basis.shape[1], counts.shape[1]))
    outer = (basis[:, :, None] * basis[:, None, :]).reshape(len(basis), -1)
    for _ in range(NEWTON_STEPS):
        mean = exposure * np.exp(np.clip(basis @ beta, -15, 15))
        slope = basis.T @ (observed - mean) - penalty[:, None] * beta
        curvature = (outer.T @ mean).T.reshape(-1, len(penalty), len(penalty)) + np.diag(penalty)
        step = np.linalg.solve(curvature, slope.T[..., None])[..., 0].T
        beta += np.clip(step, -1, 1)  # a full step can overshoot where a gene is silent
        if np.abs(step).max() < 1e-6:
            break
    return beta


class CovariateTrend(nn.Module):
    """Offsets of each gene's log rate and dispersion that depend smoothly on the covariates.

    Beyond the range of the training cells the offsets stay constant.

    Parameters
    ----------
    n_covariates, genes
        Number of covariates K and of genes G.

    Attributes
    ----------
    knots, transform
        Of the bases, ``(K, S)`` and ``(K, S, S)``, see :class:`Spline`.
    limits
        Lowest and highest training value of each covariate, ``(K, 2)``.
    rates
        Coefficients of the log rates, ``(K, S, G)``.
    dispersion
        Coefficients of the offset of the dispersion, ``(K, S, G)``; learned.
    """

    def __init__(self, n_covariates: int, genes: int) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-1, 1, KNOTS).repeat(n_covariates, 1))
        self.register_buffer("transform", torch.eye(KNOTS).repeat(n_covariates, 1, 1))
        self.register_buffer("limits", torch.tensor([-1.0, 1.0]).repeat(n_covariates, 1))
        self.register_buffer("rates", torch.zeros(n_covariates, KNOTS, genes))
        self.dispersion = nn.Parameter(torch.zeros(n_covariates, KNOTS, genes))

    knots: Tensor
    transform: Tensor
    limits: Tensor
    rates: Tensor

    @torch.no_grad()
    def init_from_data(
        self, covariates: np.ndarray, counts: Sequence[np.ndarray], expected: ExpectedCounts | np.ndarray
    ) -> None:
        """Fit the trends in turn, each to what the earlier ones leave.

        Parameters
        ----------
        covariates
            Scaled covariates of the training cells, ``(n, K)``.
        counts
            Observed counts per covariate, summed over the cells of each bin, ``(bins, G)``; see
            :func:`wbdit.data.covariates.quantile_bins`.
        expected
            Counts ``(n, G)`` of the cells that are expected without covariates. They are made in chunks.
        """
        for k, x in enumerate(covariates.T.astype(np.float64)):
            spline, bins = Spline.fit(x), quantile_bins(x)
            self.knots[k] = torch.from_numpy(spline.knots)
            self.transform[k] = torch.from_numpy(spline.transform)
            self.limits[k] = torch.tensor([x.min(), x.max()])
            exposure = np.zeros_like(counts[k])
            for part in cell_slices(len(x), exposure.shape[1]):
                known = torch.from_numpy(covariates[part, :k])
                left = (
                    expected[part] * self._offsets(known, self.rates[:k], slice(k)).exp().numpy()
                    if k
                    else expected[part]
                )
                exposure += pooled(bins[part], len(exposure), left)
            middle = np.bincount(bins, x) / np.bincount(bins)
            self.rates[k] = torch.from_numpy(fit_trend(middle, spline, counts[k], exposure))

    def forward(self, covariates: Tensor) -> tuple[Tensor, Tensor]:
        """Return the offsets of log rates and of dispersions, ``(B, G)`` each; NaN among ``(B, K)`` has none."""
        with torch.autocast(covariates.device.type, enabled=False):
            every = slice(None)
            return self._offsets(covariates, self.rates, every), self._offsets(covariates, self.dispersion, every)

    def _offsets(self, covariates: Tensor, tables: Tensor, columns: slice) -> Tensor:
        given = covariates.isfinite()
        x = torch.where(given, covariates, 0.0)
        low, high = self.limits[columns].unbind(1)
        x = torch.minimum(torch.maximum(x, low), high)
        basis = torch.stack(
            [
                natural_basis(column, knots) @ transform
                for column, knots, transform in zip(x.T, self.knots[columns], self.transform[columns], strict=True)
            ],
            dim=1,
        )
        return torch.einsum("bks,ksg->bg", basis * given[..., None], tables)
