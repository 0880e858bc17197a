"""Noise by its address, and every stream of it that the package draws.

A draw depends on the seed, the sample's index and the stream's number alone. Samplers take the numbers from 0 on: 0 is
the starting noise, ``step + 1`` the fresh noise of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from wbdit import ops

# numbers of the streams that draw library sizes and counts, out of reach of any sampler's step
LIBRARY_DRAW, COUNT_DRAW = 2**32 - 1, 2**32 - 2

Noise = Callable[[int], Tensor] | Sequence[Tensor] | Tensor


class PhiloxNoise:
    """A source of noise in which a sample's draws depend on the seed and the sample's index alone.

    A sampler given one draws inside its update (:func:`wbdit.ops.sampler_step`); called, it writes the noise out.

    Parameters
    ----------
    seed
        64 bits.
    samples
        Indices of the samples in the batch ``(B,)``, int64.
    shape
        Shape of one sample ``(C, G)``.
    """

    def __init__(self, seed: int, samples: Tensor, shape: Sequence[int]) -> None:
        self.seed = seed
        self.samples = samples
        self.shape = tuple(shape)

    def __call__(self, step: int) -> Tensor:
        """Return the noise ``(B, C, G)`` fp32 of a step: 0 for the first update, -1 for the starting noise."""
        return ops.normal(self.seed, self.samples, step + 1, math.prod(self.shape)).unflatten(1, self.shape)

    def address(self, step: int) -> dict[str, Any]:
        """Return the arguments by which :func:`wbdit.ops.sampler_step` draws the same noise."""
        return {"samples": self.samples, "seed": self.seed, "step": step + 1}
