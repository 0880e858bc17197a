"""Precision, recall, density and coverage by hand; Fréchet and energy distances against closed forms."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from wbdit.evaluation.distances import squared_distances
from wbdit.evaluation.fidelity import energy_distance, frechet, overlap


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def overlap_of(real, other, k=5):
    return overlap(*(squared_distances(a, b) for a, b in ((real, real), (real, other), (other, other))), k)


def test_overlap_by_hand():
    """Real cells at 0, 1, 3 reach 1, 1, 2 with one neighbor; synthetic ones at 0.5, 4, 9 reach 3.5, 3.5, 5."""
    real, other = np.array([[0.0], [1.0], [3.0]]), np.array([[0.5], [4.0], [9.0]])
    found = overlap_of(real, other, k=1)
    assert found.precision == pytest.approx(2 / 3)  # 9 is in no ball
    assert found.recall == pytest.approx(1.0)
    assert found.density == pytest.approx((2 + 1 + 0) / 3)
    assert found.coverage == pytest.approx(1.0)


def test_fidelity_and_diversity_are_told_apart(rng):
    real = rng.normal(size=(400, 4))
    narrow = 0.3 * rng.normal(size=(400, 4))
    wide = 3 * rng.normal(size=(400, 4))
    assert overlap_of(real, narrow).precision > 0.95 > 0.5 > overlap_of(real, narrow).recall
    assert overlap_of(real, wide).recall > 0.9 > 0.5 > overlap_of(real, wide).precision
    alike = overlap_of(real, rng.normal(size=(400, 4)))
    assert min(alike) > 0.85
    assert alike.density == pytest.approx(1.0, abs=0.1)


def test_one_far_cell_moves_recall_but_not_coverage(rng):
    """What Naeem et al. hold against precision and recall."""
    real, other = rng.normal(size=(2, 200, 2))
    other = other + np.array([8, 0])
    with_outlier = np.vstack([other[:-6], np.tile([-200.0, 0], (6, 1)) + rng.normal(size=(6, 2))])
    with_outlier[-1] += [-4000, 0]  # its ball reaches over everything
    assert overlap_of(real, with_outlier).recall > 0.9
    assert overlap_of(real, with_outlier).coverage < 0.05


def test_frechet_is_that_of_gaussians(rng):
    a, b = rng.normal(size=(50, 5)), rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)) + 1
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    wanted = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-9)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)


def test_energy_distance_has_no_bias(rng):
    """The mean over many draws of one distribution is 0; a weighted subset is the distance of its cells."""
    even, values = np.full(20, 1 / 20), []
    for _ in range(400):
        points = rng.normal(size=(40, 3))
        values.append(float(energy_distance(np.sqrt(squared_distances(points, points)), even, even)))
    assert abs(np.mean(values)) < 3 * np.std(values) / 20
    kernel = np.sqrt(squared_distances(points, points))
    half = np.repeat([2 / 20, 0], 10)
    rows = np.r_[0:10, 20:30]
    ten = np.full(10, 1 / 10)
    assert energy_distance(kernel, half, half) == pytest.approx(energy_distance(kernel[np.ix_(rows, rows)], ten, ten))
