"""One stage of a run, in its own process; `run.py` starts it, and restarts it after a failure."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import uninstalled  # noqa: F401  first: it sets the import paths
from plan import STAGES
from precision import exact_fp32
from rows import Rows
from setting import Setting

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def main() -> None:
    """Run the stage that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--cells", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--done", action="append", default=[])
    parser.add_argument("--fault", action="append", default=[])
    given = parser.parse_args()
    exact_fp32()
    if INTERPRETED:
        interpret()
    probe = torch.cuda.synchronize if given.device == "cuda" else lambda: None
    rows = Rows(
        given.file, given.run, given.stage, set(given.done), dict(f.rsplit("=", 1) for f in given.fault), probe=probe
    )
    module, function = STAGES[given.stage].where
    getattr(importlib.import_module(module), function)(Setting(rows, given.device, given.quick, given.cells))


def interpret() -> None:
    """Make Triton's interpreter run on CPU tensors, so that a rehearsal includes the GPU's launches."""
    import interpreter

    from wbdit.ops import triton as engine

    interpreter.install()
    engine.register("cpu")


if __name__ == "__main__":
    main()
