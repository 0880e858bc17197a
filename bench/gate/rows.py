"""Rows that the gate times: at most 16 against the base, and every operation against its reference."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from agreement import TOLERANCE, gradient_error, relative_error
from configs import Config, Inputs, configs, make_inputs, make_model
from denoisers import ROWS, Expected, gradients_of, sample, train_step, trained
from denoisers import Row as Denoiser
from operations import OPERATIONS, Draw, Operation, Values, cast
from torch import Tensor, nn

import wbdit
from wbdit.ops import cpu

MOST = 16
CELLS = {"published": 2, "small": 32}  # few, so that a generation has many calls
SAMPLED = {"published": 2, "small": 32}
CALLS = 2
FEW = 4  # cells for the published operations that are mostly arithmetic

# the slowest kernels: (configuration, operation, direction)
SLOW = (
    ("published", "mssa", "forward"),
    ("published", "mssa", "backward"),
    ("published", "gated_adaln", "forward"),
    ("published", "gated_adaln", "backward"),
    ("published", "ista_adaln", "forward"),
    ("published", "ista_adaln", "backward"),
    ("small", "count_nll", "forward"),
    ("small", "count_nll", "backward"),
    ("small", "normal", "forward"),
    ("small", "sampler_step drawing", "forward"),
)
# on processors with fast bf16, the default training uses bf16 too; then these are the only fp32 operations
ALSO_FP32 = (SLOW[3], SLOW[5], SLOW[7], SLOW[9])


@dataclass
class Timed:
    """A prepared row: a step to time, and a check that returns its error against fp64."""

    step: Callable[..., object]
    gradient: bool  # whether autograd records the step
    check: Callable[[], float]
    tolerance: float
    fresh: Callable[[], object] | None = None  # makes the step's argument, untimed


@dataclass(frozen=True)
class Row:
    """A row of the gate; two commits can be compared only if its `work` is the same in both."""

    name: str
    work: str
    ready: Callable[[], Timed]


def rows(quick: bool = False) -> dict[str, Row]:
    """Return the rows to compare with the base, by name."""
    sizes, fast_bf16 = configs(quick), cpu.has_fast_bf16()
    precisions = ("fp32", "bf16") if fast_bf16 else ("fp32",)
    made = [*_denoisers(sizes, precisions)]
    if fast_bf16:
        made += [_operation(sizes, *SLOW[0], "bf16"), _operation(sizes, *SLOW[1], "bf16")]
    made += [_operation(sizes, *slow, "fp32") for slow in (ALSO_FP32 if fast_bf16 else SLOW)]
    return {row.name: row for row in made[:MOST]}


def _denoisers(sizes: dict[str, Config], precisions: tuple[str, ...]) -> Iterator[Row]:
    for precision in precisions:
        ours = ROWS[f"ours, {precision}"]
        for config in sizes.values():
            few = _with_batch(config, CELLS[config.name])
            work = _work(few)
            yield Row(f"{few.name} forward {precision}", work, functools.partial(_forward, ours, few))
            yield Row(f"{few.name} train {precision}", work, functools.partial(_train, ours, few))
            if precision == "fp32":
                fewer = _with_batch(config, SAMPLED[config.name])
                work = f"{_work(fewer)}, {CALLS} calls"
                yield Row(f"{fewer.name} sampling {precision}", work, functools.partial(_sampling, ours, fewer))


def _with_batch(config: Config, cells: int) -> Config:
    return replace(config, batch=min(cells, config.batch))


def _work(config: Config) -> str:
    model = config.model
    sizes = f"d {model['hidden_size']}, {model['num_heads']} heads, {model['depth']} blocks"
    return f"{config.batch} cells of {config.tokens} tokens, {sizes}"


_models: dict[str, nn.Module] = {}


def _model(ours: Denoiser, config: Config) -> nn.Module:
    """Return a copy of the seeded model, which is faster than drawing its weights again."""
    if config.name not in _models:
        _models[config.name] = make_model(ours.kind, config)
    return copy.deepcopy(_models[config.name])


def _forward(ours: Denoiser, config: Config) -> Timed:
    inputs, model = make_inputs(config), _model(ours, config).eval()
    call, times = ours.call(model), _new_timesteps(inputs)

    def check() -> float:
        return relative_error([call(inputs.x, inputs.t, inputs.y)], [Expected(ours, config).forward(inputs)])

    def step() -> Tensor:
        return call(inputs.x, next(times), inputs.y)

    return Timed(step, False, check, TOLERANCE[ours.precision]["forward"])


def _new_timesteps(inputs: Inputs) -> Iterator[Tensor]:
    """Yield new timesteps each time, so that caches of earlier calls do not help."""
    number = 0
    while True:
        number += 1
        yield inputs.t + number / 2**12


def _train(ours: Denoiser, config: Config) -> Timed:
    inputs, model = make_inputs(config), _model(ours, config).train()
    call = ours.call(model)

    def check() -> float:
        gradients_of(call, inputs)
        found = [p.grad for p in trained(model)]
        model.zero_grad(set_to_none=True)
        return gradient_error(found, Expected(ours, config).gradients(inputs))

    return Timed(train_step(call, trained(model), inputs), True, check, TOLERANCE[ours.precision]["gradient"])


def _sampling(ours: Denoiser, config: Config) -> Timed:
    inputs, model = make_inputs(config), _model(ours, config).eval()

    def check() -> float:
        exact = Expected(ours, config).call
        with wbdit.backend("reference"):
            expected = sample(lambda x, t, y: exact(x.double(), t, y).to(x.dtype), config, inputs, CALLS)
        return relative_error([sample(ours.call(model), config, inputs, CALLS)], [expected])

    # a copy has empty caches, so that each path includes the cost of filling them
    fresh = functools.partial(copy.deepcopy, model)
    step = lambda copied: sample(ours.call(copied), config, inputs, CALLS)  # noqa: E731
    return Timed(step, False, check, TOLERANCE[ours.precision]["path"], fresh)


def _operation(sizes: dict[str, Config], name: str, op: str, direction: str, precision: str) -> Row:
    # matrix products and attention behave the same with fewer cells; a memory-bound op would then run from cache
    few = name == "published" and op != "gated_adaln"
    config = _with_batch(sizes[name], FEW) if few else sizes[name]
    ready = functools.partial(_timed_operation, OPERATIONS[op], direction, precision, config)
    return Row(f"{name} op {op} {direction} {precision}", f"{_work(config)}, {config.cells} cells", ready)


def _timed_operation(op: Operation, direction: str, precision: str, config: Config, backend: str = "auto") -> Timed:
    values = cast(op.make(Draw(config)), precision)

    def differentiated_or_run(tensors: Values) -> Callable[[], tuple[Tensor, ...]]:
        return op.differentiate(tensors)[1] if direction == "backward" else functools.partial(op.run, tensors)

    def check() -> float:
        with wbdit.backend("reference"):
            expected = differentiated_or_run(cast(values, "fp64"))()
        return (gradient_error if direction == "backward" else relative_error)(step(), expected)

    with wbdit.backend(backend):
        step = differentiated_or_run(values)
    tolerance = TOLERANCE[precision]["gradient" if direction == "backward" else "forward"]
    return Timed(step, direction == "backward", check, tolerance)


@dataclass(frozen=True)
class Pair:
    """An operation's kernel and its reference, on the same inputs."""

    name: str
    ready: Callable[[str], Timed]  # given a backend, "auto" or "reference"


def pairs(quick: bool = False) -> dict[str, Pair]:
    """Return every operation in each direction, precision and configuration, by name."""
    fast_bf16, made = cpu.has_fast_bf16(), []
    for config in reversed(configs(quick).values()):  # short ones first, in case time runs out
        for op in OPERATIONS.values():
            for precision in op.precisions if fast_bf16 else op.precisions[:1]:
                for direction in ("forward", "backward") if op.gradient else ("forward",):
                    ready = functools.partial(_timed_operation, op, direction, precision, config)
                    made.append(Pair(f"{config.name} op {op.name} {direction} {precision}", ready))
    return {pair.name: pair for pair in made}
