"""Benchmarks of each operation, forward and backward: kernel against reference."""

from __future__ import annotations

import functools

import torch
from agreement import TOLERANCE, gradient_error, relative_error
from operations import OPERATIONS, Draw, cast
from record import Subject

import wbdit

BACKENDS = {"reference": "reference", "kernel": "auto"}


def pytest_generate_tests(metafunc):
    pairs = [(op, precision) for op in OPERATIONS.values() for precision in op.precisions]
    if metafunc.function is bench_op_backward:
        pairs = [(op, precision) for op, precision in pairs if op.gradient]
    metafunc.parametrize("op, precision", pairs, ids=[f"{op.name} {precision}" for op, precision in pairs])
    metafunc.parametrize("row", BACKENDS)


def bench_op_forward(op, precision, row, config, timed):
    values = cast(op.make(Draw(config)), precision)
    with torch.no_grad(), wbdit.backend("reference"):
        expected = op.run(cast(values, "fp64"))
    with torch.no_grad(), wbdit.backend(BACKENDS[row]):
        step = functools.partial(op.run, values)
        error = relative_error(step(), expected)
        timed(subject_of(op, "forward", precision, row, config), error, step)


def bench_op_backward(op, precision, row, config, timed):
    values = cast(op.make(Draw(config)), precision)
    with wbdit.backend("reference"):
        _, gradients = op.differentiate(cast(values, "fp64"))
        expected = gradients()
    with wbdit.backend(BACKENDS[row]):
        _, step = op.differentiate(values)
        error = gradient_error(step(), expected)
        timed(subject_of(op, "backward", precision, row, config), error, step)


def subject_of(op, direction, precision, row, config):
    sizes = config.sizes()
    count = op.count if direction == "forward" else op.gradient_count
    return Subject(
        config.name,
        f"op {op.name} {direction} {precision}",
        row,
        "reference",
        precision,
        TOLERANCE[precision]["forward" if direction == "forward" else "gradient"],
        flops=count(sizes) if count else None,
        product=(sizes.batch * sizes.tokens, sizes.d),
        ours=row == "kernel",
    )
