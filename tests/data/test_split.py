"""Splits: by cell, donor and label combination; everything travels; mistakes are refused."""

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import two_columns

from wbdit import InputError
from wbdit.data.split import split
from wbdit.datasets import LABEL, blood_cells

CELLS = two_columns(60)
CELLS.obs["donor"] = [f"P{i % 5}" for i in range(60)]


def test_halves_share_no_cell_and_keep_the_types():
    cells = blood_cells()
    train, test = split(cells, label=LABEL, share=0.5, seed=0)
    assert train.n_obs + test.n_obs == 700
    assert not set(train.obs_names) & set(test.obs_names)
    difference = train.obs[LABEL].value_counts() - test.obs[LABEL].value_counts()
    assert difference.between(0, 1).all()
    assert list(split(cells, label=LABEL, share=0.5, seed=1)[0].obs_names) != list(train.obs_names)


def test_everything_travels():
    cells = CELLS.copy()
    cells.raw = cells.copy()
    cells.layers["twice"] = cells.X * 2
    cells.obsm["X_pca"] = np.arange(120.0).reshape(60, 2)
    cells.obsp["distances"] = sp.eye(60, format="csr")
    cells.uns["source"] = "here"
    for part in split(cells):
        rows = cells.obs_names.get_indexer(part.obs_names)
        assert list(rows) == sorted(rows)
        assert (cells.X[rows] == part.X).all()
        assert (cells.raw.X[rows] == part.raw.X).all()
        assert (part.layers["twice"] == cells.layers["twice"][rows]).all()
        assert (part.obsm["X_pca"] == cells.obsm["X_pca"][rows]).all()
        assert part.obsp["distances"].shape == (len(rows), len(rows))
        assert part.uns["source"] == "here"
        assert part.obs.equals(cells.obs.iloc[rows])
        assert not part.is_view


def test_combinations_are_split_alike():
    train, _ = split(CELLS, label=["type", "condition"], share=0.5)
    of_all, of_train = (part.obs.groupby(["type", "condition"], observed=True).size() for part in (CELLS, train))
    assert (of_train == -(-of_all // 2)).all()


def test_the_share_is_not_rounded_up_by_floating_point():
    cells = two_columns(100)
    assert split(cells, share=0.55)[0].n_obs == 55  # 100 * 0.55 is 55.00000000000001


@pytest.mark.parametrize(("share", "held_out"), [(0.8, 1), (0.99, 1), (0.5, 2), (0.2, 4)])
def test_donors_stay_together(share, held_out, log):
    train, test = split(CELLS, donor="donor", share=share)
    donors = set(test.obs["donor"])
    assert len(donors) == held_out
    assert not donors & set(train.obs["donor"])
    assert f"held out {held_out} of 5 donors: {', '.join(sorted(donors))}" in log


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("NK/stim", {("NK", "stim")}),
        (["NK/*", ("T/reg", "ctrl")], {("NK", "stim"), ("NK", "ctrl"), ("T/reg", "ctrl")}),
    ],
)
def test_combinations_are_held_out(names, expected):
    train, test = split(CELLS, label=["type", "condition"], hold_out=names)
    found = [set(part.obs[["type", "condition"]].itertuples(index=False, name=None)) for part in (train, test)]
    assert found[1] == expected
    assert not found[0] & expected


def test_a_label_that_training_lacks_is_said(log):
    split(CELLS, label="type", hold_out="NK")
    assert any("no training cell has these labels of 'type': NK; a generator cannot" in line for line in log)
    assert any("no held-out cell has these labels of 'type': B, T/reg" in line for line in log)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": 0.0}, "`share` must be between 0 and 1"),
        ({"share": 1.0}, "`share` must be between 0 and 1"),
        ({"share": float("nan")}, "`share` must be between 0 and 1"),
        ({"label": "sort"}, "no column 'sort'"),
        ({"donor": "sort"}, "no column 'sort'"),
        ({"hold_out": "NK"}, "needs a label column"),
        ({"label": "type", "hold_out": "Mast"}, "unknown label 'Mast' in 'type'; the labels are: B, NK, T/reg"),
        ({"label": ["type", "condition"], "hold_out": "T/reg/stim"}, "no cell to hold out has the labels 'T/reg/stim'"),
        ({"label": "type", "hold_out": "NK", "share": 0.5}, "without `share` and `donor`"),
        ({"label": "type", "hold_out": "NK", "donor": "donor"}, "without `share` and `donor`"),
        ({"label": "type", "hold_out": ["B", "NK", "T/reg"]}, "the training set would be empty"),
        ({"label": ["type", "donor"], "share": 0.999}, "the held-out set would be empty"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(InputError, match=words):
        split(CELLS, **options)


def test_one_donor_or_one_cell_cannot_be_split():
    with pytest.raises(InputError, match="all cells have one 'donor', P0"):
        split(CELLS[::5], donor="donor")
    with pytest.raises(InputError, match="at least two cells"):
        split(CELLS[:1])


def test_missing_labels_are_refused():
    cells = CELLS.copy()
    cells.obs.loc[cells.obs_names[3], "donor"] = np.nan
    with pytest.raises(InputError, match="1 cells have no 'donor'"):
        split(cells, donor="donor")
