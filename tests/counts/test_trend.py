"""Trends of log rates along a covariate."""

import numpy as np
import pytest
import torch

from wbdit.counts.trend import KNOTS, CovariateTrend, Spline, fit_trend, natural_basis
from wbdit.data.covariates import quantile_bins

RNG = np.random.default_rng(0)


def summed(counts, x):
    """Return the counts summed over the cells of each bin of a covariate."""
    bins = quantile_bins(x)
    return np.stack([counts[bins == one].sum(0, dtype=np.float64) for one in range(bins.max() + 1)])


def test_the_basis_is_linear_beyond_the_knots_and_smooth_between():
    knots = torch.linspace(-1, 1, KNOTS, dtype=torch.float64)
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    basis = natural_basis(x, knots)
    assert torch.linalg.matrix_rank(basis) == KNOTS
    curvature = basis.diff(dim=0).diff(dim=0)
    outside = (x[1:-1].abs() > 1.02)[:, None].expand_as(curvature)
    assert curvature[outside].abs().max() < 1e-9
    assert curvature.diff(dim=0).abs().max() < 1e-4  # no jump of the second derivative


def test_the_standardized_basis_is_orthonormal():
    x = RNG.gamma(1, size=500)
    spline = Spline.fit(x)
    basis = natural_basis(torch.from_numpy(x), torch.from_numpy(spline.knots)).numpy() @ spline.transform
    np.testing.assert_allclose(basis.T @ basis / len(x), np.eye(KNOTS), atol=1e-8)


@pytest.mark.parametrize("levels", [2, 3])
def test_a_few_levels_are_enough(levels):
    x = np.arange(90) % levels / 1.0
    expected = np.full((90, 1), 20.0)
    counts = RNG.poisson(expected * np.exp(0.5 * x[:, None]))
    spline = Spline.fit(x)
    basis = natural_basis(torch.from_numpy(x), torch.from_numpy(spline.knots)).numpy() @ spline.transform
    fitted = np.exp(basis @ fit_trend(x, spline, counts, expected)) * expected
    for level in range(levels):
        assert fitted[x == level].mean() == pytest.approx(counts[x == level].mean(), rel=0.02)


def test_a_known_trend_is_found_and_bridges_an_interval_without_cells():
    x = RNG.normal(size=4000)
    x = x[(x < 0.2) | (x > 0.8)]
    library = RNG.lognormal(0, 0.3, len(x))[:, None]
    truth = np.stack([0.8 * x, np.tanh(x), np.zeros_like(x)], axis=1)
    counts = RNG.poisson(5 * library * np.exp(truth)).astype(np.float32)
    trend = CovariateTrend(1, 3)
    x = x.astype(np.float32)
    trend.init_from_data(x[:, None], [summed(counts, x)], (5 * library * np.ones((1, 3))).astype(np.float32))
    at = torch.linspace(-1.5, 1.5, 31)
    rates, dispersion = trend(at[:, None])
    wanted = torch.stack([0.8 * at, at.tanh(), torch.zeros_like(at)], dim=1)
    assert (rates - wanted).abs().max() < 0.12
    assert torch.equal(dispersion, torch.zeros_like(dispersion))


def test_a_silent_gene_has_a_finite_trend():
    x = np.linspace(-1, 1, 100)
    counts = np.stack([np.zeros(100), np.where(x > 0.9, 50.0, 0)], axis=1)
    assert np.abs(fit_trend(x, Spline.fit(x), counts, np.ones((100, 2)))).max() < 20


def test_no_offset_without_a_value_and_none_that_grows_beyond_the_cells():
    x = np.linspace(-1, 1, 200, dtype=np.float32)[:, None]
    trend = CovariateTrend(1, 1)
    trend.init_from_data(x, [summed(np.exp(2 * x) * 10, x[:, 0])], np.full_like(x, 10))
    rates = trend(torch.tensor([[np.nan], [1.0], [7.0], [-1.0]]))[0][:, 0]
    assert rates[0] == 0
    assert rates[1] == rates[2] > 1.5
    assert rates[3] < -1.5
