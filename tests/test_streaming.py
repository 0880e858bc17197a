"""Cells in blocks, in chunks on disk, after kills, over ranks: the same cells, byte by byte."""

import hashlib
import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import exit_code, make_cells

import wbdit
from wbdit import InputError, cell_files, streaming
from wbdit.cell_blocks import Stopped, run_tasks
from wbdit.data.draws import _equal_rows
from wbdit.streaming import partial_folder

N = 200  # cells: three whole blocks and a part of one
HOW = {"calls": 2, "seed": 3}


@pytest.fixture(scope="module")
def generator():
    return wbdit.fit(make_cells(60, 30), label="type", steps=3, progress=False)


@pytest.fixture(scope="module")
def whole(generator, tmp_path_factory):
    """Return the file that an undisturbed process writes in one chunk."""
    return generator.generate_to(tmp_path_factory.mktemp("whole") / "cells.h5ad", N, **HOW)


@pytest.fixture(scope="module")
def run(generator, tmp_path_factory):
    generator.save(tmp_path_factory.mktemp("run") / "run")
    return tmp_path_factory.getbasetemp() / "run0" / "run"


def digest(path):
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def assert_equal(a, b):
    """Compare all that the cells hold, with dtypes."""
    pd.testing.assert_frame_equal(a.obs, b.obs)
    pd.testing.assert_frame_equal(a.var, b.var)
    assert list(a.layers) == list(b.layers)
    for one, other in [(a.X, b.X), *((a.layers[name], b.layers[name]) for name in a.layers)]:
        for part in ("data", "indices", "indptr"):
            first, second = getattr(one, part), getattr(other, part)
            assert first.dtype == second.dtype
            np.testing.assert_array_equal(first, second)
    _assert_same(dict(a.uns), dict(b.uns))


def _assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _assert_same(a[key], b[key])
    else:
        np.testing.assert_array_equal(a, b)


class Killed(BaseException):
    """Stands for a kill: nothing may clean up after it."""


def kill_after(monkeypatch, chunks, at="add"):
    """Let the process end after some chunks, and leave behind what a killed one leaves."""
    done = []
    real = getattr(streaming.PartialFile, at)

    def stop(partial, *given):
        if len(done) == chunks:
            if at == "add":
                (partial.folder / "temporary.h5ad").write_bytes(b"half a chunk")
            raise Killed
        done.append(given)
        return real(partial, *given)

    monkeypatch.setattr(streaming.PartialFile, at, stop)


# blocks


@pytest.fixture(scope="module")
def states(generator):
    """Return the hashes of all blocks' states before counts are drawn; a count would hide a rounding."""
    return states_of(generator, threads=1, batch_size=64)


def states_of(generator, threads, batch_size):
    found, real, before = [], type(generator.model).finish, torch.get_num_threads()

    def finish(model, x, *given):
        assert len(x) == 64
        found.append(hashlib.sha256(x.numpy().tobytes()).hexdigest())
        return real(model, x, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(generator.model), "finish", finish)
        torch.set_num_threads(threads)
        try:
            generator.generate(N, batch_size=batch_size, **HOW)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    return sorted(found)


@pytest.mark.parametrize(("threads", "batch_size"), [(1, None), (2, 7), (2, None)])
def test_threads_and_batches_change_no_bit_of_the_values(generator, states, threads, batch_size):
    assert states_of(generator, threads, batch_size) == states
    assert len(states) == 4


def test_tasks_end_when_one_fails():
    def task(start, check):
        if start == 0:
            raise InputError("one failed")
        while True:
            check()

    with pytest.raises(InputError, match="one failed"):
        run_tasks(task, [0, 1, 2], at_once=2)
    assert issubclass(Stopped, Exception)


def test_equal_rows_are_found_as_by_their_bytes():
    table = np.array([[0.0, np.nan], [1, 2], [0, np.nan], [1, 2], [-0.0, np.nan]])
    groups = sorted(map(tuple, (group.tolist() for group in _equal_rows(table))))
    assert groups == [(0, 2), (1, 3), (4,)]
    assert [group.tolist() for group in _equal_rows(np.zeros((3, 0)))] == [[0, 1, 2]]


# files


def test_the_file_is_that_of_the_cells_in_memory(generator, whole, tmp_path):
    cells = generator.generate(N, **HOW)
    cells.write_h5ad(tmp_path / "memory.h5ad", compression="gzip")
    assert_equal(ad.read_h5ad(whole), ad.read_h5ad(tmp_path / "memory.h5ad"))
    backed = ad.read_h5ad(whole, backed="r")
    assert (backed.X[5:70] != cells.X[5:70]).nnz == 0
    backed.file.close()


