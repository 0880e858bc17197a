"""Training, interrupting, resuming, saving, loading and generating."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers import as_old_version, interrupt_at, make_cells

import wbdit
from wbdit import InputError, samplers
from wbdit.checkpoint import read_tensors, state_hash, write_tensors
from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.generator import find_device, make_model

CELLS = make_cells(60, 30)
QUICK = {"label": "type", "steps": 12, "progress": False}


@pytest.fixture(scope="module")
def generator():
    return wbdit.fit(CELLS, **QUICK)


@pytest.fixture(scope="module")
def trained():
    return wbdit.fit(CELLS, label="type", steps=150, progress=False)


@pytest.fixture
def run(generator, tmp_path):
    generator.save(tmp_path / "run")
    return tmp_path / "run"


def weights(generator):
    return state_hash(generator.model.state_dict())


def same_cells(a, b):
    return (a.X != b.X).nnz == 0 and a.obs.equals(b.obs)


# training


def test_training_learns(trained):
    """Counts are more likely than under an untrained model, which has the mean of each gene and label."""
    fresh = make_model(trained.config)
    counts = CELLS.X.toarray()
    codes = trained.preprocessor.labels.codes(CELLS)
    fresh.init_from_data(MemoryMatrix(counts), codes, trained.preprocessor.center, trained.preprocessor.scale)
    model = trained.model
    levels = torch.from_numpy(model.likelihood.bin_of(counts))
    x0 = model.likelihood.values[torch.arange(30), levels.long()][:, None]
    t, y = torch.full((60,), 600), torch.from_numpy(codes)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    log_library = torch.from_numpy(counts.sum(1)).log()
    with torch.no_grad():
        losses = [
            one.nll(trained.schedule.noising(x0, t, noise), t, one.embed(y, log_library), levels).mean()
            for one in (model, fresh.eval())
        ]
    assert losses[0] < 0.95 * losses[1]


def test_the_same_seed_gives_the_same_model(generator):
    assert weights(wbdit.fit(CELLS, **QUICK)) == weights(generator)
    assert weights(wbdit.fit(CELLS, **QUICK, seed=1)) != weights(generator)


def test_the_users_random_numbers_are_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    wbdit.fit(CELLS, **{**QUICK, "steps": 2})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_budget_of_epochs():
    assert wbdit.fit(CELLS, label="type", progress=False, epochs=2).config.trained.epochs == 2


def test_a_budget_of_minutes(monkeypatch):
    """Use a simulated clock on which every step takes an eighth of a second."""
    ticks = itertools.count()
    monkeypatch.setattr("wbdit.training.trainer.time", SimpleNamespace(monotonic=lambda: next(ticks) / 8))
    trained = wbdit.fit(CELLS, label="type", progress=False, minutes=0.025).config.trained
    assert (trained.steps, trained.seconds) == (12, 1.5)


def test_without_labels():
    generator = wbdit.fit(CELLS, steps=3, progress=False)
    assert generator.generate(5, calls=3).obs.shape == (5, 0)


@pytest.mark.parametrize("preset", ["paper", "base"])
def test_other_presets(preset):
    generator = wbdit.fit(CELLS, label="type", preset=preset, steps=1, progress=False)
    assert generator.config.preset == preset
    cells = generator.generate(4, calls=2)
    assert (cells.X.data == np.rint(cells.X.data)).all()


def test_resume_is_bit_exact(tmp_path):
    """An interrupted and resumed run equals an uninterrupted one in all weights, bit by bit."""
    once = wbdit.fit(CELLS, label="type", epochs=30, progress=False, out=tmp_path / "once")
    stopped = _interrupted(tmp_path / "twice", 7)
    assert 0 < stopped.config.trained.steps < once.config.trained.steps
    twice = wbdit.fit(CELLS, progress=False, out=tmp_path / "twice", resume=True)
    assert twice.config.trained.steps == once.config.trained.steps
    assert weights(twice) == weights(once)


def _interrupted(run, step):
    with interrupt_at(step):
        return wbdit.fit(CELLS, label="type", epochs=30, progress=False, out=run)


def edit_config(run, change):
    as_old_version(run)
    config = json.loads((run / "config.json").read_text())
    change(config)
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("precision", "other"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_run_is_resumed_in_its_own_precision(tmp_path, monkeypatch, precision, other):
    run = tmp_path / "run"
    wbdit.fit(CELLS, **QUICK, precision=precision, out=run)
    monkeypatch.setattr("wbdit.ops.cpu.has_fast_bf16", lambda: precision == "fp32")  # auto would now choose the other
    with pytest.raises(InputError, match=f"trained in {precision}"):
        wbdit.fit(CELLS, **{**QUICK, "steps": 15}, precision=other, out=run, resume=True)
    wbdit.fit(CELLS, **{**QUICK, "steps": 15}, out=run, resume=True)
    config = json.loads((run / "config.json").read_text())
    assert config["trained"]["steps"] == 15
    assert config["training"]["precision"] == precision


def test_precision_is_that_of_the_products():
    low, full = (wbdit.fit(CELLS, **QUICK, precision=precision) for precision in ("bf16", "fp32"))
    assert weights(low) != weights(full)
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("fast", "used"), [(True, "bf16"), (False, "fp32")])
def test_precision_is_chosen_by_the_processor(monkeypatch, log, fast, used):
    monkeypatch.setattr("wbdit.ops.cpu.has_fast_bf16", lambda: fast)
    generator = wbdit.fit(CELLS, **{**QUICK, "steps": 2}, device="cpu")
    assert generator.config.training["precision"] == used
    assert any(line.endswith(f"on cpu, {used}") for line in log)


def test_a_run_of_an_unknown_precision_is_not_resumed(tmp_path):
    wbdit.fit(CELLS, **QUICK, out=tmp_path / "run")
    edit_config(tmp_path / "run", lambda config: config["training"].update(precision="fp8"))
    with pytest.raises(InputError, match="unknown `precision` 'fp8'"):
        wbdit.fit(CELLS, progress=False, out=tmp_path / "run", resume=True)


def test_a_run_saved_before_its_first_step_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(wbdit.training.trainer.Trainer, "progress", 1.0)
    assert wbdit.fit(CELLS, **QUICK, out=tmp_path / "run").config.trained.steps == 0
    monkeypatch.undo()
    assert wbdit.fit(CELLS, progress=False, out=tmp_path / "run", resume=True).config.trained.steps == 12


def test_an_interrupted_run_is_whole(tmp_path):
    stopped = _interrupted(tmp_path / "run", 3)
    assert stopped.config.trained.steps == 3
    loaded = wbdit.load(tmp_path / "run")
    assert weights(loaded) == weights(stopped)


def test_resume_refuses_other_cells(tmp_path):
    wbdit.fit(CELLS, **QUICK, out=tmp_path / "run")
    with pytest.raises(InputError, match="trained on 60 cells, not 50"):
        wbdit.fit(CELLS[:50], **QUICK, out=tmp_path / "run", resume=True)


def test_a_run_is_not_overwritten(tmp_path):
    wbdit.fit(CELLS, **QUICK, out=tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run"):
        wbdit.fit(CELLS, **QUICK, out=tmp_path / "run")


def test_the_folder_of_a_run(tmp_path):
    wbdit.fit(CELLS, **QUICK, out=tmp_path / "run")
    names = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    one_save = {
        *("config.json", "model.safetensors", "preprocessor.json", "preprocessor.safetensors", "metrics.jsonl"),
        *("README.md", "resume/state.safetensors", "manifest.json"),
    }
    assert names == one_save | {f"previous/{name}" for name in one_save}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 12
    assert {"loss", "learning_rate", "cells_per_second", "seconds", "epoch"} <= lines[-1].keys()


def test_a_diverging_loss_is_said(monkeypatch):
    monkeypatch.setattr(
        wbdit.WBDiT, "forward", lambda self, x, t, **given: x.repeat(1, 2, 1) * self.pos_embed.mean() * torch.nan
    )
    with pytest.raises((InputError, RuntimeError), match="diverged|grad"):
        wbdit.fit(CELLS, **QUICK)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 1, "minutes": 1}, "one of `minutes`, `epochs` and `steps`"),
        ({"steps": 0}, "must be positive"),
        ({"preset": "huge", "steps": 1}, "small"),
        ({"device": "abacus", "steps": 1}, "unknown `device` 'abacus'"),
        ({"device": "mps", "steps": 1}, "does not run on `device` 'mps'"),
        ({"precision": "fp8", "steps": 1}, "unknown `precision` 'fp8': choose one of auto, fp32, bf16"),
        ({"resume": True, "steps": 1}, "no run to resume"),
        ({"max_genes": 0, "steps": 1}, "at least one gene"),
    ],
)
def test_refused_arguments(arguments, words):
    with pytest.raises(InputError, match=words):
        wbdit.fit(CELLS, label="type", progress=False, **arguments)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device is available"):
        find_device("cuda:7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="no `device` 'cuda:7': the CUDA devices are numbered from cuda:0 to cuda:1"):
        find_device("cuda:7")
    assert find_device("cuda:1").index == 1


# generating


def test_what_comes_out(generator):
    cells = generator.generate(20, seed=3, calls=5)
    assert sp.issparse(cells.X)
    assert cells.X.dtype == np.float32
    assert (cells.X.data > 0).all()
    assert (cells.X.data == np.rint(cells.X.data)).all()
    counts = cells.X.toarray()
    expected = np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 1e4)
    np.testing.assert_allclose(cells.layers["lognorm"].toarray(), expected, rtol=1e-5)
    assert list(cells.var_names) == list(CELLS.var_names)
    facts = cells.uns["wbdit"]
    assert (facts["seed"], facts["sampler"], facts["calls"], facts["spacing"]) == (3, "unipc", 5, "uniform")
    assert facts["model_hash"] == weights(generator)
    assert set(facts) >= {"wbdit", "torch", "guidance", "trained_on", "values", "target_sum", "label"}
    assert list(facts["genes"]) == list(CELLS.var_names)
    assert list(facts["categories"]) == ["B", "NK", "T"]


@pytest.mark.parametrize("sampler", samplers.BY_NAME)
def test_the_batch_size_does_not_change_the_cells(generator, sampler):
    whole = generator.generate(20, sampler=sampler, calls=8, seed=1)
    assert same_cells(generator.generate(20, sampler=sampler, calls=8, seed=1, batch_size=7), whole)
    assert same_cells(generator.generate(20, sampler=sampler, calls=8, seed=1), whole)
    assert not same_cells(generator.generate(20, sampler=sampler, calls=8, seed=2), whole)


def test_bf16_products_change_few_counts(trained, monkeypatch):
    """They are used where the processor has them, and a cell's bits do not depend on its batch then either."""
    full, low = (sample_in(trained, monkeypatch, fast, 200) for fast in (False, True))
    assert [cells.uns["wbdit"]["precision"] for cells in (full, low)] == ["fp32", "bf16"]
    differing = (full.X != low.X).nnz
    assert 0 < differing < 0.02 * full.X.nnz
    assert low.X.sum() == pytest.approx(full.X.sum(), rel=1e-3)
    assert same_cells(sample_in(trained, monkeypatch, True, 200, batch_size=64), low)


