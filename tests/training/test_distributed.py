"""Training in several processes: the same results as in one, and one clear end for all when one of them fails."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, make_cells, tiny_preset

import wbdit
from bench.reliability import ranks as measured
from wbdit import InputError
from wbdit.checkpoint import read_tensors
from wbdit.training import distributed
from wbdit.training.distributed import Ranks

WORKER = Path(__file__).parent / "ranks_worker.py"


def launch(processes, *command, per_rank=lambda rank: ()):
    """Start a command in several processes with the variables that torchrun sets; return exit codes and messages."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    known = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    known["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, (*command, *per_rank(rank)))],
            env=os.environ | known | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        messages = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], messages


def lines(message):
    """Return wbdit's own lines of what a process printed."""
    return [line for line in message.splitlines() if line.startswith("wbdit: ")]


# the same results


def test_the_number_of_processes_changes_rounding_only(tmp_path):
    """Three processes are started once; a batch of 64 cells divides into 21, 21 and 22."""
    kinds, precisions = ("counts, labels",), ("fp64",)
    for _, _, world, losses, weights, agree in measured.measure(tmp_path, kinds=kinds, precisions=precisions, steps=4):
        assert losses < 1e-12, world
        assert weights < 1e-9, world
        assert agree


@pytest.mark.slow
def test_fifty_steps(tmp_path):
    for _, precision, _, losses, weights, agree in measured.measure(tmp_path, precisions=("fp64", "fp32")):
        assert losses < (1e-9 if precision == "fp64" else 1e-4)
        assert precision == "fp32" or weights < 1e-9
        assert agree


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(tmp_path):
    """Trained by 2 and resumed by 3, the calibration included, against one process; and resumed by 2 twice."""
    found = {}
    for name, worlds in {"one": (1, 1), "two": (2, 2), "again": (2, 2), "mixed": (2, 3), "back": (3, 1)}.items():
        folder = tmp_path / name
        folder.mkdir()
        for world in worlds:
            codes, messages = launch(world, WORKER, "equal", folder)
            assert codes == [0] * world, messages
        found[name] = read_tensors(folder / "run" / "model.safetensors")
    assert all(torch.equal(found["two"][name], found["again"][name]) for name in found["two"])
    for name, other in found.items():
        assert set(other) == set(found["one"])
        for key in other:
            torch.testing.assert_close(other[key], found["one"][key], rtol=1e-2, atol=1e-4, msg=f"{name} {key}")
        assert (other["noise_factors"] != 1).any()
    config = json.loads((tmp_path / "mixed" / "run" / "config.json").read_text())
    assert config["trained"]["steps"] == 12


@pytest.mark.slow
def test_the_calibration_is_that_of_one_process(tmp_path):
    """300 cells are five blocks, of which three processes sample one or two."""
    assert launch(1, WORKER, "equal", tmp_path)[0] == [0]
    found = set()
    for world in (1, 2, 3):
        codes, messages = launch(world, WORKER, "calibrate", tmp_path)
        assert codes == [0] * world, messages
        found |= {(tmp_path / f"{rank}.txt").read_text() for rank in range(world)}
    assert len(found) == 1


# one end for all


def test_an_error_in_one_process_ends_all(tmp_path):
    """The second process is given a file that does not exist: the first one says so, and exits with 2."""
    make_cells(60, 12).write_h5ad(tmp_path / "0.h5ad")
    codes, messages = launch(
        *(2, "-m", "wbdit", "train", "--out", tmp_path / "run", "--steps", 2, "--label", "type"),
        per_rank=lambda rank: [tmp_path / f"{rank}.h5ad"],
    )
    assert codes == [2, 2]
    (line,) = lines(messages[0])
    assert line.startswith("wbdit: process 1: ")
    assert "1.h5ad" in line
    assert lines(messages[1]) == []


