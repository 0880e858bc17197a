"""Each operation, forward and backward: the kernel beside the reference."""

from __future__ import annotations

import functools

import torch
from agreement import TOLERANCE, gradient_error, relative_error
from bench_denoiser import sizes_of
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
        expected, _ = gradients(op, cast(values, "fp64"))
    with wbdit.backend(BACKENDS[row]):
        found, step = gradients(op, values)
        error = gradient_error(found, expected)
        timed(subject_of(op, "backward", precision, row, config), error, step)


def gradients(op, values):
    """Return the gradients of all floating inputs, and the step that computes them again from the kept forward."""
    leaves = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in values.items()}
    outs = op.run(leaves)
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outs]
    wanted = [v for v in leaves.values() if v.requires_grad]
    step = functools.partial(torch.autograd.grad, outs, wanted, upstream, retain_graph=True)
    return step(), step


def subject_of(op, direction, precision, row, config):
    sizes = sizes_of(config)
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