def test_zarr(generator, whole, tmp_path):
    pytest.importorskip("zarr")
    path = generator.generate_to(tmp_path / "cells.zarr", N, **HOW)
    assert_equal(ad.read_zarr(path), ad.read_h5ad(whole))
    generator.generate_to(path, 70, **HOW)  # replaces it
    assert ad.read_zarr(path).n_obs == 70
    assert [file.name for file in tmp_path.iterdir()] == ["cells.zarr"]


def test_a_zarr_of_others_is_not_replaced(generator, run, tmp_path):
    pytest.importorskip("zarr")
    path = tmp_path / "cells.zarr"
    with warnings.catch_warnings(action="ignore"):  # of the format of zarr
        make_cells(20, 5).write_zarr(path)
    before = digest(path)
    with pytest.raises(InputError, match="a folder without cells of wbdit"):
        generator.generate_to(path, 5, **HOW)
    assert exit_code("generate", run, "--n", 5, "--calls", 1, "--out", path, "--overwrite") == 2
    assert digest(path) == before
    ours = tmp_path / "ours.zarr"
    for n in (5, 6):
        assert exit_code("generate", run, "--n", n, "--calls", 1, "--out", ours) == 0
    assert ad.read_zarr(ours).n_obs == 6


def test_models_of_values_are_written_too(tmp_path):
    cells = make_cells(60, 30)
    cells.X = cells.X.toarray() - 1.5  # neither counts nor logarithms: scaled
    generator = wbdit.fit(cells, space="scaled", steps=1, progress=False)
    path = generator.generate_to(tmp_path / "cells.h5ad", 70, chunk=64, calls=2)
    np.testing.assert_array_equal(ad.read_h5ad(path).X, generator.generate(70, calls=2).X)


def test_portions_change_no_byte(generator, tmp_path, monkeypatch):
    """Groups and buffers smaller than the cells, as with millions of them."""
    monkeypatch.setattr(cell_files, "GROUP", 50)
    monkeypatch.setattr(cell_files, "CHUNK", 128)
    monkeypatch.setattr(cell_files, "BUFFER", 256)
    one = generator.generate_to(tmp_path / "one.h5ad", N, **HOW)
    two = generator.generate_to(tmp_path / "two.h5ad", N, chunk=64, **HOW)
    assert digest(one) == digest(two)
    assert (ad.read_h5ad(one).X != generator.generate(N, **HOW).X).nnz == 0


# kills


@pytest.mark.parametrize(("chunks", "at"), [(0, "add"), (2, "add"), (0, "finish")])
def test_a_killed_process_goes_on_to_the_same_file(generator, whole, tmp_path, monkeypatch, chunks, at):
    path = tmp_path / "cells.h5ad"
    with monkeypatch.context() as patch:
        kill_after(patch, chunks, at)
        with pytest.raises(Killed):
            generator.generate_to(path, N, chunk=64, **HOW)
    assert not path.exists()
    made = []
    real = type(generator)._sample

    def counted(own, plan, rows, *given):
        made.append(rows)
        return real(own, plan, rows, *given)

    monkeypatch.setattr(type(generator), "_sample", counted)
    generator.generate_to(path, N, chunk=64, resume=True, **HOW)
    assert digest(path) == digest(whole)
    assert [file.name for file in tmp_path.iterdir()] == ["cells.h5ad"]
    assert len(made) == (1 if at == "finish" else 4 - chunks)  # the last chunk describes the cells


def test_a_finished_file_is_not_made_again(generator, whole, tmp_path, monkeypatch, log):
    """As when a queue starts a job again that had just ended."""
    path = tmp_path / "cells.h5ad"
    path.write_bytes(whole.read_bytes())
    monkeypatch.setattr(type(generator), "_sample", lambda *given: pytest.fail("cells are generated"))
    generator.generate_to(path, N, chunk=64, resume=True, **HOW)
    assert log[-1] == f"{path} is complete: nothing is left to generate"
    with pytest.raises(InputError, match="holds cells of another seed"):
        generator.generate_to(path, N, resume=True, **{**HOW, "seed": 4})
    make_cells(20, 5).write_h5ad(path)
    with pytest.raises(InputError, match="holds cells of another request"):
        generator.generate_to(path, N, resume=True, **HOW)


def test_a_damaged_chunk_is_made_again(generator, whole, tmp_path, monkeypatch):
    path = tmp_path / "cells.h5ad"
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            generator.generate_to(path, N, chunk=64, **HOW)
    chunk = partial_folder(path) / "64.h5ad"
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"x" * 9)
    generator.generate_to(path, N, chunk=64, resume=True, **HOW)
    assert digest(path) == digest(whole)


