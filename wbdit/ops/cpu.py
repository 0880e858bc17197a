"""The ops' CPU kernels: what PyTorch's dispatcher calls, and what goes to C++ from there.

Products of matrices stay with PyTorch; the kernels of csrc/ do what stands between them. They take fp32 and bf16; for
other types, and where they cannot be built, the reference runs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wbdit.errors import InputError
from wbdit.ops import build, reference
from wbdit.ops.backend import register_kernel

TYPES = (torch.float32, torch.bfloat16)
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def processor_level() -> str:
    """Return the instruction set that the kernels use, one of :data:`LEVELS`; "none" where they cannot be built.

    Raises
    ------
    InputError
        If the environment variable ``WBDIT_CPU``, which may hold it to a lower one, names none.
    """
    wanted = os.environ.get("WBDIT_CPU")
    if wanted not in (None, *LEVELS):
        raise InputError(f"no processor level WBDIT_CPU={wanted}: choose one of {', '.join(LEVELS)}")
    return LEVELS[torch.ops.wbdit_csrc.processor_level()] if build.available() else "none"


def has_fast_bf16() -> bool:
    """Whether bf16 is worth computing in here: the processor multiplies it, and the kernels are there."""
    return processor_level() in ("avx512_bf16", "amx")


def register() -> None:
    """Enter the kernels of this module for tensors on a CPU."""
    for kernel in (
        *(adaln, adaln_backward, gated_adaln, gated_adaln_, gated_adaln_backward),
        *(mssa, mssa_backward, fold, fold_backward, ista, ista_backward),
        *(ista_adaln, ista_adaln_, ista_adaln_backward, noising, sampler_step, normal),
    ):
        register_kernel(kernel.__name__, "cpu", "csrc")(_where_it_fits(kernel))


def _where_it_fits(kernel: Callable[..., Any]) -> Callable[..., Any]:
    fallback = getattr(reference, kernel.__name__)

    @functools.wraps(kernel)
    def kernel_or_reference(*args: Any) -> Any:
        fits = all(a.dtype in TYPES or not a.is_floating_point() for a in args if isinstance(a, Tensor))
        return (kernel if fits and build.available() else fallback)(*args)

    return kernel_or_reference


def _rows(modulation: Tensor) -> Tensor:
    """Return (B, d) with dense rows, any distance apart: slices of one table, or one row for all, are no copies."""
    return modulation if modulation.stride(-1) == 1 else modulation.contiguous()


# adaptive layer norm, and the residual before it


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    if dtype not in (None, *TYPES):
        return reference.adaln(x, shift, scale, eps, dtype)
    z = torch.empty(x.shape, dtype=dtype or x.dtype)
    torch.ops.wbdit_csrc.residual_adaln(
        x.contiguous(), None, None, None, None, _rows(shift), _rows(scale), None, z, 0.0, 0.0, eps
    )
    return z


def adaln_backward(dz: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dx, dshift, dscale = torch.empty(x.shape, dtype=x.dtype), _like(shift), _like(scale)
    torch.ops.wbdit_csrc.residual_adaln_backward(
        *(dz.contiguous(), None, x.contiguous(), None, None, None, None, _rows(scale)),
        *(dx, None, None, dshift, dscale, None, 0.0, 0.0, eps),
    )
    return dx, dshift, dscale


def gated_adaln(
    x: Tensor, out: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x_new, z_new = _like(x), _like(out)
    torch.ops.wbdit_csrc.residual_adaln(
        *(x.contiguous(), out.contiguous(), bias, None, _rows(gate), _rows(shift), _rows(scale)),
        *(x_new, z_new, 0.0, 0.0, eps),
    )
    return x_new, z_new


def gated_adaln_(
    x: Tensor, out: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> None:
    if not (x.is_contiguous() and out.is_contiguous()):
        return reference.gated_adaln_(x, out, bias, gate, shift, scale, eps)
    torch.ops.wbdit_csrc.residual_adaln(
        x, out, bias, None, _rows(gate), _rows(shift), _rows(scale), x, out, 0.0, 0.0, eps
    )
    return None


def gated_adaln_backward(
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
    dx, dout, dgate, dshift, dscale = _like(x_new), _like(out), _like(gate), _like(shift), _like(scale)
    dbias = None if bias is None else torch.empty(x_new.shape[0], x_new.shape[2])
    torch.ops.wbdit_csrc.residual_adaln_backward(
        *(dz_new.contiguous(), None if dx_new is None else dx_new.contiguous(), x_new, out.contiguous(), bias, None),
        *(_rows(gate), _rows(scale), dx, dout, dgate, dshift, dscale, dbias, 0.0, 0.0, eps),
    )
    if bias is None or dbias is None:
        return dx, dout, torch.empty(0), dgate, dshift, dscale
    return dx, dout, dbias.sum(0).to(bias.dtype), dgate, dshift, dscale


# multi-head subspace self-attention


def mssa(w: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    out, lse = _like(w), torch.empty(w.shape[0], heads, w.shape[1])
    torch.ops.wbdit_csrc.mssa(w.contiguous(), out, lse)
    return out, lse


def mssa_backward(dout: Tensor, w: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
    dw = _like(w)
    torch.ops.wbdit_csrc.mssa_backward(dout.contiguous(), w.contiguous(), out, lse, dw)
    return dw


# iterative shrinkage-thresholding


def fold(dictionary: Tensor) -> Tensor:
    return torch.addmm(dictionary, dictionary.mT, dictionary, alpha=-1)


def fold_backward(dfolded: Tensor, dictionary: Tensor) -> Tensor:
    return torch.addmm(dfolded, dictionary, dfolded + dfolded.mT, alpha=-1)


def ista(z: Tensor, folded: Tensor, eta: float, lam: float) -> Tensor:
    out = _like(z)
    torch.ops.wbdit_csrc.shrink(z.contiguous(), z.to(folded.dtype) @ folded, out, eta, lam)
    return out


def ista_backward(dout: Tensor, out: Tensor, z: Tensor, folded: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    g = _like(dout)
    torch.ops.wbdit_csrc.shrink_backward(dout.contiguous(), out.contiguous(), g)
    return _through_product(g, z, folded, eta)


def _through_product(g: Tensor, z: Tensor, folded: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of z and F, given that of z + eta z F."""
    flat, low = g.flatten(0, -2), g.flatten(0, -2).to(folded.dtype)
    if folded.dtype == torch.float32:
        # one product with 1 + eta F and no pass over g: in fp32 the identity may go into it
        step = folded.mul(eta)
        step.diagonal().add_(1)
        dz = (low @ step.mT).to(flat.dtype)
    elif flat.dtype == folded.dtype:
        dz = torch.addmm(flat, low, folded.mT, alpha=eta)
    else:
        dz = flat.add((low @ folded.mT).to(flat.dtype), alpha=eta)
    dfolded = (z.flatten(0, -2).to(folded.dtype).mT @ low).mul_(eta)
    return dz.view(g.shape), dfolded


