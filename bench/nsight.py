"""Run one phase of the model, after a warm-up, under Nsight: a forward, a train step, or sampling.

    nsys profile -t cuda,nvtx -c cudaProfilerApi -o train python bench/nsight.py train
    ncu --nvtx --nvtx-include "denoise/" -c 20 python bench/nsight.py forward

docs/profiling.md explains the recorded ranges. The script runs from an unpacked tree and needs only torch, triton and
numpy. Without a GPU it times the phase.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import uninstalled  # noqa: F401  first: it sets the import paths
from configs import Config, gpu_configs, make_inputs, make_model
from denoisers import ROWS, sample, train_step, trained

from wbdit.profiling import nvtx, span

WARM = 3  # steps before recording, so that compilation and autotuning are not recorded


def phases(config: Config, batch: int, device: torch.device, calls: int) -> dict[str, Callable[[], object]]:
    """Return a factory of each phase's step, for the configuration's sizes."""
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


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a phase of the model between the profiler's start and stop.")
    parser.add_argument("phase", choices=["forward", "train", "sampling"])
    parser.add_argument("--model", choices=["published", "base"], default="published")
    parser.add_argument("--batch", type=positive, default=256, help="cells per batch")
    parser.add_argument("--steps", type=positive, default=3, help="recorded steps of the phase")
    parser.add_argument("--calls", type=positive, default=15, help="calls of the model per sampling path")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the script")
    return parser.parse_args()


def main() -> None:
    """Warm up, then run the phase between the profiler's start and stop."""
    given = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = phases(gpu_configs(given.quick)[given.model], given.batch, device, given.calls)[given.phase]()
    for _ in range(WARM):
        step()
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.cuda.profiler.profile() if gpu else nullcontext():
        for _ in range(given.steps):
            with span(given.phase):
                step()
        if gpu:
            torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - start) / given.steps * 1e3
    print(f"{given.phase}, {given.model}, {given.batch} cells on {device.type}: {milliseconds:.2f} ms per step")
    if nvtx is None:
        print('the NVTX ranges have no domain: use ncu --nvtx-include "denoise/", not "wbdit@denoise/"')


if __name__ == "__main__":
    main()
