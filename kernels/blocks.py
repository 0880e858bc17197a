"""All blocks of a white-box denoiser without gradients: op by op, or in four or two launches per block.

Wide models run op by op (:class:`Unfused`). For others, autotuning chooses. Up to 256 columns, two launches per block
are the expected fastest (:mod:`wbdit.kernels.narrow`). The four launches of this module have no LayerNorm kernel.

Each matrix product z W follows a modulated LayerNorm, z = (x - mu) r (1 + s) + b per row. Its mean mu and reciprocal
standard deviation r need not be known before the product. With u = (x - c) (1 + s) for any c close to mu,

    z W = r (u W - (mu - c) S) + T,        S = (1 + s) W,  T = b W,  one row of each per sample.

The kernel that computes x also writes u in bf16 and the sums of (x - c) and (x - c)^2 over its columns. The next kernel
loads u as its operand, without arithmetic between memory and the matrix units, and applies r, mu, S and T in its
epilogue. c is the row's mean before the last half-step. The mean changes little in a half-step, so u is nearly
centered: bf16 keeps its significant digits, and the variance does not cancel.

Bytes per value with a bf16 stream: 4 for the projection, 4 for attention, 8 for the product of each half-step. FLOPs
per token and block: 6 d^2 + 4 N d. At d = 768 and N = 200 this is 225 FLOP per byte; an H100 is balanced at about 270.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from wbdit.kernels import adaln, block_kernels, card, mssa, narrow, tuning

Weights = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]  # per block


@dataclass(frozen=True)
class Tiles:
    """Block sizes of a fused launch: rows and columns of a program's tile, inner step, warps and pipeline stages.

    The epilogue processes `piece` columns at a time.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    piece: int = 64

    @property
    def shared(self) -> int:
        """Bytes of shared memory per program: both operands of a bf16 product, for each stage."""
        return self.stages * (self.rows + self.columns) * self.inner * 2


# The first reads the least from L2 and needs matrix units that read shared memory. The second fits other large GPUs.
# Two programs of the third share a multiprocessor. The last fits every GPU and gives small models enough programs.
TILES = (Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 4, 4), Tiles(64, 64, 64, 4, 3, 32))


def candidates(device: torch.device) -> tuple[Tiles, ...]:
    """Return the tiles that fit a device, the expected fastest first; possibly none."""
    limits = card.card_of(device)
    widest = 256 if limits.wide_products else 128
    return tuple(tiles for tiles in TILES if tiles.shared <= limits.shared and tiles.columns <= widest)


@dataclass(frozen=True)
class Unfused:
    """The blocks op by op: cuBLAS matrix products with the kernels of :mod:`wbdit.kernels.adaln` between them.

    It moves 17 token tensors per block, the fused launches 12. Yet cuBLAS reaches 690 TFLOP/s on an H200, and a fused
    product with its epilogue 280 to 460 (1,024 x 200 tokens of width 768; see kernels/README.md).
    """


WIDE = 512  # from this width on tiles are not tried: a search takes 15 s to compile, and cuBLAS is faster


def ways(x: Tensor, projections: Sequence[Tensor]) -> tuple[narrow.Rows | Tiles | Unfused, ...]:
    """Return the ways to run blocks with these projections ``(h * p, d)``, the expected fastest first."""
    if x.shape[-1] >= WIDE or any(size % 16 for weight in projections for size in weight.shape):
        return (Unfused(),)  # tiles load without masks
    rows = narrow.candidates(x.device) if narrow.fits(projections, x.device) else ()
    return (*rows, *candidates(x.device), Unfused())


class _State:
    """State of the rows between two kernels: stream x, operand u, center c, and partial sums over each row."""

    def __init__(self, like: Tensor, parts: int, dtype: torch.dtype) -> None:
        count, width = like.numel() // like.shape[-1], like.shape[-1]
        self.x = torch.empty((count, width), dtype=dtype, device=like.device)
        self.u = torch.empty_like(self.x)
        self.center = torch.empty(count, device=like.device)
        self.sums = torch.empty((count, parts, 2), device=like.device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.u, self.center, self.sums


def run_blocks(
    x: Tensor,
    modulations: Sequence[Tensor],
    projections: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor],
    folded: Sequence[Tensor],
    heads: int,
    eta: float,
    lam: float,
    eps: float,
    z: Tensor | None = None,
) -> Tensor:
    """Return the modulated LayerNorm of the residual stream after all blocks ``(B, N, d)``, in the dtype of `folded`.

    The arguments are those of :func:`wbdit.ops.reference.run_blocks`, and `z`, the first modulated LayerNorm of `x`.
    Given `z`, both are in the products' dtype, and may be overwritten. Unless all sizes of the weights are multiples of
    16, only :class:`Unfused` is used. The stream is kept in the products' dtype.
    """
    x = x.contiguous()
    modulations = [m if m.stride(-1) == 1 else m.contiguous() for m in modulations]
    weights = projections, outs, [bias.contiguous() for bias in biases], folded
    given = x, modulations, weights, heads, eta, lam, eps

    offered = ways(x, projections)

    def run(way: narrow.Rows | Tiles | Unfused, z: Tensor | None) -> tuple[Tensor, list[Any]]:
        if isinstance(way, Unfused):
            return run_unfused(*given, z), []
        return (narrow.run_blocks if isinstance(way, narrow.Rows) else run_fused)(*given, way)

    shape = (*x.shape[1:], heads, min(2**10, triton.next_power_of_2(x.shape[0])))
    # a search repeats the run, so it must not overwrite its inputs
    chosen = tuning.choose("run_blocks", shape, offered, lambda way: run(way, None)[1], x.device)
    return run(chosen, z)[0]


