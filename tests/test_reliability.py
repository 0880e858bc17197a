"""Signals, outputs of others, temporaries of killed processes, full disks, and what a resumed run refuses."""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from helpers import as_old_version, exit_code, make_cells, tiny_preset

import wbdit
from wbdit import InputError, run_folder
from wbdit._io import LOCK, TEMPORARY, replacing, write_h5ad
from wbdit._lock import FileLock
from wbdit._signals import deferred_signals
from wbdit.checkpoint import read_tensors_and_facts
from wbdit.data.fingerprint import Fingerprint
from wbdit.training.trainer import Trainer

resource = pytest.importorskip("resource")
CELLS = make_cells(60, 12)
CELLS.obs["age"] = np.arange(60.0)
TINY = ("--set", "model.hidden_size=32", "--set", "model.depth=1", "--label", "type", "--out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with data.h5ad, cells.h5ad (synthetic) and run."""
    folder = tmp_path_factory.mktemp("reliability")
    CELLS.write_h5ad(folder / "data.h5ad")
    assert exit_code("train", folder / "data.h5ad", "--steps", 3, *TINY, folder / "run") == 0
    assert exit_code("generate", folder / "run", "--n", 3, "--calls", 2, "--out", folder / "cells.h5ad") == 0
    return folder


def steps(run):
    return json.loads((run / "config.json").read_text())["trained"]["steps"]


@contextlib.contextmanager
def signals_at(step, *numbers):
    """Send signals to this process during a training step; their handlers are Python's defaults otherwise."""
    update = Trainer._update

    def pressed(trainer):
        if trainer.step == step - 1:
            for number in numbers:
                signal.raise_signal(number)
        return update(trainer)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", pressed)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


# signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 0)])
def test_a_signal_saves_the_training(folder, tmp_path, capfd, number, code):
    before = signal.getsignal(number)
    with signals_at(4, number):
        assert exit_code("train", folder / "data.h5ad", "--steps", 50, *TINY, tmp_path / "run") == code
    assert steps(tmp_path / "run") == 4
    assert "the run is saved in" in capfd.readouterr().err
    assert signal.getsignal(number) == before
    assert not (tmp_path / "run" / ".lock").exists()
    assert exit_code("train", folder / "data.h5ad", "--steps", 5, "--out", tmp_path / "run", "--resume") == 0
    assert steps(tmp_path / "run") == 5


def test_a_second_ctrl_c_does_not_lose_the_save(tmp_path, monkeypatch):
    sync, pressed = run_folder.sync, []

    def press(path):
        if steps_now[0] == 3 and len(pressed) < 3:
            pressed.append(path)
            signal.raise_signal(signal.SIGINT)
        sync(path)

    steps_now = [0]
    monkeypatch.setattr(run_folder, "sync", press)
    monkeypatch.setattr("wbdit.training.fit.TrainingRun.ending", lambda self, folder: "")
    with signals_at(3, signal.SIGINT):
        write = run_folder.RunWriter.save

        def save(writer, *given):
            steps_now[0] = 3 if holds(tmp_path / "run") else 0
            write(writer, *given)

        monkeypatch.setattr(run_folder.RunWriter, "save", save)
        wbdit.fit(CELLS, label="type", preset=tiny_preset(), steps=9, out=tmp_path / "run", progress=False)
    assert len(pressed) == 3
    assert steps(tmp_path / "run") == 3


def holds(run):
    return (run / "config.json").exists()


def test_the_programs_handlers_get_the_signal_after_the_save(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(steps(tmp_path / "run")))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with signals_at(2, signal.SIGHUP), signals_at(3, signal.SIGTERM):
            wbdit.fit(CELLS, label="type", preset=tiny_preset(), steps=9, out=tmp_path / "run", progress=False)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, ignored)
    assert seen == [3]


def test_the_third_ctrl_c_interrupts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with deferred_signals():
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_during_calibration_leaves_the_saved_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("wbdit.training.fit.calibrate_noise", lambda *given: signal.raise_signal(signal.SIGTERM))
    assert exit_code("train", folder / "data.h5ad", "--steps", 3, *TINY, tmp_path / "run") == 143
    assert wbdit.load(tmp_path / "run").config.trained.steps == 3


