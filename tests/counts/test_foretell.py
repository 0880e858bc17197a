"""Unseen combinations of labels, foretold from others."""

import numpy as np
import pytest

from wbdit.counts import foretell as module
from wbdit.counts.foretell import Foretelling, Profiles, foretell
from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.data.statistics import Statistics, training_combinations

GENES = 60
# types 0 to 2 in conditions 0 and 1, type 3 in condition 0 alone
CODES = np.array([[t, c] for t in range(4) for c in range(2) if (t, c) != (3, 1)])


def profiles(log_mean, codes=CODES, cells=None):
    cells = np.full(len(codes), 100) if cells is None else np.array(cells)
    log_size, library = np.zeros(log_mean.shape), np.full(len(codes), 1000.0)
    with np.errstate(invalid="ignore"):
        alike = np.nan_to_num(np.corrcoef(log_mean))  # 0 where nothing is expressed
    return Profiles(codes, cells, log_mean, log_size, library, alike)


@pytest.fixture
def log_means():
    rng = np.random.default_rng(0)
    types = rng.gamma(1.0, size=(4, GENES))
    types[3] = types[2] + 0.01 * rng.normal(size=GENES).clip(0)  # most like type 2
    rise = np.zeros((4, GENES))
    rise[:, :5], rise[2, 5:8] = 2.0, 1.0  # genes 5 to 7 rise in type 2 alone
    after = types + rise
    after[:, 10:20] /= 3  # fall in all types
    return {(t, c): (types, after)[c][t] for t in range(4) for c in range(2)}


def table(log_means, codes=CODES):
    return np.array([log_means[tuple(row)] for row in codes])


def test_what_rises_is_added_and_what_falls_is_multiplied(log_means, monkeypatch):
    monkeypatch.setattr(module, "TEMPERATURE", 1e-3)  # the nearest type alone
    found = foretell(profiles(table(log_means)), np.array([3, 1]), column=1)
    before, wanted = log_means[3, 0], log_means[3, 1].copy()
    wanted[5:8] += 1.0
    np.testing.assert_allclose(found.log_mean, wanted, atol=0.02)
    np.testing.assert_allclose(found.source, before)
    assert CODES[found.donor].tolist() == [2, 1]
    assert found.similarity > 0.99
    assert found.r2(wanted) > 0.99


def test_expression_does_not_fall_below_zero(log_means):
    log_means = log_means | {(3, 0): np.zeros(GENES)}
    found = foretell(profiles(table(log_means)), np.array([3, 1]), column=1)
    assert (found.log_mean >= 0).all()
    np.testing.assert_allclose(found.log_mean[:5], 2.0)


def test_weights_follow_similarity(log_means):
    at = profiles(table(log_means))
    alike = np.array([at.alike[6, 2 * t] for t in range(3)])
    weights = np.exp(alike / 0.1) / np.exp(alike / 0.1).sum()
    found = foretell(at, np.array([3, 1]), column=1)
    np.testing.assert_allclose(found.log_mean[5:8] - log_means[3, 0][5:8], weights[2], atol=1e-6)


def test_sizes_and_library_sizes_change_as_those_of_others(log_means):
    at = profiles(table(log_means))
    after = CODES[:, 1] == 1
    at = at._replace(log_size=at.log_size - 1.5 * after[:, None], library=np.where(after, 1500.0, 1000.0))
    found = foretell(at, np.array([3, 1]), column=1)
    np.testing.assert_allclose(found.log_size, -1.5)
    assert found.library == pytest.approx(1500)
    assert found.shares.sum() == pytest.approx(1)


def test_a_combination_with_few_cells_is_no_donor(log_means):
    cells = [100, 100, 100, 100, 100, 5, 100]
    found = foretell(profiles(table(log_means), cells=cells), np.array([3, 1]), column=1)
    assert CODES[found.donor][0] != 2
    np.testing.assert_allclose(found.log_mean[5:8], log_means[3, 0][5:8], atol=1e-9)


def test_without_a_counterpart_nothing_is_foretold(log_means):
    codes = CODES[[0, 3, 6]]
    assert foretell(profiles(table(log_means, codes), codes), np.array([3, 1]), column=1) is None
    assert foretell(profiles(table(log_means)), np.array([3, 2]), column=1) is None


