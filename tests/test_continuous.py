"""Generation with continuous covariates, and with requested library sizes."""

import json
import warnings

import anndata as ad
import numpy as np
import pytest
import torch
from helpers import SMALL, batch, exit_code, make_cells, stirred, tiny_preset

import wbdit
from wbdit import InputError, WBDiT
from wbdit.data.loader import Batches
from wbdit.data.sources import TrainingData
from wbdit.network_inputs import conditioning_of
from wbdit.samplers import GuidedModel
from wbdit.training.losses import CountNLL
from wbdit.training.validation import Validation

QUICK = {"calls": 2, "seed": 3}


def developing(n=150):
    """Return cells of three types along a time from 0 to 1; the first genes rise with time, the last ones fall."""
    cells = make_cells(n, 30)
    rng = np.random.default_rng(1)
    cells.obs["time"] = (np.arange(n) % 3 + rng.uniform(0, 1, n)) / 3
    cells.obs["dose"] = rng.integers(0, 3, n)
    slopes = np.repeat([2.0, 0.0, -2.0], 10)
    rates = 8 * np.exp(np.outer(cells.obs["time"] - 0.5, slopes)) * rng.lognormal(0, 0.3, (n, 1))
    cells.X = rng.poisson(rates).astype(np.float32)
    return cells


CELLS = developing()


@pytest.fixture(scope="module")
def generator():
    return wbdit.fit(CELLS, label="type", continuous=["time", "dose"], steps=20, progress=False)


def same(a, b):
    return (a.X != b.X).nnz == 0 and a.obs.equals(b.obs)


def rising(cells):
    """Return the share of each cell's counts in the genes that rise with time."""
    return np.asarray(cells.X[:, :10].sum(1)).ravel() / np.asarray(cells.X.sum(1)).ravel()


# covariates


def test_expression_follows_the_request(generator):
    cells = generator.generate(150, at={"time": [0.1, 0.5, 0.9]}, calls=6)
    assert cells.obs["time"].tolist() == [0.1] * 50 + [0.5] * 50 + [0.9] * 50
    early, middle, late = rising(cells).reshape(3, 50).mean(1)
    real = [rising(CELLS)[np.abs(CELLS.obs["time"] - time) < 0.06].mean() for time in (0.1, 0.5, 0.9)]
    assert early < middle < late
    np.testing.assert_allclose([early, middle, late], real, atol=0.08)
    kinds = cells.obs["type"].astype(str).to_numpy().reshape(3, 50)
    assert [set(row) <= allowed for row, allowed in zip(kinds, ({"B"}, {"B", "NK", "T"}, {"T"}), strict=True)]


def test_points_are_spread_evenly_within_each_label(generator):
    at = {"time": [0.2, 0.4], "dose": [0, 2]}
    obs = generator.generate(n_per_label={"T": 3, "B": 4}, at=at, **QUICK).obs
    assert obs["type"].tolist() == ["T"] * 3 + ["B"] * 4
    assert list(zip(obs["time"], obs["dose"], strict=True)) == [(0.2, 0)] * 2 + [(0.4, 2)] + 2 * [(0.2, 0)] + 2 * [
        (0.4, 2)
    ]


def test_what_is_not_requested_is_drawn_from_training_cells(generator):
    obs = generator.generate(60, **QUICK).obs
    assert obs["type"].value_counts().to_dict() == {"B": 20, "NK": 20, "T": 20}
    known = set(zip(CELLS.obs["type"], CELLS.obs["time"], CELLS.obs["dose"], strict=True))
    assert set(zip(obs["type"], obs["time"], obs["dose"], strict=True)) <= known
    at_dose = generator.generate(60, at={"dose": 2}, **QUICK).obs
    assert (at_dose["dose"] == 2).all()
    assert at_dose["type"].value_counts().min() > 10  # all cells of a dose are equally near
    assert at_dose["time"].isin(CELLS.obs["time"]).all()


def test_like_copies_covariates(generator):
    like = CELLS[[5, 3, 1, 0]]
    obs = generator.generate(like=like, **QUICK).obs
    assert obs["time"].tolist() == like.obs["time"].tolist()
    half = generator.generate(75, like=CELLS, **QUICK).obs
    assert half["type"].value_counts().to_dict() == {"B": 25, "NK": 25, "T": 25}
    known = set(zip(CELLS.obs["type"], CELLS.obs["time"], strict=True))
    assert len(set(zip(half["type"], half["time"], strict=True)) & known) == 75
    without = ad.AnnData(obs=CELLS.obs[["type", "dose"]].copy())
    assert set(generator.generate(like=without, at={"time": 0.3}, **QUICK).obs["time"]) == {0.3}
    with pytest.raises(InputError, match="no column 'time' in obs"):
        generator.generate(like=without, **QUICK)


