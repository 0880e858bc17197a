"""One step of iterative shrinkage-thresholding (ISTA), alone or fused with the gated residual and the adaptive norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wbdit.ops import reference
from wbdit.ops.dispatch import define_op
from wbdit.ops.layout import dense, dense_rows, fresh

STEP = "Tensor folded, Tensor gate, Tensor shift, Tensor scale, float eta, float lam, float eps"


def fold(dictionary: Tensor) -> Tensor:
    """Return the folded dictionary ``F = D - D^T D`` of :func:`ista`.

    Parameters
    ----------
    dictionary
        Dictionary D ``(d, d)``, floating.

    Returns
    -------
    ``(d, d)`` in the dtype of `dictionary`.

    Examples
    --------
    >>> wbdit.ops.fold(2 * torch.eye(2))
    tensor([[-2.,  0.],
            [ 0., -2.]])
    """
    return _fold(dictionary)


def ista(z: Tensor, folded: Tensor, eta: float = 0.1, lam: float = 0.1) -> Tensor:
    """Compute one step of iterative shrinkage-thresholding: ``relu(z + eta z F - eta lam)``.

    With ``F = D - D^T D`` this equals the published ``relu(z + eta (z D - z D^T D) - eta lam)`` (Yu et al. 2023,
    CRATE), but needs one matrix product.

    Parameters
    ----------
    z
        Tokens ``(..., d)``, floating.
    folded
        Folded dictionary F ``(d, d)``, from :func:`fold`. The matrix product is computed in its dtype.
    eta, lam
        Step size and sparsity penalty.

    Returns
    -------
    ``(..., d)`` in the dtype of `z`, non-negative.

    Examples
    --------
    >>> z, folded = torch.tensor([[-1.0, 0.5, 2.0]]), torch.zeros(3, 3)
    >>> wbdit.ops.ista(z, folded, eta=0.5, lam=2.0)  # soft threshold at 1
    tensor([[0., 0., 1.]])
    """
    return _ista(z, folded, eta, lam)


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
    """Compute the sparsifying half-step of a block: :func:`wbdit.ops.gated_adaln` with :func:`ista` as its update.

    Parameters
    ----------
    x
        Residual stream ``(B, N, d)``, floating.
    z
        Modulated norm of `x` ``(B, N, d)``, floating.
    folded, eta, lam
        As in :func:`ista`.
    gate, shift, scale, eps
        As in :func:`wbdit.ops.gated_adaln`.

    Returns
    -------
    ``x' = x + gate * relu(z + eta z F - eta lam)`` in the dtype of `x`, and :func:`wbdit.ops.adaln` of ``x'`` in the
    dtype of `z`.

    Examples
    --------
    >>> x, z, folded = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]]]), torch.zeros(2, 2)
    >>> gate, shift, scale = torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2)
    >>> x_new, z_new = wbdit.ops.ista_adaln(x, z, folded, gate, shift, scale, eta=0.5, lam=1.0)
    >>> x_new
    tensor([[[0.5000, 2.5000]]])
    """
    x_new, z_new, _ = _ista_adaln(x, z, folded, gate, shift, scale, eta, lam, eps)
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
    """Compute :func:`ista_adaln` in place: `x` and `z` are overwritten with its two results.

    Parameters
    ----------
    x, z, folded, gate, shift, scale, eta, lam, eps
        As in :func:`ista_adaln`.

    Returns
    -------
    `x` and `z` themselves. No gradient is defined.

    Examples
    --------
    >>> x, z, folded = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]]]), torch.zeros(2, 2)
    >>> gate, shift, scale = torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2)
    >>> _ = wbdit.ops.ista_adaln_(x, z, folded, gate, shift, scale, eta=0.5, lam=1.0)
    >>> x
    tensor([[[0.5000, 2.5000]]])
    """
    _ista_adaln_(x, z, folded, gate, shift, scale, eta, lam, eps)
    return x, z


# on an engine: PyTorch's matrix products, with one fused pass between two of them


def _fold_on(engine: Any, dictionary: Tensor) -> Tensor:
    return torch.addmm(dictionary, dictionary.mT, dictionary, alpha=-1)


def _fold_backward_on(engine: Any, dfolded: Tensor, dictionary: Tensor) -> Tensor:
    return torch.addmm(dfolded, dictionary, dfolded + dfolded.mT, alpha=-1)


def _ista_on(engine: Any, z: Tensor, folded: Tensor, eta: float, lam: float) -> Tensor:
    out = fresh(z)
    engine.shrink(z.contiguous(), z.to(folded.dtype) @ folded, out=out, eta=eta, lam=lam)
    return out


def _ista_backward_on(
    engine: Any, dout: Tensor, out: Tensor, z: Tensor, folded: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    g = fresh(dout)
    engine.shrink_backward(dout.contiguous(), out.contiguous(), dz=g)
    return _through_product(g, z, folded, eta)


def _through_product(g: Tensor, z: Tensor, folded: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of z and F, given the gradient of z + eta z F."""
    flat, low = g.flatten(0, -2), g.flatten(0, -2).to(folded.dtype)
    if folded.dtype == torch.float32 and not folded.is_cuda:
        # one product with 1 + eta F saves a pass over g; in bf16, or in TF32 on a GPU, it would round g itself
        step = folded.mul(eta)
        step.diagonal().add_(1)
        dz = (low @ step.mT).to(flat.dtype)
    elif flat.dtype == folded.dtype:
        dz = torch.addmm(flat, low, folded.mT, alpha=eta)
    else:
        dz = flat.add((low @ folded.mT).to(flat.dtype), alpha=eta)
    dfolded = (z.flatten(0, -2).to(folded.dtype).mT @ low).mul_(eta)
    return dz.view(g.shape), dfolded


