"""Memory as the engines read and write it."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16)  # floating types that the engines compute with


def dense(t: Tensor | None) -> Tensor | None:
    """Return a tensor without gaps; None stays None."""
    return None if t is None else t.contiguous()


def dense_rows(t: Tensor) -> Tensor:
    """Return ``(B, d)`` with dense rows, any distance apart: slices of one table, or one row for all, are no copies."""
    return t if t.stride(-1) == 1 else t.contiguous()


def fresh(t: Tensor) -> Tensor:
    """Return new dense memory of a tensor's shape and type."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)
