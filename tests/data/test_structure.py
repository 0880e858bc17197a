"""Files and matrices from strangers: what compiled code would follow is checked before."""

import os

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from helpers import make_cells

import wbdit
from wbdit import InputError
from wbdit._io import check_regular
from wbdit.data import structure, trial
from wbdit.data.expression import in_memory, read_h5ad
from wbdit.data.genes import read_gene_list
from wbdit.data.h5ad_check import check_claim, check_h5ad
from wbdit.data.labels import Labels
from wbdit.data.preprocessor import Preprocessor
from wbdit.data.structure import check_csr, check_matrices, check_sparse

BIG = 2**31 - 1


def cut(X):
    X.indices = X.indices[:-5]


def far(X):
    X.indices[7] = BIG


def negative(X):
    X.indices[7] = -1


def just_beyond(X):
    X.indices[7] = min(X.shape) + 100


def falling(X):
    X.indptr[3] = X.indptr[-1] + 1000


def sinking(X):
    X.indptr[4], X.indptr[5] = X.indptr[5], X.indptr[4]


def not_from_zero(X):
    X.indptr[0] = 3


def short(X):
    X.indptr = X.indptr[:-2]


def few_values(X):
    X.data = X.data[:-1]


def fractions(X):
    X.indices = X.indices.astype(np.float32)


def objects(X):
    X.data = X.data.astype(object)


def lying_shape(X):
    X._shape = (10**12, X.shape[1]) if X.format == "csr" else (X.shape[0], 10**12)


DAMAGES = [
    cut,
    far,
    negative,
    just_beyond,
    falling,
    sinking,
    not_from_zero,
    short,
    few_values,
    fractions,
    objects,
    lying_shape,
]


def test_a_layer_of_another_shape_than_the_cells():
    cells = make_cells(30, 20)
    cells.layers["counts"] = cells.X.copy()
    cells.layers["counts"]._shape = (5, 20)
    with pytest.raises(InputError, match="layers is damaged"):
        check_matrices(cells)


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, sp.csr_array])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_matrix_never_reaches_compiled_code(damage, kind):
    X = kind(make_cells(30, 20).X)
    damage(X)
    with pytest.raises(InputError, match="X is damaged"):
        check_sparse(X)
    with pytest.raises(InputError, match="X is damaged"):
        in_memory(X)


@pytest.mark.parametrize("use", ["fit", "split", "encode", "view"])
@pytest.mark.parametrize("where", ["X", "raw.X", "layers", "obsm", "obsp"])
def test_every_way_in_checks_every_matrix(where, use):
    adata = make_cells(30, 20)
    adata.raw = adata.copy()
    adata.layers["other"] = adata.X.copy()
    adata.obsm["wide"] = adata.X.copy()
    adata.obsp["near"] = sp.csr_matrix(np.eye(30))
    preprocessor = Preprocessor.fit(adata, label="type")
    broken = {
        "X": lambda: adata.X,
        "raw.X": lambda: adata.raw.X,
        "layers": lambda: adata.layers["other"],
        "obsm": lambda: adata.obsm["wide"],
        "obsp": lambda: adata.obsp["near"],
    }[where]()
    far(broken)
    ways = {
        "fit": lambda: Preprocessor.fit(adata),
        "split": lambda: wbdit.split(adata),
        "encode": lambda: preprocessor.encode(adata),
        "view": lambda: preprocessor.encode(adata[:10]),
    }
    with pytest.raises(InputError, match=f"{where}.* is damaged"):
        ways[use]()


def test_other_formats_are_checked_too():
    X = sp.coo_matrix(np.eye(5))
    X.coords = (X.row, X.col + 3)
    with pytest.raises(InputError, match="is damaged"):
        check_sparse(X)
    X = sp.bsr_matrix(np.eye(6), blocksize=(2, 2))
    check_sparse(X)
    X.indices[0] = 3
    with pytest.raises(InputError, match="is damaged"):
        check_sparse(X)


def test_arrays_may_lie_in_a_file_and_are_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(structure, "CHUNK", 16)
    make_cells(30, 20).write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        group = file["X"]
        parts = [group[part] for part in ("indptr", "indices", "data")]
        check_csr(*parts, (30, 20))
        group["indices"][-1] = 20
        with pytest.raises(InputError, match="an index is 20, but there are 20 columns"):
            check_csr(*parts, (30, 20))
        backed = ad.io.sparse_dataset(group)
        group["indptr"][20] = 0
        with pytest.raises(InputError, match="a pointer is lower than the one before"):
            check_sparse(backed)
        with pytest.raises(InputError, match="is damaged"):
            in_memory(backed)


