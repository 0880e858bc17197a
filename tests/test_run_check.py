"""RUN folders from strangers: every file is checked against itself and the others before a model is built."""

import hashlib
import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_cells, tiny_preset, two_columns
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wbdit
from wbdit import InputError
from wbdit._outputs import RUN_FILES
from wbdit.cli import _facts
from wbdit.run_check import LONGEST_JSON

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the files of a run with two label columns, a covariate and a training state.

    There is no manifest, which would tell that a file was edited, and no earlier save: a stranger can leave them out.
    """
    run = tmp_path_factory.mktemp("runs") / "run"
    cells = two_columns(60)
    cells.obs["age"] = np.linspace(20, 60, 60)
    cells.var["marker"] = np.arange(30) % 2 == 0
    cells.obs["type"] = cells.obs["type"].astype("category")
    given = {"label": ["type", "condition"], "continuous": "age", "preset": tiny_preset(), "steps": 2}
    wbdit.fit(cells, out=run, device="cpu", progress=False, **given)
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "previous")
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def copied(files, folder):
    """Write files by name into a folder, and return it."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """Return a copy of the run."""
    return copied(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def loaded(whole, tmp_path_factory):
    """Return the generator of the run."""
    return wbdit.load(copied(whole, tmp_path_factory.mktemp("loaded") / "run"), device="cpu")


def edit(path, *keys, value=None):
    """Set a value in a JSON file."""
    content = json.loads(path.read_text())
    at = content
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    path.write_text(json.dumps(content))


def refused(run):
    """Return the one line that refuses a run; it comes soon."""
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        wbdit.load(run, device="cpu")
    assert time.process_time() - began < 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_run_loads_and_generates(run):
    assert wbdit.load(run, device="cpu").generate(3, calls=1).n_obs == 3


@pytest.mark.parametrize("value", [10**9, 10**30, -1, 0, "3", 1.5, True, None, [2], {}, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["depth", "hidden_size", "patch_size", "num_heads", "input_size", "n_covariates"])
def test_sizes_of_the_model(run, name, value):
    edit(run / "config.json", "model", name, value=value)
    refused(run)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("seed",), "0"),
        (("seed",), 2**70),
        (("preset",), "a\0b"),
        (("preset",), "\ud800"),
        (("denoiser",), "other"),
        (("denoiser",), ["wbdit"]),
        (("model",), []),
        (("model", "label_sizes"), [3, 10**9]),
        (("model", "label_sizes"), [3]),
        (("model", "label_sizes"), "32"),
        (("model", "prediction"), ["v"]),
        (("model", "class_dropout_prob"), 1e308),
        (("model", "mlp_ratio"), 0),
        (("model", "in_channels"), 2),
        (("model", "learn_sigma"), True),
        (("model", "unknown"), 1),
        (("schedule", "noise_steps"), 10**12),
        (("schedule", "noise_steps"), 1),
        (("schedule", "kind"), "other"),
        (("schedule", "beta_start"), 2.0),
        (("training", "learning_rate"), [[1]]),
        (("training", "betas"), float("nan")),
        (("budget",), None),
        (("likelihood",), None),
        (("likelihood", "n_bins"), 10**9),
        (("likelihood", "n_bins"), 65),
        (("likelihood", "stop"), 999),
        (("likelihood", "stop"), 0),
        (("likelihood", "input_dropout"), -1),
        (("likelihood", "learned_dispersion"), 1),
        (("likelihood", "combinations"), [5, 1]),
        (("likelihood", "combinations"), [5, 10**9, 4]),
        (("likelihood", "combinations"), [5, 2, 3]),
        (("likelihood", "combinations", 0), "5"),
        (("likelihood", "combinations"), None),
        (("foretold",), []),
        (("foretold",), {"left_out": {}}),
        (("foretold", "left_out"), {"B/ctrl": "good"}),
        (("foretold", "left_out"), {"B/ctrl": float("nan")}),
        (("foretold", "nearest"), {"T/reg/stim": ["B/stim"]}),
        (("foretold", "nearest"), {"T/reg/stim": ["B/\0", 0.5]}),
        (("foretold", "nearest"), {"T/reg/stim": ["B/stim", None]}),
        (("trained", "cells"), -1),
        (("trained", "seconds"), None),
        (("trained", "epochs"), "5"),
        (("trained", "new"), 5),
        (("format",), "1"),
        (("model_hash",), 5),
    ],
)
def test_the_configuration(run, keys, value):
    edit(run / "config.json", *keys, value=value)
    refused(run)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("space",), "other"),
        (("space",), ["counts"]),
        (("space",), "lognorm"),
        (("values",), "as is"),
        (("values",), "lognorm"),
        (("genes",), []),
        (("genes",), "gene"),
        (("genes", 3), "gene-0"),
        (("genes", 3), 5),
        (("genes", 3), ""),
        (("genes", 3), "a\0b"),
        (("genes", 3), "\ud800"),
        (("genes",), ["one"]),
        (("scale",), 0),
        (("scale",), "1"),
        (("scale",), float("inf")),
        (("labels",), []),
        (("labels", "columns"), ["type", "type"]),
        (("labels", "columns"), ["type"]),
        (("labels", "columns", 0), "_index"),
        (("labels", "categories", 0), ["B", "NK"]),
        (("labels", "categories", 0), ["B", "B", "NK"]),
        (("labels", "categories", 0), "BNK"),
        (("labels", "categories", 0, 0), None),
        (("continuous",), ["type"]),
        (("continuous",), "age"),
        (("continuous",), ["age", "dose"]),
        (("source", "layer"), 5),
        (("source", "space"), "other"),
        (("source", "new"), 5),
        (("source",), 5),
        (("found",), 5),
        (("annotations",), 5),
        (("annotations", "var"), 5),
        (("annotations", "var", "marker"), 5),
        (("annotations", "var", "marker", "values"), [True]),
        (("annotations", "var", "marker", "values", 0), 5),
        (("annotations", "var", "_index"), {"values": ["x"] * 30}),
        (("annotations", "var", "new"), {"codes": [0] * 30, "categories": [], "ordered": False}),
        (("annotations", "var", "new"), {"codes": [0] * 30, "categories": ["a"], "ordered": None}),
        (("annotations", "categories", "type"), ["B", "NK", "T"]),
        (("annotations", "categories", "other"), ["B"]),
        (("annotations", "colors"), {"type": ["red"]}),
        (("annotations", "ordered"), ["other"]),
    ],
)
def test_the_preprocessor(run, keys, value):
    edit(run / "preprocessor.json", *keys, value=value)
    refused(run)


def with_tensor(path, name, change):
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone())
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, facts)


def filled(value, place=0):
    def change(tensor):
        tensor.view(-1)[place] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("center", filled(float("nan"))),
        ("center", lambda t: t[:-1]),
        ("center", lambda t: t.double()),
        ("center", lambda t: t.bfloat16()),
        ("center", lambda t: t[None]),
        ("smallest", filled(float("nan"))),
        ("smallest", filled(-1)),
        ("library", filled(float("inf"))),
        ("library", filled(-5)),
        ("library", lambda t: t[:-1]),
        ("sizes", filled(10**12)),
        ("sizes", filled(-3)),
        ("sizes", lambda t: t.int()),
        ("sizes", lambda t: t[:-1]),
        ("combinations", filled(99)),
        ("combinations", filled(-1)),
        ("combinations", lambda t: t.flip(0)),
        ("combinations", lambda t: t[:, :1]),
        ("combinations", lambda t: t[[0, 0, *range(2, len(t))]]),
        ("continuous.center", filled(float("nan"))),
        ("continuous.scale", filled(0)),
        ("continuous.values", filled(float("nan"))),
        ("continuous.values", lambda t: t[:-1]),
    ],
)
def test_the_tables(run, name, change):
    with_tensor(run / "preprocessor.safetensors", name, change)
    refused(run)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("label_rates", filled(float("nan"))),
        ("label_rates", filled(1e20)),
        ("label_rates", lambda t: t[:1]),
        ("denoiser.pos_embed", filled(float("inf"))),
        ("denoiser.pos_embed", lambda t: t.double()),
        ("denoiser.pos_embed", lambda t: t.half()),
        ("denoiser.pos_embed", lambda t: torch.zeros(0, 10**12)),
        ("likelihood.n_levels", filled(0)),
        ("likelihood.n_levels", filled(10**6)),
        ("likelihood.lowest", filled(-5)),
        ("likelihood.highest", filled(2**30)),
        ("likelihood.prior", filled(1e38)),
        ("log_library_scale", filled(0, place=1)),
        ("noise_factors", filled(-1)),
        ("combinations.row_of", filled(10**6)),
        ("combinations.row_of", filled(-1)),
        ("combinations.held_out_row", filled(99)),
        ("combinations.rates", filled(float("nan"))),
        ("combinations.mixture_logits", filled(1e9)),
        ("combinations.profiles", lambda t: t[:-1]),
        ("trend.knots", lambda t: t.flip(1)),
        ("trend.limits", lambda t: t.flip(1)),
    ],
)
def test_the_weights(run, name, change):
    with_tensor(run / "model.safetensors", name, change)
    assert "do not fit each other" in refused(run)


def a_lying_header(run):
    path = run / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes((2**62).to_bytes(8, "little") + content[8:])


def a_header_with_other_shapes(run):
    path = run / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(b"[16,16]", b"[16,99]")
    assert len(header) == size
    path.write_bytes(content[:8] + header + content[8 + size :])


def pipes(run):
    for name in ("config.json", "metrics.jsonl"):
        (run / name).unlink()
        os.mkfifo(run / name)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: (run / "config.json").write_text(DEEP),
        lambda run: (run / "config.json").write_text('{"format": 1, "seed": ' + "1" * 5000 + "}"),
        lambda run: (run / "config.json").write_bytes(b"\xff\xfe"),
        lambda run: edit(run / "config.json", "training", "precision", value="half \ud800 a character"),
        lambda run: (run / "preprocessor.json").write_text('{"genes": ' + DEEP + "}"),
        lambda run: os.truncate(run / "preprocessor.json", LONGEST_JSON + 1),
        lambda run: os.truncate(run / "model.safetensors", 5000),
        lambda run: (run / "model.safetensors").write_bytes(b""),
        a_lying_header,
        a_header_with_other_shapes,
        lambda run: ((run / "config.json").unlink(), (run / "config.json").symlink_to(run / "config.json")),
        lambda run: ((run / "config.json").unlink(), (run / "config.json").mkdir()),
        pipes,
    ],
)
def test_files_that_are_none(run, spoil):
    spoil(run)
    refused(run)


@pytest.mark.parametrize("place", ["", "previous", ".next"])
@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_pipes_in_a_save_are_not_waited_for(run, place, name, monkeypatch):
    """Hashes of the files are renewed, so that the pipe with its 0 bytes fits its manifest."""

    def give_up(*_):
        raise AssertionError("waits for a pipe")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    try:
        save = run / place
        save.mkdir(exist_ok=True)
        for path in (path for path in run.iterdir() if place and path.is_file()):
            shutil.copy(path, save)
        content = {path.name: path.read_bytes() for path in save.iterdir() if path.name in RUN_FILES}
        content["model.safetensors"] = b"" if name == "model.safetensors" else content["model.safetensors"]
        files = {own: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for own, data in content.items()}
        (save / "manifest.json").write_text(json.dumps({"files": files}))
        (save / name).unlink()
        os.mkfifo(save / name)
        with suppress(InputError):
            wbdit.load(run, device="cpu")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_log_is_not_needed(run):
    (run / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 2.0}}\n{{"step": \n5\n{DEEP}\n')
    assert wbdit.load(run, device="cpu").history == [{"step": 1, "loss": 2.0}]
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    assert wbdit.load(run, device="cpu").history == []


def test_no_path_of_a_file_is_followed(run, monkeypatch):
    edit(run / "config.json", "preset", value="../../etc/passwd")
    edit(run / "preprocessor.json", "source", "layer", value="/etc/passwd")
    opened = []
    own = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *given, **named: opened.append(path) or own(path, *given, **named))
    wbdit.load(run, device="cpu")
    assert all(path.is_relative_to(run) for path in opened)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("order", filled(10**6)),
        ("order", filled(1, place=0)),
        ("order", lambda t: t[:-1]),
        ("order", lambda t: t.float()),
        ("random.cpu", lambda t: t[:100]),
        ("average.likelihood.prior", filled(float("nan"))),
        ("weights.likelihood.prior", lambda t: t[:1]),
        ("optimizer.likelihood.prior.exp_avg", lambda t: t[..., :1]),
        ("optimizer.likelihood.prior.step", lambda t: torch.zeros(3)),
    ],
)
def test_the_training_state(run, name, change):
    with_tensor(run / "resume" / "state.safetensors", name, change)
    cells = two_columns(60)
    cells.obs["age"] = np.linspace(20, 60, 60)
    with pytest.raises(InputError):
        wbdit.fit(cells, out=run, resume=True, steps=3, device="cpu", progress=False)


@pytest.mark.parametrize("keys", [("training", "validation"), ("training", "betas"), ("budget", "steps")])
@pytest.mark.parametrize("value", ["x", [1, 2, 3], None])
def test_the_settings_of_a_resumed_training(run, keys, value):
    edit(run / "config.json", *keys, value=value)
    cells = two_columns(60)
    cells.obs["age"] = np.linspace(20, 60, 60)
    with pytest.raises(InputError):
        wbdit.fit(cells, out=run, resume=True, device="cpu", progress=False)


def test_a_run_without_a_precision_resumes(run):
    config = json.loads((run / "config.json").read_text())
    del config["training"]["precision"]
    (run / "config.json").write_text(json.dumps(config))
    cells = two_columns(60)
    cells.obs["age"] = np.linspace(20, 60, 60)
    assert wbdit.fit(cells, out=run, resume=True, steps=3, device="cpu", progress=False).config.trained.steps == 3


# requests


@pytest.mark.parametrize(
    "given",
    [
        {"n": "3"},
        {"n": 1.5},
        {"n": True},
        {"n": 10**12},
        {"n_per_label": 5},
        {"n_per_label": {"B/ctrl": "2"}},
        {"n_per_label": {"B/ctrl": float("nan")}},
        {"n_per_label": {5: 2}},
        {"n_per_label": {"B/ctrl": 10**10}},
        {"n": 2, "guidance": "2"},
        {"n": 2, "guidance": [2]},
        {"n": 2, "guidance": {"type": None}},
        {"n": 2, "guidance": 10**400},
        {"n": 2, "toward": "stim", "mix": 0.5},
        {"n": 2, "toward": {"condition": 5}, "mix": 0.5},
        {"n": 2, "toward": {"condition": "stim"}, "mix": "x"},
        {"n": 2, "at": 0.5},
        {"n": 2, "at": {"age": "x"}},
        {"n": 2, "at": {5: 1}},
        {"n": 2, "library_size": "1000"},
        {"n": 2, "library_size": 1e308},
        {"n": 2, "library_factor": {"B/ctrl": [1]}},
        {"n": 2, "seed": "0"},
        {"n": 2, "seed": 1.5},
        {"n": 2, "seed": None},
        {"n": 2, "calls": 1.5},
        {"n": 2, "batch_size": "x"},
        {"n": 2, "sampler": ["ddim"]},
        {"n": 2, "spacing": ["uniform"]},
    ],
)
def test_arguments_of_other_types(loaded, given):
    with pytest.raises(InputError):
        loaded.generate(**given)


def test_weights_whose_products_are_no_numbers_make_no_cells():
    generator = wbdit.fit(make_cells(30, 20), preset=tiny_preset("paper"), steps=1, device="cpu", progress=False)
    with torch.no_grad():
        for parameter in generator.model.parameters():
            parameter.fill_(1e20)
    with pytest.raises(InputError, match="weights are damaged"):
        generator.generate(2, calls=2)


@pytest.mark.parametrize(
    ("made", "facts"),
    [
        (5, {}),
        (np.arange(3), {}),
        ({5: {"deep": {"er": {}}}, "seed": 0}, {"seed": "0"}),
        ({"guidance": {"type": 2.0}, "list": [1, 2]}, {"guidance": "type=2.0"}),
        ({"x": "<script>" * 100}, {"x": ("<script>" * 100)[:200]}),  # the template escapes it
    ],
)
def test_what_a_foreign_file_says_of_itself(made, facts):
    assert _facts(made) == facts
