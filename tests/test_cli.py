"""The commands as a new user runs them: their files, their output, and one line for every mistake."""

import json
import logging
import re
import tomllib
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import torch
from helpers import ROOT, exit_code, make_cells

from wbdit import ops, system
from wbdit.evaluation.figure_data import FigureData
from wbdit.ops import triton as engine

NARROW = ("--set", "model.hidden_size=32", "--set", "model.depth=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with data.h5ad and run/, a briefly trained run on it."""
    folder = tmp_path_factory.mktemp("cli")
    make_cells(120, 30).write_h5ad(folder / "data.h5ad")
    assert exit_code("train", folder / "data.h5ad", "--label", "type", "--steps", 5, "--out", folder / "run") == 0
    return folder


@pytest.fixture
def wbdit(capfd):
    """Return a function that runs a command and returns its exit code, stdout and stderr."""

    def command(*arguments):
        capfd.readouterr()
        code = exit_code(*arguments)
        return code, *capfd.readouterr()

    return command


@pytest.fixture
def refused(wbdit):
    """Return a function that runs a command, asserts exit code 2 and one line on stderr, and returns the line."""

    def command(*arguments):
        code, out, err = wbdit(*arguments)
        assert code == 2, (out, err)
        assert out == ""
        assert err.count("\n") == 1, err
        assert err.startswith("wbdit: ")
        assert "Traceback" not in err
        return err

    return command


# main commands


def test_train_says_what_it_found(folder, wbdit, tmp_path):
    code, _, err = wbdit("train", folder / "data.h5ad", "--label", "type", "--steps", 2, "--out", tmp_path / "run")
    assert code == 0
    assert "X is raw counts" in err
    assert "120 cells, 30 genes, 3 labels" in err
    assert "training for 2 passes over the cells in 2 steps of 64 cells" in err
    assert "training 100%, step 2" in err
    assert "\r" not in err  # no bars where stderr is no terminal


def test_train_with_settings(folder, wbdit, tmp_path):
    settings = ("--set", "training.learning_rate=3e-4", "--set", "model.hidden_size=32", "--set", "model.depth=1")
    held_out = ("--validation", 0.2, "--early-stopping", 5)
    run = tmp_path / "run"
    assert wbdit("train", folder / "data.h5ad", "--steps", 2, "--out", run, *settings, *held_out)[0] == 0
    config = json.loads((run / "config.json").read_text())
    assert config["preset"] == "custom"
    assert (config["model"]["hidden_size"], config["model"]["depth"]) == (32, 1)
    assert config["training"]["learning_rate"] == 3e-4
    assert config["trained"]["validation_loss"] > 0


def test_quiet_and_json(folder, wbdit, tmp_path):
    """Nothing but one JSON object on stdout, and with --quiet nothing on stderr."""
    out, run, level = tmp_path / "cells.h5ad", tmp_path / "run", logging.getLogger("wbdit").level
    code, said, err = wbdit("train", folder / "data.h5ad", "--steps", 2, "--out", run, "--json", "--quiet", *NARROW)
    assert (code, err) == (0, "")
    found = json.loads(said)
    config = json.loads((run / "config.json").read_text())
    assert found.keys() >= {"seconds", "total_seconds", "validation_loss"}
    assert (found["run"], found["steps"], found["passes"]) == (str(run), 2, 2.0)
    assert found["model_hash"] == config["model_hash"]
    assert found["loss"] == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    code, said, err = wbdit("generate", run, "--n", 3, "--calls", 2, "--out", out, "--json")
    assert "generating 100%" in err
    assert json.loads(said) == {
        **{"out": str(out), "cells": 3, "genes": 30, "seed": 0, "model_hash": config["model_hash"]},
        "seconds": json.loads(said)["seconds"],
    }
    code, said, err = wbdit("generate", run, "--n", 3, "--calls", 2, "--out", out, "--quiet")
    assert (code, said, err) == (0, "", "")
    assert level == logging.INFO


def test_evaluate_as_json(folder, wbdit, tmp_path, monkeypatch):
    result = SimpleNamespace(to_dict=lambda: {"metrics": {"w1": {"value": 1.5}}})
    monkeypatch.setattr("wbdit.evaluation.evaluate.evaluate", lambda *cells, **options: result)
    monkeypatch.setattr("wbdit.report.evaluation.write_report", lambda *given, **options: None)
    data, out = folder / "data.h5ad", tmp_path / "report"
    code, said, err = wbdit("evaluate", data, data, "--out", out, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(said) == {"out": str(out), "metrics": {"w1": {"value": 1.5}}}


def test_threads(folder, wbdit, tmp_path):
    """The command sets the number first; generation on a CPU then sets and restores its own."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", seen.append)
        wbdit("generate", folder / "run", "--n", 2, "--calls", 1, "--threads", 3, "--out", tmp_path / "cells.h5ad")
    assert seen[0] == 3


def test_resume(folder, wbdit, tmp_path):
    run = tmp_path / "run"
    assert wbdit("train", folder / "data.h5ad", "--steps", 2, "--out", run)[0] == 0
    assert wbdit("train", folder / "data.h5ad", "--steps", 4, "--out", run, "--resume")[0] == 0
    assert json.loads((run / "config.json").read_text())["trained"]["steps"] == 4


@pytest.mark.parametrize(
    ("how", "n", "labels"),
    [
        (["--n", 9, "--calls", 2], 9, {"B": 3, "NK": 3, "T": 3}),
        (["--like", "data.h5ad", "--calls", 2], 120, {"B": 40, "NK": 40, "T": 40}),
        (["--per-label", "NK=2, B=1", "--calls", 2], 3, {"B": 1, "NK": 2, "T": 0}),
        (["--n", 6, "--sampler", "ddpm", "--calls", 3, "--guidance", 2], 6, {"B": 2, "NK": 2, "T": 2}),
        (["--n", 3, "--sampler", "unipc", "--calls", 3, "--spacing", "sqrt"], 3, {"B": 1, "NK": 1, "T": 1}),
    ],
)
def test_generate(folder, wbdit, tmp_path, how, n, labels):
    how = [folder / word if word == "data.h5ad" else word for word in how]
    code, out, err = wbdit("generate", folder / "run", "--out", tmp_path / "new" / "cells.h5ad", *how)
    assert code == 0, err
    assert out == ""
    cells = ad.read_h5ad(tmp_path / "new" / "cells.h5ad")
    assert cells.obs["type"].value_counts().to_dict() == labels
    assert cells.n_obs == n
    assert (cells.X.data == np.rint(cells.X.data)).all()
    assert cells.uns["wbdit"]["model_hash"]


def test_evaluate(folder, wbdit, tmp_path, monkeypatch):
    """Use no UMAP, which would take half a minute; `make test-slow` evaluates the demo in full."""
    layout = property(lambda data: np.random.default_rng(0).normal(size=(len(data.is_synthetic), 2)))
    monkeypatch.setattr(FigureData, "layout", layout)
    assert wbdit("generate", folder / "run", "--n", 60, "--calls", 5, "--out", tmp_path / "cells.h5ad")[0] == 0
    code, out, _ = wbdit(
        *("evaluate", folder / "data.h5ad", tmp_path / "cells.h5ad", "--label", "type", "--out", tmp_path / "report"),
        *("--ignore", "B", "--bootstrap", 4),
    )
    assert code == 0
    names = [
        *("w1", "w2", "mmd_cfgen", "mmd_scdiffusion", "mmd_raw", "ilisi", "precision", "coverage", "c2st_logistic"),
        *("scc", "pcc", "var_r2", "wasserstein_genes", "kl_hist", "corr_fro", "mean_var", "de_recall", "null_ks"),
        *("zero_mae", "library_w1", "detected_w1", "lfc_slope"),
    ]
    scores = json.loads((tmp_path / "report" / "metrics.json").read_text())["metrics"]
    for name in names:
        assert name in out
        assert {"floor", "n", "seeds"} <= scores[name].keys()
    assert (tmp_path / "report" / "report.html").stat().st_size > 20_000


def test_info(wbdit):
    code, out, _ = wbdit("info")
    assert code == 0
    assert "wbdit" in out
    assert "mssa" in out
    assert "csrc (" in out or "cannot be built" in out
    for said in ("system: ", "cpu kernels: ", "cuda: ", "triton: ", *(f"  {extra} " for extra in system.EXTRAS)):
        assert said in out


@pytest.mark.parametrize(
    ("name", "machine", "support"),
    [
        ("Darwin", "arm64", "compiled on first use"),
        ("Linux", "aarch64", "compiled on first use"),
        ("Linux", "x86_64", "prebuilt in this system's wheel"),
        ("Windows", "AMD64", "ops run on the PyTorch reference"),
        ("FreeBSD", "amd64", "unknown to wbdit"),
    ],
)
def test_info_of_another_system(wbdit, monkeypatch, name, machine, support):
    there = {"system": lambda: name, "machine": lambda: machine, "python_version": lambda: "3.11"}
    monkeypatch.setattr(system, "platform", SimpleNamespace(**there))
    code, out, _ = wbdit("info")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("system: ")]
    assert line.startswith(f"system: {name} {machine}. ")
    assert support in line
    assert ("need Linux" in out) == (name != "Linux")


@pytest.mark.parametrize(("name", "fix"), [("Linux", "sudo apt-get install g++"), ("Darwin", "xcode-select --install")])
def test_info_without_a_compiler(wbdit, monkeypatch, name, fix):
    monkeypatch.setattr(system.cpu, "cpu_level", lambda: "none")
    monkeypatch.setattr(system.build, "available", lambda: False)
    monkeypatch.setattr(system.build, "status", lambda: "not in use, no C++ compiler")
    monkeypatch.setitem(ops.serving.__globals__["_available"], "csrc", lambda: False)
    monkeypatch.setattr(system.platform, "system", lambda: name)
    _, out, _ = wbdit("info")
    assert f"cpu kernels: not in use, no C++ compiler. To get one: {fix}" in out
    assert "mssa                    reference (no CPU kernels, see above)" in out


def test_info_of_missing_packages(wbdit, monkeypatch):
    """A package that is missing, or too old, is named with the command that installs it."""
    versions = {"jinja2": system.MISSING, "matplotlib": "1.0", "tensorboard": system.MISSING}
    monkeypatch.setattr(system, "installed_version", lambda name: versions.get(name.lower(), "99.0"))
    _, out, _ = wbdit("info")
    assert re.search(r"  report +missing: matplotlib>=\S+, not 1\.0, jinja2 \(.*: pip install 'wbdit\[report\]'", out)
    assert re.search(r"  tensorboard +missing: tensorboard \(.*: pip install 'wbdit\[tensorboard\]'", out)
    assert re.search(r"  trace +installed", out)


def test_info_knows_every_extra():
    """All extras are described, apart from those for developers and the one that takes all."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) - {"peers", "interop", "test", "bench", "docs", "all"} == set(system.EXTRAS)
    assert extras["all"] == [f"wbdit[{','.join(system.EXTRAS)}]"]


def test_info_says_what_is_forced(wbdit, monkeypatch):
    monkeypatch.setenv("WBDIT_BACKEND", "reference")
    _, out, _ = wbdit("info")
    assert "reference (forced by WBDIT_BACKEND)" in out
    assert "csrc (" not in out


@pytest.mark.parametrize("there", [True, False])
def test_info_of_a_gpu(wbdit, monkeypatch, there):
    """With a simulated GPU, name its backend, and the reason if it is not Triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(engine, "available", lambda: there)
    monkeypatch.setattr(engine, "version", lambda: "3.7.1")
    monkeypatch.setitem(ops.serving.__globals__["_available"], "triton", lambda: there)
    code, out, _ = wbdit("info")
    assert code == 0
    assert "cuda: a card" in out
    said = "triton (3.7.1)" if there else 'reference (no triton here: pip install "wbdit[gpu]")'
    lines = [line for line in out.splitlines() if line.startswith("  cuda")]
    assert lines
    assert all(line.endswith(said) for line in lines)


def test_info_of_an_unknown_processor_level(wbdit, monkeypatch):
    monkeypatch.setenv("WBDIT_CPU", "nonsense")
    code, _, err = wbdit("info")
    assert code == 2
    assert err.count("\n") == 1
    assert "WBDIT_CPU=nonsense: choose one of baseline, avx2, avx512" in err


def test_help(wbdit):
    for arguments in ([], ["--help"], ["train", "--help"]):
        code, out, _ = wbdit(*arguments)
        assert code == 0
        assert "Usage: wbdit" in out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision(folder, wbdit, tmp_path, precision):
    run = tmp_path / "run"
    code, _, err = wbdit("train", folder / "data.h5ad", "--precision", precision, "--steps", 2, "--out", run)
    assert code == 0
    assert f", {precision}\n" in err
    assert json.loads((run / "config.json").read_text())["training"]["precision"] == precision


def test_split(folder, wbdit, tmp_path):
    train, test = tmp_path / "new" / "train.h5ad", tmp_path / "heldout.h5ad"
    code, out, err = wbdit("split", folder / "data.h5ad", "--train", train, "--test", test, "--label", "type")
    assert code == 0, err
    assert out == ""
    assert err == f"{train}: 96 cells to train on; {test}: 24 held-out cells\n"
    assert ad.read_h5ad(train).obs["type"].value_counts().to_dict() == {"B": 32, "NK": 32, "T": 32}
    assert ad.read_h5ad(test).n_obs == 24


def test_split_writes_both_files_or_none(folder, tmp_path, monkeypatch):
    written = []

    def fail_at_the_second(*given, **options):
        written.append(given)
        if len(written) == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr(ad.io, "write_elem", fail_at_the_second)
    code = exit_code("split", folder / "data.h5ad", "--train", tmp_path / "a.h5ad", "--test", tmp_path / "b.h5ad")
    assert code == 2
    assert len(written) == 2
    assert not list(tmp_path.iterdir())


# mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cook"], "No such command 'cook'"),
        (["train"], "Missing argument 'DATA...'"),
        (["train", "data.h5ad"], "Missing option '--out'"),
        (["train", "data.h5ad", "--out", "new", "--tpye", "x"], "No such option"),
        (["train", "data.h5ad", "--out", "new", "--steps", "many"], "not a valid integer"),
        (["train", "none.h5ad", "--out", "new"], "no such file"),
        (["train", "data.h5ad", "--out", "new", "--label", "cell_type"], "the columns are: type"),
        (["train", "data.h5ad", "--out", "new", "--preset", "huge"], "small"),
        (["train", "data.h5ad", "--out", "new", "--precision", "fp8"], "unknown --precision 'fp8'.*auto, fp32, bf16"),
        (["train", "data.h5ad", "--out", "new", "--minutes", "-1"], "must be positive"),
        (["train", "data.h5ad", "--out", "new", "--seed", "-1"], "not in the range"),
        (["train", "data.h5ad", "--out", "new", "--minutes", "1", "--steps", "1"], "one of"),
        (["train", "data.h5ad", "--out", "run", "--steps", "1"], "already holds a run"),
        (
            ["train", "none.h5ad", "--out", "new", "--set", "training.lr=1"],
            "'training.lr': choose one of training.batch",
        ),
        (["train", "none.h5ad", "--out", "new", "--set", "model.depth=deep"], "must be a whole number, not 'deep'"),
        (["train", "none.h5ad", "--out", "new", "--set", "model.num_heads=3"], "multiple of 4 and of model.num_heads"),
        (["train", "data.h5ad", "--out", "run", "--resume", "--set", "model.depth=1"], "only for a new run"),
        (["train", "data.h5ad", "--out", "new", "--set", "model.depth=999999999999"], "needs .* GB or more"),
        (
            ["train", "data.h5ad", "--out", "new", "--validation", "0.7"],
            "--validation must be at least 0 and at most 0.5",
        ),
        (["train", "data.h5ad", "--out", "new", "--early-stopping", "3"], "--early-stopping needs .* --validation 0.1"),
        (["train", "data.h5ad", "--out", "new", "--device", "mps"], "does not run on --device 'mps'"),
        (["train", "data.h5ad", "--out", "new", "--device", "xpu"], "does not run on --device 'xpu'"),
        (["train", "data.h5ad", "--out", "new", "--device", "abacus"], "unknown --device 'abacus'"),
        (["train", "data.h5ad", "--out", "new", "--device", "cuda:7"], "--device"),
        (["train", "data.h5ad", "--out", "new", "--threads", "0"], "not in the range"),
        (["generate", "run", "--n", "1", "--out", "x.h5ad", "--device", "mps"], "does not run on --device 'mps'"),
        (["train", "data.h5ad", "--out", "new", "--resume"], "no such run"),
        (["train", "data.h5ad", "--out", "data.h5ad/run", "--steps", "1"], "cannot write"),
        (["split", "data.h5ad", "--train", "a.h5ad"], "Missing option '--test'"),
        (["split", "none.h5ad", "--train", "a.h5ad", "--test", "b.h5ad"], "no such file"),
        (["split", "data.h5ad", "--train", "a.h5ad", "--test", "./a.h5ad"], "three different files"),
        (["split", "data.h5ad", "--train", "data.h5ad", "--test", "b.h5ad"], "three different files"),
        (["split", "data.h5ad", "--train", "a.h5ad", "--test", "run"], "is a folder"),
        (["split", "data.h5ad", "--train", "a.h5ad", "--test", "b.h5ad", "--donor", "x"], "the columns are: type"),
        (["split", "data.h5ad", "--train", "a.h5ad", "--test", "b.h5ad", "--share", "2"], "between 0 and 1"),
        (
            ["augment", "data.h5ad", "--label", "type", "--run", "run", "--min", "9", "--out", "x.h5ad"],
            "nothing to add",
        ),
        (["augment", "data.h5ad", "--label", "type", "--run", "new", "--out", "x.h5ad"], "no such run"),
        (["augment", "data.h5ad", "--label", "x", "--out", "x.h5ad"], "the columns are: type"),
        (["augment", "data.h5ad", "--label", "type", "--out", "run"], "is a folder"),
        (["generate", "new", "--n", "1", "--out", "x.h5ad"], "no such run"),
        (["generate", "run", "--out", "x.h5ad"], "how many cells"),
        (["generate", "run", "--n", "0", "--out", "x.h5ad"], "at least one"),
        (["generate", "run", "--per-label", "Mast=3", "--out", "x.h5ad"], "unknown label 'Mast'.*B, NK, T"),
        (["generate", "run", "--per-label", "three", "--out", "x.h5ad"], 'write it as "NK=200,B=100"'),
        (["generate", "run", "--like", "none.h5ad", "--out", "x.h5ad"], "no such file"),
        (["generate", "run", "--n", "1", "--sampler", "euler", "--out", "x.h5ad"], "ddim, ddpm"),
        (["generate", "run", "--n", "1", "--spacing", "karras", "--out", "x.h5ad"], "uniform, logsnr, sqrt"),
        (["generate", "run", "--n", "1", "--out", "data.h5ad/x.h5ad"], "cannot write"),
        (["generate", "run", "--n", "1", "--calls", "1", "--out", "run"], "is a folder"),
        (["evaluate", "data.h5ad", "none.h5ad", "--out", "new"], "no such file"),
        (["evaluate", "data.h5ad", "data.h5ad", "--label", "cell_type", "--out", "new"], "the columns are: type"),
        (["evaluate", "data.h5ad", "data.h5ad", "--out", "data.h5ad/x"], "cannot write"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_for_a_mistake(folder, refused, arguments, words, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    assert re.search(words, refused(*arguments))
    assert sorted(folder.iterdir()) == before  # no partial output


def damaged(kind):
    cells = make_cells(120, 30)
    counts = cells.X.toarray()
    if kind == "no cells":
        return cells[:0].copy()
    if kind == "one cell":
        return cells[:1].copy()
    if kind == "no genes":
        return cells[:, :0].copy()
    if kind in ("nan", "inf"):
        counts[3, 3] = float(kind)
        cells.X = counts
    elif kind == "negative":
        counts[3, 3] = -1
        cells.X = counts
    elif kind == "duplicate genes":
        cells.var_names = ["gene-1", *cells.var_names[1:]]
    elif kind == "missing labels":
        cells.obs["type"] = cells.obs["type"].astype("category")
        cells.obs.loc[cells.obs_names[2], "type"] = np.nan
    elif kind == "lonely label":
        cells.obs.loc[cells.obs_names[2], "type"] = "Mast"
    elif kind == "other genes":
        cells.var_names = [f"other-{i}" for i in range(30)]
    return cells


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no cells", "two cells"),
        ("one cell", "two cells"),
        ("no genes", "no genes"),
        ("nan", "NaN"),
        ("inf", "infinite"),
        ("negative", "negative counts"),
        ("duplicate genes", "duplicate gene names"),
        ("missing labels", "have no 'type'"),
        ("lonely label", "one cell"),
    ],
)
def test_cells_that_cannot_be_trained_on(refused, tmp_path, kind, words):
    damaged(kind).write_h5ad(tmp_path / "bad.h5ad")
    line = refused("train", tmp_path / "bad.h5ad", "--label", "type", "--steps", 1, "--out", tmp_path / "run")
    assert words in line
    assert not (tmp_path / "run").exists()


def test_a_corrupt_file(refused, tmp_path):
    (tmp_path / "bad.h5ad").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert "cannot read" in refused("train", tmp_path / "bad.h5ad", "--out", tmp_path / "run")


def test_no_shared_genes(folder, refused, tmp_path):
    damaged("other genes").write_h5ad(tmp_path / "other.h5ad")
    line = refused("evaluate", folder / "data.h5ad", tmp_path / "other.h5ad", "--out", tmp_path / "report")
    assert "gene" in line
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda run: (run / "preprocessor.json").unlink(), "has no preprocessor.json"),
        (lambda run: torch.save({}, run / "model.safetensors"), "pickle"),
        (lambda run: (run / "config.json").write_text('{"format": 99, "wbdit": "9.0"}'), "update wbdit"),
        (lambda run: (run / "config.json").write_text("[]"), "not the configuration"),
    ],
)
def test_a_spoilt_run(folder, refused, tmp_path, spoil, words):
    run = tmp_path / "run"
    run.mkdir()
    for path in (folder / "run").iterdir():
        if path.is_file() and path.name != "manifest.json":
            (run / path.name).write_bytes(path.read_bytes())
    spoil(run)
    assert words in refused("generate", run, "--n", 1, "--out", tmp_path / "cells.h5ad")
    assert not (tmp_path / "cells.h5ad").exists()


# the readout


def test_explain(folder, wbdit, tmp_path):
    code, out, err = wbdit(
        "explain", folder / "run", folder / "data.h5ad", "--cells", 40, "--out", tmp_path / "readout"
    )
    assert code == 0
    assert out.count("\n") == 7
    assert out.startswith("Does attention compress the tokens in each block? ")
    assert f"open {tmp_path / 'readout' / 'explain.html'}" in err
    assert json.loads((tmp_path / "readout" / "explain.json").read_text())["n"] == 40


def test_explain_refuses(folder, refused, tmp_path):
    data, out = folder / "data.h5ad", tmp_path / "readout"
    assert "no such run" in refused("explain", tmp_path / "none", data, "--out", out)
    assert "none.h5ad" in refused("explain", folder / "run", tmp_path / "none.h5ad", "--out", out)
    assert "cells" in refused("explain", folder / "run", data, "--cells", 0, "--out", out)
    assert "is a folder" not in refused("explain", folder / "run", data, "--out", data)
    assert not out.exists()


def test_train_tells_tensorboard(folder, wbdit, tmp_path):
    arguments = ("--steps", 2, "--out", tmp_path / "run", "--tensorboard", tmp_path / "board")
    assert wbdit("train", folder / "data.h5ad", *arguments)[0] == 0
    assert list((tmp_path / "board").glob("events.*"))