# files


@pytest.fixture
def stored(tmp_path):
    """Return a function that writes cells, changes the file and returns its path."""
    adata = make_cells(30, 20)
    adata.raw = adata.copy()
    adata.layers["other"] = sp.csc_matrix(adata.X)
    adata.write_h5ad(tmp_path / "cells.h5ad")

    def changed(change):
        with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
            change(file)
        return tmp_path / "cells.h5ad"

    return changed


def replaced(name, change):
    def do(file):
        values, attributes = file[name][()], dict(file[name].attrs)
        del file[name]
        file[name] = change(values)
        file[name].attrs.update(attributes)

    return do


def set_at(place, value):
    def change(values):
        values[place] = value
        return values

    return change


def claims(name, **how):
    def do(file):
        attributes = dict(file[name].attrs)
        del file[name]
        file.create_dataset(name, **how)
        file[name].attrs.update(attributes)

    return do


def ring(file):
    file["uns/ring"] = file["/"]


def elsewhere(file):
    file["uns/other"] = h5py.ExternalLink("/etc/passwd", "/")


def stored_elsewhere(file):
    file.create_dataset("uns/other", (10,), "u1", external=[("/etc/passwd", 0, 10)])


def virtual(file):
    layout = h5py.VirtualLayout((10,), "u1")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (10,))
    file.create_virtual_dataset("uns/other", layout)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced("X/indices", lambda x: x[:-9]), "damaged|dimensions|length|size"),
        (replaced("X/indices", set_at(4, BIG)), "X is damaged: an index is 2147483647"),
        (replaced("X/indices", set_at(4, -7)), "X is damaged: an index is -7"),
        (replaced("raw/X/indices", set_at(4, 20)), "raw.X is damaged"),
        (replaced("layers/other/indices", set_at(4, 30)), r"layers\['other'\] is damaged"),
        (replaced("X/indptr", set_at(5, 10**6)), "X is damaged"),
        (replaced("X/indptr", lambda x: x[::-1]), "damaged|start with 0|pointer"),
        (lambda file: file["X"].attrs.__setitem__("shape", [10**12, 20]), "claim to hold"),
        (lambda file: file["X"].attrs.__setitem__("shape", [31, 20]), "cannot read|damaged"),
        (claims("X/data", shape=(10**12,), dtype="f4", chunks=True), "claim to hold"),
        (claims("X/data", shape=(4 * 10**8,), dtype="f4", chunks=True, compression="gzip"), "claim to hold"),
        (claims("obs/type/codes", shape=(10**12,), dtype="i1", chunks=True), "claim to hold"),
        (claims("obs/type/categories", shape=(3 * 10**8,), dtype="S3", chunks=True), "claim to hold"),
        (replaced("obs/type/codes", lambda x: x[:-1]), "cannot read"),
        (ring, "without end"),
        (elsewhere, "lies in another file"),
        (stored_elsewhere, "lies in another file"),
        (virtual, "lies in another file"),
    ],
)
def test_a_hostile_file_is_one_line(stored, change, words):
    def categorical(file):
        if "codes" not in (file["obs/type"] if isinstance(file["obs/type"], h5py.Group) else ()):
            pytest.skip("this anndata writes text")
        change(file)

    with pytest.raises(InputError, match=words) as caught:
        read_h5ad(stored(categorical))
    assert "\n" not in str(caught.value)


def test_claims_are_compared_with_the_file_and_the_memory(monkeypatch):
    check_claim(10**9, 1)
    with pytest.raises(InputError, match="claim to hold"):
        check_claim(10**9 + 1, 10**6)
    monkeypatch.setattr("wbdit.data.h5ad_check.free_memory", lambda: 2 * 10**9)
    check_claim(2 * 10**9, 10**9)
    with pytest.raises(InputError, match="memory are free"):
        check_claim(3 * 10**9, 10**9)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("fault", "words"), [("crash", "crashes HDF5"), ("hang", "never ends"), ("memory", "more memory")]
)
def test_a_file_that_breaks_the_library_breaks_a_child_only(stored, monkeypatch, fault, words):
    def read(path, whole):
        if fault == "crash":
            os.abort()
        if fault == "memory":
            raise MemoryError
        while True:
            pass

    monkeypatch.setattr(trial, "SECONDS", 1)
    monkeypatch.setattr(trial, "check_h5ad", read)
    with pytest.raises(InputError, match=words):
        read_h5ad(stored(lambda file: None))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_trial_that_fails_early_is_not_repeated_in_this_process(stored, monkeypatch):
    def read(path, whole):
        raise RuntimeError("bad symbol table node signature")

    monkeypatch.setattr(trial, "check_h5ad", read)
    monkeypatch.setattr(ad, "read_h5ad", lambda path: pytest.fail("read in this process"))
    with pytest.raises(InputError, match=r"cannot read .* as .h5ad \(bad symbol table node signature\)"):
        read_h5ad(stored(lambda file: None))


