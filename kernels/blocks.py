"""All blocks of a white-box denoiser without gradients: four launches a block, and no pass of its own for LayerNorm.

The norm z = (x - mu) r (1 + s) + b of a row stands before each product z W. It need not be known before the product is
formed: with u = (x - c) (1 + s) for any c near mu,

    z W = r (u W - (mu - c) S) + T,        S = (1 + s) W,  T = b W,  one row of each a sample,

so the kernel that makes x also writes u in bf16 and the sums of (x - c) and its square over its columns, and the next
kernel takes u as its operand as it lies (no arithmetic between memory and the matrix units) and puts r, mu, S and T
into its epilogue. c is the row's mean one half-step ago: the mean moves little in one, so u is all but centred, bf16
rounds what matters, and the variance does not cancel.

Bytes a value with a bf16 stream: projection 4, attention 4, each half-step's other product 8. FLOPs a token and block:
6 d^2 + 4 N d. At d = 768 and N = 200 that is 225 FLOP a byte; an H100's balance is some 270.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from wbdit.kernels import adaln, card, mssa, tuning


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of the sums that a program owns, numbers a step, its warps and the depth of its pipeline."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a program takes: both operands of a bf16 product, in each stage."""
        return self.stages * (self.rows + self.columns) * self.inner * 2


# The first reads the least out of L2. Two programs of the second share a multiprocessor: one multiplies while the other
# is in its epilogue. The third fits every card, and makes enough programs of a small model.
TILES = (Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 8, 3), Tiles(64, 64, 64, 4, 3))


def candidates(device: torch.device) -> tuple[Tiles, ...]:
    """Return the tiles whose programs fit into the shared memory of a device, the expected best first; maybe none."""
    return tuple(tiles for tiles in TILES if tiles.shared <= card.card_of(device).shared)


