"""Attention of :mod:`wbdit.kernels.mssa` on Hopper GPUs for up to 256 tokens, in Gluon: one program per head.

Queries, keys and values are one operand, so the program keeps all tokens of its head in shared memory, copied once by
TMA. It takes 64 rows at a time. All scores of a row are in registers, so the softmax needs no running maximum. Columns
come in powers of two that add up to the next multiple of 16: 200 tokens take 128 + 64 + 16 columns.
"""

from __future__ import annotations

import math
from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from wbdit.kernels.mssa import split


@gluon.jit
def _scores(rows0, rows1, u0, u1, start: gl.constexpr, size: gl.constexpr, TAIL: gl.constexpr):
    """Return the products of 64 rows with the `size` rows from `start` on."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, size, 16])
    product = gl.zeros((64, size), gl.float32, layout)
    product = warpgroup_mma(rows0, u0.slice(start, size).permute((1, 0)), product, is_async=True)
    if TAIL > 0:
        product = warpgroup_mma(rows1, u1.slice(start, size).permute((1, 0)), product, is_async=True)
    return product


@gluon.jit
def _hopper_mssa_forward(
    head_desc,
    tail_desc,
    head_out_desc,
    tail_out_desc,
    lse_ptr,  # [B, h, N] fp32
    tokens: gl.constexpr,
    heads,
    p,
    scale,
    CHUNKS: gl.constexpr,
    TAIL: gl.constexpr,
):
    LENGTH: gl.constexpr = head_desc.block_type.shape[1]
    HEAD: gl.constexpr = head_desc.block_type.shape[2]
    # the buffers of one sample, as matrices
    head_layout: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * HEAD), 16, 2)
    tail_layout: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * TAIL) if TAIL > 0 else 32, 16, 2)
    sample = gl.program_id(0) // heads
    head = gl.program_id(0) % heads
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    whole0 = gl.allocate_shared_memory(gl.bfloat16, [1, LENGTH, HEAD], head_desc.layout)
    out0 = gl.allocate_shared_memory(gl.bfloat16, [1, 64, HEAD], head_out_desc.layout)
    mbarrier.expect(ready, LENGTH * (HEAD + TAIL) * 2)
    tma.async_copy_global_to_shared(head_desc, [sample, 0, head * p], ready, whole0)
    u0 = whole0._reinterpret(gl.bfloat16, [LENGTH, HEAD], head_layout)
    rows0 = whole0._reinterpret(gl.bfloat16, [LENGTH // 64, 64, HEAD], head_layout)
    u1 = u0
    rows1 = rows0
    if TAIL > 0:
        whole1 = gl.allocate_shared_memory(gl.bfloat16, [1, LENGTH, TAIL], tail_desc.layout)
        out1 = gl.allocate_shared_memory(gl.bfloat16, [1, 64, TAIL], tail_out_desc.layout)
        tma.async_copy_global_to_shared(tail_desc, [sample, 0, head * p + HEAD], ready, whole1)
        u1 = whole1._reinterpret(gl.bfloat16, [LENGTH, TAIL], tail_layout)
        rows1 = whole1._reinterpret(gl.bfloat16, [LENGTH // 64, 64, TAIL], tail_layout)
    mbarrier.wait(ready, 0)
    layout0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    layout1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL if TAIL > 0 else 16, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout0)
    for block in range((tokens + 63) // 64):
        products = ()
        for i in gl.static_range(len(CHUNKS)):
            products = products + (
                _scores(rows0.index(block), rows1.index(block), u0, u1, CHUNKS[i][0], CHUNKS[i][1], TAIL),
            )
        top = gl.full((64,), -float("inf"), gl.float32, rows)
        scores = ()
        for i in gl.static_range(len(CHUNKS)):
            score = warpgroup_mma_wait(0, deps=(products[i],)) * scale
            if CHUNKS[i][0] + CHUNKS[i][1] > tokens:
                column = CHUNKS[i][0] + gl.arange(0, CHUNKS[i][1], gl.SliceLayout(0, score.type.layout))
                score = gl.where(gl.expand_dims(column < tokens, 0), score, -float("inf"))
            top = gl.maximum(top, gl.convert_layout(gl.max(score, 1), rows))
            scores = scores + (score,)
        # all weights before the first product: their scores' registers are then free for its sums
        total = gl.zeros((64,), gl.float32, rows)
        weights = ()
        for i in gl.static_range(len(CHUNKS)):
            high = gl.convert_layout(top, gl.SliceLayout(1, scores[i].type.layout))
            weight = gl.exp2(scores[i] - gl.expand_dims(high, 1))
            total += gl.convert_layout(gl.sum(weight, 1), rows)
            weights = weights + (weight.to(gl.bfloat16),)
        sum0 = gl.zeros((64, HEAD), gl.float32, layout0)
        if TAIL > 0:
            sum1 = gl.zeros((64, TAIL), gl.float32, layout1)
        for i in gl.static_range(len(CHUNKS)):
            a0 = gl.convert_layout(weights[i], gl.DotOperandLayout(0, layout0, 2))
            sum0 = warpgroup_mma(a0, u0.slice(CHUNKS[i][0], CHUNKS[i][1]), sum0, is_async=True)
            if TAIL > 0:
                a1 = gl.convert_layout(weights[i], gl.DotOperandLayout(0, layout1, 2))
                sum1 = warpgroup_mma(a1, u1.slice(CHUNKS[i][0], CHUNKS[i][1]), sum1, is_async=True)
        sum0 = warpgroup_mma_wait(0, deps=(sum0,))
        share = 1.0 / total
        tma.store_wait(0)  # the block before has left the buffers
        out0._reinterpret(gl.bfloat16, [64, HEAD], head_layout).store((sum0 * gl.expand_dims(share, 1)).to(gl.bfloat16))
        if TAIL > 0:
            sum1 = warpgroup_mma_wait(0, deps=(sum1,))
            share1 = gl.convert_layout(share, gl.SliceLayout(1, layout1))
            out1._reinterpret(gl.bfloat16, [64, TAIL], tail_layout).store(
                (sum1 * gl.expand_dims(share1, 1)).to(gl.bfloat16)
            )
        fence_async_shared()
        tma.async_copy_shared_to_global(head_out_desc, [sample, block * 64, head * p], out0)
        if TAIL > 0:
            tma.async_copy_shared_to_global(tail_out_desc, [sample, block * 64, head * p + HEAD], out1)
        line = block * 64 + gl.arange(0, 64, rows)
        lse = (top + gl.log2(total)) * 0.6931471805599453  # ln 2: the scores are in base 2
        gl.store(lse_ptr + gl.program_id(0).to(gl.int64) * tokens + line, lse, mask=line < tokens)
    tma.store_wait(0)


def chunks(tokens: int) -> tuple[tuple[int, int], ...]:
    """Return start and size of powers of two, the largest first, that add up to the next multiple of 16.

    >>> chunks(200), chunks(33)
    (((0, 128), (128, 64), (192, 16)), ((0, 32), (32, 16)))
    """
    found, start, left = [], 0, triton.cdiv(tokens, 16) * 16
    while left:
        size = 1 << (left.bit_length() - 1)
        found.append((start, size))
        start, left = start + size, left - size
    return tuple(found)


def mssa(w: Tensor, out: Tensor, lse: Tensor, registers: int = 0) -> Any:
    """Launch the kernel, with the arguments of :func:`wbdit.kernels.mssa.mssa`; return the compiled kernel."""
    batch, heads, tokens = lse.shape
    p = w.shape[2] // heads
    head, tail = (64, 64) if p == 128 else split(p)  # TMA copies at most 64 values of a row at a time
    length = max(64, triton.next_power_of_2(tokens))

    def descriptor(tensor: Tensor, rows: int, width: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout(min(128, 2 * width), 16, 3)
        return TensorDescriptor.from_tensor(tensor, [1, rows, width], layout)

    return _hopper_mssa_forward[(batch * heads,)](
        descriptor(w, length, head),
        descriptor(w, length, tail or 16),
        descriptor(out, 64, head),
        descriptor(out, 64, tail or 16),
        *(lse, tokens, heads, p, math.log2(math.e) / math.sqrt(p)),
        CHUNKS=chunks(tokens),
        TAIL=tail,
        num_warps=4,
        **({"maxnreg": registers} if registers else {}),
    )
