"""Compile every kernel and every candidate in advance, with one process per core.

The processes launch nothing (`drylaunch.py`). The binaries go to Triton's cache, where later stages find them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from rows import Line
from setting import Setting

Job = tuple[str, int]  # an op and the index of its candidate


def compile_all(s: Setting) -> None:
    """Compile all kernels for this machine's card; on a CPU, compile one op for sm_90, to test the code."""
    if "TRITON_INTERPRET" in os.environ:
        return  # interpreted kernels are not compiled
    arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1] if s.on_gpu else 90
    jobs = [job for job in _jobs() if s.on_gpu or job == ("mssa", 0)]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        running = {job: pool.submit(compile_job, job, arch) for job in jobs}
        for (op, candidate), future in running.items():
            s.rows.attempt(f"{op} {candidate}", future.result)


def _jobs() -> list[Job]:
    from codegen import launches
    from wbdit.kernels import blocks as fused_blocks
    from wbdit.kernels import mssa, narrow

    counts = {
        "mssa": len(mssa.WHOLE_HEADS) + len(mssa.FORWARD),
        "mssa_backward": len(mssa.BACKWARD),
        "run_blocks": len(fused_blocks.TILES),
        "denoise": len(narrow.ROWS),
    }
    # the slowest to compile first
    names = sorted(launches(torch.bfloat16, batch=1), key=lambda op: -counts.get(op, 0))
    return [(op, i) for op in names for i in range(counts.get(op, 1))]


def compile_job(job: Job, arch: int) -> Line:
    """Compile one op with one candidate in bf16, and with the first in fp32 too; runs in a separate process."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import uninstalled  # noqa: F401
    from codegen import launches
    from drylaunch import dry
    from wbdit.kernels import blocks as fused_blocks
    from wbdit.kernels import mssa, narrow

    op, index = job
    kernels = 0
    with offering(mssa, index), offering(fused_blocks, index), offering(narrow, index):
        for dtype in (torch.bfloat16, torch.float32)[: 1 if index else 2]:
            launch = launches(dtype).get(op)
            if launch is not None:
                with dry(arch) as compiled:
                    launch()
                kernels += len(compiled)
    return {"kernels": kernels}


@contextlib.contextmanager
def offering(module: ModuleType, index: int) -> Iterator[None]:
    """Context in which a module offers only the candidate of an index, or the first if there is none."""
    offered = module.candidates

    def candidates(*given: object) -> tuple[object, ...]:
        every = offered(*given)
        return every[index : index + 1] or every[:1]

    module.candidates = candidates
    try:
        yield
    finally:
        module.candidates = offered