def ista_adaln(
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
    x_new, z_new = _like(x), _like(z)
    torch.ops.wbdit_csrc.residual_adaln(
        *(x.contiguous(), product.to(z.dtype), None, z.contiguous(), _rows(gate), _rows(shift), _rows(scale)),
        *(x_new, z_new, eta, lam, eps),
    )
    return x_new, z_new, product


def ista_adaln_(
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
        return reference.ista_adaln_(x, z, folded, gate, shift, scale, eta, lam, eps)
    product = (z.to(folded.dtype) @ folded).to(z.dtype)
    torch.ops.wbdit_csrc.residual_adaln(
        x, product, None, z, _rows(gate), _rows(shift), _rows(scale), x, z, eta, lam, eps
    )
    return None


def ista_adaln_backward(
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
    dx, g, dgate, dshift, dscale = _like(x_new), _like(z), _like(gate), _like(shift), _like(scale)
    torch.ops.wbdit_csrc.residual_adaln_backward(
        *(dz_new.contiguous(), None if dx_new is None else dx_new.contiguous(), x_new),
        *(product.to(z.dtype), None, z.contiguous()),
        *(_rows(gate), _rows(scale), dx, g, dgate, dshift, dscale, None, eta, lam, eps),
    )
    return dx, *_through_product(g, z, folded, eta), dgate, dshift, dscale


# the noise schedule's updates, and noise by its address


def noising(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    xt = _like(x0)
    torch.ops.wbdit_csrc.noising(x0.contiguous(), noise.contiguous(), alpha.float(), sigma.float(), xt)
    return xt


def sampler_step(
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
    new = _like(x)
    terms = (None if term is None else term.contiguous() for term in (x, out, previous, earlier, noise, samples))
    lowest = -torch.inf if clamp_min is None else clamp_min
    torch.ops.wbdit_csrc.sampler_step(*terms, new, a, b, c, d, e, lowest, seed, step)
    return new


def normal(seed: int, samples: Tensor, step: int, length: int) -> Tensor:
    out = torch.empty(samples.shape[0], length)
    torch.ops.wbdit_csrc.normal(samples.to(torch.int64).contiguous(), out, seed, step)
    return out


def _like(t: Tensor) -> Tensor:
    """Return fresh dense memory of a tensor's shape and type."""
    return torch.empty(t.shape, dtype=t.dtype)
