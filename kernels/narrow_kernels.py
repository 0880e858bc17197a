"""The kernels of :mod:`wbdit.kernels.narrow`: a program owns whole rows, so a LayerNorm needs no other program.

The residual stream of a program's rows is a tuple of tensors in fp32, each with PIECE columns. Loops go over these
pieces. Triton cannot index registers by a loop's variable, so a loop selects from all pieces. A table has one row per
sample, or one for all with stride 0; it comes with this stride. Comments give shape and dtype: M rows (tokens of all
samples), B samples, N tokens, "low" for bf16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from wbdit.kernels.block_kernels import _clamp_index, _columns, _samples

# pieces of rows


@triton.jit
def _zeros(ROWS: tl.constexpr, PIECE: tl.constexpr, COUNT: tl.constexpr):
    pieces = ()
    for _ in tl.static_range(COUNT):
        pieces = pieces + (tl.zeros((ROWS, PIECE), tl.float32),)
    return pieces


@triton.jit
def _get(x, index):
    piece = x[0]
    for other in tl.static_range(1, len(x)):
        piece = tl.where(index == other, x[other], piece)
    return piece


@triton.jit
def _set(x, index, piece):
    pieces = ()
    for other in tl.static_range(len(x)):
        pieces = pieces + (tl.where(index == other, piece, x[other]),)
    return pieces


@triton.jit
def _inside(tile, start, width: tl.constexpr, PIECE: tl.constexpr):
    """Return a tile with zeros in the columns beyond the width."""
    if width % PIECE == 0:
        return tile
    else:  # noqa: RET505  resolved at compile time
        return tl.where((start + tl.arange(0, PIECE) < width)[None, :], tile, 0.0)


@triton.jit
def _moments(x, eps, width: tl.constexpr, PIECE: tl.constexpr):
    """Return each row's mean and 1 / its standard deviation."""
    total = x[0]  # pieces are added first, since a sum over a row synchronizes all threads
    for index in tl.static_range(1, len(x)):
        total += x[index]
    mean = tl.sum(total, 1) / width
    square = tl.zeros_like(x[0])
    for index in tl.static_range(len(x)):
        off = _inside(x[index] - mean[:, None], index * PIECE, width, PIECE)  # a second pass avoids cancellation
        square += off * off
    return mean, 1.0 / tl.sqrt(tl.sum(square, 1) / width + eps)


@triton.jit
def _join(pieces):
    """Return pieces side by side, with zeros up to a power of two."""
    if len(pieces) == 1:
        return pieces[0]
    else:  # noqa: RET505  resolved at compile time
        pairs = ()
        for index in tl.static_range(0, len(pieces), 2):
            left = pieces[index]
            right = pieces[index + 1] if index + 1 < len(pieces) else tl.zeros_like(left)
            pairs = pairs + (tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1]),)
        return _join(pairs)


@triton.jit
def _load_piece(ptr, at, start, width: tl.constexpr, PIECE: tl.constexpr):
    column = _columns(start, width, PIECE, width % PIECE == 0)
    return tl.load(ptr + at[:, None] * width + column[None, :])


@triton.jit
def _store_piece(ptr, at, keep, tile, start, width: tl.constexpr, PIECE: tl.constexpr):
    column = start + tl.arange(0, PIECE)
    mask = keep[:, None] & (column < width)[None, :]
    tl.store(ptr + at[:, None] * width + column[None, :], tile.to(tl.bfloat16), mask=mask)


# modulated LayerNorms


@triton.jit
def _entries(table, rows, start, width: tl.constexpr, PIECE: tl.constexpr, SAMPLES: tl.constexpr):
    """Return each row's entries of a table, in fp32.

    With SAMPLES > 0, the program's rows belong to at most that many samples. Broadcasting their entries needs no
    exchange between threads, as a gather does.
    """
    ptr, stride = table
    sample, further, last = rows
    column = _columns(start, width, PIECE, width % PIECE == 0)
    ptr += sample * stride
    if SAMPLES == 0:
        return tl.load(ptr + further[:, None] * stride + column[None, :]).to(tl.float32)
    else:  # noqa: RET505
        entries = tl.load(ptr + column).to(tl.float32)[None, :]
        for other in tl.static_range(1, SAMPLES):
            row = tl.load(ptr + tl.minimum(other, last) * stride + column).to(tl.float32)
            entries = tl.where((further == other)[:, None], row[None, :], entries)
        return entries


@triton.jit
def _normed(x, start, moments, norm, rows, width: tl.constexpr, PIECE: tl.constexpr, SAMPLES: tl.constexpr):
    """Return the modulated LayerNorm of one piece, in fp32."""
    mean, rstd = moments
    shift, scale = norm
    normed = (x - mean[:, None]) * rstd[:, None]
    normed = normed * (1.0 + _entries(scale, rows, start, width, PIECE, SAMPLES))
    return normed + _entries(shift, rows, start, width, PIECE, SAMPLES)


