"""The axes of heads, and networks from which a head or an atom is removed.

A head's output is the product of its columns of the output matrix with what it attends to. Without these columns the
head is removed. So all kernels run such a network as they run any other.

Blocks, heads and atoms are counted from 0 here, and from 1 in names.
"""

from __future__ import annotations

import re
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from wbdit.errors import InputError
from wbdit.nn.activations import axes_of, iterate_blocks, projections, site
from wbdit.nn.blocks import Modulation
from wbdit.nn.denoiser import Denoiser
from wbdit.nn.embeddings import LocalLinear
from wbdit.nn.wbdit import WBDiT, WhiteBoxBlock

NAME = re.compile(r"block-([1-9]\d*)-head-([1-9]\d*)")


class HeadAxes(NamedTuple):
    """The first principal axis of each of h heads in L blocks: the direction in its subspace along which cells differ.

    Attributes
    ----------
    directions
        Unit vectors in the subspaces, ``(L, h, p)``. The largest coordinate is positive.
    loadings
        Change of a cell's place on the axis per unit of each gene's value, ``(L, h, G)``, along the direct path from
        the embedding to the block.
    """

    directions: Tensor
    loadings: Tensor


def white_box(model: Denoiser) -> WBDiT:
    """Return a network whose heads have axes.

    Raises
    ------
    InputError
        If it has DiT blocks.
    """
    if not isinstance(model, WBDiT):
        raise InputError('this run has DiT blocks, whose heads have no subspaces: use one with `preset="small"`')
    return model


@torch.no_grad()
def head_axes(model: WBDiT, x: Tensor, t: Tensor, conditioning: Tensor | None) -> HeadAxes:
    """Return the axes on which noised cells ``(B, C, G)`` differ most.

    Examples
    --------
    >>> from wbdit.nn.heads import head_axes
    >>> model = wbdit.WBDiT(input_size=24, patch_size=4, hidden_size=16, depth=3, num_heads=2)
    >>> axes = head_axes(model, torch.randn(9, 1, 24), torch.full((9,), 500), None)
    >>> axes.directions.shape, axes.loadings.shape
    (torch.Size([3, 2, 8]), torch.Size([3, 2, 24]))
    """
    genes, directions, loadings = gene_embedding(model), [], []
    modulations = model.modulations(t, conditioning=conditioning)
    shown = iterate_blocks(model, x, t, conditioning=conditioning)
    for block, seen, modulation in zip(model.blocks, shown, modulations, strict=False):
        block = cast(WhiteBoxBlock, block)
        first = axes_of(block, site(model, seen.before))[1][:, :1]  # [h, 1, p]
        scaled = genes * (1 + modulation[1].mean(0))
        directions.append(first[:, 0])
        loadings.append((first @ projections(block) @ scaled.T)[:, 0])
    return HeadAxes(torch.stack(directions), torch.stack(loadings))


@torch.no_grad()
def places(model: WBDiT, axes: HeadAxes, x: Tensor, t: Tensor, conditioning: Tensor | None) -> Tensor:
    """Return where noised cells lie on the axes, ``(L, h, B)``."""
    shown = iterate_blocks(model, x, t, conditioning=conditioning)
    positions = [
        axes_of(cast(WhiteBoxBlock, block), site(model, seen.before))[0]
        for block, seen in zip(model.blocks, shown, strict=True)
    ]
    return torch.einsum("lhbp,lhp->lhb", torch.stack(positions), axes.directions)


def gene_embedding(model: WBDiT) -> Tensor:
    """Return each gene's contribution to the cell token or mean patch token, per unit of its value, ``(G, d)``.

    Examples
    --------
    >>> from wbdit.nn.heads import gene_embedding
    >>> gene_embedding(wbdit.WBDiT(input_size=24, patch_size=4, hidden_size=16)).shape
    torch.Size([24, 16])
    """
    if model.has_cell_token:
        return model.cell_token.proj.weight.detach().T[: model.input_size]
    embedder = model.x_embedder
    if isinstance(embedder.proj, LocalLinear):
        rows = embedder.proj.weight.detach()[:, : embedder.patch_size].flatten(0, 1)
    else:
        rows = embedder.proj.weight.detach()[:, 0, :, 0].T.repeat(embedder.num_patches, 1)
    return rows[: model.input_size] / embedder.num_patches


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
    """Return the linear map after the attention of a block.

    Raises
    ------
    InputError
        If there is none: the block has one head, or tied projections.
    """
    own = cast(WhiteBoxBlock, model.blocks[block]).attn.to_out
    if not isinstance(own, nn.Sequential):
        raise InputError("this run's heads have no output weights of their own, so none can be removed")
    return cast(nn.Linear, own[0])
