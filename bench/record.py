"""The results of a run: rows, memory, absent rows, and ratios computed from times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from machine import commit, machine, versions
from results import FORMAT
from timing import PRODUCTS, Settings, clock, product, quantiles

import wbdit


@dataclass(frozen=True)
class Subject:
    """One row before timing: its names, its baseline, and its tolerance.

    `scale` converts the time of a step into the row's time if the step is only a part of it; `baseline_scale` does so
    for the baseline. `flops` is the row's FLOP count. Its floor is the time that matrix products of shape `product` =
    (rows, d) need for as many FLOPs.
    """

    config: str
    what: str
    name: str
    baseline: str
    precision: str
    tolerance: float
    flops: int | None = None
    product: tuple[int, int] = (1, 1)
    ours: bool = False
    scale: float = 1.0
    baseline_scale: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.config} / {self.what} / {self.name}"

    @property
    def baseline_id(self) -> str:
        return f"{self.config} / {self.what} / {self.baseline}"


class Record:
    """All measurements of one run."""

    def __init__(self, quick: bool, settings: Settings) -> None:
        self.quick = quick
        self.settings = settings
        self.rows: dict[str, dict[str, Any]] = {}
        self.memory: list[dict[str, Any]] = []
        self.absent: list[dict[str, Any]] = []
        self.red: set[str] = set()  # ids of rows whose check failed
        self.products: dict[tuple[int, int, str], list[float]] = {}
        self._steps: dict[tuple[int, int, str], Callable[[], object]] = {}

    def add(
        self,
        subject: Subject,
        times: list[float],
        iterations: int,
        error: float,
        baselines: list[float] | None = None,
        products: list[float] | None = None,
    ) -> None:
        """Add a row; its ratios use the baseline and product times measured before each of its rounds."""
        row = {
            "id": subject.id,
            "config": subject.config,
            "what": subject.what,
            "name": subject.name,
            "ours": subject.ours,
            "precision": subject.precision,
            "seconds": quantiles(times, subject.scale),
            "rounds": len(times),
            "iterations": iterations,
            "error": error,
            "tolerance": subject.tolerance,
            "baseline": subject.baseline_id,
            "ratio_to_eager": _paired(baselines, times, subject.baseline_scale / subject.scale),
            "fraction_of_floor": None,
            **subject.facts,
        }
        if subject.flops is not None:
            rows, d = subject.product
            share = subject.flops / (2 * rows * d * d) / subject.scale
            here = [share * seconds for seconds in products or self.product_seconds(rows, d, subject.precision)]
            row["fraction_of_floor"] = _paired(here, times) if products else float(np.median(here) / np.median(times))
        self.rows[subject.id] = row

    def add_floor(self, subject: Subject, precision: str) -> None:
        """Add the arithmetic floor of a row as a separate row."""
        name = f"arithmetic floor, {precision}"
        identity = f"{subject.config} / {subject.what} / {name}"
        self.rows[identity] = {
            "id": identity,
            "config": subject.config,
            "what": subject.what,
            "name": name,
            "ours": False,
            "precision": precision,
            "seconds": self._floor(subject, precision),
            "flops": subject.flops,
            "baseline": subject.baseline_id,
            "fraction_of_floor": 1.0,
        }

    def add_memory(self, config: str, what: str, name: str, baseline: str, mib: float) -> None:
        identity = f"{config} / {what} / {name}"
        row = {"id": identity, "config": config, "what": what, "name": name, "mib": mib}
        self.memory.append({**row, "baseline": f"{config} / {what} / {baseline}"})

    def as_json(self) -> dict[str, Any]:
        rows = [{**row, "ratio_to_eager": row.get("ratio_to_eager") or self._ratio(row)} for row in self.rows.values()]
        for row in rows:
            if "ratio_of_sampler" in row and row["ratio_to_eager"] is not None:
                row["ratio_of_kernels"] = row["ratio_to_eager"] / row["ratio_of_sampler"]
        return {
            "format": FORMAT,
            "quick": self.quick,
            "commit": commit(),
            "versions": versions(),
            "machine": machine(),
            "backends": wbdit.ops.serving("cpu"),
            "products": [
                {
                    "rows": rows,
                    "d": d,
                    "precision": precision,
                    "gflops": 2e-9 * rows * d * d / float(np.median(seconds)),
                }
                for (rows, d, precision), seconds in self.products.items()
            ],
            "rows": rows,
            "memory": [{**row, "ratio_to_eager": self._memory_ratio(row)} for row in self.memory],
            "absent": self.absent,
        }

    def product_step(self, rows: int, d: int, precision: str) -> Callable[[], object]:
        key = (rows, d, precision)
        if key not in self._steps:
            self._steps[key] = product(rows, d, precision)
        return self._steps[key]

    def product_seconds(self, rows: int, d: int, precision: str) -> list[float]:
        """Return the seconds of one product of (rows, d) by (d, d), measured once per run."""
        key = (rows, d, precision)
        if key not in self.products:
            step = self.product_step(*key)
            count, _ = self.settings.plan(step)
            self.products[key] = [clock(step) / PRODUCTS for _ in range(count)]
        return self.products[key]

    def _floor(self, subject: Subject, precision: str) -> dict[str, float]:
        rows, d = subject.product
        return quantiles(self.product_seconds(rows, d, precision), subject.flops / (2 * rows * d * d))

    def _memory_ratio(self, row: dict[str, Any]) -> float | None:
        eager = next((other["mib"] for other in self.memory if other["id"] == row["baseline"]), None)
        return row["mib"] / eager if eager else None

    def _ratio(self, row: dict[str, Any]) -> float | None:
        baseline = self.rows.get(row["baseline"])
        return baseline["seconds"]["p50"] / row["seconds"]["p50"] if baseline else None


def _paired(before: list[float] | None, times: list[float], scale: float = 1.0) -> float | None:
    """Return the median ratio of the time before each round to the round's own; both had the same machine load."""
    return float(np.median(np.divide(before, times))) * scale if before else None
