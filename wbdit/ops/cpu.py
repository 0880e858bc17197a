"""The C++ kernels of csrc/ as the ops' engine on a CPU; the reference runs if they cannot be built."""

from __future__ import annotations

import os

import torch

from wbdit.errors import InputError
from wbdit.ops import build, cpu_blocks, dispatch

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def cpu_level() -> str:
    """Return the instruction set of the CPU kernels, one of :data:`LEVELS`, or "none" if they cannot be built.

    The environment variable ``WBDIT_CPU`` can limit it to a lower one.

    Raises
    ------
    InputError
        If ``WBDIT_CPU`` is set to anything else.
    """
    wanted = os.environ.get("WBDIT_CPU")
    if wanted not in (None, *LEVELS):
        raise InputError(f"unknown processor level WBDIT_CPU={wanted}: choose one of {', '.join(LEVELS)}")
    return LEVELS[torch.ops.wbdit_csrc.cpu_level()] if build.available() else "none"


def has_fast_bf16() -> bool:
    """Return whether bf16 is faster than fp32 here: the CPU has bf16 instructions and the kernels are built."""
    return cpu_level() in ("avx512_bf16", "amx")


def prefers_bf16(device: torch.device) -> bool:
    """Return whether matrix products in bf16 are faster on a device: on a GPU, and see :func:`has_fast_bf16`."""
    return device.type == "cuda" or has_fast_bf16()


def serves(*tensors: torch.Tensor) -> bool:
    """Return whether the kernels can be called on these tensors: contiguous, in fp32, on a CPU."""
    if not all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
        return False
    return dispatch.active_backend() == "auto" and build.available()


def register() -> None:
    """Register the kernels for tensors on a CPU."""
    dispatch.add_engine("cpu", "csrc", torch.ops.wbdit_csrc, build.available, overrides=cpu_blocks.OVERRIDES)
