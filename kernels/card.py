"""A card's limits: block sizes that do not fit it are no candidates there."""

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
        Bytes of shared memory that one program may take.
    generation
        First digits of NVIDIA's compute capability, 9 for Hopper; 0 for another's GPU.
    """

    shared: int
    generation: int

    @property
    def wide_products(self) -> bool:
        """Whether the matrix units read their operands from shared memory; elsewhere large tiles spill registers."""
        return self.generation in (9, 10)


def card_of(device: torch.device) -> Card:
    """Return the limits of a device as Triton's driver gives them; none where kernels are interpreted."""
    if triton.knobs.runtime.interpret:
        return Card(sys.maxsize, 9)
    driver = triton.runtime.driver.active
    return _read(driver, driver.get_current_device() if device.index is None else device.index)


@functools.cache
def _read(driver: Any, index: int) -> Card:
    shared = int(driver.utils.get_device_properties(index)["max_shared_mem"])
    arch = driver.get_current_target().arch  # all GPUs of a process are taken to be of one kind, as Triton does
    return Card(shared, arch // 10 if isinstance(arch, int) else 0)
