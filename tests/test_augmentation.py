"""Augmentation: real cells stay, rare labels are filled up, and the column "synthetic" tells them apart."""

import anndata as ad
import numpy as np
import pytest
from helpers import exit_code, two_columns

import wbdit
from wbdit import InputError

CELLS = two_columns(60)[:47].copy()  # 16 B, 16 NK, 15 T/reg


@pytest.fixture(scope="module")
def generator():
    return wbdit.fit(CELLS[:, :20], label=["condition", "type"], steps=2, progress=False)  # 20 of the 30 genes


def test_rare_labels_are_filled_up(generator, log):
    cells = CELLS.copy()
    cells.obs["age"] = np.arange(47)
    cells.obs["is_old"] = np.arange(47) > 20
    cells.obs["batch"] = ["one", "two"][:1] * 47
    cells.obs["batch"] = cells.obs["batch"].astype("category")
    cells.var["chromosome"] = "1"
    cells.uns["source"] = "here"
    cells.obsm["X_pca"] = np.zeros((47, 2))
    both = wbdit.augment(cells, label="type", min_cells=20, generator=generator)
    assert both.obs["type"].value_counts().to_dict() == {"B": 20, "NK": 20, "T/reg": 20}
    assert both.obs["synthetic"].dtype == bool
    assert list(both.obs["synthetic"]) == [False] * 47 + [True] * 13
    assert list(both.obs_names[:47]) == list(cells.obs_names)
    assert list(both.var_names) == list(generator.preprocessor.genes)
    assert (both.X[:47].toarray() == cells[:, both.var_names].X).all()
    assert np.allclose(np.expm1(both.layers["lognorm"].toarray()).sum(1), 1e4)
    assert both.uns["source"] == "here"
    assert both.uns["wbdit"]["model_hash"] == generator.config.model_hash
    assert "chromosome" in both.var
    assert not both.obsm
    assert both.obs["condition"].notna().all()  # generated with it
    assert both.obs["age"].isna().sum() == both.obs["is_old"].isna().sum() == both.obs["batch"].isna().sum() == 13
    assert "added 13 synthetic to 47 real cells, over the generator's 20 of 30 genes: 4 B, 4 NK, 5 T/reg" in log
    assert any("synthetic cells do not increase n" in line for line in log)


def test_the_file_can_be_read_back(tmp_path, generator):
    cells = CELLS.copy()
    cells.obs["is_old"] = np.arange(47) > 20
    cells.obs["batch"] = "one"
    cells.write_h5ad(tmp_path / "data.h5ad")
    generator.save(tmp_path / "run")
    arguments = ("--label", "type", "--min", 17, "--run", tmp_path / "run", "--out", tmp_path / "both.h5ad")
    assert exit_code("augment", tmp_path / "data.h5ad", *arguments) == 0
    both = ad.read_h5ad(tmp_path / "both.h5ad")
    assert both.obs["synthetic"].sum() == 4
    assert both.obs_names.is_unique


def test_labels_may_be_numbers_and_names_may_clash():
    cells = CELLS.copy()
    cells.obs["cluster"] = np.arange(47) % 2
    cells.obs_names = [f"synthetic-{i}" for i in range(47)]
    both = wbdit.augment(cells, label="cluster", min_cells=24, steps=1, progress=False)
    assert both.obs["cluster"].value_counts().to_dict() == {"0": 24, "1": 24}
    assert both.obs_names[47] == "new-synthetic-0"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label": "sort"}, "no column 'sort'"),
        ({"label": "type", "min_cells": 15}, "nothing to add: the rarest label, 'T/reg', has 15 cells"),
        ({"label": "type", "steps": 3}, "`steps` is for a new training"),
        ({"label": "lane"}, "'lane' is no label column of this run, which has: condition, type"),
    ],
)
def test_mistakes(options, words, generator):
    cells = CELLS.copy()
    cells.obs["lane"] = "1"
    with pytest.raises(InputError, match=words):
        wbdit.augment(cells, **{"min_cells": 90, **options}, generator=generator)


def test_augmented_cells_are_refused(generator):
    both = wbdit.augment(CELLS, label="type", min_cells=17, generator=generator)
    with pytest.raises(InputError, match="obs has a column 'synthetic' already"):
        wbdit.augment(both, label="type", min_cells=20, generator=generator)


def test_the_command_trains_if_it_has_no_run(tmp_path):
    CELLS.write_h5ad(tmp_path / "data.h5ad")
    arguments = ("--label", "type", "--min", 16, "--minutes", 0.0001, "--out", tmp_path / "both.h5ad")
    assert exit_code("augment", tmp_path / "data.h5ad", *arguments) == 0
    both = ad.read_h5ad(tmp_path / "both.h5ad")
    assert both.obs.loc[both.obs["synthetic"], "type"].tolist() == ["T/reg"]
