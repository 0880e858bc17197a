"""The custom ops of the namespace ``wbdit``: schema, reference implementation, shape inference, gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wbdit.ops import reference
from wbdit.ops.backend import define_op

adaln = define_op("adaln", "(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor", reference.adaln)
adaln_backward = define_op(
    "adaln_backward",
    "(Tensor dz, Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    reference.adaln_backward,
)
mssa = define_op("mssa", "(Tensor w, int heads) -> (Tensor, Tensor)", reference.mssa)
mssa_backward = define_op(
    "mssa_backward", "(Tensor dout, Tensor w, Tensor out, Tensor lse, int heads) -> Tensor", reference.mssa_backward
)
fold = define_op("fold", "(Tensor dictionary) -> Tensor", reference.fold)
fold_backward = define_op("fold_backward", "(Tensor dfolded, Tensor dictionary) -> Tensor", reference.fold_backward)
ista = define_op("ista", "(Tensor z, Tensor folded, float eta, float lam) -> Tensor", reference.ista)
ista_backward = define_op(
    "ista_backward",
    "(Tensor dout, Tensor out, Tensor z, Tensor folded, float eta) -> (Tensor, Tensor)",
    reference.ista_backward,
)
noising = define_op("noising", "(Tensor x0, Tensor noise, Tensor alpha, Tensor sigma) -> Tensor", reference.noising)
sampler_step = define_op(
    "sampler_step",
    "(Tensor x, Tensor out, Tensor? previous, Tensor? earlier, Tensor? noise, "
    "float a, float b, float c, float d, float e, float? clamp_min) -> Tensor",
    reference.sampler_step,
)
normal = define_op("normal", "(int seed, Tensor samples, int step, int length) -> Tensor", reference.normal)


# shapes and types, for torch.compile and export


adaln.register_fake(lambda x, shift, scale, eps: torch.empty_like(x))
adaln_backward.register_fake(
    lambda dz, x, shift, scale, eps: (torch.empty_like(x), torch.empty_like(shift), torch.empty_like(scale))
)
mssa.register_fake(
    lambda w, heads: (
        torch.empty_like(w),
        w.new_empty((w.shape[0], heads, w.shape[1]), dtype=reference.accumulation_dtype(w.dtype)),
    )
)
mssa_backward.register_fake(lambda dout, w, out, lse, heads: torch.empty_like(w))
fold.register_fake(torch.empty_like)
fold_backward.register_fake(lambda dfolded, dictionary: torch.empty_like(dictionary))
ista.register_fake(lambda z, folded, eta, lam: torch.empty_like(z))
ista_backward.register_fake(lambda dout, out, z, folded, eta: (torch.empty_like(z), torch.empty_like(folded)))
noising.register_fake(lambda x0, noise, alpha, sigma: torch.empty_like(x0))
sampler_step.register_fake(lambda x, *rest: torch.empty_like(x))
normal.register_fake(
    lambda seed, samples, step, length: samples.new_empty((samples.shape[0], length), dtype=torch.float32)
)


# gradients


def _keep_adaln(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _adaln_gradient(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    return *adaln_backward(dz, *ctx.saved_tensors, ctx.eps), None


def _keep_mssa(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.heads = inputs[1]


def _mssa_gradient(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    return mssa_backward(dout, *ctx.saved_tensors, ctx.heads), None


def _keep_fold(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _fold_gradient(ctx: Any, dfolded: Tensor) -> Tensor:
    return fold_backward(dfolded, *ctx.saved_tensors)


def _keep_ista(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs[:2])
    ctx.eta = inputs[2]


def _ista_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *ista_backward(dout, *ctx.saved_tensors, ctx.eta), None, None


def _keep_noising(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _noising_gradient(ctx: Any, dxt: Tensor) -> tuple[Tensor | None, ...]:
    alpha, sigma = (s.to(dxt.dtype).view(-1, *(1,) * (dxt.ndim - 1)) for s in ctx.saved_tensors)
    return alpha * dxt, sigma * dxt, None, None


def _keep_sampler_step(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.factors, ctx.clamp_min = inputs[5:10], inputs[10]
    ctx.given = [term is not None for term in inputs[:5]]
    ctx.save_for_backward(*([output] if ctx.clamp_min is not None else []))


def _sampler_step_gradient(ctx: Any, dnew: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.clamp_min is not None:
        dnew = torch.where(ctx.saved_tensors[0] > ctx.clamp_min, dnew, 0)
    grads = [factor * dnew if given else None for factor, given in zip(ctx.factors, ctx.given, strict=True)]
    return *grads, *(None,) * 6


adaln.register_autograd(_adaln_gradient, setup_context=_keep_adaln)
mssa.register_autograd(_mssa_gradient, setup_context=_keep_mssa)
fold.register_autograd(_fold_gradient, setup_context=_keep_fold)
ista.register_autograd(_ista_gradient, setup_context=_keep_ista)
noising.register_autograd(_noising_gradient, setup_context=_keep_noising)
sampler_step.register_autograd(_sampler_step_gradient, setup_context=_keep_sampler_step)
