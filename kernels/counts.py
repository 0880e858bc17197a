"""Softmax over a gene's count levels, given the gene's noised value: mean, likelihood and gradient.

A program handles a block of cells by a block of genes. It loops over the levels with a running maximum and sum, so no
tensor has a level dimension. Everything is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CELLS = 32  # per program
GENES = 16


@triton.jit
def _logit(
    level,
    x,
    log_odds,
    mixture,
    alpha,
    inverse,
    log_base0_ptr,
    log_base1_ptr,
    values_ptr,
    counts_ptr,
    at,
    real,
    n_levels,
):
    """Return a level's logits (cells, genes), -inf if it does not exist, and its value, count and slope per gene."""
    exists = real & (level < n_levels)
    log_base0 = tl.load(log_base0_ptr + at + level, mask=exists, other=0.0)
    slope = tl.load(log_base1_ptr + at + level, mask=exists, other=0.0) - log_base0
    value = tl.load(values_ptr + at + level, mask=exists, other=0.0)
    count = tl.load(counts_ptr + level)
    off = (x - alpha[:, None] * value[None, :]) * inverse[:, None]
    logit = log_base0[None, :] + mixture * slope[None, :] + log_odds * count - 0.5 * off * off
    return tl.where(exists[None, :], logit, float("-inf")), value, count, slope


