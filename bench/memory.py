"""Peak memory of one row, in MiB above the starting point; bench_memory.py runs it in a fresh process per row.

    python bench/memory.py CONFIG ROW forward|train [--quick]

The starting point is the memory with the model and its inputs, after a tiny model has run the same step to load
libraries and kernels. A train step includes the optimizer's two moments, for every row.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from configs import configs, make_inputs, make_model
from denoisers import ROWS, train_step, trained


def peak() -> float:
    """Return the largest resident size so far, in MiB."""
    try:
        # not ru_maxrss: on Linux it starts at the size of the parent process
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def prepare(row, config, what):
    inputs, model = make_inputs(config), make_model(row.kind, config)
    call = row.call(model)
    if what == "train":
        return train_step(call, trained(model.train()), inputs)

    def forward():
        with torch.no_grad():
            call(inputs.x, inputs.t, inputs.y)

    model.eval()
    return forward


def main(name, row, what, quick):
    with ROWS[row].backend():
        prepare(ROWS[row], configs(quick=True)[name], what)()
        step = prepare(ROWS[row], configs(quick)[name], what)
        before = peak()
        step()
        step()
    print(peak() - before)


if __name__ == "__main__":
    main(*sys.argv[1:4], quick="--quick" in sys.argv)
