"""Train on real cells, generate, and compare the counts that one run and one seed give on a CPU and on the GPU."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path

import numpy as np
from rows import AbsentError, Line
from setting import Setting

STEPS = 200
CELLS = 64


def end_to_end(s: Setting) -> None:
    """Fit, generate, compare; each row needs the one before."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        s.rows.attempt("fit", lambda: _fit(s, run))
        s.rows.attempt("generate", lambda: _generate(s, run))
        s.rows.attempt("counts of one seed, fp32, CPU and GPU", lambda: _compare(s, run))


def _fit(s: Setting, run: Path) -> Line:
    try:
        import anndata

        from wbdit import fit
    except ImportError as error:
        raise AbsentError(f"no module {error.name}: put what wbdit needs on PYTHONPATH") from error
    if not s.cells.is_file():
        raise AbsentError(f"no file {s.cells}: make demo writes it, or name another with --cells")
    steps, cells = STEPS, anndata.read_h5ad(s.cells)
    if s.quick:
        steps, cells = 5, cells[::2].copy()
    start = time.perf_counter()
    generator = fit(cells, label="bulk_labels", steps=steps, out=run, device=s.device_name, progress=False)
    losses = [line["loss"] for line in generator.history if "loss" in line]
    return {
        "fit_seconds": time.perf_counter() - start,
        "steps": steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def _generate(s: Setting, run: Path) -> Line:
    generator = _load(run, s.device_name)
    cells = 8 if s.quick else 1000
    generator.generate(cells, seed=1)  # compiling, choosing block sizes
    start = time.perf_counter()
    counts = generator.generate(cells, seed=0).X
    seconds = time.perf_counter() - start
    return {"generate_seconds": seconds, "cells_per_second": cells / seconds, "mean_count": float(counts.mean())}


def _compare(s: Setting, run: Path) -> Line:
    """Count what differs: in fp32 ties within rounding alone, in bf16 what bf16 makes of the path."""
    cells = 8 if s.quick else CELLS
    expected = _load(run, "cpu").generate(cells, seed=0).X.toarray()
    with _fp32():
        found = _load(run, s.device_name).generate(cells, seed=0).X.toarray()
    lowered = _load(run, s.device_name).generate(cells, seed=0).X.toarray()
    apart = found != expected
    return {
        "counts": int(expected.size),
        "differ": int(apart.sum()),
        "differ_by_more_than_1": int((np.abs(found - expected) > 1).sum()),
        "differ_in_bf16": int((lowered != expected).sum()),
        "mean_count": [float(counts.mean()) for counts in (expected, found, lowered)],
    }


@contextlib.contextmanager
def _fp32():
    """Sample without autocast, which the generator takes on a GPU."""
    from wbdit import generator

    own, generator.sampling_precision = generator.sampling_precision, lambda device: contextlib.nullcontext()
    try:
        yield
    finally:
        generator.sampling_precision = own


def _load(run: Path, device: str):
    from wbdit import load

    if not (run / "config.json").exists():
        raise AbsentError("nothing was trained")
    return load(run, device=device)
