"""Conversion from AnnData to tensors and back, and the errors for unusable cells."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers import make_cells

from wbdit import InputError
from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.data.expression import check_cells, read_h5ad
from wbdit.data.labels import apportion
from wbdit.data.matrix import find_expression
from wbdit.data.preprocessor import Preprocessor
from wbdit.data.space import detect_space
from wbdit.data.variable_genes import variable_genes

COUNTS = make_cells(60, 30).X.toarray()
LOGNORM = np.log1p(COUNTS / COUNTS.sum(1, keepdims=True) * 1e4)
SCALED = (LOGNORM - LOGNORM.mean(0)) / LOGNORM.std(0)


def holding(values):
    cells = make_cells(60, 30)
    cells.X = values
    return cells


# expression spaces


@pytest.mark.parametrize(
    ("values", "space"),
    [
        (COUNTS, "counts"),
        (sp.csr_matrix(COUNTS), "counts"),
        (sp.csc_matrix(COUNTS.astype(np.int64)), "counts"),
        (LOGNORM, "lognorm"),
        (sp.csr_matrix(LOGNORM), "lognorm"),
        (SCALED, "scaled"),
    ],
)
def test_spaces_are_told_apart(values, space):
    assert detect_space(values) == space


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (-COUNTS, "negative counts"),
        (COUNTS / COUNTS.sum(1, keepdims=True) * 1e4, "take the logarithm"),
        (np.where(COUNTS.max() == COUNTS, -0.5, COUNTS) * (COUNTS > 4), "most entries are zero"),
        (np.zeros((3, 3)), "only zeros"),
    ],
)
def test_what_is_none_of_them_is_refused(values, words):
    with pytest.raises(InputError, match=words):
        detect_space(values)


def test_counts_in_a_layer_are_found_and_said():
    cells = holding(LOGNORM)
    cells.layers["counts"] = COUNTS
    expression = find_expression(cells)
    assert expression.space == "counts"
    np.testing.assert_array_equal(expression.X, COUNTS)
    assert expression.found == "X is log-normalized; using the raw counts in layers['counts']"


# what is refused


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: c[:0], "at least two cells"),
        (lambda c: c[:1], "at least two cells"),
        (lambda c: c[:, :0], "no genes"),
        (lambda c: holding(np.where(COUNTS == 3, np.nan, COUNTS)), "NaN or infinite"),
        (lambda c: holding(np.where(COUNTS == 3, np.inf, COUNTS)), "NaN or infinite"),
        (lambda c: ad.AnnData(obs=c.obs), "no X matrix|no genes"),
    ],
)
def test_unusable_cells(damage, words, cells):
    with pytest.raises(InputError, match=words):
        Preprocessor.fit(damage(cells).copy())


def test_duplicate_genes(cells):
    cells = cells.copy()
    cells.var_names = ["same", "same", *cells.var_names[2:]]
    with pytest.raises(InputError, match="'same'.*var_names_make_unique"):
        Preprocessor.fit(cells)


def test_unknown_label_lists_the_columns(cells):
    with pytest.raises(InputError, match="no column 'cell_type'.*type"):
        check_cells(cells, "cell_type")


def test_missing_labels(cells):
    cells = cells.copy()
    cells.obs.loc[cells.obs_names[:3], "type"] = None
    with pytest.raises(InputError, match="3 cells have no 'type'"):
        check_cells(cells, "type")


def test_a_label_with_one_cell(cells):
    cells = cells.copy()
    cells.obs.loc[cells.obs_names[0], "type"] = "rare"
    with pytest.raises(InputError, match="'rare'.*one cell"):
        Preprocessor.fit(cells, label="type")


def test_files_that_are_not_there_or_damaged(tmp_path, cells):
    with pytest.raises(InputError, match="no such file"):
        read_h5ad(tmp_path / "none.h5ad")
    with pytest.raises(InputError, match="is a folder"):
        read_h5ad(tmp_path)
    (tmp_path / "text.h5ad").write_text("not a file of cells")
    cells.write_h5ad(tmp_path / "whole.h5ad")
    (tmp_path / "half.h5ad").write_bytes((tmp_path / "whole.h5ad").read_bytes()[:5000])
    for name in ("text", "half"):
        with pytest.raises(InputError, match="cannot read"):
            read_h5ad(tmp_path / f"{name}.h5ad")


# round trips


@pytest.mark.parametrize("lognorm", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_counts_come_back(lognorm, centered, cells):
    preprocessor = Preprocessor.fit(cells, label="type", lognorm=lognorm, centered=centered)
    x = preprocessor.encode(cells)
    if centered:
        assert abs(x.mean(0)).max() < 1e-5
        assert x.std() == pytest.approx(1, abs=1e-5)
    # normalized values become counts by the given library size; drawn counts already have theirs
    back = preprocessor.decode(x if lognorm else COUNTS, np.full(60, 500.0))
    assert sp.issparse(back.X)
    assert back.X.format == "csr"
    assert back.X.dtype == np.float32
    if lognorm:
        expected = COUNTS / COUNTS.sum(1, keepdims=True) * 500
        np.testing.assert_allclose(back.X.toarray(), np.rint(expected), atol=1)
        assert abs(back.X.sum(1) - 500).max() < 15
    else:
        np.testing.assert_array_equal(back.X.toarray(), COUNTS)
        np.testing.assert_allclose(back.layers["lognorm"].toarray(), LOGNORM, rtol=1e-5)
    assert list(preprocessor.obs(preprocessor.labels.codes(cells))["type"]) == list(cells.obs["type"])
    assert list(back.var_names) == list(cells.var_names)


@pytest.mark.parametrize(("values", "space"), [(LOGNORM, "lognorm"), (SCALED, "scaled")])
def test_other_spaces_come_back(values, space):
    cells = holding(values.astype(np.float32))
    preprocessor = Preprocessor.fit(cells)
    assert (preprocessor.space, preprocessor.values, preprocessor.labels.columns) == (space, "as is", ())
    drawn = preprocessor.draw(np.zeros((60, 0), int), np.empty((60, 0)), np.full(60, 0.5))
    back = preprocessor.decode(preprocessor.encode(cells), drawn.library)
    np.testing.assert_allclose(back.X.toarray() if space == "lognorm" else back.X, values, atol=1e-5)
    assert ("lognorm" in back.layers) == (space == "lognorm")
    assert "type" not in back.obs


def test_a_little_is_nothing():
    """A gene has no values between zero and its smallest value, so `decode` takes the nearer of the two."""
    preprocessor = Preprocessor.fit(holding(LOGNORM.astype(np.float32)), centered=False)
    x = np.tile(preprocessor.smallest, (2, 1)) * np.array([[0.4], [0.6]], np.float32)
    back = preprocessor.decode(x, np.ones(2)).X.toarray()
    assert (back[0] == 0).all()
    np.testing.assert_allclose(back[1], x[1])


def test_libraries_are_drawn_from_their_label(cells):
    preprocessor = Preprocessor.fit(cells, label="type")
    assert preprocessor.labels.sizes.tolist() == [20, 20, 20]
    totals = COUNTS.sum(1)
    codes, u = np.repeat([[0], [1], [2]], 1000, axis=0), np.tile(np.linspace(0.0005, 0.9995, 1000), 3)
    drawn = preprocessor.draw(codes, np.empty((3000, 0)), u).library
    for k in range(3):
        own = totals[preprocessor.labels.codes(cells)[:, 0] == k]
        assert own.min() <= drawn[codes[:, 0] == k].min()
        assert drawn[codes[:, 0] == k].max() <= own.max()
        assert drawn[codes[:, 0] == k].mean() == pytest.approx(own.mean(), rel=0.03)


def test_genes_are_found_by_name(cells):
    preprocessor = Preprocessor.fit(cells)
    shuffled = cells[:, ::-1].copy()
    np.testing.assert_array_equal(preprocessor.encode(shuffled), preprocessor.encode(cells))
    with pytest.raises(InputError, match="1 of the run's 30 genes are missing, 'gene-0'"):
        preprocessor.encode(cells[:, 1:])
    with pytest.raises(InputError, match="trained on counts, these cells hold lognorm"):
        preprocessor.encode(holding(LOGNORM))


def test_unknown_label_value(cells):
    labels = Preprocessor.fit(cells, label="type").labels
    other = cells.copy()
    other.obs["type"] = other.obs["type"].astype(str)
    other.obs.loc[other.obs_names[3], "type"] = "Mast"
    with pytest.raises(InputError, match="unknown label 'Mast' in 'type'.*B, NK, T"):
        labels.codes(other)
    with pytest.raises(InputError, match="unknown label 'Mast' in 'type'.*B, NK, T"):
        labels.codes_from_counts({"B": 1, "Mast": 2})
    with pytest.raises(InputError, match="without labels"):
        Preprocessor.fit(cells).labels.codes_from_counts({"B": 1})


# variable genes


@pytest.mark.parametrize("space", ["counts", "lognorm"])
def test_variable_genes_are_kept(space):
    rng = np.random.default_rng(0)
    rate = np.tile(rng.gamma(2.0, 2.0, 200), (300, 1))
    rate[::2, :20] *= 4  # twenty genes differ between two types of cells, the others do not
    rate[:, 199] = 0
    counts = rng.poisson(rate).astype(np.float32)
    keep = variable_genes(MemoryMatrix(counts if space == "counts" else np.log1p(counts)), space, 15)
    assert keep.sum() == 15
    assert keep[:20].sum() >= 10  # one or two by chance
    assert not keep[199]


def test_no_gene_varies():
    alike = np.full((40, 9), np.log1p(1e4 / 9), np.float32)
    with pytest.raises(InputError, match="no gene varies"):
        variable_genes(MemoryMatrix(alike), "lognorm", 5)


@pytest.mark.parametrize("varying", [0, 2, 5])
def test_too_few_genes_vary_for_a_choice(varying):
    """The curve of variance over mean has no points; the library that fits it crashed on 0 and 2."""
    counts = np.full((40, 9), 3, np.float32)
    counts[::2, :varying] += np.arange(1, varying + 1)
    with pytest.raises(InputError, match="cannot be fitted"):
        Preprocessor.fit(ad.AnnData(counts), max_genes=5)


def test_too_many_genes_are_said(log):
    preprocessor = Preprocessor.fit(make_cells(200, 50), max_genes=20)
    assert len(preprocessor.genes) == 20
    assert log == ["X is raw counts", "kept the 20 most variable of 50 genes"]


def test_scaled_values_do_not_tell_variable_genes():
    with pytest.raises(InputError, match="from scaled values"):
        variable_genes(MemoryMatrix(SCALED), "scaled", 5)


def test_apportion():
    assert apportion(np.array([1, 1, 2]), 8).tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    assert np.bincount(apportion(np.array([500, 300, 200]), 7)).tolist() == [4, 2, 1]
    assert len(apportion(np.array([3, 3, 3]), 100)) == 100


def test_choosing_genes_leaves_the_number_of_threads_alone(cells):
    """A user who sets one thread, for example by OMP_NUM_THREADS, also trains with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert variable_genes(MemoryMatrix(cells.X), "counts", 10).sum() == 10
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
