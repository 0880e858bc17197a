"""Memory of a training: how much it took, and whether a model can fit at all."""

from __future__ import annotations

import sys

import torch

from wbdit.data.capacity import physical_memory
from wbdit.errors import InputError
from wbdit.generator import DENOISERS
from wbdit.training.config import Preset

COPIES = 6  # of each weight: itself, its gradient, AdamW's two moments, its average, and a copy while saving
GIGABYTE = 1e9


def peak_memory(device: torch.device) -> int | None:
    """Return the largest memory of this process so far in bytes: on the GPU, or in RAM; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def total_memory(device: torch.device) -> int | None:
    """Return the memory of the device in bytes; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return physical_memory()


def check_memory(preset: Preset, genes: int, device: torch.device) -> None:
    """Raise an InputError if the weights of a preset cannot fit into the memory of the device.

    Only weights count, so a model that passes may still be too large.
    """
    weights, total = count_weights(preset, genes), total_memory(device)
    if total is not None and 4 * COPIES * weights > total:
        raise InputError(
            f"the model would have {weights / 1e6:,.0f} million weights, whose training needs "
            f"{4 * COPIES * weights / GIGABYTE:,.0f} GB or more, but {device} has {total / GIGABYTE:,.0f} GB: choose a "
            "smaller model.hidden_size or model.depth"
        )


def count_weights(preset: Preset, genes: int) -> int:
    """Return the number of weights of a preset's denoiser without labels; it is not built."""

    def weights(depth: int) -> int:
        with torch.device("meta"):
            model = DENOISERS[preset.denoiser](**{**preset.model_for(genes), "depth": depth})
        return sum(p.numel() for p in model.parameters())

    one = weights(1)
    return one + (preset.model.get("depth", 1) - 1) * (weights(2) - one)
