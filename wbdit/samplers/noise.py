"""Counter-based noise, and the numbers of all random streams that the package draws.

A draw depends only on the seed, the sample's index and the stream's number. Samplers number their streams from 0: 0 is
the initial noise, and ``step + 1`` is the fresh noise of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from wbdit import ops

# stream numbers for library sizes and counts, above those of any sampler's steps
LIBRARY_DRAW, COUNT_DRAW = 2**32 - 1, 2**32 - 2
PLACE_DRAW = 2**31  # of the training cell near which a cell starts
# recast cells: the noise of the first draw, and the place within counts; two streams less for each next draw
RECAST_NOISE, RECAST_PLACE = 2**32 - 3, 2**32 - 4

Noise = Callable[[int], Tensor] | Sequence[Tensor] | Tensor


class PhiloxNoise:
    """A noise source whose draws depend only on the seed, the sample's index and the step, not on the batch.

    Samplers draw this noise inside their update (:func:`wbdit.ops.sampler_step`), without writing it to memory. Calling
    the object returns the same noise as a tensor. See :func:`wbdit.ops.normal` for the generator.

    Parameters
    ----------
    seed
        64-bit seed.
    samples
        Indices of the samples in the batch ``(B,)``, int64.
    shape
        Shape of one sample ``(C, G)``.

    Examples
    --------
    >>> noise = wbdit.samplers.PhiloxNoise(seed=1, samples=torch.tensor([7, 8]), shape=(1, 50))
    >>> noise(0).shape
    torch.Size([2, 1, 50])
    >>> alone = wbdit.samplers.PhiloxNoise(seed=1, samples=torch.tensor([8]), shape=(1, 50))
    >>> torch.equal(alone(0)[0], noise(0)[1])
    True
    """

    def __init__(self, seed: int, samples: Tensor, shape: Sequence[int]) -> None:
        self.seed = seed
        self.samples = samples
        self.shape = tuple(shape)

    def __call__(self, step: int) -> Tensor:
        """Return the noise of a step, ``(B, C, G)`` fp32: step 0 is the first update, -1 the initial noise."""
        return ops.normal(self.seed, self.samples, step + 1, math.prod(self.shape)).unflatten(1, self.shape)

    def address(self, step: int) -> dict[str, Any]:
        """Return the arguments with which :func:`wbdit.ops.sampler_step` draws the same noise."""
        return {"samples": self.samples, "seed": self.seed, "step": step + 1}
