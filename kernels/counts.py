"""Softmax over a gene's count levels, given the gene's noised value: mean, likelihood and gradient, and draws.

A program handles a block of cells by a block of genes. It loops over the levels with a running maximum and sum, so no
tensor has a level dimension. Everything is fp32.

For draws, a thread handles one cell and loops over a block of genes. Its sums of expected counts have a fixed order
that does not depend on the tensors' layout, so a cell gets the same counts in any batch. 64 cells by 2,000 genes are
250 programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CELLS = 32  # per program
GENES = 16
CELLS_PER_SUM = 32  # for draws: one warp
PARTS = 16  # partial sums that are loaded together


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


@triton.jit
def _log_sigmoid(x):
    """Return ln(1 / (1 + exp(-x))), by ln(1 + e) = 2 artanh(e / (2 + e)): counts of millions multiply the result."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.where(x > 0.0, 0.0, x) - 2.0 * s * series


@triton.jit
def _load_gene(
    gene,
    row,
    there,
    x_ptr,
    log_ratio_ptr,
    mixture_ptr,
    n_levels_ptr,
    log_scale,
    levels,
    x_stride,
    log_ratio_stride,
    mixture_stride,
):
    """Return the inputs of one gene (cells, 1), with the cells' factors applied, and its number of levels (1,)."""
    x = tl.load(x_ptr + row * x_stride + gene[None, :], mask=there, other=0.0)
    log_ratio = tl.load(log_ratio_ptr + row * log_ratio_stride + gene[None, :], mask=there, other=0.0)
    mixture = tl.load(mixture_ptr + row * mixture_stride + gene[None, :], mask=there, other=0.0)
    n_levels = tl.minimum(tl.load(n_levels_ptr + gene), levels)
    return x, _log_sigmoid(log_ratio + log_scale), mixture, n_levels