def test_sigterm_while_generating_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ad.io, "write_elem", lambda *given, **options: signal.raise_signal(signal.SIGTERM))
    assert exit_code("generate", folder / "run", "--n", 3, "--calls", 2, "--out", tmp_path / "new.h5ad") == 143
    assert not list(tmp_path.iterdir())


def test_outside_the_main_thread_signals_are_left_alone():
    found = []

    def look():
        before = signal.getsignal(signal.SIGTERM)
        with deferred_signals() as requests:
            found.append((signal.getsignal(signal.SIGTERM) == before, requests()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(True, False)]


# one training at a time


def test_a_second_training_is_refused(folder, tmp_path, capfd):
    for run, more in ((folder / "run", ["--resume"]), (tmp_path / "run", [])):
        run.mkdir(exist_ok=True)
        lock = FileLock.take(run / ".lock")
        assert exit_code("train", folder / "data.h5ad", "--steps", 9, "--out", run, *more) == 2
        assert f"process {os.getpid()} on " in capfd.readouterr().err
        wbdit.load(folder / "run")  # reading is allowed
        lock.release()


# outputs of others


@pytest.mark.parametrize(
    ("command", "make", "words"),
    [
        (["generate", "run", "--n", "2", "--calls", "2"], "data", "is no such output of wbdit"),
        (["augment", "data.h5ad", "--label", "type", "--min", "22", "--run", "run"], "data", "is no such output"),
        (["generate", "run", "--n", "2", "--calls", "2"], "link", "is a link to cells.h5ad"),
        (["generate", "run", "--n", "2", "--calls", "2"], "pipe", "is a device or another special file"),
        (["generate", "run", "--n", "2", "--calls", "2"], "run/config.json", "it belongs to a run"),
        (["generate", "run", "--n", "2", "--calls", "2"], "/dev/null", "is a device or another special file"),
    ],
)
def test_what_is_not_ours_is_not_replaced(folder, tmp_path, monkeypatch, capfd, command, make, words):
    monkeypatch.chdir(folder)
    out = tmp_path / "out.h5ad"
    if make == "data":
        CELLS.write_h5ad(out)
    elif make == "link":
        out.symlink_to("cells.h5ad")
    elif make == "pipe":
        os.mkfifo(out)
    else:
        out = Path(make)
    assert exit_code(*command, "--out", out) == 2
    assert words in capfd.readouterr().err
    if make == "data":
        assert "wbdit" not in ad.read_h5ad(out).uns
        assert exit_code(*command, "--out", out, "--overwrite") == 0
        assert "wbdit" in ad.read_h5ad(out).uns
    elif make != "link":
        assert exit_code(*command, "--out", out, "--overwrite") == 2
    assert out.exists() or make == "link"


def test_our_own_outputs_are_replaced(folder, tmp_path):
    """As a script does that is run again; a link is replaced, not its target."""
    out, target = tmp_path / "out.h5ad", tmp_path / "target.h5ad"
    for n in (2, 3):
        assert exit_code("generate", folder / "run", "--n", n, "--calls", 2, "--out", out) == 0
        parts = ("--train", tmp_path / "a.h5ad", "--test", tmp_path / "b.h5ad")
        assert exit_code("split", folder / "data.h5ad", *parts) == 0
    assert ad.read_h5ad(out).n_obs == 3
    target.write_text("precious")
    (tmp_path / "link.h5ad").symlink_to(target)
    given = ("--calls", 2, "--out", tmp_path / "link.h5ad", "--overwrite")
    assert exit_code("generate", folder / "run", "--n", 2, *given) == 0
    assert target.read_text() == "precious"
    assert not (tmp_path / "link.h5ad").is_symlink()


@pytest.mark.parametrize("name", ["report.html", "metrics.json"])
def test_reports_of_others_are_not_replaced(folder, tmp_path, capfd, name):
    (tmp_path / name).write_text("mine")
    data = folder / "data.h5ad"
    assert exit_code("evaluate", data, data, "--out", tmp_path) == 2
    assert f"{name} is no such output of wbdit" in capfd.readouterr().err
    (tmp_path / "explain.json").write_text("mine")
    assert exit_code("explain", folder / "run", data, "--out", tmp_path) == 2
    assert exit_code("split", data, "--train", tmp_path / "c.h5ad", "--test", tmp_path / name) == 2
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_is_replaced_only_on_request(folder, tmp_path):
    run = tmp_path / "run"
    options = {"label": "type", "preset": tiny_preset(), "progress": False, "out": run}
    wbdit.fit(CELLS, steps=2, **options)
    with pytest.raises(InputError, match="already holds a run: resume it .*overwrite=True"):
        wbdit.fit(CELLS, steps=1, **options)
    wbdit.fit(CELLS, steps=1, overwrite=True, **options)
    assert steps(run) == 1
    with pytest.raises(InputError, match="either `resume` or `overwrite`"):
        wbdit.fit(CELLS, overwrite=True, resume=True, **options)


# temporaries


def test_temporaries_of_killed_processes_go_and_those_of_live_ones_stay(tmp_path):
    killed, alive, fresh = (tmp_path / f"{TEMPORARY}{name}" for name in ("killed", "alive", "fresh"))
    for path in (killed, alive, fresh):
        path.mkdir()
        (path / "cells.h5ad").write_text("half")
    (killed / LOCK).write_text("")
    lock = FileLock.take(alive / LOCK)
    with replacing(tmp_path / "new") as temporary:
        temporary.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"new", alive.name, fresh.name}
    lock.release()
    os.utime(fresh, (time.time() - 100,) * 2)  # no lock long after it was made
    with replacing(tmp_path / "new") as temporary:
        temporary.write_text("whole")
    assert not fresh.exists()


