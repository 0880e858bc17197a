"""A stack of white-box blocks as one op, for inference."""

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
    """Run a stack of white-box blocks: :func:`wbdit.ops.adaln`, then two half-steps per block.

    Each block applies :func:`wbdit.ops.mssa` and :func:`wbdit.ops.ista`, each followed by
    :func:`wbdit.ops.gated_adaln`. As one op, the stack takes fewer and larger kernels on a GPU. The residual stream
    keeps the dtype of `x`; a kernel may keep it in the dtype of the matrix products.

    Parameters
    ----------
    x
        Residual stream ``(B, N, d)``, floating.
    modulations
        ``(B, d)`` each, ``6 * depth + 2`` in all: shift, scale, gate, shift, scale, gate per block, then shift and
        scale of the final norm.
    projections
        Weights ``(h * p, d)`` of the linear map before :func:`wbdit.ops.mssa`, one per block.
    outs, biases
        Weights ``(d, h * p)`` and biases ``(d,)`` of the linear map after :func:`wbdit.ops.mssa`, one per block.
    folded
        Folded dictionaries ``(d, d)``, one per block (see :func:`wbdit.ops.fold`). All weights share their dtype,
        which is that of the matrix products.
    heads, eta, lam, eps
        As in :func:`wbdit.ops.mssa` and :func:`wbdit.ops.ista_adaln`.

    Returns
    -------
    The modulated norm of the residual stream after the last block ``(B, N, d)``, in the dtype of `folded`. No gradient
    is defined.

    Examples
    --------
    >>> x, modulations = torch.randn(2, 5, 8), torch.zeros(8, 2, 8)  # one block
    >>> weight, bias = torch.eye(8), torch.zeros(8)
    >>> folded = wbdit.ops.fold(weight)
    >>> wbdit.ops.run_blocks(x, modulations, [weight], [weight], [bias], [folded], heads=2).shape
    torch.Size([2, 5, 8])
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
    """Run the blocks op by op, with the half-steps in place."""
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