def sample_in(generator, monkeypatch, fast, n, **options):
    monkeypatch.setattr("wbdit.ops.cpu.has_fast_bf16", lambda: fast)
    return generator.generate(n, calls=4, **options)


def test_each_sampler_has_its_steps_and_grid(generator):
    """If counts are drawn midway, every sampler takes 6 uniform steps by default from noise; the default is unipc."""
    facts = generator.generate(2, sampler="sde-dpmpp").uns["wbdit"]
    assert (facts["calls"], facts["spacing"]) == (6, "uniform")
    assert same_cells(generator.generate(5), generator.generate(5, sampler="unipc", calls=6, spacing="uniform"))
    assert not same_cells(generator.generate(40, calls=3), generator.generate(40, calls=3, spacing="logsnr"))


def test_labels_like_other_cells(generator):
    like = CELLS[[5, 3, 1, 0]]
    assert list(generator.generate(like=like, calls=2).obs["type"]) == list(like.obs["type"])
    drawn = generator.generate(8, like=like, calls=2).obs["type"].value_counts()
    assert drawn.to_dict() == like.obs["type"].value_counts().mul(2).to_dict()


def test_labels_by_count(generator):
    cells = generator.generate(n_per_label={"T": 2, "B": 3}, calls=2)
    assert cells.obs["type"].value_counts().to_dict() == {"B": 3, "T": 2, "NK": 0}


