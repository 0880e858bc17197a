"""Stacks of blocks in fp32 on a CPU, by one C++ kernel that takes a few samples at a time through all blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wbdit.ops.dispatch import adapter
from wbdit.ops.layout import dense_rows, fresh
from wbdit.ops.training_blocks import SavedActivations, by_block

MULTIPLE = 32  # of the widths: two vectors of AVX-512
# where the kernel was measured to be faster than op by op
WIDEST = 256  # width of a token; beyond it the weights leave L2
LARGEST = 1 << 16  # numbers per sample, which should stay in L2
MEASURED = (1,)  # instruction sets, as indices of cpu.LEVELS: AVX2. With AVX-512 PyTorch's products may be faster.
MOST_THREADS = 2  # per sample, of which one computes it


def run_blocks(
    engine: Any,
    x: Tensor,
    modulations: list[Tensor],
    projections: list[Tensor],
    outs: list[Tensor],
    biases: list[Tensor],
    folded: list[Tensor],
    *scalars: Any,
) -> Tensor:
    """Run :func:`wbdit.ops.run_blocks`."""
    if not _fits(engine, x, folded[0].dtype, modulations, projections, outs, biases, folded):
        return adapter("run_blocks")(engine, x, modulations, projections, outs, biases, folded, *scalars)
    heads, eta, lam, eps = scalars
    weights = [_dense(given) for given in (projections, outs, biases, folded)]
    z = fresh(x)
    rows = [dense_rows(part) for part in modulations]
    engine.blocks(x.contiguous(), rows, *weights, z=z, saved=[], heads=heads, eta=eta, lam=lam, eps=eps)
    return z


def training_blocks(
    engine: Any,
    x: Tensor,
    modulations: list[Tensor],
    projections: list[Tensor],
    outs: list[Tensor],
    biases: list[Tensor],
    dictionaries: list[Tensor],
    *scalars: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Run :func:`wbdit.ops.training_blocks`; the first result is its own, the second is saved for the gradients."""
    heads, eta, lam, eps, dtype = scalars
    if not _fits(engine, x, dtype, modulations, projections, outs, biases, dictionaries):
        given = modulations, projections, outs, biases, dictionaries
        return adapter("training_blocks")(engine, x, *given, *scalars)
    folded = [adapter("fold")(engine, dictionary) for dictionary in dictionaries]
    saved: list[Tensor] = []
    for projection, dictionary in zip(projections, folded, strict=True):
        w = x.new_empty(*x.shape[:2], len(projection))
        lse = x.new_empty(x.shape[0], heads, x.shape[1])
        out, middle, halfway, product, last = (fresh(x) for _ in range(5))
        saved += SavedActivations(fresh(x), w, fresh(w), lse, out, middle, halfway, dictionary, product, last)
    weights = [_dense(given) for given in (projections, outs, biases, folded)]
    z = fresh(x)
    rows = [dense_rows(part) for part in modulations]
    engine.blocks(x.contiguous(), rows, *weights, z=z, saved=saved, heads=heads, eta=eta, lam=lam, eps=eps)
    return z, saved


def training_blocks_backward(
    engine: Any,
    dz: Tensor,
    x: Tensor,
    modulations: list[Tensor],
    projections: list[Tensor],
    outs: list[Tensor],
    biases: list[Tensor],
    dictionaries: list[Tensor],
    saved: list[Tensor],
    *scalars: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Compute the gradients of :func:`training_blocks`."""
    heads, eta, lam, eps = scalars
    blocks = by_block(saved)
    if not _fits(engine, x, blocks[0].w.dtype, modulations, projections, outs, biases, dictionaries):
        given = modulations, projections, outs, biases, dictionaries
        return adapter("training_blocks_backward")(engine, dz, x, *given, saved, *scalars)
    batch, _, d = x.shape
    steps = [torch.add(x.new_ones(d).diag(), own.folded, alpha=eta) for own in blocks]
    dproducts = [fresh(t) for own in blocks for t in (own.w, own.out, own.product)]
    dbiases = [x.new_empty(batch, d) for _ in blocks]
    dx, dmodulations = fresh(x), [fresh(part) for part in modulations]
    engine.blocks_backward(
        dz.contiguous(),
        x.contiguous(),
        [dense_rows(part) for part in modulations],
        *(_dense(given) for given in (projections, outs, biases, steps)),
        saved,
        dx=dx,
        dmodulations=dmodulations,
        dproducts=dproducts,
        dbiases=dbiases,
        heads=heads,
        eta=eta,
        lam=lam,
        eps=eps,
    )
    flat = [t.flatten(0, 1) for t in dproducts]
    dprojections = [dw.mT @ own.normed.flatten(0, 1) for dw, own in zip(flat[::3], blocks, strict=True)]
    douts = [dout.mT @ own.subspaces.flatten(0, 1) for dout, own in zip(flat[1::3], blocks, strict=True)]
    ddictionaries = [
        adapter("fold_backward")(engine, (own.halfway.flatten(0, 1).mT @ dproduct).mul_(eta), dictionary)
        for dproduct, own, dictionary in zip(flat[2::3], blocks, dictionaries, strict=True)
    ]
    return dx, dmodulations, dprojections, douts, [rows.sum(0) for rows in dbiases], ddictionaries


def _fits(engine: Any, x: Tensor, dtype: torch.dtype, *lists: list[Tensor]) -> bool:
    """Return whether the kernel takes these sizes and dtypes, and was measured to be faster at such."""
    batch, tokens, d = x.shape
    widths = d, lists[1][0].shape[0]
    if x.numel() == 0 or any(width % MULTIPLE or width > WIDEST for width in widths) or tokens * d > LARGEST:
        return False
    if engine.cpu_level() not in MEASURED or MOST_THREADS * batch < torch.get_num_threads():
        return False
    return dtype == torch.float32 and all(t.dtype == torch.float32 for t in (x, *(t for of in lists for t in of)))


def _dense(tensors: list[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


OVERRIDES: dict[str, Callable[..., Any]] = {
    "run_blocks": run_blocks,
    "training_blocks": training_blocks,
    "training_blocks_backward": training_blocks_backward,
}
