"""Comparison with fp64, in memory filled with NaN: ops, all blocks at once, sampling, the graph path, a large batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from agreement import TOLERANCE, gradient_error, relative_error
from configs import Config, configs, make_inputs, make_model
from denoisers import EAGER, ROWS, Expected, gradients_of, sample, trained
from operations import OPERATIONS, Draw, Operation, cast
from rows import Line
from setting import Setting
from torch import Tensor

import wbdit
from wbdit import ops
from wbdit.nn.cuda_graph import CUDAGraphModel

BF16 = ROWS["ours, bf16"]
FEW = 4  # cells that are computed in fp64
PATH = 5  # calls of a sampling path


def checks(s: Setting) -> None:
    """Check everything, ops first, since their errors affect all other rows."""
    config = s.configs["published"]
    with unwritten_memory_is_nan():
        for op in OPERATIONS.values():
            for precision in op.precisions:
                name = f"op {op.name} {precision}"
                s.rows.attempt(name, lambda op=op, precision=precision: check_op(s, op, precision, config))
        for shared in (False, True):
            name = f"blocks bf16, {'a row for all' if shared else 'a row per sample'}"
            s.rows.attempt(name, lambda shared=shared: _check_blocks(s, config, shared))
        for name in (EAGER, "ours, fp32", "ours, bf16"):
            s.rows.attempt(f"forward {name}", lambda name=name: check_row(s, ROWS[name], config, "forward"))
            s.rows.attempt(f"train {name}", lambda name=name: check_row(s, ROWS[name], config, "train"))
        small = configs(s.quick)["small"]
        s.rows.attempt("forward ours, bf16, small", lambda: check_row(s, BF16, small, "forward"))
        s.rows.attempt("forward ours, bf16, small, cell token", lambda: _check_cell_token(s, small))
        for one in (config, small):
            s.rows.attempt(f"sampling ours, bf16, {one.name}", lambda one=one: _check_sampling(s, one))
        s.rows.attempt("graph, bf16", lambda: _check_graph(s, config))
        s.rows.attempt(f"forward ours, bf16, {s.batch} cells", lambda: _check_batch(s, config))


@contextlib.contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """Context in which new memory is filled with NaN, so that unwritten outputs are detected."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def checked(error: float, allowed: float) -> Line:
    """Return a check's result; a NaN error is red."""
    return {"error": error, "allowed": allowed, "green": error <= allowed}


def check_op(s: Setting, op: Operation, precision: str, config: Config) -> Line:
    """Compare an op, and its gradients if it has them, with the reference in fp64 on the same inputs."""
    config = replace(config, batch=min(config.batch, FEW), cells=min(config.cells, FEW))
    values = {name: v.to(s.device) for name, v in cast(op.make(Draw(config)), precision).items()}
    wide = cast(values, "fp64")
    allowed = TOLERANCE[precision]
    if not op.gradient:
        with torch.no_grad():
            found = op.run(values)
            with wbdit.backend("reference"):
                return checked(relative_error(found, op.run(wide)), allowed["forward"])
    found, gradients = op.differentiate(values)
    with wbdit.backend("reference"):
        expected, right = op.differentiate(wide)
        right = right()
    forward, backward = relative_error(found, expected), gradient_error(gradients(), right)
    return {
        **checked(forward, allowed["forward"]),
        "gradient_error": backward,
        "green": forward <= allowed["forward"] and backward <= allowed["gradient"],
    }


def check_row(s: Setting, row: object, config: Config, task: str) -> Line:
    """Compare a denoiser's row with the same formula in fp64 on a few cells."""
    inputs = make_inputs(config, FEW).to(s.device)
    expected = Expected(row, config, s.device)
    model = make_model(row.kind, config).to(s.device)
    with row.backend():
        if task == "train":
            gradients_of(row.call(model.train()), inputs)
            error = gradient_error([p.grad for p in trained(model)], expected.gradients(inputs))
            return checked(error, TOLERANCE[row.precision]["gradient"])
        with torch.no_grad():
            error = relative_error([row.call(model.eval())(inputs.x, inputs.t, inputs.y)], [expected.forward(inputs)])
        return checked(error, TOLERANCE[row.precision]["forward"])


