"""The noise schedule's updates, and noise by its address."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wbdit.ops import reference
from wbdit.ops.dispatch import define_op
from wbdit.ops.layout import dense, fresh

SEED_BITS = 2**63 - 1


def noising(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Draw from the forward process: ``alpha x0 + sigma noise`` with one `alpha` and `sigma` a sample.

    Parameters
    ----------
    x0, noise
        ``(B, ...)`` of one shape, floating.
    alpha, sigma
        ``(B,)``; they take no gradient.
    """
    return _noising(x0, noise, alpha, sigma)


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
    return _sampler_step(x, out, previous, earlier, noise, samples, a, b, c, d, e, clamp_min, seed & SEED_BITS, step)


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
    return _normal(seed & SEED_BITS, samples, step, length)


# on an engine


def _noising_on(engine: Any, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    xt = fresh(x0)
    engine.noising(x0.contiguous(), noise.contiguous(), alpha.float(), sigma.float(), xt=xt)
    return xt


def _sampler_step_on(
    engine: Any,
    x: Tensor,
    out: Tensor,
    previous: Tensor | None,
    earlier: Tensor | None,
    noise: Tensor | None,
    samples: Tensor | None,
    a: float,
    b: float,
    c: float,
    d: float,
    e: float,
    clamp_min: float | None,
    seed: int,
    step: int,
) -> Tensor:
    new = fresh(x)
    engine.sampler_step(
        x.contiguous(),
        out.contiguous(),
        previous=dense(previous),
        earlier=dense(earlier),
        noise=dense(noise),
        samples=None if samples is None else _numbers(samples),
        new=new,
        a=a,
        b=b,
        c=c,
        d=d,
        e=e,
        clamp_min=-torch.inf if clamp_min is None else clamp_min,
        seed=seed,
        step=step,
    )
    return new


def _normal_on(engine: Any, seed: int, samples: Tensor, step: int, length: int) -> Tensor:
    out = torch.empty(samples.shape[0], length, device=samples.device)
    engine.normal(_numbers(samples), out=out, seed=seed, step=step)
    return out


def _numbers(samples: Tensor) -> Tensor:
    """Return sample numbers as the engines read them: dense int64."""
    return samples.to(torch.int64).contiguous()


# the ops

_noising = define_op(
    "noising",
    "(Tensor x0, Tensor noise, Tensor alpha, Tensor sigma) -> Tensor",
    reference.noising,
    fake=lambda x0, noise, alpha, sigma: torch.empty_like(x0),
    on_engine=_noising_on,
)
_sampler_step = define_op(
    "sampler_step",
    "(Tensor x, Tensor out, Tensor? previous, Tensor? earlier, Tensor? noise, Tensor? samples, "
    "float a, float b, float c, float d, float e, float? clamp_min, int seed, int step) -> Tensor",
    reference.sampler_step,
    fake=lambda x, *rest: torch.empty_like(x),
    on_engine=_sampler_step_on,
)
_normal = define_op(
    "normal",
    "(int seed, Tensor samples, int step, int length) -> Tensor",
    reference.normal,
    fake=lambda seed, samples, step, length: samples.new_empty((samples.shape[0], length), dtype=torch.float32),
    on_engine=_normal_on,
)


# gradients


def _keep_noising(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _noising_gradient(ctx: Any, dxt: Tensor) -> tuple[Tensor | None, ...]:
    alpha, sigma = (s.to(dxt.dtype).view(-1, *(1,) * (dxt.ndim - 1)) for s in ctx.saved_tensors)
    return alpha * dxt, sigma * dxt, None, None


def _keep_sampler_step(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.factors, ctx.clamp_min = inputs[6:11], inputs[11]
    ctx.given = [term is not None for term in inputs[:5]]
    ctx.save_for_backward(*([output] if ctx.clamp_min is not None else []))


def _sampler_step_gradient(ctx: Any, dnew: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.clamp_min is not None:
        dnew = torch.where(ctx.saved_tensors[0] > ctx.clamp_min, dnew, 0)
    grads = [factor * dnew if given else None for factor, given in zip(ctx.factors, ctx.given, strict=True)]
    return *grads, *(None,) * 9


_noising.register_autograd(_noising_gradient, setup_context=_keep_noising)
_sampler_step.register_autograd(_sampler_step_gradient, setup_context=_keep_sampler_step)
