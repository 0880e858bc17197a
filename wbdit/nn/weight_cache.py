"""A cache of values computed from weights: inference calls a model many times with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Value = TypeVar("Value")
PROBES = 16
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
    """

    def __init__(self, limit: int = 1024) -> None:
        self.limit = limit
        self._seen: tuple[Any, ...] = ()
        self._values: dict[Hashable, Any] = {}

    def values(self, weights: Iterable[Tensor]) -> dict[Hashable, Any]:
        """Return the cached values that are valid for `weights`, as a dict for look-ups and additions."""
        seen = (_optimizer_steps[0], *(_fingerprint(weight) for weight in weights))
        if seen != self._seen or len(self._values) >= self.limit:
            self.clear()
            self._seen = seen
        return self._values

    def clear(self) -> None:
        """Clear the cache; a model does so whenever it enters training or evaluation mode."""
        self._seen, self._values = (), {}

    def get(self, key: Hashable, weights: Iterable[Tensor], compute: Callable[[], Value]) -> Value:
        """Return the value of a key, computing it if it is missing or a weight has changed."""
        values = self.values(weights)
        if key not in values:
            values[key] = compute()
        return values[key]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without cached values, so that pickles and deep copies start empty."""
        return {"limit": self.limit, "_seen": (), "_values": {}}


class RemembersWeights(nn.Module):
    """A module with a cache of values computed from its weights, ``_cache``."""

    def __init__(self) -> None:
        super().__init__()
        self._cache = WeightCache()

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode, and clear the cache."""
        self._cache.clear()
        return super().train(mode)


def may_cache(*weights: Tensor) -> bool:
    """Return whether values of these weights may be cached: on a CPU, without gradients, compilation or tracing."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(weight.device.type == "cpu" for weight in weights)


def _fingerprint(weight: Tensor) -> tuple[Any, ...]:
    """Return values that identify a weight's state: its address, version counter, dtype, shape and a few elements.

    The version counter misses changes through ``.data``, which weight averaging often uses, and a new tensor may reuse
    the address of an old one. A change of only a few elements through ``.data`` can go undetected: call
    ``model.eval()`` after it to clear the cache.
    """
    version = None if weight.is_inference() else weight._version
    probes = weight.detach().flatten()[:: max(1, weight.numel() // PROBES)].tolist() if weight.is_contiguous() else []
    return weight.data_ptr(), version, weight.dtype, weight.shape, *probes
