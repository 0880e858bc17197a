"""Adaptive layer norm, alone or fused with the gated residual update before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wbdit.ops import reference
from wbdit.ops.dispatch import define_op
from wbdit.ops.layout import TYPES, dense, dense_rows, fresh

MODULATION = "Tensor gate, Tensor shift, Tensor scale"


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None) -> Tensor:
    """Normalize each token and modulate it: ``LN(x) * (1 + scale) + shift`` (Peebles and Xie 2023, DiT).

    Parameters
    ----------
    x
        Tokens ``(B, N, d)``, floating.
    shift, scale
        Modulation ``(B, d)``, one row per sample.
    eps
        Added to the variance.
    dtype
        Dtype of the result, usually that of the following matrix product. The default is the dtype of `x`.

    Returns
    -------
    ``(B, N, d)``.

    Examples
    --------
    >>> x = torch.tensor([[[1.0, 3.0]]])
    >>> shift, scale = torch.zeros(1, 2), torch.ones(1, 2)
    >>> wbdit.ops.adaln(x, shift, scale)
    tensor([[[-2.0000,  2.0000]]])
    """
    return _adaln(x, shift, scale, eps, dtype)


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
    """Add a gated update to the residual stream, then normalize and modulate it (Peebles and Xie 2023, DiT).

    This fuses all elementwise work between two matrix products of a block.

    Parameters
    ----------
    x
        Residual stream ``(B, N, d)``, floating.
    out
        Update ``(B, N, d)``, floating: the output of the half-step.
    gate, shift, scale
        Modulation ``(B, d)``, one row per sample.
    eps
        Added to the variance.
    bias
        Bias ``(d,)`` of the half-step's last linear map. Adding it here saves a pass over memory.

    Returns
    -------
    ``x' = x + gate * (out + bias)`` in the dtype of `x`, and :func:`adaln` of ``x'`` in the dtype of `out`.

    Examples
    --------
    >>> x, out = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]]])
    >>> gate, shift, scale = torch.full((1, 2), 0.5), torch.zeros(1, 2), torch.zeros(1, 2)
    >>> x_new, z_new = wbdit.ops.gated_adaln(x, out, gate, shift, scale)
    >>> x_new
    tensor([[[0.5000, 1.5000]]])
    """
    return _gated_adaln(x, out, bias, gate, shift, scale, eps)


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
    """Compute :func:`gated_adaln` in place: `x` and `out` are overwritten with its two results.

    Parameters
    ----------
    x, out, gate, shift, scale, eps, bias
        As in :func:`gated_adaln`.

    Returns
    -------
    `x` and `out` themselves. No gradient is defined.

    Examples
    --------
    >>> x, out = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]]])
    >>> gate, shift, scale = torch.full((1, 2), 0.5), torch.zeros(1, 2), torch.zeros(1, 2)
    >>> _ = wbdit.ops.gated_adaln_(x, out, gate, shift, scale)
    >>> x
    tensor([[[0.5000, 1.5000]]])
    """
    _gated_adaln_(x, out, bias, gate, shift, scale, eps)
    return x, out


# on an engine


def _adaln_on(
    engine: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    if dtype not in (None, *TYPES):
        return reference.adaln(x, shift, scale, eps, dtype)
    z = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    engine.residual_adaln(x.contiguous(), shift=dense_rows(shift), scale=dense_rows(scale), z_new=z, eps=eps)
    return z


def _adaln_backward_on(
    engine: Any, dz: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dshift, dscale = fresh(x), fresh(shift), fresh(scale)
    engine.residual_adaln_backward(
        *(dz.contiguous(), x.contiguous()), scale=dense_rows(scale), dx=dx, dshift=dshift, dscale=dscale, eps=eps
    )
    return dx, dshift, dscale


def _gated_adaln_on(
    engine: Any, x: Tensor, out: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x_new, z_new = fresh(x), fresh(out)
    _gate(engine, x.contiguous(), out.contiguous(), bias, gate, shift, scale, eps, x_new, z_new)
    return x_new, z_new


def _gated_adaln_on_(
    engine: Any, x: Tensor, out: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> None:
    if x.is_contiguous() and out.is_contiguous():
        _gate(engine, x, out, bias, gate, shift, scale, eps, x, out)
    else:
        reference.gated_adaln_(x, out, bias, gate, shift, scale, eps)


def _gate(
    engine: Any,
    x: Tensor,
    out: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    x_new: Tensor,
    z_new: Tensor,
) -> None:
    engine.residual_adaln(
        x,
        out=out,
        bias=dense(bias),
        gate=dense_rows(gate),
        shift=dense_rows(shift),
        scale=dense_rows(scale),
        x_new=x_new,
        z_new=z_new,
        eps=eps,
    )


def _gated_adaln_backward_on(
    engine: Any,
    dx_new: Tensor | None,
    dz_new: Tensor,
    x_new: Tensor,
    out: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dout, dgate, dshift, dscale = fresh(x_new), fresh(out), fresh(gate), fresh(shift), fresh(scale)
    dbias = None if bias is None else x_new.new_empty((x_new.shape[0], x_new.shape[2]), dtype=torch.float32)
    engine.residual_adaln_backward(
        dz_new.contiguous(),
        x_new,
        dx_new=dense(dx_new),
        out=out.contiguous(),
        bias=dense(bias),
        gate=dense_rows(gate),
        scale=dense_rows(scale),
        dx=dx,
        dout=dout,
        dgate=dgate,
        dshift=dshift,
        dscale=dscale,
        dbias=dbias,
        eps=eps,
    )
    if bias is None or dbias is None:
        return dx, dout, x_new.new_empty(0), dgate, dshift, dscale
    return dx, dout, dbias.sum(0).to(bias.dtype), dgate, dshift, dscale


# shapes and types


def _fake_gated_adaln_backward(
    dx_new: Tensor | None,
    dz_new: Tensor,
    x_new: Tensor,
    out: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    dbias = x_new.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(x_new), torch.empty_like(out), dbias, *map(torch.empty_like, (gate, shift, scale))


# the ops

_adaln = define_op(
    "adaln",
    "(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType? dtype=None) -> Tensor",
    reference.adaln,
    fake=lambda x, shift, scale, eps, dtype=None: torch.empty_like(x, dtype=dtype),
    on_engine=_adaln_on,
)
_adaln_backward = define_op(
    "adaln_backward",
    "(Tensor dz, Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    reference.adaln_backward,
    fake=lambda dz, x, shift, scale, eps: tuple(map(torch.empty_like, (x, shift, scale))),
    on_engine=_adaln_backward_on,
)
_gated_adaln = define_op(
    "gated_adaln",
    f"(Tensor x, Tensor out, Tensor? bias, {MODULATION}, float eps) -> (Tensor, Tensor)",
    reference.gated_adaln,
    fake=lambda x, out, *rest: (torch.empty_like(x), torch.empty_like(out)),
    on_engine=_gated_adaln_on,
)
_gated_adaln_ = define_op(
    "gated_adaln_",
    f"(Tensor(a!) x, Tensor(b!) out, Tensor? bias, {MODULATION}, float eps) -> ()",
    reference.gated_adaln_,
    fake=lambda *args: None,
    on_engine=_gated_adaln_on_,
    mutates=("x", "out"),
)
_gated_adaln_backward = define_op(
    "gated_adaln_backward",
    f"(Tensor? dx_new, Tensor dz_new, Tensor x_new, Tensor out, Tensor? bias, {MODULATION}, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.gated_adaln_backward,
    fake=_fake_gated_adaln_backward,
    on_engine=_gated_adaln_backward_on,
)


# gradients


def _keep_adaln(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _adaln_gradient(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    return *_adaln_backward(dz, *ctx.saved_tensors, ctx.eps), None, None


def _keep_gated_adaln(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, *others, eps = inputs
    ctx.save_for_backward(output[0], *others)
    ctx.eps = eps
    ctx.set_materialize_grads(False)  # the last block's x' is unused: None saves reading zeros


def _gated_adaln_gradient(ctx: Any, dx_new: Tensor | None, dz_new: Tensor | None) -> tuple[Tensor | None, ...]:
    x_new, out, bias, *modulation = ctx.saved_tensors
    dz_new = torch.zeros_like(out) if dz_new is None else dz_new
    dx, dout, dbias, *rest = _gated_adaln_backward(dx_new, dz_new, x_new, out, bias, *modulation, ctx.eps)
    return dx, dout, None if bias is None else dbias, *rest, None


_adaln.register_autograd(_adaln_gradient, setup_context=_keep_adaln)
_gated_adaln.register_autograd(_gated_adaln_gradient, setup_context=_keep_gated_adaln)
