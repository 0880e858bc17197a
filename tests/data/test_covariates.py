"""Continuous columns: what is accepted, and how cells are drawn near a point."""

import numpy as np
import pytest
from helpers import make_cells

from wbdit import InputError
from wbdit.data.covariates import Covariates
from wbdit.data.draws import NEAREST
from wbdit.data.matrix import Source
from wbdit.data.preprocessor import Preprocessor


def aging(n=300):
    """Return cells of three types whose age and depth rise with the type: "B" young, "T" old."""
    cells = make_cells(n, 20)
    order = np.argsort(np.arange(n) % 3, kind="stable")
    cells.obs["age"] = np.empty(n)
    cells.obs.iloc[order, cells.obs.columns.get_loc("age")] = np.linspace(20, 80, n)
    cells.X = (cells.X.toarray() * np.rint(cells.obs["age"].to_numpy()[:, None] / 20)).astype(np.float32)
    return cells


CELLS = aging()


def test_values_are_standardized_and_read_by_name():
    covariates = Covariates.fit(CELLS, ["age"], ["type"])
    scaled = covariates.encode(covariates.values)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose([scaled.mean(), scaled.std()], [0, 1], atol=1e-6)
    np.testing.assert_array_equal(covariates.read(CELLS[::-1]), covariates.values[::-1])
    assert np.isnan(covariates.read(make_cells(2, 3), but=["age"])).all()
    assert np.isnan(covariates.encode(np.array([[np.nan]]))).all()


@pytest.mark.parametrize("values", [np.arange(300) % 2 == 0, np.arange(300) % 5])
def test_booleans_and_integers_are_numbers(values):
    cells = CELLS.copy()
    cells.obs["dose"] = values
    np.testing.assert_array_equal(Covariates.fit(cells, "dose").values[:, 0], values.astype(float))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("dose", "no column 'dose' in obs; the columns are: type, age"),
        (["age", "age"], "'age' is named twice"),
        ("type", "both a label and a continuous column"),
        ("text", r"'text' in obs is not numeric .*: give it as `label`, or convert it"),
        ("flat", r"all cells have the same 'flat' \(3\)"),
        ("holes", "2 cells have no 'holes'"),
        ("endless", "1 cells have an infinite 'endless'"),
    ],
)
def test_columns_that_cannot_be_learned(columns, words):
    cells = CELLS.copy()
    cells.obs["text"], cells.obs["flat"] = "x", 3
    cells.obs["holes"] = np.where(np.arange(300) < 2, np.nan, np.arange(300))
    cells.obs["endless"] = np.where(np.arange(300) < 1, np.inf, np.arange(300))
    with pytest.raises(InputError, match=words) as error:
        Preprocessor.fit(cells, label="type", continuous=columns)
    assert "\n" not in str(error.value)


def test_covariates_are_read_beside_chosen_genes_and_values():
    cells = CELLS.copy()
    cells.layers["doubled"] = 2 * cells.X
    cells.obs["donor"] = np.where(np.arange(300) % 2, "a", "b")
    genes = list(cells.var_names[:18])
    how = {"source": Source("doubled"), "genes": genes, "batch_key": "donor", "max_genes": 12}
    preprocessor, matrix, _ = Preprocessor.fit_cells(cells, label="type", continuous="age", **how)
    assert set(preprocessor.genes) < set(genes)
    doubled = 2 * cells[:, list(preprocessor.genes)].X
    np.testing.assert_array_equal(matrix.rows(np.arange(len(cells))).toarray(), doubled)
    np.testing.assert_array_equal(preprocessor.covariates.read(cells)[:, 0], cells.obs["age"])


def draw(codes, at, n=400):
    preprocessor = Preprocessor.fit(CELLS, label="type", continuous="age")
    u = (np.arange(n) + 0.5) / n
    return preprocessor, preprocessor.draw(np.full((n, 1), codes), np.full((n, 1), at), u)


def test_all_three_are_drawn_together():
    """Values of one training cell each: types, ages and library sizes are as correlated as in the cells."""
    preprocessor, drawn = draw(-1, np.nan)
    own = preprocessor.labels.codes(CELLS)[:, 0], CELLS.obs["age"], CELLS.X.sum(1)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        one, other = ([drawn.codes[:, 0], drawn.covariates[:, 0], drawn.library][k] for k in (a, b))
        assert np.corrcoef(one, other)[0, 1] == pytest.approx(np.corrcoef(own[a], own[b])[0, 1], abs=0.05)


def test_near_a_point_labels_and_library_sizes_are_those_of_the_neighbors():
    _, drawn = draw(-1, 38.0)
    away = np.abs(CELLS.obs["age"].to_numpy() - 38)
    near = CELLS[np.argsort(away, kind="stable")[:NEAREST]]
    assert (drawn.covariates == 38).all()
    shares = near.obs["type"].value_counts(normalize=True)
    for code, name in enumerate(["B", "NK"]):
        assert (drawn.codes[:, 0] == code).mean() == pytest.approx(shares[name], abs=0.02)
    assert drawn.library.min() >= near.X.sum(1).min()
    assert drawn.library.max() <= near.X.sum(1).max()


def test_a_requested_label_is_kept_far_from_its_cells():
    _, drawn = draw(0, 80.0)  # "B" is at most 40 years old
    assert (drawn.codes == 0).all()
    oldest = CELLS[(CELLS.obs["type"] == "B") & (CELLS.obs["age"] > 29)]
    assert drawn.library.max() <= oldest.X.sum(1).max()
    assert drawn.library.mean() == pytest.approx(oldest.X.sum(1).mean(), rel=0.05)


def test_values_beyond_the_training_cells_are_named():
    preprocessor, _ = draw(-1, np.nan, n=1)
    assert preprocessor.beyond(np.array([[50.0]]), np.array([CELLS.X.sum(1).mean()])) == []
    messages = preprocessor.beyond(np.array([[90.0], [15.0], [50.0]]), np.array([1.0, 1e9, 200.0]))
    assert messages[0] == "age = 90 (training cells: 20 to 80)"
    assert messages[1].startswith("the library sizes of 2 of 3 cells (training cells: ")
