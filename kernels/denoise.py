"""A denoiser without gradients: the launch that embeds cells, those of the blocks, and the one that reads them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from wbdit.kernels import blocks, ends, narrow, tuning


def denoise(
    cells: Tensor,
    modulations: Sequence[Tensor],
    embedding: Sequence[Tensor],
    projections: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor],
    folded: Sequence[Tensor],
    readout: Sequence[Tensor],
    *settings: Any,
    new: Tensor,
    **update: Any,
) -> None:
    """Write a denoiser's output to `new`, or the next state of a sampler.

    The arguments are those of :func:`wbdit.ops.denoise`, then those of :func:`wbdit.kernels.ends.read_patches`.
    """
    # maps may have any strides; their biases and the positions are read as dense
    embedding = [t if i in (0, 3) else t.contiguous() for i, t in enumerate(embedding)]
    readout = [t if i in (0, 2) else t.contiguous() for i, t in enumerate(readout)]
    network = modulations, embedding, projections, outs, biases, folded, *settings
    tokens, d = embedding[2].shape
    shape = tokens, d, settings[0], min(2**10, triton.next_power_of_2(len(cells)))
    rows = narrow.candidates(cells.device) if narrow.fits(projections, cells.device) else ()

    def run(way: narrow.Rows | None) -> tuple[Tensor, list[Any]]:
        return _run_wide(cells, *network) if way is None else narrow.run_denoiser(cells, *network, way)

    z, _ = run(tuning.choose("denoise", shape, (*rows, None), lambda way: run(way)[1], cells.device))
    ends.read_patches(z, *readout, new=new, **update)


def _run_wide(
    cells: Tensor,
    modulations: Sequence[Tensor],
    embedding: Sequence[Tensor],
    projections: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor],
    folded: Sequence[Tensor],
    *settings: Any,
) -> tuple[Tensor, list[Any]]:
    """Return the last modulated norm, with the launches of :mod:`wbdit.kernels.blocks`, and no kernels to inspect."""
    cells = cells.contiguous()
    tokens, d = embedding[2].shape
    stream = torch.empty((len(cells), tokens, d), dtype=folded[0].dtype, device=cells.device)
    z = torch.empty_like(stream)
    modulations = [m if m.stride(-1) == 1 else m.contiguous() for m in modulations]
    shift, scale = modulations[:2]
    ends.embed_patches(cells, *embedding, shift=shift, scale=scale, stream=stream, z=z, eps=settings[-1])
    return blocks.run_blocks(stream, modulations, projections, outs, biases, folded, *settings, z=z), []
