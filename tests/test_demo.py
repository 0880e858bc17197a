"""The demo (slow): its scores."""

import json

import anndata as ad
import numpy as np
import pytest

from wbdit import cli
from wbdit.datasets import LABEL


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