def test_labels_as_in_training(generator):
    assert generator.generate(9, calls=2).obs["type"].value_counts().to_dict() == {"B": 3, "NK": 3, "T": 3}


def test_guidance_drives_the_types_apart(trained):
    def spread(guidance):
        cells = trained.generate(90, calls=20, guidance=guidance)
        means = [cells[cells.obs["type"] == kind].layers["lognorm"].mean(0) for kind in ("B", "NK", "T")]
        return np.var(means, axis=0).mean()

    assert spread(2.0) > spread(1.0) > spread(0.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "how many cells"),
        ({"n": 0}, "at least one"),
        ({"like": CELLS[:0]}, "no cells to imitate"),
        ({"n": 3, "n_per_label": {"B": 1}}, "not both"),
        ({"n_per_label": {"B": 0}}, "at least one cell"),
        ({"n_per_label": {"Mast": 2}}, "unknown label 'Mast'.*B, NK, T"),
        ({"n": 3, "sampler": "euler"}, "ddim, ddpm, unipc, dpmpp, sde-dpmpp"),
        ({"n": 3, "spacing": "karras"}, "uniform, logsnr, sqrt"),
        ({"n": 3, "calls": 0}, "between 1 and 499"),
        ({"n": 3, "batch_size": 0}, "at least 1"),
    ],
)
def test_refused_requests(generator, arguments, words):
    with pytest.raises(InputError, match=words):
        generator.generate(**arguments)


