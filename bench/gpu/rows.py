"""Rows of a stage: each appends a line to a file when it ends, so that a later failure loses no measurement."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]
POISONED = 3  # exit status of a stage with a broken GPU context; a new process continues
FAULTS = ("hang", "crash", "raise", "red")


class AbsentError(Exception):
    """A row's requirement is missing; the message names it."""


@dataclass
class Rows:
    """The rows of one stage of a run.

    Parameters
    ----------
    path
        The file; lines are only appended.
    run, stage
        Names of the run and the stage, written to each line.
    done
        Rows that an earlier process of this stage wrote or failed in; they are not tried again.
    faults
        Faults to simulate, by row: one of `FAULTS`.
    """

    path: Path
    run: str
    stage: str
    done: set[str] = field(default_factory=set)
    faults: dict[str, str] = field(default_factory=dict)
    parent: int = field(default_factory=os.getppid)
    probe: Callable[[], object] = lambda: None  # raises if the GPU context is broken

    @property
    def now(self) -> Path:
        """The file with the name of the current row, which the parent process reads if it must stop the row."""
        return self.path.with_suffix(".now")

    def attempt(self, row: str, measure: Callable[[], Line]) -> Line | None:
        """Measure a row and append its line; return None if it has no result or was done before."""
        if row in self.done:
            return None
        if os.getppid() != self.parent:
            raise SystemExit("the run was killed")
        self.now.write_text(row)
        start, poisoned = time.perf_counter(), False
        try:
            self._rehearse(row)
            found = measure()
            if self.faults.get(row) == "red":
                found = {"error": 1.0, "allowed": 0.0, "green": False}
        except AbsentError as error:
            found = {"absent": str(error)}
        except Exception as error:
            found, poisoned = _failure(error), self._is_poisoned(error)
        append(self.path, {"run": self.run, "stage": self.stage, "row": row, **found, "wall": _since(start)})
        print(f"{self.stage}: {row}: {describe(found)}", flush=True)
        if poisoned:
            raise SystemExit(POISONED)
        return None if "absent" in found or "failed" in found else found

    def earlier(self, stage: str) -> dict[str, Line]:
        """Return the results of another stage of this run, by row."""
        return {line["row"]: line for line in read(self.path, self.run) if line["stage"] == stage}

    def _is_poisoned(self, error: Exception) -> bool:
        """Whether the error breaks later rows of this process too."""
        if any(mark in str(error) for mark in ("CUDA error", "[CUDA]")) and not _is_out_of_memory(error):
            return True
        try:
            self.probe()
        except Exception:
            return True
        return False

    def _rehearse(self, row: str) -> None:
        fault = self.faults.get(row)
        if fault == "hang":
            while os.getppid() == self.parent:
                time.sleep(0.2)
            raise SystemExit("the run was killed")
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif fault == "raise":
            raise RuntimeError("CUDA error: an illegal memory access was encountered (rehearsed)")


def append(path: Path, line: Line) -> None:
    """Append a line and flush it to disk."""
    with path.open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, run: str | None = None) -> Iterator[Line]:
    """Yield the lines of a run, by default the last one; incomplete lines from a killed process are skipped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    run = run or (lines[-1]["run"] if lines else None)
    yield from (line for line in lines if line["run"] == run)


def describe(line: Line) -> str:
    """Return a short description of a row's result."""
    if "failed" in line:
        return f"FAILED, {line['failed']}"
    if "absent" in line:
        return f"absent: {line['absent']}"
    parts = []
    if "seconds" in line:
        parts.append(f"{line['seconds'] * 1e6:,.1f} us")
    for key, unit, scale in (("bytes_per_second", "GB/s", 1e9), ("flops_per_second", "TFLOP/s", 1e12)):
        if key in line:
            parts.append(f"{line[key] / scale:,.1f} {unit}")
    if "of_roofline" in line:
        parts.append(f"{line['of_roofline']:.0%} of its roofline")
    if "error" in line:
        parts.append(f"fp64 error {line['error']:.1e}, {line['allowed']:.0e} allowed{'' if line['green'] else ', RED'}")
    return ", ".join(parts) or "done"


def _failure(error: Exception) -> Line:
    if _is_out_of_memory(error):
        return {"absent": "not enough memory"}
    text = (str(error).splitlines() or [""])[0][:200]
    return {"failed": f"{type(error).__name__}: {text}"}


def _is_out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError"


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 3)
