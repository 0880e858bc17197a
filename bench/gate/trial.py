"""Test the gate itself: HEAD against HEAD, or against a copy with one slowed operation.

    python -m bench.gate.trial --runs 10                           # how often is a row red by mistake?
    python -m bench.gate.trial --runs 5 --plant mssa:1.15          # is the slow operation found and named?

The planted operation busy-waits until its time is multiplied by the given factor. Operations are those of wbdit/ops:
mssa, mssa_backward, gated_adaln, count_nll, and so on. The exit status is 1 if a run without a plant is red, or if no
row of a planted operation is red.
"""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.gate import __main__ as gate
from bench.gate import report, trees
from bench.gate.judge import RED
from bench.gate.process import WorkerError

SLOWER = """
from wbdit.ops import dispatch

def _planted(method, factor):
    import functools
    import time

    @functools.wraps(method)
    def slower(*args, **kwargs):
        start = time.perf_counter()
        out = method(*args, **kwargs)
        until = start + factor * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass
        return out

    return slower


dispatch._adapters["{method}"] = _planted(dispatch._adapters["{method}"], {factor})
"""


def plant(tree: Path, method: str, factor: float) -> None:
    """Slow down an operation of a tree by a factor."""
    ops = tree / "wbdit" / "ops"
    if not any(re.search(rf'define_op\(\s*"{method}"', file.read_text()) for file in ops.glob("*.py")):
        raise trees.TreeError(f"no operation {method} in {ops}: give a name from define_op")
    with (ops / "__init__.py").open("a") as source:
        source.write(SLOWER.format(method=method, factor=factor))


def names_it(result: dict[str, Any], method: str) -> bool:
    """Whether a row of the operation, in its direction, is red."""
    direction = "backward" if method.endswith("_backward") else "forward"
    wanted = f" op {method.removesuffix('_backward')} {direction} "
    return any(wanted in name and row["verdict"] == RED for name, row in result["rows"].items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--plant", metavar="OP:FACTOR", help="operation to slow down, for example mssa:1.15")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the code, no result")
    parser.add_argument("--out", type=Path, default=gate.ROOT / "bench/out/trial.jsonl")
    options = parser.parse_args()
    method, _, factor = (options.plant or "").partition(":")
    failures = 0
    try:
        commit = trees.resolve(gate.ROOT, "HEAD")
        with ExitStack() as stack:
            base, head = (stack.enter_context(trees.files_of(gate.ROOT, commit)) for _ in range(2))
            if method:
                plant(head, method, float(factor or 1.15))
            for number in range(options.runs):
                name = options.plant or "the same"
                result = gate.run(head, base, name, commit[:12], options.quick, absolute=not method)
                report.append(result, options.out)
                right = names_it(result, method) if method else not gate.is_red(result)
                failures += not right
                print(f"run {number + 1}: {'correct' if right else 'WRONG'}, {result['seconds']} s")
                print(report.markdown(result), flush=True)
    except (trees.TreeError, WorkerError, ValueError) as error:
        print(f"trial: {error}", file=sys.stderr)
        return 2
    print(f"{options.runs - failures} of {options.runs} runs correct")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
