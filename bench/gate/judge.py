"""Verdicts from times: red, ungated or fine, row by row.

A row's shift in a generation is the median over its rounds of log(head / base). Only adjacent times are compared,
because a shared machine changes its speed within a second. The row's ratio is the median over the generations. Its
spread is the median difference between two processes of the same code, and its threshold is a multiple of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bench.gate.measure import Rounds, RowTimes

FLOOR = 0.04  # smaller slowdowns are never red: equal code measured 1.03 and 1.05 in a training step
NOISY = 0.05  # no verdict above this spread
BLUNT = 0.12  # no verdict above this log threshold, which a slowdown of 15 % could pass
FACTOR = 4.5  # times spread / sqrt(generations), which is about the ratio's standard error
GENERATIONS = 2  # no verdict with fewer
LEAST = 0.95  # smallest lower quintile of reference / kernel that passes

FINE, FASTER, RED, UNGATED = "ok", "faster", "RED", "ungated"


@dataclass(frozen=True)
class Verdict:
    """The verdict on a row against the base; `ratio` is head's time over base's, from the same rounds."""

    name: str
    verdict: str
    why: str = ""
    ratio: float | None = None
    spread: float | None = None
    threshold: float | None = None

    @property
    def needs_another_look(self) -> bool:
        """Whether more generations could change the verdict: it is red, or its spread or threshold is large."""
        if self.spread is None or self.threshold is None:
            return False
        return self.verdict == RED or self.spread > NOISY / 2 or math.log(self.threshold) > BLUNT / 2


def judge(name: str, times: RowTimes, fewest: int = GENERATIONS) -> Verdict:
    """Return the verdict on one row, ungated if it has fewer than `fewest` generations."""
    if times.failed.get("head"):
        return Verdict(name, UNGATED if "base" in times.failed else RED, f"does not run: {times.failed['head']}")
    if times.failed:
        return Verdict(name, UNGATED, f"does not run at the base: {times.failed['base']}")
    if times.red_check:
        worst = max(times.errors[side] for side in times.red_check)
        sides = " and ".join(times.red_check)
        return Verdict(name, RED, f"{sides}: error {worst:.1e} against fp64, {times.tolerance:.0e} allowed; not timed")
    if len(times.generations) < fewest:
        return Verdict(name, UNGATED, "out of time")
    shifts, differences = _differences(times.generations)
    ratio, spread = float(np.median(shifts)), float(np.median(np.abs(differences)))
    # disagreement between generations is noise too
    apart = float(np.median(np.abs(np.array(shifts) - ratio)))
    threshold = max(FLOOR, FACTOR * max(spread, apart) / math.sqrt(len(shifts)))
    figures = {"ratio": math.exp(ratio), "spread": math.expm1(spread), "threshold": math.exp(threshold)}
    if spread > NOISY or threshold > BLUNT:
        return Verdict(name, UNGATED, "too noisy", **figures)
    # one disturbed generation (a compiler running, for example) must not make a row red
    if ratio > threshold and min(shifts) > threshold / 2:
        return Verdict(name, RED, "slower", **figures)
    faster = ratio < -threshold and max(shifts) < -threshold / 2
    return Verdict(name, FASTER if faster else FINE, **figures)


def _differences(generations: Iterable[Rounds]) -> tuple[list[float], list[float]]:
    """Return log(head / base) per generation, and the log ratio of the two processes of each side."""
    shifts, differences = [], []
    for rounds in generations:
        logs = {process: np.log([one[process] for one in rounds]) for process in rounds[0]}
        base, head = (logs[f"{side} 1"] + logs[f"{side} 2"] for side in ("base", "head"))
        shifts.append(float(np.median(head - base)) / 2)
        differences += [float(np.median(logs[f"{side} 1"] - logs[f"{side} 2"])) for side in ("base", "head")]
    return shifts, differences


@dataclass(frozen=True)
class Absolute:
    """The verdict on an operation against its reference; ratios are the reference's time over the kernel's."""

    name: str
    verdict: str
    why: str = ""
    median: float | None = None
    lower_quintile: float | None = None


def judge_pair(name: str, answer: dict) -> Absolute:
    """Return the verdict on one operation, given a worker's answer to "compare"."""
    if "failed" in answer:
        return Absolute(name, RED, f"does not run: {answer['failed']}")
    if not answer:
        return Absolute(name, UNGATED, "out of time")
    if not answer["error"] <= answer["tolerance"]:
        off = f"error {answer['error']:.1e} against fp64, {answer['tolerance']:.0e} allowed; not timed"
        return Absolute(name, RED, off)
    reference, kernel = (np.array(answer[side]) for side in ("reference", "kernel"))
    ratios = reference.sum(1) / kernel.sum(1)
    median, quintile = float(np.median(ratios)), float(np.quantile(ratios, 0.2))
    if quintile >= LEAST:
        return Absolute(name, FINE, "", median, quintile)
    # the same code against itself: if that ratio fails too, the machine is too noisy for this test
    itself = float(np.quantile(np.concatenate([side[:, 0] / side[:, 1] for side in (reference, kernel)]), 0.2))
    if median >= 1 or (median >= LEAST and itself < LEAST):
        return Absolute(name, UNGATED, f"too noisy: ratio of the same code to itself {itself:.2f}", median, quintile)
    return Absolute(name, RED, "slower than the reference", median, quintile)
