"""Structure within types, and curves over genes."""

import numpy as np
import pytest

from wbdit.evaluation.within import cell_cell, dropout_mean, mean_var, within_corr, within_var


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_types_are_weighted_by_their_real_cells(rng):
    small, large = rng.normal(size=(10, 3)), rng.normal(size=(30, 3))
    assert within_var([small, large], [2 * small, large]) == pytest.approx(3.0 * 10 / 40)
    assert within_corr([small, large], [small, large]) == 0
    assert np.isnan(within_corr([], []))


def test_correlations_between_types_do_not_count(rng):
    """Shuffled genes of each type keep what is between types; the distance within them shows."""
    state = rng.normal(size=(200, 1))
    cells = state + 0.3 * rng.normal(size=(200, 20))
    shuffled = rng.permuted(cells, axis=0)
    other = rng.normal(size=(200, 1)) + 0.3 * rng.normal(size=(200, 20))
    assert within_corr([cells], [shuffled]) > 10 * within_corr([cells], [other])


def test_curves_are_over_means(rng):
    """Poisson counts of other means lie on the same curves; more spread at the same means does not."""
    means = rng.gamma(1.0, 2.0, 400) + 0.05
    real = rng.poisson(means, (2000, 400))
    other = rng.poisson(rng.permutation(means), (2000, 400))
    spread = rng.poisson(means * rng.gamma(1.0, 1.0, (2000, 400)))
    assert mean_var(real, other) < 0.05 < 0.15 < mean_var(real, spread)
    assert dropout_mean(real, other) < 0.02 < 0.05 < dropout_mean(real, spread)


def test_cell_cell_sees_how_alike_cells_are(rng):
    real, other = rng.normal(size=(2, 100, 60))
    assert cell_cell(real, other) < 0.01
    common = other + 2 * rng.normal(size=60)
    assert cell_cell(real, common) > 0.5