# saving and loading


def test_a_saved_run_gives_the_same_cells(generator, run):
    loaded = wbdit.load(run)
    assert same_cells(loaded.generate(10, calls=4, seed=2), generator.generate(10, calls=4, seed=2))
    assert loaded.history == generator.history


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor.json", "preprocessor.safetensors"])
def test_a_missing_file(run, name):
    (run / name).unlink()
    with pytest.raises(InputError, match=f"has no {name}"):
        wbdit.load(run)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor.json", "preprocessor.safetensors"])
def test_a_damaged_file(run, name):
    data = (run / name).read_bytes()
    (run / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=f"{name} is damaged .*bytes in place of"):
        wbdit.load(run)
    as_old_version(run)
    with pytest.raises(InputError, match="not valid JSON|not a valid safetensors"):
        wbdit.load(run)


def test_a_run_from_the_future(run):
    as_old_version(run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "format": 99, "wbdit": "9.0"}))
    with pytest.raises(InputError, match="wbdit 9.0 .*update wbdit"):
        wbdit.load(run)


def test_safetensors_with_a_header_of_any_length_are_opened(tmp_path):
    """The first byte is the lowest of the header length, a multiple of 8: one file in 32 begins like a pickle."""
    path, tensors = tmp_path / "some.safetensors", {"x": torch.zeros(2)}
    first = set()
    for padding in range(0, 256, 8):
        write_tensors(path, tensors, {"padding": padding * "x"})
        first.add(path.read_bytes()[0])
        assert torch.equal(read_tensors(path)["x"], tensors["x"])
    assert 0x80 in first


def test_a_pickle_is_not_opened(run):
    as_old_version(run)
    torch.save({"weight": torch.zeros(2)}, run / "model.safetensors")
    with pytest.raises(InputError, match="pickle"):
        wbdit.load(run)


def test_weights_of_another_model(run):
    edit_config(run, lambda config: config["model"].update(depth=config["model"]["depth"] + 1))
    with pytest.raises(InputError, match="do not fit"):
        wbdit.load(run)


def test_no_such_run(tmp_path):
    with pytest.raises(InputError, match="no such run"):
        wbdit.load(tmp_path / "none")


def test_training_by_the_clock_ends_with_enough_of_the_cells(log):
    generator = wbdit.fit(CELLS, label="type", minutes=1e6, progress=False)
    assert generator.config.trained.epochs == 50
    assert "50 passes over the cells" in log[-1]
