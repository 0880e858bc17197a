"""The ops on kernels: products by PyTorch, one pass of an engine's between two of them.

An engine is what holds the passes: the C++ library of csrc/ on a CPU, the Triton modules of kernels/ on a GPU. Both
have functions of the same names and arguments, which write to memory given to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wbdit.ops import reference
from wbdit.ops.dispatch import register_kernel

TYPES = (torch.float32, torch.bfloat16)
OPS = (
    *("adaln", "adaln_backward", "gated_adaln", "gated_adaln_", "gated_adaln_backward"),
    *("mssa", "mssa_backward", "fold", "fold_backward", "ista", "ista_backward"),
    *("ista_adaln", "ista_adaln_", "ista_adaln_backward", "run_blocks", "noising", "sampler_step", "normal"),
    *("count_mean", "count_nll", "count_nll_backward"),
)


def register(
    device: str,
    backend: str,
    fused: Fused,
    available: Callable[[], bool],
    fits: Callable[[str, tuple[Any, ...]], bool] = lambda name, args: True,
) -> None:
    """Enter the ops on an engine for tensors of a device type.

    Parameters
    ----------
    device, backend
        "cpu" or "cuda", and the engine's name.
    fused
        The ops on that engine.
    available
        Whether the engine is there.
    fits
        Whether it takes an op's arguments, given the op's name and these; fp32 and bf16 alone reach it. What it does
        not take goes to the reference.
    """
    for name in OPS:
        kernel, fallback = getattr(fused, name), getattr(reference, name)
        register_kernel(name, device, backend, available)(_where_it_fits(name, kernel, fallback, available, fits))


def _where_it_fits(
    name: str,
    kernel: Any,
    fallback: Any,
    available: Callable[[], bool],
    fits: Callable[[str, tuple[Any, ...]], bool],
) -> Any:
    @functools.wraps(fallback)
    def kernel_or_reference(*args: Any) -> Any:
        typed = all(a.dtype in TYPES or not a.is_floating_point() for a in args if isinstance(a, Tensor))
        return (kernel if typed and available() and fits(name, args) else fallback)(*args)

    return kernel_or_reference


class Fused:
    """The ops, taking the arguments of the same-named functions in :mod:`wbdit.ops.reference`.

    Parameters
    ----------
    engine
        What has the passes as attributes: residual_adaln, mssa, shrink, noising, sampler_step, normal, and so on.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    # adaptive layer norm, and the residual before it

    def adaln(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
        if dtype not in (None, *TYPES):
            return reference.adaln(x, shift, scale, eps, dtype)
        z = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
        self.engine.residual_adaln(
            x.contiguous(), None, None, None, None, _rows(shift), _rows(scale), None, z, 0.0, 0.0, eps
        )
        return z

    def adaln_backward(
        self, dz: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, dshift, dscale = _like(x), _like(shift), _like(scale)
        self.engine.residual_adaln_backward(
            *(dz.contiguous(), None, x.contiguous(), None, None, None, None, _rows(scale)),
            *(dx, None, None, dshift, dscale, None, 0.0, 0.0, eps),
        )
        return dx, dshift, dscale

    def gated_adaln(
        self, x: Tensor, out: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x_new, z_new = _like(x), _like(out)
        self.engine.residual_adaln(
            *(x.contiguous(), out.contiguous(), _dense(bias), None, _rows(gate), _rows(shift), _rows(scale)),
            *(x_new, z_new, 0.0, 0.0, eps),
        )
        return x_new, z_new

    def gated_adaln_(
        self, x: Tensor, out: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
    ) -> None:
        if not (x.is_contiguous() and out.is_contiguous()):
            return reference.gated_adaln_(x, out, bias, gate, shift, scale, eps)
        modulation = _rows(gate), _rows(shift), _rows(scale)
        self.engine.residual_adaln(x, out, _dense(bias), None, *modulation, x, out, 0.0, 0.0, eps)
        return None

    def gated_adaln_backward(
        self,
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
        dbias = None if bias is None else x_new.new_empty((x_new.shape[0], x_new.shape[2]), dtype=torch.float32)
        self.engine.residual_adaln_backward(
            *(
                dz_new.contiguous(),
                _dense(dx_new),
                x_new,
                out.contiguous(),
                _dense(bias),
                None,
            ),
            *(_rows(gate), _rows(scale), dx, dout, dgate, dshift, dscale, dbias, 0.0, 0.0, eps),
        )
        if bias is None or dbias is None:
            return dx, dout, x_new.new_empty(0), dgate, dshift, dscale
        return dx, dout, dbias.sum(0).to(bias.dtype), dgate, dshift, dscale

    # multi-head subspace self-attention

    def mssa(self, w: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        out, lse = _like(w), w.new_empty((w.shape[0], heads, w.shape[1]), dtype=torch.float32)
        self.engine.mssa(w.contiguous(), out, lse)
        return out, lse

    def mssa_backward(self, dout: Tensor, w: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
        dw = _like(w)
        self.engine.mssa_backward(dout.contiguous(), w.contiguous(), out, lse, dw)
        return dw

    # iterative shrinkage-thresholding

    def fold(self, dictionary: Tensor) -> Tensor:
        return torch.addmm(dictionary, dictionary.mT, dictionary, alpha=-1)

    def fold_backward(self, dfolded: Tensor, dictionary: Tensor) -> Tensor:
        return torch.addmm(dfolded, dictionary, dfolded + dfolded.mT, alpha=-1)

    def ista(self, z: Tensor, folded: Tensor, eta: float, lam: float) -> Tensor:
        out = _like(z)
        self.engine.shrink(z.contiguous(), z.to(folded.dtype) @ folded, out, eta, lam)
        return out

    def ista_backward(self, dout: Tensor, out: Tensor, z: Tensor, folded: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        g = _like(dout)
        self.engine.shrink_backward(dout.contiguous(), out.contiguous(), g)
        return self._through_product(g, z, folded, eta)

    def _through_product(self, g: Tensor, z: Tensor, folded: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """Return the gradients of z and F, given that of z + eta z F."""
        flat, low = g.flatten(0, -2), g.flatten(0, -2).to(folded.dtype)
        if folded.dtype == torch.float32 and not folded.is_cuda:
            # one product with 1 + eta F and no pass over g: in fp32, and not in tf32, the identity may go into it
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
        self,
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
        self.engine.residual_adaln(
            *(x.contiguous(), product.to(z.dtype), None, z.contiguous(), _rows(gate), _rows(shift), _rows(scale)),
            *(x_new, z_new, eta, lam, eps),
        )
        return x_new, z_new, product

    def ista_adaln_(
        self,
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
        self.engine.residual_adaln(x, product, None, z, _rows(gate), _rows(shift), _rows(scale), x, z, eta, lam, eps)
        return None

    def ista_adaln_backward(
        self,
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
        self.engine.residual_adaln_backward(
            *(dz_new.contiguous(), _dense(dx_new), x_new),
            *(product.to(z.dtype), None, z.contiguous()),
            *(_rows(gate), _rows(scale), dx, g, dgate, dshift, dscale, None, eta, lam, eps),
        )
        return dx, *self._through_product(g, z, folded, eta), dgate, dshift, dscale

    # all blocks, one after another

    def run_blocks(
        self,
        x: Tensor,
        modulations: list[Tensor],
        projections: list[Tensor],
        outs: list[Tensor],
        biases: list[Tensor],
        folded: list[Tensor],
        heads: int,
        eta: float,
        lam: float,
        eps: float,
    ) -> Tensor:
        z = self.adaln(x, modulations[0], modulations[1], eps, folded[0].dtype)
        x = x.clone(memory_format=torch.contiguous_format)  # the half-steps are taken in place
        for block, (projection, out, bias, dictionary) in enumerate(
            zip(projections, outs, biases, folded, strict=True)
        ):
            _, _, gate1, shift2, scale2, gate2, shift, scale = modulations[6 * block : 6 * block + 8]
            z = self.mssa(z @ projection.mT, heads)[0] @ out.mT
            self.gated_adaln_(x, z, bias, gate1, shift2, scale2, eps)
            self.ista_adaln_(x, z, dictionary, gate2, shift, scale, eta, lam, eps)
        return z

    # the noise schedule's updates, and noise by its address

    def noising(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        xt = _like(x0)
        self.engine.noising(x0.contiguous(), noise.contiguous(), alpha.float(), sigma.float(), xt)
        return xt

    def sampler_step(
        self,
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
        terms = map(_dense, (x, out, previous, earlier, noise))
        lowest = -torch.inf if clamp_min is None else clamp_min
        self.engine.sampler_step(*terms, _samples(samples), new, a, b, c, d, e, lowest, seed, step)
        return new

    def normal(self, seed: int, samples: Tensor, step: int, length: int) -> Tensor:
        out = torch.empty(samples.shape[0], length, device=samples.device)
        self.engine.normal(_samples(samples), out, seed, step)
        return out

    # counts of a few levels a gene: always in fp32

    def count_mean(self, x: Tensor, eta: Tensor, weight: Tensor, *given: Tensor) -> Tensor:
        mean = torch.empty(eta.shape, device=eta.device)
        self.engine.count_mean(*_counts(x, eta, weight, *given), mean)
        return mean

    def count_nll(self, x: Tensor, eta: Tensor, weight: Tensor, *given: Tensor) -> Tensor:
        *tables, target = given
        nll = torch.empty(eta.shape, device=eta.device)
        self.engine.count_nll(*_counts(x, eta, weight, *tables), target.contiguous(), nll)
        return nll

    def count_nll_backward(
        self, dnll: Tensor, x: Tensor, eta: Tensor, weight: Tensor, *given: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *tables, target = given
        takers = eta, weight, *tables[2:4]
        deta, dweight, dbase0, dbase1 = grads = [torch.empty(t.shape, device=t.device) for t in takers]
        counts = _counts(x, eta, weight, *tables)
        self.engine.count_nll_backward(_rows(dnll.float()), *counts, target.contiguous(), *grads)
        return deta.to(eta.dtype), dweight.to(weight.dtype), dbase0.to(tables[2].dtype), dbase1.to(tables[3].dtype)


def _counts(x: Tensor, eta: Tensor, weight: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    """Return the arguments of the counts' ops in fp32, (B, G) by rows and all else dense, the sizes as int32."""
    *floats, sizes = tables
    dense = (t.float().contiguous() for t in floats)
    return *(_rows(t.float()) for t in (x, eta, weight)), *dense, sizes.to(torch.int32).contiguous()


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _samples(samples: Tensor | None) -> Tensor | None:
    """Return sample numbers as the engines read them: dense int64."""
    return None if samples is None else samples.to(torch.int64).contiguous()


def _rows(modulation: Tensor) -> Tensor:
    """Return (B, d) with dense rows, any distance apart: slices of one table, or one row for all, are no copies."""
    return modulation if modulation.stride(-1) == 1 else modulation.contiguous()


def _like(t: Tensor) -> Tensor:
    """Return fresh dense memory of a tensor's shape and type."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)
