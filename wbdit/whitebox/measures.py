"""What each white-box block does to the tokens, measured: does it compress, does it sparsify, by how much.

A block claims two things (Yu et al. 2023, CRATE, arXiv 2306.01129). Attention moves the tokens so that they cost fewer
bits against the block's subspaces: the coding rate falls. The shrinkage step moves them toward a sparse code of
themselves in the block's dictionary: the lasso's objective falls. Both are measured here on the tokens as the block
sees them, before and after each half-step, gates included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from wbdit import ops
from wbdit.nn.wbdit import WBDiT, WhiteBoxBlock

EPS = 0.01  # of the coding rate, as CRATE measures it


class BlockActivations(NamedTuple):
    """What passes through one block, ``(B, N, d)`` each.

    Attributes
    ----------
    before, after
        The normalized, modulated tokens that MSSA sees, and those it would see once its half-step is taken: the same
        norm, shift and scale of the residual stream before and after.
    tokens
        The normalized, modulated tokens that ISTA sees, and the code that it starts from.
    code
        Its answer, before gate and residual.
    """

    before: Tensor
    after: Tensor
    tokens: Tensor
    code: Tensor


class Measures(NamedTuple):
    """What one block did to each cell, ``(B,)`` each but for the two rates.

    Attributes
    ----------
    rate_before, rate_after
        Coding rate of each head before and after attention, in nats, ``(B, h)``.
    non_zero
        Share of the code that is not zero.
    margin
        Median distance of a coefficient from where it turns zero, in thresholds: far below 1, it hangs by a thread.
    fit_before, fit_after, fit_empty
        Half the squared error of the tokens' reconstruction by the dictionary, a token: from the code ISTA starts from,
        from its answer, and from no code at all.
    size_before, size_after
        The lasso's other part: lambda times the code's 1-norm, a token.
    rank
        Effective rank of the tokens that attention sees, of N (Roy and Vetterli 2007).
    """

    rate_before: Tensor
    rate_after: Tensor
    non_zero: Tensor
    margin: Tensor
    fit_before: Tensor
    fit_after: Tensor
    fit_empty: Tensor
    size_before: Tensor
    size_after: Tensor
    rank: Tensor


class WeightStats(NamedTuple):
    """What a block's weights say of themselves.

    Attributes
    ----------
    step
        ``eta |D|_2^2``: below 1 a step of shrinkage cannot raise its objective, below 2 it still converges.
    overlap
        ``(h, h)``: mean squared cosine between the subspaces of two heads, 1 where they are one, p / d where they lie
        at random.
    rank
        Effective rank of each head's projection, ``(h,)``, at most p.
    eta, lam
        Step size and sparsity penalty.
    """

    step: float
    overlap: Tensor
    rank: Tensor
    eta: float
    lam: float


def coding_rate(w: Tensor, heads: int, eps: float = EPS) -> Tensor:
    """Return how many nats the tokens cost in each head's subspace: ``1/2 logdet(I + p / (N eps) w w^T)``.

    The rows of w, the tokens' coordinates, are brought to length 1, so that directions count and sizes do not. The sum
    over heads is CRATE's R^c.

    Parameters
    ----------
    w
        Projected tokens ``(B, N, h p)``.
    heads
        Number of heads h.
    eps
        Precision of the code.

    Returns
    -------
    ``(B, h)`` fp64.
    """
    rows = F.normalize(w.double().unflatten(-1, (heads, -1)).transpose(1, 2), dim=-1)  # [B, h, N, p]
    n, p = rows.shape[-2:]
    gram = rows.mT @ rows if p <= n else rows @ rows.mT  # both have the same determinant: take the smaller
    gram = gram * (p / (n * eps)) + torch.eye(min(n, p), dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky(gram).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def largest_rate(tokens: int, hidden_size: int, heads: int, eps: float = EPS) -> float:
    """Return what the sum of :func:`coding_rate` over heads can be at most: tokens as far apart as they go."""
    p = hidden_size // heads
    return heads * min(tokens, p) / 2 * math.log1p(max(1.0, p / tokens) / eps)


def effective_rank(matrix: Tensor) -> Tensor:
    """Return the exponential of the entropy of the singular values of ``(..., n, m)`` (Roy and Vetterli 2007)."""
    values = torch.linalg.svdvals(matrix.double())
    share = values / values.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


@torch.no_grad()
def iterate_blocks(
    model: WBDiT, x: Tensor, t: Tensor, y: Tensor | None = None, conditioning: Tensor | None = None
) -> Iterator[BlockActivations]:
    """Call the model, and stop after each block to show what passed through it.

    Parameters
    ----------
    model
        The denoiser.
    x, t, y, conditioning
        As it takes them.
    """
    tokens = model.embed_cells(x)
    modulations = model.modulations(t, y, conditioning)
    shift, scale = modulations[0][:2]
    z = ops.adaln(tokens, shift, scale)
    for block, (modulation, (next_shift, next_scale, *_)) in zip(model.blocks, pairwise(modulations), strict=True):
        block = cast(WhiteBoxBlock, block)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        tokens = tokens + gate1[:, None] * block.attn(z)
        seen = ops.adaln(tokens, shift2, scale2)
        code = block.mlp(seen)
        yield BlockActivations(z, ops.adaln(tokens, shift1, scale1), seen, code)
        tokens = tokens + gate2[:, None] * code
        z = ops.adaln(tokens, next_shift, next_scale)


@torch.no_grad()
def measure(block: WhiteBoxBlock, activations: BlockActivations) -> Measures:
    """Measure what a block did."""
    step, heads = block.mlp, block.attn.num_heads
    lam = step.lam

    def objective(code: Tensor) -> tuple[Tensor, Tensor]:
        error = activations.tokens - F.linear(code, step.weight)
        return error.square().sum(-1).mean(-1) / 2, lam * code.abs().sum(-1).mean(-1)

    (fit_before, size_before), (fit_after, size_after) = objective(activations.tokens), objective(activations.code)
    return Measures(
        rate_before=coding_rate(block.attn.qkv(activations.before), heads),
        rate_after=coding_rate(block.attn.qkv(activations.after), heads),
        non_zero=(activations.code > 0).double().mean((1, 2)),
        margin=_margin(block, activations),
        fit_before=fit_before,
        fit_after=fit_after,
        fit_empty=activations.tokens.square().sum(-1).mean(-1) / 2,
        size_before=size_before,
        size_after=size_after,
        rank=effective_rank(activations.before),
    )


@torch.no_grad()
def diagnostics(
    model: WBDiT, x: Tensor, t: Tensor, y: Tensor | None = None, conditioning: Tensor | None = None
) -> dict[str, list[float]]:
    """Return the few measures worth a look while a network trains, means over the cells, a number a block.

    Parameters
    ----------
    model, x, t, y, conditioning
        The denoiser and what it is called with.

    Returns
    -------
    "coding_rate_before" and "coding_rate_after" attention, in nats, and "non_zero", the code's share of non-zeros.
    """
    found: dict[str, list[float]] = {"coding_rate_before": [], "coding_rate_after": [], "non_zero": []}
    for block, activations in zip(model.blocks, iterate_blocks(model, x, t, y, conditioning), strict=True):
        attention = cast(WhiteBoxBlock, block).attn
        for name, z in (("before", activations.before), ("after", activations.after)):
            rate = coding_rate(attention.qkv(z), attention.num_heads).sum(1).mean()
            found[f"coding_rate_{name}"].append(round(float(rate), 3))
        found["non_zero"].append(round(float((activations.code > 0).double().mean()), 4))
    return found


def _margin(block: WhiteBoxBlock, activations: BlockActivations) -> Tensor:
    """Return the median distance of the coefficients from their kink, in thresholds, ``(B,)``."""
    step = block.mlp
    # the argument of the ReLU, written out: zero codes do not say how far below they were
    at, threshold = activations.tokens, step.eta * step.lam
    moved = at + step.eta * ((at - F.linear(at, step.weight)) @ step.weight)
    return ((moved - threshold).abs() / threshold).flatten(1).median(1).values


@torch.no_grad()
def weight_stats(block: WhiteBoxBlock) -> WeightStats:
    """Measure a block's weights."""
    step, heads = block.mlp, block.attn.num_heads
    projections = block.attn.qkv.weight.double().unflatten(0, (heads, -1))  # [h, p, d]
    axes = torch.linalg.qr(projections.mT).Q  # [h, d, p]
    cosines = torch.einsum("idp,jdq->ijpq", axes, axes)
    return WeightStats(
        step=step.eta * float(torch.linalg.matrix_norm(step.weight.double(), 2)) ** 2,
        overlap=cosines.square().sum((-2, -1)) / axes.shape[-1],
        rank=effective_rank(projections),
        eta=step.eta,
        lam=step.lam,
    )
