"""A stack of white-box blocks as one op with gradients: one node of autograd, where op by op takes ten per block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wbdit.ops import reference
from wbdit.ops.dispatch import define_op, served

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class SavedActivations(NamedTuple):
    """What the forward pass of one block saves for its gradients.

    Attributes
    ----------
    normed, halfway
        Modulated norms before the block's two half-steps ``(B, N, d)``.
    w, subspaces, lse
        Projections ``(B, N, h * p)``, and what :func:`wbdit.ops.mssa` makes of them.
    out, product
        Output of the linear map after attention, and product with the folded dictionary ``(B, N, d)``.
    folded
        Folded dictionary ``(d, d)``.
    middle, last
        Residual stream after each half-step ``(B, N, d)``.
    """

    normed: Tensor
    w: Tensor
    subspaces: Tensor
    lse: Tensor
    out: Tensor
    middle: Tensor
    halfway: Tensor
    folded: Tensor
    product: Tensor
    last: Tensor


def by_block(saved: list[Tensor]) -> list[SavedActivations]:
    """Return the saved activations of each block."""
    fields = len(SavedActivations._fields)
    return [SavedActivations(*saved[i : i + fields]) for i in range(0, len(saved), fields)]


def training_blocks(
    x: Tensor,
    modulations: Sequence[Tensor],
    projections: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor],
    dictionaries: Sequence[Tensor],
    heads: int,
    eta: float = 0.1,
    lam: float = 0.1,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Run a stack of white-box blocks as :func:`wbdit.ops.run_blocks` does, with gradients, but no second ones.

    Parameters
    ----------
    x
        Residual stream ``(B, N, d)``, floating. It keeps its dtype throughout.
    modulations
        ``(B, d)`` each, ``6 * depth + 2`` in all, as in :func:`wbdit.ops.run_blocks`.
    projections, outs, biases
        Weights ``(h * p, d)`` and ``(d, h * p)`` and biases ``(d,)`` of the linear maps around :func:`wbdit.ops.mssa`,
        one per block.
    dictionaries
        Dictionaries ``(d, d)``, one per block, not folded.
    heads, eta, lam, eps
        As in :func:`wbdit.ops.mssa` and :func:`wbdit.ops.ista_adaln`.
    dtype
        Dtype of the matrix products, to which the weights are rounded. Default: that of `x`.

    Returns
    -------
    The modulated norm of the residual stream after the last block ``(B, N, d)``, in `dtype`.

    Examples
    --------
    >>> x, modulations = torch.randn(2, 5, 8), torch.zeros(8, 2, 8)  # one block
    >>> weight, bias = torch.eye(8, requires_grad=True), torch.zeros(8)
    >>> z = wbdit.ops.training_blocks(x, modulations, [weight], [weight], [bias], [weight], heads=2)
    >>> z.square().mean().backward()
    >>> weight.grad.shape
    torch.Size([8, 8])
    """
    scalars = heads, eta, lam, eps, x.dtype if dtype is None else dtype
    given = *modulations, *projections, *outs, *biases, *dictionaries
    z: Tensor = _Blocks.apply(len(projections), scalars, x, *given)
    return z


# the same steps with the functions of the reference or of a device