@pytest.mark.slow
def test_memory_that_does_not_suffice_in_one_process(tmp_path):
    codes, messages = launch(2, WORKER, "memory", tmp_path)
    assert codes == [0, 0], messages
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()
    assert "memory did not suffice for 32 cells at once: batches are computed 16 cells at a time" in messages[0]
    assert messages[1] == ""


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process(tmp_path):
    codes, messages = launch(2, WORKER, "not_finite", tmp_path)
    assert codes == [0, 0], messages
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()
    (line,) = (tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 3
    assert len(json.loads(line)["rows"]) == 64


@pytest.mark.slow
def test_a_fault_in_the_code_of_one_process(tmp_path):
    codes, messages = launch(2, WORKER, "raises", tmp_path)
    assert codes == [2, 1]
    assert lines(messages[0]) == ["wbdit: process 1: ValueError a shape is wrong"]
    assert "Traceback" in messages[1]


@pytest.mark.slow
def test_all_stop_after_the_same_step(tmp_path):
    codes, messages = launch(2, WORKER, "stop", tmp_path)
    assert codes == [0, 0], messages
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["4", "4"]
    assert "stopped at step 4" in messages[0]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_killed_process_ends_the_others_and_the_run_is_saved(processes, tmp_path):
    codes, messages = launch(processes, WORKER, "kill", tmp_path)
    assert codes == [2] * (processes - 1) + [-signal.SIGKILL]
    (line,) = lines(messages[0])
    assert re.fullmatch(r"wbdit: another process of this training has ended .*; this training is saved at step 3", line)
    codes, messages = launch(1, WORKER, "equal", tmp_path)  # resumed by one
    assert codes == [0], messages
    assert wbdit.load(tmp_path / "run").config.trained.steps == 12


# the parts


@pytest.mark.parametrize(("n", "size", "block"), [(64, 3, 1), (64, 64, 1), (768, 5, 64), (100, 3, 64), (5, 8, 1)])
def test_parts_cover_all(n, size, block):
    parts = [Ranks(rank, size).part(n, block) for rank in range(size)]
    assert [row for part in parts for row in range(n)[part]] == list(range(n))
    assert all(part.start % block == 0 or part.start == n for part in parts)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert Ranks(3, 4).device("auto") == torch.device("cuda:1") == chosen[0]
    assert Ranks().device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match='is one GPU, but there are 4 processes: give "cuda"'):
        Ranks(3, 4).device("cuda:1")


def test_more_processes_than_cells_of_a_batch(monkeypatch):
    monkeypatch.setattr(distributed, "_joined", Ranks(0, 9))
    for name in ("check_same", "copy_first", "exchange"):
        monkeypatch.setattr(Ranks, name, lambda *given: None)
    with pytest.raises(InputError, match="a batch of 8 cells has none for some of 9 processes: start fewer"):
        wbdit.fit(make_cells(60, 12), preset=tiny_preset(batch_size=8), steps=1, progress=False)


# the page


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A folder with cells, and a Slurm of one machine: srun starts a command twice, as on two machines."""
    cells = make_cells(60, 12)
    cells.obs = cells.obs.rename(columns={"type": "cell_type"})
    cells.write_h5ad(tmp_path / "cells.h5ad")
    commands = {
        "scontrol": "echo localhost; echo other",
        "srun": '"$@" & first=$!; "$@"; code=$?; wait $first && exit $code',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "localhost,other", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, value in (slurm | path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


TINY = "--set model.hidden_size=16 --set model.num_heads=2 --set model.depth=1 --steps 4"


@pytest.mark.slow
@pytest.mark.parametrize("example", ["torchrun", "slurm"])
def test_the_examples_run(example, shell):
    page = (ROOT / "docs" / "clusters.md").read_text()
    if example == "torchrun":
        command = re.search(r"^    (torchrun .*)$", page, re.MULTILINE)[1]
    else:
        script = re.search(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
        (shell / "train.sh").write_text(script)
        command = re.search(r"`sbatch (train.sh .*?)`", page)[1].replace("train.sh", "bash train.sh", 1)
        command = command.replace("--preset base ", "")
    done = subprocess.run(f"{command} {TINY}", shell=True, cwd=shell, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "on 2 processes" in done.stderr
    assert done.stderr.count("60 cells, 12 genes") == 1
    assert wbdit.load(shell / "run").config.trained.steps == 4
