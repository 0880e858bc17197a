"""The forward process, the samplers' update, and counter-based Gaussian noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wbdit.ops import reference
from wbdit.ops.dispatch import define_op
from wbdit.ops.layout import dense, fresh

SEED_BITS = 2**63 - 1


def noising(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Compute the noised sample of the forward process: ``alpha x0 + sigma noise``.

    Parameters
    ----------
    x0, noise
        Clean samples and noise ``(B, ...)`` of the same shape, floating.
    alpha, sigma
        Scale of the signal and of the noise ``(B,)``, one per sample. They receive no gradient.

    Returns
    -------
    ``(B, ...)`` in the dtype of `x0`.

    Examples
    --------
    >>> x0, noise = torch.ones(1, 2), torch.tensor([[1.0, -1.0]])
    >>> wbdit.ops.noising(x0, noise, alpha=torch.tensor([0.6]), sigma=torch.tensor([0.8]))
    tensor([[ 1.4000, -0.2000]])
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
    """Compute one step of any sampler: ``a x + b out + c previous + d earlier + e noise``, then an optional clamp.

    Parameters
    ----------
    x
        Current state ``(B, ...)``, floating.
    out
        Model output at `x`, of the same shape, floating.
    previous, earlier
        Estimates of x_0 from the previous model call and the one before it, of the same shape, floating.
    noise
        Gaussian noise of the same shape, floating.
    a, b, c, d, e
        Coefficients, Python floats (see :mod:`wbdit.samplers`).
    clamp_min
        Lower bound of the result.
    samples, seed, step
        Arguments of :func:`normal`, instead of `noise`: a kernel draws the noise itself and never stores it.

    Returns
    -------
    The next state, in the shape and dtype of `x`. Gradients flow to `x`, `out`, `previous`, `earlier` and `noise`.

    Raises
    ------
    ValueError
        If both `noise` and `samples` are given.

    Examples
    --------
    >>> x, out = torch.ones(1, 3), torch.tensor([[1.0, 0.0, -4.0]])
    >>> wbdit.ops.sampler_step(x, out, a=0.5, b=0.5, clamp_min=-1.0)
    tensor([[ 1.0000,  0.5000, -1.0000]])
    """
    if noise is not None and samples is not None:
        raise ValueError("got both noise and samples: give one of them")
    return _sampler_step(x, out, previous, earlier, noise, samples, a, b, c, d, e, clamp_min, seed & SEED_BITS, step)


def normal(seed: int, samples: Tensor, step: int, length: int) -> Tensor:
    """Return counter-based Gaussian noise: each number depends on the seed, sample, step and position only.

    A sample thus gets the same noise in any batch and on any device. Random bits come from Philox4x32-10 (Salmon et
    al. 2011) with the key ``seed`` and the counter ``(position // 4, sample, step)``. The Box-Muller transform turns
    the four words of a counter into four numbers.

    Parameters
    ----------
    seed
        Integer, of which the lowest 63 bits are used.
    samples
        Indices of the samples ``(B,)``, int64.
    step
        Index of the draw, of which the lowest 32 bits are used.
    length
        Number of values per sample.

    Returns
    -------
    ``(B, length)`` fp32 on the device of `samples`.

    Examples
    --------
    >>> both = wbdit.ops.normal(seed=0, samples=torch.tensor([0, 7]), step=1, length=3)
    >>> alone = wbdit.ops.normal(seed=0, samples=torch.tensor([7]), step=1, length=3)
    >>> torch.equal(both[1:], alone)
    True
    """
    return _normal(seed & SEED_BITS, samples, step, length)


# on an engine


def _noising_on(engine: Any, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    xt = fresh(x0)
    engine.noising(x0.contiguous(), noise.contiguous(), alpha.float(), sigma.float(), xt=xt)
    return xt


def _sampler_step_on(engine: Any, x: Tensor, out: Tensor, *update: Any) -> Tensor:
    new = fresh(x)
    engine.sampler_step(x.contiguous(), out.contiguous(), new=new, **update_on_engine(*update))
    return new


def update_on_engine(
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
) -> dict[str, Any]:
    """Return the arguments of a sampler's update by name, as the engines' passes take them: dense, with a bound."""
    return {
        "previous": dense(previous),
        "earlier": dense(earlier),
        "noise": dense(noise),
        "samples": None if samples is None else _numbers(samples),
        "a": a,
        "b": b,
        "c": c,
        "d": d,
        "e": e,
        "clamp_min": -torch.inf if clamp_min is None else clamp_min,
        "seed": seed,
        "step": step,
    }


def _normal_on(engine: Any, seed: int, samples: Tensor, step: int, length: int) -> Tensor:
    out = torch.empty(samples.shape[0], length, device=samples.device)
    engine.normal(_numbers(samples), out=out, seed=seed, step=step)
    return out


def _numbers(samples: Tensor) -> Tensor:
    """Return sample indices as the engines expect them: contiguous int64."""
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
