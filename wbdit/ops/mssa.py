"""Multi-head subspace self-attention (MSSA): one projection is query, key and value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wbdit.ops import reference
from wbdit.ops.dispatch import define_op
from wbdit.ops.layout import fresh


def mssa(w: Tensor, heads: int) -> Tensor:
    """Compute multi-head subspace self-attention (Yu et al. 2023, CRATE).

    Each head returns ``softmax(w w^T / sqrt(p)) w``. The projection `w`, the tokens' coordinates in the head's
    subspace, is query, key and value.

    Parameters
    ----------
    w
        Projected tokens ``(B, N, h * p)``, floating; the last dimension concatenates the heads.
    heads
        Number of heads h; must divide the last dimension.

    Returns
    -------
    ``(B, N, h * p)`` in the dtype of `w`.

    Examples
    --------
    >>> wbdit.ops.mssa(torch.randn(2, 5, 8), heads=4).shape
    torch.Size([2, 5, 8])
    >>> w = torch.ones(1, 3, 2)  # equal tokens stay as they are
    >>> torch.allclose(wbdit.ops.mssa(w, heads=1), w)
    True
    """
    return _mssa(w, heads)[0]


# on an engine


def _mssa_on(engine: Any, w: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    out, lse = fresh(w), w.new_empty((w.shape[0], heads, w.shape[1]), dtype=torch.float32)
    engine.mssa(w.contiguous(), out=out, lse=lse)
    return out, lse


def _mssa_backward_on(engine: Any, dout: Tensor, w: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
    dw = fresh(w)
    engine.mssa_backward(dout.contiguous(), w.contiguous(), out, lse, dw=dw)
    return dw


# the ops


def _fake_mssa(w: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    wide = reference.accumulation_dtype(w.dtype)
    return torch.empty_like(w), w.new_empty((w.shape[0], heads, w.shape[1]), dtype=wide)


_mssa = define_op(
    "mssa", "(Tensor w, int heads) -> (Tensor, Tensor)", reference.mssa, fake=_fake_mssa, on_engine=_mssa_on
)
_mssa_backward = define_op(
    "mssa_backward",
    "(Tensor dout, Tensor w, Tensor out, Tensor lse, int heads) -> Tensor",
    reference.mssa_backward,
    fake=lambda dout, w, out, lse, heads: torch.empty_like(w),
    on_engine=_mssa_backward_on,
)


# gradient


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.heads = inputs[1]


def _gradient(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    return _mssa_backward(dout, *ctx.saved_tensors, ctx.heads), None


_mssa.register_autograd(_gradient, setup_context=_keep)
