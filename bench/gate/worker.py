"""One process that times the rows of one tree: requests are lines of JSON on stdin, answers lines of JSON on stdout.

    python bench/gate/worker.py TREE [--quick]

`wbdit` is imported from TREE, the rows from the code beside this file. Requests, by their "do":

    hello                      return the rows and their work, the pairs, the machine, the versions
    prepare row check          prepare a row; with `check`, return its error against fp64 and the tolerance
    visit calls chunks         return the seconds per call, one number per chunk of that many calls
    compare pair rounds until  return the seconds of reference and kernel, each twice per round, within a time limit

If a request raises, its answer has only "failed". The process ends at the end of stdin.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROTOCOL = 1
HERE = Path(__file__).resolve().parent
CHUNK_SECONDS = 0.002  # of a pair; several shorter calls are timed together
ENOUGH, CLEAR = 9, 1.25  # a pair stops after 9 rounds if the kernel was 1.25 times as fast in all of them
LONG_SECONDS = 0.02  # for shorter calls, the faster of two chunks counts


def main(tree: Path, quick: bool) -> None:
    answers = _claim_stdout()
    _use(tree)
    worker = Worker(tree, quick)
    gc.disable()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # concerns this row only; the gate continues with the others
            text = str(error).strip().splitlines() or [""]
            answer = {"failed": f"{type(error).__name__}: {text[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _claim_stdout():
    """Return a stream to stdout for answers, and redirect all other output to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _use(tree: Path) -> None:
    """Import `wbdit` from the tree, even if it is also installed, and the bench's modules from beside this file."""
    sys.path[:0] = [str(tree), str(HERE.parent), str(HERE.parent.parent / "tests")]
    import wbdit

    # a checkout has csrc and kernels beside the package; without this an installed wbdit would provide them
    wbdit.__path__.append(str(tree))
    where = Path(wbdit.__file__).resolve()
    if tree not in where.parents:
        raise SystemExit(f"wbdit was imported from {where}, not from {tree}")


class Worker:
    def __init__(self, tree: Path, quick: bool) -> None:
        import rows

        self.tree = tree
        self.rows = rows.rows(quick)
        self.pairs = rows.pairs(quick)
        self.timed: rows.Timed | None = None

    def hello(self) -> dict[str, Any]:
        import machine

        import wbdit

        _check_origin(self.tree)
        gc.freeze()  # collections between rows skip the libraries' objects
        return {
            "protocol": PROTOCOL,
            "rows": {row.name: row.work for row in self.rows.values()},
            "pairs": list(self.pairs),
            "machine": machine.machine(),
            "versions": machine.versions(),
            "wbdit": str(Path(wbdit.__file__).parent),
        }

    def prepare(self, row: str, check: bool) -> dict[str, Any]:
        self.timed = None  # free the previous row's memory first
        gc.collect()
        self.timed = timed = self.rows[row].ready()
        with _mode(timed.gradient):
            answer = {"error": timed.check(), "tolerance": timed.tolerance} if check else {}
            first = self._chunk(1)
            return {**answer, "seconds": min(first, self._chunk(1))}

    def visit(self, calls: int, chunks: int) -> dict[str, Any]:
        with _mode(self.timed.gradient):
            if calls * chunks > 1:  # warm the CPU caches after other processes
                self._chunk(1)
            return {"seconds": [self._chunk(calls) for _ in range(chunks)]}

    def _chunk(self, calls: int) -> float:
        """Return the mean seconds per call over that many calls."""
        step, fresh = self.timed.step, self.timed.fresh
        if fresh is None:
            return _clock(step, calls)
        seconds = 0.0
        for _ in range(calls):
            given = fresh()
            seconds += _clock(lambda: step(given), 1)  # noqa: B023
        return seconds / calls

    def compare(self, pair: str, rounds: int, until: float) -> dict[str, Any]:
        import wbdit

        deadline = time.perf_counter() + until
        self.timed = None
        gc.collect()
        sides = {name: self.pairs[pair].ready(name) for name in ("reference", "auto")}
        kernel = sides["auto"]
        with _mode(kernel.gradient):
            answer = {"error": kernel.check(), "tolerance": kernel.tolerance}
        found: dict[str, list[tuple[float, float]]] = {"reference": [], "kernel": []}
        if not answer["error"] <= answer["tolerance"]:
            return {**answer, **found}

        def clock(name: str, calls: int, chunks: int) -> float:
            with wbdit.backend(name):
                return min(_clock(sides[name].step, calls) for _ in range(chunks))

        with _mode(kernel.gradient):
            slower = max(clock(name, 1, 2) for name in sides)
            calls, chunks = max(1, round(CHUNK_SECONDS / slower)), 1 if slower > LONG_SECONDS else 2
            for number in range(rounds):
                outer, inner = ("reference", "auto") if number % 2 else ("auto", "reference")
                seconds = [clock(name, calls, chunks) for name in (outer, inner, inner, outer)]
                outside, inside = (seconds[0], seconds[3]), (seconds[1], seconds[2])
                found["reference"].append(outside if number % 2 else inside)
                found["kernel"].append(inside if number % 2 else outside)
                if time.perf_counter() > deadline or (number + 1 >= ENOUGH and _clear(found)):
                    break
        return {**answer, **found}


def _clear(found: dict[str, list[tuple[float, float]]]) -> bool:
    """Whether the kernel was faster by the factor `CLEAR` in every round, so that no more rounds are needed."""
    rounds = zip(found["reference"], found["kernel"], strict=True)
    return all(min(reference) > CLEAR * max(kernel) for reference, kernel in rounds)


def _clock(step: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


@contextlib.contextmanager
def _mode(gradient: bool) -> Iterator[None]:
    """Use the kernels regardless of the environment, with gradients if the row has them."""
    import torch

    import wbdit

    with torch.set_grad_enabled(gradient), wbdit.backend("auto"):
        yield


def _check_origin(tree: Path) -> None:
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] == "wbdit" and file and tree not in Path(file).resolve().parents:
            raise RuntimeError(f"{name} was imported from {file}, not from {tree}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), "--quick" in sys.argv[2:])
