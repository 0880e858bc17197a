"""Use wbdit from the source tree, installed or not; scripts for a machine with a GPU import this first.

In an installation, `kernels/` and `csrc/` are `wbdit.kernels` and `wbdit.csrc`. In an unpacked tree, this module adds
the folder that holds them to the package's search path.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]  # tests/ has the baseline

import wbdit

if importlib.util.find_spec("wbdit.kernels") is None:
    wbdit.__path__.append(str(ROOT))