@triton.jit
def _operand(x, moments, norm, rows, width: tl.constexpr, PIECE: tl.constexpr, SAMPLES: tl.constexpr):
    """Return the modulated LayerNorm of whole rows as the left operand of a product."""
    pieces = ()
    for index in tl.static_range(len(x)):
        z = _normed(x[index], index * PIECE, moments, norm, rows, width, PIECE, SAMPLES)
        pieces = pieces + (z.to(tl.bfloat16),)
    return _join(pieces)


@triton.jit
def _product(z, w_ptr, start, inner: tl.constexpr, width: tl.constexpr, PIECE: tl.constexpr, LINEAR: tl.constexpr):
    """Return columns from `start` on of z W, with a dense weight W ``(inner, width)``, stored transposed if LINEAR."""
    k = tl.arange(0, z.shape[1])
    column = _columns(start, width, PIECE, width % PIECE == 0)
    at = w_ptr + (k[:, None] + column[None, :] * inner if LINEAR else k[:, None] * width + column[None, :])
    w = tl.load(at) if inner == z.shape[1] else tl.load(at, mask=(k < inner)[:, None], other=0.0)
    return tl.dot(z, w)


@triton.jit
def _store_next(
    x,
    next_ptr,
    at,
    keep,
    norm,
    rows,
    weight_ptr,
    eps,
    width: tl.constexpr,
    inner: tl.constexpr,
    PIECE: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Write the next block's projection of the modulated LayerNorm or, without a weight, the LayerNorm itself.

    `at` are the rows of the result in memory, `keep` which of them exist.
    """
    moments = _moments(x, eps, width, PIECE)
    if weight_ptr is None:
        for index in tl.static_range(len(x)):
            z = _normed(x[index], index * PIECE, moments, norm, rows, width, PIECE, SAMPLES)
            _store_piece(next_ptr, at, keep, z, index * PIECE, width, PIECE)
    else:
        z = _operand(x, moments, norm, rows, width, PIECE, SAMPLES)
        for start in range(0, inner, PIECE):
            _store_piece(
                next_ptr, at, keep, _product(z, weight_ptr, start, width, inner, PIECE, True), start, inner, PIECE
            )


# the launches


@triton.jit
def _narrow_chain(
    a_ptr,  # [M, inner] low: attention's output
    x_ptr,  # [M, width] low: the stream, updated in place
    next_ptr,  # [M, inner] low: the next block's projection; [M, width] low without its weight: the last LayerNorm
    out_ptr,  # [width, inner] low
    bias_ptr,  # [width] any dtype
    folded_ptr,  # [width, width] low
    weight_ptr,  # [inner, width] low; None after the last block
    gate1,
    norm2,
    gate2,
    norm,
    count,
    tokens,
    eta,
    threshold,
    eps,
    steps,
    width: tl.constexpr,
    inner: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    COUNT: tl.constexpr,
    INNER: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Compute a block after its attention, and the next block's norm and projection, for ROWS rows."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, count = tl.arange(0, ROWS), tl.minimum(count - first, ROWS).to(tl.int32)
    there, keep = _clamp_index(row, count), row < count
    rows = _samples(first, there, count, tokens)
    x_ptr += first * width
    column = tl.arange(0, INNER)
    at = a_ptr + first * inner + there[:, None] * inner + column[None, :]
    a = tl.load(at) if inner == INNER else tl.load(at, mask=(column < inner)[None, :], other=0.0)

    x = _zeros(ROWS, PIECE, COUNT)
    for index in range(steps):
        start = index * PIECE
        bias = tl.load(bias_ptr + _columns(start, width, PIECE, width % PIECE == 0)).to(tl.float32)
        step = _product(a, out_ptr, start, inner, width, PIECE, True) + bias[None, :]
        new = _load_piece(x_ptr, there, start, width, PIECE).to(tl.float32)
        new += _entries(gate1, rows, start, width, PIECE, SAMPLES) * step
        x = _set(x, index, _inside(new, start, width, PIECE))

    moments = _moments(x, eps, width, PIECE)
    operand = _operand(x, moments, norm2, rows, width, PIECE, SAMPLES)
    for index in range(steps):
        start = index * PIECE
        product = _product(operand, folded_ptr, start, width, width, PIECE, False)
        old = _get(x, index)
        step = _normed(old, start, moments, norm2, rows, width, PIECE, SAMPLES) + eta * product - threshold
        step = tl.where(step < 0, 0.0, step)  # keeps NaN
        new = old + _entries(gate2, rows, start, width, PIECE, SAMPLES) * step
        _store_piece(x_ptr, row, keep, new, start, width, PIECE)
        x = _set(x, index, _inside(new, start, width, PIECE))

    next_ptr += first * (width if weight_ptr is None else inner)
    _store_next(x, next_ptr, row, keep, norm, rows, weight_ptr, eps, width, inner, PIECE, SAMPLES)


@triton.jit
def _narrow_enter(
    x_ptr,  # [M, width] any dtype
    stream_ptr,  # [M, width] low
    next_ptr,  # [M, inner] low
    weight_ptr,  # [inner, width] low
    norm,
    count,
    tokens,
    eps,
    width: tl.constexpr,
    inner: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    COUNT: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Copy the stream, and compute the first norm and projection."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, count = tl.arange(0, ROWS), tl.minimum(count - first, ROWS).to(tl.int32)
    there, keep = _clamp_index(row, count), row < count
    x = ()
    for index in tl.static_range(COUNT):
        new = _load_piece(x_ptr + first * width, there, index * PIECE, width, PIECE).to(tl.float32)
        _store_piece(stream_ptr + first * width, row, keep, new, index * PIECE, width, PIECE)
        x = x + (_inside(new, index * PIECE, width, PIECE),)
    rows = _samples(first, there, count, tokens)
    _store_next(x, next_ptr + first * inner, row, keep, norm, rows, weight_ptr, eps, width, inner, PIECE, SAMPLES)


@triton.jit
def _embed(
    x_ptr,
    x_strides,
    there,
    weight,
    start,
    span,
    genes,
    column,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Return the product of `span` genes of each channel, from `start` on, with columns of a weight ``(C span, d)``."""
    w_ptr, w_column, w_inner = weight
    x_sample, x_channel, x_gene = x_strides
    total = tl.zeros((there.shape[0], column.shape[0]), tl.float32)
    for begin in tl.range(0, CHANNELS * span, STEP, num_stages=STAGES):
        inner = begin + tl.arange(0, STEP)
        channel = inner // span if CHANNELS > 1 else 0
        gene = start + inner - channel * span
        inside = (inner < CHANNELS * span) & (gene < genes)
        at = there[:, None] * x_sample + (channel * x_channel + gene * x_gene)[None, :]
        x = tl.load(x_ptr + at, mask=inside[None, :], other=0.0)
        at = inner[:, None] * w_inner + column[None, :] * w_column
        w = tl.load(w_ptr + at, mask=inside[:, None], other=0.0)
        total = tl.dot(x.to(tl.bfloat16), w.to(tl.bfloat16), total)
    return total


@triton.jit
def _narrow_embed(
    x_ptr,  # [B, C, G] any dtype
    x_strides,
    weight,  # [N or 1, width, C P] any dtype; its first stride is 0 if all patches share it
    bias,  # [N or 1, width] any dtype, with its first stride
    cell_weight,  # [width, C G] any dtype
    cell_bias_ptr,  # [width] any dtype
    position_ptr,  # [N or N + 1, width] any dtype
    stream_ptr,  # [M, width] low
    next_ptr,  # [M, inner] low
    weight_ptr,  # [inner, width] low
    norm,
    samples,
    tokens,
    patches,
    patch,
    genes,
    eps,
    steps,
    width: tl.constexpr,
    inner: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    COUNT: tl.constexpr,
    SAMPLES: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute one token of ROWS samples, and its first norm and projection.

    The tokens for the whole cell, if any, have the index `patches`. They come first, since they take longest.
    """
    tiles = tl.cdiv(samples, ROWS)
    token = tokens - 1 - tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles).to(tl.int64) * ROWS
    row, samples = tl.arange(0, ROWS), tl.minimum(samples - first, ROWS).to(tl.int32)
    there, keep = _clamp_index(row, samples), row < samples
    x_ptr += first * x_strides[0]
    w_ptr, w_patch, w_column, w_inner = weight
    bias_ptr, bias_patch = bias
    own = w_ptr + token.to(tl.int64) * w_patch, w_column, w_inner
    at = row * tokens
    x = _zeros(ROWS, PIECE, COUNT)
    for index in range(steps):
        start = index * PIECE
        column = _columns(start, width, PIECE, width % PIECE == 0)
        known = tl.load(position_ptr + token * width + column).to(tl.float32)
        if token == patches:
            known += tl.load(cell_bias_ptr + column).to(tl.float32)
            new = _embed(x_ptr, x_strides, there, cell_weight, 0, genes, genes, column, STEP, STAGES, CHANNELS)
        else:
            known += tl.load(bias_ptr + token * bias_patch + column).to(tl.float32)
            new = _embed(x_ptr, x_strides, there, own, token * patch, patch, genes, column, STEP, STAGES, CHANNELS)
        new += known[None, :]
        _store_piece(stream_ptr + (first * tokens + token) * width, at, keep, new, start, width, PIECE)
        x = _set(x, index, _inside(new, start, width, PIECE))
    next_ptr += (first * tokens + token) * inner
    _store_next(x, next_ptr, at, keep, norm, (first, there, 0), weight_ptr, eps, width, inner, PIECE, SAMPLES)
