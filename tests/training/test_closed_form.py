"""Sampling that starts in closed form: what is fitted, when it is used, and that the cells are right."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import spreading, tiny_preset
from safetensors.torch import load_file, save_file

import wbdit
from wbdit.data.sources import TrainingData
from wbdit.errors import InputError
from wbdit.training.closed_form import AXES, fit_gaussians

LABELS = ("a", "b")


@pytest.fixture(scope="module")
def cells():
    return spreading(600)


@pytest.fixture(scope="module")
def generator(cells):
    return wbdit.fit(cells, label="type", preset=tiny_preset(), steps=40, seed=0, progress=False)


def test_the_leading_axes_are_those_along_which_cells_vary(generator):
    gaussians = generator.model.gaussians
    directions = np.linalg.qr(np.random.default_rng(9).normal(size=(60, 2)))[0]
    found = gaussians.axes.double().numpy()
    np.testing.assert_allclose(found @ found.T, np.eye(AXES), atol=1e-4)
    assert np.linalg.norm(found[:2] @ directions) ** 2 > 1.9  # of 2
    assert gaussians.codes.tolist() == [[0], [1]]
    assert (gaussians.variances >= 0).all()


def test_the_gaussian_has_the_variance_of_the_values(generator, cells):
    data, gaussians = TrainingData.of(generator.preprocessor, cells), generator.model.gaussians
    values = data.values()
    for row, code in ((1, 0), (2, 1)):
        covariance = gaussians.roots[row] @ gaussians.roots[row].T
        variances = gaussians.variances[row] + torch.einsum("ig,ij,jg->g", gaussians.axes, covariance, gaussians.axes)
        own = values[data.codes[:, 0] == code]
        library = data.log_library[data.codes[:, 0] == code]
        slopes = np.polyfit(library, own, 1)
        rest = own - np.outer(library, slopes[0]) - slopes[1]
        assert float(variances.mean()) == pytest.approx(rest.var(0).mean(), rel=0.15)


def test_places_are_those_of_the_training_cells(generator, cells):
    data, gaussians = TrainingData.of(generator.preprocessor, cells), generator.model.gaussians
    places = gaussians.places
    assert places.ends.tolist() == [0, 300, 600]
    for row, code in ((1, 0), (2, 1)):
        own = slice(*places.ends[row - 1 : row + 1].tolist())
        library = np.sort(data.log_library[data.codes[:, 0] == code])
        np.testing.assert_allclose(places.log_library[own], library, rtol=1e-6)
        found = places.coordinates[own].double()
        covariance = found.T @ found / 300
        assert float(covariance.diagonal().mean()) == pytest.approx(1, abs=0.15)
        assert float((covariance - torch.diag(covariance.diagonal())).abs().max()) < 0.3


def test_cells_start_in_the_group_that_goes_with_their_library_size():
    """One label hides two groups: cells with many counts, and cells with few counts of which half the genes differ."""
    small = np.arange(600) // 2 % 2 == 1
    grouped = spreading(600, factor=0.2)
    grouped.X[np.ix_(small, np.arange(60) % 2 == 0)] //= 4
    run = wbdit.fit(grouped, label="type", preset=tiny_preset(), steps=2, seed=0, progress=False)
    places, row = run.model.gaussians.places, torch.ones(200, dtype=torch.int64)
    own = slice(*places.ends[:2].tolist())
    values = places.coordinates[own, 0]
    correlation = np.corrcoef(values, places.log_library[own])[0, 1]
    assert abs(correlation) > 0.3
    ends = places.log_library[own][[15, -15]]
    normal = torch.randn(200, generator=torch.Generator().manual_seed(0))
    few, many = (places(row, library.expand(200), normal)[:, 0].mean() for library in ends)
    assert float(many - few) * np.sign(correlation) > 0.2 * abs(correlation)


def test_it_is_fitted_alike_again(generator, cells):
    started = {k: v.clone() for k, v in generator.model.state_dict().items() if k.startswith(("gaussians", "noise_t"))}
    again = fit_gaussians(generator, TrainingData.of(generator.preprocessor, cells))
    assert set(again) == set(started)
    assert all(torch.equal(again[name], value) for name, value in started.items())


def test_the_table_gives_the_mean_that_calls_at_pure_noise_give(generator, cells):
    data, model = TrainingData.of(generator.preprocessor, cells), generator.model
    codes, library = torch.from_numpy(data.codes), torch.from_numpy(data.log_library)
    with torch.no_grad():
        conditioning, t = model.embed(codes, library), torch.full((600,), 999)
        draws = [torch.randn(600, 1, 60, generator=torch.Generator().manual_seed(k)) for k in range(9)]
        several = [model.posterior_mean(x, t, model.output(x, t, conditioning), conditioning) for x in draws]
        found = model.mean_at_noise(draws[0], model.gaussians.rows(codes), library, conditioning)
    mean = torch.stack(several[1:]).mean(0)
    error, of_one_call, varies = ((part - mean).square().mean().sqrt() for part in (found, several[0], mean.mean(0)))
    assert error < max(of_one_call, 0.05 * varies)


@pytest.mark.parametrize("older", ["no table", "covariates"])
def test_without_a_table_a_call_tells_the_mean(generator, cells, older, monkeypatch):
    if older == "no table":
        model = copy.deepcopy(generator.model)
        model.noise_table = None
        run = generator.with_model(model)
    else:
        cells = cells.copy()
        cells.obs["age"] = np.arange(600) % 7.0
        options = {"preset": tiny_preset(), "steps": 2, "progress": False}
        run = wbdit.fit(cells, label="type", continuous="age", **options)
        assert not run.config.likelihood.noise_table
    assert generator.config.likelihood.noise_table
    facts = run.generate(3).uns["wbdit"]
    assert (facts["start"], facts["calls"]) == (850, 4)
    times, forward = [], type(run.model).forward
    monkeypatch.setattr(
        type(run.model), "forward", lambda m, x, t, **k: times.append(int(t[0])) or forward(m, x, t, **k)
    )
    monkeypatch.setattr(type(run.model), "fuse_steps", lambda *a, **k: None)
    run.generate(3, calls=1)
    assert times == [999]


def test_what_cells_say_of_it(generator):
    facts = generator.generate(3).uns["wbdit"]
    assert (facts["start"], facts["calls"]) == (850, 3)
    assert generator.generate(3, guidance=2.0).uns["wbdit"]["start"] == 0  # a guided mean is another
    assert generator.generate(3, guidance=2.0).uns["wbdit"]["calls"] == 6
    with pytest.raises(InputError, match="`calls` must be between 1 and 350, not 351"):
        generator.generate(3, calls=351)


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_the_batch_size_does_not_change_the_cells(generator, calls):
    whole = generator.generate(100, calls=calls, seed=1)
    assert (generator.generate(100, calls=calls, seed=1, batch_size=64).X != whole.X).nnz == 0
    assert (generator.generate(100, calls=calls, seed=2).X != whole.X).nnz > 0


def test_the_model_is_called_as_often_as_asked(generator, monkeypatch):
    calls, forward = [], type(generator.model).forward
    monkeypatch.setattr(type(generator.model), "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    monkeypatch.setattr(type(generator.model), "fuse_steps", lambda *a, **k: None)
    for n in (1, 2, 4):
        calls.clear()
        generator.generate(3, calls=n)
        assert len(calls) == n


@pytest.mark.parametrize("start", [850, 0])
def test_sampling_records_no_gradients(generator, monkeypatch, start):
    recorded, embed = [], type(generator.model).embed
    monkeypatch.setattr(
        type(generator.model), "embed", lambda *a: recorded.append(torch.is_grad_enabled()) or embed(*a)
    )
    made = generator.generate(3, guidance=1.0 if start else 2.0)
    assert made.uns["wbdit"]["start"] == start
    assert recorded
    assert not any(recorded)


def test_cells_vary_as_real_ones_do(generator, cells):
    """From plain noise, a denoiser that has barely learned gives every cell of a label the same rates."""
    directions = np.linalg.qr(np.random.default_rng(9).normal(size=(60, 2)))[0]

    def spread(made):
        counts = made.X.toarray() if hasattr(made.X, "toarray") else made.X
        logs = np.log(1 + counts / counts.sum(1, keepdims=True) * 1e4)
        types = made.obs["type"].to_numpy(str)
        return np.mean([(logs[types == name] @ directions).std(0) for name in LABELS], axis=0)

    real, made = spread(cells), spread(generator.generate(600, seed=0))
    plain = copy.deepcopy(generator.model)
    plain.gaussians.timestep.zero_()
    plain.noise_factors.fill_(1)
    from_noise = spread(generator.with_model(plain).generate(600, seed=0))
    assert (np.abs(made - real) < np.abs(from_noise - real)).all()


def test_cells_without_labels_start_from_pure_noise():
    """All types in one Gaussian would be mixed."""
    apart = spreading(600, factor=0.2, genes=200)
    apart.X[np.arange(600) % 2 == 0, :100] *= 20
    run = wbdit.fit(apart, preset=tiny_preset(), steps=2, seed=0, progress=False)
    assert run.model.first_timestep == 0
    assert run.generate(3).uns["wbdit"]["start"] == 0
    assert wbdit.fit(apart, label="type", preset=tiny_preset(), steps=2, progress=False).model.first_timestep == 850


def test_unseen_combinations_start_from_pure_noise():
    cells = spreading(600)
    cells.obs["batch"] = np.where(np.arange(600) // 2 % 2 == 0, "one", "two")
    seen = cells[((cells.obs["type"] != "b") | (cells.obs["batch"] != "two")).to_numpy()].copy()
    run = wbdit.fit(seen, label=["type", "batch"], preset=tiny_preset(), steps=2, seed=0, progress=False)
    starts = [run.generate(n_per_label={name: 2}).uns["wbdit"]["start"] for name in ("a/two", "b/two")]
    assert starts == [850, 0]
    assert (run.model.noise_factors != 1).any()  # calibrated for those


def test_few_cells_start_from_pure_noise():
    run = wbdit.fit(spreading(150), label="type", preset=tiny_preset(), steps=2, seed=0, progress=False)
    assert run.model.first_timestep == 0


def test_a_run_keeps_them(generator, tmp_path):
    generator.save(tmp_path / "run")
    loaded = wbdit.load(tmp_path / "run", device="cpu")
    assert (loaded.generate(20, seed=3).X != generator.generate(20, seed=3).X).nnz == 0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("noise_table.knots", lambda table: table.flip(1), "do not ascend"),
        ("noise_table.outputs", lambda table: table + 1e6, "holds values above 100"),
        ("gaussians.variances", lambda table: -table, "variances of the Gaussians are negative"),
        ("gaussians.timestep", lambda table: table + 500, "timestep must be above 500"),
        ("gaussians.places.ends", lambda table: table.flip(0), "not sorted by combination"),
        ("gaussians.places.coordinates", lambda table: table + 1e9, "holds values above 1e"),
    ],
)
def test_a_run_with_damaged_tables_is_refused(generator, tmp_path, name, change, message):
    generator.save(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()  # it would tell that a file was edited
    weights, config = tmp_path / "run" / "model.safetensors", tmp_path / "run" / "config.json"
    tensors = load_file(weights)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_hash": ""}))  # else the hash tells
    with pytest.raises(InputError, match=message):
        wbdit.load(tmp_path / "run", device="cpu")


def test_a_run_of_an_older_version_has_no_places(generator, tmp_path):
    generator.save(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    weights, config = tmp_path / "run" / "model.safetensors", tmp_path / "run" / "config.json"
    save_file({name: table for name, table in load_file(weights).items() if "places" not in name}, weights)
    content = json.loads(config.read_text())
    del content["likelihood"]["places"]
    config.write_text(json.dumps({**content, "model_hash": "", "format": 5}))
    old = wbdit.load(tmp_path / "run", device="cpu")
    assert old.model.gaussians.places is None
    facts = old.generate(3).uns["wbdit"]
    assert (facts["start"], facts["calls"]) == (850, 3)


def test_a_table_goes_with_gaussians(generator, tmp_path):
    generator.save(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()  # it would tell that a file was edited
    config = tmp_path / "run" / "config.json"
    content = json.loads(config.read_text())
    content["likelihood"]["gaussians"] = None
    config.write_text(json.dumps(content))
    with pytest.raises(InputError, match="goes with Gaussians"):
        wbdit.load(tmp_path / "run", device="cpu")
