"""Measurement: generations of fresh processes time the rows, each in rounds of base and head.

Two processes of the same code can differ by a few percent because their memory layout differs. A generation therefore
has two processes per side. The difference within a side estimates the noise of the difference between sides.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gate.process import Process

SIDES = ("base", "head")
PROCESSES = ("base 1", "head 1", "head 2", "base 2")
# each process runs before and after every other one equally often
ORDERS = ((0, 1, 2, 3), (2, 3, 0, 1), (1, 0, 3, 2), (3, 2, 1, 0))
VISIT_SECONDS = 0.015
CHUNK_SECONDS = 0.002
FEWEST, MOST = 4, 24  # rounds per row and generation

Rounds = list[dict[str, float]]  # seconds per call, by process


@dataclass
class RowTimes:
    """Measurements of a row: rounds by generation, each side's error, and the reason if a side failed."""

    generations: list[Rounds] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    tolerance: float = math.inf
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def red_check(self) -> list[str]:
        return [side for side, error in self.errors.items() if not error <= self.tolerance]

    @property
    def timeable(self) -> bool:
        return not self.failed and not self.red_check


def generation(
    start: Callable[[str], Process],
    names: Iterable[str],
    times: dict[str, RowTimes],
    deadline: float,
    check: bool,
    quick: bool = False,
) -> None:
    """Time the rows in four fresh processes until the deadline; a row that gets no round is left unchanged."""
    left = [name for name in names if times[name].timeable]
    with ExitStack() as stack:
        workers = {name: stack.enter_context(start(name.split()[0])) for name in PROCESSES}
        for worker in workers.values():  # all at once, so that they load libraries in parallel
            worker.send("hello")
        for worker in workers.values():
            worker.receive()
        for number, name in enumerate(left):
            now = time.monotonic()
            if now >= deadline:
                return
            _row(workers, name, times[name], now if quick else now + (deadline - now) / (len(left) - number), check)


def _row(workers: dict[str, Process], name: str, times: RowTimes, until: float, check: bool) -> None:
    seconds = _prepare(workers, name, times, check)
    if not times.timeable:
        return
    calls = max(1, round(CHUNK_SECONDS / seconds))
    chunks = max(1, round(VISIT_SECONDS / (calls * seconds)))
    rounds: Rounds = []
    while len(rounds) < MOST:
        order = ORDERS[len(rounds) % len(ORDERS)]
        visits = {p: workers[p].ask("visit", calls=calls, chunks=chunks) for p in (PROCESSES[i] for i in order)}
        if any("failed" in visit for visit in visits.values()):
            times.failed |= {p.split()[0]: visit["failed"] for p, visit in visits.items() if "failed" in visit}
            return
        rounds.append({p: typical(visits[p]["seconds"]) for p in PROCESSES})
        if len(rounds) >= FEWEST and time.monotonic() > until:
            break
    times.generations.append(rounds)


def _prepare(workers: dict[str, Process], name: str, times: RowTimes, check: bool) -> float:
    """Prepare the row in all workers and return the seconds per call; with `check`, compare each side with fp64."""
    answers = {}
    for process, worker in workers.items():  # one at a time, so that each has all cores
        answers[process] = worker.ask("prepare", row=name, check=check and process.endswith("1"))
    for process, answer in answers.items():
        side = process.split()[0]
        if "failed" in answer:
            times.failed[side] = answer["failed"]
        if "error" in answer:
            times.errors[side], times.tolerance = answer["error"], answer["tolerance"]
    return statistics.median([answer.get("seconds", math.inf) for answer in answers.values()])


def typical(chunks: list[float]) -> float:
    """Return the lower quartile, since disturbances only make a chunk slower."""
    ordered = sorted(chunks)
    return ordered[(len(ordered) - 1) // 4]


def beside_reference(worker: Process, pairs: Iterable[str], rounds: int, deadline: float) -> dict[str, dict[str, Any]]:
    """Return the paired rounds of each operation and its reference; empty for an operation that was not reached."""
    found: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        now = time.monotonic()
        found[pair] = worker.ask("compare", pair=pair, rounds=rounds, until=deadline - now) if now < deadline else {}
    return found


def worker_script(tree: Path) -> Path:
    return tree / "bench" / "gate" / "worker.py"
