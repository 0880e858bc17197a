"""Train on real cells, generate, and compare counts from the same run and seed on CPU and GPU."""

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
    """Fit, generate, compare; each row needs the previous one."""
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
        raise AbsentError(f"no module {error.name}: add wbdit's dependencies to PYTHONPATH") from error
    if not s.cells.is_file():
        raise AbsentError(f"no file {s.cells}: run make demo to write it, or give another with --cells")
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
    generator.generate(cells, seed=1)  # warm-up: compilation and autotuning
    start = time.perf_counter()
    counts = generator.generate(cells, seed=0).X
    seconds = time.perf_counter() - start
    return {"generate_seconds": seconds, "cells_per_second": cells / seconds, "mean_count": float(counts.mean())}


def _compare(s: Setting, run: Path) -> Line:
    """Count the differing counts: in fp32 only ties within rounding, in bf16 the effect of bf16 on the path."""
    cells = 8 if s.quick else CELLS
    with _fp32():
        expected = _load(run, "cpu").generate(cells, seed=0).X.toarray()
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
    """Context that disables the autocast which the generator uses."""
    from wbdit import generator

    own, generator.sampling_precision = generator.sampling_precision, lambda *given: contextlib.nullcontext()
    try:
        yield
    finally:
        generator.sampling_precision = own


def _load(run: Path, device: str):
    from wbdit import load

    if not (run / "config.json").exists():
        raise AbsentError("no trained model: the row fit did not finish")
    return load(run, device=device)
