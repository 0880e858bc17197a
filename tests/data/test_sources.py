"""Cells from files, several files and iterables: the same training as from memory, whatever the source."""

import warnings

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import torch
import zarr
from helpers import exit_code, interrupt_at, make_cells, tiny_preset

import wbdit
from wbdit.data import capacity, compact_matrix, stored_matrix
from wbdit.data.cell_matrix import JoinedMatrix, MemoryMatrix, chunks
from wbdit.data.cells import Cells
from wbdit.data.compact_matrix import CompactMatrix
from wbdit.data.files import open_cells, read_cells
from wbdit.data.loader import Batches, StreamedRows
from wbdit.data.matrix import Source, find_expression
from wbdit.data.sources import TrainingData
from wbdit.data.stored_matrix import StoredMatrix
from wbdit.errors import InputError

N, GENES = 90, 30


def whole():
    """Return cells with a count above 255, an empty cell, a layer of log values and raw."""
    adata = make_cells(N, GENES)
    X = adata.X.toarray()
    X[3, 5], X[7] = 300, 0
    adata.X = sp.csr_matrix(X)
    adata.obs["dose"] = np.linspace(0, 1, N)
    adata.obs["type"] = adata.obs["type"].astype("category")
    adata.raw = adata.copy()
    adata.layers["log"] = sp.csr_matrix(np.log1p(1e4 * X / np.maximum(X.sum(1, keepdims=True), 1)))
    return adata


CELLS = whole()


def altered(change):
    adata = CELLS.copy()
    adata.X = change(adata.X)
    return adata


