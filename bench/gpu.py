"""Everything there is to know of the kernels on a GPU, in one run of some minutes: `bench/gpu.sh`.

First the card's own ceilings, then the agreement of every operation and of the denoiser with fp64, then times: the
denoiser's forward, its train step and sampling, at three batch sizes of the published model and of the preset `base`,
beside the published formula and DiT. Needs torch, triton and numpy alone. Writes gpu.json and gpu.md; a row is timed
only after its check, and where the time is up, what is left is named as absent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # the baseline is the tests'

import flops
from agreement import TOLERANCE, gradient_error, relative_error
from configs import Config, gpu_configs, make_inputs, make_model
from denoisers import EAGER, GPU_ROWS, Expected, Row, gradients_of, sample, train_step, trained
from machine import commit, versions
from operations import OPERATIONS, Draw, Operation, cast

import wbdit
from wbdit import ops
from wbdit.graphs import Graphed

CALLS = 15


@dataclass
class Run:
    """What is measured on, for how long, and what came out."""

    device: torch.device
    deadline: float
    quick: bool
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, str]] = field(default_factory=list)

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def attempt(self, what: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Add a row; name it as absent where the time is up, the memory does not suffice, or something fails."""
        if self.late():
            self.absent.append({"what": what, "why": "the time was up"})
            return
        try:
            row = {"what": what, **measure()}
        except torch.OutOfMemoryError:
            self.absent.append({"what": what, "why": "not enough memory"})
        except Exception as error:  # a failure of one row must not take the others along
            first = (str(error).splitlines() or [""])[0][:160]
            self.absent.append({"what": what, "why": f"FAILED, {type(error).__name__}: {first}"})
        else:
            self.rows.append(row)
            print(f"{what}: {describe(row)}", flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, step: Callable[[], object], budget: float = 1.5) -> list[float]:
        """Time a step at least five times, by the device's own clock."""
        step()
        self.wait()
        first = self.clock(step)
        rounds = 5 if self.quick else min(50, max(5, int(budget / max(first, 1e-6))))
        return [self.clock(step) for _ in range(rounds)]

    def clock(self, step: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def describe(row: dict[str, Any]) -> str:
    parts = []
    if "seconds" in row:
        parts.append(f"{row['seconds'] * 1e3:.3f} ms")
    if "error" in row:
        parts.append(f"off fp64 by {row['error']:.1e} of {row['allowed']:.0e}{'' if row['green'] else ', RED'}")
    return ", ".join(parts)


# the card


def measure_ceilings(run: Run) -> None:
    """Measure what a copy moves and what a product reaches, on random data larger than any cache."""
    n = 2**16 if run.quick else 2**29
    source = torch.randn(n // 4, device=run.device)
    target = torch.empty_like(source)
    copied = statistics.median(run.seconds(lambda: target.copy_(source), 0.5))
    run.ceilings["copy_bytes_per_second"] = 2 * source.nbytes / copied
    size = 256 if run.quick else 8192
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=run.device).to(dtype) for _ in range(2))
        multiplied = statistics.median(run.seconds(lambda a=a, b=b: torch.mm(a, b), 0.5))
        run.ceilings[f"{name}_flops_per_second"] = 2 * size**3 / multiplied


# agreement


def checked(error: float, allowed: float) -> dict[str, Any]:
    return {"error": error, "allowed": allowed, "green": error <= allowed}  # NaN is red


def check_operation(run: Run, op: Operation, precision: str, config: Config) -> dict[str, Any]:
    """Compare an operation, and its gradients where it has them, with the reference in fp64 at the same inputs."""
    values = {k: v.to(run.device) for k, v in cast(op.make(Draw(config)), precision).items()}
    wide = cast(values, "fp64")
    allowed = TOLERANCE[precision]["forward"]
    if not op.gradient:
        with torch.no_grad():
            found = op.run(values)
            with wbdit.backend("reference"):
                return checked(relative_error(found, op.run(wide)), allowed)
    found, gradients = op.differentiate(values)
    with wbdit.backend("reference"):
        expected, right = op.differentiate(wide)
    slack = TOLERANCE[precision]["gradient"] / allowed
    return checked(max(relative_error(found, expected), gradient_error(gradients(), right()) / slack), allowed)


# denoisers


def check_denoiser(run: Run, row: Row, config: Config, task: str) -> dict[str, Any]:
    """Compare a row with the same formula in fp64 on a few cells."""
    inputs = make_inputs(config, 4).to(run.device)
    expected = Expected(row, config, run.device)
    model = make_model(row.kind, config).to(run.device)
    with row.backend():
        if task == "train":
            gradients_of(row.call(model.train()), inputs)
            error = gradient_error([p.grad for p in trained(model)], expected.gradients(inputs))
            return checked(error, TOLERANCE[row.precision]["gradient"])
        with torch.no_grad():
            error = relative_error([row.call(model.eval())(inputs.x, inputs.t, inputs.y)], [expected.forward(inputs)])
        return checked(error, TOLERANCE[row.precision]["forward"])