def test_the_request_travels_with_the_cells(generator, tmp_path, caplog):
    sizes = {"T": 500, ("B",): 200}
    cells = generator.generate(4, at={"time": [0.5, 1.5], "dose": 1}, library_size=sizes, library_factor=1, **QUICK)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("extrapolated beyond the training cells: time = 1.5 (training cells: ")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    facts = ad.read_h5ad(tmp_path / "cells.h5ad").uns["wbdit"]
    assert list(facts["continuous"]) == ["time", "dose"]
    assert (facts["at"]["time"].tolist(), facts["at"]["dose"]) == ([0.5, 1.5], 1.0)
    assert dict(zip(facts["library_size"]["labels"], facts["library_size"]["values"], strict=True)) == {
        "T": 500,
        "B": 200,
    }
    assert facts["library_factor"] == 1.0
    assert not {"at", "library_size"} & generator.generate(2, **QUICK).uns["wbdit"].keys()


def test_guidance_by_covariate(generator):
    how = {"n_per_label": {"NK": 40}, "at": {"time": 0.9}, "calls": 6}
    plain, stronger = (generator.generate(**how, guidance=w) for w in (1.0, {"time": 3.0}))
    assert same(generator.generate(**how, guidance={"time": 1.0}), plain)
    assert rising(stronger).mean() > rising(plain).mean() + 0.01
    assert stronger.uns["wbdit"]["guidance"] == {"time": 3.0}


def test_a_path_between_labels_keeps_the_covariates(generator):
    how = {"at": {"time": 0.4, "dose": 1}, **QUICK}
    start = generator.generate(n_per_label={"B": 5}, **how)
    path = [generator.generate(n_per_label={"B": 5}, toward={"type": "T"}, mix=mix, **how) for mix in (0, 0.5)]
    assert (path[0].X != start.X).nnz == 0
    assert (path[1].X != start.X).nnz > 0
    assert (path[1].obs["time"] == 0.4).all()
    drawn = generator.generate(5, at={"time": 0.4}, toward={"type": "T"}, mix=0.5, **QUICK)  # own labels are drawn
    assert set(drawn.obs["type_toward"]) == {"T"}


def test_the_batch_size_does_not_change_the_cells(generator):
    how = {"at": {"time": [0.2, 0.8]}, "guidance": {"time": 2.0}, "calls": 3}
    assert same(generator.generate(20, batch_size=7, **how), generator.generate(20, **how))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"at": {"age": 1}}, "'age' is no continuous column of this run, which has: time, dose"),
        ({"at": {"time": float("nan")}}, "`at` must give 'time' a finite number"),
        ({"at": {"time": "late"}}, "`at` must give 'time' a finite number"),
        ({"at": {"time": []}}, "`at` must give 'time' a finite number"),
        ({"at": {"time": [0, 1], "dose": [0, 1, 2]}}, "equally many points, not 2 of time, 3 of dose"),
        ({"at": {"time": [0, 0.5, 1]}}, "3 points for 2 cells"),
        ({"at": {"time": [0, 0.5, 1]}, "n": None, "like": CELLS[:4]}, r"one point, or one per cell \(4\), not 3"),
        ({"guidance": {"age": 2}}, "no label or continuous column of this run, which has: type, time, dose"),
        ({"library_size": 0}, "`library_size` must be a positive number, not 0"),
        ({"library_size": {"Mast": 9}}, "unknown label 'Mast'"),
        ({"library_factor": float("inf")}, "`library_factor` must be a positive number, not inf"),
    ],
)
def test_refused_requests(generator, arguments, words):
    with pytest.raises(InputError, match=words) as error:
        generator.generate(**{"n": 2, "calls": 2, **arguments})
    assert "\n" not in str(error.value)


# models


def test_a_run_is_saved_and_loaded(generator, tmp_path):
    generator.save(tmp_path / "run")
    how = {"n": 6, "at": {"time": [0.1, 0.9]}, **QUICK}
    assert same(wbdit.load(tmp_path / "run").generate(**how), generator.generate(**how))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["n_covariates"] == 2