def test_check_h5ad_returns_the_size_in_memory(stored):
    assert 1000 < check_h5ad(stored(lambda file: None)) < 10**6


def odd_paths(folder):
    (folder / "ring.h5ad").symlink_to(folder / "ring.h5ad")
    os.mkfifo(folder / "pipe.h5ad")
    return {
        "none.h5ad": "no such file",
        ".": "is a folder",
        "ring.h5ad": "cannot read",
        "pipe.h5ad": "is a pipe or a device",
        "/dev/zero": "is a pipe or a device",
        "a\0b": "cannot read",
        "x" * 300: "cannot read",
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_only_regular_files_are_opened(tmp_path):
    for name, words in odd_paths(tmp_path).items():
        for read in (check_regular, read_h5ad, read_gene_list):
            with pytest.raises(InputError, match=words):
                read(tmp_path / name)


@pytest.mark.parametrize("content", [b"gene-1\0gene-2", b"\xff\xfe", b"", b"\n \n"])
def test_a_gene_list_that_is_none(tmp_path, content):
    (tmp_path / "genes.txt").write_bytes(content)
    with pytest.raises(InputError, match="the gene list"):
        read_gene_list(tmp_path / "genes.txt")


def test_a_gene_list_with_the_mark_of_an_editor(tmp_path):
    (tmp_path / "genes.txt").write_bytes(b"\xef\xbb\xbfgene-1\r\ngene-2\r\n")
    assert read_gene_list(tmp_path / "genes.txt") == ["gene-1", "gene-2"]


# names and labels


@pytest.mark.parametrize("value", [[1], {"a": 1}, "a\0b", "\ud800"])
def test_labels_that_no_file_can_hold(value):
    adata = make_cells(12, 20)
    adata.obs["type"] = [value] * 6 + ["B"] * 6
    with pytest.raises(InputError, match="'type'"):
        Labels.fit(adata, "type")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_genes_that_no_file_can_hold(name):
    adata = make_cells(12, 20)
    adata.var_names = [name, *adata.var_names[1:]]
    with pytest.raises(InputError, match="the gene name"):
        Preprocessor.fit(adata)


def test_sparse_half_precision_is_refused():
    """Scipy stores it, and then cannot take rows of it."""
    X = make_cells(12, 20).X
    X.data = X.data.astype(np.float16)
    with pytest.raises(InputError, match="convert it to float32"):
        in_memory(X)


def test_twelve_columns_of_64_labels_do_not_wrap():
    """Their 2^72 combinations exceed 64 bits: keys made of one integer made different combinations equal."""
    codes = np.zeros((128, 12), np.int64)
    codes[:64, 0] = np.arange(64)
    codes[64:, 1] = np.arange(64)
    codes = np.concatenate([codes, codes[::-1]])
    adata = ad.AnnData(np.ones((256, 1), np.float32))
    for column in range(12):
        filler = np.tile(np.arange(64), 4) if column > 1 else codes[:, column]
        adata.obs[f"c{column}"] = [f"{code:02d}" for code in filler]
    labels = Labels.fit(adata, [f"c{column}" for column in range(12)])
    wanted = np.unique(labels.codes(adata), axis=0)
    np.testing.assert_array_equal(labels.combinations, wanted)
    assert labels.sizes.sum() == 256
    index = labels.combination_index(labels.codes(adata))
    np.testing.assert_array_equal(labels.combinations[index], labels.codes(adata))
    other = labels.combinations[:1] + np.eye(1, 12, dtype=np.int64)
    assert labels.combination_index(other).tolist() in (
        [-1],
        *[[i] for i in range(len(wanted)) if (wanted[i] == other).all()],
    )
