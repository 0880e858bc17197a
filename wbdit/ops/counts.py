"""Posterior mean, likelihood and draws of discrete counts, given the noised value of the same gene."""

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
    """Return the posterior mean of each gene's value, given its noised value and a prior over its count levels.

    Each gene takes one of a few levels l, with count ``c_l`` and value ``v_l``. With the softmax p over levels of ::

        logit_l = (1 - mixture) log_base0_l + mixture log_base1_l + log_odds c_l - ((x - alpha v_l) / sigma)^2 / 2

    the mean is ``sum_l p_l v_l``. This is score interpolation for categorical data (Dieleman et al. 2022, Continuous
    diffusion for categorical data, arXiv 2211.15089). The last term is the exact log-likelihood of ``x = alpha v +
    sigma noise`` up to a constant (Bayes' rule). The other terms are a prior: an exponential family with `log_odds` as
    its natural parameter.

    Parameters
    ----------
    x
        Noised values ``(B, G)``.
    log_odds
        Natural parameters ``(B, G)``, logarithms of rates.
    mixture
        Weight of the second base measure ``(B, G)``, 0 to 1.
    alpha, sigma
        Scale of the signal and of the noise ``(B,)``, one per sample; sigma above 0.
    log_base0, log_base1
        Logarithms of two base measures ``(G, L)``, finite.
    values, counts
        Values ``(G, L)`` and counts ``(L,)`` of the levels.
    n_levels
        Number of levels of each gene ``(G,)``, int32, 1 to L. Table entries beyond it do not affect the result.

    Returns
    -------
    ``(B, G)`` fp32, or fp64 if `log_odds` is fp64. No gradient is defined.

    Examples
    --------
    >>> x, zero, one = torch.tensor([[0.5]]), torch.zeros(1, 1), torch.ones(1)
    >>> base, values, n_levels = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), torch.tensor([2])
    >>> wbdit.ops.count_mean(x, zero, zero, one, one, base, base, values, values[0], n_levels)
    tensor([[0.5000]])
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
        As in :func:`count_mean`. Gradients flow to `log_odds`, `mixture`, `log_base0` and `log_base1` only.
    target
        Observed levels ``(B, G)``, uint8, below the gene's number of levels.

    Returns
    -------
    ``(B, G)`` in nats, fp32, or fp64 if `log_odds` is fp64.

    Examples
    --------
    >>> x, zero, one = torch.tensor([[0.5]]), torch.zeros(1, 1), torch.ones(1)
    >>> base, values, n_levels = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), torch.tensor([2])
    >>> target = torch.tensor([[1]], dtype=torch.uint8)
    >>> wbdit.ops.count_nll(x, zero, zero, one, one, base, base, values, values[0], n_levels, target)  # ln 2
    tensor([[0.6931]])
    """
    return _count_nll(x, log_odds, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels, target)


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
    *,
    rounds: int = 4,
) -> Tensor:
    """Draw counts whose expected sum per cell is the cell's library size.

    The distribution over levels is that of :func:`count_mean`. Its natural parameter is that of a negative binomial,
    ``log_odds = ln(mean / (mean + size))``, here given as ``log_ratio = ln(mean / size)``. All means of a cell are
    multiplied by one factor. Each of the `rounds` multiplies this factor by ``library / sum_g E[count]``, a fixed-point
    iteration. A count is then drawn by inversion (Devroye 1986, Non-Uniform Random Variate Generation, chapter III.2):
    its level is the first one whose cumulative probability reaches `u`. The position of `u` within the level's
    probability gives the position of the count between the level's lowest and highest count.

    Parameters
    ----------
    x, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels
        As in :func:`count_mean`.
    log_ratio
        Logarithms ``(B, G)`` of the ratio of mean to size of each negative binomial, before scaling.
    lowest, highest
        Smallest and largest count of each level ``(L,)``, int32.
    u
        Uniform numbers ``(B, G)``, 0 to 1.
    library
        Library sizes ``(B,)``, above 0.
    rounds
        Iterations of the factor. With 0, the means are not scaled.

    Returns
    -------
    Counts ``(B, G)`` int32. A cell with a NaN in `x`, `log_ratio`, `mixture` or `library` gets the lowest level only.
    No gradient is defined.

    Raises
    ------
    ValueError
        If `x`, `log_ratio`, `mixture` and `u` differ in shape.

    Examples
    --------
    >>> u, zero, one, ten = torch.tensor([[0.1, 0.8]]), torch.zeros(1, 2), torch.ones(1), torch.tensor([10.0])
    >>> base, counts, n_levels = torch.zeros(2, 3), torch.arange(3.0), torch.tensor([3, 3])
    >>> edges = torch.arange(3, dtype=torch.int32)
    >>> tables = one, ten, base, base, base, counts, n_levels, edges, edges
    >>> wbdit.ops.count_draw(zero, zero, zero, *tables, u, library=torch.tensor([1.0]))
    tensor([[0, 1]], dtype=torch.int32)
    """
    if not x.shape == log_ratio.shape == mixture.shape == u.shape:
        raise ValueError("x, log_ratio, mixture and u must have the same shape (cells, genes)")
    tables = alpha, sigma, log_base0, log_base1, values, counts, n_levels, lowest, highest
    drawn, _ = _count_draw(x, log_ratio, mixture, *tables, u, library, rounds)
    return drawn


# on an engine: always in fp32


def _inputs(*given: Tensor) -> list[Tensor]:
    """Return the inputs in order, in fp32 (n_levels in int32): (B, G) with dense rows, all others contiguous."""
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


def _count_draw_on(engine: Any, *given: Any) -> tuple[Tensor, Tensor]:
    *inputs, lowest, highest, u, library, rounds = given
    drawn = torch.empty(u.shape, dtype=torch.int32, device=u.device)
    log_scale = torch.empty(library.shape, device=u.device)
    engine.count_draw(
        *_inputs(*inputs),
        lowest=lowest.to(torch.int32).contiguous(),
        highest=highest.to(torch.int32).contiguous(),
        u=dense_rows(u.float()),
        library=library.float().contiguous(),
        drawn=drawn,
        log_scale=log_scale,
        rounds=rounds,
    )
    return drawn, log_scale


def _takers(*given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the inputs that receive gradients: log_odds, mixture, log_base0, log_base1."""
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

_count_draw = define_op(
    "count_draw",
    f"({SCHEMA.replace('log_odds', 'log_ratio')}, Tensor lowest, Tensor highest, Tensor u, Tensor library, int rounds)"
    " -> (Tensor, Tensor)",  # the counts, and the logarithm of each cell's factor
    reference.count_draw,
    fake=lambda x, log_ratio, *rest: (
        x.new_empty(x.shape, dtype=torch.int32),
        x.new_empty(x.shape[:1], dtype=reference.accumulation_dtype(log_ratio.dtype)),
    ),
    on_engine=_count_draw_on,
)


# gradient


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dnll: Tensor) -> tuple[Tensor | None, ...]:
    dlog_odds, dmixture, dlog_base0, dlog_base1 = _count_nll_backward(dnll, *ctx.saved_tensors)
    return None, dlog_odds, dmixture, None, None, dlog_base0, dlog_base1, *(None,) * 4


_count_nll.register_autograd(_gradient, setup_context=_keep)