def measure_denoiser(run: Run, row: Row, config: Config, batch: int, task: str) -> dict[str, Any]:
    check = check_denoiser(run, row, config, "forward" if task == "sampling" else task)
    found = {"config": config.name, "batch": batch, "task": task, "row": row.name, **check}
    if not check["green"]:
        return found
    model = make_model(row.kind, config).to(run.device).train(task == "train")
    inputs = make_inputs(config, batch).to(run.device)
    sizes = config.sizes(row.blocks, batch)
    call = row.call(Graphed(model) if task == "sampling" else model)  # as the generator samples
    with row.backend():
        if task == "train":
            times = run.seconds(train_step(call, trained(model), inputs))
            count = flops.train(sizes)
        else:
            with torch.no_grad():
                step = (
                    (lambda: call(*inputs[:3])) if task == "forward" else (lambda: sample(call, config, inputs, CALLS))
                )
                times = run.seconds(step)
            count = flops.forward(sizes) * (CALLS if task == "sampling" else 1)
    seconds = statistics.median(times)
    floor = count / run.ceilings[f"{row.precision}_flops_per_second"]
    found |= {"seconds": seconds, "spread": [min(times), max(times)], "flops": count, "of_floor": floor / seconds}
    return found | ({"cells_per_second": batch / seconds} if task == "sampling" else {})


# all of it


def measure(run: Run) -> None:
    measure_ceilings(run)
    every, batches = gpu_configs(run.quick), (2, 4) if run.quick else (16, 256, 1024)
    config = every["published"]
    for op in OPERATIONS.values():
        for precision in op.precisions:
            what = f"op {op.name} {precision}"
            run.attempt(what, lambda o=op, p=precision: {"op": o.name, **check_operation(run, o, p, config)})
    # the largest published batch first: it is what the rest is judged by
    for config in every.values():
        for batch in reversed(batches):
            for task in ("forward", "train", "sampling"):
                for row in GPU_ROWS.values():
                    # torch.compile takes half a minute a shape, so it has one batch size
                    if row.compiled and (batch != max(batches) or task == "sampling"):
                        continue
                    if task == "sampling" and not row.ours:
                        continue
                    what = f"{config.name}, {batch} cells, {task}, {row.name}"
                    run.attempt(what, lambda a=(row, config, batch, task): measure_denoiser(run, *a))


def ratios(rows: list[dict[str, Any]]) -> None:
    """Add to each timed denoiser how many times faster than the published formula in eager fp32 it is."""
    base = {
        (r["config"], r["batch"], r["task"]): r["seconds"] for r in rows if r.get("row") == EAGER and "seconds" in r
    }
    for row in rows:
        key = (row.get("config"), row.get("batch"), row.get("task"))
        if "seconds" in row and key in base:
            row["times_eager"] = base[key] / row["seconds"]


def markdown(result: dict[str, Any]) -> str:
    card, lines = result["card"], []
    c = result["ceilings"]
    lines += [f"# {card['name']}: torch {result['versions']['torch']}, triton {card['triton']}, {result['commit']}", ""]
    lines += [
        f"Copy {c['copy_bytes_per_second'] / 1e12:.2f} TB/s; products fp32 {c['fp32_flops_per_second'] / 1e12:.0f}, "
        f"bf16 {c['bf16_flops_per_second'] / 1e12:.0f} TFLOP/s.",
        "",
    ]
    lines += ["| model | cells | task | row | time | times eager | of its floor | off fp64 |", "|" + "---|" * 8]
    for r in result["rows"]:
        if "row" not in r:
            continue
        speed = f"{r['seconds'] * 1e3:.2f} ms" if "seconds" in r else "RED, not timed"
        if "cells_per_second" in r:
            speed += f" ({r['cells_per_second']:.0f} cells/s)"
        eager = f"{r['times_eager']:.2f}" if "times_eager" in r else ""
        share = f"{r['of_floor']:.0%}" if "of_floor" in r else ""
        cells = (r["config"], r["batch"], r["task"], r["row"], speed, eager, share, f"{r['error']:.0e}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| operation | off fp64 | allowed | |", "|---|---|---|---|"]
    lines += [
        f"| {r['what']} | {r['error']:.1e} | {r['allowed']:.0e} | {'' if r['green'] else 'RED'} |"
        for r in result["rows"]
        if "op" in r
    ]
    lines += ["", *(f"absent: {a['what']}: {a['why']}" for a in result["absent"])]
    return "\n".join(lines) + "\n"


def card_of(device: torch.device) -> dict[str, Any]:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"name": name, "triton": version, "serving": ops.serving(device.type)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--minutes", type=float, default=8.0, help="no row is begun after this many")
    parser.add_argument("--device", default="cuda", help="cpu tries the machinery")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries the machinery, no result")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            "no GPU here: torch.cuda.is_available() is False. --device cpu --quick tries the script.", file=sys.stderr
        )
        return 2
    run = Run(torch.device(given.device), time.monotonic() + 60 * given.minutes, given.quick)
    measure(run)
    ratios(run.rows)
    result = {
        "card": card_of(run.device),
        "versions": versions(),
        "commit": commit(),
        "quick": given.quick,
        "ceilings": run.ceilings,
        "rows": run.rows,
        "absent": run.absent,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    (given.out / "gpu.md").write_text(markdown(result))
    print(markdown(result))
    failed = any(row["why"].startswith("FAILED") for row in run.absent)
    return 1 if failed or not all(row["green"] for row in run.rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
