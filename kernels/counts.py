"""The softmax over a gene's levels of counts, given the gene's own noised value: its mean, likelihood and gradient.

A program takes a block of cells by a block of genes, and goes through the levels one by one with a running maximum and
sum, so that no tensor has a dimension of levels. All is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CELLS = 32  # of a program
GENES = 16


@triton.jit
def _logit(level, x, eta, weight, alpha, inverse, base0_ptr, base1_ptr, values_ptr, counts_ptr, at, real, sizes):
    """Return a level's logits (cells, genes), -inf where it does not exist, and its value, count and slope (genes,)."""
    exists = real & (level < sizes)
    base0 = tl.load(base0_ptr + at + level, mask=exists, other=0.0)
    slope = tl.load(base1_ptr + at + level, mask=exists, other=0.0) - base0
    value = tl.load(values_ptr + at + level, mask=exists, other=0.0)
    count = tl.load(counts_ptr + level)
    off = (x - alpha[:, None] * value[None, :]) * inverse[:, None]
    logit = base0[None, :] + weight * slope[None, :] + eta * count - 0.5 * off * off
    return tl.where(exists[None, :], logit, float("-inf")), value, count, slope


@triton.jit
def _count_likelihood(
    dnll_ptr,
    x_ptr,
    eta_ptr,
    weight_ptr,
    alpha_ptr,
    sigma_ptr,
    base0_ptr,
    base1_ptr,
    values_ptr,
    counts_ptr,
    sizes_ptr,
    target_ptr,
    mean_ptr,
    nll_ptr,
    deta_ptr,
    dweight_ptr,
    sums_ptr,
    cells,
    genes,
    levels,
    dnll_stride,
    x_stride,
    eta_stride,
    weight_stride,
    CELLS: tl.constexpr,
    GENES: tl.constexpr,
):
    blocks = tl.cdiv(genes, GENES)
    part = tl.program_id(0) // blocks
    gene = tl.program_id(0) % blocks * GENES + tl.arange(0, GENES)
    cell = part * CELLS + tl.arange(0, CELLS)
    real, there = gene < genes, cell < cells
    inside = there[:, None] & real[None, :]
    row = cell.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * x_stride + gene[None, :], mask=inside, other=0.0)
    eta = tl.load(eta_ptr + row * eta_stride + gene[None, :], mask=inside, other=0.0)
    weight = tl.load(weight_ptr + row * weight_stride + gene[None, :], mask=inside, other=0.0)
    alpha = tl.load(alpha_ptr + cell, mask=there, other=0.0)
    inverse = 1.0 / tl.load(sigma_ptr + cell, mask=there, other=1.0)
    sizes = tl.minimum(tl.load(sizes_ptr + gene, mask=real, other=1), levels)
    last = tl.max(sizes, 0)
    at = gene.to(tl.int64) * levels
    to = row * genes + gene[None, :]
    if target_ptr is not None:
        target = tl.load(target_ptr + to, mask=inside, other=0).to(tl.int32)

    # beyond the sizes of all its genes a program has nothing to do: the other genes' levels there are -inf
    top = tl.full((CELLS, GENES), float("-inf"), tl.float32)
    total = tl.zeros((CELLS, GENES), tl.float32)
    mean = tl.zeros((CELLS, GENES), tl.float32)
    chosen = tl.full((CELLS, GENES), float("-inf"), tl.float32)
    for level in range(0, last):
        logit, value, _, _ = _logit(
            level, x, eta, weight, alpha, inverse, base0_ptr, base1_ptr, values_ptr, counts_ptr, at, real, sizes
        )
        # padding genes have no level at all: no difference of infinities for them
        higher = tl.where(real[None, :], tl.maximum(top, logit), 0.0)
        kept = tl.exp(top - higher)
        e = tl.exp(logit - higher)
        total = total * kept + e
        top = higher
        if mean_ptr is not None:
            mean = mean * kept + e * value[None, :]
        if nll_ptr is not None:
            chosen = tl.where(target == level, logit, chosen)
    if mean_ptr is not None:
        tl.store(mean_ptr + to, mean / total, mask=inside)
    if nll_ptr is not None:
        tl.store(nll_ptr + to, tl.log(total) - (chosen - top), mask=inside)

    if dnll_ptr is not None:
        dnll = tl.load(dnll_ptr + row * dnll_stride + gene[None, :], mask=inside, other=0.0)
        deta = tl.zeros((CELLS, GENES), tl.float32)
        dweight = tl.zeros((CELLS, GENES), tl.float32)
        sums = sums_ptr + part.to(tl.int64) * 2 * genes * levels + at
        for level in range(0, last):
            logit, _, count, slope = _logit(
                level, x, eta, weight, alpha, inverse, base0_ptr, base1_ptr, values_ptr, counts_ptr, at, real, sizes
            )
            hit = tl.where((target == level) & (level < sizes)[None, :], 1.0, 0.0)
            dlogit = tl.where(inside, dnll * (tl.exp(logit - top) / total - hit), 0.0)
            deta += dlogit * count
            dweight += dlogit * slope[None, :]
            tl.store(sums + level, tl.sum(dlogit * (1.0 - weight), 0), mask=real)
            tl.store(sums + tl.cast(genes, tl.int64) * levels + level, tl.sum(dlogit * weight, 0), mask=real)
        tl.store(deta_ptr + to, deta, mask=inside)
        tl.store(dweight_ptr + to, dweight, mask=inside)


