"""A narrow white-box denoiser without gradients in two launches per block: attention, and everything else.

A program of the second launch owns whole rows. It multiplies attention's output by the output projection, updates the
stream, normalizes, multiplies by the folded dictionary, thresholds, updates the stream again, normalizes, and
multiplies by the next block's projection. The tensors between stay in registers and shared memory. The first launch
embeds patches and whole cells, and the last one writes the final LayerNorm: 1 + 2 launches per block in all.

The stream is bf16 between launches and fp32 inside a program. Bytes per value of a token: 8 for the second launch, 4
for attention. In addition, every program reads three weights from L2, 6 d^2 bytes for `rows` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from wbdit.kernels import card, mssa, narrow_kernels

STEP = 64  # inputs of the embedding per step
WIDEST = 256  # columns of a row; wider rows do not fit in registers

Weights = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]  # per block
Run = tuple[Tensor, list[Any]]  # the result, and the compiled kernels


@dataclass(frozen=True)
class Rows:
    """Block sizes: rows of a program, columns it computes at a time, warps and pipeline stages.

    The embedding has stages of its own: a whole cell takes many short steps, so more of them must be on their way. If
    a program's rows belong to at most `broadcast` samples, their modulations are broadcast, otherwise gathered.
    """

    rows: int
    piece: int
    warps: int
    stages: int
    embedding_stages: int
    broadcast: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory per program, the larger of two products' needs.

        A product of the stream holds its left operand, columns of a weight for each stage, and an exchange. The
        embedding holds both operands in fp32 for each stage, and in bf16.
        """
        stream = self.rows * WIDEST + self.stages * WIDEST * self.piece + self.rows * self.piece
        embedding = (2 * self.embedding_stages + 1) * STEP * (self.rows + self.piece)
        return 2 * max(stream, embedding)

    def samples(self, batch: int, tokens: int, shared: bool) -> int:
        """Return the largest number of samples per program, 0 for more than are broadcast."""
        most = 1 if shared else min(batch, (self.rows - 2) // tokens + 2)
        return most if most <= max(1, self.broadcast) else 0


# They need 200 to 255 registers per thread; with wider pieces or more samples broadcast they would spill. The second
# fits every GPU, and gives small batches enough programs.
ROWS = (Rows(64, 32, 8, 2, 3, 3), Rows(32, 32, 4, 2, 3, 3))


def candidates(device: torch.device) -> tuple[Rows, ...]:
    """Return the block sizes that fit a device, the expected fastest first; possibly none."""
    limits = card.card_of(device)
    if limits.generation == 10:
        return ()  # all spill with Triton 3.6
    return tuple(rows for rows in ROWS if rows.shared <= limits.shared)


def fits(projections: Sequence[Tensor], device: torch.device) -> bool:
    """Return whether the kernels support blocks with these projections ``(h * p, d)``."""
    sizes = {size for projection in projections for size in projection.shape}
    return bool(sizes) and max(sizes) <= WIDEST and not any(s % 16 for s in sizes) and bool(candidates(device))


def run_denoiser(
    x: Tensor,
    modulations: Sequence[Tensor],
    embedding: Sequence[Tensor],
    projections: Sequence[Tensor],
    outs: Sequence[Tensor],
    biases: Sequence[Tensor],
    folded: Sequence[Tensor],
    heads: int,
    eta: float,
    lam: float,
    eps: float,
    rows: Rows,
) -> Run:
    """Return the modulated LayerNorm of the residual stream after all blocks ``(B, N, d)`` in bf16, given cells.

    The arguments are those of :func:`wbdit.ops.denoise`, without the readout. Weights of the blocks are bf16.
    """
    shape = x.shape[0], embedding[2].shape[0], projections[0].shape[1]
    launcher = _Launcher(shape, modulations, (projections, outs, biases, folded), heads, rows, eps)
    launcher.embed(x, embedding)
    return launcher.run(eta, lam)


def run_blocks(
    x: Tensor,
    modulations: Sequence[Tensor],
    weights: Weights,
    heads: int,
    eta: float,
    lam: float,
    eps: float,
    rows: Rows,
) -> Run:
    """Return the same, given the residual stream ``(B, N, d)``, and the compiled kernels."""
    batch, tokens, d = x.shape
    launcher = _Launcher((batch, tokens, d), modulations, weights, heads, rows, eps)
    launcher.enter(x)
    return launcher.run(eta, lam)


class _Launcher:
    """The launches of one call: their common arguments, the stream, and the tensors before and after attention."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        modulations: Sequence[Tensor],
        weights: Weights,
        heads: int,
        rows: Rows,
        eps: float,
    ) -> None:
        self.batch, self.tokens, self.d = shape
        self.rows, self.eps = rows, eps
        self.projections, self.outs, self.biases, self.folded = ([t.contiguous() for t in ts] for ts in weights)
        self.inner, device = self.projections[0].shape[0], self.projections[0].device
        # a table of modulations with its row stride, 0 if all samples share a row
        tables = [m if m.stride(-1) == 1 else m.contiguous() for m in modulations]
        self.tables = [(m, m.stride(0)) for m in tables]
        self.samples = rows.samples(self.batch, self.tokens, all(stride == 0 for _, stride in self.tables))
        self.stream = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.w, self.attended = (self.stream.new_empty((*shape[:2], self.inner)) for _ in range(2))
        self.sums = torch.empty((self.batch, heads, self.tokens), dtype=torch.float32, device=device)
        self.kernels: list[Any] = []

    def embed(self, x: Tensor, embedding: Sequence[Tensor]) -> None:
        """Embed cells as tokens, and compute the first norm and projection."""
        weight, bias, positions, *cell = embedding
        bias, positions = bias.contiguous(), positions.contiguous()
        channels, genes = x.shape[1:]
        is_shared = len(weight) == 1
        cell_weight, cell_bias = cell or (weight[0], bias)  # without a token for the whole cell they are not read
        shift, scale = self.tables[:2]
        count = self.tokens * triton.cdiv(self.batch, self.rows.rows)
        kernel = narrow_kernels._narrow_embed[(count,)](
            *(x, x.stride(), (weight, 0 if is_shared else weight.stride(0), *weight.stride()[1:])),
            *((bias, 0 if is_shared else self.d), (cell_weight, *cell_weight.stride()), cell_bias.contiguous()),
            *(positions, self.stream, self.w, self.projections[0], (shift, scale), self.batch, self.tokens),
            *(self.tokens - bool(cell), weight.shape[2] // channels, genes, self.eps, self.steps),
            **self.options(1 if self.samples == 1 else 0),
            STEP=STEP,
            STAGES=self.rows.embedding_stages,
            CHANNELS=channels,
        )
        self.kernels.append(kernel)

    def enter(self, x: Tensor) -> None:
        """Copy the stream, and compute the first norm and projection."""
        shift, scale = self.tables[:2]
        kernel = narrow_kernels._narrow_enter[self.grid](
            *(x.contiguous(), self.stream, self.w, self.projections[0], (shift, scale)),
            *(self.batch * self.tokens, self.tokens, self.eps),
            **self.options(self.samples),
        )
        self.kernels.append(kernel)

    def run(self, eta: float, lam: float) -> Run:
        """Run the blocks after the first launch."""
        z = torch.empty_like(self.stream)
        projections = [*self.projections[1:], None]
        for i, weights in enumerate(zip(self.outs, self.biases, self.folded, projections, strict=True)):
            mssa.mssa(self.w, self.attended, self.sums)
            self.chain(self.tables[6 * i + 2 : 6 * i + 8], *weights, z, eta, lam)
        return z, self.kernels

    def chain(
        self,
        tables: Sequence[tuple[Tensor, int]],
        out: Tensor,
        bias: Tensor,
        folded: Tensor,
        projection: Tensor | None,
        z: Tensor,
        eta: float,
        lam: float,
    ) -> None:
        """Launch a block's second part, with the next block's projection or, after the last block, the norm `z`."""
        gate1, shift2, scale2, gate2, shift, scale = tables
        kernel = narrow_kernels._narrow_chain[self.grid](
            *(self.attended, self.stream, z if projection is None else self.w, out, bias, folded, projection),
            *(gate1, (shift2, scale2), gate2, (shift, scale), self.batch * self.tokens, self.tokens),
            *(eta, eta * lam, self.eps, self.steps),
            **self.options(self.samples),
            INNER=max(16, triton.next_power_of_2(self.inner)),
        )
        self.kernels.append(kernel)

    @property
    def grid(self) -> tuple[int]:
        return (triton.cdiv(self.batch * self.tokens, self.rows.rows),)

    @property
    def piece(self) -> int:
        return min(self.rows.piece, triton.next_power_of_2(self.d))

    @property
    def steps(self) -> int:
        """Pieces of a row, as a variable for the kernels: the compiler would unroll a constant number, and spill."""
        return triton.cdiv(self.d, self.piece)

    def options(self, samples: int) -> dict[str, object]:
        return {
            "width": self.d,
            "inner": self.inner,
            "ROWS": self.rows.rows,
            "PIECE": self.piece,
            "COUNT": self.steps,
            "SAMPLES": samples,
            "num_warps": self.rows.warps,
            "num_stages": self.rows.stages,
        }