def write_zarr(adata, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the version of the format
        adata.write_zarr(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the same cells in files of all kinds."""
    folder = tmp_path_factory.mktemp("sources")
    CELLS.write_h5ad(folder / "csr.h5ad")
    CELLS.write_h5ad(folder / "gzip.h5ad", compression="gzip")
    altered(lambda X: X.tocsc()).write_h5ad(folder / "csc.h5ad")
    altered(lambda X: X.toarray()).write_h5ad(folder / "dense.h5ad")
    write_zarr(CELLS, folder / "csr.zarr")
    CELLS[:40, ::-1].copy().write_h5ad(folder / "first.h5ad")
    CELLS[40:].copy().write_h5ad(folder / "second.h5ad")
    collection = folder / "collection.zarr"
    zarr.open_group(collection, mode="w", zarr_format=2).attrs.update({"encoding-type": "annbatch-preshuffled"})
    write_zarr(CELLS[:50].copy(), collection / "dataset_0")
    write_zarr(CELLS[50:].copy(), collection / "dataset_1")
    return folder


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """Keep nothing in memory, as with more cells than it holds; and read in pieces of a few cells."""
    monkeypatch.setattr(capacity, "memory_limit", lambda: 0)
    monkeypatch.setattr(stored_matrix, "PIECE_VALUES", 300)
    monkeypatch.setattr(stored_matrix, "BLOCK_VALUES", 400)
    monkeypatch.setattr(compact_matrix, "cache_folders", lambda: [tmp_path / "cache"])
    return tmp_path / "cache"


def backed(folder):
    return ad.read_h5ad(folder / "csr.h5ad", backed="r")


SOURCES = {
    "csr": lambda folder: folder / "csr.h5ad",
    "gzip": lambda folder: str(folder / "gzip.h5ad"),
    "csc": lambda folder: folder / "csc.h5ad",
    "dense": lambda folder: folder / "dense.h5ad",
    "zarr": lambda folder: folder / "csr.zarr",
    "collection": lambda folder: folder / "collection.zarr",
    "backed": backed,
    "part of backed": lambda folder: [backed(folder)[:60], CELLS[60:]],
    "two files": lambda folder: [folder / "first.h5ad", folder / "second.h5ad"],
    "iterable": lambda folder: (CELLS[i : i + 30].copy() for i in range(0, N, 30)),
    "batches of annbatch": lambda folder: iter([{"X": CELLS.X, "obs": CELLS.obs, "var": CELLS.var}]),
}


def fitted(source):
    return TrainingData.fit(open_cells(source), label="type", continuous="dose", max_genes=20)


def trained(source, steps, **options):
    torch.manual_seed(0)
    return wbdit.fit(source, preset=tiny_preset(batch_size=16), steps=steps, progress=False, **options)


# one result for all sources


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_cells_and_preprocessor(name, folder, on_disk):
    """The two files hold the genes in another order, and then so does the run."""
    expected = TrainingData.fit(
        CELLS[:, ::-1] if name == "two files" else CELLS, label="type", continuous="dose", max_genes=20
    )
    data = fitted(SOURCES[name](folder))
    assert data.preprocessor.genes == expected.preprocessor.genes
    for field in ("center", "scale", "smallest", "library"):
        np.testing.assert_array_equal(getattr(data.preprocessor, field), getattr(expected.preprocessor, field))
    np.testing.assert_array_equal(data.codes, expected.codes)
    rows = np.array([5, 88, 3, 4, 5, 40])
    np.testing.assert_array_equal(data.dense(rows), expected.dense(rows))
    np.testing.assert_array_equal(data.dense(), expected.dense())


@pytest.mark.parametrize("name", ["csr", "zarr", "iterable"])
def test_every_source_trains_the_same_weights(name, folder, on_disk, monkeypatch):
    stored = trained(SOURCES[name](folder), 8, label="type", validation=0.2)
    monkeypatch.undo()
    in_memory = trained(CELLS, 8, label="type", validation=0.2)
    assert stored.config.model_hash == in_memory.config.model_hash
    assert stored.config.trained.validation_loss == in_memory.config.trained.validation_loss


def test_a_run_from_memory_resumes_from_a_file_to_the_same_weights(folder, on_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(capacity, "memory_limit", lambda: 10**12)
    at_once = trained(CELLS, 7, label="type")
    with interrupt_at(4):
        trained(CELLS, 7, label="type", out=tmp_path / "run")
    monkeypatch.setattr(capacity, "memory_limit", lambda: 0)
    resumed = wbdit.fit(folder / "csr.h5ad", out=tmp_path / "run", resume=True, progress=False)
    assert resumed.config.trained.steps == 7
    assert resumed.config.model_hash == at_once.config.model_hash


@pytest.mark.parametrize("values", ["counts", "levels"])
def test_batches_are_those_of_cells_in_memory(values, folder, on_disk, monkeypatch):
    """Over two epochs, with reading ahead, and after a jump to another place."""
    data, cpu = fitted(folder / "csr.h5ad"), torch.device("cpu")

    def batches():
        if values == "counts":
            return Batches.of_values(data, 16, cpu)
        return Batches.of_counts(data, lambda dense: np.minimum(dense, 9).astype(np.uint8), 16, cpu)

    streamed = batches()
    monkeypatch.setattr(capacity, "memory_limit", lambda: 10**12)
    resident = batches()
    assert isinstance(streamed.x, StreamedRows)
    assert isinstance(resident.x, torch.Tensor)
    for jump in (False, True):
        if jump:
            streamed.position = resident.position = 32
        drawn = []
        for one in (streamed, resident):
            torch.manual_seed(1)
            drawn.append([one.take(one.draw()) for _ in range(8)])
        for a, b in zip(*drawn, strict=True):
            for part, other in zip(a, b, strict=True):
                assert part is other or torch.equal(part, other)
                assert part is None or part.dtype == other.dtype


def test_cells_that_are_read_ahead_are_those_that_are_drawn(folder, on_disk):
    streamed = Batches.of_values(fitted(folder / "csr.h5ad"), 16, torch.device("cpu"))
    streamed.take(streamed.draw())
    assert len(streamed.x.ahead) == 4  # of the five that are left of 90 / 16
    expected = [rows for rows, _ in streamed.x.ahead]
    assert torch.equal(streamed.draw(), expected[0])


# where the training cells are kept


def test_the_file_of_the_training_cells_has_no_name(folder, on_disk, log):
    """So nothing is left of it, even after a kill."""
    data = fitted(folder / "csr.h5ad")
    assert data.cells.values.dtype == np.uint16
    assert list(on_disk.iterdir()) == []
    assert any(f"in {on_disk}" in line for line in log)


def test_a_cache_without_room(folder, on_disk, monkeypatch):
    monkeypatch.setattr(compact_matrix.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(InputError, match=r"need .* on disk, .* set WBDIT_CACHE"):
        fitted(folder / "csr.h5ad")


def test_a_disk_that_is_full(folder, on_disk, monkeypatch):
    def full(self, numbers):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compact_matrix._InFile, "append", full)
    with pytest.raises(InputError, match=r"is full: .* set WBDIT_CACHE"):
        fitted(folder / "csr.h5ad")


@pytest.mark.parametrize("in_memory", [True, False])
def test_numbers_are_as_small_as_they_can_be_and_exact(in_memory, monkeypatch, tmp_path):
    monkeypatch.setattr(capacity, "memory_limit", lambda: 10**12 * in_memory)
    monkeypatch.setattr(compact_matrix, "cache_folders", lambda: [tmp_path])
    for X, dtype in (([[1, 0], [0, 255]], "u1"), ([[1, 0], [0, 65535]], "u2"), ([[1, 0], [0, 65536.0]], "f4")):
        compact = CompactMatrix.collect([sp.csr_matrix(row, dtype=np.float32) for row in X], 2, 10)
        assert compact.values.dtype == dtype
        np.testing.assert_array_equal(compact.rows(np.array([1, 0, 1])).toarray(), np.array(X)[[1, 0, 1]])
        assert compact.rows(np.zeros(0, np.int64)).shape == (0, 2)


def test_the_memory_of_a_job_counts_and_not_that_of_the_machine(monkeypatch):
    limits = {"/proc/self/cgroup": "0::/slurm/job\n", "/sys/fs/cgroup/slurm/job/memory.max": "max"}
    limits["/sys/fs/cgroup/slurm/memory.max"] = "32000\n"
    monkeypatch.setattr(capacity.Path, "read_text", lambda path: limits.get(str(path), ""))
    assert capacity.memory_limit() == 32000
    assert capacity.fits(1000)
    assert not capacity.fits(1001)


# reading in pieces


def test_rows_in_any_order_are_read_in_few_pieces(folder, monkeypatch):
    monkeypatch.setattr(stored_matrix, "PIECE_VALUES", 4 * CELLS.X.nnz)
    matrix = StoredMatrix(backed(folder).X, "X")
    reads = []
    read = matrix._read
    monkeypatch.setattr(matrix, "_read", lambda start, stop: reads.append((start, stop)) or read(start, stop))
    rows = np.array([70, 2, 2, 71, 89, 0])
    np.testing.assert_array_equal(matrix.rows(rows).toarray(), CELLS.X[rows].toarray())
    assert len(reads) < 4
    reads.clear()
    for part, found in chunks(matrix, cells=7):
        np.testing.assert_array_equal(found.toarray(), CELLS.X[part].toarray())
    assert reads == [(0, N)]  # a pass reads larger pieces than it asks for


def test_a_pass_over_a_file_is_rare(folder, on_disk, monkeypatch):
    """What the values are, two to choose genes, and the copy; few cells of the layer and of raw, which equals X."""
    read = []
    original = stored_matrix._Compressed.__call__

    def counted(self, start, stop):
        read.append((self.data.name, stop - start))
        return original(self, start, stop)

    monkeypatch.setattr(stored_matrix._Compressed, "__call__", counted)
    adata = CELLS.copy()
    del adata.raw
    adata.write_h5ad(folder / "no raw.h5ad")
    fitted(folder / "no raw.h5ad")
    passes = sum(n for name, n in read if name.startswith("/X/")) / N
    assert passes <= 6  # and the samples, which are all of so few cells


def test_rounding_and_layers_of_a_file(folder, on_disk):
    cells = open_cells(folder / "csr.h5ad")
    assert find_expression(cells, Source(layer="log")).space == "lognorm"
    assert find_expression(cells, Source(use_raw=True)).name == "raw.X"
    ambient = CELLS.copy()
    ambient.X.data -= np.random.default_rng(0).uniform(0, 0.4, ambient.X.nnz).astype(np.float32)
    ambient.write_h5ad(folder / "ambient.h5ad")
    source = Source(round_counts=True, layer="X")
    found = find_expression(open_cells(folder / "ambient.h5ad"), source)
    np.testing.assert_array_equal(found.X.toarray(), CELLS.X.toarray())
    assert "rounded to integers (100 %" in found.found


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("indices", 30, "an index is 30, but there are 30 columns"),
        ("indptr", -1, "pointer"),
        ("indptr", 10**9, "pointer"),
    ],
)
def test_a_damaged_file_gives_one_line(part, value, words, folder, on_disk, tmp_path):
    path = tmp_path / "damaged.h5ad"
    path.write_bytes((folder / "csr.h5ad").read_bytes())
    with h5py.File(path, "r+") as file:
        file[f"X/{part}"][5] = value
    with pytest.raises(InputError, match=words):
        fitted(path)


# several sets


def test_what_is_dropped_is_said(folder, log):
    some = CELLS[:40, 5:].copy()
    del some.layers["log"]
    joined = open_cells([some, folder / "second.h5ad"])
    assert (joined.n_obs, joined.n_vars) == (N, GENES - 5)
    assert list(joined.var.index) == list(CELLS.var_names[5:])
    assert log[-1] == (
        f"2 sets of cells, 90 in all, share 25 genes; left out: 5 genes of {folder / 'second.h5ad'}, "
        "layers['log'] is not in all of them"
    )


def test_labels_of_several_sets_are_joined(folder):
    a, b = CELLS[CELLS.obs["type"] == "B"].copy(), CELLS[CELLS.obs["type"] != "B"].copy()
    joined = open_cells([a, b])
    assert joined.obs["type"].tolist() == [*a.obs["type"], *b.obs["type"]]
    assert joined.obs["type"].dtype == "category"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.obs.drop(columns="type", inplace=True), "no column 'type' in obs of set 2"),
        (lambda c: setattr(c, "X", c.layers["log"]), "raw counts in set 1 and log-normalized in set 2"),
        (lambda c: setattr(c, "var_names", c.var_names + "x"), "share no genes"),
        (lambda c: setattr(c, "var_names", [*c.var_names[:-1], c.var_names[0]]), "set 2 has two genes named"),
    ],
)
def test_sets_that_do_not_fit_together(change, words):
    other = CELLS[40:].copy()
    del other.raw
    change(other)
    with pytest.raises(InputError, match=words):
        TrainingData.fit(open_cells([CELLS[:40], other]), label="type")


def test_rows_of_joined_matrices_come_in_the_order_that_is_asked_for():
    joined = JoinedMatrix([MemoryMatrix(CELLS.X[:30]), MemoryMatrix(CELLS.X[30:].toarray())])
    rows = np.array([80, 2, 31, 29, 2])
    np.testing.assert_array_equal(joined.rows(rows).toarray(), CELLS.X[rows].toarray())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "no cells were given"),
        (iter([]), "is empty"),
        (iter([3]), "piece 0 of the cells is int"),
        (7, "not int"),
        (iter([CELLS[:50], CELLS[50:, :9]]), "piece 1 of the cells lacks genes"),
        ("none.h5ad", "no such file"),
    ],
)
def test_what_is_no_source_of_cells(source, words):
    with pytest.raises(InputError, match=words):
        open_cells(source)


def test_a_folder_without_cells(tmp_path):
    for words in ("is it complete", "is it complete"):
        with pytest.raises(InputError, match=words):
            open_cells(tmp_path)
        with pytest.raises(InputError, match=words):
            read_cells(tmp_path)


def test_selected_cells_of_a_backed_file(folder):
    part = backed(folder)[10:70, 3:9]
    same = Cells.of(part)
    assert same.matrix("X").shape == (60, 6)
    np.testing.assert_array_equal(same.matrix("X").rows(np.arange(60)).toarray(), CELLS.X[10:70, 3:9].toarray())
    assert same.matrix("raw.X").shape == (60, GENES)


def test_the_command_takes_several_files(folder, tmp_path, capsys):
    options = ("--label", "type", "--steps", "1", "--max-genes", "10", "--quiet", "--set", "model.hidden_size=16")
    small = ("--set", "model.depth=1", "--set", "model.num_heads=2")
    files = (folder / "first.h5ad", folder / "csr.zarr")
    assert exit_code("train", *files, "--out", tmp_path / "run", *options, *small) == 0
    assert wbdit.load(tmp_path / "run").config.trained.cells == 40 + N
    assert exit_code("train", folder / "first.h5ad", tmp_path / "no.h5ad", "--out", tmp_path / "b") == 2
    assert "no such file" in capsys.readouterr().err
