"""The gene metrics against closed forms, hand computations and libraries."""

import math

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.stats import entropy, pearsonr, spearmanr, wasserstein_distance

from wbdit.evaluation import genes


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def sets(rng):
    """Return two sets of log1p counts, ``(40, 12)`` each."""
    return np.log1p(rng.poisson(np.arange(12) / 3, size=(2, 40, 12)))


def test_scc_is_about_order(rng):
    means = np.linspace(0.1, 3, 40)
    real = rng.normal(means, 0.001, size=(50, 40))
    assert genes.scc(real, real**3) == pytest.approx(1)
    assert genes.scc(real, -real) == pytest.approx(-1)
    assert math.isnan(genes.scc(real, np.ones_like(real)))


def test_scc_gives_ties_their_mean_rank():
    real = np.array([[1.0, 2.0, 3.0, 4.0]])
    ranks, tied = np.array([1, 2, 3, 4]), np.array([1.5, 1.5, 3, 4])
    assert genes.scc(real, np.array([[5.0, 5.0, 6.0, 7.0]])) == pytest.approx(np.corrcoef(ranks, tied)[0, 1])


def test_var_r2_by_hand_and_below_one_for_shrunken_variance():
    real = np.array([[0.0, 0.0, 0.0], [2.0, 4.0, 6.0]])  # variances 1, 4, 9
    generated = np.array([[0.0, 0.0, 0.0], [2.0, 4.0, 4.0]])  # variances 1, 4, 4
    spread = (1 - 14 / 3) ** 2 + (4 - 14 / 3) ** 2 + (9 - 14 / 3) ** 2
    assert genes.var_r2(real, generated) == pytest.approx(1 - 25 / spread)
    assert genes.var_r2(real, real + 7) == pytest.approx(1)
    assert genes.var_r2(real, real / 2) < 0.5  # perfectly correlated, but too small
    assert math.isnan(genes.var_r2(np.ones((3, 2)), np.ones((3, 2))))


def test_zero_mae_by_hand():
    real = np.array([[0, 1, 0], [0, 1, 2]])  # zero fractions 1, 0, 1/2
    generated = np.array([[0, 0, 1], [1, 0, 2], [0, 1, 3], [0, 4, 4]])  # 3/4, 1/2, 0
    assert genes.zero_mae(real, generated) == pytest.approx((1 / 4 + 1 / 2 + 1 / 2) / 3)
    assert genes.zero_mae(generated, real) == genes.zero_mae(real, generated)
    assert genes.zero_mae(np.log1p(real), generated) == genes.zero_mae(real, generated)


def test_correlations_of_means_are_scipys(sets):
    real, generated = sets
    means = real.mean(axis=0), generated.mean(axis=0)
    assert genes.scc(real, generated) == pytest.approx(spearmanr(*means).statistic)
    assert genes.pcc(real, generated) == pytest.approx(pearsonr(*means).statistic)
    assert math.isnan(genes.pcc(real, np.ones_like(real)))


def test_wasserstein_genes_is_scipys_mean(sets):
    by_gene = [wasserstein_distance(a, b) for a, b in zip(*(cells.T for cells in sets), strict=True)]
    assert genes.wasserstein_genes(*sets) == pytest.approx(np.mean(by_gene))
    with pytest.raises(ValueError, match="equal"):
        genes.wasserstein_genes(sets[0], sets[1][:5])


def test_kl_hist_is_numpys_histograms_and_scipys_entropy(sets):
    real, generated = sets
    by_gene = []
    for a, b in zip(real.T, generated.T, strict=True):
        edges = np.histogram_bin_edges(np.concatenate([a, b]), 50)
        p, q = (np.histogram(cells, edges)[0] / len(cells) + 1e-10 for cells in (a, b))
        by_gene.append(entropy(p, q))
    assert genes.kl_hist(real, generated) == pytest.approx(np.mean(by_gene), rel=1e-9)
    assert genes.kl_hist(real, real[::-1]) == 0


def test_correlations_of_genes_are_numpys(sets):
    real, generated = (cells[:, 1:] for cells in sets)
    np.testing.assert_allclose(genes.gene_correlations(real), np.corrcoef(real.T), atol=1e-12)
    by_hand = np.sqrt(((np.corrcoef(real.T) - np.corrcoef(generated.T)) ** 2).sum())
    assert genes.corr_fro(real, generated) == pytest.approx(by_hand)
    still = np.column_stack([real, np.full(len(real), 2.0)])
    np.testing.assert_array_equal(genes.gene_correlations(still)[-1], [0] * 11 + [1])


def test_shuffled_genes_keep_their_own_values_and_lose_their_company(rng):
    programme = rng.normal(size=(300, 4))
    cells = np.repeat(programme, 10, axis=1) + 0.5 * rng.normal(size=(300, 40))
    shuffled = rng.permuted(cells, axis=0)
    assert genes.wasserstein_genes(cells, shuffled) == pytest.approx(0, abs=1e-12)
    assert genes.corr_fro(cells, shuffled) > 3 * genes.corr_fro(cells[::2], cells[1::2])
    assert genes.module_ari(cells, shuffled) < 0.2


def test_modules_are_the_programmes(rng):
    from sklearn.metrics import adjusted_rand_score

    programme = np.repeat(np.arange(10), 6)
    cells = rng.normal(size=(200, 10))[:, programme] + 0.3 * rng.normal(size=(200, 60))
    modules = genes.co_expression_modules(genes.gene_correlations(cells))
    assert adjusted_rand_score(programme, modules) == 1
    theirs = fcluster(linkage(np.corrcoef(cells.T), "ward"), 10, criterion="maxclust")
    assert adjusted_rand_score(theirs, modules) == 1
    assert genes.module_ari(cells[::2], cells[1::2]) == 1


def test_the_most_variable_genes_are_chosen(rng):
    cells = rng.normal(size=(500, 5)) * [1, 9, 2, 8, 0]
    assert list(genes.most_variable(cells, 2)) == [1, 3]
    assert len(genes.most_variable(cells)) == 5