def test_explain_conditions_on_covariates(generator):
    given = [conditioning_of(generator.model, generator.preprocessor, CELLS[:4])]
    other = CELLS[:4].copy()
    other.obs["time"] += 0.3
    given.append(conditioning_of(generator.model, generator.preprocessor, other))
    assert given[0].shape == (4, generator.denoiser.hidden_size)
    assert ((given[1] - given[0]).norm(dim=1) > 1e-3).all()


def test_a_run_without_labels_is_resumed(tmp_path):
    wbdit.fit(CELLS, continuous="time", steps=1, progress=False, out=tmp_path / "run")
    resumed = wbdit.fit(CELLS, steps=2, progress=False, out=tmp_path / "run", resume=True)
    assert resumed.config.trained.steps == 2
    assert resumed.preprocessor.covariates.columns == ("time",)


def test_held_out_cells_are_conditioned_on_their_covariates(tmp_path):
    """Their loss depends on their covariates, and a resumed run reads the same columns again."""
    options = {"steps": 1, "preset": tiny_preset(), "validation": 0.2, "progress": False}
    made = wbdit.fit(CELLS, label="type", continuous="time", out=tmp_path / "run", **options)
    assert made.config.trained.cells == 120
    resumed = wbdit.fit(CELLS, steps=2, progress=False, out=tmp_path / "run", resume=True)
    assert resumed.preprocessor.covariates.columns == ("time",)
    assert np.isfinite(resumed.config.trained.validation_loss)
    stirred(resumed.model)
    other = CELLS.copy()
    other.obs["time"] = 1 - other.obs["time"]

    def loss(cells):
        data = TrainingData.of(resumed.preprocessor, cells)
        batches = Batches.of_counts(data, resumed.model.likelihood.bin_of, 64, torch.device("cpu"))
        return Validation(CountNLL(resumed.model, resumed.schedule, 1), batches, 64, seed=0).loss(False)

    assert loss(CELLS) == loss(CELLS) != pytest.approx(loss(other), rel=1e-4)


def test_augmented_cells_have_covariates(generator, tmp_path):
    cells = CELLS[:140].copy()
    cells.obs["dose"] = cells.obs["dose"] > 0  # numbers for the model
    both = wbdit.augment(cells, label="type", min_cells=50, generator=generator)
    both.write_h5ad(tmp_path / "both.h5ad")
    obs = ad.read_h5ad(tmp_path / "both.h5ad").obs
    assert obs["time"][obs["synthetic"]].isin(CELLS.obs["time"]).all()
    assert obs["dose"][:140].tolist() == cells.obs["dose"].tolist()
    assert obs["synthetic"].sum() == 10


def test_arrays_are_sampled_at_covariates_with_progress(generator):
    shares = []
    codes, at = np.zeros((4, 1), np.int64), np.tile([0.2, 1.0], (4, 1))
    made = generator.sample(
        codes, 0, calls=2, batch_size=2, covariates=at, show=lambda share, text: shares.append(share)
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert (made != generator.sample(codes, 0, calls=2, covariates=at + 0.5)).any()


def test_models_of_values_are_conditioned_too():
    cells = CELLS.copy()
    cells.X = np.log1p(cells.X / cells.X.sum(1, keepdims=True) * 100)
    generator = wbdit.fit(cells, continuous="time", steps=2, progress=False)
    made = generator.generate(4, at={"time": [0.2, 0.8]}, guidance={"time": 2.0}, calls=2)
    assert made.obs["time"].tolist() == [0.2, 0.2, 0.8, 0.8]
    assert np.isfinite(generator.sample(np.zeros((3, 0), int), 0, calls=2)).all()
    with pytest.raises(InputError, match="`library_size` needs counts, but this run was trained on lognorm"):
        generator.generate(2, library_size=100)


def test_a_network_without_covariates_has_no_new_weights():
    plain, more = WBDiT(**SMALL, label_sizes=[3]), WBDiT(**SMALL, label_sizes=[3], n_covariates=2)
    added = more.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() < more.state_dict().keys()
    assert all(name.startswith("covariate_embedder.") for name in added)


def test_a_covariate_that_is_not_given_adds_nothing():
    model = stirred(WBDiT(**SMALL, label_sizes=[3], n_covariates=2))
    x, t = batch()
    y, none = torch.tensor([0, 1, 3]), torch.full((3, 2), torch.nan)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, conditioning=model.embed(y, covariates=none)), model(x, t, y))
        given = model.embed(y, covariates=torch.tensor([[1.0, torch.nan]] * 3))
        both = model.embed(y, covariates=torch.tensor([[1.0, 2.0]] * 3))
        assert (given - model.embed(y)).norm() > 0.01
        assert (both - given).norm() > 0.01
        # weight 2 of one covariate: joint + (joint - joint without it)
        guided = GuidedModel(model, y, [1.0, 1.0, 2.0], covariates=torch.tensor([[1.0, 2.0]] * 3))(x, t)
        joint, less = model(x, t, conditioning=both), model(x, t, conditioning=given)
        torch.testing.assert_close(guided, 2 * joint - less, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"expected \(B, 2\)"):
        model.embed(y, covariates=torch.zeros(3, 1))


