"""A denoiser's call on a GPU as a CUDA graph: recorded once for a shape, replayed from then on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from wbdit import ops
from wbdit.nn.denoiser import Denoises
from wbdit.schedule import Prediction

WARM = 3  # calls before recording: compiling, choosing block sizes, libraries' own memory


@dataclass
class _Recorded:
    """A call's inputs and output, in memory that stays where it is, and what computes the one from the others."""

    x: Tensor
    t: Tensor
    given: dict[str, Tensor]
    out: Tensor
    replay: Callable[[], object]

    def __call__(self, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
        """Copy the inputs in, replay, and copy the answer out: the next replay writes there again."""
        self.x.copy_(x)
        self.t.copy_(t[:1])
        for name, value in given.items():
            self.given[name].copy_(value)
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

    def __init__(self, model: Denoises) -> None:
        self.model = model
        self.prediction: Prediction = model.prediction
        self.label_sizes = model.label_sizes
        self.embed: Callable[..., Tensor] = model.embed
        self._recorded: dict[Hashable, _Recorded | None] = {}  # None: it cannot be recorded

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, conditioning: Tensor | None = None) -> Tensor:
        """Answer for ``(B, C, G)`` at timesteps ``(B,)``, which samplers give as a view of one number."""
        given = {name: value for name, value in (("y", y), ("conditioning", conditioning)) if value is not None}
        if not self._replays(x, t):
            return self.model(x, t, **given)
        with torch.cuda.device_of(x):  # a graph is recorded and replayed on its tensors' device
            key = _key(x, t, given)
            if key not in self._recorded:
                self._recorded[key] = self._record(x, t, given)
            recorded = self._recorded[key]
            return self.model(x, t, **given) if recorded is None else recorded(x, t, given)

    def _replays(self, x: Tensor, t: Tensor) -> bool:
        return x.is_cuda and t.stride(0) == 0 and not torch.is_grad_enabled() and not self.model.training

    def _record(self, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> _Recorded | None:
        own = {name: value.clone() for name, value in given.items()}
        kept = _Recorded(x.clone(), t[:1].clone(), own, torch.empty(0), lambda: None)

        def call() -> None:
            kept.out = self.model(kept.x, kept.t.expand(len(x)), **kept.given)

        try:
            kept.replay = capture(call)
        except torch.OutOfMemoryError:
            raise  # the call itself has no memory either
        except RuntimeError as error:
            reason = (str(error).splitlines() or [""])[0]
            warnings.warn(f"wbdit: no CUDA graph of this model, it runs kernel by kernel: {reason}", stacklevel=4)
            return None
        return kept


def _key(x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Hashable:
    """Return all that a recorded call depends on besides the numbers in its inputs."""
    device = x.device.type
    lowered = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    others = tuple((name, value.shape, value.dtype) for name, value in given.items())
    modes = ops.active_backend(), torch.is_inference_mode_enabled()
    return x.shape, x.dtype, x.device, t.dtype, others, lowered, modes


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