def _ista_adaln_on(
    engine: Any,
    x: Tensor,
    z: Tensor,
    folded: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eta: float,
    lam: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    product = z.to(folded.dtype) @ folded
    x_new, z_new = fresh(x), fresh(z)
    out, tokens, modulation = product.to(z.dtype), z.contiguous(), _modulation(gate, shift, scale)
    engine.residual_adaln(
        x.contiguous(), out=out, z=tokens, **modulation, x_new=x_new, z_new=z_new, eta=eta, lam=lam, eps=eps
    )
    return x_new, z_new, product


def _ista_adaln_on_(
    engine: Any,
    x: Tensor,
    z: Tensor,
    folded: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eta: float,
    lam: float,
    eps: float,
) -> None:
    if not (x.is_contiguous() and z.is_contiguous()):
        reference.ista_adaln_(x, z, folded, gate, shift, scale, eta, lam, eps)
        return
    out, modulation = (z.to(folded.dtype) @ folded).to(z.dtype), _modulation(gate, shift, scale)
    engine.residual_adaln(x, out=out, z=z, **modulation, x_new=x, z_new=z, eta=eta, lam=lam, eps=eps)


def _ista_adaln_backward_on(
    engine: Any,
    dx_new: Tensor | None,
    dz_new: Tensor,
    x_new: Tensor,
    z: Tensor,
    product: Tensor,
    folded: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eta: float,
    lam: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, g, dgate, dshift, dscale = fresh(x_new), fresh(z), fresh(gate), fresh(shift), fresh(scale)
    engine.residual_adaln_backward(
        dz_new.contiguous(),
        x_new,
        dx_new=dense(dx_new),
        out=product.to(z.dtype),
        z=z.contiguous(),
        gate=dense_rows(gate),
        scale=dense_rows(scale),
        dx=dx,
        dout=g,
        dgate=dgate,
        dshift=dshift,
        dscale=dscale,
        eta=eta,
        lam=lam,
        eps=eps,
    )
    return dx, *_through_product(g, z, folded, eta), dgate, dshift, dscale


def _modulation(gate: Tensor, shift: Tensor, scale: Tensor) -> dict[str, Tensor]:
    return {"gate": dense_rows(gate), "shift": dense_rows(shift), "scale": dense_rows(scale)}


# the ops

_fold = define_op("fold", "(Tensor dictionary) -> Tensor", reference.fold, fake=torch.empty_like, on_engine=_fold_on)
_fold_backward = define_op(
    "fold_backward",
    "(Tensor dfolded, Tensor dictionary) -> Tensor",
    reference.fold_backward,
    fake=lambda dfolded, dictionary: torch.empty_like(dictionary),
    on_engine=_fold_backward_on,
)
_ista = define_op(
    "ista",
    "(Tensor z, Tensor folded, float eta, float lam) -> Tensor",
    reference.ista,
    fake=lambda z, folded, eta, lam: torch.empty_like(z),
    on_engine=_ista_on,
)
_ista_backward = define_op(
    "ista_backward",
    "(Tensor dout, Tensor out, Tensor z, Tensor folded, float eta) -> (Tensor, Tensor)",
    reference.ista_backward,
    fake=lambda dout, out, z, folded, eta: (torch.empty_like(z), torch.empty_like(folded)),
    on_engine=_ista_backward_on,
)
_ista_adaln = define_op(
    "ista_adaln",
    f"(Tensor x, Tensor z, {STEP}) -> (Tensor, Tensor, Tensor)",
    reference.ista_adaln,
    fake=lambda x, z, folded, *rest: (
        torch.empty_like(x),
        torch.empty_like(z),
        torch.empty_like(z, dtype=folded.dtype),
    ),
    on_engine=_ista_adaln_on,
)
_ista_adaln_ = define_op(
    "ista_adaln_",
    f"(Tensor(a!) x, Tensor(b!) z, {STEP}) -> ()",
    reference.ista_adaln_,
    fake=lambda *args: None,
    on_engine=_ista_adaln_on_,
    mutates=("x", "z"),
)
_ista_adaln_backward = define_op(
    "ista_adaln_backward",
    f"(Tensor? dx_new, Tensor dz_new, Tensor x_new, Tensor z, Tensor product, {STEP}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.ista_adaln_backward,
    fake=lambda dx_new, dz_new, x_new, z, product, *rest: tuple(map(torch.empty_like, (x_new, z, *rest[:4]))),
    on_engine=_ista_adaln_backward_on,
)


# gradients


def _keep_fold(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _fold_gradient(ctx: Any, dfolded: Tensor) -> Tensor:
    return _fold_backward(dfolded, *ctx.saved_tensors)


def _keep_ista(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[:2])
    ctx.eta = inputs[2]


def _ista_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *_ista_backward(dout, *ctx.saved_tensors, ctx.eta), None, None


def _keep_ista_adaln(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, *others, eta, lam, eps = inputs
    ctx.save_for_backward(output[0], output[2], *others)
    ctx.mark_non_differentiable(output[2])
    ctx.scalars = eta, lam, eps
    ctx.set_materialize_grads(False)


def _ista_adaln_gradient(
    ctx: Any, dx_new: Tensor | None, dz_new: Tensor | None, _dproduct: Tensor | None
) -> tuple[Tensor | None, ...]:
    x_new, product, z, *others = ctx.saved_tensors
    dz_new = torch.zeros_like(z) if dz_new is None else dz_new
    return *_ista_adaln_backward(dx_new, dz_new, x_new, z, product, *others, *ctx.scalars), None, None, None


_fold.register_autograd(_fold_gradient, setup_context=_keep_fold)
_ista.register_autograd(_ista_gradient, setup_context=_keep_ista)
_ista_adaln.register_autograd(_ista_adaln_gradient, setup_context=_keep_ista_adaln)
