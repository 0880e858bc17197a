"""Time and memory until the first training step, for cells that are tiled from a file.

    python bench/reliability/first_step.py DATA LABEL CELLS GENES [--steps STEPS]

Cells of DATA are repeated up to CELLS and thinned: each count is drawn anew from a binomial of 80 %. The GENES that
most cells express are kept. A fresh process then runs `wbdit train --max-genes GENES` and stops after STEPS steps,
without saving. It prints seconds and processor seconds since its start, and its peak memory, at each point:

    read        the file is in memory
    prepared    genes, statistics and initial weights are learned
    step 1      the first step is taken
    step N      the last one is
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

THINNING = 0.8


def peak_megabytes() -> float:
    """Return the peak resident memory of this process in MB."""
    try:  # ru_maxrss starts at the size of the parent process
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def tile(source: str, label: str, cells: int, genes: int, path: Path) -> float:
    """Write the tiled cells; return the size of their sparse matrix in MB."""
    import anndata as ad
    import numpy as np
    import scipy.sparse as sp

    whole, rng = ad.read_h5ad(source), np.random.default_rng(0)
    counts = sp.csr_matrix(whole.X, dtype=np.float32)
    kept = np.sort(np.argsort(-np.asarray((counts > 0).sum(0)).ravel(), kind="stable")[:genes])
    counts = counts[:, kept]
    rows = rng.permutation(np.resize(np.arange(counts.shape[0]), cells))
    tiled = counts[rows]
    tiled.data = rng.binomial(tiled.data.astype(np.int64), THINNING).astype(np.float32)
    tiled.eliminate_zeros()
    obs = whole.obs[[label]].iloc[rows].set_axis([f"cell-{i}" for i in range(cells)], axis=0)
    ad.AnnData(tiled, obs=obs, var=whole.var.iloc[kept][[]]).write_h5ad(path)
    return (tiled.data.nbytes + tiled.indices.nbytes + tiled.indptr.nbytes) / 1e6


def train(path: str, label: str, genes: int, steps: int) -> None:
    """Train as the command does, and print each point."""
    began = time.monotonic()

    def say(point: str) -> None:
        seconds, busy = time.monotonic() - began, time.process_time()
        print(f"{point:10} {seconds:7.1f} s {busy:7.1f} processor s {peak_megabytes():8.0f} MB", flush=True)

    say("started")
    import wbdit
    from wbdit.data.expression import read_h5ad
    from wbdit.training.fit import TrainingRun
    from wbdit.training.trainer import Trainer

    update, run = Trainer._update, TrainingRun.train

    def timed(trainer):
        loss = update(trainer)
        if trainer.step in (1, steps):
            say(f"step {trainer.step}")
        if trainer.step == steps:
            sys.exit()
        return loss

    def prepared(*given):
        say("prepared")
        return run(*given)

    Trainer._update, TrainingRun.train = timed, prepared
    say("imported")
    adata = read_h5ad(path)
    say("read")
    wbdit.fit(adata, label=label, max_genes=genes, steps=steps, progress=False)


def main() -> None:
    """Read the arguments; tile in this process, train in a fresh one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("label")
    parser.add_argument("cells", type=int)
    parser.add_argument("genes", type=int)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--file", help="train on DATA as it is")
    given = parser.parse_args()
    if given.file:
        train(given.file, given.label, given.genes, given.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        size = tile(given.data, given.label, given.cells, given.genes, path)
        print(f"{given.cells} x {given.genes} cells, {size:.0f} MB sparse", flush=True)
        command = [*sys.argv[1:], "--file", str(path)]
        subprocess.run([sys.executable, __file__, *command], check=True)


if __name__ == "__main__":
    main()
