"""A denoiser's GPU call as a CUDA graph, recorded once per input shape and then replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from wbdit import ops
from wbdit.nn.denoiser import Denoises
from wbdit.nn.weight_cache import WeightCache
from wbdit.schedule import Prediction

WARM = 3  # warm-up calls before recording: they compile and autotune kernels and allocate library workspaces


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


class CUDAGraphModel:
    """A denoiser that a GPU runs as a CUDA graph, with one graph launch per call.

    A denoiser call launches dozens of kernels. For small batches, launching them takes longer than running them. The
    first call with a given input shape records the kernels; later calls copy their inputs in and replay.

    The denoiser is called directly on other devices, with gradients, in training mode, and where timesteps differ
    between samples. It is also called directly if recording fails: a warning gives the reason, once per shape.

    Parameters
    ----------
    model
        A denoiser, or a :class:`wbdit.counts.denoiser.CountDenoiser`. When its weights change, all is recorded anew;
        after a change through ``.data``, call ``model.eval()``. After moving it to another device, create a new
        :class:`CUDAGraphModel`.
    """

    def __init__(self, model: Denoises) -> None:
        self.model = model
        self.prediction: Prediction = model.prediction
        self.label_sizes = model.label_sizes
        self.embed: Callable[..., Tensor] = model.embed
        self._weights = WeightCache()
        self._version: Hashable = None
        self._recorded: dict[Hashable, _Recorded | None] = {}  # None: recording failed

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, conditioning: Tensor | None = None) -> Tensor:
        """Return the model's output for ``(B, C, G)`` at timesteps ``(B,)``.

        A graph is used only if `t` is an expanded view of one number (stride 0), as samplers pass it.
        """
        given = {name: value for name, value in (("y", y), ("conditioning", conditioning)) if value is not None}
        if not self._replays(x, t):
            return self.model(x, t, **given)
        with torch.cuda.device_of(x):  # record and replay on the device of the inputs
            self._drop_outdated()
            key = _key(x, t, given)
            if key not in self._recorded:
                self._recorded[key] = self._record(x, t, given)
            recorded = self._recorded[key]
            return self.model(x, t, **given) if recorded is None else recorded(x, t, given)

    def _replays(self, x: Tensor, t: Tensor) -> bool:
        return x.is_cuda and t.stride(0) == 0 and not torch.is_grad_enabled() and not self.model.training

    def _drop_outdated(self) -> None:
        """Drop all recordings if a weight has changed: they hold tensors that were made from the weights."""
        weights = (*self.model.parameters(), *self.model.buffers())
        version = self._weights.version(weights), self.model.network.generation
        if version != self._version:
            self._recorded.clear()
            self._version = version

    def _record(self, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> _Recorded | None:
        own = {name: value.clone() for name, value in given.items()}
        kept = _Recorded(x.clone(), t[:1].clone(), own, torch.empty(0), lambda: None)

        def call() -> None:
            kept.out = self.model(kept.x, kept.t.expand(len(x)), **kept.given)

        try:
            kept.replay = capture(call)
        except torch.OutOfMemoryError:
            raise  # a direct call would run out of memory too
        except RuntimeError as error:
            reason = (str(error).splitlines() or [""])[0]
            warnings.warn(f"wbdit: cannot capture a CUDA graph, running without one: {reason}", stacklevel=4)
            return None
        return kept


def _key(x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Hashable:
    """Return everything that a recorded call depends on, except the values of its inputs."""
    device = x.device.type
    lowered = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    others = tuple((name, value.shape, value.dtype) for name, value in given.items())
    modes = ops.active_backend(), torch.is_inference_mode_enabled()
    return x.shape, x.dtype, x.device, t.dtype, others, lowered, modes


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """Record the kernels of a call on the current device, and return a function that replays them."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # autocast caches its casts of weights in memory that the graph does not own
    with torch.cuda.graph(graph):
        torch.clear_autocast_cache()
        call()
        torch.clear_autocast_cache()
    return graph.replay