def test_unfinished_cells_are_neither_lost_nor_mixed(generator, tmp_path, monkeypatch):
    path = tmp_path / "cells.h5ad"
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            generator.generate_to(path, N, chunk=64, **HOW)
    with pytest.raises(InputError, match="go on with `resume=True`"):
        generator.generate_to(path, N, chunk=64, **HOW)
    for other, what in (({"seed": 4}, "seed"), ({"library_size": 50}, "request"), ({"chunk": 128}, "chunk")):
        with pytest.raises(InputError, match=f"another {what}"):
            generator.generate_to(path, N, resume=True, **{"chunk": 64, **HOW, **other})
    other = wbdit.fit(make_cells(60, 30), label="type", steps=2, progress=False)
    with pytest.raises(InputError, match="another model_hash"):
        other.generate_to(path, N, chunk=64, resume=True, **HOW)


def test_two_processes_do_not_write_one_file(generator, tmp_path):
    path = tmp_path / "cells.h5ad"
    facts = {"seed": 0}
    with streaming.unfinished(path, facts, False), pytest.raises(InputError, match="is being generated by process"):
        generator.generate_to(path, N, **HOW)


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_full_disk_keeps_what_is_finished(generator, whole, tmp_path, monkeypatch, chunks):
    path, real, done = tmp_path / "cells.h5ad", cell_files.write_rows, []

    def full(*given):
        done.append(given)
        if len(done) > chunks:
            raise InputError(f"cannot write {given[0]}: the disk is full")
        real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write_rows", full)
        with pytest.raises(InputError, match="the disk is full"):
            generator.generate_to(path, N, chunk=64, **HOW)
    assert not path.exists()
    generator.generate_to(path, N, chunk=64, resume=True, **HOW)
    assert digest(path) == digest(whole)


def test_a_full_disk_is_named_and_the_file_closed(generator, tmp_path):
    """A limit of the file size stands for the disk. HDF5 must close the file in order: it would crash at exit."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(InputError, match="the disk is full"):
            generator.generate_to(tmp_path / "cells.h5ad", 3, **HOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


# ranks


def test_ranks_and_batches_give_the_same_file(generator, whole, tmp_path):
    for ranks, batch_size in ((2, 7), (3, 64)):
        parts = [
            generator.generate_to(
                tmp_path / f"{ranks}.h5ad", N, chunk=64, rank=rank, ranks=ranks, batch_size=batch_size, **HOW
            )
            for rank in range(ranks)
        ]
        assert parts[0].name == f"{ranks}.rank0-of-{ranks}.h5ad"
        assert ad.read_h5ad(parts[1]).obs_names[0] == f"synthetic-{64 * (4 // ranks)}"
        assert digest(wbdit.join(parts[::-1], tmp_path / "all.h5ad")) == digest(whole)


def test_parts_that_do_not_belong_together(generator, whole, tmp_path):
    def parts(name, **how):
        return [
            generator.generate_to(tmp_path / f"{name}.h5ad", N, rank=rank, ranks=2, **{**HOW, **how})
            for rank in range(2)
        ]

    one, other = parts("one"), parts("other", seed=9)
    out = tmp_path / "all.h5ad"
    for given, words in (
        ([one[0], other[1]], "not of the same request"),
        ([one[0]], "rank 1 of 2 is missing"),
        ([one[0], one[0]], "of the same rank"),
        ([whole, one[1]], "not the file of one rank"),
        ([tmp_path / "none.h5ad"], "no such file"),
        ([], "give the files to join"),
    ):
        with pytest.raises(InputError, match=words):
            wbdit.join(given, out)
    with pytest.raises(InputError, match="is one of the parts"):
        wbdit.join(one, one[0])
    one[1].write_bytes(one[1].read_bytes()[:-2000])
    with pytest.raises(InputError, match="cannot read"):
        wbdit.join(one, out)
    assert not out.exists()
    with pytest.raises(InputError, match="use at most 1 `ranks`"):
        generator.generate_to(out, 5, rank=0, ranks=2)
    with pytest.raises(InputError, match="`rank` must be from 0 to 1"):
        generator.generate_to(out, N, rank=2, ranks=2)


# the command


def test_the_command_over_ranks(generator, run, whole, tmp_path, monkeypatch, capsys):
    how = [run, "--n", N, "--calls", 2, "--seed", 3, "--out", tmp_path / "cells.h5ad"]
    assert exit_code("generate", *how, "--rank", 0, "--ranks", 2) == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_code("generate", *how, "--resume", "--chunk", 64, "--json") == 0
    parts = [tmp_path / f"cells.rank{rank}-of-2.h5ad" for rank in range(2)]
    said = json.loads(capsys.readouterr().out)
    assert (said["out"], said["cells"]) == (str(parts[1]), 72)
    assert exit_code("join", *parts, "--out", tmp_path / "cells.h5ad") == 0
    assert digest(tmp_path / "cells.h5ad") == digest(whole)
    assert exit_code("join", parts[0], "--out", tmp_path / "other.h5ad") == 2
    assert exit_code("generate", *how, "--rank", 0) == 2
    monkeypatch.setenv("RANK", "one")
    assert exit_code("generate", *how) == 2
    assert exit_code("generate", *how[:-1], tmp_path / "cells.txt") == 2
