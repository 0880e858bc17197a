"""The first and the last launch of a denoiser: cells to tokens, and tokens to cells with the sampler's update.

Both are limited by the token tensors that they write or read. A program handles one token of several samples, so that
maps and positions of its own patch are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from wbdit.kernels.noise import _add_terms, _normal_at

WIDEST = 1024  # values per token: a program of the first launch keeps whole tokens in registers, at least 16 of them
VALUES = 2**14  # per program of the first launch, 32 per thread
SLAB = 2**16  # bytes of a weight that the first launch keeps in shared memory


@triton.jit
def _map_genes(
    cells_ptr,
    w_ptr,
    sample,
    start,
    patch,
    column,
    batch,
    channels,
    genes,
    d,
    w_out,
    w_in,
    INNER: tl.constexpr,
    LOW: tl.constexpr,
):
    """Return the linear map of `patch` genes from `start` on, of several samples; genes beyond the last count as 0."""
    total = tl.zeros((sample.shape[0], column.shape[0]), tl.float32)
    there, inside = sample < batch, column < d
    row = sample.to(tl.int64) * channels * genes
    for first in range(0, channels * patch, INNER):
        k = first + tl.arange(0, INNER)
        gene = start + k % patch
        within = k < channels * patch
        at = row[:, None] + (k // patch * genes + gene)[None, :]
        cells = tl.load(cells_ptr + at, mask=there[:, None] & (within & (gene < genes))[None, :], other=0.0)
        at = k[:, None] * w_in + column[None, :] * w_out
        weight = tl.load(w_ptr + at, mask=within[:, None] & inside[None, :], other=0.0)
        total = tl.dot(cells.to(LOW), weight.to(LOW), total)
    return total


@triton.jit
def _embed_patches(
    cells_ptr,  # [B, C, G] any dtype
    weight_ptr,  # [1 or N, d, C P] any dtype and strides
    bias_ptr,  # [1 or N, d] any dtype
    positions_ptr,  # [N or N + 1, d] any dtype
    cell_weight_ptr,  # [d, C G] dtype of the weight, any strides; None without a token for the whole cell
    cell_bias_ptr,  # [d] dtype of the bias; None as well
    shift_ptr,  # [B, d], row stride shift_stride
    scale_ptr,  # [B, d], row stride scale_stride
    stream_ptr,  # [B, N or N + 1, d] low
    z_ptr,  # [B, N or N + 1, d] low
    batch,
    channels,
    genes,
    patch,
    patches,
    d,
    w_token,
    w_out,
    w_in,
    bias_stride,
    cell_w_out,
    cell_w_in,
    shift_stride,
    scale_stride,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Write the residual stream and its first modulated norm; the programs of whole cells, the longest, come first."""
    low = stream_ptr.dtype.element_ty
    column = tl.arange(0, WIDTH)
    inside = column < d
    program, tokens, token = tl.program_id(0), patches, tl.program_id(0) % patches
    sample = program // patches * ROWS + tl.arange(0, ROWS)
    if cell_weight_ptr is not None:
        groups = tl.cdiv(batch, ROWS)
        is_cell = program < groups
        tokens = patches + 1
        token = tl.where(is_cell, 0, (program - groups) % patches)
        sample = tl.where(is_cell, program, (program - groups) // patches) * ROWS + tl.arange(0, ROWS)
    own_ptr = weight_ptr + tl.cast(token, tl.int64) * w_token
    start = token * patch
    total = _map_genes(
        cells_ptr, own_ptr, sample, start, patch, column, batch, channels, genes, d, w_out, w_in, INNER, low
    )
    offset = tl.load(bias_ptr + token * bias_stride + column, mask=inside, other=0.0).to(tl.float32)
    if cell_weight_ptr is not None:  # noqa: SIM102  known at compile time
        if is_cell:
            token = patches
            total = _map_genes(
                *(cells_ptr, cell_weight_ptr, sample, 0, genes, column),
                *(batch, channels, genes, d, cell_w_out, cell_w_in, INNER, low),
            )
            offset = tl.load(cell_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    sample, there = sample.to(tl.int64), sample < batch
    offset += tl.load(positions_ptr + token * d + column, mask=inside, other=0.0).to(tl.float32)
    row = (total + offset[None, :]).to(low)
    at = (sample * tokens + token)[:, None] * d + column[None, :]
    keep = there[:, None] & inside[None, :]
    tl.store(stream_ptr + at, row, mask=keep)
    row = row.to(tl.float32)  # normalize the rounded values that are stored
    off = tl.where(inside[None, :], row - (tl.sum(row, 1) / d)[:, None], 0.0)
    normed = off * (1.0 / tl.sqrt(tl.sum(off * off, 1) / d + eps))[:, None]
    shift = _modulation(shift_ptr, sample, shift_stride, column, there, inside, SHARED)
    scale = _modulation(scale_ptr, sample, scale_stride, column, there, inside, SHARED)
    tl.store(z_ptr + at, (normed * (1.0 + scale) + shift).to(low), mask=keep)


@triton.jit
def _modulation(ptr, sample, stride, column, there, inside, SHARED: tl.constexpr):
    """Return the samples' rows of a modulation in fp32; one row if all share it."""
    if SHARED:
        return tl.load(ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    else:  # noqa: RET505  resolved at compile time
        at = sample[:, None] * stride + column[None, :]
        return tl.load(ptr + at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _linear(total, z_ptr, w_ptr, z_row, w_column, there, known, d, w_in, INNER: tl.constexpr):
    """Add rows of z times columns of a map, given their offsets."""
    for first in range(0, d, INNER):
        k = first + tl.arange(0, INNER)
        z = tl.load(z_ptr + z_row[:, None] + k[None, :], mask=there[:, None] & (k < d)[None, :], other=0.0)
        w = tl.load(
            w_ptr + k.to(tl.int64)[:, None] * w_in + w_column[None, :],
            mask=(k < d)[:, None] & known[None, :],
            other=0.0,
        )
        total = tl.dot(z, w.to(z.dtype), total)
    return total


@triton.jit(do_not_specialize=["seed", "step"])
def _read_patches(
    z_ptr,  # [B, N or N + 1, d] low
    weight_ptr,  # [1 or N, P C', d] any dtype and strides
    bias_ptr,  # [1 or N, P C'] any dtype
    cell_weight_ptr,  # [C' G, d] any dtype and strides; None without a token for the whole cell
    cell_bias_ptr,  # [C' G] any dtype; None as well
    x_ptr,  # [B, C', G] any dtype: the state; None for the output itself
    previous_ptr,  # [B, C', G] any dtype or None
    earlier_ptr,  # [B, C', G] any dtype or None
    noise_ptr,  # [B, C', G] any dtype or None
    samples_ptr,  # [B] int64; None to draw no noise
    new_ptr,  # [B, C', G] any dtype
    clean_ptr,  # [B, C', G] any dtype or None
    batch,
    channels,
    genes,
    patch,
    patches,
    tokens,
    d,
    w_token,
    w_out,
    w_in,
    bias_stride,
    cell_w_out,
    cell_w_in,
    a,
    b,
    c,
    on_earlier,
    e,
    clamp_min,
    clean_x,
    clean_out,
    seed,
    step,
    SAMPLES: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Compute a patch's outputs, put them where their genes are, and apply the sampler's update to them."""
    outputs = patch * channels
    stripes = tl.cdiv(outputs, COLUMNS)
    column = tl.program_id(0) % stripes * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(0) // stripes % patches
    sample = (tl.program_id(0) // stripes // patches * SAMPLES + tl.arange(0, SAMPLES)).to(tl.int64)
    gene = token * patch + column // channels
    position = column % channels * genes + gene
    there, known = sample < batch, (column < outputs) & (gene < genes)
    total = tl.zeros((SAMPLES, COLUMNS), tl.float32)
    row = sample * tokens * d
    own = weight_ptr + token.to(tl.int64) * w_token
    total = _linear(total, z_ptr, own, row + token * d, column.to(tl.int64) * w_out, there, known, d, w_in, INNER)
    bias = tl.load(bias_ptr + token * bias_stride + column, mask=known, other=0.0).to(tl.float32)
    if cell_weight_ptr is not None:
        at = position.to(tl.int64) * cell_w_out
        total = _linear(total, z_ptr, cell_weight_ptr, row + patches * d, at, there, known, d, cell_w_in, INNER)
        bias += tl.load(cell_bias_ptr + position, mask=known, other=0.0).to(tl.float32)
    out = total + bias[None, :]
    at = sample[:, None] * channels * genes + position[None, :]
    keep = there[:, None] & known[None, :]
    new = out
    if x_ptr is not None:
        x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float32)
        new = a * x + b * out
        if clean_ptr is not None:
            tl.store(clean_ptr + at, (clean_x * x + clean_out * out).to(clean_ptr.dtype.element_ty), mask=keep)
        new = _add_terms(new, at, keep, previous_ptr, earlier_ptr, noise_ptr, c, on_earlier, e)
        if samples_ptr is not None:
            number = tl.load(samples_ptr + sample, mask=there, other=0)
            new += e * _normal_at(seed, number[:, None], step, position[None, :])
        new = tl.where(new < clamp_min, clamp_min, new)  # keeps NaN
    tl.store(new_ptr + at, new.to(new_ptr.dtype.element_ty), mask=keep)


def embed_patches(
    cells: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    cell_weight: Tensor | None = None,
    cell_bias: Tensor | None = None,
    *,
    shift: Tensor,
    scale: Tensor,
    stream: Tensor,
    z: Tensor,
    eps: float,
) -> None:
    """Write the tokens of `cells` to `stream`, and ``LN(stream) * (1 + scale) + shift`` to `z`.

    The weights are those of :func:`wbdit.ops.denoise`, whose biases and positions have dense rows. `cells`
    ``(B, C, G)``, `stream` and `z` ``(B, N, d)`` are dense; modulations ``(B, d)`` have dense rows.
    """
    batch, channels, genes = cells.shape
    if stream.numel() == 0:
        return
    d, patch = stream.shape[2], weight.shape[2] // channels
    patches = triton.cdiv(genes, patch)
    width = max(16, triton.next_power_of_2(d))
    rows = min(32, max(16, VALUES // width))
    longest = max(16, min(64, SLAB // (width * weight.element_size())))
    _embed_patches[(triton.cdiv(batch, rows) * stream.shape[1],)](
        *(cells, weight, bias, positions, cell_weight, cell_bias, shift, scale, stream, z),
        *(batch, channels, genes, patch, patches, d, *_strides(weight), _per_token(bias)),
        *((0, 0) if cell_weight is None else cell_weight.stride()),
        *(shift.stride(0), scale.stride(0), eps),
        ROWS=rows,
        WIDTH=width,
        INNER=longest if cell_weight is not None else min(longest, max(16, triton.next_power_of_2(channels * patch))),
        SHARED=shift.stride(0) == 0 and scale.stride(0) == 0,
        num_warps=max(4, rows * width // 1024),
        num_stages=1,
    )


def read_patches(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    cell_weight: Tensor | None = None,
    cell_bias: Tensor | None = None,
    *,
    new: Tensor,
    x: Tensor | None = None,
    previous: Tensor | None = None,
    earlier: Tensor | None = None,
    noise: Tensor | None = None,
    samples: Tensor | None = None,
    a: float = 0.0,
    b: float = 1.0,
    c: float = 0.0,
    d: float = 0.0,
    e: float = 0.0,
    clamp_min: float = -torch.inf,
    seed: int = 0,
    step: int = 0,
    clean: Tensor | None = None,
    factors: Sequence[float] = (0.0, 0.0),
) -> None:
    """Write the outputs of the tokens `z` to `new`, or, given the state `x`, the sampler's update.

    The weights are those of :func:`wbdit.ops.denoise`, and the update that of :func:`wbdit.ops.sampler_step`. `factors`
    are those of the state and of the output in the estimate of x_0, which is written to `clean`. All tensors of cells
    ``(B, C', G)`` and `z` are dense.
    """
    batch, channels, genes = new.shape
    if new.numel() == 0:
        return
    patch = weight.shape[1] // channels
    patches = triton.cdiv(genes, patch)
    samples_per_program = min(64, max(16, triton.next_power_of_2(batch)))
    columns = min(128, max(16, triton.next_power_of_2(patch * channels)))
    stripes = triton.cdiv(patch * channels, columns)
    _read_patches[(triton.cdiv(batch, samples_per_program) * patches * stripes,)](
        *(z, weight, bias, cell_weight, cell_bias, x, previous, earlier, noise, samples, new, clean),
        *(batch, channels, genes, patch, patches, *z.shape[1:], *_strides(weight), _per_token(bias)),
        *((0, 0) if cell_weight is None else cell_weight.stride()),
        *(a, b, c, d, e, clamp_min, *factors, seed, step),
        SAMPLES=samples_per_program,
        COLUMNS=columns,
        INNER=min(64, max(16, triton.next_power_of_2(z.shape[2]))),
        num_warps=4,
        num_stages=3,
    )


def _strides(weight: Tensor) -> tuple[int, int, int]:
    """Return a map's strides along patches, outputs and inputs; 0 along patches if they share it."""
    token, out, inner = weight.stride()
    return (0 if weight.shape[0] == 1 else token), out, inner


def _per_token(bias: Tensor) -> int:
    return 0 if bias.shape[0] == 1 else bias.stride(0)
