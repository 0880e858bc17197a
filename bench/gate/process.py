"""The gate's interface to a worker process: start it, send requests, report a failure in one line."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PATIENCE = 240.0  # seconds to wait for one answer; the first includes compiling the kernels


class WorkerError(RuntimeError):
    """A worker exited or does not answer; the message is one line."""


class Process:
    """A worker process of one tree; if the tree has no worker script, it runs another tree's."""

    def __init__(self, script: Path, tree: Path, quick: bool = False) -> None:
        self.script, self.tree, self.quick = script, tree, quick
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (close() closes it)
        # OpenMP threads spin while they wait for each other. If another program takes a core, a call of 20 ms then
        # takes 400 ms. Sleeping threads cost some microseconds, the same in every process.
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} | {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(tree), *(["--quick"] if quick else [])],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
        )

    def send(self, do: str, **request: Any) -> None:
        try:
            self._process.stdin.write((json.dumps({"do": do, **request}) + "\n").encode())
        except OSError as error:
            raise self._error("the worker exited") from error

    def receive(self) -> dict[str, Any]:
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
            part = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                raise self._error("the worker exited" if ready else f"no answer in {PATIENCE:.0f} seconds")
            line += part
        return json.loads(line)

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        self.send(do, **request)
        return self.receive()

    def close(self) -> None:
        """Kill the process; it needs no cleanup."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            stream.close()

    def _error(self, what: str) -> WorkerError:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return WorkerError(f"{what}: {lines[-1][:300]}" if lines else what)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
