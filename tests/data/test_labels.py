"""Label columns: combinations, names, compositions, and library sizes per combination."""

import numpy as np
import pandas as pd
import pytest
from helpers import two_columns

from wbdit import InputError
from wbdit.data.expression import label_text
from wbdit.data.labels import Labels
from wbdit.data.preprocessor import Preprocessor
from wbdit.request import read_request

COLUMNS = ["type", "condition"]
CELLS = two_columns()


def labels_of(sizes, columns=("type", "condition"), categories=(("B", "NK", "T/reg"), ("ctrl", "stim"))):
    """Return labels with the given number of cells per combination, by default of shape ``(3, 2)``."""
    sizes = np.asarray(sizes)
    combinations = np.argwhere(sizes > 0)
    return Labels(tuple(columns), categories, combinations, sizes[tuple(combinations.T)])


LABELS = labels_of([[30, 10], [10, 50], [20, 0]])


def named(labels, codes):
    return [labels.name(row) for row in codes]


def test_labels_are_learned():
    labels = Labels.fit(CELLS, COLUMNS)
    table = CELLS.obs.groupby(COLUMNS).size()
    assert named(labels, labels.combinations) == ["/".join(key) for key in table.index]
    assert labels.sizes.tolist() == table.tolist()
    codes = labels.codes(CELLS)
    assert named(labels, codes) == list(CELLS.obs["type"] + "/" + CELLS.obs["condition"])
    assert (labels.combinations[labels.combination_index(codes)] == codes).all()
    assert labels.label_sizes == (3, 2)
    assert labels.summary() == "3 x 2 labels, 5 of their 6 combinations"
    assert Labels.fit(CELLS, "type").label_sizes == (3,)
    without = Labels.fit(CELLS, None)
    assert (without.label_sizes, without.summary(), without.combinations.shape) == ((), "no labels", (1, 0))
    assert without.training_codes(7).shape == without.codes(CELLS)[:7].shape == (7, 0)
    assert without.training_cells(without.training_codes(7)) == {"": len(CELLS)}
    some = np.concatenate([labels.combinations, [[0, 0], [2, 1]]])
    cells = {"/".join(key): n for key, n in table.items()}
    found = labels.training_cells(some)
    assert {name: n for name, n in found.items() if n} == cells
    assert [name for name, n in found.items() if n == 0] == sorted(set(map(labels.name, some)) - set(cells))


def test_the_joint_composition_is_reproduced():
    labels = Labels.fit(CELLS, COLUMNS)
    _, counts = np.unique(labels.training_codes(240), axis=0, return_counts=True)
    assert counts.tolist() == (2 * labels.sizes).tolist()  # independent columns would allow T/reg/stim
    some = labels.codes(CELLS)[[0, 1, 1, 5, 5, 5]]
    kept = labels.codes_like(some, 12)
    assert np.unique(kept, axis=0, return_counts=True)[1].tolist() == [2, 4, 6]
    assert set(named(labels, kept)) == set(named(labels, some))


@pytest.mark.parametrize(
    ("counts", "cells"),
    [
        ({"NK/stim": 2, "B/ctrl": 1}, ["NK/stim", "NK/stim", "B/ctrl"]),
        ({("NK", "stim"): 1}, ["NK/stim"]),
        ({"T/reg/ctrl": 2}, ["T/reg/ctrl"] * 2),
        ({"T/reg/stim": 1}, ["T/reg/stim"]),
        ({"B/*": 4}, ["B/ctrl"] * 3 + ["B/stim"]),
        ({"*/stim": 6}, ["B/stim"] + ["NK/stim"] * 5),
        ({("*", "*"): 12}, ["B/ctrl"] * 3 + ["B/stim", "NK/ctrl"] + ["NK/stim"] * 5 + ["T/reg/ctrl"] * 2),
        ({"B/*": 0, "NK/ctrl": 1}, ["NK/ctrl"]),
    ],
    ids=str,
)
def test_counts(counts, cells):
    assert named(LABELS, LABELS.codes_from_counts(counts)) == cells


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NK", r"'NK' does not name a label in each of type/condition: write \*"),
        (("NK",), "does not name a label in each"),
        (("NK", "stim", "x"), "does not name a label in each"),
        ("NK/stimm", "unknown label 'stimm' in 'condition'.*ctrl, stim"),
        ("Mast/stim", "unknown label 'Mast' in 'type'.*B, NK, T/reg"),
        ("T/reg/stimm", "unknown label 'stimm' in 'condition'"),
        ("T/stim", "unknown label 'T' in 'type'"),
    ],
)
def test_counts_that_cannot_be_read(name, words):
    with pytest.raises(InputError, match=words):
        LABELS.codes_from_counts({name: 1})


