"""Counts of a few levels per gene, given the gene's own noised value: their mean and their likelihood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wbdit.ops import reference
from wbdit.ops.dispatch import define_op
from wbdit.ops.layout import dense_rows

INPUTS = (
    *("x", "log_odds", "mixture", "alpha", "sigma"),
    *("log_base0", "log_base1", "values", "counts", "n_levels"),
)
SCHEMA = ", ".join(f"Tensor {name}" for name in INPUTS)


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
) -> Tensor:
    """Return the posterior mean of each gene's value, given its noised value and a prior over its few levels.

    A gene's count is one of a few levels l, at which the count is ``c_l`` and the value ``v_l``. With a softmax p of ::

        logit_l = (1 - mixture) log_base0_l + mixture log_base1_l + log_odds c_l - ((x - alpha v_l) / sigma)^2 / 2

    the mean is ``sum_l p_l v_l``: the score of categorical data by interpolation (Dieleman et al. 2022, Continuous
    diffusion for categorical data, arXiv 2211.15089). The last term is the exact evidence of ``x = alpha v + sigma
    noise`` (Bayes' rule), the rest is a prior: an exponential family with `log_odds` as its natural parameter.

    Parameters
    ----------
    x
        Noised values ``(B, G)``.
    log_odds
        Natural parameters ``(B, G)``, logarithms of rates.
    mixture
        Share of the second base measure ``(B, G)``, 0 to 1.
    alpha, sigma
        ``(B,)``, sigma above 0.
    log_base0, log_base1
        Logarithms of two base measures ``(G, L)``, finite.
    values, counts
        The levels' values ``(G, L)`` and counts ``(L,)``.
    n_levels
        How many levels a gene has ``(G,)``, int32, 1 to L. Whatever the tables hold beyond is not read.

    Returns
    -------
    ``(B, G)`` fp32, or fp64 where `log_odds` is. Without gradients.
    """
    return _count_mean(x, log_odds, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels)


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
) -> Tensor:
    """Return the negative log-likelihood of each gene's level, given its noised value: ``-ln p_target``.

    Parameters
    ----------
    x, log_odds, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels
        As in :func:`count_mean`. Gradients reach `log_odds`, `mixture`, `log_base0` and `log_base1` alone.
    target
        Levels ``(B, G)``, uint8, less than the gene's number of levels.

    Returns
    -------
    ``(B, G)`` fp32 in nats, or fp64 where `log_odds` is.
    """
    return _count_nll(x, log_odds, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels, target)


# on an engine: always in fp32


def _inputs(*given: Tensor) -> list[Tensor]:
    """Return an op's inputs in their order: (B, G) by rows and all else dense, in fp32 but for n_levels, int32."""
    *floats, n_levels = given
    wide = [t if t.dtype == torch.float32 else t.float() for t in floats]
    return [*map(dense_rows, wide[:3]), *(t.contiguous() for t in wide[3:]), n_levels.to(torch.int32).contiguous()]


def _count_mean_on(engine: Any, *given: Tensor) -> Tensor:
    mean = torch.empty(given[1].shape, device=given[1].device)
    engine.count_mean(*_inputs(*given), mean=mean)
    return mean


def _count_nll_on(engine: Any, *given: Tensor) -> Tensor:
    *inputs, target = given
    nll = torch.empty(given[1].shape, device=given[1].device)
    engine.count_nll(*_inputs(*inputs), target=target.contiguous(), nll=nll)
    return nll


def _count_nll_backward_on(engine: Any, dnll: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, target = given
    takers = _takers(*given)
    dlog_odds, dmixture, dlog_base0, dlog_base1 = grads = [torch.empty(t.shape, device=t.device) for t in takers]
    engine.count_nll_backward(
        dense_rows(dnll.float()),
        *_inputs(*inputs),
        target=target.contiguous(),
        dlog_odds=dlog_odds,
        dmixture=dmixture,
        dlog_base0=dlog_base0,
        dlog_base1=dlog_base1,
    )
    first, second, third, fourth = (grad.to(t.dtype) for grad, t in zip(grads, takers, strict=True))
    return first, second, third, fourth


def _takers(*given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what gradients reach: log_odds, mixture, log_base0, log_base1."""
    return given[1], given[2], given[5], given[6]


# the ops


def _fake(x: Tensor, log_odds: Tensor, *rest: Tensor) -> Tensor:
    return log_odds.new_empty(log_odds.shape, dtype=reference.accumulation_dtype(log_odds.dtype))


_count_mean = define_op(
    "count_mean", f"({SCHEMA}) -> Tensor", reference.count_mean, fake=_fake, on_engine=_count_mean_on
)
_count_nll = define_op(
    "count_nll", f"({SCHEMA}, Tensor target) -> Tensor", reference.count_nll, fake=_fake, on_engine=_count_nll_on
)
_count_nll_backward = define_op(
    "count_nll_backward",
    f"(Tensor dnll, {SCHEMA}, Tensor target) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.count_nll_backward,
    fake=lambda dnll, *given: tuple(t.new_empty(t.shape) for t in _takers(*given)),
    on_engine=_count_nll_backward_on,
)


# gradient


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dnll: Tensor) -> tuple[Tensor | None, ...]:
    dlog_odds, dmixture, dlog_base0, dlog_base1 = _count_nll_backward(dnll, *ctx.saved_tensors)
    return None, dlog_odds, dmixture, None, None, dlog_base0, dlog_base1, *(None,) * 4


_count_nll.register_autograd(_gradient, setup_context=_keep)
