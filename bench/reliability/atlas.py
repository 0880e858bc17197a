"""Training on millions of cells: memory, and the speed at which each source gives random batches.

    python bench/reliability/atlas.py write 2000000 atlas.h5ad --from kang_ifnb_pbmc.h5ad
    python bench/reliability/atlas.py sources atlas.h5ad atlas.zarr
    python bench/reliability/atlas.py train atlas.h5ad --steps 200

`write` tiles the cells of a real file to any number: each is thinned binomially, so that no two are equal, and they are
sorted by label, the worst order for a loader that reads neighbors. Each measurement runs in its own process, whose peak
memory is that of the system (ru_maxrss).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

GENES = 2000
KEPT = 0.8  # probability with which a molecule is kept
PIECE = 20_000  # cells that are written at once
BATCH = 128
SECONDS = 5.0  # of one measurement of a loader


def write(cells: int, out: Path, source: Path, label: str, genes: int, gzip: bool) -> None:
    """Write a file of any number of cells in pieces."""
    adata = ad.read_h5ad(source)
    counts, var = _most_variable(adata, genes)
    labels = adata.obs[label].astype(str).to_numpy()
    names, which, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    wanted = np.floor(cells * np.cumsum(sizes) / len(labels)).astype(int)
    codes = np.repeat(np.arange(len(names)), np.diff([0, *wanted]))
    obs = pd.DataFrame({label: pd.Categorical.from_codes(codes, names)}, index=np.arange(len(codes)).astype(str))
    rng = np.random.default_rng(0)
    pieces = (_thinned(counts, which, codes[i : i + PIECE], rng) for i in range(0, len(codes), PIECE))
    if out.suffix == ".zarr":
        _write_zarr(out, obs, var, pieces)
    else:
        _write_h5ad(out, obs, var, pieces, {"compression": "gzip"} if gzip else {})


def _most_variable(adata: ad.AnnData, genes: int) -> tuple[sp.csr_matrix, pd.DataFrame]:
    from wbdit.data.cell_matrix import MemoryMatrix
    from wbdit.data.matrix import find_expression
    from wbdit.data.variable_genes import variable_genes

    expression = find_expression(adata)
    try:
        mask = variable_genes(expression.matrix, "counts", genes)
    except TypeError:
        mask = variable_genes(expression.X, "counts", genes)
    assert isinstance(expression.matrix, MemoryMatrix)
    return sp.csr_matrix(expression.X, dtype=np.float32)[:, np.flatnonzero(mask)], expression.var[mask][[]]


def _thinned(counts: sp.csr_matrix, which: np.ndarray, codes: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """Return cells with these labels: cells of the file, drawn at random, of whose molecules a share is kept."""
    rows = np.empty(len(codes), np.int64)
    for code in np.unique(codes):
        mine = codes == code
        rows[mine] = rng.choice(np.flatnonzero(which == code), mine.sum())
    drawn = counts[rows]
    drawn.data = rng.binomial(drawn.data.astype(np.int64), KEPT).astype(np.float32)
    drawn.eliminate_zeros()
    drawn.sort_indices()
    return drawn


def _write_h5ad(
    out: Path, obs: pd.DataFrame, var: pd.DataFrame, pieces: Iterator[sp.csr_matrix], how: dict[str, Any]
) -> None:
    with h5py.File(out, "w") as file:
        ad.AnnData(obs=obs, var=var)  # checks the tables
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        ad.io.write_elem(file, "obs", obs)
        ad.io.write_elem(file, "var", var)
        X = file.create_group("X")
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (len(obs), len(var))})
        shape: dict[str, Any] = {"shape": (0,), "maxshape": (None,), "chunks": (2**16,), **how}
        data, indices = X.create_dataset("data", dtype="f4", **shape), X.create_dataset("indices", dtype="i4", **shape)
        pointers = [np.zeros(1, np.int64)]
        for piece in pieces:
            end = pointers[-1][-1]
            for stored, new in ((data, piece.data), (indices, piece.indices)):
                stored.resize((end + piece.nnz,))
                stored[end:] = new
            pointers.append(end + piece.indptr[1:].astype(np.int64))
        X.create_dataset("indptr", data=np.concatenate(pointers))


def _write_zarr(out: Path, obs: pd.DataFrame, var: pd.DataFrame, pieces: Iterator[sp.csr_matrix]) -> None:
    import zarr

    group = zarr.open_group(out, mode="w")
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    ad.io.write_elem(group, "obs", obs)
    ad.io.write_elem(group, "var", var)
    ad.io.write_elem(group, "X", next(pieces), dataset_kwargs={"chunks": (2**18,)})
    stored = ad.io.sparse_dataset(group["X"])
    for piece in pieces:
        stored.append(piece)


def sources(paths: list[Path], label: str) -> None:
    """Print cells per second and memory of each way to read random batches."""
    print("| source | way | cells/s | ready after s | peak GB | on disk GB |\n|---|---|---|---|---|---|")
    for path in paths:
        ways = ["X[idx].toarray()", "compact copy in a file", "compact copy in memory", "levels in memory"]
        for way in ways:
            found = _apart("loader", str(path), way, label)
            print(
                f"| {path.name} | {way} | {found['speed']:,.0f} | {found['ready']:.0f} | {found['peak']:.2f} | "
                f"{found['disk']:.2f} |",
                flush=True,
            )


def loader(path: Path, way: str, label: str) -> dict[str, float]:
    """Measure one way to read random batches."""
    import torch

    from wbdit.data import capacity, loader
    from wbdit.data.files import open_cells
    from wbdit.data.sources import TrainingData

    began = time.monotonic()
    if way == "X[idx].toarray()":
        adata = ad.read_h5ad(path, backed="r") if path.suffix == ".h5ad" else None
        X = adata.X if adata is not None else ad.io.sparse_dataset(_zarr_group(path)["X"])
        order = np.random.default_rng(0).permutation(X.shape[0])
        ready = time.monotonic() - began
        took = _rate(lambda i: X[np.sort(order[i * BATCH : (i + 1) * BATCH])].toarray())
        return {"speed": took, "ready": ready, "peak": _peak(), "disk": 0.0}
    cells = open_cells(path)
    if way == "compact copy in a file":
        capacity.SHARE = 0
    data = TrainingData.fit(cells, label=label)
    disk = data.cells.nbytes / 1e9 if way == "compact copy in a file" else 0.0  # type: ignore[attr-defined]
    levels = lambda dense: np.minimum(dense, 255).astype(np.uint8)  # noqa: E731, the cost of the likelihood's is its own
    loader.fits = lambda size: way == "levels in memory"  # type: ignore[attr-defined]
    batches = loader.Batches.of_counts(data, levels, BATCH, torch.device("cpu"))
    ready = time.monotonic() - began
    return {"speed": _rate(lambda i: batches.take(batches.draw())), "ready": ready, "peak": _peak(), "disk": disk}


def _zarr_group(path: Path) -> Any:
    import zarr

    return zarr.open_group(path, mode="r")


def _rate(draw: Any) -> float:
    """Return the cells per second of drawing batches."""
    draw(0)
    start, n = time.monotonic(), 0
    while time.monotonic() - start < SECONDS:
        n += 1
        draw(n)
    return n * BATCH / (time.monotonic() - start)


def train(path: Path, steps: int, label: str) -> dict[str, Any]:
    """Train and return the speed and the memory; then measure the loader alone."""
    import logging

    import torch

    import wbdit
    from wbdit.training import fit

    logging.getLogger("wbdit").setLevel(logging.INFO)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    runs: list[Any] = []
    init = fit.TrainingRun.__init__

    def kept(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        runs.append((self, time.monotonic(), _peak()))

    fit.TrainingRun.__init__ = kept  # type: ignore[method-assign]
    began = time.monotonic()
    generator = wbdit.fit(path, label=label, steps=steps, progress=True)
    run, learned, peak = runs[0]
    trained = generator.config.trained
    assert trained is not None
    peak_trained = _peak()
    batches = run.trainer.batches
    with torch.random.fork_rng():
        alone = _rate(lambda i: batches.take(batches.draw()))
    return {
        "cells": len(run.data),
        "learned_seconds": round(learned - began, 1),
        "learned_peak_gb": round(peak, 2),
        "training_cells_per_second": round(trained.steps * batches.batch_size / trained.seconds),
        "loader_cells_per_second": round(alone),
        "calibrated_peak_gb": round(peak_trained, 2),
        "total_seconds": round(time.monotonic() - began, 1),
    }


def _peak() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 * 1.024


def _apart(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    todo = parser.add_subparsers(dest="todo", required=True)
    of_write = todo.add_parser("write")
    of_write.add_argument("cells", type=int)
    of_write.add_argument("out", type=Path)
    of_write.add_argument("--from", dest="source", type=Path, required=True)
    of_write.add_argument("--genes", type=int, default=GENES)
    of_write.add_argument("--gzip", action="store_true")
    of_sources = todo.add_parser("sources")
    of_sources.add_argument("paths", type=Path, nargs="+")
    of_loader = todo.add_parser("loader")
    of_loader.add_argument("path", type=Path)
    of_loader.add_argument("way")
    of_loader.add_argument("label")
    of_train = todo.add_parser("train")
    of_train.add_argument("path", type=Path)
    of_train.add_argument("--steps", type=int, default=200)
    for command in (of_write, of_sources, of_train):
        command.add_argument("--label", default="cell_type")
    arguments = vars(parser.parse_args())
    todo_now = arguments.pop("todo")
    found = {"write": write, "sources": sources, "loader": loader, "train": train}[todo_now](**arguments)
    if found is not None:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