def run_fused(
    x: Tensor,
    modulations: Sequence[Tensor],
    weights: Weights,
    heads: int,
    eta: float,
    lam: float,
    eps: float,
    tiles: Tiles,
) -> tuple[Tensor, list[Any]]:
    """Run the blocks in four launches each; return the result and the compiled kernels."""
    launcher = _Launcher(x, modulations, heads, tiles, weights[-1][0].dtype, eps)
    return launcher.run(weights, eta, lam), launcher.kernels


def run_unfused(
    x: Tensor,
    modulations: Sequence[Tensor],
    weights: Weights,
    heads: int,
    eta: float,
    lam: float,
    eps: float,
    z: Tensor | None = None,
) -> Tensor:
    """Run the blocks op by op; the stream, in the products' dtype, and its LayerNorm are updated in place."""
    stream = x
    if z is None:
        stream = torch.empty_like(x, dtype=weights[-1][0].dtype)
        z = torch.empty_like(stream)
        adaln.residual_adaln(x, shift=modulations[0], scale=modulations[1], z_new=z, eps=eps)
    for i, (projection, out, bias, folded) in enumerate(zip(*weights, strict=True)):
        _, _, gate1, shift2, scale2, gate2, shift, scale = modulations[6 * i : 6 * i + 8]
        w = z @ projection.mT
        attended, sums = torch.empty_like(w), w.new_empty((len(x), heads, x.shape[1]), dtype=torch.float32)
        mssa.mssa(w, attended, sums)
        step = attended @ out.mT
        compress = {"out": step, "bias": bias, "gate": gate1, "shift": shift2, "scale": scale2}
        adaln.residual_adaln(x, **compress, x_new=stream, z_new=z, eps=eps)
        x = stream
        torch.matmul(z, folded, out=step)
        sparsify = {"out": step, "z": z, "gate": gate2, "shift": shift, "scale": scale, "eta": eta, "lam": lam}
        is_last = i == len(weights[-1]) - 1
        adaln.residual_adaln(x, **sparsify, x_new=None if is_last else x, z_new=z, eps=eps)
    return z


