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
    wide_products
        Whether the matrix units read their operands from shared memory, as those of NVIDIA's compute capabilities 9
        and 10 do. Elsewhere operands take registers, and large tiles spill.
    """

    shared: int
    wide_products: bool


def card_of(device: torch.device) -> Card:
    """Return the limits of a device as Triton's driver gives them; none where kernels are interpreted."""
    if triton.knobs.runtime.interpret:
        return Card(sys.maxsize, True)
    driver = triton.runtime.driver.active
    return _read(driver, driver.get_current_device() if device.index is None else device.index)


@functools.cache
def _read(driver: Any, index: int) -> Card:
    shared = int(driver.utils.get_device_properties(index)["max_shared_mem"])
    arch = driver.get_current_target().arch  # all GPUs of a process are taken to be of one kind, as Triton does
    return Card(shared, isinstance(arch, int) and arch // 10 in (9, 10))
