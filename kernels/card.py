"""Limits of a GPU; block sizes beyond them are not candidates."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Card:
    """The limits of a GPU.

    Parameters
    ----------
    shared
        Bytes of shared memory available to one program.
    generation
        Major number of NVIDIA's compute capability, 9 for Hopper; 0 for other vendors.
    """

    shared: int
    generation: int

    @property
    def wide_products(self) -> bool:
        """Whether the matrix units read operands from shared memory; on other GPUs large tiles spill registers."""
        return self.generation in (9, 10)


def card_of(device: torch.device) -> Card:
    """Return the limits of a device from Triton's driver; no limit if kernels are interpreted."""
    if triton.knobs.runtime.interpret:
        return Card(sys.maxsize, 9)
    driver = triton.runtime.driver.active
    return _read(driver, driver.get_current_device() if device.index is None else device.index)


@functools.cache
def _read(driver: Any, index: int) -> Card:
    shared = int(driver.utils.get_device_properties(index)["max_shared_mem"])
    arch = driver.get_current_target().arch  # assumes one kind of GPU per process, as Triton does
    return Card(shared, arch // 10 if isinstance(arch, int) else 0)