def test_three_columns(log_means):
    """A donor may differ in two other labels."""
    codes = np.array([[t, c, d] for t in range(3) for c in range(2) for d in range(2) if (t, c, d) != (0, 1, 0)])
    at = profiles(np.array([log_means[t, c] for t, c, d in codes]), codes)
    found = foretell(at, np.array([0, 1, 0]), column=1)
    np.testing.assert_allclose(found.source, log_means[0, 0])
    assert found.r2(log_means[0, 1]) > 0.8


# ---------------------------------------------------------------------------------------------------- from cells


def cells(log_mean_rates, n=150, seed=0):
    rng = np.random.default_rng(seed)
    codes = np.repeat(CODES, n, axis=0)
    library = rng.lognormal(7, 0.3, len(codes))
    rates = np.array([log_mean_rates[tuple(row)] for row in codes]) + 0.01
    shares = rates / rates.sum(1, keepdims=True)
    return codes, rng.poisson(rng.gamma(2.0, library[:, None] * shares / 2.0)).astype(np.float32)


def of(codes, counts):
    combinations = training_combinations(codes, (4, 2), GENES)
    return Foretelling.of(codes, (4, 2), Statistics.of(MemoryMatrix(counts), "log1p", (), combinations))


def test_from_counts(log_means):
    codes, counts = cells(log_means)
    found = of(codes, counts)
    assert found.rows == (7, 1, 6)
    assert [one.codes.tolist() for one in found.unseen] == [[3, 1]]
    # a negative binomial's size is found again where there are counts
    many = counts.reshape(7, 150, GENES).mean(1) > 3
    assert np.median(np.exp(found.profiles.log_size[many])) == pytest.approx(2.0, rel=0.15)
    # type 3 before is foretold by no column but that of the types
    assert {tuple(one.codes) for one in found.held_out.values()} == {(t, c) for t in range(3) for c in range(2)}


def test_a_combination_of_few_cells_is_foretold_and_its_cells_count(log_means):
    codes, counts = cells(log_means)
    few = (codes == [1, 1]).all(1)
    kept = ~few | (np.cumsum(few) <= 10)
    found = of(codes[kept], counts[kept])
    assert found.rows == (6, 2, 5)
    assert [1, 1] not in found.profiles.codes[found.seen].tolist()
    (one,) = (told for told in found.unseen if told.codes.tolist() == [1, 1])
    k = found.profiles.codes.tolist().index([1, 1])
    without = [foretell(found.profiles, one.codes, column, k).log_mean for column in (0, 1)]
    wanted = [(10 * found.profiles.log_mean[k] + 25 * log_mean) / 35 for log_mean in without]
    assert min(np.abs(one.log_mean - log_mean).max() for log_mean in wanted) < 1e-9


def test_means_are_shrunk_to_what_is_foretold(log_means):
    found = of(*cells(log_means))
    for k, told in found.held_out.items():
        known = found.profiles.log_mean[k]
        np.testing.assert_allclose(found.log_mean(k), (150 * known + 25 * told.log_mean) / 175)
    (alone,) = set(range(7)) - set(found.held_out)
    np.testing.assert_array_equal(found.log_mean(alone), found.profiles.log_mean[alone])


def test_own_cells_have_no_say(log_means):
    """What is foretold of a seen combination is the same whatever its own cells are."""
    codes, counts = cells(log_means)
    other = counts.copy()
    other[(codes == [1, 1]).all(1)] = np.random.default_rng(1).poisson(3.0, (150, GENES))
    one, two = (
        next(told for told in of(codes, X).held_out.values() if told.codes.tolist() == [1, 1]) for X in (counts, other)
    )
    np.testing.assert_allclose(one.log_mean, two.log_mean, atol=1e-9)


def test_one_column_has_no_combinations():
    counts = np.ones((10, GENES), np.float32)
    codes = np.arange(10)[:, None] % 2
    statistics = Statistics.of(MemoryMatrix(counts), "log1p", (), training_combinations(codes, (2,), GENES))
    assert Foretelling.of(codes, (2,), statistics) is None
