"""Mean log-normalized counts of negative binomials, against sums over their probabilities."""

import numpy as np
import pytest
from scipy.stats import nbinom

from wbdit.counts.log_means import LogMeans

MEANS = np.array([0.003, 0.1, 0.7, 4.0, 60.0, 900.0])


def exact(mean, size, library):
    counts = np.arange(60_000)
    return (nbinom.pmf(counts, size, size / (size + mean)) * np.log1p(1e4 * counts / library)).sum()


@pytest.mark.parametrize("library", [300.0, 20_000.0])
@pytest.mark.parametrize("size", [0.1, 1.0, 15.0])
def test_they_are_the_sums_over_all_counts(library, size):
    found = LogMeans.at(library)(MEANS, np.full(len(MEANS), np.log(size)))
    np.testing.assert_allclose(found, [exact(mean, size, library) for mean in MEANS], rtol=0.01, atol=2e-3)


def test_few_counts_are_in_proportion():
    of, size = LogMeans.at(1000), np.zeros(2)
    tiny = of(np.array([1e-6, 2e-6]), size)
    assert tiny[1] == pytest.approx(2 * tiny[0])
    assert tiny[0] == pytest.approx(1e-6 * np.log(11), rel=0.01)


def test_means_are_found_again():
    of, sizes = LogMeans.at(2000), np.log(np.array([0.1, 0.5, 1.0, 2.0, 10.0, 20.0]))
    np.testing.assert_allclose(of.means(of(MEANS, sizes), sizes), MEANS, rtol=1e-3)
