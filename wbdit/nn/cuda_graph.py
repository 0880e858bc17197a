"""A denoiser's GPU calls as CUDA graphs, recorded once per input shape and then replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from wbdit import ops
from wbdit.nn.denoiser import Denoises
from wbdit.nn.fused_steps import FusedSteps
from wbdit.nn.weight_cache import WeightCache
from wbdit.schedule import Prediction

Result = TypeVar("Result")
WARM = 3  # warm-up calls before recording: they compile and autotune kernels and allocate library workspaces
MOST_STEPS = 64  # of a run that is recorded: each step keeps its graph and its results


@dataclass
class _Recorded:
    """A recorded call: its inputs and output at fixed addresses, and the function that replays it."""

    x: Tensor
    t: Tensor
    given: dict[str, Tensor]
    out: Tensor
    replay: Callable[[], object]

    def __call__(self, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
        """Copy the inputs in, replay, and return a copy of the output, which the next replay overwrites."""
        self.x.copy_(x)
        self.t.copy_(t[:1])
        for name, value in given.items():
            self.given[name].copy_(value)
        self.replay()
        return self.out.clone()


@dataclass
class _RecordedStep:
    """A recorded step of a sampler run: its numbers, and its inputs and results at fixed addresses."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    new: Tensor
    estimate: Tensor | None
    replay: Callable[[], object]


