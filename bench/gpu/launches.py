"""Time of every kernel and candidate, compared with its roofline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import codegen
import torch
from checks import block_inputs
from roofline import Shape, costs, launch_of
from rows import AbsentError, Line
from setting import Setting

Step = Callable[[], object]
BY_CANDIDATE = ("run_blocks", "denoise", "mssa", "mssa_backward")
BF16 = torch.bfloat16


def launches(s: Setting) -> None:
    """Time every launch of the published model at the headline's batch size, the launches of a block first."""
    for name, prepare in (*_of_a_block(s), *_attention(s), *_others(s)):
        s.rows.attempt(name, lambda name=name, prepare=prepare: _time(s, name, prepare))
        s.free()


@contextlib.contextmanager
def only(module: ModuleType, candidate: Any) -> Iterator[None]:
    """Context in which a module offers only one candidate, so that nothing is searched."""
    offered = module.candidates
    module.candidates = lambda *_: (candidate,)
    try:
        yield
    finally:
        module.candidates = offered


def _time(s: Setting, name: str, prepare: Callable[[], Step]) -> Line:
    import triton

    if not (s.on_gpu or triton.knobs.runtime.interpret):
        raise AbsentError("needs a GPU, or TRITON_INTERPRET=1 for a rehearsal")
    found = s.timer.measure(prepare(), 0.2)
    cost = costs(_shape(s))[launch_of(name)]
    found["bytes_per_second"] = cost.bytes / found["seconds"]
    if cost.flops:
        found["flops_per_second"] = cost.flops / found["seconds"]
    bandwidth, products = s.ceiling("copy"), s.ceiling("mm bf16")
    if bandwidth and products:
        found["roofline"] = cost.seconds(bandwidth, products)
        found["of_roofline"] = found["roofline"] / found["seconds"]
    return found


def _shape(s: Setting) -> Shape:
    config = s.configs["published"]
    model = config.model
    return Shape(s.batch, config.tokens, model["hidden_size"], model["num_heads"], model["input_size"])


def _ops(s: Setting) -> dict[str, Step]:
    shape = _shape(s)
    return codegen.launches(*(BF16, shape.batch, shape.tokens, shape.d, shape.heads, shape.genes), device=s.device_name)


def _others(s: Setting) -> Iterator[tuple[str, Callable[[], Step]]]:
    for name in codegen.launches(BF16, batch=1, tokens=1, d=16, heads=1):
        if name not in BY_CANDIDATE:
            yield name, lambda name=name: _ops(s)[name]


def _attention(s: Setting) -> Iterator[tuple[str, Callable[[], Step]]]:
    from wbdit.kernels import mssa

    def prepare(op: str, blocks: Any) -> Step:
        launch = _ops(s)[op]

        def step() -> None:
            with only(mssa, blocks):
                launch()

        return step

    for op, table in (("mssa", (*mssa.WHOLE_HEADS, *mssa.FORWARD)), ("mssa_backward", mssa.BACKWARD)):
        for blocks in table:
            yield f"{op} {blocks}", lambda op=op, blocks=blocks: prepare(op, blocks)


def _of_a_block(s: Setting) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Yield the launches of a block for each tile, each with the state that the previous launch leaves."""
    from wbdit.kernels import blocks as fused_blocks

    def prepare(name: str, tiles: Any) -> Step:
        config = s.configs["published"]
        x, modulations, projections, outs, biases, folded = block_inputs(s, config, s.batch, shared=True)
        launcher = fused_blocks._Launcher(x, modulations, config.model["num_heads"], tiles, BF16, 1e-6)
        shift, scale, *_ = launcher.rows
        row = scale.to(BF16)  # serves as shift, scale and gate: values do not affect the timing
        launcher.init(row)
        through_projection = fused_blocks._fold_modulation_into_projection(scale, shift, projections[0])
        through_step = fused_blocks._fold_modulation_into_step(scale, shift, folded[0], 0.1, 0.1)
        w = launcher.project(projections[0], through_projection)
        return {
            "init": lambda: launcher.init(row),
            "project": lambda: launcher.project(projections[0], through_projection),
            "compress": lambda: launcher.compress(w, outs[0], biases[0], row, row),
            "sparsify": lambda: launcher.sparsify(folded[0], through_step, row, row, 0.1),
        }[name]

    yield "block_init", lambda: prepare("init", fused_blocks.TILES[0])
    for tiles in fused_blocks.TILES:
        for name in ("project", "compress", "sparsify"):
            yield f"block_{name} {tiles}", lambda name=name, tiles=tiles: prepare(name, tiles)
