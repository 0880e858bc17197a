"""What is learned from the cells in chunks is what dense fp64 arithmetic over all of them gives."""

import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers import make_cells

from wbdit.counts import init
from wbdit.counts.trend import CovariateTrend
from wbdit.data import cell_matrix, components
from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.data.components import Residuals, components_of, read_some
from wbdit.data.covariates import quantile_bins
from wbdit.data.moments import Moments
from wbdit.data.normalize import transformed
from wbdit.data.statistics import Statistics, training_groups
from wbdit.data.variable_genes import variable_genes

N, G = 60, 30
RNG = np.random.default_rng(0)
COUNTS = RNG.poisson((RNG.gamma(1, 2, (1, G)) + 0.5) * RNG.lognormal(0, 0.5, (N, 1))).astype(np.float32)
COUNTS[:, 0] = 0  # a gene without counts, and one without zeros
COUNTS[:, 1] += 1
CODES = np.stack([np.arange(N) % 3, np.arange(N) % 2], axis=1)
COVARIATES = RNG.normal(size=(N, 2)).astype(np.float32)


@pytest.fixture(params=[None, 7], ids=["at once", "by seven cells"])
def _chunked(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(cell_matrix, "CHUNK_VALUES", request.param * G)


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("values", ["log1p", "lognorm", "as is"])
@pytest.mark.parametrize("stored", [np.asarray, sp.csr_matrix])
def test_statistics(values, stored):
    cells = COUNTS - 2.5 if values == "as is" else COUNTS  # scaled values have both signs
    found = Statistics.of(MemoryMatrix(stored(cells)), values, training_groups(CODES, [3, 2], COVARIATES))
    seen, exact = transformed(cells, values).astype(np.float64), cells.astype(np.float64)
    np.testing.assert_allclose(found.mean, seen.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.variance, seen.var(0), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found.smallest, np.where(seen > 0, seen, np.inf).min(0), rtol=1e-6)
    np.testing.assert_allclose(found.matrix_mean, exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.matrix_variance, exact.var(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found.largest, cells.max(0))
    np.testing.assert_array_equal(found.totals, exact.sum(1))
    for column, table in enumerate(found.sums[:2]):
        np.testing.assert_array_equal(table, [exact[CODES[:, column] == label].sum(0) for label in range(len(table))])
    for x, table in zip(COVARIATES.T, found.sums[2:], strict=True):
        np.testing.assert_array_equal(table, [exact[quantile_bins(x) == one].sum(0) for one in range(len(table))])


def test_the_variance_of_large_values_does_not_cancel():
    values, moments = RNG.normal(size=(N, 4)) + 1e7, Moments(4)
    for rows in np.array_split(values, 5):
        moments.add(sp.csr_matrix(rows))
    np.testing.assert_allclose(moments.variance(1), values.var(0, ddof=1), rtol=1e-7)


@pytest.mark.parametrize("space", ["counts", "lognorm"])
@pytest.mark.parametrize("batches", [None, np.arange(90) % 3 // 2])
def test_variable_genes_do_not_depend_on_chunks(space, batches, monkeypatch):
    rng = np.random.default_rng(1)
    counts = rng.poisson(rng.gamma(rng.gamma(2, 2, 200), rng.gamma(1.0, 20.0, 200) + 3, (90, 200)) / 2)
    matrix = MemoryMatrix(counts if space == "counts" else np.log1p(counts / counts.sum(1, keepdims=True) * 1e4))
    at_once = variable_genes(matrix, space, 40, batches)
    monkeypatch.setattr(cell_matrix, "CHUNK_VALUES", 7 * 200)
    np.testing.assert_array_equal(variable_genes(matrix, space, 40, batches), at_once)
    assert at_once.sum() == 40


def rates_of(sizes, codes):
    """Return the fitted rates, and those of a plain dense fit over all cells."""
    found = Statistics.of(MemoryMatrix(COUNTS), "log1p", training_groups(codes, sizes))
    totals = COUNTS.sum(0, dtype=np.float64)
    exact, library = COUNTS.astype(np.float64), COUNTS.sum(1, dtype=np.float64)
    share = exact.sum(0) / exact.sum() + 1e-9
    tables = [np.zeros((size + 1, G)) for size in sizes]
    for _ in range(5):
        for column, table in enumerate(tables):
            others = sum((other[codes[:, c]] for c, other in enumerate(tables) if c != column), np.zeros((N, G)))
            expected = library[:, None] * share * np.exp(others)
            for label in range(sizes[column]):
                mine, prior = codes[:, column] == label, library.mean() * share
                table[label] = np.log((exact[mine].sum(0) + prior) / (expected[mine].sum(0) + prior))
    dense = np.concatenate([np.zeros((0, G)), *tables])
    return init.label_rates(totals, found.sums, codes, found.totals), dense, found


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("columns", [0, 1, 2])
def test_label_rates_and_expected_counts(columns):
    codes, sizes = CODES[:, :columns], [3, 2][:columns]
    rates, dense, found = rates_of(sizes, codes)
    np.testing.assert_allclose(rates, dense, atol=1e-6)
    expected = init.ExpectedCounts(COUNTS.sum(0), codes, found.totals, rates, sizes)
    first = np.cumsum([0, *(size + 1 for size in sizes)])[:-1]
    share = COUNTS.sum(0, dtype=np.float64) / COUNTS.sum(dtype=np.float64)
    plain = found.totals[:, None] * share * np.exp(dense[codes + first].sum(1))
    np.testing.assert_allclose(np.concatenate([expected[:13], expected[13:]]), plain, rtol=1e-5)


def test_columns_of_many_labels_do_not_overflow():
    """Twelve columns of 64 labels have 2^72 combinations."""
    codes = np.random.default_rng(2).integers(0, 64, (N, 12))
    codes[0], codes[1] = 63, 63
    codes[1, 0] = 0  # differs from the first cell only in the highest digit
    combinations, library = init._pooled(codes, np.arange(1.0, N + 1))
    assert len(combinations) == len(np.unique(codes, axis=0)) == N
    for row, total in zip(combinations, library, strict=True):
        assert (codes[int(total) - 1] == row).all()


@pytest.mark.usefixtures("_chunked")
def test_trends():
    """The second trend is fitted to what labels and the first trend leave, summed over the cells of each bin."""
    rates, _, found = rates_of([3, 2], CODES)
    sums = Statistics.of(MemoryMatrix(COUNTS), "log1p", training_groups(CODES, [3, 2], COVARIATES)).sums[2:]
    expected = init.ExpectedCounts(COUNTS.sum(0), CODES, found.totals, rates, [3, 2])
    both, first, second = CovariateTrend(2, G), CovariateTrend(1, G), CovariateTrend(1, G)
    both.init_from_data(COVARIATES, sums, expected)
    first.init_from_data(COVARIATES[:, :1], sums[:1], expected)
    left = expected[:N] * first(torch.from_numpy(COVARIATES[:, :1]))[0].exp().detach().numpy()
    second.init_from_data(COVARIATES[:, 1:], sums[1:], left)
    torch.testing.assert_close(both.rates, torch.cat([first.rates, second.rates]), rtol=1e-4, atol=1e-5)
    assert both.rates.abs().max() > 0.05


# components


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("k", [5, 64])
def test_components_are_those_of_a_dense_decomposition(k):
    """Few components come from the Lanczos iteration, many from a dense decomposition."""
    found = components_of(MemoryMatrix(sp.csr_matrix(COUNTS)), "log1p", k)
    values = np.log1p(COUNTS.astype(np.float64))
    variances, axes = np.linalg.eigh(np.cov(values.T, bias=True))
    k = min(k, G - 1)  # the silent gene has no variance
    np.testing.assert_allclose(found.variances, variances[::-1][:k], rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(found.axes * axes.T[::-1][:k], axis=1)), 1, atol=1e-5)
    assert (found.axes[np.arange(k), np.abs(found.axes).argmax(1)] > 0).all()


def test_no_axis_without_variance():
    """Five cells vary along four axes, and equal cells along none."""
    assert components_of(MemoryMatrix(COUNTS[:5]), "log1p", 64).axes.shape == (4, G)
    assert components_of(MemoryMatrix(np.repeat(COUNTS[:1], 9, axis=0)), "log1p", 64).axes.shape == (0, G)


def test_many_genes_take_no_matrix_of_genes_by_genes():
    """The 14,000 x 14,000 matrix in fp64 would take 1.6 GB, and its decomposition minutes."""
    X = sp.random(100, 14_000, 0.01, "csr", np.float32, random_state=0)
    tracemalloc.start()
    try:
        found = components_of(MemoryMatrix(X), "log1p", 4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.axes.shape == (4, 14_000)
    assert peak < 50e6


def test_a_random_sample_of_many_cells_is_enough(monkeypatch):
    X = make_cells(600, 40, seed=3).X
    exact = components_of(MemoryMatrix(X), "log1p", 2)
    monkeypatch.setattr(components, "MOST_CELLS", 300)
    read = []
    monkeypatch.setattr(MemoryMatrix, "rows", lambda self, index: read.extend(index) or sp.csr_matrix(self.X[index]))
    some = components_of(MemoryMatrix(X), "log1p", 2)
    assert len(set(read)) == len(read) == 300
    np.testing.assert_allclose(np.linalg.svd(some.axes @ exact.axes.T)[1], 1, atol=0.02)


def test_reading_stops_at_enough_values(monkeypatch):
    monkeypatch.setattr(cell_matrix, "CHUNK_VALUES", 10 * G)
    monkeypatch.setattr(components, "MOST_VALUES", 15 * G)
    X, read = read_some(MemoryMatrix(np.ones((N, G), np.float32)), np.random.default_rng(0).permutation(N))
    assert len(read) == X.shape[0] == 20
    assert read.max() > 40


def test_residuals_of_regressions_by_group():
    known = np.stack([np.ones(N), RNG.normal(size=N), np.ones(N)], axis=1)  # one column is redundant
    groups = [np.arange(0, N, 2), np.arange(1, 21, 2)]
    residuals, values = Residuals(sp.csr_matrix(COUNTS), known, groups, corrected=True), COUNTS.astype(np.float64)
    parts = []
    for group in groups:
        line = np.linalg.lstsq(known[group], values[group], rcond=None)[0]
        parts.append((values[group] - known[group] @ line) * np.sqrt(len(group) / (len(group) - 3)))
    plain = np.concatenate(parts)
    np.testing.assert_allclose(residuals.toarray(), plain, atol=1e-12)
    x, y = RNG.normal(size=(G, 2)), RNG.normal(size=len(plain))
    np.testing.assert_allclose(residuals @ x, plain @ x, atol=1e-10)
    np.testing.assert_allclose(residuals.transposed(y), plain.T @ y, atol=1e-10)
    singular = np.linalg.svd(plain, compute_uv=False)
    np.testing.assert_allclose(residuals.components(4).variances, singular[:4] ** 2 / len(plain), rtol=1e-6)