def count_mean(
    x: Tensor,
    eta: Tensor,
    weight: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    base0: Tensor,
    base1: Tensor,
    values: Tensor,
    counts: Tensor,
    sizes: Tensor,
    mean: Tensor,
) -> None:
    """Write the mean of `values` to `mean`; `x`, `eta` and `weight` have dense rows, all else is dense."""
    _launch(None, x, eta, weight, alpha, sigma, base0, base1, values, counts, sizes, mean=mean)


def count_nll(
    x: Tensor,
    eta: Tensor,
    weight: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    base0: Tensor,
    base1: Tensor,
    values: Tensor,
    counts: Tensor,
    sizes: Tensor,
    target: Tensor,
    nll: Tensor,
) -> None:
    """Write the negative log-likelihood of the levels `target` to `nll`."""
    _launch(None, x, eta, weight, alpha, sigma, base0, base1, values, counts, sizes, target=target, nll=nll)


def count_nll_backward(
    dnll: Tensor,
    x: Tensor,
    eta: Tensor,
    weight: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    base0: Tensor,
    base1: Tensor,
    values: Tensor,
    counts: Tensor,
    sizes: Tensor,
    target: Tensor,
    deta: Tensor,
    dweight: Tensor,
    dbase0: Tensor,
    dbase1: Tensor,
) -> None:
    """Write the gradients of :func:`count_nll`; sums over cells are formed in parts, in their order: no atomics."""
    parts = triton.cdiv(x.shape[0], CELLS)
    sums = torch.zeros((parts, 2, *base0.shape), dtype=torch.float32, device=x.device)
    _launch(
        *(dnll, x, eta, weight, alpha, sigma, base0, base1, values, counts, sizes),
        target=target,
        deta=deta,
        dweight=dweight,
        sums=sums,
    )
    for to, part in zip((dbase0, dbase1), sums.sum(0).unbind(0), strict=True):
        to.copy_(part)


def _launch(
    dnll: Tensor | None,
    x: Tensor,
    eta: Tensor,
    weight: Tensor,
    *tables: Tensor,
    target: Tensor | None = None,
    mean: Tensor | None = None,
    nll: Tensor | None = None,
    deta: Tensor | None = None,
    dweight: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    cells, genes = x.shape
    if x.numel() == 0:
        return
    strides = (0 if dnll is None else dnll.stride(0), x.stride(0), eta.stride(0), weight.stride(0))
    _count_likelihood[(triton.cdiv(cells, CELLS) * triton.cdiv(genes, GENES),)](
        *(dnll, x, eta, weight, *tables, target, mean, nll, deta, dweight, sums),
        *(cells, genes, tables[5].shape[0], *strides),
        CELLS=CELLS,
        GENES=GENES,
    )