# full disks


def test_a_full_disk_closes_hdf5_in_order(tmp_path):
    """HDF5 crashed the process at its end. A limit of the file size stands for the disk; see bench/reliability."""
    path = tmp_path / "cells.h5ad"
    path.write_text("old")
    cells = ad.AnnData(sp.random(400, 300, 0.5, "csr", rng=np.random.default_rng(0)))
    opened, limits = h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match="the disk is full"):
            write_h5ad(cells, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL) == opened
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_during_training(tmp_path, capfd, folder):
    """The line names the disk and the last save, which loads."""
    run = tmp_path / "run"
    assert exit_code("train", folder / "data.h5ad", "--steps", 3, *TINY, run) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        assert exit_code("train", folder / "data.h5ad", "--steps", 5, "--out", run, "--resume") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capfd.readouterr().err.splitlines()[-1]
    assert "the disk is full (File too large); the last save, of step 3, is intact: make space" in line
    assert wbdit.load(run).config.trained.steps == 3
    assert not (run / ".next.tmp").exists()


def test_cells_written_are_those_read(tmp_path):
    cells = CELLS.copy()
    write_h5ad(cells, tmp_path / "cells.h5ad")
    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert (again.X != CELLS.X).nnz == 0
    assert again.obs["type"].astype(str).equals(CELLS.obs["type"].astype(str))
    with h5py.File(tmp_path / "cells.h5ad") as file:
        assert "raw" not in file


# damage


@pytest.mark.parametrize("line", ["{", '{"step": ', "[1]", '"text"', "{}", "\udcff", "[" * 5000])
def test_a_broken_line_of_the_log_is_left_out(folder, tmp_path, log, line):
    run = tmp_path / "run"
    wbdit.load(folder / "run").save(run)
    whole = wbdit.load(run).history
    with (run / "metrics.jsonl").open("a", errors="surrogateescape") as file:
        file.write(line)
    assert wbdit.load(run).history == whole
    assert [said for said in log if "left out 1 broken line" in said]


