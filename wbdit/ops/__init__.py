"""The operations a white-box block is made of, one function an op, on whatever device the tensors are.

Each is a PyTorch custom op in the namespace ``wbdit`` with shape inference and a gradient, so autograd, autocast,
``torch.compile`` and export see through it. Kernels enter by :func:`wbdit.ops.dispatch.register_kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wbdit.ops import cpu, definitions, triton
from wbdit.ops.dispatch import active_backend, backend, register_kernel, serving

__all__ = [
    "active_backend",
    "adaln",
    "backend",
    "count_mean",
    "count_nll",
    "fold",
    "gated_adaln",
    "gated_adaln_",
    "ista",
    "ista_adaln",
    "ista_adaln_",
    "mssa",
    "noising",
    "normal",
    "register_kernel",
    "run_blocks",
    "sampler_step",
    "serving",
]


cpu.register()
triton.register()


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None) -> Tensor:
    """Normalise each token and modulate it: ``LN(x) * (1 + scale) + shift`` (Peebles and Xie 2023, DiT).

    Parameters
    ----------
    x
        Tokens ``(B, N, d)``, floating.
    shift, scale
        Modulation ``(B, d)``, one row a sample.
    eps
        Added to the variance.
    dtype
        Type of the result, that of the product it goes into; the type of `x` by default.

    Returns
    -------
    ``(B, N, d)``.
    """
    return definitions.adaln(x, shift, scale, eps, dtype)


def gated_adaln(
    x: Tensor,
    out: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a gated half-step to the residual stream and modulate for the next: all that stands between two products.

    Parameters
    ----------
    x
        Residual stream ``(B, N, d)``, floating.
    out
        What the half-step gave ``(B, N, d)``, floating.
    gate, shift, scale
        Modulation ``(B, d)``, one row a sample.
    eps
        Added to the variance.
    bias
        What the half-step's last linear map would have added ``(d,)``: here it costs no pass of its own.

    Returns
    -------
    ``x' = x + gate * (out + bias)`` in the type of `x`, and :func:`adaln` of it in the type of `out`.
    """
    return definitions.gated_adaln(x, out, bias, gate, shift, scale, eps)


