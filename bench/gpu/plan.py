"""The stages of the two parts, in the order of what they are worth, each with its limit in seconds.

The limits of a part add up to its own: A 330 s, B 240 s. They hold the start of the processes, some 6 s each. What a
stage leaves of its time, later ones may use.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Where a stage's function is, how long the stage may take, and how long a row of it."""

    where: tuple[str, str]
    limit: float
    row_limit: float


STAGES = {
    # A: is it right, where does the time go, the headline
    "card": Plan(("ceilings", "card"), 15, 12),
    "compile": Plan(("precompile", "compile_all"), 35, 30),
    "ceilings": Plan(("ceilings", "ceilings"), 20, 10),
    "checks": Plan(("checks", "checks"), 55, 25),
    "launches": Plan(("launches", "launches"), 45, 10),
    "headline": Plan(("denoisers_gpu", "headline"), 60, 40),
    "blocks": Plan(("denoisers_gpu", "blocks"), 15, 8),
    "profile": Plan(("profiles", "profiles"), 20, 15),
    "end to end": Plan(("end_to_end", "end_to_end"), 35, 60),
    "sanitizer": Plan(("tools", "sanitizer"), 30, 40),
    # B: after what A taught
    "counters": Plan(("tools", "counters"), 55, 30),
    "again": Plan(("denoisers_gpu", "again"), 25, 20),
    "batches": Plan(("denoisers_gpu", "batches"), 45, 25),
    "base": Plan(("denoisers_gpu", "base"), 40, 25),
    "peers": Plan(("denoisers_gpu", "peers"), 40, 15),
}
PARTS = {
    "A": (
        "card",
        "compile",
        "ceilings",
        "checks",
        "launches",
        "headline",
        "blocks",
        "profile",
        "end to end",
        "sanitizer",
    ),
    "B": ("card", "ceilings", "again", "batches", "base", "peers", "counters"),
}
SECONDS = {"A": 330, "B": 240}
