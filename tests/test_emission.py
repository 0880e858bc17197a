"""Effects in, counts out: means change by the factors asked for, and nothing else does."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import ROOT, exit_code

import wbdit
from wbdit.datasets import blood_cells
from wbdit.emission import Effects
from wbdit.errors import InputError

TYPES = ("B", "NK")


@pytest.fixture(scope="module")
def cells():
    """Return negative binomial counts of 3,000 cells by 40 genes with a hidden program; the last gene is silent."""
    rng = np.random.default_rng(0)
    labels = np.repeat(TYPES, 1500)
    program = rng.gamma(4.0, 0.25, (3000, 1)) ** (np.arange(40) < 10)
    means = rng.uniform(0.3, 4, 40) * np.where(labels[:, None] == "B", 1 + (np.arange(40) % 3 == 0), 1) * program
    counts = rng.poisson(rng.gamma(2.0, means / 2.0) * rng.lognormal(0, 0.3, (3000, 1)))
    counts[:, 39] = 0
    obs = pd.DataFrame({"kind": labels}, index=[f"cell{i}" for i in range(3000)])
    var = pd.DataFrame(index=[f"g{i}" for i in range(40)])
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def means(cells):
    return np.asarray(cells.X.mean(axis=0)).ravel()


def test_no_effect_gives_the_cells_back(cells):
    made = wbdit.emit(cells, pd.Series({"g0": 0.0}), label="kind")
    assert (made.X != cells.X).nnz == 0
    assert made.obs.equals(cells.obs)


def test_means_change_by_the_factors_asked_for(cells):
    asked = np.linspace(-2, 2, 38)
    made = wbdit.emit(cells, pd.Series(asked, index=cells.var_names[:38]), label="kind", pseudo_count=0)
    got = np.log(means(made)[:38] / means(cells)[:38])
    slope, intercept = np.polyfit(asked, got, 1)
    assert slope == pytest.approx(1, abs=0.02)
    assert intercept == pytest.approx(0, abs=0.02)
    np.testing.assert_allclose(got, asked, atol=0.1)
    np.testing.assert_array_equal(made.X[:, 38:].toarray(), cells.X[:, 38:].toarray())


def test_counts_stay_as_dispersed_and_correlated(cells):
    """A program that ties ten genes is still there, and raised genes are as dispersed as before."""
    made = wbdit.emit(cells, pd.Series(1.0, index=cells.var_names[:10]), label="kind")
    one, two = (x.X[:1500, :10].toarray() for x in (cells, made))
    before, after = (np.corrcoef(x.T)[np.triu_indices(10, 1)].mean() for x in (one, two))
    assert after > 0.9 * before > 0.1
    excess = [((x.var(0) - x.mean(0)) / x.mean(0) ** 2).mean() for x in (one, two)]
    assert excess[1] == pytest.approx(excess[0], rel=0.15)


def test_silent_genes_can_turn_on(cells):
    effect = pd.Series({"g39": 5.0})
    made = wbdit.emit(cells, effect, label="kind", pseudo_count=1.0)
    library = np.asarray(cells.X.sum(axis=1)).ravel()
    assert means(made)[39] == pytest.approx((np.exp(5) - 1) * library.mean() / 1e4, rel=0.1)
    assert np.asarray((made.X[:, 39] > 0).mean()) > 0.3


def test_effects_by_label_replace_the_others(cells):
    table = pd.DataFrame({"gene": ["g0", "g0"], "log2_fold_change": [1.0, -1.0], "label": ["B", "NK"]})
    made = wbdit.emit(cells, table, label="kind")
    for name, factor in (("B", 2.0), ("NK", 0.5)):
        rows = np.flatnonzero(cells.obs["kind"] == name)
        assert means(made[rows])[0] / means(cells[rows])[0] == pytest.approx(factor, rel=0.05)


def test_further_cells_are_no_copies(cells):
    few = cells[:100].copy()
    made = wbdit.emit(few, pd.Series({"g0": 0.5}), n=250)
    assert made.n_obs == 250
    assert made.obs_names[100] == "cell0-1"
    assert made.obs_names.is_unique
    again = made.X[100:200].toarray()[:, 1:]
    assert ((again != few.X.toarray()[:, 1:]).any(axis=1)).mean() > 0.95
    assert again.mean() == pytest.approx(few.X[:, 1:].mean(), rel=0.1)
    assert (made.X[:70] != wbdit.emit(few, pd.Series({"g0": 0.5}), n=70).X).nnz == 0


def test_empty_cells_stay_empty(cells):
    few = cells[:70].copy()
    few.X = sp.csr_matrix(few.X.toarray() * (np.arange(70) > 3)[:, None])
    made = wbdit.emit(few, pd.Series([2.0, -2.0], index=["g0", "g1"]), n=140)
    assert made.X[:4].nnz == 0
    assert made.X[70:74].nnz == 0


def test_a_file_has_the_same_cells(cells, tmp_path):
    effects = pd.Series({"g0": 0.5, "g3": -1.0})
    path = wbdit.emit_to(tmp_path / "made.h5ad", cells, effects, label="kind", seed=4)
    made = ad.read_h5ad(path)
    assert (made.X != wbdit.emit(cells, effects, label="kind", seed=4).X).nnz == 0
    assert made.uns["wbdit"]["genes"] == 2


def test_dispersions_of_a_run(cells):
    blood = blood_cells()
    generator = wbdit.load(ROOT / "wbdit" / "example_run", device="cpu")
    effects = pd.Series({"LYZ": 1.0})
    made = wbdit.emit(blood, effects, label="bulk_labels", generator=generator)
    place = blood.var_names.get_loc("LYZ")
    assert np.log(means(made)[place] / means(blood)[place]) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("effects", "message"),
    [
        (pd.DataFrame({"gene": ["g0"]}), "needs a column 'gene' and one of"),
        (pd.DataFrame({"log_fold_change": [1.0]}), "needs a column 'gene'"),
        (pd.DataFrame({"gene": ["g0"], "log_fold_change": ["x"]}), "effect on 'g0' is no number"),
        (pd.DataFrame({"gene": ["g0"], "log_fold_change": [99.0]}), "no number between -15 and 15"),
        (pd.Series([1.0, 2.0], index=["g0", "g0"]), "'g0' is given twice"),
        (pd.Series({"none": 1.0}), "lack 1 genes of the effects, 'none' first"),
        (pd.DataFrame({"gene": ["g0"], "log_fold_change": [1.0], "label": ["T"]}), "label 'T'; the labels .*: B, NK"),
    ],
)
def test_wrong_effects_are_refused(cells, effects, message):
    with pytest.raises(InputError, match=message):
        wbdit.emit(cells, effects, label="kind")


def test_base_two_and_natural_logarithms():
    base = Effects.of(pd.DataFrame({"names": ["a"], "logfoldchanges": [2.0]}))
    assert base.of_gene["a"] == pytest.approx(2 * np.log(2))


def test_the_command(cells, tmp_path, capsys):
    cells[:50].copy().write_h5ad(tmp_path / "ctrl.h5ad")
    (tmp_path / "effects.csv").write_text("gene,log_fold_change\ng0,1.5\ng1,-0.5\n")
    asked = ("emit", tmp_path / "ctrl.h5ad", "--out", tmp_path / "made.h5ad", "--label", "kind")
    assert exit_code(*asked, "--effects", tmp_path / "effects.csv", "--quiet") == 0
    made = ad.read_h5ad(tmp_path / "made.h5ad")
    assert made.shape == (50, 40)
    assert means(made)[0] > means(cells)[0]
    assert exit_code(*asked, "--effects", tmp_path / "none.csv") == 2
    assert "no such file" in capsys.readouterr().err