def gated_adaln_(
    x: Tensor,
    out: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`gated_adaln` does in place: `x` and `out` become its two results. Without gradients."""
    definitions.gated_adaln_(x, out, bias, gate, shift, scale, eps)
    return x, out


def mssa(w: Tensor, heads: int) -> Tensor:
    """Multi-head subspace self-attention with one shared operand (Yu et al. 2023, CRATE).

    Per head ``softmax(w w^T / sqrt(p)) w``: `w`, the tokens' coordinates in the head's subspace, is query, key and
    value at once.

    Parameters
    ----------
    w
        Projected tokens ``(B, N, h * p)``, heads side by side, floating.
    heads
        Number of heads h; must divide the last dimension.

    Returns
    -------
    ``(B, N, h * p)`` in the type of `w`.
    """
    return definitions.mssa(w, heads)[0]


def fold(dictionary: Tensor) -> Tensor:
    """Fold a dictionary for :func:`ista`: ``F = D - D^T D``, ``(d, d)`` to ``(d, d)``."""
    return definitions.fold(dictionary)


def ista(z: Tensor, folded: Tensor, eta: float = 0.1, lam: float = 0.1) -> Tensor:
    """Take one step of iterative shrinkage-thresholding: ``relu(z + eta z F - eta lam)``.

    With ``F = D - D^T D`` this is the published ``relu(z + eta (z D - z D^T D) - eta lam)`` in one product.

    Parameters
    ----------
    z
        Tokens ``(..., d)``, floating.
    folded
        The folded dictionary ``(d, d)``. Its type is the product's; all else is computed in the type of `z`.
    eta, lam
        Step size and sparsity penalty.

    Returns
    -------
    ``(..., d)`` in the type of `z`, non-negative.
    """
    return definitions.ista(z, folded, eta, lam)


def ista_adaln(
    x: Tensor,
    z: Tensor,
    folded: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eta: float = 0.1,
    lam: float = 0.1,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Take the sparsifying half-step and modulate for the next: :func:`gated_adaln` of :func:`ista`.

    Parameters
    ----------
    x
        Residual stream ``(B, N, d)``, floating.
    z
        Its modulated norm ``(B, N, d)``, floating.
    folded, eta, lam
        As in :func:`ista`.
    gate, shift, scale, eps
        As in :func:`gated_adaln`.

    Returns
    -------
    ``x' = x + gate * relu(z + eta z F - eta lam)`` in the type of `x` and :func:`adaln` of it in the type of `z`.
    """
    x_new, z_new, _ = definitions.ista_adaln(x, z, folded, gate, shift, scale, eta, lam, eps)
    return x_new, z_new


def ista_adaln_(
    x: Tensor,
    z: Tensor,
    folded: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eta: float = 0.1,
    lam: float = 0.1,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`ista_adaln` does in place: `x` and `z` become its two results. Without gradients."""
    definitions.ista_adaln_(x, z, folded, gate, shift, scale, eta, lam, eps)
    return x, z


def run_blocks(
    x: Tensor,
    modulations: Sequence[Tensor],
    projections: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor],
    folded: Sequence[Tensor],
    heads: int,
    eta: float = 0.1,
    lam: float = 0.1,
    eps: float = 1e-6,
) -> Tensor:
    """Run white-box blocks one after another, without gradients: :func:`adaln`, then a block's two half-steps each.

    What a GPU does in fewer and larger steps than the parts. The residual stream is kept in the type of `x`, or in the
    products' where a kernel runs.

    Parameters
    ----------
    x
        Residual stream ``(B, N, d)``, floating.
    modulations
        ``(B, d)`` each: of every block shift, scale, gate, shift, scale, gate; of what follows shift and scale.
    projections, outs, biases
        Of every block the weight ``(h * p, d)`` before :func:`mssa`, and the weight ``(d, h * p)`` and bias ``(d,)``
        after it.
    folded
        Of every block the folded dictionary ``(d, d)``. Products are formed in its type, and the weights have it.
    heads, eta, lam, eps
        As in :func:`mssa` and :func:`ista_adaln`.

    Returns
    -------
    The stream's modulated norm after the last block ``(B, N, d)``, in the type of `folded`.
    """
    weights = list(projections), list(outs), list(biases), list(folded)
    return definitions.run_blocks(x, list(modulations), *weights, heads, eta, lam, eps)


def noising(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Draw from the forward process: ``alpha x0 + sigma noise`` with one `alpha` and `sigma` a sample.

    Parameters
    ----------
    x0, noise
        ``(B, ...)`` of one shape, floating.
    alpha, sigma
        ``(B,)``; they take no gradient.
    """
    return definitions.noising(x0, noise, alpha, sigma)


def sampler_step(
    x: Tensor,
    out: Tensor,
    previous: Tensor | None = None,
    earlier: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    a: float,
    b: float,
    c: float = 0.0,
    d: float = 0.0,
    e: float = 0.0,
    clamp_min: float | None = None,
    samples: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
) -> Tensor:
    """Take one step of any sampler: ``a x + b out + c previous + d earlier + e noise``, then an optional clamp.

    Parameters
    ----------
    x, out, previous, earlier, noise
        ``(B, ...)`` of one shape, floating.
    a, b, c, d, e
        Host scalars (see :mod:`wbdit.samplers`).
    clamp_min
        Lower bound of the result.
    samples, seed, step
        In place of `noise`: draw it by its address, as :func:`normal` does, without writing it to memory.

    Returns
    -------
    The shape and type of `x`. Gradients reach the first five.

    Raises
    ------
    ValueError
        If both `noise` and `samples` are given.
    """
    if noise is not None and samples is not None:
        raise ValueError("give noise or samples to draw it for, not both")
    return definitions.sampler_step(
        x, out, previous, earlier, noise, samples, a, b, c, d, e, clamp_min, seed & (2**63 - 1), step
    )


def normal(seed: int, samples: Tensor, step: int, length: int) -> Tensor:
    """Return Gaussian noise addressed by (seed, sample, step, position): the same numbers in any batch, on any device.

    Philox4x32-10 (Salmon et al. 2011) with the key ``seed`` and the counter ``(position // 4, sample, step)``, then
    Box and Muller on the four words of a counter.

    Parameters
    ----------
    seed
        64 bits.
    samples
        Indices of the samples ``(B,)``, int64.
    step
        Number of the draw, 32 bits.
    length
        Numbers a sample.

    Returns
    -------
    ``(B, length)`` fp32 on the device of `samples`.
    """
    return definitions.normal(seed & (2**63 - 1), samples, step, length)


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
) -> Tensor:
    """Return the posterior mean of each gene's value, given its noised value and a prior over its few levels.

    A gene's count is one of a few levels l, at which the count is ``c_l`` and the value ``v_l``. With a softmax p of ::

        logit_l = (1 - weight) base0_l + weight base1_l + eta c_l - ((x - alpha v_l) / sigma)^2 / 2

    the mean is ``sum_l p_l v_l``: the score of categorical data by interpolation (Dieleman et al. 2022, Continuous
    diffusion for categorical data, arXiv 2211.15089). The last term is the exact evidence of ``x = alpha v + sigma
    noise`` (Bayes' rule), the rest is a prior: an exponential family with `eta` as its natural parameter.

    Parameters
    ----------
    x
        Noised values ``(B, G)``.
    eta
        Natural parameters ``(B, G)``, logarithms of rates.
    weight
        Share of the second base measure ``(B, G)``, 0 to 1.
    alpha, sigma
        ``(B,)``, sigma above 0.
    base0, base1
        Logarithms of two base measures ``(G, L)``, finite.
    values, counts
        The levels' values ``(G, L)`` and counts ``(L,)``.
    sizes
        How many levels a gene has ``(G,)``, int32, 1 to L. Whatever the tables hold beyond is not read.

    Returns
    -------
    ``(B, G)`` fp32, or fp64 where `eta` is. Without gradients.
    """
    return definitions.count_mean(x, eta, weight, alpha, sigma, base0, base1, values, counts, sizes)


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
) -> Tensor:
    """Return the negative log-likelihood of each gene's level, given its noised value: ``-ln p_target``.

    Parameters
    ----------
    x, eta, weight, alpha, sigma, base0, base1, values, counts, sizes
        As in :func:`count_mean`. Gradients reach `eta`, `weight`, `base0` and `base1` alone.
    target
        CountBins ``(B, G)``, uint8, less than the gene's size.

    Returns
    -------
    ``(B, G)`` fp32 in nats, or fp64 where `eta` is.
    """
    return definitions.count_nll(x, eta, weight, alpha, sigma, base0, base1, values, counts, sizes, target)
