"""Confidence intervals: their width matches the scores' spread, closed forms and libraries."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from wbdit.evaluation.intervals import Estimate, Halves, auc, normal, proportion


def width(estimate):
    return estimate.interval[1] - estimate.interval[0]


def test_halves_hold_half_of_the_cells():
    halves = Halves.draw(21, 30, np.random.default_rng(0))
    for weights in (halves.real, halves.other):
        assert weights.shape == (30, 21)
        np.testing.assert_allclose(weights.sum(axis=1), 1)
        assert set(np.round(np.unique(weights), 12)) == {0, 0.1}
    assert (halves.real != halves.other).any()
    again = Halves.draw(21, 30, np.random.default_rng(0))
    np.testing.assert_array_equal(again.real, halves.real)


@pytest.mark.parametrize("n", [60, 61])
def test_the_interval_of_a_difference_of_means_is_the_textbooks(n):
    rng = np.random.default_rng(1)
    real, other = rng.normal(size=(2, n))
    halves = Halves.draw(n, 4000, rng)
    estimate = halves.pairwise(other.mean() - real.mean(), lambda a, b: b - a, halves.real @ real, halves.other @ other)
    error = np.sqrt(real.var(ddof=1) / n + other.var(ddof=1) / n)
    assert width(estimate) == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert np.mean(estimate.interval) == pytest.approx(other.mean() - real.mean())


def test_recomputing_and_weighing_agree():
    rng = np.random.default_rng(2)
    real, other = rng.normal(size=(2, 40))
    halves = Halves.draw(40, 30, rng)
    weighed = halves.pairwise(0.0, lambda a, b: a - b, halves.real @ real, halves.other @ other)
    recomputed = halves.recomputed(0.0, lambda a, b: a.mean() - b.mean(), real, other)
    assert recomputed.interval == pytest.approx(weighed.interval)


def test_without_resamples_there_is_no_interval():
    none = Halves.draw(10, 0, np.random.default_rng(0))
    assert none.estimate(3.0, []) == Estimate(3.0, None)
    two = Halves.draw(10, 4, np.random.default_rng(0))
    assert two.estimate(3.0, [np.nan, np.nan, np.nan, 1.0]) == Estimate(3.0, None)


def test_auc_is_sklearns_with_ties():
    rng = np.random.default_rng(3)
    negative, positive = rng.integers(0, 6, 50) / 5, rng.integers(2, 9, 40) / 5
    labels = np.repeat([0, 1], [50, 40])
    assert auc(negative, positive).value == pytest.approx(roc_auc_score(labels, np.concatenate([negative, positive])))


def test_the_interval_of_auc_is_as_wide_as_it_spreads():
    rng = np.random.default_rng(4)
    drawn = [auc(rng.normal(size=60), 0.7 + rng.normal(size=60)) for _ in range(300)]
    spread = np.std([each.value for each in drawn])
    assert np.mean([width(each) for each in drawn]) == pytest.approx(2 * 1.96 * spread, rel=0.12)


@pytest.mark.parametrize("hits", [0, 3, 20])
def test_the_interval_of_a_share_is_statsmodels(hits):
    statsmodels = pytest.importorskip("statsmodels.stats.proportion")
    found = proportion(np.arange(20) < hits)
    theirs = statsmodels.proportion_confint(hits, 20, method="wilson")
    assert found.value == hits / 20
    assert found.interval == pytest.approx(theirs, abs=1e-6)


def test_normal_is_symmetric():
    assert normal(1.0, 0.5).interval == pytest.approx((1 - 0.98, 1 + 0.98), abs=1e-4)