def _check_blocks(s: Setting, config: Config, shared: bool) -> Line:
    """Compare all blocks at once with the reference in fp64, on the same rounded weights."""
    x, *given = block_inputs(s, config, FEW, shared)
    wide = [[t.double() for t in ts] for ts in given]
    heads = config.model["num_heads"]
    with torch.no_grad():
        found = ops.run_blocks(x, *given, heads)
        with wbdit.backend("reference"):
            return checked(
                relative_error([found], [ops.run_blocks(x.double(), *wide, heads)]), TOLERANCE["bf16"]["forward"]
            )


def block_inputs(
    s: Setting, config: Config, batch: int, shared: bool, low: torch.dtype = torch.bfloat16
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return the first arguments of :func:`wbdit.ops.run_blocks`: a stream, modulations, and rounded weights."""
    generator = torch.Generator(s.device).manual_seed(0)
    d, depth = config.model["hidden_size"], config.model["depth"]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=s.device)

    rows = [0.5 * draw(1 if shared else batch, d) for _ in range(6 * depth + 2)]
    weights = [[(draw(d, d) / d**0.5).to(low) for _ in range(depth)] for _ in range(3)]
    biases = [draw(d).to(low) for _ in range(depth)]
    folded = [ops.fold(weight.float()).to(low) for weight in weights[2]]
    return (
        draw(batch, config.tokens, d),
        [row.expand(batch, d) for row in rows],
        weights[0],
        weights[1],
        biases,
        folded,
    )


def _check_graph(s: Setting, config: Config) -> Line:
    """Compare a replayed CUDA graph with fp64, on other inputs than those it was captured with."""
    s.need_gpu()
    inputs = make_inputs(config, FEW).to(s.device)
    call = BF16.call(CUDAGraphModel(make_model(BF16.kind, config).to(s.device).eval()))
    t = inputs.t[:1].expand(FEW)
    with torch.no_grad():
        call(inputs.x.flip(0), t + 1, inputs.y)
        found = call(inputs.x, t, inputs.y)
    expected = Expected(BF16, config, s.device).forward(inputs._replace(t=t))
    return checked(relative_error([found], [expected]), TOLERANCE["bf16"]["forward"])


def _check_cell_token(s: Setting, config: Config) -> Line:
    """Compare a model with a token for the whole cell, which the published formula lacks, with itself in fp64."""
    with_token = replace(config, model={**config.model, "cell_token": True})
    inputs = make_inputs(with_token, FEW).to(s.device)
    model = make_model(BF16.kind, with_token).to(s.device).eval()
    with torch.no_grad():
        found = BF16.call(model)(inputs.x, inputs.t, inputs.y)
        with wbdit.backend("reference"):
            expected = model.double()(inputs.x.double(), inputs.t, inputs.y)
    return checked(relative_error([found], [expected]), TOLERANCE["bf16"]["forward"])


def _check_sampling(s: Setting, config: Config) -> Line:
    """Compare whole sampling paths with fp64: called directly, then recorded as CUDA graphs, then replayed."""
    inputs = make_inputs(config, FEW).to(s.device)
    call = BF16.call(CUDAGraphModel(make_model(BF16.kind, config).to(s.device).eval()))
    with torch.no_grad():
        found = [sample(call, config, inputs, PATH) for _ in range(3)]
        exact = Expected(BF16, config, s.device).call
        expected = sample(lambda x, t, y: exact(x.double(), t, y).to(x.dtype), config, inputs, PATH)
    return checked(max(relative_error([one], [expected]) for one in found), TOLERANCE["bf16"]["path"])


def _check_batch(s: Setting, config: Config) -> Line:
    """Compare the first and the last cells of a large batch with fp64."""
    inputs = make_inputs(config, s.batch).to(s.device)
    model = make_model(BF16.kind, config).to(s.device).eval()
    some = [0, 1, s.batch - 2, s.batch - 1]
    with torch.no_grad(), BF16.backend():
        found = BF16.call(model)(inputs.x, inputs.t, inputs.y)[some]
    few = inputs._replace(**{k: None if v is None else v[some] for k, v in inputs._asdict().items()})
    return checked(
        relative_error([found], [Expected(BF16, config, s.device).forward(few)]), TOLERANCE["bf16"]["forward"]
    )
