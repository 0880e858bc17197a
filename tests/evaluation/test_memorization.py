"""Memorization: copies are found, and independent cells are not flagged."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from wbdit.evaluation import memorization


@pytest.fixture
def sets():
    """Return training, held-out and synthetic cells of one distribution, ``(150, 8)`` each."""
    return np.random.default_rng(0).normal(size=(3, 150, 8))


def test_membership_is_the_auc_of_the_published_score(sets):
    train, heldout, synthetic = sets

    def score(cells):
        return np.exp(-np.array([min(((x - y) ** 2).sum() for y in synthetic) for x in cells]))

    labels = np.repeat([1, 0], 150)
    by_hand = roc_auc_score(labels, np.concatenate([score(train), score(heldout)]))
    assert memorization.mia_auc(train, heldout, synthetic) == pytest.approx(by_hand)
    far = memorization.mia_auc(1000 * train, 1000 * heldout, 1000 * synthetic)  # exp(-d^2) underflows to 0
    assert far == pytest.approx(by_hand)


def test_honest_cells_are_not_accused(sets):
    train, heldout, synthetic = sets
    assert abs(memorization.mia_auc(train, heldout, synthetic) - 0.5) < 0.08
    assert abs(memorization.dcr_ratio(train, heldout, synthetic) - 1) < 0.08
    limit = memorization.copy_distance(train, np.arange(150))
    assert memorization.copied(synthetic, train, limit).mean() < 0.06


def test_copies_are_found(sets):
    train, heldout, _ = sets
    near = train + 1e-3
    assert memorization.mia_auc(train, heldout, near) == 1
    assert memorization.dcr_ratio(train, heldout, near) < 0.01
    limit = memorization.copy_distance(train, np.arange(150))
    mixed = np.vstack([train[:30] + 1e-3, heldout[:120] + 100])
    assert memorization.copied(mixed, train, limit).mean() == 30 / 150


def test_dcr_ratio_by_hand():
    train, heldout = np.array([[0.0], [10.0]]), np.array([[4.0], [14.0]])
    synthetic = np.array([[1.0], [12.0], [11.0]])  # distances: 1, 2, 1 to training cells; 3, 2, 3 to held-out
    assert memorization.dcr_ratio(train, heldout, synthetic) == pytest.approx(1 / 3)
    assert np.isnan(memorization.dcr_ratio(train, heldout, heldout))
    with pytest.raises(ValueError, match="equal"):
        memorization.dcr_ratio(train, heldout[:1], synthetic)


def test_the_copy_distance_is_the_first_percentile_to_the_nearest_other(sets):
    train = sets[0]
    apart = np.linalg.norm(train[:, None] - train[None], axis=-1) + np.diag(np.full(150, np.inf))
    rows = np.arange(0, 150, 3)
    assert memorization.copy_distance(train, rows) == pytest.approx(np.percentile(apart.min(axis=1)[rows], 1))
