"""The parent process of a run: it runs each stage in its own process, with a time limit, and restarts failed stages.

    bench/gpu.sh A                                # correctness, time per kernel, headline: at most 330 s
    bench/gpu.sh B                                # counters, other sizes, peers: at most 240 s
    bench/gpu.sh A --device cpu --quick           # rehearses the run; TRITON_INTERPRET=1 includes the kernels

Each row appends a line to gpu-A.jsonl or gpu-B.jsonl when it ends. The report gpu-A.md or gpu-B.md is written from them
at the end, and by `python bench/gpu/report.py FILE` at any time. The exit status is 1 if a row is red or failed. This
process does not import torch, so only a stage can hang or crash.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from plan import PARTS, SECONDS, STAGES
from report import write_report
from rows import FAULTS, POISONED, append, read

HERE = Path(__file__).resolve().parent
POLL = 0.1
LEAST = 5.0  # no process is started with fewer seconds left
START = 30.0  # seconds that a process may take until its first row


@dataclass
class Run:
    """One run of a part."""

    name: str
    path: Path
    arguments: list[str]
    faults: list[str]
    deadline: float
    row_limit: float | None = None

    @property
    def now(self) -> Path:
        return self.path.with_suffix(".now")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def stage(self, stage: str, later: float) -> None:
        """Run a stage until it ends or its time is up; a row that ends a process is recorded and skipped."""
        ends = time.monotonic() + max(STAGES[stage].limit, self.left() - later)
        ends = min(ends, self.deadline)
        broken: list[str] = []
        while True:
            if ends - time.monotonic() < LEAST:
                self.note(stage, "the rest", absent="the time was up")
                return
            why = self._process(stage, ends, broken)
            if why is None:
                return
            if why != "poisoned":  # a row that poisons the context writes its own line
                row = self.now.read_text() if self.now.exists() else "start"
                self.note(stage, row, failed=why)
                broken.append(row)
                if row == "start":
                    return

    def _process(self, stage: str, ends: float, broken: list[str]) -> str | None:
        """Run one process of a stage; return the reason if it ended early, else None."""
        self.now.unlink(missing_ok=True)
        done = {line["row"] for line in read(self.path, self.name) if line["stage"] == stage} | set(broken)
        command = [sys.executable, HERE / "stage.py", stage, "--file", self.path, "--run", self.name, *self.arguments]
        command += [word for row in done for word in ("--done", row)]
        prefix = f"{stage}/"
        command += [word for f in self.faults if f.startswith(prefix) for word in ("--fault", f.removeprefix(prefix))]
        process = subprocess.Popen([str(word) for word in command], start_new_session=True)
        try:
            return self._watch(process, self.row_limit or STAGES[stage].row_limit, ends)
        finally:
            _kill(process)

    def _watch(self, process: subprocess.Popen[bytes], row_limit: float, ends: float) -> str | None:
        started = time.time()
        while process.poll() is None:
            time.sleep(POLL)
            begun, limit = (self.now.stat().st_mtime, row_limit) if self.now.exists() else (started, START)
            if time.time() - begun > limit:
                return f"no end within {limit:g} s"
            if time.monotonic() > ends:
                return "the stage's time was up"
        if process.returncode == 0:
            return None
        if process.returncode == POISONED:
            return "poisoned"
        code = process.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def note(self, stage: str, row: str, **facts: str) -> None:
        """Append a line for a row that could not write one."""
        append(self.path, {"run": self.name, "stage": stage, "row": row, **facts})
        print(f"{stage}: {row}: {', '.join(f'{k}: {v}' for k, v in facts.items())}", flush=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _has_gpu() -> bool:
    """Return whether a GPU is available; checked in a separate process, which may hang."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    try:
        return subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description="Check and time everything on a GPU.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=HERE.parent / "out")
    parser.add_argument("--seconds", type=float, help="time limit of the run; default 330 for A, 240 for B")
    parser.add_argument("--device", default="cuda", help="cpu rehearses the run")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a rehearsal, no result")
    parser.add_argument("--cells", type=Path, default=HERE.parent.parent / "demo" / "train.h5ad", help="to train on")
    parser.add_argument("--only", action="append", choices=STAGES, help="run only this stage; may be repeated")
    parser.add_argument("--row-limit", type=float, help="seconds per row, instead of each stage's own limit")
    parser.add_argument(
        "--fault", action="append", default=[], metavar="STAGE/ROW=FAULT", help=f"simulate a fault: {', '.join(FAULTS)}"
    )
    given = parser.parse_args()
    for fault in given.fault:
        stage, _, kind = fault.partition("/")[0], *fault.rpartition("=")[1:]
        if stage not in STAGES or kind not in FAULTS:
            parser.error(f"invalid fault {fault!r}: give STAGE/ROW=FAULT with one of {', '.join(FAULTS)}")
    return given


def main() -> int:
    """Run the part that the command line names."""
    given = _parse()
    if importlib.util.find_spec("torch") is None:
        print("no module torch: install it, or use a Python that has it: PYTHON=... bench/gpu.sh A", file=sys.stderr)
        return 2
    begun = time.monotonic()
    if given.device == "cuda" and not _has_gpu():
        print("no GPU: torch.cuda.is_available() is False; use --device cpu --quick to rehearse", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"gpu-{given.part}.jsonl"
    arguments = ["--device", given.device, "--cells", str(given.cells.absolute()), *(["--quick"] * given.quick)]
    name = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    deadline = begun + (given.seconds or SECONDS[given.part])
    run = Run(name, path, arguments, given.fault, deadline, given.row_limit)
    stages = [stage for stage in PARTS[given.part] if given.only is None or stage in ("card", *given.only)]
    for i, stage in enumerate(stages):
        start = time.monotonic()
        run.stage(stage, later=sum(STAGES[s].limit for s in stages[i + 1 :]))
        append(path, {"run": name, "stage": stage, "row": "whole stage", "wall": round(time.monotonic() - start, 1)})
    run.now.unlink(missing_ok=True)
    print(write_report(path))
    return 1 if any("failed" in line or line.get("green") is False for line in read(path, name)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