class _RecordedRun:
    """A sampler run whose steps are recorded as CUDA graphs, one after another, in memory that they share.

    A step reads the state and the estimates where the steps before it have written them, so nothing is copied between
    two steps. The coefficients of the update are part of a step's graph.

    Parameters
    ----------
    fused
        The steps, which own their inputs.
    steps
        Number of its steps.
    """

    def __init__(self, fused: FusedSteps, steps: int) -> None:
        self.fused = fused
        self.inputs = fused.inputs
        self.last = steps - 1
        self._steps: dict[int, _RecordedStep] = {}
        self._own: dict[str, Tensor] = {}  # inputs of steps that are no results, such as the first state
        self._loaded: dict[str, tuple[Tensor, int]] = {}  # tensors that they hold, and their versions
        self._pool: Any = None
        self._failed = False

    def step(
        self, i: int, x: Tensor, *, clean: tuple[float, float] | None, **update: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Replay a step, see :class:`FusedSteps`; record it first if it is new or has other coefficients."""
        tensors = {"x": x, **{name: value for name, value in update.items() if isinstance(value, Tensor)}}
        numbers = {"clean": clean, **{name: value for name, value in update.items() if name not in tensors}}
        with torch.cuda.device_of(x):
            own = self._steps.get(i)
            if own is None or own.numbers != numbers or own.tensors.keys() != tensors.keys():
                own = self._record(i, tensors, numbers)
            if own is None:
                return self.fused.step(i, x, clean=clean, **update)
            for name, value in tensors.items():
                if value is not own.tensors[name]:
                    self._load(name, value, own.tensors[name])
            own.replay()
            # a sampler returns the last state, which must outlive the next run
            return (own.new.clone() if i == self.last else own.new), own.estimate

    def _load(self, name: str, value: Tensor, own: Tensor) -> None:
        """Copy an input in, unless it has been: the samples' indices are the same at all steps."""
        held, version = self._loaded.get(name, (None, 0))
        shared = own is self._own.get(name) and not value.is_inference()
        if not (shared and held is value and version == value._version):
            own.copy_(value)
        self._loaded[name] = (value, value._version) if shared else (own, -1)

    def _record(self, i: int, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> _RecordedStep | None:
        if self._failed:
            return None
        results = [value for step in self._steps.values() for value in (step.new, step.estimate)]
        kept = {
            name: value if any(value is result for result in results) else self._own.setdefault(name, value.clone())
            for name, value in tensors.items()
        }
        x, clean = kept["x"], numbers["clean"]
        update = {name: value for name, value in (kept | numbers).items() if name not in ("x", "clean")}
        recorded = _capture_or_warn(lambda: self.fused.step(i, x, clean=clean, **update), self._shared_memory())
        self._failed = recorded is None
        if recorded is None:
            return None
        (new, estimate), replay = recorded
        self._steps[i] = _RecordedStep(kept, numbers, new, estimate, replay)
        return self._steps[i]

    def _shared_memory(self) -> Any:
        """Return the handle of the memory that all steps share; one step runs at a time."""
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


class CUDAGraphModel:
    """A denoiser that a GPU runs as CUDA graphs, with one graph launch per call or per step of a sampler.

    A denoiser call launches dozens of kernels. For small batches, launching them takes longer than running them. The
    first call with a given input shape records the kernels; later calls copy their inputs in and replay.

    A sampler whose updates the model fuses with its calls runs as a chain of graphs, one per step. The first run of a
    shape is direct, the second is recorded, so that a single batch does not pay for the recording.

    The denoiser is called directly on other devices, with gradients, in training mode, and where timesteps differ
    between samples. It is also called directly if recording fails: a warning gives the reason, once per shape.

    Parameters
    ----------
    model
        A denoiser, or a :class:`wbdit.counts.denoiser.CountDenoiser`. When its weights change, all is recorded anew;
        after a change through ``.data``, call ``model.eval()``. After moving it to another device, create a new
        :class:`CUDAGraphModel`.
    embeds_once
        Whether :class:`wbdit.samplers.GuidedModel` embeds labels once for all calls. Results then do not depend on the
        labels that were seen before: on a CPU, a denoiser given labels computes only new ones (:meth:`modulations
        <wbdit.nn.conditioning.Conditioned.modulations>`), as products of other sizes.
    """

    def __init__(self, model: Denoises, *, embeds_once: bool = False) -> None:
        self.model = model
        self.embeds_once = embeds_once
        self.prediction: Prediction = model.prediction
        self.label_sizes = model.label_sizes
        self.embed: Callable[..., Tensor] = model.embed
        self._weights = WeightCache()
        self._version: Hashable = None
        self._recorded: dict[Hashable, _Recorded | None] = {}  # None: recording failed
        self._runs: dict[Hashable, _RecordedRun | None] = {}  # None: run once, directly

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, conditioning: Tensor | None = None) -> Tensor:
        """Return the model's output for ``(B, C, G)`` at timesteps ``(B,)``.

        A graph is used only if `t` is an expanded view of one number (stride 0), as samplers pass it.
        """
        given = {name: value for name, value in (("y", y), ("conditioning", conditioning)) if value is not None}
        if t.stride(0) != 0 or not self._is_replayable(x):
            return self.model(x, t, **given)
        with torch.cuda.device_of(x):  # record and replay on the device of the inputs
            self._drop_outdated()
            key = _key(x, t, given)
            if key not in self._recorded:
                self._recorded[key] = self._record(x, t, given)
            recorded = self._recorded[key]
            return self.model(x, t, **given) if recorded is None else recorded(x, t, given)

    def fuse_steps(self, x: Tensor, times: Tensor, **given: Tensor) -> FusedSteps | None:
        """Fuse the calls of a sampler as the model does, see :meth:`wbdit.WBDiT.fuse_steps`; replay those that repeat.

        A state that a callback receives is overwritten when the next run of the same shape reaches the same step.
        """
        fused = self.model.fuse_steps(x, times, **given)
        if fused is None or len(times) > MOST_STEPS or not self._is_replayable(x):
            return fused
        with torch.cuda.device_of(x):
            self._drop_outdated()
            key = (_key(x, times, given), *times.tolist())
            if key not in self._runs:
                self._runs[key] = None
                return fused
            recorded = self._runs[key]
            if recorded is None:
                own = self.model.fuse_steps(x, times, **{name: value.clone() for name, value in given.items()})
                assert own is not None
                recorded = self._runs[key] = _RecordedRun(own, len(times))
            else:
                for old, new in zip(recorded.inputs, fused.inputs, strict=True):
                    old.copy_(new)
        return recorded

    def _is_replayable(self, x: Tensor) -> bool:
        return x.is_cuda and not torch.is_grad_enabled() and not self.model.training

    def _drop_outdated(self) -> None:
        """Drop all recordings if a weight has changed: they hold tensors that were made from the weights."""
        weights = (*self.model.parameters(), *self.model.buffers())
        version = self._weights.version(weights), self.model.network.generation
        if version != self._version:
            self._recorded.clear()
            self._runs.clear()
            self._version = version

    def _record(self, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> _Recorded | None:
        own = {name: value.clone() for name, value in given.items()}
        own_x, own_t = x.clone(), t[:1].clone()
        recorded = _capture_or_warn(lambda: self.model(own_x, own_t.expand(len(x)), **own))
        return None if recorded is None else _Recorded(own_x, own_t, own, *recorded)


def _capture_or_warn(call: Callable[[], Result], pool: Any = None) -> tuple[Result, Callable[[], object]] | None:
    """Record the kernels of a call; return None with a warning if they cannot be recorded."""
    try:
        return capture(call, pool)
    except torch.OutOfMemoryError:
        raise  # a direct call would run out of memory too
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        warnings.warn(f"wbdit: cannot capture a CUDA graph, running without one: {reason}", stacklevel=5)
        return None


def _key(x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Hashable:
    """Return everything that a recorded call depends on, except the values of its inputs."""
    device = x.device.type
    lowered = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    others = tuple((name, value.shape, value.dtype) for name, value in given.items())
    modes = ops.active_backend(), torch.is_inference_mode_enabled()
    return x.shape, x.dtype, x.device, t.dtype, others, lowered, modes


def capture(call: Callable[[], Result], pool: Any = None) -> tuple[Result, Callable[[], object]]:
    """Record the kernels of a call on the current device; return its result and a function that computes it anew.

    Graphs with one memory pool share memory: no two of them may run at the same time.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # autocast caches its casts of weights in memory that the graph does not own
    with torch.cuda.graph(graph, pool=pool):
        torch.clear_autocast_cache()
        result = call()
        torch.clear_autocast_cache()
    return result, graph.replay
