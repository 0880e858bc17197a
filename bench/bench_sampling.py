"""Benchmarks of sampling: our 15 DDIM calls against the authors' 100."""

from __future__ import annotations

import copy
import functools

import flops
import pytest
import torch
from agreement import TOLERANCE, relative_error
from configs import make_inputs, make_model, make_schedule
from denoisers import EAGER, ROWS, AtLabels, Expected
from record import Subject

import wbdit
from wbdit import samplers

THEIR_CALLS, OUR_CALLS = 100, 15
TIMED_CALLS = 5  # of the authors' 100, which all take the same time
FEW = 4  # cells whose whole path is compared with fp64
SAMPLED = ("published, eager fp32", "ours, fp32", "ours, bf16")


@pytest.mark.parametrize("name", SAMPLED)
def bench_sampling(name, config, timed):
    row = ROWS[name]
    model = make_model(row.kind, config).eval()
    with torch.no_grad(), wbdit.backend("reference"):
        expected = sample_cells(config, row, Expected(row, config).call, FEW, dtype=torch.float64)
    with torch.no_grad(), row.backend():
        error = relative_error([sample_cells(config, row, row.call(model), FEW)], [expected])
        # a copy has empty caches, so that each path includes the cost of filling them
        timed(
            subject_of(row, config),
            error,
            lambda copied: sample_cells(config, row, row.call(copied), config.cells, fresh=not row.ours),
            fresh=functools.partial(copy.deepcopy, model),
            baseline=baseline_walk(config) if row.ours else None,
        )


def baseline_walk(config):
    """Return a part of the authors' path as a step, which runs before each round of another row."""
    row = ROWS[EAGER]
    call = row.call(make_model(row.kind, config).eval())
    return lambda: sample_cells(config, row, call, config.cells, fresh=True)


@pytest.mark.parametrize("precision", TOLERANCE)
def bench_floor(precision, config, record):
    record.add_floor(subject_of(ROWS["ours, fp32"], config), precision)


def sample_cells(config, row, call, cells, *, dtype=torch.float32, fresh=False):
    """Sample with the row's timesteps, as the generator does; with `fresh`, use torch's noise like the authors."""
    schedule, y = make_schedule(config), make_inputs(config, config.cells).y
    denoiser = AtLabels(call, None if y is None else y[:cells], config.model["prediction"])
    shape = (1, config.model["input_size"])
    noise = samplers.PhiloxNoise(0, torch.arange(cells), shape)
    return samplers.ddim(
        denoiser,
        torch.randn(cells, *shape) if fresh else noise(-1).to(dtype),
        schedule,
        path(row, schedule),
        clamp_min=config.clamp_min,
        noise=None if fresh else noise,
    )


def path(row, schedule):
    if row.ours:
        return samplers.timesteps(schedule, OUR_CALLS)
    return samplers.timesteps(schedule, THEIR_CALLS)[:TIMED_CALLS]


def subject_of(row, config):
    sizes = config.sizes(batch=config.cells, conditions=max(1, config.classes))
    calls = OUR_CALLS if row.ours else THEIR_CALLS
    facts = {"calls": calls}
    if row.ours:
        facts |= {"ratio_of_sampler": THEIR_CALLS / OUR_CALLS}
    else:
        facts |= {"note": f"time of {TIMED_CALLS} whole calls, multiplied by {THEIR_CALLS / TIMED_CALLS:g}"}
    return Subject(
        config.name,
        "sampling",
        row.name,
        EAGER,
        row.precision,
        TOLERANCE[row.precision]["path"],
        flops=calls * flops.forward(sizes),
        product=(sizes.batch * sizes.tokens, sizes.d),
        ours=row.ours,
        scale=1.0 if row.ours else THEIR_CALLS / TIMED_CALLS,
        baseline_scale=THEIR_CALLS / TIMED_CALLS,
        facts=facts,
    )
