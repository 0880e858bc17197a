"""Measurements of a white-box block: how far it compresses the tokens and how sparse it makes them.

CRATE (Yu et al. 2023, arXiv 2306.01129) makes two claims about a block. Attention compresses the tokens in the block's
subspaces: it lowers their coding rate. Shrinkage moves the tokens toward a sparse code in the block's dictionary: it
lowers the lasso objective. Both are measured on the block's own inputs, before and after each half-step. Attention is
measured with its gate and residual, shrinkage without.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from wbdit.nn.activations import BlockActivations, iterate_blocks
from wbdit.nn.wbdit import WBDiT, WhiteBoxBlock

EPS = 0.01  # precision in the coding rate, the value that CRATE's measurements use


class Measures(NamedTuple):
    """Measurements of one block, one value per cell: ``(B,)`` each, ``(B, h)`` for the two rates.

    Rates, ``non_zero`` and ``rank`` are fp64; the others have the dtype of the activations.

    Attributes
    ----------
    rate_before, rate_after
        Coding rate per head before and after attention, in nats, ``(B, h)``.
    non_zero
        Fraction of nonzero coefficients in the code.
    margin
        Median distance of a coefficient from the point where it becomes zero, in units of the threshold eta lambda. Far
        below 1, small changes of the tokens switch coefficients on and off.
    fit_before, fit_after, fit_empty
        First term of the lasso objective, mean over tokens: half the squared error of the reconstruction. The codes
        are ISTA's initial code, its output and the zero code.
    size_before, size_after
        Second term of the lasso objective, mean over tokens: lambda times the 1-norm of the code.
    rank
        Effective rank of attention's input, at most min(N, d) (Roy and Vetterli 2007).
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
    """Statistics of a block's weights.

    Attributes
    ----------
    step
        ``eta |D|_2^2``. Below 1 a shrinkage step cannot raise the objective; below 2 repeated steps still converge.
    overlap
        Mean squared cosine between the subspaces of two heads, fp64 ``(h, h)``: 1 for identical subspaces, p / d on
        average for random ones.
    rank
        Effective rank of each head's projection, fp64 ``(h,)``, at most p.
    eta, lam
        Step size and sparsity penalty.
    """

    step: float
    overlap: Tensor
    rank: Tensor
    eta: float
    lam: float


def coding_rate(w: Tensor, heads: int, eps: float = EPS) -> Tensor:
    """Return the coding rate of the tokens in each head's subspace: ``1/2 logdet(I + p / (N eps) w w^T)``, in nats.

    The rows of w are the tokens' coordinates. They are normalized to length 1: directions count, lengths do not.
    The sum over heads is CRATE's R^c (Yu et al. 2023).

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
    One rate per cell and head, ``(B, h)`` fp64; NaN where the tokens are not finite.

    Examples
    --------
    Orthogonal tokens cost more than identical ones:

    >>> from wbdit.whitebox.measures import coding_rate
    >>> round(coding_rate(torch.eye(6, 8)[None], heads=1).item(), 2)
    14.7
    >>> round(coding_rate(torch.ones(1, 6, 8), heads=1).item(), 2)
    3.34
    """
    rows = F.normalize(w.double().unflatten(-1, (heads, -1)).transpose(1, 2), dim=-1)  # [B, h, N, p]
    n, p = rows.shape[-2:]
    gram = rows.mT @ rows if p <= n else rows @ rows.mT  # same determinant either way: take the smaller
    gram = gram * (p / (n * eps)) + torch.eye(min(n, p), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram)  # does not raise for values that are not finite
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).masked_fill(failed != 0, float("nan"))


def largest_rate(tokens: int, hidden_size: int, heads: int, eps: float = EPS) -> float:
    """Return the upper bound of :func:`coding_rate` summed over heads, in nats.

    Tokens reach it when they are orthogonal in each head, or evenly spread over all directions if N exceeds p.

    Parameters
    ----------
    tokens
        Number of tokens N.
    hidden_size
        Width d of a token; p is d // h.
    heads
        Number of heads h.
    eps
        Precision of the code.

    Examples
    --------
    >>> from wbdit.whitebox.measures import largest_rate
    >>> round(largest_rate(tokens=6, hidden_size=8, heads=1), 2)
    14.7
    """
    p = hidden_size // heads
    return heads * min(tokens, p) / 2 * math.log1p(max(1.0, p / tokens) / eps)


def effective_rank(matrix: Tensor) -> Tensor:
    """Return the effective rank of matrices ``(..., n, m)``, ``(...)`` fp64 (Roy and Vetterli 2007).

    It is the exponential of the entropy of the singular values, which are first normalized to sum 1.

    Examples
    --------
    >>> from wbdit.whitebox.measures import effective_rank
    >>> round(effective_rank(torch.eye(5)).item(), 3), round(effective_rank(torch.ones(4, 3)).item(), 3)
    (5.0, 1.0)
    """
    values = torch.linalg.svdvals(matrix.double())
    share = values / values.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


@torch.no_grad()
def measure(block: WhiteBoxBlock, activations: BlockActivations) -> Measures:
    """Measure one block on its activations, see :class:`Measures`.

    Parameters
    ----------
    block
        A block of the model.
    activations
        Its activations, from :func:`iterate_blocks`.

    Examples
    --------
    >>> from wbdit.nn.activations import iterate_blocks
    >>> from wbdit.whitebox.measures import measure
    >>> model = wbdit.WBDiT(input_size=24, patch_size=4, hidden_size=16, num_heads=2)
    >>> x, t = torch.randn(3, 1, 24), torch.tensor([5, 500, 900])
    >>> measures = measure(model.blocks[0], next(iterate_blocks(model, x, t)))
    >>> measures.rate_before.shape, measures.non_zero.shape  # cells and heads; cells
    (torch.Size([3, 2]), torch.Size([3]))
    """
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
    """Return the measurements that training logs: means over the cells, one value per block.

    Parameters
    ----------
    model, x, t, y, conditioning
        The denoiser and its inputs.

    Returns
    -------
    "coding_rate_before" and "coding_rate_after": coding rate before and after attention, summed over heads, in nats.
    "non_zero": fraction of nonzero coefficients in the code.

    Examples
    --------
    >>> from wbdit.whitebox.measures import diagnostics
    >>> model = wbdit.WBDiT(input_size=24, patch_size=4, hidden_size=16, depth=2, num_heads=2)
    >>> logged = diagnostics(model, torch.randn(3, 1, 24), torch.tensor([5, 500, 900]))
    >>> {name: len(values) for name, values in logged.items()}  # one value per block
    {'coding_rate_before': 2, 'coding_rate_after': 2, 'non_zero': 2}
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
    """Return :class:`Measures`'s ``margin``, ``(B,)``."""
    step = block.mlp
    # recompute the argument of the ReLU: the code no longer shows how far a zero coefficient was below it
    at, threshold = activations.tokens, step.eta * step.lam
    moved = at + step.eta * ((at - F.linear(at, step.weight)) @ step.weight)
    return ((moved - threshold).abs() / threshold).flatten(1).median(1).values


@torch.no_grad()
def weight_stats(block: WhiteBoxBlock) -> WeightStats:
    """Return statistics of a block's weights, see :class:`WeightStats`.

    Examples
    --------
    >>> from wbdit.whitebox.measures import weight_stats
    >>> block = wbdit.WBDiT(input_size=24, patch_size=4, hidden_size=8, num_heads=2).blocks[0]
    >>> _ = torch.nn.init.eye_(block.mlp.weight)
    >>> round(weight_stats(block).step, 3)  # eta |D|^2 for an orthogonal dictionary
    0.1
    """
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
