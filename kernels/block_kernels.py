"""The kernels of :mod:`wbdit.kernels.blocks`: one matrix product each, fused with the element-wise work after it.

Comments beside pointers give shape and dtype: M rows (tokens of all samples), B samples, "low" the products' dtype,
bf16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product(a_ptr, w_ptr, row, column, inner, w_inner, w_column, INNER: tl.constexpr, EVEN: tl.constexpr):
    """Return rows of a dense matrix a (rows, inner) times columns of w, which has strides `w_inner` and `w_column`."""
    k = tl.arange(0, INNER)
    total = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, inner, INNER):
        if EVEN:
            a = tl.load(a_ptr + row[:, None] * inner + (start + k)[None, :])
            w = tl.load(w_ptr + (start + k)[:, None] * w_inner + column[None, :] * w_column)
        else:
            a = tl.load(
                a_ptr + row[:, None] * inner + (start + k)[None, :], mask=(start + k < inner)[None, :], other=0.0
            )
            w = tl.load(
                w_ptr + (start + k)[:, None] * w_inner + column[None, :] * w_column,
                mask=(start + k < inner)[:, None],
                other=0.0,
            )
        total = tl.dot(a, w, total)
    return total


@triton.jit
def _tile_origin(width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return this program's first row and column; programs of the same rows have adjacent ids and share them in L2.

    The first row is 64-bit and offsets the pointers once. The offsets of single values then fit into 32 bits.
    """
    stripes = tl.cdiv(width, COLUMNS)
    first = (tl.program_id(0) // stripes).to(tl.int64) * ROWS
    return first, tl.program_id(0) % stripes * COLUMNS


@triton.jit
def _samples(first, row, count, tokens):
    """Return the sample of the first row, and the sample of each row and of the last of `count` relative to it."""
    sample = first // tokens
    offset = (first - sample * tokens).to(tl.int32)
    return sample, (offset + row) // tokens, (offset + count - 1) // tokens


@triton.jit
def _moments(center_ptr, sums_ptr, row, parts, width, eps, PARTS: tl.constexpr):
    """Return each row's center c, its mean minus c, and 1 / its standard deviation."""
    part = tl.arange(0, PARTS)
    at = (row[:, None] * parts + part[None, :]) * 2
    first = tl.sum(tl.load(sums_ptr + at, mask=(part < parts)[None, :], other=0.0), 1) / width
    second = tl.sum(tl.load(sums_ptr + at + 1, mask=(part < parts)[None, :], other=0.0), 1) / width
    return tl.load(center_ptr + row), first, 1.0 / tl.sqrt(tl.maximum(second - first * first, 0.0) + eps)


@triton.jit
def _load_per_sample(ptr, further, last, stride, column, TWO: tl.constexpr):
    """Return the table row of each token's sample, in fp32; with TWO, a tile has tokens of at most two samples.

    Two broadcast rows need no gather and no exchange between threads.
    """
    if TWO:
        one = tl.load(ptr + column).to(tl.float32)
        other = tl.load(ptr + last * stride + column).to(tl.float32)
        return tl.where((further == 0)[:, None], one[None, :], other[None, :])
    else:  # noqa: RET505  resolved at compile time
        return tl.load(ptr + further[:, None] * stride + column[None, :]).to(tl.float32)


@triton.jit
def _half(tile, RIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the left or right half of a tile's columns."""
    left, right = tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
    if RIGHT:
        return right
    else:  # noqa: RET505
        return left


@triton.jit
def _piece(tile, INDEX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr):
    """Return PIECE columns from INDEX * PIECE on; an epilogue that works piece by piece needs fewer registers."""
    if COLUMNS == PIECE:
        return tile
    else:  # noqa: RET505
        COUNT: tl.constexpr = COLUMNS // PIECE // 2
        half = _half(tile, INDEX >= COUNT, ROWS, COLUMNS)
        return _piece(half, INDEX % COUNT, ROWS, COLUMNS // 2, PIECE)


@triton.jit
def _clamp_index(index, count):
    """Return indices with those out of range set to 0, so that loads need no mask; stores are masked."""
    return tl.where(index < count, index, 0)


@triton.jit
def _columns(start, width, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """Return `COUNT` columns to load; if tiles divide the width, the compiler sees that they are contiguous."""
    column = start + tl.arange(0, COUNT)
    return column if WHOLE else _clamp_index(column, width)


@triton.jit
def _store_state(
    x, new_x_ptr, new_u_ptr, new_sums_ptr, scale, center, row, start, count, width, parts, PIECE: tl.constexpr
):
    """Write x, u = (x - c) (1 + s), and the sums of x - c and of (x - c)^2 over these columns."""
    column = start + tl.arange(0, PIECE)
    keep = (row < count)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = x.to(new_x_ptr.dtype.element_ty)
    tl.store(new_x_ptr + at, x, mask=keep)
    off = tl.where(keep, x.to(tl.float32) - center[:, None], 0.0)
    tl.store(new_u_ptr + at, (off * (1.0 + scale)).to(new_u_ptr.dtype.element_ty), mask=keep)
    to = new_sums_ptr + (row * parts + start // PIECE) * 2
    tl.store(to, tl.sum(off, 1), mask=row < count)
    tl.store(to + 1, tl.sum(off * off, 1), mask=row < count)


@triton.jit
def _block_project(
    u_ptr,  # [M, inner] low
    w_ptr,  # [inner, width] low, any strides
    center_ptr,  # [M] fp32
    sums_ptr,  # [M, parts, 2] fp32
    slope_ptr,  # [B or 1, width] low: S
    level_ptr,  # [B or 1, width] low: T
    out_ptr,  # [M, width] low
    count,
    tokens,
    width,
    inner,
    parts,
    w_inner,
    w_column,
    stride,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    TWO: tl.constexpr,
):
    first, start = _tile_origin(width, ROWS, COLUMNS)
    row, count = tl.arange(0, ROWS), tl.minimum(count - first, ROWS).to(tl.int32)
    there, within = _clamp_index(row, count), _columns(start, width, COLUMNS, WHOLE)
    product = _product(u_ptr + first * inner, w_ptr, there, within, inner, w_inner, w_column, INNER, EVEN)
    _, mean, rstd = _moments(center_ptr + first, sums_ptr + first * parts * 2, there, parts, inner, eps, PARTS)
    sample, further, last = _samples(first, there, count, tokens)
    slope_ptr += sample * stride
    level_ptr += sample * stride
    out_ptr += first * width
    for index in tl.static_range(COLUMNS // PIECE):
        within = _columns(start + index * PIECE, width, PIECE, WHOLE)
        # a gathered load has the layout of the store; gathering one table gives the other loads that layout too
        slope = _load_per_sample(slope_ptr, further, last, stride, within, False)
        level = _load_per_sample(level_ptr, further, last, stride, within, TWO)
        out = rstd[:, None] * (_piece(product, index, ROWS, COLUMNS, PIECE) - mean[:, None] * slope) + level
        column = start + index * PIECE + tl.arange(0, PIECE)
        keep = (row < count)[:, None] & (column < width)[None, :]
        tl.store(out_ptr + row[:, None] * width + column[None, :], out.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _half_step_columns(
    product,
    a_ptr,
    bias_ptr,
    slope_ptr,
    level_ptr,
    gate_ptr,
    scale_ptr,
    x_ptr,
    new_x_ptr,
    new_u_ptr,
    new_sums_ptr,
    center,
    mean,
    rstd,
    row,
    start,
    count,
    further,
    last,
    width,
    parts,
    stride,
    eta,
    PIECE: tl.constexpr,
    WHOLE: tl.constexpr,
    TWO: tl.constexpr,
    SPARSIFY: tl.constexpr,
):
    """Compute a half-step on some columns of a tile: add its gated result to x and write the state after it."""
    there, within = _clamp_index(row, count), _columns(start, width, PIECE, WHOLE)
    if SPARSIFY:
        # z + eta z F in one step: u takes the place of z, and u F, not rounded to bf16, that of z F
        step = tl.load(a_ptr + there[:, None] * width + within[None, :]).to(tl.float32) + eta * product
        step -= mean[:, None] * _load_per_sample(slope_ptr, further, last, stride, within, TWO)
        step = rstd[:, None] * step + _load_per_sample(level_ptr, further, last, stride, within, TWO)
        step = tl.where(step < 0, 0.0, step)  # keeps NaN
    else:
        step = product + tl.load(bias_ptr + within).to(tl.float32)[None, :]
    x = tl.load(x_ptr + there[:, None] * width + within[None, :]).to(tl.float32)
    x += _load_per_sample(gate_ptr, further, last, stride, within, TWO) * step
    scale = _load_per_sample(scale_ptr, further, last, stride, within, TWO)
    _store_state(x, new_x_ptr, new_u_ptr, new_sums_ptr, scale, center, row, start, count, width, parts, PIECE)


def _half_step_name(specialization):
    """Return the kernel name of a half-step, which profilers show."""
    return "_block_sparsify" if specialization.constants["SPARSIFY"] else "_block_compress"


@triton.jit(repr=_half_step_name)
def _block_half_step(
    a_ptr,  # [M, inner] low: attention's output, or u with SPARSIFY
    w_ptr,  # [inner, width] low, any strides
    bias_ptr,  # [width] any dtype; None with SPARSIFY
    slope_ptr,  # [B or 1, width] low: S; None without SPARSIFY
    level_ptr,  # [B or 1, width] low: T minus the threshold; None without SPARSIFY
    gate_ptr,  # [B or 1, width] low
    scale_ptr,  # [B or 1, width] low, scale of the next LayerNorm
    x_ptr,  # [M, width] low
    center_ptr,  # [M] fp32
    sums_ptr,  # [M, parts, 2] fp32
    new_x_ptr,  # [M, width] low
    new_u_ptr,  # [M, width] low
    new_center_ptr,  # [M] fp32
    new_sums_ptr,  # [M, parts, 2] fp32
    count,
    tokens,
    width,
    inner,
    parts,
    w_inner,
    w_column,
    stride,
    eta,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    TWO: tl.constexpr,
    SPARSIFY: tl.constexpr,
):
    """Compute a half-step: compression (attention's output projection) or, with SPARSIFY, the thresholded ISTA step."""
    first, start = _tile_origin(width, ROWS, COLUMNS)
    row, count = tl.arange(0, ROWS), tl.minimum(count - first, ROWS).to(tl.int32)
    there, within = _clamp_index(row, count), _columns(start, width, COLUMNS, WHOLE)
    product = _product(a_ptr + first * inner, w_ptr, there, within, inner, w_inner, w_column, INNER, EVEN)
    center, mean, rstd = _moments(center_ptr + first, sums_ptr + first * parts * 2, there, parts, width, eps, PARTS)
    sample, further, last = _samples(first, there, count, tokens)
    for index in tl.static_range(COLUMNS // PIECE):
        _half_step_columns(
            _piece(product, index, ROWS, COLUMNS, PIECE),
            a_ptr + first * inner,
            bias_ptr,
            slope_ptr + sample * stride if SPARSIFY else None,
            level_ptr + sample * stride if SPARSIFY else None,
            gate_ptr + sample * stride,
            scale_ptr + sample * stride,
            x_ptr + first * width,
            new_x_ptr + first * width,
            new_u_ptr + first * width,
            new_sums_ptr + first * parts * 2,
            center + mean,
            mean,
            rstd,
            row,
            start + index * PIECE,
            count,
            further,
            last,
            width,
            parts,
            stride,
            eta,
            PIECE,
            WHOLE,
            TWO,
            SPARSIFY,
        )
    tl.store(new_center_ptr + first + row, center + mean, mask=(row < count) & (start == 0))


@triton.jit
def _block_init(
    x_ptr,  # [M, width] any dtype
    scale_ptr,  # [B or 1, width] low
    new_x_ptr,  # [M, width] low
    u_ptr,  # [M, width] low
    center_ptr,  # [M] fp32
    sums_ptr,  # [M, parts, 2] fp32
    tokens,
    width,
    parts,
    scale_stride,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the initial state: the stream, u with c equal to the row's mean, and the sums, all in the first part."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(new_x_ptr.dtype.element_ty)
    tl.store(new_x_ptr + row * width + column, x, mask=inside)
    x = x.to(tl.float32)
    center = tl.sum(x, 0) / width
    off = tl.where(inside, x - center, 0.0)
    scale = tl.load(scale_ptr + row // tokens * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(u_ptr + row * width + column, (off * (1.0 + scale)).to(u_ptr.dtype.element_ty), mask=inside)
    tl.store(center_ptr + row, center)
    at = tl.arange(0, 2 * PARTS)
    tl.store(sums_ptr + row * parts * 2 + at, tl.where(at == 1, tl.sum(off * off, 0), 0.0), mask=at < 2 * parts)
