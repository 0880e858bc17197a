"""A denoiser's call on a GPU as a CUDA graph: recorded once for a shape, replayed from then on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wbdit import ops
from wbdit.schedule import Prediction

WARM = 3  # calls before recording: compiling, choosing block sizes, libraries' own memory


@dataclass
class _Recorded:
    """A call's inputs and output, in memory that stays where it is, and what computes the one from the others."""

    x: Tensor
    t: Tensor
    y: Tensor | None
    out: Tensor
    replay: Callable[[], object]

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Copy the inputs in, replay, and copy the answer out: the next replay writes there again."""
        self.x.copy_(x)
        self.t.copy_(t[:1])
        if y is not None and self.y is not None:
            self.y.copy_(y)
        self.replay()
        return self.out.clone()


class CUDAGraphModel:
    """A denoiser as samplers call it, whose launches on a GPU cost the host one.

    A call of the denoiser is some dozens of kernels, and few cells are computed faster than these are launched. The
    first call of a shape records them; the next ones copy their inputs in and replay. Where there is nothing to replay
    (another device, wanted gradients, timesteps that differ between samples) the denoiser is called as it is. So it is
    where recording fails: a warning says why, once per shape.

    Parameters
    ----------
    model
        A denoiser, or a :class:`wbdit.counts.denoiser.CountDenoiser`. Its weights may change in place between calls;
        after moving it, make a new one of these.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prediction: Prediction = model.prediction
        self.num_classes = model.num_classes
        self.embed_labels: Callable[..., Tensor] = model.embed_labels
        self._recorded: dict[Hashable, _Recorded | None] = {}  # None: it cannot be recorded

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Answer for ``(B, C, G)`` at timesteps ``(B,)``, which samplers give as a view of one; `y` as the model."""
        if not self._replays(x, t):
            return self.model(x, t, y)
        with torch.cuda.device_of(x):  # a graph is recorded and replayed on its tensors' device
            key = _key(x, t, y)
            if key not in self._recorded:
                self._recorded[key] = self._record(x, t, y)
            recorded = self._recorded[key]
            return self.model(x, t, y) if recorded is None else recorded(x, t, y)

    def _replays(self, x: Tensor, t: Tensor) -> bool:
        return x.is_cuda and t.stride(0) == 0 and not torch.is_grad_enabled() and not self.model.training

    def _record(self, x: Tensor, t: Tensor, y: Tensor | None) -> _Recorded | None:
        kept: Any = _Recorded(x.clone(), t[:1].clone(), None if y is None else y.clone(), torch.empty(0), lambda: None)

        def call() -> None:
            kept.out = self.model(kept.x, kept.t.expand(len(x)), kept.y)

        try:
            kept.replay = capture(call)
        except torch.OutOfMemoryError:
            raise  # the call itself has no room either
        except RuntimeError as error:
            reason = (str(error).splitlines() or [""])[0]
            warnings.warn(f"wbdit: no CUDA graph of this model, it runs kernel by kernel: {reason}", stacklevel=4)
            return None
        return kept


def _key(x: Tensor, t: Tensor, y: Tensor | None) -> Hashable:
    """Return all that a recorded call depends on besides the numbers in its inputs."""
    device = x.device.type
    lowered = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    labels = None if y is None else (y.shape, y.dtype)
    modes = ops.active_backend(), torch.is_inference_mode_enabled()
    return x.shape, x.dtype, x.device, t.dtype, labels, lowered, modes


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """Record a call's kernels on the current device, and return what launches them again."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # autocast remembers what it has cast, in memory that a graph would not own
    with torch.cuda.graph(graph):
        torch.clear_autocast_cache()
        call()
        torch.clear_autocast_cache()
    return graph.replay
