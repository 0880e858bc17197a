"""Roofline of each GPU launch: its bytes over the copy speed or its FLOPs over the product speed, whichever is longer.

    python bench/roofline.py bench/out/gpu-A.jsonl          # beside the times that a run of bench/gpu.sh A measured

Each operand counts as read once and each result as written once. FLOPs are those of matrix products. The ceilings are
those of the run. ``launch_list.py`` takes bytes from the launches themselves and prints predictions before any run;
:func:`costs` gives them by hand, for the rows of that run, and a test compares the two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "gpu"))

H200 = (4.27e12, 660e12)  # bytes and bf16 FLOPs per second, both measured: kernels/README.md
FP32 = 4
LEVELS = 10  # count levels per gene, on average
ROUNDS = 4  # passes of count_draw before the draw


@dataclass(frozen=True)
class Shape:
    """Sizes of a launch: cells, tokens per cell, width, heads, genes."""

    batch: int
    tokens: int
    d: int
    heads: int
    genes: int

    @property
    def values(self) -> int:
        """Number of values in one token tensor."""
        return self.batch * self.tokens * self.d


@dataclass(frozen=True)
class Cost:
    """Bytes that a launch moves and FLOPs of its products."""

    bytes: float
    flops: float = 0.0

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Return the time of the slower of the two."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


def product(rows: int, inner: int, columns: int) -> float:
    """Return the FLOPs of a matrix product."""
    return 2.0 * rows * inner * columns


def attention(tokens: int, values: int, products: int) -> float:
    """Return the FLOPs of products of each sample's tokens with its tokens, over all heads and `values` numbers."""
    return 2.0 * products * values * tokens


def _half_step(given: Mapping[str, Any]) -> float:
    return product(given["count"], given["inner"], given["width"])


def _ends(given: Mapping[str, Any]) -> float:
    """Return the FLOPs of the maps between genes and tokens: one per patch, and one of the whole cell."""
    genes = given["patches"] * given["patch"] + (given["cell_weight_ptr"] is not None) * given["genes"]
    return product(given["batch"], given["channels"] * genes, given["d"])


def _narrow_embed(given: Mapping[str, Any]) -> float:
    whole = given["tokens"] - given["patches"]
    genes = given["CHANNELS"] * (given["patches"] * given["patch"] + whole * given["genes"])
    projection = product(given["samples"] * given["tokens"], given["inner"], given["width"])
    return product(given["samples"], genes, given["width"]) + projection


def _narrow_chain(given: Mapping[str, Any]) -> float:
    projections = 1 if given["weight_ptr"] is None else 2  # after the last block, only the map after attention
    dictionary = product(given["count"], given["width"], given["width"])
    return projections * product(given["count"], given["inner"], given["width"]) + dictionary


# FLOPs of matrix products, by the name of the kernel's function, from the launch's arguments; kernels without products
# need no entry. tests/bench/test_launch_list.py holds that all others have one.
FLOPS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "_mssa_forward": lambda given: attention(given["tokens"], given["w_ptr"].numel(), 2),
    "_hopper_mssa_forward": lambda given: attention(given["tokens"], given["head_desc"].numel(), 2),
    "_mssa_backward": lambda given: attention(given["tokens"], given["w_ptr"].numel(), 5),
    "_block_project": _half_step,
    "_block_half_step": _half_step,
    "_embed_patches": _ends,
    "_read_patches": _ends,
    "_narrow_embed": _narrow_embed,
    "_narrow_enter": _half_step,
    "_narrow_chain": _narrow_chain,
}


def costs(s: Shape, low: int = 2) -> dict[str, Cost]:
    """Return the cost of every launch that `bench/gpu.sh` times, by name; `low` is the bytes per product operand."""
    n, wide = s.values, FP32
    cells = s.batch * s.genes
    step = product(s.batch * s.tokens, s.d, s.d)
    return {
        "adaln": Cost(n * (wide + low)),
        "adaln_backward": Cost(n * (low + 2 * wide)),
        "gated_adaln": Cost(n * 2 * (wide + low)),
        "gated_adaln_backward": Cost(n * (low + 2 * wide + low + wide + low)),
        "ista_adaln": Cost(n * (2 * wide + 3 * low)),
        "ista_adaln_backward": Cost(n * (low + 2 * wide + 2 * low + wide + low)),
        "ista": Cost(n * 3 * low),
        "ista_backward": Cost(n * 3 * low),
        "mssa": Cost(n * 2 * low, attention(s.tokens, n, 2)),
        "mssa_backward": Cost(n * 5 * low, attention(s.tokens, n, 5)),  # the first of two kernels reads two of them
        "block_init": Cost(n * (wide + 2 * low)),
        "block_project": Cost(n * 2 * low, step),
        "block_compress": Cost(n * 4 * low, step),
        "block_sparsify": Cost(n * 4 * low, step),
        "embed_patches": Cost(n * 2 * low + cells * FP32),
        "read_patches": Cost(n * low + cells * 2 * FP32),
        "noising": Cost(cells * 3 * FP32),
        "sampler_step": Cost(cells * 4 * FP32),
        "normal": Cost(cells * FP32),
        "count_mean": Cost(cells * 4 * FP32 + 3 * s.genes * LEVELS * FP32),
        "count_mean_step": Cost(cells * 8 * FP32 + 3 * s.genes * LEVELS * FP32),
        "count_nll": Cost(cells * (4 * FP32 + 1) + 3 * s.genes * LEVELS * FP32),
        "count_draw": Cost((ROUNDS + 1) * (cells + s.genes * LEVELS) * 3 * FP32 + cells * 2 * FP32),
        "count_nll_backward": Cost(cells * (6 * FP32 + 1) + 3 * s.genes * LEVELS * FP32),
    }


def launch_of(row: str) -> str:
    """Return the launch that a row measures: the first word of its name."""
    return row.split()[0].rstrip(",")


def main(arguments: list[str]) -> int:
    """Print predicted and measured times of a file."""
    from rows import read

    path = Path(*arguments[:1])
    if not path.is_file():
        print(f"no file {path}: give one that bench/gpu.sh A wrote", file=sys.stderr)
        return 2
    print("| launch | roofline, us | measured, us | share |\n|---|---|---|---|")
    for line in read(path):
        if "roofline" in line and "seconds" in line:
            share = line["roofline"] / line["seconds"]
            print(f"| {line['row']} | {line['roofline'] * 1e6:.1f} | {line['seconds'] * 1e6:.1f} | {share:.0%} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
