"""A sampler's step of a count model: from the denoiser's answer to the posterior mean and the next state.

A program handles a block of cells by a block of genes and loops over the levels, as in :mod:`wbdit.kernels.counts`. In
fp32 it reads 24 bytes per cell and gene, 8 more with two earlier estimates, and writes 8: the natural parameter, the
mixture weight and the noise never leave the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from wbdit.kernels.counts import _log_sigmoid, _logit
from wbdit.kernels.noise import _add_terms, _normals

CELLS = 32  # per program
GENES = 16  # a multiple of 4: four genes share a counter of the noise


@triton.jit(do_not_specialize=["seed", "step"])
def _count_mean_step(
    x_ptr,  # [B, G]
    answer_ptr,  # [B, OUTPUTS, G]
    rates_ptr,  # [B, G]
    dispersion_ptr,  # [B, G]
    knots_ptr,  # [G]
    log_size_ptr,  # [2, G]
    log_mean_ptr,  # [G]
    log_base0_ptr,  # [G, L]
    log_base1_ptr,  # [G, L]
    values_ptr,  # [G, L]
    counts_ptr,  # [L]
    n_levels_ptr,  # [G] int32
    previous_ptr,  # [B, G] or None
    earlier_ptr,  # [B, G] or None
    noise_ptr,  # [B, G] or None
    samples_ptr,  # [B] int64; None to draw no noise
    new_ptr,  # [B, G], dtype of x
    mean_ptr,  # [B, G] or None
    cells,
    genes,
    levels,
    rates_stride,
    dispersion_stride,
    alpha,
    inverse,  # 1 / sigma
    a,
    b,
    c,
    d,
    e,
    clamp_min,
    seed,
    step,
    OUTPUTS: tl.constexpr,
    CELLS: tl.constexpr,
    GENES: tl.constexpr,
):
    blocks = tl.cdiv(genes, GENES)
    first = tl.program_id(0) % blocks * GENES
    gene = first + tl.arange(0, GENES)
    cell = tl.program_id(0) // blocks * CELLS + tl.arange(0, CELLS)
    real, there = gene < genes, cell < cells
    inside = there[:, None] & real[None, :]
    row, column = cell.to(tl.int64)[:, None], gene[None, :]
    to = row * genes + column
    x = tl.load(x_ptr + to, mask=inside, other=0.0).to(tl.float32)
    answer = row * OUTPUTS * genes + column
    log_ratio = tl.load(answer_ptr + answer, mask=inside, other=0.0).to(tl.float32)
    log_ratio += tl.load(rates_ptr + row * rates_stride + column, mask=inside, other=0.0).to(tl.float32)
    logit = tl.load(dispersion_ptr + row * dispersion_stride + column, mask=inside, other=0.0).to(tl.float32)
    if OUTPUTS == 2:
        logit += tl.load(answer_ptr + answer + genes, mask=inside, other=0.0).to(tl.float32)
    mixture = tl.sigmoid(logit + tl.load(knots_ptr + gene, mask=real, other=0.0)[None, :])
    size0 = tl.load(log_size_ptr + gene, mask=real, other=0.0)
    size1 = tl.load(log_size_ptr + genes + gene, mask=real, other=0.0)
    log_mean = tl.load(log_mean_ptr + gene, mask=real, other=0.0)
    log_size = size0[None, :] + mixture * (size1 - size0)[None, :]
    log_odds = _log_sigmoid(log_ratio - (log_size - log_mean[None, :]))

    # a running maximum; one of the two factors, of the sums and of the new term, is always 1
    n_levels = tl.minimum(tl.load(n_levels_ptr + gene, mask=real, other=1), levels)
    at = gene.to(tl.int64) * levels
    alphas, inverses = tl.full((CELLS,), alpha, tl.float32), tl.full((CELLS,), inverse, tl.float32)
    top = tl.full((CELLS, GENES), float("-inf"), tl.float32)
    total = tl.zeros((CELLS, GENES), tl.float32)
    mean = tl.zeros((CELLS, GENES), tl.float32)
    for level in range(0, tl.max(n_levels, 0)):
        logit, value, _, _ = _logit(
            level,
            x,
            log_odds,
            mixture,
            alphas,
            inverses,
            log_base0_ptr,
            log_base1_ptr,
            values_ptr,
            counts_ptr,
            at,
            real,
            n_levels,
        )
        above = logit - top
        higher = above > 0.0
        factor = tl.exp(-tl.abs(above))
        kept, weight = tl.where(higher, factor, 1.0), tl.where(higher, 1.0, factor)
        total = total * kept + weight
        mean = mean * kept + weight * value[None, :]
        top = tl.where(higher, logit, top)
    mean = mean / total

    new = a * x + b * mean
    new = _add_terms(new, to, inside, previous_ptr, earlier_ptr, noise_ptr, c, d, e)
    if samples_ptr is not None:
        sample = tl.load(samples_ptr + cell, mask=there, other=0)
        quads = tl.broadcast_to((first // 4 + tl.arange(0, GENES // 4))[None, :], (CELLS, GENES // 4))
        new += e * _normals(seed, sample[:, None], step, quads)
    new = tl.where(new < clamp_min, clamp_min, new)  # keeps NaN
    tl.store(new_ptr + to, new.to(new_ptr.dtype.element_ty), mask=inside)
    if mean_ptr is not None:
        tl.store(mean_ptr + to, mean, mask=inside)


def count_mean_step(
    x: Tensor,
    answer: Tensor,
    rates: Tensor,
    dispersion: Tensor,
    *known: Tensor,
    previous: Tensor | None = None,
    earlier: Tensor | None = None,
    noise: Tensor | None = None,
    samples: Tensor | None = None,
    new: Tensor,
    mean: Tensor | None,
    alpha: float,
    sigma: float,
    a: float,
    b: float,
    c: float,
    d: float,
    e: float,
    clamp_min: float,
    seed: int,
    step: int,
) -> None:
    """Write the next state ``(B, 1, G)`` to `new` and the estimate of x_0 to `mean`, if that is given.

    `known` are the tensors ``knots`` to ``n_levels`` of :func:`wbdit.ops.count_mean_step`. `rates` and `dispersion`
    have dense rows; all other tensors are dense.
    """
    if x.numel() == 0:
        return
    cells, _, genes = x.shape
    levels = known[6].shape[0]
    _count_mean_step[(triton.cdiv(cells, CELLS) * triton.cdiv(genes, GENES),)](
        *(x, answer, rates, dispersion, *known, previous, earlier, noise, samples, new, mean),
        *(cells, genes, levels, rates.stride(0), dispersion.stride(0)),
        *(alpha, 1 / sigma, a, b, c, d, e, clamp_min, seed, step),
        OUTPUTS=answer.shape[1],
        CELLS=CELLS,
        GENES=GENES,
    )
