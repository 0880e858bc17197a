"""Use wbdit where it lies, installed or not: scripts for a machine with a GPU import this first.

Installed, `kernels/` and `csrc/` are `wbdit.kernels` and `wbdit.csrc`. In an unpacked tree the package's search path is
given the folder that holds them.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]  # the baseline is the tests'

import wbdit

if importlib.util.find_spec("wbdit.kernels") is None:
    wbdit.__path__.append(str(ROOT))
