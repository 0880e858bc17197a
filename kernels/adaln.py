"""Residual update, threshold, LayerNorm and modulation fused in one kernel over the tokens, and its gradient.

With an fp32 residual stream and bf16 matrix products, the forward kernel reads x and out (and z) and writes x' and z':
12 (14) bytes per value. A row of d values stays in registers. A program processes several rows of one sample in turn,
so it reads their shift, scale and gate once. The arithmetic is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 8192  # values per row; wider rows do not fit in registers


@triton.jit
def _read(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(ptr, at, value, inside):
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _normalize(row, inside, d, eps):
    mean = tl.sum(row, 0) / d
    off = tl.where(inside, row - mean, 0.0)  # a second pass over registers is cheap and avoids cancellation
    rstd = 1.0 / tl.sqrt(tl.sum(off * off, 0) / d + eps)
    return off * rstd, rstd


@triton.jit
def _shrink(z, product, eta, threshold):
    value = z + eta * product - threshold
    return tl.where(value < 0, 0.0, value)  # keeps NaN


@triton.jit
def _adaln_forward(
    x_ptr,  # [B, N, d] fp32 or bf16
    out_ptr,  # [B, N, d], the products' dtype; None without a half-step
    bias_ptr,  # [d] or None
    z_ptr,  # [B, N, d]; None if the half-step has no threshold
    gate_ptr,  # [B, d], row stride gate_stride
    shift_ptr,  # [B, d], row stride shift_stride
    scale_ptr,  # [B, d], row stride scale_stride
    x_new_ptr,  # [B, N, d], dtype of x, or None
    z_new_ptr,  # [B, N, d], the products' dtype
    tokens,
    d,
    gate_stride,
    shift_stride,
    scale_stride,
    eta,
    threshold,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    parts = tl.cdiv(tokens, ROWS)
    sample = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * ROWS
    column = tl.arange(0, WIDTH)
    inside = column < d
    shift = _read(shift_ptr + sample * shift_stride, column, inside)
    scale = _read(scale_ptr + sample * scale_stride, column, inside)
    if out_ptr is not None:
        gate = _read(gate_ptr + sample * gate_stride, column, inside)
    if bias_ptr is not None:
        bias = _read(bias_ptr, column, inside)
    for token in range(first, tl.minimum(first + ROWS, tokens)):
        at = (sample * tokens + token) * d + column
        row = _read(x_ptr, at, inside)
        if out_ptr is not None:
            step = _read(out_ptr, at, inside)
            if bias_ptr is not None:
                step += bias
            if z_ptr is not None:
                step = _shrink(_read(z_ptr, at, inside), step, eta, threshold)
            row += gate * step
            if x_new_ptr is not None:
                _write(x_new_ptr, at, row, inside)
                row = row.to(x_new_ptr.dtype.element_ty).to(tl.float32)  # normalize the rounded values that are stored
        normed, _ = _normalize(row, inside, d, eps)
        _write(z_new_ptr, at, normed * (1.0 + scale) + shift, inside)


@triton.jit
def _adaln_backward(
    dz_new_ptr,  # [B, N, d], the products' dtype
    dx_new_ptr,  # [B, N, d], dtype of x, or None
    x_new_ptr,  # [B, N, d], dtype of x
    out_ptr,  # [B, N, d], the products' dtype; None without a half-step
    bias_ptr,  # [d] or None
    z_ptr,  # [B, N, d]; None if the half-step has no threshold
    gate_ptr,  # [B, d], row stride gate_stride
    scale_ptr,  # [B, d], row stride scale_stride
    dx_ptr,  # [B, N, d], dtype of x
    dout_ptr,  # [B, N, d], the products' dtype
    sums_ptr,  # [B, parts, 4, d] fp32
    tokens,
    d,
    gate_stride,
    scale_stride,
    eta,
    threshold,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    parts = tl.cdiv(tokens, ROWS)
    sample = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * ROWS
    column = tl.arange(0, WIDTH)
    inside = column < d
    scale = _read(scale_ptr + sample * scale_stride, column, inside)
    if out_ptr is not None:
        gate = _read(gate_ptr + sample * gate_stride, column, inside)
    if bias_ptr is not None:
        bias = _read(bias_ptr, column, inside)
    dshift = tl.zeros((WIDTH,), tl.float32)
    dscale = tl.zeros((WIDTH,), tl.float32)
    dgate = tl.zeros((WIDTH,), tl.float32)
    dbias = tl.zeros((WIDTH,), tl.float32)
    for token in range(first, tl.minimum(first + ROWS, tokens)):
        # issue all loads before the first reduction over the row, which synchronizes all threads
        at = (sample * tokens + token) * d + column
        row = _read(x_new_ptr, at, inside)
        g = _read(dz_new_ptr, at, inside)
        if dx_new_ptr is not None:
            before = _read(dx_new_ptr, at, inside)
        if out_ptr is not None:
            step = _read(out_ptr, at, inside)
        if z_ptr is not None:
            z = _read(z_ptr, at, inside)
        normed, rstd = _normalize(row, inside, d, eps)
        dshift += g
        dscale += g * normed
        slope = g * (1.0 + scale)
        dx = rstd * (slope - tl.sum(slope, 0) / d - normed * (tl.sum(slope * normed, 0) / d))
        if dx_new_ptr is not None:
            dx += before
        _write(dx_ptr, at, dx, inside)
        if out_ptr is not None:
            through = gate * dx
            if bias_ptr is not None:
                step += bias
                dbias += through
            if z_ptr is not None:
                step = _shrink(z, step, eta, threshold)
                through = tl.where(step > 0, through, 0.0)
            dgate += dx * step
            _write(dout_ptr, at, through, inside)
    to = sums_ptr + tl.program_id(0).to(tl.int64) * 4 * d
    _write(to, column, dshift, inside)
    _write(to + d, column, dscale, inside)
    if out_ptr is not None:
        _write(to + 2 * d, column, dgate, inside)
    if bias_ptr is not None:
        _write(to + 3 * d, column, dbias, inside)


def residual_adaln(
    x: Tensor,
    *,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor,
    scale: Tensor,
    x_new: Tensor | None = None,
    z_new: Tensor,
    eta: float = 0.0,
    lam: float = 0.0,
    eps: float,
) -> None:
    """Write ``x' = x + gate * step`` to `x_new` and ``LN(x') * (1 + scale) + shift`` to `z_new`.

    `step` is ``out + bias``, or ``relu(z + eta out - eta lam)`` if `z` is given. Without `out` there is no step, and x'
    is x. Without `x_new`, x' is not written. `x_new` may be `x`, and `z_new` may be `out` or `z`. Token tensors
    ``(B, N, d)`` are dense. Modulations ``(B, d)`` have dense rows.
    """
    batch, tokens, d = x.shape
    if x.numel() == 0:
        return
    rows = 8
    _adaln_forward[(batch * triton.cdiv(tokens, rows),)](
        *(x, out, bias, z, gate, shift, scale, x_new, z_new, tokens, d),
        *(_stride(gate), shift.stride(0), scale.stride(0), eta, eta * lam, eps),
        ROWS=rows,
        WIDTH=triton.next_power_of_2(d),
        num_warps=_warps(d),
    )


def residual_adaln_backward(
    dz_new: Tensor,
    x_new: Tensor,
    *,
    dx_new: Tensor | None = None,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor,
    dx: Tensor,
    dout: Tensor | None = None,
    dgate: Tensor | None = None,
    dshift: Tensor,
    dscale: Tensor,
    dbias: Tensor | None = None,
    eta: float = 0.0,
    lam: float = 0.0,
    eps: float,
) -> None:
    """Write the gradients of :func:`residual_adaln`, given x', to `dx`, `dout` and the per-sample sums over tokens.

    `dbias` is ``(B, d)``, one row per sample. Partial sums of a fixed size are added in a fixed order, without atomics.
    """
    batch, tokens, d = x_new.shape
    # small inputs use smaller parts, to fill the GPU; the size depends on the shape alone, so results are reproducible
    rows = 64 if batch * tokens >= 2**16 else 16
    parts = triton.cdiv(tokens, rows)
    sums = torch.zeros if x_new.numel() == 0 else torch.empty
    sum_of = sums((batch, parts, 4, d), dtype=torch.float32, device=x_new.device)
    if x_new.numel():
        _adaln_backward[(batch * parts,)](
            *(dz_new, dx_new, x_new, out, bias, z, gate, scale, dx, dout, sum_of, tokens, d),
            *(_stride(gate), scale.stride(0), eta, eta * lam, eps),
            ROWS=rows,
            WIDTH=triton.next_power_of_2(d),
            num_warps=_warps(d),
        )
    for to, part in zip((dshift, dscale, dgate, dbias), sum_of.sum(1).unbind(1), strict=True):
        if to is not None:
            to.copy_(part)


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _warps(d: int) -> int:
    """Return the number of warps per program, for 8 values of a row per thread (16 in rows wider than 4,096)."""
    return min(16, max(1, triton.next_power_of_2(d) // 256))
