"""The demo: its split of the cells, and (slow) its scores."""

import json

import anndata as ad
import numpy as np
import pytest

from wbdit import cli
from wbdit.data.expression import split_cells
from wbdit.datasets import LABEL, blood_cells


def test_halves_share_no_cell_and_keep_the_types():
    cells = blood_cells()
    train, test = split_cells(cells, LABEL, 0.5, seed=0)
    assert train.n_obs + test.n_obs == 700
    assert not set(train.obs_names) & set(test.obs_names)
    difference = train.obs[LABEL].value_counts() - test.obs[LABEL].value_counts()
    assert difference.between(0, 1).all()
    assert list(split_cells(cells, LABEL, 0.5, seed=1)[0].obs_names) != list(train.obs_names)


@pytest.mark.slow
def test_the_demo_meets_its_bars(tmp_path):
    with pytest.raises(SystemExit) as done:
        cli.run(["demo", "--out", str(tmp_path)])
    assert done.value.code == 0
    scores = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert scores["w2"]["value"] <= 1.15 * scores["w2"]["floor"]
    assert scores["scc"]["value"] >= 0.95
    assert scores["lfc_slope"]["value"] >= 0.75
    assert scores["zero_mae"]["value"] <= 0.05
    synthetic = ad.read_h5ad(tmp_path / "synthetic.h5ad")
    assert (synthetic.X.data == np.rint(synthetic.X.data)).all()
    assert list(synthetic.obs[LABEL]) == list(ad.read_h5ad(tmp_path / "test.h5ad").obs[LABEL])


@pytest.mark.slow
def test_the_demo_can_be_run_again_in_its_folder(tmp_path):
    for _ in range(2):
        with pytest.raises(SystemExit) as done:
            cli.run(["demo", "--out", str(tmp_path), "--minutes", "0.05"])
        assert done.value.code == 0
