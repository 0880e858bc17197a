"""One phase of the model, warmed up, for Nsight: a forward, a train step, or sampling.

    nsys profile -t cuda,nvtx -c cudaProfilerApi -o train python bench/nsight.py train
    ncu --nvtx --nvtx-include "wbdit@trunk/" -c 12 python bench/nsight.py forward

What lies between is in docs/profiling.md. Without a GPU it runs too, and times the phase.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import click
import torch

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # the baseline is the tests'

from configs import Config, gpu_configs, make_inputs, make_model
from denoisers import ROWS, sample, train_step, trained

from wbdit.trace import nvtx, span

WARM = 3  # compiling and choosing block sizes stay out of the picture


def phases(config: Config, batch: int, device: torch.device, calls: int) -> dict[str, Callable[[], object]]:
    """Return a step of each phase, on the configuration's own sizes and types."""
    row = ROWS["ours, bf16"]
    inputs = make_inputs(config, batch).to(device)

    def model() -> torch.nn.Module:
        return make_model(row.kind, config).to(device)

    def forward() -> Callable[[], object]:
        call = torch.no_grad()(row.call(model().eval()))
        return lambda: call(inputs.x, inputs.t, inputs.y)

    def train() -> Callable[[], object]:
        trainee = model().train()
        return train_step(row.call(trainee), trained(trainee), inputs)

    def sampling() -> Callable[[], object]:
        call = row.call(model().eval())
        return lambda: sample(call, config, inputs, calls)

    return {"forward": forward, "train": train, "sampling": sampling}


@click.command()
@click.argument("phase", type=click.Choice(["forward", "train", "sampling"]))
@click.option("--model", "name", type=click.Choice(["published", "base"]), default="published", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Cells.")
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="Of the phase, recorded.")
@click.option("--calls", type=click.IntRange(min=1), default=15, show_default=True, help="Of the model, in sampling.")
@click.option("--quick", is_flag=True, help="Tiny sizes: tries the script.")
def main(phase: str, name: str, batch: int, steps: int, calls: int, quick: bool) -> None:
    """Run a PHASE of the model between the start and the stop of a profiler."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = phases(gpu_configs(quick)[name], batch, device, calls)[phase]()
    for _ in range(WARM):
        step()
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.cuda.profiler.profile() if gpu else nullcontext():
        for _ in range(steps):
            with span(phase):
                step()
        if gpu:
            torch.cuda.synchronize()
    click.echo(
        f"{phase}, {name}, {batch} cells on {device.type}: {(time.perf_counter() - start) / steps * 1e3:.2f} ms a step"
    )
    if nvtx is None:
        click.echo("no named ranges: pip install nvtx brings them")


if __name__ == "__main__":
    main()
