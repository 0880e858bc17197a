"""The noise schedule's updates and their counter-based noise, the same stream as that of ``csrc/noise.cpp``.

A noise value depends only on (seed, sample, step, position). Philox4x32-10 (Salmon et al. 2011) has the seed as key and
the counter (position // 4, sample's low word, step, sample's high word). Box-Muller turns its four words into normals.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

QUADS = 256  # counters per program, with four values each

UNIT = tl.constexpr(2.0**-24)
TURN = tl.constexpr(math.pi / 2 * 2.0**-22)


@triton.jit
def _log(u):
    """Return ln u of a positive normal number; a GPU's own is off by 1e-7 near u = 1, where ln u itself is that small.

    It is ln 2 times the exponent plus 2 artanh(s) by its series, where the rest m = (1 + s) / (1 - s) is between
    sqrt(1/2) and sqrt(2). The first omitted term is 4e-9.
    """
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the constant is sqrt(1/2)
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9)))))
    return exponent.to(tl.float32) * 0.693147180559945 + series


@triton.jit
def _pair(radius, angle):
    """Return two normals from two words (Box-Muller); 24 bits of each word are used, which fp32 holds exactly."""
    r = tl.sqrt(-2.0 * _log(((radius >> 8).to(tl.int32) + 1).to(tl.float32) * UNIT))
    # the angle in quarter turns: whole turns select the quadrant; the rest, at most 1/2, goes into the Taylor series
    a = (angle >> 8).to(tl.int32)
    whole = (a + (1 << 21)) >> 22
    x = (a - (whole << 22)).to(tl.float32) * TURN
    q = x * x
    sine = x * (1.0 + q * (-1 / 6 + q * (1 / 120 + q * (-1 / 5040 + q * (1 / 362880)))))
    cosine = 1.0 + q * (-1 / 2 + q * (1 / 24 + q * (-1 / 720 + q * (1 / 40320))))
    odd = (whole & 1) == 1
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    return r * tl.where(((whole + 1) & 2) == 2, -c, c), r * tl.where((whole & 2) == 2, -s, s)


@triton.jit
def _normals(seed, sample, step, quads):
    """Return the normals of the counters `quads` in order of position, four per counter."""
    sample = sample.to(tl.int64)
    low = (sample & 0xFFFFFFFF).to(tl.uint32)
    high = ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = quads.to(tl.uint32) * 0
    a, b, c, d = tl.philox(seed, quads.to(tl.uint32), zero + low, zero + step.to(tl.uint32), zero + high)
    n0, n1 = _pair(a, b)
    n2, n3 = _pair(c, d)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _normal_at(seed, sample, step, position):
    """Return the normals at any positions, with one counter for each of them."""
    sample, position = tl.broadcast(sample.to(tl.int64), position)
    low = (sample & 0xFFFFFFFF).to(tl.uint32)
    high = ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a, b, c, d = tl.philox(seed, (position // 4).to(tl.uint32), low, low * 0 + step.to(tl.uint32), high)
    second = position % 4 >= 2
    even, odd = _pair(tl.where(second, c, a), tl.where(second, d, b))
    return tl.where(position % 2 == 0, even, odd)


@triton.jit
def _add_terms(new, at, inside, previous_ptr, earlier_ptr, noise_ptr, c, d, e):
    """Return a sampler's next state with those of its terms added that are given."""
    if previous_ptr is not None:
        new += c * tl.load(previous_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if earlier_ptr is not None:
        new += d * tl.load(earlier_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if noise_ptr is not None:
        new += e * tl.load(noise_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return new


@triton.jit(do_not_specialize=["seed", "step"])
def _normal(
    samples_ptr,  # [B] int64
    out_ptr,  # [B, length] fp32
    length,
    seed,
    step,
    QUADS: tl.constexpr,
):
    parts = tl.cdiv(length, 4 * QUADS)
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    z = _normals(seed, tl.load(samples_ptr + row), step, part * QUADS + tl.arange(0, QUADS))
    at = part * 4 * QUADS + tl.arange(0, 4 * QUADS)
    tl.store(out_ptr + row * length + at, z, mask=at < length)


@triton.jit(do_not_specialize=["seed", "step"])
def _sampler_step(
    x_ptr,  # [B, length] fp32 or bf16
    out_ptr,  # [B, length]
    previous_ptr,  # [B, length] or None
    earlier_ptr,  # [B, length] or None
    noise_ptr,  # [B, length] or None
    samples_ptr,  # [B] int64; None to draw no noise
    new_ptr,  # [B, length], dtype of x
    length,
    a,
    b,
    c,
    d,
    e,
    clamp_min,
    seed,
    step,
    QUADS: tl.constexpr,
):
    parts = tl.cdiv(length, 4 * QUADS)
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    position = part * 4 * QUADS + tl.arange(0, 4 * QUADS)
    inside = position < length
    at = row * length + position
    new = a * tl.load(x_ptr + at, mask=inside).to(tl.float32) + b * tl.load(out_ptr + at, mask=inside).to(tl.float32)
    new = _add_terms(new, at, inside, previous_ptr, earlier_ptr, noise_ptr, c, d, e)
    if samples_ptr is not None:
        new += e * _normals(seed, tl.load(samples_ptr + row), step, part * QUADS + tl.arange(0, QUADS))
    new = tl.where(new < clamp_min, clamp_min, new)  # keeps NaN
    tl.store(new_ptr + at, new.to(new_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _noising(
    x0_ptr,  # [B, length] fp32 or bf16
    noise_ptr,  # [B, length]
    alpha_ptr,  # [B] fp32
    sigma_ptr,  # [B] fp32
    xt_ptr,  # [B, length]
    length,
    BLOCK: tl.constexpr,
):
    parts = tl.cdiv(length, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    position = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    at = row * length + position
    x0 = tl.load(x0_ptr + at, mask=inside).to(tl.float32)
    noise = tl.load(noise_ptr + at, mask=inside).to(tl.float32)
    xt = tl.load(alpha_ptr + row) * x0 + tl.load(sigma_ptr + row) * noise
    tl.store(xt_ptr + at, xt.to(xt_ptr.dtype.element_ty), mask=inside)


def normal(samples: Tensor, out: Tensor, seed: int, step: int) -> None:
    """Write the noise of `samples` ``(B,)``, int64, to `out` ``(B, length)``, fp32."""
    if out.numel():
        _normal[_grid(out)](samples, out, out.shape[1], seed, step, QUADS=QUADS)


def sampler_step(
    x: Tensor,
    out: Tensor,
    *,
    previous: Tensor | None = None,
    earlier: Tensor | None = None,
    noise: Tensor | None = None,
    samples: Tensor | None = None,
    new: Tensor,
    a: float,
    b: float,
    c: float,
    d: float,
    e: float,
    clamp_min: float,
    seed: int,
    step: int,
) -> None:
    """Write ``a x + b out + c previous + d earlier + e noise``, clamped from below at `clamp_min`, to `new`.

    Given `samples` ``(B,)``, int64, instead of `noise`, the kernel draws the noise itself, without storing it. All
    tensors are dense.
    """
    if x.numel():
        length = x.numel() // x.shape[0]
        _sampler_step[_grid(x)](
            *(x, out, previous, earlier, noise, samples, new, length, a, b, c, d, e, clamp_min, seed, step),
            QUADS=QUADS,
        )


def noising(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, xt: Tensor) -> None:
    """Write ``alpha x0 + sigma noise`` to `xt`; `alpha` and `sigma` are ``(B,)``, fp32; all tensors are dense."""
    if x0.numel():
        _noising[_grid(x0)](x0, noise, alpha, sigma, xt, x0.numel() // x0.shape[0], BLOCK=4 * QUADS)


def _grid(t: Tensor) -> tuple[int]:
    return (t.shape[0] * triton.cdiv(t.numel() // t.shape[0], 4 * QUADS),)
