"""A white-box denoiser's call without gradients as one op, alone or together with the sampler's update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wbdit.ops import reference
from wbdit.ops.dispatch import adapter, define_op
from wbdit.ops.sampling import SEED_BITS


def denoise(
    x: Tensor,
    modulations: Sequence[Tensor],
    embedding: Sequence[Tensor],
    projections: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor],
    folded: Sequence[Tensor],
    readout: Sequence[Tensor],
    heads: int,
    eta: float = 0.1,
    lam: float = 0.1,
    eps: float = 1e-6,
) -> Tensor:
    """Run a white-box denoiser: patches to tokens, all blocks (:func:`wbdit.ops.run_blocks`), tokens to patches.

    As one op, it takes fewer kernels on a GPU, and no tensor of tokens is read or written only to change its layout.
    Products and the residual stream have the dtype of `folded`.

    Parameters
    ----------
    x
        Noised cells ``(B, C, G)``, floating.
    modulations
        As in :func:`wbdit.ops.run_blocks`.
    embedding
        Weight ``(1 or N, d, C P)`` and bias ``(1 or N, d)`` of the linear map from a patch of P genes to its token,
        shared by all N patches or one per patch, and positions ``(N, d)``. If P does not divide G, the last patch is
        padded with zeros. With a token for the whole cell, the positions are ``(N + 1, d)``, and the weight
        ``(d, C G)`` and bias ``(d,)`` of its own map follow.
    projections, outs, biases, folded
        As in :func:`wbdit.ops.run_blocks`.
    readout
        Weight ``(1 or N, P C', d)`` and bias ``(1 or N, P C')`` of the linear map back to the C' outputs of each gene
        of a patch, the outputs of a gene next to each other. With a token for the whole cell, the weight ``(C' G, d)``
        and bias ``(C' G,)`` of its map follow, whose result is added; here the genes of an output are next to each
        other.
    heads, eta, lam, eps
        As in :func:`wbdit.ops.run_blocks`.

    Returns
    -------
    ``(B, C', G)`` in the dtype of `x`. No gradient is defined.

    Examples
    --------
    >>> x, modulations = torch.randn(2, 1, 50), torch.zeros(8, 2, 16)  # one block, 5 patches of 10 genes
    >>> weight, bias = torch.eye(16), torch.zeros(16)
    >>> embedding = torch.randn(1, 16, 10), torch.zeros(1, 16), torch.zeros(5, 16)
    >>> readout = torch.randn(1, 10, 16), torch.zeros(1, 10)
    >>> blocks = [weight], [weight], [bias], [wbdit.ops.fold(weight)]
    >>> wbdit.ops.denoise(x, modulations, embedding, *blocks, readout, heads=2).shape
    torch.Size([2, 1, 50])
    """
    network = _lists(modulations, embedding, projections, outs, biases, folded, readout)
    return _denoise(x, *network, heads, eta, lam, eps)


def denoise_step(
    x: Tensor,
    modulations: Sequence[Tensor],
    embedding: Sequence[Tensor],
    projections: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor],
    folded: Sequence[Tensor],
    readout: Sequence[Tensor],
    heads: int,
    eta: float = 0.1,
    lam: float = 0.1,
    eps: float = 1e-6,
    *,
    previous: Tensor | None = None,
    earlier: Tensor | None = None,
    noise: Tensor | None = None,
    a: float,
    b: float,
    c: float = 0.0,
    d: float = 0.0,
    e: float = 0.0,
    clamp_min: float | None = None,
    samples: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    clean: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run a white-box denoiser and one step of any sampler: :func:`denoise`, then :func:`wbdit.ops.sampler_step`.

    The model's output is never written.

    Parameters
    ----------
    x, modulations, embedding, projections, outs, biases, folded, readout, heads, eta, lam, eps
        As in :func:`denoise`, with as many outputs per gene as inputs.
    previous, earlier, noise, a, b, c, d, e, clamp_min, samples, seed, step
        As in :func:`wbdit.ops.sampler_step`.
    clean
        Factors of `x` and of the model's output in the estimate of x_0; None if the estimate is not needed.

    Returns
    -------
    The next state ``(B, C, G)`` in the dtype of `x`, and the estimate of x_0, or None. No gradient is defined.

    Raises
    ------
    ValueError
        If both `noise` and `samples` are given.

    Examples
    --------
    >>> x, modulations = torch.randn(2, 1, 50), torch.zeros(8, 2, 16)
    >>> weight, bias = torch.eye(16), torch.zeros(16)
    >>> embedding = torch.randn(1, 16, 10), torch.zeros(1, 16), torch.zeros(5, 16)
    >>> readout = torch.zeros(1, 10, 16), torch.ones(1, 10)  # the output is 1 everywhere
    >>> blocks = [weight], [weight], [bias], [wbdit.ops.fold(weight)]
    >>> new, _ = wbdit.ops.denoise_step(x, modulations, embedding, *blocks, readout, heads=2, a=0.0, b=0.5)
    >>> new[0, 0, :3]
    tensor([0.5000, 0.5000, 0.5000])
    """
    if noise is not None and samples is not None:
        raise ValueError("got both noise and samples: give one of them")
    network = _lists(modulations, embedding, projections, outs, biases, folded, readout)
    update = previous, earlier, noise, samples, a, b, c, d, e, clamp_min, seed & SEED_BITS, step
    new, estimate = _denoise_step(x, *network, heads, eta, lam, eps, *update, clean)
    return new, None if clean is None else estimate


def _lists(*weights: Sequence[Tensor]) -> list[list[Tensor]]:
    return [list(tensors) for tensors in weights]


# on an engine: op by op


def _denoise_on(
    engine: Any,
    x: Tensor,
    modulations: list[Tensor],
    embedding: list[Tensor],
    projections: list[Tensor],
    outs: list[Tensor],
    biases: list[Tensor],
    folded: list[Tensor],
    readout: list[Tensor],
    *settings: Any,
) -> Tensor:
    tokens = reference.embed_patches(x, folded[0].dtype, *embedding)
    z = adapter("run_blocks")(engine, tokens, modulations, projections, outs, biases, folded, *settings)
    return reference.read_patches(z, x.shape[2], embedding[0].shape[2] // x.shape[1], *readout).to(x.dtype)


def _denoise_step_on(
    engine: Any, x: Tensor, *given: Any, denoise: Callable[..., Tensor] = _denoise_on
) -> tuple[Tensor, Tensor]:
    network, update, clean = given[:11], given[11:-1], given[-1]
    out = denoise(engine, x, *network)
    new = adapter("sampler_step")(engine, x, out, *update)
    return new, x.new_empty(0) if clean is None else clean[0] * x + clean[1] * out


# the ops

NETWORK = (
    "Tensor x, Tensor[] modulations, Tensor[] embedding, Tensor[] projections, Tensor[] outs, Tensor[] biases, "
    "Tensor[] folded, Tensor[] readout, int heads, float eta, float lam, float eps"
)


def _shape_of(x: Tensor, embedding: list[Tensor], readout: list[Tensor]) -> tuple[int, int, int]:
    """Return the shape of :func:`denoise`'s result."""
    patch = embedding[0].shape[2] // x.shape[1]
    return x.shape[0], readout[0].shape[1] // patch, x.shape[2]


_denoise = define_op(
    "denoise",
    f"({NETWORK}) -> Tensor",
    reference.denoise,
    fake=lambda x, _, embedding, *rest: x.new_empty(_shape_of(x, embedding, rest[4])),
    on_engine=_denoise_on,
)
_denoise_step = define_op(
    "denoise_step",
    f"({NETWORK}, Tensor? previous, Tensor? earlier, Tensor? noise, Tensor? samples, float a, float b, float c, "
    "float d, float e, float? clamp_min, int seed, int step, float[]? clean) -> (Tensor, Tensor)",
    reference.denoise_step,
    fake=lambda x, *rest: (torch.empty_like(x), x.new_empty(0) if rest[-1] is None else torch.empty_like(x)),
    on_engine=_denoise_step_on,
)
