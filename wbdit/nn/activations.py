"""Activations of white-box blocks, and where tokens lie in the subspaces of their heads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor

from wbdit import ops
from wbdit.nn.wbdit import WBDiT, WhiteBoxBlock

AXES = 3  # principal axes per head


class BlockActivations(NamedTuple):
    """Activations of one block, ``(B, N, d)`` each.

    Attributes
    ----------
    before, after
        The residual stream before and after MSSA's half-step, both with the norm, shift and scale of MSSA's input.
        ``before`` is that input.
    tokens
        Input of ISTA, normalized and modulated. It is also the code that ISTA starts from.
    code
        Output of ISTA, before gate and residual.
    stream
        The residual stream after the block.
    """

    before: Tensor
    after: Tensor
    tokens: Tensor
    code: Tensor
    stream: Tensor


@torch.no_grad()
def iterate_blocks(
    model: WBDiT, x: Tensor, t: Tensor, y: Tensor | None = None, conditioning: Tensor | None = None
) -> Iterator[BlockActivations]:
    """Run the model and yield the activations of each block, the first block first.

    Parameters
    ----------
    model
        The denoiser.
    x, t, y, conditioning
        Its inputs, see :class:`wbdit.WBDiT`.

    Examples
    --------
    >>> from wbdit.nn.activations import iterate_blocks
    >>> model = wbdit.WBDiT(input_size=24, patch_size=4, hidden_size=16, depth=2, num_heads=2)
    >>> x, t = torch.randn(3, 1, 24), torch.tensor([5, 500, 900])
    >>> [tuple(activations.code.shape) for activations in iterate_blocks(model, x, t)]
    [(3, 6, 16), (3, 6, 16)]
    """
    tokens = model.embed_cells(x)
    modulations = model.modulations(t, y, conditioning)
    shift, scale = modulations[0][:2]
    z = ops.adaln(tokens, shift, scale)
    for block, (modulation, (next_shift, next_scale, *_)) in zip(model.blocks, pairwise(modulations), strict=True):
        block = cast(WhiteBoxBlock, block)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        tokens = tokens + gate1[:, None] * block.attn(z)
        seen = ops.adaln(tokens, shift2, scale2)
        code = block.mlp(seen)
        after = ops.adaln(tokens, shift1, scale1)
        tokens = tokens + gate2[:, None] * code
        yield BlockActivations(z, after, seen, code, tokens)
        z = ops.adaln(tokens, next_shift, next_scale)


def site(model: WBDiT, tokens: Tensor) -> Tensor:
    """Return the cell token of tokens ``(B, N, d)``, or their mean in a model without one, ``(B, d)``."""
    return tokens[:, -1] if model.has_cell_token else tokens.mean(1)


def axes_of(block: WhiteBoxBlock, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return where tokens ``(B, d)`` lie in the heads' subspaces ``(h, B, p)``, and their principal axes there.

    The axes are ``(h, AXES, p)``, at most one per dimension. Each points to where its largest coordinate is positive,
    since a principal axis has no direction of its own.
    """
    w = (z @ projections(block).mT).float()
    axes = torch.linalg.svd(w - w.mean(1, keepdim=True), full_matrices=False).Vh[:, :AXES]
    longest = axes.gather(-1, axes.abs().argmax(-1, keepdim=True))
    return w, axes * longest.sign()


def projections(block: WhiteBoxBlock) -> Tensor:
    """Return the projections of the heads, ``(h, p, d)``."""
    return block.attn.qkv.weight.unflatten(0, (block.attn.num_heads, -1))
