"""A cache of values computed from weights: inference calls a model many times with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Value = TypeVar("Value")
PROBES = 16
TRACKED = ("cuda",)  # device types whose weights are not read back, but known by their version
_optimizer_steps = [0]


def _count_step(*_: Any) -> None:
    _optimizer_steps[0] += 1


register_optimizer_step_post_hook(_count_step)  # fused optimizers do not advance version counters


class WeightCache:
    """A small cache of values computed from weights, cleared when any of the weights changes.

    Parameters
    ----------
    limit
        Maximum number of values; a full cache is cleared.

    Attributes
    ----------
    generation
        Number of times that the cache has been cleared.
    """

    def __init__(self, limit: int = 1024) -> None:
        self.limit = limit
        self.generation = 0
        self._seen: tuple[Any, ...] = ()
        self._held: tuple[Tensor, ...] = ()
        self._values: dict[Hashable, Any] = {}

    def values(self, weights: Iterable[Tensor]) -> dict[Hashable, Any]:
        """Return the cached values that are valid for `weights`, as a dict for look-ups and additions."""
        weights = tuple(weights)
        seen = (_optimizer_steps[0], *(_fingerprint(weight) for weight in weights))
        if seen != self._seen or len(self._values) >= self.limit:
            self.clear()
            self._seen = seen
            # as long as a weight's memory is held, no new weight can have its address
            self._held = tuple(weight.detach() for weight in weights if not is_cheap_to_read(weight))
        return self._values

    def version(self, weights: Iterable[Tensor]) -> int:
        """Return the generation of the values for `weights`: it grows whenever one of them changes."""
        self.values(weights)
        return self.generation

    def clear(self) -> None:
        """Clear the cache; a model does so whenever it enters training or evaluation mode."""
        self._seen, self._held, self._values = (), (), {}
        self.generation += 1

    def get(self, key: Hashable, weights: Iterable[Tensor], compute: Callable[[], Value]) -> Value:
        """Return the value of a key, computing it if it is missing or a weight has changed."""
        values = self.values(weights)
        if key in values:
            return values[key]
        value = compute()
        if not _is_recording():  # a value in the memory of a CUDA graph is not computed until the graph is replayed
            values[key] = value
        return value

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without cached values, so that pickles and deep copies start empty."""
        return {"limit": self.limit, "generation": 0, "_seen": (), "_held": (), "_values": {}}


class RemembersWeights(nn.Module):
    """A module with a cache of values computed from its weights, ``_cache``."""

    def __init__(self) -> None:
        super().__init__()
        self._cache = WeightCache()

    def forget(self) -> None:
        """Clear the cache. Call it, or :meth:`eval`, after changing weights through ``.data``."""
        self._cache.clear()

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode, and clear the cache."""
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the weights, and clear the cache."""
        self.forget()
        return super()._apply(fn, recurse)


def may_cache(*weights: Tensor) -> bool:
    """Return whether values of these weights may be cached: on a CPU, without gradients, compilation or tracing."""
    return _is_plain_inference() and all(map(is_cheap_to_read, weights))


def may_pack(weights: Iterable[Tensor]) -> bool:
    """Return whether tensors made from these weights may be kept: on a GPU too, without gradients or compilation.

    On a GPU a change is seen by the weight's address and version counter and by optimizer steps, without reading
    values. Changes through ``.data`` are not: call ``model.eval()`` after them. Weights made in inference mode have no
    version counter.
    """
    return _is_plain_inference() and all(is_cheap_to_read(weight) or _has_version(weight) for weight in weights)


def is_cheap_to_read(t: Tensor) -> bool:
    """Return whether values of a tensor can be read without waiting for a GPU."""
    return t.device.type == "cpu"


def _has_version(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter)  # subclasses may change without a new version
    return weight.device.type in TRACKED and plain and not weight.is_inference()


def _is_plain_inference() -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())


def _is_recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _fingerprint(weight: Tensor) -> tuple[Any, ...]:
    """Return values that identify a weight's state: its address, version counter, dtype and shape; on a CPU, elements.

    The version counter misses changes through ``.data``, which weight averaging often uses, and a new tensor may reuse
    the address of an old one. A change of only a few elements through ``.data`` can go undetected: call
    ``model.eval()`` after it to clear the cache.
    """
    version = None if weight.is_inference() else weight._version
    state = weight.data_ptr(), version, weight.dtype, weight.shape
    if not (is_cheap_to_read(weight) and weight.is_contiguous()):
        return state
    return *state, *weight.detach().flatten()[:: max(1, weight.numel() // PROBES)].tolist()
