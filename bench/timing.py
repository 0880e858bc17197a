"""Timing of a row: warm up, choose the number of calls per round, run at least five rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

PRODUCTS = 10  # products per timed step


@dataclass(frozen=True)
class Settings:
    """Target seconds per round and per row, and the range of the number of rounds."""

    round_seconds: float = 0.05
    row_seconds: float = 3.0
    fewest: int = 5
    most: int = 25

    def plan(self, step: Callable[[], object]) -> tuple[int, int]:
        """Warm up and return (rounds, iterations per round)."""
        step()
        start = time.perf_counter()
        step()
        seconds = max(time.perf_counter() - start, 1e-7)
        iterations = max(1, math.ceil(self.round_seconds / seconds))
        rounds = int(self.row_seconds / (seconds * iterations))
        return min(max(rounds, self.fewest), self.most), iterations


QUICK = Settings(round_seconds=0.0, row_seconds=0.0)


def quantiles(seconds: list[float], scale: float = 1.0) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentiles of the rounds."""
    return {f"p{q}": float(np.percentile(seconds, q)) * scale for q in (20, 50, 80)}


def clock(step: Callable[[], object]) -> float:
    """Return the seconds that one step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def product(rows: int, d: int, precision: str) -> Callable[[], object]:
    """Return a step of `PRODUCTS` calls of torch.mm on (rows, d) by (d, d), the models' main product."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, d, generator=generator).to(dtype) for n in (rows, d))
    out = torch.empty(rows, d, dtype=dtype)

    def step() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=out)

    return step