@triton.jit
def _product(a_ptr, w_ptr, row, column, inner, w_inner, w_column, INNER: tl.constexpr, EVEN: tl.constexpr):
    """Return rows of a (rows, inner), dense, times columns of w, its elements `w_inner` and `w_column` apart."""
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
    """Return this program's first row and column; programs of the same rows are neighbours, and share them in L2.

    The first row moves the pointers, by 64 bits; what is added to them for each number then fits into 32.
    """
    stripes = tl.cdiv(width, COLUMNS)
    first = (tl.program_id(0) // stripes).to(tl.int64) * ROWS
    return first, tl.program_id(0) % stripes * COLUMNS


@triton.jit
def _samples(first, row, tokens):
    """Return the sample of the first row, and how many samples further each row lies."""
    sample = first // tokens
    return sample, ((first - sample * tokens).to(tl.int32) + row) // tokens


@triton.jit
def _moments(centre_ptr, sums_ptr, row, parts, width, eps, PARTS: tl.constexpr):
    """Return a row's centre c, its mean less c, and 1 / its standard deviation."""
    part = tl.arange(0, PARTS)
    at = (row[:, None] * parts + part[None, :]) * 2
    first = tl.sum(tl.load(sums_ptr + at, mask=(part < parts)[None, :], other=0.0), 1) / width
    second = tl.sum(tl.load(sums_ptr + at + 1, mask=(part < parts)[None, :], other=0.0), 1) / width
    return tl.load(centre_ptr + row), first, 1.0 / tl.sqrt(tl.maximum(second - first * first, 0.0) + eps)


@triton.jit
def _load_per_sample(ptr, sample, stride, column):
    """Return a table's row for each token's sample, fp32."""
    return tl.load(ptr + sample[:, None] * stride + column[None, :]).to(tl.float32)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a tile's left and right half: an epilogue that takes one after the other keeps to its registers."""
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def _clamp_index(index, count):
    """Return indices with those that are not there put to 0: loads need no mask, and stores have one."""
    return tl.where(index < count, index, 0)


@triton.jit
def _columns(start, width, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """Return `COUNT` columns to load from; where tiles divide the width, the compiler sees that they are neighbours."""
    column = start + tl.arange(0, COUNT)
    return column if WHOLE else _clamp_index(column, width)


@triton.jit
def _store_state(x, new_x_ptr, new_u_ptr, new_sums_ptr, scale, centre, row, start, count, width, HALF: tl.constexpr):
    """Write x, u = (x - c) (1 + s), and the sums of x - c and its square over these columns."""
    column = start + tl.arange(0, HALF)
    keep = (row < count)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = x.to(new_x_ptr.dtype.element_ty)
    tl.store(new_x_ptr + at, x, mask=keep)
    off = tl.where(keep, x.to(tl.float32) - centre[:, None], 0.0)
    tl.store(new_u_ptr + at, (off * (1.0 + scale)).to(new_u_ptr.dtype.element_ty), mask=keep)
    to = new_sums_ptr + (row * (2 * tl.cdiv(width, 2 * HALF)) + start // HALF) * 2
    tl.store(to, tl.sum(off, 1), mask=row < count)
    tl.store(to + 1, tl.sum(off * off, 1), mask=row < count)


@triton.jit
def _block_project(
    u_ptr,
    w_ptr,
    centre_ptr,
    sums_ptr,
    slope_ptr,
    level_ptr,
    out_ptr,
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
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    first, start = _tile_origin(width, ROWS, COLUMNS)
    row, count = tl.arange(0, ROWS), tl.minimum(count - first, ROWS).to(tl.int32)
    there, within = _clamp_index(row, count), _columns(start, width, COLUMNS, WHOLE)
    product = _product(u_ptr + first * inner, w_ptr, there, within, inner, w_inner, w_column, INNER, EVEN)
    _, mean, rstd = _moments(centre_ptr + first, sums_ptr + first * parts * 2, there, parts, inner, eps, PARTS)
    sample, further = _samples(first, there, tokens)
    slope = _load_per_sample(slope_ptr + sample * stride, further, stride, within)
    level = _load_per_sample(level_ptr + sample * stride, further, stride, within)
    out = rstd[:, None] * (product - mean[:, None] * slope) + level
    column = start + tl.arange(0, COLUMNS)
    keep = (row < count)[:, None] & (column < width)[None, :]
    to = out_ptr + first * width
    tl.store(to + row[:, None] * width + column[None, :], out.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _compress_half(
    step,
    bias_ptr,
    gate_ptr,
    scale_ptr,
    x_ptr,
    new_x_ptr,
    new_u_ptr,
    new_sums_ptr,
    centre,
    row,
    start,
    count,
    further,
    width,
    stride,
    HALF: tl.constexpr,
    WHOLE: tl.constexpr,
):
    there, within = _clamp_index(row, count), _columns(start, width, HALF, WHOLE)
    step += tl.load(bias_ptr + within).to(tl.float32)[None, :]
    x = tl.load(x_ptr + there[:, None] * width + within[None, :]).to(tl.float32)
    x += _load_per_sample(gate_ptr, further, stride, within) * step
    scale = _load_per_sample(scale_ptr, further, stride, within)
    _store_state(x, new_x_ptr, new_u_ptr, new_sums_ptr, scale, centre, row, start, count, width, HALF)


@triton.jit
def _block_compress(
    a_ptr,
    w_ptr,
    bias_ptr,
    gate_ptr,
    scale_ptr,
    x_ptr,
    centre_ptr,
    sums_ptr,
    new_x_ptr,
    new_u_ptr,
    new_centre_ptr,
    new_sums_ptr,
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
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    HALF: tl.constexpr = COLUMNS // 2
    first, start = _tile_origin(width, ROWS, COLUMNS)
    row, count = tl.arange(0, ROWS), tl.minimum(count - first, ROWS).to(tl.int32)
    there, within = _clamp_index(row, count), _columns(start, width, COLUMNS, WHOLE)
    step = _product(a_ptr + first * inner, w_ptr, there, within, inner, w_inner, w_column, INNER, EVEN)
    centre, mean, _ = _moments(centre_ptr + first, sums_ptr + first * parts * 2, there, parts, width, eps, PARTS)
    centre += mean
    sample, further = _samples(first, there, tokens)
    left, right = _halves(step, ROWS, COLUMNS)
    for half in tl.static_range(2):
        _compress_half(
            left if half == 0 else right,
            bias_ptr,
            gate_ptr + sample * stride,
            scale_ptr + sample * stride,
            x_ptr + first * width,
            new_x_ptr + first * width,
            new_u_ptr + first * width,
            new_sums_ptr + first * parts * 2,
            centre,
            row,
            start + half * HALF,
            count,
            further,
            width,
            stride,
            HALF,
            WHOLE,
        )
    tl.store(new_centre_ptr + first + row, centre, mask=(row < count) & (start == 0))


@triton.jit
def _sparsify_half(
    product,
    u_ptr,
    slope_ptr,
    level_ptr,
    gate_ptr,
    scale_ptr,
    x_ptr,
    new_x_ptr,
    new_u_ptr,
    new_sums_ptr,
    centre,
    mean,
    rstd,
    row,
    start,
    count,
    further,
    width,
    stride,
    eta,
    HALF: tl.constexpr,
    WHOLE: tl.constexpr,
):
    there, within = _clamp_index(row, count), _columns(start, width, HALF, WHOLE)
    # z + eta z F in one: u is z's part and u F, not rounded to bf16, the product's
    step = tl.load(u_ptr + there[:, None] * width + within[None, :]).to(tl.float32) + eta * product
    step -= mean[:, None] * _load_per_sample(slope_ptr, further, stride, within)
    step = rstd[:, None] * step + _load_per_sample(level_ptr, further, stride, within)
    step = tl.where(step < 0, 0.0, step)  # a NaN stays one
    x = tl.load(x_ptr + there[:, None] * width + within[None, :]).to(tl.float32)
    x += _load_per_sample(gate_ptr, further, stride, within) * step
    scale = _load_per_sample(scale_ptr, further, stride, within)
    _store_state(x, new_x_ptr, new_u_ptr, new_sums_ptr, scale, centre, row, start, count, width, HALF)


@triton.jit
def _block_sparsify(
    u_ptr,
    w_ptr,
    slope_ptr,
    level_ptr,
    gate_ptr,
    scale_ptr,
    x_ptr,
    centre_ptr,
    sums_ptr,
    new_x_ptr,
    new_u_ptr,
    new_centre_ptr,
    new_sums_ptr,
    count,
    tokens,
    width,
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
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    HALF: tl.constexpr = COLUMNS // 2
    first, start = _tile_origin(width, ROWS, COLUMNS)
    row, count = tl.arange(0, ROWS), tl.minimum(count - first, ROWS).to(tl.int32)
    there, within = _clamp_index(row, count), _columns(start, width, COLUMNS, WHOLE)
    product = _product(u_ptr + first * width, w_ptr, there, within, width, w_inner, w_column, INNER, EVEN)
    centre, mean, rstd = _moments(centre_ptr + first, sums_ptr + first * parts * 2, there, parts, width, eps, PARTS)
    sample, further = _samples(first, there, tokens)
    left, right = _halves(product, ROWS, COLUMNS)
    for half in tl.static_range(2):
        _sparsify_half(
            left if half == 0 else right,
            u_ptr + first * width,
            slope_ptr + sample * stride,
            level_ptr + sample * stride,
            gate_ptr + sample * stride,
            scale_ptr + sample * stride,
            x_ptr + first * width,
            new_x_ptr + first * width,
            new_u_ptr + first * width,
            new_sums_ptr + first * parts * 2,
            centre + mean,
            mean,
            rstd,
            row,
            start + half * HALF,
            count,
            further,
            width,
            stride,
            eta,
            HALF,
            WHOLE,
        )
    tl.store(new_centre_ptr + first + row, centre + mean, mask=(row < count) & (start == 0))


@triton.jit
def _block_init(
    x_ptr,
    scale_ptr,
    new_x_ptr,
    u_ptr,
    centre_ptr,
    sums_ptr,
    tokens,
    width,
    parts,
    scale_stride,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the state of the rows as they come: the stream, u with c = mu exactly, and the sums in their first part."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(new_x_ptr.dtype.element_ty)
    tl.store(new_x_ptr + row * width + column, x, mask=inside)
    x = x.to(tl.float32)
    centre = tl.sum(x, 0) / width
    off = tl.where(inside, x - centre, 0.0)
    scale = tl.load(scale_ptr + row // tokens * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(u_ptr + row * width + column, (off * (1.0 + scale)).to(u_ptr.dtype.element_ty), mask=inside)
    tl.store(centre_ptr + row, centre)
    at = tl.arange(0, 2 * PARTS)
    tl.store(sums_ptr + row * parts * 2 + at, tl.where(at == 1, tl.sum(off * off, 0), 0.0), mask=at < 2 * parts)


class _State:
    """The rows between two kernels: the stream x, the operand u, the centre c, and the sums over parts of a row."""

    def __init__(self, like: Tensor, parts: int, dtype: torch.dtype) -> None:
        count, width = like.numel() // like.shape[-1], like.shape[-1]
        self.x = torch.empty((count, width), dtype=dtype, device=like.device)
        self.u = torch.empty_like(self.x)
        self.centre = torch.empty(count, device=like.device)
        self.sums = torch.empty((count, parts, 2), device=like.device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.u, self.centre, self.sums


def run_blocks(
    x: Tensor,
    modulations: Sequence[Tensor],
    projections: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor],
    folded: Sequence[Tensor],
    heads: int,
    eta: float,
    lam: float,
    eps: float,
) -> Tensor:
    """Return the modulated norm of the residual stream after all blocks ``(B, N, d)``, in the type of `folded`.

    Takes what :func:`wbdit.ops.reference.run_blocks` takes; d is a multiple of 16, and so is what the heads make
    of it. The stream is kept in the products' type.
    """
    x = x.contiguous()
    modulations = [m if m.stride(-1) == 1 else m.contiguous() for m in modulations]
    weights = projections, outs, [bias.contiguous() for bias in biases], folded

    def run(tiles: Tiles) -> tuple[Tensor, list[Any]]:
        launcher = _Launcher(x, modulations, heads, tiles, folded[0].dtype, eps)
        return launcher.run(weights, eta, lam), launcher.kernels

    shape = (*x.shape[1:], heads, min(2**10, triton.next_power_of_2(x.shape[0])))
    return run(tuning.choose("run_blocks", shape, candidates(x.device), lambda tiles: run(tiles)[1], x.device))[0]


class _Launcher:
    """The launches of one call: what its kernels share, and the rows' state, which goes to and fro between two."""

    def __init__(
        self, x: Tensor, modulations: Sequence[Tensor], heads: int, tiles: Tiles, dtype: torch.dtype, eps: float
    ) -> None:
        self.x, self.heads, self.tiles, self.dtype, self.eps = x, heads, tiles, dtype, eps
        self.batch, self.tokens, self.d = x.shape
        self.count = self.batch * self.tokens
        self.parts = 2 * triton.cdiv(self.d, tiles.columns)
        self.state, self.spare = (_State(x, self.parts, dtype) for _ in range(2))
        self.modulations, self.rows = modulations, _shared_rows(modulations)
        self.shared = len(self.rows[0]) == 1
        self.kernels: list[Any] = []  # compiled, of the launches that depend on the tiles

    def run(self, weights: tuple[Sequence[Tensor], ...], eta: float, lam: float) -> Tensor:
        table = torch.stack(self.rows).to(self.dtype)  # [6 blocks + 2, B or 1, d]
        self.init(table[1])
        for i, (projection, out, bias, folded) in enumerate(zip(*weights, strict=True)):
            _, _, gate1, _, scale2, gate2, _, scale = table[6 * i : 6 * i + 8]
            shift1, scale1, _, shift2, exact_scale2, _ = self.rows[6 * i : 6 * i + 6]
            w = self.project(projection, _fold_modulation_into_projection(scale1, shift1, projection))
            attended, lse = torch.empty_like(w), w.new_empty((self.batch, self.heads, self.tokens), dtype=torch.float32)
            mssa.mssa(w, attended, lse)
            self.compress(attended, out, bias, gate1, scale2)
            self.sparsify(folded, _fold_modulation_into_step(exact_scale2, shift2, folded, eta, lam), gate2, scale, eta)
        return self.end(*self.modulations[-2:])

    def init(self, scale: Tensor) -> None:
        _block_init[(self.count,)](
            *(self.x, scale, *self.state.tensors, self.tokens, self.d, self.parts, self.stride(self.d)),
            PARTS=triton.next_power_of_2(self.parts),
            WIDTH=triton.next_power_of_2(self.d),
            num_warps=4,
        )

    def project(self, weight: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        width = weight.shape[0]
        w = torch.empty((self.batch, self.tokens, width), dtype=self.dtype, device=self.x.device)
        s = self.state
        kernel = _block_project[self.grid(width)](
            *(s.u, weight, s.centre, s.sums, *table, w, self.count, self.tokens, width, self.d, self.parts),
            *(weight.stride(1), weight.stride(0), self.stride(width), self.eps),
            **self.options(self.d, width),
        )
        self.kernels.append(kernel)
        return w

    def compress(self, a: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, scale: Tensor) -> None:
        s, inner = self.state, a.shape[-1]
        kernel = _block_compress[self.grid(self.d)](
            *(a, weight, bias, gate, scale, s.x, s.centre, s.sums, *self.spare.tensors),
            *(self.count, self.tokens, self.d, inner, self.parts),
            *(weight.stride(1), weight.stride(0), self.stride(self.d), self.eps),
            **self.options(inner, self.d),
        )
        self.kernels.append(kernel)
        self.state, self.spare = self.spare, self.state

    def sparsify(self, weight: Tensor, table: tuple[Tensor, Tensor], gate: Tensor, scale: Tensor, eta: float) -> None:
        s = self.state
        kernel = _block_sparsify[self.grid(self.d)](
            *(s.u, weight, *table, gate, scale, s.x, s.centre, s.sums, *self.spare.tensors),
            *(self.count, self.tokens, self.d, self.parts),
            *(weight.stride(0), weight.stride(1), self.stride(self.d), eta, self.eps),
            **self.options(self.d, self.d),
        )
        self.kernels.append(kernel)
        self.state, self.spare = self.spare, self.state

    def end(self, shift: Tensor, scale: Tensor) -> Tensor:
        x, z = self.state.x.view(self.x.shape), self.spare.u.view(self.x.shape)
        adaln.residual_adaln(x, shift=shift, scale=scale, z_new=z, eps=self.eps)
        return z

    def stride(self, width: int) -> int:
        """Return how far a table's rows lie apart: where all samples share one, nowhere."""
        return 0 if self.shared else width

    def grid(self, width: int) -> tuple[int]:
        return (triton.cdiv(self.count, self.tiles.rows) * triton.cdiv(width, self.tiles.columns),)

    def options(self, inner: int, width: int) -> dict[str, object]:
        t = self.tiles
        return {
            "ROWS": t.rows,
            "COLUMNS": t.columns,
            "INNER": t.inner,
            "PARTS": triton.next_power_of_2(self.parts),
            "EVEN": inner % t.inner == 0,
            "WHOLE": width % t.columns == 0,
            "num_warps": t.warps,
            "num_stages": t.stages,
        }


def _shared_rows(modulations: Sequence[Tensor]) -> list[Tensor]:
    """Return the modulations, one row of each where all samples share it: a view of one row says so."""
    shared = all(m.stride(0) == 0 for m in modulations)
    return [m[:1] if shared else m for m in modulations]


def _fold_modulation_into_projection(scale: Tensor, shift: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return S = (1 + s) W and T = b W, one row a sample."""
    slope, level = (torch.cat([1 + scale, shift]).to(weight.dtype) @ weight.mT).chunk(2)
    return slope, level


def _fold_modulation_into_step(
    scale: Tensor, shift: Tensor, folded: Tensor, eta: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return what z + eta z F - eta lam makes of 1 + s and of b: as S and T, with the identity and the threshold in."""
    both = torch.cat([1 + scale, shift]).float()
    slope, level = (both + eta * (both.to(folded.dtype) @ folded).float()).chunk(2)
    return slope.to(folded.dtype), (level - eta * lam).to(folded.dtype)
