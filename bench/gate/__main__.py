"""The speed gate: is this tree slower than a base commit, or an operation slower than its reference?

    python -m bench.gate BASE [--quick] [--out FILE]

The exit status is 0, 1 if a row is red, and 2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gate import measure, report, trees
from bench.gate.judge import FINE, RED, UNGATED, Absolute, Verdict, judge, judge_pair
from bench.gate.process import Process, WorkerError

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = 1  # worker.py's
GENERATIONS, MORE = 3, 2
ROUNDS = 25
# time limits in seconds from the start: generations, additional generations, operations; under six minutes in total
UNTIL = (205.0, 245.0, 340.0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-gate", description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="Commit to compare with; HEAD for uncommitted changes.")
    parser.add_argument("--quick", action="store_true", help="Tiny sizes: tests the code, no result.")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/out/gate.jsonl", help="File to append the line to.")
    options = parser.parse_args()
    if not options.base:
        print("bench-gate: no base: use make bench-gate BASE=<commit>", file=sys.stderr)
        return 2
    try:
        base = trees.resolve(ROOT, options.base)
        with trees.files_of(ROOT, base) as tree:
            result = run(ROOT, tree, trees.name(ROOT), trees.name(ROOT, base), options.quick)
    except (trees.TreeError, WorkerError) as error:
        print(f"bench-gate: {error}", file=sys.stderr)
        return 2
    text = report.markdown(result)
    print(text)
    report.append_to_job(text)
    report.append(result, options.out)
    return int(is_red(result))


def is_red(result: dict[str, Any]) -> bool:
    return any(found["verdict"] == RED for part in ("rows", "operations") for found in result[part].values())


def run(
    head_tree: Path, base_tree: Path, head: str, base: str, quick: bool = False, absolute: bool = True
) -> dict[str, Any]:
    """Measure and judge two trees and return the history line; without `absolute`, skip the operations."""
    started = time.monotonic()
    until = [started + seconds for seconds in UNTIL]
    greetings, start = _first_workers(head_tree, base_tree, quick)
    facts, common, verdicts = greetings["head"], *_compared(greetings)
    times = {name: measure.RowTimes() for name in common}
    generations = 1 if quick else GENERATIONS
    for number in range(generations):
        part = (until[0] - time.monotonic()) / (generations - number)
        measure.generation(start, common, times, time.monotonic() + part, number == 0, quick)
    for number in range(0 if quick else MORE):
        unsure = [name for name in common if judge(name, times[name]).needs_another_look]
        if unsure:
            part = (until[1] - time.monotonic()) / (MORE - number)
            measure.generation(start, unsure, times, time.monotonic() + part, False)
    verdicts += [judge(name, times[name], 1 if quick else 2) for name in common]
    operations = []
    if absolute:
        with start("head") as worker:
            operations = _absolute(worker, facts["pairs"], until[2], quick)
    seconds = time.monotonic() - started
    return report.line(head, base, facts, verdicts, operations, seconds, quick)


def _first_workers(
    head_tree: Path, base_tree: Path, quick: bool
) -> tuple[dict[str, dict[str, Any]], Callable[[str], Process]]:
    """Build both sides' kernels; return each side's greeting, and a function that starts a worker of a side."""
    places = {
        "head": (measure.worker_script(head_tree), head_tree),
        "base": (measure.worker_script(base_tree), base_tree),
    }
    greetings = {}
    for side in places:
        try:
            greetings[side] = _greet(Process(*places[side], quick))
        except WorkerError as error:
            if side == "head":
                raise WorkerError(f"head: {error}") from error
            # the base is older than the gate or its protocol: this tree's worker times the base's package
            places[side] = (places["head"][0], base_tree)
            try:
                greetings[side] = _greet(Process(*places[side], quick))
            except WorkerError as second:
                raise WorkerError(f"base: {second}") from second
    levels = {side: greeting["machine"]["kernels"] for side, greeting in greetings.items()}
    missing = [side for side, level in levels.items() if level == "none"]
    if missing:
        raise WorkerError(f"no kernels in {' and '.join(missing)}: the gate needs them; `wbdit build` shows why")
    return greetings, lambda side: Process(*places[side], quick)


def _greet(process: Process) -> dict[str, Any]:
    with process:
        greeting = process.ask("hello")
    if greeting.get("failed") or greeting.get("protocol") != PROTOCOL:
        raise WorkerError(greeting.get("failed", "the worker has another protocol"))
    return greeting


def _compared(greetings: dict[str, dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    """Return the rows that both sides share, and an ungated verdict on each row that cannot be compared."""
    head, base = greetings["head"]["rows"], greetings["base"]["rows"]
    apart = {
        **{name: "not at the base" for name in head if name not in base},
        **{name: "at the base only" for name in base if name not in head},
        **{name: "not the same work as at the base" for name in head if name in base and head[name] != base[name]},
    }
    return [name for name in head if name not in apart], [Verdict(name, UNGATED, why) for name, why in apart.items()]


def _absolute(worker: Process, pairs: list[str], until: float, quick: bool) -> list[Absolute]:
    """Judge every operation against its reference; one that fails is measured again, and the better result counts."""
    worker.ask("hello")
    rounds = 3 if quick else ROUNDS
    found = {name: judge_pair(name, a) for name, a in measure.beside_reference(worker, pairs, rounds, until).items()}
    doubtful = [name for name, one in found.items() if one.lower_quintile is not None and one.verdict != FINE]
    for name, answer in measure.beside_reference(worker, doubtful, rounds, until).items():
        again = judge_pair(name, answer)
        if again.lower_quintile is not None and again.lower_quintile > found[name].lower_quintile:
            found[name] = again
    return list(found.values())


if __name__ == "__main__":
    sys.exit(main())
