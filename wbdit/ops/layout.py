"""Memory layouts and dtypes that the engines support."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16)  # the floating dtypes that the engines support


def dense(t: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor; None stays None."""
    return None if t is None else t.contiguous()


def dense_rows(t: Tensor) -> Tensor:
    """Return ``(B, d)`` with contiguous rows at any row stride; slices and expanded rows are not copied."""
    return t if t.stride(-1) == 1 else t.contiguous()


def fresh(t: Tensor) -> Tensor:
    """Return a new contiguous, uninitialized tensor of the same shape, dtype and device."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)
