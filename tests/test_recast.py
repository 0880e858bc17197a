"""The same cells under other labels: what labels do not change stays, and what they change is changed."""

import json

import anndata as ad
import numpy as np
import pytest
import torch
from helpers import ROOT, exit_code

import wbdit
from wbdit.datasets import LABEL, blood_cells
from wbdit.errors import InputError


@pytest.fixture(scope="module")
def generator():
    return wbdit.load(ROOT / "wbdit" / "example_run", device="cpu")


@pytest.fixture(scope="module")
def b_cells():
    cells = blood_cells()
    cells = cells[cells.obs[LABEL] == "CD19+ B"][:70].copy()
    cells.obs["donor"] = np.arange(70) % 3
    return cells


def test_uniform_numbers_give_the_counts_back(generator):
    """The inverse of the draw: the cell's own counts, whatever the place within a count's numbers."""
    cells = blood_cells()[:64].copy()
    model, known = generator.model, generator.preprocessor
    counts = torch.from_numpy(known.matrix(cells))
    alpha, sigma = generator.schedule.levels(model.stop)
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=counts.shape)).float()
    x = (alpha * torch.from_numpy(known.scaled(counts.numpy())).float() + sigma * noise)[:, None]
    library, t = counts.sum(1), torch.full((64,), model.stop)
    with torch.no_grad():
        conditioning = model.embed(torch.from_numpy(known.labels.codes(cells)), library.log())
    for place in (0.01, 0.5, 0.99):
        u = model.uniform_numbers(x, t, conditioning, counts, torch.full_like(counts, place), library)
        assert 0 <= u.min() <= u.max() <= 1
        drawn = model.draw(x, t, conditioning, u, library)
        assert (drawn == counts).float().mean() > 0.9995
    spread = torch.from_numpy(np.random.default_rng(1).random(counts.shape)).float()
    u = model.uniform_numbers(x, t, conditioning, counts, spread, library)
    assert abs(float(u.mean()) - 0.5) < 0.01  # those of cells that the model knows are spread evenly


def test_cells_under_their_own_labels_are_themselves(generator, b_cells):
    made = generator.recast(b_cells, toward={LABEL: "CD19+ B"}, seed=3)
    before, after = made.layers["original"].toarray(), made.X.toarray()
    np.testing.assert_array_equal(before, generator.preprocessor.matrix(b_cells))
    assert (before == after).mean() > 0.995
    assert (before == after)[before > 0].mean() > 0.95


def test_labels_change_what_they_explain(generator, b_cells):
    made = generator.recast(b_cells, toward={LABEL: "Dendritic"})
    before, after = made.layers["original"].toarray(), made.X.toarray()
    cells = blood_cells()
    means = {
        name: generator.preprocessor.matrix(cells[cells.obs[LABEL] == name]).mean(0)
        for name in ("CD19+ B", "Dendritic")
    }
    wanted, got = means["Dendritic"] - means["CD19+ B"], after.mean(0) - before.mean(0)
    strong = np.abs(wanted) > 1
    assert np.corrcoef(wanted[strong], got[strong])[0, 1] > 0.8
    np.testing.assert_allclose(after.sum(1).mean(), before.sum(1).mean(), rtol=0.1)  # library sizes stay
    assert np.corrcoef(after.sum(1), before.sum(1))[0, 1] > 0.9
    assert made.obs[LABEL].unique().tolist() == ["Dendritic"]
    assert made.obs["donor"].tolist() == b_cells.obs["donor"].tolist()
    assert made.obs_names.tolist() == b_cells.obs_names.tolist()


def test_a_cell_depends_on_its_place_and_the_seed_alone(generator, b_cells):
    how = {"toward": {LABEL: "Dendritic"}, "calls": 4}
    all_cells, first = generator.recast(b_cells, **how), generator.recast(b_cells[:10].copy(), **how)
    assert (all_cells.X[:10] != first.X).nnz == 0
    assert (generator.recast(b_cells[:10].copy(), **how, seed=1).X != first.X).nnz > 0


def test_draws_have_a_mean_and_a_deviation(generator, b_cells):
    how = {"toward": {LABEL: "Dendritic"}, "calls": 4}
    few = b_cells[:10].copy()
    one, many = generator.recast(few, **how), generator.recast(few, **how, draws=3)
    assert (one.X != many.X).nnz == 0  # the first draw
    assert "mean" not in one.layers
    deviation = many.layers["std"].toarray()
    assert deviation.max() > 0
    assert (np.abs(many.layers["mean"] - many.X).toarray() <= 2 * deviation + 1e-3).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"toward": {LABEL: "no such"}}, "unknown label 'no such'"),
        ({"toward": {"donor": "1"}}, "'donor' is no label column"),
        ({"toward": {}}, "recast to which labels"),
        ({"draws": 0}, "`draws` must be at least 1"),
        ({"calls": 0}, "`calls` must be between 1 and 499"),
    ],
)
def test_a_wrong_request_is_refused(generator, b_cells, change, message):
    with pytest.raises(InputError, match=message):
        generator.recast(b_cells, **{"toward": {LABEL: "Dendritic"}} | change)


def test_cells_without_the_genes_or_labels_are_refused(generator, b_cells):
    with pytest.raises(InputError, match="genes are missing"):
        generator.recast(b_cells[:, 1:].copy(), toward={LABEL: "Dendritic"})
    bare = b_cells.copy()
    del bare.obs[LABEL]
    with pytest.raises(InputError, match=LABEL):
        generator.recast(bare, toward={LABEL: "Dendritic"})


def test_the_command(b_cells, tmp_path, capsys):
    b_cells[:10].copy().write_h5ad(tmp_path / "cells.h5ad")
    made, where = tmp_path / "recast.h5ad", ROOT / "wbdit" / "example_run"
    asked = ("--toward", f"{LABEL}=Dendritic", "--out", made)
    assert exit_code("recast", where, tmp_path / "cells.h5ad", *asked, "--calls", 4, "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["cells"] == 10
    cells = ad.read_h5ad(made)
    assert cells.uns["wbdit"]["recast_toward"] == {LABEL: "Dendritic"}
    assert set(cells.layers) == {"lognorm", "original"}
    assert exit_code("recast", where, tmp_path / "cells.h5ad", "--toward", "Dendritic", "--out", made) == 2
    assert "write it as condition=stim" in capsys.readouterr().err
    assert exit_code("recast", where, tmp_path / "cells.h5ad", "--out", made) == 2
    assert exit_code("recast", where, tmp_path / "none.h5ad", *asked) == 2