class _Launcher:
    """The launches of one call: their common arguments, and two states that alternate as input and output."""

    def __init__(
        self, x: Tensor, modulations: Sequence[Tensor], heads: int, tiles: Tiles, dtype: torch.dtype, eps: float
    ) -> None:
        self.x, self.heads, self.tiles, self.dtype, self.eps = x, heads, tiles, dtype, eps
        self.batch, self.tokens, self.d = x.shape
        self.count = self.batch * self.tokens
        self.parts = triton.cdiv(self.d, tiles.columns) * (tiles.columns // tiles.piece)
        self.state, self.spare = (_State(x, self.parts, dtype) for _ in range(2))
        self.modulations, self.rows = modulations, _shared_rows(modulations)
        self.shared = len(self.rows[0]) == 1
        self.kernels: list[Any] = []  # the compiled kernels that depend on the tiles

    def run(self, weights: Weights, eta: float, lam: float) -> Tensor:
        table = torch.stack(self.rows).to(self.dtype)  # [6 blocks + 2, B or 1, d]
        self.init(table[1])
        for i, (projection, out, bias, folded) in enumerate(zip(*weights, strict=True)):
            _, _, gate1, _, scale2, gate2, _, scale = table[6 * i : 6 * i + 8]
            shift1, scale1, _, shift2, exact_scale2, _ = self.rows[6 * i : 6 * i + 6]
            w = self.project(projection, _fold_modulation_into_projection(scale1, shift1, projection))
            attended, lse = torch.empty_like(w), w.new_empty((self.batch, self.heads, self.tokens), dtype=torch.float32)
            mssa.mssa(w, attended, lse)
            self.compress(attended, out, bias, gate1, scale2)
            self.sparsify(folded, _fold_modulation_into_step(exact_scale2, shift2, folded, eta, lam), gate2, scale, eta)
        return self.end(*self.modulations[-2:])

    def init(self, scale: Tensor) -> None:
        block_kernels._block_init[(self.count,)](
            *(self.x, scale, *self.state.tensors, self.tokens, self.d, self.parts, self.stride(self.d)),
            PARTS=triton.next_power_of_2(self.parts),
            WIDTH=triton.next_power_of_2(self.d),
            num_warps=4,
        )

    def project(self, weight: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        width = weight.shape[0]
        w = torch.empty((self.batch, self.tokens, width), dtype=self.dtype, device=self.x.device)
        s = self.state
        kernel = block_kernels._block_project[self.grid(width)](
            *(s.u, weight, s.center, s.sums, *table, w, self.count, self.tokens, width, self.d, self.parts),
            *(weight.stride(1), weight.stride(0), self.stride(width), self.eps),
            **self.options(self.d, width),
        )
        self.kernels.append(kernel)
        return w

    def compress(self, a: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, scale: Tensor) -> None:
        self.half_step(a, (weight, weight.stride(1), weight.stride(0)), bias, None, gate, scale, 0.0)

    def sparsify(self, weight: Tensor, table: tuple[Tensor, Tensor], gate: Tensor, scale: Tensor, eta: float) -> None:
        self.half_step(self.state.u, (weight, *weight.stride()), None, table, gate, scale, eta)

    def half_step(
        self,
        a: Tensor,
        weight: tuple[Tensor, int, int],
        bias: Tensor | None,
        table: tuple[Tensor, Tensor] | None,
        gate: Tensor,
        scale: Tensor,
        eta: float,
    ) -> None:
        """Launch a half-step; `weight` comes with its strides along the inner dimension and along the columns."""
        s, inner = self.state, a.shape[-1]
        matrix, *strides = weight
        slope, level = table or (None, None)
        kernel = block_kernels._block_half_step[self.grid(self.d)](
            *(a, matrix, bias, slope, level, gate, scale, s.x, s.center, s.sums, *self.spare.tensors),
            *(self.count, self.tokens, self.d, inner, self.parts, *strides, self.stride(self.d), eta, self.eps),
            **self.options(inner, self.d),
            SPARSIFY=table is not None,
        )
        self.kernels.append(kernel)
        self.state, self.spare = self.spare, self.state

    def end(self, shift: Tensor, scale: Tensor) -> Tensor:
        x, z = self.state.x.view(self.x.shape), self.spare.u.view(self.x.shape)
        adaln.residual_adaln(x, shift=shift, scale=scale, z_new=z, eps=self.eps)
        return z

    def stride(self, width: int) -> int:
        """Return the row stride of a table: 0 if all samples share one row."""
        return 0 if self.shared else width

    def grid(self, width: int) -> tuple[int]:
        return (triton.cdiv(self.count, self.tiles.rows) * triton.cdiv(width, self.tiles.columns),)

    def options(self, inner: int, width: int) -> dict[str, object]:
        t = self.tiles
        return {
            "ROWS": t.rows,
            "COLUMNS": t.columns,
            "INNER": t.inner,
            "PARTS": triton.next_power_of_2(self.parts),
            "PIECE": t.piece,
            "EVEN": inner % t.inner == 0,
            "WHOLE": width % t.columns == 0,
            "TWO": self.tokens >= t.rows,
            "num_warps": t.warps,
            "num_stages": t.stages,
        }


def _shared_rows(modulations: Sequence[Tensor]) -> list[Tensor]:
    """Return the modulations, as one row each if all are views of a row that all samples share."""
    shared = all(m.stride(0) == 0 for m in modulations)
    return [m[:1] if shared else m for m in modulations]


def _fold_modulation_into_projection(scale: Tensor, shift: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return S = (1 + s) W and T = b W, one row per sample."""
    slope, level = (torch.cat([1 + scale, shift]).to(weight.dtype) @ weight.mT).chunk(2)
    return slope, level


def _fold_modulation_into_step(
    scale: Tensor, shift: Tensor, folded: Tensor, eta: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return S = (1 + s) (I + eta F) and T = b (I + eta F) - eta lam, one row per sample."""
    both = torch.cat([1 + scale, shift]).float()
    slope, level = (both + eta * (both.to(folded.dtype) @ folded).float()).chunk(2)
    return slope.to(folded.dtype), (level - eta * lam).to(folded.dtype)
