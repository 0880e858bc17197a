"""The posterior mean of counts from a denoiser's answer, and the sampler's update, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wbdit.ops import reference
from wbdit.ops.dispatch import adapter, define_op
from wbdit.ops.layout import dense_rows, fresh
from wbdit.ops.sampling import SEED_BITS, update_on_engine


def count_mean_step(
    x: Tensor,
    answer: Tensor,
    rates: Tensor,
    dispersion: Tensor,
    knots: Tensor,
    log_size: Tensor,
    log_mean: Tensor,
    log_base0: Tensor,
    log_base1: Tensor,
    values: Tensor,
    counts: Tensor,
    n_levels: Tensor,
    *,
    alpha: float,
    sigma: float,
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
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Run one step of any sampler of a count model, from the answer of its denoiser to the next state.

    With a negative binomial per gene, of log mean ``log_mean + answer[:, 0] + rates`` and the weight and log size ::

        mixture = sigmoid(knots + dispersion + answer[:, 1])
        size = (1 - mixture) log_size[0] + mixture log_size[1]

    the natural parameter is ``log_odds = ln(mean / (mean + size))``. :func:`wbdit.ops.count_mean` of both is the
    estimate of x_0, and :func:`wbdit.ops.sampler_step` with this estimate as `out` gives the next state. On a GPU this
    is one kernel.

    Parameters
    ----------
    x
        Current state ``(B, 1, G)``, floating. All cells are at one timestep.
    answer
        Output of the denoiser ``(B, 1, G)``, or ``(B, 2, G)`` if it predicts dispersions too.
    rates, dispersion
        Offsets ``(B, G)`` of the log rates and of the mixture weight's logits that labels and library sizes give.
    knots
        Logits of the mixture weight at this timestep ``(G,)``.
    log_size, log_mean
        Log sizes ``(2, G)`` of the negative binomials without noise and without signal, and log means ``(G,)``.
    log_base0, log_base1, values, counts, n_levels
        As in :func:`wbdit.ops.count_mean`.
    alpha, sigma
        Scale of the signal and of the noise; sigma above 0.
    previous, earlier, noise, a, b, c, d, e, clamp_min, samples, seed, step
        As in :func:`wbdit.ops.sampler_step`.
    keep
        Return the estimate of x_0. Otherwise it is not written.

    Returns
    -------
    The next state ``(B, 1, G)`` in the dtype of `x`, and the estimate of x_0 ``(B, 1, G)`` fp32, or fp64 if `answer` is
    fp64; None without `keep`. No gradient is defined.

    Raises
    ------
    ValueError
        If both `noise` and `samples` are given.

    Examples
    --------
    >>> x, zero, gene = torch.tensor([[[0.5]]]), torch.zeros(1, 1), torch.zeros(1)
    >>> base, values, n_levels = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), torch.tensor([2], dtype=torch.int32)
    >>> known = zero, zero, gene, torch.full((2, 1), -9.0), gene  # mean far above size: all counts are alike
    >>> tables = base, base, values, values[0], n_levels
    >>> new, clean = wbdit.ops.count_mean_step(x, x, *known, *tables, alpha=1.0, sigma=1.0, a=0.0, b=2.0)
    >>> new.round(decimals=3), clean.round(decimals=3)
    (tensor([[[1.]]]), tensor([[[0.5000]]]))
    """
    if noise is not None and samples is not None:
        raise ValueError("got both noise and samples: give one of them")
    known = rates, dispersion, knots, log_size, log_mean, log_base0, log_base1, values, counts, n_levels
    update = previous, earlier, noise, samples, a, b, c, d, e, clamp_min, seed & SEED_BITS, step, keep
    new, clean = _count_mean_step(x, answer, *known, alpha, sigma, *update)
    return new, clean if keep else None


# on an engine


def _count_mean_step_on(engine: Any, x: Tensor, answer: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """Run the ops one after another."""
    known, tables, (alpha, sigma), (*update, keep) = given[:5], given[5:10], given[10:12], given[12:]
    terms = reference.count_terms(answer, *known)
    levels = (terms[0].new_full((len(x),), level) for level in (alpha, sigma))
    mean = adapter("count_mean")(engine, x[:, 0], *terms, *levels, *tables)[:, None]
    return adapter("sampler_step")(engine, x, mean, *update), mean if keep else mean.new_empty(0)


def one_pass(
    engine: Any,
    x: Tensor,
    answer: Tensor,
    rates: Tensor,
    dispersion: Tensor,
    knots: Tensor,
    log_size: Tensor,
    log_mean: Tensor,
    log_base0: Tensor,
    log_base1: Tensor,
    values: Tensor,
    counts: Tensor,
    n_levels: Tensor,
    alpha: float,
    sigma: float,
    *given: Any,
) -> tuple[Tensor, Tensor]:
    """Run the op on an engine that has it as one pass; the arguments are those of the op."""
    *update, keep = given
    new, mean = fresh(x), torch.empty(x.shape if keep else 0, device=x.device)
    engine.count_mean_step(
        x.contiguous(),
        answer.contiguous(),
        dense_rows(rates),
        dense_rows(dispersion),
        knots.contiguous(),
        log_size.contiguous(),
        log_mean.contiguous(),
        *(table.float().contiguous() for table in (log_base0, log_base1, values, counts)),
        n_levels.to(torch.int32).contiguous(),
        new=new,
        mean=mean if keep else None,
        alpha=alpha,
        sigma=sigma,
        **update_on_engine(*update),
    )
    return new, mean


# the op


def _fake(x: Tensor, answer: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    wide = reference.accumulation_dtype(answer.dtype)
    return torch.empty_like(x), x.new_empty(x.shape if given[-1] else 0, dtype=wide)


_count_mean_step = define_op(
    "count_mean_step",
    "(Tensor x, Tensor answer, Tensor rates, Tensor dispersion, Tensor knots, Tensor log_size, Tensor log_mean, "
    "Tensor log_base0, Tensor log_base1, Tensor values, Tensor counts, Tensor n_levels, float alpha, float sigma, "
    "Tensor? previous, Tensor? earlier, Tensor? noise, Tensor? samples, float a, float b, float c, float d, float e, "
    "float? clamp_min, int seed, int step, bool keep) -> (Tensor, Tensor)",
    reference.count_mean_step,
    fake=_fake,
    on_engine=_count_mean_step_on,
)
