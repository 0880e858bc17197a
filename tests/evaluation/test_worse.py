"""Each worse set differs from real cells in what its name says, and in nothing else that it can keep."""

import numpy as np
import pytest

from wbdit.evaluation.figure_data import AlignedCells
from wbdit.evaluation.genes import gene_correlations
from wbdit.evaluation.worse import WORSE, doubled_cells, independent_genes, lost_type, weaker_effects


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    labels = np.repeat(["B", "NK", "T"], [60, 20, 120])
    state = rng.gamma(4.0, 0.25, (200, 1))
    means = np.where(labels[:, None] == "B", 1 + (np.arange(30) < 10), 1.0)
    return AlignedCells(np.log1p(rng.poisson(3 * means * state)).astype(float), labels, np.ones((200, 2)))


def test_every_set_has_as_many_cells_and_is_repeatable(cells):
    for make, words in WORSE.values():
        one, two = (make(cells, np.random.default_rng(3)) for _ in range(2))
        assert one.values.shape == cells.values.shape
        np.testing.assert_array_equal(one.values, two.values)
        assert words


def test_genes_become_independent_within_labels(cells):
    made = independent_genes(cells, np.random.default_rng(0))
    rows = cells.labels == "T"
    off = ~np.eye(30, dtype=bool)
    assert gene_correlations(cells.values[rows])[off].mean() > 0.2
    assert abs(gene_correlations(made.values[rows])[off].mean()) < 0.03
    np.testing.assert_allclose(made.values[rows].mean(0), cells.values[rows].mean(0))


def test_some_effects_are_halved_and_zeros_stay(cells):
    made = weaker_effects(cells, np.random.default_rng(0))
    np.testing.assert_array_equal(made.values == 0, cells.values == 0)
    rows, overall = cells.labels == "B", cells.values.mean(0)
    kept = (made.values[rows].mean(0) - overall) / (cells.values[rows].mean(0) - overall)
    assert set(kept.round(6)) == {0.5, 1.0}


def test_the_type_nearest_to_a_tenth_is_lost(cells):
    made = lost_type(cells, np.random.default_rng(0))
    assert "NK" not in made.labels
    assert set(made.labels) == {"B", "T"}


def test_half_of_the_cells_come_twice(cells):
    made = doubled_cells(cells, np.random.default_rng(0))
    _, times = np.unique(made.values, axis=0, return_counts=True)
    assert set(times) == {2}


def test_without_labels_there_are_no_types_to_lose(cells):
    bare = cells._replace(labels=None)
    assert weaker_effects(bare, np.random.default_rng(0)) is None
    assert lost_type(bare, np.random.default_rng(0)) is None
    assert lost_type(cells._replace(labels=np.repeat("B", 200)), np.random.default_rng(0)) is None
