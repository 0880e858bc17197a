"""Autotuning: time a few block sizes of an op once per GPU and class of shapes, and remember the fastest.

The first candidate is the expected best. It is used without timing on other devices, while a CUDA graph is captured,
and with ``WBDIT_AUTOTUNE=0``. Results of complete searches are kept in
``tuning-<GPU>-triton-<version>-wbdit-<version>.json`` in the cache folder of the CPU kernels (``WBDIT_CACHE``, else
``~/.cache/wbdit``). Delete the file to search again.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from wbdit._cache import cache_folders
from wbdit._version import __version__

Candidate = TypeVar("Candidate")
Launch = Callable[[Candidate], Iterable[Any]]
SECONDS = 5.0  # limit of timing per op and class of shapes, without compilation
ROUND = 5e-3  # seconds per round, of at most LAUNCHES launches; a single short launch would measure Python's time
LAUNCHES = 20
ROUNDS = 3

_chosen: dict[Hashable, Any] = {}


def choose(
    op: str, shape: Sequence[Hashable], candidates: Sequence[Candidate], launch: Launch[Candidate], device: torch.device
) -> Candidate:
    """Return the candidate whose launch is fastest.

    Parameters
    ----------
    op, shape
        Key of the choice: the op's name and the class of shapes.
    candidates
        Block sizes, the expected best first. All give the same results and fit the GPU (:mod:`wbdit.kernels.card`).
    launch
        Function that runs the op with a candidate and returns the compiled kernels it launched. It is called many
        times and overwrites the outputs each time.
    device
        Device of the tensors.
    """
    if len(candidates) == 1 or device.type != "cuda" or os.environ.get("WBDIT_AUTOTUNE") == "0":
        return candidates[0]
    key = "/".join(map(str, (op, *shape)))
    file = _file(device)
    if (file, key) not in _chosen:
        kept = _kept(file, key, candidates)
        if kept is None:
            if torch.cuda.is_current_stream_capturing():
                return candidates[0]
            kept, whole = _fastest(candidates, launch)
            if whole:
                _save(file, key, kept, candidates)
        _chosen[file, key] = kept
    return _chosen[file, key]


def _fastest(candidates: Sequence[Candidate], launch: Launch[Candidate]) -> tuple[Candidate, bool]:
    """Compile all candidates and time them within the time limit; return the fastest and whether all were timed.

    A candidate whose launch raises any exception is skipped. One that spills registers is skipped too, unless all do.
    """
    spills: dict[int, int] = {}
    for index, candidate in enumerate(candidates):
        try:
            spills[index] = sum(getattr(kernel, "n_spills", 0) or 0 for kernel in launch(candidate))
        except Exception:
            continue
    tried = [index for index, count in spills.items() if not count] or list(spills)
    start, times = time.monotonic(), dict[int, float]()
    for index in tried:
        if times and time.monotonic() - start > SECONDS:
            break
        times[index] = _seconds(lambda index=index: launch(candidates[index]))
    best = min(times, key=times.__getitem__) if times else 0  # if none works, the first raises its error later
    return candidates[best], bool(times) and len(times) == len(tried)


def _seconds(launch: Callable[[], Any]) -> float:
    """Return the seconds per launch, the minimum over a few rounds, since disturbances only make a round longer.

    The GPU sleeps while the launches are queued, so that it never waits for Python between them.
    """
    torch.cuda.synchronize()
    start = time.perf_counter()
    launch()
    queued = time.perf_counter() - start
    torch.cuda.synchronize()
    launches = max(1, min(LAUNCHES, int(ROUND / max(time.perf_counter() - start, 1e-9))))
    rounds = []
    for _ in range(ROUNDS):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # the argument is in cycles; GPUs have at most 2e9 per second
        torch.cuda._sleep(int(min(2 * launches * queued, 0.1) * 2e9))
        begun.record()
        for _ in range(launches):
            launch()
        ended.record()
        ended.synchronize()
        rounds.append(begun.elapsed_time(ended) / launches / 1e3)
    return min(rounds)


@functools.cache
def _name(device: torch.device) -> str:
    return re.sub(r"\W+", "-", torch.cuda.get_device_name(device))


def _file(device: torch.device) -> Path:
    return _file_in(device, os.environ.get("WBDIT_CACHE"), os.environ.get("XDG_CACHE_HOME"))


@functools.cache
def _file_in(device: torch.device, *_: str | None) -> Path:
    """Return the file of a GPU; cached by the variables that name its folder, since resolving a path takes 0.1 ms."""
    return cache_folders()[0] / f"tuning-{_name(device)}-triton-{triton.__version__}-wbdit-{__version__}.json"


def _kept(file: Path, key: str, candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the choice of an earlier search among exactly these candidates; None if there was none."""
    entry = _load(file).get(key)
    names = [str(candidate) for candidate in candidates]
    if not isinstance(entry, dict) or entry.get("among") != names or entry.get("chosen") not in names:
        return None
    return candidates[names.index(entry["chosen"])]


def _load(file: Path) -> dict[str, Any]:
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _save(file: Path, key: str, chosen: Candidate, candidates: Sequence[Candidate]) -> None:
    """Add a choice to the file atomically; if it cannot be written, only this process remembers the choice."""
    entry = {"chosen": str(chosen), "among": [str(candidate) for candidate in candidates]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".tuning.", suffix=".json")
        with os.fdopen(handle, "w") as stream:
            json.dump({**_load(file), key: entry}, stream, indent=1, sort_keys=True)
        Path(temporary).replace(file)
    except OSError:
        return
