"""Minimum arithmetic of a denoiser: the exact FLOP count of its matrix products.

A product of (m, k) by (k, n) counts 2 m k n, as in torch.utils.flop_counter. The count includes the products that
remain after the exact folds: the dictionary's F = D - D^T D (one product instead of the formula's three) and the shared
projection (one instead of attention's three). Element-wise work is not counted, so no code can reach the floor.
"""

from __future__ import annotations

from dataclasses import dataclass

FREQUENCIES = 256  # of the timestep embedding

# d x d products per token and block. White box: qkv, to_out, ista. Black box: qkv (3), proj (1), MLP (4 + 4)
PRODUCTS = {"white": 3, "black": 12}


@dataclass(frozen=True)
class Sizes:
    """Sizes that determine the count; `conditions` is the number of distinct (timestep, label) pairs in the batch."""

    batch: int
    tokens: int
    d: int
    depth: int
    patch: int  # values per patch, in and out
    conditions: int
    kind: str = "white"


def forward(s: Sizes) -> int:
    """Return the FLOPs of one call, with dictionaries that are already folded."""
    block = mssa(s) + PRODUCTS[s.kind] * linear(s, s.d, s.d)
    final = linear(s, s.d, s.patch)
    return _embedding(s) + s.depth * block + final + _conditioning(s)


def train(s: Sizes) -> int:
    """Return the FLOPs of one step: three times the forward's, minus two unneeded input gradients, plus the folds.

    Attention's gradient has three products and recomputes the scores, twice its forward (see the reference).
    """
    unneeded = _embedding(s) + _timestep_waves(s)  # cells and sinusoids need no gradient
    folds = 2 * s.depth * fold(s) if s.kind == "white" else 0
    return 3 * forward(s) - unneeded + folds


def linear(s: Sizes, inputs: int, outputs: int) -> int:
    """Return the FLOPs of a linear layer on every token."""
    return s.batch * s.tokens * 2 * inputs * outputs


def mssa(s: Sizes) -> int:
    """Return the FLOPs of attention's two products, without its projections."""
    return s.batch * s.tokens * 4 * s.tokens * s.d


def fold(s: Sizes) -> int:
    """Return the FLOPs of one fold; its gradient, dD = dF - D (dF + dF^T), has as many."""
    return 2 * s.d**3


def _embedding(s: Sizes) -> int:
    return linear(s, s.patch, s.d)


def _timestep_waves(s: Sizes) -> int:
    return s.conditions * 2 * FREQUENCIES * s.d


def _conditioning(s: Sizes) -> int:
    """Return the FLOPs of the timestep's MLP, six modulation vectors per block, and two of the final layer."""
    return _timestep_waves(s) + s.conditions * 2 * s.d * s.d * (1 + 6 * s.depth + 2)
