"""Heads that are turned: removed, or with an axis along which all tokens are moved.

Both change weights alone, so that all kernels run such a network as they run any other. A head's output is the product
of its columns of the output matrix with what it attends to. Without these columns the head is removed (ablation). A
multiple of its axis, mapped by these columns and added to the bias, moves all tokens along it (activation steering:
Turner et al. 2023, arXiv 2308.10248, here in a head's subspace).

Blocks, heads and atoms are counted from 0 here, and from 1 in names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from wbdit.errors import InputError
from wbdit.nn.activations import axes_of, iterate_blocks, site
from wbdit.nn.blocks import Modulation
from wbdit.nn.denoiser import Denoiser
from wbdit.nn.wbdit import WBDiT, WhiteBoxBlock

NAME = re.compile(r"block-([1-9]\d*)-head-([1-9]\d*)")


class Axis(NamedTuple):
    """The axis of a head: a unit vector ``(p,)`` in its subspace, and the standard deviation of cells along it."""

    direction: Tensor
    deviation: float


def turnable(model: Denoiser) -> WBDiT:
    """Return a network whose heads can be turned.

    Raises
    ------
    InputError
        If it has DiT blocks, a single head, or no output matrix after attention.
    """
    if not isinstance(model, WBDiT):
        raise InputError('this run has DiT blocks, whose heads have no subspaces: use one with `preset="small"`')
    if not isinstance(cast(WhiteBoxBlock, model.blocks[0]).attn.to_out, nn.Sequential):
        raise InputError("this run's heads have no output weights that could be changed: use one with `tie_out=False`")
    return model


@torch.no_grad()
def head_axes(model: WBDiT, x: Tensor, t: Tensor, conditioning: Tensor | None) -> list[list[Axis]]:
    """Return the axis of each head by block: the first principal axis of cells ``(B, C, G)`` in its subspace.

    Examples
    --------
    >>> from wbdit.nn.heads import head_axes
    >>> model = wbdit.WBDiT(input_size=24, patch_size=4, hidden_size=16, depth=3, num_heads=2)
    >>> axes = head_axes(model, torch.randn(9, 1, 24), torch.full((9,), 500), None)
    >>> len(axes), len(axes[0]), axes[0][1].direction.shape
    (3, 2, torch.Size([8]))
    """
    found = []
    for block, seen in zip(model.blocks, iterate_blocks(model, x, t, conditioning=conditioning), strict=True):
        positions, axes = axes_of(cast(WhiteBoxBlock, block), site(model, seen.before))
        first = axes[:, 0]  # [h, p]
        deviations = (positions @ first[..., None])[..., 0].std(1)
        found.append([Axis(*pair) for pair in zip(first, deviations.tolist(), strict=True)])
    return found


@torch.no_grad()
def move(model: WBDiT, axes: list[list[Axis]], by: Mapping[tuple[int, int], float]) -> None:
    """Move all tokens along axes, by standard deviations for each block and head."""
    for (block, head), dose in by.items():
        axis, out = axes[block][head], _output(model, block)
        out.bias.add_(out.weight[:, columns(model, head)] @ axis.direction, alpha=dose * axis.deviation)


@torch.no_grad()
def remove_head(model: WBDiT, block: int, head: int) -> None:
    """Remove a head."""
    _output(model, block).weight[:, columns(model, head)] = 0


@torch.no_grad()
def remove_subspace(model: WBDiT, block: int, basis: Tensor) -> None:
    """Remove the subspace of orthonormal vectors ``(d, p)`` from the joined outputs of a block's heads."""
    weight = _output(model, block).weight
    weight.sub_(weight @ basis @ basis.mT)


@torch.no_grad()
def remove_atom(model: WBDiT, block: int, atom: int) -> None:
    """Remove an atom of a block's dictionary: close its gate."""
    modulation = cast(Modulation, model.blocks[block].adaLN_modulation)
    linear, row = cast(nn.Linear, modulation[1]), (modulation.parts - 1) * model.hidden_size + atom
    linear.weight[row], linear.bias[row] = 0, 0


def head_of(model: WBDiT, name: str) -> tuple[int, int]:
    """Return the block and head of a name such as ``"block-1-head-2"``.

    Raises
    ------
    InputError
        If the model has no such head.

    Examples
    --------
    >>> from wbdit.nn.heads import head_of
    >>> head_of(wbdit.WBDiT(input_size=24, patch_size=4, hidden_size=16, num_heads=2), "block-1-head-2")
    (0, 1)
    """
    found = NAME.fullmatch(name)
    blocks, heads = len(model.blocks), model.num_heads
    block, head = map(int, found.groups()) if found else (0, 0)
    if not (1 <= block <= blocks and 1 <= head <= heads):
        raise InputError(f"`steer` names no head {name!r}: the heads are block-1-head-1 to block-{blocks}-head-{heads}")
    return block - 1, head - 1


def head_name(block: int, head: int) -> str:
    """Return the name of a head."""
    return f"block-{block + 1}-head-{head + 1}"


def columns(model: WBDiT, head: int) -> slice:
    """Return the columns of the output matrix that belong to a head."""
    width = model.hidden_size // model.num_heads
    return slice(head * width, (head + 1) * width)


def _output(model: WBDiT, block: int) -> nn.Linear:
    """Return the linear map after the attention of a block."""
    attention = cast(WhiteBoxBlock, model.blocks[block]).attn
    return cast(nn.Linear, cast(nn.Sequential, attention.to_out)[0])
