"""The C++ kernels of csrc/ as the ops' engine on a CPU; where they cannot be built, the reference runs."""

from __future__ import annotations

import os

import torch

from wbdit.errors import InputError
from wbdit.ops import build, dispatch

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def cpu_level() -> str:
    """Return the instruction set that the kernels use, one of :data:`LEVELS`; "none" where they cannot be built.

    Raises
    ------
    InputError
        If the environment variable ``WBDIT_CPU``, which may hold it to a lower one, names none.
    """
    wanted = os.environ.get("WBDIT_CPU")
    if wanted not in (None, *LEVELS):
        raise InputError(f"no processor level WBDIT_CPU={wanted}: choose one of {', '.join(LEVELS)}")
    return LEVELS[torch.ops.wbdit_csrc.cpu_level()] if build.available() else "none"


def has_fast_bf16() -> bool:
    """Whether bf16 is worth computing in here: the processor multiplies it, and the kernels are there."""
    return cpu_level() in ("avx512_bf16", "amx")


def register() -> None:
    """Enter the kernels for tensors on a CPU."""
    dispatch.add_engine("cpu", "csrc", torch.ops.wbdit_csrc, build.available)
