"""NVIDIA's tools, if installed: compute-sanitizer on tiny blocks, Nsight Compute on four kernels."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rows import AbsentError, Line
from setting import Setting

HERE = Path(__file__).resolve().parent
KERNELS = {
    "hopper_mssa_forward": "forward",
    "mssa_forward": "forward",
    "adaln_forward": "forward",
    "mssa_backward": "train",
    "adaln_backward": "train",
}
METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes.sum": "bytes",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "programs_by_registers",
    "launch__occupancy_limit_shared_mem": "programs_by_shared_memory",
}


def sanitizer(s: Setting) -> None:
    """Check tiny blocks for out-of-bounds accesses and races."""
    for tool in ("memcheck", "racecheck"):
        s.rows.attempt(f"{tool}, tiny blocks", lambda tool=tool: _sanitize(s, tool))


def counters(s: Setting) -> None:
    """Read the hardware counters for one launch of each of the four kernels."""
    for kernel in KERNELS:
        s.rows.attempt(f"ncu {kernel}", lambda kernel=kernel: _count(s, kernel))


def _sanitize(s: Setting, tool: str) -> Line:
    s.need_gpu()
    command = [_find("compute-sanitizer"), "--tool", tool, "--error-exitcode", "9", sys.executable, HERE / "tiny.py"]
    done = _run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
    clean = done.returncode == 0 and bool(summary)
    found = {"summary": (summary or [_last(done)])[-1][:200], "error": 0.0 if clean else 1.0}
    return {**found, "allowed": 0.0, "green": clean}


def _count(s: Setting, kernel: str) -> Line:
    """Profile one launch within the phase's NVTX range; without a range, skip the first two launches."""
    s.need_gpu()
    ncu = [_find("ncu"), "--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(METRICS)]
    ncu += ["--kernel-name", f"regex:{kernel}", "--launch-count", "1"]
    name = KERNELS[kernel]
    phase = [sys.executable, HERE.parent / "nsight.py", name, "--batch", "1024", "--steps", "1"]
    ranges = ["--nvtx", "--nvtx-include", f"{name}/", "--nvtx-include", f"wbdit@{name}/"]
    for where in (ranges, ["--launch-skip", "2"]):
        done = _run([*ncu, *where, *phase])
        lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
        if len(lines) >= 3:
            names, units, values = (next(csv.reader([line])) for line in lines[:3])
            table = dict(zip(names, zip(values, units, strict=True), strict=True))
            return {short: " ".join(table[metric]) for metric, short in METRICS.items() if metric in table}
    raise RuntimeError(f"ncu: {_last(done)}")


def _find(tool: str) -> str:
    """Return the path of a CUDA toolkit program, from PATH, nvcc's folder, or CUDA_HOME."""
    beside = [Path(found).resolve().parent for found in [shutil.which("nvcc")] if found]
    beside += [Path(home) / "bin" for home in [os.environ.get("CUDA_HOME")] if home]
    found = shutil.which(tool) or next((str(folder / tool) for folder in beside if (folder / tool).exists()), None)
    if found is None:
        raise AbsentError(f"no program {tool}: install it, or set CUDA_HOME")
    return found


def _run(command: list[object], **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment, "WBDIT_AUTOTUNE": "0"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env=env)


def _last(done: subprocess.CompletedProcess[str]) -> str:
    return ((done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit status {done.returncode}"])[-1][:200]