def test_an_ambiguous_name_is_refused():
    labels = labels_of([[1, 1], [1, 1]], categories=(("a", "a/b"), ("b/c", "c")))
    with pytest.raises(InputError, match="more than one way.*tuple"):
        labels.codes_from_counts({"a/b/c": 1})
    assert named(labels, labels.codes_from_counts({("a/b", "c"): 1})) == ["a/b/c"]


def test_an_open_column_that_nothing_tells():
    labels = labels_of(
        np.ones((2, 2, 2)) - np.eye(2)[:, :, None], [*COLUMNS, "donor"], (("B", "NK"), ("c", "s"), ("1", "2"))
    )
    with pytest.raises(InputError, match="no training cell is 'B/c/\\*'"):
        labels.codes_from_counts({"B/c/*": 1})


def test_one_column_is_named_whole():
    labels = Labels.fit(CELLS, "type")
    assert named(labels, labels.codes_from_counts({"T/reg": 2, ("B",): 1, "*": 3})) == [
        "T/reg",
        "T/reg",
        "B",
        "B",
        "NK",
        "T/reg",
    ]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["type", "donor"], "no column 'donor' in obs; the columns are: type, condition"),
        (["type", "type"], "'type' is named twice"),
    ],
)
def test_columns_that_cannot_be_learned(columns, words):
    with pytest.raises(InputError, match=words):
        Preprocessor.fit(CELLS, label=columns)


def test_library_sizes_are_those_of_the_combination_or_foretold():
    preprocessor = Preprocessor.fit(CELLS, label=COLUMNS, lognorm=True)
    totals, labels = np.asarray(CELLS.X.sum(1)).ravel(), preprocessor.labels
    u = np.linspace(0, 1, 41)
    for name, own in [
        ("NK/stim", (CELLS.obs["type"] == "NK") & (CELLS.obs["condition"] == "stim")),
        ("NK/ctrl", (CELLS.obs["type"] == "NK") & (CELLS.obs["condition"] == "ctrl")),
    ]:
        drawn = preprocessor.draw(labels.codes_from_counts({name: 41}), np.empty((41, 0)), u).library
        np.testing.assert_allclose(drawn, np.quantile(totals[own], u))
    means = {
        (t, c): np.log(totals[(CELLS.obs["type"] == t) & (CELLS.obs["condition"] == c)]).mean()
        for t, c in (("NK", "stim"), ("NK", "ctrl"), ("B", "stim"), ("B", "ctrl"))
    }
    factor = np.exp(np.mean([means[t, "stim"] - means[t, "ctrl"] for t in ("NK", "B")]))
    unseen = preprocessor.draw(labels.codes_from_counts({"T/reg/stim": 41}), np.empty((41, 0)), u).library
    expected = np.quantile(totals[CELLS.obs["type"] == "T/reg"], u) * factor
    np.testing.assert_allclose(unseen, expected.clip(totals.min(), totals.max()), rtol=0.05)
    half = np.full(5, 0.5)
    asked = read_request(preprocessor, n_per_label={"B/ctrl": 5}, toward={"condition": "stim"}, mix=0.25)
    between = asked.complete(preprocessor, half)[1]
    own, other = (preprocessor.draw(codes, asked.at, half).library for codes in (asked.codes, asked.toward))
    np.testing.assert_allclose(between, 0.75 * own + 0.25 * other)


def test_a_column_without_categories_becomes_text():
    """pandas itself fails: "Cannot cast object dtype to <U0"."""
    column = pd.Series(pd.Categorical([None, None], categories=pd.Index([], dtype=object)))
    assert label_text(column).tolist() == ["nan", "nan"]
