"""The stages of the two parts, in order of importance, each with its limit in seconds.

The limits of a part's stages add up to the part's own: A 330 s, B 240 s. They include the start of the processes, about
6 s each. Later stages may use the time that a stage leaves.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """A stage's function (module, name), the limit of the stage, and the limit of each of its rows, in seconds."""

    where: tuple[str, str]
    limit: float
    row_limit: float


STAGES = {
    # A: correctness, time per kernel, headline
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
    # B: counters, other sizes, peers
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
