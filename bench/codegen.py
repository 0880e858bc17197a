"""Resources of every Triton kernel: registers, shared memory, matrix instructions. Needs no GPU.

    python bench/codegen.py [--arch 80 --arch 90 --arch 100]

This prints a Markdown table of the launches of one block of the published model, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import click
import torch
from drylaunch import Resources, dry, resources
from torch import Tensor

from wbdit.ops import count_step
from wbdit.ops.dispatch import adapter
from wbdit.ops.triton import Triton

ARCHITECTURES = (80, 90, 100)


def launches(
    dtype: torch.dtype,
    batch: int = 4,
    tokens: int = 200,
    d: int = 768,
    heads: int = 8,
    genes: int = 2000,
    levels: int = 27,
    device: torch.device | str = "cpu",
) -> dict[str, Callable[[], object]]:
    """Return a function per op that launches it with arguments of the model's dtypes and the given sizes."""
    from wbdit.kernels import blocks as fused_blocks

    engine = Triton()

    def op(name: str, *args: object) -> Callable[[], object]:
        return lambda: adapter(name)(engine, *args)

    def low(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def wide(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    is_low = dtype == torch.bfloat16
    x, z, lse = wide(batch, tokens, d), low(batch, tokens, d), wide(batch, heads, tokens)
    other, result, dx = low(batch, tokens, d), low(batch, tokens, d), wide(batch, tokens, d)
    gate, shift, scale = (wide(batch, d) for _ in range(3))
    bias, cells = wide(d), wide(batch, 1, genes)
    samples, alpha = torch.zeros(batch, dtype=torch.int64, device=device), wide(batch).sigmoid()
    parts, matrices = [wide(batch, d) for _ in range(8)], [low(d, d)]
    weights = matrices, matrices, [bias], matrices
    values, table = wide(batch, genes), wide(genes, levels)
    present = torch.full((genes,), min(10, levels), dtype=torch.int32, device=device)  # average levels per gene
    tables = (alpha, alpha, table, table, table, wide(levels), present)
    target = torch.zeros(batch, genes, dtype=torch.uint8, device=device)
    edges = torch.arange(levels, dtype=torch.int32, device=device)
    scalars = (1.0, -0.5, 0.25, 2.0, 0.1, None, 7, 3)
    step = {"eta": 0.1, "lam": 0.1, "eps": 1e-6}

    def run_blocks() -> object:
        tiles, *_ = fused_blocks.candidates(x.device)
        return fused_blocks.run_fused(x, parts, weights, heads, 0.1, 0.1, 1e-6, tiles)

    # with one map for all patches, and with one per patch and a token for the whole cell
    patch, update = -(-genes // tokens), {"samples": samples, "a": 1.0, "e": 0.1, "seed": 7, "step": 3}
    embedded = {
        "one map": [wide(1, d, patch), wide(1, d), wide(tokens, d)],
        "own maps": [wide(tokens, patch, d).mT, wide(tokens, d), wide(tokens + 1, d), wide(d, genes), wide(d)],
    }
    read = {
        "one map": [wide(1, patch, d), wide(1, patch)],
        "own maps": [wide(tokens, d, patch).mT, wide(tokens, patch), wide(genes, d), wide(genes)],
    }

    def embed_patches(maps: str) -> Callable[[], object]:
        stream, normed = (low(batch, len(embedded[maps][2]), d) for _ in range(2))
        named = {"shift": shift, "scale": scale, "stream": stream, "z": normed, "eps": 1e-6}
        return lambda: engine.embed_patches(cells, *embedded[maps], **named)

    def read_patches(maps: str, **update: object) -> Callable[[], object]:
        normed = low(batch, len(embedded[maps][2]), d)
        return lambda: engine.read_patches(normed, *read[maps], new=cells, **update)

    ends = {f"embed_patches, {maps}": embed_patches(maps) for maps in embedded}
    ends |= {f"read_patches, {maps}": read_patches(maps) for maps in read}
    ends["read_patches, with the update"] = read_patches("one map", x=cells, **update)

    def count_mean_step() -> object:
        sizes = wide(genes), wide(2, genes), wide(genes), *tables[2:]
        answer, update = wide(batch, 2, genes), (cells, cells, None, samples, *scalars, True)
        return count_step.one_pass(engine, cells, answer, values, values, *sizes, 0.8, 0.6, *update)

    given, grads = {"out": other, "z": z, "gate": gate, "scale": scale, **step}, {"dshift": shift, "dscale": scale}
    return {
        "adaln": op("adaln", x, shift, scale, 1e-6, dtype),
        "adaln_backward": op("adaln_backward", z, x, shift, scale, 1e-6),
        "gated_adaln": op("gated_adaln", x, z, bias, gate, shift, scale, 1e-6),
        "gated_adaln_backward": op("gated_adaln_backward", dx, z, x, other, bias, gate, shift, scale, 1e-6),
        # only the kernels: PyTorch computes the products
        "ista_adaln": lambda: engine.residual_adaln(x, **given, shift=shift, x_new=x, z_new=z),
        "ista_adaln_backward": lambda: engine.residual_adaln_backward(
            result, x, dx_new=dx, **given, dx=dx, dout=other, dgate=gate, **grads
        ),
        "ista": lambda: engine.shrink(z, other, result, 0.1, 0.1),
        "ista_backward": lambda: engine.shrink_backward(z, other, result),
        "mssa": op("mssa", z, heads),
        **({"mssa_backward": op("mssa_backward", other, z, result, lse, heads)} if is_low else {}),
        **({"run_blocks": run_blocks} if is_low and d % 16 == 0 else {}),
        **(ends if is_low else {}),
        **({"denoise": narrow_denoiser(batch, d, heads, genes, device)} if is_low and d % 16 == 0 else {}),
        "noising": op("noising", cells, cells, alpha, alpha),
        "sampler_step": op("sampler_step", cells, cells, cells, None, None, samples, *scalars),
        "normal": op("normal", 7, samples, 3, genes),
        "count_mean": op("count_mean", values, values, values, *tables),
        "count_mean_step": count_mean_step,
        "count_nll": op("count_nll", values, values, values, *tables, target),
        "count_nll_backward": op("count_nll_backward", values, values, values, values, *tables, target),
        "count_draw": op("count_draw", values, values, values, *tables, edges, edges, values, alpha, 4),
    }


def narrow_denoiser(batch: int, d: int, heads: int, genes: int, device: torch.device | str) -> Callable[[], object]:
    """Return a function that runs two blocks of the preset `small`, unless `d` and `heads` are smaller still."""
    from wbdit.kernels import narrow

    d, heads, patch = min(d, narrow.WIDEST), min(heads, 4), 64
    patches = math.ceil(genes / patch)

    def wide(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def run() -> object:
        if not narrow.candidates(torch.device(device)):
            return None  # such a GPU runs narrow models op by op
        own = wide(patches, patch, d).mT, wide(patches, d)
        embedding = *own, wide(patches + 1, d), wide(d, genes), wide(d)
        parts = [part for _ in range(2) for part in wide(batch, 6 * d).chunk(6, 1)] + [*wide(batch, 2 * d).chunk(2, 1)]
        matrices = [wide(d, d).bfloat16() for _ in range(2)]
        weights = matrices, matrices, [wide(d)] * 2, matrices
        rows, *_ = narrow.candidates(torch.device(device))
        return narrow.run_denoiser(wide(batch, 1, genes), parts, embedding, *weights, heads, 0.1, 0.1, 1e-6, rows)

    return run


def compile_op(name: str, arch: int, dtype: torch.dtype, **sizes: int) -> list[Resources]:
    """Compile an op's kernels, by default for the published model's sizes, and return their resources."""
    with dry(arch) as compiled:
        launches(dtype, **sizes)[name]()
    return [resources(kernel, arch) for kernel in compiled]


def table(architectures: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> str:
    """Return the Markdown table of all ops."""
    rows = ["| op | kernel | GPU | warps | registers | shared KiB | spills | matrix | async copies | wide loads |"]
    rows.append("|" + "---|" * 10)
    for name in launches(dtype):
        for arch in architectures:
            for r in compile_op(name, arch, dtype):
                cells = (name, r.name, f"sm_{arch}", r.warps, r.registers, f"{r.shared / 1024:.0f}", r.spills, r.matrix)
                rows.append(f"| {' | '.join(map(str, (*cells, r.asynchronous, r.wide_loads)))} |")
    return "\n".join(rows)


@click.command()
@click.option("--arch", "architectures", type=int, multiple=True, default=ARCHITECTURES, show_default=True)
def main(architectures: tuple[int, ...]) -> None:
    """Print the registers, shared memory and matrix instructions of every kernel as a Markdown table."""
    print(table(architectures))


if __name__ == "__main__":
    main()
