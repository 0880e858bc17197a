"""Classifiers find what they can find, and nothing where there is nothing."""

import numpy as np
import pytest

from wbdit.evaluation.classifiers import CLASSIFIERS, giveaways, two_sample_test


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_shift_is_found_and_no_difference_is_not(kind):
    real, other = np.random.default_rng(0).normal(size=(2, 150, 12))
    same = two_sample_test(real, other, kind)
    assert same.interval[0] - 0.05 < 0.5 < same.interval[1] + 0.05
    shifted = two_sample_test(real, other + 2 * (np.arange(12) == 3), kind)
    assert shifted.value > 0.7
    assert shifted.interval[0] < shifted.value < shifted.interval[1]


def test_trees_find_what_a_line_cannot():
    """A gene with the same mean but two modes."""
    rng = np.random.default_rng(0)
    real, other = rng.normal(size=(2, 200, 5))
    other[:, 2] = 2 * np.sign(other[:, 2]) + 0.3 * rng.normal(size=200)
    assert two_sample_test(real, other, "c2st_logistic").value < 0.6
    assert two_sample_test(real, other, "c2st_trees").value > 0.85


def test_an_unknown_classifier_is_named():
    with pytest.raises(ValueError, match="no such classifier"):
        two_sample_test(np.zeros((20, 2)), np.ones((20, 2)), "oracle")


def test_giveaways_are_named_with_their_direction():
    real, other = np.random.default_rng(0).normal(size=(2, 100, 4))
    found = giveaways(real, other + np.array([0, -3, 0, 1]), np.array(["A", "B", "C", "D"]), n=2)
    assert [each.gene for each in found] == ["B", "D"]
    assert found[0].auc < 0.1 < 0.6 < found[1].auc
    assert found[0].synthetic_mean == pytest.approx(found[0].real_mean - 3, abs=0.5)