@triton.jit
def _count_expect(
    x_ptr,  # [B, G]
    log_ratio_ptr,  # [B, G]
    mixture_ptr,  # [B, G]
    alpha_ptr,  # [B]
    sigma_ptr,  # [B]
    log_base0_ptr,  # [G, L]
    log_base1_ptr,  # [G, L]
    values_ptr,  # [G, L]
    counts_ptr,  # [L]
    n_levels_ptr,  # [G] int32
    log_scale_ptr,  # [B]
    expected_ptr,  # [blocks of genes, B]
    cells,
    genes,
    levels,
    x_stride,
    log_ratio_stride,
    mixture_stride,
    CELLS: tl.constexpr,
    GENES: tl.constexpr,
):
    """Write the sum of a block's expected counts, for each cell."""
    blocks = tl.cdiv(genes, GENES)
    block = tl.program_id(0) % blocks
    cell = tl.program_id(0) // blocks * CELLS + tl.arange(0, CELLS)
    row, there = cell.to(tl.int64)[:, None], (cell < cells)[:, None]
    alpha = tl.load(alpha_ptr + cell, mask=cell < cells, other=0.0)
    inverse = 1.0 / tl.load(sigma_ptr + cell, mask=cell < cells, other=1.0)
    log_scale = tl.load(log_scale_ptr + row, mask=there, other=0.0)
    expected = tl.zeros((CELLS, 1), tl.float32)
    for number in range(block * GENES, tl.minimum(block * GENES + GENES, genes)):
        gene = number + tl.arange(0, 1)
        real, at = gene < genes, gene.to(tl.int64) * levels
        x, log_odds, mixture, n_levels = _load_gene(
            gene,
            row,
            there,
            x_ptr,
            log_ratio_ptr,
            mixture_ptr,
            n_levels_ptr,
            log_scale,
            levels,
            x_stride,
            log_ratio_stride,
            mixture_stride,
        )
        top = tl.full((CELLS, 1), float("-inf"), tl.float32)
        total = tl.zeros((CELLS, 1), tl.float32)
        sum_of_counts = tl.zeros((CELLS, 1), tl.float32)
        for level in range(0, tl.max(n_levels, 0)):
            logit, _, count, _ = _logit(
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
            higher = tl.maximum(top, logit)
            kept = tl.exp(top - higher)
            e = tl.exp(logit - higher)
            total = total * kept + e
            sum_of_counts = sum_of_counts * kept + e * count
            top = higher
        expected += sum_of_counts / total
    tl.store(expected_ptr + block.to(tl.int64) * cells + row, expected, mask=there)


@triton.jit
def _count_rescale(
    expected_ptr,  # [blocks of genes, B]
    library_ptr,  # [B]
    log_scale_ptr,  # [B]
    blocks,
    cells,
    CELLS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add ln(library / expected sum) to each cell's factor; the blocks are added one after another."""
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    there = cell < cells
    total = tl.zeros((CELLS,), tl.float32)
    for first in range(0, blocks, PARTS):
        for i in tl.static_range(PARTS):
            block = tl.cast(first + i, tl.int64)
            total += tl.load(expected_ptr + block * cells + cell, mask=there & (block < blocks), other=0.0)
    library = tl.load(library_ptr + cell, mask=there, other=1.0)
    log_scale = tl.load(log_scale_ptr + cell, mask=there, other=0.0)
    tl.store(log_scale_ptr + cell, log_scale + tl.log(library / tl.where(there, total, 1.0)), mask=there)


@triton.jit
def _count_draw(
    x_ptr,  # [B, G]
    log_ratio_ptr,  # [B, G]
    mixture_ptr,  # [B, G]
    alpha_ptr,  # [B]
    sigma_ptr,  # [B]
    log_base0_ptr,  # [G, L]
    log_base1_ptr,  # [G, L]
    values_ptr,  # [G, L]
    counts_ptr,  # [L]
    n_levels_ptr,  # [G] int32
    log_scale_ptr,  # [B]
    u_ptr,  # [B, G]
    lowest_ptr,  # [L] int32
    highest_ptr,  # [L] int32
    drawn_ptr,  # [B, G] int32
    cells,
    genes,
    levels,
    x_stride,
    log_ratio_stride,
    mixture_stride,
    u_stride,
    CELLS: tl.constexpr,
    GENES: tl.constexpr,
):
    """Draw the counts of a block: one loop for the maximum, one for the sum, one for the level that u reaches."""
    blocks = tl.cdiv(genes, GENES)
    block = tl.program_id(0) % blocks
    cell = tl.program_id(0) // blocks * CELLS + tl.arange(0, CELLS)
    row, there = cell.to(tl.int64)[:, None], (cell < cells)[:, None]
    alpha = tl.load(alpha_ptr + cell, mask=cell < cells, other=0.0)
    inverse = 1.0 / tl.load(sigma_ptr + cell, mask=cell < cells, other=1.0)
    log_scale = tl.load(log_scale_ptr + row, mask=there, other=0.0)
    for number in range(block * GENES, tl.minimum(block * GENES + GENES, genes)):
        gene = number + tl.arange(0, 1)
        real, at = gene < genes, gene.to(tl.int64) * levels
        x, log_odds, mixture, n_levels = _load_gene(
            gene,
            row,
            there,
            x_ptr,
            log_ratio_ptr,
            mixture_ptr,
            n_levels_ptr,
            log_scale,
            levels,
            x_stride,
            log_ratio_stride,
            mixture_stride,
        )
        u = tl.load(u_ptr + row * u_stride + gene[None, :], mask=there, other=0.0)
        last = tl.max(n_levels, 0)
        top = tl.full((CELLS, 1), float("-inf"), tl.float32)
        for level in range(0, last):
            logit, _, _, _ = _logit(
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
            top = tl.maximum(top, logit)
        total = tl.zeros((CELLS, 1), tl.float32)
        for level in range(0, last):
            logit, _, _, _ = _logit(
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
            total += tl.exp(logit - top)
        # the sums have the same order, so u = 1 reaches the total exactly; with a NaN, level 0 is drawn
        reach = u * total
        below = tl.zeros((CELLS, 1), tl.float32)
        until = tl.zeros((CELLS, 1), tl.float32)
        mass = tl.zeros((CELLS, 1), tl.float32)
        drawn = tl.zeros((CELLS, 1), tl.int32)
        for level in range(0, last):
            logit, _, _, _ = _logit(
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
            e = tl.exp(logit - top)
            # a level too improbable to change the sum is never drawn
            further = (level == 0) | ((below < reach) & (below + e > below))
            below += e
            until = tl.where(further, below, until)
            mass = tl.where(further, e, mass)
            drawn = tl.where(further, level, drawn)
        lowest = tl.load(lowest_ptr + drawn)
        wider = tl.load(highest_ptr + drawn) - lowest
        inside = (1.0 - (until - reach) / mass) * (wider.to(tl.float32) + 1.0)
        inside = tl.where(inside > 0.0, tl.minimum(inside, wider.to(tl.float32)), 0.0)
        count = lowest + tl.minimum(inside.to(tl.int32), wider)
        tl.store(drawn_ptr + row * genes + gene[None, :], count, mask=there)


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


def count_draw(
    x: Tensor,
    log_ratio: Tensor,
    mixture: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_base0: Tensor,
    log_base1: Tensor,
    values: Tensor,
    counts: Tensor,
    n_levels: Tensor,
    lowest: Tensor,
    highest: Tensor,
    u: Tensor,
    library: Tensor,
    drawn: Tensor,
    log_scale: Tensor,
    rounds: int,
) -> None:
    """Write the logarithms of the cells' factors to `log_scale`, and counts to `drawn`; `u` has dense rows.

    Each round launches one kernel for the sums of blocks of genes, and a small one that adds them.
    """
    cells, genes = x.shape
    log_scale.zero_()
    if x.numel() == 0:
        return
    given = x, log_ratio, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels, log_scale
    sizes = cells, genes, counts.shape[0], x.stride(0), log_ratio.stride(0), mixture.stride(0)
    blocks, parts = triton.cdiv(genes, GENES), triton.cdiv(cells, CELLS_PER_SUM)
    expected = torch.empty((blocks, cells), dtype=torch.float32, device=x.device)
    fixed = {"CELLS": CELLS_PER_SUM, "num_warps": 1}
    for _ in range(rounds):
        _count_expect[(parts * blocks,)](*given, expected, *sizes, GENES=GENES, **fixed)
        _count_rescale[(parts,)](expected, library, log_scale, blocks, cells, PARTS=PARTS, **fixed)
    _count_draw[(parts * blocks,)](*given, u, lowest, highest, drawn, *sizes, u.stride(0), GENES=GENES, **fixed)


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
