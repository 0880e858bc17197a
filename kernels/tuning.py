"""Which block sizes an op takes: the fastest of a few, tried once for a GPU and a class of shapes, then remembered.

The first of the candidates is the one that is reasoned to be best. It is taken untried where there is nothing to time
(another device, a CUDA graph being captured), where ``WBDIT_AUTOTUNE=0`` says so, and when trying has taken too long.
The choices are kept in ``tuning-<GPU>.json`` in the folder of the CPU kernels (``WBDIT_CACHE``, else
``~/.cache/wbdit``); delete it to try again.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from wbdit.ops import build
from wbdit.version import __version__

Candidate = TypeVar("Candidate")
SECONDS = 5.0  # of trying, compiling included, in one op and class of shapes
ROUNDS = 5

_chosen: dict[Hashable, int] = {}


def choose(
    op: str, shape: Sequence[Hashable], candidates: Sequence[Candidate], launch: Callable[[Candidate], Any], device: Any
) -> Candidate:
    """Return the candidate whose launch is fastest.

    Parameters
    ----------
    op, shape
        What the choice is kept under: the op's name, and the class of shapes.
    candidates
        The choices, the expected best first; all give the same results.
    launch
        Runs the op with a candidate; the outputs may be written many times.
    device
        The ``torch.device`` of the tensors.
    """
    if len(candidates) == 1 or device.type != "cuda" or os.environ.get("WBDIT_AUTOTUNE") == "0":
        return candidates[0]
    key = "/".join(map(str, (op, *shape)))
    file = _file(device)
    if (file, key) not in _chosen:
        kept = _load(file).get(key)
        if kept is None or not 0 <= kept < len(candidates):
            if torch.cuda.is_current_stream_capturing():
                return candidates[0]
            kept = _fastest(candidates, launch)
            _save(file, key, kept)
        _chosen[file, key] = kept
    return candidates[_chosen[file, key]]


def _fastest(candidates: Sequence[Candidate], launch: Callable[[Candidate], Any]) -> int:
    """Time the candidates until the time is up; one that does not compile or fit is passed over."""
    start, times = time.monotonic(), {}
    for index, candidate in enumerate(candidates):
        if time.monotonic() - start > SECONDS:
            break
        try:
            times[index] = _seconds(lambda candidate=candidate: launch(candidate))
        except triton.runtime.errors.OutOfResources:
            continue
    return min(times, key=times.__getitem__) if times else 0


def _seconds(launch: Callable[[], Any]) -> float:
    """Return the least of a few rounds by the GPU's clock: what disturbs a launch only makes it longer."""
    launch()
    rounds = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end))
    return min(rounds)


def _file(device: Any) -> Path:
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    return build.cache_folders()[0] / f"tuning-{name}-triton-{triton.__version__}-wbdit-{__version__}.json"


def _load(file: Path) -> dict[str, int]:
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in kept.items() if isinstance(v, int)} if isinstance(kept, dict) else {}


def _save(file: Path, key: str, index: int) -> None:
    """Add a choice to the file, as a whole or not at all; where it cannot be written, this process alone knows."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".tuning.", suffix=".json")
        with os.fdopen(handle, "w") as stream:
            json.dump({**_load(file), key: index}, stream, indent=1, sort_keys=True)
        Path(temporary).replace(file)
    except OSError:
        return
