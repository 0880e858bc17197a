"""How much arithmetic a denoiser cannot do without: the exact count of its matrix products.

A product of (m, k) by (k, n) counts 2 m k n, as in torch.utils.flop_counter. Counted are the products that remain after
the exact folds: the dictionary's F = D - D^T D (one product where the formula has three) and the shared projection (one
where attention has three). Element-wise work counts nothing, so the floor is below what any code can reach.
"""

from __future__ import annotations

from dataclasses import dataclass

FREQUENCIES = 256  # of the timestep embedding

# d x d products a token and block: qkv, to_out and ista; and, black box, qkv of 3, proj and a perceptron of 4 + 4
PRODUCTS = {"white": 3, "black": 12}


@dataclass(frozen=True)
class Sizes:
    """What the count depends on; `conditions` is how many different (timestep, label) pairs the batch holds."""

    batch: int
    tokens: int
    d: int
    depth: int
    patch: int  # values a patch, in and out
    conditions: int
    kind: str = "white"


def forward(s: Sizes) -> int:
    """Return the operations of one call, the dictionaries being folded beforehand."""
    block = mssa(s) + PRODUCTS[s.kind] * linear(s, s.d, s.d)
    final = linear(s, s.d, s.patch)
    return _embedding(s) + s.depth * block + final + _conditioning(s)


def train(s: Sizes) -> int:
    """Return the operations of one step: three times the forward's, less two input gradients nobody needs, and folds.

    Attention's gradient is three products and the scores formed anew, which is twice its forward (see the reference).
    """
    unneeded = _embedding(s) + _timestep_waves(s)  # cells and sinusoids take no gradient
    folds = 2 * s.depth * fold(s) if s.kind == "white" else 0
    return 3 * forward(s) - unneeded + folds


def linear(s: Sizes, inputs: int, outputs: int) -> int:
    """Return the operations of a linear map on every token."""
    return s.batch * s.tokens * 2 * inputs * outputs


def mssa(s: Sizes) -> int:
    """Return the operations of attention's two products, without the projections around it."""
    return s.batch * s.tokens * 4 * s.tokens * s.d


def fold(s: Sizes) -> int:
    """Return the operations of one fold; its gradient, dD = dF - D (dF + dF^T), takes as many."""
    return 2 * s.d**3


def _embedding(s: Sizes) -> int:
    return linear(s, s.patch, s.d)


def _timestep_waves(s: Sizes) -> int:
    return s.conditions * 2 * FREQUENCIES * s.d


def _conditioning(s: Sizes) -> int:
    """Count the timestep's perceptron, six modulation vectors a block and two of the final layer."""
    return _timestep_waves(s) + s.conditions * 2 * s.d * s.d * (1 + 6 * s.depth + 2)
