"""Values computed from weights, kept until a weight changes: inference calls a model many times with the same ones."""

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


register_optimizer_step_post_hook(_count_step)  # a fused optimizer changes weights without PyTorch counting it


class WeightCache:
    """A small memory of values by key, emptied when any of the weights they came from is no longer the same.

    Parameters
    ----------
    limit
        Number of values kept; at the limit it starts anew.
    """

    def __init__(self, limit: int = 1024) -> None:
        self.limit = limit
        self._seen: tuple[Any, ...] = ()
        self._values: dict[Hashable, Any] = {}

    def values(self, weights: Iterable[Tensor]) -> dict[Hashable, Any]:
        """Return the values that are still true of the `weights`, to look up and to add to."""
        seen = (_optimizer_steps[0], *(_fingerprint(weight) for weight in weights))
        if seen != self._seen or len(self._values) >= self.limit:
            self.clear()
            self._seen = seen
        return self._values

    def clear(self) -> None:
        """Forget everything; a model does so whenever it goes from training to evaluation or back."""
        self._seen, self._values = (), {}

    def get(self, key: Hashable, weights: Iterable[Tensor], compute: Callable[[], Value]) -> Value:
        """Return the value of a key, computing it if a weight has changed or it was never asked for."""
        values = self.values(weights)
        if key not in values:
            values[key] = compute()
        return values[key]

    def __getstate__(self) -> dict[str, Any]:
        """Let a copy of a model, pickled or deep, start with nothing in memory."""
        return {"limit": self.limit, "_seen": (), "_values": {}}


class RemembersWeights(nn.Module):
    """A module with a memory of what it computed from its weights, ``_cache``."""

    def __init__(self) -> None:
        super().__init__()
        self._cache = WeightCache()

    def train(self, mode: bool = True) -> Self:
        """Go to training or evaluation; what was remembered of the weights is forgotten."""
        self._cache.clear()
        return super().train(mode)


def may_cache(*weights: Tensor) -> bool:
    """Whether values of these weights may be kept: no gradient is wanted of them, and no compiler is watching."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(weight.device.type == "cpu" for weight in weights)


def _fingerprint(weight: Tensor) -> tuple[Any, ...]:
    """Tell a weight from what it was: by its memory, its version, and a few of its numbers.

    PyTorch counts a tensor's changes but not those made through ``.data``, as averages of weights often are made; and
    memory that one weight gave back may hold the next. What changes a few numbers alone through ``.data`` goes unseen:
    call ``model.eval()`` after it, which forgets everything.
    """
    version = None if weight.is_inference() else weight._version
    probes = weight.detach().flatten()[:: max(1, weight.numel() // PROBES)].tolist() if weight.is_contiguous() else []
    return weight.data_ptr(), version, weight.dtype, weight.shape, *probes