def test_conditions_are_hidden_in_training():
    torch.manual_seed(0)
    model = WBDiT(**SMALL, label_sizes=[3], n_covariates=2, class_dropout_prob=0.2)
    y, covariates = model.drop_conditions(torch.zeros(4000, dtype=torch.long), torch.zeros(4000, 2))
    hidden = torch.cat([(y == 3)[:, None], covariates.isnan()], dim=1).float()
    single = 1 - 0.8**2  # the label: by itself, or all conditions together
    torch.testing.assert_close(hidden.mean(0), torch.tensor([single, 1 - 0.8**3, 1 - 0.8**3]), rtol=0, atol=0.03)
    assert hidden.prod(1).mean() > 0.2


# library sizes


def test_library_sizes_are_those_requested(generator):
    def totals(**how):
        cells = generator.generate(n_per_label={"B": 20, "T": 20}, calls=4, **how)
        return np.asarray(cells.X.sum(1)).ravel().reshape(2, 20)

    drawn, fixed, by_label = totals(), totals(library_size=300), totals(library_size={"T": 300})
    assert fixed.mean() == pytest.approx(300, rel=0.04)
    assert fixed.std() < 30 < drawn.std()
    np.testing.assert_array_equal(by_label[0], drawn[0])
    np.testing.assert_array_equal(by_label[1], fixed[1])
    doubled = totals(library_factor=2)
    np.testing.assert_allclose(doubled.mean(1), 2 * drawn.mean(1), rtol=0.05)
    assert np.corrcoef(doubled.ravel(), drawn.ravel())[0, 1] > 0.9
    assert totals(library_size=150, library_factor={"T": 2}).mean(1) == pytest.approx([150, 300], rel=0.05)


# commands


@pytest.fixture(scope="module")
def folder(generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuous")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CELLS.write_h5ad(folder / "data.h5ad")
    generator.save(folder / "run")
    return folder


def test_train_and_generate(folder, tmp_path, capfd):
    names = ("--label", "type", "--continuous", "time", "--continuous", "dose")
    assert exit_code("train", folder / "data.h5ad", *names, "--steps", 1, "--out", tmp_path / "run") == 0
    assert "3 labels, continuous: time, dose on" in capfd.readouterr().err
    asked = ("--n", 4, "--at", "time=0.25,0.75", "--at", "dose=1", "--library-size", "T=300,B=200")
    out = tmp_path / "cells.h5ad"
    assert exit_code("generate", folder / "run", *asked, "--library-factor", 2, "--calls", 2, "--out", out) == 0
    obs = ad.read_h5ad(out).obs
    assert (obs["time"].tolist(), obs["dose"].tolist()) == ([0.25, 0.25, 0.75, 0.75], [1.0] * 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--at", "0.5"], "write it as pseudotime=0.5, or as pseudotime=0,0.5,1"),
        (["--at", "time=early"], "write it as pseudotime=0.5"),
        (["--at", "time=1", "--at", "time=2"], "names 'time' twice"),
        (["--at", "age=1"], "'age' is no continuous column of this run"),
        (["--library-size", "much"], "cannot read --library-size 'much': write one number, or \"NK=2,B=3\""),
        (["--library-factor", "T=2,3"], "cannot read --library-factor"),
        (["--library-size", "-5"], "wbdit: --library-size must be a positive number"),
    ],
    ids=str,
)
def test_mistakes(folder, tmp_path, capfd, arguments, words):
    out = tmp_path / "cells.h5ad"
    assert exit_code("generate", folder / "run", "--n", 2, *arguments, "--out", out) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert words in line
    assert not out.exists()