def _forward(
    op: Callable[[str], Callable[..., Any]],
    x: Tensor,
    modulations: list[Tensor],
    projections: list[Tensor],
    outs: list[Tensor],
    biases: list[Tensor],
    dictionaries: list[Tensor],
    heads: int,
    eta: float,
    lam: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """Return the result, and what the gradients need: ten tensors per block, see :class:`SavedActivations`."""
    z = op("adaln")(x, modulations[0], modulations[1], eps, dtype)
    saved: list[Tensor] = []
    for block, (projection, out, bias, dictionary) in enumerate(
        zip(projections, outs, biases, dictionaries, strict=True)
    ):
        gate1, shift2, scale2, gate2, shift, scale = modulations[6 * block + 2 : 6 * block + 8]
        w = z @ projection.to(dtype).mT
        subspaces, lse = op("mssa")(w, heads)
        step = subspaces @ out.to(dtype).mT
        middle, halfway = op("gated_adaln")(x, step, bias, gate1, shift2, scale2, eps)
        folded = op("fold")(dictionary.to(dtype))
        x, after, product = op("ista_adaln")(middle, halfway, folded, gate2, shift, scale, eta, lam, eps)
        saved += SavedActivations(z, w, subspaces, lse, step, middle, halfway, folded, product, x)
        z = after
    return z, saved


def _backward(
    op: Callable[[str], Callable[..., Any]],
    dz: Tensor,
    x: Tensor,
    modulations: list[Tensor],
    projections: list[Tensor],
    outs: list[Tensor],
    biases: list[Tensor],
    dictionaries: list[Tensor],
    saved: list[Tensor],
    heads: int,
    eta: float,
    lam: float,
    eps: float,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    dmodulations: list[Tensor] = []
    dprojections, douts, dbiases, ddictionaries = gradients = [], [], [], []  # type: Lists
    dx, activations = None, by_block(saved)
    for block in reversed(range(len(projections))):
        _, _, gate1, shift2, scale2, gate2, shift, scale = modulations[6 * block : 6 * block + 8]
        own = activations[block]
        projection, out, bias = projections[block], outs[block], biases[block]
        dictionary, dtype = dictionaries[block], own.w.dtype
        dx, dz, dfolded, *dmodulation = op("ista_adaln_backward")(
            dx, dz, own.last, own.halfway, own.product, own.folded, gate2, shift, scale, eta, lam, eps
        )
        dmodulations[:0] = dmodulation
        ddictionaries.append(op("fold_backward")(dfolded, dictionary.to(dtype)).to(dictionary.dtype))
        dx, dstep, dbias, *dmodulation = op("gated_adaln_backward")(
            dx, dz, own.middle, own.out, bias, gate1, shift2, scale2, eps
        )
        dmodulations[:0] = dmodulation
        douts.append((_flat(dstep).mT @ _flat(own.subspaces)).to(out.dtype))
        dbiases.append(dbias)
        dw = op("mssa_backward")(dstep @ out.to(dtype), own.w, own.subspaces, own.lse, heads)
        dprojections.append((_flat(dw).mT @ _flat(own.normed)).to(projection.dtype))
        dz = dw @ projection.to(dtype)
    through, *dmodulation = op("adaln_backward")(dz, x, modulations[0], modulations[1], eps)
    for found in gradients:
        found.reverse()
    return through if dx is None else dx + through, [*dmodulation, *dmodulations], *gradients


def _flat(t: Tensor) -> Tensor:
    return t.flatten(0, -2)


def _of_reference(name: str) -> Callable[..., Any]:
    return getattr(reference, name)


def _of_device(device: torch.device) -> Callable[[str], Callable[..., Any]]:
    return lambda name: served(name, device.type)  # an engine may support some of the ops only


# shapes and types


def _fake(x: Tensor, modulations: list[Tensor], projections: list[Tensor], *rest: Any) -> tuple[Tensor, list[Tensor]]:
    heads, dtype, dictionaries = rest[3], rest[7], rest[2]
    saved: list[Tensor] = []
    for projection, dictionary in zip(projections, dictionaries, strict=True):
        low, stream = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
        w = x.new_empty((*x.shape[:2], projection.shape[0]), dtype=dtype)
        lse = x.new_empty((x.shape[0], heads, x.shape[1]), dtype=reference.accumulation_dtype(dtype))
        folded = torch.empty_like(dictionary, dtype=dtype)
        like = w, lse, low, stream, low, folded, low, stream
        saved += SavedActivations(low, w, *(torch.empty_like(t) for t in like))
    return torch.empty_like(x, dtype=dtype), saved


def _fake_backward(
    dz: Tensor, x: Tensor, *lists: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    first, second, third, fourth, fifth = ([torch.empty_like(t) for t in given] for given in lists[:5])
    return torch.empty_like(x), first, second, third, fourth, fifth


# the ops

WEIGHTS = "Tensor[] modulations, Tensor[] projections, Tensor[] outs, Tensor[] biases, Tensor[] dictionaries"
define_op(
    "training_blocks",
    f"(Tensor x, {WEIGHTS}, int heads, float eta, float lam, float eps, ScalarType dtype) -> (Tensor, Tensor[])",
    lambda *args: _forward(_of_reference, *args),
    fake=_fake,
    on_engine=lambda engine, x, *args: _forward(_of_device(x.device), x, *args),
)
define_op(
    "training_blocks_backward",
    f"(Tensor dz, Tensor x, {WEIGHTS}, Tensor[] saved, int heads, float eta, float lam, float eps) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])",
    lambda *args: _backward(_of_reference, *args),
    fake=_fake_backward,
    on_engine=lambda engine, dz, *args: _backward(_of_device(dz.device), dz, *args),
)


# gradient: a plain autograd.Function, because PyTorch's own handling of lists takes a millisecond per step


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, depth: int, scalars: tuple[Any, ...], x: Tensor, *given: Tensor) -> Tensor:
        z, saved = served("training_blocks", x.device.type)(x, *_split(given, depth)[:5], *scalars)
        ctx.depth, ctx.scalars = depth, scalars[:-1]
        ctx.save_for_backward(x, *given, *saved)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        gradient = served("training_blocks_backward", x.device.type)
        dx, *gradients = gradient(dz, x, *_split(rest, ctx.depth), *ctx.scalars)
        return None, None, dx, *(found for given in gradients for found in given)


def _split(tensors: Sequence[Tensor], depth: int) -> list[list[Tensor]]:
    """Return the lists of modulations, projections, outs, biases, dictionaries, and of what is saved."""
    ends = [6 * depth + 2 + i * depth for i in range(5)]
    return [list(tensors[begin:end]) for begin, end in zip([0, *ends], [*ends, None], strict=True)]
