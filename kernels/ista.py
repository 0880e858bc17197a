"""The thresholded step of ``ista`` as a separate kernel, and its gradient; blocks use the fused ``ista_adaln``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _ista_shrink(
    z_ptr,  # [count] fp32 or bf16
    product_ptr,  # [count] fp32 or bf16
    out_ptr,  # [count], dtype of z
    count,
    eta,
    threshold,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    product = tl.load(product_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = z + eta * product - threshold
    out = tl.where(out < 0, 0.0, out)  # keeps NaN
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _ista_shrink_backward(
    dout_ptr,  # [count] fp32 or bf16
    out_ptr,  # [count]
    dz_ptr,  # [count]
    count,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dz_ptr + at, tl.where(out > 0, dout, 0.0).to(dz_ptr.dtype.element_ty), mask=inside)


def shrink(z: Tensor, product: Tensor, out: Tensor, eta: float, lam: float) -> None:
    """Write ``relu(z + eta product - eta lam)`` to `out`; all tensors are dense and have the same shape."""
    if z.numel():
        _ista_shrink[(triton.cdiv(z.numel(), BLOCK),)](z, product, out, z.numel(), eta, eta * lam, BLOCK=BLOCK)


def shrink_backward(dout: Tensor, out: Tensor, dz: Tensor) -> None:
    """Write `dout` to `dz` where `out` is positive, else 0; all tensors are dense and have the same shape."""
    if out.numel():
        _ista_shrink_backward[(triton.cdiv(out.numel(), BLOCK),)](dout, out, dz, out.numel(), BLOCK=BLOCK)
