"""The parent of a run: each stage in a process of its own, with a limit, begun again where it broke off.

    bench/gpu.sh A                                # is it right, where does the time go, the headline: at most 330 s
    bench/gpu.sh B                                # counters, other sizes, peers: at most 240 s
    bench/gpu.sh A --device cpu --quick           # rehearses it; with TRITON_INTERPRET=1 the kernels too

Lines are appended to gpu-A.jsonl or gpu-B.jsonl as rows end; gpu-A.md is made of them at the end, and by
`python bench/gpu/report.py FILE` at any time. Exit status 1 where a row is red or failed. This process loads no torch:
what hangs or crashes is a stage.
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
LEAST = 5.0  # seconds under which no process is started
START = 30.0  # seconds that a process may take to its first row


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
        """Run a stage to its end, or until its time is up; a row that broke it off is named and left out."""
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
            if why != "poisoned":  # then the row has its line
                row = self.now.read_text() if self.now.exists() else "start"
                self.note(stage, row, failed=why)
                broken.append(row)
                if row == "start":
                    return

    def _process(self, stage: str, ends: float, broken: list[str]) -> str | None:
        """Run one process of a stage; return why it ended early, None where it did not."""
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
        """Append a line about a row that could not write its own."""
        append(self.path, {"run": self.name, "stage": stage, "row": row, **facts})
        print(f"{stage}: {row}: {', '.join(f'{k}: {v}' for k, v in facts.items())}", flush=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _has_gpu() -> bool:
    """Ask in a process of its own, which may hang without hanging this one."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    try:
        return subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description="Check and time everything on a GPU.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=HERE.parent / "out")
    parser.add_argument("--seconds", type=float, help="limit of the whole; by default 330 for A, 240 for B")
    parser.add_argument("--device", default="cuda", help="cpu rehearses the run")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a rehearsal, no result")
    parser.add_argument("--cells", type=Path, default=HERE.parent.parent / "demo" / "train.h5ad", help="to train on")
    parser.add_argument("--only", action="append", choices=STAGES, help="a stage, as often as needed")
    parser.add_argument("--row-limit", type=float, help="seconds per row, in place of each stage's own")
    parser.add_argument(
        "--fault", action="append", default=[], metavar="STAGE/ROW=FAULT", help=f"to rehearse: {', '.join(FAULTS)}"
    )
    given = parser.parse_args()
    for fault in given.fault:
        stage, _, kind = fault.partition("/")[0], *fault.rpartition("=")[1:]
        if stage not in STAGES or kind not in FAULTS:
            parser.error(f"no fault {fault!r}: give STAGE/ROW=FAULT with one of {', '.join(FAULTS)}")
    return given


def main() -> int:
    """Run a part."""
    given = _parse()
    if importlib.util.find_spec("torch") is None:
        print("no module torch: install it, or name a Python that has it, PYTHON=... bench/gpu.sh A", file=sys.stderr)
        return 2
    begun = time.monotonic()
    if given.device == "cuda" and not _has_gpu():
        print(
            "no GPU here: torch.cuda.is_available() is False. --device cpu --quick rehearses the run.", file=sys.stderr
        )
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
