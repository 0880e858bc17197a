"""Multi-head attention whose queries, keys and values are one operand; input and output have the layout (B, N, h * p).

FLOPs per head: 4 N^2 p forward, 10 N^2 p backward. Each block of rows reads w once, from the L2 cache after the first
read. Scores are never written to memory. A head's width is split into two powers of two (96 = 64 + 32) instead of being
padded to 128.

Backward, with A = softmax rows, s_ij = u_i . u_j / sqrt(p) symmetric, delta_i = g_i . o_i (Dao et al. 2022):

    dS_ij = A_ij (g_i . u_j - delta_i)
    du_i  = sum_j A_ji g_j  +  sum_j (dS_ij + dS_ji) u_j / sqrt(p)

The first sum is u_i's gradient as value, the second as query and key. Since s is symmetric, the same scores and two
log-sums give A_ij and A_ji. The program that owns the rows i writes their whole gradient: one kernel, no atomics,
reproducible sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from wbdit.kernels import card, tuning

WIDEST = 128  # values per head; the sums of wider heads do not fit in registers


@triton.jit
def _tile(ptr, rows, columns, stride, tokens, p):
    return tl.load(
        ptr + rows[:, None] * stride + columns[None, :],
        mask=(rows < tokens)[:, None] & (columns < p)[None, :],
        other=0.0,
    )


@triton.jit
def _put(ptr, rows, columns, stride, tokens, p, value):
    tl.store(
        ptr + rows[:, None] * stride + columns[None, :],
        value.to(ptr.dtype.element_ty),
        mask=(rows < tokens)[:, None] & (columns < p)[None, :],
    )


@triton.jit
def _place(tokens, heads, p, ROWS: tl.constexpr):
    """Return the offset of this program's head, the token stride, the offset of its log-sums, and its rows."""
    blocks = tl.cdiv(tokens, ROWS)
    head = tl.program_id(0) // blocks
    stride = heads * p
    base = (head // heads).to(tl.int64) * tokens * stride + head % heads * p
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    return base, stride, head.to(tl.int64) * tokens, rows


@triton.jit
def _gram(a0, a1, b0, b1, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if TAIL > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
    return product


@triton.jit
def _mssa_forward(
    w_ptr,  # [B, N, h p]
    out_ptr,  # [B, N, h p]
    lse_ptr,  # [B, h, N] fp32
    tokens,
    heads,
    p,
    scale,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    base, stride, sums, rows = _place(tokens, heads, p, ROWS)
    first = tl.arange(0, HEAD)
    second = HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    u0 = _tile(w_ptr + base, rows, first, stride, tokens, p)
    sum0 = tl.zeros((ROWS, HEAD), tl.float32)
    if TAIL > 0:
        u1 = _tile(w_ptr + base, rows, second, stride, tokens, p)
        sum1 = tl.zeros((ROWS, TAIL), tl.float32)
    else:
        u1 = u0
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tokens, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        v0 = _tile(w_ptr + base, columns, first, stride, tokens, p)
        v1 = v0
        if TAIL > 0:
            v1 = _tile(w_ptr + base, columns, second, stride, tokens, p)
        scores = _gram(u0, u1, v0, v1, TAIL, PRECISION) * scale
        scores = tl.where((columns < tokens)[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        top = higher
        weights = weights.to(w_ptr.dtype.element_ty)
        sum0 = tl.dot(weights, v0, sum0 * fade[:, None], input_precision=PRECISION)
        if TAIL > 0:
            sum1 = tl.dot(weights, v1, sum1 * fade[:, None], input_precision=PRECISION)
    _put(out_ptr + base, rows, first, stride, tokens, p, sum0 / total[:, None])
    if TAIL > 0:
        _put(out_ptr + base, rows, second, stride, tokens, p, sum1 / total[:, None])
    lse = (top + tl.log2(total)) * 0.6931471805599453  # ln 2: the scores are in base 2
    tl.store(lse_ptr + sums + rows, lse, mask=rows < tokens)


@triton.jit
def _mssa_delta(
    dout_ptr,  # [B, N, h p]
    out_ptr,  # [B, N, h p]
    delta_ptr,  # [B, h, N] fp32
    tokens,
    heads,
    p,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    base, stride, sums, rows = _place(tokens, heads, p, ROWS)
    g = _tile(dout_ptr + base, rows, tl.arange(0, WIDTH), stride, tokens, p).to(tl.float32)
    o = _tile(out_ptr + base, rows, tl.arange(0, WIDTH), stride, tokens, p).to(tl.float32)
    tl.store(delta_ptr + sums + rows, tl.sum(g * o, 1), mask=rows < tokens)


@triton.jit
def _mssa_backward(
    dout_ptr,  # [B, N, h p]
    w_ptr,  # [B, N, h p]
    lse_ptr,  # [B, h, N] fp32
    delta_ptr,  # [B, h, N] fp32
    dw_ptr,  # [B, N, h p]
    tokens,
    heads,
    p,
    scale,
    root,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    base, stride, sums, rows = _place(tokens, heads, p, ROWS)
    first = tl.arange(0, HEAD)
    second = HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    u0 = _tile(w_ptr + base, rows, first, stride, tokens, p)
    g0 = _tile(dout_ptr + base, rows, first, stride, tokens, p)
    u1 = u0
    g1 = g0
    sum0 = tl.zeros((ROWS, HEAD), tl.float32)
    if TAIL > 0:
        u1 = _tile(w_ptr + base, rows, second, stride, tokens, p)
        g1 = _tile(dout_ptr + base, rows, second, stride, tokens, p)
        sum1 = tl.zeros((ROWS, TAIL), tl.float32)
    # masked rows get weight 2^-inf = 0
    lse_row = tl.load(lse_ptr + sums + rows, mask=rows < tokens, other=float("inf")) * 1.4426950408889634
    delta_row = tl.load(delta_ptr + sums + rows, mask=rows < tokens, other=0.0)
    for start in range(0, tokens, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        v0 = _tile(w_ptr + base, columns, first, stride, tokens, p)
        h0 = _tile(dout_ptr + base, columns, first, stride, tokens, p)
        v1 = v0
        h1 = h0
        if TAIL > 0:
            v1 = _tile(w_ptr + base, columns, second, stride, tokens, p)
            h1 = _tile(dout_ptr + base, columns, second, stride, tokens, p)
        lse_column = tl.load(lse_ptr + sums + columns, mask=columns < tokens, other=float("inf")) * 1.4426950408889634
        delta_column = tl.load(delta_ptr + sums + columns, mask=columns < tokens, other=0.0)
        scores = _gram(u0, u1, v0, v1, TAIL, PRECISION) * scale
        to_column = tl.exp2(scores - lse_column[None, :])  # A_ji
        slopes = tl.exp2(scores - lse_row[:, None]) * (_gram(g0, g1, v0, v1, TAIL, PRECISION) - delta_row[:, None])
        slopes += to_column * (_gram(u0, u1, h0, h1, TAIL, PRECISION) - delta_column[None, :])
        to_column = to_column.to(w_ptr.dtype.element_ty)
        slopes = (slopes * root).to(w_ptr.dtype.element_ty)
        sum0 = tl.dot(to_column, h0, sum0, input_precision=PRECISION)
        sum0 = tl.dot(slopes, v0, sum0, input_precision=PRECISION)
        if TAIL > 0:
            sum1 = tl.dot(to_column, h1, sum1, input_precision=PRECISION)
            sum1 = tl.dot(slopes, v1, sum1, input_precision=PRECISION)
    _put(dw_ptr + base, rows, first, stride, tokens, p, sum0)
    if TAIL > 0:
        _put(dw_ptr + base, rows, second, stride, tokens, p, sum1)


@dataclass(frozen=True)
class WholeHead:
    """The kernel of :mod:`wbdit.kernels.hopper_mssa`, with at most this many registers per thread; 0 for no limit.

    Fewer registers let more programs share a multiprocessor, which is faster if heads are small.
    """

    registers: int


@dataclass(frozen=True)
class Blocks:
    """Block sizes: rows that a program owns, rows it reads per step, warps, pipeline stages, precision of products.

    `precision` applies to fp32: "ieee" uses multiply-adds. "tf32x3" uses three TF32 products on the matrix units, which
    together keep all digits of fp32 but the last (NVIDIA only).
    """

    rows: int
    columns: int
    warps: int
    stages: int
    precision: str = "ieee"

    def shared(self, width: int, operands: int, size: int) -> int:
        """Return the bytes of shared memory per program: its own rows, the rows it reads, and the attention weights.

        Parameters
        ----------
        width
            Values per head, as split into powers of two.
        operands
            Number of tensors that are read: 1 forward, 2 backward.
        size
            Bytes per value.
        """
        return (self.rows + self.stages * self.columns) * width * operands * size + self.rows * self.columns * size


# The candidates. On Hopper, whole heads: on an H200, 1,024 samples with 8 heads of 200 x 96 take 0.37 ms (0.40 with the
# limit, 0.60 with FORWARD), and 12 heads of 64 x 64 take 0.13 ms (0.09 with the limit or FORWARD). Elsewhere, forward:
# a warp group multiplies 64 rows, and two groups share the rows they read. With few tokens, narrow steps waste less.
# Backward: five products per tile, so smaller steps.
WHOLE_HEADS = (WholeHead(0), WholeHead(168))
LONGEST = 256  # tokens of a whole head
FORWARD = (Blocks(64, 32, 4, 3), Blocks(64, 64, 4, 3), Blocks(128, 64, 8, 3))
BACKWARD = (Blocks(64, 32, 4, 2), Blocks(128, 32, 8, 2))
BACKWARD_NARROW = (Blocks(64, 16, 4, 2),)  # for GPUs that keep operands in registers, where the others spill
# fp32 has a forward kernel only. On an H200, multiply-adds take 5.7 times as long as three TF32 products and are no
# more accurate. Backward, they take 21 ms at 256 cells of the published size, longer than PyTorch's products.
FORWARD_FP32 = {True: (Blocks(128, 32, 8, 1, "tf32x3"),), False: (Blocks(32, 32, 8, 1),)}  # on Hopper, elsewhere


def candidates(
    backward: bool, dtype: torch.dtype, p: int, device: torch.device, tokens: int = LONGEST + 1
) -> tuple[Blocks | WholeHead, ...]:
    """Return the block sizes that fit a device and heads of `p` values, the expected fastest first; possibly none."""
    limits, width = card.card_of(device), sum(split(p))
    if dtype == torch.float32:
        table = FORWARD_FP32[limits.generation == 9]
    elif backward:
        table = BACKWARD if limits.wide_products else BACKWARD_NARROW
    else:
        table = FORWARD
    operands = 2 if backward else 1
    fitting = tuple(blocks for blocks in table if blocks.shared(width, operands, dtype.itemsize) <= limits.shared)
    # the interpreter cannot run Gluon; heads are not padded
    whole = limits.generation == 9 and not triton.knobs.runtime.interpret and width == p and tokens <= LONGEST
    return (*WHOLE_HEADS, *fitting) if whole and not backward and dtype == torch.bfloat16 else fitting


def mssa(w: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write ``softmax(w w^T / sqrt(p)) w`` of each head to `out` and the log-sum-exp of its scores to `lse`.

    `w` and `out` are dense ``(B, N, h * p)``, `lse` dense ``(B, h, N)`` in fp32.
    """
    heads, tokens, p = lse.shape[1], w.shape[1], w.shape[2] // lse.shape[1]
    if w.numel() == 0:
        return

    def launch(blocks: Blocks | WholeHead) -> tuple[Any]:
        if isinstance(blocks, WholeHead):
            # imported on Hopper alone: Gluon is experimental, and other Tritons may lack it
            from wbdit.kernels import hopper_mssa

            return (hopper_mssa.mssa(w, out, lse, blocks.registers),)
        kernel = _mssa_forward[(w.shape[0] * heads * triton.cdiv(tokens, blocks.rows),)](
            *(w, out, lse, tokens, heads, p, math.log2(math.e) / math.sqrt(p)), **_options(blocks, w, p)
        )
        return (kernel,)

    launch(_choose("mssa", False, w, lse, launch))


def mssa_backward(dout: Tensor, w: Tensor, out: Tensor, lse: Tensor, dw: Tensor) -> None:
    """Write the gradient of :func:`mssa` to `dw`, bf16 only; all tensors but `lse` are dense ``(B, N, h * p)``."""
    heads, tokens, p = lse.shape[1], w.shape[1], w.shape[2] // lse.shape[1]
    if w.numel() == 0:
        return
    delta = torch.empty_like(lse)
    _mssa_delta[(w.shape[0] * heads * triton.cdiv(tokens, 64),)](
        dout, out, delta, tokens, heads, p, WIDTH=max(16, triton.next_power_of_2(p)), ROWS=64
    )

    def launch(blocks: Blocks) -> tuple[Any]:
        kernel = _mssa_backward[(w.shape[0] * heads * triton.cdiv(tokens, blocks.rows),)](
            *(dout, w, lse, delta, dw, tokens, heads, p, math.log2(math.e) / math.sqrt(p), 1 / math.sqrt(p)),
            **_options(blocks, w, p),
        )
        return (kernel,)

    launch(_choose("mssa_backward", True, w, lse, launch))


def split(p: int) -> tuple[int, int]:
    """Return two powers of two, each at least 16, that together hold `p` values; the second is 0 if one suffices.

    >>> split(96), split(64), split(20), split(7)
    ((64, 32), (64, 0), (32, 0), (16, 0))
    """
    whole = max(16, triton.next_power_of_2(p))
    tail = max(16, triton.next_power_of_2(p - whole // 2))
    return (whole, 0) if whole // 2 + tail >= whole else (whole // 2, tail)


def _choose(op: str, backward: bool, w: Tensor, lse: Tensor, launch: tuning.Launch[Any]) -> Any:
    batch, heads, tokens = lse.shape
    p = w.shape[2] // heads
    # the number of programs matters only while they do not fill the GPU
    shape = (w.dtype, p, triton.next_power_of_2(tokens), min(2**10, triton.next_power_of_2(batch * heads)))
    return tuning.choose(op, shape, candidates(backward, w.dtype, p, w.device, tokens), launch, w.device)


def _options(blocks: Blocks, w: Tensor, p: int) -> dict[str, object]:
    head, tail = split(p)
    # PyTorch's switch: fp32 products keep full precision unless the user allows TF32. Setting `allow_tf32` sets it too;
    # reading `allow_tf32` instead can raise an error if the user has set `fp32_precision`.
    lowered = w.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "HEAD": head,
        "TAIL": tail,
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "PRECISION": "tf32" if lowered else blocks.precision,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
