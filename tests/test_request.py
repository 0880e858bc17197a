"""Several label columns: combined labels, one guidance weight per column, and interpolation between labels."""

import warnings
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
from helpers import exit_code, two_columns

import wbdit
from wbdit import InputError, cli
from wbdit.data.preprocessor import Preprocessor
from wbdit.request import read_request

COLUMNS = ["type", "condition"]
CELLS = two_columns()


@pytest.fixture(scope="module")
def generator():
    return wbdit.fit(CELLS, label=COLUMNS, steps=100, progress=False)


def test_guidance_drives_its_column_apart(generator):
    def effects(guidance):
        cells = generator.generate(n_per_label={"B/*": 40, "NK/*": 40}, calls=15, guidance=guidance).to_memory()
        X, obs = cells.layers["lognorm"].toarray(), cells.obs
        between = [[X[obs[c] == a].mean(0) - X[obs[c] == b].mean(0)] for c, a, b in BOTH]
        return [np.linalg.norm(difference) for difference in between]

    BOTH = [("type", "B", "NK"), ("condition", "ctrl", "stim")]
    plain, by_condition, by_type = (effects(w) for w in (1.0, {"condition": 3.0}, {"type": 3.0}))
    assert by_condition[1] > 1.1 * plain[1]
    assert by_type[0] > 1.1 * plain[0]
    assert by_condition[1] / plain[1] > by_condition[0] / plain[0]


# cells


def same(a, b):
    return (a.X != b.X).nnz == 0


def test_like_gives_each_cell_its_labels(generator):
    like = CELLS[[5, 3, 1, 0]]
    cells = generator.generate(like=like, calls=2)
    for column in COLUMNS:
        assert list(cells.obs[column]) == list(like.obs[column])
    twice = generator.generate(8, like=like, calls=2).obs.groupby(COLUMNS, observed=True).size()
    assert twice.to_dict() == like.obs.groupby(COLUMNS).size().mul(2).to_dict()
    anew = generator.generate(60, calls=2).obs.groupby(COLUMNS, observed=True).size()
    assert anew.to_dict() == CELLS.obs.groupby(COLUMNS).size().floordiv(2).to_dict()


def test_unseen_combinations_take_more_calls(generator):
    seen, unseen = (generator.generate(n_per_label={name: 2}).uns["wbdit"] for name in ("T/reg/ctrl", "T/reg/stim"))
    assert (seen["start"], seen["calls"]) == (0, 6)  # too few cells for Gaussians
    assert (unseen["start"], unseen["calls"]) == (0, 15)


def test_what_travels_with_the_cells(generator, tmp_path):
    ends = {"guidance": {"condition": 2}, "toward": {"condition": "stim"}, "mix": 0.25}
    generator.generate(n_per_label={"T/reg/ctrl": 2}, calls=2, **ends).write_h5ad(tmp_path / "cells.h5ad")
    cells = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert cells.obs.iloc[0].to_dict() == {
        **{"type": "T/reg", "condition": "ctrl", "type_toward": "T/reg", "condition_toward": "stim", "mix": 0.25}
    }
    assert list(cells.obs["condition"].cat.categories) == ["ctrl", "stim"]
    facts = cells.uns["wbdit"]
    assert list(facts["label"]) == COLUMNS
    assert list(facts["categories"]["condition"]) == ["ctrl", "stim"]
    assert facts["guidance"] == {"condition": 2.0}
    assert (facts["toward"], facts["mix"]) == ({"condition": "stim"}, 0.25)
    assert list(facts["unseen"]) == ["T/reg/stim"]


def test_a_combination_never_seen_is_tried_and_said(generator, caplog):
    cells = generator.generate(n_per_label={"T/reg/stim": 2, "B/stim": 1}, calls=2)
    assert cells.n_obs == 3
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("no training cell is T/reg/stim: it is foretold from other combinations")
    assert "unseen" not in generator.generate(5, calls=2).uns["wbdit"]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("guidance", [1.0, {"type": 2.0, "condition": 3.0}])
def test_a_path_from_one_end_to_the_other(generator, guidance):
    how = {"calls": 8, "seed": 4, "guidance": guidance}

    def between(mix):
        return generator.generate(n_per_label={"NK/ctrl": 12}, toward={"condition": "stim"}, mix=mix, **how)

    start, end = (generator.generate(n_per_label={f"NK/{name}": 12}, **how) for name in ("ctrl", "stim"))
    assert same(between(0), start)
    assert same(between(1), end)
    path = [between(mix).layers["lognorm"].toarray() for mix in (0, 1e-6, 0.5, 0.5 + 1e-6, 1 - 1e-6, 1)]
    whole = np.linalg.norm(path[-1] - path[0])
    for near, there in ((0, 1), (2, 3), (4, 5)):  # a count near a threshold may change
        assert np.linalg.norm(path[there] - path[near]) < 0.1 * whole
    for end in (0, -1):  # a path need not be straight
        assert 0.1 * whole < np.linalg.norm(path[2] - path[end]) < 1.3 * whole


