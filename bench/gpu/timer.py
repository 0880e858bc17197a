"""Timing on a device; on a GPU, many launches between two CUDA events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

ROUND = 5e-3  # target seconds per round
FEWEST, MOST = 5, 25  # rounds


@dataclass(frozen=True)
class Timer:
    device: torch.device
    quick: bool = False

    def measure(self, step: Callable[[], object], budget: float = 0.4) -> dict[str, Any]:
        """Return a step's median seconds, its fastest and slowest round, and the number of rounds and launches."""
        for _ in range(2):  # warm-up: compilation, autotuning, choices of libraries
            step()
        self.wait()
        start = time.perf_counter()
        step()
        queued = time.perf_counter() - start
        self.wait()
        once = max(time.perf_counter() - start, 1e-6)
        launches = 1 if self.quick else max(1, min(50, int(ROUND / once)))
        rounds = FEWEST if self.quick else max(FEWEST, min(MOST, int(budget / (launches * once))))
        times = [self._round(step, launches, queued) for _ in range(rounds)]
        return {
            "seconds": statistics.median(times),
            "spread": [min(times), max(times)],
            "rounds": rounds,
            "launches": launches,
        }

    def _round(self, step: Callable[[], object], launches: int, queued: float) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(launches):
                step()
            return (time.perf_counter() - start) / launches
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if launches > 1:  # short steps: the GPU sleeps until all are queued, so that it never waits for Python
            torch.cuda._sleep(int(min(2 * queued * launches, 0.1) * 2e9))
        start.record()
        for _ in range(launches):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / launches

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
