"""Benchmarks of whole denoisers: one call without gradients, and one training step."""

from __future__ import annotations

import functools
import itertools

import flops
import pytest
import torch
from agreement import TOLERANCE, gradient_error, relative_error
from configs import make_inputs, make_model
from denoisers import EAGER, ROWS, Expected, gradients_of, train_step, trained
from record import Subject

EVERY_ROW = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


@EVERY_ROW
def bench_forward(row, config, quick, timed):
    skip_if_slow(row, quick)
    inputs, model = make_inputs(config), make_model(row.kind, config).eval()
    call = row.call(model)
    with torch.no_grad(), row.backend():
        once = functools.partial(call, inputs.x, inputs.t, inputs.y)
        compile_or_skip(row, once)
        error = relative_error([once()], [Expected(row, config).forward(inputs)])
        subject = subject_of(row, config, "forward", TOLERANCE[row.precision]["forward"], flops.forward)
        timed(subject, error, at_new_timesteps(call, inputs), baseline=baseline_step(row, config, "forward"))


@EVERY_ROW
def bench_train(row, config, quick, timed):
    skip_if_slow(row, quick)
    inputs, model = make_inputs(config), make_model(row.kind, config).train()
    call = row.call(model)
    with row.backend():
        compile_or_skip(row, lambda: gradients_of(call, inputs))
        model.zero_grad(set_to_none=True)
        gradients_of(call, inputs)
        found = [p.grad for p in trained(model)]
        error = gradient_error(found, Expected(row, config).gradients(inputs))
        del found
        model.zero_grad(set_to_none=True)
        subject = subject_of(row, config, "train", TOLERANCE[row.precision]["gradient"], flops.train)
        timed(subject, error, train_step(call, trained(model), inputs), baseline=baseline_step(row, config, "train"))


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("what", ["forward", "train"])
def bench_floor(what, precision, config, record):
    """Add the floor of the white-box model; DiT rows use their own only in their fraction of the floor."""
    record.add_floor(subject_of(ROWS[EAGER], config, what, 0.0, getattr(flops, what)), precision)


def baseline_step(row, config, what):
    """Return one step of the baseline, which runs before each round of another row; None for the baseline itself."""
    if row.name == EAGER:
        return None
    inputs, model = make_inputs(config), make_model(ROWS[EAGER].kind, config)
    call = ROWS[EAGER].call(model)
    step = at_new_timesteps(call, inputs) if what == "forward" else train_step(call, trained(model), inputs)
    step()
    return step


def subject_of(row, config, what, tolerance, count):
    sizes = config.sizes(row.blocks)
    return Subject(
        config.name,
        what,
        row.name,
        EAGER,
        row.precision,
        tolerance,
        flops=count(sizes),
        product=(sizes.batch * sizes.tokens, sizes.d),
        ours=row.ours,
    )


def at_new_timesteps(call, inputs):
    """Return a step that calls the model at new timesteps each time, so that caches of earlier calls do not help."""
    numbers = itertools.count(1)

    def step():
        return call(inputs.x, inputs.t + next(numbers) / 2**12, inputs.y)

    return step


def skip_if_slow(row, quick):
    if quick and row.compiled:
        pytest.skip("a quick run skips torch.compile")


def compile_or_skip(row, step):
    """Compile a row that uses torch.compile before its check; skip it if that fails, as without a C++ compiler."""
    if not row.compiled:
        return
    torch._dynamo.reset()
    try:
        step()
    except Exception as error:  # whatever the compiler raises
        pytest.skip(f"torch.compile does not work here: {str(error).strip().splitlines()[0]}")
