"""The custom ops of the namespace ``wbdit``: schema, reference implementation, shape inference, gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wbdit.ops import reference
from wbdit.ops.dispatch import define_op

adaln = define_op(
    "adaln", "(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType? dtype=None) -> Tensor", reference.adaln
)
adaln_backward = define_op(
    "adaln_backward",
    "(Tensor dz, Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    reference.adaln_backward,
)
gated_adaln = define_op(
    "gated_adaln",
    "(Tensor x, Tensor out, Tensor? bias, Tensor gate, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)",
    reference.gated_adaln,
)
gated_adaln_backward = define_op(
    "gated_adaln_backward",
    "(Tensor? dx_new, Tensor dz_new, Tensor x_new, Tensor out, Tensor? bias, Tensor gate, Tensor shift, Tensor scale, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.gated_adaln_backward,
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
ista_adaln = define_op(
    "ista_adaln",
    "(Tensor x, Tensor z, Tensor folded, Tensor gate, Tensor shift, Tensor scale, float eta, float lam, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    reference.ista_adaln,
)
ista_adaln_backward = define_op(
    "ista_adaln_backward",
    "(Tensor? dx_new, Tensor dz_new, Tensor x_new, Tensor z, Tensor product, Tensor folded, Tensor gate, Tensor shift, "
    "Tensor scale, float eta, float lam, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.ista_adaln_backward,
)
gated_adaln_ = define_op(
    "gated_adaln_",
    "(Tensor(a!) x, Tensor(b!) out, Tensor? bias, Tensor gate, Tensor shift, Tensor scale, float eps) -> ()",
    reference.gated_adaln_,
    mutates_args=("x", "out"),
)
ista_adaln_ = define_op(
    "ista_adaln_",
    "(Tensor(a!) x, Tensor(b!) z, Tensor folded, Tensor gate, Tensor shift, Tensor scale, "
    "float eta, float lam, float eps) -> ()",
    reference.ista_adaln_,
    mutates_args=("x", "z"),
)
run_blocks = define_op(
    "run_blocks",
    "(Tensor x, Tensor[] modulations, Tensor[] projections, Tensor[] outs, Tensor[] biases, Tensor[] folded, "
    "int heads, float eta, float lam, float eps) -> Tensor",
    reference.run_blocks,
)
noising = define_op("noising", "(Tensor x0, Tensor noise, Tensor alpha, Tensor sigma) -> Tensor", reference.noising)
sampler_step = define_op(
    "sampler_step",
    "(Tensor x, Tensor out, Tensor? previous, Tensor? earlier, Tensor? noise, Tensor? samples, "
    "float a, float b, float c, float d, float e, float? clamp_min, int seed, int step) -> Tensor",
    reference.sampler_step,
)
normal = define_op("normal", "(int seed, Tensor samples, int step, int length) -> Tensor", reference.normal)
COUNTS = (
    "Tensor x, Tensor eta, Tensor weight, Tensor alpha, Tensor sigma, Tensor base0, Tensor base1, Tensor values, "
    "Tensor counts, Tensor sizes"
)
count_mean = define_op("count_mean", f"({COUNTS}) -> Tensor", reference.count_mean)
count_nll = define_op("count_nll", f"({COUNTS}, Tensor target) -> Tensor", reference.count_nll)
count_nll_backward = define_op(
    "count_nll_backward",
    f"(Tensor dnll, {COUNTS}, Tensor target) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.count_nll_backward,
)


# shapes and types, for torch.compile and export


adaln.register_fake(lambda x, shift, scale, eps, dtype=None: torch.empty_like(x, dtype=dtype))
adaln_backward.register_fake(
    lambda dz, x, shift, scale, eps: (torch.empty_like(x), torch.empty_like(shift), torch.empty_like(scale))
)
gated_adaln.register_fake(lambda x, out, *rest: (torch.empty_like(x), torch.empty_like(out)))
gated_adaln_backward.register_fake(
    lambda dx_new, dz_new, x_new, out, bias, gate, shift, scale, eps: (
        *(
            torch.empty_like(x_new),
            torch.empty_like(out),
            x_new.new_empty(0) if bias is None else torch.empty_like(bias),
        ),
        *(torch.empty_like(gate), torch.empty_like(shift), torch.empty_like(scale)),
    )
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
ista_adaln.register_fake(
    lambda x, z, folded, *rest: (torch.empty_like(x), torch.empty_like(z), torch.empty_like(z, dtype=folded.dtype))
)
ista_adaln_backward.register_fake(
    lambda dx_new, dz_new, x_new, z, product, *rest: tuple(map(torch.empty_like, (x_new, z, *rest[:4])))
)
gated_adaln_.register_fake(lambda *args: None)
ista_adaln_.register_fake(lambda *args: None)
run_blocks.register_fake(
    lambda x, modulations, projections, outs, biases, folded, *rest: torch.empty_like(x, dtype=folded[0].dtype)
)
noising.register_fake(lambda x0, noise, alpha, sigma: torch.empty_like(x0))
sampler_step.register_fake(lambda x, *rest: torch.empty_like(x))
normal.register_fake(
    lambda seed, samples, step, length: samples.new_empty((samples.shape[0], length), dtype=torch.float32)
)
for _op in (count_mean, count_nll):
    _op.register_fake(lambda x, eta, *rest: eta.new_empty(eta.shape, dtype=reference.accumulation_dtype(eta.dtype)))
count_nll_backward.register_fake(
    lambda dnll, x, eta, weight, alpha, sigma, base0, base1, *rest: tuple(
        t.new_empty(t.shape) for t in (eta, weight, base0, base1)
    )
)


# gradients


def _keep_adaln(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _adaln_gradient(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    return *adaln_backward(dz, *ctx.saved_tensors, ctx.eps), None, None


def _keep_gated_adaln(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, *others, eps = inputs
    ctx.save_for_backward(output[0], *others)
    ctx.eps = eps
    ctx.set_materialize_grads(False)  # the last block's x' goes nowhere: no zeros need be read for it


def _gated_adaln_gradient(ctx: Any, dx_new: Tensor | None, dz_new: Tensor | None) -> tuple[Tensor | None, ...]:
    x_new, out, bias, *modulation = ctx.saved_tensors
    dz_new = torch.zeros_like(out) if dz_new is None else dz_new
    dx, dout, dbias, *rest = gated_adaln_backward(dx_new, dz_new, x_new, out, bias, *modulation, ctx.eps)
    return dx, dout, None if bias is None else dbias, *rest, None


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
    return *ista_adaln_backward(dx_new, dz_new, x_new, z, product, *others, *ctx.scalars), None, None, None


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
    ctx.factors, ctx.clamp_min = inputs[6:11], inputs[11]
    ctx.given = [term is not None for term in inputs[:5]]
    ctx.save_for_backward(*([output] if ctx.clamp_min is not None else []))


def _sampler_step_gradient(ctx: Any, dnew: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.clamp_min is not None:
        dnew = torch.where(ctx.saved_tensors[0] > ctx.clamp_min, dnew, 0)
    grads = [factor * dnew if given else None for factor, given in zip(ctx.factors, ctx.given, strict=True)]
    return *grads, *(None,) * 9


def _keep_count_nll(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _count_nll_gradient(ctx: Any, dnll: Tensor) -> tuple[Tensor | None, ...]:
    deta, dweight, dbase0, dbase1 = count_nll_backward(dnll, *ctx.saved_tensors)
    return None, deta, dweight, None, None, dbase0, dbase1, *(None,) * 4


adaln.register_autograd(_adaln_gradient, setup_context=_keep_adaln)
gated_adaln.register_autograd(_gated_adaln_gradient, setup_context=_keep_gated_adaln)
ista_adaln.register_autograd(_ista_adaln_gradient, setup_context=_keep_ista_adaln)
mssa.register_autograd(_mssa_gradient, setup_context=_keep_mssa)
fold.register_autograd(_fold_gradient, setup_context=_keep_fold)
ista.register_autograd(_ista_gradient, setup_context=_keep_ista)
noising.register_autograd(_noising_gradient, setup_context=_keep_noising)
sampler_step.register_autograd(_sampler_step_gradient, setup_context=_keep_sampler_step)
count_nll.register_autograd(_count_nll_gradient, setup_context=_keep_count_nll)