def test_the_batch_size_does_not_change_the_cells(generator):
    how = {"calls": 4, "seed": 1, "guidance": {"condition": 2.0}, "toward": {"condition": "stim"}, "mix": 0.3}
    assert same(generator.generate(20, batch_size=7, **how), generator.generate(20, **how))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 2, "guidance": {"donor": 2.0}}, "'donor' is no label column of this run, which has: type, condition"),
        ({"n": 2, "guidance": {"type": float("nan")}}, "between -1000 and 1000"),
        ({"n": 2, "guidance": -1e39}, "between -1000 and 1000"),
        ({"n": 2, "toward": {"condition": "stim"}}, "together"),
        ({"n": 2, "mix": 0.5}, "together"),
        ({"n": 2, "toward": {"condition": "stim"}, "mix": 1.5}, "between 0 and 1"),
        ({"n": 2, "toward": {"condition": "stimm"}, "mix": 0.5}, "unknown label 'stimm' in 'condition'"),
        ({"n": 2, "toward": {"donor": "1"}, "mix": 0.5}, "no label column"),
    ],
)
def test_refused_requests(generator, arguments, words):
    with pytest.raises(InputError, match=words):
        generator.generate(calls=2, **arguments)


def test_cells_to_imitate_need_every_column(generator):
    like = ad.AnnData(obs=CELLS.obs[["type"]].copy())
    with pytest.raises(InputError, match="no column 'condition' in obs; the columns are: type"):
        generator.generate(like=like, calls=2)


# runs


def test_a_run_of_several_columns_is_saved_and_resumed(tmp_path):
    run = tmp_path / "run"
    made = wbdit.fit(CELLS, label=COLUMNS, steps=4, progress=False, out=run)
    loaded = wbdit.load(run)
    assert loaded.preprocessor.labels.columns == ("type", "condition")
    assert loaded.model.label_sizes == (3, 2)
    assert same(loaded.generate(10, calls=2), made.generate(10, calls=2))
    assert wbdit.fit(CELLS, steps=6, progress=False, out=run, resume=True).config.trained.steps == 6


def test_a_column_called_as_the_mix_is():
    preprocessor = Preprocessor.fit(CELLS, label=COLUMNS)
    labels = replace(preprocessor.labels, columns=("mix", "condition"))
    with pytest.raises(InputError, match="called 'mix'"):
        read_request(replace(preprocessor, labels=labels), 3, toward={"condition": "stim"}, mix=0.5)


# commands


@pytest.fixture(scope="module")
def folder(generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditions")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CELLS.write_h5ad(folder / "data.h5ad")
    generator.save(folder / "run")
    return folder


def test_train_with_two_columns(folder, tmp_path, capfd):
    label = ("--label", "type", "--label", "condition")
    assert exit_code("train", folder / "data.h5ad", *label, "--steps", 2, "--out", tmp_path / "run") == 0
    assert "120 cells, 30 genes, 3 x 2 labels, 5 of their 6 combinations on" in capfd.readouterr().err
    assert wbdit.load(tmp_path / "run").preprocessor.labels.columns == ("type", "condition")


def test_generate_by_both_columns(folder, tmp_path, capfd):
    out = tmp_path / "cells.h5ad"
    asked = ("--per-label", "NK/*=3,T/reg/ctrl=2", "--toward", "condition=stim", "--mix", 0.5)
    weights = ("--guidance", "condition=3", "--guidance", "type=2")
    assert exit_code("generate", folder / "run", *asked, *weights, "--calls", 2, "--out", out) == 0
    assert "no training cell is T/reg/stim: it is foretold from other combinations" in capfd.readouterr().err
    cells = ad.read_h5ad(out)
    said = cli._facts(cells.uns["wbdit"])
    assert (said["guidance"], said["toward"], said["mix"]) == ("condition=3.0, type=2.0", "condition=stim", "0.5")
    assert not {"genes", "categories", "label", "unseen"} & said.keys()
    assert list(cells.obs["type"]) == ["NK"] * 3 + ["T/reg"] * 2
    assert set(cells.obs["condition_toward"]) == {"stim"}
    assert cells.uns["wbdit"]["guidance"] == {"condition": 3.0, "type": 2.0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--guidance", "much"], "write it as 2, or as condition=3"),
        (["--guidance", "2", "--guidance", "condition=3"], "one number, or COLUMN=NUMBER"),
        (["--guidance", "2", "--guidance", "3"], "one number, or COLUMN=NUMBER"),
        (["--guidance", "donor=3"], "'donor' is no label column"),
        (["--toward", "stim", "--mix", "0.5"], "write it as condition=stim"),
        (["--mix", "0.5"], "together"),
    ],
    ids=str,
)
def test_mistakes(folder, tmp_path, capfd, arguments, words):
    assert exit_code("generate", folder / "run", "--n", 2, *arguments, "--out", tmp_path / "cells.h5ad") == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert words in line