def test_weights_of_another_save_are_refused(folder, tmp_path):
    """A run of an older version may hold a new model beside an old config."""
    generator = wbdit.load(folder / "run")
    for name, seed in (("one", 0), ("other", 1)):
        wbdit.fit(CELLS, label="type", preset=tiny_preset(), steps=1, seed=seed, progress=False).save(tmp_path / name)
    one = as_old_version(tmp_path / "one")
    wbdit.load(one)
    (one / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="do not fit each other .*another hash"):
        wbdit.load(one)
    assert generator.config.model_hash


def test_saving_again_keeps_the_training_state(folder, tmp_path):
    run = tmp_path / "run"
    trained = wbdit.fit(CELLS, label="type", preset=tiny_preset(), steps=2, out=run, progress=False)
    trained.save(run)
    assert wbdit.fit(CELLS, steps=3, out=run, resume=True, progress=False).config.trained.steps == 3
    wbdit.load(folder / "run").save(run)  # another generator: the state of the run is not its own
    assert not (run / "resume" / "state.safetensors").exists()


def test_reading_writes_nothing(folder):
    def tree():
        return {path: path.stat().st_mtime_ns for path in (folder / "run", *(folder / "run").rglob("*"))}

    before = tree()
    wbdit.load(folder / "run").generate(2, calls=2)
    assert tree() == before


# what a resumed run refuses


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    run = tmp_path_factory.mktemp("begun") / "run"
    wbdit.fit(CELLS, label="type", preset="dit", max_genes=12, steps=1, out=run, progress=False)
    return run


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"label": "age"}, "with label type: resume it without `label=age`"),
        ({"continuous": "age"}, "with continuous none: resume it without `continuous=age`"),
        ({"preset": "small"}, "with preset dit: resume it without `preset=small`"),
        ({"preset": tiny_preset()}, "with preset dit: resume it without `preset=custom`"),
        ({"seed": 3}, "with seed 0: resume it without `seed=3`"),
        ({"max_genes": 11}, "with max_genes 12: resume it without `max_genes=11`"),
        ({"genes": ["gene-1"]}, "with genes none: resume it without `genes=1 names"),
        ({"layer": "X"}, "with layer none: resume it without `layer=X`"),
    ],
)
def test_other_choices_are_refused_by_name(begun, given, words):
    with pytest.raises(InputError, match=words):
        wbdit.fit(CELLS, steps=2, out=begun, resume=True, progress=False, **given)


@pytest.mark.parametrize("part", ["expression", "labels"])
def test_other_cells_are_refused(begun, part):
    cells = CELLS.copy()
    if part == "labels":
        cells.obs["type"] = cells.obs["type"].to_numpy()[[1, 0, *range(2, 60)]]
    else:
        counts = cells.X.toarray()
        counts[5] += 1
        cells.X = counts
    with pytest.raises(InputError, match=f"trained on other cells .they differ in {part}.: give the same cells"):
        wbdit.fit(cells, steps=2, out=begun, resume=True, progress=False)


def test_the_same_choices_are_taken(begun):
    given = {"label": "type", "preset": "dit", "max_genes": 12, "seed": 0}
    assert wbdit.fit(CELLS, steps=2, out=begun, resume=True, progress=False, **given).config.trained.steps == 2
    facts = read_tensors_and_facts(begun / "resume" / "state.safetensors")[1]
    assert facts["cells_hash"].keys() == {"expression", "labels", "covariates"}


def test_the_fingerprint_depends_on_the_cells_alone():
    x = CELLS.X.toarray()
    codes, covariates = np.zeros((60, 1), np.int64), np.zeros((60, 0))
    found = set()
    for matrix, size in ((x, 60), (x, 7), (CELLS.X, 60), (CELLS.X, 13), (x.astype(np.uint8), 60), (x + 0.0, 1)):
        one = Fingerprint()
        for start in range(0, 60, size):
            rows = slice(start, start + size)
            one.update(matrix[rows], codes[rows], covariates[rows])
        found.add(json.dumps(one.digests()))
    assert len(found) == 1
    other = Fingerprint()
    other.update(x[::-1].copy(), codes, covariates)
    assert json.dumps(other.digests()) not in found