@triton.jit
def _count_likelihood(
    dnll_ptr,  # [B, G] or None
    x_ptr,  # [B, G]
    log_odds_ptr,  # [B, G]
    mixture_ptr,  # [B, G]
    alpha_ptr,  # [B]
    sigma_ptr,  # [B]
    log_base0_ptr,  # [G, L]
    log_base1_ptr,  # [G, L]
    values_ptr,  # [G, L]
    counts_ptr,  # [L]
    n_levels_ptr,  # [G] int32
    target_ptr,  # [B, G] uint8, or None
    mean_ptr,  # [B, G] or None
    nll_ptr,  # [B, G] or None
    dlog_odds_ptr,  # [B, G] or None
    dmixture_ptr,  # [B, G] or None
    sums_ptr,  # [parts, 2, G, L] or None
    cells,
    genes,
    levels,
    dnll_stride,
    x_stride,
    log_odds_stride,
    mixture_stride,
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
    log_odds = tl.load(log_odds_ptr + row * log_odds_stride + gene[None, :], mask=inside, other=0.0)
    mixture = tl.load(mixture_ptr + row * mixture_stride + gene[None, :], mask=inside, other=0.0)
    alpha = tl.load(alpha_ptr + cell, mask=there, other=0.0)
    inverse = 1.0 / tl.load(sigma_ptr + cell, mask=there, other=1.0)
    n_levels = tl.minimum(tl.load(n_levels_ptr + gene, mask=real, other=1), levels)
    last = tl.max(n_levels, 0)
    at = gene.to(tl.int64) * levels
    to = row * genes + gene[None, :]
    if target_ptr is not None:
        target = tl.load(target_ptr + to, mask=inside, other=0).to(tl.int32)

    # stop at the largest n_levels of these genes; genes with fewer levels have logit -inf there
    top = tl.full((CELLS, GENES), float("-inf"), tl.float32)
    total = tl.zeros((CELLS, GENES), tl.float32)
    mean = tl.zeros((CELLS, GENES), tl.float32)
    chosen = tl.full((CELLS, GENES), float("-inf"), tl.float32)
    for level in range(0, last):
        logit, value, _, _ = _logit(
            level,
            x,
            log_odds,
            mixture,
            alpha,
            inverse,
            log_base0_ptr,
            log_base1_ptr,
            values_ptr,
            counts_ptr,
            at,
            real,
            n_levels,
        )
        # padding genes have no level: avoid inf - inf
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
        dlog_odds = tl.zeros((CELLS, GENES), tl.float32)
        dmixture = tl.zeros((CELLS, GENES), tl.float32)
        sums = sums_ptr + part.to(tl.int64) * 2 * genes * levels + at
        for level in range(0, last):
            logit, _, count, slope = _logit(
                level,
                x,
                log_odds,
                mixture,
                alpha,
                inverse,
                log_base0_ptr,
                log_base1_ptr,
                values_ptr,
                counts_ptr,
                at,
                real,
                n_levels,
            )
            hit = tl.where((target == level) & (level < n_levels)[None, :], 1.0, 0.0)
            dlogit = tl.where(inside, dnll * (tl.exp(logit - top) / total - hit), 0.0)
            dlog_odds += dlogit * count
            dmixture += dlogit * slope[None, :]
            tl.store(sums + level, tl.sum(dlogit * (1.0 - mixture), 0), mask=real)
            tl.store(sums + tl.cast(genes, tl.int64) * levels + level, tl.sum(dlogit * mixture, 0), mask=real)
        tl.store(dlog_odds_ptr + to, dlog_odds, mask=inside)
        tl.store(dmixture_ptr + to, dmixture, mask=inside)


def count_mean(
    x: Tensor,
    log_odds: Tensor,
    mixture: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_base0: Tensor,
    log_base1: Tensor,
    values: Tensor,
    counts: Tensor,
    n_levels: Tensor,
    mean: Tensor,
) -> None:
    """Write the mean of `values` under the softmax to `mean`.

    `x`, `log_odds` and `mixture` have dense rows; all other tensors are dense.
    """
    _launch(None, x, log_odds, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels, mean=mean)


def count_nll(
    x: Tensor,
    log_odds: Tensor,
    mixture: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_base0: Tensor,
    log_base1: Tensor,
    values: Tensor,
    counts: Tensor,
    n_levels: Tensor,
    target: Tensor,
    nll: Tensor,
) -> None:
    """Write the negative log-likelihood of the levels `target` to `nll`."""
    tables = alpha, sigma, log_base0, log_base1, values, counts, n_levels
    _launch(None, x, log_odds, mixture, *tables, target=target, nll=nll)


def count_nll_backward(
    dnll: Tensor,
    x: Tensor,
    log_odds: Tensor,
    mixture: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_base0: Tensor,
    log_base1: Tensor,
    values: Tensor,
    counts: Tensor,
    n_levels: Tensor,
    target: Tensor,
    dlog_odds: Tensor,
    dmixture: Tensor,
    dlog_base0: Tensor,
    dlog_base1: Tensor,
) -> None:
    """Write the gradients of :func:`count_nll`; partial sums over cells are added in a fixed order, without atomics."""
    parts = triton.cdiv(x.shape[0], CELLS)
    sums = torch.zeros((parts, 2, *log_base0.shape), dtype=torch.float32, device=x.device)
    _launch(
        *(dnll, x, log_odds, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels),
        target=target,
        dlog_odds=dlog_odds,
        dmixture=dmixture,
        sums=sums,
    )
    for to, part in zip((dlog_base0, dlog_base1), sums.sum(0).unbind(0), strict=True):
        to.copy_(part)


def _launch(
    dnll: Tensor | None,
    x: Tensor,
    log_odds: Tensor,
    mixture: Tensor,
    *tables: Tensor,
    target: Tensor | None = None,
    mean: Tensor | None = None,
    nll: Tensor | None = None,
    dlog_odds: Tensor | None = None,
    dmixture: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    cells, genes = x.shape
    if x.numel() == 0:
        return
    strides = (0 if dnll is None else dnll.stride(0), x.stride(0), log_odds.stride(0), mixture.stride(0))
    _count_likelihood[(triton.cdiv(cells, CELLS) * triton.cdiv(genes, GENES),)](
        *(dnll, x, log_odds, mixture, *tables, target, mean, nll, dlog_odds, dmixture, sums),
        *(cells, genes, tables[5].shape[0], *strides),
        CELLS=CELLS,
        GENES=GENES,
    )
