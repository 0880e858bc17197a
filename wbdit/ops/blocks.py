"""White-box blocks one after another, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wbdit.ops import reference
from wbdit.ops.dispatch import adapter, define_op


def run_blocks(
    x: Tensor,
    modulations: Sequence[Tensor],
    projections: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor],
    folded: Sequence[Tensor],
    heads: int,
    eta: float = 0.1,
    lam: float = 0.1,
    eps: float = 1e-6,
) -> Tensor:
    """Run white-box blocks one after another, without gradients: adaln, then a block's two half-steps each.

    What a GPU does in fewer and larger steps than the parts. The residual stream is kept in the type of `x`, or in the
    products' where a kernel runs.

    Parameters
    ----------
    x
        Residual stream ``(B, N, d)``, floating.
    modulations
        ``(B, d)`` each: of every block shift, scale, gate, shift, scale, gate; of what follows shift and scale.
    projections, outs, biases
        Of every block the weight ``(h * p, d)`` before :func:`wbdit.ops.mssa`, and the weight ``(d, h * p)`` and bias
        ``(d,)`` after it.
    folded
        Of every block the folded dictionary ``(d, d)``. Products are formed in its type, and the weights have it.
    heads, eta, lam, eps
        As in :func:`wbdit.ops.mssa` and :func:`wbdit.ops.ista_adaln`.

    Returns
    -------
    The stream's modulated norm after the last block ``(B, N, d)``, in the type of `folded`.
    """
    weights = list(projections), list(outs), list(biases), list(folded)
    return _run_blocks(x, list(modulations), *weights, heads, eta, lam, eps)


def _run_blocks_on(
    engine: Any,
    x: Tensor,
    modulations: list[Tensor],
    projections: list[Tensor],
    outs: list[Tensor],
    biases: list[Tensor],
    folded: list[Tensor],
    heads: int,
    eta: float,
    lam: float,
    eps: float,
) -> Tensor:
    """Run the blocks op by op, the half-steps in place."""
    z = adapter("adaln")(engine, x, modulations[0], modulations[1], eps, folded[0].dtype)
    x = x.clone(memory_format=torch.contiguous_format)
    for block, (projection, out, bias, dictionary) in enumerate(zip(projections, outs, biases, folded, strict=True)):
        _, _, gate1, shift2, scale2, gate2, shift, scale = modulations[6 * block : 6 * block + 8]
        z = adapter("mssa")(engine, z @ projection.mT, heads)[0] @ out.mT
        adapter("gated_adaln_")(engine, x, z, bias, gate1, shift2, scale2, eps)
        adapter("ista_adaln_")(engine, x, z, dictionary, gate2, shift, scale, eta, lam, eps)
    return z


_run_blocks = define_op(
    "run_blocks",
    "(Tensor x, Tensor[] modulations, Tensor[] projections, Tensor[] outs, Tensor[] biases, Tensor[] folded, "
    "int heads, float eta, float lam, float eps) -> Tensor",
    reference.run_blocks,
    fake=lambda x, modulations, projections, outs, biases, folded, *rest: torch.empty_like(x, dtype=folded[0].dtype),
    on_engine=_run_blocks_on,
)
