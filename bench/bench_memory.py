"""Benchmarks of peak memory: a call and a train step, each in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from denoisers import EAGER

MEASURED = (EAGER, "ours, fp32", "ours, bf16", "DiT, eager fp32")
HERE = Path(__file__).parent


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("what", ["forward", "train"])
def bench_memory(what, name, config, quick, record):
    if quick and (config.name, what, name) != ("published", "forward", EAGER):
        pytest.skip("a quick run starts only one process")
    # the timed row's check, earlier in this run, applies here too
    if f"{config.name} / {what} / {name}" in record.red:
        pytest.fail(f"{config.name} / {what} / {name}: its check is red; not measured", pytrace=False)
    command = [sys.executable, HERE / "memory.py", config.name, name, what, *(["--quick"] if quick else [])]
    paths = os.pathsep.join([str(HERE.parent / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False)
    if done.returncode:
        pytest.fail(f"{config.name} / {what} / {name}: {done.stderr.strip().splitlines()[-1]}", pytrace=False)
    record.add_memory(config.name, what, name, EAGER, float(done.stdout))
