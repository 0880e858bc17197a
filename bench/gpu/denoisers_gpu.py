"""Whole denoisers at the headline's and other sizes: a call, a training step and a sampling path."""

from __future__ import annotations

from functools import partial

import flops
import torch
from agreement import TOLERANCE, relative_error
from checks import FEW, block_inputs, check_row, checked
from configs import Config, Inputs, make_inputs, make_model
from denoisers import EAGER, GPU_ROWS, ROWS, Expected, Forward, Row, sample, train_step, trained
from rows import AbsentError, Line
from setting import Setting

import wbdit
from wbdit import ops
from wbdit.nn.cuda_graph import CUDAGraphModel
from wbdit.ops.dispatch import adapter
from wbdit.ops.triton import Triton

CALLS = 15
TASKS = ("forward", "train", "sampling")
OURS, EAGER_BF16, COMPILED = (GPU_ROWS[f"{name} bf16"] for name in ("ours,", "published, eager", "published, compiled"))


def headline(s: Setting) -> None:
    """Measure ours and the published formula, eager and compiled, at the headline's batch size; the slowest last."""
    for row in (OURS, EAGER_BF16, COMPILED):
        for task in TASKS:
            _attempt(s, row, "published", s.batch, task)


def again(s: Setting) -> None:
    """Measure ours again in another process; the difference between the two runs is noise."""
    for task in TASKS:
        _attempt(s, OURS, "published", s.batch, task)


def batches(s: Setting) -> None:
    """Measure smaller batch sizes."""
    for batch in (2,) if s.quick else (256, 16):
        for row in (OURS, EAGER_BF16):
            for task in TASKS:
                _attempt(s, row, "published", batch, task)


def base(s: Setting) -> None:
    """Measure the preset `base`."""
    for batch in (2,) if s.quick else (1024, 256):
        for row in (OURS, EAGER_BF16):
            for task in TASKS:
                _attempt(s, row, "base", batch, task)


def peers(s: Setting) -> None:
    """Measure a DiT of the published size, and ours and the published formula in fp32."""
    for row in (GPU_ROWS["DiT, bf16"], GPU_ROWS["ours, fp32"], ROWS[EAGER]):
        for task in TASKS[:2]:
            _attempt(s, row, "published", 2 if s.quick else 256, task)


def blocks(s: Setting) -> None:
    """Measure all blocks at once in bf16, and op by op in bf16 and fp32."""
    config = s.configs["published"]
    own = partial(adapter("run_blocks"), Triton())
    ways = {
        "blocks at once, bf16": (lambda *given: ops.run_blocks(*given), torch.bfloat16),
        "op by op, bf16": (lambda *given: own(*given, 0.1, 0.1, 1e-6), torch.bfloat16),
        "op by op, fp32": (lambda *given: own(*given, 0.1, 0.1, 1e-6), torch.float32),
    }
    for name, (call, low) in ways.items():
        s.rows.attempt(name, lambda call=call, low=low: _time_blocks(s, config, call, low))
        s.free()


def _time_blocks(s: Setting, config: Config, call: object, low: torch.dtype) -> Line:
    if not s.on_gpu:
        call = ops.run_blocks  # the Triton kernels need a GPU
    heads = config.model["num_heads"]
    x, *given = block_inputs(s, config, 4, shared=True, low=low)
    with torch.no_grad(), wbdit.backend("reference"):
        expected = ops.run_blocks(x.double(), *([t.double() for t in ts] for ts in given), heads)
    with torch.no_grad():
        found = checked(relative_error([call(x, *given, heads)], [expected]), 2e-2 if low == torch.bfloat16 else 1e-5)
        if not found["green"]:
            return found
        given = block_inputs(s, config, s.batch, shared=True, low=low)
        return found | s.timer.measure(lambda: call(*given, heads), 1.0)


_checked: dict[tuple[str, str, str], Line] = {}  # a row is checked once per configuration and task


def _attempt(s: Setting, row: Row, name: str, batch: int, task: str) -> None:
    s.rows.attempt(f"{name}, {batch} cells, {task}, {row.name}", lambda: _measure(s, row, s.configs[name], batch, task))
    s.free()


def _check(s: Setting, row: Row, config: Config, task: str) -> Line:
    """Check a row once per configuration; skip compiled rows, since the check's shape would need compiling too."""
    if row.compiled:
        return {}
    key = row.name, config.name, "train" if task == "train" else "forward"
    if key not in _checked:
        _checked[key] = check_row(s, row, config, key[-1])
    return _checked[key]


def _measure(s: Setting, row: Row, config: Config, batch: int, task: str) -> Line:
    if row.compiled and s.quick:
        raise AbsentError("a quick run skips torch.compile")
    found = {"config": config.name, "batch": batch, "task": task, "name": row.name, **_check(s, row, config, task)}
    if row.ours and not found["green"]:
        return found  # a red baseline is timed and marked
    if row.compiled:
        torch._dynamo.reset()
    model = make_model(row.kind, config).to(s.device).train(task == "train")
    inputs = make_inputs(config, batch).to(s.device)
    call = row.call(
        CUDAGraphModel(model) if task == "sampling" and row.ours else model
    )  # ours samples as the generator does
    sizes = config.sizes(row.blocks, batch)
    with row.backend():
        if task == "train":
            found |= s.timer.measure(train_step(call, trained(model), inputs), 1.0)
            count = flops.train(sizes)
        else:
            with torch.no_grad():
                if row.compiled:
                    found |= _agreement(s, row, config, inputs, call)
                step = {"forward": lambda: call(*inputs[:3]), "sampling": lambda: sample(call, config, inputs, CALLS)}
                found |= s.timer.measure(step[task], 1.0)
            count = flops.forward(sizes) * (CALLS if task == "sampling" else 1)
    if task == "sampling":
        found["cells_per_second"] = batch / found["seconds"]
    found["flops_per_second"] = count / found["seconds"]
    ceiling = s.ceiling(f"mm {row.precision}")
    return found | ({"of_floor": count / ceiling / found["seconds"]} if ceiling else {})


def _agreement(s: Setting, row: Row, config: Config, inputs: Inputs, call: Forward) -> Line:
    """Compare the first cells of a batch with fp64."""
    found = call(*inputs[:3])[:FEW]
    few = Inputs(*(None if v is None else v[:FEW] for v in inputs))
    return checked(
        relative_error([found], [Expected(row, config, s.device).forward(few)]), TOLERANCE["bf16"]["forward"]
    )
